//! The two copies of the header, and the region table.

use super::format::{
    HEADER_AT, HEADER_SECTION, HEADER_SIGNATURE, MAX_REGIONS, MIB, PAGE, PAGE_BYTES, REGION_BAT, REGION_METADATA,
    REGION_REQUIRED, REGION_SIGNATURE, REGION_TABLE_AT, RawHeader, RawRegion, RawRegionTable, TABLE_BYTES, checksum,
    parse, put, seal,
};
use super::metadata::Fault;
use crate::ErrorKind;
use store::Store;
use uuid::Uuid;
use zerocopy::FromZeros;

/// What the current header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) sequence: u64,
    pub(crate) file_write: Uuid,
    pub(crate) data_write: Uuid,
    /// Nil when the log is empty.
    pub(crate) log: Uuid,
    pub(crate) log_offset: u64,
    pub(crate) log_length: u64,
}

impl Header {
    /// The header as it lies in the file.
    pub(crate) fn encode(&self) -> Box<[u8; PAGE]> {
        let mut raw = RawHeader::new_zeroed();
        raw.signature = HEADER_SIGNATURE;
        raw.sequence = self.sequence.into();
        raw.file_write = self.file_write.into();
        raw.data_write = self.data_write.into();
        raw.log = self.log.into();
        raw.version = 1.into();
        raw.log_length = (self.log_length as u32).into();
        raw.log_offset = self.log_offset.into();
        let mut bytes = Box::new([0; PAGE]);
        put(&mut bytes[..], 0, &raw);
        seal(&mut bytes[..]);
        bytes
    }
}

/// Reads the file, or says that it ends too early.
pub(crate) fn read(store: &dyn Store, offset: u64, length: usize) -> Result<Vec<u8>, crate::Error> {
    if length > PAGE {
        // The last byte first: a length that is a lie takes no memory.
        store.read_at(&mut [0], offset + length as u64 - 1)?;
    }
    let mut bytes = vec![0; length];
    store.read_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// How much of a stretch is read at once, in bytes.
const STEP: u64 = MIB;

/// Reads what the file holds of a region, or the beginning of one, and passes over its holes: `take` is given pages and where they lie
/// in the region; what it is not given is zero. `what` it is, for messages.
pub(crate) fn read_data(
    store: &dyn Store,
    region: Region,
    what: &str,
    mut take: impl FnMut(u64, &[u8]),
) -> Result<(), crate::Error> {
    let mut at = region.offset;
    while let Some((start, end)) = store.data(at)?.filter(|(start, _)| *start < region.end()) {
        let start = at.max(start / PAGE_BYTES * PAGE_BYTES);
        let end = end.next_multiple_of(PAGE_BYTES).min(region.end()).min(start + STEP);
        if store.len()? < end {
            break;
        }
        take(start - region.offset, &read(store, start, (end - start) as usize)?);
        at = end;
    }
    // Asked behind the last look: what lies past the file's end is no hole.
    check_reaches(store, region, what)
}

/// Fails if the file ends before the region does.
pub(crate) fn check_reaches(store: &dyn Store, region: Region, what: &str) -> Result<(), crate::Error> {
    let length = store.len()?;
    if length < region.end() {
        let message = format!("it was cut: {what} reaches to {}, and the file has {length} bytes", region.end());
        return Err(crate::Error::new(ErrorKind::Damaged, store.name(), message));
    }
    Ok(())
}

/// A copy of the header, if it is a sound one.
pub(crate) fn decode(bytes: &[u8]) -> Option<RawHeader> {
    let raw: RawHeader = parse(bytes, 0)?;
    (raw.signature == HEADER_SIGNATURE && raw.checksum.get() == checksum(bytes)).then_some(raw)
}

/// The current header and which copy it is. `copies` are the two copies' bytes.
///
/// Copies of one sequence number are fine if they are equal (Disk2VHD writes such files).
pub(crate) fn current(copies: [&[u8]; 2]) -> Result<(Header, usize), Fault> {
    let damaged = |message: &str| (ErrorKind::Damaged, message.to_owned());
    let (raw, slot) = match (decode(copies[0]), decode(copies[1])) {
        (Some(first), Some(second)) if first.sequence == second.sequence && copies[0] != copies[1] => {
            return Err(damaged("the two headers have the same number and differ"));
        }
        (Some(first), Some(second)) if second.sequence.get() > first.sequence.get() => (second, 1),
        (Some(first), _) => (first, 0),
        (None, Some(second)) => (second, 1),
        (None, None) => return Err(damaged("neither header is valid")),
    };
    Ok((of(&raw)?, slot))
}

/// What a sound copy of the header says, if that can be.
pub(crate) fn of(raw: &RawHeader) -> Result<Header, Fault> {
    if raw.version.get() != 1 {
        return Err((ErrorKind::Unsupported, format!("the image is of version {}, not 1", raw.version)));
    }
    let header = Header {
        sequence: raw.sequence.get(),
        file_write: raw.file_write.into(),
        data_write: raw.data_write.into(),
        log: raw.log.into(),
        log_offset: raw.log_offset.get(),
        log_length: raw.log_length.get().into(),
    };
    if !header.log.is_nil() && raw.log_version.get() != 0 {
        return Err((ErrorKind::Unsupported, format!("the log is of version {}, not 0", raw.log_version)));
    }
    let placed = header.log_offset >= HEADER_SECTION
        && header.log_offset.is_multiple_of(MIB)
        && header.log_length.is_multiple_of(MIB)
        && header.log_length != 0
        && header.log_offset.checked_add(header.log_length).is_some();
    let message = "the header places the log where it cannot be";
    if placed { Ok(header) } else { Err((ErrorKind::Damaged, message.to_owned())) }
}

/// Where the other copy of a header in `slot` lies.
pub(crate) fn slot_offset(slot: usize) -> u64 {
    HEADER_AT[slot]
}

/// A stretch of the file with one purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Region {
    /// The offset behind it. Regions are checked when they are read, so this cannot overflow.
    pub(crate) fn end(self) -> u64 {
        self.offset + self.length
    }
}

