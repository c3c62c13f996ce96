//! VHDX (MS-VHDX), also `.avhdx`: fixed, dynamic and differencing.
//!
//! ```text
//!   0        1 MiB   2 MiB      3 MiB       4 MiB …
//!   │headers │ log   │ metadata │ table    │ blocks, 2 MiB-aligned; bitmap blocks of 1 MiB in pairs │
//!   (where we put things; a reader takes them from wherever the headers and the region table say)
//!
//!   table entry ──► block:   not present │ zero │ full │ partial: the bitmap says which sectors are here
//! ```
//!
//! Life of a layer: [`create`] or [`open`] → `map`, `prepare`/`commit`, `flush` from any number of threads → `close`.
//!
//! Rules:
//! - The table and the bitmaps in memory are the truth. Readers take them without a lock; they change under one lock (`Meta`).
//! - Committed changes gather in memory until [`Layer::flush`]: it takes the set of changed pages, syncs the data that they expose,
//!   writes one log entry, syncs, and only then writes the pages in their places. So a flush costs two syncs, however many blocks
//!   it makes real, and data is durable before the metadata that exposes it.
//! - A place is handed to another block only after the entry that freed it is durable and no ticket that could still write there
//!   is left; old bytes in it are punched out first.
//! - What is committed and not flushed dies with the process, unless it is carried over: see [`carry`].
//! - A failed write or sync of metadata poisons the layer: it can still be read, but takes no change any more.

mod alloc;
mod bat;
mod bitmap;
mod carry;
pub(crate) mod check;
mod create;
mod flush;
mod format;
mod header;
mod journal;
mod log;
mod map;
mod metadata;
mod open;
mod pack;
mod page;
mod replay;
mod resize;
mod units;
mod write;

pub use carry::Carry;
pub use create::{Options, Parent, create, create_carried};
pub use open::{open, open_carried};

use crate::layer::{Change, Format, Kind, Layer, LayerInfo, ParentLink, Run, Ticket, check_note};
use crate::{Error, ErrorKind, Result};
use bat::{Bat, Geometry};
use bitmap::{BitmapPage, Bitmaps};
use flush::Session;
use header::Region;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use store::Store;
use uuid::Uuid;

/// One VHDX file.
pub struct VhdxLayer(Arc<Inner>);

/// The layer behind its handle; tickets hold it too.
pub(crate) struct Inner {
    store: Arc<dyn Store>,
    file: String,
    writable: bool,
    /// For all but the size, which may change: see [`Inner::geometry`].
    shape: Geometry,
    /// Virtual size in bytes.
    size: AtomicU64,
    kind: Kind,
    disk_id: Uuid,
    metadata_region: Region,
    bat: Bat,
    bitmaps: Bitmaps,
    /// Tickets that may write to a block's place, counted by the block's number modulo the length.
    users: Box<[AtomicU32]>,
    meta: Mutex<Meta>,
    session: Mutex<Session>,
    ids: Mutex<Ids>,
    /// Something was written since the last flush began.
    wrote: AtomicBool,
    /// This session has changed the file's ids; the first change needs that.
    started: AtomicBool,
    poisoned: AtomicBool,
    closed: AtomicBool,
}

/// What changes under the metadata lock, besides the table and the bitmaps.
#[derive(Debug)]
struct Meta {
    space: alloc::Space,
    /// Where the table lies.
    bat_region: Region,
    dirty: Dirty,
    /// Blocks that have a place which the table does not name yet. Such a place holds zeros outside of its tickets' ranges.
    pending: HashMap<u64, write::Pending>,
    /// Bitmap blocks that have a place which the table does not name yet, by chunk.
    pending_bitmaps: HashMap<u64, u64>,
    /// Places that the table in memory has given up, and the table in the file may not have.
    freed: Vec<write::Freed>,
    /// Places of bitmap blocks that were moved since the last flush.
    freed_bitmaps: Vec<u64>,
    /// Places that the table in the file has given up too.
    draining: Vec<write::Freed>,
    next_ticket: u64,
    /// Where changes are written down before they are exposed, if they are to outlive the process.
    carry: Option<carry::Writer>,
}

