//! Collecting garbage changes no content: against a model in which each layer is a map from blocks to values.

#[expect(dead_code, reason = "each test uses a part of the samples")]
mod sample;

use image::merge::Direction;
use machine::garbage::{Fold, Garbage, base_of_capture, folded, garbage, removed};
use machine::plan::Written;
use machine::tree::{
    DiskId, Firmware, LayerFormat, LayerId, LayerKind, Machine, SnapshotId, SnapshotState, State, Stats,
};
use proptest::prelude::*;
use sample::{layer, leaves, take};
use std::collections::{BTreeMap, BTreeSet};

type Blocks = BTreeMap<u8, u32>;

/// What a snapshot or Now holds: each disk's content, and the memory's.
#[derive(Debug, Clone, Default, PartialEq)]
struct Content {
    disks: BTreeMap<DiskId, Blocks>,
    memory: Option<Blocks>,
}

/// The rows, the layers' own blocks, and what ought to be read through them.
struct World {
    machine: Machine,
    blocks: BTreeMap<LayerId, Blocks>,
    snapshots: BTreeMap<SnapshotId, Content>,
    now: Content,
}

#[derive(Debug, Clone)]
enum Op {
    Write { disk: usize, block: u8, value: u32 },
    Snapshot { memory: Option<(u8, u32)> },
    Apply { snapshot: usize, keep: bool },
    Delete { snapshot: usize, subtree: bool },
    CollectOne,
    CollectAll,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..2_usize, 0..6_u8, any::<u32>()).prop_map(|(disk, block, value)| Op::Write { disk, block, value }),
        4 => proptest::option::of((0..6_u8, any::<u32>())).prop_map(|memory| Op::Snapshot { memory }),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(snapshot, keep)| Op::Apply { snapshot, keep }),
        3 => (any::<usize>(), prop::bool::weighted(0.2)).prop_map(|(snapshot, subtree)| Op::Delete { snapshot, subtree }),
        3 => Just(Op::CollectOne),
        1 => Just(Op::CollectAll),
    ]
}

