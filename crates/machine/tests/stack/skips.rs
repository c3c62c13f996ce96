//! The test tests itself: each sync of a life is left out once, and the life's crash test has to notice, or it is known why it cannot.

use crate::world::World;
use crate::{LIFE, check, live, runtime, sample};
use std::collections::BTreeMap;
use store::sim::{At, Crash, Sim, Skipped};

/// Places in the code whose syncs can be left out, one at a time, without harm, and why.
const HARMLESS: &[(&str, &str)] = &[];

/// After how many of the things that are done next it is looked whether anything is wrong.
const LOOKS: u32 = 10;
/// How many syncs of one place are looked at closely if nobody has noticed that one is missing.
const CLOSELY: usize = 4;
/// How many operations after a sync that is missing the power is cut then.
const AFTER: u64 = 60;

/// What became of leaving out the syncs of one place in the code.
#[derive(Debug, Default)]
struct Site {
    noticed: u32,
    /// Seed, number of the sync, number of its operation.
    missed: Vec<(u64, u64, u64)>,
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

/// Leaves out the `nth` sync of this seed's life. After each thing that is done then, the power goes and takes all that was not synced.
fn skip(seed: u64, nth: u64, sites: &mut BTreeMap<String, Site>) {
    let (machine, runtime) = (sample::machine(2), runtime());
    let mut world = World::new(&machine, seed);
    world.disk.skip_sync(nth);
    let (mut noticed, mut looks) = (false, 0);
    for _ in 0..LIFE {
        if noticed || looks == LOOKS || runtime.block_on(world.live(1)).is_err() {
            break;
        }
        if world.disk.skipped().is_some() {
            looks += 1;
            noticed = check(&world.disk.after_crash(Crash::Nothing), &world.models(), nth).is_err();
        }
    }
    // One that had nothing to do is not missed.
    let Some(skipped) = world.disk.skipped() else { return };
    let site = sites.entry(site(&skipped)).or_default();
    match noticed {
        true => site.noticed += 1,
        false => site.missed.push((seed, nth, skipped.operation)),
    }
}

/// The same, with the power cut at each of the next operations.
fn look_closely(seed: u64, nth: u64, operation: u64) -> bool {
    let (machine, runtime) = (sample::machine(2), runtime());
    (operation + 1..operation + AFTER).any(|at| {
        let mut world = World::new(&machine, seed);
        world.disk.skip_sync(nth);
        world.disk.cut(At::Operation(at));
        let ended = live(&mut world, &runtime);
        let wrong = |crash| {
            let after: Sim = world.disk.after_crash(crash);
            check(&after, &world.models(), at).is_err()
        };
        !ended && Crash::several(at, 6).any(wrong)
    })
}

#[test]
fn a_sync_that_is_left_out_is_noticed() {
    let mut sites = BTreeMap::new();
    for seed in 300..301 {
        let (machine, runtime) = (sample::machine(2), runtime());
        let mut whole = World::new(&machine, seed);
        let first = whole.disk.counts().syncs;
        assert!(live(&mut whole, &runtime), "seed {seed}");
        for nth in first..whole.disk.counts().syncs {
            skip(seed, nth, &mut sites);
        }
    }
    let mut unnoticed = Vec::new();
    for (name, site) in &mut sites {
        if site.noticed == 0 {
            let close = site.missed.iter().take(CLOSELY);
            site.noticed = close.filter(|(seed, nth, operation)| look_closely(*seed, *nth, *operation)).count() as u32;
        }
        println!("{:>5} noticed, {:>5} not: {name}", site.noticed, site.missed.len());
        if site.noticed == 0 && !HARMLESS.iter().any(|(harmless, _)| name.contains(harmless)) {
            unnoticed.push(name.clone());
        }
    }
    assert!(unnoticed.is_empty(), "nobody notices that these are left out: {unnoticed:#?}");
}
