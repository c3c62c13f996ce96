//! Machines that share sealed files: who has them both, nobody writes; and a power cut at any moment leaves the one as it was, and the other
//! whole or not there.

#[expect(dead_code, reason = "each test uses a part of the samples")]
mod sample;

use machine::audit::audit;
use machine::carry::Carries;
use machine::collect::Begin;
use machine::files::Files;
use machine::garbage::{Fold, Garbage, garbage};
use machine::job::{Cancel, Task};
use machine::keeper::Keeper;
use machine::ledger::Ledger;
use machine::linked::{Linked, Named};
use machine::request::ProblemKind;
use machine::steps::Steps;
use machine::tree::{Borrowed, JobId, LayerId, LayerKind, Machine, MachineId, Publish, SnapshotState, State};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use store::Mode;
use store::sim::{Crash, Sim};

/// A machine with a base, the snapshots Monday and Tuesday, and Now; in the folder `one` of a disk.
struct Lab {
    sim: Sim,
    keeper: Keeper,
}

impl Lab {
    fn new() -> Self {
        let sim = Sim::new();
        let files = new_folder(&sim, "one");
        let mut machine = sample::machine(1);
        for row in machine.layers.values_mut() {
            row.file = format!("disks/{}.vhdx", row.id);
            files.create_layer(row, 4 << 20, None, None).expect("a base").close().expect("closed");
        }
        Ledger::create(files.folder(), &machine).expect("a ledger").close();
        files.sync_names().expect("synced");
        sim.root().sync().expect("synced");
        let lab = Self { sim, keeper: keeper(&files) };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        for name in ["Monday", "Tuesday"] {
            let task = lab.task("snapshot");
            runtime.block_on(lab.keeper.snapshot_still(&task, sample::take(name), &Value::Null)).expect("taken");
        }
        lab
    }

    fn task(&self, kind: &str) -> Task {
        self.keeper.jobs().open(JobId::new(), "lab", kind).expect("a fresh job")
    }

    fn linked(&self, snapshot: &str) -> Linked {
        let rows = self.keeper.rows();
        let snapshot = &rows.machine.snapshots[&rows.machine.resolve(snapshot).expect("it is there")];
        rows.machine.linked(snapshot, &Named { id: MachineId::new(), name: "twin".to_owned() }, "", true)
    }

    /// Makes the twin, out of sight until it is complete; then its folder is `two`.
    fn link(&self, snapshot: &str) -> Files {
        let files = new_folder(&self.sim, "two.new");
        self.keeper.link_machine(self.linked(snapshot), &files, &mut |_, _| true).expect("linked");
        self.sim.root().rename("two.new", "two").expect("it is complete");
        files
    }

    fn delete_all(&self) {
        for name in ["Monday", "Tuesday"] {
            self.keeper.delete(&self.task("delete"), name, false).expect("deleted");
        }
    }
}

fn new_folder(sim: &Sim, name: &str) -> Files {
    let files = Files::new(sim.root().create_folder(name).expect("a folder"), &Path::new("/").join(name));
    files.create_folders().expect("folders");
    files
}

fn keeper(files: &Files) -> Keeper {
    let carries = Carries::new(Sim::new().root(), uuid::Uuid::nil());
    Keeper::open(files, carries, Steps::default()).expect("opens")
}

/// The machine in a folder of a disk, if it is there; all of it is sound.
fn sound(sim: &Sim, name: &str) -> Option<Machine> {
    let files = Files::new(sim.root().folder(name).ok()?, &Path::new("/").join(name));
    let machine = Ledger::read(files.folder()).ok()?.machine;
    let audit = audit(&machine, &files, false, &[]).expect("audited");
    assert!(audit.clean, "{name}: {audit:?}");
    Some(machine)
}

#[test]
fn what_another_has_too_is_neither_written_nor_folded() {
    let lab = Lab::new();
    let twin = lab.link("Tuesday");
    lab.delete_all();
    let rows = lab.keeper.rows();
    let shared: Vec<_> = rows.machine.layers.values().filter(|row| lab.keeper.files().is_shared(row)).collect();
    assert_eq!(shared.len(), 2, "the base and Monday's");
    for row in shared {
        let refused = lab.keeper.files().open_layer(row, Mode::Write).expect_err("refused");
        assert_eq!(refused.kind, ProblemKind::Refused, "{refused}");
        lab.keeper.files().open_layer(row, Mode::Read).expect("read it can be");
    }
    assert!(lab.keeper.next_fold(None, Begin::default()).expect("looked").is_none());
    assert_eq!(lab.keeper.files().garbage(&rows.machine).wait.len(), 2);
    let bytes = lab.keeper.files().shared_bytes(&rows.machine);
    assert!(bytes > 0);
    // The twin may do no more.
    let other = keeper(&twin);
    assert!(other.next_fold(None, Begin::default()).expect("looked").is_none());
    assert_eq!(other.files().shared_bytes(&other.rows().machine), bytes);
    assert!(sound(&lab.sim, "one").is_none() || sound(&lab.sim, "two").is_some());
    // It goes: what is left is this machine's alone.
    let layers: Vec<String> = other.rows().machine.layers.values().map(|row| row.file.clone()).collect();
    drop(other);
    twin.remove(&layers).expect("removed");
    let folding = lab.keeper.next_fold(None, Begin::default()).expect("looked").expect("it is due");
    let ended = lab.keeper.fold(folding, &Cancel::default());
    lab.keeper.folded(&ended, None).expect("folded");
    assert_eq!(lab.keeper.rows().machine.layers.len(), 1);
}

