//! What a machine ought to hold: a version for each sector and each page, 0 for zeros.

use image::{Access, Chain, RunKind};
use machine::files::Files;
use machine::ledger::State as Rows;
use machine::records::downwards;
use machine::request::JobState;
use machine::tree::{DiskId, JobId, LayerId, Snapshot, SnapshotId};
use memory::Sealed;
use memory::stream::{Event, PAGE, Parser};
use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) const SECTOR: u64 = 512;

/// The disks of a guest that runs.
pub(crate) type Live = BTreeMap<DiskId, Arc<Chain>>;

/// What was wrong, for people.
pub(crate) type Checked = Result<(), String>;

/// A disk that is written: what was flushed, and what each sector was since.
#[derive(Debug, Clone, PartialEq, Hash)]
pub(crate) struct Written {
    flushed: Vec<u32>,
    since: BTreeMap<u64, Vec<u32>>,
}

impl Written {
    pub(crate) fn new(flushed: Vec<u32>) -> Self {
        Self { flushed, since: BTreeMap::new() }
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.flushed.len() as u64
    }

    pub(crate) fn put(&mut self, from: u64, count: u64, version: u32) {
        for sector in from..from + count {
            self.since.entry(sector).or_default().push(version);
        }
    }

    pub(crate) fn flush(&mut self) {
        *self = Self::new(self.latest());
    }

    pub(crate) fn latest(&self) -> Vec<u32> {
        let mut latest = self.flushed.clone();
        for (sector, versions) in &self.since {
            latest[*sector as usize] = *versions.last().expect("one at least");
        }
        latest
    }

    /// With `exact`, as the host sees it while it lives; otherwise as a power cut may leave it.
    fn allows(&self, exact: bool, sector: u64, version: u32) -> bool {
        let flushed = self.flushed[sector as usize] == version;
        match self.since.get(&sector) {
            None => flushed,
            Some(all) if exact => all.last() == Some(&version),
            Some(all) => flushed || all.contains(&version),
        }
    }
}

/// What a snapshot holds, to the last sector.
#[derive(Debug, Clone, PartialEq, Hash)]
pub(crate) struct Content {
    pub(crate) disks: BTreeMap<DiskId, Vec<u32>>,
    pub(crate) memory: Option<Vec<u32>>,
}

/// What a machine holds.
#[derive(Debug, Clone, Hash)]
pub(crate) struct Model {
    pub(crate) snapshots: BTreeMap<SnapshotId, Content>,
    /// What can be taken back.
    pub(crate) trash: BTreeMap<SnapshotId, Content>,
    pub(crate) disks: BTreeMap<DiskId, Written>,
    /// The memory of a machine that is saved.
    pub(crate) saved: Option<Vec<u32>>,
    /// How requests have ended.
    pub(crate) ended: BTreeMap<JobId, JobState>,
}

impl Model {
    /// Whether the machine holds just this. Of disks that are written, what `live` shows is to be exact; without it, what the files show
    /// is as a power cut may leave it.
    pub(crate) fn check(&self, rows: &Rows, files: &Files, live: Option<&Live>) -> Checked {
        let machine = &rows.machine;
        if !machine.snapshots.keys().eq(self.snapshots.keys()) {
            return Err(format!("{} snapshots, not {}", machine.snapshots.len(), self.snapshots.len()));
        }
        for (id, content) in &self.snapshots {
            check_snapshot(rows, files, &machine.snapshots[id], content)?;
        }
        let trash: BTreeMap<SnapshotId, &Snapshot> =
            machine.trash.values().flat_map(|trash| &trash.snapshots).map(|snapshot| (snapshot.id, snapshot)).collect();
        if !trash.keys().eq(self.trash.keys()) {
            return Err(format!("{} snapshots to take back, not {}", trash.len(), self.trash.len()));
        }
        for (id, content) in &self.trash {
            check_snapshot(rows, files, trash[id], content).map_err(|error| format!("in the trash: {error}"))?;
        }
        // Of those that are remembered.
        let ended = |(id, state): (&JobId, &JobState)| rows.job(*id).is_none_or(|job| job.state == *state);
        if !self.ended.iter().all(ended) {
            return Err("a request has ended in another way".to_owned());
        }
        for (disk, written) in &self.disks {
            let leaf = machine.now.disks.get(disk).ok_or("a disk of Now is missing")?;
            let allows = |sector, version| written.allows(live.is_some(), sector, version);
            match live.and_then(|live| live.get(disk)) {
                Some(chain) => compare(chain, allows),
                None => check_disk(rows, files, *leaf, allows),
            }
            .map_err(|error| format!("Now, {disk}: {error}"))?;
        }
        check_memory(rows, files, machine.now.memory, self.saved.as_deref()).map_err(|error| format!("Now: {error}"))
    }
}

