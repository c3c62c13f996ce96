//! The contract that every image format meets. Read this first.
//!
//! A [`Layer`] is one image file. It never moves guest data: it says *where* bytes lie ([`Layer::map`]) and hands out write
//! tickets ([`Layer::prepare`] → the caller writes the data into the store → [`Layer::commit`]). A ticket that is dropped is a
//! write that never happened. What a committed ticket exposed is read back at once through `map`, and is durable after the next
//! [`Layer::flush`], which syncs data *before* the metadata that exposes it.
//!
//! ```text
//!   write:  prepare(range) ──► Ticket{extents} ──► store.write_at(extents) ──► commit(ticket)      (volatile)
//!   flush:  store.sync (data) ──► metadata, atomically (VHDX: one log entry) ──► store.sync        (durable)
//! ```
//!
//! All offsets and lengths are bytes of the virtual disk and multiples of its sector size unless said otherwise.

use crate::{Error, ErrorKind, Result};
use std::any::Any;
use std::fmt;
use std::sync::Arc;
use store::Store;
use uuid::Uuid;

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInfo {
    /// VHDX, VHD, raw.
    pub format: Format,
    /// Fixed, dynamic or differencing.
    pub kind: Kind,
    /// Virtual size in bytes; a multiple of `sector_size`.
    pub size: u64,
    /// Logical sector size in bytes: 512 or 4096.
    pub sector_size: u32,
    /// Allocation unit in bytes (a power of two); for raw files the sector size.
    pub block_size: u32,
    /// What a child's parent linkage must name (VHDX: the DataWriteGuid; VHD: the UUID). Nil where the format has none (raw).
    pub data_id: Uuid,
    /// The disk's identity as a guest may see it (VHDX: VirtualDiskId, copied from parent to child, so it is no proof of
    /// anything). Nil where the format has none (raw, VHD).
    pub disk_id: Uuid,
    /// What this image says of its parent; `None` unless it is differencing.
    pub parent: Option<ParentLink>,
}

/// The parent as a differencing image names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentLink {
    /// The parent's `data_id` when this image was made.
    pub linkage: Uuid,
    /// A second id that is accepted as well, while a merge changes the parent (VHDX: `parent_linkage2`; VHD: a locator of
    /// our own).
    pub linkage2: Option<Uuid>,
    /// The parent's name relative to this image, as written there (backslashes and all): a *name*, never opened as it stands.
    pub relative_path: Option<String>,
    /// An absolute Windows path, for display only.
    pub absolute_path: Option<String>,
}

impl ParentLink {
    /// The link to `parent`, which is to lie beside the child under `name`, a single path component; without a name only somebody who
    /// knows (the ledger) finds it. Its `data_id` is settled first, see [`Layer::settle`]; of a raw file it is nil.
    pub(crate) fn to(parent: &dyn Layer, name: Option<&str>) -> Result<Self> {
        if name.is_some_and(|name| matches!(name, "" | "." | "..") || name.contains(['/', '\\', ':', '\0'])) {
            let message = "a parent is named by a plain file name beside the child";
            return Err(Error::new(ErrorKind::Parent, parent.store().name(), message));
        }
        parent.settle()?;
        Ok(Self {
            linkage: parent.info().data_id,
            linkage2: None,
            relative_path: name.map(|name| format!(r".\{name}")),
            absolute_path: None,
        })
    }
}

/// An image file's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Bytes as they are.
    Raw,
    /// Microsoft's VHDX (MS-VHDX), also `.avhdx`.
    Vhdx,
    /// Microsoft's VHD, also `.avhd`.
    Vhd,
}

impl Format {
    /// Its name, as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Vhdx => "VHDX",
            Self::Vhd => "VHD",
        }
    }
}

/// How an image holds its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Every block has its place.
    Fixed,
    /// Blocks are placed when first written; the others read as zeros.
    Dynamic,
    /// Blocks are placed when first written; the others are the parent's.
    Differencing,
}

/// The longest note that an image holds, bytes; see [`Layer::note`].
pub const MAX_NOTE: usize = 64 << 10;

/// Where a run of bytes lies, as one layer sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// In this layer's file, from this file offset on.
    Data(u64),
    /// Zeros, said so by this layer: the parent is not asked.
    Zero,
    /// Not in this layer: the parent is asked (zeros if there is none).
    Absent,
}

/// A run of virtual bytes with one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Virtual offset in bytes.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Where it lies.
    pub source: Source,
}

/// Appends `run` to `out`, joined to the last run if that is of one source with it and of index `first` or later.
pub(crate) fn push_run(out: &mut Vec<Run>, first: usize, run: Run) {
    let joins = |last: &Run| match (last.source, run.source) {
        (Source::Data(last_at), Source::Data(at)) => last_at + last.len == at,
        (last, this) => last == this,
    };
    match out[first..].last_mut() {
        Some(last) if joins(last) => last.len += run.len,
        _ => out.push(run),
    }
}

/// Refuses a note that is too long.
pub(crate) fn check_note(layer: &dyn Layer, note: &[u8]) -> Result<()> {
    if note.len() <= MAX_NOTE {
        return Ok(());
    }
    let message = format!("a note has at most {MAX_NOTE} bytes, not {}", note.len());
    Err(Error::new(ErrorKind::Invalid, layer.store().name(), message))
}

/// What a ticket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The range gets new data, which the caller writes to the ticket's extents.
    Data,
    /// The range reads as zeros from now on, whatever a parent holds. A layer may return extents here too: parts that it can
    /// only zero by writing zeros; the caller writes them.
    Zero,
}

