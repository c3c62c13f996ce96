//! `tenby disk check`: what is wrong with an image file, mending it, and taking a repair back.

use super::problem::problem;
use super::{Parents, Place, edit, holding, shown};
use crate::draw::plain;
use crate::out::Out;
use crate::work::{interruptible, look};
use image::check::{self, Finding, Remedy, Report, Severity};
use machine::plan::quoted;
use machine::request::Problem;
use serde::Serialize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::{Folder, Mode};

/// The contract's `disk check`.
#[derive(Debug, Serialize)]
pub(crate) struct Checked {
    #[serde(skip)]
    file: PathBuf,
    /// Whether the image is sound; after the repair, if there was one.
    clean: bool,
    /// What there is to say of it as it stands now.
    findings: Vec<Found>,
    /// Further damage that is not listed.
    #[serde(skip_serializing_if = "is_zero")]
    more: u64,
    /// What a repair has mended.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    repaired: Vec<Found>,
    /// The file with which the repair can be taken back.
    #[serde(skip_serializing_if = "Option::is_none")]
    undo: Option<PathBuf>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands out references")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// One finding.
#[derive(Debug, Serialize)]
struct Found {
    kind: &'static str,
    severity: &'static str,
    r#where: String,
    what: String,
    effect: String,
    /// What a repair does about it, or why it cannot; `null` where nothing is to be done.
    repair: Option<String>,
    /// Whether a repair mends it.
    repairable: bool,
    /// The bytes of the virtual disk that are lost or in doubt.
    ranges: Vec<Stretch>,
}

#[derive(Debug, Serialize)]
struct Stretch {
    offset: u64,
    length: u64,
}

impl From<&Range<u64>> for Stretch {
    fn from(range: &Range<u64>) -> Self {
        Self { offset: range.start, length: range.end - range.start }
    }
}

impl From<&Finding> for Found {
    fn from(finding: &Finding) -> Self {
        let (repair, repairable) = match &finding.remedy {
            Remedy::Nothing => (None, false),
            Remedy::Mend(how) => (Some(how.clone()), true),
            Remedy::Cannot(why) => (Some(format!("not possible: {why}")), false),
        };
        Self {
            kind: finding.kind,
            severity: match finding.severity {
                Severity::Note => "note",
                Severity::Damage => "damage",
            },
            r#where: finding.place.clone(),
            what: finding.what.clone(),
            effect: finding.effect.clone(),
            repair,
            repairable,
            ranges: finding.ranges.iter().map(Stretch::from).collect(),
        }
    }
}

impl Found {
    /// For people: what it is, under `title`, and where; what that means; what a repair does.
    fn draw(&self, title: &str) -> String {
        let repair = self.repair.as_ref().map(|repair| format!("  repair  {}\n", plain(repair))).unwrap_or_default();
        let [what, place, effect] = [&self.what, &self.r#where, &self.effect].map(|text| plain(text));
        format!("{title}: {what} ({})\n  where   {place}\n  effect  {effect}\n{repair}", self.kind)
    }
}

impl Checked {
    fn of(path: &Path, report: &Report) -> Self {
        Self {
            file: path.to_owned(),
            clean: report.clean(),
            findings: report.findings.iter().map(Found::from).collect(),
            more: report.more,
            repaired: Vec::new(),
            undo: None,
        }
    }

    /// Whether the image is sound.
    pub(crate) fn clean(&self) -> bool {
        self.clean
    }

    /// For people.
    pub(crate) fn draw(&self) -> String {
        let file = plain(&self.file.display().to_string());
        let mended = self.repaired.iter().map(|found| found.draw("mended"));
        let mut text: String = mended.chain(self.findings.iter().map(|found| found.draw(found.severity))).collect();
        let mut line = |line: String| text.extend([line.as_str(), "\n"]);
        if self.more > 0 {
            line(format!("damage: {} more findings like these", self.more));
        }
        if let Some(undo) = &self.undo {
            let undo = plain(&undo.display().to_string());
            line(format!(
                "what was written over is kept; to take the repair back: tenby disk check {file} --undo {undo}"
            ));
        }
        if self.clean {
            line(format!("{file} is sound"));
        }
        text
    }

    /// That the image is damaged, and what to do.
    pub(crate) fn problem(&self) -> Problem {
        let damage = self.findings.iter().filter(|found| found.severity == "damage").count() as u64 + self.more;
        let findings = if damage == 1 { "1 finding".to_owned() } else { format!("{damage} findings") };
        let problem = Problem::damaged(format!("{} is damaged: {findings}", self.file.display()));
        if self.findings.iter().any(|found| found.repairable) {
            problem.hint(format!("tenby disk check {} --repair", quoted(&self.file.display().to_string())))
        } else {
            problem
        }
    }
}

/// What is wrong with the image. Nothing is written.
pub(crate) async fn check(path: &Path, out: &Out) -> Result<Checked, Problem> {
    let place = Place::of(path, None, Parents::default())?;
    let store = store::host::open_file(path, Mode::Read).map_err(|error| problem(&error.into()))?;
    let work = move || check::check(&store, place.format).map_err(|error| problem(&error));
    let report = look(out, format!("checking {}", path.display()), work).await?;
    Ok(Checked::of(path, &report))
}

/// Mends what can be mended.
pub(crate) async fn repair(path: &Path, out: &Out) -> Result<Checked, Problem> {
    edit::check_owner(path, out).await?;
    let place = Place::of(path, None, Parents::default())?;
    let (folder, name) = holding(path)?;
    let above = folder.path().to_owned();
    let folder: Arc<dyn Folder> = Arc::new(folder);
    let stamp = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%3fZ").to_string();
    let undo = check::undo_name(&name, &stamp);
    // Not to be broken off, short of a kill: then the next repair takes it back.
    let (what, undo_file) = (format!("repairing {}", path.display()), undo.clone());
    let repair = move |_: &mut dyn FnMut(u64, u64) -> bool| {
        check::repair(&folder, &name, place.format, &undo_file).map_err(|error| problem(&error))
    };
    let done = interruptible(out, what, repair).await?;
    let is_left = |finding: &Finding| done.after.findings.contains(finding);
    let mended = done.before.findings.iter().filter(|finding| done.changed && finding.remedy != Remedy::Nothing);
    Ok(Checked {
        repaired: mended.filter(|finding| !is_left(finding)).map(Found::from).collect(),
        undo: done.changed.then(|| shown(&above.join(&undo).display().to_string())),
        ..Checked::of(path, &done.after)
    })
}

/// Takes a repair back.
pub(crate) async fn take_back(path: &Path, undo: &Path, out: &Out) -> Result<(), Problem> {
    edit::check_owner(path, out).await?;
    let ((folder, name), (undo_folder, undo_name)) = (holding(path)?, holding(undo)?);
    if !folder.is(&undo_folder) {
        let message = format!("{} must lie in the same folder as {}", undo.display(), path.display());
        return Err(Problem::usage(message));
    }
    let folder: Arc<dyn Folder> = Arc::new(folder);
    check::take_back(&folder, &name, &undo_name).map_err(|error| match error.kind {
        image::ErrorKind::Invalid => Problem::refused(format!("{}: {}", shown(&error.file).display(), error.message)),
        _ => problem(&error),
    })
}
