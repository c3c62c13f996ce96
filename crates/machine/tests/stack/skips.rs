//! The test tests itself: what becomes of a life whose syncs are left out, one at a time, or come too late. The life's crash test has to notice, or it
//! is known why it cannot.
//!
//! A life does not see what is durable. So one life shows all of that: just before and just after each sync, what is there without the last one of each
//! other file. A sync that is left out is told by the step of a request that asked for it, and by its place in the format's code.

use crate::world::{Moment, World};
use crate::{check, live, number, runtime, sample};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use store::sim::{Crash, Synced, Unsynced};

/// Syncs that can be left out without harm, each alone: a part of how they are told, and why.
const HARMLESS: &[(&str, &str)] = &[
    ("VHDX: sync_second", TWO_COPIES),
    ("VHDX: set_header < finish", TWO_COPIES),
    (
        "VHDX: write_metadata < set_note",
        "an entry that begins a log counts once the header names it, which comes after another sync; in a log that is in use it is noticed",
    ),
    ("label: collect with_writable", CLOSED),
    ("label: disks seal", CLOSED),
    ("fold: disks seal", CLOSED),
    // What a guest had flushed was worked off before, with the leaf's journal.
    ("recovery: disks open", CLOSED),
    ("fold: collect carry_out_fold", CLOSED),
    ("fold: merge/up name_new_parent", "until then the top names both parents, and stands on one of them"),
    ("fold: merge/up where_nothing_is", NEW_IDS),
    ("guest: chain zero", NEW_IDS),
    ("snapshot: chain/ambiguous settle_before", NEW_IDS),
    ("ram make, a layer", "nobody knows the file before its commit, and the capture syncs all of it before that"),
    (
        "recovery: keeper open, ledger",
        "redb says that the file is in use, in the sector in which its next commit says which rows count",
    ),
];

const TWO_COPIES: &str = "a header's copies are durable one after the other for devices that tear a sector; simulated ones do not, and to either \
    copy the other is enough";
const NEW_IDS: &str =
    "the ids of a session's first change: nothing stands on what a guest or a fold writes to and goes by them";
const CLOSED: &str = "a log is emptied of what was durable before, but for notes, which the next worker writes again, and for a link's names and \
    second id: the ledger says what stands on what, and with two ids a link only accepts more";

/// Steps of requests of which the first must be durable before the second: to swap them has to be noticed.
const ORDERED: &[(&str, &str)] = &[
    // The journal knows the files before they are there; they are there, whole, before a row names them.
    ("snapshot: keeper journal", "snapshot: files sync_names, disks"),
    ("snapshot: ops/snapshot make_leaf, a layer", "snapshot: book commit, ledger"),
    ("snapshot: files sync_names, disks", "snapshot: book commit, ledger"),
    ("snapshot: ram capture, a layer", "snapshot: keeper settle"),
    ("snapshot: ram capture, memory", "snapshot: keeper settle"),
    ("apply: keeper journal", "apply: files sync_names, disks"),
    ("apply: ops/snapshot make_leaf, a layer", "apply: keeper settle"),
    ("apply: files sync_names, disks", "apply: keeper settle"),
    ("apply: ram capture, a layer", "apply: keeper settle"),
    // What a deletion leaves behind: the names are gone before the journal forgets them.
    ("remove: keeper forget, disks", "remove: keeper forget, ledger"),
    ("remove: keeper forget, memory", "remove: keeper forget, ledger"),
    // The tables of `merge.rs`, and the file that goes after the commit.
    ("fold: merge/down take_apart", "fold: merge/down take_apart"),
    ("fold: merge/down take_apart", "fold: merge/down copy_and_end"),
    ("fold: merge/down hand_over", "fold: merge/down hand_over"),
    ("fold: merge/down hand_over", "fold: merge/down end, ledger"),
    ("fold: merge/down end, ledger", "fold: keeper forget, disks"),
    ("fold: merge/up accept_both", "fold: merge/up copy_and_end, ledger"),
    ("fold: merge/up copy_and_end, ledger", "fold: merge/up name_new_parent"),
    ("fold: keeper forget, disks", "fold: keeper forget, ledger"),
];

/// A mistake that was noticed so often is not tried again.
const OFTEN: u32 = 2;
/// A sync that is left out is looked for at so many syncs after it, before and after each,
const LOOKS: u32 = 12;
/// and one that is late is done after each of so many.
const LATE: usize = 5;
/// So many times as many lives as were asked for are lived, as long as an order was not looked at.
const MORE: u64 = 3;
/// States that are looked at each time, besides nothing and everything,
const STATES: u64 = 2;
/// and so many if a mistake has to be noticed, or has often been missed and nobody knows why.
const MANY_STATES: u64 = 100;
const MISSED: u32 = 40;

