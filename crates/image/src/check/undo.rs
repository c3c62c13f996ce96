//! The undo file of a repair: what it writes over, and what it writes. Its layout is in `docs/formats/check.md`.
//!
//! Both are there so that an undo file can tell whether it still fits: every sector of the image that it speaks of must be the old
//! or the new one, else the image was used since, and taking the repair back would destroy what was written.

use super::plan::{Plan, read_padded};
use crate::Result;
use std::sync::Arc;
use store::{Folder, Store};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

const SIGNATURE: [u8; 8] = *b"tnbyundo";
const RECORD_SIGNATURE: [u8; 4] = *b"undo";
const VERSION: u32 = 1;
/// Where the first record lies; the header is alone in its sector.
const RECORDS_AT: u64 = 4096;
/// The most bytes that one record speaks of. Repairs write pages; this bounds what a file that lies can ask for.
const MAX_RECORD: usize = 1 << 20;
/// What a device writes whole or not at all.
const SECTOR: u64 = 512;

/// The repair is under way, or was cut off.
const UNDER_WAY: u32 = 1;
/// The repair is complete.
const FINISHED: u32 = 2;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    signature: [u8; 8],
    checksum: U32,
    version: U32,
    state: U32,
    reserved: U32,
    /// Records.
    count: U64,
    /// The image's length before and after, bytes.
    before: U64,
    after: U64,
}
const _: () = assert!(size_of::<RawHeader>() == 48);

/// Followed by `length` old bytes and `length` new ones.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawRecord {
    signature: [u8; 4],
    checksum: U32,
    offset: U64,
    length: U32,
    reserved: U32,
}
const _: () = assert!(size_of::<RawRecord>() == 24);

impl RawHeader {
    fn sum(mut self) -> u32 {
        self.checksum = 0.into();
        crc32c::crc32c(self.as_bytes())
    }
}

impl RawRecord {
    fn sum(mut self, old_and_new: &[u8]) -> u32 {
        self.checksum = 0.into();
        crc32c::crc32c_append(crc32c::crc32c(self.as_bytes()), old_and_new)
    }
}

/// One stretch of the image.
struct Record {
    offset: u64,
    old: Vec<u8>,
    new: Vec<u8>,
}

/// An undo file that is whole.
#[derive(Debug)]
pub(super) struct Undo {
    file: Arc<dyn Store>,
    header: RawHeader,
}

impl Undo {
    /// Writes the undo file `name` of `plan` for the image `store`. It and its name are durable when this returns.
    pub(super) fn make(folder: &Arc<dyn Folder>, name: &str, store: &dyn Store, plan: &Plan) -> Result<Self> {
        // A file by this name is always whole: what was cut off in the making bears another.
        let partial = format!("{name}.part");
        let file = folder.create(&partial)?;
        let made = Self::fill(file, store, plan).and_then(|undo| {
            folder.rename(&partial, name)?;
            folder.sync()?;
            Ok(undo)
        });
        if made.is_err() {
            // The error that is passed on says more than a failure to tidy up.
            let _ = folder.unlink(&partial);
        }
        made
    }

    fn fill(file: Arc<dyn Store>, store: &dyn Store, plan: &Plan) -> Result<Self> {
        let before = store.len()?;
        let (mut at, mut count) = (RECORDS_AT, 0);
        for (offset, new) in plan.writes() {
            for (piece, new) in new.chunks(MAX_RECORD).enumerate() {
                let offset = offset + (piece * MAX_RECORD) as u64;
                let mut bytes = vec![0; new.len()];
                read_padded(store, &mut bytes, offset)?;
                bytes.extend_from_slice(new);
                let mut record = RawRecord::new_zeroed();
                record.signature = RECORD_SIGNATURE;
                record.offset = offset.into();
                record.length = (new.len() as u32).into();
                record.checksum = record.sum(&bytes).into();
                file.write_at(record.as_bytes(), at)?;
                file.write_at(&bytes, at + size_of::<RawRecord>() as u64)?;
                at += (size_of::<RawRecord>() + bytes.len()) as u64;
                count += 1;
            }
        }
        let mut header = RawHeader::new_zeroed();
        header.signature = SIGNATURE;
        header.version = VERSION.into();
        header.count = count.into();
        header.before = before.into();
        header.after = plan.length_after(before).into();
        let mut undo = Self { file, header };
        undo.put_state(UNDER_WAY)?;
        Ok(undo)
    }

