//! Disks served over NBD, beside other servers: fio's nbd engine over a unix socket.

use std::cell::Cell;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::contest::{Contestant, Promise, Report, in_turn};
use super::{scratch, tenby};
use crate::{call, output_of, target};

/// Disk size in bytes: small enough to stay cached.
const SIZE: u64 = 1 << 30;
/// The disk that is read past the page cache is larger than what is read of it in a round.
const COLD: u64 = 4 << 30;
const ROUNDS: usize = 5;
const DEPTH: u32 = 50;
/// A server is there in this time, or not at all.
const PATIENCE: Duration = Duration::from_secs(120);
/// How `qemu-nbd` reaches its files; the better one counts.
const MODES: [(&str, &[&str]); 2] =
    [("none", &["--cache=none", "--aio=io_uring"]), ("writeback", &["--cache=writeback"])];

/// A load, as fio names its parts.
#[derive(Debug, Clone, Copy)]
struct Load {
    rw: &'static str,
    block: &'static str,
    depth: u32,
    /// MB/s rather than IOPS.
    bandwidth: bool,
    more: &'static [&'static str],
}

const READ: Load = Load {
    rw: "randread",
    block: "4k",
    depth: 32,
    bandwidth: false,
    more: &["--time_based", "--runtime=3", "--norandommap"],
};
const READ_ON: Load =
    Load { rw: "read", block: "1m", depth: 8, bandwidth: true, more: &["--time_based", "--runtime=3"] };
// With the flush that makes it durable: without, it would be measured how soon the page cache is full.
const WRITE_ON: Load = Load { rw: "write", more: &["--end_fsync=1"], ..READ_ON };

impl Load {
    fn unit(self) -> &'static str {
        if self.bandwidth { "MB/s" } else { "IOPS" }
    }
}

/// Random reads from the page cache, through one layer and through many.
pub(super) fn read() -> Result<Vec<Report>> {
    let folder = scratch("disk-read")?;
    let mut servers = vec![
        ("depth 1".to_owned(), Server::tenby(&folder, &chain(&folder, 1)?)?),
        ("depth 50".to_owned(), Server::tenby(&folder, &chain(&folder, DEPTH)?)?),
        ("nbdkit memory".to_owned(), Server::memory(&folder)?),
    ];
    let qcow2 = qcow2_chain(&folder, DEPTH)?;
    servers.extend(Server::qemu_readers(&folder, &qcow2, "qcow2")?);
    let contestants = servers.iter().map(|(name, server)| server.under(name, READ)).collect();
    // Once through everything: from here on it is in memory.
    servers.iter().try_for_each(|(_, server)| server.read_through())?;
    Ok(vec![Report {
        name: "disk-read".into(),
        what: "random 4 KiB reads, queue depth 32, cached".into(),
        unit: READ.unit(),
        rows: in_turn(ROUNDS, contestants)?,
        promises: vec![
            Promise::Times("depth 50", 0.95, &["depth 1"]),
            Promise::Times("depth 50", 3.0, &["qemu-nbd qcow2"]),
            Promise::Times("depth 1", 0.8, &["nbdkit memory"]),
        ],
    }])
}

/// Random reads of what is not in the page cache.
pub(super) fn cold_read() -> Result<Vec<Report>> {
    let folder = scratch("disk-cold-read")?;
    let raw = folder.join("cold").join("disk.raw");
    fs::create_dir(folder.join("cold"))?;
    full(&raw, COLD)?;
    let vhdx = raw.with_extension("vhdx");
    call(Command::new(tenby()).args(["--quiet", "disk", "convert"]).args([&raw, &vhdx]))?;
    let ours = Server::tenby(&folder, &vhdx)?;
    let others = Server::qemu_readers(&folder, &raw, "raw")?;
    let load = Load { more: &["--time_based", "--runtime=3", "--norandommap"], ..READ };
    let mut contestants: Vec<Contestant<'_>> = vec![
        ("raw file, io_uring".into(), Box::new(|| cold().and_then(|()| fio_file(&raw, load, true)))),
        ("tenby".into(), Box::new(|| cold().and_then(|()| fio(&ours.uri, load, COLD)))),
    ];
    for (name, server) in &others {
        contestants.push((name.clone(), Box::new(|| cold().and_then(|()| fio(&server.uri, load, COLD)))));
    }
    Ok(vec![Report {
        name: "disk-cold-read".into(),
        what: "random 4 KiB reads, queue depth 32, past the page cache".into(),
        unit: load.unit(),
        rows: in_turn(ROUNDS, contestants)?,
        promises: vec![
            Promise::Times("tenby", 0.75, &["raw file, io_uring"]),
            Promise::Times("tenby", 1.2, &["qemu-nbd raw"]),
        ],
    }])
}

