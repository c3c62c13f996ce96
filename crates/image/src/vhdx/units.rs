//! A set of MiB of a file, the unit of all places in a VHDX.

use super::format::MIB;
use super::open::MAX_FILE;
use std::ops::Range;

/// Words of a stretch: 4 GiB of the file.
const WORDS: usize = 64;
/// Bits of a stretch.
const BITS: u64 = WORDS as u64 * 64;
/// Where a set ends: a block at the end of the longest file may stick out by almost its own length, 256 MiB.
const END: u64 = (MAX_FILE >> 20) + 256;

/// A bit for each MiB. Its memory grows with what was put in, not with the file.
#[derive(Debug, Default)]
pub(crate) struct Units(Vec<Option<Box<[u64; WORDS]>>>);

/// The MiB of `len` bytes at `at`.
fn units(at: u64, len: u64) -> Range<u64> {
    at / MIB..at.saturating_add(len).div_ceil(MIB).min(END)
}

/// Where in a stretch a unit's bit is: word and mask.
fn bit(unit: u64) -> (usize, u64) {
    ((unit % BITS / 64) as usize, 1 << (unit % 64))
}

impl Units {
    fn stretch(&self, unit: u64) -> Option<&[u64; WORDS]> {
        self.0.get((unit / BITS) as usize)?.as_deref()
    }

    fn has(&self, unit: u64) -> bool {
        let (word, mask) = bit(unit);
        self.stretch(unit).is_some_and(|words| words[word] & mask != 0)
    }

    /// Whether any MiB of `len` bytes at `at` is in it.
    pub(crate) fn any(&self, at: u64, len: u64) -> bool {
        units(at, len).any(|unit| self.has(unit))
    }

    /// Puts all MiB of `len` bytes at `at` in. Says of each that was there already so to `again`.
    pub(crate) fn put(&mut self, at: u64, len: u64, mut again: impl FnMut(u64)) {
        for unit in units(at, len) {
            let index = (unit / BITS) as usize;
            if self.0.len() <= index {
                self.0.resize_with(index + 1, || None);
            }
            let (word, mask) = bit(unit);
            let words = self.0[index].get_or_insert_with(|| Box::new([0; WORDS]));
            if words[word] & mask != 0 {
                again(unit * MIB);
            }
            words[word] |= mask;
        }
    }

    /// Puts all MiB of `len` bytes at `at` in.
    pub(crate) fn mark(&mut self, at: u64, len: u64) {
        self.put(at, len, |_| ());
    }

    /// The first unit from `from` on that is in it, or not in it; at most `end`.
    fn next(&self, from: u64, end: u64, wanted: bool) -> u64 {
        let mut unit = from;
        while unit < end {
            if self.stretch(unit).is_none() {
                if !wanted {
                    return unit;
                }
                unit = (unit / BITS + 1) * BITS;
            } else if self.has(unit) == wanted {
                return unit;
            } else {
                unit += 1;
            }
        }
        end
    }

    /// The runs of MiB below `end` (bytes) that are not in it: offset and length in bytes.
    pub(crate) fn holes(&self, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let end = end / MIB;
        let mut unit = 0;
        std::iter::from_fn(move || {
            let start = self.next(unit, end, false);
            unit = self.next(start, end, true);
            (start < end).then_some((start * MIB, (unit - start) * MIB))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_there_and_holes_are_between() {
        let mut units = Units::default();
        assert_eq!(units.holes(3 * MIB).collect::<Vec<_>>(), [(0, 3 * MIB)]);
        units.mark(MIB, 2 * MIB);
        units.mark(5 << 32, 3 * MIB - 5);
        let mut twice = Vec::new();
        units.put(2 * MIB, 2 * MIB, |at| twice.push(at));
        assert_eq!(twice, [2 * MIB]);
        assert!(units.any(0, 2 * MIB) && !units.any(0, MIB) && !units.any(4 * MIB, 1 << 32));
        assert!(units.any((5 << 32) + 2 * MIB, 1));
        let holes: Vec<_> = units.holes((5 << 32) + 4 * MIB).collect();
        assert_eq!(holes, [(0, MIB), (4 * MIB, (5 << 32) - 4 * MIB), ((5 << 32) + 3 * MIB, MIB)]);
        assert_eq!(units.holes(MIB).collect::<Vec<_>>(), [(0, MIB)]);
    }

    #[test]
    fn a_place_far_away_takes_little_and_one_past_everything_nothing() {
        let mut units = Units::default();
        units.mark(MAX_FILE - MIB, MIB);
        assert_eq!(units.0.iter().flatten().count(), 1);
        assert_eq!(units.holes(MAX_FILE).collect::<Vec<_>>(), [(0, MAX_FILE - MIB)]);
        units.mark(u64::MAX - 5, 100);
        assert!(!units.any(u64::MAX - 5, 100));
    }
}