/// A sync of a life.
struct Step {
    sync: Arc<Synced>,
    /// What was being done, and when that began.
    request: (u64, &'static str),
    /// Who asked for it, innermost first: files of ours and functions.
    path: Vec<(String, String)>,
}

impl Step {
    /// What was being done, the step of it, and what was synced.
    fn step(&self) -> String {
        const BELOW: [&str; 6] = ["vhdx/", "chain", "ledger", "book", "files", "steps"];
        let step = self.path.iter().find(|(file, _)| !BELOW.iter().any(|below| file.starts_with(below)));
        let (file, function) = step.or(self.path.last()).cloned().unwrap_or_default();
        let what = self.sync.name.trim_start_matches('/');
        let what = match what.split_once('/') {
            Some(("disks" | "memory", _)) => "a layer",
            Some((folder, _)) => folder,
            None => what,
        };
        format!("{}: {file} {function}, {what}", self.request.1)
    }

    /// Its place in the format's code, if it is one of a layer's.
    fn place(&self) -> Option<String> {
        let format = self.path.iter().take_while(|(file, _)| file.starts_with("vhdx/"));
        let functions: Vec<&str> = format.map(|(_, function)| &**function).skip(1).take(2).collect();
        (!functions.is_empty()).then(|| format!("a VHDX: {}", functions.join(" < ")))
    }
}

/// A life, and its syncs by the numbers of their operations.
struct Life {
    moments: Vec<Moment>,
    steps: BTreeMap<u64, Step>,
}

impl Life {
    fn new(seed: u64) -> Self {
        let machine = sample::machine(2);
        let mut once = World::new(&machine, seed);
        assert!(live(&mut once, &runtime()), "seed {seed}");
        let mut world = World::new(&machine, seed);
        world.disk.remember_syncs();
        let moments = world.moments(world.disk.counts().operations..once.disk.counts().operations);
        assert!(live(&mut world, &runtime()), "seed {seed}");
        let (moments, mut steps) = (moments.take(), BTreeMap::new());
        for sync in moments.iter().flat_map(|moment| moment.disk.last_syncs()) {
            steps.entry(sync.operation).or_insert_with(|| {
                let begun = world.diary.iter().rev().find(|(at, _)| *at <= sync.operation);
                Step { path: path(&sync), request: begun.copied().unwrap_or_default(), sync }
            });
        }
        Self { moments, steps }
    }

    /// The sync that was done just before a moment.
    fn just_done(&self, moment: &Moment) -> Option<&Step> {
        self.steps.get(&moment.at.checked_sub(1)?)
    }

    /// Whether a sync is about to be done, or was just done.
    fn is_near(&self, moment: &Moment) -> bool {
        self.steps.contains_key(&moment.at) || self.just_done(moment).is_some()
    }

    /// What it is if a sync has not been done until this moment.
    fn mistakes(&self, sync: &Synced, moment: &Moment) -> Vec<Mistake> {
        let late = &self.steps[&sync.operation];
        let after = self.just_done(moment).filter(|done| {
            // What was written before both of them may be durable in any order.
            let orders = done.sync.newest > sync.operation && done.request == late.request;
            orders && self.steps.range(sync.operation..done.sync.operation).count() <= LATE
        });
        let left_out = std::iter::once(late.step()).chain(late.place()).map(Mistake::LeftOut);
        left_out.chain(after.map(|after| Mistake::Late(late.step(), after.step()))).collect()
    }
}

/// A sync that is not done, or not before another one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Mistake {
    LeftOut(String),
    Late(String, String),
}

impl Mistake {
    /// Whether it is that these two come in the other order.
    fn swaps(&self, (first, second): &(&str, &str)) -> bool {
        matches!(self, Self::Late(late, after) if late.starts_with(first) && after.starts_with(second))
    }
}

impl std::fmt::Display for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::LeftOut(sync) => write!(f, "without {sync}"),
            Self::Late(first, second) => write!(f, "{first}; after {second}"),
        }
    }
}

/// The functions of ours that asked for a sync, and their files. (It takes a while to find them out.)
fn path(sync: &Synced) -> Vec<(String, String)> {
    let trace = sync.by.to_string();
    let lines: Vec<&str> = trace.lines().map(str::trim_start).collect();
    let ours = |pair: &[&str]| {
        let (_, function) = pair[0].split_once(": ")?;
        let place = pair[1].strip_prefix("at ")?;
        // In the package that is tested the compiler was told a relative path.
        let file = place.strip_prefix("./src/").or_else(|| Some(place.split_once("/image/src/")?.1))?;
        // Of a closure the function that it is in, if that is told; and nothing of types.
        let function = function.split("::{").next()?.trim_start_matches('<').split(['<', ' ']).next()?;
        let function = function.trim_end_matches("::").rsplit("::").next()?;
        Some((file.split(".rs:").next()?.to_owned(), function.to_owned())).filter(|_| !function.starts_with('{'))
    };
    let mut functions: Vec<(String, String)> = lines.windows(2).filter_map(ours).collect();
    functions.dedup();
    functions
}

/// What became of a mistake.
#[derive(Debug, Default)]
struct Tried {
    noticed: u32,
    /// How often nothing came of it.
    missed: u32,
}

