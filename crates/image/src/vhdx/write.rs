//! Tickets: finding places for what is to be written, and exposing it.
//!
//! A piece of a block whose sectors are exposed already is written where it lies, and its ticket takes no lock. Any other piece
//! goes to the block's place if it has one, else to a *pending* place, which the table names from the first commit on.

use super::bat::{Entry, State};
use super::carry::Edit;
use super::map::Piece;
use super::{Inner, Meta, lock};
use crate::layer::{Change, Extent, Kind, Pin, Ticket};
use crate::{ErrorKind, Result};
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Zeroed stretches of at least this many bytes become holes; shorter ones are written by the caller.
const MIN_HOLE: u64 = 64 << 10;
/// Freed space in bytes that may wait for a flush before a ticket causes one.
const MAX_FREED: u64 = 1 << 30;
/// Bytes that changes may take in the carry-over journal before a ticket causes a flush.
const MAX_CARRIED: u64 = 64 << 20;

/// A block's place that the table does not name yet, and the tickets that write to it.
#[derive(Debug)]
pub(crate) struct Pending {
    place: u64,
    tickets: Vec<(u64, Range<u64>)>,
}

/// A place that a block has given up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Freed {
    pub(crate) block: u64,
    pub(crate) at: u64,
}

/// A piece of a ticket and where it goes.
#[derive(Debug)]
struct Part {
    piece: Piece,
    /// The block's place in the file.
    place: u64,
    /// All of the piece was exposed when the ticket was made: nothing to do at its commit.
    exposed: bool,
    /// To be punched out at commit.
    punch: bool,
}

/// What the layer knows of a ticket.
struct VhdxPin {
    inner: Arc<Inner>,
    id: u64,
    /// Each is counted in its block's `users`.
    parts: Vec<Part>,
    /// Blocks that become zeros as a whole.
    zeros: Range<u64>,
    committed: bool,
}

impl fmt::Debug for VhdxPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhdxPin").field("parts", &self.parts).field("zeros", &self.zeros).finish_non_exhaustive()
    }
}

impl Pin for VhdxPin {}

