//! The NBD server: fio's nbd engine over a unix socket, everything in the page cache.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::contest::{Contestant, Promise, Report, in_turn};
use super::{scratch, tenby};
use crate::{call, output_of, setup, target};

/// Disk size in bytes: small enough to stay cached.
const SIZE: u64 = 1 << 30;
const ROUNDS: usize = 7;
/// A server is there in this time, or not at all.
const PATIENCE: Duration = Duration::from_secs(120);

/// A load, as fio names its parts.
#[derive(Debug, Clone, Copy)]
struct Load {
    name: &'static str,
    what: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    /// MB/s rather than IOPS.
    bandwidth: bool,
}

const RANDOM_READ: Load = Load {
    name: "read",
    what: "random 4 KiB reads, queue depth 32",
    rw: "randread",
    block: "4k",
    depth: 32,
    bandwidth: false,
};

const LOADS: [Load; 5] = [
    RANDOM_READ,
    Load { name: "read-1", what: "random 4 KiB reads, one at a time", depth: 1, ..RANDOM_READ },
    Load { name: "write", what: "random 4 KiB writes, queue depth 32", rw: "randwrite", ..RANDOM_READ },
    Load {
        name: "read-seq",
        what: "sequential 1 MiB reads, queue depth 8",
        rw: "read",
        block: "1m",
        depth: 8,
        bandwidth: true,
    },
    Load {
        name: "write-seq",
        what: "sequential 1 MiB writes, queue depth 8",
        rw: "write",
        block: "1m",
        depth: 8,
        bandwidth: true,
    },
];

/// Chains of 1 and of 50 layers, and what the protocol allows at most.
pub(super) fn depth() -> Result<Vec<Report>> {
    let folder = scratch("nbd-depth")?;
    let mut servers = vec![
        ("depth 1".to_owned(), Server::tenby(&folder, &chain(&folder, 1)?)?),
        ("depth 50".to_owned(), Server::tenby(&folder, &chain(&folder, 50)?)?),
    ];
    servers.extend(memory(&folder)?.map(|server| ("nbdkit memory".to_owned(), server)));
    Ok(vec![compare("nbd-depth", RANDOM_READ, &servers, vec![Promise::Ratio("depth 50", 0.9)])?])
}

/// One full image of ours, and others' servers over the simplest thing that each can serve.
pub(super) fn peers() -> Result<Vec<Report>> {
    let folder = scratch("nbd-peers")?;
    let mut servers = vec![("tenby vhdx".to_owned(), Server::tenby(&folder, &chain(&folder, 1)?)?)];
    servers.extend(memory(&folder)?.map(|server| ("nbdkit memory".to_owned(), server)));
    servers.push(("qemu-nbd raw".to_owned(), Server::qemu(&folder)?));
    LOADS.into_iter().map(|load| compare(&format!("nbd-{}", load.name), load, &servers, Vec::new())).collect()
}

/// A new differencing leaf each time: its blocks are found places for, then written again in place.
pub(super) fn first_write() -> Result<Vec<Report>> {
    let folder = scratch("nbd-first-write")?;
    let base = chain(&folder, 1)?;
    let mut first = Vec::new();
    let mut again = Vec::new();
    for round in 0..ROUNDS {
        let leaf = base.with_file_name(format!("leaf-{round}.avhdx"));
        call(Command::new(tenby()).args(["--quiet", "disk", "create"]).arg(&leaf).arg("--parent").arg(&base))?;
        let server = Server::tenby(&folder, &leaf)?;
        // The same places both times: fio's random numbers begin anew.
        let write = || fio(&server, Load { rw: "randwrite", ..RANDOM_READ }, "--io_size=128m");
        first.push(write()?);
        again.push(write()?);
    }
    let rows = [("again", again), ("first", first)]
        .map(|(name, samples)| super::contest::Row { name: name.into(), samples })
        .into();
    let what = "random 4 KiB writes to a new leaf, queue depth 32".to_owned();
    Ok(vec![Report {
        name: "nbd-first-write".into(),
        what,
        unit: "IOPS",
        rows,
        promises: vec![Promise::Ratio("first", 0.6)],
    }])
}

