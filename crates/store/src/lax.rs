//! A file that nobody waits for.

use crate::{Lock, Result, Store};
use std::sync::Arc;

/// A [`Store`] whose syncs do nothing: its bytes become durable when the system sees fit, as those of a file that `cp` made. For copies
/// that one can make again.
#[derive(Debug)]
pub struct Lax(pub Arc<dyn Store>);

impl Store for Lax {
    fn name(&self) -> String {
        self.0.name()
    }

    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.0.punch(offset, len)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn lock(&self, lock: Lock) -> Result<()> {
        self.0.lock(lock)
    }

    fn data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.0.data(offset)
    }

    fn reflink(&self, from: &dyn Store) -> Result<bool> {
        self.0.reflink(from)
    }

    fn allocated(&self) -> Result<u64> {
        self.0.allocated()
    }
}
