//! The ledger: everything that a machine is, in one small crash-proof file.
//!
//! ```text
//!   State (in memory) ── commit(change): clone, change, compare ──► the rows that differ ── one transaction, synced ──► ledger
//!     machine, jobs, journal                                                                                     │
//!        ▲──────────────────────────── replaced only now ────────────────────────────────────────────────────────┘
//! ```
//!
//! The file is a `redb` database on our own [`Store`], so that the simulated disk cuts it like any other file. Its tables hold
//! JSON: `ledger` (what there is once: `format`, `machine`, `now`, `at`), and by id `snapshots`, `trash`, `layers`, `jobs`, `journal`.
//!
//! A ledger of an older format is read as it is, and rewritten in the present one when it is opened for writing; what it was is kept beside it as
//! `ledger.format-N`.
//!
//! # When a commit fails
//!
//! For want of room: the reserve is given up ([`crate::reserve`]), and the file is written anew with the change in it. Otherwise, or if there
//! is no reserve, nothing has changed in memory, and the file is written anew from memory at once, beside the old one and renamed over it:
//! a file with a failed write or sync is never trusted again. If that fails as well, the error is of kind
//! [`ErrorKind::Unsure`]: the file holds the state before *or after* the change, and nothing that depends on which may be
//! acknowledged to anybody. The next commit begins with writing the file anew.

use crate::request::{Job, Problem};
use crate::reserve;
use crate::trash::Trash;
use crate::tree::{JobId, LayerRow, Machine, MachineId, Now, Policy, Snapshot};
use jiff::{SignedDuration, Timestamp};
use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use store::{Folder, Lock, Mode, Store};

/// The file's name in the machine's folder.
pub const NAME: &str = "ledger";

/// Its name while it is being made.
const NEW: &str = "ledger.new";

/// The version of the rows that is written, and the newest that is read.
/// 2: what can be taken back. 3: UEFI, which an older program would take for damage, and files that other machines have, too, which are not to be
/// written.
const FORMAT: u32 = 3;

/// The largest ledger that is read into memory, bytes: thousands of snapshots take a hundredth of it.
const MAX_LEN: u64 = 1 << 29;

/// redb's cache, bytes. The rows are in memory anyway.
const CACHE: usize = 4 << 20;

type Table = TableDefinition<'static, &'static str, &'static [u8]>;

const LEDGER: Table = Table::new("ledger");
const SNAPSHOTS: Table = Table::new("snapshots");
const TRASH: Table = Table::new("trash");
const LAYERS: Table = Table::new("layers");
const JOBS: Table = Table::new("jobs");
const JOURNAL: Table = Table::new("journal");

/// Everything that a ledger holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct State {
    /// The machine.
    pub machine: Machine,
    at: Timestamp,
    /// Each is shared with the copies that a commit changes: there are hundreds, and it changes one.
    jobs: BTreeMap<JobId, Arc<Job>>,
    journal: BTreeMap<JobId, Journal>,
}

/// A request under way: what to undo if its worker dies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// The job that carries it out.
    pub job: JobId,
    /// What was asked.
    pub request: serde_json::Value,
    /// The files that it makes, relative to the machine's folder. Recovery deletes those that no other row names, and no others.
    pub files: Vec<String>,
    /// Anything else that recovery has to know. Of a merge that was committed: the layer that moved into another file.
    pub note: String,
}

impl State {
    fn new(machine: Machine) -> Self {
        Self { at: machine.created, machine, jobs: BTreeMap::new(), journal: BTreeMap::new() }
    }

    /// When the machine was last changed, by the host's clock; but later than every change before it, also where that clock was set back.
    pub fn at(&self) -> Timestamp {
        self.at
    }

    /// The jobs that are remembered, oldest first.
    pub fn jobs(&self) -> Vec<Job> {
        let mut jobs: Vec<Job> = self.jobs.values().map(|job| Job::clone(job)).collect();
        jobs.sort_by_key(|job| (job.started, job.id));
        jobs
    }

    /// The job of this id.
    pub fn job(&self, id: JobId) -> Option<&Job> {
        self.jobs.get(&id).map(Arc::as_ref)
    }

