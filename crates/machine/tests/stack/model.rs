//! What a machine ought to hold: a version for each sector and each page, 0 for zeros.

use crate::world::PAGES;
use image::{Access, Chain, Layer, RunKind, gate};
use machine::files::Files;
use machine::ledger::State as Rows;
use machine::records::downwards;
use machine::request::JobState;
use machine::tree::{DiskId, JobId, LayerId, Snapshot, SnapshotId};
use memory::Sealed;
use memory::stream::{Event, PAGE, Parser};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use store::Mode;

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

/// The version of each sector of a disk, or of each page of a memory.
type Versions = Rc<Result<Vec<u32>, String>>;

/// What a machine's files hold. Each is read once, however many models it is compared with.
pub(crate) struct Held<'a> {
    rows: &'a Rows,
    files: &'a Files,
    layers: RefCell<BTreeMap<LayerId, Arc<dyn Layer>>>,
    /// What each leaf reads as.
    read: RefCell<BTreeMap<LayerId, Versions>>,
}

impl<'a> Held<'a> {
    pub(crate) fn by(rows: &'a Rows, files: &'a Files) -> Self {
        Self { rows, files, layers: RefCell::default(), read: RefCell::default() }
    }

    fn disk(&self, leaf: LayerId) -> Versions {
        self.read(leaf, || sectors(&self.chain(leaf)?))
    }

    fn memory(&self, leaf: LayerId) -> Versions {
        let read = || {
            let expected = self.files.expected(&downwards(&self.rows.machine, leaf));
            pages(&Sealed { chain: self.chain(leaf)?, expected })
        };
        self.read(leaf, || read().map_err(|e| format!("memory: {e}")))
    }

    fn read(&self, leaf: LayerId, read: impl FnOnce() -> Result<Vec<u32>, String>) -> Versions {
        Rc::clone(self.read.borrow_mut().entry(leaf).or_insert_with(|| Rc::new(read())))
    }

    fn chain(&self, leaf: LayerId) -> Result<Chain, String> {
        let (machine, mut opened) = (&self.rows.machine, self.layers.borrow_mut());
        let mut layers: Vec<Arc<dyn Layer>> = Vec::new();
        for id in machine.chain(leaf) {
            let row = machine.layers.get(&id).ok_or("a layer is not in the ledger")?;
            let layer = match opened.get(&id) {
                Some(layer) => Arc::clone(layer),
                None => self.files.open_layer(row, Mode::Read).map_err(|e| e.to_string())?,
            };
            if let Some(parent) = layers.last() {
                gate::check_link(&*layer, &**parent).map_err(|e| e.to_string())?;
            }
            opened.insert(id, Arc::clone(&layer));
            layers.push(layer);
        }
        Chain::new(layers, Access::Read).map_err(|e| e.to_string())
    }
}

impl Model {
    /// Whether the machine holds just this. Of disks that are written, what `live` shows is to be exact; without it, what the files show
    /// is as a power cut may leave it.
    pub(crate) fn check(&self, rows: &Rows, files: &Files, live: Option<&Live>) -> Checked {
        self.matches(&Held::by(rows, files), live)
    }

