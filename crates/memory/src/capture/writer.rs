//! Writes pages to the memory disk: only what differs from what lies beneath.

use super::Counts;
use super::batch::{Batch, DATA};
use crate::Result;
use crate::spans::{Span, spans};
use crate::stream::PAGE;
use image::Chain;
use image::hashes::Pages;
use std::sync::mpsc::{Receiver, Sender};

/// What is to be done with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Store,
    Zero,
    Same,
    Empty,
}

impl Fate {
    /// `None` stands for zeros.
    fn of(page: Option<&[u8]>, beneath: Option<&[u8]>) -> Self {
        match (page.filter(|page| !is_zero(page)), beneath) {
            (Some(page), Some(beneath)) if page == beneath => Self::Same,
            (Some(_), _) => Self::Store,
            // Invariant 11: zeros over data are zeros from now on.
            (None, Some(beneath)) if !is_zero(beneath) => Self::Zero,
            (None, _) => Self::Empty,
        }
    }
}

fn is_zero(page: &[u8]) -> bool {
    static ZEROS: [u8; PAGE] = [0; PAGE];
    page == ZEROS
}

/// The writing end of a capture.
pub(super) struct Writer<'a> {
    chain: &'a Chain,
    /// What is written.
    pages: Pages,
    counts: Counts,
    /// What lies beneath a run; used again and again.
    beneath: Vec<u8>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(chain: &'a Chain, pages: Pages) -> Self {
        Self { chain, pages, counts: Counts::default(), beneath: Vec::new() }
    }

    /// What became of the pages.
    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// What was recorded.
    pub(super) fn end(self) -> Pages {
        self.pages
    }

    /// Writes whole pages.
    pub(super) fn write(&mut self, pages: &[u8], at: u64) -> Result<()> {
        self.chain.write(pages, at)?;
        self.pages.set(at, pages);
        Ok(())
    }

    /// Writes what arrives until the other end is dropped.
    pub(super) fn run(mut self, full: &Receiver<Batch>, empty: &Sender<Batch>) -> Result<Self> {
        let mut below = Vec::new();
        for mut batch in full {
            batch.each_run(|at, len, data| self.run_of_pages(at, len, data, &mut below))?;
            batch.clear();
            // The other end may have stopped already; then nobody needs the batch.
            let _ = empty.send(batch);
        }
        Ok(self)
    }

    /// Makes `[at, at + len)` read as `data`, or as zeros.
    fn run_of_pages(&mut self, at: u64, len: u64, data: Option<&[u8]>, below: &mut Vec<Span>) -> Result<()> {
        spans(self.chain, at, len, below)?;
        for span in below {
            for done in (0..span.len).step_by(DATA) {
                let (from, len) = (span.at + done, (span.len - done).min(DATA as u64));
                let data = data.map(|data| &data[(from - at) as usize..][..len as usize]);
                self.piece(from, len, data, span.data)?;
            }
        }
        Ok(())
    }

    /// The same where what lies beneath is data throughout, or zeros throughout.
    fn piece(&mut self, at: u64, len: u64, data: Option<&[u8]>, over_data: bool) -> Result<()> {
        if over_data {
            self.beneath.resize(len as usize, 0);
            self.chain.read(&mut self.beneath, at)?;
        } else if data.is_none() {
            self.counts.empty += len / PAGE as u64;
            return Ok(());
        }
        let page = |bytes: &'_ [u8], page: usize| -> std::ops::Range<usize> {
            debug_assert_eq!(bytes.len() as u64, len);
            page * PAGE..(page + 1) * PAGE
        };
        let fates = (0..len as usize / PAGE).map(|at| {
            let data = data.map(|data| &data[page(data, at)]);
            Fate::of(data, over_data.then(|| &self.beneath[page(&self.beneath, at)]))
        });
        let fates: Vec<_> = fates.collect();
        let mut from = at;
        for alike in fates.chunk_by(Fate::eq) {
            let len = (alike.len() * PAGE) as u64;
            let data = data.map(|data| &data[(from - at) as usize..][..len as usize]);
            self.carry_out(alike[0], from, len, data)?;
            from += len;
        }
        Ok(())
    }

    fn carry_out(&mut self, fate: Fate, at: u64, len: u64, data: Option<&[u8]>) -> Result<()> {
        let count = match fate {
            Fate::Store => {
                self.write(data.expect("only data is stored"), at)?;
                &mut self.counts.stored
            }
            Fate::Zero => {
                self.chain.zero(at, len)?;
                self.pages.set_zeros(at, len);
                &mut self.counts.zeroed
            }
            Fate::Same => &mut self.counts.same,
            Fate::Empty => &mut self.counts.empty,
        };
        *count += len / PAGE as u64;
        Ok(())
    }
}
