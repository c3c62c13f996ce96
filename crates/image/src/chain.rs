//! A chain of layers as one disk.
//!
//! ```text
//!        read ──► index: which layer, which file offset ──► one pread a run         (any depth: the same)
//!       write ──► in the leaf already: in place │ not yet: prepare ► data ► commit ► index
//!
//!      leaf   ░░▓▓░░░░░░▓     ▓ data   0 zeros   ░ absent: the layer below is asked
//!             ░▓░░00░░▓░░
//!      base   ▓▓▓▓▓▓░░        its end: above it zeros
//! ```
//!
//! # Who waits for whom
//!
//! In the order in which they are taken:
//!
//! | lock | held | by |
//! | --- | --- | --- |
//! | `folding` | for a whole fold | one fold at a time |
//! | `ending` | from a fold's last look at the layers to its end | a push waits for that |
//! | `flushing` | for a whole flush | a second flush finds either nothing unsynced or the first one finished |
//! | `stack` | shared for a whole request | a change of the layers (push, splice) takes it alone, so it happens *between* requests |
//! | a stripe's `gate` | shared by reads and writes of whole sectors | alone by what gives space back or reads to write (zeroes, unaligned edges), and by what must come in one order to two places (a log, a mirror) |
//! | a stripe's `shard` | for a look-up | |
//!
//! A reader holds its gate from look-up to the end of its `pread`, so the place it reads from is not given away meanwhile: only a
//! zero frees places, and a zero is alone. Two writes of the same sectors at once may share a gate; either may win.
//!
//! Who reads the file himself ([`Chain::locate`]) holds stack and gate in the same way, for as long as the read takes. He may hold many
//! at once, of any stripes, because he does not wait for one: where somebody is alone, or waits to be, he gets none.

mod ambiguous;
mod index;
mod locate;
mod mirror;
mod resolve;
mod slot;

pub use ambiguous::Ambiguous;
pub use locate::{Held, Located};

use crate::merge::{self, FoldError};
use crate::{Error, ErrorKind, Layer, Result};
use ambiguous::Log;
use index::{BLOCK, MAX_LAYERS, Runs, Shard};
pub(crate) use mirror::Mirror;
pub(crate) use resolve::{Found, Place, resolve};
pub(crate) use slot::Slot;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::SystemTime;

/// Blocks are dealt out to this many stripes.
const STRIPES: u64 = 64;
/// What the flat index of one chain may hold, bytes, unless the caller says otherwise.
const INDEX_BYTES: usize = 64 << 20;
/// Zeroes and block status look at no more than this at a time.
const SPAN: u64 = 1 << 30;

/// Whether a chain may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    Read,
    /// The leaf is written.
    Write,
}

/// When a request came in: nanoseconds of `CLOCK_REALTIME`, the clock of QEMU's event stamps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Received(pub u64);

impl Received {
    /// This moment.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self(since.as_nanos() as u64)
    }
}

/// A run of bytes of the disk and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainRun {
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What it holds.
    pub kind: RunKind,
    /// The layer that says so, counted from the base, 0. `None` for [`RunKind::Absent`].
    pub layer: Option<usize>,
}

/// What a run holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// Data in a layer's file.
    Data,
    /// Zeros, because a layer says so.
    Zero,
    /// Zeros, because no layer says anything: a hole.
    Absent,
}

/// Some of the disk's blocks: who may touch them now, and what is known of them.
#[derive(Debug)]
struct Stripe {
    gate: RwLock<()>,
    shard: Mutex<Shard>,
}

/// The layers, base first.
#[derive(Debug)]
pub(crate) struct Stack {
    slots: Vec<Arc<Slot>>,
    /// Set while it is open on which side of a point in time a request lies.
    log: Option<Arc<Log>>,
    /// Set until what was logged has gone where it belongs.
    unsettled: bool,
    /// Set while a fold copies the leaf into the layer below.
    mirror: Option<Mirror>,
    closed: bool,
}