impl World {
    fn new() -> Self {
        let machine = sample::machine(2);
        let now =
            Content { disks: machine.now.disks.keys().map(|d| (d.clone(), Blocks::new())).collect(), memory: None };
        Self { machine, blocks: BTreeMap::new(), snapshots: BTreeMap::new(), now }
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Write { disk, block, value } => {
                let (disk, leaf) = self.machine.now.disks.iter().nth(disk).expect("two disks");
                self.blocks.entry(*leaf).or_default().insert(block, value);
                self.now.disks.get_mut(disk).expect("it is there").insert(block, value);
                self.machine.now.touched = true;
            }
            Op::Snapshot { memory } => self.snapshot(memory),
            Op::Apply { snapshot, keep } => self.apply(snapshot, keep),
            Op::Delete { snapshot, subtree } => {
                let Some(id) = self.pick(snapshot) else { return };
                for id in self.machine.delete(id, subtree) {
                    self.snapshots.remove(&id);
                }
            }
            Op::CollectOne => {
                self.collect_one();
            }
            Op::CollectAll => while self.collect_one() {},
        }
    }

    fn pick(&self, nth: usize) -> Option<SnapshotId> {
        let count = self.machine.snapshots.len();
        (count > 0).then(|| *self.machine.snapshots.keys().nth(nth % count).expect("in range"))
    }

    fn snapshot(&mut self, memory: Option<(u8, u32)>) {
        let mut take = take("s");
        let id = take.id;
        let mut content = self.now.clone();
        take.state = if memory.is_some() { SnapshotState::Creating } else { SnapshotState::Ready };
        self.machine.take(take, leaves(&self.machine.now.disks.clone()));
        // What is written to memory since the last capture is one block.
        if let Some((block, value)) = memory {
            let base = self.machine.now.memory_base.filter(|base| self.machine.layers.contains_key(base));
            let row = layer(LayerKind::Memory, base);
            self.blocks.insert(row.id, Blocks::from([(block, value)]));
            content.memory = Some(base.map_or_else(Blocks::new, |base| self.read(base)));
            content.memory.as_mut().expect("just made").insert(block, value);
            self.machine.ready(id, Some(Written { layer: row, stats: Stats::default() }));
        }
        self.snapshots.insert(id, content);
    }

    fn apply(&mut self, nth: usize, keep: bool) {
        let Some(id) = self.pick(nth) else { return };
        if keep {
            let take = take("kept");
            let mut content = self.now.clone();
            content.memory = None;
            self.snapshots.insert(take.id, content);
            self.machine.keep(take, None);
        }
        let leaves = leaves(&self.machine.snapshots[&id].disks);
        self.machine.apply(id, leaves, true);
        self.now = self.snapshots[&id].clone();
        // It runs on at once, from that memory.
        let memory = self.machine.now.memory.take();
        self.machine.now.memory_base = memory;
        self.machine.now.state = State::Running;
        self.now.memory = None;
    }

    /// What is read through the chain that ends in this layer.
    fn read(&self, leaf: LayerId) -> Blocks {
        let mut content = Blocks::new();
        for id in self.machine.chain(leaf) {
            content.extend(self.blocks.get(&id).into_iter().flatten());
        }
        content
    }

    fn see(&self, disks: &BTreeMap<DiskId, LayerId>, memory: Option<LayerId>) -> Content {
        Content {
            disks: disks.iter().map(|(disk, leaf)| (disk.clone(), self.read(*leaf))).collect(),
            memory: memory.map(|memory| self.read(memory)),
        }
    }

    /// Does the first thing there is to do; false if there is nothing.
    fn collect_one(&mut self) -> bool {
        let Garbage { remove, fold, .. } = garbage(&self.machine);
        if let Some(id) = remove.first() {
            let row = self.machine.layers.remove(id).expect("its row is there");
            self.blocks.remove(&row.id);
            return true;
        }
        let Some(fold) = fold.first() else { return false };
        self.fold(*fold);
        true
    }

    fn fold(&mut self, fold: Fold) {
        let Fold { into, child } = fold;
        let mut file = self.blocks.remove(&into).unwrap_or_default();
        file.extend(self.blocks.remove(&child).unwrap_or_default());
        self.blocks.insert(child, file);
        // Some this way, some that way.
        let direction = if self.machine.layers.len().is_multiple_of(2) { Direction::Up } else { Direction::Down };
        let stays = if direction == Direction::Up { child } else { into };
        let (kept, parent) = (self.machine.layers[&stays].file.clone(), self.machine.layers[&into].parent);
        folded(&mut self.machine, fold, direction);
        assert_eq!((&self.machine.layers[&child].file, self.machine.layers[&child].parent), (&kept, parent));
    }

    fn named(&self) -> BTreeSet<LayerId> {
        let mut named: BTreeSet<LayerId> = self.machine.now.disks.values().copied().collect();
        named.extend(self.machine.now.memory);
        for snapshot in self.machine.snapshots.values() {
            named.extend(snapshot.disks.values().chain(&snapshot.memory));
        }
        named
    }

    fn verify(&self) {
        assert_eq!(self.machine.check(), Ok(()));
        for (id, content) in &self.snapshots {
            let snapshot = &self.machine.snapshots[id];
            assert_eq!(&self.see(&snapshot.disks, snapshot.memory), content, "snapshot {id}");
        }
        assert_eq!(self.machine.snapshots.len(), self.snapshots.len());
        assert_eq!(self.see(&self.machine.now.disks, self.machine.now.memory), self.now, "now");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn collecting_changes_no_content(ops in proptest::collection::vec(op(), 1..80)) {
        let mut world = World::new();
        for op in &ops {
            world.run(op);
            world.verify();
        }
        while world.collect_one() {
            world.verify();
        }
        let (named, children) = (world.named(), world.machine.children());
        let waiting: Vec<LayerId> =
            world.machine.layers.keys().filter(|id| !named.contains(id)).copied().collect();
        for id in &waiting {
            prop_assert!(children.get(id).is_some_and(|children| children.len() >= 2), "{} has no reason to be there", id);
        }
        let left = garbage(&world.machine);
        prop_assert_eq!(left.wait.into_iter().collect::<BTreeSet<_>>(), waiting.into_iter().collect());
        // Each layer of one kind is needed by a snapshot or by Now: never more files than twice those that are named.
        prop_assert!(world.machine.layers.len() <= 2 * named.len());
    }

    /// What is listed can be done in the order in which it is listed, without asking again.
    #[test]
    fn the_list_is_valid_as_a_whole(ops in proptest::collection::vec(op(), 1..60)) {
        let mut world = World::new();
        ops.iter().filter(|op| !matches!(op, Op::CollectAll | Op::CollectOne)).for_each(|op| world.run(op));
        let Garbage { remove, fold, wait } = garbage(&world.machine);
        for id in remove {
            let standing = world.machine.layers.values().any(|row| row.parent == Some(id));
            prop_assert!(!standing, "a child is removed before its parent");
            world.machine.layers.remove(&id);
            world.blocks.remove(&id);
        }
        world.verify();
        for fold in fold {
            prop_assert!(garbage(&world.machine).fold.contains(&fold));
            world.fold(fold);
            world.verify();
        }
        let left = garbage(&world.machine);
        prop_assert!(left.remove.is_empty() && left.fold.is_empty());
        let set = |ids: Vec<LayerId>| ids.into_iter().collect::<BTreeSet<_>>();
        prop_assert_eq!(set(left.wait), set(wait));
    }
}

