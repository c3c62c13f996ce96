//! The ledger keeps what it acknowledged: through crashes at every operation, failures of every operation, and damage.

#[expect(dead_code, reason = "each test uses a part of the samples")]
mod sample;

use machine::ledger::{ErrorKind, Journal, Ledger, State};
use machine::request::{Job, JobState};
use machine::root::Root;
use machine::tree::{JobId, Machine, SnapshotId};
use proptest::prelude::*;
use sample::{job, leaves, take};
use std::collections::BTreeSet;
use std::sync::Arc;
use store::host::HostFolder;
use store::sim::{At, Crash, Sim, Times};
use store::{Folder, Mode};

/// Something that a worker commits.
#[derive(Debug, Clone)]
enum Op {
    Snapshot(String),
    Delete(usize),
    Rename(String),
    Journal(usize),
    End,
    Job,
    Collect,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => "[a-zä\"\\\\]{0,300}".prop_map(Op::Snapshot),
        1 => any::<usize>().prop_map(Op::Delete),
        1 => ".{1,20}".prop_map(Op::Rename),
        1 => (0..40_usize).prop_map(Op::Journal),
        1 => Just(Op::End),
        1 => Just(Op::Job),
        1 => Just(Op::Collect),
    ]
}

fn change(state: &mut State, op: &Op) {
    let machine = &mut state.machine;
    match op {
        Op::Snapshot(name) => machine.take(take(name), leaves(&machine.now.disks.clone())),
        Op::Delete(nth) => {
            let ids: Vec<SnapshotId> = machine.snapshots.keys().copied().collect();
            if !ids.is_empty() {
                machine.delete(ids[nth % ids.len()], false);
            }
        }
        Op::Rename(name) => machine.name.clone_from(name),
        Op::Journal(files) => state.insert_journal(Journal {
            job: JobId::new(),
            request: serde_json::json!({ "verb": "snapshot", "name": "x".repeat(*files) }),
            files: (0..*files).map(|n| format!("disks/{n}.avhdx")).collect(),
            note: String::new(),
        }),
        Op::End => {
            let ids: Vec<JobId> = state.journals().map(|journal| journal.job).collect();
            for id in ids {
                state.remove_journal(id);
            }
        }
        Op::Job => {
            state.insert_job(job(state.jobs().len() as i64, JobState::Completed));
            state.prune_jobs(3);
        }
        Op::Collect => {
            for id in machine::garbage::garbage(machine).remove {
                machine.layers.remove(&id);
            }
        }
    }
}

/// Fixed sequences of a seed: the same in each of the many runs that are cut at different places.
fn sequence(seed: u64, length: usize) -> Vec<Op> {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let ops = proptest::collection::vec(op(), length);
    ops.new_tree(&mut runner).expect("a sequence").current()
}

/// What a run of a worker came to.
struct Run {
    /// The last state that was acknowledged; `None` before the creation was.
    acknowledged: Option<State>,
    /// The one that was to be next.
    flying: Option<State>,
}

/// All but the moment, which is the commit's to say.
fn rows(state: &State) -> (&Machine, Vec<Job>, Vec<&Journal>) {
    (&state.machine, state.jobs(), state.journals().collect())
}

/// Creates a ledger and commits one operation after the other until one fails.
fn run(folder: &Arc<dyn Folder>, machine: &Machine, ops: &[Op]) -> Run {
    let Ok(mut ledger) = Ledger::create(folder, machine) else {
        return Run { acknowledged: None, flying: None };
    };
    for op in ops {
        let before = ledger.state().clone();
        let mut after = None;
        let committed = ledger.commit(|state| {
            change(state, op);
            after = Some(state.clone());
        });
        if committed.is_err() {
            assert_eq!(ledger.state(), &before, "a failed commit changes nothing");
            return Run { acknowledged: Some(before), flying: after };
        }
        assert_eq!(rows(ledger.state()), rows(after.as_ref().expect("it was changed")));
    }
    Run { acknowledged: Some(ledger.state().clone()), flying: None }
}

