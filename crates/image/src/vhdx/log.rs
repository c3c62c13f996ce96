//! The log: metadata changes become durable here, all or nothing, before they are carried out in their places.
//!
//! ```text
//!   entry:  header 64 │ descriptors 32 each … │ pad to 4 KiB │ one 4 KiB sector for each `desc` descriptor
//! ```
//!
//! The log is a ring. What counts after a crash is the *active run*: entries with the header's log id, sound checksums and
//! consecutive sequence numbers, from the head's `tail` up to the head, the head being the one with the largest number.

use super::format::{
    DATA_SIGNATURE, DESCRIPTOR_DATA, DESCRIPTOR_ZERO, LOG_SIGNATURE, PAGE, RawDataSector, RawDescriptor, RawLogEntry,
    checksum, parse, put, seal,
};
use super::page::PageBytes;
use uuid::Uuid;
use zerocopy::FromZeros;

/// The longest log that we replay, in bytes. Every file seen has 1 MiB; the bound keeps hostile files cheap.
pub(crate) const MAX_LOG: u64 = 64 << 20;
/// No file is longer than this; larger lengths in a log are damage.
const MAX_FILE: u64 = 1 << 50;
/// How many pages we put into one entry: such an entry takes less than a third of the smallest log.
///
/// While an entry is written, a crash makes the one before it the head, and that one may still name the one before *it* as its tail.
/// So three must fit into the ring.
pub(crate) const ENTRY_PAGES: usize = 84;
const _: () = assert!(3 * (ENTRY_PAGES + 1) * PAGE <= 1 << 20);
const _: () = assert!(size_of::<RawLogEntry>() + ENTRY_PAGES * size_of::<RawDescriptor>() <= PAGE);

/// One change that the log holds for the file.
#[derive(Debug)]
pub(crate) enum Patch {
    /// A page at this offset.
    Page(u64, PageBytes),
    /// Zeros at this offset, so many.
    Zero(u64, u64),
}

impl Patch {
    /// Where it changes the file, and how many bytes.
    pub(crate) fn place(&self) -> (u64, u64) {
        match *self {
            Self::Page(at, _) => (at, PAGE as u64),
            Self::Zero(at, len) => (at, len),
        }
    }
}

/// What replaying a log does to the file.
#[derive(Debug)]
pub(crate) struct Replay {
    /// The changes, to be made in this order.
    pub(crate) patches: Vec<Patch>,
    /// The file was at least this long when the log was written; if it is shorter now, it was cut.
    pub(crate) flushed_length: u64,
    /// The file is to be at least this long.
    pub(crate) last_length: u64,
}

/// A sound entry, found at `start` of the log.
#[derive(Debug, Clone, Copy)]
struct Found {
    start: usize,
    length: usize,
    tail: usize,
    sequence: u64,
    count: usize,
    flushed_length: u64,
    last_length: u64,
}

/// A log read into memory, as a ring.
struct Ring<'a>(&'a [u8]);

impl Ring<'_> {
    fn sector(&self, offset: usize) -> &[u8] {
        let at = offset % self.0.len();
        &self.0[at..at + PAGE]
    }

    /// `length` bytes from `start` on, over the ring's end.
    fn copy(&self, start: usize, length: usize) -> Vec<u8> {
        let first = length.min(self.0.len() - start);
        [&self.0[start..start + first], &self.0[..length - first]].concat()
    }

    /// The entry at `start`, if it is a sound one of this log. `budget` bounds the bytes that checksums may cost in all.
    fn entry(&self, start: usize, id: Uuid, budget: &mut usize) -> Option<Found> {
        let raw: RawLogEntry = parse(self.sector(start), 0)?;
        let (length, count) = (raw.length.get() as usize, raw.count.get() as usize);
        let tail = raw.tail.get() as usize;
        let sound = raw.signature == LOG_SIGNATURE
            && Uuid::from(raw.log) == id
            && length.is_multiple_of(PAGE)
            && (PAGE..=self.0.len()).contains(&length)
            && tail.is_multiple_of(PAGE)
            && tail < self.0.len()
            && raw.sequence.get() != 0
            && descriptor_bytes(count) <= length;
        if !sound || *budget < length {
            return None;
        }
        *budget -= length;
        let bytes = self.copy(start, length);
        let sequence = raw.sequence.get();
        let complete = checksum(&bytes) == raw.checksum.get() && patches(&bytes, sequence, count, |_| ()).is_some();
        complete.then_some(Found {
            start,
            length,
            tail,
            sequence,
            count,
            flushed_length: raw.flushed_length.get(),
            last_length: raw.last_length.get(),
        })
    }
}