/// The regions of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Regions {
    pub(crate) bat: Region,
    pub(crate) metadata: Region,
    /// Those that we do not know and need not know; their bytes are kept.
    pub(crate) others: Vec<Region>,
}

/// Reads the first sound copy of the region table.
pub(crate) fn regions(store: &dyn Store) -> Result<Regions, crate::Error> {
    let fault = |(kind, message): Fault| crate::Error::new(kind, store.name(), message);
    for at in REGION_TABLE_AT {
        if let Some(regions) = decode_copy(&read(store, at, TABLE_BYTES)?) {
            return regions.map_err(fault);
        }
    }
    Err(fault((ErrorKind::Damaged, "neither region table is valid".to_owned())))
}

/// A copy of the region table: `None` if it is not sound, else what it says, if that can be.
pub(crate) fn decode_copy(bytes: &[u8]) -> Option<Result<Regions, Fault>> {
    let table: RawRegionTable = parse(bytes, 0)?;
    let sound = table.signature == REGION_SIGNATURE && table.checksum.get() == checksum(bytes);
    sound.then(|| decode_regions(bytes, table.count.get()))
}

fn decode_regions(bytes: &[u8], count: u32) -> Result<Regions, Fault> {
    let damaged = |message: String| (ErrorKind::Damaged, message);
    if count > MAX_REGIONS {
        return Err(damaged(format!("the region table names {count} regions")));
    }
    let (mut bat, mut metadata, mut others) = (None, None, Vec::new());
    for index in 0..count as usize {
        let raw: RawRegion = parse(bytes, size_of::<RawRegionTable>() + index * size_of::<RawRegion>())
            .ok_or_else(|| damaged("the region table is cut short".to_owned()))?;
        let region = Region { offset: raw.offset.get(), length: raw.length.get().into() };
        let sound = region.offset >= HEADER_SECTION
            && region.offset.is_multiple_of(MIB)
            && region.length.is_multiple_of(MIB)
            && region.length != 0
            && region.offset.checked_add(region.length).is_some();
        if !sound {
            return Err(damaged(format!("region {:?} is placed where it cannot be", raw.id)));
        }
        let known = match raw.id.into() {
            REGION_BAT => bat.replace(region).is_some(),
            REGION_METADATA => metadata.replace(region).is_some(),
            _ if raw.flags.get() & REGION_REQUIRED != 0 => {
                return Err((ErrorKind::Unsupported, format!("the image needs the unknown region {:?}", raw.id)));
            }
            _ => {
                others.push(region);
                false
            }
        };
        if known {
            return Err(damaged(format!("region {:?} is there twice", raw.id)));
        }
    }
    match (bat, metadata) {
        (Some(bat), Some(metadata)) => Ok(Regions { bat, metadata, others }),
        _ => Err(damaged("the image lacks its block table or its metadata".to_owned())),
    }
}

/// A sound copy of the region table in which the block table lies elsewhere; all else in it stays.
pub(crate) fn with_bat_at(store: &dyn Store, bat: Region) -> Result<Vec<u8>, crate::Error> {
    let damaged = || crate::Error::new(ErrorKind::Damaged, store.name(), "neither region table is valid");
    for at in REGION_TABLE_AT {
        let mut bytes = read(store, at, TABLE_BYTES)?;
        let Some(table) = parse::<RawRegionTable>(&bytes, 0) else { continue };
        if table.signature != REGION_SIGNATURE || table.checksum.get() != checksum(&bytes) {
            continue;
        }
        let places = (0..table.count.get().min(MAX_REGIONS) as usize)
            .map(|index| size_of::<RawRegionTable>() + index * size_of::<RawRegion>());
        let found = places.filter_map(|place| Some((place, parse::<RawRegion>(&bytes, place)?)));
        let (place, raw) = found.into_iter().find(|(_, raw)| Uuid::from(raw.id) == REGION_BAT).ok_or_else(damaged)?;
        put(&mut bytes, place, &RawRegion { offset: bat.offset.into(), length: (bat.length as u32).into(), ..raw });
        seal(&mut bytes);
        return Ok(bytes);
    }
    Err(damaged())
}

/// A region table for a new file.
pub(crate) fn encode_regions(bat: Region, metadata: Region) -> Vec<u8> {
    let mut bytes = vec![0; TABLE_BYTES];
    let mut table = RawRegionTable::new_zeroed();
    table.signature = REGION_SIGNATURE;
    table.count = 2.into();
    put(&mut bytes, 0, &table);
    for (index, (id, region)) in [(REGION_BAT, bat), (REGION_METADATA, metadata)].into_iter().enumerate() {
        let raw = RawRegion {
            id: id.into(),
            offset: region.offset.into(),
            length: (region.length as u32).into(),
            flags: REGION_REQUIRED.into(),
        };
        put(&mut bytes, size_of::<RawRegionTable>() + index * size_of::<RawRegion>(), &raw);
    }
    seal(&mut bytes);
    bytes
}
