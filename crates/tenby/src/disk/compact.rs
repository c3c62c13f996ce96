//! `disk compact`: what an image takes and does not need goes back to the file system.

use super::problem::{problem, words};
use super::{Place, edit};
use crate::out::Out;
use crate::session::cancelled;
use crate::work::interruptible;
use image::{Access, Chain};
use machine::request::Problem;
use serde::Serialize;
use std::path::PathBuf;

/// What a compaction has changed: bytes on the host, and the file's length.
#[derive(Debug, Serialize)]
pub(crate) struct Compacted {
    file: PathBuf,
    pub(crate) bytes_before: u64,
    pub(crate) bytes: u64,
    length_before: u64,
    length: u64,
}

/// Compacts an image on which nothing stands.
pub(crate) async fn compact(place: Place, out: &Out) -> Result<Compacted, Problem> {
    edit::check_owner(&place.path, out).await?;
    let layers = place.layers(store::Mode::Write)?;
    let leaf = layers.last().expect("an image is a chain of one at least").clone();
    edit::check_leaf(&place, &*leaf, out)?;
    let measure = || Ok((leaf.store().allocated()?, leaf.store().len()?));
    let measured = || measure().map_err(|error: store::Error| problem(&error.into()));
    let (bytes_before, length_before) = measured()?;
    let complete = interruptible(out, format!("compacting {}", place.path.display()), move |progress| {
        let chain = Chain::new(layers, Access::Write).map_err(|error| problem(&error))?;
        image::compact::compact(&chain, progress).map_err(|error| problem(&error))
    })
    .await?;
    if !complete {
        let message = "the compaction was cancelled; the image is whole, and what was given back so far is";
        return Err(cancelled(message).hint(format!("{}      (goes on)", words())));
    }
    let (bytes, length) = measured()?;
    Ok(Compacted { file: place.path, bytes_before, bytes, length_before, length })
}
