//! Opening an image: everything that the file says is checked here, once, before anything relies on it.

use super::alloc::Space;
use super::bat::{Bat, Entry, Geometry, State};
use super::bitmap::Bitmaps;
use super::carry::{Carry, Edit, Writer};
use super::flush::Session;
use super::format::{FILE_SIGNATURE, HEADER_AT, HEADER_SECTION, MIB, PAGE, PAGE_BYTES, RawItem, TABLE_BYTES};
use super::header::{self, Header, Region, Regions, check_reaches, read, read_data};
use super::journal::Journal;
use super::metadata::{self, Fault, Metadata};
use super::replay::{self, Replayed};
use super::units::Units;
use super::{Dirty, Ids, Inner, Meta, USERS, VhdxLayer, lock};
use crate::layer::Kind;
use crate::{Error, ErrorKind, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex};
use store::{Mode, Store};
use uuid::Uuid;

/// The longest file that we open, 256 TiB: four times the largest disk.
pub(crate) const MAX_FILE: u64 = 1 << 48;
/// The longest metadata region that we read. Every file seen has 1 MiB.
pub(crate) const MAX_METADATA: u64 = 16 * MIB;

/// Opens a VHDX.
///
/// A log that is in use is replayed: for [`Mode::Write`] in the file, for [`Mode::Read`] in memory only.
///
/// # Errors
/// [`ErrorKind::Damaged`] for a file that breaks the format's rules (places that overlap or lie outside, reserved states, bad
/// checksums), [`ErrorKind::Unsupported`] for one that requires what we do not know.
pub fn open(store: Arc<dyn Store>, mode: Mode) -> Result<Arc<VhdxLayer>> {
    open_with(store, mode, None)
}

/// Opens a VHDX for writing, and keeps what is committed and not flushed in `carry`, so that it outlives the process.
///
/// If the last one to write the file was a session that died with this carry, in this life of the host, then all that it
/// committed is there again, and durable, before this returns; and so is what it wrote in place. A layer that was being written
/// when its process died is to be opened so first, even if it is only read from then on.
///
/// # Errors
/// As [`open`], and those of the carry's file. What the carry's file says is never one: what is not understood is not used.
pub fn open_carried(store: Arc<dyn Store>, carry: Carry) -> Result<Arc<VhdxLayer>> {
    open_with(store, Mode::Write, Some(carry))
}

fn open_with(store: Arc<dyn Store>, mode: Mode, carry: Option<Carry>) -> Result<Arc<VhdxLayer>> {
    let name = store.name();
    let fault = |(kind, message): Fault| Error::new(kind, name.clone(), message);
    if read(&*store, 0, FILE_SIGNATURE.len())? != FILE_SIGNATURE {
        return Err(fault((ErrorKind::Damaged, "it is no VHDX: the signature is missing".to_owned())));
    }
    let copies = [read(&*store, HEADER_AT[0], PAGE)?, read(&*store, HEADER_AT[1], PAGE)?];
    let (header, slot) = header::current([&copies[0], &copies[1]]).map_err(fault)?;
    let carried = carry.as_ref().map(|carry| carry.find(header.file_write)).transpose()?.flatten();
    let mut journal = Journal::new(header, slot);
    let mut replayed = false;
    let store = match (replay::pending(&*store, &header)?, mode) {
        (None, _) => store,
        (Some(replay), Mode::Read) => Arc::new(Replayed::new(store, replay)?),
        (Some(replay), Mode::Write) => {
            replay::carry_out(&*store, &replay)?;
            // While its journal is needed, the session that died goes on: the file keeps its id.
            replayed = carried.is_none();
            journal.empty_log(&*store, replayed)?;
            store
        }
    };
    let regions = header::regions(&*store)?;
    if regions.metadata.length > MAX_METADATA {
        let message = format!("its metadata region has {} bytes, which is too much", regions.metadata.length);
        return Err(fault((ErrorKind::Unsupported, message)));
    }
    let metadata = read_metadata(&*store, regions.metadata)?;
    let geometry = geometry(&metadata);
    let mut edits = match (&carry, carried) {
        (Some(carry), Some(mark)) => carry.edits(header.file_write, mark, &geometry)?,
        _ => Vec::new(),
    };
    let read_table = |edits: &[Edit]| {
        let mut used = Used::new(&name, store.len()?)?;
        used.mark_fixed(&header, &regions)?;
        let bat = read_table(&*store, regions.bat, &geometry)?;
        let dirty = redo(&bat, &geometry, edits);
        check_table(&bat, &geometry, &mut used)?;
        Ok((bat, dirty, used.into_space(geometry.block)))
    };
    let (bat, dirty, space) = match read_table(&edits) {
        // They are none that this file's session can have made.
        Err(Error { kind: ErrorKind::Damaged, .. }) if !edits.is_empty() => {
            edits.clear();
            read_table(&[])?
        }
        result => result?,
    };
    let session = Session { journal, file_identified: replayed, data_identified: false };
    let writable = mode == Mode::Write;
    let inner = Inner::new(store, writable, &metadata, &regions, bat, space, session).map_err(fault)?;
    {
        let mut meta = lock(&inner.meta);
        meta.dirty.bat = dirty;
        meta.carry = carry.map(Writer::new);
    }
    if carried.is_some() {
        inner.recover(&edits)?;
    }
    Ok(Arc::new(VhdxLayer(Arc::new(inner))))
}

