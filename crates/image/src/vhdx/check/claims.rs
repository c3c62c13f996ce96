//! Which MiB of the file are claimed, and which by several.

use crate::vhdx::units::Units;

/// Who claims what.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Claimed by something.
    pub(super) used: Units,
    /// Claimed by more than one.
    pub(super) twice: Units,
    /// Claimed by more than one, and left to one of them.
    pub(super) kept: Units,
    /// Claimed by bitmaps that blocks need.
    pub(super) bitmaps: Units,
    /// Whether anything is claimed twice.
    pub(super) any_twice: bool,
}

impl Claims {
    /// Claims `len` bytes at `at`.
    pub(super) fn claim(&mut self, at: u64, len: u64) {
        let Self { used, twice, any_twice, .. } = self;
        used.put(at, len, |again| {
            twice.mark(again, 1);
            *any_twice = true;
        });
    }
}
