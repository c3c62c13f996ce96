//! A machine whose ledger is lost is what it was: snapshots, branches, memory, two disks, configuration, to the last sector. Lives of machines are
//! those of the crash test, folds in both directions among them.

#[path = "stack/model.rs"]
mod model;
#[expect(dead_code, reason = "each test uses a part of the samples")]
mod sample;
#[expect(dead_code, reason = "each test uses a part of the world")]
#[path = "stack/world.rs"]
mod world;

use image::{Format, Kind, LayerInfo, ParentLink};
use machine::files::Files;
use machine::garbage::{Garbage, garbage};
use machine::label::{Base, Head, Label, Present};
use machine::ledger::{self, Ledger};
use machine::request::{Problem, ProblemKind};
use machine::rescue::{Found, Rescued, Unknown, rebuild, rescue_files};
use machine::tree::{
    DiskId, Firmware, LayerFormat, LayerId, LayerKind, LayerRow, Machine, MachineId, Snapshot, SnapshotId,
    SnapshotState, State,
};
use model::Model;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use store::sim::{At, Crash, Sim};
use store::{Folder, Mode};
use world::{Dice, Moment, World, files};

/// How much a life does.
const LIFE: u32 = 60;

fn live(world: &mut World) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    matches!(catch_unwind(AssertUnwindSafe(|| runtime.block_on(world.live(LIFE)))), Ok(Ok(())))
}

fn machine(format: LayerFormat) -> Machine {
    let mut machine = sample::machine(2);
    machine.layers.values_mut().for_each(|row| row.format = format);
    machine
}

/// The same machine, but that its last disk is what its UEFI keeps.
fn with_uefi(mut machine: Machine) -> Machine {
    let disk = machine.now.config.disks.pop().expect("a disk");
    let leaf = machine.now.disks.remove(&disk.id).expect("its leaf");
    machine.now.config.firmware = Firmware::Uefi;
    machine.now.disks.insert(DiskId::firmware(), leaf);
    machine.next_disk -= 1;
    // The host's clock was set back since: which file was written last is not to be told by it.
    machine.created = "2100-01-01T00:00:00Z".parse().expect("a time");
    machine
}

/// A life to its end, its guest off or saved.
fn lived(machine: &Machine, seed: u64) -> World {
    let mut world = World::new(machine, seed);
    assert!(live(&mut world), "seed {seed}: {}", world.doing());
    world.rest().expect("it comes to rest");
    world
}

fn rescue(files: &Files, id: MachineId) -> Result<Rescued, Problem> {
    rescue_files(files, id, &[], |name| Ok(name.to_owned()))
}

/// What is left when the ledger is not.
fn without_ledger(disk: &Sim) -> Files {
    let files = files(disk);
    files.folder().unlink(ledger::NAME).expect("it was there");
    files
}

fn rows(files: &Files) -> ledger::State {
    Ledger::read(files.folder()).expect("it is sound")
}

/// What a machine is, but for what is of the moment.
fn lasting(machine: &Machine) -> Machine {
    let mut machine = machine.clone();
    let now = &mut machine.now;
    (now.state, now.memory, now.memory_base, now.run) = (State::Off, None, None, None);
    (now.touched, now.generation) = (true, uuid::Uuid::nil());
    machine.layers = needed(&machine).into();
    for snapshot in machine.snapshots.values_mut() {
        // The sample's disks are of another size than its configuration says.
        snapshot.config.disks.iter_mut().for_each(|disk| disk.size = 0);
    }
    machine.now.config.disks.iter_mut().for_each(|disk| disk.size = 0);
    machine
}

/// The snapshots, but for what each stands on, and the disks of Now.
fn but_for_parents(machine: &Machine) -> Machine {
    let mut machine = lasting(machine);
    machine.now.parent = None;
    machine.snapshots.values_mut().for_each(|snapshot| snapshot.parent = None);
    machine.layers.clear();
    machine
}