/// Scattered writes to a new leaf, flushed now and then; and to a raw file that is all holes, which has no table to keep.
pub(super) fn first_write() -> Result<Vec<Report>> {
    let folder = scratch("disk-first-write")?;
    let (ours, theirs) = (chain(&folder, 1)?, qcow2_chain(&folder, 1)?);
    let (folder, ours, theirs, number) = (&*folder, &ours, &theirs, &Cell::new(0));
    let mut contestants: Vec<Contestant<'_>> = vec![
        ("tenby".into(), Box::new(|| scattered_flushed(&Server::tenby(folder, &leaf(ours, number)?)?))),
        (
            "tenby, again".into(),
            Box::new(|| {
                let server = Server::tenby(folder, &leaf(ours, number)?)?;
                scattered_flushed(&server)?;
                scattered_flushed(&server)
            }),
        ),
        (
            "tenby, raw".into(),
            Box::new(|| {
                let file = new_name(folder, "raw", number);
                File::create(&file)?.set_len(SIZE)?;
                scattered_flushed(&Server::tenby(folder, &file)?)
            }),
        ),
    ];
    for mode in MODES {
        let qcow2 = move || scattered_flushed(&Server::qemu(folder, &overlay(theirs, number)?, "qcow2", mode)?);
        let vhdx = move || {
            let file = new_name(folder, "vhdx", number);
            call(Command::new("qemu-img").args(["create", "-q", "-f", "vhdx"]).arg(&file).arg(SIZE.to_string()))?;
            scattered_flushed(&Server::qemu(folder, &file, "vhdx", mode)?)
        };
        contestants.push((format!("qemu-nbd qcow2 ({})", mode.0), Box::new(qcow2)));
        contestants.push((format!("qemu-nbd vhdx ({})", mode.0), Box::new(vhdx)));
    }
    Ok(vec![Report {
        name: "disk-first-write".into(),
        what: "random 4 KiB writes to a new leaf, queue depth 32, a flush after each 64".into(),
        unit: "IOPS",
        rows: in_turn(ROUNDS, contestants)?,
        promises: vec![
            Promise::Times("tenby", 0.7, &["tenby, again"]),
            Promise::Times("tenby", 4.0, &["qemu-nbd qcow2"]),
            Promise::Times("tenby", 5.0, &["qemu-nbd vhdx"]),
        ],
    }])
}

