//! Free space of the file: who gets which place next.

use super::format::MIB;
use std::collections::BTreeMap;
use store::Store;

/// Blocks start at multiples of this if they are as large: good for direct I/O, reflinks and huge extents.
const ALIGNMENT: u64 = 2 * MIB;
/// A file grows by an eighth of itself, but not by more than this at once.
const MAX_STEP: u64 = 1 << 30;

/// A place that was handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// File offset in bytes.
    pub(crate) at: u64,
    /// Whether old bytes may lie there; else it reads as zeros.
    pub(crate) stale: bool,
}

/// The file's free space: runs between what is used, and everything past `end`.
///
/// Invariant: past `end` the file was never written since it was opened, and what it grows by reads as zeros.
#[derive(Debug)]
pub(crate) struct Space {
    /// The file's length in bytes.
    len: u64,
    /// The end of everything that was ever used.
    end: u64,
    /// Free runs below `end` that hold at least one aligned block: offset to length.
    runs: BTreeMap<u64, u64>,
    /// Free pieces of 1 MiB that hold no block; bitmap blocks go there.
    pieces: Vec<u64>,
    block: u64,
    /// Blocks start at multiples of this.
    alignment: u64,
}

impl Space {
    /// Space for blocks of `block` bytes in a file of `len` bytes whose used part ends at `end`.
    pub(crate) fn new(len: u64, end: u64, block: u64) -> Self {
        // What lies between `end` and the file's length may hold old bytes: it is a free run, not fresh space.
        let fresh = len.max(end).next_multiple_of(MIB);
        let alignment = block.min(ALIGNMENT);
        let mut space = Self { len, end: fresh, runs: BTreeMap::new(), pieces: Vec::new(), block, alignment };
        space.give(end, fresh - end);
        space
    }

    /// The file's length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Takes back `len` bytes at `at`, both multiples of 1 MiB, that nobody uses any more.
    pub(crate) fn give(&mut self, at: u64, len: u64) {
        let (mut at, mut end) = (at, at + len);
        if let Some((&before, &before_len)) = self.runs.range(..at).next_back()
            && before + before_len == at
        {
            at = before;
            self.runs.remove(&before);
        }
        if let Some(after_len) = self.runs.remove(&end) {
            end += after_len;
        }
        if at.next_multiple_of(self.alignment) + self.block <= end {
            self.runs.insert(at, end - at);
        } else {
            self.pieces.extend((at..end).step_by(MIB as usize));
        }
    }

    /// A place for a block. If the file cannot grow, nothing has changed.
    pub(crate) fn block(&mut self, store: &dyn Store) -> store::Result<Place> {
        if let Some((&run, &len)) = self.runs.first_key_value() {
            let at = run.next_multiple_of(self.alignment);
            self.grow(store, at + self.block)?;
            self.runs.remove(&run);
            self.keep_rest(run, at);
            self.keep_rest(at + self.block, run + len);
            return Ok(Place { at, stale: true });
        }
        let at = self.end.next_multiple_of(self.alignment);
        self.grow(store, at + self.block)?;
        self.pieces.extend((self.end..at).step_by(MIB as usize));
        self.end = at + self.block;
        Ok(Place { at, stale: false })
    }

    fn keep_rest(&mut self, start: u64, end: u64) {
        if start < end {
            self.give(start, end - start);
        }
    }

    /// A place for a bitmap block of 1 MiB. Two share an aligned pair, so that blocks stay aligned.
    pub(crate) fn bitmap(&mut self, store: &dyn Store) -> store::Result<Place> {
        if let Some(&at) = self.pieces.last() {
            self.grow(store, at + MIB)?;
            self.pieces.pop();
            return Ok(Place { at, stale: true });
        }
        let at = self.end.next_multiple_of(ALIGNMENT);
        self.grow(store, at + ALIGNMENT)?;
        self.pieces.extend((self.end..at).step_by(MIB as usize));
        self.end = at + ALIGNMENT;
        self.pieces.push(at + MIB);
        Ok(Place { at, stale: false })
    }

