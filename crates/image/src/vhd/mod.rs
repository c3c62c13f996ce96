//! VHD (Microsoft's Virtual Hard Disk Image Format 1.0), also `.avhd`: fixed, dynamic and differencing.
//!
//! ```text
//!   fixed     │ data …                                                                       │footer│
//!   others    │footer│header│ (room) │ table │ … │bitmap│data … │ … │bitmap│data … │ … grown … │footer│
//!              copy                                    └ 4 KiB-aligned ┘
//!
//!   table entry ──► block:  none: zeros, or the parent's │ place: the bitmap says which sectors are not the parent's
//! ```
//!
//! Life of a layer: [`create`] or [`open`] → `map`, `prepare`/`commit`, `flush` from any number of threads → `close`.
//!
//! Rules, by which the format does without a log:
//! - The table and the bitmaps in memory are the truth. Readers take them without a lock; they change under one lock (`Meta`).
//! - A sector of 512 bytes is what is written whole or not at all. Each sector of the table and of a bitmap is sound without the
//!   others, given that what they expose is durable: [`Layer::flush`] writes new blocks' bitmaps, syncs them and all data, then writes
//!   the sectors that changed, and syncs.
//! - A block, once placed, stays, but for what nobody else uses meanwhile: resizing, packing, a fold that gives space back. Zeros over a
//!   parent's data are bits and zeros; zeros without a parent are a hole in the block.
//! - The file grows by a new footer behind its new end; the old one stays where it was. Footers are replaced one copy after the
//!   other. The header is never changed in place: a new one is written beside it, and the footer names it.
//! - A file that others made may hold what only they know of. It is theirs until its size or its blocks' places change; then the footer
//!   says that it is ours, before anything else happens.
//! - What is committed and not flushed dies with the process. There is no journal for it as VHDX has: a chain whose writes must
//!   survive ([`crate::Chain::surviving`]) flushes before it acknowledges what a layer came to hold, which is true of every format.
//! - The footer's UUID is what a child names. The format says nothing of when it changes; with us the first change of a session gives
//!   a new one, unless the id was settled, so that a parent that was changed is noticed.
//! - A failed write or sync of metadata poisons the layer: it can still be read, but takes no change any more.

mod alloc;
mod bat;
mod bitmap;
pub(crate) mod check;
mod create;
mod flush;
mod footer;
mod format;
mod map;
mod open;
mod pack;
mod parent;
mod resize;
mod write;

pub use create::{Options, Parent, create};
pub use open::{is_padded, open};

use crate::layer::{Change, Format, Layer, LayerInfo, ParentLink, Run, Ticket, check_note};
use crate::{Error, ErrorKind, Result};
use bat::{Bat, Geometry};
use bitmap::{BitmapSector, Bitmaps};
use flush::Session;
use footer::Footer;
pub(crate) use footer::TAIL_LENGTHS;
pub(crate) use format::FOOTER_COOKIE;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use store::Store;
use uuid::Uuid;

/// One VHD file.
pub struct VhdLayer(Arc<Inner>);

/// The layer behind its handle; tickets hold it too.
pub(crate) struct Inner {
    store: Arc<dyn Store>,
    file: String,
    writable: bool,
    /// For all but the size, which may change: see [`Inner::geometry`].
    shape: Geometry,
    /// Virtual size in bytes.
    size: AtomicU64,
    /// Where the block table lies.
    table_at: u64,
    bat: Bat,
    bitmaps: Bitmaps,
    meta: Mutex<Meta>,
    session: Mutex<Session>,
    ids: Mutex<Ids>,
    /// Something was written since the last flush began.
    wrote: AtomicBool,
    /// This session has changed the file's id, or need not; the first change needs that.
    started: AtomicBool,
    poisoned: AtomicBool,
    closed: AtomicBool,
}

/// What changes under the metadata lock, besides the table and the bitmaps. Taken after the session's.
#[derive(Debug)]
struct Meta {
    space: alloc::Space,
    footer: Footer,
    /// The copies of the footer in the file that equal it.
    tail_sound: bool,
    head_sound: bool,
    dirty: Dirty,
    /// Blocks that have a place which no table names yet. Such a place holds zeros outside of its tickets' ranges.
    pending: HashMap<u64, write::Pending>,
    /// Stretches of the file that the table in memory has given up, and the table in the file may not have.
    freed: Vec<Range<u64>>,
    next_ticket: u64,
}

/// What differs from the file's.
#[derive(Debug, Default)]
struct Dirty {
    /// Sectors of the table.
    bat: BTreeSet<u64>,
    /// Sectors of bitmaps, of blocks that the table in the file names.
    bitmaps: BTreeSet<BitmapSector>,
    /// Blocks that the table in the file does not name yet.
    placed: BTreeSet<u64>,
}

impl Dirty {
    fn extend(&mut self, other: Self) {
        self.bat.extend(other.bat);
        self.bitmaps.extend(other.bitmaps);
        self.placed.extend(other.placed);
    }
}

/// The ids as they stand in the file.
#[derive(Debug, Clone)]
struct Ids {
    data_id: Uuid,
    link: Option<ParentLink>,
}

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

    /// Passes on what finding a place came to. No space, or no room in the format, is an answer and no fault.
    fn poison_on_fault<T>(&self, result: Result<T>) -> Result<T> {
        match &result {
            Err(Error { kind: ErrorKind::NoSpace | ErrorKind::Unsupported, .. }) => result,
            _ => self.poison_on_error(result),
        }
    }
}

impl fmt::Debug for VhdLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VhdLayer").field(&self.0.file).finish()
    }
}

impl Layer for VhdLayer {
    fn info(&self) -> LayerInfo {
        let inner = &self.0;
        let ids = lock(&inner.ids);
        LayerInfo {
            format: Format::Vhd,
            kind: inner.shape.kind,
            size: inner.geometry().size,
            sector_size: format::SECTOR as u32,
            block_size: inner.shape.block as u32,
            data_id: ids.data_id,
            // The only id of the format is the one that names the content.
            disk_id: Uuid::nil(),
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
        self.0.relink(data_id, parent.as_ref())
    }

    fn settle(&self) -> Result<()> {
        lock(&self.0.session).identified = true;
        Ok(())
    }

    fn check_resize(&self, size: u64) -> Result<()> {
        self.0.check_resize(size)
    }

    fn resize(&self, size: u64, beneath: u64) -> Result<()> {
        self.0.resize(size, beneath)
    }

    fn forget(&self, offset: u64, len: u64) -> Result<()> {
        self.0.forget(offset, len)
    }

    fn pack(&self, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool> {
        self.0.pack(progress)
    }

    fn note(&self) -> Result<Option<Vec<u8>>> {
        self.0.note()
    }

    fn set_note(&self, note: &[u8]) -> Result<()> {
        check_note(self, note)?;
        self.0.set_note(note)
    }

    fn close(&self) -> Result<()> {
        self.0.close()
    }
}
