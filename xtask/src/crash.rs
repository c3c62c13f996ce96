//! The crash test of the whole stack, for as many states as one likes.

use anyhow::{Result, bail};

use crate::{call, cargo, number_after, step};

/// Distinct states that are looked at if nobody says.
const STATES: u64 = 100_000;
/// The first of the lives that meet every sync often enough to notice that it is not there.
const SYNCS: u64 = 300;

/// `cargo xtask crash [--states N] [--seed S]`, or `--syncs`: whether the test notices each sync that is left out.
pub(crate) fn run(words: &[String]) -> Result<()> {
    let (mut states, mut seed, mut syncs) = (STATES, None, false);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--syncs" => syncs = true,
            "--states" => states = number_after(word, &mut words)?,
            "--seed" => seed = Some(number_after(word, &mut words)?),
            other => bail!("there is no {other}"),
        }
    }
    let test = if syncs {
        "skips::a_sync_that_is_left_out_or_late_is_noticed"
    } else {
        "nothing_is_lost_wherever_the_power_goes"
    };
    let seed = seed.unwrap_or(if syncs { SYNCS } else { 1 });
    step(&match syncs {
        true => format!("lives from seed {seed} on, without each of their syncs"),
        false => format!("{states} distinct crash states, from seed {seed} on"),
    });
    call(
        cargo()
            .args(["test", "--profile", "fuzz", "--package", "machine", "--test", "stack", "--"])
            .args(["--nocapture", "--include-ignored", "--exact", test])
            .env("TENBY_CRASH_STATES", states.to_string())
            .env("TENBY_CRASH_SEED", seed.to_string()),
    )
}
