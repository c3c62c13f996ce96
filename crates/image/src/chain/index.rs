//! The flat index: for each block of the disk the runs of sectors that it is made of, whatever the depth of the chain.
//!
//! ```text
//!   block 7 ─► [ 0: layer 2 @ 8192 | 12: zero | 64: layer 0 @ 4096 | … ]      8 bytes a run, at most 32 KiB a block
//! ```
//!
//! A shard holds some of the blocks in bounded memory; what has not been used for longest (roughly: a clock) makes room.

use super::resolve::{Found, Place};
use crate::{Error, ErrorKind, Result};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Bytes of the disk that one entry describes.
pub(crate) const BLOCK: u64 = 2 << 20;

/// What an entry costs beside its runs, bytes: table, slot and allocator, roughly.
const OVERHEAD: usize = 112;

const AT_BITS: u32 = 40;
const LAYER_BITS: u32 = 12;
const AT_ZERO: u64 = (1 << AT_BITS) - 1;
const AT_HOLE: u64 = AT_ZERO - 1;

/// The most layers that an entry can tell apart.
pub(crate) const MAX_LAYERS: usize = 1 << LAYER_BITS;

// A block has at most 2^12 sectors of 512 bytes: first sector, layer and file offset (in sectors) fit into 64 bits.
const _: () = assert!(BLOCK / 512 <= 1 << (64 - LAYER_BITS - AT_BITS));

/// A run: first sector within the block (12 bits), layer (12), file offset in sectors (40; the two highest stand for zeros).
/// It ends where the next begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packed(u64);

impl Packed {
    fn new(first: u64, place: Place, sector: u64) -> Result<Self> {
        let (layer, at) = match place {
            Place::Hole => (0, AT_HOLE),
            Place::Zero { layer } => (layer as u64, AT_ZERO),
            Place::Data { layer, at } if at % sector == 0 && at / sector < AT_HOLE - BLOCK / 512 => {
                (layer as u64, at / sector)
            }
            Place::Data { at, .. } => {
                return Err(Error::new(
                    ErrorKind::Damaged,
                    "a layer",
                    format!("data lies at the impossible offset {at}"),
                ));
            }
        };
        Ok(Self((first << (LAYER_BITS + AT_BITS)) | (layer << AT_BITS) | at))
    }

    fn first(self) -> u64 {
        self.0 >> (LAYER_BITS + AT_BITS)
    }

    /// The place of the run's sector `skip`.
    fn place(self, skip: u64, sector: u64) -> Place {
        let layer = (self.0 >> AT_BITS) as usize & (MAX_LAYERS - 1);
        match self.0 & AT_ZERO {
            AT_HOLE => Place::Hole,
            AT_ZERO => Place::Zero { layer },
            at => Place::Data { layer, at: (at + skip) * sector },
        }
    }

    /// The same run from sector `first` on.
    fn cut(self, first: u64) -> Self {
        let at = self.0 & AT_ZERO;
        let skip = if at >= AT_HOLE { 0 } else { first - self.first() };
        let rest = self.0 & ((1 << (LAYER_BITS + AT_BITS)) - 1);
        Self((first << (LAYER_BITS + AT_BITS)) | (rest + skip))
    }

    /// Whether `next` only says what this one says anyway.
    fn continues(self, next: Self) -> bool {
        self.cut(next.first()) == next
    }
}

/// The runs of one block.
#[derive(Debug)]
pub(crate) struct Runs {
    packed: Vec<Packed>,
    /// Sectors that the block has (the disk's last block may be short).
    end: u64,
}

impl Runs {
    /// From the resolved runs of the block at `start` (bytes).
    pub(crate) fn new(start: u64, found: &[Found], sector: u64) -> Result<Self> {
        let packed = found
            .iter()
            .map(|run| Packed::new((run.offset - start) / sector, run.place, sector))
            .collect::<Result<_>>()?;
        let end = found.last().map_or(0, |run| (run.offset + run.len - start) / sector);
        Ok(Self { packed, end })
    }

