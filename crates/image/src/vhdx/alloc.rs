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
}

impl Space {
    /// Space for blocks of `block` bytes in a file of `len` bytes whose used part ends at `end`.
    pub(crate) fn new(len: u64, end: u64, block: u64) -> Self {
        // What lies between `end` and the file's length may hold old bytes: it is a free run, not fresh space.
        let fresh = len.max(end).next_multiple_of(MIB);
        let mut space = Self { len, end: fresh, runs: BTreeMap::new(), pieces: Vec::new(), block };
        space.give(end, fresh - end);
        space
    }

    /// The file's length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    fn alignment(&self) -> u64 {
        self.block.min(ALIGNMENT)
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
        if at.next_multiple_of(self.alignment()) + self.block <= end {
            self.runs.insert(at, end - at);
        } else {
            self.pieces.extend((at..end).step_by(MIB as usize));
        }
    }

    /// A place for a block. If the file cannot grow, nothing has changed.
    pub(crate) fn block(&mut self, store: &dyn Store) -> store::Result<Place> {
        if let Some((&run, &len)) = self.runs.first_key_value() {
            let at = run.next_multiple_of(self.alignment());
            self.grow(store, at + self.block)?;
            self.runs.remove(&run);
            self.keep_rest(run, at);
            self.keep_rest(at + self.block, run + len);
            return Ok(Place { at, stale: true });
        }
        let at = self.end.next_multiple_of(self.alignment());
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

    /// Cuts off what the file grew ahead of need.
    pub(crate) fn trim(&mut self, store: &dyn Store) -> store::Result<()> {
        if self.len > self.end {
            store.set_len(self.end)?;
            self.len = self.end;
        }
        Ok(())
    }
}
