//! What `vm check --deep` adds: every sealed layer reads as was recorded.
//!
//! Layers are compared from the base upwards, so that what a layer does not hold itself need not be read again, and a block that is not as
//! it was is laid at the door of the one file that changed. The machine goes on meanwhile: where something is found, its rows are looked at
//! again, and what has changed since is compared once more.

use super::{Finding, MOST, fold_members, names_of};
use crate::files::Files;
use crate::records::{Opened, Recorded, sealed};
use crate::request::{Problem, ProblemKind};
use crate::tree::{LayerId, LayerKind, LayerRow, Machine};
use image::hashes::{self, Difference, Hashed, Pages, Record};
use image::{Access, Chain, Layer};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// How often it is begun again because the tree changed.
const TRIES: usize = 20;

/// A machine as it was looked at.
#[derive(Debug, Clone)]
pub struct Looked {
    /// Its rows.
    pub machine: Machine,
    /// Whether a worker has it, which may be merging.
    pub worker: bool,
}

impl Looked {
    /// Whether the files of both are the same, and nobody has begun to change them.
    fn is_like(&self, other: &Self) -> bool {
        let (a, b) = (&self.machine, &other.machine);
        let named = a.snapshots == b.snapshots && a.trash == b.trash && a.now.disks == b.now.disks;
        self.worker == other.worker && a.layers == b.layers && named
    }
}

/// How much was compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Compared {
    /// Layers of which something was recorded, and all that was compared.
    pub layers: usize,
    /// Sealed layers that there are.
    pub sealed: usize,
    /// Bytes that had to be read for it.
    pub bytes: u64,
}

/// Compares all sealed layers with what was recorded of them. `look` looks at the machine, now and whenever something is found; `progress` is
/// told bytes read and to read, and says `false` to stop.
///
/// # Errors
/// `Cancelled` if it was stopped, `Refused` if the tree never stays as it is for long enough, and whatever `look` says.
pub fn deep(
    files: &Files,
    look: &mut dyn FnMut() -> Result<Looked, Problem>,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(Compared, Vec<Finding>), Problem> {
    let mut state = State::default();
    let mut looked = look()?;
    for _ in 0..TRIES {
        let compared = Comparison::new(files, &looked, &mut state).run(look, progress)?;
        match compared {
            Some(changed) => looked = changed,
            None => return Ok(state.told(files, &looked.machine)),
        }
    }
    Err(Problem::refused(format!("the files of {} change too often just now to be compared", looked.machine.name)))
}

/// What was found so far.
#[derive(Debug, Default)]
struct State {
    /// The layers that need not be looked at again, and how far each was compared, bytes.
    done: BTreeMap<LayerId, u64>,
    /// Layers, and where their blocks begin that are not as recorded.
    differs: BTreeSet<(LayerId, u64)>,
    /// Whose data that is.
    blamed: BTreeMap<LayerId, Vec<Blame>>,
    notes: Vec<Finding>,
    layers: usize,
    bytes: u64,
}

/// A range of a layer's disk that is not as recorded.
#[derive(Debug, PartialEq)]
struct Blame {
    range: Range<u64>,
    /// Layers below, of which nothing is recorded there: it may be their data that changed.
    or: Vec<LayerId>,
}

/// A comparison while the tree stays as it is.
struct Comparison<'a> {
    files: &'a Files,
    looked: &'a Looked,
    state: &'a mut State,
    merged: BTreeSet<LayerId>,
    opened: Opened<'a>,
    total: u64,
}

/// What came of a layer.
enum Outcome {
    /// Not read, and why.
    Left(Finding),
    Read {
        done: u64,
        differences: Vec<Difference>,
        note: Option<Finding>,
    },
}

impl<'a> Comparison<'a> {
    fn new(files: &'a Files, looked: &'a Looked, state: &'a mut State) -> Self {
        let machine = &looked.machine;
        let merged = if looked.worker { fold_members(machine, files) } else { BTreeSet::new() };
        Self { files, looked, state, merged, opened: Opened::new(files, machine), total: 0 }
    }

