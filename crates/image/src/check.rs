//! Checking an image file, and mending what can be mended.
//!
//! ```text
//!   check:   file ──► survey: findings + plan                                        (nothing is written)
//!   repair:  survey ──► plan seen as done, surveyed again ──► undo file ──► the file ──► surveyed again
//!   undo:    undo file ──► the file as it was
//! ```
//!
//! A format looks at the file leniently, names everything that is wrong, and works out what would mend it: a [`Plan`] of new
//! bytes. Nothing here knows formats but [`survey`]; nothing in a format's checker writes.
//!
//! Rules:
//! - A repair is tried on a view of the file first. If that view is not better, nothing is written.
//! - The old bytes of all that a repair writes are durable in the undo file before the first byte is written. A repair that was
//!   cut off is taken back by the next one before it begins.
//! - What cannot be known is not guessed in silence: a finding says what is lost, in bytes of the virtual disk.

mod plan;
mod undo;

pub(crate) use plan::{Plan, Planned};

use crate::open::{Signature, probe};
use crate::{Error, ErrorKind, Format, Result, vhd, vhdx};
use std::ops::Range;
use std::sync::Arc;
use store::{Folder, Lock, Mode, Store};
use undo::Undo;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Worth knowing; the image is sound.
    Note,
    /// The image breaks its format's rules.
    Damage,
}

/// What a repair does about a finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remedy {
    /// Nothing, and nothing is needed.
    Nothing,
    /// It mends it, like this.
    Mend(String),
    /// It cannot, because of this.
    Cannot(String),
}

/// One thing about an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// What it is, as one word for programs; see `docs/formats/check.md`.
    pub kind: &'static str,
    /// Where it is: a structure, block numbers, file offsets in bytes.
    pub place: String,
    /// What is wrong.
    pub what: String,
    /// What it means for the data.
    pub effect: String,
    /// The bytes of the virtual disk whose content is lost or in doubt. Empty if there are none, or if it is not known which.
    pub ranges: Vec<Range<u64>>,
    /// What a repair does about it.
    pub remedy: Remedy,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The format that the file was checked as.
    pub format: Format,
    /// At most [`Report::MOST`] findings.
    pub findings: Vec<Finding>,
    /// Findings that are not listed; if there are any, the image is not clean.
    pub more: u64,
}

impl Report {
    /// The most findings that are listed one by one. (Neighbouring blocks with the same fault are one finding.)
    pub const MOST: usize = 1000;

    pub(crate) fn new(format: Format) -> Self {
        Self { format, findings: Vec::new(), more: 0 }
    }

    /// Whether nothing is wrong: there may be notes.
    pub fn clean(&self) -> bool {
        self.more == 0 && self.damage().next().is_none()
    }

    /// The findings that are damage.
    pub fn damage(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.severity == Severity::Damage)
    }

    pub(crate) fn add(&mut self, finding: Finding) {
        if self.findings.len() < Self::MOST {
            self.findings.push(finding);
        } else if finding.severity == Severity::Damage {
            self.more += 1;
        }
    }
}

/// What a format's checker comes to.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) report: Report,
    /// What mends all findings that can be mended.
    pub(crate) plan: Plan,
}

/// Looks at a file as what its signature says, or, where that is gone, as what it looks like.
fn survey(store: &Arc<dyn Store>, format: Option<Format>) -> Result<Survey> {
    let refuse = |message: String| Err(Error::new(ErrorKind::Unsupported, store.name(), message));
    match (probe(&**store)?, format) {
        (None, _) if store.is_empty()? => {
            Err(Error::new(ErrorKind::Damaged, store.name(), "it is empty, and there is nothing to check"))
        }
        (Some(Signature::Vhdx), None | Some(Format::Vhdx)) => vhdx::check::survey(store),
        (None, None | Some(Format::Vhdx)) if vhdx::check::looks_like_one(&**store)? => vhdx::check::survey(store),
        (Some(Signature::Vhd), None | Some(Format::Vhd)) => vhd::check::survey(store),
        (None, None | Some(Format::Vhd)) if vhd::check::looks_like_one(&**store)? => vhd::check::survey(store),
        // Raw bytes have no rules that they could break.
        (None, Some(Format::Raw)) => Ok(Survey { report: Report::new(Format::Raw), plan: Plan::default() }),
        (Some(Signature::Foreign(name)), _) => refuse(format!("it is a {name} image, which is not checked here yet")),
        (Some(Signature::Vhdx), Some(_)) => refuse("its signature says VHDX".to_owned()),
        (Some(Signature::Vhd), _) => refuse("its signature says VHD".to_owned()),
        (None, _) => refuse(
            "it has no signature of an image format (and a fixed VHD whose end was lost cannot be told from raw bytes)"
                .to_owned(),
        ),
    }
}

