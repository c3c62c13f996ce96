//! The metadata region: a table of items, and what the items say.

use super::format::{
    BLOCK_SIZES, HAS_PARENT, ITEM_DISK_ID, ITEM_DISK_SIZE, ITEM_FILE_PARAMETERS, ITEM_INCOMPLETE, ITEM_LOGICAL_SECTOR,
    ITEM_NOTE, ITEM_PARENT_LOCATOR, ITEM_PHYSICAL_SECTOR, ITEM_REQUIRED, ITEM_USER, ITEM_VIRTUAL_DISK, KIB,
    LEAVE_ALLOCATED, LOCATOR_TYPE, MAX_ITEMS, MAX_SIZE, METADATA_SIGNATURE, RawFileParameters, RawItem, RawLocator,
    RawLocatorEntry, RawMetadataTable, TABLE_BYTES, parse, put,
};
use crate::{ErrorKind, MAX_NOTE, ParentLink};
use std::collections::{BTreeMap, HashSet};
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Where a new file's first item lies inside the region.
const FIRST_ITEM: u32 = 64 * KIB as u32;
/// Where a new file's parent locator lies inside the region, with room behind it.
const LOCATOR_AT: u32 = 128 * KIB as u32;
/// Where the note lies inside the region, if that is free: behind the longest parent locator.
const NOTE_AT: u32 = 384 * KIB as u32;
/// The longest parent locator that we read or write.
const MAX_LOCATOR: u32 = 256 * KIB as u32;
/// The most keys that a locator may have. Windows writes five.
const MAX_KEYS: u16 = 64;

/// What is wrong with a piece of metadata; the caller knows the file.
pub(crate) type Fault = (ErrorKind, String);

fn damaged(message: impl Into<String>) -> Fault {
    (ErrorKind::Damaged, message.into())
}

fn unsupported(message: impl Into<String>) -> Fault {
    (ErrorKind::Unsupported, message.into())
}

/// What the items say.
#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    pub(crate) size: u64,
    pub(crate) block_size: u32,
    pub(crate) sector_size: u32,
    pub(crate) physical_sector_size: u32,
    pub(crate) disk_id: Uuid,
    /// Blocks keep their places (a fixed disk).
    pub(crate) leave_allocated: bool,
    /// `Some` for a differencing file.
    pub(crate) locator: Option<Locator>,
}

/// The parent locator: keys and values in the file's order, also those that we do not use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Locator(Vec<(String, String)>);

const LINKAGE: &str = "parent_linkage";
const LINKAGE2: &str = "parent_linkage2";
const RELATIVE: &str = "relative_path";
const ABSOLUTE: &str = "absolute_win32_path";
const VOLUME: &str = "volume_path";
/// A key of ours: which parent the image named before somebody insisted on another one.
const FORCED: &str = "tenby_forced";

