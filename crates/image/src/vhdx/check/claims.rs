//! Which MiB of the file are claimed, and which by several.

use crate::vhdx::format::MIB;

/// One bit for each MiB of the file.
#[derive(Debug)]
pub(super) struct Units {
    bits: Vec<u64>,
    units: u64,
}

impl Units {
    fn new(units: u64) -> Self {
        Self { bits: vec![0; units.div_ceil(64) as usize], units }
    }

    fn get(&self, unit: u64) -> bool {
        unit < self.units && self.bits[(unit / 64) as usize] >> (unit % 64) & 1 == 1
    }

    fn set(&mut self, unit: u64) {
        if unit < self.units {
            self.bits[(unit / 64) as usize] |= 1 << (unit % 64);
        }
    }

    /// Whether any MiB of `len` bytes at `at` is set.
    pub(super) fn any(&self, at: u64, len: u64) -> bool {
        units(at, len).any(|unit| self.get(unit))
    }

    /// Sets all MiB of `len` bytes at `at`.
    pub(super) fn mark(&mut self, at: u64, len: u64) {
        units(at, len).for_each(|unit| self.set(unit));
    }
}

/// The MiB of `len` bytes at `at`, a multiple of 1 MiB.
fn units(at: u64, len: u64) -> std::ops::Range<u64> {
    at / MIB..at.saturating_add(len).div_ceil(MIB)
}

/// Who claims what.
#[derive(Debug)]
pub(super) struct Claims {
    /// Claimed by something.
    pub(super) used: Units,
    /// Claimed by more than one.
    pub(super) twice: Units,
    /// Claimed by more than one, and left to the first of them.
    pub(super) kept: Units,
    /// Whether anything is claimed twice.
    pub(super) any_twice: bool,
}

impl Claims {
    /// Claims in a file of `length` bytes; blocks may stick out past its end.
    pub(super) fn new(length: u64) -> Self {
        let count = length / MIB + 512;
        let new = || Units::new(count);
        Self { used: new(), twice: new(), kept: new(), any_twice: false }
    }

    /// Claims `len` bytes at `at`.
    pub(super) fn claim(&mut self, at: u64, len: u64) {
        for unit in units(at, len) {
            if self.used.get(unit) {
                self.twice.set(unit);
                self.any_twice = true;
            }
            self.used.set(unit);
        }
    }

    /// The runs of MiB below `end` that nothing claims: offset and length in bytes.
    pub(super) fn holes(&self, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let end = end / MIB;
        let mut unit = 0;
        std::iter::from_fn(move || {
            let start = (unit..end).find(|unit| !self.used.get(*unit))?;
            unit = (start..end).find(|unit| self.used.get(*unit)).unwrap_or(end);
            Some((start * MIB, (unit - start) * MIB))
        })
    }
}
