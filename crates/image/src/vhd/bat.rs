//! How the disk is cut into blocks, and the block table: where each block lies.

use super::format::SECTOR;
use crate::cells::Cells;
use crate::layer::Kind;
use std::sync::atomic::{AtomicU32, Ordering};

/// How the virtual disk is cut into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Virtual size in bytes, a multiple of [`SECTOR`].
    pub(crate) size: u64,
    /// Bytes in a block: a power of two, at least [`SECTOR`]. Of a fixed disk, a sector.
    pub(crate) block: u64,
    /// Whether there are blocks at all, and whether bitmaps say, sector by sector, what is here and what is the parent's.
    pub(crate) kind: Kind,
}

impl Geometry {
    /// Blocks of the disk; the last may stick out past its end. A fixed disk has none: its data lies in a row.
    pub(crate) fn blocks(&self) -> u64 {
        if self.kind == Kind::Fixed { 0 } else { self.size.div_ceil(self.block) }
    }

    /// Whether what is not here is the parent's.
    pub(crate) fn differencing(&self) -> bool {
        self.kind == Kind::Differencing
    }

    /// The bytes of `block` that lie inside the disk.
    pub(crate) fn inside(&self, block: u64) -> u64 {
        self.block.min(self.size - block * self.block)
    }

    /// Sectors in a block.
    pub(crate) fn block_sectors(&self) -> u64 {
        self.block / SECTOR
    }

    /// Bytes of the bitmap that stands before each block's data, in whole sectors.
    pub(crate) fn bitmap(&self) -> u64 {
        self.block_sectors().div_ceil(8).next_multiple_of(SECTOR)
    }

    /// Bytes of the part of the table that these blocks need, in whole sectors.
    pub(crate) fn table(&self) -> u64 {
        (self.blocks() * 4).next_multiple_of(SECTOR)
    }
}

/// A block that has no place.
const ABSENT: u32 = u32::MAX;
/// Entries in a sector of the table.
pub(crate) const SECTOR_ENTRIES: u64 = SECTOR / 4;
/// Entries whose memory is taken together, when the first of them gets a place; whole sectors of the table.
const GROUP: u64 = 8 * SECTOR_ENTRIES;

/// The table in memory: the truth, read without a lock and changed under the metadata lock. It has as many entries as are asked for.
pub(crate) struct Bat(Cells<Box<[AtomicU32]>>);

impl Bat {
    /// A table without places.
    pub(crate) fn new() -> Self {
        Self(Cells::new())
    }

    fn entry(&self, block: u64) -> Option<&AtomicU32> {
        self.0.get(block / GROUP).map(|group| &group[(block % GROUP) as usize])
    }

    fn entry_to_set(&self, block: u64) -> &AtomicU32 {
        let group = self.0.get_or_init(block / GROUP, || (0..GROUP).map(|_| AtomicU32::new(ABSENT)).collect());
        &group[(block % GROUP) as usize]
    }

    /// Takes over a sector of the table, entries behind the last block's included: they are written back as they were.
    pub(crate) fn load(&self, sector: u64, bytes: &[u8]) {
        for (block, bytes) in (sector * SECTOR_ENTRIES..).zip(bytes.as_chunks::<4>().0) {
            let place = u32::from_be_bytes(*bytes);
            if place != ABSENT {
                self.entry_to_set(block).store(place, Ordering::Relaxed);
            }
        }
    }

    /// Where the block's bitmap, and behind it its data, begins in the file: bytes. `None` if it has no place.
    pub(crate) fn get(&self, block: u64) -> Option<u64> {
        place(self.entry(block)?)
    }

    /// The blocks that have a place, in order, and their places.
    pub(crate) fn placed(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.filled().flat_map(|(number, group)| {
            let numbered = (number * GROUP..).zip(&**group);
            numbered.filter_map(|(block, entry)| Some((block, place(entry)?)))
        })
    }

    /// Gives the block a place, which is checked to fit when it is found. Says which sector of the table this changes.
    pub(crate) fn set(&self, block: u64, place: u64) -> u64 {
        self.entry_to_set(block).store((place / SECTOR) as u32, Ordering::SeqCst);
        block / SECTOR_ENTRIES
    }

    /// Takes the block's place away. Says which sector of the table this changes.
    pub(crate) fn clear(&self, block: u64) -> u64 {
        if let Some(entry) = self.entry(block) {
            entry.store(ABSENT, Ordering::SeqCst);
        }
        block / SECTOR_ENTRIES
    }

    /// A sector of the table as it lies in the file.
    pub(crate) fn sector(&self, sector: u64) -> Vec<u8> {
        let blocks = sector * SECTOR_ENTRIES..(sector + 1) * SECTOR_ENTRIES;
        let entries = blocks.map(|block| self.entry(block).map_or(ABSENT, |entry| entry.load(Ordering::SeqCst)));
        entries.flat_map(u32::to_be_bytes).collect()
    }
}

fn place(entry: &AtomicU32) -> Option<u64> {
    let place = entry.load(Ordering::SeqCst);
    (place != ABSENT).then_some(u64::from(place) * SECTOR)
}

/// The last place that an entry can name, bytes.
pub(crate) const MAX_PLACE: u64 = (ABSENT as u64 - 1) * SECTOR;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_big_endian_sector_numbers() {
        let bat = Bat::new();
        assert_eq!(bat.get(129), None);
        assert_eq!(bat.set(129, 0x0102_0304 * SECTOR), 1);
        assert_eq!(bat.get(129), Some(0x0102_0304 * SECTOR));
        assert_eq!(bat.sector(1)[..12], [255, 255, 255, 255, 1, 2, 3, 4, 255, 255, 255, 255]);
        let other = Bat::new();
        other.load(1, &bat.sector(1));
        assert_eq!(other.get(129), bat.get(129));
        assert_eq!(bat.set(0, MAX_PLACE), 0);
        assert_eq!(bat.get(0), Some(MAX_PLACE));
        bat.set(4_000_000, 512);
        let placed: Vec<_> = bat.placed().collect();
        assert_eq!(placed, [(0, MAX_PLACE), (129, 0x0102_0304 * SECTOR), (4_000_000, 512)]);
        assert_eq!(bat.clear(129), 1);
        assert_eq!((bat.get(129), bat.sector(1)), (None, vec![0xFF; 512]));
    }

    #[test]
    fn bitmaps_fill_whole_sectors() {
        let bitmap = |block| Geometry { size: 1 << 30, block, kind: Kind::Dynamic }.bitmap();
        assert_eq!((bitmap(512), bitmap(512 << 10), bitmap(2 << 20), bitmap(32 << 20)), (512, 512, 512, 8192));
    }
}
