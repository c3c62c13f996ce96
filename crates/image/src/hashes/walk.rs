//! Block after block of a layer: what need not be read, and what the rest is.

use super::{BLOCK, Hash, Hashed, Key};
use crate::chain::RunKind;
use crate::{Access, Chain, Error, Result, Source};
use std::ops::Range;

/// A layer is asked what it holds in windows of this many blocks.
const WINDOW: u64 = 512;
/// The chain's index: each block is looked at once.
const INDEX: usize = 1 << 20;

/// What zeros look like, a divisor of a block.
const ZEROS: [u8; 4096] = [0; 4096];

/// What a layer itself says of a block.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    data: bool,
    zero: bool,
    absent: bool,
}

/// What a block's content is.
pub(super) enum Content {
    /// What the layer below has there: its hash, `None` for zeros.
    Below(Option<Hash>),
    /// All zeros.
    Zero,
    /// That has to be read.
    Read,
}

pub(super) struct Walk<'a, E> {
    hashed: Hashed<'a, E>,
    size: u64,
    chain: Option<Chain>,
    /// What the layer holds of the blocks from `first` on.
    window: Vec<Held>,
    first: u64,
    buffer: Vec<u8>,
}

impl<'a, E: From<Error>> Walk<'a, E> {
    pub(super) fn new(hashed: Hashed<'a, E>) -> Self {
        let size = hashed.layer.info().size;
        Self { hashed, size, chain: None, window: Vec::new(), first: 0, buffer: Vec::new() }
    }

    /// Where a block lies on the disk, bytes.
    pub(super) fn range(&self, block: u64) -> Range<u64> {
        block * BLOCK..((block + 1) * BLOCK).min(self.size)
    }

    /// What can be said of a block without reading it.
    pub(super) fn look(&mut self, block: u64) -> Result<Content> {
        let held = self.held(block)?;
        let below = self.hashed.below.filter(|below| below.shows(block, self.size));
        Ok(match (held, below) {
            (Held { data: false, absent: false, .. }, _) => Content::Zero,
            (Held { data: false, zero: false, .. }, Some(below)) => Content::Below(below.get(block)),
            _ => Content::Read,
        })
    }

    fn held(&mut self, block: u64) -> Result<Held> {
        let known = self.first..self.first + self.window.len() as u64;
        if !known.contains(&block) {
            self.first = block;
            let from = block * BLOCK;
            let len = (self.size - from).min(WINDOW * BLOCK);
            self.window = vec![Held::default(); len.div_ceil(BLOCK) as usize];
            let mut runs = Vec::new();
            self.hashed.layer.map(from, len, &mut runs)?;
            for run in runs {
                let blocks = (run.offset - from) / BLOCK..=(run.offset + run.len - 1 - from) / BLOCK;
                for held in &mut self.window[*blocks.start() as usize..=*blocks.end() as usize] {
                    match run.source {
                        Source::Data(_) => held.data = true,
                        Source::Zero => held.zero = true,
                        Source::Absent => held.absent = true,
                    }
                }
            }
        }
        Ok(self.window[(block - self.first) as usize])
    }

    /// Reads a block: its hash, `None` for zeros, and how many bytes were read.
    pub(super) fn read(&mut self, block: u64, key: &Key) -> Result<(Option<Hash>, u64), E> {
        let Range { start, end } = self.range(block);
        let len = (end - start) as usize;
        let chain = chain(&mut self.chain, &mut self.hashed)?;
        let runs = chain.runs(start, end - start, usize::MAX)?;
        if runs.iter().all(|run| run.kind != RunKind::Data) {
            return Ok((None, 0));
        }
        if self.buffer.is_empty() {
            self.buffer = vec![0; BLOCK as usize];
        }
        chain.read(&mut self.buffer[..len], start)?;
        self.buffer[len..].fill(0);
        let zeros = self.buffer.chunks(ZEROS.len()).all(|piece| piece == ZEROS);
        Ok(((!zeros).then(|| key.hash(&self.buffer)), len as u64))
    }

    /// The layers whose data a block is made of, by their positions in the chain.
    pub(super) fn holders(&mut self, block: u64) -> Result<Vec<usize>, E> {
        let Range { start, end } = self.range(block);
        let runs = chain(&mut self.chain, &mut self.hashed)?.runs(start, end - start, usize::MAX)?;
        let data = runs.iter().filter(|run| run.kind == RunKind::Data);
        let mut layers: Vec<usize> = data.filter_map(|run| run.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        Ok(layers)
    }
}

fn chain<'c, E: From<Error>>(chain: &'c mut Option<Chain>, hashed: &mut Hashed<'_, E>) -> Result<&'c Chain, E> {
    if chain.is_none() {
        let layers = (hashed.open)()?;
        *chain = Some(Chain::with_index(layers, Access::Read, INDEX)?);
    }
    Ok(chain.as_ref().expect("it was opened"))
}
