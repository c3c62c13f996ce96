//! Opening an image: everything that the file says is checked here, once, before anything relies on it.

use super::alloc::Space;
use super::bat::{Bat, Geometry};
use super::bitmap::Bitmaps;
use super::flush::Session;
use super::footer::{self, Found};
use super::format::{BLOCK_SIZES, MAX_BLOCKS, MAX_FIXED, MAX_SPARSE, SECTOR};
use super::parent::Header;
use super::{Dirty, Ids, Inner, Meta, VhdLayer};
use crate::layer::Kind;
use crate::{Error, ErrorKind, Result};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use store::{Mode, Store};

/// How much of the table is read at once, in bytes.
const TABLE_STEP: u64 = 1 << 20;

/// Opens a VHD.
///
/// A dynamic or differencing file that has lost one of its two footers is as good as before: the other one counts, and the first change
/// mends the lost one. So it does with zeros behind the footer of a fixed one. Nothing is written before that.
///
/// # Errors
/// [`ErrorKind::Damaged`] for a file that breaks the format's rules (places that overlap or lie outside, sizes that cannot be); for
/// [`Mode::Write`] also if a checksum is wrong. [`ErrorKind::Unsupported`] for other versions and types.
pub fn open(store: Arc<dyn Store>, mode: Mode) -> Result<Arc<VhdLayer>> {
    let found = footer::find(&*store)?;
    let refuse = |kind, message: String| Err(Error::new(kind, store.name(), message));
    let kind = match found.footer.kind() {
        Ok(kind) if found.footer.is_known_version() => kind,
        Ok(_) => return refuse(ErrorKind::Unsupported, "its footer is of another version than 1.0".to_owned()),
        Err(number) => {
            return refuse(ErrorKind::Unsupported, format!("it is a disk of type {number}, which is unknown"));
        }
    };
    let damaged = |what: &str| {
        let message =
            format!("the checksum of its {what} is wrong: it can be read, but must be repaired before it is written");
        refuse(ErrorKind::Damaged, message)
    };
    if mode == Mode::Write && !found.sealed {
        return damaged("footer");
    }
    check_size(&*store, &found, kind)?;
    let (header, space, bat) = if kind == Kind::Fixed {
        let space = Space::new(found.tail.unwrap_or(0), found.footer.size(), 0, 0);
        (None, space, Bat::new())
    } else {
        let (header, sealed) = Header::read(&*store, found.footer.header_at())?;
        if mode == Mode::Write && !sealed {
            return damaged("header");
        }
        let geometry = geometry(&*store, &found, kind, &header)?;
        let bat = read_table(&*store, &header, &geometry)?;
        let space = check_places(&*store, &found, &header, &geometry, &bat)?;
        (Some(header), space, bat)
    };
    let inner = Inner::new(store, mode == Mode::Write, &found, kind, header, bat, space, false);
    Ok(Arc::new(VhdLayer(Arc::new(inner))))
}

/// Whether a file without a signature at its end is a fixed VHD behind which nothing but zeros lies.
pub fn is_padded(store: &dyn Store) -> Result<bool> {
    Ok(footer::before_zeros(store)?.is_some())
}

impl Inner {
    #[expect(clippy::too_many_arguments, reason = "the parts that make up a layer")]
    pub(crate) fn new(
        store: Arc<dyn Store>,
        writable: bool,
        found: &Found,
        kind: Kind,
        header: Option<Header>,
        bat: Bat,
        space: Space,
        identified: bool,
    ) -> Self {
        let block = header.as_ref().map_or(SECTOR, |header| header.block_size().into());
        let shape = Geometry { size: found.footer.size(), block, kind };
        let link = header.as_ref().filter(|_| kind == Kind::Differencing).map(Header::link);
        let meta = Meta {
            space,
            footer: found.footer,
            tail_sound: found.tail_sound,
            head_sound: kind == Kind::Fixed || found.head_sound,
            dirty: Dirty::default(),
            pending: HashMap::new(),
            freed: Vec::new(),
            next_ticket: 0,
        };
        Self {
            file: store.name(),
            store,
            writable,
            shape,
            size: AtomicU64::new(shape.size),
            table_at: header.as_ref().map_or(0, Header::table_at),
            bat,
            bitmaps: Bitmaps::new(&shape),
            meta: Mutex::new(meta),
            session: Mutex::new(Session { header, identified }),
            ids: Mutex::new(Ids { data_id: found.footer.id(), link }),
            wrote: AtomicBool::new(false),
            started: AtomicBool::new(identified),
            poisoned: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        }
    }
}

fn check_size(store: &dyn Store, found: &Found, kind: Kind) -> Result<()> {
    let refuse = |kind, message: String| Err(Error::new(kind, store.name(), message));
    let size = found.footer.size();
    let most = if kind == Kind::Fixed { MAX_FIXED } else { MAX_SPARSE };
    if size == 0 || size > most || !size.is_multiple_of(SECTOR) {
        return refuse(ErrorKind::Damaged, format!("the size of {size} bytes is none that the format allows"));
    }
    if kind == Kind::Fixed && found.tail.is_none_or(|tail| size > tail) {
        return refuse(
            ErrorKind::Damaged,
            format!("it is cut short: its disk has {size} bytes, and the file has fewer"),
        );
    }
    Ok(())
}

