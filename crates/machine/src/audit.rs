//! What is wrong with a machine's files: each that the ledger names is there, opens, stands on the one below it and is sound; and no other is
//! there. Nothing is written. With [`deep`], what is sealed reads as was recorded, too.

mod deep;

pub use deep::{Compared, Looked, deep};

use crate::files::Files;
use crate::plan::quoted;
use crate::request::Problem;
use crate::tree::{LayerFormat, LayerId, LayerRow, Machine, State};
use image::check::{Finding as Damage, Severity, check};
use image::{ErrorKind, Format, Layer, gate};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use store::Mode;

/// The most findings of one file that are listed.
const MOST: usize = 3;

/// What an audit came to: the contract's `vm check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// Whether nothing is damaged: there may be notes.
    pub clean: bool,
    /// How many files were looked at.
    pub files: usize,
    /// How much was compared with what was recorded, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compared: Option<Compared>,
    /// What there is to say of them.
    pub findings: Vec<Finding>,
}

/// One thing about one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `missing`, `damaged`, `parent`, `changed`: not as recorded; `unknown`, `unread`: not looked into, for it is being written; `unhashed`: not
    /// compared, for nothing is recorded.
    pub kind: &'static str,
    /// The file.
    #[serde(rename = "where")]
    pub place: String,
    /// What is wrong.
    pub what: String,
    /// What that means for the machine.
    pub effect: String,
    /// What helps.
    pub repair: String,
}

impl Audit {
    /// Adds what a deep look has found.
    pub fn deepen(&mut self, compared: Compared, findings: Vec<Finding>) {
        self.compared = Some(compared);
        self.findings.extend(findings);
        self.clean = self.findings.iter().all(Finding::is_note);
    }
}

impl Finding {
    /// Whether it is only said, and nothing is wrong.
    pub fn is_note(&self) -> bool {
        matches!(self.kind, "unknown" | "unread" | "unhashed")
    }
}

/// Looks at all files of a machine. With a worker, files that it writes just now are not looked into. Those that are `journalled` come and go with
/// the request that made them.
pub fn audit(machine: &Machine, files: &Files, worker: bool, journalled: &[String]) -> Result<Audit, Problem> {
    let mut audit = Auditor {
        machine,
        files,
        written: written(machine, files, worker),
        layers: BTreeMap::new(),
        findings: Vec::new(),
    };
    for row in from_the_base(machine) {
        audit.look(row);
    }
    for file in files.unknown(machine)?.into_iter().filter(|file| !journalled.contains(file)) {
        audit.findings.push(Finding {
            kind: "unknown",
            place: file,
            what: "no row of the ledger names it".to_owned(),
            effect: "none: nothing needs it".to_owned(),
            repair: "remove it if nobody else knows it; Tenby leaves alone what it did not make".to_owned(),
        });
    }
    let findings = audit.findings;
    Ok(Audit { clean: findings.iter().all(Finding::is_note), files: machine.layers.len(), compared: None, findings })
}

/// The layers that a worker writes: the leaves of a guest that runs, and what it merges.
fn written(machine: &Machine, files: &Files, worker: bool) -> BTreeSet<LayerId> {
    let running = matches!(machine.now.state, State::Running | State::Paused);
    let leaves = machine.now.disks.values().filter(|_| running).copied();
    let folds = if worker { fold_members(machine, files) } else { BTreeSet::new() };
    leaves.chain(folds).collect()
}

/// The layers that are to be merged, and may be just now.
fn fold_members(machine: &Machine, files: &Files) -> BTreeSet<LayerId> {
    files.garbage(machine).fold.into_iter().flat_map(|fold| [fold.into, fold.child]).collect()
}

/// Parents before their children.
fn from_the_base(machine: &Machine) -> Vec<&LayerRow> {
    let mut rows: Vec<&LayerRow> = machine.layers.values().collect();
    rows.sort_by_cached_key(|row| (machine.chain(row.id).len(), row.file.clone()));
    rows
}

struct Auditor<'a> {
    machine: &'a Machine,
    files: &'a Files,
    written: BTreeSet<LayerId>,
    /// Those that could be opened.
    layers: BTreeMap<LayerId, Arc<dyn Layer>>,
    findings: Vec<Finding>,
}

impl Auditor<'_> {
    fn look(&mut self, row: &LayerRow) {
        let layer = match self.files.open_layer(row, Mode::Read) {
            Ok(layer) => layer,
            Err(problem) => {
                let kind = if self.files.is_missing(row) { "missing" } else { "damaged" };
                return self.damage(row, kind, problem.message);
            }
        };
        if let Some(parent) = row.parent {
            match self.layers.get(&parent).map(|parent| gate::check_link(&*layer, &**parent)) {
                // What is wrong with the one below was said.
                None | Some(Ok(())) => {}
                Some(Err(error)) => self.damage(row, "parent", error.to_string()),
            }
        }
        self.layers.insert(row.id, Arc::clone(&layer));
        if self.written.contains(&row.id) {
            return self.unread(row, "it is being written");
        }
        let format = (row.format == LayerFormat::Raw).then_some(Format::Raw);
        match check(layer.store(), format) {
            Ok(report) => {
                let damage = report.findings.iter().filter(|found| found.severity == Severity::Damage);
                for Damage { what, place, .. } in damage.take(MOST) {
                    self.damage(row, "damaged", format!("{what} ({place})"));
                }
            }
            Err(error) if error.kind == ErrorKind::Locked => self.unread(row, "somebody writes to it"),
            Err(error) => self.damage(row, "damaged", error.to_string()),
        }
    }

    fn damage(&mut self, row: &LayerRow, kind: &'static str, what: String) {
        let place = self.files.layer_path(row).display().to_string();
        let needed = names_of(self.machine, row.id, |_| true);
        let effect = match needed.as_slice() {
            [] => "none: nothing needs it any more".to_owned(),
            names => format!("{} cannot be relied on", names.join(", ")),
        };
        let repair = match kind {
            "damaged" => format!("tenby disk check {}      (what can be mended)", quoted(&place)),
            _ => "put the right file back, from a backup".to_owned(),
        };
        self.findings.push(Finding { kind, place, what, effect, repair });
    }

    fn unread(&mut self, row: &LayerRow, why: &str) {
        self.findings.push(Finding {
            kind: "unread",
            place: self.files.layer_path(row).display().to_string(),
            what: format!("{why}: it opens, and was not looked into"),
            effect: "none".to_owned(),
            repair: "ask again when the machine is off and nothing is merged".to_owned(),
        });
    }
}

/// The snapshots whose disks or memory stand on a layer, Now, and what can be taken back, as far as `concerned` says so of the topmost layer.
fn names_of(machine: &Machine, layer: LayerId, mut concerned: impl FnMut(LayerId) -> bool) -> Vec<String> {
    let mut stands = |id: &LayerId| machine.chain(*id).contains(&layer) && concerned(*id);
    let mut snapshots: Vec<_> =
        machine.snapshots.values().filter(|s| s.disks.values().chain(&s.memory).any(&mut stands)).collect();
    snapshots.sort_by_cached_key(|s| (s.created, s.name.clone()));
    let now = machine.now.disks.values().chain(&machine.now.memory).any(&mut stands).then(|| "Now".to_owned());
    let trash = machine.trash_by_time().into_iter().filter(|trash| trash.layers().any(|id| stands(&id)));
    let trash = trash.map(|trash| format!("what can be taken back ({})", trash.what));
    snapshots.into_iter().map(|s| s.name.clone()).chain(now).chain(trash).collect()
}