impl Stack {
    fn leaf(&self) -> &Arc<Slot> {
        self.slots.last().expect("a chain has at least one layer")
    }

    fn size(&self) -> u64 {
        self.leaf().size()
    }

    /// The parts of a range, from and to, that may not read as zeros. (Beside a write of the same sectors: as before it or after.)
    fn not_zero(&self, from: u64, to: u64) -> Result<Vec<(u64, u64)>> {
        if self.log.is_some() {
            // The log wants every request, in the order in which they took effect.
            return Ok(vec![(from, to)]);
        }
        let found = resolve(&self.slots, from, to - from)?;
        let data = found.iter().filter(|run| matches!(run.place, Place::Data { .. }));
        Ok(data.map(|run| (run.offset, run.offset + run.len)).collect())
    }

    /// Where a layer stands, counted from the base.
    pub(crate) fn position(&self, layer: &Arc<dyn Layer>) -> Option<usize> {
        self.slots.iter().position(|slot| slot.is(layer))
    }

    pub(crate) fn slot(&self, position: usize) -> &Arc<Slot> {
        &self.slots[position]
    }

    /// Where writes to the leaf go as well. Gone when another leaf is pushed.
    pub(crate) fn mirror(&self) -> Option<&Mirror> {
        self.mirror.as_ref()
    }

    pub(crate) fn set_mirror(&mut self, mirror: Option<Mirror>) {
        self.mirror = mirror;
    }

    pub(crate) fn mirror_mut(&mut self) -> Option<&mut Mirror> {
        self.mirror.as_mut()
    }

    /// Whether every write must come to two places in one order.
    fn is_ordered(&self) -> bool {
        self.log.is_some() || self.mirror.is_some()
    }

    /// Whether writes go to the layer at `position`.
    pub(crate) fn is_leaf(&self, position: usize) -> bool {
        position + 1 == self.slots.len()
    }

    /// Whether it is still open what belongs into the layer at `position`.
    pub(crate) fn is_ambiguous(&self, position: usize) -> bool {
        self.unsettled && position + 2 >= self.slots.len()
    }
}

/// Leaf to base as one disk. All methods may be called from many threads at once.
#[derive(Debug)]
pub struct Chain {
    stack: RwLock<Stack>,
    stripes: Vec<Stripe>,
    flushing: Mutex<()>,
    ending: Mutex<()>,
    folding: Mutex<()>,
    /// Requests so far.
    requests: AtomicU64,
    access: Access,
    sector: u64,
    survives: bool,
}

impl Chain {
    /// A chain of these layers, base first, leaf last. One layer at least, 4,096 at most, all of one sector size
    /// ([`ErrorKind::Invalid`], [`ErrorKind::Unsupported`]). That each is the parent that the next one names is the gate's affair.
    pub fn new(layers: Vec<Arc<dyn Layer>>, access: Access) -> Result<Self> {
        Self::with_index(layers, access, INDEX_BYTES)
    }

    /// The same with a bound on the bytes of the flat index.
    pub fn with_index(layers: Vec<Arc<dyn Layer>>, access: Access, bytes: usize) -> Result<Self> {
        let slots: Vec<_> = layers.into_iter().map(|layer| Arc::new(Slot::new(layer))).collect();
        let Some(leaf) = slots.last() else { return Err(invalid("a chain needs a layer")) };
        let sector = u64::from(leaf.sector());
        check_depth(slots.len())?;
        slots.iter().try_for_each(|slot| check_sector(slot, sector))?;
        let stripe =
            || Stripe { gate: RwLock::default(), shard: Mutex::new(Shard::new(sector, bytes / STRIPES as usize)) };
        Ok(Self {
            stack: RwLock::new(Stack { slots, log: None, unsettled: false, mirror: None, closed: false }),
            stripes: (0..STRIPES).map(|_| stripe()).collect(),
            flushing: Mutex::default(),
            ending: Mutex::default(),
            folding: Mutex::default(),
            requests: AtomicU64::new(0),
            access,
            sector,
            survives: false,
        })
    }

