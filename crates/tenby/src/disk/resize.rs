//! `disk resize`: another size for a disk on which nothing stands.

use super::problem::problem;
use super::{Info, Place, edit, info};
use crate::draw;
use crate::out::Out;
use crate::session::cancelled;
use crate::work::interruptible;
use image::{Access, Chain, ErrorKind};
use machine::plan::quoted;
use machine::request::Problem;

/// Makes a disk `size` bytes.
pub(crate) async fn resize(place: Place, size: u64, out: &Out) -> Result<Info, Problem> {
    edit::check_owner(&place.path, out).await?;
    let layers = place.layers(store::Mode::Write)?;
    let leaf = layers.last().expect("an image is a chain of one at least");
    leaf.check_resize(size).map_err(|error| match error.kind {
        ErrorKind::Unsupported => {
            let (file, new) =
                (place.path.display().to_string(), place.path.with_extension("vhdx").display().to_string());
            Problem::refused(problem(&error).message).hint(format!(
                "tenby disk convert {} {}",
                quoted(&file),
                quoted(&new)
            ))
        }
        _ => problem(&error),
    })?;
    edit::check_leaf(&place, &**leaf, out)?;
    let what = format!("looking at what {} would lose", place.path.display());
    let file = place.path.clone();
    let complete = interruptible(out, what, move |progress| {
        let chain = Chain::new(layers, Access::Write).map_err(|error| problem(&error))?;
        if size < chain.size() {
            let end = image::resize::data_end(&chain, size, progress).map_err(|error| problem(&error))?;
            let Some(end) = end else { return Ok(false) };
            if end > size {
                let sector = u64::from(chain.sector_size());
                return Err(Problem::refused(format!(
                    "{} holds data up to {end}: {} would cut it off",
                    file.display(),
                    draw::size(size)
                ))
                .hint(format!(
                    "tenby disk resize {} {}      (the smallest size that keeps all)",
                    quoted(&file.display().to_string()),
                    end.next_multiple_of(sector)
                )));
            }
        }
        chain.resize(size).and_then(|()| chain.close()).map_err(|error| problem(&error))?;
        Ok(true)
    })
    .await?;
    if !complete {
        return Err(cancelled("the resize was cancelled; nothing was changed"));
    }
    info(&place)
}
