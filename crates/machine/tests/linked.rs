//! Machines that share sealed files: who has them both, nobody writes; and wherever the power goes while one is made, takes over, is detached or
//! deleted, each is as it was before or as it is afterwards, and no link leaks.

#[expect(dead_code, reason = "each test uses a part of the samples")]
mod sample;

use image::{Access, Chain};
use machine::audit::audit;
use machine::carry::Carries;
use machine::collect::Begin;
use machine::files::Files;
use machine::garbage::{Fold, Garbage, garbage};
use machine::job::{Cancel, Task};
use machine::keeper::Keeper;
use machine::ledger::Ledger;
use machine::linked::{Linked, Named};
use machine::plan::{Take, Written};
use machine::ram;
use machine::records::downwards;
use machine::request::{Present, ProblemKind};
use machine::root::{Found, Root};
use machine::steps::Steps;
use machine::tree::{
    Borrowed, Config, JobId, Kernel, LayerId, LayerKind, Machine, MachineId, Now, Publish, SnapshotState, State, Stats,
};
use memory::Sealed;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use store::sim::{Crash, Sim};
use store::{Folder, Mode};

/// Bytes of each disk.
const SIZE: u64 = 256 << 10;

/// A machine with a base, the snapshots Monday and Tuesday, and Now.
struct Lab {
    sim: Sim,
    root: Root,
    keeper: Keeper,
}

impl Lab {
    fn new() -> Self {
        let sim = Sim::new();
        let root = root(&sim);
        let keeper = new_machine(&root, "one");
        let lab = Self { sim, root, keeper };
        for name in ["Monday", "Tuesday"] {
            lab.write(name);
            lab.snapshot(name);
        }
        lab.write("Now");
        lab
    }

    /// The same, with a snapshot that holds memory.
    fn saved() -> Self {
        let lab = Self::new();
        let target = ram::Target::new(lab.keeper.files(), &lab.rows(), lab.keeper.memory_row());
        let (layer, captured) = target.capture(sample::ram(&[1, 0, 3]).as_slice(), |_| {}).expect("captured");
        captured.chain.close().expect("closed");
        let written = Written { layer, stats: Stats::default() };
        lab.keeper.files().sync_names().expect("synced");
        lab.keeper.book().commit(|rows| rows.machine.save(written)).expect("committed");
        lab.snapshot("Wednesday");
        lab
    }

    fn rows(&self) -> Machine {
        self.keeper.rows().machine.clone()
    }

    /// A guest that runs for a moment and writes.
    fn write(&self, words: &str) {
        write(&self.keeper, words);
    }

    fn snapshot(&self, name: &str) {
        let now = self.rows().now;
        let take = Take { memory: now.memory, vm_state: now.state, ..sample::take(name) };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let task = task(&self.keeper, "snapshot");
        runtime.block_on(self.keeper.snapshot_still(&task, take, &Value::Null)).expect("taken");
    }

    fn linked(&self, snapshot: &str, name: &str) -> Linked {
        let machine = self.rows();
        let snapshot = &machine.snapshots[&machine.resolve(snapshot).expect("it is there")];
        machine.linked(snapshot, &Named { id: MachineId::new(), name: name.to_owned() }, "", true)
    }

    /// Makes machines of these names. Their files.
    fn clone_to(&self, snapshot: &str, names: &[&str]) -> Vec<Files> {
        let linked: Vec<Linked> = names.iter().map(|name| self.linked(snapshot, name)).collect();
        let ids: Vec<MachineId> = linked.iter().map(|linked| linked.machine.id).collect();
        self.keeper.clone_machines(&self.root, &task(&self.keeper, "clone"), linked, "made").expect("made");
        ids.into_iter().map(|id| self.root.files(id).expect("a folder")).collect()
    }

    fn link(&self, snapshot: &str) -> Files {
        self.clone_to(snapshot, &["twin"]).remove(0)
    }

    fn delete_all(&self) {
        for name in self.rows().snapshots.values().map(|snapshot| snapshot.name.clone()) {
            self.keeper.delete(&task(&self.keeper, "delete"), &name, false).expect("deleted");
        }
    }
}

fn root(sim: &Sim) -> Root {
    Root::over(sim.root(), Path::new("/"))
}

fn task(keeper: &Keeper, kind: &str) -> Task {
    keeper.jobs().open(JobId::new(), "lab", kind).expect("a fresh job")
}