/// The layers that something needs.
fn needed(machine: &Machine) -> BTreeMap<LayerId, LayerRow> {
    let snapshots = machine.snapshots.values().flat_map(|s| s.disks.values().chain(&s.memory));
    let named = snapshots.chain(machine.now.disks.values());
    named.flat_map(|id| machine.chain(*id)).map(|id| (id, machine.layers[&id].clone())).collect()
}

fn all_comes_back(machine: &Machine, seeds: std::ops::Range<u64>) {
    let (mut snapshots, mut branches, mut memories, mut folds, mut saved_ones, mut exact) = (0, 0, 0, 0, 0, 0);
    for seed in seeds {
        let world = lived(machine, seed);
        // What could be taken back comes back, too.
        let mut before = world.machine();
        for trash in world.machine().trash.keys() {
            before.take_back(*trash);
        }
        // What is taken back or given up changes what others stand on, and that is not told to each of them.
        let undoes = before.policy.undo_for > 0;
        let pending = garbage(&before);
        folds += world.diary.iter().filter(|(_, what)| *what == "fold").count();
        let files = without_ledger(&world.disk);
        let rescued = rescue(&files, before.id).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        let mut after = rows(&files);
        let saved = before.now.state == State::Saved;
        let mut model = world.models().swap_remove(0);
        model.snapshots.append(&mut model.trash);
        if saved {
            saved_ones += 1;
            // One that was given up and whose memory is still to be removed comes back, too.
            let is_state = |s: &&Snapshot| s.name == "saved state" && s.memory == before.now.memory;
            match after.machine.snapshots.values().find(is_state).map(|s| s.id) {
                Some(state) => take_out(&mut after.machine, state, &before, pending == Garbage::default() && !undoes),
                // A snapshot has the same memory, over the same disks.
                None => assert!(before.snapshots.values().any(|s| s.memory == before.now.memory), "seed {seed}"),
            }
            assert!(said(&rescued).contains("the machine was saved"), "seed {seed}");
            model.saved = None;
        } else if pending == Garbage::default() {
            assert_eq!(rescued.unknown, [], "seed {seed}: {:?}", machine::log::read(&files));
        }
        if pending == Garbage::default() {
            exact += 1;
            assert_eq!(needed(&after.machine), needed(&before), "seed {seed}");
            let compared = if undoes { but_for_parents } else { lasting };
            assert_eq!(compared(&after.machine), compared(&before), "seed {seed}");
        } else {
            // What was deleted and not merged yet may come back.
            after.machine.snapshots.retain(|id, _| before.snapshots.contains_key(id));
            assert_eq!(but_for_parents(&after.machine), but_for_parents(&before), "seed {seed}: {}", said(&rescued));
        }
        model.check(&after, &files, None).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        snapshots += before.snapshots.len();
        let parents: Vec<_> = before.snapshots.values().filter_map(|s| s.parent).collect();
        branches += usize::from((1..parents.len()).any(|at| parents[at..].contains(&parents[at - 1])));
        memories += before.snapshots.values().filter(|s| s.memory.is_some()).count();
    }
    println!(
        "{snapshots} snapshots, {memories} with memory, {branches} trees with branches, {folds} folds, {saved_ones} saved"
    );
    assert!(snapshots > 20 && memories > 5 && branches > 3 && folds > 20 && saved_ones > 0 && exact > 3);
}

/// A saved machine comes back as it was, but for a snapshot of its memory, on which Now stands.
fn take_out(machine: &mut Machine, state: SnapshotId, before: &Machine, exact: bool) {
    let state = machine.snapshots.remove(&state).expect("it is there");
    assert_eq!((&state.disks, state.memory), (&before.now.disks, before.now.memory));
    assert_eq!(machine.now.parent, Some(state.id));
    assert!(!exact || state.parent == before.now.parent);
    machine.now.parent = before.now.parent;
    let leaves = std::mem::replace(&mut machine.now.disks, before.now.disks.clone());
    assert!(leaves.values().all(|leaf| machine.layers.remove(leaf).is_some()));
    let memory = machine.chain(state.memory.expect("memory"));
    let needed = needed(before);
    memory.iter().filter(|id| !needed.contains_key(id)).for_each(|id| drop(machine.layers.remove(id)));
}

