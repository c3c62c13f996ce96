//! Tickets: finding places for what is to be written, and exposing it.
//!
//! A piece of a block whose sectors are exposed already is written where it lies, and its ticket takes no lock. Any other piece
//! goes to the block's place if it has one, else to a *pending* place, which the table names from the first commit on.
//!
//! The format cannot say "zeros, whatever the parent holds" without a place: zeros over a parent are a place too, of which nothing
//! has to be written while it is new. Blocks are never given up; zeroed stretches of them become holes in the file.

use super::map::Piece;
use super::{Inner, Meta, lock};
use crate::layer::{Change, Extent, Kind, Pin, Ticket};
use crate::{ErrorKind, Result};
use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Zeroed stretches of at least this many bytes become holes; shorter ones are written by the caller.
const MIN_HOLE: u64 = 64 << 10;

/// A block's place that the table does not name yet, and the tickets that write to it.
#[derive(Debug)]
pub(crate) struct Pending {
    place: u64,
    tickets: Vec<(u64, Range<u64>)>,
}

/// A piece of a ticket and where it goes.
#[derive(Debug)]
struct Part {
    piece: Piece,
    /// The block's place in the file: its bitmap, and behind it its data.
    place: u64,
    /// All of the piece was exposed when the ticket was made: nothing to do at its commit.
    exposed: bool,
    /// To be punched out at commit.
    punch: bool,
}

/// What the layer knows of a ticket.
struct VhdPin {
    inner: Arc<Inner>,
    id: u64,
    parts: Vec<Part>,
    committed: bool,
}

impl fmt::Debug for VhdPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhdPin").field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl Pin for VhdPin {}

impl Drop for VhdPin {
    fn drop(&mut self) {
        if !self.committed && self.parts.iter().any(|part| !part.exposed) {
            let mut meta = lock(&self.inner.meta);
            for part in self.parts.iter().filter(|part| !part.exposed) {
                self.inner.undo(&mut meta, self.id, part);
            }
        }
    }
}

/// See [`crate::Layer::prepare`].
pub(crate) fn prepare(inner: &Arc<Inner>, offset: u64, len: u64, change: Change) -> Result<Ticket> {
    inner.check_range(offset, len)?;
    inner.check_writable()?;
    inner.start()?;
    let zero = change == Change::Zero;
    if inner.shape.kind == Kind::Fixed {
        let written = len > 0 && !(zero && len >= MIN_HOLE);
        let extents = written.then_some(Extent { offset, at: offset, len });
        return Ok(Ticket { offset, len, change, extents: extents.into_iter().collect(), pin: None });
    }
    let mut pin = VhdPin { inner: Arc::clone(inner), id: 0, parts: Vec::new(), committed: false };
    let mut extents = Vec::new();
    for piece in inner.pieces(offset, len) {
        if !(zero && inner.reads_as_zeros(piece.block)) {
            pin.add(piece)?;
        }
    }
    let fresh = pin.place(zero)?;
    for (part, fresh) in pin.parts.iter_mut().zip(fresh) {
        let len = part.piece.len();
        // A new place holds zeros, so that zeroing a part of it needs nothing but its commit.
        if zero && (fresh || len >= MIN_HOLE) {
            part.punch = !fresh;
            continue;
        }
        let offset = part.piece.block * inner.shape.block + part.piece.bytes.start;
        extents.push(Extent { offset, at: inner.data_at(part.place) + part.piece.bytes.start, len });
    }
    Ok(Ticket { offset, len, change, extents, pin: Some(Box::new(pin)) })
}

impl VhdPin {
    /// Adds a piece, placed if all of it is exposed already.
    fn add(&mut self, piece: Piece) -> Result<()> {
        let place = self.inner.bat.get(piece.block);
        let mut exposed = false;
        if let Some(place) = place {
            // The commit must not read: the bits that it may touch are loaded here.
            self.inner.load_bitmap(piece.block, place)?;
            exposed = self.inner.bitmaps.all_set(piece.block, &self.inner.exposes(&piece));
        }
        self.parts.push(Part { piece, place: place.unwrap_or(0), exposed, punch: false });
        Ok(())
    }

