//! The structures of MS-VHDX as they lie in the file, and their fixed places.
//!
//! All integers are little-endian; GUIDs are in Microsoft's mixed-endian byte order. Nothing here decides anything: the readers
//! and writers do.

use uuid::{Uuid, uuid};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// One kibibyte in bytes.
pub(crate) const KIB: u64 = 1 << 10;
/// One mebibyte in bytes: the unit of every place in a VHDX.
pub(crate) const MIB: u64 = 1 << 20;

/// The unit in which the log carries metadata, and in which we keep it.
pub(crate) const PAGE: usize = 4096;
/// [`PAGE`] for file offsets.
pub(crate) const PAGE_BYTES: u64 = PAGE as u64;

/// The first eight bytes of the file.
pub(crate) const FILE_SIGNATURE: [u8; 8] = *b"vhdxfile";
/// Where the two copies of the header lie.
pub(crate) const HEADER_AT: [u64; 2] = [64 * KIB, 128 * KIB];
/// Where the two copies of the region table lie.
pub(crate) const REGION_TABLE_AT: [u64; 2] = [192 * KIB, 256 * KIB];
/// The length of a region table and of a metadata table in bytes.
pub(crate) const TABLE_BYTES: usize = 64 * KIB as usize;
/// Nothing but headers and region tables lies below this offset.
pub(crate) const HEADER_SECTION: u64 = MIB;

/// The region that holds the block allocation table.
pub(crate) const REGION_BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
/// The region that holds the metadata table and its items.
pub(crate) const REGION_METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");

/// Metadata item: block size and flags.
pub(crate) const ITEM_FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
/// Metadata item: virtual size in bytes.
pub(crate) const ITEM_DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
/// Metadata item: the disk's identity as the guest sees it (SCSI page 83).
pub(crate) const ITEM_DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
/// Metadata item: logical sector size in bytes.
pub(crate) const ITEM_LOGICAL_SECTOR: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
/// Metadata item: physical sector size in bytes.
pub(crate) const ITEM_PHYSICAL_SECTOR: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
/// Metadata item: where the parent is.
pub(crate) const ITEM_PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");
/// Metadata item: present while the file is still being made.
pub(crate) const ITEM_INCOMPLETE: Uuid = uuid!("71cc85f0-1b69-4e28-9558-c3bf83ae75d3");
/// Metadata item of ours, a user's: the note (`docs/formats/note.md`).
pub(crate) const ITEM_NOTE: Uuid = uuid!("7e2d5b1c-0f53-4c0e-9a43-6d1f4a0c7b92");
/// The one type of parent locator.
pub(crate) const LOCATOR_TYPE: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");

/// The largest virtual size, 64 TiB.
pub(crate) const MAX_SIZE: u64 = 64 << 40;
/// The smallest and the largest block.
pub(crate) const BLOCK_SIZES: std::ops::RangeInclusive<u32> = (1 << 20)..=(256 << 20);
/// Bits in one 1 MiB bitmap block: the sectors of one chunk.
pub(crate) const CHUNK_SECTORS: u64 = 1 << 23;

/// A GUID in the file's byte order.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Guid([u8; 16]);

impl From<Uuid> for Guid {
    fn from(id: Uuid) -> Self {
        Self(id.to_bytes_le())
    }
}

impl From<Guid> for Uuid {
    fn from(id: Guid) -> Self {
        Self::from_bytes_le(id.0)
    }
}

impl std::fmt::Debug for Guid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(&Uuid::from(*self), f)
    }
}

/// The header without its 4,016 reserved bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) signature: [u8; 4],
    pub(crate) checksum: U32,
    pub(crate) sequence: U64,
    pub(crate) file_write: Guid,
    pub(crate) data_write: Guid,
    pub(crate) log: Guid,
    pub(crate) log_version: U16,
    pub(crate) version: U16,
    pub(crate) log_length: U32,
    pub(crate) log_offset: U64,
}
const _: () = assert!(size_of::<RawHeader>() == 80);
/// `head`
pub(crate) const HEADER_SIGNATURE: [u8; 4] = *b"head";

/// The beginning of a region table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawRegionTable {
    pub(crate) signature: [u8; 4],
    pub(crate) checksum: U32,
    pub(crate) count: U32,
    pub(crate) reserved: U32,
}
const _: () = assert!(size_of::<RawRegionTable>() == 16);
/// `regi`
pub(crate) const REGION_SIGNATURE: [u8; 4] = *b"regi";
/// Entries that fit into a region table.
pub(crate) const MAX_REGIONS: u32 = 2047;

/// One region.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawRegion {
    pub(crate) id: Guid,
    pub(crate) offset: U64,
    pub(crate) length: U32,
    pub(crate) flags: U32,
}
const _: () = assert!(size_of::<RawRegion>() == 32);
/// A reader that does not know the region must refuse the file.
pub(crate) const REGION_REQUIRED: u32 = 1;

