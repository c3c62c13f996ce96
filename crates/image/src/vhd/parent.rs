//! The header: the block table's place, and what the image says of its parent.

use super::format::{
    HEADER_BYTES, HEADER_CHECKSUM, HEADER_COOKIE, LOCATOR_ABSOLUTE, LOCATOR_NOTE, LOCATOR_RELATIVE, LOCATOR_SECOND,
    LOCATOR_URL, LOCATORS, NOWHERE, RawHeader, RawLocator, SECTOR, VERSION, checksum,
};
use crate::ErrorKind;
use crate::ParentLink;
use std::ops::Range;
use store::Store;
use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// What is wrong with a structure; whoever reads it knows the file.
pub(crate) type Fault = (ErrorKind, String);

/// The longest locator that we read, bytes. Windows' longest path has half of it.
pub(crate) const MAX_LOCATOR: u32 = 128 << 10;
/// UTF-16 units of the parent's name in the header.
const NAME_UNITS: usize = 256;

/// A way of saying where the parent is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Locator {
    code: [u8; 4],
    data: Vec<u8>,
}

/// The header, with the locators' data.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    raw: RawHeader,
    locators: Vec<Locator>,
    /// See [`Header::places`].
    places: Vec<Range<u64>>,
}

impl Header {
    /// A new file's header; where its table lies is still to be said.
    pub(crate) fn new(blocks: u64, block_size: u32, link: Option<&ParentLink>) -> Result<Self, Fault> {
        let mut raw = RawHeader::new_zeroed();
        raw.cookie = HEADER_COOKIE;
        raw.data_offset = NOWHERE.into();
        raw.version = VERSION.into();
        raw.block_size = block_size.into();
        let mut header =
            Self { raw, locators: Vec::new(), places: std::iter::once(0..0).collect() }.with_entries(blocks);
        if let Some(link) = link {
            header.relink(link)?;
        }
        Ok(header)
    }

    /// Reads the header at `at`. Whether its checksum is right is said too.
    pub(crate) fn read(store: &dyn Store, at: u64) -> Result<(Self, bool), crate::Error> {
        let fault = |(kind, message): Fault| crate::Error::new(kind, store.name(), message);
        let damaged = |message: &str| fault((ErrorKind::Damaged, message.to_owned()));
        let length = store.len()?;
        let inside = |at: u64, bytes: u64| at.checked_add(bytes).is_some_and(|end| end <= length);
        if at < SECTOR || !at.is_multiple_of(SECTOR) || !inside(at, HEADER_BYTES) {
            return Err(damaged("its footer places the header where it cannot be"));
        }
        let mut bytes = [0; HEADER_BYTES as usize];
        store.read_at(&mut bytes, at)?;
        let raw = RawHeader::read_from_bytes(&bytes).map_err(|_| damaged("its header is cut short"))?;
        if raw.cookie != HEADER_COOKIE {
            return Err(damaged("its header has no signature"));
        }
        if raw.version.get() != VERSION {
            let message = format!("its header is of version {:#x}, not 1.0", raw.version.get());
            return Err(fault((ErrorKind::Unsupported, message)));
        }
        let mut header = Self { raw, locators: Vec::new(), places: std::iter::once(at..at + HEADER_BYTES).collect() };
        for locator in raw.locators.iter().filter(|locator| locator.code != [0; 4] && locator.length.get() != 0) {
            let (at, bytes) = (locator.offset.get(), u64::from(locator.length.get()));
            if locator.length.get() > MAX_LOCATOR || !inside(at, bytes) {
                return Err(damaged("its header places a parent locator where it cannot be"));
            }
            let mut data = vec![0; bytes as usize];
            store.read_at(&mut data, at)?;
            header.locators.push(Locator { code: locator.code, data });
            header.places.push(at / SECTOR * SECTOR..(at + bytes).next_multiple_of(SECTOR));
        }
        Ok((header, raw.checksum.get() == checksum(&bytes, HEADER_CHECKSUM)))
    }

    /// The same for a table of so many blocks.
    pub(crate) fn with_entries(mut self, blocks: u64) -> Self {
        // Bounded by the largest disk and the smallest block.
        self.raw.max_entries = (blocks as u32).into();
        self
    }

    /// Says where the block table of a new file lies.
    pub(crate) fn place_table(&mut self, at: u64) {
        self.raw.table_offset = at.into();
    }

    /// Where the block table lies.
    pub(crate) fn table_at(&self) -> u64 {
        self.raw.table_offset.get()
    }

    /// For how many blocks the table has room. Some tools say more than the disk has.
    pub(crate) fn max_entries(&self) -> u64 {
        self.raw.max_entries.get().into()
    }

    /// Bytes in a block.
    pub(crate) fn block_size(&self) -> u32 {
        self.raw.block_size.get()
    }

    /// What it occupies in the file: itself first, then its locators' data.
    pub(crate) fn places(&self) -> &[Range<u64>] {
        &self.places
    }

