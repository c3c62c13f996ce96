//! What is written outside of data blocks, and in which order: the header's copies, the log, and the pages in their places.
//!
//! Invariants:
//! - A page is written in its place only after the log entry that carries it is durable.
//! - At any moment the log holds a valid run if the header says that it is in use, and replaying it yields the newest
//!   metadata: an entry overwrites neither the one before it, which is the head until it is durable, nor that one's tail.
//! - At any moment one copy of the header is durable and sound.
//! - What finds no room on the file system has changed nothing that counts: all of it can be written again, pages that had got their entry
//!   in a new entry. (A *sync* that finds no room is a fault like any other: what it covered may be lost.)

use super::format::PAGE;
use super::header::{Header, slot_offset};
use super::log::{self, ENTRY_PAGES, EntryHeader};
use super::page::PageBytes;
use crate::{Error, ErrorKind, Result};
use store::Store;
use uuid::Uuid;

/// The writer of headers and log entries. Used under the journal's lock.
#[derive(Debug)]
pub(crate) struct Journal {
    header: Header,
    /// Which copy of the header is the current one.
    slot: usize,
    /// A copy of the header was written and not synced since.
    header_unsynced: bool,
    /// Pages were written in their places and not synced since.
    pages_unsynced: bool,
    /// Where in the log the newest entry begins.
    newest: u64,
    /// Where in the log the next entry goes.
    next: u64,
    /// The next entry's number.
    sequence: u64,
}

impl Journal {
    /// A journal over a file whose log is empty.
    pub(crate) fn new(header: Header, slot: usize) -> Self {
        Self { header, slot, header_unsynced: false, pages_unsynced: false, newest: 0, next: 0, sequence: 1 }
    }

    /// The current header.
    pub(crate) fn header(&self) -> Header {
        self.header
    }

    /// Makes everything written to the file durable.
    pub(crate) fn sync(&mut self, store: &dyn Store) -> Result<()> {
        store.sync()?;
        self.header_unsynced = false;
        self.pages_unsynced = false;
        Ok(())
    }

    /// Changes the header, durably. The second copy follows without a sync: the first is enough to be sound.
    pub(crate) fn set_header(&mut self, store: &dyn Store, change: impl FnOnce(&mut Header)) -> Result<()> {
        self.sync_second(store)?;
        let mut header = self.header;
        change(&mut header);
        self.put_header(store, header)?;
        self.sync(store)?;
        self.header_unsynced = true;
        match self.put_header(store, self.header) {
            Err(error) if error.kind == ErrorKind::NoSpace => Ok(()),
            second => second,
        }
    }

    /// Makes the header's second copy durable.
    fn sync_second(&mut self, store: &dyn Store) -> Result<()> {
        if self.header_unsynced { self.sync(store) } else { Ok(()) }
    }

    fn put_header(&mut self, store: &dyn Store, mut header: Header) -> Result<()> {
        let Some(sequence) = header.sequence.checked_add(1) else {
            // Only a file made to do harm counts so far. The copy that is current stays.
            let message = "its headers are numbered to the end of all numbers";
            return Err(Error::new(ErrorKind::Unsupported, store.name(), message));
        };
        header.sequence = sequence;
        let slot = 1 - self.slot;
        store.write_at(&header.encode()[..], slot_offset(slot))?;
        (self.header, self.slot) = (header, slot);
        Ok(())
    }

    /// Makes these pages durable, and then writes them in their places. All that they expose must be durable already.
    ///
    /// Up to [`ENTRY_PAGES`] pages are one entry, all or nothing. More are several, in the order given: the caller orders them so
    /// that each prefix is sound.
    pub(crate) fn write(&mut self, store: &dyn Store, file_length: u64, pages: &[(u64, PageBytes)]) -> Result<()> {
        pages.chunks(ENTRY_PAGES).try_for_each(|pages| self.write_entry(store, file_length, pages))
    }

    fn write_entry(&mut self, store: &dyn Store, file_length: u64, pages: &[(u64, PageBytes)]) -> Result<()> {
        let starting = self.header.log.is_nil();
        let id = if starting { Uuid::new_v4() } else { self.header.log };
        let start = self.next;
        // The entry before is needed for as long as its pages in their places are not durable. They are by the sync below.
        let tail = if self.pages_unsynced && !starting { self.newest } else { start };
        let entry = log::encode(
            &EntryHeader { id, sequence: self.sequence, tail, flushed_length: file_length, last_length: file_length },
            pages,
        );
        self.put_in_ring(store, start, &entry)?;
        self.sync(store)?;
        if starting {
            self.set_header(store, |header| header.log = id)?;
        }
        self.newest = start;
        self.next = (start + entry.len() as u64) % self.header.log_length;
        self.sequence += 1;
        self.pages_unsynced = true;
        for (offset, page) in pages {
            store.write_at(&page[..], *offset)?;
        }
        Ok(())
    }

    /// Takes the room on the file system that an entry of these pages needs, and the pages in their places. Nothing has changed, whether
    /// there is room or not.
    pub(crate) fn take_room(&self, store: &dyn Store, pages: &[(u64, PageBytes)]) -> Result<()> {
        // Where the next entry will be, nothing counts.
        self.put_in_ring(store, self.next, &vec![0; log::entry_bytes(pages.len())])?;
        let zeros = [0; PAGE];
        for (offset, _) in pages {
            // What is not zeros has its place.
            let mut old = zeros;
            store.read_at(&mut old, *offset)?;
            if old == zeros {
                store.write_at(&zeros, *offset)?;
            }
        }
        Ok(())
    }

    fn put_in_ring(&self, store: &dyn Store, start: u64, entry: &[u8]) -> Result<()> {
        let first = entry.len().min((self.header.log_length - start) as usize);
        store.write_at(&entry[..first], self.header.log_offset + start)?;
        if first < entry.len() {
            store.write_at(&entry[first..], self.header.log_offset)?;
        }
        Ok(())
    }

    /// Leaves the log empty, durably. Everything that it held must be in its place (it is synced here).
    pub(crate) fn finish(&mut self, store: &dyn Store) -> Result<()> {
        if !self.header.log.is_nil() {
            self.sync(store)?;
            self.set_header(store, |header| header.log = Uuid::nil())?;
        }
        self.sync_second(store)?;
        (self.newest, self.next, self.sequence) = (0, 0, 1);
        Ok(())
    }
}