    /// Changes the state, durably. The header lies in one sector: it is the old or the new one.
    fn put_state(&mut self, state: u32) -> Result<()> {
        self.header.state = state.into();
        self.header.checksum = self.header.sum().into();
        self.file.write_at(self.header.as_bytes(), 0)?;
        Ok(self.file.sync()?)
    }

    /// Says that the repair is complete.
    pub(super) fn finish(mut self) -> Result<()> {
        self.put_state(FINISHED)
    }

    /// An undo file that is there; `None` if it is none, or not whole.
    pub(super) fn open(file: Arc<dyn Store>) -> Result<Option<Self>> {
        let mut bytes = [0; size_of::<RawHeader>()];
        read_padded(&*file, &mut bytes, 0)?;
        let Ok(header) = RawHeader::read_from_bytes(&bytes) else { return Ok(None) };
        let sound = header.signature == SIGNATURE
            && header.version.get() == VERSION
            && header.checksum.get() == header.sum()
            && header.before.get() <= header.after.get();
        if !sound {
            return Ok(None);
        }
        let undo = Self { file, header };
        let whole = undo.each(|_| Ok(true))?;
        Ok(whole.then_some(undo))
    }

    /// Whether the repair was completed.
    pub(super) fn finished(&self) -> bool {
        self.header.state.get() == FINISHED
    }

    /// Hands out the records, as long as they are sound and `each` says so. Whether it came to the end.
    fn each(&self, mut each: impl FnMut(Record) -> Result<bool>) -> Result<bool> {
        let mut at = RECORDS_AT;
        let length = self.file.len()?;
        for _ in 0..self.header.count.get() {
            let mut bytes = [0; size_of::<RawRecord>()];
            read_padded(&*self.file, &mut bytes, at)?;
            let Ok(raw) = RawRecord::read_from_bytes(&bytes) else { return Ok(false) };
            let len = raw.length.get() as usize;
            let end = at + (size_of::<RawRecord>() + 2 * len) as u64;
            if raw.signature != RECORD_SIGNATURE || len == 0 || len > MAX_RECORD || end > length {
                return Ok(false);
            }
            let mut old = vec![0; 2 * len];
            self.file.read_at(&mut old, at + size_of::<RawRecord>() as u64)?;
            let inside = raw.offset.get().checked_add(len as u64).is_some_and(|end| end <= self.header.after.get());
            if raw.checksum.get() != raw.sum(&old) || !inside {
                return Ok(false);
            }
            let new = old.split_off(len);
            if !each(Record { offset: raw.offset.get(), old, new })? {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    /// Whether the image is what the repair found, what it made, or something between.
    pub(super) fn fits(&self, store: &dyn Store) -> Result<bool> {
        let length = store.len()?;
        if length < self.header.before.get() || length > self.header.after.get() {
            return Ok(false);
        }
        self.each(|record| {
            let mut now = vec![0; record.old.len()];
            read_padded(store, &mut now, record.offset)?;
            let mut start = 0;
            while start < now.len() {
                let sector_end = SECTOR - (record.offset + start as u64) % SECTOR;
                let end = (start + sector_end as usize).min(now.len());
                if now[start..end] != record.old[start..end] && now[start..end] != record.new[start..end] {
                    return Ok(false);
                }
                start = end;
            }
            Ok(true)
        })
    }

    /// Writes the old bytes back, durably.
    pub(super) fn take_back(&self, store: &dyn Store) -> Result<()> {
        let before = self.header.before.get();
        self.each(|mut record| {
            // What lay past the end is cut off below.
            record.old.truncate(before.saturating_sub(record.offset).min(record.old.len() as u64) as usize);
            if !record.old.is_empty() {
                store.write_at(&record.old, record.offset)?;
            }
            Ok(true)
        })?;
        if store.len()? != before {
            store.set_len(before)?;
        }
        Ok(store.sync()?)
    }
}
