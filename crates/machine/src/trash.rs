//! What was deleted or discarded and can still be taken back. Pure.
//!
//! ```text
//!   delete, discard, remove a disk ──► a row here, which names the layers: they are no garbage
//!                                        ├──► undo: what the row holds is back
//!                                        └──► its time is over, or the disk is full: the row goes, and the collector does the rest
//! ```
//!
//! How long is a setting of the machine ([`Policy::undo_for`](crate::tree::Policy::undo_for)). It counts for what is here already, too: a
//! shorter time lets it go earlier, 0 at once.

use crate::plan::{NAME_LIMIT, Take, quoted, shorten};
use crate::request::Problem;
use crate::tree::{Disk, DiskId, LayerId, LayerRow, Machine, Snapshot, SnapshotId, SnapshotState, TrashId};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Snapshots were deleted.
    Deleted,
    /// The present was replaced by a snapshot, and not kept; or was turned off while it was saved.
    Discarded,
    /// A disk was removed.
    Removed,
}

/// Something that can be taken back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trash {
    /// Who it is.
    pub id: TrashId,
    /// What was done.
    pub kind: Kind,
    /// The same for people: `deleted Monday`.
    pub what: String,
    /// When.
    pub at: Timestamp,
    /// Snapshots: those that were deleted, or the present that was discarded.
    pub snapshots: Vec<Snapshot>,
    /// A disk that was removed.
    pub disk: Option<(Disk, LayerId)>,
}

impl Trash {
    fn new(kind: Kind, what: String, at: Timestamp) -> Self {
        Self { id: TrashId::new(), kind, what, at, snapshots: Vec::new(), disk: None }
    }

    /// The layers that it holds.
    pub fn layers(&self) -> impl Iterator<Item = LayerId> {
        let disk = self.disk.iter().map(|(_, layer)| *layer);
        self.snapshots.iter().flat_map(Snapshot::layers).chain(disk)
    }
}

impl Machine {
    /// Deletes a snapshot, or it and everything below. It can be taken back, if the machine's setting says so.
    pub fn throw_away(&mut self, id: SnapshotId, subtree: bool, at: Timestamp) {
        if self.policy.undo_for == 0 {
            self.delete(id, subtree);
            return;
        }
        let gone = self.below(id, subtree);
        let names: Vec<String> =
            gone.iter().filter_map(|id| self.snapshots.get(id)).map(|snapshot| shorten(&snapshot.name)).collect();
        self.hold(&gone, Trash::new(Kind::Deleted, format!("deleted {}", listed(&names)), at));
    }

    /// Turns off a saved machine, and keeps what it was: as a snapshot that is thrown away as soon as it is taken, `take`. Now stands on that, on
    /// `leaves`.
    pub fn set_aside(&mut self, take: Take, leaves: Vec<(DiskId, LayerRow)>) {
        let (id, at) = (take.id, take.created);
        self.take(take, leaves);
        self.hold(&[id], Trash::new(Kind::Discarded, "discarded what was saved".to_owned(), at));
        self.turn_off();
    }

    /// These snapshots are no longer of the tree, but of `trash`.
    fn hold(&mut self, gone: &[SnapshotId], mut trash: Trash) {
        trash.snapshots = gone.iter().filter_map(|id| self.snapshots.remove(id)).collect();
        self.trash.insert(trash.id, trash);
        self.hang();
    }

    /// Gives up what could be taken back.
    pub fn give_up(&mut self, id: TrashId) {
        let Some(trash) = self.trash.remove(&id) else { return };
        let gone: BTreeMap<SnapshotId, Option<SnapshotId>> =
            trash.snapshots.iter().map(|snapshot| (snapshot.id, snapshot.stood_on())).collect();
        let remaining = |mut parent: Option<SnapshotId>| {
            while let Some(next) = parent.and_then(|id| gone.get(&id)) {
                parent = *next;
            }
            parent
        };
        let thrown_away = self.trash.values_mut().flat_map(|trash| &mut trash.snapshots);
        for snapshot in self.snapshots.values_mut().chain(thrown_away) {
            (snapshot.parent, snapshot.under) = (remaining(snapshot.stood_on()), None);
        }
        (self.now.parent, self.now.under) = (remaining(self.now.under.or(self.now.parent)), None);
        self.hang();
    }

    /// Hangs each snapshot, and Now, under the nearest that is still there of what they stood on; what they stood on is remembered as long as
    /// it can be taken back.
    fn hang(&mut self) {
        let there: BTreeSet<SnapshotId> = self.snapshots.keys().copied().collect();
        let thrown_away = self.trash.values().flat_map(|trash| &trash.snapshots);
        let thrown_away: BTreeMap<SnapshotId, Option<SnapshotId>> = thrown_away.map(|s| (s.id, s.stood_on())).collect();
        let nearest = |mut parent: Option<SnapshotId>| {
            while let Some(id) = parent.filter(|id| !there.contains(id)) {
                parent = thrown_away.get(&id).copied().flatten();
            }
            parent
        };
        for snapshot in self.snapshots.values_mut() {
            let stood_on = snapshot.stood_on();
            snapshot.parent = nearest(stood_on);
            snapshot.under = stood_on.filter(|_| snapshot.parent != stood_on);
        }
        let now = &mut self.now;
        let stood_on = now.under.or(now.parent);
        // What Now stands on is another: whether it differs from that is no longer told by its leaf alone.
        now.touched |= now.parent != nearest(stood_on);
        now.parent = nearest(stood_on);
        now.under = stood_on.filter(|_| now.parent != stood_on);
    }

