//! Making what was committed durable, and changing the ids.

use super::carry::{self, Edit};
use super::format::{PAGE, PAGE_BYTES};
use super::header::{check_reaches, read_data};
use super::journal::Journal;
use super::metadata::{self, Fault, Locator};
use super::open::{read_item, read_items};
use super::page::PageBytes;
use super::write::Freed;
use super::{Dirty, Inner, Meta, lock};
use crate::layer::ParentLink;
use crate::{ErrorKind, Result};
use std::sync::atomic::Ordering;
use uuid::Uuid;

/// What the writer of metadata keeps while the image is open.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) journal: Journal,
    /// The file has a new FileWriteGuid from this session.
    pub(crate) file_identified: bool,
    /// The file has a DataWriteGuid from this session, or one that it was told to keep.
    pub(crate) data_identified: bool,
}

/// What one flush makes durable.
struct Capture {
    /// Pages and their file offsets, in an order of which every prefix is sound.
    pages: Vec<(u64, PageBytes)>,
    /// The same pages, by what they are.
    dirty: Dirty,
    freed: Vec<Freed>,
    file_length: u64,
    /// Where the journal of changes that are not in it begins.
    carried: Option<carry::Mark>,
}

impl Inner {
    /// Gives the file its new ids before its first change in this session, as the format asks.
    pub(crate) fn start(&self) -> Result<()> {
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut session = lock(&self.session);
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        self.check_sound()?;
        let data_id = (!session.data_identified).then(Uuid::new_v4);
        self.poison_on_fault(self.identify(&mut session, data_id))?;
        self.begin_carry(session.journal.header().file_write)?;
        self.started.store(true, Ordering::Release);
        Ok(())
    }

    /// See [`crate::Layer::wrote`]. What was written in place without a ticket is a change too: the ids change before it is
    /// acknowledged.
    pub(crate) fn wrote(&self) {
        if self.writable && !self.started.load(Ordering::Acquire) {
            // The next flush tries again, and reports it.
            let _ = self.start();
        }
        self.wrote.store(true, Ordering::Release);
    }

    /// Begins the journal of changes that are to outlive the process. From here on the file's `FileWriteGuid` stays what it is.
    pub(crate) fn begin_carry(&self, session: Uuid) -> Result<()> {
        if let Some(carry) = &mut lock(&self.meta).carry {
            carry.begin(session)?;
        }
        Ok(())
    }

    fn identify(&self, session: &mut Session, data_id: Option<Uuid>) -> Result<()> {
        let new_file_id = (!session.file_identified).then(Uuid::new_v4);
        if new_file_id.is_none() && data_id.is_none() {
            return Ok(());
        }
        session.journal.set_header(&*self.store, |header| {
            header.file_write = new_file_id.unwrap_or(header.file_write);
            header.data_write = data_id.unwrap_or(header.data_write);
        })?;
        session.file_identified = true;
        if let Some(data_id) = data_id {
            session.data_identified = true;
            lock(&self.ids).data_id = data_id;
        }
        Ok(())
    }

    /// See [`crate::Layer::flush`].
    pub(crate) fn flush(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        if self.wrote.load(Ordering::Acquire) {
            self.start()?;
        }
        let mut session = lock(&self.session);
        self.check_sound()?;
        // Taken before the sync: what is written from here on is the next flush's.
        let wrote = self.wrote.swap(false, Ordering::AcqRel);
        let capture = self.capture();
        if !wrote && capture.pages.is_empty() {
            return Ok(());
        }
        let flushed = self.write_out(&mut session.journal, capture);
        if wrote && flushed.is_err() {
            self.wrote.store(true, Ordering::Release);
        }
        flushed
    }

    /// Makes durable what a session that died has left, the changes of `edits` included, which are in the table already. The ids stay
    /// as they are: it is that session's work.
    pub(crate) fn recover(&self, edits: &[Edit]) -> Result<()> {
        self.redo_bits(edits)?;
        let mut session = lock(&self.session);
        let capture = self.capture();
        self.write_out(&mut session.journal, capture)?;
        if let Some(carry) = &lock(&self.meta).carry {
            carry.end()?;
        }
        Ok(())
    }

    fn redo_bits(&self, edits: &[Edit]) -> Result<()> {
        for edit in edits {
            let Edit::Bits { block, sectors, set } = edit else { continue };
            if self.bitmap_place(block / self.geometry().ratio()).is_some() {
                self.load_bitmaps(*block, sectors)?;
                self.bitmaps.put(*block, sectors, *set, &mut lock(&self.meta).dirty.bitmaps);
            }
        }
        Ok(())
    }

