//! Changing the size of the disk.
//!
//! The size in the footer decides: what the table says of blocks past it counts for nobody. So a disk grows by preparing what lies past
//! its end, and then changing the size; and it shrinks by changing the size, and then giving up what lies past it. The footer names the
//! header, which says how many entries the table has: both change as one.
//!
//! ```text
//!   sparse, growing   │footer│header│ table ▓▓│block│ …      blocks where the longer table will be move to the end
//!                     │footer│header│ table ░░░░░ │ …        entries past the old end: absent, or zeros with a place
//!   fixed, growing    │ data │footer│ 0 0 0 0 │footer│       the new end still says the old size until all before it is zeros
//!   fixed, shrinking  │ data │ gone …         │footer│       the old end says the new size; then the file is cut
//! ```
//!
//! A file that others made is ours from then on: they may have kept something where the table grows, which only they know of.

use super::bat::{Geometry, SECTOR_ENTRIES};
use super::flush::{Put, Session};
use super::format::{HEADER_BYTES, MAX_BLOCKS, MAX_FIXED, MAX_SPARSE, SECTOR};
use super::{Inner, Meta, lock};
use crate::layer::Kind;
use crate::{ErrorKind, Result};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// A block is copied in pieces of so many bytes.
const PIECE: u64 = 1 << 20;

