//! Making a new image.

use super::VhdxLayer;
use super::alloc::Space;
use super::bat::{Bat, Entry, Geometry};
use super::carry::{Carry, Writer};
use super::flush::Session;
use super::format::{BLOCK_SIZES, FILE_SIGNATURE, HEADER_AT, MAX_SIZE, MIB, REGION_TABLE_AT, TABLE_BYTES};
use super::header::{Header, Region, Regions, encode_regions};
use super::journal::Journal;
use super::metadata::{self, Fault, Locator, Metadata};
use super::open::geometry;
use crate::layer::{Kind, Layer, ParentLink};
use crate::{Error, ErrorKind, Result};
use std::sync::Arc;
use store::{Lock, Store};
use uuid::Uuid;

/// Who made the file, as it says itself.
const CREATOR: &str = concat!("Tenby ", env!("CARGO_PKG_VERSION"));
const LOG: Region = Region { offset: MIB, length: MIB };
const METADATA: Region = Region { offset: 2 * MIB, length: MIB };
const BAT_AT: u64 = 3 * MIB;

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Virtual size in bytes: 1 sector to 64 TiB, a multiple of the sector size.
    pub size: u64,
    /// Bytes in a block: a power of two from 1 MiB to 256 MiB.
    pub block_size: u32,
    /// Bytes in a logical sector: 512 or 4096. A child's must be its parent's.
    pub sector_size: u32,
    /// Fixed, dynamic or differencing.
    pub kind: Kind,
    /// The parent: there if and only if the image is a differencing one.
    pub parent: Option<Parent>,
}

impl Default for Options {
    /// A dynamic image with blocks of 2 MiB and sectors of 512 bytes; its size is still to be said.
    fn default() -> Self {
        Self { size: 0, block_size: 2 << 20, sector_size: 512, kind: Kind::Dynamic, parent: None }
    }
}