#[derive(Default)]
struct Trial {
    tried: BTreeMap<Mistake, Tried>,
    /// States of the present life in which nothing is wrong.
    right: HashSet<u64>,
    checks: u32,
}

impl Trial {
    fn live(&mut self, life: &Life) {
        let mut looks = HashMap::<u64, u32>::new();
        self.right.clear();
        for moment in life.moments.iter().filter(|moment| life.is_near(moment)) {
            for sync in moment.disk.last_syncs() {
                let looks = looks.entry(sync.operation).or_default();
                *looks += 1;
                let mut mistakes = life.mistakes(&sync, moment);
                mistakes.retain(|mistake| self.tried.get(mistake).is_none_or(|tried| tried.noticed < OFTEN));
                if *looks > 2 * LOOKS || mistakes.is_empty() {
                    continue;
                }
                let states = if mistakes.iter().any(|mistake| self.is_missed(mistake)) { MANY_STATES } else { STATES };
                let wrong = self.is_wrong(moment, sync.operation, states);
                for mistake in mistakes {
                    let tried = self.tried.entry(mistake).or_default();
                    *if wrong { &mut tried.noticed } else { &mut tried.missed } += 1;
                }
            }
        }
    }

    /// Whether it shows in what a power cut leaves then.
    fn is_wrong(&mut self, moment: &Moment, without: u64, states: u64) -> bool {
        let Some(Unsynced { open, lost }) = moment.disk.without_sync(without) else { return false };
        let lost = Crash::several(moment.at, states).map(|crash| lost.after_crash(crash));
        let open = Crash::several(moment.at, states).skip(2).map(|crash| open.after_crash(crash));
        lost.chain(open).any(|disk| {
            let mut state = DefaultHasher::new();
            (disk.digest(), &moment.models).hash(&mut state);
            if self.right.contains(&state.finish()) {
                return false;
            }
            self.checks += 1;
            let found = catch_unwind(AssertUnwindSafe(|| check(&disk, &moment.models, moment.at)));
            let right = matches!(found, Ok(Ok(())));
            if right {
                self.right.insert(state.finish());
            }
            !right
        })
    }
}

impl Trial {
    fn is_noticed(&self, mistake: &Mistake) -> bool {
        self.tried.get(mistake).is_some_and(|tried| tried.noticed > 0)
    }

    /// Whether more than the few states are looked at for it: nobody has noticed it yet, and somebody has to, or no reason is known why nobody does.
    fn is_missed(&self, mistake: &Mistake) -> bool {
        let often = || self.tried.get(mistake).is_some_and(|tried| tried.missed >= MISSED);
        let ordered = ORDERED.iter().any(|ordered| mistake.swaps(ordered));
        !self.is_noticed(mistake) && (ordered || often() && self.reason(mistake).is_none())
    }

    /// Why it is all right that nobody notices.
    fn reason(&self, mistake: &Mistake) -> Option<&'static str> {
        let (Mistake::LeftOut(sync) | Mistake::Late(sync, _)) = mistake;
        let harmless = HARMLESS.iter().find(|(harmless, _)| sync.contains(harmless)).map(|(_, why)| *why);
        let late = || matches!(mistake, Mistake::Late(..)) && self.is_noticed(&Mistake::LeftOut(sync.clone()));
        harmless.or_else(|| late().then_some("it only has to be there for a later one, by when its absence is noticed"))
    }

    /// The steps whose order nobody has looked after yet.
    fn unordered(&self) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        let noticed = |ordered: &(&str, &str)| {
            self.tried.keys().any(|mistake| mistake.swaps(ordered) && self.is_noticed(mistake))
        };
        ORDERED.iter().filter(move |ordered| !noticed(ordered))
    }

    /// Prints what became of all mistakes, and says what is wrong with that.
    fn report(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (mistake, Tried { noticed, missed }) in &self.tried {
            let reason = if *noticed > 0 { Some("") } else { self.reason(mistake) };
            println!("{noticed:>5} noticed, {missed:>5} not: {mistake}: {}", reason.unwrap_or("NOBODY NOTICES"));
            wrong.extend(reason.is_none().then(|| mistake.to_string()));
        }
        wrong.extend(self.unordered().map(|(first, second)| format!("nobody notices {first}; after {second}")));
        wrong
    }
}

/// Takes long: `cargo xtask crash --syncs`.
#[test]
#[ignore = "takes many minutes"]
fn a_sync_that_is_left_out_or_late_is_noticed() {
    let mut trial = Trial::default();
    let (seed, lives) = (number("TENBY_CRASH_SEED", 300), number("TENBY_CRASH_LIVES", 6));
    for life in 0..MORE * lives {
        // A life is not the same each time, for its ids are not: what few of them meet is waited for.
        if life >= lives && trial.unordered().next().is_none() {
            break;
        }
        trial.live(&Life::new(seed + life));
        println!("life {}: {} states looked at", seed + life, trial.checks);
    }
    let wrong = trial.report();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
