//! What a repair changes, worked out and not yet done; and a file as it will be when it is done.

use crate::Result;
use std::collections::BTreeMap;
use std::sync::Arc;
use store::{Error, ErrorKind, Lock, Store};

/// How much is copied at once, in bytes.
const STEP: u64 = 1 << 20;

/// New bytes for a file.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Offset to bytes; they do not overlap.
    writes: BTreeMap<u64, Vec<u8>>,
    /// The same, written when all else is durable: what makes the rest count (headers, footers).
    last: BTreeMap<u64, Vec<u8>>,
    /// To-offset to from-offset and length: stretches that are copied to where the file had no bytes before.
    copies: BTreeMap<u64, (u64, u64)>,
    /// The file is to be so long at least.
    length: u64,
}

impl Plan {
    /// Writes `bytes` at `at`, instead of what was to be written at this offset before. Must not overlap other writes.
    pub(crate) fn write(&mut self, at: u64, bytes: Vec<u8>) {
        self.writes.insert(at, bytes);
    }

    /// As [`Plan::write`], when all else is durable. The image must change with every later use so that these bytes are not those
    /// any more: by that an undo file that has become too old is told.
    pub(crate) fn write_last(&mut self, at: u64, bytes: Vec<u8>) {
        self.last.insert(at, bytes);
    }

    /// Copies `len` bytes from `from` to `to`, which must lie past the file's end.
    pub(crate) fn copy(&mut self, from: u64, to: u64, len: u64) {
        self.copies.insert(to, (from, len));
        self.grow(to + len);
    }

    /// Makes the file so long at least; what is added reads as zeros.
    pub(crate) fn grow(&mut self, length: u64) {
        self.length = self.length.max(length);
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.last.is_empty() && self.copies.is_empty() && self.length == 0
    }

    /// All writes, neighbours joined: offset and bytes.
    pub(crate) fn writes(&self) -> impl Iterator<Item = (u64, Vec<u8>)> {
        joined(&self.writes).chain(joined(&self.last))
    }

    /// The length of a file of `length` bytes afterwards.
    pub(crate) fn length_after(&self, length: u64) -> u64 {
        let end = |writes: &BTreeMap<u64, Vec<u8>>| writes.iter().next_back().map_or(0, |(at, b)| at + b.len() as u64);
        length.max(self.length).max(end(&self.writes)).max(end(&self.last))
    }

    /// Does it, durably.
    pub(crate) fn carry_out(&self, store: &dyn Store) -> Result<()> {
        let length = store.len()?;
        if self.length_after(length) > length {
            store.set_len(self.length_after(length))?;
        }
        for (to, (from, len)) in &self.copies {
            copy(store, *from, *to, *len)?;
        }
        if !self.copies.is_empty() {
            store.sync()?;
        }
        for writes in [&self.writes, &self.last] {
            for (at, bytes) in joined(writes) {
                store.write_at(&bytes, at)?;
            }
            store.sync()?;
        }
        Ok(())
    }
}

/// The writes in order, those that follow on one another joined up to [`STEP`] bytes.
fn joined(writes: &BTreeMap<u64, Vec<u8>>) -> impl Iterator<Item = (u64, Vec<u8>)> {
    let mut rest = writes.iter().peekable();
    std::iter::from_fn(move || {
        let (at, bytes) = rest.next()?;
        let mut all = bytes.clone();
        let follows =
            |all: &Vec<u8>, next: u64, more: usize| next == at + all.len() as u64 && all.len() + more <= STEP as usize;
        while let Some((_, more)) = rest.next_if(|(next, more)| follows(&all, **next, more.len())) {
            all.extend_from_slice(more);
        }
        Some((*at, all))
    })
}

fn copy(store: &dyn Store, from: u64, to: u64, len: u64) -> Result<()> {
    let mut buffer = vec![0; STEP.min(len) as usize];
    for done in (0..len).step_by(STEP as usize) {
        let bytes = &mut buffer[..STEP.min(len - done) as usize];
        read_padded(store, bytes, from + done)?;
        store.write_at(bytes, to + done)?;
    }
    Ok(())
}

/// Fills `bytes` from `at`; what lies past the file's end is zeros.
pub(crate) fn read_padded(store: &dyn Store, bytes: &mut [u8], at: u64) -> store::Result<()> {
    let inside = store.len()?.saturating_sub(at).min(bytes.len() as u64) as usize;
    bytes[inside..].fill(0);
    if inside == 0 { Ok(()) } else { store.read_at(&mut bytes[..inside], at) }
}

/// A file as it will be when a plan is carried out, for reading.
#[derive(Debug)]
pub(crate) struct Planned {
    inner: Arc<dyn Store>,
    plan: Arc<Plan>,
    length: u64,
}

impl Planned {
    pub(crate) fn new(inner: Arc<dyn Store>, plan: Arc<Plan>) -> Result<Self> {
        let length = plan.length_after(inner.len()?);
        Ok(Self { inner, plan, length })
    }

    fn error(&self, kind: ErrorKind, operation: &'static str) -> Error {
        Error::new(kind, operation, self.name(), "the file is looked at as a repair will make it")
    }
}

/// The stretch that `[at, at + len)` and `[offset, end)` share, as offsets of the file.
fn common(at: u64, len: u64, offset: u64, end: u64) -> Option<(u64, u64)> {
    let (from, to) = (at.max(offset), (at + len).min(end));
    (from < to).then_some((from, to))
}

impl Store for Planned {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn len(&self) -> store::Result<u64> {
        Ok(self.length)
    }

    fn set_len(&self, _len: u64) -> store::Result<()> {
        Err(self.error(ErrorKind::Denied, "resize"))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> store::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.length);
        let end = end.ok_or_else(|| self.error(ErrorKind::PastEnd, "read"))?;
        read_padded(&*self.inner, buf, offset)?;
        let first = self.plan.copies.range(..=offset).next_back().map_or(offset, |(at, _)| *at);
        for (&to, &(source, len)) in self.plan.copies.range(first..end) {
            if let Some((start, stop)) = common(to, len, offset, end) {
                let bytes = &mut buf[(start - offset) as usize..(stop - offset) as usize];
                read_padded(&*self.inner, bytes, source + (start - to))?;
            }
        }
        for writes in [&self.plan.writes, &self.plan.last] {
            let first = writes.range(..=offset).next_back().map_or(offset, |(at, _)| *at);
            for (&at, bytes) in writes.range(first..end) {
                if let Some((start, stop)) = common(at, bytes.len() as u64, offset, end) {
                    buf[(start - offset) as usize..(stop - offset) as usize]
                        .copy_from_slice(&bytes[(start - at) as usize..(stop - at) as usize]);
                }
            }
        }
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> store::Result<()> {
        Err(self.error(ErrorKind::Denied, "write"))
    }

    fn punch(&self, _offset: u64, _len: u64) -> store::Result<()> {
        Err(self.error(ErrorKind::Denied, "punch"))
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