    /// Keeps a job, in place of the one of its id.
    pub fn insert_job(&mut self, job: Job) {
        self.jobs.insert(job.id, Arc::new(job));
    }

    /// Forgets the oldest of the jobs that have ended, beyond `keep` of them.
    pub fn prune_jobs(&mut self, keep: usize) {
        let mut ended: Vec<(Timestamp, JobId)> =
            self.jobs.values().filter(|job| job.state.ended()).map(|job| (job.started, job.id)).collect();
        ended.sort_unstable();
        for (_, id) in ended.iter().rev().skip(keep) {
            self.jobs.remove(id);
        }
    }

    /// The journal row of a job.
    pub fn journal(&self, job: JobId) -> Option<&Journal> {
        self.journal.get(&job)
    }

    /// All journal rows: the requests that have not ended.
    pub fn journals(&self) -> impl Iterator<Item = &Journal> {
        self.journal.values()
    }

    /// Journals a request, in place of the row of its job.
    pub fn insert_journal(&mut self, journal: Journal) {
        self.journal.insert(journal.job, journal);
    }

    /// A request has ended.
    pub fn remove_journal(&mut self, job: JobId) {
        self.journal.remove(&job);
    }
}

/// A machine's ledger, open for writing. Its file is locked meanwhile.
#[derive(Debug)]
pub struct Ledger {
    folder: Arc<dyn Folder>,
    state: Arc<State>,
    /// `None` after a failed commit: the file is not to be trusted.
    file: Option<File>,
}

impl Ledger {
    /// Makes the ledger of a new machine, durable with its name when it returns. Replaces one that is there.
    pub fn create(folder: &Arc<dyn Folder>, machine: &Machine) -> Result<Self> {
        Self::create_with(folder, machine, machine.created, Vec::new())
    }

    /// The same, of a machine that was last changed then, and with work that is left for its next worker.
    pub fn create_with(
        folder: &Arc<dyn Folder>,
        machine: &Machine,
        at: Timestamp,
        journals: Vec<Journal>,
    ) -> Result<Self> {
        let mut state = State { at, ..State::new(machine.clone()) };
        for journal in journals {
            state.insert_journal(journal);
        }
        check(&state).map_err(|why| Error::new(ErrorKind::Invalid, why))?;
        let file = File::create(folder, &state)?;
        Ok(Self { folder: Arc::clone(folder), state: Arc::new(state), file: Some(file) })
    }

    /// Opens a ledger, repairing it if its last writer was interrupted, and bringing it up to the present format.
    pub fn open(folder: &Arc<dyn Folder>) -> Result<Self> {
        let store = folder.open(NAME, Mode::Write)?;
        store.lock(Lock::Exclusive)?;
        let (mut file, state, format) = File::open(Medium::Store(Arc::clone(&store)))?;
        if format < FORMAT {
            file.close();
            keep_copy(&**folder, &*store, &format!("{NAME}.format-{format}"))?;
            drop(store);
            file = File::create(folder, &state)?;
        }
        // What a creation that died has left; in nobody's way if it cannot be removed.
        let _ = folder.unlink(NEW);
        Ok(Self { folder: Arc::clone(folder), state: Arc::new(state), file: Some(file) })
    }

    /// Reads a ledger without writing to its file: what an interrupted writer has left is repaired on a copy in memory. Fails with
    /// [`store::ErrorKind::Locked`] while somebody has it open.
    pub fn read(folder: &Arc<dyn Folder>) -> Result<State> {
        let store = folder.open(NAME, Mode::Read)?;
        store.lock(Lock::Shared)?;
        let len = store.len()?;
        if len > MAX_LEN {
            return Err(Error::damaged(format!("it is too large: {len} bytes")));
        }
        let mut bytes = vec![0; len as usize];
        store.read_at(&mut bytes, 0)?;
        drop(store);
        let (file, state, _) = File::open(Medium::Copy(Arc::new(Mutex::new(bytes))))?;
        file.close();
        Ok(state)
    }

    /// The rows as last committed.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The same, to keep.
    pub fn shared(&self) -> Arc<State> {
        Arc::clone(&self.state)
    }

