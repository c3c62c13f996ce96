//! What was thrown away comes back as it was: whatever was done meanwhile, in whichever order it is taken back.

#[expect(dead_code, reason = "each test uses a part of the samples")]
mod sample;

use jiff::{SignedDuration, Timestamp};
use machine::garbage::garbage;
use machine::request::ProblemKind;
use machine::tree::{DiskId, LayerId, Machine, SnapshotId, State, TrashId};
use proptest::prelude::*;
use sample::{layer, leaves, take};
use std::collections::{BTreeMap, BTreeSet};

/// A machine that keeps what is thrown away for an hour.
fn machine() -> Machine {
    let mut machine = sample::machine(2);
    machine.policy.undo_for = 3600;
    machine
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds)
}

fn snapshot(machine: &mut Machine, name: &str) -> SnapshotId {
    let take = take(name);
    let (id, leaves) = (take.id, leaves(&machine.now.disks));
    machine.take(take, leaves);
    machine.check().expect("sound");
    id
}

fn apply(machine: &mut Machine, id: SnapshotId) {
    let leaves = leaves(&machine.snapshots[&id].disks);
    machine.apply(id, leaves, true);
    machine.check().expect("sound");
}

/// Its memory.
fn save(machine: &mut Machine) -> LayerId {
    let layer = layer(machine::tree::LayerKind::Memory, None);
    let memory = layer.id;
    machine.save(machine::plan::Written { layer, stats: machine::tree::Stats::default() });
    memory
}

/// Which snapshot stands on which, and Now.
fn tree(machine: &Machine) -> (BTreeMap<SnapshotId, Option<SnapshotId>>, Option<SnapshotId>) {
    (machine.snapshots.iter().map(|(id, row)| (*id, row.parent)).collect(), machine.now.parent)
}

fn needed(machine: &Machine) -> BTreeSet<LayerId> {
    let found = garbage(machine);
    let unneeded: BTreeSet<LayerId> =
        found.remove.iter().chain(&found.wait).copied().chain(found.fold.iter().map(|fold| fold.into)).collect();
    machine.layers.keys().filter(|id| !unneeded.contains(id)).copied().collect()
}

#[derive(Debug, Clone)]
enum Op {
    Snapshot,
    Apply(usize),
    Discard(usize),
    SetAside,
    ThrowAway { nth: usize, subtree: bool },
    TakeBack(usize),
    GiveUp(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => Just(Op::Snapshot),
        2 => any::<usize>().prop_map(Op::Apply),
        1 => any::<usize>().prop_map(Op::Discard),
        1 => Just(Op::SetAside),
        4 => (any::<usize>(), prop::bool::weighted(0.3)).prop_map(|(nth, subtree)| Op::ThrowAway { nth, subtree }),
        2 => any::<usize>().prop_map(Op::TakeBack),
        1 => any::<usize>().prop_map(Op::GiveUp),
    ]
}

/// A machine, and the same if nothing had been thrown away but what was given up.
struct World {
    machine: Machine,
    whole: Machine,
    discarded: Vec<SnapshotId>,
    clock: i64,
}

