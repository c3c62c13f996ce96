//! The bytes of a simulated file: pages that copies of the file share.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, OnceLock};

/// Bytes in a page.
pub(super) const PAGE: u64 = 4096;

type Bytes = [u8; PAGE as usize];

const ZEROS: Bytes = [0; PAGE as usize];

/// Shared by copies of the disk, of which each is hashed: that is done once.
struct Page {
    bytes: Bytes,
    /// None for zeros.
    digest: OnceLock<Option<u64>>,
}

impl Page {
    fn zeros() -> Arc<Self> {
        Arc::new(Self { bytes: ZEROS, digest: OnceLock::new() })
    }

    /// Its bytes, to be changed.
    fn change(page: &mut Arc<Self>) -> &mut Bytes {
        let page = Arc::make_mut(page);
        page.digest.take();
        &mut page.bytes
    }

    fn digest(&self) -> Option<u64> {
        *self.digest.get_or_init(|| {
            let mut hasher = DefaultHasher::new();
            self.bytes.hash(&mut hasher);
            (self.bytes != ZEROS).then(|| hasher.finish())
        })
    }
}

impl Clone for Page {
    fn clone(&self) -> Self {
        Self { bytes: self.bytes, digest: OnceLock::new() }
    }
}

/// A file's bytes. A page that is not there reads as zeros. A clone shares all pages.
#[derive(Clone, Default)]
pub(super) struct Pages {
    len: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

impl Pages {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Pages that take space.
    pub(super) fn allocated(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Pages that a write of this range would add.
    pub(super) fn missing(&self, offset: u64, len: u64) -> u64 {
        let touched = offset / PAGE..(offset + len).div_ceil(PAGE);
        (touched.end - touched.start) - self.pages.range(touched).count() as u64
    }

    /// Changes the length only: pages beyond it stay, and a greater length shows them again. See [`Pages::truncate`].
    pub(super) fn set_len(&mut self, len: u64) {
        self.len = len;
    }

    /// Drops what lies beyond the length, so that growing shows zeros.
    pub(super) fn truncate(&mut self) {
        self.pages.split_off(&self.len.div_ceil(PAGE));
        let edge = self.len % PAGE;
        if edge != 0 {
            self.zero(self.len, PAGE - edge);
        }
    }

    /// Copies bytes out, zeros where there is no page; the length is not looked at.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) {
        for (index, at, part) in split(buf.len() as u64, offset) {
            let buf = &mut buf[part];
            match self.pages.get(&index) {
                Some(page) => buf.copy_from_slice(&page.bytes[at..at + buf.len()]),
                None => buf.fill(0),
            }
        }
    }

    /// The next pages in a row at `offset` or after it, inside the length: from and to.
    pub(super) fn data(&self, offset: u64) -> Option<(u64, u64)> {
        let mut pages = self.pages.range(offset / PAGE..).map(|(index, _)| *index);
        let first = pages.next()?;
        let last =
            pages.zip(first + 1..).take_while(|(index, next)| index == next).last().map_or(first, |(last, _)| last);
        let (start, end) = (offset.max(first * PAGE), self.len.min((last + 1) * PAGE));
        (start < end).then_some((start, end))
    }

    /// Copies bytes in; the length is left alone.
    pub(super) fn write(&mut self, buf: &[u8], offset: u64) {
        for (index, at, part) in split(buf.len() as u64, offset) {
            let buf = &buf[part];
            let page = self.pages.entry(index).or_insert_with(Page::zeros);
            Page::change(page)[at..at + buf.len()].copy_from_slice(buf);
        }
    }

    /// Makes a range read as zeros, dropping whole pages.
    pub(super) fn zero(&mut self, offset: u64, len: u64) {
        for index in self.touched(offset, len) {
            let start = offset.max(index * PAGE) - index * PAGE;
            let end = (offset + len).min((index + 1) * PAGE) - index * PAGE;
            if (start, end) == (0, PAGE) {
                self.pages.remove(&index);
            } else if let Some(page) = self.pages.get_mut(&index) {
                Page::change(page)[start as usize..end as usize].fill(0);
            }
        }
    }

    /// The pages in a range that are there.
    pub(super) fn touched(&self, offset: u64, len: u64) -> Vec<u64> {
        self.pages.range(offset / PAGE..(offset + len).div_ceil(PAGE)).map(|(index, _)| *index).collect()
    }
}

/// Two files of the same bytes hash alike, however they came by them.
impl Hash for Pages {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.len.hash(state);
        for (index, page) in &self.pages {
            if let Some(digest) = page.digest() {
                (index, digest).hash(state);
            }
        }
    }
}

/// The pieces of a range by pages: page, offset in the page, part of the range.
fn split(len: u64, offset: u64) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let (index, at) = ((offset + done) / PAGE, (offset + done) % PAGE);
        let step = (PAGE - at).min(len - done);
        let part = done as usize..(done + step) as usize;
        done += step;
        Some((index, at as usize, part))
    })
}
