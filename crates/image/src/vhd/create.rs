//! Making a new image.

use super::alloc::Space;
use super::bat::{Bat, Geometry};
use super::footer::{Footer, Found};
use super::format::{BLOCK_SIZES, HEADER_BYTES, MAX_FIXED, MAX_SPARSE, NOWHERE, SECTOR};
use super::parent::{Fault, Header};
use super::{Inner, VhdLayer};
use crate::layer::{Kind, Layer, ParentLink};
use crate::{Error, ErrorKind, Result};
use std::sync::Arc;
use store::{Lock, Store};
use uuid::Uuid;

/// Where a new file's header lies: behind the footer's copy, where every reader finds it.
const HEADER_AT: u64 = SECTOR;
/// The block table of a file with a parent starts at a multiple of this, so that there is room for another header before it.
const ROOM: u64 = 4096;

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Virtual size in bytes, whole sectors of 512: up to 64 TiB for a fixed disk, 2040 GiB for others. (Azure wants whole MiB, which
    /// is the caller's affair.)
    pub size: u64,
    /// Bytes in a block: a power of two from 512 KiB to 256 MiB. A fixed disk has none.
    pub block_size: u32,
    /// Fixed, dynamic or differencing.
    pub kind: Kind,
    /// The parent: there if and only if the image is a differencing one.
    pub parent: Option<Parent>,
}

impl Default for Options {
    /// A dynamic image with blocks of 2 MiB; its size is still to be said.
    fn default() -> Self {
        Self { size: 0, block_size: 2 << 20, kind: Kind::Dynamic, parent: None }
    }
}

impl Options {
    /// A dynamic image of `size` bytes with blocks of 2 MiB.
    pub fn dynamic(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    /// A differencing image over `parent`, of its size, with blocks of 2 MiB. The parent is to lie beside it under `name`. See
    /// [`Parent::of`].
    pub fn differencing(parent: &dyn Layer, name: &str) -> Result<Self> {
        Ok(Self {
            size: parent.info().size,
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
}

impl Parent {
    /// The parent `layer`, which is to lie beside the child under `name`, a single path component; without a name only somebody who
    /// knows (the ledger) finds it.
    ///
    /// If `layer` is open for writing, its `data_id` is settled first, see [`Layer::settle`]. [`ErrorKind::Unsupported`] for a parent
    /// with sectors of 4,096 bytes, which a VHD cannot have.
    pub fn of(layer: &dyn Layer, name: Option<&str>) -> Result<Self> {
        if u64::from(layer.info().sector_size) != SECTOR {
            let message = "it has sectors of 4096 bytes, and a VHD, which would be its child, only of 512";
            return Err(Error::new(ErrorKind::Unsupported, layer.store().name(), message));
        }
        Ok(Self { link: ParentLink::to(layer, name)? })
    }

    /// The same with the path that the parent has on a Windows machine, for readers there.
    #[must_use]
    pub fn with_windows_path(mut self, path: &str) -> Self {
        self.link.absolute_path = Some(path.to_owned());
        self
    }
}

/// Makes a new image in `store`, which must be empty, and opens it for writing, locked. It is durable when this returns (its name is the
/// folder's business).
///
/// # Errors
/// [`ErrorKind::Invalid`] for options out of range; the store is unchanged then.
pub fn create(store: Arc<dyn Store>, options: &Options) -> Result<Arc<VhdLayer>> {
    let name = store.name();
    let fault = |(kind, message): Fault| Error::new(kind, name.clone(), message);
    check(options).map_err(fault)?;
    store.lock(Lock::Exclusive)?;
    if !store.is_empty()? {
        return Err(fault((ErrorKind::Exists, "the file is not empty".to_owned())));
    }
    if options.kind == Kind::Fixed { create_fixed(store, options.size) } else { create_sparse(store, options) }
}

fn create_fixed(store: Arc<dyn Store>, size: u64) -> Result<Arc<VhdLayer>> {
    let footer = Footer::new(Kind::Fixed, size, Uuid::new_v4(), NOWHERE);
    store.write_at(footer.bytes(), size)?;
    store.sync()?;
    Ok(layer(store, &footer, Kind::Fixed, None, Bat::new(), Space::new(size, size, 0, 0)))
}

fn create_sparse(store: Arc<dyn Store>, options: &Options) -> Result<Arc<VhdLayer>> {
    let Options { size, block_size, kind, parent } = options;
    let geometry = Geometry { size: *size, block: (*block_size).into(), kind: *kind };
    let link = parent.as_ref().map(|parent| &parent.link);
    let fault = |(kind, message): Fault| Error::new(kind, store.name(), message);
    let mut header = Header::new(geometry.blocks(), *block_size, link).map_err(fault)?;
    let room = HEADER_AT + header.length();
    // A child's header is made anew beside the old one whenever its link changes.
    let table_at = if link.is_some() { (2 * room + HEADER_BYTES).next_multiple_of(ROOM) } else { room };
    header.place_table(table_at);
    let end = table_at + geometry.table();
    let footer = Footer::new(*kind, *size, Uuid::new_v4(), HEADER_AT);
    let bat = Bat::new();
    store.write_at(footer.bytes(), end)?;
    for sector in 0..geometry.table() / SECTOR {
        store.write_at(&bat.sector(sector), table_at + sector * SECTOR)?;
    }
    store.write_at(&header.encode(HEADER_AT), HEADER_AT)?;
    store.write_at(footer.bytes(), 0)?;
    store.sync()?;
    let space = Space::new(end, end, geometry.bitmap(), geometry.block);
    let space = space.with_gaps(vec![0..room, table_at..end], table_at);
    Ok(layer(store, &footer, *kind, Some(header), bat, space))
}

fn layer(
    store: Arc<dyn Store>,
    footer: &Footer,
    kind: Kind,
    header: Option<Header>,
    bat: Bat,
    space: Space,
) -> Arc<VhdLayer> {
    let tail = Some(space.footer_at());
    let found = Found { footer: *footer, tail, tail_sound: true, head_sound: true, sealed: true };
    Arc::new(VhdLayer(Arc::new(Inner::new(store, true, &found, kind, header, bat, space, true))))
}

/// Checks the options.
fn check(options: &Options) -> std::result::Result<(), Fault> {
    let refuse = |message: String| Err((ErrorKind::Invalid, message));
    let Options { size, block_size, kind, parent } = options;
    let (most, words) = if *kind == Kind::Fixed { (MAX_FIXED, "64 TiB") } else { (MAX_SPARSE, "2040 GiB") };
    if *size == 0 || *size > most || !size.is_multiple_of(SECTOR) {
        return refuse(format!("a VHD of this type has up to {words} in whole sectors of 512 bytes, not {size} bytes"));
    }
    if !block_size.is_power_of_two() || *block_size < MIN_BLOCK || !BLOCK_SIZES.contains(block_size) {
        return refuse(format!("a block has 512 KiB to 256 MiB, a power of two, not {block_size} bytes"));
    }
    if parent.is_some() != (*kind == Kind::Differencing) {
        return refuse("a differencing image, and no other, has a parent".to_owned());
    }
    Ok(())
}

/// The smallest blocks that we make, bytes; smaller ones are read.
const MIN_BLOCK: u32 = 512 << 10;