    /// Notes the present, which is about to be replaced by `target`: it can be taken back as a snapshot. Its memory comes back only if it is
    /// written already (a saved machine's).
    pub fn note_discarded(&mut self, target: SnapshotId, at: Timestamp) {
        let Some(target) = self.snapshots.get(&target) else { return };
        self.note_discarded_for(&target.name.clone(), at);
    }

    /// The same, where that is named so.
    pub fn note_discarded_for(&mut self, target: &str, at: Timestamp) {
        let clean = target.replace('@', " of ");
        let name: String = format!("before {clean}").chars().take(NAME_LIMIT).collect();
        let what = format!("discarded Now for {}", shorten(target));
        let memory = self.now.memory;
        let snapshot = self.snapshot_of_now(Take {
            id: SnapshotId::new(),
            name,
            note: String::new(),
            created: at,
            vm_state: self.now.state,
            memory,
            state: SnapshotState::Ready,
        });
        let trash = Trash { snapshots: vec![snapshot], ..Trash::new(Kind::Discarded, what, at) };
        self.trash.insert(trash.id, trash);
    }

    /// Notes a disk that is about to be removed from Now.
    pub fn note_removed(&mut self, disk: &Disk, leaf: LayerId, at: Timestamp) {
        if self.policy.undo_for > 0 {
            let what = format!("removed {}", disk.id);
            let trash = Trash { disk: Some((disk.clone(), leaf)), ..Trash::new(Kind::Removed, what, at) };
            self.trash.insert(trash.id, trash);
        }
    }

    /// Until when something can be taken back.
    pub fn until(&self, trash: &Trash) -> Timestamp {
        let time = SignedDuration::from_secs(i64::try_from(self.policy.undo_for).unwrap_or(i64::MAX));
        trash.at.saturating_add(time).unwrap_or(Timestamp::MAX)
    }

    /// What cannot be taken back any more at `now`.
    pub fn expired(&self, now: Timestamp) -> Vec<TrashId> {
        self.trash.values().filter(|trash| self.until(trash) <= now).map(|trash| trash.id).collect()
    }

    /// What can be taken back, oldest first.
    pub fn trash_by_time(&self) -> Vec<&Trash> {
        let mut all: Vec<&Trash> = self.trash.values().collect();
        all.sort_by_key(|trash| (trash.at, trash.id));
        all
    }

    /// What `name` means of what can be taken back: an id, how it begins, or the name of a snapshot that was deleted, the latest of that name.
    /// Without a name, the latest of all.
    pub fn resolve_trash(&self, name: Option<&str>) -> Result<TrashId, Problem> {
        let all = self.trash_by_time();
        let Some(latest) = all.last() else { return Err(self.nothing_to_undo()) };
        let Some(name) = name else { return Ok(latest.id) };
        let holds = |trash: &&&Trash| trash.snapshots.iter().any(|snapshot| snapshot.name == name);
        if let Some(trash) = all.iter().rev().find(holds) {
            return Ok(trash.id);
        }
        let prefix = name.to_ascii_lowercase().replace('-', "");
        let begins = |trash: &&&Trash| !prefix.is_empty() && trash.id.to_string().starts_with(&prefix);
        let found: Vec<_> = all.iter().filter(begins).collect();
        if let [one] = found.as_slice() {
            return Ok(one.id);
        }
        let words = format!("\"{}\" is nothing that {} can take back", shorten(name), self.name);
        let mut problem = Problem::not_found(words).hint(format!("tenby snapshot list {}", quoted(&self.name)));
        problem.candidates = all.iter().map(|trash| trash.id.to_string()).collect();
        Err(problem)
    }

    fn nothing_to_undo(&self) -> Problem {
        let problem = Problem::not_found(format!("there is nothing that {} could take back", self.name));
        let name = quoted(&self.name);
        match self.policy.undo_for {
            0 => problem.hint(format!("tenby vm set {name} --undo-for 1h      (for what is deleted from then on)")),
            _ => problem.hint(format!("tenby vm log {name}")),
        }
    }

    /// Takes back what a row holds. Snapshots hang where they hung, as far as what they stood on is there; a disk is attached again, as
    /// another one if there is one of its id by now.
    pub fn take_back(&mut self, id: TrashId) -> Option<Trash> {
        let trash = self.trash.remove(&id)?;
        self.snapshots.extend(trash.snapshots.iter().map(|snapshot| (snapshot.id, snapshot.clone())));
        self.hang();
        if let Some((disk, leaf)) = &trash.disk {
            self.attach(disk.clone(), *leaf);
        }
        Some(trash)
    }

    fn attach(&mut self, mut disk: Disk, leaf: LayerId) {
        if self.now.config.disk(&disk.id).is_some() {
            disk.id = DiskId(format!("disk{}", self.next_disk));
            self.next_disk += 1;
        }
        self.now.disks.insert(disk.id.clone(), leaf);
        self.now.config.disks.push(disk);
        self.now.touched = true;
    }
}

/// `Monday, Tuesday and 3 more`.
fn listed(names: &[String]) -> String {
    const MOST: usize = 3;
    match names {
        [names @ .., last] if names.len() < MOST => {
            if names.is_empty() {
                last.clone()
            } else {
                format!("{} and {last}", names.join(", "))
            }
        }
        _ => format!("{} and {} more", names[..MOST - 1].join(", "), names.len() + 1 - MOST),
    }
}