/// Base ← a ← b ← now, none of it named but now.
#[test]
fn a_run_is_folded_from_its_base() {
    let mut machine = sample::machine(1);
    let mut ids = vec![*machine.now.disks.values().next().expect("a disk")];
    for _ in 0..3 {
        let take = take("s");
        let id = take.id;
        machine.take(take, leaves(&machine.now.disks.clone()));
        machine.delete(id, false);
        ids.extend(machine.now.disks.values());
    }
    let base = machine.layers[&ids[0]].clone();
    let folds = garbage(&machine).fold;
    let expected: Vec<Fold> = ids.windows(2).map(|pair| Fold { into: pair[0], child: pair[1] }).collect();
    assert_eq!(folds, expected);
    for fold in folds {
        folded(&mut machine, fold, Direction::Down);
        machine.check().expect("sound");
    }
    let leaf = &machine.layers[&ids[3]];
    assert_eq!((&leaf.file, leaf.parent, machine.layers.len()), (&base.file, None, 1));
}

#[test]
fn a_base_taken_in_place_keeps_its_file() {
    let mut machine = sample::machine(1);
    let base = *machine.now.disks.values().next().expect("a disk");
    let row = machine.layers.get_mut(&base).expect("its row");
    (row.file, row.in_place, row.format) = ("/srv/win.vhdx".to_owned(), true, LayerFormat::Vhdx);
    let take = take("s");
    let id = take.id;
    machine.take(take, leaves(&machine.now.disks.clone()));
    machine.delete(id, false);
    let fold = garbage(&machine).fold[0];
    folded(&mut machine, fold, Direction::Down);
    let leaf = &machine.layers[&fold.child];
    assert_eq!((leaf.file.as_str(), leaf.in_place), ("/srv/win.vhdx", true));
}

