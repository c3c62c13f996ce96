//! A record of hashes as it lies in its file. Little-endian. See `docs/formats/hashes.md`.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a record begins with.
pub(super) const MAGIC: [u8; 8] = *b"TENBYSUM";
/// The record's version.
pub(super) const VERSION: u32 = 1;
/// The head's length, bytes.
pub(super) const HEAD: usize = size_of::<Head>();
/// An entry's length, bytes.
pub(super) const ENTRY: usize = size_of::<Entry>();

/// The head; `count` entries follow it at once, and nothing else.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Head {
    pub(super) magic: [u8; 8],
    pub(super) version: U32,
    /// Bytes in a block: 2 MiB.
    pub(super) block: U32,
    /// BLAKE3 of the head, with this field zero, and all entries: the first half.
    pub(super) checksum: [u8; 16],
    /// The layer's id.
    pub(super) layer: [u8; 16],
    /// The disk's size in bytes.
    pub(super) size: U64,
    /// How many blocks were looked at, from the first on.
    pub(super) done: U64,
    pub(super) count: U64,
    pub(super) key: [u8; 32],
    pub(super) reserved: [u8; 24],
}
const _: () = assert!(HEAD == 128);

/// What a record of a memory's pages begins with.
pub(super) const PAGES_MAGIC: [u8; 8] = *b"TENBYPAG";
/// Its version.
pub(super) const PAGES_VERSION: u32 = 1;

/// The head of a record of a memory's pages; `count` entries follow it at once, and nothing else.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct PagesHead {
    pub(super) magic: [u8; 8],
    pub(super) version: U32,
    /// Bytes in a page: 4 KiB.
    pub(super) page: U32,
    /// BLAKE3 of the head, with this field zero, and all entries: the first half.
    pub(super) checksum: [u8; 16],
    /// The layer's id.
    pub(super) layer: [u8; 16],
    /// That of the layer below, zeros for none.
    pub(super) below: [u8; 16],
    /// The disk's size in bytes.
    pub(super) size: U64,
    pub(super) count: U64,
    pub(super) key: [u8; 32],
    /// 1 if all that the layer holds over the one below is recorded.
    pub(super) whole: U32,
    pub(super) reserved: [u8; 12],
}
const _: () = assert!(size_of::<PagesHead>() == HEAD);

/// A block that is not all zeros; or a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Entry {
    pub(super) block: U32,
    pub(super) hash: [u8; 16],
}
const _: () = assert!(ENTRY == 20);