#[test]
fn all_comes_back_of_a_machine_with_two_disks() {
    all_comes_back(&machine(LayerFormat::Vhdx), 0..30);
}

#[test]
fn and_of_one_with_vhds() {
    all_comes_back(&machine(LayerFormat::Vhd), 100..130);
}

#[test]
fn all_comes_back_of_what_uefi_keeps() {
    all_comes_back(&with_uefi(machine(LayerFormat::Vhdx)), 200..220);
}

/// The life of this seed, as it was every now and then.
fn moments(format: LayerFormat, seed: u64) -> Vec<Moment> {
    let mut world = World::new(&machine(format), seed);
    let moments = world.moments((200..20_000).step_by(101));
    assert!(live(&mut world), "seed {seed}");
    moments.take()
}

/// Of a power cut that takes the ledger as well: whatever comes back under its own name holds what it held. What does not is the one snapshot
/// whose files had no time to say what they are.
#[test]
fn nothing_that_comes_back_is_something_else() {
    let (mut seen, mut known, mut lost) = (0, 0, 0);
    for (seed, format) in (200..212).zip([LayerFormat::Vhdx, LayerFormat::Vhdx, LayerFormat::Vhd].into_iter().cycle()) {
        for Moment { at, disk, doing, models } in moments(format, seed) {
            for crash in Crash::several(seed ^ at, 3) {
                let files = files(&disk.after_crash(crash));
                let Ok(before) = Ledger::read(files.folder()) else { continue };
                files.folder().unlink(ledger::NAME).expect("it was there");
                let what = format!("seed {seed}, cut at {at} while {doing}, {crash:?}");
                let rescued = rescue(&files, before.machine.id).unwrap_or_else(|problem| panic!("{what}: {problem}"));
                let after = rows(&files);
                for (id, snapshot) in &after.machine.snapshots {
                    let holds = models.iter().filter_map(|model| check_one(&after, &files, *id, model));
                    let holds: Vec<_> = holds.collect();
                    let fine = holds.is_empty() || holds.iter().any(Result::is_ok);
                    assert!(fine, "{what}: {}: {holds:?}; {:?}", snapshot.name, rescued.unknown);
                    known += usize::from(!holds.is_empty());
                }
                let ready = before.machine.snapshots.values().filter(|s| s.state == SnapshotState::Ready);
                for missing in ready.filter(|s| !after.machine.snapshots.contains_key(&s.id)) {
                    let newest = before.machine.snapshots.values().all(|s| nth(s) <= nth(missing));
                    let unlabelled = newest && matches!(doing, "label" | "snapshot" | "apply");
                    assert!(unlabelled, "{what}: {} is lost: {:?}", missing.name, rescued.unknown);
                    lost += 1;
                }
                seen += 1;
            }
        }
    }
    println!("{seen} states, {known} snapshots known, {lost} not known by their names any more");
    assert!(seen > 80 && known > 150, "{seen} {known} {lost}");
}

