//! The carry-over journal: what was acknowledged and not flushed outlives the process, not a power cut.
//!
//! Between a commit and the next flush, the table and the bitmaps of an image are newer in memory than in its file. The data is in the
//! file already (in the system's cache), so that nothing but those changes dies with the process, while the guest, which has not
//! lost its power, counts on them. They are written down here: in a second, small file on a file system in memory, without a
//! single sync.
//!
//! ```text
//!   0          512        4096            start                         tail
//!   │ header A │ header B │ … given back … │ record │ record │ record … │
//! ```
//!
//! Rules:
//! - A record is one commit's [`Edit`]s. It is appended after the data was written, and before anything of it is exposed.
//! - An edit says what a place *becomes*, not what is done to it. So redoing those of a whole suffix, in order, over a file that has any
//!   part of them already yields what was in memory: a flush may be cut short anywhere, and records may be kept for too long.
//! - A flush notes the journal's end when it takes over the changed pages. When they are durable, the journal begins there: the
//!   other header is written, then the space before is given back. Nothing is ever written over a record that counts.
//! - An append that failed is cut off again, for the places that it names go to others. If that fails too the layer is poisoned.
//! - It counts for one life of the host and for one session of one file, known by the `FileWriteGuid` that the session gave it.
//!   What cannot be read as a record ends it.
//!
//! `docs/formats/carry.md` has the layout.

use super::bat::{Entry, Geometry};
use super::format::{Guid, PAGE_BYTES, checksum, parse, put, seal};
use crate::Result;
use std::ops::Range;
use std::sync::Arc;
use store::Store;
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Where a layer keeps what must outlive its process: see [`super::open_carried`] and [`super::create_carried`].
#[derive(Debug, Clone)]
pub struct Carry {
    /// A file of this one image, open for writing, that outlives the process: on a file system in memory, since it is written at
    /// every commit and never synced. Empty, or as the session before left it.
    pub store: Arc<dyn Store>,
    /// This life of the host: its boot id. What another life left is not used, for then the image has lost unsynced data too.
    pub life: Uuid,
}

/// One change of the metadata in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Edit {
    /// The table's entry at `index` becomes `entry`, which has a place.
    Place { index: u64, entry: Entry },
    /// These blocks become zeros without a place.
    Zero { blocks: Range<u64> },
    /// The bits of these sectors (counted from the block's first) are set or cleared.
    Bits { block: u64, sectors: Range<u64>, set: bool },
}

/// One copy of the journal's header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    signature: [u8; 4],
    checksum: U32,
    version: U32,
    reserved: U32,
    /// The copy with the larger number counts.
    number: U64,
    life: Guid,
    session: Guid,
    /// Where the first record begins.
    start: U64,
    /// The first record's number.
    sequence: U64,
}
const _: () = assert!(size_of::<RawHeader>() == 72);
const HEADER_SIGNATURE: [u8; 4] = *b"tbcj";
const VERSION: u32 = 1;
/// Where the two copies lie.
const HEADERS_AT: [u64; 2] = [0, 512];
/// Where the first record ever lies.
const RECORDS_AT: u64 = PAGE_BYTES;

/// What a record begins with; `count` edits follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawRecord {
    signature: [u8; 4],
    checksum: U32,
    sequence: U64,
    session: Guid,
    count: U32,
    reserved: U32,
}
const _: () = assert!(size_of::<RawRecord>() == 40);
const RECORD_SIGNATURE: [u8; 4] = *b"tbcr";
/// The most edits in a record: bounds what a reader takes at once. Larger commits are several records, written at once.
const MAX_EDITS: usize = 1 << 14;

/// One edit.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawEdit {
    kind: U32,
    /// Set, clear: how many sectors.
    count: U32,
    /// Place: the entry's index. Zero: the first block. Set, clear: the block.
    at: U64,
    /// Place: the entry. Zero: how many blocks. Set, clear: the first sector.
    value: U64,
}
const _: () = assert!(size_of::<RawEdit>() == 24);
const KIND_PLACE: u32 = 1;
const KIND_ZERO: u32 = 2;
const KIND_SET: u32 = 3;
const KIND_CLEAR: u32 = 4;

impl Edit {
    fn encode(&self) -> RawEdit {
        let (kind, count, at, value) = match self {
            Self::Place { index, entry } => (KIND_PLACE, 0, *index, entry.0),
            Self::Zero { blocks } => (KIND_ZERO, 0, blocks.start, blocks.end - blocks.start),
            Self::Bits { block, sectors, set } => {
                let kind = if *set { KIND_SET } else { KIND_CLEAR };
                // A block has 2^19 sectors at most.
                (kind, (sectors.end - sectors.start) as u32, *block, sectors.start)
            }
        };
        RawEdit { kind: kind.into(), count: count.into(), at: at.into(), value: value.into() }
    }

