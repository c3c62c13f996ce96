//! Making what was committed durable, and changing the ids.

use super::footer::Footer;
use super::format::{HEADER_BYTES, SECTOR};
use super::parent::{Fault, Header};
use super::{BitmapSector, Dirty, Inner, Meta, lock};
use crate::layer::{Kind, ParentLink};
use crate::{ErrorKind, MAX_NOTE, Result};
use std::ops::Range;
use std::sync::atomic::Ordering;
use uuid::Uuid;

/// What the writer of ids keeps while the image is open.
#[derive(Debug)]
pub(crate) struct Session {
    /// The header; a fixed file has none.
    pub(crate) header: Option<Header>,
    /// The file has an id from this session, or one that it was told to keep.
    pub(crate) identified: bool,
}

/// How much of a header is written anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Put {
    /// With its locators' data.
    Whole,
    /// Alone: the locators' data stays where it is.
    Alone,
}

/// What one flush makes durable: file offsets and bytes.
struct Capture {
    /// Bitmaps of blocks that the table in the file does not name yet.
    placed: Vec<(u64, Vec<u8>)>,
    /// Sectors of bitmaps and of the table: what exposes data. Each is sound without the others.
    exposing: Vec<(u64, Vec<u8>)>,
    /// The same, by what they are.
    dirty: Dirty,
    /// Stretches that no entry of the table names any more.
    freed: Vec<Range<u64>>,
}

impl Inner {
    /// Gives the file a new id before its first change in this session, so that nobody takes it for the parent that it was; and
    /// mends a footer that was lost.
    pub(crate) fn start(&self) -> Result<()> {
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut session = lock(&self.session);
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        self.check_sound()?;
        let mut meta = lock(&self.meta);
        let id = if session.identified { meta.footer.id() } else { Uuid::new_v4() };
        if !(session.identified && meta.head_sound && meta.tail_sound) {
            if self.shape.kind == Kind::Fixed && !meta.tail_sound {
                // Zeros behind the footer: it was cut off while it grew.
                self.poison_on_error(self.store.set_len(meta.space.footer_at() + SECTOR).map_err(Into::into))?;
            }
            let footer = meta.footer.with(id, meta.footer.header_at());
            self.poison_on_fault(self.put_footers(&mut meta, &footer))?;
        }
        session.identified = true;
        lock(&self.ids).data_id = id;
        self.started.store(true, Ordering::Release);
        Ok(())
    }

    /// See [`crate::Layer::wrote`]. What was written in place without a ticket is a change too: the id changes before it is
    /// acknowledged.
    pub(crate) fn wrote(&self) {
        if self.writable && !self.started.load(Ordering::Acquire) {
            // The next flush tries again, and reports it.
            let _ = self.start();
        }
        self.wrote.store(true, Ordering::Release);
    }

    /// Replaces the footer, durably: both copies, one after the other, so that a whole one is there at every moment. A copy that is
    /// not sound goes first. Else the one at the end does: it counts.
    pub(super) fn put_footers(&self, meta: &mut Meta, footer: &Footer) -> Result<()> {
        let (head, tail) = (0, meta.space.footer_at());
        let both = if meta.tail_sound && !meta.head_sound { [head, tail] } else { [tail, head] };
        for at in both.into_iter().filter(|at| *at == tail || self.shape.kind != Kind::Fixed) {
            self.store.write_at(footer.bytes(), at)?;
            self.store.sync()?;
        }
        (meta.footer, meta.head_sound, meta.tail_sound) = (*footer, true, true);
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
        let _session = lock(&self.session);
        self.check_sound()?;
        // Taken before the sync: what is written from here on is the next flush's.
        let wrote = self.wrote.swap(false, Ordering::AcqRel);
        let capture = self.capture(&mut lock(&self.meta));
        if !wrote && capture.exposing.is_empty() {
            return Ok(());
        }
        let written = self.poison_on_fault(self.write_out(&capture));
        if wrote && written.is_err() {
            self.wrote.store(true, Ordering::Release);
        }
        self.written_out(written, capture, &mut lock(&self.meta))
    }

