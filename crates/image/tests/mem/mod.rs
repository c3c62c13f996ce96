//! A layer in memory that is as nasty as the contract allows: places are given away again at once, new places are full of
//! garbage, and every other zero must be written by the caller.

use image::{Change, Extent, Format, Kind, Layer, LayerInfo, ParentLink, Pin, Result, Run, Source, Ticket};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use store::{Error, ErrorKind, Lock, Store};
use uuid::Uuid;

/// A file in memory.
#[derive(Debug, Default)]
pub(crate) struct MemStore(RwLock<Vec<u8>>);

impl Store for MemStore {
    fn len(&self) -> store::Result<u64> {
        Ok(self.0.read().unwrap().len() as u64)
    }

    fn set_len(&self, len: u64) -> store::Result<()> {
        self.0.write().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> store::Result<()> {
        let bytes = self.0.read().unwrap();
        let from = bytes.get(offset as usize..offset as usize + buf.len()).ok_or_else(|| Error {
            kind: ErrorKind::PastEnd,
            operation: "read",
            name: "memory".into(),
            detail: format!("{} bytes at {offset}", buf.len()),
        })?;
        buf.copy_from_slice(from);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> store::Result<()> {
        let mut bytes = self.0.write().unwrap();
        let end = offset as usize + buf.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(buf);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> store::Result<()> {
        self.0.write().unwrap()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }

    fn sync(&self) -> store::Result<()> {
        Ok(())
    }

    fn lock(&self, _: Lock) -> store::Result<()> {
        Ok(())
    }

    fn allocated(&self) -> store::Result<u64> {
        self.len()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sector {
    Absent,
    Zero,
    Data,
}

#[derive(Debug)]
struct State {
    info: LayerInfo,
    sectors: Vec<Sector>,
    /// Block to file offset.
    places: BTreeMap<u64, u64>,
    free: Vec<u64>,
    end: u64,
    /// Tickets for data that are out, by block.
    pinned: BTreeMap<u64, u32>,
    zeroes: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct MemLayer {
    store: Arc<dyn Store>,
    state: Arc<Mutex<State>>,
    /// Flushes that had something to do.
    pub(crate) flushes: AtomicU64,
    unsynced: Mutex<bool>,
    /// Called once, at the next look-up.
    pub(crate) on_map: OnMap,
}

type Hook = Box<dyn FnOnce() + Send>;

#[derive(Default)]
pub(crate) struct OnMap(pub(crate) Mutex<Option<Hook>>);

impl std::fmt::Debug for OnMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnMap")
    }
}

#[derive(Debug)]
struct Pinned {
    state: Arc<Mutex<State>>,
    blocks: std::ops::RangeInclusive<u64>,
}

impl Pin for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap();
        for block in self.blocks.clone() {
            *state.pinned.get_mut(&block).unwrap() -= 1;
        }
    }
}

impl MemLayer {
    /// A layer of `size` bytes; `kind` is dynamic or differencing.
    pub(crate) fn new(size: u64, sector_size: u32, block_size: u32, kind: Kind) -> Arc<Self> {
        let parent = (kind == Kind::Differencing).then(|| ParentLink {
            linkage: Uuid::nil(),
            linkage2: None,
            relative_path: None,
            absolute_path: None,
        });
        let info = LayerInfo {
            format: Format::Vhdx,
            kind,
            size,
            sector_size,
            block_size,
            data_id: Uuid::new_v4(),
            disk_id: Uuid::nil(),
            parent,
        };
        let sectors = vec![Sector::Absent; (size / u64::from(sector_size)) as usize];
        let state = State {
            info,
            sectors,
            places: BTreeMap::new(),
            free: Vec::new(),
            end: 1 << 20,
            pinned: BTreeMap::new(),
            zeroes: 0,
        };
        Arc::new(Self {
            store: Arc::new(MemStore::default()),
            state: Arc::new(Mutex::new(state)),
            flushes: AtomicU64::new(0),
            unsynced: Mutex::new(false),
            on_map: OnMap::default(),
        })
    }
}

impl State {
    fn sector(&self) -> u64 {
        u64::from(self.info.sector_size)
    }

    fn block(&self) -> u64 {
        u64::from(self.info.block_size)
    }

    /// (sector index, its place in the file) of a range.
    fn each(&self, offset: u64, len: u64) -> impl Iterator<Item = (usize, Option<u64>)> + '_ {
        assert!(offset.is_multiple_of(self.sector()) && len.is_multiple_of(self.sector()) && len > 0);
        assert!(offset + len <= self.info.size, "{len} at {offset} is past {}", self.info.size);
        (offset..offset + len).step_by(self.sector() as usize).map(|at| {
            let place = self.places.get(&(at / self.block())).map(|place| place + at % self.block());
            ((at / self.sector()) as usize, place)
        })
    }

    fn allocate(&mut self, block: u64, store: &Arc<dyn Store>) {
        if self.places.contains_key(&block) {
            return;
        }
        let place = self.free.pop().unwrap_or(self.end);
        self.end = self.end.max(place + self.block());
        store.write_at(&vec![0xEE; self.block() as usize], place).unwrap();
        self.places.insert(block, place);
    }

    fn set(&mut self, offset: u64, len: u64, sector: Sector) {
        let indices: Vec<_> = self.each(offset, len).map(|(index, _)| index).collect();
        for index in indices {
            self.sectors[index] = sector;
        }
    }
}

impl Layer for MemLayer {
    fn info(&self) -> LayerInfo {
        self.state.lock().unwrap().info.clone()
    }

    fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Run>) -> Result<()> {
        let hook = self.on_map.0.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
        let state = self.state.lock().unwrap();
        let size = state.sector();
        let mut runs: Vec<Run> = Vec::new();
        for (index, place) in state.each(offset, len) {
            let source = match state.sectors[index] {
                Sector::Absent => Source::Absent,
                Sector::Zero => Source::Zero,
                Sector::Data => Source::Data(place.unwrap()),
            };
            match runs.last_mut() {
                Some(run)
                    if run.source == source
                        || matches!((run.source, source), (Source::Data(at), Source::Data(then)) if at + run.len == then) =>
                {
                    run.len += size;
                }
                _ => runs.push(Run { offset: index as u64 * size, len: size, source }),
            }
        }
        // Two runs of data are one only if the second goes on where the first ends.
        out.extend(runs);
        Ok(())
    }

    fn prepare(&self, offset: u64, len: u64, change: Change) -> Result<Ticket> {
        let mut state = self.state.lock().unwrap();
        let blocks = offset / state.block()..=(offset + len - 1) / state.block();
        let (size, block) = (state.sector(), state.block());
        match change {
            Change::Data => {
                for block in blocks.clone() {
                    state.allocate(block, &self.store);
                    *state.pinned.entry(block).or_default() += 1;
                }
                let mut extents = Vec::new();
                let mut at = offset;
                while at < offset + len {
                    let end = ((at / block + 1) * block).min(offset + len);
                    extents.push(Extent { offset: at, at: state.places[&(at / block)] + at % block, len: end - at });
                    at = end;
                }
                let pin = Box::new(Pinned { state: Arc::clone(&self.state), blocks });
                Ok(Ticket { offset, len, change, extents, pin: Some(pin) })
            }
            Change::Zero => {
                state.zeroes += 1;
                let by_caller = state.zeroes.is_multiple_of(2);
                let whole = |at: u64| at / block * block >= offset && (at / block + 1) * block <= offset + len;
                let data = state.each(offset, len).filter(|(index, _)| state.sectors[*index] == Sector::Data);
                let extents = data
                    .filter(|(index, _)| by_caller && !whole(*index as u64 * size))
                    .map(|(index, place)| Extent { offset: index as u64 * size, at: place.unwrap(), len: size })
                    .collect();
                Ok(Ticket { offset, len, change, extents, pin: None })
            }
        }
    }

    fn commit(&self, mut ticket: Ticket) -> Result<()> {
        drop(ticket.pin.take());
        let mut state = self.state.lock().unwrap();
        *self.unsynced.lock().unwrap() = true;
        let Ticket { offset, len, .. } = ticket;
        match ticket.change {
            Change::Data => state.set(offset, len, Sector::Data),
            Change::Zero => {
                state.set(offset, len, Sector::Zero);
                for extent in &ticket.extents {
                    state.set(extent.offset, extent.len, Sector::Data);
                }
                let block = state.block();
                for block in offset.div_ceil(block)..(offset + len) / block {
                    assert_eq!(state.pinned.get(&block).copied().unwrap_or(0), 0, "freed while it is written");
                    if let Some(place) = state.places.remove(&block) {
                        let garbage = vec![0xDD; state.block() as usize];
                        self.store.write_at(&garbage, place).unwrap();
                        state.free.push(place);
                    }
                }
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        if std::mem::take(&mut *self.unsynced.lock().unwrap()) {
            self.flushes.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    fn wrote(&self) {
        *self.unsynced.lock().unwrap() = true;
    }

    fn relink(&self, data_id: Option<Uuid>, parent: Option<ParentLink>) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        if let Some(id) = data_id {
            state.info.data_id = id;
        }
        if let Some(link) = parent {
            assert!(state.info.parent.is_some());
            state.info.parent = Some(link);
        }
        Ok(())
    }

    fn check_resize(&self, _size: u64) -> Result<()> {
        Ok(())
    }

    fn resize(&self, size: u64, _beneath: u64) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        let sectors = (size / state.sector()) as usize;
        // What is new is zeros; without a parent that need not be said.
        let new = if state.info.kind == Kind::Differencing { Sector::Zero } else { Sector::Absent };
        state.sectors.resize(sectors, new);
        state.info.size = size;
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.flush()
    }
}
