//! The block allocation table: where each block lies, and how much of it counts.

use super::format::{CHUNK_SECTORS, MIB, PAGE_BYTES};
use super::page::{Page, PageBytes, WORDS};
use crate::cells::Cells;

/// How the virtual disk is cut into blocks and chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Virtual size in bytes, a multiple of `sector`.
    pub(crate) size: u64,
    /// Bytes in a logical sector: 512 or 4096.
    pub(crate) sector: u64,
    /// Bytes in a block, a power of two of at least 1 MiB.
    pub(crate) block: u64,
    /// Whether bitmaps say, sector by sector, what is here and what is the parent's.
    pub(crate) differencing: bool,
}

impl Geometry {
    /// Blocks of the disk; the last may stick out past its end.
    pub(crate) fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// Blocks in a chunk: the stretch that one bitmap block describes.
    pub(crate) fn ratio(&self) -> u64 {
        CHUNK_SECTORS * self.sector / self.block
    }

    /// Chunks of the disk; the last may stick out past its end.
    pub(crate) fn chunks(&self) -> u64 {
        self.blocks().div_ceil(self.ratio())
    }

    /// Sectors in a block.
    pub(crate) fn block_sectors(&self) -> u64 {
        self.block / self.sector
    }

    /// The bytes of `block` that lie inside the disk.
    pub(crate) fn inside(&self, block: u64) -> u64 {
        self.block.min(self.size - block * self.block)
    }

    /// Entries that the table has. A differencing file has a bitmap entry at the end of every chunk, also where the last chunk
    /// has fewer blocks (real files do; the text's formula says otherwise).
    pub(crate) fn entries(&self) -> u64 {
        if self.differencing { self.chunks() * (self.ratio() + 1) } else { self.payload_index(self.blocks() - 1) + 1 }
    }

    /// The table's length in bytes, in whole MiB: its region.
    pub(crate) fn table_region(&self) -> u64 {
        (self.entries() * 8).next_multiple_of(MIB)
    }

    /// The index of a block's entry: after each chunk's blocks stands the chunk's bitmap entry.
    pub(crate) fn payload_index(&self, block: u64) -> u64 {
        block + block / self.ratio()
    }

    /// The index of a chunk's bitmap entry.
    pub(crate) fn bitmap_index(&self, chunk: u64) -> u64 {
        chunk * (self.ratio() + 1) + self.ratio()
    }

    /// Which block an entry is for; `None` for a bitmap entry or one past the last block.
    pub(crate) fn block_of(&self, index: u64) -> Option<u64> {
        let (chunk, place) = (index / (self.ratio() + 1), index % (self.ratio() + 1));
        let block = chunk * self.ratio() + place;
        (place < self.ratio() && block < self.blocks()).then_some(block)
    }
}

/// What a block's entry says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing is here: the parent's, or zeros where there is none.
    NotPresent,
    /// Zeros, whatever a parent holds (states zero, undefined and unmapped of the format).
    Zero,
    /// All of the block is here; its bitmap is not to be asked.
    Full,
    /// The sectors whose bits are set are here, the others are the parent's. Differencing only.
    Partial,
}

/// One entry of the table: a state and a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry(pub(crate) u64);

impl Entry {
    const NOT_PRESENT: u64 = 0;
    const UNDEFINED: u64 = 1;
    const ZERO: u64 = 2;
    const UNMAPPED: u64 = 3;
    const FULL: u64 = 6;
    const PARTIAL: u64 = 7;

    /// A block or bitmap block that lies at `at`, a multiple of 1 MiB.
    fn placed(state: u64, at: u64) -> Self {
        debug_assert!(at.is_multiple_of(MIB));
        Self(state | (at / MIB) << 20)
    }

    /// Nothing: the parent's, or zeros where there is none. Also a bitmap block that is not there.
    pub(crate) fn absent() -> Self {
        Self(Self::NOT_PRESENT)
    }

    /// A block of zeros without a place.
    pub(crate) fn zero() -> Self {
        Self(Self::ZERO)
    }

    /// A block all of which lies at `at`; also a bitmap block that is present.
    pub(crate) fn full(at: u64) -> Self {
        Self::placed(Self::FULL, at)
    }

    /// A block of which some lies at `at`.
    pub(crate) fn partial(at: u64) -> Self {
        Self::placed(Self::PARTIAL, at)
    }

    /// The state; `None` for those that the format reserves.
    pub(crate) fn state(self) -> Option<State> {
        match self.0 & 7 {
            Self::NOT_PRESENT => Some(State::NotPresent),
            Self::UNDEFINED | Self::ZERO | Self::UNMAPPED => Some(State::Zero),
            Self::FULL => Some(State::Full),
            Self::PARTIAL => Some(State::Partial),
            _ => None,
        }
    }