/// Reads and first writes in order.
pub(super) fn in_order() -> Result<Vec<Report>> {
    let folder = scratch("disk-in-order")?;
    let (ours, theirs) = (chain(&folder, 1)?, qcow2_chain(&folder, 1)?);
    let raw = folder.join("disk.raw");
    full(&raw, SIZE)?;
    let memory = Server::memory(&folder)?;
    let tenby = Server::tenby(&folder, &ours)?;
    let others = Server::qemu_readers(&folder, &theirs, "qcow2")?;
    let mut reads: Vec<Contestant<'_>> = vec![
        ("raw file, io_uring".into(), Box::new(|| fio_file(&raw, READ_ON, false))),
        memory.under("nbdkit memory", READ_ON),
        tenby.under("tenby", READ_ON),
    ];
    reads.extend(others.iter().map(|(name, server)| server.under(name, READ_ON)));
    [&tenby, &memory].into_iter().chain(others.iter().map(|(_, server)| server)).try_for_each(Server::read_through)?;
    fio_file(&raw, READ_ON, false)?;
    let reads = in_turn(ROUNDS, reads)?;
    drop((tenby, others));

    let number = &Cell::new(0);
    let (folder, ours, theirs) = (&*folder, &ours, &theirs);
    let mut writes: Vec<Contestant<'_>> = vec![
        (
            "raw file, io_uring".into(),
            Box::new(|| {
                let file = new_name(folder, "raw", number);
                File::create(&file)?.set_len(SIZE)?;
                fio_file(&file, WRITE_ON, false)
            }),
        ),
        memory.under("nbdkit memory", WRITE_ON),
        ("tenby".into(), Box::new(|| fio(&Server::tenby(folder, &leaf(ours, number)?)?.uri, WRITE_ON, SIZE))),
    ];
    for mode in MODES {
        let measure = move || fio(&Server::qemu(folder, &overlay(theirs, number)?, "qcow2", mode)?.uri, WRITE_ON, SIZE);
        writes.push((format!("qemu-nbd qcow2 ({})", mode.0), Box::new(measure)));
    }
    let writes = in_turn(ROUNDS, writes)?;
    let report = |name: &str, what: &str, rows| Report {
        name: name.into(),
        what: what.into(),
        unit: READ_ON.unit(),
        rows,
        promises: vec![
            Promise::Times("tenby", 0.8, &["raw file, io_uring", "nbdkit memory"]),
            Promise::Times("tenby", 1.0, &["qemu-nbd qcow2"]),
        ],
    };
    Ok(vec![
        report("disk-read-in-order", "sequential 1 MiB reads, queue depth 8, cached", reads),
        report("disk-write-in-order", "sequential 1 MiB writes to a new leaf, queue depth 8", writes),
    ])
}

/// A new file's path. What earlier rounds have made there goes.
fn new_name(folder: &Path, ending: &str, number: &Cell<u32>) -> PathBuf {
    let name = |number: u32| folder.join(format!("round-{number}.{ending}"));
    // It may not be there: that is as good.
    let _ = fs::remove_file(name(number.get()));
    number.set(number.get() + 1);
    name(number.get())
}

/// A new differencing image beside its parent.
fn leaf(parent: &Path, number: &Cell<u32>) -> Result<PathBuf> {
    let leaf = new_name(parent.parent().context("the parent lies in a folder")?, "avhdx", number);
    call(Command::new(tenby()).args(["--quiet", "disk", "create"]).arg(&leaf).arg("--parent").arg(parent))?;
    Ok(leaf)
}

/// A new qcow2 beside the one that it stands on.
fn overlay(backing: &Path, number: &Cell<u32>) -> Result<PathBuf> {
    let overlay = new_name(backing.parent().context("the backing file lies in a folder")?, "qcow2", number);
    let mut create = Command::new("qemu-img");
    call(create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).args([backing, &*overlay]))?;
    Ok(overlay)
}

/// A chain of `depth` layers in which every page is somewhere; gives its leaf.
fn chain(folder: &Path, depth: u32) -> Result<PathBuf> {
    let socket = folder.join("chain.sock");
    let chain = folder.join(format!("chain-{depth}"));
    let words = [socket.as_os_str(), chain.as_os_str()];
    let mut maker = Command::new(target().join("release/examples/serve"));
    maker.args(words).args([SIZE.to_string(), depth.to_string()]);
    // It serves what it has made, and ends with its standard input.
    drop(Server::start(maker.stdin(Stdio::piped()), &socket)?);
    Ok(chain.join(format!("{}.vhdx", depth - 1)))
}