/// How metadata cuts the disk into blocks.
pub(crate) fn geometry(metadata: &Metadata) -> Geometry {
    Geometry {
        size: metadata.size,
        sector: metadata.sector_size.into(),
        block: metadata.block_size.into(),
        differencing: metadata.locator.is_some(),
    }
}

impl Inner {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        writable: bool,
        metadata: &Metadata,
        regions: &Regions,
        bat: Bat,
        space: Space,
        session: Session,
    ) -> std::result::Result<Self, Fault> {
        let geometry = geometry(metadata);
        let link = metadata.locator.as_ref().map(metadata::Locator::link).transpose()?;
        let ids = Ids { data_id: session.journal.header().data_write, parent: metadata.locator.clone(), link };
        let meta = Meta {
            space,
            bat_region: regions.bat,
            dirty: Dirty::default(),
            pending: HashMap::new(),
            pending_bitmaps: HashMap::new(),
            freed: Vec::new(),
            freed_bitmaps: Vec::new(),
            draining: Vec::new(),
            next_ticket: 0,
            carry: None,
        };
        Ok(Self {
            file: store.name(),
            store,
            writable,
            shape: geometry,
            size: AtomicU64::new(geometry.size),
            kind: match (&metadata.locator, metadata.leave_allocated) {
                (Some(_), _) => Kind::Differencing,
                (None, true) => Kind::Fixed,
                (None, false) => Kind::Dynamic,
            },
            disk_id: metadata.disk_id,
            metadata_region: regions.metadata,
            bat,
            bitmaps: Bitmaps::new(geometry),
            users: (0..USERS).map(|_| AtomicU32::new(0)).collect(),
            meta: Mutex::new(meta),
            ids: Mutex::new(ids),
            wrote: AtomicBool::new(false),
            started: AtomicBool::new(session.data_identified),
            session: Mutex::new(session),
            poisoned: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        })
    }
}

/// Reads of the metadata its table and what says what the disk is: a fraction of a region of 1 MiB.
fn read_metadata(store: &dyn Store, region: Region) -> Result<Metadata> {
    let fault = |(kind, message): Fault| Error::new(kind, store.name(), message);
    check_reaches(store, region, "its metadata")?;
    let items = read_items(store, region)?;
    let mut contents = BTreeMap::new();
    for item in metadata::says(&items) {
        contents.insert(item.id.into(), read_item(store, region, item)?);
    }
    metadata::decode(&items, &contents).map_err(fault)
}

/// Reads which items a region of metadata has.
pub(crate) fn read_items(store: &dyn Store, region: Region) -> Result<Vec<RawItem>> {
    let table = read(store, region.offset, TABLE_BYTES)?;
    metadata::items_within(&table, region.length).map_err(|(kind, message)| Error::new(kind, store.name(), message))
}

/// Reads one of them.
pub(crate) fn read_item(store: &dyn Store, region: Region, item: &RawItem) -> Result<Vec<u8>> {
    read(store, region.offset + u64::from(item.offset.get()), item.length.get() as usize)
}

/// Reads the table. That of a disk of 1 TiB has 4 MiB, most of them a hole.
fn read_table(store: &dyn Store, region: Region, geometry: &Geometry) -> Result<Bat> {
    let bytes = geometry.entries() * 8;
    if bytes > region.length {
        let message = format!("its block table has {} bytes of {bytes}", region.length);
        return Err(Error::new(ErrorKind::Damaged, store.name(), message));
    }
    let bat = Bat::new();
    read_data(store, Region { length: bytes, ..region }, "its block table", |at, pages| {
        (at / PAGE_BYTES..).zip(pages.chunks(PAGE)).for_each(|(page, bytes)| bat.load(page, bytes));
    })?;
    Ok(bat)
}

/// Makes the changes to the table among `edits`, and says which pages they changed.
fn redo(bat: &Bat, geometry: &Geometry, edits: &[Edit]) -> BTreeSet<u64> {
    let mut dirty = BTreeSet::new();
    let mut set = |index, entry| {
        if bat.get(index) != entry {
            dirty.insert(bat.set(index, entry));
        }
    };
    for edit in edits {
        match edit {
            Edit::Place { index, entry } => set(*index, *entry),
            Edit::Zero { blocks } => {
                blocks.clone().for_each(|block| set(geometry.payload_index(block), Entry::zero()));
            }
            Edit::Bits { .. } => (),
        }
    }
    dirty
}

