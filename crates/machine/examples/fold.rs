//! A machine whose snapshots are deleted, without QEMU: somebody writes to its disk, and something is merged. For `cargo xtask bench merge`.
//!
//! ```text
//!   fold FOLDER idle          20,000 scattered pages over 4 GiB are merged into their base
//!   fold FOLDER live          the same while somebody writes to that leaf, with flushes; before, they write without it
//!   fold FOLDER many N MIB    N snapshots, each of which rewrote the same MIB; all but the last are deleted
//!   fold FOLDER every N MIB   N snapshots, each of which wrote MIB of its own; every second is deleted
//!   fold FOLDER dies N MIB    as for `many`; the first is deleted, and the process dies as its merge is about to be committed
//! ```
//!
//! FOLDER becomes a root with the machine `lab`. What was measured is printed as a JSON document.

use image::Chain;
use machine::carry::Carries;
use machine::collect::Begin;
use machine::disks::Disks;
use machine::job::{Cancel, Task};
use machine::keeper::Keeper;
use machine::plan::Take;
use machine::request::{Create, DiskSource, DiskSpec, Problem};
use machine::root::Root;
use machine::steps::Steps;
use machine::tree::{Accel, Boot, Bus, Firmware, JobId, LayerFormat, NetMode, SnapshotId, SnapshotState, State};
use serde_json::{Value, json};
use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use store::host::HostFolder;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PAGE: u64 = 4096;
const SIZE: u64 = 4 << 30;
/// Pages of the leaf that is merged, and how far one lies behind the other: an odd number of pages, so that none comes twice.
const PAGES: u64 = 20_000;
const APART: u64 = 419_431 * PAGE;
/// Pages between two syncs of a merge beside a guest.
const PLAIN_SYNC: u64 = 96;
/// How long it is looked what a writer sees while nothing is merged.
const UNDISTURBED: Duration = Duration::from_secs(3);

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let [folder, what, numbers @ ..] = &words[..] else { return Err("fold FOLDER WHAT [N MIB]".into()) };
    let numbers: Vec<u64> = numbers.iter().map(|number| number.parse()).collect::<std::result::Result<_, _>>()?;
    let mut lab = Lab::make(Path::new(folder), *what == "dies")?;
    let told = match (*what, &numbers[..]) {
        ("idle", []) => lab.idle()?,
        ("live", []) => lab.live()?,
        ("many", [count, mib]) => {
            let snapshots = lab.written(*count, mib << 20, 0)?;
            lab.deleted(&snapshots[..snapshots.len() - 1])?
        }
        ("every", [count, mib]) => {
            let snapshots = lab.written(*count, mib << 20, mib << 20)?;
            lab.deleted(&snapshots.into_iter().step_by(2).collect::<Vec<_>>())?
        }
        ("dies", [count, mib]) => {
            let snapshots = lab.written(*count, mib << 20, 0)?;
            lab.deleted(&snapshots[..1])?
        }
        _ => return Err("fold FOLDER (idle | live | many N MIB | every N MIB | dies N MIB)".into()),
    };
    println!("{told}");
    Ok(())
}

struct Lab {
    keeper: Keeper,
    runtime: tokio::runtime::Runtime,
}

impl Lab {
    fn make(folder: &Path, dies: bool) -> Result<Self> {
        let root = Root::open(folder)?;
        let disk = DiskSpec { source: DiskSource::New { size: SIZE, format: LayerFormat::Vhdx }, bus: Bus::Virtio };
        let spec = Create {
            name: "lab".to_owned(),
            memory: 128 << 20,
            cpus: 1,
            disks: vec![disk],
            cdrom: None,
            boot: Boot::Disk,
            firmware: Firmware::Bios,
            kernel: None,
            initrd: None,
            append: String::new(),
            net: NetMode::None,
            publish: Vec::new(),
            accel: Accel::Tcg,
            note: String::new(),
        };
        let id = root.create(&spec, &mut |_, _| true)?;
        let steps = Steps::die_at(dies.then_some("merge:copied"));
        let carries = HostFolder::create(&Root::runtime_folder(id).join("carry"))?;
        let keeper = Keeper::open(&root.files(id)?, Carries::new(Arc::new(carries), uuid::Uuid::new_v4()), steps)?;
        Ok(Self { keeper, runtime: tokio::runtime::Builder::new_current_thread().build()? })
    }