fn check_snapshot(rows: &Rows, files: &Files, found: &Snapshot, content: &Content) -> Checked {
    let told = |error| format!("snapshot {}: {error}", found.name);
    for (disk, sectors) in &content.disks {
        let leaf = found.disks.get(disk).ok_or_else(|| told("a disk is missing".to_owned()))?;
        check_disk(rows, files, *leaf, |sector, version| sectors[sector as usize] == version).map_err(told)?;
    }
    check_memory(rows, files, found.memory, content.memory.as_deref()).map_err(told)
}

fn check_disk(rows: &Rows, files: &Files, leaf: LayerId, allows: impl Fn(u64, u32) -> bool) -> Checked {
    let layers = files.open_chain(&rows.machine, leaf).map_err(|e| e.to_string())?;
    compare(&Chain::new(layers, Access::Read).map_err(|e| e.to_string())?, allows)
}

fn compare(chain: &Chain, allows: impl Fn(u64, u32) -> bool) -> Checked {
    let mut at = 0;
    while at < chain.size() {
        for run in chain.runs(at, chain.size() - at, 1000).map_err(|e| e.to_string())? {
            let mut bytes = vec![0; run.len as usize];
            if run.kind == RunKind::Data {
                chain.read(&mut bytes, run.offset).map_err(|e| e.to_string())?;
            }
            check_sectors(&bytes, run.offset / SECTOR, &allows)?;
            at = run.offset + run.len;
        }
    }
    Ok(())
}

fn check_sectors(bytes: &[u8], first: u64, allows: &impl Fn(u64, u32) -> bool) -> Checked {
    for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR as usize)) {
        let version = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
        if bytes[4..] != bytes[..bytes.len() - 4] {
            return Err(format!("sector {sector} is torn"));
        }
        if !allows(sector, version) {
            return Err(format!("sector {sector} holds version {version}"));
        }
    }
    Ok(())
}

fn check_memory(rows: &Rows, files: &Files, layer: Option<LayerId>, expected: Option<&[u32]>) -> Checked {
    let (layer, expected) = match (layer, expected) {
        (Some(layer), Some(expected)) => (layer, expected),
        (None, None) => return Ok(()),
        (found, _) => return Err(format!("memory: {}", if found.is_some() { "there is one" } else { "it is gone" })),
    };
    let layers = files.open_chain(&rows.machine, layer).map_err(|e| e.to_string())?;
    let chain = Chain::new(layers, Access::Read).map_err(|e| e.to_string())?;
    let mut stream = Vec::new();
    let sealed = Sealed { chain, expected: files.expected(&downwards(&rows.machine, layer)) };
    memory::restore(&sealed, &mut stream, |_, _| {}).map_err(|e| format!("memory: {e}"))?;
    let (mut parser, mut rest, mut pages) = (Parser::new(), stream.as_slice(), vec![0; expected.len()]);
    while let Some(event) = parser.next(&mut rest).map_err(|e| format!("memory: {e}"))? {
        if let Event::Page { offset, data, .. } = event {
            pages[offset as usize / PAGE] = u32::from_le_bytes(data[..4].try_into().expect("four bytes"));
        }
    }
    if pages == expected { Ok(()) } else { Err(format!("memory: {pages:?} instead of {expected:?}")) }
}