    /// The same chain, whose acknowledged writes survive the death of this process, flushed or not.
    ///
    /// For a disk that is served to somebody who outlives us and will not send again what was acknowledged. What is written in place
    /// lies in the file at once; but where new data lies is known to this process alone until the next flush, unless the leaf writes
    /// that down elsewhere ([`Layer::survives`]). Without that, a request that makes the leaf hold something new is acknowledged after
    /// a flush, which all requests under way share.
    #[must_use]
    pub fn surviving(self) -> Self {
        Self { survives: true, ..self }
    }

    /// The disk's size in bytes: the leaf's.
    pub fn size(&self) -> u64 {
        self.shared().size()
    }

    /// Logical sector size in bytes: 512 or 4096.
    pub fn sector_size(&self) -> u32 {
        self.sector as u32
    }

    /// The layers, base first.
    pub fn layers(&self) -> Vec<Arc<dyn Layer>> {
        self.shared().slots.iter().map(|slot| Arc::clone(slot.layer())).collect()
    }

    /// Fills `buf` from `offset` (bytes, any alignment). Outside the disk: [`ErrorKind::Invalid`].
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let stack = self.open(offset, buf.len() as u64)?;
        let mut rest = buf;
        for (offset, len) in blocks(offset, rest.len() as u64) {
            let (piece, after) = rest.split_at_mut(len as usize);
            let _gate = self.gate(offset / BLOCK);
            self.read_piece(&stack, piece, offset)?;
            rest = after;
        }
        Ok(())
    }

    /// Writes `data` at `offset` (bytes, any alignment; whole sectors are faster). Read back by every read that begins after this
    /// returns; durable after the next [`Chain::flush`].
    pub fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.write_received(data, offset, Received::now())
    }

    /// [`Chain::write`] of a request that came in at `received`.
    pub fn write_received(&self, data: &[u8], offset: u64, received: Received) -> Result<()> {
        let stack = self.open_to_write(offset, data.len() as u64)?;
        let mut rest = data;
        for (offset, len) in blocks(offset, data.len() as u64) {
            let (piece, after) = rest.split_at(len as usize);
            self.write_piece(&stack, piece, offset, received)?;
            rest = after;
        }
        self.settle(stack)
    }

    /// Makes a range read as zeros, whatever a parent holds (bytes, any alignment).
    pub fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.zero_received(offset, len, Received::now())
    }

    /// [`Chain::zero`] of a request that came in at `received`.
    pub fn zero_received(&self, offset: u64, len: u64, received: Received) -> Result<()> {
        let stack = self.open_to_write(offset, len)?;
        let end = offset + len;
        let first = offset.next_multiple_of(self.sector).min(end);
        let last = (end - end % self.sector).max(first);
        for (offset, end) in [(offset, first), (last, end)] {
            if offset < end {
                self.write_piece(&stack, &vec![0; (end - offset) as usize], offset, received)?;
            }
        }
        self.zero_sectors(&stack, first, last, received)?;
        self.settle(stack)
    }

    /// The guest does not need this range any more: its whole sectors read as zeros afterwards (bytes, any alignment).
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.discard_received(offset, len, Received::now())
    }

    /// [`Chain::discard`] of a request that came in at `received`.
    pub fn discard_received(&self, offset: u64, len: u64, received: Received) -> Result<()> {
        let stack = self.open_to_write(offset, len)?;
        let end = offset + len;
        let last = end - end % self.sector;
        self.zero_sectors(&stack, offset.next_multiple_of(self.sector), last, received)?;
        self.settle(stack)
    }

    /// A change is done and may be acknowledged; see [`Chain::surviving`]. It need not have exposed anything itself: what it has written in
    /// place is lost with what somebody else, a fold too, has exposed there.
    fn settle(&self, stack: RwLockReadGuard<'_, Stack>) -> Result<()> {
        let below = stack.mirror().and_then(Mirror::counts);
        let mortal = self.survives && (stack.leaf().is_mortal() || below.is_some_and(Slot::is_mortal));
        // A flush takes the stack itself, and a push may be waiting for us in between.
        drop(stack);
        if mortal { self.flush() } else { Ok(()) }
    }

    /// Makes durable what was acknowledged before this was called, in every layer that holds any of it, lowest first
    /// (invariant 4). After a failure the layer is not trusted any more ([`ErrorKind::Poisoned`]).
    pub fn flush(&self) -> Result<()> {
        let _one = locked(&self.flushing);
        // Not for the whole flush: a push need not wait for a disk to sync. Slots that go meanwhile wait for `flushing`.
        let slots: Vec<_> = self.open(0, 0)?.slots.iter().filter(|slot| slot.is_unsynced()).cloned().collect();
        slots.iter().try_for_each(|slot| slot.flush())
    }

    /// What `[offset, offset + len)` is made of, from `offset` on without gaps, for block status, maps and hashes. Stops after
    /// `limit` runs, so it may end early. `offset` and `len` in bytes, of any alignment.
    pub fn runs(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<ChainRun>> {
        let stack = self.open(offset, len)?;
        let mut out: Vec<ChainRun> = Vec::new();
        let end = offset + len;
        // Most callers want little: look far only when what is near turns out to be uniform.
        let (mut at, mut step) = (offset - offset % self.sector, BLOCK);
        while at < end && out.len() <= limit {
            let len = step.min(end.next_multiple_of(self.sector) - at);
            for run in resolve(&stack.slots, at, len)? {
                self.push_run(&stack, &mut out, run)?;
            }
            (at, step) = (at + len, (step * 2).min(SPAN));
        }
        out.truncate(limit);
        clip(&mut out, offset, end);
        Ok(out)
    }

    /// Puts a new leaf on top, between two requests: it waits for those under way, and what comes after writes to `leaf`.
    pub fn push(&self, leaf: Arc<dyn Layer>) -> Result<()> {
        self.push_logged(leaf, None).map(|_| ())
    }

    /// [`Chain::push`] while it is not yet known which requests came before a certain point: they go to the new leaf, and up to
    /// `limit` bytes of them are kept, so that [`Ambiguous::finish`] can write those before the point to the old leaf too.
    pub fn push_ambiguous(self: &Arc<Self>, leaf: Arc<dyn Layer>, limit: u64) -> Result<Ambiguous> {
        let log = Arc::new(Log::new(limit));
        let old = self.push_logged(leaf, Some(Arc::clone(&log)))?;
        Ok(Ambiguous::new(Arc::clone(self), old, log))
    }

    /// Takes the leaf away again: what it holds is folded into the layer below while the guest goes on, then `commit` runs (the ledger:
    /// the layer below is Now's leaf), then the leaf is gone from the chain and handed back. If anything fails the chain reads and writes
    /// as before. `commit` must not change the chain's layers.
    pub fn pop_leaf<E>(&self, commit: impl FnOnce() -> Result<(), E>) -> Result<Arc<dyn Layer>, FoldError<E>> {
        merge::fold_back(self, commit)
    }

    /// Puts another handle of the same file, with the same content, in a layer's place: a writable one for a fold, a read-only one
    /// after it.
    pub fn replace(&self, old: &Arc<dyn Layer>, new: Arc<dyn Layer>) -> Result<()> {
        let slot = Slot::new(new);
        check_sector(&slot, self.sector)?;
        let _one = locked(&self.flushing);
        let mut stack = self.alone();
        let position = stack.position(old).ok_or_else(|| invalid("the layer is not in this chain"))?;
        if stack.slots[position].size() != slot.size() {
            return Err(invalid("the two handles disagree on the disk's size"));
        }
        // What the old handle has not synced it must sync itself: the next flush asks only the new one.
        stack.slots[position].flush()?;
        stack.slots[position] = Arc::new(slot);
        self.forget_all();
        Ok(())
    }

    /// Gives the leaf, and with it the disk, another size between two requests; see [`Layer::resize`].
    pub fn resize(&self, size: u64) -> Result<()> {
        let leaf = {
            let stack = self.open_to_write(0, 0)?;
            if stack.mirror.is_some() {
                return Err(invalid("the leaf is being folded, and cannot be resized at the same time"));
            }
            Arc::clone(stack.leaf())
        };
        self.resize_slot(&leaf, size)
    }

    /// Gives a layer of the chain another size, between two requests: what lies where in its file may change.
    pub(crate) fn resize_slot(&self, slot: &Slot, size: u64) -> Result<()> {
        let stack = self.alone();
        let position = stack.position(slot.layer()).ok_or_else(|| invalid("the layer is not in this chain"))?;
        let beneath = match position.checked_sub(1) {
            Some(below) => stack.slot(below).size(),
            None if slot.differencing() => u64::MAX,
            None => 0,
        };
        let resized = slot.resize(size, beneath);
        self.forget_all();
        resized
    }

    /// Flushes, leaves every layer's file clean, and refuses every request from now on. Waits for those under way.
    pub fn close(&self) -> Result<()> {
        let _one = locked(&self.flushing);
        let mut stack = self.alone();
        if stack.closed {
            return Ok(());
        }
        stack.closed = true;
        if self.access == Access::Write {
            stack.slots.iter().try_for_each(|slot| slot.flush())?;
            stack.slots.iter().try_for_each(|slot| slot.layer().close())?;
        }
        Ok(())
    }
}

