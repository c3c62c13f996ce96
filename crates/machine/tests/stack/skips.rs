//! The test tests itself: what becomes of a life whose syncs are left out, one at a time, or come too late, so that the next one is done first. The
//! life's crash test has to notice, or it is known why it cannot.
//!
//! A life does not see what is durable. So one life shows all of that: at each cut, what is there without the last sync of each file.

use crate::world::{Moment, World};
use crate::{check, live, number, runtime, sample};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use store::sim::{Synced, Unsynced};

/// Syncs that can be left out, or come after the next one, without harm: a part of how they are told, and why.
const HARMLESS: &[(&str, &str)] = &[];

/// A mistake that was noticed so often is not tried again.
const OFTEN: u32 = 3;

/// What became of a mistake.
#[derive(Debug, Default)]
struct Tried {
    noticed: u32,
    /// Operations of syncs of whose absence nothing was noticed.
    missed: BTreeSet<u64>,
    /// One of those, for where in the code it was asked for.
    example: Option<Arc<Synced>>,
}

/// A mistake; a sync is the n-th of what was being done, and of a kind of file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Mistake {
    LeftOut(String),
    /// The first is done after the second.
    Late(String, String),
}

impl std::fmt::Display for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::LeftOut(sync) => write!(f, "without {sync}"),
            Self::Late(first, second) => write!(f, "{first} after {second}"),
        }
    }
}

#[derive(Default)]
struct Trial {
    tried: BTreeMap<Mistake, Tried>,
    /// Operations of syncs of this life, and those that are known to be noticed.
    syncs: BTreeSet<u64>,
    noticed: HashSet<u64>,
    diary: Vec<(u64, &'static str)>,
}

impl Trial {
    /// Which sync of what was being done it is.
    fn name(&self, sync: &Synced) -> String {
        let (begun, doing) = self.diary.iter().rev().find(|(at, _)| *at <= sync.operation).copied().unwrap_or_default();
        let nth = self.syncs.range(begun..=sync.operation).count();
        let kind = sync.name.rsplit(['.', '/']).next().unwrap_or_default();
        format!("{doing} {nth} ({kind})")
    }

    fn note(&mut self, mistake: Mistake, sync: &Arc<Synced>, wrong: bool) {
        let operation = sync.operation;
        let tried = self.tried.entry(mistake).or_default();
        if wrong {
            tried.noticed += 1;
            tried.missed.remove(&operation);
        } else {
            tried.missed.insert(operation);
            tried.example.get_or_insert_with(|| Arc::clone(sync));
        }
    }

    fn is_known(&self, mistake: &Mistake) -> bool {
        self.tried.get(mistake).is_some_and(|tried| tried.noticed >= OFTEN)
    }

    /// At a moment; `late` are the last two syncs, if it is right after them.
    fn look(&mut self, moment: &Moment, late: Option<(u64, u64)>) {
        let all = moment.disk.last_syncs();
        let named = |operation| all.iter().find(|sync| sync.operation == operation).map(|sync| self.name(sync));
        let pair = late.and_then(|(first, second)| Some(Mistake::Late(named(first)?, named(second)?)));
        for sync in &all {
            let left_out = Mistake::LeftOut(self.name(sync));
            let is_late = late.is_some_and(|late| late.0 == sync.operation);
            let late = pair.clone().filter(|pair| is_late && !self.is_known(pair));
            let old = self.noticed.contains(&sync.operation) || self.is_known(&left_out);
            if old && late.is_none() {
                continue;
            }
            let wrong = is_wrong(moment, sync.operation);
            if wrong {
                self.noticed.insert(sync.operation);
            }
            for mistake in late.into_iter().chain((!old).then_some(left_out)) {
                self.note(mistake, sync, wrong);
            }
        }
    }
}

/// Whether it shows in what a power cut leaves then.
fn is_wrong(moment: &Moment, without: u64) -> bool {
    let Some(Unsynced { nothing, all_else }) = moment.disk.without_sync(without) else { return false };
    [nothing, all_else].iter().any(|disk| check(disk, &moment.models, moment.at).is_err())
}

/// The functions that asked for a sync, innermost first. (It takes a while to find them out.)
fn place(sync: &Synced) -> String {
    let trace = sync.by.to_string();
    let lines: Vec<&str> = trace.lines().map(str::trim_start).collect();
    let ours = |pair: &[&str]| {
        let (_, function) = pair[0].split_once(": ")?;
        let place = pair[1].strip_prefix("at ")?;
        let file = ["/image/src/", "/machine/src/"].iter().find_map(|part| place.split_once(part))?.1;
        // A closure or a generic function, by its plain name.
        let function = function.split(['<', '{']).find(|part| !part.is_empty())?;
        let function = function.trim_end_matches("::").rsplit("::").next()?;
        Some(format!("{} {function}", file.split(':').next()?))
    };
    let mut functions: Vec<String> = lines.windows(2).filter_map(ours).collect();
    functions.dedup();
    functions.truncate(7);
    functions.join(" < ")
}

/// Takes long: `cargo xtask crash --syncs`.
#[test]
#[ignore = "takes many minutes"]
fn a_sync_that_is_left_out_or_late_is_noticed() {
    let mut trial = Trial::default();
    let (seed, lives) = (number("TENBY_CRASH_SEED", 300), number("TENBY_CRASH_LIVES", 2));
    for seed in seed..seed + lives {
        let machine = sample::machine(2);
        let mut once = World::new(&machine, seed);
        assert!(live(&mut once, &runtime()), "seed {seed}");
        let mut world = World::new(&machine, seed);
        world.disk.remember_syncs();
        let moments = world.moments(world.disk.counts().operations..once.disk.counts().operations);
        assert!(live(&mut world, &runtime()), "seed {seed}");
        let (mut before, mut last) = (None, None);
        (trial.noticed, trial.syncs) = Default::default();
        trial.diary.clone_from(&world.diary);
        for moment in moments.take() {
            let newest = moment.disk.last_syncs().iter().map(|sync| sync.operation).max();
            trial.syncs.extend(newest);
            let fresh = newest != last;
            if fresh {
                (before, last) = (last, newest);
            }
            if fresh || (moment.at + seed).is_multiple_of(5) {
                trial.look(&moment, before.zip(last).filter(|_| fresh));
            }
        }
    }
    let mut unknown = Vec::new();
    for (mistake, tried) in &trial.tried {
        let place = tried.example.as_ref().filter(|_| tried.noticed == 0).map(|sync| place(sync)).unwrap_or_default();
        let told = format!("{mistake}: {place}");
        println!("{:>5} noticed, {:>5} not: {told}", tried.noticed, tried.missed.len());
        if tried.noticed == 0 {
            unknown.push(told);
        }
    }
    unknown.retain(|told| !HARMLESS.iter().any(|(harmless, _)| told.contains(harmless)));
    assert!(unknown.is_empty(), "nobody notices: {unknown:#?}");
}