/// A machine of a disk and a kernel, all of it durable.
fn new_machine(root: &Root, name: &str) -> Keeper {
    let mut machine = sample::machine(1);
    name.clone_into(&mut machine.name);
    machine.now.config.kernel = Some(Kernel { kernel: "kernel".to_owned(), initrd: None, append: "quiet".to_owned() });
    let begun = root.begin(machine.id).expect("a folder");
    let folder = begun.files.folder();
    let boot = folder.folder("boot").expect("a folder");
    let kernel = boot.create("kernel").expect("a file");
    kernel.write_at(format!("the kernel of {name}").as_bytes(), 0).expect("written");
    kernel.sync().and_then(|()| boot.sync()).expect("synced");
    for row in machine.layers.values_mut() {
        row.file = format!("disks/{}.vhdx", row.id);
        begun.files.create_layer(row, SIZE, None, None).expect("a base").close().expect("closed");
    }
    begun.files.sync_names().expect("synced");
    Ledger::create(folder, &machine).expect("a ledger").close();
    folder.sync().expect("synced");
    root.show(&[machine.id], || {}).expect("it is there");
    keeper(&root.files(machine.id).expect("a folder"))
}

fn keeper(files: &Files) -> Keeper {
    let carries = Carries::new(Sim::new().root(), uuid::Uuid::nil());
    Keeper::open(files, carries, Steps::default()).expect("opens")
}

fn write(keeper: &Keeper, words: &str) {
    let disks = keeper.open_disks(&keeper.rows().machine).expect("opens");
    for (_, chain) in disks.chains() {
        // In another place each time, and over what is there.
        for at in [0, 4096 * words.len() as u64] {
            chain.write(&words.as_bytes().repeat(1000), at).expect("written");
        }
    }
    disks.close().expect("closed");
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
    // It goes: what is left is this machine's alone.
    let id = other.rows().machine.id;
    drop(other);
    remove(&lab.root, id);
    let folding = lab.keeper.next_fold(None, Begin::default()).expect("looked").expect("it is due");
    let ended = lab.keeper.fold(folding, &Cancel::default());
    lab.keeper.folded(&ended, None).expect("folded");
    assert_eq!(lab.keeper.rows().machine.layers.len(), 1);
}

/// What a machine shows: the bytes of the disks, the memory and the kernel of each snapshot, and of Now.
type Shown = BTreeMap<String, Vec<Vec<u8>>>;

/// A machine, and what it shows.
#[derive(Debug, Clone, PartialEq)]
struct Held {
    machine: Machine,
    shown: Shown,
}

fn shown(machine: &Machine, files: &Files) -> Shown {
    let Now { config, disks, memory, .. } = &machine.now;
    let snapshots = machine.snapshots.values().map(|s| (s.name.as_str(), &s.config, &s.disks, s.memory));
    let all = snapshots.chain([("Now", config, disks, *memory)]);
    let show = |(name, config, disks, memory): (&str, &Config, &BTreeMap<_, _>, Option<_>)| {
        let disks = disks.values().map(|leaf| bytes_of(&chain(machine, files, *leaf)));
        let memory = memory.map(|top| {
            let (chain, expected) = (chain(machine, files, top), files.expected(&downwards(machine, top)));
            let mut stream = Vec::new();
            memory::restore(&Sealed { chain, expected }, &mut stream, |_, _| {}).expect("restored");
            stream
        });
        let boot = files.folder().folder("boot").expect("a folder");
        let kernels = config.boot_files().map(|name| {
            let file = boot.open(name, Mode::Read).unwrap_or_else(|error| panic!("{}: {error}", machine.name));
            let mut bytes = vec![0; file.len().expect("a length") as usize];
            file.read_at(&mut bytes, 0).expect("read");
            bytes
        });
        (name.to_owned(), disks.chain(memory).chain(kernels).collect())
    };
    all.map(show).collect()
}

fn chain(machine: &Machine, files: &Files, leaf: LayerId) -> Chain {
    let layers = files.open_chain(machine, leaf).unwrap_or_else(|problem| panic!("{}: {problem}", machine.name));
    Chain::new(layers, Access::Read).expect("a chain")
}

fn bytes_of(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; chain.size() as usize];
    chain.read(&mut bytes, 0).expect("read");
    bytes
}

