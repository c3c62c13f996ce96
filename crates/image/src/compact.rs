//! Giving back what an image takes and does not need.
//!
//! First what reads as zeros is let go, block by block; then what lies at the file's end moves into the holes
//! ([`crate::Layer::pack`]); and closing the layer cuts the file. Each step leaves an image that is whole and reads as before, so a
//! compaction that was cut off anywhere is simply done again. The image's id stays: its content does.

use crate::chain::Chain;
use crate::layer::Source;
use crate::{Error, Result};
use std::sync::Arc;

/// Zeros shorter than this stay where they are, unless a whole block is zeros.
const GRAIN: u64 = 64 << 10;
/// What one look at a layer's runs covers, bytes; blocks may be larger.
const LOOK: u64 = 64 << 20;
/// After this many bytes that were let go the image is flushed.
const FLUSH: u64 = 1 << 30;

/// Compacts the leaf of a chain that is open for writing and used by nobody else. `progress` is told bytes done and to do. Says
/// whether it came to the end: if `progress` stopped it, what was given back so far is.
pub fn compact(chain: &Chain, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool> {
    let layers = chain.layers();
    let leaf = layers.last().expect("a chain has at least one layer");
    leaf.settle()?;
    let whole = drop_zeros(chain, progress)? && {
        chain.flush()?;
        leaf.pack(progress)?
    };
    chain.close()?;
    Ok(whole)
}

/// Lets go of what the leaf holds and reads as zeros.
fn drop_zeros(chain: &Chain, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool> {
    let layers = chain.layers();
    let leaf = layers.last().expect("a chain has at least one layer");
    let size = chain.size();
    let unit = u64::from(leaf.info().block_size).max(GRAIN);
    let step = unit.max(LOOK);
    let mut buffer = vec![0; GRAIN as usize];
    let (mut runs, mut dropped) = (Vec::new(), 0);
    for at in (0..size).step_by(step as usize) {
        let end = size.min(at + step);
        runs.clear();
        leaf.map(at, end - at, &mut runs)?;
        let held: Vec<_> = runs.iter().filter(|run| matches!(run.source, Source::Data(_))).collect();
        let mut zeros = Zeros { chain, buffer: &mut buffer };
        // Whole blocks first: they need no place at all.
        for block in (at..end).step_by(unit as usize) {
            let stop = end.min(block + unit);
            let in_block = |run: &&&crate::Run| run.offset < stop && run.offset + run.len > block;
            let mut parts = held.iter().filter(in_block).peekable();
            if parts.peek().is_none() {
                continue;
            }
            let found: Vec<(u64, u64)> = if zeros.all(block, stop)? {
                vec![(block, stop)]
            } else {
                let parts = parts.map(|run| (run.offset.max(block), (run.offset + run.len).min(stop)));
                parts.map(|(from, to)| zeros.grains(from, to)).collect::<Result<Vec<_>>>()?.concat()
            };
            for (from, to) in found {
                chain.zero(from, to - from)?;
                dropped += to - from;
            }
            if dropped > FLUSH {
                chain.flush()?;
                dropped = 0;
            }
            if !progress(stop, size) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

struct Zeros<'a> {
    chain: &'a Chain,
    buffer: &'a mut [u8],
}

impl Zeros<'_> {
    /// Whether the disk reads as zeros from `from` to `to`.
    fn all(&mut self, from: u64, to: u64) -> Result<bool> {
        let mut at = from;
        while at < to {
            let piece = &mut self.buffer[..GRAIN.min(to - at) as usize];
            self.chain.read(piece, at)?;
            if piece.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += piece.len() as u64;
        }
        Ok(true)
    }

    /// The whole grains between `from` and `to` that read as zeros, from and to, joined.
    fn grains(&mut self, from: u64, to: u64) -> Result<Vec<(u64, u64)>, Error> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        let mut at = from.next_multiple_of(GRAIN);
        while at + GRAIN <= to {
            if self.all(at, at + GRAIN)? {
                match found.last_mut() {
                    Some((_, end)) if *end == at => *end = at + GRAIN,
                    _ => found.push((at, at + GRAIN)),
                }
            }
            at += GRAIN;
        }
        Ok(found)
    }
}

/// Bytes that the chain's leaf takes on its file system now.
pub fn occupied(chain: &Chain) -> Result<u64> {
    let layers = chain.layers();
    Ok(Arc::clone(layers.last().expect("a chain has at least one layer")).store().allocated()?)
}