/// Requests, piece by piece. A piece lies inside one block.
impl Chain {
    fn read_piece(&self, stack: &Stack, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + buf.len() as u64;
        let (mut at, mut rest) = (offset, buf);
        while at < end {
            let run = self.look_up(stack, at, end)?;
            // Look-ups are by sector; the request may begin and end inside one.
            let (piece, after) = rest.split_at_mut(((run.offset + run.len).min(end) - at) as usize);
            match run.place {
                Place::Data { layer, at: file } => stack.slots[layer].read(piece, file + (at - run.offset))?,
                Place::Zero { .. } | Place::Hole => piece.fill(0),
            }
            (at, rest) = (at + piece.len() as u64, after);
        }
        Ok(())
    }

    fn write_piece(&self, stack: &Stack, data: &[u8], offset: u64, received: Received) -> Result<()> {
        let end = offset + data.len() as u64;
        let aligned = offset.is_multiple_of(self.sector) && end.is_multiple_of(self.sector);
        if aligned && !stack.is_ordered() {
            let _gate = self.gate(offset / BLOCK);
            return self.write_sectors(stack, data, offset);
        }
        let _alone = self.gate_alone(offset / BLOCK);
        if aligned {
            return self.write_logged(stack, data, offset, received);
        }
        let start = offset - offset % self.sector;
        let mut sectors = vec![0; (end.next_multiple_of(self.sector) - start) as usize];
        self.read_piece(stack, &mut sectors, start)?;
        let skip = (offset - start) as usize;
        sectors[skip..skip + data.len()].copy_from_slice(data);
        self.write_logged(stack, &sectors, start, received)
    }

