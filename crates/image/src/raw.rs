//! Raw files: the disk's bytes as they are.

use crate::layer::{Change, Extent, Format, Kind, Layer, LayerInfo, ParentLink, Run, Source, Ticket};
use crate::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use store::{Lock, Mode, Store};
use uuid::Uuid;

/// Bytes in a sector of a raw disk.
const SECTOR: u64 = 512;
/// The largest raw disk, bytes: what a file's length can be.
const MAX_SIZE: u64 = i64::MAX as u64;

/// One raw file. Its disk has the file's length, rounded up to whole sectors; what the file lacks of the last one reads as zeros.
#[derive(Debug)]
pub struct RawLayer {
    store: Arc<dyn Store>,
    writable: bool,
    /// Bytes of the disk.
    size: AtomicU64,
    wrote: AtomicBool,
    poisoned: AtomicBool,
    /// Held while it is being synced: who finds nothing to do must know that it is done.
    flushing: Mutex<()>,
}

/// Opens a file as a raw disk. For [`Mode::Write`] its length is made a multiple of the sector size.
pub fn open(store: Arc<dyn Store>, mode: Mode) -> Result<Arc<RawLayer>> {
    let length = store.len()?;
    let size = length.checked_next_multiple_of(SECTOR).filter(|size| *size != 0);
    let size = size.ok_or_else(|| Error::new(ErrorKind::Damaged, store.name(), "it is empty, and no disk"))?;
    let store = match mode {
        _ if size == length => store,
        Mode::Write => {
            store.set_len(size)?;
            store
        }
        Mode::Read => Arc::new(Padded { inner: store, length, size }),
    };
    Ok(Arc::new(RawLayer {
        store,
        writable: mode == Mode::Write,
        size: AtomicU64::new(size),
        wrote: AtomicBool::new(false),
        poisoned: AtomicBool::new(false),
        flushing: Mutex::default(),
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

/// A file for reading, with zeros behind its end up to the disk's.
#[derive(Debug)]
struct Padded {
    inner: Arc<dyn Store>,
    length: u64,
    size: u64,
}

impl Padded {
    fn denied(&self, operation: &'static str) -> store::Error {
        let detail = "the file is open for reading only".to_owned();
        store::Error { kind: store::ErrorKind::Denied, operation, name: self.name(), detail }
    }
}

impl Store for Padded {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn len(&self) -> store::Result<u64> {
        let inner = self.inner.len()?;
        Ok(if inner < self.length { inner } else { self.size })
    }

    fn set_len(&self, _len: u64) -> store::Result<()> {
        Err(self.denied("resize"))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> store::Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        if end <= self.length || end > self.size {
            // What lies past the disk is past the file as well: the file says so.
            return self.inner.read_at(buf, offset);
        }
        let (here, past) = buf.split_at_mut(self.length.saturating_sub(offset) as usize);
        past.fill(0);
        if here.is_empty() { Ok(()) } else { self.inner.read_at(here, offset) }
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> store::Result<()> {
        Err(self.denied("write"))
    }

    fn punch(&self, _offset: u64, _len: u64) -> store::Result<()> {
        Err(self.denied("zero"))
    }

    fn sync(&self) -> store::Result<()> {
        Ok(())
    }

    fn lock(&self, lock: Lock) -> store::Result<()> {
        self.inner.lock(lock)
    }

    fn data(&self, offset: u64) -> store::Result<Option<(u64, u64)>> {
        self.inner.data(offset)
    }

    fn allocated(&self) -> store::Result<u64> {
        self.inner.allocated()
    }
}

impl RawLayer {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size());
        if inside && offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) {
            return Ok(());
        }
        let message = format!("{len} bytes at {offset} are no sectors of a disk of {} bytes", self.size());
        Err(Error::new(ErrorKind::Invalid, self.store.name(), message))
    }

    fn check_trusted(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            let message = "an earlier sync of this image failed; open it again";
            return Err(Error::new(ErrorKind::Poisoned, self.store.name(), message));
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<()> {
        self.check_trusted()?;
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
        if len > 0 {
            out.push(Run { offset, len, source: Source::Data(offset) });
        }
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
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_trusted()?;
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

    fn check_resize(&self, size: u64) -> Result<()> {
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
            let message = format!("a raw disk has whole sectors of {SECTOR} bytes, not {size} bytes");
            return Err(Error::new(ErrorKind::Invalid, self.store.name(), message));
        }
        Ok(())
    }

    fn resize(&self, size: u64, _beneath: u64) -> Result<()> {
        self.check_writable()?;
        self.check_resize(size)?;
        self.store.set_len(size)?;
        self.size.store(size, Ordering::Release);
        self.wrote();
        self.flush()
    }

    /// There is nothing but data, and that is in the file.
    fn survives(&self) -> bool {
        true
    }

    fn close(&self) -> Result<()> {
        self.flush()
    }
}
