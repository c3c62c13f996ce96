//! The soak: a live machine, asked and killed at random for as long as one likes.

use anyhow::{Result, bail};

use crate::{call, cargo, guest, number_after, step};

/// Minutes if nobody says.
const MINUTES: u64 = 60;

/// `cargo xtask soak [--minutes N] [--seed S]`.
pub(crate) fn run(words: &[String]) -> Result<()> {
    let (mut minutes, mut seed) = (MINUTES, 1);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--minutes" => minutes = number_after(word, &mut words)?,
            "--seed" => seed = number_after(word, &mut words)?,
            other => bail!("there is no {other}"),
        }
    }
    let guest = guest::build()?;
    step("building Tenby");
    call(cargo().args(["build", "--package", "tenby"]))?;
    step(&format!("{minutes} minutes of random requests and deaths, from seed {seed} on"));
    call(
        cargo()
            .args(["test", "--package", "e2e", "--test", "random", "--"])
            .args(["--nocapture", "--ignored", "--exact", "soak::an_hour"])
            .env("TENBY_SOAK_MINUTES", minutes.to_string())
            .env("TENBY_SEED", seed.to_string())
            .env("TENBY_GUEST", guest),
    )
}
