//! What goes wrong with images, for people: what happened to which file, and what to type next.

use super::shown;
use crate::draw;
use image::{Chain, Error, ErrorKind, RunKind};
use machine::plan::quoted;
use machine::request::Problem;
use std::path::Path;
use store::Store;

/// What went wrong with an image.
pub(super) fn problem(error: &Error) -> Problem {
    let file = shown(&error.file);
    let (name, cause) = (file.display(), error.source.as_deref());
    let text = match cause {
        Some(cause) if cause.kind == store::ErrorKind::WrongType => format!("{name} is {}", cause.detail),
        Some(cause) => format!("{name}: {}: {}", error.message, cause.detail),
        None => format!("{name}: {}", error.message),
    };
    match (error.kind, cause.map(|cause| cause.kind)) {
        (_, Some(store::ErrorKind::WrongType)) => Problem::damaged(text),
        // A lock is held by an open file, so all of a chain's are open. What the system grants has been asked for at the start.
        (_, Some(store::ErrorKind::TooManyFiles)) => Problem::failed(text)
            .hint("sudo prlimit --pid $$ --nofile=8192      (for this shell; a file for each layer)"),
        (ErrorKind::Unsigned, _) if verb_is(&["create", "merge", "reconnect", "check"]) => Problem::damaged(text),
        (ErrorKind::Unsigned, _) => Problem::damaged(text).hint(format!("{} --from raw      (if it is)", words())),
        (ErrorKind::Damaged, None) if !verb_is(&["check"]) && !is_empty(&file) => Problem::damaged(text).hint(format!(
            "tenby disk check {}      (what is wrong with it, and what can be mended)",
            quoted(&name.to_string())
        )),
        (ErrorKind::Damaged | ErrorKind::Unsupported | ErrorKind::Parent, _) => Problem::damaged(text),
        (ErrorKind::Invalid, _) => Problem::usage(text),
        (ErrorKind::Locked, _) => machine::mark::in_use(&file),
        (ErrorKind::Exists, _) => Problem::refused(text),
        (ErrorKind::NotFound, _) => Problem::not_found(format!("{name}: no such file")),
        (ErrorKind::NoSpace, _) => {
            let free = file.parent().and_then(free_space).map(|free| format!(" ({} left)", draw::size(free)));
            let detail = cause.map_or("no room", |cause| &cause.detail);
            Problem::failed(format!("{name}: {detail}{}", free.unwrap_or_default())).hint(FREE_SPACE)
        }
        _ => Problem::failed(text),
    }
}

const FREE_SPACE: &str = "free some space on that file system, then try again";

/// Whether one of these was typed.
fn verb_is(verbs: &[&str]) -> bool {
    std::env::args().skip(1).any(|word| verbs.contains(&&*word))
}

fn is_empty(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|data| data.len() == 0)
}

/// The command as it was typed, ready to be pasted.
pub(super) fn words() -> String {
    let words = std::env::args_os().skip(1).map(|word| quoted(&word.to_string_lossy()));
    std::iter::once("tenby".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// A new file that could not be begun, or not be given its name.
pub(super) fn unmade(error: store::Error, path: &Path) -> Problem {
    match error.kind {
        store::ErrorKind::Exists => Problem::refused(format!("{} exists already; nothing was changed", path.display())),
        _ => problem(&error.into()),
    }
}

/// What went wrong with a copy. If there was no room for it: how much is missing, as far as is known.
pub(super) fn copy_problem(error: &Error, source: &Chain, partial: &dyn Store, target: &Path) -> Problem {
    match data_bytes(source) {
        Ok(need) if error.kind == ErrorKind::NoSpace => no_room(need, partial, target),
        _ => problem(error),
    }
}

/// There was no room for a new file that is to take about `need` bytes, of which `partial` holds some.
pub(super) fn no_room(need: u64, partial: &dyn Store, target: &Path) -> Problem {
    let free = target.parent().and_then(free_space).unwrap_or(0);
    let missing = need.saturating_sub(partial.allocated().unwrap_or(0)).saturating_sub(free).max(1);
    let (file, missing, free) = (target.display(), draw::size(missing), draw::size(free));
    Problem::failed(format!("{file}: no room: about {missing} more is needed ({free} left)")).hint(FREE_SPACE)
}

/// Bytes of a disk that are not known to be zeros.
pub(super) fn data_bytes(chain: &Chain) -> Result<u64, Error> {
    let (mut at, mut bytes) = (0, 0);
    while at < chain.size() {
        for run in chain.runs(at, (1 << 30).min(chain.size() - at), 4096)? {
            at = run.offset + run.len;
            bytes += if run.kind == RunKind::Data { run.len } else { 0 };
        }
    }
    Ok(bytes)
}

/// Bytes that are left to us on the file system of a folder.
pub(super) fn free_space(folder: &Path) -> Option<u64> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let stat = rustix::fs::statvfs(folder).ok()?;
    Some(stat.f_bavail * stat.f_frsize)
}
