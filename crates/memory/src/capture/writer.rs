//! Writes pages to the memory disk: only what differs from what lies beneath.
//!
//! Where it is recorded how that reads, hashes are compared and nothing is read; else the bytes are. What was stored once is recorded from then on.

use super::Counts;
use super::batch::{Batch, DATA};
use crate::Result;
use crate::spans::spans;
use crate::stream::PAGE;
use image::Chain;
use image::hashes::{Expected, Hash, Pages};
use std::sync::mpsc::{Receiver, Sender};

static ZEROS: [u8; PAGE] = [0; PAGE];

/// What is to be done with a page.
#[derive(Debug, Clone, Copy)]
enum Fate {
    /// It has this hash.
    Store(Hash),
    Zero,
    Same,
    Empty,
}

impl Fate {
    fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// Pages that lie one after another, all data or all zeros.
#[derive(Debug, Clone, Copy)]
struct Run<'a> {
    /// Offset on the disk, bytes.
    at: u64,
    pages: usize,
    data: Option<&'a [u8]>,
}

impl<'a> Run<'a> {
    /// Some of them.
    fn part(self, from: usize, pages: usize) -> Self {
        let data = self.data.map(|data| &data[from * PAGE..][..pages * PAGE]);
        Self { at: self.at + (from * PAGE) as u64, pages, data }
    }

    /// What each of them holds; `None` stands for zeros.
    fn each(self) -> impl Iterator<Item = Option<&'a [u8]>> {
        (0..self.pages).map(move |page| self.part(page, 1).data.filter(|page| **page != ZEROS))
    }

    /// Where each of them is.
    fn places(self) -> impl Iterator<Item = u64> {
        (self.at..).step_by(PAGE).take(self.pages)
    }
}

/// The writing end of a capture.
pub(super) struct Writer<'a> {
    chain: &'a Chain,
    /// What is written.
    pages: Pages,
    /// How the chain reads where nothing was written.
    below: &'a Expected,
    /// The hash of a page of zeros.
    zeros: Hash,
    counts: Counts,
    /// What was read of what lies beneath; used again and again.
    beneath: Vec<u8>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(chain: &'a Chain, pages: Pages, below: &'a Expected) -> Self {
        let zeros = pages.hash(&ZEROS);
        Self { chain, pages, below, zeros, counts: Counts::default(), beneath: Vec::new() }
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
        for mut batch in full {
            batch.each_run(|at, len, data| self.run_of_pages(Run { at, pages: len as usize / PAGE, data }))?;
            batch.clear();
            // The other end may have stopped already; then nobody needs the batch.
            let _ = empty.send(batch);
        }
        Ok(self)
    }

    /// Makes the disk read as these pages do.
    fn run_of_pages(&mut self, run: Run<'_>) -> Result<()> {
        let beneath: Vec<_> = run.places().map(|at| self.pages.hash_over(self.below, at)).collect();
        let mut from = 0;
        for alike in beneath.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let part = run.part(from, alike.len());
            match alike[0] {
                Some(_) => self.over_recorded(part, alike.iter().flatten())?,
                None => self.over_unknown(part)?,
            }
            from += alike.len();
        }
        Ok(())
    }

    /// The same where what lies beneath has these hashes.
    fn over_recorded<'h>(&mut self, run: Run<'_>, beneath: impl Iterator<Item = &'h Hash>) -> Result<()> {
        let fate = |(page, beneath): (Option<&[u8]>, &Hash)| match page.map(|page| self.pages.hash(page)) {
            Some(hash) if hash == *beneath => Fate::Same,
            Some(hash) => Fate::Store(hash),
            None if self.zeros == *beneath => Fate::Empty,
            // Invariant 11: zeros over data are zeros from now on.
            None => Fate::Zero,
        };
        let fates: Vec<_> = run.each().zip(beneath).map(fate).collect();
        self.carry_out(run, &fates)
    }

    /// The same where that is not recorded.
    fn over_unknown(&mut self, run: Run<'_>) -> Result<()> {
        let (zeros, mut below, mut from) = (self.zeros, Vec::new(), 0);
        spans(self.chain, run.at, (run.pages * PAGE) as u64, &mut below)?;
        for span in below {
            let end = from + span.len as usize / PAGE;
            while from < end {
                let part = run.part(from, (end - from).min(DATA / PAGE));
                match span.data {
                    true => self.over_data(part)?,
                    false => self.over_recorded(part, std::iter::repeat(&zeros))?,
                }
                from += part.pages;
            }
        }
        Ok(())
    }

    /// The same where it has to be read.
    fn over_data(&mut self, run: Run<'_>) -> Result<()> {
        self.beneath.resize(run.pages * PAGE, 0);
        self.chain.read(&mut self.beneath, run.at)?;
        let fate = |(page, beneath): (Option<&[u8]>, &[u8])| match page {
            Some(page) if page == beneath => Fate::Same,
            Some(page) => Fate::Store(self.pages.hash(page)),
            None if *beneath == ZEROS => Fate::Empty,
            None => Fate::Zero,
        };
        let fates: Vec<_> = run.each().zip(self.beneath.chunks_exact(PAGE)).map(fate).collect();
        self.carry_out(run, &fates)
    }

    fn carry_out(&mut self, run: Run<'_>, fates: &[Fate]) -> Result<()> {
        let mut from = 0;
        for alike in fates.chunk_by(Fate::is_like) {
            let part = run.part(from, alike.len());
            let count = match alike[0] {
                Fate::Store(_) => {
                    self.store(part, alike)?;
                    &mut self.counts.stored
                }
                Fate::Zero => {
                    let len = (part.pages * PAGE) as u64;
                    self.chain.zero(part.at, len)?;
                    self.pages.set_zeros(part.at, len);
                    &mut self.counts.zeroed
                }
                Fate::Same => &mut self.counts.same,
                Fate::Empty => &mut self.counts.empty,
            };
            *count += part.pages as u64;
            from += part.pages;
        }
        Ok(())
    }

    fn store(&mut self, run: Run<'_>, fates: &[Fate]) -> Result<()> {
        self.chain.write(run.data.expect("only data is stored"), run.at)?;
        for (at, fate) in run.places().zip(fates) {
            if let Fate::Store(hash) = fate {
                self.pages.set_hash(at, *hash);
            }
        }
        Ok(())
    }
}