#[test]
fn a_hint_names_nothing() {
    let mut machine = sample::machine(1);
    let memory = layer(LayerKind::Memory, None);
    machine.now.memory_base = Some(memory.id);
    machine.layers.insert(memory.id, memory.clone());
    assert_eq!(garbage(&machine).remove, [memory.id]);
    let child = layer(LayerKind::Memory, Some(memory.id));
    machine.layers.insert(child.id, child.clone());
    machine.now.memory = Some(child.id);
    assert_eq!(garbage(&machine).fold, [Fold { into: memory.id, child: child.id }]);
    assert_eq!(base_of_capture(&machine), Some(child.id), "a merge may have begun to change the hint");
    folded(&mut machine, Fold { into: memory.id, child: child.id }, Direction::Up);
    assert_eq!(machine.now.memory_base, Some(child.id), "the layer is gone: this is what is left of it");
    assert_eq!(base_of_capture(&machine), Some(child.id));
    machine.now.memory = None;
    let other = layer(LayerKind::Memory, Some(child.id));
    machine.layers.insert(other.id, other.clone());
    machine.now.memory_base = Some(other.id);
    machine.now.memory = Some(child.id);
    assert_eq!(garbage(&machine).remove, [other.id]);
    assert_eq!(base_of_capture(&machine), Some(child.id), "it is about to go");
    removed(&mut machine, &[other.id]);
    assert_eq!(machine.now.memory_base, Some(child.id), "it is gone: what it stood on is the nearest");
    machine.now.memory = None;
    assert_eq!(base_of_capture(&machine), None, "a merge may have been under way before both were to go");
    let gone = garbage(&machine).remove;
    removed(&mut machine, &gone);
    assert_eq!((machine.now.memory_base, machine.layers.contains_key(&child.id)), (None, false));
}

/// What is wrong, and the words that say so.
type Breach = (&'static str, fn(&mut Machine));

/// Each rule of [`Machine::check`] finds its breach.
#[test]
fn breaches_are_found() {
    let sound = || {
        let mut machine = sample::machine(2);
        machine.take(take("a"), leaves(&machine.now.disks.clone()));
        machine.take(take("b"), leaves(&machine.now.disks.clone()));
        machine.check().expect("sound");
        machine
    };
    let breaches: [Breach; 17] = [
        ("not there", |m| m.now.parent = Some(SnapshotId::new())),
        ("not there", |m| m.snapshots.values_mut().for_each(|s| s.parent = Some(SnapshotId::new()))),
        ("on itself", |m| {
            let ids: Vec<SnapshotId> = m.snapshots.keys().copied().collect();
            m.snapshots.get_mut(&ids[0]).expect("a").parent = Some(ids[1]);
            m.snapshots.get_mut(&ids[1]).expect("b").parent = Some(ids[0]);
        }),
        ("filed under", |m| m.snapshots.values_mut().next().expect("one").id = SnapshotId::new()),
        ("filed under", |m| m.layers.values_mut().next().expect("one").id = LayerId::new()),
        ("not there", |m| {
            let base = m.layers.values().find(|row| row.parent.is_none()).expect("a base").id;
            m.layers.remove(&base);
        }),
        ("on itself", |m| {
            let leaf = *m.now.disks.values().next().expect("one");
            let base = m.chain(leaf)[0];
            m.layers.get_mut(&base).expect("its row").parent = Some(leaf);
        }),
        ("share the file", |m| m.layers.values_mut().for_each(|row| row.file = "disks/x.vhdx".to_owned())),
        ("another kind", |m| {
            let leaf = *m.now.disks.values().next().expect("one");
            m.layers.get_mut(&leaf).expect("its row").kind = LayerKind::Memory;
        }),
        ("not there", |m| m.now.memory = Some(LayerId::new())),
        ("another kind", |m| m.now.memory = m.now.disks.values().next().copied()),
        ("other disks", |m| drop(m.now.config.disks.pop())),
        ("other disks", |m| m.now.config.firmware = Firmware::Uefi),
        ("two disks of one id", |m| m.now.config.disks[0].id = DiskId::firmware()),
        ("shares its leaf", |m| {
            let leaf = *m.now.disks.values().next().expect("one");
            m.now.disks.values_mut().for_each(|id| *id = leaf);
        }),
        ("names a leaf", |m| {
            let disks = m.now.disks.clone();
            m.snapshots.values_mut().next().expect("one").disks = disks;
        }),
        ("without a memory", |m| m.now.state = State::Saved),
    ];
    for (words, breach) in breaches {
        let mut machine = sound();
        breach(&mut machine);
        let why = machine.check().expect_err(words);
        assert!(why.contains(words), "{why:?} should say {words:?}");
    }
    let mut machine = sound();
    let leaf = *machine.now.disks.values().next().expect("one");
    let child = layer(LayerKind::Disk, Some(leaf));
    machine.layers.insert(child.id, child);
    assert!(machine.check().expect_err("a child").contains("stands on a leaf"));
}