/// How the header cuts the disk into blocks.
fn geometry(store: &dyn Store, found: &Found, kind: Kind, header: &Header) -> Result<Geometry> {
    let refuse = |kind, message: String| Err(Error::new(kind, store.name(), message));
    let block_size = header.block_size();
    if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
        return refuse(
            ErrorKind::Damaged,
            format!("the block size of {block_size} bytes is none that the format allows"),
        );
    }
    let geometry = Geometry { size: found.footer.size(), block: block_size.into(), kind };
    if geometry.blocks() > MAX_BLOCKS {
        return refuse(ErrorKind::Unsupported, format!("it has {} blocks, which is too much", geometry.blocks()));
    }
    // A longer table than the disk needs is fine: the size counts.
    if header.max_entries() < geometry.blocks() {
        let (entries, blocks) = (header.max_entries(), geometry.blocks());
        return refuse(ErrorKind::Damaged, format!("its block table has {entries} entries for {blocks} blocks"));
    }
    Ok(geometry)
}

/// Reads the table.
fn read_table(store: &dyn Store, header: &Header, geometry: &Geometry) -> Result<Bat> {
    let (at, bytes) = (header.table_at(), geometry.table());
    if !at.is_multiple_of(SECTOR) || at.checked_add(bytes).is_none_or(|end| end > store.len().unwrap_or(0)) {
        let message = format!("its block table lies at {at}, where it cannot be");
        return Err(Error::new(ErrorKind::Damaged, store.name(), message));
    }
    load_table(store, at, geometry)
}

/// Reads the table, which lies in the file at `at`.
pub(crate) fn load_table(store: &dyn Store, at: u64, geometry: &Geometry) -> Result<Bat> {
    let bytes = geometry.table();
    let bat = Bat::new();
    for start in (0..bytes).step_by(TABLE_STEP as usize) {
        let mut step = vec![0; TABLE_STEP.min(bytes - start) as usize];
        store.read_at(&mut step, at + start)?;
        for (sector, bytes) in (start / SECTOR..).zip(step.chunks_exact(SECTOR as usize)) {
            bat.load(sector, bytes);
        }
    }
    Ok(bat)
}

/// What lies somewhere in the file.
#[derive(Debug, Clone, Copy)]
enum Part {
    Head,
    Tail,
    Header,
    Table,
    Block(u64),
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Head => f.write_str("the footer's copy"),
            Self::Tail => f.write_str("the footer"),
            Self::Header => f.write_str("the header"),
            Self::Table => f.write_str("the block table"),
            Self::Block(block) => write!(f, "block {block}"),
        }
    }
}

/// Checks that everything lies inside the file and nothing over anything else, and says what is left.
fn check_places(store: &dyn Store, found: &Found, header: &Header, geometry: &Geometry, bat: &Bat) -> Result<Space> {
    let damaged = |message: String| Err(Error::new(ErrorKind::Damaged, store.name(), message));
    let length = store.len()?;
    let mut parts = vec![
        (0..SECTOR, Part::Head),
        (header.places()[0].clone(), Part::Header),
        (header.table_at()..header.table_at() + geometry.table(), Part::Table),
    ];
    parts.extend(found.tail.map(|tail| (tail..length, Part::Tail)));
    // More than this cannot lie side by side in the file: a table that says so is not read to its end.
    let most = parts.len() as u64 + length / (geometry.bitmap() + geometry.block) + 1;
    for (block, place) in bat.placed().take_while(|(block, _)| *block < geometry.blocks()) {
        // Only what lies inside the disk must be there: the last block may be cut off.
        let end = place + geometry.bitmap() + geometry.inside(block);
        if end > length {
            return damaged(format!("block {block} lies at {place}, past the file's end at {length}"));
        }
        parts.push((place..end, Part::Block(block)));
        if parts.len() as u64 > most {
            return damaged(format!("its block table names more blocks than a file of {length} bytes can hold"));
        }
    }
    parts.sort_by_key(|(place, _)| (place.start, place.end));
    for pair in parts.windows(2) {
        let [(one, first), (two, second)] = pair else { continue };
        if one.end > two.start {
            return damaged(format!("{second} lies at {}, where {first} lies too", two.start));
        }
    }
    let used = parts.into_iter().filter_map(|(place, part)| match part {
        Part::Tail => None,
        // A block keeps its whole place.
        Part::Block(_) => {
            let whole = (place.start + geometry.bitmap() + geometry.block).min(found.tail.unwrap_or(length));
            Some(place.start..place.end.max(whole))
        }
        _ => Some(place),
    });
    Ok(space(length, found, header, geometry, used))
}

/// The free space around what is used.
fn space(
    length: u64,
    found: &Found,
    header: &Header,
    geometry: &Geometry,
    used: impl Iterator<Item = Range<u64>>,
) -> Space {
    let used: Vec<_> = used.chain(header.places()[1..].iter().cloned()).collect();
    let end = used.iter().map(|place| place.end).max().unwrap_or(0).next_multiple_of(SECTOR);
    let footer_at = found.tail.unwrap_or_else(|| length.next_multiple_of(SECTOR).max(end));
    if !found.footer.is_ours() {
        // Others may keep things in their files that we do not know.
        return Space::new(footer_at, end.max(footer_at + SECTOR), geometry.bitmap(), geometry.block);
    }
    Space::new(footer_at, end, geometry.bitmap(), geometry.block).with_gaps(used, header.table_at())
}
