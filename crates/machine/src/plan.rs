//! What each request does to the rows: pure functions from a [`Machine`] to a [`Machine`].
//!
//! ```text
//!   take    Now's leaves are sealed under a new snapshot; Now gets fresh leaves and stands on it
//!   apply   Now gets fresh leaves over a snapshot's layers, its configuration and its memory; the old Now is kept as a snapshot
//!           of its own, or forgotten
//!   delete  a snapshot's row goes; its children re-hang under its parent
//! ```
//!
//! None of them touches a file. Files are made before the rows that name them, and collected after the last row that did
//! ([`crate::garbage`]).

use crate::request::{Problem, ProblemKind};
use crate::tree::{
    Clock, Config, DiskId, Firmware, LayerId, LayerRow, Machine, Run, Snapshot, SnapshotId, SnapshotState, State, Stats,
};
use jiff::{Timestamp, tz::TimeZone};
use std::collections::{BTreeMap, BTreeSet};

/// The longest name, in characters.
pub const NAME_LIMIT: usize = 100;

/// Checks a machine's or a snapshot's name: 1 to 100 characters, no `/`, `@`, control characters or leading `-`.
pub fn check_name(name: &str) -> Result<(), Problem> {
    let fault = if name.is_empty() {
        "a name needs at least one character".to_owned()
    } else if name.trim().is_empty() {
        "a name of blanks cannot be told from another".to_owned()
    } else if name.chars().count() > NAME_LIMIT {
        format!("a name has at most {NAME_LIMIT} characters, this one {}", name.chars().count())
    } else if name.starts_with('-') {
        "a name must not begin with \"-\"".to_owned()
    } else if let Some(c) = name.chars().find(|c| matches!(c, '/' | '@') || c.is_control()) {
        format!(
            "a name must not contain {}",
            if c.is_control() { "control characters".to_owned() } else { format!("\"{c}\"") }
        )
    } else {
        return Ok(());
    };
    Err(Problem::usage(fault))
}

/// A snapshot to be taken of Now.
#[derive(Debug, Clone)]
pub struct Take {
    /// Its id.
    pub id: SnapshotId,
    /// Its name; see [`Machine::snapshot_name`].
    pub name: String,
    /// The user's words.
    pub note: String,
    /// When it was asked for.
    pub created: Timestamp,
    /// What the machine was doing.
    pub vm_state: State,
    /// Its memory, where that exists already (a saved machine's).
    pub memory: Option<LayerId>,
    /// `Creating` while its memory is still to be written.
    pub state: SnapshotState,
}

/// The memory of a snapshot that has been written.
#[derive(Debug, Clone)]
pub struct Written {
    /// The layer that holds it.
    pub layer: LayerRow,
    /// How it went.
    pub stats: Stats,
}

impl Machine {
    /// The snapshot that `name` means: a name, an id, or a unique prefix of an id.
    pub fn resolve(&self, name: &str) -> Result<SnapshotId, Problem> {
        let by_name: Vec<&Snapshot> = self.snapshots.values().filter(|s| s.name == name).collect();
        let matches = if by_name.is_empty() && !name.is_empty() {
            let prefix = name.to_ascii_lowercase().replace('-', "");
            self.snapshots.values().filter(|s| !prefix.is_empty() && s.id.to_string().starts_with(&prefix)).collect()
        } else {
            by_name
        };
        match matches.as_slice() {
            [one] => Ok(one.id),
            [] => Err(self.no_snapshot(name)),
            many => Err(self.ambiguous(name, many)),
        }
    }

    fn no_snapshot(&self, name: &str) -> Problem {
        let problem = Problem::not_found(format!("{} has no snapshot \"{}\"", self.name, shorten(name)));
        match self.snapshots.is_empty() {
            true => problem.hint(format!("tenby snapshot create {}", quoted(&self.name))),
            false => problem.hint(format!("tenby snapshot list {}", quoted(&self.name))),
        }
    }

    fn ambiguous(&self, name: &str, many: &[&Snapshot]) -> Problem {
        let mut many = many.to_vec();
        many.sort_by_key(|s| s.created);
        let label = |s: &Snapshot| {
            let at = s.created.to_zoned(TimeZone::system());
            format!("{} ({})", self.short_id(s.id), at.strftime("%a %-d %b %H:%M"))
        };
        let labels: Vec<String> = many.iter().map(|s| label(s)).collect();
        let mut problem = Problem::new(
            ProblemKind::Ambiguous,
            format!(
                "{} snapshots of {} are named \"{}\": {}",
                count_word(many.len()),
                self.name,
                shorten(name),
                labels.join(", ")
            ),
        );
        problem.candidates = many.iter().map(|s| s.id.to_string()).collect();
        problem
    }

    /// The shortest prefix of at least 4 digits that names this snapshot alone.
    pub fn short_id(&self, id: SnapshotId) -> String {
        let id = id.to_string();
        let unique =
            |n: &usize| self.snapshots.keys().filter(|other| other.to_string().starts_with(&id[..*n])).count() <= 1;
        let length = (4..id.len()).find(unique).unwrap_or(id.len());
        id[..length].to_owned()
    }