impl Inner {
    /// See [`crate::Layer::check_resize`].
    pub(crate) fn check_resize(&self, size: u64) -> Result<()> {
        let new = Geometry { size, ..self.shape };
        let (most, words) = match self.shape.kind {
            Kind::Fixed => (MAX_FIXED, "a fixed VHD has up to 64 TiB"),
            Kind::Dynamic | Kind::Differencing => (MAX_SPARSE, "a VHD has up to 2040 GiB"),
        };
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(
                self.error(ErrorKind::Invalid, format!("a VHD has whole sectors of 512 bytes, not {size} bytes"))
            );
        }
        if size > most {
            return Err(self.error(ErrorKind::Unsupported, format!("{words}, not {size} bytes")));
        }
        if new.blocks() > MAX_BLOCKS {
            let message = format!("it has blocks of {} bytes, too small for a disk of {size} bytes", new.block);
            return Err(self.error(ErrorKind::Unsupported, message));
        }
        Ok(())
    }

    /// See [`crate::Layer::resize`].
    pub(crate) fn resize(&self, size: u64, beneath: u64) -> Result<()> {
        self.check_writable()?;
        self.check_resize(size)?;
        let (old, new) = (self.geometry(), Geometry { size, ..self.shape });
        if size == old.size {
            return Ok(());
        }
        self.start()?;
        self.flush()?;
        let mut session = lock(&self.session);
        let mut meta = lock(&self.meta);
        if !meta.pending.is_empty() {
            return Err(self.error(ErrorKind::Invalid, "it is being written, and cannot be resized at the same time"));
        }
        if self.shape.kind == Kind::Fixed {
            return self.resize_fixed(&mut meta, &old, &new);
        }
        self.adopt(&mut session, &mut meta)?;
        let resized = if size > old.size {
            self.grow(&mut session, &mut meta, &old, &new, beneath)
        } else {
            self.shrink(&mut session, &mut meta, &old, &new)
        };
        // What was moved before an error is good where it is.
        resized.and(self.tidy(&mut session, &mut meta))
    }

    fn resize_fixed(&self, meta: &mut Meta, old: &Geometry, new: &Geometry) -> Result<()> {
        if new.size > old.size {
            let footer = meta.footer;
            self.poison_on_fault(meta.space.reach(&*self.store, &footer, new.size))?;
            self.poison_on_error(self.store.sync().map_err(Into::into))?;
            // The footer that was the file's end, too.
            let zeroed = self.store.punch(old.size, new.size - old.size).and_then(|()| self.store.sync());
            self.poison_on_error(zeroed.map_err(Into::into))?;
        }
        let footer = meta.footer.resized(new.size);
        self.poison_on_error(self.put_footers(meta, &footer))?;
        self.size.store(new.size, Ordering::Release);
        self.poison_on_error(meta.space.trim(&*self.store, &footer, new.size))
    }

    fn grow(&self, session: &mut Session, meta: &mut Meta, old: &Geometry, new: &Geometry, beneath: u64) -> Result<()> {
        let prepared = self
            .make_room(session, meta, new)
            .and_then(|()| self.add_tail(session, meta, old, beneath))
            .and_then(|()| self.add_blocks(meta, old, new, beneath))
            .and_then(|()| self.flush_alone(meta))
            .and_then(|()| self.put_size(session, meta, new));
        if prepared.is_err() {
            // Nothing of the larger disk is to be written into what is not its table.
            self.clear_past(meta, old);
        }
        prepared
    }

    fn shrink(&self, session: &mut Session, meta: &mut Meta, old: &Geometry, new: &Geometry) -> Result<()> {
        self.put_size(session, meta, new)?;
        let past = self.bat.placed().filter(|(block, _)| (new.blocks()..old.blocks()).contains(block));
        meta.freed.extend(past.map(|(block, at)| held(old, block, at)));
        self.clear_past(meta, new);
        if !new.blocks().is_multiple_of(SECTOR_ENTRIES) {
            meta.dirty.bat.insert(new.blocks() / SECTOR_ENTRIES);
        }
        self.punch_tail(old, new);
        Ok(())
    }

    /// Changes the size, durably.
    fn put_size(&self, session: &mut Session, meta: &mut Meta, new: &Geometry) -> Result<()> {
        let header = session.header.clone().expect("all but fixed disks have a header").with_entries(new.blocks());
        let footer = meta.footer.resized(new.size);
        self.put_header(session, meta, header, Put::Alone, &footer)?;
        self.size.store(new.size, Ordering::Release);
        Ok(())
    }

    /// Makes the file ours, if others made it. Their tables may have more entries than the disk needs, which become free space: the
    /// header does not name them any more.
    pub(super) fn adopt(&self, session: &mut Session, meta: &mut Meta) -> Result<()> {
        if meta.footer.is_ours() {
            return Ok(());
        }
        let blocks = self.geometry().blocks();
        let header = session.header.clone().expect("all but fixed disks have a header").with_entries(blocks);
        let footer = meta.footer.adopted();
        self.put_header(session, meta, header, Put::Alone, &footer)?;
        meta.space = meta.space.around(self.used(session, self.geometry().table()), self.table_at);
        Ok(())
    }

    /// Flushes, finds out what of the file is free, and puts a header that had to go elsewhere where all readers expect it.
    pub(super) fn tidy(&self, session: &mut Session, meta: &mut Meta) -> Result<()> {
        self.check_sound()?;
        self.flush_alone(meta)?;
        meta.space = meta.space.around(self.used(session, self.geometry().table()), self.table_at);
        let header = session.header.clone().expect("all but fixed disks have a header");
        let (places, footer) = (header.places(), meta.footer);
        let strays = places[1..].iter().any(|place| place.start > self.table_at);
        if strays && meta.space.has_room(header.length(), self.table_at) {
            self.put_header(session, meta, header, Put::Whole, &footer)
        } else if meta.space.has_room(HEADER_BYTES, places[0].start.min(self.table_at)) {
            self.put_header(session, meta, header, Put::Alone, &footer)
        } else {
            Ok(())
        }
    }

    /// What is used of the file, in no order, if the table has `table` bytes. Of blocks all of their places, also of one that is cut off.
    pub(super) fn used(&self, session: &Session, table: u64) -> Vec<Range<u64>> {
        let header = session.header.as_ref().map(super::parent::Header::places).unwrap_or_default();
        let fixed = [0..SECTOR, self.table_at..self.table_at + table];
        fixed.into_iter().chain(header.iter().cloned()).chain(self.placed().map(|(_, at)| self.place(at))).collect()
    }

    /// The end of what is used of the file.
    pub(super) fn end(&self, session: &Session) -> u64 {
        self.used(session, self.geometry().table()).iter().map(|place| place.end).max().unwrap_or(0)
    }

    /// The disk's blocks that have a place, in order, and their places.
    pub(super) fn placed(&self) -> impl Iterator<Item = (u64, u64)> {
        let blocks = self.geometry().blocks();
        self.bat.placed().take_while(move |(block, _)| *block < blocks)
    }

    /// Whether neither a footer nor the table nor a block lies there. (A damaged header may place locators anywhere.)
    pub(super) fn is_free(&self, meta: &Meta, place: &Range<u64>) -> bool {
        let footers = [0, meta.space.footer_at()].map(|at| at..at + SECTOR);
        let table = self.table_at..self.table_at + self.geometry().table();
        let fixed = footers.into_iter().chain([table]);
        let mut others = fixed.chain(self.placed().map(|(_, at)| self.place(at)));
        !others.any(|other| other.start < place.end && place.start < other.end)
    }

    /// All of the place that begins at `at`: bitmap and data.
    fn place(&self, at: u64) -> Range<u64> {
        at..at + self.shape.bitmap() + self.shape.block
    }

    /// Makes room for a longer table: what lies behind it moves away.
    fn make_room(&self, session: &mut Session, meta: &mut Meta, new: &Geometry) -> Result<()> {
        let room = self.table_at + self.geometry().table()..self.table_at + new.table();
        if room.is_empty() {
            return Ok(());
        }
        let in_way = |place: &Range<u64>| place.start < room.end && room.start < place.end;
        // Nothing is placed there from now on.
        meta.space = meta.space.around(self.used(session, new.table()), self.table_at);
        let footer = meta.footer;
        self.poison_on_fault(meta.space.reach(&*self.store, &footer, room.end))?;
        let header = session.header.clone().expect("all but fixed disks have a header");
        if header.places().iter().any(in_way) {
            self.put_header(session, meta, header, Put::Whole, &footer)?;
        }
        let blocks: Vec<_> = self.placed().filter(|(_, at)| in_way(&self.place(*at))).collect();
        for (block, at) in blocks {
            self.move_away(meta, block)?;
            let end = held(&self.geometry(), block, at).end;
            meta.freed.extend((at.max(room.end) < end).then_some(at.max(room.end)..end));
        }
        // The old places count no more, and the file's end lies behind the room.
        self.flush_alone(meta)
    }

    /// Moves a block to a new place.
    fn move_away(&self, meta: &mut Meta, block: u64) -> Result<()> {
        let to = self.new_block(meta)?;
        self.copy_block(block, to).inspect_err(|_| meta.space.give([to]))?;
        let sector = self.bat.set(block, to);
        meta.dirty.bat.insert(sector);
        Ok(())
    }

    /// Copies what a block's place holds, as far as the block lies inside the disk, to a place that is all zeros.
    pub(super) fn copy_block(&self, block: u64, to: u64) -> Result<()> {
        let at = self.bat.get(block).expect("a block that moves has a place");
        let from = held(&self.geometry(), block, at);
        let mut piece = vec![0; PIECE as usize];
        for start in from.clone().step_by(PIECE as usize) {
            let piece = &mut piece[..PIECE.min(from.end - start) as usize];
            self.store.read_at(piece, start)?;
            if piece.iter().any(|byte| *byte != 0) {
                self.store.write_at(piece, to + (start - at))?;
            }
        }
        Ok(())
    }

    /// What the last block holds past the old end becomes zeros of its own, if the block has a place, or a parent would show through.
    fn add_tail(&self, session: &Session, meta: &mut Meta, old: &Geometry, beneath: u64) -> Result<()> {
        let block = old.blocks() - 1;
        let inside = old.inside(block);
        if inside == old.block {
            return Ok(());
        }
        if let Some(at) = self.bat.get(block).filter(|at| self.is_cut(session, meta, *at)) {
            self.move_away(meta, block)?;
            meta.freed.push(held(old, block, at));
            self.flush_alone(meta)?;
        }
        let tail = inside / SECTOR..old.block_sectors();
        match self.bat.get(block) {
            Some(at) => {
                self.store.punch(self.data_at(at) + inside, old.block - inside)?;
                self.load_bitmap(block, at)?;
                self.bitmaps.set(block, &tail, &mut meta.dirty.bitmaps);
            }
            None if old.differencing() && beneath > old.size => {
                let at = self.new_block(meta)?;
                self.bitmaps.create(block, false);
                self.bitmaps.set(block, &tail, &mut BTreeSet::new());
                meta.dirty.placed.insert(block);
                let sector = self.bat.set(block, at);
                meta.dirty.bat.insert(sector);
            }
            None => (),
        }
        Ok(())
    }

    /// Whether something else, or the file's end, lies where the last block's place goes on behind the disk's end: so others cut it off.
    fn is_cut(&self, session: &Session, meta: &Meta, at: u64) -> bool {
        let place = self.place(at);
        let inside = |other: &Range<u64>| place.start < other.start && other.start < place.end;
        place.end > meta.space.footer_at() || self.used(session, self.geometry().table()).iter().any(inside)
    }

    /// The entries of the new blocks. As far as something beneath would show through they get places, which are zeros of their own.
    fn add_blocks(&self, meta: &mut Meta, old: &Geometry, new: &Geometry, beneath: u64) -> Result<()> {
        self.clear_past(meta, old);
        meta.dirty.bat.extend(old.blocks() / SECTOR_ENTRIES..new.table() / SECTOR);
        if !new.differencing() {
            return Ok(());
        }
        let ones = vec![0xFF; new.bitmap() as usize];
        for block in old.blocks()..new.blocks().min(beneath.div_ceil(new.block)) {
            let at = self.new_block(meta)?;
            self.store.write_at(&ones, at)?;
            if self.bitmaps.is_loaded(block) {
                self.bitmaps.create(block, true);
            }
            self.bat.set(block, at);
        }
        Ok(())
    }

    /// Forgets what the table says of blocks that a disk of this size does not have.
    fn clear_past(&self, meta: &mut Meta, geometry: &Geometry) {
        for (block, _) in self.bat.placed().filter(|(block, _)| *block >= geometry.blocks()) {
            self.bat.clear(block);
        }
        meta.dirty.bat.split_off(&(geometry.table() / SECTOR));
    }

    /// Gives back what the last block holds past the end. (Whoever grows the disk again relies on nothing there.)
    fn punch_tail(&self, old: &Geometry, new: &Geometry) {
        let block = new.blocks() - 1;
        let (from, to) = (new.inside(block), old.inside(block));
        if let Some(at) = self.bat.get(block).filter(|_| from < to) {
            // Space that stays taken does no harm.
            let _ = self.store.punch(self.data_at(at) + from, to - from);
        }
    }

    /// See [`crate::Layer::forget`].
    pub(crate) fn forget(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        self.check_writable()?;
        if !self.shape.differencing() {
            return Ok(());
        }
        let geometry = self.geometry();
        let mut meta = lock(&self.meta);
        let whole = self.pieces(offset, len).filter(|piece| piece.bytes == (0..geometry.inside(piece.block)));
        for block in whole.map(|piece| piece.block) {
            if let Some(at) = self.bat.get(block) {
                let sector = self.bat.clear(block);
                meta.dirty.bat.insert(sector);
                meta.freed.push(held(&geometry, block, at));
            }
        }
        Ok(())
    }
}

/// What a block at `at` holds of the file for certain: a place that is cut off goes on as something else's.
pub(super) fn held(geometry: &Geometry, block: u64, at: u64) -> Range<u64> {
    at..at + geometry.bitmap() + geometry.inside(block)
}
