//! Making what was committed durable, and changing the ids.

use super::footer::Footer;
use super::format::SECTOR;
use super::parent::{Fault, Header};
use super::{Inner, Meta, lock};
use crate::layer::{Kind, ParentLink};
use crate::{ErrorKind, Result};
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

/// What one flush makes durable: file offsets and bytes.
struct Capture {
    /// Bitmaps of blocks that the table in the file does not name yet.
    placed: Vec<(u64, Vec<u8>)>,
    /// Sectors of bitmaps and of the table: what exposes data. Each is sound without the others.
    exposing: Vec<(u64, Vec<u8>)>,
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
        let mut meta = lock(&self.meta);
        let id = if session.identified { meta.footer.id() } else { Uuid::new_v4() };
        if !(session.identified && meta.head_sound && meta.tail_sound) {
            let footer = meta.footer.with(id, meta.footer.header_at());
            self.poison_on_error(self.put_footers(&mut meta, &footer))?;
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
            // A failure poisons the layer, so that the next flush reports it.
            let _ = self.start();
        }
        self.wrote.store(true, Ordering::Release);
    }

    /// Replaces the footer, durably: both copies, one after the other, so that a whole one is there at every moment. A copy that is
    /// not sound goes first. Else the one at the end does: it counts.
    fn put_footers(&self, meta: &mut Meta, footer: &Footer) -> Result<()> {
        let (head, tail) = (0, meta.space.footer_at());
        let both = if meta.tail_sound && !meta.head_sound { [head, tail] } else { [tail, head] };
        for at in both.into_iter().filter(|at| *at == tail || self.geometry.kind != Kind::Fixed) {
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
        let _session = lock(&self.session);
        self.check_sound()?;
        // Taken before the sync: what is written from here on is the next flush's.
        let wrote = self.wrote.swap(false, Ordering::AcqRel);
        let capture = self.capture();
        if !wrote && capture.exposing.is_empty() {
            return Ok(());
        }
        self.poison_on_error(self.write_out(&capture))
    }

    /// Takes over everything that was committed and is not durable. Only committed tickets have set bits and entries, so that their
    /// data is in the file already and the sync that follows covers it.
    fn capture(&self) -> Capture {
        let mut meta = lock(&self.meta);
        let placed = std::mem::take(&mut meta.placed).into_iter().map(|block| {
            let place = self.bat.get(block).expect("a block that was placed has a place");
            (place, self.bitmaps.bytes(block))
        });
        let placed = placed.collect();
        let bitmaps = std::mem::take(&mut meta.dirty_bitmaps).into_iter().map(|at| {
            let place = self.bat.get(at.block).expect("a bitmap that was changed has a place");
            (place + at.sector * SECTOR, self.bitmaps.sector(at))
        });
        let bat = std::mem::take(&mut meta.dirty_bat)
            .into_iter()
            .map(|sector| (self.table_at + sector * SECTOR, self.bat.sector(sector)));
        Capture { placed, exposing: bitmaps.chain(bat).collect() }
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
        let mut header = session.header.clone();
        if let Some(link) = parent {
            let header = header.as_mut().filter(|_| self.geometry.differencing());
            let header = header
                .ok_or_else(|| self.error(ErrorKind::Invalid, "only a differencing image has a parent to name"))?;
            header.relink(link).map_err(|(kind, message): Fault| self.error(kind, message))?;
        }
        let mut meta = lock(&self.meta);
        let id = data_id.unwrap_or(meta.footer.id());
        let mut header_at = meta.footer.header_at();
        if let (Some(header), Some(_)) = (&mut header, parent) {
            let footer = meta.footer;
            header_at = self.poison_on_fault(meta.space.header(&*self.store, &footer, header.length()))?;
            let written = self.store.write_at(&header.encode(header_at), header_at).and_then(|()| self.store.sync());
            self.poison_on_error(written.map_err(Into::into))?;
        }
        let footer = meta.footer.with(id, header_at);
        if footer != meta.footer || parent.is_some() {
            self.poison_on_error(self.put_footers(&mut meta, &footer))?;
        }
        if parent.is_some() {
            let old = std::mem::replace(&mut session.header, header);
            let old = old.as_ref().filter(|_| meta.footer.is_ours());
            meta.space.give_header(old.map_or(&[], Header::places));
        }
        session.identified |= data_id.is_some();
        let mut ids = lock(&self.ids);
        ids.data_id = id;
        if parent.is_some() {
            ids.link = session.header.as_ref().map(Header::link);
        }
        Ok(())
    }

    /// See [`crate::Layer::close`].
    pub(crate) fn close(&self) -> Result<()> {
        if !self.writable || self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.flush()?;
        let mut meta = lock(&self.meta);
        if self.started.load(Ordering::Acquire) && self.geometry.kind != Kind::Fixed {
            let footer = meta.footer;
            self.poison_on_error(meta.space.trim(&*self.store, &footer))?;
        }
        Ok(())
    }
}