/// What is found after a crash is what was acknowledged or what was under way; and it works.
fn check_after_crash(sim: &Sim, run: &Run, machine: &Machine) {
    let folder = sim.root();
    let read = Ledger::read(&folder);
    let opened = Ledger::open(&folder);
    let Some(acknowledged) = &run.acknowledged else {
        // Not acknowledged: whole, or not there at all.
        match (read, opened) {
            (Ok(read), Ok(opened)) => assert_eq!((&read.machine, opened.state()), (machine, &read)),
            (Err(read), Err(opened)) => {
                let absent = ErrorKind::Store(store::ErrorKind::NotFound);
                assert_eq!((read.kind, opened.kind), (absent, absent), "{read}");
            }
            (read, opened) => panic!("{read:?} but {opened:?}"),
        }
        Ledger::create(&folder, machine).expect("can be made again");
        return;
    };
    let mut opened = opened.expect("opens");
    assert_eq!(opened.state(), &read.expect("reads"));
    let found = opened.state() == acknowledged || Some(rows(opened.state())) == run.flying.as_ref().map(rows);
    assert!(found, "neither the last acknowledged state nor the next");
    opened.commit(|state| "recovered".clone_into(&mut state.machine.note)).expect("goes on");
    opened.close();
    assert_eq!(Ledger::read(&folder).expect("reads").machine.note, "recovered");
}

#[test]
fn what_is_committed_is_there() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let folder: Arc<dyn Folder> = Arc::new(HostFolder::open(place.path()).expect("open"));
    let run = run(&folder, &sample::machine(2), &sequence(1, 60));
    let state = run.acknowledged.expect("all went well");
    assert!(run.flying.is_none());
    assert!(state.machine.snapshots.len() > 5 && state.journals().count() > 0 && !state.jobs().is_empty());
    assert_eq!(Ledger::read(&folder).expect("reads"), state);
    let ledger = Ledger::open(&folder).expect("opens");
    assert_eq!(ledger.state(), &state);
    assert_eq!(*ledger.shared(), state);
}

/// Cuts the power at every operation.
#[test]
fn what_was_acknowledged_survives_any_crash() {
    let mut states = BTreeSet::new();
    for seed in 0..3 {
        let (machine, ops) = (sample::machine(1), sequence(seed, 14));
        let whole = Sim::new();
        assert!(run(&whole.root(), &machine, &ops).flying.is_none());
        for operation in 0..whole.counts().operations {
            let sim = Sim::new();
            sim.cut(At::Operation(operation));
            let run = run(&sim.root(), &machine, &ops);
            for crash in Crash::several(operation, 8) {
                let after = sim.after_crash(crash);
                states.insert(after.digest());
                check_after_crash(&after, &run, &machine);
            }
        }
    }
    assert!(states.len() > 1000, "{} states", states.len());
}

/// Cuts it a second time, while what the first cut left is repaired.
#[test]
fn a_repair_survives_a_crash_too() {
    let (machine, ops) = (sample::machine(1), sequence(7, 8));
    let whole = Sim::new();
    run(&whole.root(), &machine, &ops);
    for operation in (0..whole.counts().operations).step_by(3) {
        let sim = Sim::new();
        sim.cut(At::Operation(operation));
        let run = run(&sim.root(), &machine, &ops);
        if run.acknowledged.is_none() {
            continue;
        }
        let first = sim.after_crash(Crash::seeded(operation));
        let whole = first.after_crash(Crash::Everything);
        drop(Ledger::open(&whole.root()).expect("opens"));
        for second in 0..whole.counts().operations {
            let again = first.after_crash(Crash::Everything);
            again.cut(At::Operation(second));
            drop(Ledger::open(&again.root()));
            check_after_crash(&again.after_crash(Crash::seeded(second)), &run, &machine);
        }
    }
}