/// The same as qcow2: its base is full, and each other layer has its share of the clusters; gives its leaf.
fn qcow2_chain(folder: &Path, depth: u32) -> Result<PathBuf> {
    const CLUSTER: u64 = 64 << 10;
    let own = folder.join(format!("qcow2-{depth}"));
    fs::create_dir(&own)?;
    let name = |number: u32| own.join(format!("{number}.qcow2"));
    call(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(name(0)).arg(SIZE.to_string()))?;
    Server::qemu(folder, &name(0), "qcow2", MODES[1])?.fill()?;
    for number in 1..depth {
        let mut create = Command::new("qemu-img");
        call(create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).args([name(number - 1), name(number)]))?;
        let mut words = String::new();
        for cluster in (0..SIZE / CLUSTER).filter(|cluster| cluster * 7919 % u64::from(depth) == u64::from(number)) {
            writeln!(words, "write -q -P {number} {} {CLUSTER}", cluster * CLUSTER)?;
        }
        let mut writer = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .arg(name(number))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        writer.stdin.take().context("its input")?.write_all(words.as_bytes())?;
        if !writer.wait()?.success() {
            bail!("qemu-io could not write a layer");
        }
    }
    Ok(name(depth - 1))
}

/// A file without holes.
fn full(path: &Path, size: u64) -> Result<()> {
    File::create(path)?.set_len(size)?;
    fio_on(&["--ioengine=psync".into(), format!("--filename={}", path.display())], FILL, size)?;
    Ok(File::open(path)?.sync_all()?)
}

const FILL: Load = Load { rw: "write", block: "1m", depth: 8, bandwidth: true, more: &["--refill_buffers"] };

/// Empties the page cache.
fn cold() -> Result<()> {
    call(&mut Command::new("sync"))?;
    fs::write("/proc/sys/vm/drop_caches", "3").context("the page cache can only be emptied by root")
}

/// So many random writes of 4 KiB over the whole disk, the same each time, and a flush.
pub(super) fn scattered_writes(server: &Server, count: u64) -> Result<()> {
    let size = output_of(Command::new("nbdinfo").arg("--size").arg(&server.uri))?;
    let words = ["--name=bench", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--end_fsync=1"];
    let count = [format!("--uri={}", server.uri), format!("--size={}", size.trim()), format!("--number_ios={count}")];
    output_of(Command::new("fio").args(words).args(count)).map(drop)
}

/// Writes of 4 KiB to so many places, each once and the same each time, at queue depth 32 with a flush after each 64; gives IOPS.
/// `qemu-img bench` does it, for fio's nbd engine flushes far more often than it is told to.
fn scattered_flushed(server: &Server) -> Result<f64> {
    const COUNT: u32 = 16_384;
    // An odd number of pages, so that none comes twice.
    const STEP: u64 = 13_577 * 4096;
    let words = ["bench", "-w", "-f", "raw", "-t", "writeback", "-d", "32", "-s", "4096", "--flush-interval=64"];
    let mut bench = Command::new("qemu-img");
    bench.args(words).args(["-c", &COUNT.to_string(), "-S", &STEP.to_string()]).arg(&server.uri);
    let said = output_of(&mut bench)?;
    let seconds = said.split("completed in ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
    Ok(f64::from(COUNT) / seconds.context("qemu-img bench does not say how long it took")?)
}

/// A running NBD server.
pub(super) struct Server {
    child: Child,
    uri: String,
}

impl Server {
    /// `tenby disk serve` of an image and its parents.
    pub(super) fn tenby(folder: &Path, file: &Path) -> Result<Self> {
        let name = file.parent().and_then(Path::file_name).context("the image lies in a folder")?;
        let socket = folder.join(name).with_extension("sock");
        Self::start(Command::new(tenby()).args(["disk", "serve"]).arg(file).arg("--socket").arg(&socket), &socket)
    }

    /// `qemu-nbd` of an image, in one of [`MODES`].
    fn qemu(folder: &Path, file: &Path, format: &str, (name, mode): (&str, &[&str])) -> Result<Self> {
        let socket = folder.join(format!("qemu-{name}.sock"));
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=0", "--format", format]).args(mode);
        Self::start(command.arg("--socket").arg(&socket).arg(file), &socket)
    }

    /// One for each of [`MODES`], of an image that none of them locks.
    fn qemu_readers(folder: &Path, file: &Path, format: &str) -> Result<Vec<(String, Self)>> {
        let reader = |(name, mode): (&str, &[&str])| {
            let words = [&["--read-only"], mode].concat();
            Ok((format!("qemu-nbd {format} ({name})"), Self::qemu(folder, file, format, (name, &words))?))
        };
        MODES.into_iter().map(reader).collect()
    }

    /// `qemu-nbd` of an image as it is when nothing is said.
    pub(super) fn qemu_of(folder: &Path, file: &Path, format: &str) -> Result<Self> {
        Self::qemu(folder, file, format, ("image", &[]))
    }

    /// What the protocol allows at most: a server of others that copies from memory. It is full, as the images are.
    fn memory(folder: &Path) -> Result<Self> {
        let socket = folder.join("nbdkit.sock");
        let mut command = Command::new("nbdkit");
        command.arg("-f").arg("-U").arg(&socket).args(["memory", &SIZE.to_string()]);
        let server = Self::start(&mut command, &socket)?;
        server.fill()?;
        Ok(server)
    }

    /// The process.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    fn fill(&self) -> Result<()> {
        fio(&self.uri, FILL, SIZE).map(drop)
    }

    fn read_through(&self) -> Result<()> {
        call(Command::new("nbdcopy").arg(&self.uri).arg("null:"))
    }

    /// A contestant that puts a load on this server.
    fn under(&self, name: &str, load: Load) -> Contestant<'static> {
        let uri = self.uri.clone();
        (name.to_owned(), Box::new(move || fio(&uri, load, SIZE)))
    }

    fn start(command: &mut Command, socket: &Path) -> Result<Self> {
        let child = command.stdout(Stdio::null()).spawn()?;
        let mut server = Self { child, uri: format!("nbd+unix:///?socket={}", socket.display()) };
        let start = Instant::now();
        while UnixStream::connect(socket).is_err() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{} ended with {status}", crate::in_a_line(command));
            }
            if start.elapsed() > PATIENCE {
                bail!("{} does not listen", crate::in_a_line(command));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }
}