/// Pages that differ from the file's.
#[derive(Debug, Default)]
struct Dirty {
    /// Of the table.
    bat: BTreeSet<u64>,
    /// Of bitmaps.
    bitmaps: BTreeSet<BitmapPage>,
}

impl Dirty {
    fn extend(&mut self, other: Self) {
        self.bat.extend(other.bat);
        self.bitmaps.extend(other.bitmaps);
    }
}

/// The ids as they stand in the file.
#[derive(Debug, Clone)]
struct Ids {
    data_id: Uuid,
    parent: Option<metadata::Locator>,
    link: Option<ParentLink>,
}

/// Counters of users; more than the requests that are ever under way at once.
const USERS: usize = 1024;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds these locks panics half-way through a change; a poisoned mutex would hide the first panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// How the disk, as large as it is now, is cut into blocks.
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size.load(Ordering::Acquire), ..self.shape }
    }

    fn error(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(kind, self.file.clone(), message)
    }

    /// Refuses changes to a layer that cannot take them.
    fn check_writable(&self) -> Result<()> {
        if !self.writable {
            return Err(self.error(ErrorKind::Invalid, "the image is open for reading only"));
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(self.error(ErrorKind::Invalid, "the image is closed"));
        }
        self.check_sound()
    }

    fn check_sound(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(self.error(ErrorKind::Poisoned, "an earlier write of this image failed; open it again"));
        }
        Ok(())
    }

    /// Passes a result on, and distrusts the layer from now on if it is an error.
    fn poison_on_error<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }

    /// The same, but that there is no room is an answer and no fault.
    fn poison_on_fault<T>(&self, result: Result<T>) -> Result<T> {
        match &result {
            Err(error) if error.kind == ErrorKind::NoSpace => result,
            _ => self.poison_on_error(result),
        }
    }

    fn users(&self, block: u64) -> &AtomicU32 {
        &self.users[block as usize % USERS]
    }
}

impl fmt::Debug for VhdxLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VhdxLayer").field(&self.0.file).finish()
    }
}

impl Layer for VhdxLayer {
    fn info(&self) -> LayerInfo {
        let inner = &self.0;
        let ids = lock(&inner.ids);
        LayerInfo {
            format: Format::Vhdx,
            kind: inner.kind,
            size: inner.geometry().size,
            sector_size: inner.geometry().sector as u32,
            block_size: inner.geometry().block as u32,
            data_id: ids.data_id,
            disk_id: inner.disk_id,
            parent: ids.link.clone(),
        }
    }

    fn store(&self) -> &Arc<dyn Store> {
        &self.0.store
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Run>) -> Result<()> {
        self.0.map(offset, len, out)
    }

    fn prepare(&self, offset: u64, len: u64, change: Change) -> Result<Ticket> {
        write::prepare(&self.0, offset, len, change)
    }

    fn commit(&self, ticket: Ticket) -> Result<()> {
        write::commit(&self.0, ticket)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn wrote(&self) {
        self.0.wrote();
    }

    fn relink(&self, data_id: Option<Uuid>, parent: Option<ParentLink>) -> Result<()> {
        self.0.relink(data_id, parent)
    }

    fn settle(&self) -> Result<()> {
        lock(&self.0.session).data_identified = true;
        Ok(())
    }

    fn check_resize(&self, size: u64) -> Result<()> {
        self.0.check_resize(size)
    }

    fn resize(&self, size: u64, _beneath: u64) -> Result<()> {
        self.0.resize(size)
    }

    fn forget(&self, offset: u64, len: u64) -> Result<()> {
        self.0.forget(offset, len)
    }

    fn pack(&self, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool> {
        self.0.pack(progress)
    }

    fn force_parent(&self, parent: ParentLink) -> Result<()> {
        self.0.force_parent(parent)
    }

    fn forced(&self) -> Option<Uuid> {
        lock(&self.0.ids).parent.as_ref().and_then(metadata::Locator::forced)
    }

    fn note(&self) -> Result<Option<Vec<u8>>> {
        self.0.note()
    }

    fn set_note(&self, note: &[u8]) -> Result<()> {
        check_note(self, note)?;
        self.0.set_note(note)
    }

    fn survives(&self) -> bool {
        lock(&self.0.meta).carry.is_some()
    }

    fn close(&self) -> Result<()> {
        self.0.close()
    }
}
