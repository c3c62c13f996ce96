//! The structures as they lie in the file, and nothing else. Numbers are big-endian; UUIDs are plain bytes.
//!
//! From Microsoft's "Virtual Hard Disk Image Format Specification" 1.0, and from files where the text is silent.

use std::time::SystemTime;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in a sector: of the disk, of the bitmaps, and what a device writes at once.
pub(crate) const SECTOR: u64 = 512;
/// One TiB.
const TIB: u64 = 1 << 40;
/// The largest dynamic or differencing disk, 2040 GiB: places are 32-bit sector numbers.
pub(crate) const MAX_SPARSE: u64 = 2040 << 30;
/// The largest fixed disk that we make or read, the limit of VHDX.
pub(crate) const MAX_FIXED: u64 = 64 * TIB;
/// Block sizes that we read and write, bytes; powers of two. The text says nothing; every file seen has 512 KiB or 2 MiB.
pub(crate) const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=256 << 20;
/// The most entries of a block table that we read: 2040 GiB in blocks of 512 KiB need fewer.
pub(crate) const MAX_BLOCKS: u64 = 4 << 20;

/// What the file ends with, and a dynamic or differencing one begins with, too.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawFooter {
    pub(crate) cookie: [u8; 8],
    pub(crate) features: U32,
    pub(crate) version: U32,
    /// Where the header lies; all ones in a fixed file.
    pub(crate) data_offset: U64,
    /// Seconds since [`EPOCH`].
    pub(crate) timestamp: U32,
    pub(crate) creator: [u8; 4],
    pub(crate) creator_version: U32,
    pub(crate) host: [u8; 4],
    pub(crate) original_size: U64,
    /// The disk's size: the one that counts.
    pub(crate) size: U64,
    pub(crate) cylinders: U16,
    pub(crate) heads: u8,
    pub(crate) sectors: u8,
    pub(crate) kind: U32,
    pub(crate) checksum: U32,
    pub(crate) id: [u8; 16],
    pub(crate) saved_state: u8,
    pub(crate) reserved: [u8; 427],
}
const _: () = assert!(size_of::<RawFooter>() == SECTOR as usize);
/// `conectix`
pub(crate) const FOOTER_COOKIE: [u8; 8] = *b"conectix";
/// The version of footer and header that is known: 1.0.
pub(crate) const VERSION: u32 = 0x0001_0000;
/// A bit that is always set.
pub(crate) const FEATURES: u32 = 2;
/// An offset that leads nowhere.
pub(crate) const NOWHERE: u64 = u64::MAX;
/// Every block has its place.
pub(crate) const KIND_FIXED: u32 = 2;
/// Blocks are placed when first written.
pub(crate) const KIND_DYNAMIC: u32 = 3;
/// The same, over a parent.
pub(crate) const KIND_DIFFERENCING: u32 = 4;
/// What Windows says. QEMU before 10 takes the size of creators that it does not know from the geometry, which is rounded down.
pub(crate) const CREATOR: [u8; 4] = *b"win ";
/// Windows 10, and us: `tn` is no version that Windows ever had.
pub(crate) const CREATOR_VERSION: u32 = 0x000A_0000 | u16::from_be_bytes(*b"tn") as u32;
/// Windows, for readers that look.
pub(crate) const HOST: [u8; 4] = *b"Wi2k";

/// What a dynamic or differencing file says of its blocks and its parent.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) cookie: [u8; 8],
    pub(crate) data_offset: U64,
    pub(crate) table_offset: U64,
    pub(crate) version: U32,
    pub(crate) max_entries: U32,
    pub(crate) block_size: U32,
    pub(crate) checksum: U32,
    pub(crate) parent_id: [u8; 16],
    pub(crate) parent_timestamp: U32,
    pub(crate) reserved: U32,
    /// UTF-16, big-endian.
    pub(crate) parent_name: [u8; 512],
    pub(crate) locators: [RawLocator; LOCATORS],
    pub(crate) reserved2: [u8; 256],
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES as usize);
/// Bytes of a header.
pub(crate) const HEADER_BYTES: u64 = 1024;
/// `cxsparse`
pub(crate) const HEADER_COOKIE: [u8; 8] = *b"cxsparse";