impl Drop for Server {
    /// Lets it end as it should, so that its images are whole.
    fn drop(&mut self) {
        if self.child.stdin.take().is_none() {
            // Whether it can be told or not: it is waited for, or killed.
            let _told = Command::new("kill").arg(self.child.id().to_string()).status();
        }
        for _ in 0..1000 {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _killed = self.child.kill();
        let _ended = self.child.wait();
    }
}

/// Lets fio put a load on a server; gives IOPS, or MB/s.
fn fio(uri: &str, load: Load, size: u64) -> Result<f64> {
    fio_on(&["--ioengine=nbd".into(), format!("--uri={uri}")], load, size)
}

/// The same on a file, past the page cache if `direct`.
fn fio_file(path: &Path, load: Load, direct: bool) -> Result<f64> {
    let direct = format!("--direct={}", u8::from(direct));
    let size = fs::metadata(path)?.len();
    fio_on(&["--ioengine=io_uring".into(), direct, format!("--filename={}", path.display())], load, size)
}

fn fio_on(target: &[String], load: Load, size: u64) -> Result<f64> {
    let Load { rw, block, depth, .. } = load;
    let words = [
        "--name=bench".to_owned(),
        format!("--rw={rw}"),
        format!("--bs={block}"),
        format!("--iodepth={depth}"),
        format!("--size={size}"),
        "--output-format=json".to_owned(),
    ];
    let text = output_of(Command::new("fio").args(target).args(&words).args(load.more))?;
    let report: Value = serde_json::from_str(&text[text.find('{').context("fio printed no report")?..])?;
    let part = if rw.contains("read") { "read" } else { "write" };
    let job = &report["jobs"][0];
    if job["error"].as_i64() != Some(0) {
        bail!("fio: error {}", job["error"]);
    }
    let value = if load.bandwidth {
        job[part]["bw_bytes"].as_f64().map(|bytes| bytes / 1e6)
    } else {
        job[part]["iops"].as_f64()
    };
    value.context("fio's report lacks the figure")
}
