//! Who may change an image file, and what keeps them from it.

use super::place::{Neighbours, told};
use super::{Place, free_space, problem};
use crate::draw;
use crate::out::Out;
use crate::session::{Reader, Session};
use image::{Chain, Error, ErrorKind, Layer, RunKind};
use jiff::Timestamp;
use machine::mark::Owner;
use machine::plan::quoted;
use machine::request::Problem;
use std::path::Path;
use store::Store;

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

/// A file that somebody has locked: who, and what to do.
pub(super) fn in_use(file: &Path) -> Problem {
    if let Some(owner) = machine::mark::owner(file) {
        let name = owner.machine.name;
        return Problem::refused(format!("{} is in use: the machine {name} has it open", file.display()))
            .hint(format!("tenby vm show {}", quoted(&name)));
    }
    let holders = store::host::holders(file);
    let told: Vec<_> = holders.iter().map(|holder| format!("process {} ({})", holder.pid, holder.program)).collect();
    match holders.first() {
        Some(first) => Problem::refused(format!("{} is in use by {}", file.display(), told.join(", ")))
            .hint(format!("ps -fp {}      (what it does; wait for it, or end it)", first.pid)),
        None => Problem::refused(format!("{} is in use by another process", file.display()))
            .hint(format!("fuser -v {}      (who has it open)", quoted(&file.display().to_string()))),
    }
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
