//! Deleting: how long merging takes, and what whoever writes meanwhile sees of it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;

use super::contest::{Promise, Report, Row, median};
use super::{scratch, tenby};
use crate::{call, output_of, target};

/// Times that each is measured,
const ROUNDS: usize = 5;
/// and in each of them the merge beside a writer: one meets some 350 of its flushes, too few to tell the thousandth by.
const LIVE: usize = 3;
/// Snapshots that each rewrote the same, and how many MiB: 1,000 x 1 GiB would not fit here, and what is looked at is the ratio.
const MANY: u64 = 1000;
const REWRITTEN: u64 = 8;
/// What each writes where every second is deleted, MiB, and times that this is measured: it takes as long as the device makes it.
const OWN: u64 = 4;
const EVERY: usize = 3;

/// What a writer's flushes are beside, and where `fold` tells them.
const FLUSHES: [(&str, &str); 4] = [
    ("nothing is merged", "/before/flushes_ms"),
    ("something is", "/during/flushes_ms"),
    ("its space is given back", "/after/flushes_ms"),
    ("as much is written to a plain file", "/plain/flushes_ms"),
];

/// What the example `fold` measured in a new root.
fn fold(folder: &Path, words: &[&str]) -> Result<Value> {
    let root = folder.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
        call(&mut Command::new("sync"))?;
    }
    let mut fold = Command::new(target().join("release/examples/fold"));
    let text = output_of(fold.arg(&root).args(words))?;
    Ok(serde_json::from_str(&text)?)
}

fn number(of: &Value, path: &str) -> Result<f64> {
    of.pointer(path).and_then(Value::as_f64).with_context(|| format!("no {path} in {of}"))
}

fn numbers(of: &Value, path: &str) -> Result<Vec<f64>> {
    let list = of.pointer(path).and_then(Value::as_array).with_context(|| format!("no {path} in {of}"))?;
    Ok(list.iter().filter_map(Value::as_f64).collect())
}

/// The 99.9th in 100: of a thousand one is longer.
fn thousandth(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() * 999 / 1000).copied().unwrap_or(f64::NAN)
}

fn row(name: &str, samples: Vec<f64>) -> Row {
    Row { name: name.into(), samples }
}

fn report(name: &str, what: &str, unit: &'static str, rows: Vec<Row>, promises: Vec<Promise>) -> Report {
    Report { name: name.into(), what: what.into(), unit, rows, promises }
}

/// A leaf of 20,000 scattered pages is merged into its base: while nobody writes, and while somebody does.
pub(super) fn live() -> Result<Vec<Report>> {
    let folder = scratch("merge-live")?;
    let qcow2 = super::disk::theirs_written(&folder)?;
    let (mut copies, mut commits) = (Vec::new(), Vec::new());
    let (mut idle, mut moved, mut live) = (Vec::new(), Vec::new(), Vec::new());
    let (mut stall, mut flushes) = (Vec::new(), FLUSHES.map(|(_, path)| (path, Vec::new())));
    for _ in 0..ROUNDS {
        copies.push(copied(&folder)?);
        commits.push(super::disk::committed(&folder, &qcow2)?);
        let told = fold(&folder, &["idle"])?;
        idle.push(number(&told, "/seconds")?);
        moved.push(number(&told, "/moved")? / number(&told, "/payload")?);
        let mut took = Vec::new();
        for _ in 0..LIVE {
            let told = fold(&folder, &["live"])?;
            took.push(number(&told, "/seconds")?);
            stall.push(number(&told, "/during/worst_write_ms")?);
            for (path, all) in &mut flushes {
                all.extend(numbers(&told, path)?);
            }
        }
        live.push(median(took));
    }
    let rows = vec![
        row("cp of as scattered a file, synced", copies),
        row("qemu-img commit of the same", commits),
        row("idle", idle),
        row("live", live),
    ];
    let promises = vec![
        Promise::TimesAtMost("idle", 2.0, "cp of as scattered a file, synced"),
        Promise::TimesAtMost("idle", 1.0 / 3.0, "qemu-img commit of the same"),
        Promise::TimesAtMost("live", 3.0, "idle"),
    ];
    let flushes = FLUSHES.iter().zip(flushes).map(|((name, _), (_, all))| row(name, vec![thousandth(all)])).collect();
    Ok(vec![
        report("merge-time", "20,000 scattered pages over 4 GiB merged into their base", "s", rows, promises),
        report(
            "merge-moved",
            "bytes that moved, of those to be moved",
            "x",
            vec![row("tenby", moved)],
            vec![Promise::AtMost("tenby", 1.0)],
        ),
        report(
            "merge-stall",
            "the longest write of a steady writer meanwhile",
            "ms",
            vec![row("tenby", stall)],
            vec![Promise::AtMost("tenby", 100.0)],
        ),
        report(
            "merge-flush",
            "the writer's flushes, 99.9th in 100 of all",
            "ms",
            flushes,
            vec![
                Promise::TimesAtMost("something is", 2.0, "nothing is merged"),
                Promise::TimesAtMost("its space is given back", 2.0, "nothing is merged"),
            ],
        ),
    ])
}

