//! The whole stack under power cuts: guest, chains, formats, folds, snapshots and the ledger, on a simulated disk.
//!
//! A life is a random sequence of what a machine's owner does ([`World`]). It is cut at every few operations of the disk; each time, in
//! several of the states that the disk may then be in, a new worker recovers, and every snapshot and Now are compared with the model:
//! what was flushed is there, what was not is old or new, and the request under way is done or has changed nothing. Then the collector
//! does all that is left to do, and they are compared again.
//!
//! `TENBY_CRASH_STATES` says how many distinct states are to be seen, `TENBY_CRASH_SEED` with which life to begin.

#[path = "stack/model.rs"]
mod model;
#[expect(dead_code, reason = "each test uses a part of the samples")]
mod sample;
#[path = "stack/skips.rs"]
mod skips;
#[expect(dead_code, reason = "each test uses a part of the world")]
#[path = "stack/world.rs"]
mod world;

use machine::audit::{Finding, Looked, deep};
use machine::collect::Begin;
use machine::files::Files;
use machine::garbage::garbage;
use machine::hashing::{Known, Manner};
use machine::job::Cancel;
use machine::keeper::Keeper;
use machine::request::Problem;
use machine::steps::Steps;
use machine::tree::State;
use model::{Checked, Held, Model};
use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use store::ErrorKind;
use store::sim::{At, Crash, Sim, Times};
use world::{Dice, Moment, World, carries, files};

/// How much a life does.
const LIFE: u32 = 50;
/// States that are looked at, at each cut.
const STATES: u64 = 16;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
}

/// Lives until the end or the cut; whether it came to the end.
fn live(world: &mut World, runtime: &tokio::runtime::Runtime) -> bool {
    let lived = catch_unwind(AssertUnwindSafe(|| runtime.block_on(world.live(LIFE))));
    match lived {
        Ok(Ok(())) => true,
        Ok(Err(problem)) => {
            assert!(!world.disk.powered(), "while {}: {problem}", world.doing());
            false
        }
        Err(panic) => {
            assert!(gave_up(&*panic) && !world.disk.powered(), "while {}: {panic:?}", world.doing());
            false
        }
    }
}

/// Whether it was a worker that ended itself.
fn gave_up(panic: &(dyn std::any::Any + Send)) -> bool {
    panic.is::<Problem>()
}

/// A long run says each time that it has seen so many more.
const TOLD: usize = 50_000;

/// The life of this seed, as it was every few operations, more often during folds.
fn moments(seed: u64, runtime: &tokio::runtime::Runtime) -> Vec<Moment> {
    let machine = sample::machine(2);
    let mut once = World::new(&machine, seed);
    assert!(live(&mut once, runtime), "seed {seed}");
    let mut world = World::new(&machine, seed);
    // Ids differ from life to life, and with them a little of what the ledger writes.
    let moments = world.moments(cuts(&once.diary, seed, 1));
    assert!(live(&mut world, runtime), "seed {seed}");
    moments.take()
}

/// The distinct states that were seen, by what was under way, and how many are wanted.
struct Seen {
    states: Mutex<BTreeMap<&'static str, HashSet<u64>>>,
    wanted: usize,
}

impl Seen {
    fn note(&self, doing: &'static str, digest: u64) {
        let mut states = self.states.lock().expect("not poisoned");
        let all: usize = states.values().map(HashSet::len).sum();
        if states.entry(doing).or_default().insert(digest) && (all + 1).is_multiple_of(TOLD) {
            println!("{:>8} distinct crash states so far", all + 1);
        }
    }

    /// As many as are wanted, and a third of them during folds.
    fn enough(&self) -> bool {
        let states = self.states.lock().expect("not poisoned");
        let all: usize = states.values().map(HashSet::len).sum();
        all >= self.wanted && states.get("fold").map_or(0, HashSet::len) * 3 >= all
    }
}

/// Cuts the life of this seed at every few operations, until enough was seen.
fn cut_everywhere(seed: u64, seen: &Seen) -> Checked {
    for Moment { at, disk, doing, models } in moments(seed, &runtime()) {
        if seen.enough() {
            break;
        }
        let mut looked_at = HashSet::new();
        for crash in Crash::several(at, STATES) {
            let disk = disk.after_crash(crash);
            let digest = disk.digest();
            if !looked_at.insert(digest) {
                continue;
            }
            seen.note(doing, digest);
            check(&disk, &models, at)
                .map_err(|error| format!("seed {seed}, cut at {at} while {doing}, {crash:?}: {error}"))?;
        }
    }
    Ok(())
}