    /// The run from sector `from` on, at most up to `to`; offsets are bytes of the disk, the block begins at `start`.
    pub(crate) fn at(&self, start: u64, from: u64, to: u64, sector: u64) -> Found {
        let index = self.position(from);
        let run = self.packed[index];
        let end = self.packed.get(index + 1).map_or(self.end, |next| next.first()).min(to);
        let place = run.place(from - run.first(), sector);
        Found { offset: start + from * sector, len: (end - from) * sector, place }
    }

    /// Which run a sector is in. It looks first where the run would be if all were of one length, and widens from there: for a
    /// block of many runs that is one cache line instead of one for each halving.
    fn position(&self, sector: u64) -> usize {
        let count = self.packed.len();
        let guess = (sector * count as u64 / self.end.max(1)) as usize;
        let (mut low, mut high, mut step) = (guess.min(count - 1), guess + 1, 1);
        while low > 0 && self.packed[low].first() > sector {
            high = low;
            low = low.saturating_sub(step);
            step *= 2;
        }
        while high < count && self.packed[high].first() <= sector {
            low = high;
            high += step;
            step *= 2;
        }
        let high = high.min(count);
        low + self.packed[low..high].partition_point(|run| run.first() <= sector) - 1
    }

    /// Sectors `[from, to)` now lie elsewhere.
    fn put(&mut self, from: u64, to: u64, new: Packed) {
        let first = self.packed.partition_point(|run| run.first() < from);
        let last = self.packed.partition_point(|run| run.first() <= to);
        let rest = (to < self.end).then(|| self.packed[last - 1].cut(to));
        let before = first.checked_sub(1).map(|index| self.packed[index]);
        let joined = before.is_some_and(|run| run.continues(new));
        let rest = rest.filter(|rest| !new.continues(*rest));
        self.packed.splice(first..last, (!joined).then_some(new).into_iter().chain(rest));
    }

    fn bytes(&self) -> usize {
        OVERHEAD + self.packed.capacity() * size_of::<Packed>()
    }
}

#[derive(Debug)]
struct Entry {
    block: u64,
    used: bool,
    runs: Runs,
}