/// The beginning of the metadata table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawMetadataTable {
    pub(crate) signature: [u8; 8],
    pub(crate) reserved: U16,
    pub(crate) count: U16,
    pub(crate) reserved2: [u8; 20],
}
const _: () = assert!(size_of::<RawMetadataTable>() == 32);
/// `metadata`
pub(crate) const METADATA_SIGNATURE: [u8; 8] = *b"metadata";
/// Entries that fit into a metadata table.
pub(crate) const MAX_ITEMS: u16 = 1023;

/// One metadata item's place: `offset` counts from the region's beginning.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawItem {
    pub(crate) id: Guid,
    pub(crate) offset: U32,
    pub(crate) length: U32,
    pub(crate) flags: U32,
    pub(crate) reserved: U32,
}
const _: () = assert!(size_of::<RawItem>() == 32);
/// The item is a user's, not the format's.
pub(crate) const ITEM_USER: u32 = 1;
/// The item describes the virtual disk and is copied to a new child.
pub(crate) const ITEM_VIRTUAL_DISK: u32 = 2;
/// A reader that does not know the item must refuse the file.
pub(crate) const ITEM_REQUIRED: u32 = 4;

/// The file parameters item.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawFileParameters {
    pub(crate) block_size: U32,
    pub(crate) flags: U32,
}
/// Blocks keep their places: a fixed disk.
pub(crate) const LEAVE_ALLOCATED: u32 = 1;
/// The image is a differencing one.
pub(crate) const HAS_PARENT: u32 = 2;

/// The beginning of a parent locator.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawLocator {
    pub(crate) kind: Guid,
    pub(crate) reserved: U16,
    pub(crate) count: U16,
}
const _: () = assert!(size_of::<RawLocator>() == 20);

/// One key and value of a parent locator: UTF-16, offsets from the item's beginning, lengths in bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawLocatorEntry {
    pub(crate) key_offset: U32,
    pub(crate) value_offset: U32,
    pub(crate) key_length: U16,
    pub(crate) value_length: U16,
}
const _: () = assert!(size_of::<RawLocatorEntry>() == 12);

/// The beginning of a log entry.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawLogEntry {
    pub(crate) signature: [u8; 4],
    pub(crate) checksum: U32,
    pub(crate) length: U32,
    pub(crate) tail: U32,
    pub(crate) sequence: U64,
    pub(crate) count: U32,
    pub(crate) reserved: U32,
    pub(crate) log: Guid,
    pub(crate) flushed_length: U64,
    pub(crate) last_length: U64,
}
const _: () = assert!(size_of::<RawLogEntry>() == 64);
/// `loge`
pub(crate) const LOG_SIGNATURE: [u8; 4] = *b"loge";

/// A descriptor: what one page of the file becomes (`desc`), or that a stretch of it becomes zeros (`zero`).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawDescriptor {
    pub(crate) signature: [u8; 4],
    /// `desc`: the page's last four bytes.
    pub(crate) trailing: [u8; 4],
    /// `desc`: the page's first eight bytes. `zero`: the length as a U64.
    pub(crate) leading: [u8; 8],
    pub(crate) offset: U64,
    pub(crate) sequence: U64,
}
const _: () = assert!(size_of::<RawDescriptor>() == 32);
/// `desc`
pub(crate) const DESCRIPTOR_DATA: [u8; 4] = *b"desc";
/// `zero`
pub(crate) const DESCRIPTOR_ZERO: [u8; 4] = *b"zero";

/// A page in the log, its first eight and last four bytes lent to the sequence number.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawDataSector {
    pub(crate) signature: [u8; 4],
    pub(crate) sequence_high: U32,
    pub(crate) data: [u8; 4084],
    pub(crate) sequence_low: U32,
}
const _: () = assert!(size_of::<RawDataSector>() == PAGE);
/// `data`
pub(crate) const DATA_SIGNATURE: [u8; 4] = *b"data";

/// CRC-32C over `bytes` with the checksum field (bytes 4 to 8, as in every VHDX structure) taken as zero.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    let head = crc32c::crc32c(&bytes[..4]);
    let zeroed = crc32c::crc32c_append(head, &[0; 4]);
    crc32c::crc32c_append(zeroed, &bytes[8..])
}

/// Writes the checksum of `bytes` into its field.
pub(crate) fn seal(bytes: &mut [u8]) {
    let sum = checksum(bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// A structure at `offset` of `bytes`, if it lies inside.
pub(crate) fn parse<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8], offset: usize) -> Option<T> {
    T::read_from_prefix(bytes.get(offset..)?).ok().map(|(value, _)| value)
}

/// Writes a structure at `offset` of `bytes`, which must have room.
pub(crate) fn put<T: IntoBytes + Immutable + ?Sized>(bytes: &mut [u8], offset: usize, value: &T) {
    let value = value.as_bytes();
    bytes[offset..offset + value.len()].copy_from_slice(value);
}