/// Bytes of an entry's header and descriptors, padded to sectors.
fn descriptor_bytes(count: usize) -> usize {
    (size_of::<RawLogEntry>() + count * size_of::<RawDescriptor>()).next_multiple_of(PAGE)
}

/// Hands an entry's changes to `each`, in order; `None` at the first thing that is wrong with them.
fn patches(entry: &[u8], sequence: u64, count: usize, mut each: impl FnMut(Patch)) -> Option<()> {
    let mut data_at = descriptor_bytes(count);
    for index in 0..count {
        let descriptor: RawDescriptor = parse(entry, size_of::<RawLogEntry>() + index * size_of::<RawDescriptor>())?;
        let offset = descriptor.offset.get();
        if descriptor.sequence.get() != sequence || !offset.is_multiple_of(PAGE as u64) || offset >= MAX_FILE {
            return None;
        }
        match descriptor.signature {
            DESCRIPTOR_ZERO => {
                let length = u64::from_le_bytes(descriptor.leading);
                if !length.is_multiple_of(PAGE as u64) || length > MAX_FILE {
                    return None;
                }
                each(Patch::Zero(offset, length));
            }
            DESCRIPTOR_DATA => {
                let sector: RawDataSector = parse(entry.get(..data_at + PAGE)?, data_at)?;
                let stamp = u64::from(sector.sequence_high.get()) << 32 | u64::from(sector.sequence_low.get());
                if sector.signature != DATA_SIGNATURE || stamp != sequence {
                    return None;
                }
                let mut page = Box::new([0; PAGE]);
                page[..8].copy_from_slice(&descriptor.leading);
                page[8..PAGE - 4].copy_from_slice(&sector.data);
                page[PAGE - 4..].copy_from_slice(&descriptor.trailing);
                each(Patch::Page(offset, page));
                data_at += PAGE;
            }
            _ => return None,
        }
    }
    Some(())
}

/// Finds the active run of a log and says what it does to the file; `None` if the log holds no valid run, which in a log that the
/// header calls in use is damage.
pub(crate) fn replay(log: &[u8], id: Uuid) -> Option<Replay> {
    let ring = Ring(log);
    // Honest entries do not overlap, so their checksums cost the log's length once, and stale ones a little more.
    let mut budget = log.len() * 8;
    let sectors = log.len() / PAGE;
    let found: Vec<Option<Found>> = (0..sectors).map(|sector| ring.entry(sector * PAGE, id, &mut budget)).collect();
    let at = |offset: usize| found[offset % log.len() / PAGE];
    let next = |entry: &Found| {
        at(entry.start + entry.length).filter(|next| Some(next.sequence) == entry.sequence.checked_add(1))
    };
    let mut heads: Vec<Found> = found.iter().flatten().filter(|entry| next(entry).is_none()).copied().collect();
    heads.sort_by_key(|head| std::cmp::Reverse(head.sequence));
    let run = heads.iter().find_map(|head| {
        let mut run = vec![at(head.tail)?];
        let mut length = run[0].length;
        while run.last()?.start != head.start {
            run.push(next(run.last()?)?);
            length += run.last()?.length;
        }
        (length <= log.len()).then_some(run)
    })?;
    let head = run.last()?;
    if head.flushed_length > MAX_FILE || head.last_length > MAX_FILE {
        return None;
    }
    let mut all = Vec::new();
    for entry in &run {
        patches(&ring.copy(entry.start, entry.length), entry.sequence, entry.count, |patch| all.push(patch))?;
    }
    Some(Replay { patches: all, flushed_length: head.flushed_length, last_length: head.last_length })
}

/// What an entry's header says besides what follows from its pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EntryHeader {
    /// The log's id, as the file's header has it.
    pub(crate) id: Uuid,
    /// This entry's number.
    pub(crate) sequence: u64,
    /// Where in the log the oldest entry lies that must be replayed with this one.
    pub(crate) tail: u64,
    /// The file's length that is known to be durable.
    pub(crate) flushed_length: u64,
    /// The file's length that this entry needs.
    pub(crate) last_length: u64,
}

/// How long an entry of so many pages is, in bytes.
pub(crate) fn entry_bytes(pages: usize) -> usize {
    descriptor_bytes(pages) + pages * PAGE
}

