//! The sector bitmaps: which sectors of a block are here. One bit a sector, the *highest* bit of a byte first.
//!
//! In a differencing file a clear bit means that the parent is asked. In a dynamic file bits only advise (what was never written is
//! zeros in the data as well): they are not read with the data, and all set when a block is written.

use super::bat::Geometry;
use super::format::SECTOR;
use crate::cells::Cells;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks whose bitmaps are kept together: an untouched stretch of the disk costs one pointer.
const GROUP: u64 = 1024;
/// Bits in a sector of a bitmap.
const SECTOR_BITS: u64 = SECTOR * 8;

/// A sector of a bitmap: of which block, and which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BitmapSector {
    pub(crate) block: u64,
    pub(crate) sector: u64,
}

/// A bitmap as big-endian words, so that the first sector's bit is a word's highest.
type Words = Box<[AtomicU64]>;
/// The bitmaps of one group.
type Group = Box<[OnceLock<Words>]>;

/// The bitmaps in memory: the truth for every block whose bitmap is loaded. Read without a lock, changed under the metadata lock;
/// they stay, so memory is bounded by the blocks that the file has.
pub(crate) struct Bitmaps {
    /// Bytes of one.
    bytes: u64,
    groups: Cells<Group>,
}

impl Bitmaps {
    /// Bitmaps of which none is loaded.
    pub(crate) fn new(geometry: &Geometry) -> Self {
        Self { bytes: geometry.bitmap(), groups: Cells::new() }
    }

    fn get(&self, block: u64) -> Option<&Words> {
        self.groups.get(block / GROUP)?[(block % GROUP) as usize].get()
    }

    /// Whether a block's bitmap is in memory.
    pub(crate) fn is_loaded(&self, block: u64) -> bool {
        self.get(block).is_some()
    }

    /// Takes a bitmap over, unless it is in memory already: then what is in memory is newer.
    pub(crate) fn load(&self, block: u64, bytes: &[u8]) {
        debug_assert_eq!(bytes.len() as u64, self.bytes);
        let group = self.groups.get_or_init(block / GROUP, || (0..GROUP).map(|_| OnceLock::new()).collect());
        let words = bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().expect("chunks of eight")));
        let _ = group[(block % GROUP) as usize].set(words.map(AtomicU64::new).collect());
    }

    /// The bitmap of a block that gets a place, whatever it was in an earlier life of the block.
    pub(crate) fn create(&self, block: u64, set: bool) {
        self.load(block, &vec![if set { 0xFF } else { 0 }; self.bytes as usize]);
        for word in self.get(block).into_iter().flatten() {
            word.store(if set { u64::MAX } else { 0 }, Ordering::SeqCst);
        }
    }

    fn word(&self, block: u64, bit: u64) -> u64 {
        self.get(block).map_or(0, |words| words[(bit / 64) as usize].load(Ordering::SeqCst))
    }

    /// The first run of equal bits in `sectors` of `block`: whether they are set, and how many. The bitmap must be loaded; one that
    /// is not reads as clear.
    pub(crate) fn run(&self, block: u64, sectors: &Range<u64>) -> (bool, u64) {
        let set = self.word(block, sectors.start) << (sectors.start % 64) >> 63 == 1;
        let mut bit = sectors.start;
        while bit < sectors.end {
            let word = self.word(block, bit);
            let differing = (if set { !word } else { word }) << (bit % 64);
            if differing != 0 {
                bit += u64::from(differing.leading_zeros());
                break;
            }
            bit = (bit / 64 + 1) * 64;
        }
        (set, bit.min(sectors.end) - sectors.start)
    }

    /// Whether all these sectors' bits are set; so they are if there are none.
    pub(crate) fn all_set(&self, block: u64, sectors: &Range<u64>) -> bool {
        sectors.is_empty() || self.run(block, sectors) == (true, sectors.end - sectors.start)
    }

    /// Sets these sectors' bits and records the sectors of the bitmap that changed. It must be loaded. Under the metadata lock.
    pub(crate) fn set(&self, block: u64, sectors: &Range<u64>, changed: &mut BTreeSet<BitmapSector>) {
        let words = self.get(block).expect("only loaded bitmaps are changed");
        let mut bit = sectors.start;
        while bit < sectors.end {
            let end = ((bit / 64 + 1) * 64).min(sectors.end);
            let mask = (u64::MAX << (64 - (end - bit))) >> (bit % 64);
            if words[(bit / 64) as usize].fetch_or(mask, Ordering::SeqCst) & mask != mask {
                changed.insert(BitmapSector { block, sector: bit / SECTOR_BITS });
            }
            bit = end;
        }
    }

    /// A loaded bitmap's bytes.
    pub(crate) fn bytes(&self, block: u64) -> Vec<u8> {
        let words = self.get(block).expect("only loaded bitmaps are changed");
        words.iter().flat_map(|word| word.load(Ordering::SeqCst).to_be_bytes()).collect()
    }

    /// The bytes of one sector of a loaded bitmap.
    pub(crate) fn sector(&self, at: BitmapSector) -> Vec<u8> {
        let words = self.get(at.block).expect("only loaded bitmaps are changed");
        let words = &words[(at.sector * SECTOR / 8) as usize..][..(SECTOR / 8) as usize];
        words.iter().flat_map(|word| word.load(Ordering::SeqCst).to_be_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bitmaps(block: u64) -> Bitmaps {
        Bitmaps::new(&Geometry { size: 64 << 20, block, kind: crate::Kind::Differencing })
    }

    #[test]
    fn the_highest_bit_is_the_first_sector() {
        let bitmaps = bitmaps(2 << 20);
        bitmaps.create(1, false);
        bitmaps.set(1, &(0..1), &mut BTreeSet::new());
        bitmaps.set(1, &(9..11), &mut BTreeSet::new());
        assert_eq!(bitmaps.bytes(1)[..3], [0x80, 0x60, 0]);
        assert_eq!(bitmaps.run(1, &(9..4096)), (true, 2));
    }

    #[test]
    fn changed_sectors_of_long_bitmaps_are_told_apart() {
        let bitmaps = bitmaps(8 << 20);
        bitmaps.create(0, false);
        let mut changed = BTreeSet::new();
        bitmaps.set(0, &(4095..4097), &mut changed);
        assert_eq!(changed.iter().map(|at| at.sector).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(bitmaps.sector(BitmapSector { block: 0, sector: 1 })[0], 0x80);
        changed.clear();
        bitmaps.set(0, &(4095..4096), &mut changed);
        assert!(changed.is_empty(), "it was set");
    }

    proptest! {
        #[test]
        fn runs_agree_with_single_bits(changes in prop::collection::vec((0u64..4096, 1u64..300), 0..12)) {
            let bitmaps = bitmaps(2 << 20);
            bitmaps.create(3, false);
            let mut model = vec![false; 4096];
            for (start, len) in changes {
                let sectors = start..(start + len).min(4096);
                bitmaps.set(3, &sectors, &mut BTreeSet::new());
                model[sectors.start as usize..sectors.end as usize].fill(true);
            }
            let other = self::bitmaps(2 << 20);
            other.load(3, &bitmaps.bytes(3));
            let mut at = 0;
            while at < 4096 {
                let (set, len) = other.run(3, &(at..4096));
                prop_assert!(len > 0);
                prop_assert!(model[at as usize..(at + len) as usize].iter().all(|bit| *bit == set));
                at += len;
                prop_assert!(at == 4096 || model[at as usize] != set);
            }
            prop_assert!(!other.run(2, &(0..4096)).0);
        }
    }
}