    fn data(&self, code: [u8; 4]) -> Option<&[u8]> {
        self.locators.iter().find(|locator| locator.code == code).map(|locator| &locator.data[..])
    }

    /// What a differencing file says of its parent. Its name is taken from the relative locator, the URL or the header, whichever is
    /// there first; a full path from the absolute locator or the header.
    pub(crate) fn link(&self) -> ParentLink {
        let text = |code| utf16(self.data(code)?, u16::from_le_bytes);
        let url = || url_name(std::str::from_utf8(self.data(LOCATOR_URL)?).ok()?);
        let name = utf16(&self.raw.parent_name, u16::from_be_bytes);
        let is_path = |name: &String| name.contains(['\\', '/', ':']);
        let second = self.data(LOCATOR_SECOND).and_then(|data| Uuid::from_slice(data).ok());
        ParentLink {
            linkage: Uuid::from_bytes(self.raw.parent_id),
            linkage2: second,
            relative_path: text(LOCATOR_RELATIVE).or_else(url).or_else(|| name.clone().filter(|name| !is_path(name))),
            absolute_path: text(LOCATOR_ABSOLUTE).or(name.filter(is_path)),
        }
    }

    /// Says something else of the parent. Locators that we do not know stay.
    pub(crate) fn relink(&mut self, link: &ParentLink) -> Result<(), Fault> {
        let known = self.link();
        self.raw.parent_id = link.linkage.into_bytes();
        if link.relative_path != known.relative_path
            && let Some(path) = &link.relative_path
        {
            self.raw.parent_name = header_name(path);
            self.put(LOCATOR_RELATIVE, Some(utf16_bytes(path)));
        }
        if link.absolute_path != known.absolute_path {
            self.put(LOCATOR_ABSOLUTE, link.absolute_path.as_deref().map(utf16_bytes));
        }
        self.put(LOCATOR_SECOND, link.linkage2.map(|id| id.as_bytes().to_vec()));
        self.check_room("its header has no room for what is to be said of the parent")
    }

    /// The note, if there is one.
    pub(crate) fn note(&self) -> Option<&[u8]> {
        self.data(LOCATOR_NOTE)
    }

    /// Takes another note. Locators that we do not know stay.
    pub(crate) fn set_note(&mut self, note: &[u8]) -> Result<(), Fault> {
        self.put(LOCATOR_NOTE, Some(note.to_vec()).filter(|note| !note.is_empty()));
        self.check_room("its header has no room for a note")
    }

    fn check_room(&self, refusal: &str) -> Result<(), Fault> {
        let fits = self.locators.iter().all(|locator| locator.data.len() <= MAX_LOCATOR as usize);
        if self.locators.len() > LOCATORS || !fits {
            return Err((ErrorKind::Unsupported, refusal.to_owned()));
        }
        Ok(())
    }

    fn put(&mut self, code: [u8; 4], data: Option<Vec<u8>>) {
        let at = self.locators.iter().position(|locator| locator.code == code);
        match (at, data) {
            (Some(at), Some(data)) => self.locators[at].data = data,
            (None, Some(data)) => self.locators.push(Locator { code, data }),
            (Some(at), None) => drop(self.locators.remove(at)),
            (None, None) => (),
        }
    }

    /// Bytes of the header and its locators' data.
    pub(crate) fn length(&self) -> u64 {
        let data = self.locators.iter().map(|locator| (locator.data.len() as u64).next_multiple_of(SECTOR));
        HEADER_BYTES + data.sum::<u64>()
    }

    /// The header as it lies at `at` from now on, its locators' data right behind it, [`Header::length`] bytes in all.
    pub(crate) fn encode(&mut self, at: u64) -> Vec<u8> {
        let mut data = Vec::new();
        self.raw.locators = [RawLocator::new_zeroed(); LOCATORS];
        self.places.truncate(1);
        for (raw, locator) in self.raw.locators.iter_mut().zip(&self.locators) {
            let (space, offset) =
                (locator.data.len().next_multiple_of(SECTOR as usize), at + HEADER_BYTES + data.len() as u64);
            raw.code = locator.code;
            raw.space = (space as u32).into();
            raw.length = (locator.data.len() as u32).into();
            raw.offset = offset.into();
            data.extend(&locator.data);
            data.resize(data.len().next_multiple_of(SECTOR as usize), 0);
            self.places.push(offset..offset + space as u64);
        }
        [self.encode_alone(at), data].concat()
    }

    /// The header itself as it lies at `at` from now on, [`HEADER_BYTES`] bytes; its locators' data stays where it is.
    pub(crate) fn encode_alone(&mut self, at: u64) -> Vec<u8> {
        self.raw.checksum = checksum(self.raw.as_bytes(), HEADER_CHECKSUM).into();
        self.places[0] = at..at + HEADER_BYTES;
        self.raw.as_bytes().to_vec()
    }
}

/// The text up to the first zero; `None` if there is none, or if it is no UTF-16.
pub(crate) fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Option<String> {
    let (units, _) = bytes.as_chunks::<2>();
    let units: Vec<u16> = units.iter().map(|bytes| unit(*bytes)).take_while(|unit| *unit != 0).collect();
    String::from_utf16(&units).ok().filter(|text| !text.is_empty())
}