/// The how-manieth snapshot of its world it is; 0 for what was taken back of a present that was discarded.
fn nth(snapshot: &Snapshot) -> u32 {
    snapshot.name.strip_prefix('s').and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Whether a snapshot that a model knows holds what it ought to; a part of it may be missing.
fn check_one(rows: &ledger::State, files: &Files, id: SnapshotId, model: &Model) -> Option<model::Checked> {
    let mut content = model.snapshots.get(&id)?.clone();
    let mut rows = rows.clone();
    rows.machine.snapshots.retain(|other, _| *other == id);
    let found = &rows.machine.snapshots[&id];
    content.disks.retain(|disk, _| found.disks.contains_key(disk));
    content.memory = content.memory.filter(|_| found.memory.is_some());
    rows.machine.now.memory = None;
    let snapshots = BTreeMap::from([(id, content)]);
    let (trash, disks, ended) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let model = Model { snapshots, trash, disks, saved: None, ended };
    Some(model.check(&rows, files, None))
}

/// What is in the machine's folders, to see that nothing has changed.
fn images(files: &Files) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for folder in ["disks", "memory"] {
        let inner = files.folder().folder(folder).expect("a folder");
        for name in inner.list().expect("names") {
            let store = inner.open(&name, Mode::Read).expect("opens");
            let mut bytes = vec![0; store.len().expect("a length") as usize];
            store.read_at(&mut bytes, 0).expect("read");
            all.insert(format!("{folder}/{name}"), bytes);
        }
    }
    all
}

/// Cut off anywhere, a rescue has changed nothing or is done; and no image is written.
#[test]
fn a_rescue_that_is_cut_off_has_changed_nothing() {
    {
        let world = week();
        let id = world.machine().id;
        let files = files(&world.disk);
        let damaged = files.folder().open(ledger::NAME, Mode::Write).expect("it is there");
        damaged.write_at(&[0xa5; 4096], 0).expect("harmed");
        damaged.sync().expect("synced");
        drop(damaged);
        let before = images(&files);
        let start = world.disk.counts().operations;
        let whole = rescue(&crate::files(&world.disk.after_crash(Crash::Nothing)), id).expect("rescued");
        for cut in start.. {
            let disk = world.disk.after_crash(Crash::Nothing);
            let first = disk.counts().operations;
            disk.cut(At::Operation(first + (cut - start)));
            let done = catch_unwind(AssertUnwindSafe(|| rescue(&crate::files(&disk), id)));
            let done = matches!(done, Ok(Ok(_)));
            for crash in [Crash::Nothing].into_iter().chain(Crash::several(cut, 2)) {
                let after = crate::files(&disk.after_crash(crash));
                if let Err(error) = Ledger::read(after.folder()) {
                    assert_eq!(error.kind, ledger::ErrorKind::Damaged, "cut at {cut}, {crash:?}");
                    let again = rescue(&after, id).expect("rescued");
                    assert_eq!(again.tree.snapshots.len(), whole.tree.snapshots.len(), "cut at {cut}, {crash:?}");
                }
                if crash != Crash::Nothing {
                    continue;
                }
                let now = images(&after);
                assert!(before.iter().all(|(file, bytes)| now.get(file) == Some(bytes)), "cut at {cut}, {crash:?}");
            }
            if done {
                break;
            }
        }
    }
}

fn folder(files: &Files, name: &str) -> Arc<dyn Folder> {
    files.folder().folder(name).expect("a folder")
}

/// A machine with Monday under Tuesday, off.
fn week() -> World {
    let mut world = World::new(&machine(LayerFormat::Vhdx), 0);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(world.week()).expect("a week");
    world
}

fn snapshot<'a>(machine: &'a Machine, name: &str) -> Option<&'a Snapshot> {
    machine.snapshots.values().find(|snapshot| snapshot.name == name)
}