    /// The name that a new snapshot gets: the one asked for (checked), or `NAME - (2026-11-23 - 14:03:22)`, with ` (2)` where taken.
    pub fn snapshot_name(&self, asked: Option<&str>, at: Timestamp) -> Result<String, Problem> {
        if let Some(name) = asked {
            check_name(name)?;
            return Ok(name.to_owned());
        }
        let at = at.to_zoned(TimeZone::system());
        let stamp = format!(" - ({})", at.strftime("%Y-%m-%d - %H:%M:%S"));
        let room = NAME_LIMIT - stamp.chars().count() - 6;
        let base = format!("{}{stamp}", self.name.chars().take(room).collect::<String>());
        let taken = |name: &str| self.snapshots.values().any(|s| s.name == name);
        let numbered = (2u32..).map(|n| format!("{base} ({n})"));
        Ok(std::iter::once(base.clone()).chain(numbered).find(|name| !taken(name)).unwrap_or(base))
    }

    /// Takes a snapshot: Now's layers become the snapshot's, `leaves` (fresh, standing on them) become Now's.
    pub fn take(&mut self, take: Take, leaves: Vec<(DiskId, LayerRow)>) {
        let snapshot = self.snapshot_of_now(take);
        let id = snapshot.id;
        self.snapshots.insert(id, snapshot);
        self.set_leaves(leaves);
        self.now.parent = Some(id);
        self.now.under = None;
        self.now.touched = false;
    }

    pub(crate) fn snapshot_of_now(&self, take: Take) -> Snapshot {
        Snapshot {
            id: take.id,
            name: take.name,
            note: take.note,
            parent: self.now.parent,
            under: self.now.under,
            created: take.created,
            state: take.state,
            vm_state: take.vm_state,
            config: self.now.config.clone(),
            disks: self.now.disks.clone(),
            memory: take.memory,
            stats: Stats::default(),
        }
    }

    fn set_leaves(&mut self, leaves: Vec<(DiskId, LayerRow)>) {
        self.now.disks = leaves.iter().map(|(disk, row)| (disk.clone(), row.id)).collect();
        self.layers.extend(leaves.into_iter().map(|(_, row)| (row.id, row)));
    }

    /// A snapshot's memory has been written: it can be applied from now on.
    pub fn ready(&mut self, id: SnapshotId, written: Option<Written>) {
        let Some(snapshot) = self.snapshots.get_mut(&id) else { return };
        snapshot.state = SnapshotState::Ready;
        if let Some(Written { layer, stats }) = written {
            snapshot.memory = Some(layer.id);
            snapshot.stats = stats;
            self.now.memory_base = Some(layer.id);
            self.layers.insert(layer.id, layer);
        }
    }

    /// The machine has come up, in `run`; its RAM is what `memory` holds, if that was loaded. What is still on its way into it is for the caller
    /// to note ([`crate::tree::Now::restoring`]).
    pub fn start(&mut self, state: State, memory: Option<LayerId>, mut run: Run) {
        run.clock = memory.and_then(|layer| self.clock_of(layer, run.since));
        let now = &mut self.now;
        now.state = state;
        now.memory = None;
        now.memory_base = memory;
        now.restoring = None;
        now.run = Some(run);
        now.touched = true;
    }

    /// How the clock goes of a guest that goes on from a memory at some time.
    fn clock_of(&self, layer: LayerId, since: Timestamp) -> Option<Clock> {
        let taken_on = self.layers.get(&layer)?.taken_on.as_ref()?;
        // The host's own clock may have been set back.
        let asleep = u64::try_from(since.duration_since(taken_on.at).as_millis()).unwrap_or(0);
        let applied =
            self.now.parent.and_then(|id| self.snapshots.get(&id)).filter(|snapshot| snapshot.memory == Some(layer));
        let snapshot = applied.map(|snapshot| snapshot.name.clone());
        Some(Clock { behind_ms: taken_on.behind_ms.saturating_add(asleep), since, snapshot })
    }

    /// The machine is off.
    pub fn turn_off(&mut self) {
        let now = &mut self.now;
        // What comes up next is the machine itself.
        now.config.borrowed = None;
        now.state = State::Off;
        now.memory = None;
        now.memory_base = None;
        now.restoring = None;
        now.run = None;
        now.touched = true;
    }

    /// The machine's memory was written and its guest is gone.
    pub fn save(&mut self, written: Written) {
        let now = &mut self.now;
        now.state = State::Saved;
        now.memory = Some(written.layer.id);
        now.memory_base = None;
        now.restoring = None;
        now.run = None;
        now.touched = true;
        self.layers.insert(written.layer.id, written.layer);
    }

    /// A snapshot could not be finished: its row goes. Now's fresh leaves stay, over layers that the collector folds.
    pub fn abandon(&mut self, id: SnapshotId) {
        self.delete(id, false);
        self.now.touched = true;
    }