impl Locator {
    /// The locator that says this.
    pub(crate) fn of(link: &ParentLink) -> Self {
        let mut locator = Self(Vec::new());
        locator.relink(link);
        locator
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == key).map(|(_, value)| value.as_str())
    }

    fn put(&mut self, key: &str, value: Option<String>) {
        match (self.0.iter().position(|(found, _)| found == key), value) {
            (Some(at), Some(value)) => self.0[at].1 = value,
            (Some(at), None) => drop(self.0.remove(at)),
            (None, Some(value)) => self.0.push((key.to_owned(), value)),
            (None, None) => (),
        }
    }

    /// Takes over what `link` says. Keys that we do not know stay.
    pub(crate) fn relink(&mut self, link: &ParentLink) {
        if self.get(RELATIVE) != link.relative_path.as_deref() || self.get(ABSOLUTE) != link.absolute_path.as_deref() {
            // It names the old parent.
            self.put(VOLUME, None);
        }
        self.put(LINKAGE, Some(link.linkage.braced().to_string()));
        self.put(LINKAGE2, link.linkage2.map(|id| id.braced().to_string()));
        self.put(RELATIVE, link.relative_path.clone());
        self.put(ABSOLUTE, link.absolute_path.clone());
    }

    /// Writes down which parent the image was made over, before another one is forced on it. The first one stays.
    pub(crate) fn mark_forced(&mut self) {
        if self.get(FORCED).is_none() {
            let linkage = self.get(LINKAGE).map(str::to_owned);
            self.put(FORCED, linkage);
        }
    }

    /// The id of the parent that the image was made over, if another one was forced on it.
    pub(crate) fn forced(&self) -> Option<Uuid> {
        Uuid::try_parse(self.get(FORCED)?.trim()).ok()
    }

    /// What the locator says. Windows writes an all-zero second linkage, which says nothing.
    pub(crate) fn link(&self) -> Result<ParentLink, Fault> {
        let id = |key: &str| match self.get(key) {
            Some(text) => Uuid::try_parse(text.trim())
                .map(Some)
                .map_err(|_| damaged(format!("the parent locator's {key} is not a GUID: {text:?}"))),
            None => Ok(None),
        };
        Ok(ParentLink {
            linkage: id(LINKAGE)?.ok_or_else(|| damaged("the parent locator has no parent_linkage"))?,
            linkage2: id(LINKAGE2)?.filter(|id| !id.is_nil()),
            relative_path: self.get(RELATIVE).map(str::to_owned),
            absolute_path: self.get(ABSOLUTE).map(str::to_owned),
        })
    }

    fn parse(item: &[u8]) -> Result<Self, Fault> {
        let head: RawLocator = parse(item, 0).ok_or_else(|| damaged("the parent locator is cut short"))?;
        if Uuid::from(head.kind) != LOCATOR_TYPE {
            return Err(unsupported(format!("the parent locator is of the unknown type {:?}", head.kind)));
        }
        if head.count.get() > MAX_KEYS {
            return Err(damaged(format!("the parent locator has {} keys", head.count)));
        }
        let text = |offset: U32, length: u16| {
            let bytes =
                (offset.get() as usize).checked_add(length.into()).and_then(|end| item.get(offset.get() as usize..end));
            let bytes = bytes.filter(|bytes| bytes.len().is_multiple_of(2));
            let units = bytes.map(|bytes| bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])));
            units
                .and_then(|units| char::decode_utf16(units).collect::<Result<String, _>>().ok())
                .ok_or_else(|| damaged("the parent locator holds a text that lies outside of it or is not UTF-16"))
        };
        let mut keys = Vec::new();
        for index in 0..usize::from(head.count.get()) {
            let entry: RawLocatorEntry = parse(item, size_of::<RawLocator>() + index * size_of::<RawLocatorEntry>())
                .ok_or_else(|| damaged("the parent locator is cut short"))?;
            let key = text(entry.key_offset, entry.key_length.get())?;
            let value = text(entry.value_offset, entry.value_length.get())?;
            if keys.iter().any(|(found, _)| *found == key) {
                return Err(damaged(format!("the parent locator has the key {key:?} twice")));
            }
            keys.push((key, value));
        }
        Ok(Self(keys))
    }

    /// The item's bytes.
    fn encode(&self) -> Result<Vec<u8>, Fault> {
        let too_long = || (ErrorKind::Invalid, "the parent's path is too long for the image".to_owned());
        let mut item = vec![0; size_of::<RawLocator>() + self.0.len() * size_of::<RawLocatorEntry>()];
        put(
            &mut item,
            0,
            &RawLocator { kind: LOCATOR_TYPE.into(), reserved: 0.into(), count: (self.0.len() as u16).into() },
        );
        for (index, (key, value)) in self.0.iter().enumerate() {
            let mut text = |text: &str| {
                let at = item.len() as u32;
                item.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
                let length = u16::try_from(item.len() - at as usize).map_err(|_| too_long())?;
                Ok::<_, Fault>((at, length))
            };
            let ((key_at, key_length), (value_at, value_length)) = (text(key)?, text(value)?);
            let entry = RawLocatorEntry {
                key_offset: key_at.into(),
                value_offset: value_at.into(),
                key_length: key_length.into(),
                value_length: value_length.into(),
            };
            put(&mut item, size_of::<RawLocator>() + index * size_of::<RawLocatorEntry>(), &entry);
        }
        if item.len() > MAX_LOCATOR as usize { Err(too_long()) } else { Ok(item) }
    }
}

/// The table's entries. (For bytes of a region, its beginning is enough.)
pub(crate) fn items(region: &[u8]) -> Result<Vec<RawItem>, Fault> {
    items_within(region, region.len() as u64)
}