    fn write_logged(&self, stack: &Stack, data: &[u8], offset: u64, received: Received) -> Result<()> {
        self.write_sectors(stack, data, offset)?;
        if let Some(log) = &stack.log {
            log.write(offset, data, received);
        }
        Ok(())
    }

    fn write_sectors(&self, stack: &Stack, data: &[u8], offset: u64) -> Result<()> {
        let result = self.write_to_leaf(stack, data, offset);
        match stack.mirror() {
            Some(mirror) => mirror.write(result, data, offset),
            None => result,
        }
    }

    fn write_to_leaf(&self, stack: &Stack, data: &[u8], offset: u64) -> Result<()> {
        let (leaf, top) = (stack.leaf(), stack.slots.len() - 1);
        if let Some(places) = self.all_in_leaf(stack, offset, offset + data.len() as u64)? {
            let mut rest = data;
            return places.into_iter().try_for_each(|(at, len)| {
                let (piece, after) = rest.split_at(len as usize);
                rest = after;
                leaf.rewrite(piece, at)
            });
        }
        let extents = leaf.write(data, offset);
        let mut shard = locked(&self.stripe(offset / BLOCK).shard);
        match extents {
            Ok(extents) => extents.iter().try_for_each(|e| shard.put(e.offset, e.len, top, e.at)),
            Err(error) => {
                shard.forget(offset / BLOCK);
                Err(error)
            }
        }
    }