/// Spreads block numbers; nobody gains from making them collide.
#[derive(Debug, Default)]
pub(crate) struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte) ^ self.0);
        }
    }

    fn write_u64(&mut self, block: u64) {
        let mixed = block.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// Some of the blocks.
#[derive(Debug)]
pub(crate) struct Shard {
    sector: u64,
    limit: usize,
    bytes: usize,
    hand: usize,
    /// Grows with each change of what a block is made of: an answer worked out before it must not be kept after it.
    generation: u64,
    entries: Vec<Entry>,
    by_block: HashMap<u64, usize, BuildHasherDefault<BlockHasher>>,
}

impl Shard {
    /// At most about `limit` bytes.
    pub(crate) fn new(sector: u64, limit: usize) -> Self {
        Self { sector, limit, bytes: 0, hand: 0, generation: 0, entries: Vec::new(), by_block: HashMap::default() }
    }

    /// The run of a block from sector `from` on, at most up to `to`, if the block is known.
    pub(crate) fn get(&mut self, block: u64, from: u64, to: u64) -> Option<Found> {
        let entry = &mut self.entries[*self.by_block.get(&block)?];
        entry.used = true;
        Some(entry.runs.at(block * BLOCK, from, to, self.sector))
    }

    /// To be given back to [`Shard::insert`].
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Keeps a block's runs, unless something changed since `generation` was read.
    pub(crate) fn insert(&mut self, block: u64, runs: Runs, generation: u64) {
        if generation != self.generation || self.by_block.contains_key(&block) {
            return;
        }
        self.bytes += runs.bytes();
        self.make_room();
        self.by_block.insert(block, self.entries.len());
        // Not used yet: what is looked at once only, by a scan, makes room first.
        self.entries.push(Entry { block, used: false, runs });
    }

    /// Bytes `[offset, offset + len)`, inside one block, now lie at `at` of `layer`.
    pub(crate) fn put(&mut self, offset: u64, len: u64, layer: usize, at: u64) -> Result<()> {
        self.generation += 1;
        let Some(&index) = self.by_block.get(&(offset / BLOCK)) else { return Ok(()) };
        let from = offset % BLOCK / self.sector;
        let new = Packed::new(from, Place::Data { layer, at }, self.sector)?;
        let runs = &mut self.entries[index].runs;
        let before = runs.bytes();
        runs.put(from, from + len / self.sector, new);
        self.bytes = self.bytes - before + runs.bytes();
        self.make_room();
        Ok(())
    }

    pub(crate) fn forget(&mut self, block: u64) {
        self.generation += 1;
        if let Some(&index) = self.by_block.get(&block) {
            self.remove(index);
        }
    }

    pub(crate) fn clear(&mut self) {
        *self = Self { generation: self.generation + 1, ..Self::new(self.sector, self.limit) };
    }

    fn make_room(&mut self) {
        while self.bytes > self.limit && !self.entries.is_empty() {
            if self.hand >= self.entries.len() {
                self.hand = 0;
            }
            if std::mem::take(&mut self.entries[self.hand].used) {
                self.hand += 1;
            } else {
                self.remove(self.hand);
            }
        }
    }

    fn remove(&mut self, index: usize) {
        let entry = self.entries.swap_remove(index);
        self.bytes -= entry.runs.bytes();
        self.by_block.remove(&entry.block);
        if let Some(moved) = self.entries.get(index) {
            self.by_block.insert(moved.block, index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECTOR: u64 = 512;

    proptest! {
        /// Runs against one place per sector.
        #[test]
        fn puts_are_read_back(writes in prop::collection::vec((0u64..64, 1u64..20, 0usize..3, 0u64..100), 0..40)) {
            let mut model = [Place::Hole; 64];
            let mut runs = Runs::new(0, &[Found { offset: 0, len: 64 * SECTOR, place: Place::Hole }], SECTOR).unwrap();
            for (from, len, layer, at) in writes {
                let to = (from + len).min(64);
                for (n, place) in model[from as usize..to as usize].iter_mut().enumerate() {
                    *place = Place::Data { layer, at: (at + n as u64) * SECTOR };
                }
                runs.put(from, to, Packed::new(from, Place::Data { layer, at: at * SECTOR }, SECTOR).unwrap());
                prop_assert!(runs.packed.windows(2).all(|w| w[0].first() < w[1].first() && !w[0].continues(w[1])));
                for (sector, place) in model.iter().enumerate() {
                    let offset = sector as u64 * SECTOR;
                    let found = runs.at(0, sector as u64, sector as u64 + 1, SECTOR);
                    prop_assert_eq!(found, Found { offset, len: SECTOR, place: *place });
                    // As far as it goes on, and no further than there are sectors.
                    let long = runs.at(0, sector as u64, 64, SECTOR);
                    let next = (offset + long.len) / SECTOR;
                    prop_assert!(next == 64 || runs.packed.iter().any(|run| run.first() == next));
                }
            }
        }
    }

    #[test]
    fn stays_within_its_bytes_and_keeps_what_is_used() {
        let mut shard = Shard::new(SECTOR, 20 * (OVERHEAD + 8));
        let whole = |block: u64| Found { offset: block * BLOCK, len: BLOCK, place: Place::Zero { layer: 5 } };
        for block in 0..100 {
            let runs = Runs::new(block * BLOCK, &[whole(block)], SECTOR).unwrap();
            shard.insert(block, runs, shard.generation());
            assert!(shard.bytes <= shard.limit + OVERHEAD + 8);
            assert!(block == 0 || shard.get(0, 0, 1).is_some(), "block 0 is used all the time");
        }
        assert_eq!(shard.get(1, 0, 1), None);
        shard.clear();
        assert!(shard.get(0, 0, 1).is_none() && shard.bytes == 0);
    }

    #[test]
    fn an_answer_from_before_a_change_is_not_kept() {
        let mut shard = Shard::new(SECTOR, 1 << 20);
        let generation = shard.generation();
        shard.put(0, SECTOR, 1, 4096).unwrap();
        let old = Runs::new(0, &[Found { offset: 0, len: BLOCK, place: Place::Hole }], SECTOR).unwrap();
        shard.insert(0, old, generation);
        assert_eq!(shard.get(0, 0, 1), None);
    }

    #[test]
    fn offsets_no_file_can_have_are_refused() {
        let place = Place::Data { layer: 0, at: 1 << 60 };
        assert!(Packed::new(0, place, SECTOR).is_err());
        assert!(Packed::new(0, Place::Data { layer: 0, at: 100 }, SECTOR).is_err());
    }
}
