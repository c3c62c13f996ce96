//! Moving blocks from the end of the file into holes, so that the file can be cut.
//!
//! What holds nothing goes first. Then a block is copied, the copy synced, and the table says that it lies there; only after that is the
//! old place free. No hole was anybody's before the pack began: so one that was cut off anywhere has moved some blocks, and the next one
//! goes on. A file that others made is ours from then on.

use super::alloc::Space;
use super::flush::Session;
use super::resize::held;
use super::{Inner, Meta, lock};
use crate::Result;
use crate::layer::Kind;

/// So many bytes are moved between two flushes.
const BATCH: u64 = 64 << 20;
/// Data is looked at in pieces of so many bytes.
const GRAIN: u64 = 64 << 10;

/// A block that lies at `from`, and the hole that it fits into.
struct Move {
    block: u64,
    from: u64,
    to: u64,
}

impl Inner {
    /// See [`crate::Layer::pack`].
    pub(crate) fn pack(&self, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool> {
        self.check_writable()?;
        if self.shape.kind == Kind::Fixed {
            return Ok(true);
        }
        self.start()?;
        self.flush()?;
        let mut session = lock(&self.session);
        let mut meta = lock(&self.meta);
        self.adopt(&mut session, &mut meta)?;
        let packed = self.drop_empty(&mut meta).and_then(|()| self.move_down(&session, &mut meta, progress));
        // What was moved before an error is good where it is.
        self.tidy(&mut session, &mut meta).and(packed)
    }

    /// Lets go of the blocks of which nothing is here: whose bits are clear, or, without a parent, whose data is zeros.
    fn drop_empty(&self, meta: &mut Meta) -> Result<()> {
        let geometry = self.geometry();
        let mut buffer = vec![0; GRAIN as usize];
        for (block, at) in self.placed() {
            if self.is_empty(block, at, &mut buffer)? {
                let sector = self.bat.clear(block);
                meta.dirty.bat.insert(sector);
                meta.freed.push(held(&geometry, block, at));
            }
        }
        self.flush_alone(meta)
    }

    fn is_empty(&self, block: u64, at: u64, buffer: &mut [u8]) -> Result<bool> {
        let geometry = self.geometry();
        if geometry.differencing() {
            self.load_bitmap(block, at)?;
            let sectors = 0..geometry.inside(block).div_ceil(super::format::SECTOR);
            return Ok(self.bitmaps.run(block, &sectors) == (false, sectors.end));
        }
        let (mut from, end) = (self.data_at(at), held(&geometry, block, at).end);
        while let Some((start, stop)) = self.store.data(from)?.filter(|(start, _)| *start < end) {
            for piece in (start..stop.min(end)).step_by(buffer.len()) {
                let buffer = &mut buffer[..GRAIN.min(stop.min(end) - piece) as usize];
                self.store.read_at(buffer, piece)?;
                if buffer.iter().any(|byte| *byte != 0) {
                    return Ok(false);
                }
            }
            from = stop;
        }
        Ok(true)
    }

    fn move_down(
        &self,
        session: &Session,
        meta: &mut Meta,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<bool> {
        let moves = self.moves(session);
        let (whole, mut unflushed) = (self.shape.bitmap() + self.shape.block, 0);
        let total = moves.len() as u64 * whole;
        for (done, Move { block, from, to }) in (1..).zip(moves) {
            self.store.punch(to, whole)?;
            self.copy_block(block, to)?;
            let sector = self.bat.set(block, to);
            meta.dirty.bat.insert(sector);
            meta.freed.push(held(&self.geometry(), block, from));
            unflushed += whole;
            if unflushed >= BATCH {
                self.flush_alone(meta)?;
                unflushed = 0;
            }
            if !progress(done * whole, total) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The highest blocks into the lowest holes, until there is no hole below a block.
    fn moves(&self, session: &Session) -> Vec<Move> {
        let mut blocks: Vec<_> = self.placed().collect();
        blocks.sort_unstable_by_key(|(_, at)| std::cmp::Reverse(*at));
        // Where others have placed blocks at any sector nothing else fits into the holes.
        let aligned = blocks.iter().all(|(_, at)| Space::is_aligned(self.data_at(*at)));
        let (bitmap, block) = (self.shape.bitmap(), self.shape.block);
        let holes = Space::holes(self.used(session, self.geometry().table()), bitmap, block, aligned);
        let pairs = blocks.into_iter().zip(holes).take_while(|((_, from), to)| to < from);
        pairs.map(|((block, from), to)| Move { block, from, to }).collect()
    }
}
