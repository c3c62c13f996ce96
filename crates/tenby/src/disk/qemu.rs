//! qcow2, which `qemu-img` reads and writes for us.

use super::problem::{data_bytes, no_room, problem};
use super::{Info, Place, Target, begin, blank, cancelled, edit, finish};
use crate::out::Out;
use crate::work::interruptible;
use export::qcow2::{self, Qcow2};
use image::Access;
use machine::files::qcow2_problem;
use machine::request::Problem;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A qcow2 that was made.
#[derive(Debug, Serialize)]
pub(crate) struct Made {
    file: PathBuf,
    format: &'static str,
    size: u64,
    bytes: u64,
}

/// What went wrong with a copy, for people.
fn told(error: qcow2::Error) -> Problem {
    match error {
        qcow2::Error::Image(error) => problem(&error),
        qcow2::Error::Serve(error) => super::refused(&error),
        other => qcow2_problem(&other),
    }
}

/// Whether a file says that it is a qcow2.
pub(crate) fn is_qcow2(path: &Path) -> Result<bool, Problem> {
    qcow2::is_one(path).map_err(told)
}

/// Copies a qcow2 into a new image. Nothing is left if it fails or is cancelled.
pub(crate) async fn convert_from(source: &Path, target: Target<'_>, out: &Out) -> Result<Info, Problem> {
    let qcow2 = Qcow2::open(source).map_err(told)?;
    let new = begin(target.path, target.durable)?;
    let store = new.store();
    let size = target.size(qcow2.size(), out)?;
    let Target { format, kind, dense, .. } = target;
    let file = target.path.to_owned();
    let source_bytes = std::fs::metadata(source).map_or(0, |data| data.len());
    let complete = interruptible(out, format!("copying {}", source.display()), move |progress| {
        let chain = Arc::new(blank(&store, format, kind, size, 512).map_err(|error| problem(&error))?);
        // What the source takes is what the copy will, roughly.
        let complete = qcow2.copy_in(&chain, progress).map_err(|error| match error.is_no_room() {
            true => no_room(source_bytes, &*store, &file),
            false => told(error),
        })?;
        chain.close().map_err(|error| problem(&error))?;
        let filled =
            complete && (!dense || image::convert::fill(&*store, progress).map_err(|error| problem(&error))?);
        Ok(filled)
    })
    .await?;
    if !complete {
        return Err(target.cancelled());
    }
    finish(new, target.path)?;
    target.info()
}

/// Copies an image into a new qcow2. Nothing is left if it fails or is cancelled.
pub(crate) async fn convert_to(
    source: Place,
    target: &Path,
    dense: bool,
    durable: bool,
    out: &Out,
) -> Result<Made, Problem> {
    edit::check_still(&source.path, out).await?;
    let new = begin(target, durable)?;
    let (store, partial, file) = (new.store(), new.path(), target.to_owned());
    let what = format!("copying {}", source.path.display());
    let copied = interruptible(out, what, move |progress| {
        let chain = Arc::new(source.chain(Access::Read)?);
        let complete = qcow2::copy_out(&chain, &partial, progress).map_err(|error| match data_bytes(&chain) {
            Ok(need) if error.is_no_room() => no_room(need, &*store, &file),
            _ => told(error),
        })?;
        let filled =
            complete && (!dense || image::convert::fill(&*store, progress).map_err(|error| problem(&error))?);
        store.sync().map_err(|error| problem(&error.into()))?;
        Ok(filled.then_some((chain.size(), store.allocated().map_err(|error| problem(&error.into()))?)))
    })
    .await?;
    let Some((size, bytes)) = copied else {
        return Err(cancelled(format!("the copy was cancelled; {} was not made", target.display())));
    };
    finish(new, target)?;
    Ok(Made { file: target.to_owned(), format: "qcow2", size, bytes })
}