/// Fails every operation in turn, once or from then on.
#[test]
fn a_failed_commit_changes_nothing() {
    let (machine, ops) = (sample::machine(1), sequence(3, 8));
    let whole = Sim::new();
    run(&whole.root(), &machine, &ops);
    let operations = whole.counts().operations;
    for (kind, times) in [
        (store::ErrorKind::Io, Times::Once),
        (store::ErrorKind::NoSpace, Times::Once),
        (store::ErrorKind::NoSpace, Times::Forever),
    ] {
        for operation in 0..operations {
            let sim = Sim::new();
            sim.fail(At::Operation(operation), kind, times);
            let Ok(mut ledger) = Ledger::create(&sim.root(), &machine) else { continue };
            let failed = ops.iter().find_map(|op| {
                let (before, mut after) = (ledger.state().clone(), None);
                let committed = ledger.commit(|state| {
                    change(state, op);
                    after = Some(state.clone());
                });
                committed.err().map(|error| (error, before, after))
            });
            let Some((error, before, after)) = failed else { continue };
            assert_eq!(ledger.state(), &before);
            let unsure = error.kind == ErrorKind::Unsure;
            assert_eq!(unsure, times == Times::Forever, "{error}");
            assert!(unsure || error.kind == ErrorKind::Store(kind), "{error:?}");
            // A crash now finds the state that is in memory, unless we were told that it may not.
            for crash in Crash::several(operation, 6) {
                let run = Run { acknowledged: Some(before.clone()), flying: after.clone().filter(|_| unsure) };
                check_after_crash(&sim.after_crash(crash), &run, &machine);
            }
            sim.heal();
            ledger.commit(|state| "healed".clone_into(&mut state.machine.note)).expect("goes on");
            let healed = ledger.state().clone();
            assert_eq!(healed.machine.snapshots, before.machine.snapshots);
            drop(ledger);
            assert_eq!(Ledger::read(&sim.after_crash(Crash::Nothing).root()).expect("reads"), healed);
        }
    }
}

#[test]
fn a_change_of_nothing_writes_nothing() {
    let sim = Sim::new();
    let mut ledger = Ledger::create(&sim.root(), &sample::machine(1)).expect("create");
    let before = sim.counts();
    ledger.commit(|_| {}).expect("commit");
    ledger.commit(|state| "lab".clone_into(&mut state.machine.name)).expect("commit");
    assert_eq!(sim.counts(), before);
    ledger.commit(|state| "other".clone_into(&mut state.machine.name)).expect("commit");
    assert_eq!(sim.counts().syncs, before.syncs + 1, "a commit is one sync");
}

#[test]
fn a_change_is_later_than_all_before_it_whatever_the_clock_says() {
    let folder = Sim::new().root();
    let mut machine = sample::machine(1);
    machine.created = "2100-01-01T00:00:00Z".parse().expect("a time");
    let mut ledger = Ledger::create(&folder, &machine).expect("create");
    for name in ["one", "two", "three"] {
        let before = ledger.state().at();
        ledger.commit(|state| name.clone_into(&mut state.machine.name)).expect("commit");
        assert!(ledger.state().at() > before);
        let at = ledger.state().at();
        ledger.close();
        ledger = Ledger::open(&folder).expect("open");
        assert_eq!(ledger.state().at(), at);
    }
}

#[test]
fn rows_that_make_no_sense_are_not_written() {
    let sim = Sim::new();
    let mut ledger = Ledger::create(&sim.root(), &sample::machine(1)).expect("create");
    let before = ledger.state().clone();
    let error = ledger.commit(|state| state.machine.layers.clear()).expect_err("names layers that are gone");
    assert_eq!(error.kind, ErrorKind::Invalid);
    assert_eq!(ledger.state(), &before);
    ledger.commit(|state| "fine".clone_into(&mut state.machine.note)).expect("goes on");
}