/// A permission to write: where the data goes, and what [`Layer::commit`] will expose.
///
/// Dropping it without `commit` undoes it: nothing it covered becomes visible. (A block that was allocated for it may be kept
/// for the next ticket.)
#[derive(Debug)]
pub struct Ticket {
    /// Virtual offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// What for.
    pub change: Change,
    /// Where to write: (virtual offset, file offset, length), in order of virtual offset. For [`Change::Data`] they cover the range.
    pub extents: Vec<Extent>,
    /// Holds what the layer must know until the ticket is committed or dropped.
    pub pin: Option<Box<dyn Pin>>,
}

/// A piece of a ticket's range and its place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Virtual offset in bytes.
    pub offset: u64,
    /// Offset in the layer's file, bytes.
    pub at: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What a layer hangs on a ticket to learn of its end; see [`Ticket::pin`]. (`Any`: the layer gets its own type back at commit.)
pub trait Pin: Any + Send + fmt::Debug {}

/// One image file. See the module's text for the protocol.
pub trait Layer: Send + Sync + fmt::Debug {
    /// What the image says of itself, as it stands now.
    fn info(&self) -> LayerInfo;

    /// The file, for reading and writing data at the offsets that `map` and tickets name.
    fn store(&self) -> &Arc<dyn Store>;

    /// Appends the runs that make up `[offset, offset + len)` to `out`, in order, without gaps, adjacent runs of one source joined.
    /// The range must lie inside the disk. Runs need no alignment to blocks.
    fn map(&self, offset: u64, len: u64, out: &mut Vec<Run>) -> Result<()>;

    /// A ticket to change `[offset, offset + len)`: places are found for all of it. Fails with nothing changed.
    fn prepare(&self, offset: u64, len: u64, change: Change) -> Result<Ticket>;

    /// Exposes what the ticket covers. The caller has written its extents.
    fn commit(&self, ticket: Ticket) -> Result<()>;

    /// Makes everything committed so far durable: data first, then the metadata that exposes it, atomically. Does nothing, and
    /// syncs nothing, when nothing was written since the last flush. Call [`Layer::wrote`] (or commit) for the layer to know.
    fn flush(&self) -> Result<()>;

    /// Tells the layer that data was written in place, by a ticket whose range was already exposed. (`commit` does it too.)
    fn wrote(&self);

    /// Changes the ids: this image's own `data_id`, and, for a differencing one, its link to the parent. Durable and atomic when it
    /// returns. `None` leaves a part as it is. For merges; see `merge.rs`.
    fn relink(&self, data_id: Option<Uuid>, parent: Option<ParentLink>) -> Result<()>;

    /// Settles `data_id`: from here on it stays what it is until the layer is closed, whatever is still written. To be called before
    /// a child is made that names it. (Otherwise the first write after opening changes it, so that nobody takes the changed file
    /// for the parent that it was.)
    fn settle(&self) -> Result<()> {
        Ok(())
    }

    /// Whether the disk may be made `size` bytes: what this refuses, [`Layer::resize`] refuses too, before anything has changed.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a size that no disk has, [`ErrorKind::Unsupported`] for one that this format cannot have, or if no size
    /// can be changed.
    fn check_resize(&self, _size: u64) -> Result<()> {
        let message = "the size of an image of this format cannot be changed";
        Err(Error::new(ErrorKind::Unsupported, self.store().name(), message))
    }

    /// Makes the disk `size` bytes. What is cut off is gone; what is added reads as zeros, whatever a parent holds there. Durable and
    /// atomic when it returns. What was not flushed is. Nobody may use the layer meanwhile, for places change.
    ///
    /// `beneath` is how far anything but zeros can show through where nothing is here, in bytes: the size of the layer below; `u64::MAX` if
    /// that is not known. (VHD has no zeros without a place: what nothing shows through is left absent.)
    fn resize(&self, size: u64, _beneath: u64) -> Result<()> {
        self.check_resize(size)
    }

    /// What this layer holds of the range is the parent's as well, durably: whole blocks of it may become [`Source::Absent`], and their
    /// places free with the next flush. Nobody may write the range meanwhile. A layer need not do it.
    fn forget(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    /// Moves what lies at the file's end into holes, so that [`Layer::close`] can cut the file. Nobody may use the layer meanwhile, for
    /// places change. `progress` is told bytes done and to do; if it says `false`, what was moved stays moved, and this returns `false`.
    /// A layer need not do it.
    fn pack(&self, _progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool> {
        Ok(true)
    }

    /// [`Layer::relink`] to a parent that is not the one this image was made over, because somebody insists. Where the format has a
    /// place for it the image remembers that: see [`Layer::forced`].
    fn force_parent(&self, parent: ParentLink) -> Result<()> {
        self.relink(None, Some(parent))
    }

    /// The id of the parent that this image was made over, if another one was forced on it.
    fn forced(&self) -> Option<Uuid> {
        None
    }

    /// The note in the image: bytes that mean nothing to it, at most [`MAX_NOTE`] of them. `None` if there is none, or an empty one, or no
    /// place for one.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is longer, and what reading the file says.
    fn note(&self) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// Leaves a note in the image, in place of the one that is there. Durable and atomic when it returns; what the disk reads as and its
    /// `data_id` stay, so that what stands on the image is not touched.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for more than [`MAX_NOTE`] bytes, [`ErrorKind::Unsupported`] where there is no place for it (a raw file, a
    /// fixed VHD): nothing has changed then.
    fn set_note(&self, _note: &[u8]) -> Result<()> {
        let message = "an image of this kind has no place for a note";
        Err(Error::new(ErrorKind::Unsupported, self.store().name(), message))
    }

    /// Whether what is committed outlives this process, flushed or not, as long as the host lives.
    fn survives(&self) -> bool {
        false
    }

    /// Flushes and leaves the file clean (VHDX: log empty). The layer is not to be written afterwards.
    fn close(&self) -> Result<()>;
}
