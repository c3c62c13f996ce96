//! `disk reconnect`: a child is told where its parent is.

use super::problem::problem;
use super::{Place, edit, holding, name_below};
use crate::draw::{Look, plain};
use crate::out::Out;
use image::reconnect::Match;
use image::{Error, ErrorKind};
use jiff::Timestamp;
use machine::plan::quoted;
use machine::request::Problem;
use serde::Serialize;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use store::Mode;

/// A child and its parent, and how they fit.
#[derive(Debug, Serialize)]
pub(crate) struct Reconnected {
    file: PathBuf,
    parent: PathBuf,
    /// The id that the child named.
    named: String,
    /// The id that the parent has.
    id: String,
    /// The ids are the same.
    fits: bool,
    /// Both call themselves the same disk, which proves only that they are of one family.
    same_disk: bool,
    /// They were put together all the same.
    forced: bool,
    /// When the parent was last written.
    parent_modified: Option<Timestamp>,
}

/// Writes into `child` that it stands on `parent`, which must lie where it will be looked for.
pub(crate) async fn reconnect(child: &Place, parent: &Place, force: bool, out: &Out) -> Result<Reconnected, Problem> {
    edit::check_owner(&child.path, out).await?;
    let name = name_below(&child.path, parent)?;
    let (own, own_name) = holding(&child.path)?;
    let layers = parent.layers(Mode::Read)?;
    let own_file = own.path().join(&own_name).display().to_string();
    if layers.iter().any(|layer| layer.store().name() == own_file) {
        return Err(Problem::refused(format!("{} stands on {} itself", parent.path.display(), child.path.display())));
    }
    let base = layers.last().expect("an image is a chain of one at least");
    let layer = child.alone(Mode::Write)?;
    let found = image::reconnect::examine(&*layer, &**base).map_err(|error| unfit(&error))?;
    let reconnected = Reconnected {
        file: child.path.clone(),
        parent: parent.path.clone(),
        named: found.named.to_string(),
        id: found.found.to_string(),
        fits: found.fits,
        same_disk: found.same_disk,
        forced: !found.fits,
        parent_modified: modified(&parent.path),
    };
    if !found.fits && !force {
        return Err(refusal(&reconnected, &found));
    }
    image::reconnect::reconnect(&*layer, &**base, &name, force).map_err(|error| problem(&error))?;
    Ok(reconnected)
}

fn modified(path: &Path) -> Option<Timestamp> {
    std::fs::metadata(path).and_then(|data| data.modified()).ok().and_then(|time| Timestamp::try_from(time).ok())
}

/// What can never be a pair is not a matter of ids.
fn unfit(error: &Error) -> Problem {
    let problem = problem(error);
    if error.kind == ErrorKind::Parent { Problem::refused(problem.message) } else { problem }
}

fn refusal(pair: &Reconnected, found: &Match) -> Problem {
    let (child, parent) = (pair.file.display().to_string(), pair.parent.display().to_string());
    let written = pair.parent_modified.map(|at| format!(", last written {}", at.strftime("%Y-%m-%d %H:%M:%S UTC")));
    let family = match found.same_disk {
        true => "they are of the same disk, so it may have been changed since",
        false => "they are not of the same disk",
    };
    Problem::refused(format!(
        "{child} was made over {}, but {parent} is {}{}: {family}",
        pair.named,
        pair.id,
        written.unwrap_or_default()
    ))
    .hint(format!(
        "tenby disk reconnect {} {} --force      (if it has changed since, what is read is a mixture)",
        quoted(&child),
        quoted(&parent)
    ))
}

impl Reconnected {
    /// For people.
    pub(crate) fn draw(&self, look: &Look) -> String {
        let fits = match (self.fits, self.same_disk) {
            (true, _) => "the ids match",
            (false, true) => "forced: the ids differ, the disk is the same",
            (false, false) => "forced: neither the ids nor the disks match",
        };
        let mut text = format!(
            "{} stands on {}\n  named     {}\n  id        {}\n  match     {fits}\n",
            plain(&self.file.display().to_string()),
            plain(&self.parent.display().to_string()),
            self.named,
            self.id
        );
        if let Some(at) = self.parent_modified {
            writeln!(text, "  written   {}", look.date(at)).expect("writing to a string never fails");
        }
        text
    }
}