impl World {
    fn run(&mut self, op: &Op) {
        self.clock += 1;
        let known: Vec<SnapshotId> =
            self.machine.snapshots.keys().filter(|id| self.whole.snapshots.contains_key(id)).copied().collect();
        let pick = |nth: usize| known.get(nth % known.len().max(1)).copied();
        match *op {
            Op::Snapshot => {
                let take = take(&format!("s{}", self.clock));
                let leaves = leaves(&self.machine.now.disks);
                self.machine.take(take.clone(), leaves.clone());
                self.whole.take(take, leaves);
            }
            Op::Apply(nth) | Op::Discard(nth) => {
                let Some(id) = pick(nth) else { return };
                if matches!(op, Op::Discard(_)) {
                    self.machine.note_discarded(id, at(self.clock));
                    let all = self.machine.trash_by_time();
                    let trash = all.last().expect("it was noted");
                    self.discarded.push(trash.snapshots[0].id);
                }
                let leaves = leaves(&self.machine.snapshots[&id].disks);
                self.machine.apply(id, leaves.clone(), true);
                self.whole.apply(id, leaves, true);
            }
            Op::SetAside => {
                let take = take(&format!("s{}", self.clock));
                let leaves = leaves(&self.machine.now.disks);
                self.machine.set_aside(take.clone(), leaves.clone());
                self.whole.take(take, leaves);
            }
            Op::ThrowAway { nth, subtree } => {
                let Some(id) = pick(nth) else { return };
                self.machine.throw_away(id, subtree, at(self.clock));
            }
            Op::TakeBack(nth) => {
                let all: Vec<TrashId> = self.machine.trash.keys().copied().collect();
                let Some(id) = all.get(nth % all.len().max(1)) else { return };
                self.take_back(*id);
            }
            Op::GiveUp(nth) => {
                let all: Vec<TrashId> = self.machine.trash.keys().copied().collect();
                let Some(id) = all.get(nth % all.len().max(1)) else { return };
                for snapshot in &self.machine.trash[id].snapshots {
                    self.whole.delete(snapshot.id, false);
                }
                self.machine.give_up(*id);
            }
        }
        self.machine.check().expect("sound");
    }