/// All machines of a root, by name, of which no worker has one; each has the files that its ledger names, no others, and they are sound.
fn all(root: &Root) -> BTreeMap<String, Held> {
    let held = |found: Found| {
        let files = root.files(found.id).expect("a folder");
        let machine = Ledger::read(files.folder()).expect("a ledger").machine;
        let audit = audit(&machine, &files, false, &[]).expect("audited");
        assert!(audit.findings.is_empty(), "{}: {audit:?}", found.name);
        let shown = shown(&machine, &files);
        (found.name, Held { machine, shown })
    };
    root.list().expect("listed").into_iter().map(held).collect()
}

/// What the next workers do first, and the next creation. Then nothing is half done, and nothing is out of sight.
fn recover(sim: &Sim) -> Root {
    let root = root(sim);
    for found in root.list().expect("listed") {
        let keeper = keeper(&root.files(found.id).expect("a folder"));
        keeper.work_off_carries().expect("worked off");
        keeper.finish_clones(&root).expect("finished");
        keeper.undo_unfinished(None).expect("undone");
        let rows = keeper.rows();
        assert_eq!(rows.journals().count(), 0, "{}", found.name);
        assert!(rows.jobs().iter().all(|job| job.state.ended()), "{}", found.name);
    }
    let _names = root.lock_names().expect("locked");
    root.sweep().expect("swept");
    let there = sim.root().list().expect("listed");
    let other = there.iter().find(|name| *name != "lock" && name.parse().map(MachineId).is_err());
    assert_eq!(other, None, "out of sight");
    root
}

/// Each machine's worker merges what nobody else has.
fn collect(root: &Root) {
    for found in root.list().expect("listed") {
        let keeper = keeper(&root.files(found.id).expect("a folder"));
        keeper.remove_garbage().expect("removed");
        while let Some(folding) = keeper.next_fold(None, Begin::default()).expect("looked") {
            let ended = keeper.fold(folding, &Cancel::default());
            keeper.folded(&ended, None).expect("folded");
        }
    }
}

fn remove(root: &Root, id: MachineId) {
    root.hide(id).expect("out of sight");
    root.give_up(id);
}

/// Each machine is deleted in its turn: those that are left are as they were. In the end nothing is left.
fn delete_all(sim: &Sim, root: &Root, mut held: BTreeMap<String, Held>, backwards: bool) {
    while let Some((_, gone)) = if backwards { held.pop_last() } else { held.pop_first() } {
        remove(root, gone.machine.id);
        assert!(all(root) == held, "without {}", gone.machine.name);
    }
    assert_eq!((sim.root().list().expect("listed").as_slice(), sim.used()), (&["lock".to_owned()][..], 0));
}

/// How many states were seen of something that was cut off,
#[derive(Debug, Default)]
struct Seen {
    /// in which all machines were as before,
    before: usize,
    /// as after,
    after: usize,
    /// or neither: some were as before, and some as after;
    between: usize,
    /// and in which the power cut had left a file only one of its names,
    lost: usize,
    /// or had brought back a name of a file that has another.
    back: usize,
}

/// Does something to the machines of a disk, and cuts the power at every operation of it. Whatever that leaves, each machine comes back as it was
/// before or as it is afterwards, no link has leaked, and deleted they leave nothing.
fn cut_everywhere(lab: &Lab, act: impl FnOnce(&Lab)) -> Seen {
    let before = all_of(&lab.sim);
    let copies = Arc::new(Mutex::new(Vec::new()));
    let (first, taken) = (lab.sim.counts().operations, Arc::clone(&copies));
    lab.sim
        .copy_before((first..first + 10_000).collect(), move |_, copy| taken.lock().expect("not poisoned").push(copy));
    act(lab);
    let done = lab.sim.counts().operations - first;
    let mut copies = std::mem::take(&mut *copies.lock().expect("not poisoned"));
    assert_eq!(copies.len() as u64, done, "every operation");
    copies.push(lab.sim.fork());
    let after = all_of(&lab.sim);
    let (mut seen, mut known) = (Seen::default(), HashSet::new());
    for (nth, copy) in copies.iter().enumerate() {
        let there = links(copy);
        for (how, disk) in states(copy, nth as u64) {
            // (Two files of the same bytes are not one of two names.)
            let left = links(&disk);
            if nth < copies.len() - 1 && !known.insert((disk.digest(), left.clone())) {
                continue;
            }
            seen.lost += usize::from(there.iter().any(|(path, links)| *links > 1 && left.get(path) == Some(&1)));
            seen.back += usize::from(left.iter().any(|(path, links)| *links > 1 && !there.contains_key(path)));
            let looked = catch_unwind(AssertUnwindSafe(|| look(&disk, &before, &after, nth)));
            let (is_before, is_after) = looked.unwrap_or_else(|_| panic!("cut at {nth} of {done}, {how}"));
            assert!(is_after || nth < copies.len() - 1, "it was done, {how}");
            seen.before += usize::from(is_before);
            seen.after += usize::from(is_after);
            seen.between += usize::from(!is_before && !is_after);
        }
    }
    seen
}

