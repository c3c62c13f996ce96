//! Moving blocks from the end of the file into holes, so that the file can be cut.
//!
//! A block is copied, the copy synced, and then one log entry says that it lies there; only after that is the old place free. So a
//! pack that was cut off anywhere has moved some blocks, and the next one goes on.

use super::bat::Entry;
use super::format::MIB;
use super::write::Freed;
use super::{Inner, Meta, lock};
use crate::Result;

/// So many bytes are moved between two flushes.
const BATCH: u64 = 64 * MIB;

/// Something that can be moved: where it lies, and its entry's index.
struct Placed {
    at: u64,
    index: u64,
    entry: Entry,
    len: u64,
}

impl Inner {
    /// See [`crate::Layer::pack`].
    pub(crate) fn pack(&self, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool> {
        self.check_writable()?;
        self.start()?;
        // Twice: what the first one gives up is free after the second.
        self.flush()?;
        self.flush()?;
        let placed = self.placed();
        let total = self.begin_pack(&placed);
        let (mut done, mut unflushed) = (0, 0);
        for block in &placed {
            if !self.move_down(&mut lock(&self.meta), block)? {
                continue;
            }
            (done, unflushed) = (done + block.len, unflushed + block.len);
            if unflushed >= BATCH {
                self.flush_moved()?;
                unflushed = 0;
            }
            if !progress(done, total.max(done)) {
                self.flush_moved()?;
                return Ok(false);
            }
        }
        self.flush_moved()?;
        Ok(true)
    }

    /// Everything that has a place, the highest first.
    fn placed(&self) -> Vec<Placed> {
        let geometry = self.geometry();
        let entries = self.bat.entries().filter(|(index, _)| *index < geometry.entries());
        let placed = entries.filter_map(|(index, entry)| {
            let is_block = geometry.block_of(index).is_some();
            let at = entry.place().filter(|_| is_block || geometry.differencing)?;
            Some(Placed { at, index, entry, len: if is_block { geometry.block } else { MIB } })
        });
        let mut placed: Vec<_> = placed.collect();
        placed.sort_unstable_by_key(|placed| std::cmp::Reverse(placed.at));
        placed
    }

    /// Prepares the free space, and says about how many bytes will move.
    fn begin_pack(&self, placed: &[Placed]) -> u64 {
        let mut meta = lock(&self.meta);
        let block = self.geometry().block;
        if placed.iter().any(|placed| placed.len == block && !placed.at.is_multiple_of(block.min(2 * MIB))) {
            meta.space.unalign();
        }
        let end = meta.space.len().saturating_sub(meta.space.free());
        placed.iter().take_while(|placed| placed.at >= end).map(|placed| placed.len).sum()
    }

    /// Copies one block to the lowest hole below it, and names the new place. Says whether there was one.
    fn move_down(&self, meta: &mut Meta, block: &Placed) -> Result<bool> {
        let is_block = self.geometry().block_of(block.index);
        let place = match is_block {
            Some(_) => meta.space.block_below(block.at),
            None => meta.space.bitmap_below(block.at),
        };
        let Some(to) = place else { return Ok(false) };
        if let Err(error) = self.copy_place(block, to) {
            meta.space.give(to, block.len);
            return Err(error);
        }
        self.set_entry(meta, block.index, block.entry.moved(to));
        match is_block {
            Some(number) => meta.freed.push(Freed { block: number, at: block.at }),
            None => meta.freed_bitmaps.push(block.at),
        }
        Ok(true)
    }

    /// Copies what a place holds; what is zeros there stays a hole.
    fn copy_place(&self, from: &Placed, to: u64) -> Result<()> {
        self.store.punch(to, from.len)?;
        // The last block may be cut off by the file's end.
        let len = from.len.min(self.store.len()?.saturating_sub(from.at));
        let mut piece = vec![0; MIB as usize];
        for start in (0..len).step_by(MIB as usize) {
            let piece = &mut piece[..MIB.min(len - start) as usize];
            self.store.read_at(piece, from.at + start)?;
            if piece.iter().any(|byte| *byte != 0) {
                self.store.write_at(piece, to + start)?;
            }
        }
        Ok(())
    }

    /// Makes the moves so far durable, and the old places free.
    fn flush_moved(&self) -> Result<()> {
        self.flush()?;
        let mut meta = lock(&self.meta);
        let bitmaps = std::mem::take(&mut meta.freed_bitmaps);
        for at in bitmaps.into_iter().filter(|at| self.store.punch(*at, MIB).is_ok()) {
            meta.space.give(at, MIB);
        }
        Ok(())
    }
}
