//! A simulated disk that loses what was not synced.
//!
//! ```text
//!   write, set_len, punch ──► content (what reads see)    create, link, rename, unlink ──► entries
//!                             pending (not synced)                                   pending
//!   sync ───────────────────► durable                     sync ────────────────────► durable
//!
//!   Sim ── cut(At::Operation(n)) ──► every operation fails: PowerLost
//!    └──── after_crash(Crash) ─────► another Sim: durable, and of pending what the Crash says
//! ```
//!
//! The rules, which are POSIX's at their strictest where file systems differ:
//!
//! - A *sector* (512 bytes) is written whole or not at all. Unsynced sectors survive in any combination, each with any content
//!   that it had since the last sync. A longer length survives apart from the data; what is then not there reads as zeros.
//! - A change of a *name* survives apart from the file's content, and from changes of other names. A rename is atomic.
//! - After a *sync that failed*, what it covered is durable or not, by halves, and no later sync makes it so: reads still see the
//!   new content until the crash.
//! - A *write that failed* may have written a part of its bytes, whole sectors like any other.
//!
//! Everything is deterministic: the same operations, faults and [`Crash`] give the same disk. States are cheap, for content is
//! shared between a disk and what becomes of it.

mod crash;
mod pages;

pub use crash::Crash;

use crate::{Error, ErrorKind, Folder, Lock, Mode, Result, Store, check_name};
use crash::{Choice, FileOp, NameOp, SECTOR, apply_names, mix};
use pages::{PAGE, Pages};
use std::any::Any;
use std::backtrace::Backtrace;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An operation of a disk, by its number: counted from 0 since the disk was made, see [`Counts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The n-th operation that changes or syncs something.
    Operation(u64),
    /// The n-th sync, of a file or a folder.
    Sync(u64),
    /// The n-th read.
    Read(u64),
}

/// How many operations a disk has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Operations that change or sync something.
    pub operations: u64,
    /// Syncs among them.
    pub syncs: u64,
    /// Reads.
    pub reads: u64,
}

/// How long a fault lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    /// The one operation.
    Once,
    /// It and all later ones of its sort.
    Forever,
}

/// A sync that had something to do.
#[derive(Debug)]
pub struct Synced {
    /// The file or folder.
    pub name: String,
    /// The number of the operation.
    pub operation: u64,
    /// The newest of those that it made durable.
    pub newest: u64,
    /// Who asked for it.
    pub by: Backtrace,
}

/// A disk of which a sync did nothing and said that it did, for [`Sim::after_crash`]. See [`Sim::without_sync`].
#[derive(Debug)]
pub struct Unsynced {
    /// What it covered is pending: any of it may be lost.
    pub open: Sim,
    /// What it covered is lost, whatever comes of later operations.
    pub lost: Sim,
}

/// A simulated disk. A clone is the same disk.
#[derive(Clone)]
pub struct Sim {
    disk: Arc<Mutex<Disk>>,
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sim").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

impl Default for Sim {
    fn default() -> Self {
        Self::new()
    }
}

impl Sim {
    /// An empty disk.
    pub fn new() -> Self {
        Self::with_inodes(BTreeMap::from([(ROOT, Inode::Folder(FolderInode::default()))]))
    }

    fn with_inodes(inodes: BTreeMap<u64, Inode>) -> Self {
        let next_id = inodes.keys().max().map_or(ROOT, |last| last + 1);
        let disk = Disk {
            inodes,
            next_id,
            counts: Counts::default(),
            powered: true,
            cut: None,
            faults: Vec::new(),
            remembers: false,
            capacity: None,
            copies: None,
        };
        Self { disk: Arc::new(Mutex::new(disk)) }
    }

    /// The disk's root folder.
    pub fn root(&self) -> Arc<dyn Folder> {
        Arc::new(SimFolder { disk: Arc::clone(&self.disk), inode: ROOT, name: String::new() })
    }

    /// How many operations there were.
    pub fn counts(&self) -> Counts {
        lock(&self.disk).counts
    }

    /// Cuts the power in the middle of that operation: whether it took place the [`Crash`] says. Every operation after it fails.
    pub fn cut(&self, at: At) {
        lock(&self.disk).cut = Some(at);
    }

    /// Cuts the power now.
    pub fn cut_now(&self) {
        lock(&self.disk).powered = false;
    }

    /// Undoes a cut, as if only the process had died and not the machine: all that was written is still there, and what was not
    /// synced may still be lost.
    pub fn revive(&self) {
        let mut disk = lock(&self.disk);
        (disk.powered, disk.cut) = (true, None);
    }

    /// Whether the power is still on.
    pub fn powered(&self) -> bool {
        lock(&self.disk).powered
    }

    /// Makes an operation fail with an error of `kind`.
    pub fn fail(&self, at: At, kind: ErrorKind, times: Times) {
        lock(&self.disk).faults.push(Fault { at, kind, times });
    }

    /// Remembers from now on what the last sync of each file and folder has done, for [`Sim::without_sync`].
    pub fn remember_syncs(&self) {
        lock(&self.disk).remembers = true;
    }

    /// The last sync of each file and folder, of those that are remembered and had something to do.
    pub fn last_syncs(&self) -> Vec<Arc<Synced>> {
        lock(&self.disk).inodes.values().filter_map(Inode::last).cloned().collect()
    }

    /// This disk, had one of [`Sim::last_syncs`], by the number of its operation, done nothing. So one run shows what becomes of every sync that is
    /// forgotten, or that comes too late: a run does not see what is durable. (What a sync before the last one did, the last one did as well.)
    pub fn without_sync(&self, operation: u64) -> Option<Unsynced> {
        let disk = lock(&self.disk);
        let is_it = |inode: &Inode| inode.last().is_some_and(|sync| sync.operation == operation);
        let (id, inode) = disk.inodes.iter().find(|(_, inode)| is_it(inode))?;
        let with = |inode| {
            let mut inodes = disk.inodes.clone();
            inodes.insert(*id, inode);
            Self::with_inodes(inodes)
        };
        Some(Unsynced { open: with(inode.without_sync()), lost: with(inode.without_synced()) })
    }

    /// Lets all operations succeed again.
    pub fn heal(&self) {
        lock(&self.disk).faults.clear();
    }

    /// Limits what all files together may occupy, bytes; `None` is no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        lock(&self.disk).capacity = bytes;
    }

    /// Hands over a copy of the disk just before each of these operations (their numbers, see [`Counts`]): with what is not synced, for
    /// [`Sim::after_crash`]. So one run shows what a power cut at any of them leaves, and need not be repeated up to each.
    ///
    /// `taken` gets the operation's number. It must not touch this disk.
    pub fn copy_before(&self, operations: BTreeSet<u64>, taken: impl FnMut(u64, Self) + Send + 'static) {
        lock(&self.disk).copies = Some(Copies { operations, taken: Box::new(taken) });
    }

    /// What all files together occupy, bytes.
    pub fn used(&self) -> u64 {
        lock(&self.disk).used()
    }

    /// Another disk that is as this one: the same is synced, and the same is not.
    #[must_use]
    pub fn fork(&self) -> Self {
        lock(&self.disk).fork()
    }

    /// Operations that no sync covers: what a [`Crash`] chooses from.
    pub fn unsynced(&self) -> u64 {
        lock(&self.disk).unsynced().len() as u64
    }

    /// The disk as it comes up after losing its power now. This disk is left as it is.
    #[must_use]
    pub fn after_crash(&self, crash: Crash) -> Self {
        Self::with_inodes(lock(&self.disk).after_crash(crash))
    }

    /// A number that tells apart disks of different names or bytes, as a read sees them: for counting distinct states.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        lock(&self.disk).hash_folder(ROOT, &mut hasher);
        hasher.finish()
    }
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    // A panicking test thread leaves the disk as an interrupted program would: usable.
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

const ROOT: u64 = 1;

struct Disk {
    inodes: BTreeMap<u64, Inode>,
    /// For inodes and handles.
    next_id: u64,
    counts: Counts,
    powered: bool,
    cut: Option<At>,
    faults: Vec<Fault>,
    /// Whether the last sync of everything is remembered.
    remembers: bool,
    capacity: Option<u64>,
    copies: Option<Copies>,
}

/// Where copies of the disk are wanted, and by whom.
struct Copies {
    operations: BTreeSet<u64>,
    taken: Box<dyn FnMut(u64, Sim) + Send>,
}

#[derive(Clone)]
enum Inode {
    File(FileInode),
    Folder(FolderInode),
}

#[derive(Clone, Default)]
struct FileInode {
    /// What reads see.
    content: Arc<Pages>,
    /// What the last sync left.
    durable: Arc<Pages>,
    /// Changes since then, each with the number of its operation.
    pending: Vec<(u64, FileOp)>,
    /// A sync has failed: `durable` plus `pending` is not `content` any more.
    diverged: bool,
    /// Open handles and their locks.
    handles: BTreeMap<u64, Lock>,
    /// The last sync, and what was durable and pending before it.
    last: Option<Last<Arc<Pages>, FileOp>>,
}

type Last<D, O> = (Arc<Synced>, D, Vec<(u64, O)>);

#[derive(Clone, Default)]
struct FolderInode {
    entries: BTreeMap<String, u64>,
    durable: BTreeMap<String, u64>,
    pending: Vec<(u64, NameOp)>,
    removed: bool,
    last: Option<Last<BTreeMap<String, u64>, NameOp>>,
}

impl Inode {
    fn last(&self) -> Option<&Arc<Synced>> {
        match self {
            Self::File(file) => file.last.as_ref().map(|last| &last.0),
            Self::Folder(folder) => folder.last.as_ref().map(|last| &last.0),
        }
    }

    /// What a crash leaves of it.
    fn crashed(&self, choice: &Choice<'_>) -> Self {
        match self {
            Self::File(file) => {
                let durable = file.crashed(choice);
                Self::File(FileInode { content: Arc::clone(&durable), durable, ..FileInode::default() })
            }
            Self::Folder(folder) => {
                let durable = folder.crashed(choice);
                Self::Folder(FolderInode { entries: durable.clone(), durable, ..FolderInode::default() })
            }
        }
    }

    /// As if the last sync had done nothing.
    fn without_sync(&self) -> Self {
        match self.clone() {
            Self::File(mut file) => {
                if let Some((_, durable, pending)) = file.last.take() {
                    (file.durable, file.pending) = (durable, pending.into_iter().chain(file.pending).collect());
                }
                Self::File(file)
            }
            Self::Folder(mut folder) => {
                if let Some((_, durable, pending)) = folder.last.take() {
                    (folder.durable, folder.pending) = (durable, pending.into_iter().chain(folder.pending).collect());
                }
                Self::Folder(folder)
            }
        }
    }

    /// As if what the last sync covered had been lost.
    fn without_synced(&self) -> Self {
        match self.clone() {
            Self::File(mut file) => {
                if let Some((_, durable, _)) = file.last.take() {
                    (file.durable, file.diverged) = (durable, true);
                }
                Self::File(file)
            }
            Self::Folder(mut folder) => {
                if let Some((_, durable, mut lost)) = folder.last.take() {
                    folder.durable = durable;
                    // What follows something that is lost is lost as well.
                    folder.pending.retain(|change| {
                        let kept = !lost.iter().any(|(_, earlier)| change.1.follows(earlier));
                        if !kept {
                            lost.push(change.clone());
                        }
                        kept
                    });
                }
                Self::Folder(folder)
            }
        }
    }
}

struct Fault {
    at: At,
    kind: ErrorKind,
    times: Times,
}

/// What sort of operation begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sort {
    Read,
    Change,
    Sync,
}

/// What is to become of an operation.
enum Fate {
    /// It is carried out. The number is that of its operation.
    Done(u64),
    /// The power goes while it is carried out.
    Cut(u64),
    /// It fails.
    Failed(u64, ErrorKind),
}

impl Fault {
    fn hits(&self, sort: Sort, counts: Counts) -> bool {
        let hit = |at: u64, now: u64| match self.times {
            Times::Once => now == at,
            Times::Forever => now >= at,
        };
        match self.at {
            At::Operation(at) => sort != Sort::Read && hit(at, counts.operations),
            At::Sync(at) => sort == Sort::Sync && hit(at, counts.syncs),
            At::Read(at) => sort == Sort::Read && hit(at, counts.reads),
        }
    }
}

fn power_lost(operation: &'static str, name: &str) -> Error {
    Error::new(ErrorKind::PowerLost, operation, name, "the simulated power is gone")
}

impl Disk {
    /// Counts an operation and says what is to become of it.
    fn begin(&mut self, sort: Sort, operation: &'static str, name: &str) -> Result<Fate> {
        if !self.powered {
            return Err(power_lost(operation, name));
        }
        if sort != Sort::Read {
            self.copy();
        }
        let counts = self.counts;
        match sort {
            Sort::Read => self.counts.reads += 1,
            Sort::Change => self.counts.operations += 1,
            Sort::Sync => {
                self.counts.operations += 1;
                self.counts.syncs += 1;
            }
        }
        let number = counts.operations;
        let cut =
            self.cut.is_some_and(|at| Fault { at, kind: ErrorKind::PowerLost, times: Times::Once }.hits(sort, counts));
        if cut {
            self.powered = false;
            return Ok(Fate::Cut(number));
        }
        let fault = self.faults.iter().find(|fault| fault.hits(sort, counts));
        Ok(fault.map_or(Fate::Done(number), |fault| Fate::Failed(number, fault.kind)))
    }

    /// Hands over a copy, if one is wanted before the next operation.
    fn copy(&mut self) {
        let next = self.counts.operations;
        if !self.copies.as_ref().is_some_and(|copies| copies.operations.contains(&next)) {
            return;
        }
        let fork = self.fork();
        if let Some(copies) = &mut self.copies {
            (copies.taken)(next, fork);
        }
    }

    /// Nobody has a file of it open.
    fn fork(&self) -> Sim {
        let mut inodes = self.inodes.clone();
        for inode in inodes.values_mut() {
            if let Inode::File(file) = inode {
                file.handles.clear();
            }
        }
        Sim::with_inodes(inodes)
    }

    /// An operation that is done whole or not at all.
    fn begin_change(&mut self, operation: &'static str, name: &str) -> Result<(u64, Outcome)> {
        let outcome = |result| Outcome { result, operation, name: name.to_owned() };
        match self.begin(Sort::Change, operation, name)? {
            Fate::Done(number) => Ok((number, outcome(Ok(())))),
            Fate::Cut(number) => Ok((number, outcome(Err(ErrorKind::PowerLost)))),
            Fate::Failed(_, kind) => Err(Error::new(kind, operation, name, "a simulated fault")),
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn file(&mut self, inode: u64) -> &mut FileInode {
        match self.inodes.get_mut(&inode) {
            Some(Inode::File(file)) => file,
            _ => unreachable!("an open file's inode stays"),
        }
    }

    fn folder(&mut self, inode: u64) -> &mut FolderInode {
        match self.inodes.get_mut(&inode) {
            Some(Inode::Folder(folder)) => folder,
            _ => unreachable!("an open folder's inode stays"),
        }
    }

    /// How many names a file has.
    fn names(&self, file: u64) -> u64 {
        let folders = self.inodes.values().filter_map(|inode| match inode {
            Inode::Folder(folder) => Some(folder),
            Inode::File(_) => None,
        });
        folders.flat_map(|folder| folder.entries.values()).filter(|named| **named == file).count() as u64
    }

    /// Bytes that the files occupy which have a name or are open.
    fn used(&self) -> u64 {
        let mut live: BTreeSet<u64> = BTreeSet::new();
        for inode in self.inodes.values() {
            if let Inode::Folder(folder) = inode {
                live.extend(folder.entries.values());
            }
        }
        let files = self.inodes.iter().filter_map(|(id, inode)| match inode {
            Inode::File(file) if live.contains(id) || !file.handles.is_empty() => Some(file.content.allocated() * PAGE),
            _ => None,
        });
        files.sum()
    }

    fn unsynced(&self) -> Vec<u64> {
        let mut numbers: Vec<u64> = Vec::new();
        for inode in self.inodes.values() {
            match inode {
                Inode::File(file) => numbers.extend(file.pending.iter().map(|(number, _)| number)),
                Inode::Folder(folder) => numbers.extend(folder.pending.iter().map(|(number, _)| number)),
            }
        }
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    fn after_crash(&self, crash: Crash) -> BTreeMap<u64, Inode> {
        let unsynced = self.unsynced();
        let choice = Choice { crash, unsynced: &unsynced };
        Self::reached(|id| self.inodes[&id].crashed(&choice))
    }

    /// What is found from the root on, each as `after` says.
    fn reached(after: impl Fn(u64) -> Inode) -> BTreeMap<u64, Inode> {
        let (mut inodes, mut found) = (BTreeMap::new(), vec![ROOT]);
        while let Some(id) = found.pop() {
            let inode = after(id);
            if let Inode::Folder(folder) = &inode {
                found.extend(folder.durable.values());
            }
            inodes.insert(id, inode);
        }
        inodes
    }

    fn hash_folder(&self, id: u64, hasher: &mut DefaultHasher) {
        let Some(Inode::Folder(folder)) = self.inodes.get(&id) else { return };
        folder.entries.len().hash(hasher);
        for (name, id) in &folder.entries {
            name.hash(hasher);
            match &self.inodes[id] {
                Inode::File(file) => file.content.hash(hasher),
                Inode::Folder(_) => self.hash_folder(*id, hasher),
            }
        }
    }

    /// Forgets the files that neither a name nor a handle nor a crash can bring back.
    fn forget_unreachable(&mut self) {
        let mut named = BTreeSet::from([ROOT]);
        for inode in self.inodes.values() {
            if let Inode::Folder(folder) = inode {
                named.extend(folder.entries.values().chain(folder.durable.values()));
                named.extend(folder.pending.iter().map(|(_, change)| change.inode()));
                if let Some((_, durable, pending)) = &folder.last {
                    named.extend(durable.values().copied().chain(pending.iter().map(|(_, change)| change.inode())));
                }
            }
        }
        self.inodes.retain(|id, inode| match inode {
            Inode::File(file) => named.contains(id) || !file.handles.is_empty(),
            // Folders cost nothing, and handles of them are not counted.
            Inode::Folder(_) => true,
        });
    }
}

impl FileInode {
    fn crashed(&self, choice: &Choice<'_>) -> Arc<Pages> {
        if self.pending.is_empty() || choice.crash == Crash::Nothing {
            return Arc::clone(&self.durable);
        }
        if choice.crash == Crash::Everything && !self.diverged {
            return Arc::clone(&self.content);
        }
        let mut pages = Pages::clone(&self.durable);
        for (number, change) in &self.pending {
            change.apply(&mut pages, *number, choice);
        }
        pages.truncate();
        Arc::new(pages)
    }

    fn write(&mut self, number: u64, buf: &[u8], offset: u64) {
        if buf.is_empty() {
            return;
        }
        let end = offset + buf.len() as u64;
        let content = Arc::make_mut(&mut self.content);
        content.write(buf, offset);
        content.set_len(content.len().max(end));
        self.record_sectors(number, offset, end, end);
    }

    /// Notes the sectors of a range as they are now.
    fn record_sectors(&mut self, number: u64, start: u64, end: u64, reaches: u64) {
        let start = start / SECTOR * SECTOR;
        let mut data = vec![0; (end.next_multiple_of(SECTOR) - start) as usize];
        self.content.read(&mut data, start);
        self.pending.push((number, FileOp::Write { offset: start, data: data.into(), end: reaches }));
    }

    fn set_len(&mut self, number: u64, len: u64) {
        let content = Arc::make_mut(&mut self.content);
        let shrinks = len < content.len();
        content.set_len(len);
        if shrinks {
            content.truncate();
        }
        self.pending.push((number, FileOp::SetLen(len)));
    }

    fn punch(&mut self, number: u64, offset: u64, len: u64) {
        Arc::make_mut(&mut self.content).zero(offset, len);
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(SECTOR), end / SECTOR * SECTOR);
        if first > last {
            // Inside one sector.
            self.record_sectors(number, offset, end, 0);
            return;
        }
        if offset < first {
            self.record_sectors(number, offset, first, 0);
        }
        if first < last {
            self.pending.push((number, FileOp::Zero { offset: first, len: last - first }));
        }
        if last < end {
            self.record_sectors(number, last, end, 0);
        }
    }

    /// Makes of the pending changes durable what `crash` says, and forgets the others.
    fn settle(&mut self, crash: Crash) {
        let unsynced: Vec<u64> = self.pending.iter().map(|(number, _)| *number).collect();
        self.durable = self.crashed(&Choice { crash, unsynced: &unsynced });
        self.pending.clear();
    }
}

impl FolderInode {
    fn crashed(&self, choice: &Choice<'_>) -> BTreeMap<String, u64> {
        let mut entries = self.durable.clone();
        apply_names(&mut entries, &self.pending, choice);
        entries
    }

    fn settle(&mut self, crash: Crash) {
        let unsynced: Vec<u64> = self.pending.iter().map(|(number, _)| *number).collect();
        self.durable = self.crashed(&Choice { crash, unsynced: &unsynced });
        self.pending.clear();
    }

    fn change(&mut self, number: u64, change: NameOp) {
        change.apply(&mut self.entries);
        self.pending.push((number, change));
    }
}

/// A sync that is asked for now, unless it has nothing to do.
fn synced<O>(name: &str, operation: u64, pending: &[(u64, O)]) -> Option<Arc<Synced>> {
    let newest = pending.last()?.0;
    Some(Arc::new(Synced { name: name.to_owned(), operation, newest, by: Backtrace::force_capture() }))
}

/// How an operation that was carried out ends.
struct Outcome {
    result: std::result::Result<(), ErrorKind>,
    operation: &'static str,
    name: String,
}

impl Outcome {
    fn end<T>(self, value: T) -> Result<T> {
        match self.result {
            Ok(()) => Ok(value),
            Err(_) => Err(power_lost(self.operation, &self.name)),
        }
    }
}

/// The choice that a failed sync makes: half of the sectors.
fn failed_sync(number: u64) -> Crash {
    Crash::Sectors { seed: mix(number) }
}

struct SimFolder {
    disk: Arc<Mutex<Disk>>,
    inode: u64,
    /// Its path, empty for the root.
    name: String,
}

impl fmt::Debug for SimFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFolder").field("name", &self.name).finish_non_exhaustive()
    }
}

impl SimFolder {
    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.name)
    }

    fn error(&self, kind: ErrorKind, operation: &'static str, name: &str) -> Error {
        let detail = match kind {
            ErrorKind::NotFound => "no such file or folder",
            ErrorKind::Exists => "the name is taken, or the folder is not empty",
            ErrorKind::WrongType => "something of another type has that name",
            _ => "failed",
        };
        Error::new(kind, operation, self.path(name), detail)
    }

    /// The inode of a name, and whether it is a folder.
    fn find(&self, disk: &mut Disk, operation: &'static str, name: &str) -> Result<(u64, bool)> {
        let id = disk.folder(self.inode).entries.get(name).copied();
        let id = id.ok_or_else(|| self.error(ErrorKind::NotFound, operation, name))?;
        Ok((id, matches!(disk.inodes[&id], Inode::Folder(_))))
    }

    /// Fails unless a new name can be made.
    fn check_free(&self, disk: &mut Disk, operation: &'static str, name: &str) -> Result<()> {
        let folder = disk.folder(self.inode);
        if folder.entries.contains_key(name) {
            return Err(self.error(ErrorKind::Exists, operation, name));
        }
        if folder.removed {
            return Err(self.error(ErrorKind::NotFound, operation, name));
        }
        Ok(())
    }

    /// Makes a name for something new.
    fn add(&self, disk: &mut Disk, operation: &'static str, name: &str, inode: Inode) -> Result<u64> {
        self.check_free(disk, operation, name)?;
        let (number, outcome) = disk.begin_change(operation, &self.path(name))?;
        let id = disk.new_id();
        disk.inodes.insert(id, inode);
        disk.folder(self.inode).change(number, NameOp::Add { name: name.to_owned(), inode: id });
        outcome.end(id)
    }

    fn handle(&self, disk: &mut Disk, name: &str, inode: u64, mode: Mode) -> Arc<dyn Store> {
        let id = disk.new_id();
        disk.file(inode).handles.insert(id, Lock::None);
        let (disk, name) = (Arc::clone(&self.disk), self.path(name));
        Arc::new(SimFile { disk, inode, id, mode, name, sync_failed: AtomicBool::new(false) })
    }

    fn remove(&self, name: &str, folder: bool) -> Result<()> {
        let operation = "remove";
        check_name(name, operation)?;
        let mut disk = lock(&self.disk);
        let (id, is_folder) = self.find(&mut disk, operation, name)?;
        if is_folder != folder {
            return Err(self.error(ErrorKind::WrongType, operation, name));
        }
        if folder && !disk.folder(id).entries.is_empty() {
            return Err(self.error(ErrorKind::Exists, operation, name));
        }
        let (number, outcome) = disk.begin_change(operation, &self.path(name))?;
        if folder {
            disk.folder(id).removed = true;
        }
        disk.folder(self.inode).change(number, NameOp::Remove { name: name.to_owned(), inode: id });
        outcome.end(())
    }
}

impl Folder for SimFolder {
    fn open(&self, name: &str, mode: Mode) -> Result<Arc<dyn Store>> {
        check_name(name, "open")?;
        let mut disk = lock(&self.disk);
        if !disk.powered {
            return Err(power_lost("open", &self.path(name)));
        }
        match self.find(&mut disk, "open", name)? {
            (_, true) => Err(self.error(ErrorKind::WrongType, "open", name)),
            (inode, false) => Ok(self.handle(&mut disk, name, inode, mode)),
        }
    }

    fn create(&self, name: &str) -> Result<Arc<dyn Store>> {
        check_name(name, "create")?;
        let mut disk = lock(&self.disk);
        let inode = self.add(&mut disk, "create", name, Inode::File(FileInode::default()))?;
        Ok(self.handle(&mut disk, name, inode, Mode::Write))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let operation = "rename";
        check_name(from, operation)?;
        check_name(to, operation)?;
        let mut disk = lock(&self.disk);
        let (inode, folder) = self.find(&mut disk, operation, from)?;
        let replaced = disk.folder(self.inode).entries.get(to).copied();
        if replaced == Some(inode) {
            return Ok(());
        }
        if let Some(replaced) = replaced {
            match &disk.inodes[&replaced] {
                Inode::Folder(other) if folder && other.entries.is_empty() => {}
                Inode::Folder(_) if folder => return Err(self.error(ErrorKind::Exists, operation, to)),
                Inode::File(_) if !folder => {}
                _ => return Err(self.error(ErrorKind::WrongType, operation, to)),
            }
        }
        let (number, outcome) = disk.begin_change(operation, &self.path(from))?;
        if let Some(Inode::Folder(replaced)) = replaced.and_then(|id| disk.inodes.get_mut(&id)) {
            replaced.removed = true;
        }
        let change = NameOp::Rename { from: from.to_owned(), to: to.to_owned(), inode };
        disk.folder(self.inode).change(number, change);
        outcome.end(())
    }

    fn link(&self, name: &str, into: &dyn Folder, new: &str) -> Result<()> {
        let operation = "link";
        check_name(name, operation)?;
        check_name(new, operation)?;
        let mut disk = lock(&self.disk);
        let into: &dyn Any = into;
        let into = into.downcast_ref::<Self>().filter(|into| Arc::ptr_eq(&into.disk, &self.disk));
        let into = into.ok_or_else(|| self.error(ErrorKind::CannotLink, operation, name))?;
        let (inode, folder) = self.find(&mut disk, operation, name)?;
        if folder {
            return Err(self.error(ErrorKind::WrongType, operation, name));
        }
        into.check_free(&mut disk, operation, new)?;
        let (number, outcome) = disk.begin_change(operation, &into.path(new))?;
        disk.folder(into.inode).change(number, NameOp::Add { name: new.to_owned(), inode });
        outcome.end(())
    }

    fn links(&self, name: &str) -> Result<u64> {
        check_name(name, "look at")?;
        let mut disk = lock(&self.disk);
        if !disk.powered {
            return Err(power_lost("look at", &self.path(name)));
        }
        match self.find(&mut disk, "look at", name)? {
            (_, true) => Err(self.error(ErrorKind::WrongType, "look at", name)),
            (inode, false) => Ok(disk.names(inode)),
        }
    }

    fn unlink(&self, name: &str) -> Result<()> {
        self.remove(name, false)
    }

    fn create_folder(&self, name: &str) -> Result<Arc<dyn Folder>> {
        check_name(name, "create folder")?;
        let mut disk = lock(&self.disk);
        let inode = self.add(&mut disk, "create folder", name, Inode::Folder(FolderInode::default()))?;
        Ok(Arc::new(Self { disk: Arc::clone(&self.disk), inode, name: self.path(name) }))
    }

    fn folder(&self, name: &str) -> Result<Arc<dyn Folder>> {
        check_name(name, "open")?;
        let mut disk = lock(&self.disk);
        if !disk.powered {
            return Err(power_lost("open", &self.path(name)));
        }
        match self.find(&mut disk, "open", name)? {
            (_, false) => Err(self.error(ErrorKind::WrongType, "open", name)),
            (inode, true) => Ok(Arc::new(Self { disk: Arc::clone(&self.disk), inode, name: self.path(name) })),
        }
    }

    fn remove_folder(&self, name: &str) -> Result<()> {
        self.remove(name, true)
    }

    fn room(&self) -> Result<u64> {
        let disk = lock(&self.disk);
        Ok(disk.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(disk.used())))
    }

    fn list(&self) -> Result<Vec<String>> {
        let mut disk = lock(&self.disk);
        if !disk.powered {
            return Err(power_lost("list", &self.name));
        }
        Ok(disk.folder(self.inode).entries.keys().cloned().collect())
    }

    fn sync(&self) -> Result<()> {
        let mut disk = lock(&self.disk);
        match disk.begin(Sort::Sync, "sync", &self.name)? {
            Fate::Done(number) => {
                let remembers = disk.remembers;
                let folder = disk.folder(self.inode);
                if let Some(synced) = remembers.then(|| synced(&self.name, number, &folder.pending)).flatten() {
                    folder.last = Some((synced, folder.durable.clone(), folder.pending.clone()));
                }
                folder.settle(Crash::Everything);
                disk.forget_unreachable();
                Ok(())
            }
            Fate::Cut(_) => Err(power_lost("sync", &self.name)),
            Fate::Failed(number, kind) => {
                disk.folder(self.inode).settle(failed_sync(number));
                Err(Error::new(kind, "sync", &self.name, "a simulated fault"))
            }
        }
    }
}

struct SimFile {
    disk: Arc<Mutex<Disk>>,
    inode: u64,
    /// The handle's own number: locks belong to it.
    id: u64,
    mode: Mode,
    name: String,
    sync_failed: AtomicBool,
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFile").field("name", &self.name).field("mode", &self.mode).finish_non_exhaustive()
    }
}

/// The longest file, bytes.
const MAX_LEN: u64 = i64::MAX as u64;

impl SimFile {
    fn error(&self, kind: ErrorKind, operation: &'static str, detail: &str) -> Error {
        Error::new(kind, operation, &self.name, detail)
    }

    fn check_writable(&self, operation: &'static str) -> Result<()> {
        match self.mode {
            Mode::Write => Ok(()),
            Mode::Read => Err(self.error(ErrorKind::Denied, operation, "the file was opened for reading")),
        }
    }

    /// The end of a range, unless no file could reach so far.
    fn end(&self, operation: &'static str, offset: u64, len: u64) -> Result<u64> {
        let end = offset.checked_add(len).filter(|end| *end <= MAX_LEN);
        end.ok_or_else(|| self.error(ErrorKind::Io, operation, "offset out of range"))
    }
}

impl Store for SimFile {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn len(&self) -> Result<u64> {
        let mut disk = lock(&self.disk);
        if !disk.powered {
            return Err(power_lost("read the length of", &self.name));
        }
        Ok(disk.file(self.inode).content.len())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let operation = "set the length of";
        self.check_writable(operation)?;
        self.end(operation, len, 0)?;
        let mut disk = lock(&self.disk);
        let (number, outcome) = disk.begin_change(operation, &self.name)?;
        disk.file(self.inode).set_len(number, len);
        outcome.end(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let end = self.end("read", offset, buf.len() as u64)?;
        let mut disk = lock(&self.disk);
        match disk.begin(Sort::Read, "read", &self.name)? {
            Fate::Done(_) => {}
            Fate::Cut(_) => return Err(power_lost("read", &self.name)),
            Fate::Failed(_, kind) => return Err(self.error(kind, "read", "a simulated fault")),
        }
        let content = &disk.file(self.inode).content;
        if end > content.len() {
            return Err(self.error(ErrorKind::PastEnd, "read", "the bytes lie past the end of the file"));
        }
        content.read(buf, offset);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_writable("write")?;
        if buf.is_empty() {
            return Ok(());
        }
        self.end("write", offset, buf.len() as u64)?;
        let mut disk = lock(&self.disk);
        let fate = disk.begin(Sort::Change, "write", &self.name)?;
        let missing = disk.file(self.inode).content.missing(offset, buf.len() as u64);
        let full = disk.capacity.is_some_and(|capacity| disk.used() + missing * PAGE > capacity);
        let fate = match fate {
            Fate::Done(number) if full => Fate::Failed(number, ErrorKind::NoSpace),
            fate => fate,
        };
        let file = disk.file(self.inode);
        match fate {
            Fate::Done(number) => {
                file.write(number, buf, offset);
                Ok(())
            }
            Fate::Cut(number) => {
                file.write(number, buf, offset);
                Err(power_lost("write", &self.name))
            }
            Fate::Failed(number, kind) => {
                // Nothing if there is no room. Else a write may stop behind any sector.
                let stops = (offset + mix(number) % (buf.len() as u64 + 1)) / SECTOR * SECTOR;
                let done = if full && missing > 0 { 0 } else { stops.saturating_sub(offset) };
                file.write(number, &buf[..done as usize], offset);
                Err(self.error(kind, "write", "a simulated fault"))
            }
        }
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable("zero")?;
        let mut disk = lock(&self.disk);
        let inside = offset.checked_add(len).is_some_and(|end| end <= disk.file(self.inode).content.len());
        if !inside {
            return Err(self.error(ErrorKind::PastEnd, "zero", "the bytes lie past the end of the file"));
        }
        if len == 0 {
            return Ok(());
        }
        let (number, outcome) = disk.begin_change("zero", &self.name)?;
        disk.file(self.inode).punch(number, offset, len);
        outcome.end(())
    }

    fn sync(&self) -> Result<()> {
        if self.sync_failed.load(Ordering::Acquire) {
            return Err(self.error(ErrorKind::Io, "sync", "an earlier sync of this file failed"));
        }
        let mut disk = lock(&self.disk);
        match disk.begin(Sort::Sync, "sync", &self.name)? {
            Fate::Done(number) => {
                let remembers = disk.remembers;
                let file = disk.file(self.inode);
                if let Some(synced) = remembers.then(|| synced(&self.name, number, &file.pending)).flatten() {
                    file.last = Some((synced, Arc::clone(&file.durable), file.pending.clone()));
                }
                file.settle(Crash::Everything);
                Ok(())
            }
            Fate::Cut(_) => Err(power_lost("sync", &self.name)),
            Fate::Failed(number, kind) => {
                self.sync_failed.store(true, Ordering::Release);
                let file = disk.file(self.inode);
                file.settle(failed_sync(number));
                file.diverged = true;
                Err(self.error(kind, "sync", "a simulated fault"))
            }
        }
    }

    fn lock(&self, wanted: Lock) -> Result<()> {
        let mut disk = lock(&self.disk);
        if !disk.powered {
            return Err(power_lost("lock", &self.name));
        }
        let handles = &mut disk.file(self.inode).handles;
        let conflict = handles.iter().any(|(id, held)| {
            *id != self.id
                && matches!(
                    (wanted, held),
                    (Lock::Exclusive, Lock::Shared | Lock::Exclusive) | (Lock::Shared, Lock::Exclusive)
                )
        });
        if conflict {
            return Err(self.error(ErrorKind::Locked, "lock", "in use by somebody else"));
        }
        handles.insert(self.id, wanted);
        if wanted != Lock::None && disk.names(self.inode) == 0 {
            return Err(self.error(ErrorKind::NotFound, "lock", "it was removed"));
        }
        Ok(())
    }

    fn data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let mut disk = lock(&self.disk);
        if !disk.powered {
            return Err(power_lost("look for holes in", &self.name));
        }
        Ok(disk.file(self.inode).content.data(offset))
    }

    fn allocated(&self) -> Result<u64> {
        let mut disk = lock(&self.disk);
        if !disk.powered {
            return Err(power_lost("read the size of", &self.name));
        }
        Ok(disk.file(self.inode).content.allocated() * PAGE)
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        lock(&self.disk).file(self.inode).handles.remove(&self.id);
    }
}