/// The same of a region of `length` bytes, whose beginning this is.
pub(crate) fn items_within(region: &[u8], length: u64) -> Result<Vec<RawItem>, Fault> {
    let table: RawMetadataTable = parse(region, 0).ok_or_else(|| damaged("the metadata region is too small"))?;
    if table.signature != METADATA_SIGNATURE {
        return Err(damaged("the metadata table has no signature"));
    }
    if table.count.get() > MAX_ITEMS || region.len() < TABLE_BYTES {
        return Err(damaged(format!("the metadata table names {} items", table.count)));
    }
    let mut seen = HashSet::new();
    let mut items = Vec::new();
    for index in 0..usize::from(table.count.get()) {
        let item: RawItem = parse(region, (index + 1) * size_of::<RawItem>())
            .ok_or_else(|| damaged("the metadata table is cut short"))?;
        let id = Uuid::from(item.id);
        let end = u64::from(item.offset.get()) + u64::from(item.length.get());
        let empty = item.length.get() == 0;
        if end > length || (!empty && (item.offset.get() as usize) < TABLE_BYTES) {
            return Err(damaged(format!("metadata item {id} lies outside of its region")));
        }
        if !seen.insert((id, item.flags.get() & ITEM_USER)) {
            return Err(damaged(format!("metadata item {id} is there twice")));
        }
        items.push(item);
    }
    Ok(items)
}

/// Whether we know what an item means.
pub(crate) fn is_known(item: &RawItem) -> bool {
    let known = [
        ITEM_FILE_PARAMETERS,
        ITEM_DISK_SIZE,
        ITEM_DISK_ID,
        ITEM_LOGICAL_SECTOR,
        ITEM_PHYSICAL_SECTOR,
        ITEM_PARENT_LOCATOR,
    ];
    is_note(item) || item.flags.get() & ITEM_USER == 0 && known.contains(&item.id.into())
}

fn is_note(item: &RawItem) -> bool {
    item.flags.get() & ITEM_USER != 0 && Uuid::from(item.id) == ITEM_NOTE
}

/// What a region of metadata says. The region is bounded by the caller.
pub(crate) fn read(region: &[u8]) -> Result<Metadata, Fault> {
    let items = items(region)?;
    let content = |item: &RawItem| region[item.offset.get() as usize..][..item.length.get() as usize].to_vec();
    decode(&items, &says(&items).map(|item| (Uuid::from(item.id), content(item))).collect())
}

/// The items that say what the disk is.
pub(crate) fn says(items: &[RawItem]) -> impl Iterator<Item = &RawItem> {
    items.iter().filter(|item| item.flags.get() & ITEM_USER == 0 && is_known(item))
}

/// What a region of these items says, the contents of those that say something being these.
pub(crate) fn decode(items: &[RawItem], contents: &BTreeMap<Uuid, Vec<u8>>) -> Result<Metadata, Fault> {
    let find = |id: Uuid| contents.get(&id).map(Vec::as_slice);
    if items.iter().any(|item| item.flags.get() & ITEM_USER == 0 && Uuid::from(item.id) == ITEM_INCOMPLETE) {
        return Err(damaged("the image was never finished: what was making it stopped half-way"));
    }
    let strange = |item: &&RawItem| item.flags.get() & ITEM_REQUIRED != 0 && !is_known(item);
    if let Some(item) = items.iter().find(strange) {
        return Err(unsupported(format!("the image needs the unknown metadata item {:?}", item.id)));
    }
    let need = |id: Uuid, what: &str| find(id).ok_or_else(|| damaged(format!("the image does not say its {what}")));
    let cut = |what: &str| damaged(format!("the image's {what} is cut short"));
    let number = |id: Uuid, what: &str| {
        U32::read_from_prefix(need(id, what)?).map(|(value, _)| value.get()).map_err(|_| cut(what))
    };

    let parameters: RawFileParameters =
        parse(need(ITEM_FILE_PARAMETERS, "block size")?, 0).ok_or_else(|| cut("block size"))?;
    let block_size = parameters.block_size.get();
    if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
        return Err(damaged(format!("the block size of {block_size} bytes is none that the format allows")));
    }
    let sector_size = number(ITEM_LOGICAL_SECTOR, "sector size")?;
    if sector_size != 512 && sector_size != 4096 {
        return Err(damaged(format!("the sector size of {sector_size} bytes is none that the format allows")));
    }
    let size = U64::read_from_prefix(need(ITEM_DISK_SIZE, "size")?).map_err(|_| cut("size"))?.0.get();
    if size == 0 || size > MAX_SIZE || !size.is_multiple_of(sector_size.into()) {
        return Err(damaged(format!("the size of {size} bytes is none that the format allows")));
    }
    let locator = if parameters.flags.get() & HAS_PARENT == 0 {
        None
    } else {
        let item = need(ITEM_PARENT_LOCATOR, "parent")?;
        if item.len() > MAX_LOCATOR as usize {
            return Err(damaged("the parent locator is too long"));
        }
        let locator = Locator::parse(item)?;
        locator.link()?;
        Some(locator)
    };
    let disk_id = find(ITEM_DISK_ID).and_then(|item| item.get(..16)).and_then(|id| id.try_into().ok());
    Ok(Metadata {
        size,
        block_size,
        sector_size,
        physical_sector_size: number(ITEM_PHYSICAL_SECTOR, "physical sector size").unwrap_or(sector_size),
        disk_id: disk_id.map_or(Uuid::nil(), Uuid::from_bytes_le),
        leave_allocated: parameters.flags.get() & LEAVE_ALLOCATED != 0,
        locator,
    })
}