    fn take_back(&mut self, id: TrashId) {
        let layers: Vec<LayerId> = self.machine.trash[&id].layers().collect();
        let kept = needed(&self.machine);
        assert!(layers.iter().all(|layer| kept.contains(layer)), "what can be taken back is no garbage");
        self.machine.take_back(id).expect("it is there");
        self.machine.check().expect("sound");
        assert_eq!(needed(&self.machine), kept, "taking back needs nothing that was not kept");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn in_any_order(ops in prop::collection::vec(op(), 1..40), order in any::<prop::sample::Index>()) {
        let machine = machine();
        let mut world = World { whole: machine.clone(), machine, discarded: Vec::new(), clock: 0 };
        for op in &ops {
            world.run(op);
        }
        while !world.machine.trash.is_empty() {
            let nth = order.index(world.machine.trash.len());
            let id = *world.machine.trash.keys().nth(nth).expect("counted");
            world.take_back(id);
        }
        let (mut snapshots, now) = tree(&world.machine);
        snapshots.retain(|id, _| !world.discarded.contains(id));
        prop_assert_eq!((snapshots, now), tree(&world.whole));
    }
}

#[test]
fn nothing_is_kept_unless_it_was_asked_for() {
    let mut machine = sample::machine(1);
    let monday = snapshot(&mut machine, "Monday");
    machine.throw_away(monday, false, at(0));
    assert!(machine.trash.is_empty() && machine.snapshots.is_empty());
    let refusal = machine.resolve_trash(None).unwrap_err();
    assert_eq!(refusal.kind, ProblemKind::NotFound);
    assert!(refusal.hint.unwrap().contains("--undo-for"));
}

#[test]
fn its_time_is_the_settings_also_for_what_is_there_already() {
    let mut machine = machine();
    let monday = snapshot(&mut machine, "Monday");
    machine.throw_away(monday, false, at(100));
    assert!(machine.expired(at(3699)).is_empty());
    assert_eq!(machine.expired(at(3700)).len(), 1);
    machine.policy.undo_for = 10;
    assert_eq!(machine.expired(at(110)).len(), 1);
    machine.policy.undo_for = 0;
    assert_eq!(machine.expired(at(100)).len(), 1);
    machine.policy.undo_for = u64::MAX;
    assert!(machine.expired(Timestamp::MAX - SignedDuration::from_secs(1)).is_empty());
}

#[test]
fn what_is_meant_is_an_id_a_name_or_the_latest() {
    let mut machine = machine();
    let (monday, tuesday) = (snapshot(&mut machine, "Monday"), snapshot(&mut machine, "Tuesday"));
    machine.throw_away(tuesday, false, at(1));
    machine.throw_away(monday, false, at(2));
    let means = |name: Option<&str>| machine.trash[&machine.resolve_trash(name).expect("it is there")].what.clone();
    assert_eq!(means(None), "deleted Monday");
    assert_eq!(means(Some("Tuesday")), "deleted Tuesday");
    let id = machine.resolve_trash(None).unwrap().to_string();
    assert_eq!(means(Some(&id[..12].to_uppercase())), "deleted Monday");
    let refusal = machine.resolve_trash(Some("Sunday")).unwrap_err();
    assert_eq!((refusal.kind, refusal.candidates.len()), (ProblemKind::NotFound, 2));
}

#[test]
fn a_subtree_is_told_in_few_words_and_comes_back_whole() {
    let mut machine = machine();
    let first = snapshot(&mut machine, "a");
    for name in ["b", "c", "d", "e"] {
        snapshot(&mut machine, name);
    }
    let before = tree(&machine);
    machine.throw_away(first, true, at(0));
    assert!(machine.snapshots.is_empty() && machine.now.parent.is_none());
    let id = machine.resolve_trash(Some("d")).unwrap();
    assert_eq!(machine.trash[&id].what, "deleted a, b and 3 more");
    machine.take_back(id);
    assert_eq!(tree(&machine), before);
}

#[test]
fn a_saved_present_comes_back_with_its_memory_and_a_running_one_without() {
    let mut machine = machine();
    let monday = snapshot(&mut machine, "Monday");
    let memory = save(&mut machine);
    machine.note_discarded(monday, at(0));
    apply(&mut machine, monday);
    assert!(needed(&machine).contains(&memory));
    let trash = machine.take_back(machine.resolve_trash(Some("before Monday")).unwrap()).unwrap();
    let back = &machine.snapshots[&trash.snapshots[0].id];
    assert_eq!((back.memory, back.vm_state, back.parent), (Some(memory), State::Saved, Some(monday)));
    machine.now.state = State::Running;
    machine.note_discarded(monday, at(1));
    apply(&mut machine, monday);
    let trash = machine.take_back(machine.resolve_trash(None).unwrap()).unwrap();
    assert_eq!((trash.snapshots[0].memory, trash.snapshots[0].vm_state), (None, State::Running));
}

#[test]
fn what_was_saved_and_turned_off_comes_back_below_now() {
    let mut machine = machine();
    let monday = snapshot(&mut machine, "Monday");
    let memory = save(&mut machine);
    let (disks, leaves) = (machine.now.disks.clone(), leaves(&machine.now.disks));
    let take = machine::plan::Take { memory: Some(memory), vm_state: State::Saved, ..take("saved") };
    machine.set_aside(take, leaves);
    machine.check().expect("sound");
    assert_eq!((machine.now.state, machine.now.memory, machine.now.parent), (State::Off, None, Some(monday)));
    assert_eq!(machine.snapshots.len(), 1);
    assert!(needed(&machine).contains(&memory));
    let trash = machine.take_back(machine.resolve_trash(None).unwrap()).unwrap();
    let back = &machine.snapshots[&trash.snapshots[0].id];
    assert_eq!((back.memory, back.vm_state, back.parent), (Some(memory), State::Saved, Some(monday)));
    assert_eq!((&back.disks, machine.now.parent), (&disks, Some(back.id)));
}

#[test]
fn a_removed_disk_comes_back_as_another_if_its_id_is_taken() {
    let mut machine = machine();
    snapshot(&mut machine, "Monday");
    let (disk, gone) = (machine.now.config.disks[1].clone(), DiskId("disk1".to_owned()));
    let leaf = machine.now.disks.remove(&gone).unwrap();
    machine.now.config.disks.remove(1);
    machine.note_removed(&disk, leaf, at(0));
    machine.check().expect("sound");
    let mut other = machine.clone();
    machine.take_back(machine.resolve_trash(None).unwrap());
    machine.check().expect("sound");
    assert_eq!((machine.now.config.disks[1].clone(), machine.now.disks[&gone]), (disk, leaf));
    let monday = *other.snapshots.keys().next().unwrap();
    apply(&mut other, monday);
    other.take_back(other.resolve_trash(None).unwrap());
    other.check().expect("sound");
    assert_eq!(other.now.disks[&DiskId("disk2".to_owned())], leaf);
    assert_eq!(other.now.disks.len(), 3);
}
