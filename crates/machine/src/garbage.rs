//! Which layers are still needed: what can be removed, what can be folded away, what has to wait. Pure.
//!
//! A layer is *named* if a snapshot, Now or what can be taken back holds it. One that is not named is on its way out, and what stands on it decides how:
//!
//! ```text
//!   nothing            its file is removed
//!   one child          the two are folded into one: down, the child's blocks go into its file, and the child lives there; or up,
//!                      what the child lacks goes into the child's file. Which of the two moves fewer bytes only the files can say
//!   several children   it waits, for each child reads a part of it
//! ```
//!
//! A file that another machine has, too (a linked clone, or what it was made from), is not written: what would be folded with it waits until it is
//! this machine's alone ([`Garbage::but`]). To remove it is always possible: the other has its own name of it.
//!
//! What stands on each other and is to be folded is folded at once ([`Garbage::runs`]): a block that was rewritten a thousand times moves
//! once.
//!
//! This is the seed's "works out when it can merge and/or delete AVHD files". Nothing is remembered: after a crash the same rows
//! give the same answer.

use crate::trash::Trash;
use crate::tree::{LayerId, Machine, Now, Snapshot};
use image::merge::Direction;
use std::collections::{BTreeMap, BTreeSet};

/// Not more layers are folded as one: they are all open meanwhile.
const RUN: usize = 1000;

/// What is to be done about the layers that nothing names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Garbage {
    /// Nothing needs these: the rows and files can go. Children before their parents.
    pub remove: Vec<LayerId>,
    /// These can be folded, in this order, once `remove` is done.
    pub fold: Vec<Fold>,
    /// These have to wait: several layers stand on each, or another machine has the file, too.
    pub wait: Vec<LayerId>,
}

/// Two layers that can be one. See [`folded`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fold {
    /// The layer that nothing names: its row goes.
    pub into: LayerId,
    /// The one layer that stands on it: its row stays.
    pub child: LayerId,
}

impl Garbage {
    /// The same, but that nothing is folded into or out of these: their files are not this machine's alone.
    #[must_use]
    pub fn but(mut self, shared: &BTreeSet<LayerId>) -> Self {
        let waits = |fold: &mut Fold| shared.contains(&fold.into) || shared.contains(&fold.child);
        self.wait.extend(self.fold.extract_if(.., waits).map(|fold| fold.into));
        self
    }

    /// The folds that can be done as one: runs of layers that stand on each other. Of each block only the topmost copy moves then.
    pub fn runs(&self) -> impl Iterator<Item = &[Fold]> {
        self.fold.chunk_by(|below, above| below.child == above.into).flat_map(|run| run.chunks(RUN))
    }
}

/// What is to be done about the layers that nothing names. The rows must be sound ([`Machine::check`]).
pub fn garbage(machine: &Machine) -> Garbage {
    let named = named(machine);
    let mut children = machine.children();
    let remove = removable(machine, &named, &mut children);
    let mut found = Garbage { remove, ..Garbage::default() };
    let gone: BTreeSet<LayerId> = found.remove.iter().copied().collect();
    for id in from_the_base(machine) {
        if named.contains(&id) || gone.contains(&id) {
            continue;
        }
        match children.get(&id).map_or(&[][..], Vec::as_slice) {
            [child] => found.fold.push(Fold { into: id, child: *child }),
            _ => found.wait.push(id),
        }
    }
    found
}

/// The rows after a fold: `child` stands on what `into` stood on. Down it lives in the file of `into`, up in its own.
pub fn folded(machine: &mut Machine, Fold { into, child }: Fold, direction: Direction) {
    if !machine.layers.contains_key(&child) {
        return;
    }
    let Some(gone) = machine.layers.remove(&into) else { return };
    if let Some(row) = machine.layers.get_mut(&child) {
        row.parent = gone.parent;
        row.folded = None;
        if direction == Direction::Down {
            row.file = gone.file;
            row.in_place = gone.in_place;
            row.format = gone.format;
        }
    }
    // RAM is hardly the same as what stands on what it was last equal to, but most of its pages are.
    if machine.now.memory_base == Some(into) {
        machine.now.memory_base = Some(child);
    }
}

/// The memory that the next capture is to stand on, if any: what RAM was last equal to, if it stays. What goes may read as neither of two by now, for a
/// merge may have begun to change it; what it goes into always reads as it did, and so does what stays below it.
pub fn base_of_capture(machine: &Machine) -> Option<LayerId> {
    let found = garbage(machine);
    let goes_into: BTreeMap<LayerId, LayerId> = found.fold.iter().map(|fold| (fold.into, fold.child)).collect();
    let mut base = machine.now.memory_base;
    while let Some(row) = base.and_then(|id| machine.layers.get(&id)) {
        base = match goes_into.get(&row.id) {
            Some(child) => Some(*child),
            None if found.remove.contains(&row.id) => row.parent,
            None => return base,
        };
    }
    None
}

/// The rows without these layers, which nothing needs. The next capture stands on what stays.
pub fn removed(machine: &mut Machine, gone: &[LayerId]) {
    machine.now.memory_base = base_of_capture(machine);
    for id in gone {
        machine.layers.remove(id);
    }
}

/// The layers that a snapshot, Now or the trash holds. (`memory_base` holds nothing: it is a hint.) What RAM is being filled from is read all the
/// while, by who has it open as it was: nothing of its chain may be folded.
fn named(machine: &Machine) -> BTreeSet<LayerId> {
    let Now { disks, memory, .. } = &machine.now;
    let read = machine.now.restoring.into_iter().flat_map(|layer| machine.chain(layer));
    let snapshots = machine.snapshots.values().flat_map(Snapshot::layers);
    let trash = machine.trash.values().flat_map(Trash::layers);
    disks.values().chain(memory).copied().chain(read).chain(snapshots).chain(trash).collect()
}

/// The unnamed layers without children, then those that are left without by their going, and so on. Takes them out of `children`.
fn removable(
    machine: &Machine,
    named: &BTreeSet<LayerId>,
    children: &mut BTreeMap<LayerId, Vec<LayerId>>,
) -> Vec<LayerId> {
    let bare = |id: &LayerId, children: &BTreeMap<LayerId, Vec<LayerId>>| {
        !named.contains(id) && children.get(id).is_none_or(Vec::is_empty)
    };
    let mut remove: Vec<LayerId> = machine.layers.keys().filter(|id| bare(id, children)).copied().collect();
    let mut next = 0;
    while let Some(id) = remove.get(next).copied() {
        next += 1;
        let Some(parent) = machine.layers[&id].parent else { continue };
        if let Some(siblings) = children.get_mut(&parent) {
            siblings.retain(|child| *child != id);
        }
        if machine.layers.contains_key(&parent) && bare(&parent, children) {
            remove.push(parent);
        }
    }
    remove
}

/// All layers, each after the one that it stands on, and right after it where that is possible: the folds of a run are neighbours
/// (see [`Garbage::runs`]), and go from its base upwards.
pub(crate) fn from_the_base(machine: &Machine) -> Vec<LayerId> {
    let children = machine.children();
    let mut order = Vec::new();
    let mut open: Vec<LayerId> = machine.layers.values().filter(|row| row.parent.is_none()).map(|row| row.id).collect();
    while let Some(id) = open.pop() {
        order.push(id);
        open.extend(children.get(&id).into_iter().flatten());
    }
    order
}
