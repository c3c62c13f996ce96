//! The crash test of the whole stack, for as many states as one likes.

use anyhow::{Context, Result, bail};

use crate::{call, cargo, step};

/// Distinct states that are looked at if nobody says.
const STATES: u64 = 100_000;

/// `cargo xtask crash [--states N] [--seed S]`
pub(crate) fn run(words: &[String]) -> Result<()> {
    let (mut states, mut seed) = (STATES, 1);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} wants a number"))?;
        let number: u64 = value.parse().with_context(|| format!("{word} wants a number, not {value:?}"))?;
        match word.as_str() {
            "--states" => states = number,
            "--seed" => seed = number,
            other => bail!("there is no {other}"),
        }
    }
    step(&format!("{states} distinct crash states, from seed {seed} on"));
    call(
        cargo()
            .args(["test", "--profile", "fuzz", "--package", "machine", "--test", "stack", "--"])
            .args(["--nocapture", "--exact", "nothing_is_lost_wherever_the_power_goes"])
            .env("TENBY_CRASH_STATES", states.to_string())
            .env("TENBY_CRASH_SEED", seed.to_string()),
    )
}
