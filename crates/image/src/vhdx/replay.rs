//! A file whose log is in use, as it will be once the log is replayed.

use super::format::{HEADER_SECTION, PAGE_BYTES};
use super::header::{Header, read};
use super::log::{self, MAX_LOG, Patch, Replay};
use super::page::PageBytes;
use crate::{Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::sync::Arc;
use store::{Lock, Store};

/// Reads the log and says what it does to the file, or why it cannot be trusted.
pub(crate) fn pending(store: &dyn Store, header: &Header) -> Result<Option<Replay>> {
    if header.log.is_nil() {
        return Ok(None);
    }
    let error = |kind, message: String| Error::new(kind, store.name(), message);
    if header.log_length > MAX_LOG {
        return Err(error(ErrorKind::Unsupported, format!("its log of {} bytes is too long", header.log_length)));
    }
    let bytes = read(store, header.log_offset, header.log_length as usize)?;
    let replay = log::replay(&bytes, header.log)
        .ok_or_else(|| error(ErrorKind::Damaged, "its log is in use and holds nothing valid".to_owned()))?;
    let length = store.len()?;
    if length < replay.flushed_length {
        let message = format!("it was cut: {length} bytes are left of at least {}", replay.flushed_length);
        return Err(error(ErrorKind::Damaged, message));
    }
    check_places(store, header, &replay, length.max(replay.last_length))?;
    Ok(Some(replay))
}

/// Checks that a log changes only what may be changed in a file that ends at `end`.
pub(crate) fn check_places(store: &dyn Store, header: &Header, replay: &Replay, end: u64) -> Result<()> {
    let log_end = header.log_offset + header.log_length;
    for patch in &replay.patches {
        let (at, len) = patch.place();
        if at < HEADER_SECTION || at + len > end || (at < log_end && at + len > header.log_offset) {
            let message = format!("its log changes {len} bytes at {at}, where nothing may be changed");
            return Err(Error::new(ErrorKind::Damaged, store.name(), message));
        }
    }
    Ok(())
}

/// Carries the log out in the file. The header still says that the log is in use: doing it twice does no harm.
pub(crate) fn carry_out(store: &dyn Store, replay: &Replay) -> Result<()> {
    if store.len()? < replay.last_length {
        store.set_len(replay.last_length)?;
    }
    for patch in &replay.patches {
        match patch {
            Patch::Page(at, page) => store.write_at(&page[..], *at)?,
            Patch::Zero(at, len) => store.punch(*at, *len)?,
        }
    }
    Ok(())
}

/// A file seen through its log, for reading: nothing is written.
#[derive(Debug)]
pub(crate) struct Replayed {
    inner: Arc<dyn Store>,
    length: u64,
    /// Disjoint stretches that the log changes: offset to length and bytes (`None`: zeros).
    changes: BTreeMap<u64, (u64, Option<PageBytes>)>,
}

impl Replayed {
    /// `inner` as `replay` makes it.
    pub(crate) fn new(inner: Arc<dyn Store>, replay: Replay) -> Result<Self> {
        let length = inner.len()?.max(replay.last_length);
        let mut view = Self { inner, length, changes: BTreeMap::new() };
        for patch in replay.patches {
            match patch {
                Patch::Page(at, page) => view.change(at, PAGE_BYTES, Some(page)),
                Patch::Zero(at, len) => view.change(at, len, None),
            }
        }
        Ok(view)
    }

    /// Lays a later change over the earlier ones. All begin and end at pages, so that a page is covered whole or not at all.
    fn change(&mut self, at: u64, len: u64, bytes: Option<PageBytes>) {
        if len == 0 {
            return;
        }
        let end = at + len;
        if let Some((&start, &(before, _))) = self.changes.range(..at).next_back()
            && start + before > at
        {
            // Only a stretch of zeros is longer than a page.
            self.changes.insert(start, (at - start, None));
            if start + before > end {
                self.changes.insert(end, (start + before - end, None));
            }
        }
        while let Some((&start, &(covered, _))) = self.changes.range(at..end).next() {
            self.changes.remove(&start);
            if start + covered > end {
                self.changes.insert(end, (start + covered - end, None));
            }
        }
        self.changes.insert(at, (len, bytes));
    }

    fn denied(&self, operation: &'static str) -> store::Error {
        store::Error {
            kind: store::ErrorKind::Denied,
            operation,
            name: self.name(),
            detail: "the file is open for reading only".to_owned(),
        }
    }
}

impl Store for Replayed {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn len(&self) -> store::Result<u64> {
        Ok(self.length)
    }

    fn set_len(&self, _len: u64) -> store::Result<()> {
        Err(self.denied("resize"))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> store::Result<()> {
        let end =
            offset.checked_add(buf.len() as u64).filter(|end| *end <= self.length).ok_or_else(|| store::Error {
                kind: store::ErrorKind::PastEnd,
                operation: "read",
                name: self.name(),
                detail: format!("{} bytes at {offset} reach past the end", buf.len()),
            })?;
        let real = self.inner.len()?.clamp(offset, end) - offset;
        let (here, past) = buf.split_at_mut(real as usize);
        if !here.is_empty() {
            self.inner.read_at(here, offset)?;
        }
        past.fill(0);
        let first = self.changes.range(..=offset).next_back().map_or(offset, |(&start, _)| start);
        for (&start, (len, bytes)) in self.changes.range(first..end) {
            let (from, to) = (start.max(offset), (start + len).min(end));
            if from >= to {
                continue;
            }
            let target = &mut buf[(from - offset) as usize..(to - offset) as usize];
            match bytes {
                Some(bytes) => target.copy_from_slice(&bytes[(from - start) as usize..(to - start) as usize]),
                None => target.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> store::Result<()> {
        Err(self.denied("write"))
    }

    fn punch(&self, _offset: u64, _len: u64) -> store::Result<()> {
        Err(self.denied("punch"))
    }

    fn sync(&self) -> store::Result<()> {
        Ok(())
    }

    fn lock(&self, lock: Lock) -> store::Result<()> {
        self.inner.lock(lock)
    }

    fn allocated(&self) -> store::Result<u64> {
        self.inner.allocated()
    }
}