fn compare(name: &str, load: Load, servers: &[(String, Server)], promises: Vec<Promise>) -> Result<Report> {
    let contestant = |(name, server): &'_ (String, Server)| -> Contestant<'_> {
        let server = server.uri.clone();
        (name.clone(), Box::new(move || fio_at(&server, load, "--time_based", "--runtime=3")))
    };
    // Once through everything: from here on it is in memory.
    servers.iter().try_for_each(|(_, server)| call(Command::new("nbdcopy").arg(&server.uri).arg("null:")))?;
    let rows = in_turn(ROUNDS, servers.iter().map(contestant).collect())?;
    let unit = if load.bandwidth { "MB/s" } else { "IOPS" };
    Ok(Report { name: name.into(), what: load.what.into(), unit, rows, promises })
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

/// What the protocol allows at most: a server of others that copies from memory. It is full, as the images are.
fn memory(folder: &Path) -> Result<Option<Server>> {
    if !setup::is_here("nbdkit") {
        println!("nbdkit is not here, and left out (Debian's package nbdkit)");
        return Ok(None);
    }
    let socket = folder.join("nbdkit.sock");
    let server = Server::start(
        Command::new("nbdkit").arg("-f").arg("-U").arg(&socket).args(["memory", &SIZE.to_string()]),
        &socket,
    )?;
    fill(&server)?;
    Ok(Some(server))
}

fn fill(server: &Server) -> Result<()> {
    let load = Load { rw: "write", block: "1m", depth: 8, ..RANDOM_READ };
    fio(server, load, "--refill_buffers").map(drop)
}

/// So many random writes of 4 KiB over the whole disk, the same each time, and a flush.
pub(super) fn scattered_writes(server: &Server, count: u64) -> Result<()> {
    let size = output_of(Command::new("nbdinfo").arg("--size").arg(&server.uri))?;
    let words = ["--name=bench", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--end_fsync=1"];
    let count = [format!("--uri={}", server.uri), format!("--size={}", size.trim()), format!("--number_ios={count}")];
    output_of(Command::new("fio").args(words).args(count)).map(drop)
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

    /// `qemu-nbd` of an image.
    pub(super) fn qemu_of(folder: &Path, file: &Path, format: &str) -> Result<Self> {
        let socket = folder.join("qemu-image.sock");
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=0", "--format", format, "--socket"]).arg(&socket).arg(file);
        Self::start(&mut command, &socket)
    }

    /// The process.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// `qemu-nbd` of a raw file through the page cache.
    fn qemu(folder: &Path) -> Result<Self> {
        let (file, socket) = (folder.join("raw"), folder.join("qemu.sock"));
        File::create(&file)?.set_len(SIZE)?;
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=0", "--format=raw", "--socket"]).arg(&socket).arg(&file);
        let server = Self::start(&mut command, &socket)?;
        fill(&server)?;
        Ok(server)
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
            std::thread::sleep(Duration::from_millis(50));
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
        for _ in 0..200 {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _killed = self.child.kill();
        let _ended = self.child.wait();
    }
}

fn fio(server: &Server, load: Load, more: &str) -> Result<f64> {
    fio_at(&server.uri, load, "--randrepeat=1", more)
}

/// Lets fio put a load on a server; gives IOPS, or MB/s.
fn fio_at(uri: &str, load: Load, more: &str, still_more: &str) -> Result<f64> {
    let Load { rw, block, depth, .. } = load;
    let words = [
        "--name=bench".to_owned(),
        "--ioengine=nbd".to_owned(),
        format!("--uri={uri}"),
        format!("--rw={rw}"),
        format!("--bs={block}"),
        format!("--iodepth={depth}"),
        format!("--size={SIZE}"),
        "--norandommap".to_owned(),
        "--output-format=json".to_owned(),
        more.to_owned(),
        still_more.to_owned(),
    ];
    let text = output_of(Command::new("fio").args(&words))?;
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
