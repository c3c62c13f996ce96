//! Who may change an image file, and what keeps them from it.

use super::{Place, free_space, problem};
use crate::draw;
use crate::out::Out;
use image::siblings::Siblings;
use image::{Chain, Error, ErrorKind, Layer, RunKind};
use machine::request::Problem;
use std::path::Path;
use std::sync::Arc;
use store::Store;
use store::host::HostFolder;

/// Refuses a file that a machine owns.
pub(super) fn check_owner(path: &Path) -> Result<(), Problem> {
    match machine::mark::owner(path) {
        None => Ok(()),
        Some(name) => Err(Problem::refused(format!("{} belongs to the machine {name}", path.display()))
            .hint(format!("tenby vm show {}", machine::plan::quoted(&name)))),
    }
}

/// The folder that holds a file, its name there, and the images in it.
pub(super) fn surroundings(path: &Path) -> Result<(HostFolder, String, Siblings), Problem> {
    let (folder, name) = HostFolder::holding(path).map_err(|error| problem(&error.into()))?;
    let siblings = Siblings::of(&folder).map_err(|error| problem(&error))?;
    Ok((folder, name, siblings))
}

/// Refuses to change an image that a machine owns, or on which another one stands.
pub(super) fn check_leaf(place: &Place, layer: &Arc<dyn Layer>, out: &Out) -> Result<(), Problem> {
    check_owner(&place.path)?;
    let (_, name, siblings) = surroundings(&place.path)?;
    tell_unread(&siblings, out);
    let children: Vec<_> = siblings.children(&name, layer.info().data_id).map(|child| child.name.as_str()).collect();
    match children.as_slice() {
        [] => Ok(()),
        [first, ..] => {
            let child = place.path.with_file_name(first).display().to_string();
            Err(Problem::refused(format!("{} stands on {}, which must not change", children.join(", "), name))
                .hint(format!("tenby disk merge {}", machine::plan::quoted(&child))))
        }
    }
}

/// Says which files could not be asked what they stand on.
pub(super) fn tell_unread(siblings: &Siblings, out: &Out) {
    for name in &siblings.unread {
        out.note(&format!("{name} cannot be read: whether it stands on another image is not known"));
    }
}

/// What went wrong with a copy. If there was no room for it: how much is missing, as far as is known.
pub(super) fn copy_problem(error: &Error, source: &Chain, partial: &dyn Store, target: &Path) -> Problem {
    let missing = |need: u64| {
        let free = target.parent().and_then(free_space)?;
        Some((need.saturating_sub(partial.allocated().ok()?).saturating_sub(free).max(1), free))
    };
    let problem = problem(error);
    match data_bytes(source).ok().filter(|_| error.kind == ErrorKind::NoSpace).and_then(missing) {
        None => problem,
        Some((missing, free)) => {
            let (missing, free) = (draw::size(missing), draw::size(free));
            let file = target.display();
            Problem { message: format!("{file}: no room: about {missing} more is needed ({free} left)"), ..problem }
        }
    }
}

/// Bytes of a disk that are not known to be zeros.
fn data_bytes(chain: &Chain) -> Result<u64, Error> {
    let (mut at, mut bytes) = (0, 0);
    while at < chain.size() {
        for run in chain.runs(at, (1 << 30).min(chain.size() - at), 4096)? {
            at = run.offset + run.len;
            bytes += if run.kind == RunKind::Data { run.len } else { 0 };
        }
    }
    Ok(bytes)
}
