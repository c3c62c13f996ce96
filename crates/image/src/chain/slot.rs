//! One layer in its place in a chain: tickets taken and kept, what is unsynced, what failed.

use crate::{Change, Error, ErrorKind, Extent, Kind, Layer, LayerInfo, Result, Run, Source};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use store::Store;

/// Zeros are written in pieces of this many bytes.
const ZEROS: usize = 256 << 10;

/// A layer and what the chain must know of it. All offsets are multiples of the sector size.
#[derive(Debug)]
pub(crate) struct Slot {
    layer: Arc<dyn Layer>,
    store: Arc<dyn Store>,
    /// Virtual size, bytes.
    size: AtomicU64,
    /// Allocation unit, bytes.
    block: u64,
    sector: u32,
    differencing: bool,
    /// The guest may have written something since the last flush *began*.
    unsynced: AtomicBool,
    /// A write or sync failed (invariant 10).
    poisoned: AtomicBool,
    /// How often the layer came to hold something new, which only its handle in this process knows until the next sync.
    exposures: AtomicU64,
    /// How many of those are durable.
    durable: AtomicU64,
}

impl Slot {
    pub(crate) fn new(layer: Arc<dyn Layer>) -> Self {
        let LayerInfo { size, block_size, sector_size, kind, .. } = layer.info();
        Self {
            store: Arc::clone(layer.store()),
            layer,
            size: AtomicU64::new(size),
            block: u64::from(block_size),
            sector: sector_size,
            differencing: kind == Kind::Differencing,
            // Whoever made the layer may have written to it: the first flush asks.
            unsynced: AtomicBool::new(true),
            poisoned: AtomicBool::new(false),
            exposures: AtomicU64::new(0),
            durable: AtomicU64::new(0),
        }
    }

    pub(crate) fn layer(&self) -> &Arc<dyn Layer> {
        &self.layer
    }

