//! Image files without a machine: copied, merged, opened; beside `cp` and `qemu-img`, on the file system that holds `target/`.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use super::contest::{Contestant, Promise, Report, Row, in_turn};
use super::nbd::{Server, scattered_writes};
use super::{scratch, tenby};
use crate::{call, output_of};

const ROUNDS: usize = 5;
const MIB: u64 = 1 << 20;
/// The disk that is copied: half of it is data, in islands.
const COPIED: u64 = 2 << 30;
const ISLAND: u64 = 64 << 10;
/// The disk that is merged, and what was written to its leaf: pages of 4 KiB.
const MERGED: &str = "4G";
const WRITES: u64 = 20_000;
const PAYLOAD: u64 = WRITES * 4096;
/// So far apart are as many places of 4 GiB, bytes.
const SCATTER: u64 = 52 * 4096;
/// The chain that is opened.
const DEEP: usize = 1000;

/// Copies between raw and VHDX: time, and processor time.
pub(super) fn convert() -> Result<Vec<Report>> {
    let folder = scratch("disk-convert")?;
    let (raw, vhdx, out) = (folder.join("half.raw"), folder.join("half.vhdx"), folder.join("out"));
    half_full(&raw)?;
    call(tenby_disk().arg("convert").arg(&raw).arg(&vhdx))?;
    let mut reports = Vec::new();
    for (name, source, to) in [("disk-to-raw", &vhdx, "raw"), ("disk-to-vhdx", &raw, "vhdx")] {
        let mut cp = Command::new("cp");
        cp.arg("--sparse=always").args([&raw, &out]);
        let mut synced_cp = Command::new("sh");
        synced_cp.args(["-c", r#"cp --sparse=always "$0" "$1" && sync --data "$1""#]).args([&raw, &out]);
        let mut ours = tenby_disk();
        ours.args(["convert", "--no-sync", "--to", to]).args([source, &out]);
        let mut synced_ours = tenby_disk();
        synced_ours.args(["convert", "--to", to]).args([source, &out]);
        let mut theirs = Command::new("qemu-img");
        theirs.args(["convert", "-O", to]).args([source, &out]);
        let commands = [
            ("cp", cp),
            ("cp, synced", synced_cp),
            ("tenby --no-sync", ours),
            ("tenby", synced_ours),
            ("qemu-img", theirs),
        ];
        let mut processor: Vec<Row> =
            commands.iter().map(|(name, _)| Row { name: (*name).into(), samples: Vec::new() }).collect();
        let contestants = commands.into_iter().zip(&mut processor).map(|((name, mut command), row)| {
            let out = out.clone();
            let measure = move || {
                let (wall, used) = timed(&mut command, &out)?;
                row.samples.push(used);
                Ok(wall)
            };
            (name.to_owned(), Box::new(measure) as Box<dyn FnMut() -> Result<f64>>)
        });
        let rows = in_turn(ROUNDS, contestants.collect())?;
        let what = format!("2 GiB, half full, to {to}");
        // A copy that is durable beside one that is, and one that is not beside those that are not.
        let report = |suffix: &str, rows, most| Report {
            name: format!("{name}{suffix}"),
            what: format!("{what}{}", if suffix.is_empty() { "" } else { ": processor time" }),
            unit: "s",
            rows,
            promises: vec![
                Promise::TimesAtMost("tenby --no-sync", most, "cp"),
                Promise::TimesAtMost("tenby", most, "cp, synced"),
                Promise::TimesAtMost("tenby --no-sync", 1.0, "qemu-img"),
            ],
        };
        reports.push(report("", rows, 1.2));
        reports.push(report("-cpu", processor, 1.5));
    }
    Ok(reports)
}

/// A leaf with scattered writes is merged into its parent; and the space that it takes.
pub(super) fn merge() -> Result<Vec<Report>> {
    let folder = scratch("disk-merge")?;
    let (vhdx, qcow2) = (ours_written(&folder)?, theirs_written(&folder)?);
    let space = fs::metadata(vhdx.join("leaf.avhdx"))?.blocks() as f64 * 512.0 / PAYLOAD as f64;
    let contestants: Vec<Contestant<'_>> = vec![
        ("payload".into(), Box::new(|| written_once(&folder.join("payload"), PAYLOAD / MIB, MIB, MIB))),
        ("to its places".into(), Box::new(|| written_and_removed(&folder))),
        (
            "tenby".into(),
            Box::new(|| {
                let work = fresh(&folder, &vhdx)?;
                seconds(tenby_disk().arg("merge").arg(work.join("leaf.avhdx")))
            }),
        ),
        ("qemu-img".into(), Box::new(|| committed(&folder, &qcow2))),
    ];
    let rows = in_turn(ROUNDS, contestants)?;
    let thirds = [rows[3].clone(), rows[2].clone()];
    Ok(vec![
        Report {
            name: "disk-merge".into(),
            what: "20,000 random 4 KiB writes over 4 GiB merged; the payload written with one fsync, in one piece, or to as \
                   many places and as scattered a file removed"
                .into(),
            unit: "s",
            rows,
            promises: vec![
                Promise::TimesAtMost("tenby", 2.0, "payload"),
                Promise::TimesAtMost("tenby", 1.5, "to its places"),
            ],
        },
        Report {
            name: "disk-merge-peer".into(),
            what: "the same beside qemu-img commit (clusters of 64 KiB)".into(),
            unit: "s",
            rows: thirds.into(),
            promises: vec![Promise::TimesAtMost("tenby", 1.0 / 3.0, "qemu-img")],
        },
        Report {
            name: "disk-space".into(),
            what: "what a leaf takes after 20,000 random 4 KiB writes".into(),
            unit: "x payload",
            rows: vec![Row { name: "leaf".into(), samples: vec![space] }],
            promises: vec![Promise::AtMost("leaf", 1.1)],
        },
    ])
}

/// A chain of 1,000 layers of a disk of 1 TiB: until it is served, and what the server holds then.
pub(super) fn deep() -> Result<Vec<Report>> {
    let folder = scratch("disk-deep")?;
    let name = |number: usize| folder.join(format!("{number}.vhdx"));
    call(tenby_disk().arg("create").arg(name(0)).args(["--size", "1T"]))?;
    for number in 1..DEEP {
        call(tenby_disk().arg("create").arg(name(number)).arg("--parent").arg(name(number - 1)))?;
    }
    let (mut times, mut memory) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let server = Server::tenby(&folder, &name(DEEP - 1))?;
        times.push(start.elapsed().as_secs_f64());
        memory.push(most_memory(server.id())?);
    }
    let report = |name: &str, what: &str, unit, most, samples| Report {
        name: name.into(),
        what: what.into(),
        unit,
        rows: vec![Row { name: "tenby".into(), samples }],
        promises: vec![Promise::AtMost("tenby", most)],
    };
    Ok(vec![
        report("disk-deep", "1,000 layers of a disk of 1 TiB opened and served", "s", 1.0, times),
        report("disk-deep-memory", "what the server of that chain holds at most", "MiB", 64.0, memory),
    ])
}