    /// The edit, unless it lies outside of a disk of this `geometry`. Whether an entry is sound the table's check says.
    fn decode(raw: &RawEdit, geometry: &Geometry) -> Option<Self> {
        let (at, value) = (raw.at.get(), raw.value.get());
        match raw.kind.get() {
            KIND_PLACE => {
                let entry = Entry(value);
                (at < geometry.entries() && entry.place().is_some()).then_some(Self::Place { index: at, entry })
            }
            KIND_ZERO => {
                let end = at.checked_add(value)?;
                (end <= geometry.blocks()).then_some(Self::Zero { blocks: at..end })
            }
            kind @ (KIND_SET | KIND_CLEAR) => {
                let end = value.checked_add(raw.count.get().into())?;
                let inside = geometry.differencing && at < geometry.blocks() && end <= geometry.block_sectors();
                inside.then_some(Self::Bits { block: at, sectors: value..end, set: kind == KIND_SET })
            }
            _ => None,
        }
    }
}

/// How many blocks can still become zeros: only one that is not zeros does, so each may once, and again for each place that one got
/// since. This bounds the work of redoing, whatever a journal says.
struct Zeros(u64);

impl Zeros {
    /// Counts an edit, and says whether a session can have made it.
    fn allow(&mut self, edit: &Edit) -> bool {
        let left = match edit {
            Edit::Place { .. } => self.0.checked_add(1),
            Edit::Zero { blocks } => self.0.checked_sub(blocks.end - blocks.start),
            Edit::Bits { .. } => return true,
        };
        self.0 = left.unwrap_or(self.0);
        left.is_some()
    }
}

/// A place in the journal, between records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    at: u64,
    /// The number of the record that begins there.
    sequence: u64,
}

impl Carry {
    /// Where the journal of the session that gave a file the id `session` begins; `None` if there is no such journal.
    pub(crate) fn find(&self, session: Uuid) -> Result<Option<Mark>> {
        let mut newest: Option<RawHeader> = None;
        for at in HEADERS_AT {
            let Some(bytes) = self.read(at, size_of::<RawHeader>())? else { continue };
            let Some(header) = parse::<RawHeader>(&bytes, 0) else { continue };
            let sound = header.signature == HEADER_SIGNATURE
                && header.checksum.get() == checksum(&bytes)
                && header.version.get() == VERSION;
            if sound && newest.is_none_or(|newest| newest.number.get() < header.number.get()) {
                newest = Some(header);
            }
        }
        let ours = newest.filter(|header| {
            Uuid::from(header.life) == self.life && Uuid::from(header.session) == session && !session.is_nil()
        });
        Ok(ours.map(|header| Mark { at: header.start.get(), sequence: header.sequence.get() }))
    }

    /// The edits of the session's records from `mark` on, up to the first that is none of its own or cut short.
    pub(crate) fn edits(&self, session: Uuid, mut mark: Mark, geometry: &Geometry) -> Result<Vec<Edit>> {
        let mut edits = Vec::new();
        let mut zeros = Zeros(geometry.blocks());
        while let Some((record, next)) = self.record(session, mark)? {
            let raws = record.chunks_exact(size_of::<RawEdit>()).filter_map(|raw| parse::<RawEdit>(raw, 0));
            let sound = raws.map(|raw| Edit::decode(&raw, geometry).filter(|edit| zeros.allow(edit)));
            let Some(more) = sound.collect::<Option<Vec<_>>>() else { break };
            edits.extend(more);
            mark = next;
        }
        Ok(edits)
    }

    /// The bytes of the edits of the record at `mark`, and where the next one begins.
    fn record(&self, session: Uuid, mark: Mark) -> Result<Option<(Vec<u8>, Mark)>> {
        let head = size_of::<RawRecord>();
        let Some(bytes) = self.read(mark.at, head)? else { return Ok(None) };
        let Some(raw) = parse::<RawRecord>(&bytes, 0) else { return Ok(None) };
        let count = raw.count.get() as usize;
        let ours = raw.signature == RECORD_SIGNATURE
            && raw.sequence.get() == mark.sequence
            && Uuid::from(raw.session) == session
            && count <= MAX_EDITS;
        if !ours {
            return Ok(None);
        }
        let length = head + count * size_of::<RawEdit>();
        let Some(mut bytes) = self.read(mark.at, length)? else { return Ok(None) };
        if checksum(&bytes) != raw.checksum.get() {
            return Ok(None);
        }
        let Some(sequence) = mark.sequence.checked_add(1) else { return Ok(None) };
        Ok(Some((bytes.split_off(head), Mark { at: mark.at + length as u64, sequence })))
    }