/// The machines of a disk that somebody works with.
fn all_of(sim: &Sim) -> BTreeMap<String, Held> {
    all(&root(&sim.fork()))
}

/// What a power cut may leave: any of what was not synced; and of the folders one alone that was, or all but one.
fn states(copy: &Sim, seed: u64) -> impl Iterator<Item = (String, Sim)> {
    let any = Crash::several(seed, 6).map(|crash| (format!("{crash:?}"), copy.after_crash(crash)));
    let folders = folders(&*copy.root(), "");
    let others = folders.clone();
    let one = folders.clone().into_iter().map(|folder| (format!("only {folder} synced"), vec![folder]));
    let but = folders.into_iter().map(move |but| {
        (format!("all but {but} synced"), others.iter().filter(|folder| **folder != but).cloned().collect())
    });
    any.chain(one.chain(but).map(|(how, synced)| {
        let disk = copy.fork();
        for path in synced {
            folder(&disk, &path).sync().expect("synced");
        }
        (how, disk.after_crash(Crash::Nothing))
    }))
}

/// The files of a disk, with how many names each has.
fn links(disk: &Sim) -> BTreeMap<String, u64> {
    let links = |path: String| {
        let folder = folder(disk, &path);
        let names = folder.list().expect("listed").into_iter();
        names.filter_map(move |name| Some((format!("{path}/{name}"), folder.links(&name).ok()?)))
    };
    folders(&*disk.root(), "").into_iter().flat_map(links).collect()
}

/// The paths of a folder and of all below it.
fn folders(folder: &dyn Folder, path: &str) -> Vec<String> {
    let mut all = vec![path.to_owned()];
    for name in folder.list().expect("listed") {
        if let Ok(inner) = folder.folder(&name) {
            all.extend(folders(&*inner, &format!("{path}/{name}")));
        }
    }
    all
}

fn folder(disk: &Sim, path: &str) -> Arc<dyn Folder> {
    path.split('/').skip(1).fold(disk.root(), |folder, name| folder.folder(name).expect("a folder"))
}

/// Whether the machines that are there after a power cut are as before, and as afterwards.
fn look(disk: &Sim, before: &BTreeMap<String, Held>, after: &BTreeMap<String, Held>, nth: usize) -> (bool, bool) {
    let root = recover(disk);
    let held = all(&root);
    for name in before.keys().chain(after.keys()) {
        let (was, is, will) = (before.get(name), held.get(name), after.get(name));
        assert!(is == was || is == will, "{name} is neither as before nor as after: {is:?}");
    }
    assert!(held.keys().all(|name| before.contains_key(name) || after.contains_key(name)), "{:?}", held.keys());
    let is = (held == *before, held == *after);
    collect(&root);
    let collected = all(&root);
    assert!(held.iter().all(|(name, held)| held.shown == collected[name].shown), "collected");
    let held = collected;
    delete_all(disk, &root, held, nth.is_multiple_of(2));
    is
}

#[test]
fn machines_that_are_made_are_all_there_or_none() {
    let seen = cut_everywhere(&Lab::saved(), |lab| drop(lab.clone_to("Wednesday", &["twin", "third"])));
    assert!(seen.before > 100 && seen.after > 50 && seen.between == 0, "{seen:?}");
}

