//! Who may change an image file, and what keeps them from it.

use super::Place;
use super::place::{Neighbours, told};
use crate::draw;
use crate::out::Out;
use crate::session::{Reader, Session};
use image::Layer;
use jiff::Timestamp;
use machine::mark::Owner;
use machine::plan::quoted;
use machine::request::Problem;
use machine::tree::State;
use std::fs::canonicalize;
use std::path::Path;

/// Refuses a file that a machine owns, and says what the machine has still to do with its files.
pub(super) async fn check_owner(path: &Path, out: &Out) -> Result<(), Problem> {
    let Some(Owner { root, machine }) = machine::mark::owner(path) else { return Ok(()) };
    let (file, name) = (path.display(), &machine.name);
    let session = Session { root, out: out.clone() };
    let pending = match session.reader(&machine).await {
        Ok(reader) => pending(&reader).await,
        // It owns the file all the same.
        Err(_) => None,
    };
    Err(match pending {
        None => Problem::refused(format!("{file} belongs to the machine {name}"))
            .hint(format!("tenby vm show {}", quoted(name))),
        Some(pending) => Problem::refused(format!("{file} belongs to the machine {name}; {pending}"))
            .hint(format!("tenby job list {}", quoted(name))),
    })
}

/// Refuses to read what a machine is writing just now. In a machine's folder nothing is locked but the folder itself.
pub(super) async fn check_still(path: &Path, out: &Out) -> Result<(), Problem> {
    let Some(Owner { root, machine }) = machine::mark::owner(path) else { return Ok(()) };
    let session = Session { root, out: out.clone() };
    // Without a worker nobody writes; and what cannot be asked must not keep anybody from saving a disk.
    let Ok(reader @ Reader::Worker { .. }) = session.reader(&machine).await else { return Ok(()) };
    let Ok(view) = reader.view().await else { return Ok(()) };
    let (file, name) = (path.display(), &machine.name);
    if view.doing.iter().any(|what| what == "merging") {
        return Err(Problem::refused(format!("{file} belongs to the machine {name}, which merges its files just now"))
            .hint(format!("tenby job list {}", quoted(name))));
    }
    let own = canonicalize(path).ok();
    let files = view.disks.iter().map(|disk| &disk.file).chain(view.variables.iter().map(|kept| &kept.file));
    let written = files.into_iter().any(|file| canonicalize(file).ok() == own);
    if written && !matches!(view.state, State::Off | State::Saved) {
        return Err(Problem::refused(format!(
            "{file} is being written: the machine {name} is {}",
            draw::state_word(view.state)
        ))
        .hint(format!("tenby snapshot create {}      (then this file changes no more)", quoted(name))));
    }
    Ok(())
}

/// The merge that a machine has under way, or those that it has still to do, and how long that takes.
async fn pending(reader: &Reader) -> Option<String> {
    let jobs = reader.jobs().await.unwrap_or_default();
    if let Some(job) = jobs.iter().find(|job| job.kind == "merge" && !job.state.ended()) {
        return Some(draw::job_line(job, Timestamp::now()));
    }
    let mut pending = reader.tree().await.ok()?.pending;
    pending.retain(|pending| pending.kind == "merge");
    let ms = pending.iter().filter_map(|merge| merge.estimated_ms).sum();
    Some(format!("{} pending, about {}", draw::pending(&pending)?, draw::duration(ms)))
}

/// Refuses to change an image on which another one stands.
pub(super) fn check_leaf(place: &Place, layer: &dyn Layer, out: &Out) -> Result<(), Problem> {
    let neighbours = place.neighbours()?;
    tell_unread(&neighbours, out);
    let children = neighbours.children(layer);
    let Some(first) = children.first() else { return Ok(()) };
    let first = quoted(&first.path().display().to_string());
    Err(Problem::refused(format!("{} stands on {}, which must not change", told(&children), place.path.display()))
        .hint(format!("tenby disk merge {first}")))
}

/// Says which files could not be asked what they stand on.
pub(super) fn tell_unread(neighbours: &Neighbours, out: &Out) {
    for name in neighbours.unread() {
        out.note(&format!("{name} cannot be read: whether it stands on another image is not known"));
    }
}
