//! Raw files: the disk's bytes as they are.

use crate::layer::{Change, Extent, Format, Kind, Layer, LayerInfo, ParentLink, Run, Source, Ticket};
use crate::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use store::{Lock, Mode, Store};
use uuid::Uuid;

/// Bytes in a sector of a raw disk.
const SECTOR: u64 = 512;

/// One raw file. Its disk has the file's length, rounded up to whole sectors; what the file lacks of the last one reads as zeros.
#[derive(Debug)]
pub struct RawLayer {
    store: Arc<dyn Store>,
    writable: bool,
    /// Bytes that the file has.
    length: u64,
    wrote: AtomicBool,
    poisoned: AtomicBool,
}

/// Opens a file as a raw disk. For [`Mode::Write`] its length is made a multiple of the sector size.
pub fn open(store: Arc<dyn Store>, mode: Mode) -> Result<Arc<RawLayer>> {
    let mut length = store.len()?;
    let whole = length.checked_next_multiple_of(SECTOR).filter(|length| *length != 0);
    let whole = whole.ok_or_else(|| Error::new(ErrorKind::Invalid, store.name(), "an empty file is no disk"))?;
    if mode == Mode::Write && whole != length {
        store.set_len(whole)?;
        length = whole;
    }
    Ok(Arc::new(RawLayer {
        store,
        writable: mode == Mode::Write,
        length,
        wrote: AtomicBool::new(false),
        poisoned: AtomicBool::new(false),
    }))
}

/// Makes a raw disk of `size` bytes, a multiple of 512, in an empty file, and opens it for writing, locked.
pub fn create(store: Arc<dyn Store>, size: u64) -> Result<Arc<RawLayer>> {
    store.lock(Lock::Exclusive)?;
    if !store.is_empty()? {
        return Err(Error::new(ErrorKind::Exists, store.name(), "the file is not empty"));
    }
    if size == 0 || !size.is_multiple_of(SECTOR) {
        let message = format!("a raw disk has whole sectors of {SECTOR} bytes, not {size} bytes");
        return Err(Error::new(ErrorKind::Invalid, store.name(), message));
    }
    store.set_len(size)?;
    store.sync()?;
    open(store, Mode::Write)
}

impl RawLayer {
    fn size(&self) -> u64 {
        self.length.next_multiple_of(SECTOR)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size());
        if inside && offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) {
            return Ok(());
        }
        let message = format!("{len} bytes at {offset} are no sectors of a disk of {} bytes", self.size());
        Err(Error::new(ErrorKind::Invalid, self.store.name(), message))
    }

    fn check_writable(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Poisoned,
                self.store.name(),
                "an earlier sync of this image failed; open it again",
            ));
        }
        if !self.writable {
            return Err(Error::new(ErrorKind::Invalid, self.store.name(), "the image is open for reading only"));
        }
        Ok(())
    }
}

impl Layer for RawLayer {
    fn info(&self) -> LayerInfo {
        LayerInfo {
            format: Format::Raw,
            kind: Kind::Fixed,
            size: self.size(),
            sector_size: SECTOR as u32,
            block_size: SECTOR as u32,
            data_id: Uuid::nil(),
            disk_id: Uuid::nil(),
            parent: None,
        }
    }

    fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Run>) -> Result<()> {
        self.check_range(offset, len)?;
        let (end, there) = (offset + len, self.length.clamp(offset, offset + len));
        let runs = [(offset, there, Source::Data(offset)), (there, end, Source::Zero)];
        out.extend(runs.into_iter().filter(|(start, end, _)| start < end).map(|(start, end, source)| Run {
            offset: start,
            len: end - start,
            source,
        }));
        Ok(())
    }

    fn prepare(&self, offset: u64, len: u64, change: Change) -> Result<Ticket> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        // Zeroing is done at commit, as a hole.
        let extents = match change {
            Change::Data if len > 0 => vec![Extent { offset, at: offset, len }],
            _ => Vec::new(),
        };
        Ok(Ticket { offset, len, change, extents, pin: None })
    }

    fn commit(&self, ticket: Ticket) -> Result<()> {
        self.check_writable()?;
        if ticket.change == Change::Zero && ticket.len > 0 {
            self.store.punch(ticket.offset, ticket.len)?;
        }
        self.wrote();
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        if self.wrote.swap(false, Ordering::AcqRel) {
            self.check_writable()?;
            self.store.sync().inspect_err(|_| self.poisoned.store(true, Ordering::Release))?;
        }
        Ok(())
    }

    fn wrote(&self) {
        self.wrote.store(true, Ordering::Release);
    }

    fn relink(&self, _data_id: Option<Uuid>, _parent: Option<ParentLink>) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, self.store.name(), "a raw file has no ids"))
    }

    fn close(&self) -> Result<()> {
        self.flush()
    }
}