#[test]
fn reading_leaves_the_file_alone() {
    let sim = Sim::new();
    let folder = sim.root();
    let mut ledger = Ledger::create(&folder, &sample::machine(1)).expect("create");
    assert_eq!(Ledger::read(&folder).expect_err("it is open").kind, ErrorKind::Store(store::ErrorKind::Locked));
    assert_eq!(Ledger::open(&folder).expect_err("it is open").kind, ErrorKind::Store(store::ErrorKind::Locked));
    ledger.commit(|state| change(state, &Op::Snapshot("a".to_owned()))).expect("commit");
    let state = ledger.state().clone();
    // As a killed worker leaves it.
    let crashed = sim.after_crash(Crash::Everything);
    let (digest, counts) = (crashed.digest(), crashed.counts());
    assert_eq!(Ledger::read(&crashed.root()).expect("reads"), state);
    assert_eq!((crashed.digest(), crashed.counts().operations), (digest, counts.operations));
    // Readers do not disturb each other.
    let other = crashed.root().open("ledger", Mode::Read).expect("open");
    other.lock(store::Lock::Shared).expect("lock");
    Ledger::read(&crashed.root()).expect("reads");
}

#[test]
fn what_is_no_ledger_is_refused() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let folder: Arc<dyn Folder> = Arc::new(HostFolder::open(place.path()).expect("open"));
    let path = place.path().join("ledger");
    assert_eq!(Ledger::read(&folder).expect_err("none").kind, ErrorKind::Store(store::ErrorKind::NotFound));
    for bytes in [Vec::new(), b"x".to_vec(), vec![0; 4096], b"SQLite format 3\0".repeat(1000)] {
        std::fs::write(&path, &bytes).expect("write");
        for error in [Ledger::read(&folder).expect_err("read"), Ledger::open(&folder).expect_err("open")] {
            assert_eq!(error.kind, ErrorKind::Damaged, "{error}");
            assert!(error.problem(place.path()).message.contains("damaged"));
        }
        assert_eq!(std::fs::read(&path).expect("read"), bytes, "left as it was");
    }
}

/// A ledger's file as an older format had it, which has nothing that this one does not have.
fn of_format(format: u32, machine: &Machine) -> Vec<u8> {
    let place = tempfile::tempdir().expect("a temporary folder");
    let folder: Arc<dyn Folder> = Arc::new(HostFolder::open(place.path()).expect("open"));
    Ledger::create(&folder, machine).expect("create").close();
    let path = place.path().join("ledger");
    let database = redb::Database::open(&path).expect("open");
    let transaction = database.begin_write().expect("begin");
    let table: redb::TableDefinition<&str, &[u8]> = redb::TableDefinition::new("ledger");
    transaction.open_table(table).expect("table").insert("format", format.to_string().as_bytes()).expect("insert");
    transaction.commit().expect("commit");
    drop(database);
    std::fs::read(path).expect("read")
}

#[test]
fn an_older_ledger_is_brought_up_to_date_and_kept() {
    brought_up_to_date(1);
    brought_up_to_date(2);
}

fn brought_up_to_date(format: u32) {
    let machine = sample::machine(2);
    let (old, kept) = (of_format(format, &machine), format!("ledger.format-{format}"));
    let laid_down = || {
        let sim = Sim::new();
        let folder = sim.root();
        let store = folder.create("ledger").expect("create");
        store.write_at(&old, 0).and_then(|()| store.sync()).and_then(|()| folder.sync()).expect("written");
        sim
    };
    let sim = laid_down();
    assert_eq!(Ledger::read(&sim.root()).expect("read").machine, machine, "it is read as it is");
    assert_eq!(sim.root().list().expect("list"), ["ledger"], "and nothing is written");
    let began = sim.counts().operations;
    Ledger::open(&sim.root()).expect("open").close();
    let operations = began..sim.counts().operations;
    assert_eq!(sim.root().list().expect("list"), ["ledger", &kept]);
    assert_eq!(Ledger::read(&sim.root()).expect("read").machine, machine);

    for at in operations {
        let sim = laid_down();
        sim.cut(At::Operation(at));
        drop(Ledger::open(&sim.root()));
        assert!(!sim.powered(), "cut at {at}");
        for crash in Crash::several(at, 8) {
            let after = sim.after_crash(crash);
            let ledger = Ledger::open(&after.root()).expect("open");
            assert_eq!(ledger.state().machine, machine, "cut at {at}, {crash:?}");
            ledger.close();
            assert_eq!(after.root().list().expect("list"), ["ledger", &kept], "cut at {at}, {crash:?}");
        }
    }
}

