//! The memory disk's table as it lies on the disk. Little-endian, like the VHDX around it. See `docs/formats/memory.md`.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a memory disk begins with.
pub(crate) const MAGIC: [u8; 8] = *b"TENBYRAM";
/// The table's version.
pub(crate) const VERSION: u32 = 1;

/// The table's head; `entries` regions follow it at once.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawHead {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U32,
    /// CRC-32C of the head and all regions, with this field zero.
    pub(crate) checksum: U32,
    pub(crate) entries: U32,
    /// The stream's id of the RAM section.
    pub(crate) section: U32,
    /// Bytes in a page: 4096.
    pub(crate) page: U32,
    pub(crate) reserved: U32,
    /// The disk's size in bytes, as the layout has it.
    pub(crate) size: U64,
    /// What the capture did, in pages: see `Counts`.
    pub(crate) stored: U64,
    pub(crate) zeroed: U64,
    pub(crate) same: U64,
    pub(crate) empty: U64,
    pub(crate) padding: [u8; 56],
}
const _: () = assert!(size_of::<RawHead>() == 128);

/// One region of the disk.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawRegion {
    /// One of `kind`.
    pub(crate) kind: U32,
    /// CRC-32C of the region's bytes; 0 for RAM.
    pub(crate) checksum: U32,
    /// Where it begins, bytes; a multiple of 2 MiB.
    pub(crate) offset: U64,
    /// Its length in bytes.
    pub(crate) len: U64,
    pub(crate) name_len: u8,
    /// A RAM block's name, UTF-8, padded with zeros; empty for the others.
    pub(crate) name: [u8; 255],
}
const _: () = assert!(size_of::<RawRegion>() == 280);

/// What a region holds.
pub(crate) mod kind {
    pub(crate) const RAM: u32 = 1;
    pub(crate) const PRELUDE: u32 = 2;
    pub(crate) const DESCRIPTION: u32 = 3;
    pub(crate) const STATE: u32 = 4;
}
