//! The plain bytes that a disk is compared with.

use crate::dice::Dice;
use crate::forge::{self, Held, Sector};
use image::{Chain, RunKind};
use std::ops::Range;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// Where something happens on a disk: all of a small one, and a few stretches of a large one, whose second chunk lies gigabytes
/// away. In order, in whole MiB; the first begins at 0.
pub(crate) type Windows = Arc<[Range<u64>]>;

/// What a disk must read as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bytes {
    size: u64,
    windows: Windows,
    /// The windows' content, zeros past the disk's end. Outside of them the disk is zeros.
    parts: Vec<Vec<u8>>,
}

impl Bytes {
    pub(crate) fn zeros(size: u64, windows: &Windows) -> Self {
        let parts = windows.iter().map(|window| vec![0; (window.end - window.start) as usize]).collect();
        Self { size, windows: Arc::clone(windows), parts }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// A child or a change of this size: what is cut off is gone, what is added is zeros.
    pub(crate) fn resize(&mut self, size: u64) {
        let (from, to) = (size.min(self.size), self.windows.last().expect("a window").end);
        self.fill_zeros(from, to);
        self.size = size;
    }

    /// The windows, as far as the disk reaches.
    pub(crate) fn windows(&self) -> impl Iterator<Item = Range<u64>> {
        self.windows.iter().map(|window| window.start..window.end.min(self.size)).filter(|window| !window.is_empty())
    }

    /// The bytes of a stretch that lies inside of a window.
    fn stretch(&mut self, at: u64, len: u64) -> &mut [u8] {
        let index = self.windows.iter().rposition(|window| window.start <= at).expect("the first begins at 0");
        let from = (at - self.windows[index].start) as usize;
        &mut self.parts[index][from..from + len as usize]
    }

    /// Writes inside of a window.
    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        assert!(at + bytes.len() as u64 <= self.size);
        self.stretch(at, bytes.len() as u64).copy_from_slice(bytes);
    }

    /// Zeroes anything.
    pub(crate) fn zero(&mut self, at: u64, len: u64) {
        self.fill_zeros(at, at + len);
    }

    /// Lays what a layer holds over this.
    pub(crate) fn lay(&mut self, held: &Held, block: u64, sector: u64) {
        for (number, sectors) in held {
            for (index, found) in (0..).zip(sectors) {
                let at = number * block + index * sector;
                match found {
                    Sector::Data(stamp) => self.put(at, &forge::bytes(*stamp, at / sector, sector)),
                    Sector::Zeros => self.zero(at, sector),
                    Sector::Nothing => (),
                }
            }
        }
    }

    fn fill_zeros(&mut self, from: u64, to: u64) {
        for (window, part) in self.windows.iter().zip(&mut self.parts) {
            let (from, to) = (from.max(window.start), to.min(window.end));
            if from < to {
                part[(from - window.start) as usize..(to - window.start) as usize].fill(0);
            }
        }
    }

    /// Whether everything happens in one window, so that it can be read as a whole.
    pub(crate) fn is_small(&self) -> bool {
        self.windows.len() == 1
    }

    /// All bytes of a small disk.
    pub(crate) fn whole(&self) -> &[u8] {
        &self.parts[0][..self.size as usize]
    }

    /// A range of bytes inside of a window: few, many, or around what blocks begin with.
    pub(crate) fn range(&self, dice: &mut Dice) -> (u64, u64) {
        let windows: Vec<_> = self.windows().collect();
        let window = windows[dice.below(windows.len() as u64) as usize].clone();
        let at = match dice.below(4) {
            0 => dice.within(window.clone()) / (512 << 10) * (512 << 10),
            1 => (dice.within(window.clone()) / MIB * MIB).saturating_sub(dice.below(3000)),
            _ => dice.within(window.clone()),
        };
        let at = at.clamp(window.start, window.end - 1);
        let most = match dice.below(6) {
            0 => window.end - at,
            1 => MIB,
            2 => 512 << 10,
            3 => 60_000,
            _ => 2_000,
        };
        let len = if dice.one_in(3) { most } else { 1 + dice.below(most) };
        (at, len.min(window.end - at))
    }

    /// Compares a disk with this, read in pieces of any size.
    pub(crate) fn check(&self, chain: &Chain, dice: &mut Dice, what: &str) {
        assert_eq!(chain.size(), self.size, "the size, {what}");
        let mut buffer = vec![0; 2 << 20];
        for (window, part) in self.windows.iter().zip(&self.parts) {
            let end = window.end.min(self.size);
            let mut at = window.start;
            while at < end {
                let len = (1 + dice.below(2 * MIB)).min(end - at);
                let bytes = &mut buffer[..len as usize];
                bytes.fill(0xAA);
                chain.read(bytes, at).unwrap_or_else(|error| panic!("{error}, {what}"));
                let from = (at - window.start) as usize;
                let expected = &part[from..from + len as usize];
                if bytes != expected {
                    let index = (0..bytes.len()).find(|index| bytes[*index] != expected[*index]).expect("they differ");
                    let (byte, wrong, right) = (at + index as u64, bytes[index], expected[index]);
                    panic!("byte {byte} of {} is {wrong:#x} and should be {right:#x}, {what}", self.size);
                }
                at += len;
            }
        }
        let starts = self.windows.iter().skip(1).map(|window| window.start).chain([self.size]);
        for (window, start) in self.windows.iter().zip(starts) {
            if window.end < start.min(self.size) {
                only_zeros(chain, window.end, start.min(self.size), what);
            }
        }
    }

    /// Runs cover a range, say zeros only where there are zeros, and can be asked for piecemeal.
    pub(crate) fn check_runs(&self, chain: &Chain, dice: &mut Dice, what: &str) {
        let (at, len) = self.range(dice);
        let whole = chain.runs(at, len, usize::MAX).expect("runs");
        let mut next = at;
        let mut own = self.clone();
        for run in &whole {
            assert!(run.offset == next && run.len > 0, "{run:?}, {what}");
            next += run.len;
            let is_zeros = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
            assert!(run.kind == RunKind::Data || is_zeros(own.stretch(run.offset, run.len)), "{run:?}, {what}");
            assert_eq!(run.layer.is_none(), run.kind == RunKind::Absent);
        }
        assert_eq!(next, at + len, "{what}");
        let (mut pieces, mut next) = (Vec::new(), at);
        while next < at + len {
            let some = chain.runs(next, at + len - next, 3).expect("runs");
            next = some.last().map(|run| run.offset + run.len).expect("a run");
            pieces.extend(some);
        }
        assert_eq!(pieces, whole, "{what}");
    }
}

/// Reads what is said to be data between two windows, which is zeros.
fn only_zeros(chain: &Chain, from: u64, to: u64, what: &str) {
    for run in chain.runs(from, to - from, usize::MAX).expect("runs") {
        if run.kind == RunKind::Data {
            assert!(run.len < 64 * MIB, "{run:?} takes space, {what}");
            let mut bytes = vec![0xAA; run.len as usize];
            chain.read(&mut bytes, run.offset).expect("read");
            assert!(bytes.iter().all(|byte| *byte == 0), "{run:?} holds something, {what}");
        }
    }
}