    /// The number of the state, for messages.
    pub(crate) fn state_number(self) -> u64 {
        self.0 & 7
    }

    /// The file offset that the entry holds in bytes, whether its state counts it or not.
    pub(crate) fn offset(self) -> u64 {
        // 44 bits of MiB: 2^64 bytes at most, which is why this cannot overflow.
        (self.0 >> 20) * MIB
    }

    /// The same state at another place.
    pub(crate) fn moved(self, at: u64) -> Self {
        Self::placed(self.state_number(), at)
    }

    /// Where the block lies, in a state that has a place.
    pub(crate) fn place(self) -> Option<u64> {
        matches!(self.state(), Some(State::Full | State::Partial)).then(|| self.offset())
    }
}

/// The table in memory. It is the truth; pages of it that are all zero take no memory. It has as many entries as are asked for.
pub(crate) struct Bat {
    pages: Cells<Page>,
}

impl Bat {
    /// A table of zero entries.
    pub(crate) fn new() -> Self {
        Self { pages: Cells::new() }
    }

    /// Takes over page `page` as it lies in the file.
    pub(crate) fn load(&self, page: u64, bytes: &[u8]) {
        if bytes.iter().any(|byte| *byte != 0) {
            // A page is loaded once, before the layer is used.
            self.pages.get_or_init(page, || Page::from_bytes(bytes));
        }
    }

    /// The entry at `index`.
    pub(crate) fn get(&self, index: u64) -> Entry {
        let page = self.pages.get(index / WORDS as u64);
        Entry(page.map_or(0, |page| page.get((index % WORDS as u64) as usize)))
    }

    /// All entries that are not zero, with their indices.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (u64, Entry)> {
        let all = self.pages.filled().flat_map(|(number, page)| {
            (0..WORDS).map(move |index| (number * WORDS as u64 + index as u64, Entry(page.get(index))))
        });
        all.filter(|(_, entry)| entry.0 != 0)
    }

    /// Replaces the entry at `index` and says which page that changed. Under the metadata lock only.
    pub(crate) fn set(&self, index: u64, entry: Entry) -> u64 {
        let page = index / WORDS as u64;
        self.pages.get_or_init(page, Page::zeroed).set((index % WORDS as u64) as usize, entry.0);
        page
    }

    /// A page's bytes and its offset inside the table's region.
    pub(crate) fn page(&self, page: u64) -> (u64, PageBytes) {
        (page * PAGE_BYTES, self.pages.get_or_init(page, Page::zeroed).to_bytes())
    }

    /// The pages that hold anything, or ever did.
    pub(crate) fn loaded(&self) -> impl Iterator<Item = u64> {
        self.pages.filled().map(|(number, _)| number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(size: u64, sector: u64, block: u64, differencing: bool) -> Geometry {
        Geometry { size, sector, block, differencing }
    }

    #[test]
    fn the_table_is_interleaved_as_in_real_files() {
        // Windows' 4 MiB differencing disk: two blocks, and the bitmap entry at 2048.
        let small = geometry(4 * MIB, 512, 2 * MIB, true);
        assert_eq!((small.ratio(), small.blocks(), small.chunks()), (2048, 2, 1));
        assert_eq!(small.bitmap_index(0), 2048);
        assert_eq!(small.entries(), 2049);
        // Without a parent the entries end with the last block.
        assert_eq!(geometry(4 * MIB, 512, 2 * MIB, false).entries(), 2);
        let large = geometry((4 << 30) + 1024, 512, 2 * MIB, false);
        assert_eq!(large.payload_index(2048), 2049);
        assert_eq!(large.entries(), 2050);
        assert_eq!(large.inside(2048), 1024);
        assert_eq!(geometry(MIB, 512, 32 * MIB, false).ratio(), 128);
        assert_eq!(geometry(MIB, 4096, 2 * MIB, false).ratio(), 16384);
    }

    #[test]
    fn an_index_knows_its_block() {
        let disk = geometry(9 << 30, 512, 2 * MIB, true);
        for block in [0, 1, 2047, 2048, 4095, 4096, disk.blocks() - 1] {
            assert_eq!(disk.block_of(disk.payload_index(block)), Some(block));
        }
        assert_eq!(disk.block_of(disk.bitmap_index(0)), None);
        assert_eq!(disk.block_of(disk.payload_index(disk.blocks() - 1) + 1), None);
    }

    #[test]
    fn entries_keep_state_and_place() {
        let entry = Entry::partial(5 * MIB);
        assert_eq!((entry.state(), entry.place()), (Some(State::Partial), Some(5 * MIB)));
        assert_eq!(Entry::zero().place(), None);
        assert_eq!(Entry(5).state(), None);
        assert_eq!(Entry(u64::MAX).offset(), u64::MAX - (MIB - 1));
    }
}