/// Checks an image file. Nothing is written; a shared lock is taken. Parents are not looked at.
///
/// `format` is needed only for a file without a signature.
///
/// # Errors
/// [`ErrorKind::Locked`] if somebody writes to the file, [`ErrorKind::Unsupported`] if it is of no format that is checked here,
/// and what reading it said. Damage is not an error.
pub fn check(store: &Arc<dyn Store>, format: Option<Format>) -> Result<Report> {
    store.lock(Lock::Shared)?;
    Ok(survey(store, format)?.report)
}

/// What a repair did.
#[derive(Debug)]
pub struct Repaired {
    /// What was found.
    pub before: Report,
    /// What is left.
    pub after: Report,
    /// Whether the file was changed; then it can be taken back with the undo file.
    pub changed: bool,
}

/// Mends what can be mended in the image `name`, and writes a log that is in use into its place. The file is locked.
///
/// The bytes that are written over are kept in the new file `undo` beside it, durable before the first change; if nothing is to
/// be changed, there is none. `undo` is to be [`undo_name`]'s: a repair that was cut off is found by it and taken back first.
///
/// # Errors
/// As [`check`]; [`ErrorKind::Damaged`] if what was worked out would not make the image better, nothing being changed then. After an
/// error of a write or a sync the image may be changed by halves; calling this again, or [`take_back`], is the way out.
pub fn repair(folder: &Arc<dyn Folder>, name: &str, format: Option<Format>, undo: &str) -> Result<Repaired> {
    let store = folder.open(name, Mode::Write)?;
    store.lock(Lock::Exclusive)?;
    take_back_unfinished(folder, name, &*store)?;
    let Survey { report: before, plan } = survey(&store, format)?;
    if plan.is_empty() {
        return Ok(Repaired { after: before.clone(), before, changed: false });
    }
    let plan = Arc::new(plan);
    let view: Arc<dyn Store> = Arc::new(Planned::new(Arc::clone(&store), Arc::clone(&plan))?);
    check_better(&store.name(), &before, &survey(&view, format)?.report)?;
    drop(view);
    let undo = Undo::make(folder, undo, &*store, &plan)?;
    plan.carry_out(&*store)?;
    undo.finish()?;
    let after = survey(&store, format)?.report;
    Ok(Repaired { before, after, changed: true })
}

/// Takes a repair of the image `name` back with its undo file, which is removed.
///
/// # Errors
/// [`ErrorKind::Invalid`] if `undo` is no undo file of this image as it stands: it was changed since. Nothing is changed then.
pub fn take_back(folder: &Arc<dyn Folder>, name: &str, undo: &str) -> Result<()> {
    let store = folder.open(name, Mode::Write)?;
    store.lock(Lock::Exclusive)?;
    let file = folder.open(undo, Mode::Write)?;
    let invalid = |message: String| Error::new(ErrorKind::Invalid, store.name(), message);
    let undo_file = Undo::open(file)?.ok_or_else(|| invalid(format!("{undo} is no undo file of a repair")))?;
    if !undo_file.fits(&*store)? {
        return Err(invalid(format!("it was changed since the repair that {undo} can take back")));
    }
    undo_file.take_back(&*store)?;
    folder.unlink(undo)?;
    Ok(folder.sync()?)
}

/// What the names of an image's undo files begin with.
fn undo_prefix(name: &str) -> String {
    format!("{name}.undo-")
}

/// The name of an undo file for the image `name`, made different from others by `stamp`.
pub fn undo_name(name: &str, stamp: &str) -> String {
    format!("{}{stamp}", undo_prefix(name))
}

/// Takes back what a repair that was cut off has done by halves.
fn take_back_unfinished(folder: &Arc<dyn Folder>, name: &str, store: &dyn Store) -> Result<()> {
    let prefix = undo_prefix(name);
    for undo in folder.list()?.into_iter().filter(|other| other.starts_with(&prefix)) {
        // Something else may bear such a name.
        let Ok(file) = folder.open(&undo, Mode::Write) else { continue };
        let Some(file) = Undo::open(file)? else { continue };
        // An image that went on after the cut is not taken back under its user's feet.
        if !file.finished() && file.fits(store)? {
            file.take_back(store)?;
            folder.unlink(&undo)?;
            folder.sync()?;
        }
    }
    Ok(())
}

/// Fails unless all that was to be mended is, and nothing else came up.
fn check_better(file: &str, before: &Report, after: &Report) -> Result<()> {
    let was_there = |finding: &Finding| {
        before.damage().any(|old| {
            matches!(old.remedy, Remedy::Cannot(_)) && (old.kind, &old.place) == (finding.kind, &finding.place)
        })
    };
    // What was not listed before may be listed now.
    let listed = before.more == 0;
    match after.damage().find(|finding| matches!(finding.remedy, Remedy::Mend(_)) || listed && !was_there(finding)) {
        None => Ok(()),
        Some(left) => {
            let message = format!("the repair was given up, nothing was changed: it would leave {}", left.what);
            Err(Error::new(ErrorKind::Damaged, file, message))
        }
    }
}
