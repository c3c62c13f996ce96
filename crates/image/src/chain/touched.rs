//! Which parts of a layer were written while a fold copies it.

use super::locked;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// One bit stands for this many bytes.
const GRAIN: u64 = 64 << 10;
/// One map entry: 32 grains.
const SPAN: u64 = 32 * GRAIN;

/// A sparse bitmap of 64 KiB grains: its memory grows with what was touched, not with the disk.
#[derive(Debug)]
pub(crate) struct Touched {
    size: u64,
    on: AtomicBool,
    spans: Mutex<BTreeMap<u64, u32>>,
}

impl Touched {
    /// For a layer of `size` bytes; notes nothing until [`Touched::start`].
    pub(crate) fn new(size: u64) -> Self {
        Self { size, on: AtomicBool::new(false), spans: Mutex::default() }
    }

    /// Notes from now on. The caller sees to it that no write is under way.
    pub(crate) fn start(&self) {
        locked(&self.spans).clear();
        self.on.store(true, Ordering::SeqCst);
    }

    pub(crate) fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
        locked(&self.spans).clear();
    }

    pub(crate) fn mark(&self, offset: u64, len: u64) {
        if len == 0 || !self.on.load(Ordering::SeqCst) {
            return;
        }
        let mut spans = locked(&self.spans);
        for span in offset / SPAN..=(offset + len - 1) / SPAN {
            let start = span * SPAN;
            let first = offset.saturating_sub(start) / GRAIN;
            let last = (offset + len - 1 - start).min(SPAN - 1) / GRAIN;
            let mask = (u32::MAX << first) & (u32::MAX >> (31 - last));
            *spans.entry(span).or_default() |= mask;
        }
    }

    /// Bytes touched, in whole grains.
    pub(crate) fn bytes(&self) -> u64 {
        locked(&self.spans).values().map(|mask| u64::from(mask.count_ones()) * GRAIN).sum()
    }

    /// Takes what was touched: ranges (offset, length) in order, adjacent ones joined, inside the layer.
    pub(crate) fn take(&self) -> Vec<(u64, u64)> {
        let spans = std::mem::take(&mut *locked(&self.spans));
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (span, mask) in spans {
            for bit in (0..32).filter(|bit| mask & (1 << bit) != 0) {
                let offset = span * SPAN + bit * GRAIN;
                let len = GRAIN.min(self.size.saturating_sub(offset));
                match ranges.last_mut() {
                    Some((at, run)) if *at + *run == offset => *run += len,
                    _ => ranges.push((offset, len)),
                }
            }
        }
        ranges.retain(|&(_, len)| len > 0);
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_round_outward_and_join() {
        let touched = Touched::new(10 * SPAN + 512);
        touched.mark(0, 512);
        assert!(touched.take().is_empty(), "nothing is noted before the start");
        touched.start();
        touched.mark(GRAIN - 1, 2);
        touched.mark(SPAN - 1, SPAN + 2);
        touched.mark(10 * SPAN, 512);
        assert_eq!(touched.bytes(), (2 + 34 + 1) * GRAIN);
        assert_eq!(touched.take(), [(0, 2 * GRAIN), (SPAN - GRAIN, SPAN + 2 * GRAIN), (10 * SPAN, 512)]);
        assert!(touched.take().is_empty());
    }
}
