//! The test tests itself: each sync of a life is left out once, and the life's crash test has to notice, or it is known why it cannot.

use crate::world::World;
use crate::{check, live, number, runtime, sample};
use std::collections::BTreeMap;
use store::sim::{At, Crash, Skipped};

/// Places in the code whose syncs can be left out, one at a time, without harm, and why.
const HARMLESS: &[(&str, &str)] = &[];

/// So many operations after a sync that is missing the power is cut, at every third.
const AFTER: u64 = 60;

/// What became of leaving out the syncs of one place in the code.
#[derive(Debug, Default)]
struct Site {
    noticed: u32,
    missed: u32,
}

/// The lines that asked for the sync, innermost first.
fn site(skipped: &Skipped) -> String {
    let ours = |line: &str| {
        let (_, place) = line.trim_start().strip_prefix("at ")?.split_once("/src/")?;
        let file = place.rsplit_once(':').map_or(place, |(line, _)| line);
        let foreign = line.contains("/rustc/") || line.contains("/registry/") || file.starts_with("sim");
        (!foreign).then(|| file.to_owned())
    };
    let kind = skipped.name.rsplit('.').next().unwrap_or_default();
    let lines: Vec<String> = skipped.by.lines().filter_map(ours).take(3).collect();
    format!("{kind}: {}", lines.join(" < "))
}

/// Leaves out the `nth` sync of this seed's life, and cuts the power soon after: what was not synced is gone. Whether that is noticed, and where it
/// was asked for; nothing, if it had nothing to do.
fn skip(seed: u64, nth: u64) -> Option<(String, bool)> {
    let (machine, runtime) = (sample::machine(2), runtime());
    let life = |cut: Option<u64>| {
        let mut world = World::new(&machine, seed);
        world.disk.skip_sync(nth);
        if let Some(at) = cut {
            world.disk.cut(At::Operation(at));
        }
        let ended = live(&mut world, &runtime);
        (world, ended)
    };
    let skipped = life(None).0.disk.skipped()?;
    let wrong = |at| {
        let (world, ended) = life(Some(at));
        !ended && check(&world.disk.after_crash(Crash::Nothing), &world.models(), at).is_err()
    };
    let noticed = (skipped.operation + 1..skipped.operation + AFTER).step_by(3).any(wrong);
    Some((site(&skipped), noticed))
}

/// Takes long: `cargo xtask crash --syncs`.
#[test]
#[ignore = "takes many minutes"]
fn a_sync_that_is_left_out_is_noticed() {
    let mut sites: BTreeMap<String, Site> = BTreeMap::new();
    let seed = number("TENBY_CRASH_SEED", 300);
    let mut whole = World::new(&sample::machine(2), seed);
    let first = whole.disk.counts().syncs;
    assert!(live(&mut whole, &runtime()), "seed {seed}");
    for (name, noticed) in (first..whole.disk.counts().syncs).filter_map(|nth| skip(seed, nth)) {
        let site = sites.entry(name).or_default();
        *(if noticed { &mut site.noticed } else { &mut site.missed }) += 1;
    }
    for (name, site) in &sites {
        println!("{:>5} noticed, {:>5} not: {name}", site.noticed, site.missed);
    }
    let known = |name: &str| HARMLESS.iter().any(|(harmless, _)| name.contains(harmless));
    let unnoticed: Vec<_> = sites.iter().filter(|(name, site)| site.noticed == 0 && !known(name)).collect();
    assert!(unnoticed.is_empty(), "nobody notices that these are left out: {unnoticed:#?}");
}