/// How long `cp` takes for the bytes of such a leaf, as scattered, until they are durable.
fn copied(folder: &Path) -> Result<f64> {
    let (from, to) = (folder.join("scattered"), folder.join("copy"));
    if !from.exists() {
        super::disk::scattered_file(&from)?;
    }
    let start = Instant::now();
    call(Command::new("cp").arg("--sparse=always").arg(&from).arg(&to))?;
    fs::File::open(&to)?.sync_all()?;
    let took = start.elapsed().as_secs_f64();
    fs::remove_file(to)?;
    Ok(took)
}

/// Many snapshots that each rewrote the same.
pub(super) fn many() -> Result<Vec<Report>> {
    let folder = scratch("merge-many")?;
    let mib = REWRITTEN.to_string();
    let payload = (REWRITTEN << 20) as f64;
    let told = fold(&folder, &["many", &MANY.to_string(), &mib])?;
    let moved = number(&told, "/moved")? / payload;
    let memory = number(&told, "/memory_kib")? / 1024.0;
    let (mut few, mut all) = (Vec::new(), Vec::new());
    for _ in 0..EVERY {
        few.push(per_gib(&folder, MANY / 5)?);
        all.push(per_gib(&folder, MANY)?);
    }
    let every = vec![row("of 200", few), row("of 1,000", all)];
    let one = |name: &str, what: &str, unit, sample, most| {
        report(name, what, unit, vec![row("tenby", vec![sample])], vec![Promise::AtMost("tenby", most)])
    };
    Ok(vec![
        one(
            "merge-many",
            "999 of 1,000 snapshots deleted that each rewrote the same: bytes that moved",
            "x once",
            moved,
            1.05,
        ),
        one("merge-memory", "the most memory meanwhile", "MiB", memory, 256.0),
        report(
            "merge-every-second",
            "every second snapshot deleted: time a GiB moved",
            "s",
            every,
            vec![Promise::TimesAtMost("of 1,000", 1.5, "of 200")],
        ),
        recovery(&folder, &mib)?,
    ])
}

/// Every second of so many snapshots is deleted: seconds a GiB that moves.
fn per_gib(folder: &Path, snapshots: u64) -> Result<f64> {
    let told = fold(folder, &["every", &snapshots.to_string(), &OWN.to_string()])?;
    Ok(number(&told, "/seconds")? / (number(&told, "/moved")? / f64::from(1 << 30)))
}

/// A worker that died as a merge was about to be committed, 1,000 snapshots present: until the next command is answered.
fn recovery(folder: &Path, mib: &str) -> Result<Report> {
    let dead = fold(folder, &["dies", &MANY.to_string(), mib]);
    anyhow::ensure!(dead.is_err(), "it was to die");
    let root = folder.join("root");
    let start = Instant::now();
    let mut note = Command::new(tenby());
    call(note.arg("--quiet").arg("--root").arg(&root).args(["snapshot", "note", "lab", "s500", "still there"]))?;
    let took = start.elapsed().as_secs_f64();
    let what = "a merge was cut off, 1,000 snapshots present: until the next request is done";
    Ok(report("merge-recovery", what, "s", vec![row("tenby", vec![took])], vec![Promise::AtMost("tenby", 1.0)]))
}