/// The region's beginning for a new file: table and items; the rest of it is zeros.
pub(crate) fn encode(metadata: &Metadata) -> Result<Vec<u8>, Fault> {
    let flags = if metadata.leave_allocated { LEAVE_ALLOCATED } else { 0 }
        | if metadata.locator.is_some() { HAS_PARENT } else { 0 };
    let parameters = RawFileParameters { block_size: metadata.block_size.into(), flags: flags.into() };
    let disk = ITEM_REQUIRED | ITEM_VIRTUAL_DISK;
    let mut items = vec![
        (ITEM_FILE_PARAMETERS, ITEM_REQUIRED, parameters.as_bytes().to_vec()),
        (ITEM_DISK_SIZE, disk, metadata.size.to_le_bytes().to_vec()),
        (ITEM_DISK_ID, disk, metadata.disk_id.to_bytes_le().to_vec()),
        (ITEM_LOGICAL_SECTOR, disk, metadata.sector_size.to_le_bytes().to_vec()),
        (ITEM_PHYSICAL_SECTOR, disk, metadata.physical_sector_size.to_le_bytes().to_vec()),
    ];
    if let Some(locator) = &metadata.locator {
        items.push((ITEM_PARENT_LOCATOR, ITEM_REQUIRED, locator.encode()?));
    }
    let mut region = vec![0; TABLE_BYTES];
    let mut table = RawMetadataTable::new_zeroed();
    table.signature = METADATA_SIGNATURE;
    table.count = (items.len() as u16).into();
    put(&mut region, 0, &table);
    let mut free = FIRST_ITEM;
    for (index, (id, flags, bytes)) in items.into_iter().enumerate() {
        let offset = if id == ITEM_PARENT_LOCATOR { LOCATOR_AT } else { free };
        let item = RawItem {
            id: id.into(),
            offset: offset.into(),
            length: (bytes.len() as u32).into(),
            flags: flags.into(),
            reserved: 0.into(),
        };
        put(&mut region, (index + 1) * size_of::<RawItem>(), &item);
        region.resize(region.len().max(offset as usize + bytes.len()), 0);
        put(&mut region, offset as usize, bytes.as_slice());
        free += bytes.len() as u32;
    }
    Ok(region)
}

/// Replaces the parent locator inside a region's bytes: in its place if there is room, else behind everything else.
pub(crate) fn replace_locator(region: &mut [u8], locator: &Locator) -> Result<(), Fault> {
    let items = items(region)?;
    let is_locator = |item: &RawItem| item.flags.get() & ITEM_USER == 0 && Uuid::from(item.id) == ITEM_PARENT_LOCATOR;
    let index = items.iter().position(is_locator).ok_or_else(|| damaged("the image has no parent locator"))?;
    let bytes = locator.encode()?;
    let places = [items[index].offset.get(), behind(&items, index)];
    let place = find_place(region, &items, index, &places, bytes.len())
        .ok_or_else(|| unsupported("the metadata region has no room for the parent's name"))?;
    put_item(region, index, items[index], place, &bytes);
    Ok(())
}

/// The item that is the note.
pub(crate) fn note(items: &[RawItem]) -> Result<Option<&RawItem>, Fault> {
    let Some(item) = items.iter().find(|item| is_note(item)) else { return Ok(None) };
    if item.length.get() as usize > MAX_NOTE {
        return Err(damaged(format!("the image's note of {} bytes is too long", item.length)));
    }
    Ok(Some(item))
}

