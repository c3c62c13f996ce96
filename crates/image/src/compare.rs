//! Where the content of two disks differs.
//!
//! What both say is zeros is not read, nor what both take from the same file: two disks that share a base are compared by what was
//! written over it.

use crate::chain::{Chain, ChainRun, RunKind};
use crate::{Layer, Result};
use std::sync::Arc;

/// How much is read at once of each disk, in bytes.
const BUFFER: u64 = 1 << 20;
/// How far one look at a disk's runs reaches, in bytes, and how many it returns at most.
const LOOK: u64 = 1 << 30;
const RUNS: usize = 4096;
/// Differences are found in units of this many bytes.
const SECTOR: usize = 512;

/// The runs of one disk, one look after another.
struct Look<'a> {
    chain: &'a Chain,
    runs: std::vec::IntoIter<ChainRun>,
    now: Option<ChainRun>,
}

impl<'a> Look<'a> {
    fn new(chain: &'a Chain) -> Self {
        Self { chain, runs: Vec::new().into_iter(), now: None }
    }

    /// The run that `at` is in.
    fn at(&mut self, at: u64) -> Result<ChainRun> {
        loop {
            if let Some(run) = self.now.filter(|run| at < run.offset + run.len) {
                return Ok(run);
            }
            self.now = self.runs.next();
            if self.now.is_none() {
                let len = LOOK.min(self.chain.size() - at);
                self.runs = self.chain.runs(at, len, RUNS)?.into_iter();
            }
        }
    }
}

/// Tells `each` (offset and length, bytes) where two disks differ, in order, in whole sectors of 512 bytes, neighbours joined. What one
/// has past the other's end differs. `progress` is told bytes done and to do; says `false` if it stopped the comparison.
pub fn compare(
    one: &Chain,
    other: &Chain,
    progress: &mut dyn FnMut(u64, u64) -> bool,
    mut each: impl FnMut(u64, u64),
) -> Result<bool> {
    let (end, total) = (one.size().min(other.size()), one.size().max(other.size()));
    let shared = shared(&one.layers(), &other.layers());
    let (mut left, mut right) = (Look::new(one), Look::new(other));
    let mut open: Option<(u64, u64)> = None;
    let mut differs = |from: u64, len: u64| match &mut open {
        Some((at, run)) if *at + *run == from => *run += len,
        open => {
            if let Some((at, len)) = open.replace((from, len)) {
                each(at, len);
            }
        }
    };
    let mut buffers = [vec![0; BUFFER as usize], vec![0; BUFFER as usize]];
    let mut at = 0;
    while at < end {
        let (a, b) = (left.at(at)?, right.at(at)?);
        let stop = end.min(a.offset + a.len).min(b.offset + b.len);
        let both_zero = a.kind != RunKind::Data && b.kind != RunKind::Data;
        let same_file = a.kind == b.kind && a.layer.zip(b.layer).is_some_and(|pair| shared.contains(&pair));
        if both_zero || same_file {
            at = stop;
            if !progress(at, total) {
                return Ok(false);
            }
            continue;
        }
        while at < stop {
            let len = BUFFER.min(stop - at) as usize;
            let [a, b] = &mut buffers;
            one.read(&mut a[..len], at)?;
            other.read(&mut b[..len], at)?;
            if a[..len] != b[..len] {
                let sectors = a[..len].chunks(SECTOR).zip(b[..len].chunks(SECTOR)).enumerate();
                for (n, (a, _)) in sectors.filter(|(_, (a, b))| a != b) {
                    differs(at + (n * SECTOR) as u64, a.len() as u64);
                }
            }
            at += len as u64;
            if !progress(at, total) {
                return Ok(false);
            }
        }
    }
    if end < total {
        differs(end, total - end);
    }
    if let Some((at, len)) = open {
        each(at, len);
    }
    Ok(true)
}

/// Which layers of two chains are one file, by their positions. One virtual offset has one place in a layer, so that what both disks
/// take from such a layer is the same.
fn shared(one: &[Arc<dyn Layer>], other: &[Arc<dyn Layer>]) -> Vec<(usize, usize)> {
    let same = |a: &Arc<dyn Layer>, b: &Arc<dyn Layer>| {
        let id = a.info().data_id;
        !id.is_nil() && id == b.info().data_id && a.store().name() == b.store().name()
    };
    let pairs = one.iter().enumerate().flat_map(|(n, a)| other.iter().enumerate().map(move |(m, b)| (n, a, m, b)));
    pairs.filter(|(_, a, _, b)| same(a, b)).map(|(n, _, m, _)| (n, m)).collect()
}