    /// The places of whole sectors (offset in the file, length) if the leaf holds them all.
    fn all_in_leaf(&self, stack: &Stack, from: u64, to: u64) -> Result<Option<Vec<(u64, u64)>>> {
        let mut places = Vec::new();
        let mut at = from;
        while at < to {
            let run = self.look_up(stack, at, to)?;
            match run.place {
                Place::Data { layer, at: file } if stack.is_leaf(layer) => places.push((file, run.len)),
                _ => return Ok(None),
            }
            at += run.len;
        }
        Ok(Some(places))
    }

    fn zero_sectors(&self, stack: &Stack, from: u64, to: u64, received: Received) -> Result<()> {
        // Whole blocks of the leaf, so that it can let go of them.
        let unit = stack.leaf().block().max(BLOCK);
        let mut at = from;
        while at < to {
            let end = to.min((at / SPAN + 1) * SPAN);
            let dirty = stack.not_zero(at, end)?;
            for (offset, len) in pieces(at, end - at, unit) {
                if dirty.iter().any(|&(from, to)| from < offset + len && offset < to) {
                    self.zero_piece(stack, offset, len, received)?;
                }
            }
            at = end;
        }
        Ok(())
    }

    fn zero_piece(&self, stack: &Stack, offset: u64, len: u64, received: Received) -> Result<()> {
        let _alone = self.gates_alone(offset, len);
        let result = stack.leaf().zero(offset, len);
        for block in offset / BLOCK..=(offset + len - 1) / BLOCK {
            locked(&self.stripe(block).shard).forget(block);
        }
        match stack.mirror() {
            Some(mirror) => mirror.zero(result, offset, len)?,
            None => result?,
        }
        if let Some(log) = &stack.log {
            log.zero(offset, len, received);
        }
        Ok(())
    }

    /// The run of sectors from the one that `from` is in, at most up to the one before `to`. Both inside one block.
    fn look_up(&self, stack: &Stack, from: u64, to: u64) -> Result<Found> {
        let block = from / BLOCK;
        let start = block * BLOCK;
        let (first, last) = ((from - start) / self.sector, (to - start).div_ceil(self.sector));
        let shard = &self.stripe(block).shard;
        let generation = {
            let mut shard = locked(shard);
            if let Some(run) = shard.get(block, first, last) {
                return Ok(run);
            }
            shard.generation()
        };
        let found = resolve(&stack.slots, start, BLOCK.min(stack.size() - start))?;
        let runs = Runs::new(start, &found, self.sector)?;
        let run = runs.at(start, first, last, self.sector);
        locked(shard).insert(block, runs, generation);
        Ok(run)
    }
}

/// What [`Chain::runs`] says.
impl Chain {
    fn push_run(&self, stack: &Stack, out: &mut Vec<ChainRun>, found: Found) -> Result<()> {
        let Found { offset, len, place } = found;
        let (kind, layer) = match place {
            Place::Data { layer, at } if self.access == Access::Read => {
                return self.push_data(stack.slot(layer), layer, out, (offset, len, at));
            }
            Place::Data { layer, .. } => (RunKind::Data, Some(layer)),
            Place::Zero { layer } => (RunKind::Zero, Some(layer)),
            Place::Hole => (RunKind::Absent, None),
        };
        push_run(out, ChainRun { offset, len, kind, layer });
        Ok(())
    }