    fn task(&self, kind: &str) -> Result<Task> {
        let task = self.keeper.jobs().open(JobId::new(), "lab", kind).map_err(|_| "a fresh job id is taken")?;
        task.running();
        Ok(task)
    }

    fn disks(&self) -> Result<(Disks, Arc<Chain>)> {
        let disks = self.keeper.open_disks(&self.keeper.rows().machine)?;
        let chain = disks.chains().next().map(|(_, chain)| Arc::clone(chain)).ok_or("it has a disk")?;
        Ok((disks, chain))
    }

    fn snapshot(&self) -> Result<SnapshotId> {
        let task = self.task("snapshot")?;
        let take = Take {
            id: SnapshotId::new(),
            name: format!("s{}", self.keeper.rows().machine.snapshots.len() + 1),
            note: String::new(),
            created: jiff::Timestamp::now(),
            vm_state: State::Off,
            memory: None,
            state: SnapshotState::Ready,
        };
        let id = take.id;
        self.runtime.block_on(self.keeper.snapshot_still(&task, take, &Value::Null))?;
        Ok(id)
    }

    /// Deletes these, one after the other.
    fn delete(&self, snapshots: &[SnapshotId]) -> Result<()> {
        for id in snapshots {
            self.keeper.delete(&self.task("delete")?, &id.to_string(), false)?;
        }
        Ok(())
    }

    /// Does what the collector would do; gives the bytes that moved.
    fn collect(&self, mut disks: Option<&mut Disks>) -> std::result::Result<u64, Problem> {
        let mut moved = 0;
        loop {
            self.keeper.remove_garbage()?;
            let Some(folding) = self.keeper.next_fold(disks.as_deref_mut(), Begin::default())? else {
                return Ok(moved);
            };
            let folded = self.keeper.fold(folding, &Cancel::default());
            let outcome = self.keeper.folded(&folded, disks.as_deref_mut());
            moved += folded.task().job().map_or(0, |job| job.bytes_done);
            self.keeper.finish(folded.task(), &outcome);
            outcome?;
        }
    }

    /// A base that is there all over, and a leaf of scattered pages on it; gives the snapshot between the two.
    fn scattered(&self) -> Result<SnapshotId> {
        let (disks, chain) = self.disks()?;
        for block in 0..SIZE >> 21 {
            chain.write(&[0x5a; PAGE as usize], block << 21)?;
        }
        drop(chain);
        disks.close()?;
        let snapshot = self.snapshot()?;
        let (disks, chain) = self.disks()?;
        for number in 0..PAGES {
            chain.write(&(number as u8 | 1).to_le_bytes().repeat(PAGE as usize), number * APART % SIZE)?;
        }
        drop(chain);
        disks.close()?;
        // What was written so far is not to be on its way to the disk while something is measured.
        std::process::Command::new("sync").status()?;
        Ok(snapshot)
    }

    fn idle(&mut self) -> Result<Value> {
        let snapshot = self.scattered()?;
        self.delete(&[snapshot])?;
        let start = Instant::now();
        let moved = self.collect(None)?;
        Ok(json!({ "seconds": start.elapsed().as_secs_f64(), "moved": moved, "payload": PAGES * PAGE }))
    }