impl Options {
    /// A dynamic image of `size` bytes with blocks of 2 MiB and sectors of 512 bytes.
    pub fn dynamic(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    /// A differencing image over `parent`, of its size and sector size, with blocks of 2 MiB. The parent is to lie beside it under
    /// `name`. See [`Parent::of`].
    pub fn differencing(parent: &dyn Layer, name: &str) -> Result<Self> {
        let info = parent.info();
        Ok(Self {
            size: info.size,
            sector_size: info.sector_size,
            kind: Kind::Differencing,
            parent: Some(Parent::of(parent, Some(name))?),
            ..Self::default()
        })
    }
}

/// What a new differencing image says of its parent.
#[derive(Debug, Clone)]
pub struct Parent {
    link: ParentLink,
    disk_id: Uuid,
    sector_size: u32,
}

impl Parent {
    /// The parent `layer`, which is to lie beside the child under `name`, a single path component; without a name only somebody who
    /// knows (the ledger) finds it.
    ///
    /// If `layer` is open for writing, its `data_id` is settled first: it stays what it is until the layer is closed, whatever is
    /// still written, so that the child's link holds. A parent without an id (raw) is linked by the nil id.
    pub fn of(layer: &dyn Layer, name: Option<&str>) -> Result<Self> {
        let link = ParentLink::to(layer, name)?;
        let info = layer.info();
        Ok(Self { link, disk_id: info.disk_id, sector_size: info.sector_size })
    }
}

/// Makes a new image in `store`, which must be empty, and opens it for writing, locked. It is durable when this returns (its name is the
/// folder's business).
///
/// # Errors
/// [`ErrorKind::Invalid`] for options out of range; the store is unchanged then.
pub fn create(store: Arc<dyn Store>, options: &Options) -> Result<Arc<VhdxLayer>> {
    create_with(store, options, None)
}

/// Makes a new image as [`create`] does, and keeps what is committed and not flushed in `carry`, so that it outlives the process: see
/// [`super::open_carried`].
///
/// # Errors
/// As [`create`], and those of the carry's file.
pub fn create_carried(store: Arc<dyn Store>, options: &Options, carry: Carry) -> Result<Arc<VhdxLayer>> {
    create_with(store, options, Some(carry))
}

fn create_with(store: Arc<dyn Store>, options: &Options, carry: Option<Carry>) -> Result<Arc<VhdxLayer>> {
    let name = store.name();
    let fault = |(kind, message): Fault| Error::new(kind, name.clone(), message);
    let metadata = check(options).map_err(fault)?;
    store.lock(Lock::Exclusive)?;
    if !store.is_empty()? {
        return Err(fault((ErrorKind::Exists, "the file is not empty".to_owned())));
    }
    let geometry = geometry(&metadata);
    let table = Region { offset: BAT_AT, length: geometry.table_region() };
    let data_at = table.end().next_multiple_of(geometry.block.min(2 * MIB));
    let end = if options.kind == Kind::Fixed { data_at + geometry.blocks() * geometry.block } else { data_at };
    let header = Header {
        sequence: 1,
        file_write: Uuid::new_v4(),
        data_write: Uuid::new_v4(),
        log: Uuid::nil(),
        log_offset: LOG.offset,
        log_length: LOG.length,
    };
    store.set_len(end)?;
    store.write_at(&metadata::encode(&metadata).map_err(fault)?, METADATA.offset)?;
    let regions = encode_regions(table, METADATA);
    debug_assert_eq!(regions.len(), TABLE_BYTES);
    for at in REGION_TABLE_AT {
        store.write_at(&regions, at)?;
    }
    let bat = Bat::new();
    if options.kind == Kind::Fixed {
        place_all(&*store, &bat, &geometry, data_at)?;
    }
    store.write_at(&header.encode()[..], HEADER_AT[0])?;
    let current = Header { sequence: 2, ..header };
    store.write_at(&current.encode()[..], HEADER_AT[1])?;
    store.write_at(&identifier(), 0)?;
    store.sync()?;

    let space = Space::new(end, end, geometry.block);
    let session = Session { journal: Journal::new(current, 1), file_identified: true, data_identified: true };
    let regions = Regions { bat: table, metadata: METADATA, others: Vec::new() };
    let inner = super::Inner::new(store, true, &metadata, &regions, bat, space, session).map_err(fault)?;
    super::lock(&inner.meta).carry = carry.map(Writer::new);
    inner.begin_carry(current.file_write)?;
    Ok(Arc::new(VhdxLayer(Arc::new(inner))))
}

/// Checks the options and says what the metadata will hold.
fn check(options: &Options) -> std::result::Result<Metadata, Fault> {
    let refuse = |message: String| Err((ErrorKind::Invalid, message));
    let Options { size, block_size, sector_size, kind, parent } = options;
    if ![512, 4096].contains(sector_size) {
        return refuse(format!("a sector has 512 or 4096 bytes, not {sector_size}"));
    }
    if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(block_size) {
        return refuse(format!("a block has 1 MiB to 256 MiB, a power of two, not {block_size} bytes"));
    }
    if *size == 0 || *size > MAX_SIZE || !size.is_multiple_of((*sector_size).into()) {
        return refuse(format!("a disk has up to 64 TiB in whole sectors of {sector_size} bytes, not {size} bytes"));
    }
    if parent.is_some() != (*kind == Kind::Differencing) {
        return refuse("a differencing image, and no other, has a parent".to_owned());
    }
    if let Some(parent) = parent
        && parent.sector_size != *sector_size
    {
        return refuse(format!("the parent has sectors of {} bytes, and so must its child", parent.sector_size));
    }
    Ok(Metadata {
        size: *size,
        block_size: *block_size,
        sector_size: *sector_size,
        physical_sector_size: 4096,
        disk_id: parent.as_ref().map_or_else(Uuid::new_v4, |parent| parent.disk_id),
        leave_allocated: *kind == Kind::Fixed,
        locator: parent.as_ref().map(|parent| Locator::of(&parent.link)),
    })
}

/// The file identifier: signature and creator.
fn identifier() -> Vec<u8> {
    let creator = CREATOR.encode_utf16().flat_map(u16::to_le_bytes);
    FILE_SIGNATURE.into_iter().chain(creator).collect()
}

/// Gives every block its place, one behind the other.
fn place_all(store: &dyn Store, bat: &Bat, geometry: &Geometry, data_at: u64) -> Result<()> {
    for block in 0..geometry.blocks() {
        bat.set(geometry.payload_index(block), Entry::full(data_at + block * geometry.block));
    }
    for page in bat.loaded() {
        let (offset, bytes) = bat.page(page);
        store.write_at(&bytes[..], BAT_AT + offset)?;
    }
    Ok(())
}
