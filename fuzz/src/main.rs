//! Fuzzes for a time: `fuzz SECONDS SEED [TARGET…]`. `cargo xtask fuzz` builds and starts it.

use anyhow::{Context, Result, bail, ensure};
use fuzz::run::{Campaign, Failure, execute, keep};
use fuzz::targets::{ALL, find};
use fuzz::{Input, Target};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// An execution that takes longer hangs.
const HANGS: Duration = Duration::from_secs(60);
/// Failures of a target after which it is given up for this time.
const ENOUGH: usize = 5;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["replay", target, ref files @ ..] => replay(known(target)?, files),
        [seconds, seed, ref names @ ..] => {
            let targets = match names {
                [] => ALL.iter().collect(),
                names => names.iter().map(|name| known(name)).collect::<Result<Vec<_>>>()?,
            };
            let time = Duration::from_secs(seconds.parse().context("SECONDS is a number")?);
            let seed = seed.parse().context("SEED is a number")?;
            let mut failed = 0;
            for target in targets {
                failed += campaign(target, seed, time)?;
            }
            ensure!(failed == 0, "{failed} executions failed");
            Ok(())
        }
        _ => bail!("usage: fuzz SECONDS SEED [TARGET...] | fuzz replay TARGET FILE..."),
    }
}

fn known(name: &str) -> Result<&'static Target> {
    let names: Vec<_> = ALL.iter().map(|target| target.name).collect();
    find(name).with_context(|| format!("there is no target `{name}`; there are {}", names.join(", ")))
}

/// Runs kept inputs again.
fn replay(target: &Target, files: &[&str]) -> Result<()> {
    for file in files {
        let input = Input::decode(&std::fs::read(file)?)?;
        match execute(target, &input) {
            Ok(ran) => println!("{file}: {} ({} KiB of memory)", ran.outcome, ran.memory >> 10),
            Err(failure) => println!("{file}: FAILED: {failure}"),
        }
    }
    Ok(())
}

/// What is executed now, since when; for the watchdog.
type Current = Arc<Mutex<Option<(Instant, Input)>>>;

/// Keeps the input of an execution that does not end, and ends everything.
fn watch(target: &'static Target, current: &Current) {
    let current = Arc::clone(current);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(5));
            let now = current.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, input)) = now.as_ref().filter(|(since, _)| since.elapsed() > HANGS) {
                let failure = Failure { reason: "it took too long".to_owned(), input: input.clone() };
                eprintln!("{}: it does not end; kept in {:?}", target.name, keep(target, &failure));
                std::process::exit(2);
            }
        }
    });
}

/// Fuzzes one target and says what came of it; gives the number of failures.
fn campaign(target: &'static Target, seed: u64, time: Duration) -> Result<usize> {
    let current = Current::default();
    watch(target, &current);
    let begun = Instant::now();
    let mut campaign = match Campaign::new(target, seed) {
        Ok(campaign) => campaign,
        Err(failure) => {
            bail!("{}: a seed fails: {failure}; kept in {}", target.name, keep(target, &failure)?.display())
        }
    };
    let mut failures = Vec::new();
    while begun.elapsed() < time && failures.len() < ENOUGH {
        let input = campaign.next_input();
        *current.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), input.clone()));
        let ran = campaign.run(input);
        *current.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if let Err(failure) = ran {
            println!("{}: FAILED: {failure}\n  kept in {}", target.name, keep(target, &failure)?.display());
            failures.push(failure);
        }
    }
    println!(
        "{:10} {:>9} executions  {:>5}/s  {:>4} outcomes  {:>4} MiB at most  {} failures",
        target.name,
        campaign.executions,
        campaign.executions * 1000 / (begun.elapsed().as_millis() as u64).max(1),
        campaign.outcomes.len(),
        campaign.memory >> 20,
        failures.len()
    );
    if std::env::var_os("FUZZ_OUTCOMES").is_some() {
        for (outcome, times) in &campaign.outcomes {
            println!("    {times:>8}  {outcome}");
        }
    }
    Ok(failures.len())
}