/// The operations at which a life is cut: every few, and with `sparse` fewer by that.
fn cuts(diary: &[(u64, &'static str)], seed: u64, sparse: u64) -> Vec<u64> {
    let stretches = diary.windows(2).map(|two| (two[0].0..two[1].0, two[0].1));
    let cuts = |(stretch, doing): (std::ops::Range<u64>, &str)| {
        let stride = match doing {
            "fold" => 2,
            "snapshot" | "apply" | "save" => 13,
            // Much of it, and the same again and again; each by itself is cut at every operation elsewhere.
            "label" | "hash" => 41,
            _ => 7,
        };
        stretch.filter(move |at| (at + seed).is_multiple_of(stride * sparse))
    };
    stretches.flat_map(cuts).collect()
}

/// Recovers on what a power cut has left, and compares with what it may be.
fn check(disk: &Sim, models: &[Model], seed: u64) -> Checked {
    let files = files(disk);
    let keeper = Keeper::open(&files, carries(&Sim::new()), Steps::watched(|_| {})).map_err(|e| e.to_string())?;
    keeper.work_off_carries().map_err(|e| e.to_string())?;
    keeper.undo_unfinished(None).map_err(|e| e.to_string())?;
    let rows = keeper.rows();
    if rows.machine.now.state == State::Running {
        keeper.book().commit(|rows| rows.machine.turn_off()).map_err(|e| e.to_string())?;
    }
    let rows = keeper.rows();
    let held = Held::by(&rows, &files);
    let mut wrong = Vec::new();
    let is = |model: &Model| model.matches(&held, None).map_err(|error| wrong.push(error)).is_ok();
    let Some(right) = models.iter().position(is) else { return Err(wrong.join("; or ")) };
    drop(held);
    let mut dice = Dice::new(seed);
    if !dice.one_in(3) {
        return Ok(());
    }
    // Hashing everything takes ten times as long as all the rest.
    let deeply = dice.one_in(12);
    if deeply {
        check_recorded(&keeper, &files)?;
    }
    collect_all(&keeper)?;
    models[right].check(&keeper.rows(), &files, None).map_err(|error| format!("after collecting: {error}"))?;
    let left = garbage(&keeper.rows().machine);
    if !(left.remove.is_empty() && left.fold.is_empty()) {
        return Err(format!("left to do: {left:?}"));
    }
    if deeply {
        check_hashing(&keeper, &files)?;
    }
    match files.unknown(&keeper.rows().machine).map_err(|e| e.to_string())?.as_slice() {
        [] => Ok(()),
        unknown => Err(format!("nobody knows {unknown:?}")),
    }
}

/// What is sealed reads as was recorded, and no record is damaged. What is said besides.
fn check_recorded(keeper: &Keeper, files: &Files) -> std::result::Result<Vec<Finding>, String> {
    let mut look = || Ok(Looked { machine: keeper.rows().machine.clone(), worker: false });
    let (_, findings) = deep(files, &mut look, &mut |_, _| true).map_err(|e| e.to_string())?;
    match findings.iter().find(|found| !found.is_note() || found.what.contains("damaged")) {
        Some(wrong) => Err(format!("not as recorded: {wrong:?}")),
        None => Ok(findings),
    }
}

/// What is not hashed yet is hashed, and then everything is as recorded.
fn check_hashing(keeper: &Keeper, files: &Files) -> Checked {
    keeper.hash(&mut Known::default(), &Manner::default(), &Cancel::default()).map_err(|e| e.to_string())?;
    match check_recorded(keeper, files)?.as_slice() {
        [] => Ok(()),
        notes => Err(format!("not hashed: {notes:?}")),
    }
}

fn collect_all(keeper: &Keeper) -> Checked {
    loop {
        keeper.remove_garbage().map_err(|e| e.to_string())?;
        let Some(folding) = keeper.next_fold(None, Begin::default()).map_err(|e| e.to_string())? else { return Ok(()) };
        let folded = keeper.fold(folding, &Cancel::default());
        keeper.folded(&folded, None).map_err(|e| e.to_string())?;
    }
}

/// The worker dies in the middle of the life of this seed, at every few operations; the host and the guest live on, and so does the next
/// worker, for a while.
fn die_everywhere(seed: u64) -> std::result::Result<u64, String> {
    let (machine, runtime) = (sample::machine(2), runtime());
    let mut whole = World::new(&machine, seed);
    assert!(live(&mut whole, &runtime), "seed {seed}");
    let mut deaths = 0;
    for at in cuts(&whole.diary, seed, 2) {
        let mut world = World::new(&machine, seed);
        world.disk.cut(At::Operation(at));
        if live(&mut world, &runtime) {
            continue;
        }
        let doing = world.doing();
        let told = |error: String| format!("seed {seed}, died at {at} while {doing}: {error}");
        world.die().map_err(|e| told(e.to_string()))?;
        world.check().map_err(told)?;
        runtime.block_on(world.live(6)).map_err(|e| told(format!("later, while {}: {e}", world.doing())))?;
        world.check().map_err(|error| told(format!("later, after {}: {error}", world.doing())))?;
        deaths += 1;
    }
    Ok(deaths)
}

#[test]
fn a_worker_that_dies_takes_nothing_with_it() {
    let (mut deaths, mut seed) = (0, 100);
    while deaths < 80 {
        deaths += die_everywhere(seed).unwrap_or_else(|error| panic!("{error}"));
        seed += 1;
    }
    println!("{deaths:>8} deaths, and nothing that was acknowledged is missing");
}

/// An operation of the disk fails in the middle of the life of this seed, once or from then on. What fails is undone; then the power goes,
/// or a new worker takes over.
fn fail_everywhere(seed: u64, kind: ErrorKind, times: Times) -> std::result::Result<u64, String> {
    let (machine, runtime) = (sample::machine(2), runtime());
    let mut whole = World::new(&machine, seed);
    assert!(live(&mut whole, &runtime), "seed {seed}");
    let mut failures = 0;
    for at in cuts(&whole.diary, seed, 5) {
        let mut world = World::new(&machine, seed);
        world.disk.fail(At::Operation(at), kind, times);
        // Whether it shows is another matter: the log, for one, stops nobody.
        let lived = catch_unwind(AssertUnwindSafe(|| runtime.block_on(world.live(LIFE))));
        world.disk.heal();
        assert!(lived.as_ref().map_or_else(|panic| gave_up(&**panic), |_| true), "while {}", world.doing());
        let began = world.diary.iter().rev().find(|entry| entry.0 <= at).map_or("nothing", |entry| entry.1);
        let told = |error: String| {
            let lived = lived.as_ref().map_or_else(|_| "gave up".to_owned(), |lived| format!("{lived:?}"));
            format!("seed {seed}, {kind:?} {times:?} at {at} while {began}: {lived}: {error}")
        };
        let models = world.models();
        for crash in Crash::several(at, 2) {
            check(&world.disk.after_crash(crash), &models, at).map_err(|error| told(format!("{crash:?}: {error}")))?;
        }
        world.die().map_err(|e| told(e.to_string()))?;
        world.check().map_err(told)?;
        failures += 1;
    }
    Ok(failures)
}

#[test]
fn a_disk_that_fails_costs_nothing_that_was_acknowledged() {
    let kinds = [ErrorKind::Io, ErrorKind::NoSpace].into_iter();
    let trials = kinds.flat_map(|kind| [Times::Once, Times::Forever].map(|times| (kind, times)));
    let fail = |(seed, (kind, times))| fail_everywhere(seed, kind, times).unwrap_or_else(|error| panic!("{error}"));
    let failures: u64 = (200..).zip(trials).map(fail).sum();
    println!("{failures:>8} failed operations, and nothing that was acknowledged is missing");
    assert!(failures > 100, "{failures}");
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn nothing_is_lost_wherever_the_power_goes() {
    let (wanted, first) = (number("TENBY_CRASH_STATES", 10_000) as usize, number("TENBY_CRASH_SEED", 1));
    let (seen, next) = (Seen { states: Mutex::default(), wanted }, Mutex::new(first));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while !seen.enough() {
                    let seed = take_number(&next);
                    cut_everywhere(seed, &seen).unwrap_or_else(|error| panic!("{error}"));
                }
            });
        }
    });
    let seen = seen.states.into_inner().expect("not poisoned");
    for (doing, states) in &seen {
        println!("{:>8} crash states while {doing}", states.len());
    }
    println!("{:>8} distinct crash states, and none lost a byte", seen.values().map(HashSet::len).sum::<usize>());
}

fn take_number(next: &Mutex<u64>) -> u64 {
    let mut next = next.lock().expect("not poisoned");
    *next += 1;
    *next - 1
}
