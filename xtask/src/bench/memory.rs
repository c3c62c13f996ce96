//! Memory: what a guest notices of its snapshots and of applies, beside QEMU's own `savevm` and `loadvm` on qcow2, and beside a copy of its RAM.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::contest::{Promise, Report, Row};
use super::tenby;
use crate::{call, cargo, guest, output_of, target};

/// RAM of the guests, MiB.
const SIZES: [&str; 2] = ["512", "2048"];
/// What others do who have no `savevm` for their disks: all of RAM goes into a file while the guest stands still.
const COPY: &str = "stop, migrate to a file, cont";
/// RAM of the guest that is cloned, MiB.
const CLONE: &str = "256";
/// Pages in a MiB.
const PAGES_A_MIB: f64 = 256.0;

pub(super) fn run() -> Result<Vec<Report>> {
    let guest = guest::build()?;
    call(cargo().args(["build", "--release", "--package", "e2e", "--example", "memory"]))?;
    let measure = |peer: &str, mib: &str| -> Result<Value> {
        let mut command = Command::new(target().join("release/examples/memory"));
        command.args([peer, mib]).env("TENBY_BIN", tenby()).env("TENBY_GUEST", &guest);
        Ok(serde_json::from_str(&output_of(&mut command)?)?)
    };
    let (mut reports, mut heartbeats) = (Vec::new(), Vec::new());
    for mib in SIZES {
        let (ours, theirs) = (measure("tenby", mib)?, measure("qemu", mib)?);
        reports.push(pause(mib, &ours, &theirs)?);
        reports.push(stored(mib, &ours)?);
        reports.push(apply(mib, &ours, &theirs)?);
        reports.push(save(mib, &ours, &theirs)?);
        heartbeats.push(Row { name: format!("{mib} MiB"), samples: numbers(&ours, "applied_s")? });
    }
    reports.push(Report {
        name: "memory-apply-size".into(),
        what: "apply to the first answer, by RAM".into(),
        unit: "s",
        rows: heartbeats,
        promises: vec![Promise::TimesAtMost("2048 MiB", 1.25, "512 MiB")],
    });
    reports.extend(hundred(&measure("hundred", SIZES[0])?)?);
    reports.extend(busy(&measure("busy", SIZES[0])?)?);
    reports.extend(clones(&measure("clones", CLONE)?)?);
    Ok(reports)
}

/// 25 clones of one memory, started together.
fn clones(told: &Value) -> Result<Vec<Report>> {
    let answered = numbers(told, "answered_s")?;
    let slowest = answered.iter().copied().fold(0.0, f64::max);
    let number = |key: &str| told[key].as_f64().with_context(|| format!("no {key} in {told}"));
    let rows =
        vec![Row { name: "each".into(), samples: answered }, Row { name: "slowest".into(), samples: vec![slowest] }];
    Ok(vec![
        Report {
            name: "memory-clones".into(),
            what: format!("25 linked clones that go on from the memory of a guest of {CLONE} MiB, until each answers"),
            unit: "s",
            rows,
            promises: vec![Promise::AtMost("slowest", 8.0)],
        },
        Report {
            name: "memory-clones-ram".into(),
            what: "what each of them costs the host beside the pages that are not zero, with its worker".into(),
            unit: "MiB",
            rows: vec![Row { name: "each".into(), samples: vec![number("host_mib")? - number("used_mib")?] }],
            promises: vec![Promise::AtMost("each", 80.0)],
        },
    ])
}

/// Snapshots of a guest that changes 2,000 pages a second.
fn busy(told: &Value) -> Result<Vec<Report>> {
    let (pauses, with, without) =
        (numbers(told, "pauses_ms")?, numbers(told, "gaps_ms")?, numbers(told, "idle_gaps_ms")?);
    let slow = |all: &[f64]| ninety_fifth(all.to_vec());
    let more = slow(&with) - slow(&without);
    let row = |name: &str, samples| Row { name: name.into(), samples };
    Ok(vec![
        Report {
            name: "memory-busy-pause".into(),
            what: "pause of a guest of 512 MiB that changes 2,000 pages a second".into(),
            unit: "ms",
            rows: vec![row("95th in 100", vec![slow(&pauses)]), row("each", pauses)],
            promises: vec![Promise::AtMost("95th in 100", 20.0)],
        },
        Report {
            name: "memory-busy-gap".into(),
            what: "the longest that it is without a tick (each 20 ms) of its own clock, over a snapshot".into(),
            unit: "ms",
            rows: vec![row("without a snapshot", without), row("snapshot", with), row("more, 95th in 100", vec![more])],
            promises: vec![Promise::AtMost("more, 95th in 100", 50.0)],
        },
    ])
}

/// What 95 in 100 are not above.
fn ninety_fifth(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() * 95 / 100).copied().unwrap_or(f64::INFINITY)
}

