//! The test tests itself: what becomes of a life whose syncs are left out, one at a time, or come too late, so that the next one is done first. The
//! life's crash test has to notice, or it is known why it cannot.
//!
//! A life does not see what is durable. So one life shows all of that: at each cut, what is there without the last sync of each file.

use crate::world::{Moment, World};
use crate::{check, live, number, runtime, sample};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use store::sim::{Synced, Unsynced};

/// Syncs that can be left out, or come after the next one, without harm, by the end of their name, and why.
const HARMLESS: &[(&str, &str)] = &[];

/// A mistake that was noticed so often is not tried again.
const OFTEN: u32 = 3;

/// What became of a mistake.
#[derive(Debug, Default)]
struct Tried {
    noticed: u32,
    missed: BTreeSet<u64>,
    /// How it was noticed first.
    how: Option<String>,
}

/// A mistake, by the places in the code that ask for the sync.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Mistake {
    LeftOut(String),
    /// The first is done after the second.
    Late(String, String),
}

#[derive(Default)]
struct Trial {
    tried: BTreeMap<Mistake, Tried>,
    /// Operations of syncs of this life that are known to be noticed.
    noticed: HashSet<u64>,
    names: BTreeMap<u64, String>,
}

impl Trial {
    /// The functions that asked for a sync, innermost first.
    fn name(&mut self, sync: &Synced) -> String {
        self.names.entry(sync.operation).or_insert_with(|| name(sync)).clone()
    }

    fn note(&mut self, mistake: Mistake, operation: u64, wrong: Option<&String>) {
        let tried = self.tried.entry(mistake).or_default();
        match wrong {
            None => {
                tried.missed.insert(operation);
            }
            Some(wrong) => {
                tried.noticed += 1;
                tried.missed.remove(&operation);
                tried.how.get_or_insert_with(|| wrong.clone());
            }
        }
    }

    fn is_known(&self, mistake: &Mistake) -> bool {
        self.tried.get(mistake).is_some_and(|tried| tried.noticed >= OFTEN)
    }

    /// At a moment; `late` are the last two syncs, if it is right after them.
    fn look(&mut self, moment: &Moment, late: Option<(u64, u64)>) {
        let all = moment.disk.last_syncs();
        let name = |trial: &mut Self, operation| {
            let sync = all.iter().find(|sync| sync.operation == operation)?;
            Some(trial.name(sync))
        };
        let pair = late.and_then(|(first, second)| Some(Mistake::Late(name(self, first)?, name(self, second)?)));
        for sync in &all {
            let operation = sync.operation;
            let left_out = Mistake::LeftOut(self.name(sync));
            let late = pair.clone().filter(|pair| late.is_some_and(|late| late.0 == operation) && !self.is_known(pair));
            let old = self.noticed.contains(&operation) || self.is_known(&left_out);
            if old && late.is_none() {
                continue;
            }
            let wrong = wrong(moment, operation);
            if wrong.is_some() {
                self.noticed.insert(operation);
            }
            for mistake in late.into_iter().chain((!old).then_some(left_out)) {
                self.note(mistake, operation, wrong.as_ref());
            }
        }
    }
}

/// What is wrong with what a power cut leaves then.
fn wrong(moment: &Moment, without: u64) -> Option<String> {
    let Unsynced { nothing, all_else } = moment.disk.without_sync(without)?;
    [nothing, all_else].into_iter().find_map(|disk| check(&disk, &moment.models, moment.at).err())
}

/// The functions that asked for a sync, innermost first, and the kind of file.
fn name(sync: &Synced) -> String {
    let kind = sync.name.rsplit(['.', '/']).next().unwrap_or_default();
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
    format!("{kind}: {}", functions.join(" < "))
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
        (trial.noticed, trial.names) = Default::default();
        for moment in moments.take() {
            let newest = moment.disk.last_syncs().iter().map(|sync| sync.operation).max();
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
        let words = match mistake {
            Mistake::LeftOut(sync) => format!("left out: {sync}"),
            Mistake::Late(first, second) => {
                format!("late:     {first}\n                                  after: {second}")
            }
        };
        println!("{:>5} noticed, {:>5} not: {words}", tried.noticed, tried.missed.len());
        if tried.noticed == 0 {
            unknown.push(words);
        }
    }
    unknown.retain(|words| !HARMLESS.iter().any(|(harmless, _)| words.contains(harmless)));
    assert!(unknown.is_empty(), "nobody notices: {unknown:#?}");
}