    /// All layers that were not looked at yet. The machine as it is now, if that is why something is not as it was.
    fn run(
        mut self,
        look: &mut dyn FnMut() -> Result<Looked, Problem>,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Option<Looked>, Problem> {
        let looked = self.looked;
        let rows = sealed(&looked.machine, self.files);
        let rows: Vec<&LayerRow> = rows.into_iter().filter(|row| !self.state.done.contains_key(&row.id)).collect();
        self.total = self.state.bytes + rows.iter().map(|row| self.to_read(row)).sum::<u64>();
        for row in rows {
            let outcome = self.look_at(row, progress);
            let troubled = match &outcome {
                Ok(Outcome::Read { differences, .. }) => !differences.is_empty(),
                Ok(Outcome::Left(_)) => false,
                Err(problem) if problem.kind == ProblemKind::Cancelled => return outcome.map(|_| None),
                Err(_) => true,
            };
            if troubled {
                let now = look()?;
                if !now.is_like(looked) {
                    return Ok(Some(now));
                }
            }
            self.note(row, outcome);
        }
        Ok(None)
    }

    /// How much has to be read of a layer, as far as that can be said.
    fn to_read(&self, row: &LayerRow) -> u64 {
        if row.kind == LayerKind::Memory {
            return self.files.pages(row.id).record().map_or(0, |pages| pages.to_read());
        }
        let Some(record) = self.files.record(row.id).record() else { return 0 };
        let below =
            row.parent.and_then(|id| self.files.record(id).record()).filter(|below| below.key() == record.key());
        let Ok(layer) = self.files.open_layer(row, store::Mode::Read) else { return 0 };
        hashes::to_read(&*layer, below.as_ref(), record.done()).unwrap_or(0)
    }

    fn look_at(&mut self, row: &LayerRow, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<Outcome, Problem> {
        match row.kind {
            LayerKind::Disk => match self.recorded(row, self.files.record(row.id)) {
                Ok(record) => self.look_at_disk(row, &record, progress),
                Err(note) => Ok(Outcome::Left(note)),
            },
            LayerKind::Memory => match self.recorded(row, self.files.pages(row.id)) {
                Ok(pages) => self.look_at_memory(row, &pages, progress),
                Err(note) => Ok(Outcome::Left(note)),
            },
        }
    }

    fn recorded<R>(&self, row: &LayerRow, recorded: Recorded<R>) -> Result<R, Finding> {
        match recorded {
            Recorded::Record(record) => Ok(record),
            Recorded::Nothing => Err(self.unhashed(row, "nothing is recorded of it yet")),
            Recorded::Damaged(why) => {
                let what = format!("its record of hashes is damaged ({why}) and is made anew");
                Err(self.unhashed(row, &what))
            }
        }
    }

    /// Opens a layer with what it stands on, base first.
    fn open(&mut self, row: &LayerRow) -> Result<Vec<Arc<dyn Layer>>, Finding> {
        if self.looked.machine.chain(row.id).iter().any(|id| self.merged.contains(id)) {
            return Err(self.unread(row, "it, or what it stands on, is being merged"));
        }
        // What is wrong the audit says.
        self.opened.chain(row.id).map_err(|problem| self.unread(row, &problem.message))
    }

    fn look_at_memory(
        &mut self,
        row: &LayerRow,
        pages: &Pages,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Outcome, Problem> {
        let layers = match self.open(row) {
            Ok(layers) => layers,
            Err(note) => return Ok(Outcome::Left(note)),
        };
        let chain = Chain::new(layers, Access::Read)?;
        let mut differences = Vec::new();
        let whole = pages.compare(&chain, &mut self.told(progress), &mut |found| differences.push(found))?;
        if !whole {
            return Err(cancelled());
        }
        let is_whole = pages.is_whole(row.parent.map(|id| id.0));
        let note = (!is_whole).then(|| self.unhashed(row, "not all of its pages are recorded yet"));
        Ok(Outcome::Read { done: chain.size(), differences, note })
    }

    /// Counts what is read, and tells of it.
    fn told(&mut self, progress: &mut dyn FnMut(u64, u64) -> bool) -> impl FnMut(u64) -> bool {
        let (bytes, total) = (&mut self.state.bytes, self.total);
        move |read| {
            *bytes += read;
            progress(*bytes, total.max(*bytes))
        }
    }

    fn look_at_disk(
        &mut self,
        row: &LayerRow,
        record: &Record,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Outcome, Problem> {
        let layers = match self.open(row) {
            Ok(layers) => layers,
            Err(note) => return Ok(Outcome::Left(note)),
        };
        let below = row.parent.filter(|id| self.state.done.get(id).is_some_and(|done| *done > 0));
        let below = below.and_then(|id| self.files.record(id).record());
        let mut differences = Vec::new();
        let mut open = || Ok::<_, Problem>(layers.clone());
        let hashed =
            Hashed { layer: &**layers.last().expect("a chain has a top"), below: below.as_ref(), open: &mut open };
        let whole = hashes::compare(record, hashed, &mut self.told(progress), &mut |found| differences.push(found))?;
        if !whole {
            return Err(cancelled());
        }
        let note = (!record.is_complete()).then(|| {
            let what = format!("only its first {} of {} bytes are recorded so far", record.done(), record.size());
            self.unhashed(row, &what)
        });
        Ok(Outcome::Read { done: record.done(), differences, note })
    }

    fn note(&mut self, row: &LayerRow, outcome: Result<Outcome, Problem>) {
        let (done, note) = match outcome {
            Ok(Outcome::Left(note)) => (0, Some(note)),
            Ok(Outcome::Read { done, differences, note }) => {
                for found in &differences {
                    self.blame(row, found);
                }
                self.state.layers += 1;
                (done, note)
            }
            Err(problem) => {
                let names = names_of(&self.looked.machine, row.id, |_| true);
                let what = format!("it cannot be compared with what was recorded: {problem}");
                (0, Some(finding("changed", self.files, row, what, &names)))
            }
        };
        self.state.notes.extend(note);
        self.state.done.insert(row.id, done);
    }

    /// Finds whose data it is that changed: that of a layer is as it was, as long as the layer itself reads as recorded there.
    fn blame(&mut self, row: &LayerRow, Difference { range, layers }: &Difference) {
        let chain = self.looked.machine.chain(row.id);
        let state = &mut *self.state;
        let sound = |id: &LayerId| {
            let compared = *id != row.id && state.done.get(id).is_some_and(|done| range.start < *done);
            compared && !state.differs.contains(&(*id, range.start))
        };
        let holders = layers.iter().rev().filter_map(|at| chain.get(*at));
        let mut suspects: Vec<LayerId> = holders.filter(|id| !sound(id)).copied().collect();
        state.differs.insert((row.id, range.start));
        let known = |id: &LayerId| {
            state.blamed.get(id).is_some_and(|all| all.iter().any(|blame| blame.range.contains(&range.start)))
        };
        if suspects.iter().any(known) {
            return;
        }
        if suspects.is_empty() {
            // It reads as zeros, or as something that is as it was: then it is the layer that says so wrongly.
            suspects.push(row.id);
        }
        let or = suspects.split_off(1);
        let blamed = state.blamed.entry(suspects[0]).or_default();
        match blamed.last_mut() {
            Some(last) if last.range.end == range.start && last.or == or => last.range.end = range.end,
            _ => blamed.push(Blame { range: range.clone(), or }),
        }
    }

    fn unhashed(&self, row: &LayerRow, what: &str) -> Finding {
        Finding {
            kind: "unhashed",
            place: self.files.layer_path(row).display().to_string(),
            what: format!("{what}: it was not compared"),
            effect: "none".to_owned(),
            repair: "hashes are made in the background: ask again later".to_owned(),
        }
    }

    fn unread(&self, row: &LayerRow, why: &str) -> Finding {
        Finding {
            kind: "unread",
            place: self.files.layer_path(row).display().to_string(),
            what: format!("it was not compared with what was recorded: {why}"),
            effect: "none".to_owned(),
            repair: "ask again when the machine is off and nothing is merged".to_owned(),
        }
    }
}

fn cancelled() -> Problem {
    Problem::new(ProblemKind::Cancelled, "the check was cancelled; nothing was changed")
}

impl State {
    fn told(self, files: &Files, machine: &Machine) -> (Compared, Vec<Finding>) {
        let compared = Compared { layers: self.layers, sealed: self.done.len(), bytes: self.bytes };
        let mut findings = Vec::new();
        let mut opened = Opened::new(files, machine);
        for (id, blames) in &self.blamed {
            let Some(row) = machine.layers.get(id) else { continue };
            for Blame { range, or } in blames.iter().take(MOST) {
                let names = names_of(machine, *id, |leaf| shows(&mut opened, machine, leaf, *id, range));
                findings.push(finding("changed", files, row, changed(files, machine, row, range, or), &names));
            }
            if let Some(more) = blames.len().checked_sub(MOST).filter(|more| *more > 0) {
                let names = names_of(machine, *id, |_| true);
                let what = format!("{more} more ranges are not as recorded");
                findings.push(finding("changed", files, row, what, &names));
            }
        }
        findings.extend(self.notes);
        (compared, findings)
    }
}

fn changed(files: &Files, machine: &Machine, row: &LayerRow, range: &Range<u64>, or: &[LayerId]) -> String {
    let disk = if row.kind == LayerKind::Memory { "memory disk" } else { "disk" };
    let what = format!("bytes {} to {} of its {disk} are not as recorded", range.start, range.end - 1);
    let path = |id: &LayerId| machine.layers.get(id).map(|row| files.layer_path(row).display().to_string());
    match or.iter().filter_map(path).collect::<Vec<_>>().as_slice() {
        [] => what,
        others => format!("{what}; or it is {} that changed, of which nothing is recorded", others.join(" or ")),
    }
}

fn finding(kind: &'static str, files: &Files, row: &LayerRow, what: String, names: &[String]) -> Finding {
    let effect = match names {
        [] => "none: nothing reads that any more".to_owned(),
        names => format!("{} cannot be relied on", names.join(", ")),
    };
    let place = files.layer_path(row).display().to_string();
    Finding { kind, place, what, effect, repair: "put the right file back, from a backup".to_owned() }
}

/// Whether a layer shows data of another one that it stands on somewhere in a range. If that cannot be said, it may.
fn shows(opened: &mut Opened<'_>, machine: &Machine, leaf: LayerId, holder: LayerId, range: &Range<u64>) -> bool {
    let runs = opened.chain(leaf).and_then(|layers| {
        let chain = Chain::new(layers, Access::Read)?;
        let end = range.end.min(chain.size());
        Ok(if range.start < end { chain.runs(range.start, end - range.start, usize::MAX)? } else { Vec::new() })
    });
    let at = machine.chain(leaf).iter().position(|id| *id == holder);
    runs.map_or(true, |runs| runs.iter().any(|run| run.layer.is_some() && run.layer == at))
}