fn utf16_bytes(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// The last part of a path, as the header's own name field wants it. It is cut off where the field ends: nobody needs it.
fn header_name(path: &str) -> [u8; 512] {
    let name = path.rsplit(['\\', '/']).next().unwrap_or(path);
    let mut field = [0; 512];
    for (bytes, unit) in field.as_chunks_mut::<2>().0.iter_mut().zip(name.encode_utf16().take(NAME_UNITS - 1)) {
        *bytes = unit.to_be_bytes();
    }
    field
}

/// The path of a file URL (RFC 8089): `file://./name` as other tools write it, or `file:///folder/name`.
fn url_name(url: &str) -> Option<String> {
    let path = url.trim_end_matches('\0').strip_prefix("file://")?;
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let escaped = after.get(..2).filter(|_| *first == b'%').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 16).ok()
        });
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &after[2..] } else { after };
    }
    String::from_utf8(bytes).ok().filter(|path| !path.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::sim::Sim;

    fn link(path: &str) -> ParentLink {
        ParentLink {
            linkage: Uuid::from_u128(7),
            linkage2: None,
            relative_path: Some(path.to_owned()),
            absolute_path: None,
        }
    }

    fn written(header: &mut Header) -> Header {
        let store = Sim::new().root().create("header").unwrap();
        let bytes = header.encode(1024);
        assert_eq!(bytes.len() as u64, header.length());
        store.write_at(&bytes, 1024).unwrap();
        let (read, sound) = Header::read(&*store, 1024).unwrap();
        assert!(sound);
        read
    }

    #[test]
    fn what_is_written_is_read() {
        let mut other = link(r".\Überlauf.vhd");
        let mut header = Header::new(3, 2 << 20, Some(&other)).unwrap();
        header.place_table(4096);
        let read = written(&mut header);
        assert_eq!(read.link(), other);
        assert_eq!((read.table_at(), read.max_entries(), read.block_size()), (4096, 3, 2 << 20));
        assert_eq!(utf16(&read.raw.parent_name, u16::from_be_bytes).as_deref(), Some("Überlauf.vhd"));
        other.absolute_path = Some(r"C:\disks\Überlauf.vhd".to_owned());
        other.linkage2 = Some(Uuid::from_u128(8));
        header.relink(&other).unwrap();
        assert_eq!(written(&mut header).link(), other);
        other.linkage2 = None;
        header.relink(&other).unwrap();
        assert_eq!(written(&mut header).link(), other);
    }

    #[test]
    fn the_parent_is_named_by_whatever_names_it() {
        let named = |locators: &[([u8; 4], Vec<u8>)], name: &str| {
            let mut header = Header::new(3, 2 << 20, None).unwrap();
            for (code, data) in locators {
                header.put(*code, Some(data.clone()));
            }
            for (bytes, unit) in header.raw.parent_name.as_chunks_mut::<2>().0.iter_mut().zip(name.encode_utf16()) {
                *bytes = unit.to_be_bytes();
            }
            let link = written(&mut header).link();
            (link.relative_path.unwrap_or_default(), link.absolute_path.unwrap_or_default())
        };
        let pair = |one: &str, two: &str| (one.to_owned(), two.to_owned());
        let relative = (LOCATOR_RELATIVE, utf16_bytes(r".\a.vhd"));
        let absolute = (LOCATOR_ABSOLUTE, utf16_bytes(r"D:\b.vhd"));
        let url = (LOCATOR_URL, b"file://./c%20d.vhd".to_vec());
        assert_eq!(named(&[relative, absolute.clone(), url.clone()], "e.vhd"), pair(r".\a.vhd", r"D:\b.vhd"));
        assert_eq!(named(&[absolute, url.clone()], "e.vhd"), pair("./c d.vhd", r"D:\b.vhd"));
        assert_eq!(named(&[url], r"E:\f.vhd"), pair("./c d.vhd", r"E:\f.vhd"));
        assert_eq!(named(&[], "e.vhd"), pair("e.vhd", ""));
        assert_eq!(named(&[], r"E:\f.vhd"), pair("", r"E:\f.vhd"));
        assert_eq!(named(&[(*b"what", Vec::new())], ""), pair("", ""));
    }

    #[test]
    fn unknown_locators_stay_and_eight_are_the_most() {
        let mut header = Header::new(3, 2 << 20, Some(&link(r".\a.vhd"))).unwrap();
        for nth in 0..7 {
            header.put([b'x', b'x', b'x', nth], Some(vec![nth; 10]));
        }
        let mut other = link(r".\b.vhd");
        header.relink(&other).unwrap();
        let read = written(&mut header);
        assert_eq!(read.data([b'x', b'x', b'x', 6]), Some(&[6; 10][..]));
        assert_eq!(read.link(), other);
        other.linkage2 = Some(Uuid::from_u128(1));
        assert!(header.relink(&other).is_err());
    }
}
