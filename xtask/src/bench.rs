//! The numbers of SPECIFICATION.md, measured.
//!
//! A figure alone says more about the machine and its other load than about Tenby. So whatever is compared is run in turn, several
//! times, and what counts are medians and their ratios. Results are printed, and kept in `target/bench/NAME.json`.

mod contest;
mod disk;
mod memory;
mod merge;
mod nbd;
mod snapshots;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use contest::Report;

use crate::{call, cargo, setup, step, target};

/// Something that can be measured.
struct Bench {
    name: &'static str,
    what: &'static str,
    run: fn() -> Result<Vec<Report>>,
}

const BENCHES: &[Bench] = &[
    Bench { name: "disk-read", what: "random reads, cached, through 1 layer and through 50", run: nbd::read },
    Bench { name: "disk-cold-read", what: "random reads past the page cache", run: nbd::cold_read },
    Bench { name: "disk-first-write", what: "scattered writes to a new leaf, with flushes", run: nbd::first_write },
    Bench { name: "disk-in-order", what: "reads and first writes in order", run: nbd::in_order },
    Bench { name: "disk-convert", what: "copies between raw and VHDX beside cp and qemu-img", run: disk::convert },
    Bench { name: "disk-merge", what: "a leaf of scattered writes merged into its parent", run: disk::merge },
    Bench { name: "disk-deep", what: "a chain of 1,000 layers opened", run: disk::deep },
    Bench { name: "merge-live", what: "a merge while somebody writes, and what they see of it", run: merge::live },
    Bench { name: "merge-many", what: "snapshots by the thousand deleted", run: merge::many },
    Bench { name: "memory", what: "pauses and applies, beside savevm and loadvm", run: memory::run },
    Bench { name: "snapshot-off", what: "snapshots of a machine that is off, 1,000 present", run: snapshots::off },
    Bench { name: "snapshot-pause", what: "what a running guest notices, and what is stored", run: snapshots::running },
];

/// Measures what `names` says, or everything. The beginning of a name stands for all that begin so: `disk`, `snapshot`.
pub(crate) fn run(names: &[String]) -> Result<()> {
    let is_meant = |bench: &Bench, name: &String| bench.name == name || bench.name.starts_with(&format!("{name}-"));
    if let Some(unknown) = names.iter().find(|name| BENCHES.iter().all(|bench| !is_meant(bench, name))) {
        let known: Vec<String> = BENCHES.iter().map(|bench| format!("  {:16} {}", bench.name, bench.what)).collect();
        bail!("there is no bench `{unknown}`; there are\n{}", known.join("\n"));
    }
    setup::run()?;
    setup::for_benches()?;
    step("building Tenby");
    call(cargo().args(["build", "--release", "--package", "tenby"]))?;
    call(cargo().args(["build", "--release", "--package", "export", "--example", "serve"]))?;
    call(cargo().args(["build", "--release", "--package", "machine", "--example", "fold"]))?;
    let chosen = BENCHES.iter().filter(|bench| names.is_empty() || names.iter().any(|name| is_meant(bench, name)));
    let mut missed = 0;
    for bench in chosen {
        step(&format!("{}: {}", bench.name, bench.what));
        for report in (bench.run)().with_context(|| format!("bench {}", bench.name))? {
            println!("{report}");
            fs::write(folder()?.join(format!("{}.json", report.name)), report.json())?;
            missed += usize::from(!report.is_kept());
        }
    }
    if missed > 0 {
        // Not a failure: a busy machine misses them too.
        println!("{missed} of the promised numbers were missed");
    }
    Ok(())
}

/// Where results are kept and benches work.
fn folder() -> Result<PathBuf> {
    let folder = target().join("bench");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// A folder of this name for a bench to work in, empty.
fn scratch(name: &str) -> Result<PathBuf> {
    let folder = folder()?.join("work").join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn tenby() -> PathBuf {
    target().join("release/tenby")
}