    /// Appends a run of data, less the holes that the layer's file has there: a block of megabytes often holds little. Of a chain that
    /// is written holes are not asked for: they come and go.
    fn push_data(
        &self,
        slot: &Slot,
        layer: usize,
        out: &mut Vec<ChainRun>,
        (offset, len, at): (u64, u64, u64),
    ) -> Result<()> {
        let mut push = |from: u64, to: u64, kind| {
            if from < to {
                push_run(out, ChainRun { offset: offset + from, len: to - from, kind, layer: Some(layer) });
            }
        };
        let mut done = 0;
        while done < len {
            let (start, end) = slot.data(at + done)?;
            let start = (start.saturating_sub(at) / self.sector * self.sector).clamp(done, len);
            let end = (end.saturating_sub(at).min(len)).next_multiple_of(self.sector).clamp(start, len);
            push(done, start, RunKind::Zero);
            push(start, end, RunKind::Data);
            done = end;
        }
        Ok(())
    }
}

/// Layers, guards and what folds need.
impl Chain {
    fn push_logged(&self, leaf: Arc<dyn Layer>, log: Option<Arc<Log>>) -> Result<Arc<Slot>> {
        let slot = Slot::new(leaf);
        check_sector(&slot, self.sector)?;
        // Asked before the guest has to wait.
        let empty = slot.is_empty()?;
        // The new leaf names the old one by its id, which therefore stays, whatever is still written to it.
        let below = Arc::clone(self.shared().leaf());
        below.layer().settle()?;
        // What goes to the old leaf from here on a fold of it must not miss.
        let _ending = locked(&self.ending);
        let mut stack = self.alone();
        self.check_writable(&stack)?;
        check_depth(stack.slots.len() + 1)?;
        if stack.unsettled {
            return Err(invalid("the last push is still ambiguous"));
        }
        let old = Arc::clone(stack.leaf());
        if !(empty && slot.size() == old.size()) {
            self.forget_all();
        }
        stack.slots.push(Arc::new(slot));
        stack.mirror = None;
        stack.unsettled = log.is_some();
        stack.log = log;
        Ok(old)
    }

    /// Nothing is logged any more. Waits for requests under way.
    fn stop_logging(&self) {
        self.alone().log = None;
    }

    /// What was logged is where it belongs, or will never be.
    fn settled(&self) {
        let mut stack = self.alone();
        (stack.log, stack.unsettled) = (None, false);
    }

    pub(crate) fn sync_slot(&self, slot: &Slot) -> Result<()> {
        let _one = locked(&self.flushing);
        slot.sync()
    }