    /// Makes what was committed durable by somebody who uses the layer alone, and has taken the session's lock.
    pub(super) fn flush_alone(&self, meta: &mut Meta) -> Result<()> {
        let capture = self.capture(meta);
        let written = self.poison_on_fault(self.write_out(&capture));
        self.written_out(written, capture, meta)
    }

    /// What a capture gave up is free when it is durable. If there was no room for it, the next flush takes it over again.
    fn written_out(&self, written: Result<()>, capture: Capture, meta: &mut Meta) -> Result<()> {
        if written.is_ok() {
            self.release(capture.freed, meta);
        } else {
            meta.dirty.extend(capture.dirty);
            meta.freed.extend(capture.freed);
        }
        written
    }

    /// Gives what no entry in the file names any more back to the file system, and the places of whole blocks to others. Where that
    /// cannot be done they are lost until the image is opened again; nothing else depends on them.
    fn release(&self, freed: Vec<Range<u64>>, meta: &mut Meta) {
        let punched = freed.into_iter().filter(|place| self.store.punch(place.start, place.end - place.start).is_ok());
        let whole = self.shape.bitmap() + self.shape.block;
        meta.space.give(punched.filter(|place| place.end - place.start == whole).map(|place| place.start));
    }

    /// Takes over everything that was committed and is not durable. Only committed tickets have set bits and entries, so that their
    /// data is in the file already and the sync that follows covers it.
    fn capture(&self, meta: &mut Meta) -> Capture {
        // A block may have lost its place meanwhile.
        let dirty = std::mem::take(&mut meta.dirty);
        let placed = |block: &u64| Some((self.bat.get(*block)?, self.bitmaps.bytes(*block)));
        let bitmap = |at: &BitmapSector| Some((self.bat.get(at.block)? + at.sector * SECTOR, self.bitmaps.sector(*at)));
        let table = |sector: &u64| (self.table_at + sector * SECTOR, self.bat.sector(*sector));
        let exposing = joined(dirty.bitmaps.iter().filter_map(bitmap).chain(dirty.bat.iter().map(table)));
        let placed = dirty.placed.iter().filter_map(placed).collect();
        Capture { placed, exposing, dirty, freed: std::mem::take(&mut meta.freed) }
    }

    fn write_out(&self, capture: &Capture) -> Result<()> {
        for (at, bytes) in &capture.placed {
            self.store.write_at(bytes, *at)?;
        }
        // The data, new blocks' bitmaps, and the footer behind them.
        self.store.sync()?;
        if capture.exposing.is_empty() {
            return Ok(());
        }
        for (at, bytes) in &capture.exposing {
            self.store.write_at(bytes, *at)?;
        }
        Ok(self.store.sync()?)
    }

    /// See [`crate::Layer::relink`]. A new header is written beside the old one; the footer that names it is the step from which all of
    /// it holds, own id and link to the parent.
    pub(crate) fn relink(&self, data_id: Option<Uuid>, parent: Option<&ParentLink>) -> Result<()> {
        self.check_writable()?;
        let mut session = lock(&self.session);
        let mut meta = lock(&self.meta);
        let id = data_id.unwrap_or(meta.footer.id());
        let footer = meta.footer.with(id, meta.footer.header_at());
        if let Some(link) = parent {
            let header = session.header.clone().filter(|_| self.shape.differencing());
            let mut header = header
                .ok_or_else(|| self.error(ErrorKind::Invalid, "only a differencing image has a parent to name"))?;
            header.relink(link).map_err(|(kind, message): Fault| self.error(kind, message))?;
            self.put_header(&mut session, &mut meta, header, Put::Whole, &footer)?;
        } else if footer != meta.footer {
            self.poison_on_error(self.put_footers(&mut meta, &footer))?;
        }
        session.identified |= data_id.is_some();
        let mut ids = lock(&self.ids);
        ids.data_id = id;
        if parent.is_some() {
            ids.link = session.header.as_ref().map(Header::link);
        }
        Ok(())
    }