/// Replaces the note inside a region's bytes, or adds it.
pub(crate) fn replace_note(region: &mut [u8], note: &[u8]) -> Result<(), Fault> {
    let no_room = || unsupported("the metadata region has no room for a note");
    let items = items(region)?;
    let index = items.iter().position(is_note).unwrap_or(items.len());
    let item = items.get(index).copied().unwrap_or_else(|| RawItem {
        id: ITEM_NOTE.into(),
        flags: ITEM_USER.into(),
        ..RawItem::new_zeroed()
    });
    let behind = behind(&items, index);
    let places = [item.offset.get(), behind.max(NOTE_AT), behind];
    let place = find_place(region, &items, index, &places, note.len()).ok_or_else(no_room)?;
    if index == items.len() {
        let mut table: RawMetadataTable = parse(region, 0).ok_or_else(no_room)?;
        if table.count.get() == MAX_ITEMS {
            return Err(no_room());
        }
        table.count = (table.count.get() + 1).into();
        put(region, 0, &table);
    }
    put_item(region, index, item, place, note);
    Ok(())
}

/// All items that take room, but for the one of this index.
fn others(items: &[RawItem], index: usize) -> impl Iterator<Item = &RawItem> {
    let others = items.iter().enumerate().filter(move |(other, _)| *other != index);
    others.map(|(_, item)| item).filter(|item| item.length.get() != 0)
}

/// Where nothing but the item of this index lies any more, in whole pages.
fn behind(items: &[RawItem], index: usize) -> u32 {
    let end = others(items, index).map(|item| item.offset.get() + item.length.get()).max().unwrap_or(0);
    end.max(FIRST_ITEM).next_multiple_of(4096)
}

/// The first of these places where `length` bytes lie over no item but the one of this index.
fn find_place(region: &[u8], items: &[RawItem], index: usize, places: &[u32], length: usize) -> Option<u32> {
    let fits = |start: usize| {
        let end = start + length;
        let apart = |item: &RawItem| {
            let other = item.offset.get() as usize;
            end <= other || other + item.length.get() as usize <= start
        };
        end <= region.len() && others(items, index).all(apart)
    };
    places.iter().copied().find(|start| *start as usize >= TABLE_BYTES && fits(*start as usize))
}

fn put_item(region: &mut [u8], index: usize, item: RawItem, place: u32, bytes: &[u8]) {
    let item = RawItem { offset: place.into(), length: (bytes.len() as u32).into(), ..item };
    put(region, (index + 1) * size_of::<RawItem>(), &item);
    put(region, place as usize, bytes);
}