impl Drop for VhdxPin {
    fn drop(&mut self) {
        if !self.committed && self.parts.iter().any(|part| !part.exposed) {
            let mut meta = lock(&self.inner.meta);
            for part in self.parts.iter().filter(|part| !part.exposed) {
                self.inner.undo(&mut meta, self.id, part);
            }
        }
        for part in &self.parts {
            self.inner.users(part.piece.block).fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// See [`crate::Layer::prepare`].
pub(crate) fn prepare(inner: &Arc<Inner>, offset: u64, len: u64, change: Change) -> Result<Ticket> {
    inner.check_range(offset, len)?;
    inner.check_writable()?;
    inner.start()?;
    let mut pin = VhdxPin { inner: Arc::clone(inner), id: 0, parts: Vec::new(), zeros: 0..0, committed: false };
    let mut extents = Vec::new();
    let zero = change == Change::Zero;
    for piece in inner.pieces(offset, len) {
        if zero && inner.kind != Kind::Fixed && piece.bytes == (0..inner.geometry().inside(piece.block)) {
            let start = if pin.zeros.is_empty() { piece.block } else { pin.zeros.start };
            pin.zeros = start..piece.block + 1;
        } else if !(zero && inner.reads_as_zeros(piece.block)) {
            pin.add(piece)?;
        }
    }
    // Whole new places hold zeros, so that zeroing a part of one needs nothing but its commit.
    let fresh = pin.place(zero)?;
    for (part, fresh) in pin.parts.iter_mut().zip(fresh) {
        let length = part.piece.bytes.end - part.piece.bytes.start;
        if zero && (fresh || length >= MIN_HOLE) {
            part.punch = !fresh;
            continue;
        }
        let offset = part.piece.block * inner.geometry().block + part.piece.bytes.start;
        extents.push(Extent { offset, at: part.place + part.piece.bytes.start, len: length });
    }
    Ok(Ticket { offset, len, change, extents, pin: Some(Box::new(pin)) })
}

impl VhdxPin {
    /// Adds a piece, placed if all of it is exposed already. From here on its block's place is not given away.
    fn add(&mut self, piece: Piece) -> Result<()> {
        self.inner.users(piece.block).fetch_add(1, Ordering::SeqCst);
        let block = piece.block;
        self.parts.push(Part { piece, place: 0, exposed: false, punch: false });
        let part = self.parts.last_mut().expect("just pushed");
        if let Some(place) = self.inner.exposed_at(&part.piece)? {
            (part.place, part.exposed) = (place, true);
        } else if self.inner.geometry().differencing {
            // The commit must not read: all bits that it may touch are loaded here.
            self.inner.load_bitmaps(block, &(0..self.inner.geometry().block_sectors()))?;
        }
        Ok(())
    }

    /// Finds places for the pieces that have none. Says of each whether its place is all zeros there.
    fn place(&mut self, zero: bool) -> Result<Vec<bool>> {
        let mut fresh = vec![false; self.parts.len()];
        if self.parts.iter().all(|part| part.exposed) {
            return Ok(fresh);
        }
        let inner = Arc::clone(&self.inner);
        if inner.must_flush(&lock(&inner.meta)) {
            inner.flush()?;
        }
        // An error drops the pin after the lock: parts without a place are `exposed: false, place: 0` and hold nothing.
        let mut meta = lock(&inner.meta);
        meta.next_ticket += 1;
        self.id = meta.next_ticket;
        for (part, fresh) in self.parts.iter_mut().zip(&mut fresh).filter(|(part, _)| !part.exposed) {
            *fresh = inner.find_place(&mut meta, self.id, part)? && zero;
        }
        Ok(fresh)
    }
}

impl Inner {
    /// Whether too much waits for a flush.
    fn must_flush(&self, meta: &Meta) -> bool {
        meta.freed.len() as u64 * self.geometry().block > MAX_FREED
            || meta.carry.as_ref().is_some_and(|carry| carry.bytes() > MAX_CARRIED)
    }

    /// The block's place, if all of the piece is exposed there.
    fn exposed_at(&self, piece: &Piece) -> Result<Option<u64>> {
        let entry = self.entry(piece.block);
        match entry.state() {
            Some(State::Full) => Ok(Some(entry.offset())),
            Some(State::Partial) => {
                let sectors = self.sectors(&piece.bytes);
                self.load_bitmaps(piece.block, &sectors)?;
                Ok(self.bitmaps.all_set(piece.block, &sectors).then(|| entry.offset()))
            }
            Some(State::NotPresent | State::Zero) => Ok(None),
            None => Err(self.bad_state(piece.block, entry)),
        }
    }

    /// Whether the block is all zeros without a place, so that zeroing a part of it changes nothing.
    fn reads_as_zeros(&self, block: u64) -> bool {
        match self.entry(block).state() {
            Some(State::Zero) => true,
            Some(State::NotPresent) => !self.geometry().differencing,
            _ => false,
        }
    }

    /// Gives a part the place that it is written to: the block's own or a pending one (then true is returned).
    fn find_place(&self, meta: &mut Meta, ticket: u64, part: &mut Part) -> Result<bool> {
        let block = part.piece.block;
        if let Some(place) = self.entry(block).place() {
            part.place = place;
            return Ok(false);
        }
        if self.geometry().differencing {
            self.find_bitmap_place(meta, block / self.geometry().ratio())?;
        }
        let place = match meta.pending.get(&block) {
            Some(pending) => pending.place,
            None => self.new_block(meta)?,
        };
        let pending = meta.pending.entry(block).or_insert_with(|| Pending { place, tickets: Vec::new() });
        pending.tickets.push((ticket, part.piece.bytes.clone()));
        part.place = place;
        Ok(true)
    }

    /// A place for a block, all zeros.
    pub(super) fn new_block(&self, meta: &mut Meta) -> Result<u64> {
        let place = meta.space.block(&*self.store)?;
        if place.stale
            && let Err(error) = self.store.punch(place.at, self.geometry().block)
        {
            meta.space.give(place.at, self.geometry().block);
            return Err(error.into());
        }
        Ok(place.at)
    }

    /// Makes sure that the chunk's bitmap block has a place, all zeros if it is new.
    pub(super) fn find_bitmap_place(&self, meta: &mut Meta, chunk: u64) -> Result<()> {
        if self.bitmap_place(chunk).is_some() || meta.pending_bitmaps.contains_key(&chunk) {
            return Ok(());
        }
        let place = meta.space.bitmap(&*self.store)?;
        if place.stale
            && let Err(error) = self.store.punch(place.at, super::format::MIB)
        {
            meta.space.give(place.at, super::format::MIB);
            return Err(error.into());
        }
        meta.pending_bitmaps.insert(chunk, place.at);
        Ok(())
    }

    /// Undoes what a ticket that was dropped has done to a pending place: nothing of it may show when others expose the place.
    fn undo(&self, meta: &mut Meta, ticket: u64, part: &Part) {
        let block = part.piece.block;
        let Some(pending) = meta.pending.get_mut(&block).filter(|pending| pending.place == part.place) else { return };
        pending.tickets.retain(|(id, _)| *id != ticket);
        if pending.tickets.is_empty() {
            let place = pending.place;
            meta.pending.remove(&block);
            meta.space.give(place, self.geometry().block);
            return;
        }
        // What other tickets write is theirs.
        let others: Vec<_> = pending.tickets.iter().map(|(_, bytes)| bytes.clone()).collect();
        for hole in without(&part.piece.bytes, others) {
            if self.store.punch(part.place + hole.start, hole.end - hole.start).is_err() {
                self.poisoned.store(true, Ordering::Release);
            }
        }
    }

    /// Adds what exposes a part's data to `edits`.
    ///
    /// A place that is neither the block's nor pending belongs to a write that a zeroing has overtaken: it counts as the earlier of
    /// the two, and leaves no trace.
    fn expose(&self, meta: &Meta, part: &Part, edits: &mut Vec<Edit>) {
        let block = part.piece.block;
        let entry = self.entry(block);
        let sectors = self.sectors(&part.piece.bytes);
        let whole = 0..self.geometry().block_sectors();
        let inside = 0..self.geometry().inside(block) / self.geometry().sector;
        let index = self.geometry().payload_index(block);
        let bits = |sectors: &Range<u64>, set| Edit::Bits { block, sectors: sectors.clone(), set };
        match entry.state() {
            Some(State::Partial) if entry.offset() == part.place => {
                edits.push(bits(&sectors, true));
                let others = [0..sectors.start, sectors.end..inside.end];
                if others.iter().all(|others| self.bitmaps.all_set(block, others)) {
                    edits.push(Edit::Place { index, entry: Entry::full(part.place) });
                }
            }
            Some(State::NotPresent | State::Zero) => {
                if meta.pending.get(&block).is_none_or(|pending| pending.place != part.place) {
                    return;
                }
                let parents_stay = self.geometry().differencing && entry.state() == Some(State::NotPresent);
                if parents_stay && sectors != inside {
                    // Bits from an earlier life of the block may be set.
                    edits.extend([bits(&whole, false), bits(&sectors, true)]);
                    let chunk = block / self.geometry().ratio();
                    if let Some(place) = meta.pending_bitmaps.get(&chunk) {
                        let index = self.geometry().bitmap_index(chunk);
                        edits.push(Edit::Place { index, entry: Entry::full(*place) });
                    }
                    edits.push(Edit::Place { index, entry: Entry::partial(part.place) });
                } else {
                    edits.push(Edit::Place { index, entry: Entry::full(part.place) });
                }
            }
            _ => (),
        }
    }

    /// Adds what makes whole blocks zeros to `edits`.
    fn zero_blocks(&self, blocks: &Range<u64>, edits: &mut Vec<Edit>) {
        let mut run = blocks.start..blocks.start;
        for block in blocks.clone() {
            if self.reads_as_zeros(block) {
                continue;
            }
            if run.end != block {
                edits.extend((!run.is_empty()).then_some(Edit::Zero { blocks: run }));
                run = block..block;
            }
            run.end = block + 1;
        }
        edits.extend((!run.is_empty()).then_some(Edit::Zero { blocks: run }));
    }

    /// Writes edits down where they outlive the process, before they are made.
    fn carry_over(&self, meta: &mut Meta, edits: &[Edit]) -> Result<()> {
        let Some(carry) = meta.carry.as_mut().filter(|_| !edits.is_empty()) else { return Ok(()) };
        carry.append(edits).or_else(|error| {
            // The places that they name go to others.
            self.poison_on_error(carry.cut().map_err(Into::into))?;
            Err(error.into())
        })
    }

    /// Makes an edit.
    fn apply(&self, meta: &mut Meta, edit: Edit) {
        match edit {
            Edit::Bits { block, sectors, set } => self.bitmaps.put(block, &sectors, set, &mut meta.dirty.bitmaps),
            Edit::Place { index, entry } => {
                match self.geometry().block_of(index) {
                    Some(block) => drop(meta.pending.remove(&block)),
                    None => drop(meta.pending_bitmaps.remove(&(index / (self.geometry().ratio() + 1)))),
                }
                self.set_entry(meta, index, entry);
            }
            Edit::Zero { blocks } => blocks.for_each(|block| self.zero_block(meta, block)),
        }
    }

    pub(super) fn set_entry(&self, meta: &mut Meta, index: u64, entry: Entry) {
        let page = self.bat.set(index, entry);
        meta.dirty.bat.insert(page);
    }

    /// Makes a whole block zeros. Its place is free once that is durable.
    fn zero_block(&self, meta: &mut Meta, block: u64) {
        let entry = self.entry(block);
        self.set_entry(meta, self.geometry().payload_index(block), Entry::zero());
        if let Some(at) = entry.place() {
            meta.freed.push(Freed { block, at });
        }
    }
}

/// See [`crate::Layer::commit`].
pub(crate) fn commit(inner: &Arc<Inner>, mut ticket: Ticket) -> Result<()> {
    let foreign = || inner.error(ErrorKind::Invalid, "the ticket is none of this image's");
    let pin: Box<dyn Any> = ticket.pin.take().ok_or_else(foreign)?;
    let mut pin = pin.downcast::<VhdxPin>().map_err(|_| foreign())?;
    if !Arc::ptr_eq(&pin.inner, inner) {
        return Err(foreign());
    }
    inner.check_writable()?;
    for part in pin.parts.iter().filter(|part| part.punch) {
        inner.store.punch(part.place + part.piece.bytes.start, part.piece.bytes.end - part.piece.bytes.start)?;
    }
    inner.wrote.store(true, Ordering::Release);
    if !pin.zeros.is_empty() || pin.parts.iter().any(|part| !part.exposed) {
        let mut meta = lock(&inner.meta);
        let mut edits = Vec::new();
        for part in pin.parts.iter().filter(|part| !part.exposed) {
            inner.expose(&meta, part, &mut edits);
        }
        inner.zero_blocks(&pin.zeros, &mut edits);
        // An error drops the pin after the lock.
        inner.carry_over(&mut meta, &edits)?;
        for edit in edits {
            inner.apply(&mut meta, edit);
        }
    }
    pin.committed = true;
    Ok(())
}

/// `range` without `others`.
fn without(range: &Range<u64>, mut others: Vec<Range<u64>>) -> Vec<Range<u64>> {
    others.sort_by_key(|other| other.start);
    let mut rest = Vec::new();
    let mut at = range.start;
    for other in others {
        if at < other.start.min(range.end) {
            rest.push(at..other.start.min(range.end));
        }
        at = at.max(other.end);
    }
    if at < range.end {
        rest.push(at..range.end);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is left of 10 to 20 without `others`, as (from, to).
    fn rest(others: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let others = others.iter().map(|(start, end)| *start..*end).collect();
        without(&(10..20), others).into_iter().map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn ranges_are_cut_out() {
        assert_eq!(rest(&[]), [(10, 20)]);
        assert_eq!(rest(&[(15, 17), (0, 12)]), [(12, 15), (17, 20)]);
        assert_eq!(rest(&[(0, 30)]), []);
        assert_eq!(rest(&[(20, 30), (0, 10)]), [(10, 20)]);
        assert_eq!(rest(&[(12, 18), (13, 14)]), [(10, 12), (18, 20)]);
    }
}