fn tenby_disk() -> Command {
    let mut command = Command::new(tenby());
    command.args(["--quiet", "disk"]);
    command
}

/// Data and holes by turns.
fn half_full(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(COPIED)?;
    let mut number = 1_u64;
    let mut island = vec![0; ISLAND as usize];
    for at in (0..COPIED).step_by(2 * ISLAND as usize) {
        for word in island.chunks_exact_mut(8) {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&number.to_le_bytes());
        }
        file.write_all_at(&island, at)?;
    }
    Ok(file.sync_all()?)
}

/// Runs a command that makes `out`, then removes that: wall and processor time, seconds.
fn timed(command: &mut Command, out: &Path) -> Result<(f64, f64)> {
    if out.exists() {
        fs::remove_file(out)?;
    }
    let before = processor_time()?;
    let wall = seconds(command)?;
    Ok((wall, processor_time()? - before))
}

fn seconds(command: &mut Command) -> Result<f64> {
    let start = Instant::now();
    output_of(command)?;
    Ok(start.elapsed().as_secs_f64())
}

/// What our children that have ended used of the processors, seconds (`/proc/self/stat`, fields 16 and 17, in hundredths).
fn processor_time() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok());
    let both = ticks(13).zip(ticks(14)).context("/proc/self/stat is not understood")?;
    Ok((both.0 + both.1) / 100.0)
}