    fn live(&mut self) -> Result<Value> {
        let snapshot = self.scattered()?;
        let (mut disks, chain) = self.disks()?;
        let wait = || {
            std::thread::sleep(UNDISTURBED);
            Ok(0)
        };
        // They go on to other pages each time: to write one again takes a sync less of a flush.
        let mut places = Places(1);
        let (_, before) = beside_a_writer(&chain, &mut places, wait)?;
        self.delete(&[snapshot])?;
        let (seconds, during) = beside_a_writer(&chain, &mut places, || self.collect(Some(&mut disks)))?;
        drop(chain);
        disks.close()?;
        // They go on in a new leaf: what the base holds is written in place, with one sync a flush instead of two.
        self.snapshot()?;
        let (disks, chain) = self.disks()?;
        // What was removed is given back.
        let (_, after) = beside_a_writer(&chain, &mut places, wait)?;
        let (plain_seconds, plain) = beside_a_writer(&chain, &mut places, || self.plain())?;
        drop(chain);
        disks.close()?;
        let (before, during, after, plain) = (before.told(), during.told(), after.told(), plain.told());
        Ok(json!({
            "seconds": seconds, "before": before, "during": during, "after": after,
            "plain": plain, "plain_seconds": plain_seconds,
        }))
    }

    /// What moves in such a merge, written to a file of its own as scattered, and synced as often: what any program would do to its neighbours.
    /// The file stays, for its removal is none of that.
    fn plain(&self) -> std::result::Result<u64, Problem> {
        let write = || -> std::io::Result<()> {
            let file = File::create(self.keeper.files().path().join("plain"))?;
            for number in 0..PAGES {
                file.write_all_at(&[number as u8 | 1; PAGE as usize], number * APART % SIZE)?;
                if (number + 1) % PLAIN_SYNC == 0 {
                    file.sync_data()?;
                }
            }
            file.sync_data()
        };
        write().map_err(|error| Problem::failed(error.to_string()))?;
        Ok(PAGES * PAGE)
    }

    /// So many snapshots, each after so many bytes were written, so far behind those before.
    fn written(&self, count: u64, bytes: u64, apart: u64) -> Result<Vec<SnapshotId>> {
        let mut snapshots = Vec::new();
        for number in 0..count {
            let (disks, chain) = self.disks()?;
            for at in (0..bytes).step_by(1 << 20) {
                chain.write(&vec![number as u8 | 1; 1 << 20], number * apart + at)?;
            }
            drop(chain);
            disks.close()?;
            snapshots.push(self.snapshot()?);
        }
        Ok(snapshots)
    }

    fn deleted(&self, snapshots: &[SnapshotId]) -> Result<Value> {
        self.delete(snapshots)?;
        let start = Instant::now();
        let moved = self.collect(None)?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(json!({ "seconds": seconds, "moved": moved, "memory_kib": most_memory()? }))
    }
}

/// What a writer saw, in milliseconds.
#[derive(Default)]
struct Seen {
    writes: Vec<f64>,
    flushes: Vec<f64>,
}

impl Seen {
    fn told(self) -> Value {
        let most = self.writes.iter().copied().fold(0.0, f64::max);
        json!({ "worst_write_ms": most, "flushes_ms": self.flushes })
    }
}

/// Where somebody writes: pages all over the disk.
struct Places(u64);

impl Places {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) * PAGE % SIZE
    }
}

/// Somebody writes while this is done: how long it took, seconds, and what they saw.
fn beside_a_writer(
    chain: &Chain,
    places: &mut Places,
    work: impl FnOnce() -> std::result::Result<u64, Problem>,
) -> Result<(f64, Seen)> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_steadily(chain, places, &stop));
        let start = Instant::now();
        let done = work();
        let seconds = start.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        let seen = writer.join().expect("it does not panic")?;
        done?;
        Ok((seconds, seen))
    })
}

/// A page every now and then, and a flush after each eight.
fn write_steadily(chain: &Chain, places: &mut Places, stop: &AtomicBool) -> image::Result<Seen> {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..8 {
            let place = places.next();
            let start = Instant::now();
            chain.write(&[0xc3; PAGE as usize], place)?;
            seen.writes.push(start.elapsed().as_secs_f64() * 1e3);
        }
        let start = Instant::now();
        chain.flush()?;
        seen.flushes.push(start.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(seen)
}

/// The most memory that this process held, KiB.
fn most_memory() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