#[test]
fn a_newer_ledger_is_refused() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let folder: Arc<dyn Folder> = Arc::new(HostFolder::open(place.path()).expect("open"));
    Ledger::create(&folder, &sample::machine(1)).expect("create").close();
    let table: redb::TableDefinition<&str, &[u8]> = redb::TableDefinition::new("ledger");
    let set = |key: &str, value: Option<&[u8]>| {
        let database = redb::Database::open(place.path().join("ledger")).expect("open");
        let transaction = database.begin_write().expect("begin");
        {
            let mut table = transaction.open_table(table).expect("table");
            match value {
                Some(value) => drop(table.insert(key, value).expect("insert")),
                None => drop(table.remove(key).expect("remove")),
            }
        }
        transaction.commit().expect("commit");
    };
    set("format", Some(b"7"));
    let error = Ledger::open(&folder).expect_err("newer");
    assert_eq!(error.kind, ErrorKind::Newer);
    assert!(error.message.contains("format 7") && error.message.contains("formats up to 3"), "{error}");
    assert_eq!(Ledger::read(&folder).expect_err("newer").kind, ErrorKind::Newer);
    for (key, value, words) in [
        ("format", Some(&b"1"[..]), ""),
        ("now", Some(b"{}"), "row now cannot be read"),
        ("now", None, "row now is missing"),
        ("format", None, "row format is missing"),
    ] {
        set(key, value);
        match Ledger::read(&folder) {
            Ok(_) => assert_eq!(words, ""),
            Err(error) => assert!(error.kind == ErrorKind::Damaged && error.message.contains(words), "{error}"),
        }
    }
}

/// Flips and cuts bytes anywhere: an error, or the rows as they were; never a panic, never other rows.
#[test]
fn damage_is_found() {
    let sim = Sim::new();
    let mut ledger = Ledger::create(&sim.root(), &sample::machine(2)).expect("create");
    for op in sequence(5, 30) {
        ledger.commit(|state| change(state, &op)).expect("commit");
    }
    let mut known = vec![ledger.state().clone()];
    ledger.commit(|state| "last".clone_into(&mut state.machine.note)).expect("commit");
    known.push(ledger.state().clone());
    let unclean = file(&sim.after_crash(Crash::Everything));
    drop(ledger);
    let clean = file(&sim);
    let mut damaged = 0;
    for (nth, whole) in [clean, unclean].iter().enumerate() {
        for seed in 0..400_u64 {
            let mut bytes = whole.clone();
            // The first page says where everything is: it gets a third of the damage.
            let reach = if seed % 3 == 0 { 512 } else { bytes.len() };
            let at = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) as usize % reach;
            match seed % 5 {
                0 => bytes.truncate(at),
                1 => bytes[at..].fill(0),
                2 => bytes[at] ^= 1 << (seed % 8),
                _ => bytes[at] = (seed >> 3) as u8,
            }
            let sim = Sim::new();
            sim.root().create("ledger").expect("create").write_at(&bytes, 0).expect("write");
            match Ledger::read(&sim.root()) {
                Ok(state) => assert!(known.contains(&state), "file {nth}, seed {seed}"),
                Err(error) => {
                    assert_eq!(error.kind, ErrorKind::Damaged, "{error}");
                    damaged += 1;
                }
            }
            if let Ok(opened) = Ledger::open(&sim.root()) {
                assert!(known.contains(opened.state()), "file {nth}, seed {seed}");
            }
        }
    }
    assert!(damaged > 100, "{damaged}");
}

fn file(sim: &Sim) -> Vec<u8> {
    let file = sim.root().open("ledger", Mode::Read).expect("open");
    let mut bytes = vec![0; file.len().expect("length") as usize];
    file.read_at(&mut bytes, 0).expect("read");
    bytes
}

