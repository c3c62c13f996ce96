//! Changing the size of the disk.
//!
//! The size in the metadata decides: what the table says of blocks past it counts for nobody. So a disk grows by preparing what lies past
//! its end, and then changing the size; and it shrinks by changing the size, and then giving up what lies past it.
//!
//! A table that has too little room moves first:
//!
//! ```text
//!   1  the table is written at the end of the file      sync
//!   2  the second copy of the region table names it     sync     (the first copy counts: the old table)
//!   3  the first copy names it                          sync     (torn, the second counts: the same table)
//!   4  the old place is free
//! ```

use super::bat::{Entry, Geometry, State};
use super::format::{MAX_SIZE, MIB, PAGE_BYTES, REGION_TABLE_AT};
use super::header::{Region, with_bat_at};
use super::journal::Journal;
use super::metadata;
use super::page::{PageBytes, WORDS};
use super::write::Freed;
use super::{Inner, Meta, lock};
use crate::layer::Kind;
use crate::{ErrorKind, Result};
use std::sync::atomic::Ordering;

/// Pages and their file offsets.
type Pages = Vec<(u64, PageBytes)>;

impl Inner {
    /// See [`crate::Layer::check_resize`].
    pub(crate) fn check_resize(&self, size: u64) -> Result<()> {
        let sector = self.geometry().sector;
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(sector) {
            let message = format!("a VHDX has up to 64 TiB in whole sectors of {sector} bytes, not {size} bytes");
            return Err(self.error(ErrorKind::Invalid, message));
        }
        Ok(())
    }

    /// See [`crate::Layer::resize`].
    pub(crate) fn resize(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        self.check_resize(size)?;
        let old = self.geometry();
        if size == old.size {
            return Ok(());
        }
        self.start()?;
        self.flush()?;
        let mut session = lock(&self.session);
        // What an old log entry holds must not come back over what is written here beside the log.
        self.poison_on_error(session.journal.finish(&*self.store))?;
        let new = Geometry { size, ..old };
        if size > old.size { self.grow(&mut session.journal, &new) } else { self.shrink(&mut session.journal, &new) }
    }

    fn grow(&self, journal: &mut Journal, new: &Geometry) -> Result<()> {
        let old = self.geometry();
        let mut meta = lock(&self.meta);
        self.check_quiet(&meta)?;
        let size = self.metadata_pages(|region| metadata::replace_size(region, new.size))?;
        self.make_room(&mut meta, new)?;
        self.add_tail(&mut meta, &old, new)?;
        self.add_blocks(&mut meta, &old, new)?;
        // The size is last: whatever comes before it changes nothing that anybody sees.
        let pages: Pages = self.take_pages(&mut meta).into_iter().chain(size).collect();
        self.poison_on_error(self.write_metadata(journal, meta.space.len(), &pages))?;
        self.size.store(new.size, Ordering::Release);
        Ok(())
    }

    fn shrink(&self, journal: &mut Journal, new: &Geometry) -> Result<()> {
        let old = self.geometry();
        let mut meta = lock(&self.meta);
        self.check_quiet(&meta)?;
        let size = self.metadata_pages(|region| metadata::replace_size(region, new.size))?;
        let (mut freed, mut bitmaps) = (Vec::new(), Vec::new());
        let past: Vec<_> = self.bat.entries().filter(|(index, _)| past_end(&old, new, *index)).collect();
        for (index, entry) in past {
            match (old.block_of(index), entry.place()) {
                (Some(block), Some(at)) => freed.push(Freed { block, at }),
                (None, Some(at)) if old.differencing => bitmaps.push(at),
                _ => (),
            }
            self.set_entry(&mut meta, index, Entry::absent());
        }
        // The size is first: then nobody sees what the others take away.
        let pages: Pages = size.into_iter().chain(self.take_pages(&mut meta)).collect();
        self.poison_on_error(self.write_metadata(journal, meta.space.len(), &pages))?;
        self.size.store(new.size, Ordering::Release);
        for at in bitmaps.into_iter().filter(|at| self.store.punch(*at, MIB).is_ok()) {
            meta.space.give(at, MIB);
        }
        drop(meta);
        self.release(freed);
        self.punch_tail(new);
        Ok(())
    }

    fn check_quiet(&self, meta: &Meta) -> Result<()> {
        // (Places of bitmaps that nothing needed so far may wait for their first use: they are zeros, and stay good.)
        if meta.pending.is_empty() {
            return Ok(());
        }
        Err(self.error(ErrorKind::Invalid, "it is being written, and cannot be resized at the same time"))
    }

    /// Moves the table to where there is room for all the entries of the larger disk.
    fn make_room(&self, meta: &mut Meta, new: &Geometry) -> Result<()> {
        if new.entries() * 8 <= meta.bat_region.length {
            return Ok(());
        }
        let length = new.table_region();
        let region = Region { offset: meta.space.region(&*self.store, length)?, length };
        let moved = self.write_table(region);
        let old = std::mem::replace(&mut meta.bat_region, region);
        if let Err(error) = moved {
            // Which of the two tables counts is not certain any more.
            return self.poison_on_error(Err(error));
        }
        // A place that cannot be punched is lost until the image is opened again.
        if self.store.punch(old.offset, old.length).is_ok() {
            meta.space.give(old.offset, old.length);
        }
        Ok(())
    }

    fn write_table(&self, region: Region) -> Result<()> {
        for page in self.bat.loaded() {
            let (offset, bytes) = self.bat.page(page);
            self.store.write_at(&bytes[..], region.offset + offset)?;
        }
        let table = with_bat_at(&*self.store, region)?;
        self.store.sync()?;
        for at in REGION_TABLE_AT.into_iter().rev() {
            self.store.write_at(&table, at)?;
            self.store.sync()?;
        }
        Ok(())
    }

