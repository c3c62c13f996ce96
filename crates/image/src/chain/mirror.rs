//! What is written to the leaf while a fold copies it into the layer below goes there as well.
//!
//! ```text
//!   request ──► leaf ──► layer below ──► acknowledged        both in one order: the block's gate is held alone
//! ```
//!
//! So the fold need not look again at what it has copied. Until its last phase the leaf alone counts: if the layer below fails, the fold
//! has failed and the request has not. In the last phase the layer below may be the truth at any moment: a request that fails there has
//! failed, and a flush covers both.

use super::slot::Slot;
use super::{invalid, locked};
use crate::{Error, Result};
use std::sync::{Arc, Mutex};

#[derive(Debug)]
pub(crate) struct Mirror {
    below: Arc<Slot>,
    last_phase: bool,
    /// Why the layer below has not got what the leaf has.
    failed: Mutex<Option<Error>>,
}

impl Mirror {
    pub(crate) fn new(below: Arc<Slot>) -> Self {
        Self { below, last_phase: false, failed: Mutex::default() }
    }

    /// The layer below counts from now on. No request is under way.
    pub(crate) fn begin_last_phase(&mut self) {
        self.last_phase = true;
        self.below.wrote();
    }

    /// The layer below, if it counts.
    pub(crate) fn counts(&self) -> Option<&Slot> {
        self.last_phase.then_some(&*self.below)
    }

    /// Fails, once, if the two are not the same.
    pub(crate) fn check(&self) -> Result<()> {
        locked(&self.failed).take().map_or(Ok(()), Err)
    }

    /// The leaf was written, with this result.
    pub(super) fn write(&self, leaf: Result<()>, data: &[u8], offset: u64) -> Result<()> {
        self.also(leaf, |below| below.copy_in(data, offset).map(drop))
    }

    /// The leaf was zeroed, with this result.
    pub(super) fn zero(&self, leaf: Result<()>, offset: u64, len: u64) -> Result<()> {
        self.also(leaf, |below| below.copy_zeros(offset, len))
    }

    fn also(&self, leaf: Result<()>, change: impl FnOnce(&Slot) -> Result<()>) -> Result<()> {
        if leaf.is_err() {
            // It may have changed something all the same.
            self.fail(invalid("a write failed while the leaf was being folded"));
            return leaf;
        }
        let result = change(&self.below);
        if self.last_phase {
            self.below.wrote();
            result.inspect_err(|_| self.fail(invalid("a write failed in the last phase of a fold")))
        } else {
            result.or_else(|error| {
                self.fail(error);
                Ok(())
            })
        }
    }

    fn fail(&self, error: Error) {
        locked(&self.failed).get_or_insert(error);
    }
}