/// The bytes of an entry that carries these pages, at most [`ENTRY_PAGES`], to their file offsets.
pub(crate) fn encode(header: &EntryHeader, pages: &[(u64, PageBytes)]) -> Vec<u8> {
    debug_assert!(pages.len() <= ENTRY_PAGES);
    let mut entry = vec![0; entry_bytes(pages.len())];
    let mut raw = RawLogEntry::new_zeroed();
    raw.signature = LOG_SIGNATURE;
    raw.length = (entry.len() as u32).into();
    raw.tail = (header.tail as u32).into();
    raw.sequence = header.sequence.into();
    raw.count = (pages.len() as u32).into();
    raw.log = header.id.into();
    raw.flushed_length = header.flushed_length.into();
    raw.last_length = header.last_length.into();
    put(&mut entry, 0, &raw);
    for (index, (offset, page)) in pages.iter().enumerate() {
        let mut descriptor = RawDescriptor::new_zeroed();
        descriptor.signature = DESCRIPTOR_DATA;
        descriptor.leading.copy_from_slice(&page[..8]);
        descriptor.trailing.copy_from_slice(&page[PAGE - 4..]);
        descriptor.offset = (*offset).into();
        descriptor.sequence = header.sequence.into();
        put(&mut entry, size_of::<RawLogEntry>() + index * size_of::<RawDescriptor>(), &descriptor);
        let at = descriptor_bytes(pages.len()) + index * PAGE;
        put(&mut entry, at, &DATA_SIGNATURE);
        put(&mut entry, at + 4, &((header.sequence >> 32) as u32).to_le_bytes());
        entry[at + 8..at + PAGE - 4].copy_from_slice(&page[8..PAGE - 4]);
        put(&mut entry, at + PAGE - 4, &(header.sequence as u32).to_le_bytes());
    }
    seal(&mut entry);
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Uuid = Uuid::from_u128(7);

    fn page(fill: u8) -> PageBytes {
        Box::new([fill; PAGE])
    }

    fn entry(sequence: u64, tail: u64, pages: &[(u64, PageBytes)]) -> Vec<u8> {
        let header = EntryHeader { id: ID, sequence, tail, flushed_length: 10 << 20, last_length: 12 << 20 };
        encode(&header, pages)
    }

    fn place(log: &mut [u8], at: usize, entry: &[u8]) {
        for (index, byte) in entry.iter().enumerate() {
            log[(at + index) % log.len()] = *byte;
        }
    }

    fn offsets(replay: &Replay) -> Vec<u64> {
        replay
            .patches
            .iter()
            .map(|patch| match patch {
                Patch::Page(at, _) | Patch::Zero(at, _) => *at,
            })
            .collect()
    }

    #[test]
    fn a_run_is_replayed_from_its_tail_in_order_and_over_the_end_of_the_ring() {
        let mut log = vec![0; 1 << 20];
        let start = (1 << 20) - PAGE;
        place(&mut log, start, &entry(41, start as u64, &[(4 << 20, page(1))]));
        place(&mut log, PAGE, &entry(42, start as u64, &[(5 << 20, page(2)), (4 << 20, page(3))]));
        let replay = replay(&log, ID).expect("a valid run");
        assert_eq!(offsets(&replay), [4 << 20, 5 << 20, 4 << 20]);
        let Patch::Page(_, last) = &replay.patches[2] else { panic!("a page") };
        assert_eq!(last[..], [3; PAGE][..]);
        assert_eq!((replay.flushed_length, replay.last_length), (10 << 20, 12 << 20));
    }

    #[test]
    fn only_sound_entries_of_this_log_count() {
        let mut log = vec![0; 1 << 20];
        place(&mut log, 0, &entry(7, 0, &[(4 << 20, page(1))]));
        place(&mut log, 2 * PAGE, &entry(8, 2 * PAGE as u64, &[(5 << 20, page(2))]));
        assert_eq!(offsets(&replay(&log, ID).expect("valid")), [5 << 20]);
        assert!(replay(&log, Uuid::from_u128(8)).is_none());
        // A torn head gives way to the entry before it.
        log[3 * PAGE + 100] ^= 1;
        assert_eq!(offsets(&replay(&log, ID).expect("valid")), [4 << 20]);
        // A head whose tail is no entry of the run is none.
        place(&mut log, 2 * PAGE, &entry(8, 9 * PAGE as u64, &[(5 << 20, page(2))]));
        assert!(replay(&log, ID).is_none_or(|replay| offsets(&replay) == [4 << 20]));
    }

    #[test]
    fn an_entry_without_descriptors_is_a_valid_one() {
        let mut log = vec![0; 1 << 20];
        place(&mut log, 0, &entry(80_000_000_000_000_000, 0, &[]));
        assert!(replay(&log, ID).expect("valid").patches.is_empty());
    }

    #[test]
    fn three_of_the_fullest_entries_fit_into_a_log() {
        let pages: Vec<_> = (0..ENTRY_PAGES as u64).map(|at| (at << 20, page(9))).collect();
        assert!(3 * entry(1, 0, &pages).len() <= 1 << 20);
    }
}