fn said(rescued: &Rescued) -> String {
    let line = |said: &Unknown| format!("{}: {}", said.file.clone().unwrap_or_default(), said.what);
    rescued.unknown.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// What could be taken back is a snapshot as before: too much comes back rather than too little.
#[test]
fn what_could_be_taken_back_comes_back() {
    let mut world = week();
    world.throw_away("s1").expect("deleted");
    let (files, before) = (files(&world.disk), world.machine());
    assert!(snapshot(&before, "s1").is_none() && before.trash.len() == 1);
    world.leave();
    files.folder().unlink(ledger::NAME).expect("it was there");
    rescue(&files, before.id).expect("rescued");
    let after = rows(&files).machine;
    let first = snapshot(&after, "s1").expect("it is back");
    assert_eq!(first.disks, before.trash.values().next().expect("a row").snapshots[0].disks);
    assert!(snapshot(&after, "s2").is_some());
}

#[test]
fn a_sound_ledger_is_left_alone_and_a_damaged_one_is_kept() {
    let mut world = week();
    let (files, id) = (files(&world.disk), world.machine().id);
    world.leave();
    let refusal = rescue(&files, id).expect_err("there is nothing to rescue");
    assert_eq!(refusal.kind, ProblemKind::Refused);
    for _ in 0..2 {
        let ledger = files.folder().open(ledger::NAME, Mode::Write).expect("it is there");
        ledger.write_at(&[7; 4096], 0).expect("harmed");
        drop(ledger);
        rescue(&files, id).expect("rescued");
    }
    let names = files.folder().list().expect("names");
    assert!(
        names.contains(&"ledger.damaged".to_owned()) && names.contains(&"ledger.damaged-2".to_owned()),
        "{names:?}"
    );
}

#[test]
fn a_file_that_is_gone_takes_with_it_what_stands_on_it() {
    let world = week();
    let before = world.machine();
    let files = without_ledger(&world.disk);
    let tuesday = snapshot(&before, "s2").expect("taken");
    let (disk, layer) = tuesday.disks.first_key_value().expect("a disk");
    let file = &before.layers[layer].file;
    folder(&files, "disks").unlink(file.strip_prefix("disks/").expect("in its folder")).expect("removed");
    let rescued = rescue(&files, before.id).expect("rescued");
    let after = rows(&files).machine;
    let monday = snapshot(&after, "s1").expect("it does not need it");
    assert_eq!((monday.disks.len(), monday.memory), (2, snapshot(&before, "s1").expect("taken").memory));
    let tuesday = snapshot(&after, "s2").expect("its other disk is here");
    assert!(tuesday.disks.len() == 1 && !tuesday.disks.contains_key(disk) && tuesday.memory.is_none(), "{tuesday:?}");
    // Now had stood on it: it begins anew.
    assert_eq!(after.now.parent, Some(tuesday.id), "{}", said(&rescued));
    assert!(said(&rescued).contains("s2: what it held of disk0 is lost"), "{}", said(&rescued));
    assert!(said(&rescued).contains("its memory is of no use"), "{}", said(&rescued));
}

#[test]
fn copies_and_files_of_others_stay_and_are_named() {
    let (world, other) = (week(), week());
    let before = world.machine();
    let files = without_ledger(&world.disk);
    let copy = |from: &Sim, file: &str, name: &str| {
        let bytes = images(&crate::files(from))[file].clone();
        folder(&files, "disks").create(name).expect("made").write_at(&bytes, 0).expect("copied");
    };
    let sealed =
        before.layers[snapshot(&before, "s1").expect("taken").disks.first_key_value().expect("a disk").1].clone();
    copy(&world.disk, &sealed.file, "a copy.vhdx");
    let theirs = other.machine();
    let foreign = theirs.layers[theirs.now.disks.first_key_value().expect("a disk").1].file.clone();
    copy(&other.disk, &foreign, "theirs.avhdx");
    let nonsense = folder(&files, "disks").create("notes.txt").expect("made");
    nonsense.write_at(b"remember the milk", 0).expect("written");
    let rescued = rescue(&files, before.id).expect("rescued");
    assert_eq!(lasting(&rows(&files).machine), lasting(&before), "{}", said(&rescued));
    for (file, what) in
        [("a copy.vhdx", "copy"), ("theirs.avhdx", "another machine's"), ("notes.txt", "cannot be read")]
    {
        let line = rescued.unknown.iter().find(|said| said.file.as_deref() == Some(&format!("disks/{file}")));
        assert!(line.is_some_and(|said| said.what.contains(what)), "{file}: {}", said(&rescued));
    }
    assert!(images(&files).len() == before.layers.len() + 3, "they are all there");
}

/// Without labels the tree is still there, under the names of files.
#[test]
fn without_labels_files_give_their_names() {
    let mut machine = sample::machine(1);
    let sim = Sim::new();
    let files = crate::files(&sim);
    files.create_folders().expect("folders");
    let base = machine.layers.values_mut().next().expect("a base");
    base.file = format!("disks/{}.vhdx", base.id);
    files.create_layer(base, 1 << 20, None, None).expect("made").close().expect("closed");
    let mut below = base.clone();
    for _ in 0..2 {
        let row = files.new_row(LayerKind::Disk, LayerFormat::Vhdx, Some(below.id));
        let parent = files.open_layer(&below, Mode::Read).expect("opens");
        let parent = machine::files::Parent { layer: &*parent, row: &below };
        files.create_layer(&row, 1 << 20, Some(&parent), None).expect("made").close().expect("closed");
        below = row;
    }
    let rescued = rescue(&files, machine.id).expect("rescued");
    let after = rows(&files).machine;
    assert_eq!(
        (after.name.as_str(), after.snapshots.len(), after.layers.len()),
        ("rescued", 2, 3),
        "{}",
        said(&rescued)
    );
    assert_eq!(after.now.disks.values().next(), Some(&below.id), "the only leaf is Now's");
    assert!(after.snapshots.values().all(|s| s.name.starts_with("found: ") && s.memory.is_none()));
    assert!(said(&rescued).contains("not known"), "{}", said(&rescued));
}

/// Whatever files say of themselves and of each other, what is made of it are sound rows, and nothing of a path is taken over.
#[test]
fn nonsense_becomes_sound_rows() {
    let (mut rebuilt, mut snapshots, mut nothing) = (0, 0, 0);
    for seed in 0..4000 {
        let mut dice = Dice::new(seed);
        let files: Vec<Found> = (0..=dice.below(10)).map(|nth| nonsense(&mut dice, nth)).collect();
        let machine = MachineId(pool(&mut dice, 2));
        let Ok(mut made) = rebuild(machine, &files, &[], jiff::Timestamp::UNIX_EPOCH, Vec::new()) else {
            nothing += 1;
            continue;
        };
        if let Some(over) = made.over {
            assert!(made.machine.now.disks.is_empty(), "seed {seed}");
            for (disk, layer) in &made.machine.snapshots[&over].disks {
                let row = sample::layer(LayerKind::Disk, Some(*layer));
                made.machine.now.disks.insert(disk.clone(), row.id);
                made.machine.layers.insert(row.id, row);
            }
        }
        made.machine.check().unwrap_or_else(|why| panic!("seed {seed}: {why}: {:#?}", made.machine));
        let configs = made.machine.snapshots.values().map(|snapshot| &snapshot.config);
        for config in configs.chain([&made.machine.now.config]) {
            assert!(
                config.cdrom.is_none() && config.machine_type.is_none() && config.memory <= 16 << 40,
                "seed {seed}"
            );
        }
        rebuilt += 1;
        snapshots += made.machine.snapshots.len();
    }
    println!("{rebuilt} rebuilt with {snapshots} snapshots, {nothing} came to nothing");
    assert!(rebuilt > 1000 && snapshots > 1000 && nothing > 10);
}

/// One of a few ids, so that files meet.
fn pool(dice: &mut Dice, size: u64) -> uuid::Uuid {
    uuid::Uuid::from_u128(u128::from(1 + dice.below(size)))
}

fn nonsense(dice: &mut Dice, nth: u64) -> Found {
    let kind = if dice.one_in(4) { LayerKind::Memory } else { LayerKind::Disk };
    let base = dice.one_in(3);
    let data_id = pool(dice, 9);
    let link = ParentLink {
        linkage: if dice.one_in(9) { uuid::Uuid::nil() } else { pool(dice, 9) },
        linkage2: dice.one_in(3).then(|| pool(dice, 9)),
        relative_path: dice.one_in(2).then(|| format!(r".\{}.vhdx", dice.below(10))),
        absolute_path: None,
    };
    let info = LayerInfo {
        format: if dice.one_in(5) { Format::Vhd } else { Format::Vhdx },
        kind: if base { Kind::Dynamic } else { Kind::Differencing },
        size: 1 << 20,
        sector_size: if dice.one_in(9) { 4096 } else { 512 },
        block_size: 1 << 20,
        data_id,
        disk_id: uuid::Uuid::nil(),
        parent: (!base).then_some(link),
    };
    let label = (!dice.one_in(4)).then(|| nonsensical(dice, kind, data_id));
    if kind == LayerKind::Disk && base && dice.one_in(4) {
        let info = LayerInfo { format: Format::Raw, data_id: uuid::Uuid::nil(), ..info };
        return Found { file: format!("/srv/{nth}.raw"), in_place: true, kind, info, label: None, holds: true };
    }
    Found { file: format!("disks/{nth}.vhdx"), in_place: false, kind, info, label, holds: dice.one_in(2) }
}

fn nonsensical(dice: &mut Dice, kind: LayerKind, data_id: uuid::Uuid) -> Label {
    let mut config = sample::machine(dice.below(3) as u32).now.config;
    config.machine_type = Some("pc,firmware=/etc/shadow".to_owned());
    config.cdrom = Some("/etc/shadow".to_owned());
    config.memory = 1 << dice.below(63);
    let mut disks = BTreeMap::new();
    for _ in 0..dice.below(3) {
        let disk = ["disk0", "disk1", "../disk", "disk"][dice.below(4) as usize];
        disks.insert(DiskId(disk.to_owned()), LayerId(pool(dice, 9)));
    }
    let snapshot = |dice: &mut Dice| Snapshot {
        under: None,
        id: SnapshotId(pool(dice, 5)),
        name: ["Monday", "", "a/b", "-x"][dice.below(4) as usize].to_owned(),
        note: String::new(),
        parent: dice.one_in(2).then(|| SnapshotId(pool(dice, 5))),
        created: jiff::Timestamp::UNIX_EPOCH,
        state: SnapshotState::Creating,
        vm_state: State::Stopping,
        config: config.clone(),
        disks: disks.clone(),
        memory: dice.one_in(2).then(|| LayerId(pool(dice, 9))),
        stats: machine::tree::Stats::default(),
    };
    let now = |dice: &mut Dice| Present {
        parent: dice.one_in(2).then(|| SnapshotId(pool(dice, 5))),
        config: config.clone(),
        disks: disks.clone(),
        memory: dice.one_in(2).then(|| LayerId(pool(dice, 9))),
        contents: disks.keys().map(|disk| (disk.clone(), data_id)).collect(),
    };
    Label {
        format: 1,
        at: jiff::Timestamp::UNIX_EPOCH,
        machine: Head {
            id: MachineId(pool(dice, 2)),
            name: "a/b".to_owned(),
            note: String::new(),
            created: jiff::Timestamp::UNIX_EPOCH,
            policy: machine::tree::Policy::default(),
        },
        layer: LayerId(pool(dice, 9)),
        kind,
        disk: disks.keys().next().cloned(),
        made: jiff::Timestamp::UNIX_EPOCH,
        base: dice.one_in(3).then(|| Base { file: "/srv/base.raw".to_owned(), format: LayerFormat::Raw }),
        snapshots: (0..dice.below(3)).map(|_| snapshot(dice)).collect(),
        now: dice.one_in(3).then(|| now(dice)),
        merging: (0..dice.below(2)).map(|_| LayerId(pool(dice, 9))).collect(),
        content: (!dice.one_in(3)).then_some(data_id),
    }
}

#[test]
fn an_empty_folder_is_no_machine() {
    let sim = Sim::new();
    let files = crate::files(&sim);
    files.create_folders().expect("folders");
    let problem = rescue(&files, MachineId::new()).expect_err("nothing is there");
    assert_eq!(problem.kind, ProblemKind::Damaged);
}