    /// Changes the rows in one durable transaction. On an error nothing has changed; see the module for [`ErrorKind::Unsure`].
    /// Rows that break an invariant are refused ([`ErrorKind::Invalid`]). A change that changes nothing costs nothing.
    pub fn commit(&mut self, change: impl FnOnce(&mut State)) -> Result<()> {
        let mut next = State::clone(&self.state);
        change(&mut next);
        if next.machine != self.state.machine {
            next.at = Timestamp::now().max(just_after(self.state.at));
        }
        let rows = Rows::between(Some(&self.state), &next)?;
        if rows.0.is_empty() {
            return Ok(());
        }
        check(&next).map_err(|why| Error::new(ErrorKind::Invalid, why))?;
        match self.file.take() {
            Some(file) => match file.write(&rows) {
                Ok(()) => self.file = Some(file),
                Err(error) => {
                    file.close();
                    if !self.makes_room(&error) {
                        return Err(self.start_over(error));
                    }
                    self.file = Some(File::create(&self.folder, &next).map_err(Error::unsure)?);
                }
            },
            None => self.file = Some(self.write_anew(&next).map_err(Error::unsure)?),
        }
        self.state = Arc::new(next);
        Ok(())
    }

    /// Whether it was for want of room, and there is some now: the reserve's.
    fn makes_room(&self, error: &Error) -> bool {
        error.kind == ErrorKind::Store(store::ErrorKind::NoSpace) && reserve::give_up(&*self.folder)
    }

    fn write_anew(&self, state: &State) -> Result<File> {
        match File::create(&self.folder, state) {
            Err(error) if self.makes_room(&error) => File::create(&self.folder, state),
            made => made,
        }
    }

    /// Writes the file anew with the rows in memory, after a commit that failed with `error`.
    fn start_over(&mut self, error: Error) -> Error {
        match self.write_anew(&self.state) {
            Ok(file) => {
                self.file = Some(file);
                error
            }
            Err(_) => error.unsure(),
        }
    }

    /// Closes the file in good order: the next one who opens it has nothing to repair.
    pub fn close(self) {
        // Dropping does it.
        drop(self);
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            file.close();
        }
    }
}

