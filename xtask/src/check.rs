//! The direction of dependencies between the crates.

use anyhow::Result;

pub(crate) fn run() -> Result<()> {
    Ok(())
}