    /// Keeps Now as a snapshot of its own and leaves Now's leaves to it; to be followed by [`Machine::apply`], which gives Now others.
    pub fn keep(&mut self, take: Take, written: Option<Written>) {
        let id = take.id;
        let snapshot = self.snapshot_of_now(take);
        self.snapshots.insert(id, snapshot);
        self.ready(id, written);
    }

    /// Applies a snapshot: `leaves` stand on its layers. With `memory`, Now is `saved` with the snapshot's memory, if it has one.
    pub fn apply(&mut self, id: SnapshotId, leaves: Vec<(DiskId, LayerRow)>, memory: bool) {
        let Some(snapshot) = self.snapshots.get(&id).cloned() else { return };
        self.set_leaves(leaves);
        let memory = snapshot.memory.filter(|_| memory);
        self.now.parent = Some(id);
        self.now.under = None;
        self.now.config = snapshot.config;
        self.now.config.borrowed.take_if(|_| memory.is_none());
        self.now.state = if memory.is_some() { State::Saved } else { State::Off };
        self.now.memory = memory;
        self.now.memory_base = None;
        self.now.restoring = None;
        self.now.run = None;
        self.now.generation = uuid::Uuid::new_v4();
        // Without its memory Now is not the snapshot's state, though nothing was written yet.
        self.now.touched = snapshot.memory.is_some() && memory.is_none();
    }

    /// The snapshot and, with `subtree`, everything below it; parents first.
    pub fn below(&self, id: SnapshotId, subtree: bool) -> Vec<SnapshotId> {
        let mut found = vec![id];
        let mut next = 0;
        while subtree && next < found.len() {
            let parent = Some(found[next]);
            found.extend(self.snapshots.values().filter(|s| s.parent == parent).map(|s| s.id));
            next += 1;
        }
        found
    }

    /// Deletes a snapshot, or it and everything below; children re-hang under the nearest ancestor that stays.
    pub fn delete(&mut self, id: SnapshotId, subtree: bool) -> Vec<SnapshotId> {
        let gone = self.below(id, subtree);
        let heir = self.snapshots.get(&id).and_then(|s| s.parent);
        for id in &gone {
            self.snapshots.remove(id);
        }
        let orphan = |parent: Option<SnapshotId>| parent.is_some_and(|p| gone.contains(&p));
        for snapshot in self.snapshots.values_mut().filter(|s| orphan(s.parent)) {
            snapshot.parent = heir;
        }
        if orphan(self.now.parent) {
            self.now.parent = heir;
            // What Now stood on is gone: whether it differs from the heir is no longer told by its leaf alone.
            self.now.touched = true;
        }
        gone
    }

    /// The layers from base to `leaf`.
    pub fn chain(&self, leaf: LayerId) -> Vec<LayerId> {
        let mut chain: Vec<LayerId> =
            std::iter::successors(Some(leaf), |id| self.layers.get(id).and_then(|row| row.parent)).collect();
        chain.reverse();
        chain
    }

    /// Some of Now's leaves get fresh ones on top; it stands where it stood.
    pub(crate) fn follow(&mut self, leaves: Vec<(DiskId, LayerRow)>) {
        self.now.disks.extend(leaves.iter().map(|(disk, row)| (disk.clone(), row.id)));
        self.layers.extend(leaves.into_iter().map(|(_, row)| (row.id, row)));
    }

    /// How many layers stand on each.
    pub fn children(&self) -> BTreeMap<LayerId, Vec<LayerId>> {
        let mut children: BTreeMap<LayerId, Vec<LayerId>> = BTreeMap::new();
        for row in self.layers.values() {
            if let Some(parent) = row.parent {
                children.entry(parent).or_default().push(row.id);
            }
        }
        children
    }
}

impl Config {
    /// The disks that a machine of this configuration has layers of: the guest's, and what its firmware keeps.
    pub fn disk_ids(&self) -> BTreeSet<DiskId> {
        let firmware = (self.firmware == Firmware::Uefi).then(DiskId::firmware);
        self.disks.iter().map(|disk| disk.id.clone()).chain(firmware).collect()
    }

    /// The guest's disk of this id.
    pub fn disk(&self, id: &DiskId) -> Option<&crate::tree::Disk> {
        self.disks.iter().find(|disk| &disk.id == id)
    }
}

/// A name as a shell takes it.
pub fn quoted(name: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_.:+,=".contains(c);
    if !name.is_empty() && name.chars().all(plain) {
        name.to_owned()
    } else {
        format!("'{}'", name.replace('\'', "'\\''"))
    }
}

/// A name for a message: never longer than a line.
pub fn shorten(name: &str) -> String {
    let clean: String = name.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    if clean.chars().count() <= 60 { clean } else { format!("{}…", clean.chars().take(60).collect::<String>()) }
}

fn count_word(n: usize) -> String {
    const WORDS: [&str; 10] = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
    WORDS.get(n).map_or_else(|| n.to_string(), |word| (*word).to_owned())
}