/// Copies a ledger's file as it is to another name, durable when this returns. What an attempt that died has left there is replaced.
pub(crate) fn keep_copy(folder: &dyn Folder, ledger: &dyn Store, name: &str) -> store::Result<()> {
    match folder.unlink(name) {
        Err(error) if error.kind != store::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let copy = folder.create(name)?;
    let (len, mut at, mut buffer) = (ledger.len()?, 0, vec![0; 1 << 20]);
    while at < len {
        let piece = (len - at).min(buffer.len() as u64);
        ledger.read_at(&mut buffer[..piece as usize], at)?;
        copy.write_at(&buffer[..piece as usize], at)?;
        at += piece;
    }
    copy.sync()?;
    folder.sync()
}

/// The moment after this one.
pub(crate) fn just_after(at: Timestamp) -> Timestamp {
    at.saturating_add(SignedDuration::from_nanos(1)).unwrap_or(at)
}

fn check(state: &State) -> std::result::Result<(), String> {
    state.machine.check()
}

/// A database on a store or on a copy of one.
#[derive(Debug)]
struct File {
    database: Database,
}

impl File {
    /// Makes a ledger's file with these rows: whole and durable under its name, or not there at all.
    fn create(folder: &Arc<dyn Folder>, state: &State) -> Result<Self> {
        match folder.unlink(NEW) {
            Err(error) if error.kind != store::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let store = folder.create(NEW)?;
        let made = Self::fill(store, state).and_then(|file| {
            let named = folder.rename(NEW, NAME).and_then(|()| folder.sync());
            named.map(|()| file).map_err(Error::from)
        });
        if made.is_err() {
            // If it cannot be removed it is in nobody's way: the next creation does it.
            let _ = folder.unlink(NEW);
        }
        made
    }

    fn fill(store: Arc<dyn Store>, state: &State) -> Result<Self> {
        store.lock(Lock::Exclusive)?;
        let database = guarded(|| Ok(builder().create_with_backend(Medium::Store(store))?))?;
        let file = Self { database };
        match file.write(&Rows::between(None, state)?) {
            Ok(()) => Ok(file),
            Err(error) => {
                file.close();
                Err(error)
            }
        }
    }

    /// Opens a ledger's file, and reads its rows and their format.
    fn open(medium: Medium) -> Result<(Self, State, u32)> {
        // To redb an empty file is a database to be made.
        if medium.len()? == 0 {
            return Err(Error::damaged("it is empty"));
        }
        let database = guarded(|| Ok(builder().set_check_integrity_on_open(true).create_with_backend(medium)?))?;
        let file = Self { database };
        match file.read() {
            Ok((state, format)) => Ok((file, state, format)),
            Err(error) => {
                file.close();
                Err(error)
            }
        }
    }

    fn read(&self) -> Result<(State, u32)> {
        guarded(|| {
            let rows = self.database.begin_read()?;
            let once = |key: &str| -> Result<Option<Vec<u8>>> {
                Ok(rows.open_table(LEDGER)?.get(key)?.map(|value| value.value().to_vec()))
            };
            let format: u32 = parse("format", once("format")?)?;
            if format > FORMAT {
                return Err(Error::new(
                    ErrorKind::Newer,
                    format!(
                        "it is of format {format}; this program knows formats up to {FORMAT}. Use the newer program"
                    ),
                ));
            }
            let Head { id, name, note, created, policy, next_disk } = parse("machine", once("machine")?)?;
            let now: Now = parse("now", once("now")?)?;
            let at = once("at")?.map(|at| parse("at", Some(at))).transpose()?.unwrap_or_else(Timestamp::now);
            let snapshots = read_table(&rows, SNAPSHOTS, |row: &Snapshot| row.id)?;
            let trash = read_table(&rows, TRASH, |row: &Trash| row.id)?;
            let layers = read_table(&rows, LAYERS, |row: &LayerRow| row.id)?;
            let jobs = read_table(&rows, JOBS, |row: &Arc<Job>| row.id)?;
            let journal = read_table(&rows, JOURNAL, |row: &Journal| row.job)?;
            let (snapshots, trash, layers) = (snapshots.into(), trash.into(), layers.into());
            let machine = Machine { id, name, note, created, policy, next_disk, now, snapshots, trash, layers };
            let state = State { machine, at, jobs, journal };
            check(&state).map_err(Error::damaged)?;
            Ok((state, format))
        })
    }

    fn write(&self, rows: &Rows) -> Result<()> {
        guarded(|| {
            let transaction = self.database.begin_write()?;
            for Row { table, key, value } in &rows.0 {
                let mut table = transaction.open_table(*table)?;
                match value {
                    Some(value) => table.insert(key.as_str(), value.as_slice())?,
                    None => table.remove(key.as_str())?,
                };
            }
            // redb's default durability: synced when commit returns.
            transaction.commit()?;
            Ok(())
        })
    }

    fn close(self) {
        // A file that cannot be closed in good order is repaired by whoever opens it next.
        let _ = guarded(|| {
            drop(self);
            Ok(())
        });
    }
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE);
    builder
}

/// Runs what calls redb. It checks a file's checksums as it opens it, but may still panic on a damaged one; that must not take the
/// worker down.
fn guarded<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_| Err(Error::damaged("its database broke off reading it")))
}

/// The machine's own row.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Head {
    id: MachineId,
    name: String,
    note: String,
    created: Timestamp,
    policy: Policy,
    next_disk: u32,
}

impl Head {
    fn of(machine: &Machine) -> Self {
        // Taken apart by name, so that a new part of a machine cannot be forgotten here.
        let Machine { id, name, note, created, policy, next_disk, now: _, snapshots: _, trash: _, layers: _ } = machine;
        Self {
            id: *id,
            name: name.clone(),
            note: note.clone(),
            created: *created,
            policy: policy.clone(),
            next_disk: *next_disk,
        }
    }
}

/// The rows that a transaction writes.
#[derive(Default)]
struct Rows(Vec<Row>);