#[test]
fn ended_jobs_are_forgotten_oldest_first() {
    let sim = Sim::new();
    let mut ledger = Ledger::create(&sim.root(), &sample::machine(1)).expect("create");
    ledger
        .commit(|state| {
            for second in 0..6 {
                state.insert_job(job(second, if second == 0 { JobState::Running } else { JobState::Completed }));
            }
            state.prune_jobs(2);
        })
        .expect("commit");
    let seconds: Vec<i64> = ledger.state().jobs().iter().map(|job| job.started.as_second()).collect();
    assert_eq!(seconds, [0, 4, 5], "the one that runs, and the newest two");
    let id = ledger.state().jobs()[0].id;
    assert!(ledger.state().job(id).is_some());
}

/// On a full disk the reserve is given up for a commit; without one the commit fails, and nothing has changed.
#[test]
fn the_reserve_makes_room_for_a_commit() {
    for kept in [true, false] {
        let sim = Sim::new();
        let folder = sim.root();
        let mut ledger = Ledger::create(&folder, &sample::machine(1)).expect("created");
        if kept {
            machine::reserve::keep(&*folder).expect("there is room");
            machine::reserve::keep(&*folder).expect("it is there");
        }
        let used: u64 = folder.list().expect("a list").iter().map(|name| allocated(&*folder, name)).sum();
        sim.set_capacity(Some(used));
        let note = "x".repeat(2 << 20);
        let committed = ledger.commit(|state| state.machine.note.clone_from(&note));
        assert_eq!(committed.is_ok(), kept, "{committed:?}");
        assert_eq!(ledger.state().machine.note == note, kept);
        assert_eq!(folder.list().expect("a list"), ["ledger"]);
        sim.set_capacity(None);
        ledger.commit(|state| state.machine.name = "other".to_owned()).expect("there is room");
        ledger.close();
        let read = Ledger::read(&sim.after_crash(Crash::Nothing).root()).expect("reads");
        assert_eq!((read.machine.note == note, read.machine.name.as_str()), (kept, "other"));
    }
}

#[test]
fn a_reserve_is_there_as_a_whole_or_not_at_all() {
    let whole = Sim::new();
    machine::reserve::keep(&*whole.root()).expect("there is room");
    for operation in 0..whole.counts().operations {
        let sim = Sim::new();
        sim.cut(At::Operation(operation));
        assert!(machine::reserve::keep(&*sim.root()).is_err());
        for crash in Crash::several(operation, 2) {
            let folder = sim.after_crash(crash).root();
            let there = folder.list().expect("a list").iter().any(|name| name == "reserve");
            assert!(
                !there || allocated(&*folder, "reserve") == machine::reserve::SIZE,
                "cut at {operation}, {crash:?}"
            );
            machine::reserve::keep(&*folder).expect("there is room");
            assert_eq!(
                (folder.list().expect("a list"), machine::reserve::give_up(&*folder)),
                (vec!["reserve".to_owned()], true)
            );
        }
    }
}

fn allocated(folder: &dyn Folder, name: &str) -> u64 {
    folder.open(name, Mode::Read).and_then(|file| file.allocated()).expect("a file")
}

/// A worker gives up its lock and its ledger one after the other.
#[test]
fn a_ledger_that_a_worker_still_has_is_not_looked_at() {
    let (place, machine) = (tempfile::tempdir().expect("a folder"), sample::machine(1));
    let root = Root::open(place.path()).expect("a root");
    let folder: Arc<dyn Folder> = Arc::new(HostFolder::create(&root.machine_folder(machine.id)).expect("a folder"));
    folder.create("lock").expect("a lock");
    let ledger = Ledger::create(&folder, &machine).expect("a ledger");
    assert!(root.peek(machine.id).expect("no failure").is_none());
    ledger.close();
    assert!(root.peek(machine.id).expect("it is read").is_some());
}