    /// So many bytes at `at`; `None` if the file does not reach so far.
    fn read(&self, at: u64, length: usize) -> Result<Option<Vec<u8>>> {
        let inside = at.checked_add(length as u64).is_some_and(|end| self.store.len().is_ok_and(|len| end <= len));
        if !inside {
            return Ok(None);
        }
        let mut bytes = vec![0; length];
        self.store.read_at(&mut bytes, at)?;
        Ok(Some(bytes))
    }
}

/// The journal of a session that is under way. Used under the metadata lock, which keeps the records in the order of their
/// changes.
#[derive(Debug)]
pub(crate) struct Writer {
    carry: Carry,
    session: Uuid,
    /// The number of the newest header.
    number: u64,
    start: Mark,
    /// What lies before is given back.
    given_back: u64,
    tail: Mark,
    /// Records are put together here.
    buffer: Vec<u8>,
}

impl Writer {
    /// A journal whose session has not begun.
    pub(crate) fn new(carry: Carry) -> Self {
        let first = Mark { at: RECORDS_AT, sequence: 1 };
        Self {
            carry,
            session: Uuid::nil(),
            number: 0,
            start: first,
            given_back: first.at,
            tail: first,
            buffer: Vec::new(),
        }
    }

    /// Begins the journal of the session that has given its file the id `session`. What the file held is gone.
    pub(crate) fn begin(&mut self, session: Uuid) -> store::Result<()> {
        self.end()?;
        self.carry.store.set_len(RECORDS_AT)?;
        *self = Self { session, ..Self::new(self.carry.clone()) };
        self.put_header(self.start)
    }

    /// Ends the journal: there is nothing to redo.
    pub(crate) fn end(&self) -> store::Result<()> {
        self.carry.store.set_len(0)
    }

    /// Writes the header that is not the newest.
    fn put_header(&mut self, start: Mark) -> store::Result<()> {
        let number = self.number + 1;
        let mut raw = RawHeader::new_zeroed();
        raw.signature = HEADER_SIGNATURE;
        raw.version = VERSION.into();
        raw.number = number.into();
        raw.life = self.carry.life.into();
        raw.session = self.session.into();
        raw.start = start.at.into();
        raw.sequence = start.sequence.into();
        let mut bytes = [0; size_of::<RawHeader>()];
        put(&mut bytes, 0, &raw);
        seal(&mut bytes);
        self.carry.store.write_at(&bytes, HEADERS_AT[(number % 2) as usize])?;
        (self.number, self.start) = (number, start);
        Ok(())
    }

    /// Bytes of records that are not durable elsewhere.
    pub(crate) fn bytes(&self) -> u64 {
        self.tail.at - self.start.at
    }

    /// Where the next record goes.
    pub(crate) fn mark(&self) -> Mark {
        self.tail
    }

    /// Appends a commit's edits. If that fails, they may be there all the same until [`Writer::cut`].
    pub(crate) fn append(&mut self, edits: &[Edit]) -> store::Result<()> {
        self.buffer.clear();
        let mut sequence = self.tail.sequence;
        for edits in edits.chunks(MAX_EDITS) {
            let begin = self.buffer.len();
            let mut raw = RawRecord::new_zeroed();
            raw.signature = RECORD_SIGNATURE;
            raw.sequence = sequence.into();
            raw.session = self.session.into();
            raw.count = (edits.len() as u32).into();
            self.buffer.extend_from_slice(raw.as_bytes());
            for edit in edits {
                self.buffer.extend_from_slice(edit.encode().as_bytes());
            }
            seal(&mut self.buffer[begin..]);
            sequence += 1;
        }
        self.carry.store.write_at(&self.buffer, self.tail.at)?;
        self.tail = Mark { at: self.tail.at + self.buffer.len() as u64, sequence };
        Ok(())
    }

    /// Takes away what an append that failed may have left.
    pub(crate) fn cut(&self) -> store::Result<()> {
        self.carry.store.set_len(self.tail.at)
    }

    /// Forgets the records before `mark`, which are durable in the image. If that fails they stay, which does no harm.
    pub(crate) fn forget(&mut self, mark: Mark) {
        if mark == self.start || self.put_header(mark).is_err() {
            return;
        }
        let whole_pages = mark.at / PAGE_BYTES * PAGE_BYTES;
        if self.carry.store.punch(self.given_back, whole_pages - self.given_back).is_ok() {
            self.given_back = whole_pages;
        }
    }
}