#[test]
fn a_power_cut_leaves_the_one_as_it_was_and_the_other_whole_or_not_there() {
    let lab = Lab::new();
    let before = lab.keeper.rows().machine.clone();
    let copies = Arc::new(Mutex::new(Vec::new()));
    let (first, taken) = (lab.sim.counts().operations, Arc::clone(&copies));
    lab.sim
        .copy_before((first..first + 10_000).collect(), move |_, copy| taken.lock().expect("not poisoned").push(copy));
    lab.link("Tuesday");
    lab.sim.root().sync().expect("synced");
    let made = lab.sim.counts().operations;
    let copies = std::mem::take(&mut *copies.lock().expect("not poisoned"));
    assert_eq!(copies.len() as u64, made - first);
    // A ledger is read by whoever has its lock.
    drop(lab.keeper);
    let mut whole = 0;
    for (nth, copy) in copies.iter().chain([&lab.sim]).enumerate() {
        for crash in Crash::several(nth as u64, 8) {
            let after = copy.after_crash(crash);
            assert_eq!(sound(&after, "one").as_ref(), Some(&before), "{nth}, {crash:?}");
            let twin = sound(&after, "two");
            whole += usize::from(twin.is_some());
            assert!(twin.is_some() || nth < copies.len(), "it was made, {crash:?}");
        }
    }
    assert!(whole > 10);
}

#[test]
fn nothing_is_folded_into_or_out_of_what_is_shared() {
    let layers: Vec<LayerId> = (0..4).map(|_| LayerId::new()).collect();
    let folds: Vec<Fold> = layers.windows(2).map(|pair| Fold { into: pair[0], child: pair[1] }).collect();
    let found = || Garbage { fold: folds.clone(), ..Garbage::default() };
    assert_eq!(found().but(&BTreeSet::new()), found());
    let left = found().but(&BTreeSet::from([layers[0]]));
    assert_eq!((left.fold.as_slice(), left.wait), (&folds[1..], vec![layers[0]]));
    let left = found().but(&BTreeSet::from([layers[2]]));
    assert_eq!((left.fold.as_slice(), left.wait), (&folds[..1], vec![layers[1], layers[2]]));
    assert!(found().but(&layers.into_iter().collect()).fold.is_empty());
}

#[test]
fn a_new_machine_is_somebody_else_unless_it_goes_on_from_memory() {
    let mut machine = sample::machine(2);
    machine.now.config.net.publish = vec![Publish { address: "127.0.0.1".to_owned(), host: 8080, guest: 80 }];
    let base = sample::layer(LayerKind::Memory, None);
    let memory = sample::layer(LayerKind::Memory, Some(base.id));
    machine.layers.extend([(base.id, base.clone()), (memory.id, memory.clone())]);
    let take = machine::plan::Take {
        memory: Some(memory.id),
        vm_state: State::Running,
        state: SnapshotState::Ready,
        ..sample::take("Monday")
    };
    let id = take.id;
    machine.take(take, sample::leaves(&machine.now.disks.clone()));
    let new = Named { id: MachineId::new(), name: "twin".to_owned() };
    let with = machine.linked(&machine.snapshots[&id], &new, "a note", true).machine;
    with.check().expect("sound");
    let of = Borrowed { machine: machine.id, mac: machine.now.config.net.mac.clone() };
    assert_eq!((with.now.state, with.now.config.borrowed.as_ref()), (State::Saved, Some(&of)));
    assert_eq!((with.id, with.name.as_str(), with.note.as_str()), (new.id, "twin", "a note"));
    assert!(with.now.config.net.mac != of.mac && with.now.config.net.publish.is_empty());
    assert_ne!(with.now.generation, machine.now.generation);
    assert_eq!(with.layers.len(), 4, "two disks, the memory and what it stands on");
    assert!(with.layers.keys().all(|id| !machine.layers.contains_key(id)), "ids are its own");
    let files = |machine: &Machine| machine.layers.values().map(|row| row.file.clone()).collect::<BTreeSet<_>>();
    assert!(files(&with).is_subset(&files(&machine)), "files keep their names");
    // What is made of that in turn holds the same guest's memory.
    let again = with.linked(
        &{
            let mut with = with.clone();
            with.take(machine::plan::Take { memory: with.now.memory, ..sample::take("own") }, Vec::new());
            with.snapshots.into_values().next().expect("taken")
        },
        &new,
        "",
        true,
    );
    assert_eq!(again.machine.now.config.borrowed, Some(of));
    let without = machine.linked(&machine.snapshots[&id], &new, "", false).machine;
    assert_eq!((without.now.state, without.now.config.borrowed, without.layers.len()), (State::Off, None, 2));
    let mut off = with;
    off.turn_off();
    assert_eq!(off.now.config.borrowed, None, "what comes up next is itself");
    assert_eq!(garbage(&off).remove.len(), 2, "its memory goes");
}