    /// Takes over everything that was committed and is not durable. Only committed tickets have changed pages, so that their data
    /// is in the file already and the sync that follows covers it.
    fn capture(&self) -> Capture {
        let mut meta = lock(&self.meta);
        self.reclaim(&mut meta);
        let dirty = std::mem::take(&mut meta.dirty);
        Capture {
            pages: self.pages(&dirty, &meta),
            dirty,
            freed: std::mem::take(&mut meta.freed),
            file_length: meta.space.len(),
            carried: meta.carry.as_ref().map(carry::Writer::mark),
        }
    }

    /// The pages that were changed since they were last taken.
    pub(super) fn take_pages(&self, meta: &mut Meta) -> Vec<(u64, PageBytes)> {
        let dirty = std::mem::take(&mut meta.dirty);
        self.pages(&dirty, meta)
    }

    /// These pages and their file offsets, in an order of which every prefix is sound.
    fn pages(&self, dirty: &Dirty, meta: &Meta) -> Vec<(u64, PageBytes)> {
        // Bits first, then the entries that make them count; and backwards through the table, where a chunk's bitmap entry stands
        // behind its blocks' entries.
        let bitmaps = dirty.bitmaps.iter().map(|at| {
            let place = self.bitmap_page_place(*at).expect("a bitmap that was changed has a place");
            (place, self.bitmaps.bytes(*at))
        });
        let bat = dirty.bat.iter().rev().map(|page| {
            let (offset, bytes) = self.bat.page(*page);
            (meta.bat_region.offset + offset, bytes)
        });
        bitmaps.chain(bat).collect()
    }

    /// Makes a capture durable, and the places free that it gave up. If there is no room for it, the next flush takes it over again.
    fn write_out(&self, journal: &mut Journal, capture: Capture) -> Result<()> {
        if let Err(error) = self.poison_on_fault(self.write_metadata(journal, capture.file_length, &capture.pages)) {
            let mut meta = lock(&self.meta);
            meta.dirty.extend(capture.dirty);
            meta.freed.extend(capture.freed);
            return Err(error);
        }
        self.release(capture.freed);
        if let (Some(carry), Some(mark)) = (&mut lock(&self.meta).carry, capture.carried) {
            carry.forget(mark);
        }
        Ok(())
    }

    /// Gives the space of places that no entry in the file names any more back to the file system.
    pub(crate) fn release(&self, freed: Vec<Freed>) {
        // A place that cannot be punched is lost until the image is opened again; nothing else depends on it.
        let (block, end) = (self.geometry().block, self.store.len().unwrap_or(0));
        // The last block may be cut off by the file's end.
        let punch = |at: u64| self.store.punch(at, block.min(end.saturating_sub(at)));
        let punched: Vec<_> = freed.into_iter().filter(|freed| punch(freed.at).is_ok()).collect();
        lock(&self.meta).draining.extend(punched);
    }

    /// Makes places free that were given up before the last flush, and to which no ticket can write any more.
    fn reclaim(&self, meta: &mut Meta) {
        let (free, busy): (Vec<_>, Vec<_>) = std::mem::take(&mut meta.draining)
            .into_iter()
            .partition(|freed| self.users(freed.block).load(Ordering::SeqCst) == 0);
        meta.draining = busy;
        for freed in free {
            meta.space.give(freed.at, self.geometry().block);
        }
    }

    /// See [`crate::Layer::relink`].
    pub(crate) fn relink(&self, data_id: Option<Uuid>, parent: Option<ParentLink>) -> Result<()> {
        self.relink_with(data_id, parent, |_| ())
    }

    /// See [`crate::Layer::force_parent`].
    pub(crate) fn force_parent(&self, parent: ParentLink) -> Result<()> {
        self.relink_with(None, Some(parent), Locator::mark_forced)
    }