    /// The same.
    pub(crate) fn matches(&self, held: &Held<'_>, live: Option<&Live>) -> Checked {
        let machine = &held.rows.machine;
        if !machine.snapshots.keys().eq(self.snapshots.keys()) {
            return Err(format!("{} snapshots, not {}", machine.snapshots.len(), self.snapshots.len()));
        }
        for (id, content) in &self.snapshots {
            check_snapshot(held, &machine.snapshots[id], content)?;
        }
        let trash: BTreeMap<SnapshotId, &Snapshot> =
            machine.trash.values().flat_map(|trash| &trash.snapshots).map(|snapshot| (snapshot.id, snapshot)).collect();
        if !trash.keys().eq(self.trash.keys()) {
            return Err(format!("{} snapshots to take back, not {}", trash.len(), self.trash.len()));
        }
        for (id, content) in &self.trash {
            check_snapshot(held, trash[id], content).map_err(|error| format!("in the trash: {error}"))?;
        }
        // Of those that are remembered.
        let ended = |(id, state): (&JobId, &JobState)| held.rows.job(*id).is_none_or(|job| job.state == *state);
        if !self.ended.iter().all(ended) {
            return Err("a request has ended in another way".to_owned());
        }
        for (disk, written) in &self.disks {
            let leaf = machine.now.disks.get(disk).ok_or("a disk of Now is missing")?;
            let found = match live.and_then(|live| live.get(disk)) {
                Some(chain) => Rc::new(sectors(chain)),
                None => held.disk(*leaf),
            };
            compare(&found, |sector, version| written.allows(live.is_some(), sector, version))
                .map_err(|error| format!("Now, {disk}: {error}"))?;
        }
        check_memory(held, machine.now.memory, self.saved.as_deref()).map_err(|error| format!("Now: {error}"))
    }
}

fn check_snapshot(held: &Held<'_>, found: &Snapshot, content: &Content) -> Checked {
    let told = |error| format!("snapshot {}: {error}", found.name);
    for (disk, sectors) in &content.disks {
        let leaf = found.disks.get(disk).ok_or_else(|| told("a disk is missing".to_owned()))?;
        compare(&held.disk(*leaf), |sector, version| sectors[sector as usize] == version).map_err(told)?;
    }
    check_memory(held, found.memory, content.memory.as_deref()).map_err(told)
}

fn compare(found: &Result<Vec<u32>, String>, allows: impl Fn(u64, u32) -> bool) -> Checked {
    let found = found.as_ref().map_err(String::clone)?;
    match (0..).zip(found).find(|(sector, version)| !allows(*sector, **version)) {
        Some((sector, version)) => Err(format!("sector {sector} holds version {version}")),
        None => Ok(()),
    }
}

/// The version of each sector of a disk.
fn sectors(chain: &Chain) -> Result<Vec<u32>, String> {
    let mut versions = Vec::new();
    let mut at = 0;
    while at < chain.size() {
        for run in chain.runs(at, chain.size() - at, 1000).map_err(|e| e.to_string())? {
            at = run.offset + run.len;
            if run.kind != RunKind::Data {
                versions.resize((at / SECTOR) as usize, 0);
                continue;
            }
            let mut bytes = vec![0; run.len as usize];
            chain.read(&mut bytes, run.offset).map_err(|e| e.to_string())?;
            for sector in bytes.chunks(SECTOR as usize) {
                if sector[4..] != sector[..sector.len() - 4] {
                    return Err(format!("sector {} is torn", versions.len()));
                }
                versions.push(u32::from_le_bytes(sector[..4].try_into().expect("four bytes")));
            }
        }
    }
    Ok(versions)
}

fn check_memory(held: &Held<'_>, layer: Option<LayerId>, expected: Option<&[u32]>) -> Checked {
    let (layer, expected) = match (layer, expected) {
        (Some(layer), Some(expected)) => (layer, expected),
        (None, None) => return Ok(()),
        (found, _) => return Err(format!("memory: {}", if found.is_some() { "there is one" } else { "it is gone" })),
    };
    let found = held.memory(layer);
    let pages = (*found).as_ref().map_err(String::clone)?;
    if pages == expected { Ok(()) } else { Err(format!("memory: {pages:?} instead of {expected:?}")) }
}

/// The version of each page of a memory.
fn pages(memory: &Sealed) -> Result<Vec<u32>, String> {
    let mut stream = Vec::new();
    memory::restore(memory, &mut stream, |_, _| {}).map_err(|e| e.to_string())?;
    let (mut parser, mut rest, mut pages) = (Parser::new(), stream.as_slice(), vec![0; PAGES]);
    while let Some(event) = parser.next(&mut rest).map_err(|e| e.to_string())? {
        if let Event::Page { offset, data, .. } = event {
            pages[offset as usize / PAGE] = u32::from_le_bytes(data[..4].try_into().expect("four bytes"));
        }
    }
    Ok(pages)
}