    pub(crate) fn is(&self, layer: &Arc<dyn Layer>) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.layer), Arc::as_ptr(layer))
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    /// Makes the layer's disk `size` bytes; see [`Layer::resize`].
    pub(crate) fn resize(&self, size: u64, beneath: u64) -> Result<()> {
        self.trusted()?;
        self.layer.resize(size, beneath)?;
        self.size.store(size, Ordering::SeqCst);
        Ok(())
    }

    pub(crate) fn block(&self) -> u64 {
        self.block
    }

    pub(crate) fn sector(&self) -> u32 {
        self.sector
    }

    /// Whether what this layer does not hold is asked of a parent.
    pub(crate) fn differencing(&self) -> bool {
        self.differencing
    }

    pub(crate) fn map(&self, offset: u64, len: u64, out: &mut Vec<Run>) -> Result<()> {
        self.layer.map(offset, len, out)
    }

    /// Whether everything is still the parent's.
    pub(crate) fn is_empty(&self) -> Result<bool> {
        let mut runs = Vec::new();
        if self.size() > 0 {
            self.map(0, self.size(), &mut runs)?;
        }
        Ok(runs.iter().all(|run| run.source == Source::Absent))
    }

    /// The layer's file.
    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Reads from the layer's file.
    pub(crate) fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        Ok(self.store.read_at(buf, at)?)
    }

    /// The next stretch of the layer's file, from and to, at `at` or behind it, that is no hole. What lies past the file's end is none:
    /// whoever reads it is to hear of it.
    pub(crate) fn data(&self, at: u64) -> Result<(u64, u64)> {
        match self.store.data(at)? {
            Some(data) => Ok(data),
            None => Ok((self.store.len()?.max(at), u64::MAX)),
        }
    }

    /// Writes sectors of the guest, wherever the layer wants them; they are read back once this returns. Says where they went.
    pub(crate) fn write(&self, data: &[u8], offset: u64) -> Result<Vec<Extent>> {
        let result = self.copy_in(data, offset);
        self.wrote();
        result
    }

    /// Writes sectors that this layer exposes already, in place.
    pub(crate) fn rewrite(&self, data: &[u8], at: u64) -> Result<()> {
        self.trusted()?;
        let result = self.put(data, at);
        self.layer.wrote();
        self.wrote();
        result
    }

    /// Makes sectors read as zeros, whatever a parent holds (invariant 11).
    pub(crate) fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let result = self.copy_zeros(offset, len);
        self.wrote();
        result
    }

    /// Writes sectors that another layer of the chain holds as well: no flush of the guest waits for them, or fails with them.
    pub(crate) fn copy_in(&self, data: &[u8], offset: u64) -> Result<Vec<Extent>> {
        self.trusted()?;
        let ticket = self.layer.prepare(offset, data.len() as u64, Change::Data)?;
        let extents = ticket.extents.clone();
        for extent in &extents {
            let from = (extent.offset - offset) as usize;
            self.put(&data[from..from + extent.len as usize], extent.at)?;
        }
        let committed = self.layer.commit(ticket);
        self.exposures.fetch_add(1, Ordering::SeqCst);
        committed.map(|()| extents)
    }

    /// Zeroes sectors that another layer of the chain says are zeros.
    pub(crate) fn copy_zeros(&self, offset: u64, len: u64) -> Result<()> {
        self.trusted()?;
        let ticket = self.layer.prepare(offset, len, Change::Zero)?;
        for extent in &ticket.extents {
            self.put_zeros(extent.at, extent.len)?;
        }
        let committed = self.layer.commit(ticket);
        self.exposures.fetch_add(1, Ordering::SeqCst);
        committed
    }

    /// Whether a process that dies now would take something with it: what the layer came to hold since its last sync, unless that is
    /// written down elsewhere ([`Layer::survives`]).
    pub(crate) fn is_mortal(&self) -> bool {
        self.exposures.load(Ordering::SeqCst) != self.durable.load(Ordering::SeqCst) && !self.layer.survives()
    }

    /// Whether acknowledged data of the guest may not be durable yet.
    pub(crate) fn is_unsynced(&self) -> bool {
        self.unsynced.load(Ordering::SeqCst)
    }

    /// Makes durable what the guest wrote before this was called. Flushes of one slot must not overlap: the second would find nothing
    /// to do while the first is still under way.
    pub(crate) fn flush(&self) -> Result<()> {
        if !self.unsynced.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        // What a failed sync covered stays unsynced for ever: no later flush may say otherwise.
        self.sync().inspect_err(|_| self.unsynced.store(true, Ordering::SeqCst))
    }

    /// Makes everything durable, copies included. Others may flush at the same time: a layer's flush returns when all that was committed
    /// before is durable, whoever makes it so.
    pub(crate) fn sync(&self) -> Result<()> {
        self.trusted()?;
        let exposures = self.exposures.load(Ordering::SeqCst);
        self.layer.flush().inspect_err(|error| self.distrust(error.kind == ErrorKind::NoSpace))?;
        self.durable.fetch_max(exposures, Ordering::SeqCst);
        Ok(())
    }

    /// The guest counts on what is here from now on: a flush that begins later covers it. After the data and before the request is
    /// acknowledged. A write that failed counts: it may have changed something.
    pub(crate) fn wrote(&self) {
        self.unsynced.store(true, Ordering::SeqCst);
    }

    fn put(&self, data: &[u8], at: u64) -> Result<()> {
        self.store.write_at(data, at).map_err(|error| {
            self.distrust(error.kind == store::ErrorKind::NoSpace);
            error.into()
        })
    }

    fn put_zeros(&self, at: u64, len: u64) -> Result<()> {
        let zeros = vec![0; ZEROS.min(len as usize)];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(ZEROS as u64);
            self.put(&zeros[..piece as usize], at + done)?;
            done += piece;
        }
        Ok(())
    }

    /// Something failed: for want of space is an answer, not a fault, and the same may succeed later.
    fn distrust(&self, for_space: bool) {
        if !for_space {
            self.poisoned.store(true, Ordering::SeqCst);
        }
    }

    fn trusted(&self) -> Result<()> {
        if self.poisoned.load(Ordering::SeqCst) {
            return Err(Error::new(
                ErrorKind::Poisoned,
                self.store.name(),
                "an earlier write or sync failed; it is not written any more",
            ));
        }
        Ok(())
    }
}