/// What nothing names any more in the source waits as long as the other has it, too, and is merged afterwards.
#[test]
fn a_machine_that_is_detached_shares_what_it_did_or_nothing() {
    let lab = Lab::saved();
    let twin = keeper(&lab.link("Wednesday"));
    lab.delete_all();
    let seen = cut_everywhere(&lab, |_| {
        let task = task(&twin, "detach");
        let (shared, bytes) = twin.shared();
        assert_eq!(shared.len(), 4, "the base, those of two days and the memory");
        let gone = twin.copy_shared(&task, &shared, bytes, Some(&Value::Null)).expect("copied");
        twin.forget(&gone).expect("forgotten");
        twin.own_boot();
        assert!(twin.shared().0.is_empty());
    });
    assert!(seen.before > 100 && seen.after > 50 && seen.between == 0, "{seen:?}");
}

#[test]
fn a_machine_that_takes_over_anothers_snapshot_is_what_it_was_or_what_that_holds() {
    let keep = Present::Keep { name: Some("kept".to_owned()) };
    // What is discarded goes at once, or is in the trash for a while.
    for (present, undo_for) in [(keep, 0), (Present::Discard, 0), (Present::Discard, 3600)] {
        let lab = Lab::saved();
        let other = new_machine(&lab.root, "other");
        other.book().commit(|rows| rows.machine.policy.undo_for = undo_for).expect("committed");
        write(&other, "other");
        let seen = cut_everywhere(&lab, |lab| {
            let linked = lab.linked("Wednesday", "one");
            let lent = linked.machine.id;
            lab.keeper.lend(&lab.root, &task(&lab.keeper, "lend"), linked).expect("lent");
            other.take_over(&lab.root, &task(&other, "apply"), lent, "one@Wednesday", &present).expect("taken over");
        });
        assert!(seen.before > 100 && seen.after > 50 && seen.between == 0, "{present:?}: {seen:?}");
    }
}

#[test]
fn of_two_that_share_one_is_deleted_and_the_other_is_whole() {
    for gone in ["one", "twin"] {
        let lab = Lab::saved();
        let twin = lab.link("Wednesday");
        let ids = [lab.rows().id, keeper(&twin).rows().machine.id];
        lab.delete_all();
        let seen = cut_everywhere(&lab, |lab| remove(&lab.root, ids[usize::from(gone == "twin")]));
        assert!(seen.before > 5 && seen.after > 50 && seen.between == 0, "{gone}: {seen:?}");
    }
}

/// The folder of the one was synced, and that of the other was not: a file that ought to have two names has one, or the other way round.
#[test]
fn a_power_cut_between_the_syncs_of_two_folders_costs_neither_a_file() {
    let seen = cut_everywhere(&Lab::saved(), |lab| drop(lab.link("Wednesday")));
    assert!(seen.lost > 20 && seen.between == 0, "{seen:?}");
    // The source gives up its name of the memory.
    let lab = Lab::saved();
    lab.link("Wednesday");
    lab.keeper.book().commit(|rows| rows.machine.turn_off()).expect("committed");
    lab.delete_all();
    let seen = cut_everywhere(&lab, |lab| lab.keeper.remove_garbage().expect("removed"));
    assert!(seen.back > 0 && seen.between == 0, "{seen:?}");
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

/// Whatever is shared, what is folded next is the first of the runs that are left.
#[test]
fn what_is_folded_next_shares_nothing() {
    let lab = Lab::new();
    for day in ["Wednesday", "Thursday", "Friday"] {
        lab.snapshot(day);
    }
    lab.delete_all();
    let (machine, files) = (lab.rows(), lab.keeper.files());
    let disks = folder(&lab.sim, &format!("/{}/disks", machine.id.0.simple()));
    let names: Vec<&str> = machine.layers.values().filter_map(|row| row.file.strip_prefix("disks/")).collect();
    let mut runs = HashSet::new();
    for shared in 0..1_u32 << names.len() {
        let shared: Vec<&str> =
            names.iter().enumerate().filter(|(nth, _)| shared >> nth & 1 == 1).map(|(_, name)| *name).collect();
        for name in &shared {
            disks.link(name, &*disks, &format!("{name}.twin")).expect("linked");
        }
        let first = files.first_run(&machine);
        assert_eq!(first, files.garbage(&machine).runs().next().unwrap_or_default(), "shared: {shared:?}");
        runs.insert(first.len());
        for name in &shared {
            disks.unlink(&format!("{name}.twin")).expect("removed");
        }
    }
    assert!(runs.len() > 3, "of {runs:?} folds");
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
            with.snapshots.values().next().cloned().expect("taken")
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