    /// See [`crate::Layer::note`].
    pub(crate) fn note(&self) -> Result<Option<Vec<u8>>> {
        let session = lock(&self.session);
        let note = session.header.as_ref().and_then(Header::note);
        match note {
            Some(note) if note.len() > MAX_NOTE => {
                Err(self.error(ErrorKind::Damaged, format!("the image's note of {} bytes is too long", note.len())))
            }
            note => Ok(note.map(<[u8]>::to_vec)),
        }
    }

    /// See [`crate::Layer::set_note`].
    pub(crate) fn set_note(&self, note: &[u8]) -> Result<()> {
        self.check_writable()?;
        let mut session = lock(&self.session);
        let mut meta = lock(&self.meta);
        let no_place = || self.error(ErrorKind::Unsupported, "a fixed VHD has no place for a note");
        let mut header = session.header.clone().ok_or_else(no_place)?;
        if header.note().unwrap_or_default() == note {
            return Ok(());
        }
        header.set_note(note).map_err(|(kind, message): Fault| self.error(kind, message))?;
        let footer = meta.footer;
        self.put_header(&mut session, &mut meta, header, Put::Whole, &footer)
    }

    /// Replaces header and footer as one: a new header is written beside the old one, and the footer names it.
    pub(super) fn put_header(
        &self,
        session: &mut Session,
        meta: &mut Meta,
        mut header: Header,
        put: Put,
        footer: &Footer,
    ) -> Result<()> {
        let length = if put == Put::Whole { header.length() } else { HEADER_BYTES };
        let now = meta.footer;
        let at = self.poison_on_fault(meta.space.header(&*self.store, &now, length))?;
        let bytes = if put == Put::Whole { header.encode(at) } else { header.encode_alone(at) };
        let written = self.store.write_at(&bytes, at).and_then(|()| self.store.sync());
        self.poison_on_fault(written.map_err(Into::into))?;
        self.poison_on_error(self.put_footers(meta, &footer.with(footer.id(), at)))?;
        let kept = header.places().to_vec();
        let old = session.header.replace(header);
        // Others may keep something beside their headers, of which we do not know.
        if let Some(old) = old.filter(|_| meta.footer.is_ours()) {
            let over_kept = |place: &Range<u64>| kept.iter().any(|k| k.start < place.end && place.start < k.end);
            let given = old.places().iter().filter(|place| !over_kept(place) && self.is_free(meta, place));
            let given: Vec<_> = given.cloned().collect();
            meta.space.give_header(&given);
        }
        Ok(())
    }

    /// See [`crate::Layer::close`].
    pub(crate) fn close(&self) -> Result<()> {
        if !self.writable || self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.flush()?;
        let session = lock(&self.session);
        let mut meta = lock(&self.meta);
        if !self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        let footer = meta.footer;
        let end = match self.shape.kind {
            // Others may keep something in their files, of which we do not know.
            Kind::Fixed if !footer.is_ours() => return Ok(()),
            _ if !footer.is_ours() => meta.space.end(),
            Kind::Fixed => self.geometry().size,
            Kind::Dynamic | Kind::Differencing => self.end(&session),
        };
        self.poison_on_error(meta.space.trim(&*self.store, &footer, end))
    }
}

/// A write is no longer than this, in bytes.
const LONGEST: usize = 1 << 20;

/// Writes of neighbouring sectors as one.
fn joined(writes: impl Iterator<Item = (u64, Vec<u8>)>) -> Vec<(u64, Vec<u8>)> {
    let mut out: Vec<(u64, Vec<u8>)> = Vec::new();
    for (at, bytes) in writes {
        match out.last_mut() {
            Some((start, last)) if *start + last.len() as u64 == at && last.len() < LONGEST => last.extend(bytes),
            _ => out.push((at, bytes)),
        }
    }
    out
}