/// One way of saying where the parent is.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawLocator {
    pub(crate) code: [u8; 4],
    /// Bytes in practice, although old texts say sectors.
    pub(crate) space: U32,
    /// Bytes.
    pub(crate) length: U32,
    pub(crate) reserved: U32,
    pub(crate) offset: U64,
}
const _: () = assert!(size_of::<RawLocator>() == 24);
/// Locators in a header.
pub(crate) const LOCATORS: usize = 8;
/// A path relative to the child, UTF-16, little-endian.
pub(crate) const LOCATOR_RELATIVE: [u8; 4] = *b"W2ru";
/// An absolute path, UTF-16, little-endian.
pub(crate) const LOCATOR_ABSOLUTE: [u8; 4] = *b"W2ku";
/// A file URL, UTF-8.
pub(crate) const LOCATOR_URL: [u8; 4] = *b"MacX";
/// Ours: a second UUID that the parent may have while a fold changes it, 16 bytes. Others skip what they do not know.
pub(crate) const LOCATOR_SECOND: [u8; 4] = *b"tnby";
/// Ours: the note (`docs/formats/note.md`); also in an image without a parent.
pub(crate) const LOCATOR_NOTE: [u8; 4] = *b"tnno";

/// Where the checksum lies in a footer.
pub(crate) const FOOTER_CHECKSUM: usize = 64;
/// Where the checksum lies in a header.
pub(crate) const HEADER_CHECKSUM: usize = 36;

/// The ones' complement of the sum of all bytes but the checksum's own, which lie at `at`.
pub(crate) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let others = bytes[..at].iter().chain(&bytes[at + 4..]);
    !others.fold(0u32, |sum, byte| sum.wrapping_add((*byte).into()))
}

/// The geometry that the format's appendix gives a disk of so many bytes: cylinders, heads, sectors. We write it and never read it:
/// it is rounded down, and ends at 127 GiB.
pub(crate) fn geometry(size: u64) -> (u16, u8, u8) {
    let total = (size / SECTOR).min(65_535 * 16 * 255);
    if total >= 65_535 * 16 * 63 {
        return ((total / 255 / 16) as u16, 16, 255);
    }
    let mut sectors = 17;
    let mut tracks = total / sectors;
    let mut heads = tracks.div_ceil(1024).max(4);
    if tracks >= heads * 1024 || heads > 16 {
        (sectors, heads) = (31, 16);
        tracks = total / sectors;
    }
    if tracks >= heads * 1024 {
        (sectors, heads) = (63, 16);
        tracks = total / sectors;
    }
    ((tracks / heads) as u16, heads as u8, sectors as u8)
}

/// The beginning of the year 2000, in seconds since 1970.
const EPOCH: u64 = 946_684_800;

/// This moment, as a footer says it.
pub(crate) fn now() -> u32 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since.as_secs().saturating_sub(EPOCH)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries_are_those_of_other_tools() {
        // Of files that Windows made.
        assert_eq!(geometry(4 << 20), (120, 4, 17));
        assert_eq!(geometry(10 << 20), (301, 4, 17));
        assert_eq!(geometry(127 << 30), (65_278, 16, 255));
        assert_eq!(geometry(2040 << 30), (65_535, 16, 255));
        assert_eq!(geometry(512), (0, 4, 17));
        for mib in 1..5000 {
            let (cylinders, heads, sectors) = geometry(mib << 20);
            let covered = u64::from(cylinders) * u64::from(heads) * u64::from(sectors) * SECTOR;
            assert!(covered <= mib << 20 && covered + (1 << 20) > mib << 20, "{mib} MiB");
        }
    }

    #[test]
    fn the_checksum_leaves_itself_out() {
        let mut bytes = [0u8; 512];
        bytes[0] = 3;
        bytes[FOOTER_CHECKSUM..][..4].fill(0xFF);
        assert_eq!(checksum(&bytes, FOOTER_CHECKSUM), !3);
    }
}