    /// Changes the ids; `before` is done to the old locator first.
    fn relink_with(
        &self,
        data_id: Option<Uuid>,
        parent: Option<ParentLink>,
        before: impl FnOnce(&mut Locator),
    ) -> Result<()> {
        self.check_writable()?;
        let mut session = lock(&self.session);
        if let Some(link) = parent {
            let mut locator = lock(&self.ids)
                .parent
                .clone()
                .ok_or_else(|| self.error(ErrorKind::Invalid, "only a differencing image has a parent to name"))?;
            before(&mut locator);
            locator.relink(&link);
            // What cannot be written is refused before anything has changed.
            let pages = self.metadata_pages(|region| metadata::replace_locator(region, &locator))?;
            // A disk that is full is no reason to distrust a leaf that somebody writes: the room is taken before anything depends on it.
            session.journal.take_room(&*self.store, &pages)?;
            self.poison_on_error(self.identify(&mut session, None))?;
            let file_length = lock(&self.meta).space.len();
            self.poison_on_error(self.write_metadata(&mut session.journal, file_length, &pages))?;
            let mut ids = lock(&self.ids);
            (ids.parent, ids.link) = (Some(locator), Some(link));
        }
        if data_id.is_some() {
            self.poison_on_error(self.identify(&mut session, data_id))?;
        }
        Ok(())
    }

    /// See [`crate::Layer::note`].
    pub(crate) fn note(&self) -> Result<Option<Vec<u8>>> {
        // A change of it is one of several pages.
        let _session = lock(&self.session);
        let (store, region) = (&*self.store, self.metadata_region);
        let items = read_items(store, region)?;
        let note = metadata::note(&items).map_err(|(kind, message)| self.error(kind, message))?;
        let note = note.map(|item| read_item(store, region, item)).transpose()?;
        Ok(note.filter(|note| !note.is_empty()))
    }

    /// See [`crate::Layer::set_note`].
    pub(crate) fn set_note(&self, note: &[u8]) -> Result<()> {
        self.check_writable()?;
        let mut session = lock(&self.session);
        let pages = self.metadata_pages(|region| metadata::replace_note(region, note))?;
        if pages.is_empty() {
            return Ok(());
        }
        session.journal.take_room(&*self.store, &pages)?;
        self.poison_on_error(self.identify(&mut session, None))?;
        let file_length = lock(&self.meta).space.len();
        self.poison_on_error(self.write_metadata(&mut session.journal, file_length, &pages))
    }

    pub(crate) fn write_metadata(
        &self,
        journal: &mut Journal,
        file_length: u64,
        pages: &[(u64, PageBytes)],
    ) -> Result<()> {
        // What the pages expose comes first; and the entry says how long the file is known to be.
        journal.sync(&*self.store)?;
        journal.write(&*self.store, file_length, pages)
    }

    /// The pages of the metadata region that a change of it changes: one log entry holds them all.
    pub(crate) fn metadata_pages(
        &self,
        change: impl FnOnce(&mut [u8]) -> std::result::Result<(), Fault>,
    ) -> Result<Vec<(u64, PageBytes)>> {
        let fault = |(kind, message): Fault| self.error(kind, message);
        let region = self.metadata_region;
        let old = self.metadata()?;
        let mut new = old.clone();
        change(&mut new).map_err(fault)?;
        let page = |index: u64| index as usize * PAGE..(index as usize + 1) * PAGE;
        let pages: Vec<(u64, PageBytes)> = (0..region.length / PAGE_BYTES)
            .filter(|index| old[page(*index)] != new[page(*index)])
            .map(|index| {
                let bytes = new[page(index)].try_into().expect("a page long");
                (region.offset + index * PAGE_BYTES, Box::new(bytes))
            })
            .collect();
        if pages.len() > super::log::ENTRY_PAGES {
            return Err(self.error(ErrorKind::Unsupported, "it is too long to change it in one step"));
        }
        Ok(pages)
    }

    /// The metadata region; most of it is a hole.
    fn metadata(&self) -> Result<Vec<u8>> {
        let (store, region) = (&*self.store, self.metadata_region);
        // Before it takes memory.
        check_reaches(store, region, "its metadata")?;
        let mut bytes = vec![0; region.length as usize];
        read_data(store, region, "its metadata", |at, pages| {
            bytes[at as usize..][..pages.len()].copy_from_slice(pages);
        })?;
        Ok(bytes)
    }

    /// See [`crate::Layer::close`].
    pub(crate) fn close(&self) -> Result<()> {
        if !self.writable || self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.flush()?;
        let mut session = lock(&self.session);
        self.poison_on_error(session.journal.finish(&*self.store))?;
        if let Some(carry) = &lock(&self.meta).carry {
            carry.end()?;
        }
        if session.file_identified {
            // Only now: a log that counts on the file's length must not be left behind a shorter file.
            let mut meta = lock(&self.meta);
            self.reclaim(&mut meta);
            meta.space.trim(&*self.store)?;
        }
        Ok(())
    }
}