struct Row {
    table: Table,
    key: String,
    /// `None`: the row goes.
    value: Option<Vec<u8>>,
}

impl Rows {
    /// What makes the rows of `old` (none at all, if there are none) those of `new`.
    fn between(old: Option<&State>, new: &State) -> Result<Self> {
        let mut rows = Self::default();
        rows.once("format", old.map(|_| &FORMAT), &FORMAT)?;
        rows.once("machine", old.map(|old| Head::of(&old.machine)).as_ref(), &Head::of(&new.machine))?;
        rows.once("at", old.map(|old| &old.at), &new.at)?;
        rows.once("now", old.map(|old| &old.machine.now), &new.machine.now)?;
        rows.table(SNAPSHOTS, old.map(|old| &*old.machine.snapshots), &new.machine.snapshots)?;
        rows.table(TRASH, old.map(|old| &*old.machine.trash), &new.machine.trash)?;
        rows.table(LAYERS, old.map(|old| &*old.machine.layers), &new.machine.layers)?;
        rows.table(JOBS, old.map(|old| &old.jobs), &new.jobs)?;
        rows.table(JOURNAL, old.map(|old| &old.journal), &new.journal)?;
        Ok(rows)
    }

    fn put<V: Serialize>(&mut self, table: Table, key: String, value: &V) -> Result<()> {
        let json = serde_json::to_vec(value)
            .map_err(|why| Error::new(ErrorKind::Invalid, format!("row {key} cannot be written: {why}")))?;
        self.0.push(Row { table, key, value: Some(json) });
        Ok(())
    }

    fn once<V: Serialize + PartialEq>(&mut self, key: &str, old: Option<&V>, new: &V) -> Result<()> {
        if old == Some(new) { Ok(()) } else { self.put(LEDGER, key.to_owned(), new) }
    }

    fn table<K, V>(&mut self, table: Table, old: Option<&BTreeMap<K, V>>, new: &BTreeMap<K, V>) -> Result<()>
    where
        K: Ord + Display,
        V: Serialize + PartialEq,
    {
        if old.is_some_and(|old| std::ptr::eq(old, new)) {
            return Ok(());
        }
        for (key, value) in new {
            if old.and_then(|old| old.get(key)) != Some(value) {
                self.put(table, key.to_string(), value)?;
            }
        }
        for key in old.into_iter().flat_map(BTreeMap::keys).filter(|key| !new.contains_key(key)) {
            self.0.push(Row { table, key: key.to_string(), value: None });
        }
        Ok(())
    }
}

fn read_table<K, V>(rows: &redb::ReadTransaction, table: Table, id: impl Fn(&V) -> K) -> Result<BTreeMap<K, V>>
where
    K: Ord + Display,
    V: DeserializeOwned,
{
    let table = match rows.open_table(table) {
        // A table is made with its first row.
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(BTreeMap::new()),
        table => table?,
    };
    let mut read = BTreeMap::new();
    for row in table.iter()? {
        let (key, value) = row?;
        let row: V = parse(key.value(), Some(value.value().to_vec()))?;
        let id = id(&row);
        if id.to_string() != key.value() {
            return Err(Error::damaged(format!("row {id} is filed under {}", key.value().escape_debug())));
        }
        read.insert(id, row);
    }
    Ok(read)
}

fn parse<V: DeserializeOwned>(key: &str, json: Option<Vec<u8>>) -> Result<V> {
    let key = key.escape_debug();
    let json = json.ok_or_else(|| Error::damaged(format!("row {key} is missing")))?;
    serde_json::from_slice(&json).map_err(|why| Error::damaged(format!("row {key} cannot be read: {why}")))
}

/// What redb stands on.
#[derive(Debug)]
enum Medium {
    /// The file.
    Store(Arc<dyn Store>),
    /// A copy of it: what is repaired there is gone afterwards.
    Copy(Arc<Mutex<Vec<u8>>>),
}

