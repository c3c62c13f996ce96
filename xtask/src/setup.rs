//! Installs what is missing.

use anyhow::Result;

pub(crate) fn run() -> Result<()> {
    Ok(())
}