    /// Finds places for the pieces that have none. Says of each whether its place is all zeros there.
    fn place(&mut self, zero: bool) -> Result<Vec<bool>> {
        let mut fresh = vec![false; self.parts.len()];
        if self.parts.iter().all(|part| part.exposed) {
            return Ok(fresh);
        }
        let inner = Arc::clone(&self.inner);
        // An error drops the pin after the lock: parts without a place are none of a pending one's.
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
    /// Whether the block is all zeros without a place, so that zeroing a part of it changes nothing.
    fn reads_as_zeros(&self, block: u64) -> bool {
        !self.shape.differencing() && self.bat.get(block).is_none()
    }

    /// The sectors of its block whose bits say that a piece is here: its own; without a parent all, for those that were never written
    /// are zeros here as well.
    fn exposes(&self, piece: &Piece) -> Range<u64> {
        if self.shape.differencing() { piece.sectors() } else { 0..self.shape.block_sectors() }
    }

    /// Gives a part the place that it is written to: the block's own or a pending one (then true is returned).
    fn find_place(&self, meta: &mut Meta, ticket: u64, part: &mut Part) -> Result<bool> {
        let block = part.piece.block;
        if let Some(place) = self.bat.get(block) {
            part.place = place;
            return Ok(false);
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
        let place = self.poison_on_fault(meta.space.block(&*self.store, &meta.footer))?;
        if place.stale
            && let Err(error) = self.store.punch(place.at, self.shape.bitmap() + self.shape.block)
        {
            meta.space.give([place.at]);
            return Err(error.into());
        }
        Ok(place.at)
    }

    /// Undoes what a ticket that was dropped has done to a pending place: nothing of it may show when others expose the place.
    fn undo(&self, meta: &mut Meta, ticket: u64, part: &Part) {
        let block = part.piece.block;
        let Some(pending) = meta.pending.get_mut(&block).filter(|pending| pending.place == part.place) else { return };
        pending.tickets.retain(|(id, _)| *id != ticket);
        if pending.tickets.is_empty() {
            let place = pending.place;
            meta.pending.remove(&block);
            meta.space.give([place]);
            return;
        }
        // What other tickets write is theirs.
        let others: Vec<_> = pending.tickets.iter().map(|(_, bytes)| bytes.clone()).collect();
        for hole in without(&part.piece.bytes, others) {
            if self.store.punch(self.data_at(part.place) + hole.start, hole.end - hole.start).is_err() {
                self.poisoned.store(true, Ordering::Release);
            }
        }
    }

    /// Makes the data of a part count.
    fn expose(&self, meta: &mut Meta, part: &Part) {
        let block = part.piece.block;
        if self.bat.get(block).is_none() {
            debug_assert_eq!(meta.pending.get(&block).map(|pending| pending.place), Some(part.place));
            meta.pending.remove(&block);
            // The bits before the entry that makes them count; and the bitmap is written as a whole.
            self.bitmaps.create(block, !self.shape.differencing());
            self.bitmaps.set(block, &self.exposes(&part.piece), &mut BTreeSet::new());
            meta.dirty.placed.insert(block);
            let sector = self.bat.set(block, part.place);
            meta.dirty.bat.insert(sector);
        } else {
            self.bitmaps.set(block, &self.exposes(&part.piece), &mut meta.dirty.bitmaps);
        }
    }
}

/// See [`crate::Layer::commit`].
pub(crate) fn commit(inner: &Arc<Inner>, mut ticket: Ticket) -> Result<()> {
    inner.check_writable()?;
    if inner.shape.kind == Kind::Fixed {
        if ticket.change == Change::Zero && ticket.extents.is_empty() && ticket.len > 0 {
            inner.store.punch(ticket.offset, ticket.len)?;
        }
        inner.wrote.store(true, Ordering::Release);
        return Ok(());
    }
    let foreign = || inner.error(ErrorKind::Invalid, "the ticket is none of this image's");
    let pin: Box<dyn Any> = ticket.pin.take().ok_or_else(foreign)?;
    let mut pin = pin.downcast::<VhdPin>().map_err(|_| foreign())?;
    if !Arc::ptr_eq(&pin.inner, inner) {
        return Err(foreign());
    }
    for part in pin.parts.iter().filter(|part| part.punch) {
        inner.store.punch(inner.data_at(part.place) + part.piece.bytes.start, part.piece.len())?;
    }
    inner.wrote.store(true, Ordering::Release);
    if pin.parts.iter().any(|part| !part.exposed) {
        let mut meta = lock(&inner.meta);
        for part in pin.parts.iter().filter(|part| !part.exposed) {
            inner.expose(&mut meta, part);
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