    /// Makes the file reach `need`, and further if it has to grow at all. (A file whose length is no multiple of 1 MiB may end
    /// inside a free piece.)
    fn grow(&mut self, store: &dyn Store, need: u64) -> store::Result<()> {
        if need <= self.len {
            return Ok(());
        }
        let step = (self.len / 8).clamp(self.block.min(MAX_STEP), MAX_STEP).next_multiple_of(MIB);
        let generous = need.max(self.len + step);
        if store.set_len(generous).is_ok() {
            self.len = generous;
            return Ok(());
        }
        store.set_len(need)?;
        self.len = need;
        Ok(())
    }

    /// Room for a table of `len` bytes, a multiple of 1 MiB, all zeros, at the end of the file.
    pub(crate) fn region(&mut self, store: &dyn Store, len: u64) -> store::Result<u64> {
        let at = self.end;
        self.grow(store, at + len)?;
        self.end = at + len;
        Ok(at)
    }

    /// Places for `count` blocks one behind the other, all zeros, at the end of the file.
    pub(crate) fn blocks(&mut self, store: &dyn Store, count: u64) -> store::Result<u64> {
        let at = self.end.next_multiple_of(self.alignment);
        self.reach(store, at + count * self.block)?;
        self.pieces.extend((self.end..at).step_by(MIB as usize));
        self.end = at + count * self.block;
        Ok(at)
    }

    /// Makes the file reach `need`: no further, unlike what grows for blocks.
    pub(crate) fn reach(&mut self, store: &dyn Store, need: u64) -> store::Result<()> {
        if need > self.len {
            store.set_len(need)?;
            self.len = need;
        }
        Ok(())
    }

    /// The lowest place for a block, if one lies below `limit`. Old bytes may lie there.
    pub(crate) fn block_below(&mut self, limit: u64) -> Option<u64> {
        let (&run, &len) = self.runs.first_key_value()?;
        let at = run.next_multiple_of(self.alignment);
        if at >= limit || at + self.block > self.len {
            return None;
        }
        self.runs.remove(&run);
        self.keep_rest(run, at);
        self.keep_rest(at + self.block, run + len);
        Some(at)
    }

    /// The lowest place for a bitmap block, if one lies below `limit`. Old bytes may lie there. Places that hold no block go first.
    pub(crate) fn bitmap_below(&mut self, limit: u64) -> Option<u64> {
        let fits = |at: &u64| *at < limit && at + MIB <= self.len;
        if let Some(index) =
            (0..self.pieces.len()).min_by_key(|index| self.pieces[*index]).filter(|index| fits(&self.pieces[*index]))
        {
            return Some(self.pieces.swap_remove(index));
        }
        let (&run, &len) = self.runs.first_key_value().filter(|(run, _)| fits(run))?;
        self.runs.remove(&run);
        self.keep_rest(run + MIB, run + len);
        Some(run)
    }

    /// Free bytes below the end.
    pub(crate) fn free(&self) -> u64 {
        self.runs.values().sum::<u64>() + self.pieces.len() as u64 * MIB
    }

    /// From now on blocks start at any MiB: in a file whose blocks do so already nothing else fits into the holes.
    pub(crate) fn unalign(&mut self) {
        self.alignment = MIB;
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.sort_unstable();
        for run in pieces.chunk_by(|one, next| one + MIB == *next) {
            self.give(run[0], run.len() as u64 * MIB);
        }
    }

    /// Cuts off what is free at the file's end. The file is not written any more afterwards.
    pub(crate) fn trim(&mut self, store: &dyn Store) -> store::Result<()> {
        self.pieces.sort_unstable();
        loop {
            if let Some((&at, _)) = self.runs.last_key_value().filter(|(at, len)| *at + *len == self.end) {
                self.runs.remove(&at);
                self.end = at;
            } else if self.pieces.last().is_some_and(|at| at + MIB == self.end) {
                self.pieces.pop();
                self.end -= MIB;
            } else {
                break;
            }
        }
        if self.len > self.end {
            store.set_len(self.end)?;
            self.len = self.end;
        }
        Ok(())
    }
}
