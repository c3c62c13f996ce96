//! Every target, some thousands of executions, the same each time; and every input that once failed.

use fuzz::run::{Campaign, execute, keep, regressions};
use fuzz::targets::{ALL, find};

/// The seed of the bounded runs.
const SEED: u64 = 1;

fn bounded(name: &str) {
    let target = find(name).expect("a target of that name");
    for (path, input) in regressions(target).expect("kept inputs") {
        if let Err(failure) = execute(target, &input) {
            panic!("{name} fails again with {}: {failure}", path.display());
        }
    }
    let failed = |failure: Box<fuzz::run::Failure>, at: u64| -> ! {
        let path = keep(target, &failure).expect("a place for the input");
        panic!("{name}, seed {SEED}, execution {at}: {failure}\nkept in {}", path.display())
    };
    let mut campaign = Campaign::new(target, SEED).unwrap_or_else(|failure| failed(failure, 0));
    let times = std::env::var("FUZZ_TIMES").ok().and_then(|times| times.parse().ok()).unwrap_or(1);
    for at in 0..target.quick * times {
        if let Err(failure) = campaign.step() {
            failed(failure, at);
        }
    }
    println!("{name}: {} executions, {} outcomes", campaign.executions, campaign.outcomes.len());
    assert!(campaign.outcomes.len() > 3, "mutations come to nothing: {:?}", campaign.outcomes);
}

macro_rules! targets {
    ($($name:ident),*) => {
        $(#[test] fn $name() { bounded(stringify!($name)); })*

        #[test]
        fn no_target_is_left_out() {
            assert_eq!(ALL.iter().map(|target| target.name).collect::<Vec<_>>(), [$(stringify!($name)),*]);
        }
    };
}

targets!(vhdx, vhd, chain, shape, check, undo, carry, hashes, pages, probe, stream, memory, handshake, nbd, qmp, agent);
