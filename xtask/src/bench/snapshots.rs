//! Snapshots, as the command line's user has them: with its start, the worker's, and everything on disk.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::contest::{Promise, Report, Row};
use super::{scratch, tenby};
use crate::{call, guest, output_of};

/// Snapshots that are there before the first is measured.
const PRESENT: usize = 1000;
/// How often a snapshot is taken and the list is asked for.
const TIMES: usize = 20;
/// Machines that are booted, one after the other.
const MACHINES: usize = 3;
/// The guest has nothing to do for so long before its first snapshot.
const SETTLING: Duration = Duration::from_secs(20);
/// From the first snapshot to the second.
const LATER: Duration = Duration::from_secs(60);

/// A root of its own.
struct Root(PathBuf);

impl Root {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(tenby());
        command.arg("--root").arg(&self.0).args(words).stdin(Stdio::null());
        command
    }

    fn quietly(&self, words: &[&str]) -> Result<()> {
        output_of(&mut self.command(words)).map(drop)
    }

    fn json(&self, words: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&output_of(&mut self.command(&[&["--json"], words].concat()))?)?)
    }

    /// How long a command takes from its start to its end, milliseconds.
    fn time(&self, words: &[&str]) -> Result<f64> {
        let start = Instant::now();
        self.quietly(words)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

/// A machine that is off, with many snapshots: one more, and the list of them all.
pub(super) fn off() -> Result<Vec<Report>> {
    let root = Root(scratch("snapshot-off")?);
    root.quietly(&["vm", "create", "bench", "--memory", "64M", "--disk", "new:1G"])?;
    for number in 0..PRESENT {
        root.quietly(&["snapshot", "create", "bench", &format!("{number}")])?;
    }
    let take = |number| root.time(&["snapshot", "create", "bench", &format!("measured {number}")]);
    let list = |_| root.time(&["snapshot", "list", "bench"]);
    let reports = [
        report(
            "snapshot-off-create",
            "a snapshot of a machine that is off, with 1,000 present",
            "ms",
            "create",
            50.0,
            take,
        )?,
        report("snapshot-off-list", "the list of 1,000 snapshots", "ms", "list", 100.0, list)?,
    ];
    root.quietly(&["vm", "delete", "bench", "--yes"])?;
    Ok(reports.into())
}

fn report(
    name: &str,
    what: &str,
    unit: &'static str,
    row: &'static str,
    at_most: f64,
    measure: impl FnMut(usize) -> Result<f64>,
) -> Result<Report> {
    let samples = (0..TIMES).map(measure).collect::<Result<_>>()?;
    Ok(one_row(name, what, unit, row, at_most, samples))
}

fn one_row(name: &str, what: &str, unit: &'static str, row: &'static str, at_most: f64, samples: Vec<f64>) -> Report {
    Report {
        name: name.into(),
        what: what.into(),
        unit,
        rows: vec![Row { name: row.into(), samples }],
        promises: vec![Promise::AtMost(row, at_most)],
    }
}

/// The idle guest of 512 MiB: what it notices of its first snapshot, and what a second one a minute later stores.
pub(super) fn running() -> Result<Vec<Report>> {
    let guest = guest::build()?;
    let append = std::fs::read_to_string(guest.join("append"))?;
    let root = Root(scratch("snapshot-pause")?);
    let (mut pauses, mut stored) = (Vec::new(), Vec::new());
    for number in 0..MACHINES {
        let name = format!("bench-{number}");
        let hardware = ["--memory", "512M", "--accel", "tcg", "--disk", "new:64M", "--disk", "new:64M"];
        let mut create = root.command(&["vm", "create", &name]);
        create.args(hardware).arg("--kernel").arg(guest.join("kernel")).arg("--initrd").arg(guest.join("initrd"));
        output_of(create.args(["--append", append.trim()]))?;
        root.quietly(&["vm", "start", &name])?;
        wait_until_up(&root, &name)?;
        std::thread::sleep(SETTLING);
        root.quietly(&["snapshot", "create", &name, "first"])?;
        pauses.push(number_in(&root.json(&["snapshot", "show", &name, "first"])?, "/pause_ms")?);
        std::thread::sleep(LATER);
        root.quietly(&["snapshot", "create", &name, "second"])?;
        stored.push(stored_percent(&root.json(&["snapshot", "show", &name, "second"])?)?);
        call(&mut root.command(&["--quiet", "vm", "stop", &name, "--turn-off"]))?;
        root.quietly(&["vm", "delete", &name, "--yes"])?;
    }
    Ok(vec![
        one_row("snapshot-pause", "pause of an idle guest of 512 MiB, first snapshot", "ms", "pause", 10.0, pauses),
        one_row("snapshot-second", "RAM stored by a second snapshot a minute later", "%", "stored", 5.0, stored),
    ])
}

/// The witness says on the serial port that it is up.
fn wait_until_up(root: &Root, name: &str) -> Result<()> {
    let mut console = root.command(&["vm", "console", name]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(console.stdout.take().context("it is a pipe")?).split(b'\n');
    let up = lines.map_while(Result::ok).any(|line| String::from_utf8_lossy(&line).contains("WITNESS READY"));
    console.kill()?;
    console.wait()?;
    if !up {
        bail!("the console of {name} ended before the guest was up");
    }
    Ok(())
}

fn stored_percent(snapshot: &Value) -> Result<f64> {
    let stored = number_in(snapshot, "/pages/stored")?;
    let all = stored + number_in(snapshot, "/pages/same")? + number_in(snapshot, "/pages/zero")?;
    Ok(stored / all * 100.0)
}

fn number_in(document: &Value, pointer: &str) -> Result<f64> {
    document.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("no {pointer} in {document}"))
}
