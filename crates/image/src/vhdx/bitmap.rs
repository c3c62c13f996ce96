//! The sector bitmaps of a differencing file: which sectors of a partial block are here.
//!
//! One bit a sector, lowest bit first; one bitmap block of 1 MiB a chunk. Pages are loaded when first asked for and stay: memory
//! is bounded by the bitmap blocks that the file has.

use super::bat::Geometry;
use super::format::PAGE_BYTES;
use super::page::{Page, PageBytes};
use crate::cells::Cells;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::OnceLock;

/// Bits in a page.
const PAGE_BITS: u64 = PAGE_BYTES * 8;
/// Pages in a chunk's bitmap block.
const CHUNK_PAGES: usize = 256;

/// A page of a bitmap: of which chunk, and which page of its bitmap block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BitmapPage {
    pub(crate) chunk: u64,
    pub(crate) page: u64,
}

/// The pages of one bitmap block.
type ChunkPages = Box<[OnceLock<Page>]>;

/// The bitmaps in memory. They are the truth for every page that is loaded.
pub(crate) struct Bitmaps {
    /// For what does not change when the disk is resized.
    geometry: Geometry,
    chunks: Cells<ChunkPages>,
}

impl Bitmaps {
    /// Bitmaps of which nothing is loaded.
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self { geometry, chunks: Cells::new() }
    }

    /// The bits, counted from the chunk's first, of the sectors `sectors` (counted from the block's first) of `block`.
    fn bits(&self, block: u64, sectors: &Range<u64>) -> (u64, Range<u64>) {
        let base = block % self.geometry.ratio() * self.geometry.block_sectors();
        (block / self.geometry.ratio(), base + sectors.start..base + sectors.end)
    }

    /// The pages that hold the bits of these sectors of `block`.
    pub(crate) fn pages(&self, block: u64, sectors: &Range<u64>) -> impl Iterator<Item = BitmapPage> + use<> {
        let (chunk, bits) = self.bits(block, sectors);
        (bits.start / PAGE_BITS..bits.end.div_ceil(PAGE_BITS)).map(move |page| BitmapPage { chunk, page })
    }

    /// A loaded page.
    fn get(&self, at: BitmapPage) -> Option<&Page> {
        self.chunks.get(at.chunk)?[at.page as usize].get()
    }

    /// Whether a page is in memory.
    pub(crate) fn is_loaded(&self, at: BitmapPage) -> bool {
        self.get(at).is_some()
    }

    /// Takes a page over from the file, unless it is in memory already: then what is in memory is newer.
    pub(crate) fn load(&self, at: BitmapPage, bytes: &[u8]) {
        let chunk = self.chunks.get_or_init(at.chunk, || (0..CHUNK_PAGES).map(|_| OnceLock::new()).collect());
        let _ = chunk[at.page as usize].set(Page::from_bytes(bytes));
    }

    /// A loaded page's bytes.
    pub(crate) fn bytes(&self, at: BitmapPage) -> PageBytes {
        self.get(at).expect("only loaded pages are changed").to_bytes()
    }

    /// The first run of equal bits in `sectors` of `block`: whether they are set, and how many. The pages must be loaded; one
    /// that is not reads as clear.
    pub(crate) fn run(&self, block: u64, sectors: &Range<u64>) -> (bool, u64) {
        let (chunk, bits) = self.bits(block, sectors);
        let word_at = |bit: u64| {
            let page = self.get(BitmapPage { chunk, page: bit / PAGE_BITS });
            page.map_or(0, |page| page.get((bit % PAGE_BITS / 64) as usize))
        };
        let set = word_at(bits.start) >> (bits.start % 64) & 1 == 1;
        let mut bit = bits.start;
        while bit < bits.end {
            let word = word_at(bit);
            let differing = (if set { !word } else { word }) >> (bit % 64);
            if differing != 0 {
                bit += u64::from(differing.trailing_zeros());
                break;
            }
            bit = (bit / 64 + 1) * 64;
        }
        (set, bit.min(bits.end) - bits.start)
    }

    /// Whether all these sectors' bits are set; so they are if there are none.
    pub(crate) fn all_set(&self, block: u64, sectors: &Range<u64>) -> bool {
        sectors.is_empty() || self.run(block, sectors) == (true, sectors.end - sectors.start)
    }

    /// Sets or clears these sectors' bits and records the pages that changed. The pages must be loaded. Under the metadata lock.
    pub(crate) fn put(&self, block: u64, sectors: &Range<u64>, set: bool, changed: &mut BTreeSet<BitmapPage>) {
        let (chunk, bits) = self.bits(block, sectors);
        let mut bit = bits.start;
        while bit < bits.end {
            let end = ((bit / 64 + 1) * 64).min(bits.end);
            let mask = (u64::MAX >> (64 - (end - bit))) << (bit % 64);
            let at = BitmapPage { chunk, page: bit / PAGE_BITS };
            let page = self.get(at).expect("only loaded pages are changed");
            let index = (bit % PAGE_BITS / 64) as usize;
            let (old, new) = (page.get(index), if set { page.get(index) | mask } else { page.get(index) & !mask });
            if old != new {
                page.set(index, new);
                changed.insert(at);
            }
            bit = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhdx::format::{MIB, PAGE};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_agree_with_single_bits(changes in prop::collection::vec((0u64..4096, 1u64..3000, any::<bool>()), 0..12)) {
            let geometry = Geometry { size: 64 * MIB, sector: 512, block: 2 * MIB, differencing: true };
            let bitmaps = Bitmaps::new(geometry);
            bitmaps.load(BitmapPage { chunk: 0, page: 0 }, &[0; PAGE]);
            let (mut model, mut changed) = (vec![false; 4096], BTreeSet::new());
            for (start, len, set) in changes {
                let sectors = start..(start + len).min(4096);
                bitmaps.put(3, &sectors, set, &mut changed);
                model[sectors.start as usize..sectors.end as usize].fill(set);
            }
            let mut at = 0;
            while at < 4096 {
                let (set, len) = bitmaps.run(3, &(at..4096));
                prop_assert!(len > 0);
                prop_assert!(model[at as usize..(at + len) as usize].iter().all(|bit| *bit == set));
                at += len;
                prop_assert!(at == 4096 || model[at as usize] != set);
            }
            prop_assert!(!bitmaps.run(2, &(0..4096)).0);
        }
    }
}