/// The most memory that a process held, MiB.
fn most_memory(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

/// The least that such a merge does to its two files.
fn written_and_removed(folder: &Path) -> Result<f64> {
    let (parent, child) = (folder.join("parent"), folder.join("child"));
    written_once(&child, WRITES, 4096, SCATTER)?;
    let written = written_once(&parent, WRITES, 4096, SCATTER)?;
    let start = Instant::now();
    fs::remove_file(child)?;
    File::open(folder)?.sync_all()?;
    Ok(written + start.elapsed().as_secs_f64())
}

/// A copy of a folder of disks, to be merged. What the copy left to be written is not the merge's to wait for.
fn fresh(folder: &Path, from: &Path) -> Result<PathBuf> {
    let work = folder.join("work");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    call(Command::new("cp").args(["-r", "--sparse=always"]).arg(from).arg(&work))?;
    call(&mut Command::new("sync"))?;
    Ok(work)
}

/// How long `qemu-img commit` takes for what [`theirs_written`] has made.
pub(super) fn committed(folder: &Path, written: &Path) -> Result<f64> {
    let work = fresh(folder, written)?;
    seconds(Command::new("qemu-img").arg("commit").arg("-q").arg(work.join("leaf.qcow2")))
}

/// As many bytes as such a merge moves, as scattered.
pub(super) fn scattered_file(path: &Path) -> Result<()> {
    written_once(path, WRITES, 4096, SCATTER).map(drop)
}

/// Writes so many pieces of so many bytes, each so far behind the one before, with one fsync.
fn written_once(path: &Path, count: u64, size: u64, apart: u64) -> Result<f64> {
    if path.exists() {
        fs::remove_file(path)?;
    }
    let data = vec![0xA5; size as usize];
    let start = Instant::now();
    let file = File::create(path)?;
    (0..count).try_for_each(|number| file.write_all_at(&data, number * apart))?;
    file.sync_all()?;
    Ok(start.elapsed().as_secs_f64())
}

fn ours_written(folder: &Path) -> Result<PathBuf> {
    let own = folder.join("vhdx");
    fs::create_dir(&own)?;
    let (base, leaf) = (own.join("base.vhdx"), own.join("leaf.avhdx"));
    call(tenby_disk().arg("create").arg(&base).args(["--size", MERGED]))?;
    call(tenby_disk().arg("create").arg(&leaf).arg("--parent").arg(&base))?;
    scattered_writes(&Server::tenby(folder, &leaf)?, WRITES)?;
    Ok(own)
}

pub(super) fn theirs_written(folder: &Path) -> Result<PathBuf> {
    let own = folder.join("qcow2");
    fs::create_dir(&own)?;
    let create = ["create", "-q", "-f", "qcow2"];
    call(Command::new("qemu-img").args(create).arg("base.qcow2").arg(MERGED).current_dir(&own))?;
    let over = ["-b", "base.qcow2", "-F", "qcow2", "leaf.qcow2"];
    call(Command::new("qemu-img").args(create).args(over).current_dir(&own))?;
    scattered_writes(&Server::qemu_of(folder, &own.join("leaf.qcow2"), "qcow2")?, WRITES)?;
    Ok(own)
}