/// A snapshot applied a hundred times: does it become slower, does something leak?
fn hundred(told: &Value) -> Result<Vec<Report>> {
    let mut applied = numbers(told, "applied_s")?;
    applied.sort_by(f64::total_cmp);
    let slow = vec![ninety_fifth(applied.clone())];
    let held = numbers(told, "descriptors")?;
    let (first, last) = held.split_at(held.len() / 2);
    let most = |part: &[f64]| vec![part.iter().copied().fold(0.0, f64::max)];
    let memory = told["worker_mib"].as_f64().context("no worker_mib")?;
    let report = |name: &str, what: &str, unit, rows: Vec<(&str, Vec<f64>)>, promise| Report {
        name: name.into(),
        what: what.into(),
        unit,
        rows: rows.into_iter().map(|(name, samples)| Row { name: name.into(), samples }).collect(),
        promises: vec![promise],
    };
    Ok(vec![
        report(
            "memory-hundred",
            "one snapshot of a guest of 512 MiB applied 100 times, until the guest answers",
            "s",
            vec![("median", vec![applied[applied.len() / 2]]), ("95th in 100", slow)],
            Promise::TimesAtMost("95th in 100", 2.0, "median"),
        ),
        report(
            "memory-leaks",
            "the most descriptors that the worker has meanwhile",
            "",
            vec![("first fifty", most(first)), ("last fifty", most(last))],
            Promise::TimesAtMost("last fifty", 1.1, "first fifty"),
        ),
        report(
            "memory-worker",
            "the most memory of the worker",
            "MiB",
            vec![("worker", vec![memory])],
            Promise::AtMost("worker", 64.0),
        ),
    ])
}

fn pause(mib: &str, ours: &Value, theirs: &Value) -> Result<Report> {
    let all = numbers(ours, "pauses_ms")?;
    let one = |name: &str, nth: usize| Row { name: name.into(), samples: vec![all[nth]] };
    let slowest = all.iter().copied().fold(0.0, f64::max);
    let rows = vec![
        Row { name: "savevm".into(), samples: numbers(theirs, "pauses_ms")? },
        Row { name: COPY.into(), samples: numbers(theirs, "copied_s")?.into_iter().map(|s| s * 1e3).collect() },
        one("first", 0),
        one("second", 1),
        one("tenth", 9),
        Row { name: "slowest of ten".into(), samples: vec![slowest] },
        Row { name: "ten".into(), samples: all },
    ];
    Ok(Report {
        name: format!("memory-pause-{mib}"),
        what: format!("pause of a guest of {mib} MiB at ten snapshots in a row"),
        unit: "ms",
        rows,
        promises: vec![
            Promise::AtMost("ten", 5.0),
            Promise::AtMost("slowest of ten", 20.0),
            Promise::TimesAtMost("ten", 1.0 / 50.0, "savevm"),
        ],
    })
}

fn stored(mib: &str, ours: &Value) -> Result<Report> {
    let all = mib.parse::<f64>()? * PAGES_A_MIB;
    let samples = numbers(ours, "stored_pages")?.into_iter().skip(1).map(|pages| pages / all * 100.0).collect();
    Ok(Report {
        name: format!("memory-stored-{mib}"),
        what: format!("RAM stored by each snapshot of an idle guest of {mib} MiB but the first"),
        unit: "%",
        rows: vec![Row { name: "stored".into(), samples }],
        promises: vec![Promise::AtMost("stored", 1.0)],
    })
}

fn apply(mib: &str, ours: &Value, theirs: &Value) -> Result<Report> {
    let rows = vec![
        Row { name: "loadvm".into(), samples: numbers(theirs, "applied_s")? },
        Row { name: "tenby".into(), samples: numbers(ours, "applied_s")? },
    ];
    let mut promises = vec![Promise::AtMost("tenby", 0.4)];
    if mib == "2048" {
        promises.push(Promise::TimesAtMost("tenby", 0.2, "loadvm"));
    }
    Ok(Report {
        name: format!("memory-apply-{mib}"),
        what: format!("a snapshot of a running guest of {mib} MiB applied, until the guest answers"),
        unit: "s",
        rows,
        promises,
    })
}

/// Saving goes over all of RAM while the guest stands still, for it must not run past what it is taken back to; going on from it does not.
fn save(mib: &str, ours: &Value, theirs: &Value) -> Result<Report> {
    let row =
        |name: &str, of: &Value, key| -> Result<Row> { Ok(Row { name: name.into(), samples: numbers(of, key)? }) };
    Ok(Report {
        name: format!("memory-save-{mib}"),
        what: format!("a guest of {mib} MiB saved, and started again until it answers"),
        unit: "s",
        rows: vec![row(COPY, theirs, "copied_s")?, row("save", ours, "saved_s")?, row("start", ours, "resumed_s")?],
        promises: vec![Promise::TimesAtMost("save", 2.0, COPY)],
    })
}

fn numbers(of: &Value, key: &str) -> Result<Vec<f64>> {
    let list = of[key].as_array().with_context(|| format!("no {key} in {of}"))?;
    list.iter().map(|value| value.as_f64().with_context(|| format!("{key} holds {value}"))).collect()
}