/// Checks every entry of the table.
fn check_table(bat: &Bat, geometry: &Geometry, used: &mut Used) -> Result<()> {
    for (index, entry) in bat.entries().take_while(|(index, _)| *index < geometry.entries()) {
        check_entry(geometry, index, entry, used)?;
        check_bitmap(bat, geometry, index, entry, used)?;
    }
    Ok(())
}

fn check_entry(geometry: &Geometry, index: u64, entry: Entry, used: &mut Used) -> Result<()> {
    let Some(block) = geometry.block_of(index) else {
        // A bitmap entry counts in a differencing file only.
        if geometry.differencing && entry.place().is_some() {
            used.mark(entry.offset(), MIB, MIB, "a bitmap block")?;
        }
        return Ok(());
    };
    match entry.state() {
        Some(State::Partial) if !geometry.differencing => {
            Err(used.damaged(format!("block {block} is partly the parent's, and there is no parent")))
        }
        // Only what lies inside the disk must be there: the last block may be cut off.
        Some(State::Full | State::Partial) => {
            used.mark(entry.offset(), geometry.block, geometry.inside(block), &format!("block {block}"))
        }
        Some(State::NotPresent | State::Zero) => Ok(()),
        None => Err(used.damaged(format!("block {block} is in the reserved state {}", entry.state_number()))),
    }
}

/// A partial block needs its chunk's bitmap.
fn check_bitmap(bat: &Bat, geometry: &Geometry, index: u64, entry: Entry, used: &Used) -> Result<()> {
    let Some(block) = geometry.block_of(index).filter(|_| entry.state() == Some(State::Partial)) else { return Ok(()) };
    match bat.get(geometry.bitmap_index(block / geometry.ratio())).place() {
        Some(_) => Ok(()),
        None => Err(used.damaged(format!("block {block} is partial and its bitmap is missing"))),
    }
}

/// Which MiB of the file belong to something.
struct Used {
    file: String,
    length: u64,
    units: Units,
    /// The end of everything that was marked.
    end: u64,
}

impl Used {
    fn new(file: &str, length: u64) -> Result<Self> {
        if length > MAX_FILE {
            return Err(Error::new(ErrorKind::Unsupported, file, format!("it has {length} bytes, which is too much")));
        }
        Ok(Self { file: file.to_owned(), length, units: Units::default(), end: 0 })
    }

    fn damaged(&self, message: String) -> Error {
        Error::new(ErrorKind::Damaged, self.file.clone(), message)
    }

    /// Marks the format's own places.
    fn mark_fixed(&mut self, header: &Header, regions: &Regions) -> Result<()> {
        self.mark(0, HEADER_SECTION, HEADER_SECTION, "the header")?;
        self.mark(header.log_offset, header.log_length, header.log_length, "the log")?;
        self.mark(regions.bat.offset, regions.bat.length, regions.bat.length, "the block table")?;
        self.mark(regions.metadata.offset, regions.metadata.length, regions.metadata.length, "the metadata")?;
        for other in &regions.others {
            self.mark(other.offset, other.length, other.length, "an unknown region")?;
        }
        Ok(())
    }

    /// Marks `len` bytes at `at`, both multiples of 1 MiB, of which the first `needed` must lie inside the file.
    fn mark(&mut self, at: u64, len: u64, needed: u64, what: &str) -> Result<()> {
        let inside = at.checked_add(needed).is_some_and(|end| end <= self.length);
        if !inside {
            return Err(self.damaged(format!("{what} lies at {at}, past the file's end at {}", self.length)));
        }
        let mut twice = false;
        self.units.put(at, len, |_| twice = true);
        if twice {
            return Err(self.damaged(format!("{what} lies at {at}, where something else lies too")));
        }
        self.end = self.end.max(at + len);
        Ok(())
    }

    /// What is left, for blocks of `block` bytes.
    fn into_space(self, block: u64) -> Space {
        let mut space = Space::new(self.length, self.end, block);
        for (at, len) in self.units.holes(self.end) {
            space.give(at, len);
        }
        space
    }
}

impl Journal {
    /// Says that the log, which was carried out, is empty; with a new FileWriteGuid if `identify` says so.
    fn empty_log(&mut self, store: &dyn Store, identify: bool) -> Result<()> {
        self.sync(store)?;
        self.set_header(store, |header| {
            header.log = Uuid::nil();
            if identify {
                header.file_write = Uuid::new_v4();
            }
        })
    }
}