    fn open(&self, offset: u64, len: u64) -> Result<RwLockReadGuard<'_, Stack>> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let stack = self.shared();
        if stack.closed {
            return Err(invalid("the chain is closed"));
        }
        if offset.checked_add(len).is_none_or(|end| end > stack.size()) {
            let size = stack.size();
            return Err(invalid(format!("{len} bytes at {offset} are not inside a disk of {size}")));
        }
        Ok(stack)
    }

    fn open_to_write(&self, offset: u64, len: u64) -> Result<RwLockReadGuard<'_, Stack>> {
        let stack = self.open(offset, len)?;
        self.check_writable(&stack)?;
        Ok(stack)
    }

    fn check_writable(&self, stack: &Stack) -> Result<()> {
        match self.access {
            Access::Read => Err(invalid("the chain was opened for reading")),
            Access::Write if stack.closed => Err(invalid("the chain is closed")),
            Access::Write => Ok(()),
        }
    }

    pub(crate) fn shared(&self) -> RwLockReadGuard<'_, Stack> {
        self.stack.read().expect("a change of layers panicked")
    }

    pub(crate) fn alone(&self) -> RwLockWriteGuard<'_, Stack> {
        self.stack.write().expect("a change of layers panicked")
    }

    pub(crate) fn folding(&self) -> MutexGuard<'_, ()> {
        locked(&self.folding)
    }

    pub(crate) fn ending(&self) -> MutexGuard<'_, ()> {
        locked(&self.ending)
    }

    /// Requests so far.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Does `work` while no request changes what a layer holds of a range. `None`, and nothing is done, while it is open what belongs into
    /// the layer.
    pub(crate) fn still<T, E: From<Error>>(
        &self,
        slot: &Slot,
        (offset, len): (u64, u64),
        work: impl FnOnce(&Stack) -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        let stack = self.shared();
        let position = stack.position(slot.layer()).ok_or_else(|| invalid("the layer left the chain"))?;
        if stack.is_ambiguous(position) {
            return Ok(None);
        }
        let _alone = stack.is_leaf(position).then(|| self.gates_alone(offset, len));
        work(&stack).map(Some)
    }

    /// Lets a layer give up what the one below holds as well, between two requests: nobody reads from the places that become free with its next sync.
    pub(crate) fn forget(&self, slot: &Slot, (offset, len): (u64, u64)) -> Result<()> {
        let _stack = self.alone();
        let forgotten = slot.layer().forget(offset, len);
        self.forget_all();
        forgotten
    }

    /// Takes layers out whose content now lies in another one. One fold at a time takes layers away, so they are there.
    pub(crate) fn splice(&self, gone: &[Arc<Slot>]) {
        let mut stack = self.alone();
        stack.slots.retain(|slot| !gone.iter().any(|gone| Arc::ptr_eq(slot, gone)));
        stack.mirror = None;
        self.forget_all();
    }

    fn forget_all(&self) {
        for stripe in &self.stripes {
            locked(&stripe.shard).clear();
        }
    }

    fn stripe(&self, block: u64) -> &Stripe {
        &self.stripes[(block % STRIPES) as usize]
    }

    fn gate(&self, block: u64) -> RwLockReadGuard<'_, ()> {
        self.stripe(block).gate.read().expect("a request panicked")
    }

    /// The gates of all blocks of a range.
    fn gates_alone(&self, offset: u64, len: u64) -> Vec<RwLockWriteGuard<'_, ()>> {
        let blocks = offset / BLOCK..=(offset + len - 1) / BLOCK;
        let mut stripes: Vec<_> = blocks.take(STRIPES as usize).map(|block| block % STRIPES).collect();
        stripes.sort_unstable();
        stripes.into_iter().map(|stripe| self.gate_alone(stripe)).collect()
    }

    fn gate_alone(&self, block: u64) -> RwLockWriteGuard<'_, ()> {
        self.stripe(block).gate.write().expect("a request panicked")
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a request panicked")
}

pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, "disk chain", message)
}

fn check_depth(depth: usize) -> Result<()> {
    if depth > MAX_LAYERS {
        return Err(invalid(format!("{depth} layers are more than {MAX_LAYERS}")));
    }
    Ok(())
}

fn check_sector(slot: &Slot, sector: u64) -> Result<()> {
    let own = slot.sector();
    if u64::from(own) != sector || !matches!(own, 512 | 4096) {
        let message = format!("a layer has sectors of {own} bytes, the chain of {sector}");
        return Err(Error::new(ErrorKind::Unsupported, "disk chain", message));
    }
    Ok(())
}

/// Cuts a range at multiples of `unit`: (offset, length).
pub(crate) fn pieces(offset: u64, len: u64, unit: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    std::iter::successors(Some(offset), move |at| Some((at / unit + 1) * unit))
        .take_while(move |&at| at < end)
        .map(move |at| (at, ((at / unit + 1) * unit).min(end) - at))
}

fn blocks(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    pieces(offset, len, BLOCK)
}

/// Appends a run, joined to the last one if that holds the same.
fn push_run(out: &mut Vec<ChainRun>, run: ChainRun) {
    match out.last_mut() {
        Some(last) if last.kind == run.kind && last.layer == run.layer => last.len += run.len,
        _ => out.push(run),
    }
}

/// Cuts whole sectors down to the bytes that were asked for.
fn clip(runs: &mut [ChainRun], offset: u64, end: u64) {
    if let Some(first) = runs.first_mut() {
        first.len -= offset - first.offset;
        first.offset = offset;
    }
    if let Some(last) = runs.last_mut() {
        last.len = last.len.min(end - last.offset);
    }
}