    /// What the last block holds past the old end becomes zeros of its own, if the block has a place or a parent.
    fn add_tail(&self, meta: &mut Meta, old: &Geometry, new: &Geometry) -> Result<()> {
        let block = old.blocks() - 1;
        let inside = old.inside(block);
        if inside == old.block {
            return Ok(());
        }
        let tail = inside / old.sector..old.block_sectors();
        let entry = self.entry(block);
        match entry.state() {
            Some(State::Full | State::Partial) => {
                meta.space.reach(&*self.store, entry.offset() + old.block)?;
                self.store.punch(entry.offset() + inside, old.block - inside)?;
                if entry.state() == Some(State::Partial) {
                    self.load_bitmaps(block, &tail)?;
                    self.bitmaps.put(block, &tail, true, &mut meta.dirty.bitmaps);
                }
            }
            // Without a place of its own the parent would show through.
            Some(State::NotPresent) if old.differencing => {
                let chunk = block / old.ratio();
                self.find_bitmap_place(meta, chunk)?;
                if let Some(at) = meta.pending_bitmaps.remove(&chunk) {
                    self.set_entry(meta, new.bitmap_index(chunk), Entry::full(at));
                }
                let place = self.new_block(meta)?;
                let whole = 0..old.block_sectors();
                self.load_bitmaps(block, &whole)?;
                self.bitmaps.put(block, &whole, false, &mut meta.dirty.bitmaps);
                self.bitmaps.put(block, &tail, true, &mut meta.dirty.bitmaps);
                self.set_entry(meta, new.payload_index(block), Entry::partial(place));
            }
            _ => (),
        }
        Ok(())
    }

    /// The entries of the new blocks: zeros, whatever a parent holds; in a fixed disk with places. Whatever lay there before is none
    /// of this disk's.
    fn add_blocks(&self, meta: &mut Meta, old: &Geometry, new: &Geometry) -> Result<()> {
        let (first, last) = (new.payload_index(old.blocks() - 1) + 1, new.entries() - 1);
        let pages = first / WORDS as u64..=last / WORDS as u64;
        // These hold entries of the old disk, too: the log carries them.
        let mut shared = vec![(first - 1) / WORDS as u64];
        if old.differencing {
            shared.push(old.bitmap_index(old.chunks() - 1) / WORDS as u64);
        }
        // Behind the old end the file may hold more than was read of it.
        meta.dirty.bat.extend(&shared);
        let stale: Vec<_> = self.bat.entries().filter(|(index, _)| past_end(new, old, *index)).collect();
        for (index, _) in stale {
            self.set_entry(meta, index, Entry::absent());
        }
        let places = match self.kind {
            Kind::Fixed => Some(meta.space.blocks(&*self.store, new.blocks() - old.blocks())?),
            _ => None,
        };
        for block in old.blocks()..new.blocks() {
            let entry = match places {
                Some(at) => Entry::full(at + (block - old.blocks()) * new.block),
                None if new.differencing => Entry::zero(),
                None => break,
            };
            self.set_entry(meta, new.payload_index(block), entry);
        }
        let table = meta.bat_region.offset;
        let beside: Vec<_> = pages.filter(|page| !shared.contains(page)).collect();
        for run in beside.chunk_by(|one, next| one + 1 == *next) {
            self.store.punch(table + run[0] * PAGE_BYTES, run.len() as u64 * PAGE_BYTES)?;
        }
        for page in self.bat.loaded().filter(|page| beside.binary_search(page).is_ok()) {
            let (offset, bytes) = self.bat.page(page);
            self.store.write_at(&bytes[..], table + offset)?;
            meta.dirty.bat.remove(&page);
        }
        Ok(())
    }

    /// Gives back what the last block holds past the end. (Whoever grows the disk again relies on nothing there.)
    fn punch_tail(&self, new: &Geometry) {
        let block = new.blocks() - 1;
        let inside = new.inside(block);
        let Some(at) = self.entry(block).place().filter(|_| inside < new.block) else { return };
        let end = self.store.len().map_or(0, |length| length.min(at + new.block));
        if at + inside < end {
            // Space that stays taken does no harm.
            let _ = self.store.punch(at + inside, end - at - inside);
        }
    }

    /// See [`crate::Layer::forget`].
    pub(crate) fn forget(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        self.check_writable()?;
        let geometry = self.geometry();
        let mut meta = lock(&self.meta);
        if !geometry.differencing || meta.carry.is_some() {
            return Ok(());
        }
        let whole = self.pieces(offset, len).filter(|piece| piece.bytes == (0..geometry.inside(piece.block)));
        for block in whole.map(|piece| piece.block) {
            let entry = self.entry(block);
            if entry != Entry::absent() && !meta.pending.contains_key(&block) {
                self.set_entry(&mut meta, geometry.payload_index(block), Entry::absent());
                meta.freed.extend(entry.place().map(|at| Freed { block, at }));
            }
        }
        Ok(())
    }
}

/// Whether an entry is for something that the smaller of two disks does not have. `larger` says what it is for.
fn past_end(larger: &Geometry, smaller: &Geometry, index: u64) -> bool {
    match larger.block_of(index) {
        Some(block) => block >= smaller.blocks(),
        None => index / (larger.ratio() + 1) >= smaller.chunks() || index % (larger.ratio() + 1) != larger.ratio(),
    }
}