/// Replaces the disk's size inside a region's bytes. An item that lies over it would say something else afterwards.
pub(crate) fn replace_size(region: &mut [u8], size: u64) -> Result<(), Fault> {
    let items = items(region)?;
    let is_size = |item: &&RawItem| item.flags.get() & ITEM_USER == 0 && Uuid::from(item.id) == ITEM_DISK_SIZE;
    let item = items.iter().find(is_size).filter(|item| item.length.get() as usize >= size_of::<u64>());
    let item = item.ok_or_else(|| damaged("the image does not say its size"))?;
    let place =
        |item: &RawItem| u64::from(item.offset.get())..u64::from(item.offset.get()) + u64::from(item.length.get());
    let own = place(item);
    let over = |other: &RawItem| place(other).start < own.end && own.start < place(other).end;
    if items.iter().filter(|other| over(other)).count() > 1 {
        return Err(damaged("the disk's size cannot be changed: another item of the metadata lies over it"));
    }
    put(region, item.offset.get() as usize, &size.to_le_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(path: &str) -> ParentLink {
        ParentLink {
            linkage: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
            linkage2: None,
            relative_path: Some(path.to_owned()),
            absolute_path: None,
        }
    }

    fn noted(region: &[u8]) -> Result<Option<&[u8]>, Fault> {
        let items = items(region)?;
        let content = |item: &RawItem| &region[item.offset.get() as usize..][..item.length.get() as usize];
        note(&items).map(|note| note.map(content))
    }

    #[test]
    fn a_size_that_another_item_lies_over_is_not_changed() {
        let mut region = encode(&metadata("base")).unwrap();
        let sound = region.clone();
        replace_size(&mut region, 77 << 20).unwrap();
        assert_eq!(read(&region).unwrap().size, 77 << 20);
        // The parameters' place, for both.
        let mut region = sound;
        let parameters: RawItem = parse(&region, size_of::<RawItem>()).unwrap();
        let size: RawItem = parse(&region, 2 * size_of::<RawItem>()).unwrap();
        put(&mut region, 2 * size_of::<RawItem>(), &RawItem { offset: parameters.offset, ..size });
        let before = region.clone();
        let (kind, message) = replace_size(&mut region, 77 << 20).unwrap_err();
        assert!(kind == ErrorKind::Damaged && message.contains("lies over it"), "{message}");
        assert_eq!(region, before);
    }

    fn metadata(path: &str) -> Metadata {
        Metadata {
            size: 5 << 20,
            block_size: 2 << 20,
            sector_size: 512,
            physical_sector_size: 4096,
            disk_id: Uuid::from_u128(3),
            leave_allocated: false,
            locator: Some(Locator::of(&link(path))),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let read = read(&encode(&metadata(r".\Überlauf.vhdx")).unwrap()).unwrap();
        assert_eq!((read.size, read.block_size, read.sector_size), (5 << 20, 2 << 20, 512));
        assert_eq!(read.locator.unwrap().link().unwrap(), link(r".\Überlauf.vhdx"));
    }

    #[test]
    fn a_longer_locator_replaces_a_shorter_one_and_unknown_keys_stay() {
        let mut region = encode(&metadata(r".\a")).unwrap();
        region.resize(1 << 20, 0);
        let mut locator = Locator::of(&link(r".\a"));
        locator.put("house_number", Some("7".to_owned()));
        let mut other = link(&"x".repeat(3000));
        other.linkage2 = Some(Uuid::from_u128(9));
        locator.relink(&other);
        replace_locator(&mut region, &locator).unwrap();
        let found = read(&region).unwrap().locator.unwrap();
        assert_eq!(found.link().unwrap(), other);
        assert_eq!(found.get("house_number"), Some("7"));
    }

    #[test]
    fn a_note_is_added_replaced_and_in_nobodys_way() {
        let mut region = encode(&metadata(r".\a")).unwrap();
        region.resize(1 << 20, 0);
        assert_eq!(noted(&region).unwrap(), None);
        for text in [b"short".to_vec(), vec![7; MAX_NOTE], Vec::new(), b"again".to_vec()] {
            replace_note(&mut region, &text).unwrap();
            assert_eq!(noted(&region).unwrap(), Some(&text[..]));
            assert!(items(&region).unwrap().iter().all(is_known));
            assert_eq!(read(&region).unwrap().locator.unwrap().link().unwrap(), link(r".\a"));
        }
        let mut locator = Locator::of(&link(r".\a"));
        locator.relink(&link(&"x".repeat(30_000)));
        replace_locator(&mut region, &locator).unwrap();
        assert_eq!(noted(&region).unwrap(), Some(&b"again"[..]));
        assert_eq!(read(&region).unwrap().size, metadata("").size);
    }

    #[test]
    fn a_note_without_room_is_refused_and_one_that_is_too_long_is_damage() {
        let mut region = encode(&metadata(r".\a")).unwrap();
        region.resize(136 << 10, 0);
        let before = region.clone();
        assert_eq!(replace_note(&mut region, &[1; 9 << 10]).unwrap_err().0, ErrorKind::Unsupported);
        assert_eq!(region, before);
        region.resize(1 << 20, 0);
        replace_note(&mut region, &vec![1; MAX_NOTE]).unwrap();
        let index = items(&region).unwrap().len();
        put(&mut region, index * size_of::<RawItem>() + 20, &(MAX_NOTE as u32 + 1).to_le_bytes());
        assert_eq!(noted(&region).unwrap_err().0, ErrorKind::Damaged);
        assert!(read(&region).is_ok(), "nobody but who asks for the note is bothered");
    }

    #[test]
    fn a_locator_without_room_is_refused() {
        let mut region = encode(&metadata(r".\a")).unwrap();
        assert!(replace_locator(&mut region, &Locator::of(&link(&"x".repeat(32_000)))).is_err());
    }

    #[test]
    fn an_unknown_required_item_is_refused_and_an_unknown_other_is_not() {
        let mut region = encode(&metadata(r".\a")).unwrap();
        let mut item: RawItem = parse(&region, 32).unwrap();
        item.id = Uuid::from_u128(77).into();
        item.offset = 0.into();
        item.length = 0.into();
        let table: RawMetadataTable = parse(&region, 0).unwrap();
        put(&mut region, 8 + 2, &(table.count.get() + 1).to_le_bytes());
        for (flags, fine) in [(0, true), (ITEM_REQUIRED, false), (ITEM_USER, true), (ITEM_USER | ITEM_REQUIRED, false)]
        {
            item.flags = flags.into();
            put(&mut region, 32 * (1 + usize::from(table.count.get())), &item);
            assert_eq!(read(&region).is_ok(), fine, "flags {flags}");
        }
    }
}