impl StorageBackend for Medium {
    fn len(&self) -> io::Result<u64> {
        match self {
            Self::Store(store) => store.len().map_err(io::Error::other),
            Self::Copy(bytes) => Ok(held(bytes).len() as u64),
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Store(store) => store.read_at(out, offset).map_err(io::Error::other),
            Self::Copy(bytes) => {
                let bytes = held(bytes);
                out.copy_from_slice(bytes.get(range(offset, out.len())?).ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > MAX_LEN {
            return Err(io::Error::other("a ledger does not grow so large"));
        }
        match self {
            Self::Store(store) => store.set_len(len).map_err(io::Error::other),
            Self::Copy(bytes) => {
                held(bytes).resize(len as usize, 0);
                Ok(())
            }
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        match self {
            Self::Store(store) => store.sync().map_err(io::Error::other),
            Self::Copy(_) => Ok(()),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Store(store) => store.write_at(data, offset).map_err(io::Error::other),
            Self::Copy(bytes) => {
                let mut bytes = held(bytes);
                let place = bytes.get_mut(range(offset, data.len())?).ok_or(io::ErrorKind::UnexpectedEof)?;
                place.copy_from_slice(data);
                Ok(())
            }
        }
    }
}

fn held(bytes: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

fn range(offset: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok();
    let range = start.and_then(|start| Some(start..start.checked_add(len)?));
    range.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// What went wrong, coarsely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The store said no; see the source. Nothing has changed.
    Store(store::ErrorKind),
    /// The file is damaged, or no ledger.
    Damaged,
    /// It was written by a newer program.
    Newer,
    /// The rows to be written break an invariant: a mistake of the program. Nothing has changed.
    Invalid,
    /// Nothing has changed in memory, but nobody knows what the file holds: before the change or after it.
    Unsure,
}

/// A failed operation on a ledger.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What went wrong, coarsely.
    pub kind: ErrorKind,
    /// What happened, for people.
    pub message: String,
    /// What the store said, if it was the store.
    #[source]
    pub source: Option<store::Error>,
}

/// The result of an operation on a ledger.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    fn damaged(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Damaged, message)
    }

    fn unsure(self) -> Self {
        let message = format!("{}; whether the last change was kept is not known", self.message);
        Self { kind: ErrorKind::Unsure, message, ..self }
    }

    /// For the user: about the ledger in the machine's folder `path`.
    pub fn problem(&self, path: &Path) -> Problem {
        let ledger = path.join(NAME).display().to_string();
        match self.kind {
            ErrorKind::Damaged => Problem::damaged(format!("{ledger} is damaged: {}", self.message)),
            ErrorKind::Newer => Problem::refused(format!("{ledger} cannot be used: {}", self.message)),
            ErrorKind::Store(store::ErrorKind::NotFound) => Problem::not_found(format!("{ledger} is not there")),
            ErrorKind::Store(store::ErrorKind::Locked) => {
                Problem::refused(format!("{ledger} is in use by another process"))
            }
            ErrorKind::Store(store::ErrorKind::NoSpace) => {
                Problem::failed(format!("{ledger} could not be written: {}", self.message))
                    .hint("free some space on that file system, then try again")
            }
            ErrorKind::Store(_) | ErrorKind::Unsure => Problem::failed(format!("{ledger}: {}", self.message)),
            ErrorKind::Invalid => {
                Problem::failed(format!("{ledger} was not changed, for the change makes no sense: {}", self.message))
            }
        }
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        Self { kind: ErrorKind::Store(error.kind), message: error.to_string(), source: Some(error) }
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        redb::Error::from(redb::StorageError::Io(error)).into()
    }
}

impl From<redb::Error> for Error {
    fn from(error: redb::Error) -> Self {
        match error {
            redb::Error::Io(error) => match error.downcast::<store::Error>() {
                Ok(error) => error.into(),
                // redb's own: not a database, or cut off.
                Err(error) => Self::damaged(error.to_string()),
            },
            error => Self::damaged(error.to_string()),
        }
    }
}

macro_rules! from_redb {
    ($($name:ident),*) => {$(
        impl From<redb::$name> for Error {
            fn from(error: redb::$name) -> Self {
                redb::Error::from(error).into()
            }
        }
    )*};
}

from_redb!(StorageError, DatabaseError, TransactionError, TableError, CommitError);
