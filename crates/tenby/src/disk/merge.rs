//! `disk merge`: a child into its own parent.

use super::{Place, edit, free_space, interruptible, problem, shown, words};
use crate::draw;
use crate::out::Out;
use crate::session::cancelled;
use image::layer::{Layer, ParentLink};
use image::merge::{self, FoldError, Outcome};
use image::siblings::{Siblings, file_name};
use image::{ErrorKind, gate};
use machine::plan::quoted;
use machine::request::Problem;
use serde::Serialize;
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::{Folder, Mode};

/// What a merge has done.
#[derive(Debug, Serialize)]
pub(crate) struct Merged {
    /// The parent, which holds all now.
    pub(crate) file: PathBuf,
    /// The child, which is gone.
    pub(crate) removed: PathBuf,
    /// Bytes that were copied.
    bytes: u64,
    /// What stood on the child and stands on the parent now.
    children: Vec<String>,
}

/// The layers of a merge, locked.
struct Pair {
    /// Base first; the last two are child and parent.
    layers: Vec<Arc<dyn Layer>>,
    /// What stands on the child, open for writing.
    children: Vec<Arc<dyn Layer>>,
}

impl Pair {
    fn child(&self) -> &Arc<dyn Layer> {
        &self.layers[self.layers.len() - 1]
    }

    fn parent(&self) -> &Arc<dyn Layer> {
        &self.layers[self.layers.len() - 2]
    }
}

/// Merges a child into its parent, and removes it.
pub(crate) async fn merge(child: &Path, out: &Out) -> Result<Merged, Problem> {
    let place = Place::of(child, None)?;
    edit::check_owner(child)?;
    let (folder, name, siblings) = edit::surroundings(child)?;
    let folder: Arc<dyn Folder> = Arc::new(folder);
    let pair = open(&folder, &name, &siblings, &place)?;
    edit::tell_unread(&siblings, out);
    let (parent_name, parent_file) = (file_name(pair.parent()), shown(&pair.parent().store().name()));
    let names: Vec<_> = pair.children.iter().map(file_name).collect();
    let bytes = estimate(&pair, &parent_file, child, out)?;
    let what = format!("merging {}", child.display());
    let outcome = interruptible(out, what, move |progress| fold(&pair, &parent_name, progress)).await?;
    if outcome == Outcome::Cancelled {
        let message = "the merge was cancelled; nothing is lost, and the child is to be used as before";
        return Err(cancelled(message).hint(format!("{}      (goes on)", words())));
    }
    folder.unlink(&name).and_then(|()| folder.sync()).map_err(|error| problem(&error.into()))?;
    Ok(Merged { file: parent_file, removed: child.to_owned(), bytes, children: names })
}

/// Opens all that a merge changes, or says why it must not.
fn open(folder: &Arc<dyn Folder>, name: &str, siblings: &Siblings, place: &Place) -> Result<Pair, Problem> {
    let child = &place.path;
    let layers = gate::open_to_merge(folder, name, place.format).map_err(|error| problem(&error))?;
    let [.., parent, leaf] = layers.as_slice() else {
        return Err(Problem::refused(format!(
            "{} stands on nothing: there is nothing to merge it into",
            child.display()
        )));
    };
    edit::check_owner(Path::new(&parent.store().name()))?;
    let parent_name = file_name(parent);
    let others: Vec<_> = siblings
        .children(&parent_name, parent.info().data_id)
        .map(|other| other.name.as_str())
        // What stands on the child may name the parent by its id already, if this merge was cut off near its end.
        .filter(|other| *other != name && !stands_on(siblings, other, name))
        .collect();
    if !others.is_empty() {
        let (child, new) = (child.display().to_string(), child.with_extension("new.vhdx").display().to_string());
        return Err(Problem::refused(format!("{} stands on {parent_name}, too, and would be lost", others.join(", ")))
            .hint(format!("tenby disk merge {} --into {}", quoted(&child), quoted(&new))));
    }
    let mut children = Vec::new();
    for other in siblings.children(name, leaf.info().data_id).filter(|other| other.name != parent_name) {
        let store = folder.open(&other.name, Mode::Write).map_err(|error| problem(&error.into()))?;
        children.push(image::open(store, None, Mode::Write).map_err(|error| problem(&error))?);
    }
    Ok(Pair { layers, children })
}

/// Whether an image names this file as its parent.
fn stands_on(siblings: &Siblings, other: &str, name: &str) -> bool {
    let link = siblings.images.iter().find(|image| image.name == other).and_then(|image| image.info.parent.as_ref());
    link.and_then(|link| gate::parent_name(link).ok()).is_some_and(|parent| parent.eq_ignore_ascii_case(name))
}

/// Says how much there is to do before anything is done.
fn estimate(pair: &Pair, parent: &Path, child: &Path, out: &Out) -> Result<u64, Problem> {
    let bytes = merge::plan(pair.child(), pair.parent()).map_err(|error| problem(&error))?;
    let free = parent.parent().and_then(free_space);
    let free = free.map(|free| format!(" ({} is free)", draw::size(free))).unwrap_or_default();
    out.note(&format!(
        "{} to copy from {} into {}; space is given back as it goes{free}",
        draw::size(bytes),
        child.display(),
        parent.display()
    ));
    Ok(bytes)
}

fn fold(pair: &Pair, parent_name: &str, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<Outcome, Problem> {
    let id = pair.parent().info().data_id;
    // The parent has the child's id once it holds all that the child held: a merge that was cut off behind that.
    if id.is_nil() || id != pair.child().info().data_id {
        let mut told = |now: merge::Progress| match progress(now.done, now.total) {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        };
        let commit = || Ok::<_, Infallible>(());
        // Others may take some of it meanwhile.
        let room = folder_of(pair.parent()).and_then(|folder| free_space(&folder)).map_or(u64::MAX, |free| free / 4);
        let folded = merge::move_down(&pair.layers, room, uuid::Uuid::new_v4(), &mut told, commit);
        let outcome = folded.map_err(|error| match error {
            FoldError::Image(error) if error.kind == ErrorKind::NoSpace => {
                problem(&error).hint(format!("free some space, then go on: {}", words()))
            }
            FoldError::Image(error) => problem(&error),
            FoldError::Commit(never) => match never {},
        })?;
        if outcome == Outcome::Cancelled {
            pair.parent().close().and_then(|()| pair.child().close()).map_err(|error| problem(&error))?;
            return Ok(outcome);
        }
    }
    pair.parent().close().map_err(|error| problem(&error))?;
    for child in &pair.children {
        rename_parent(child, parent_name).map_err(|error| problem(&error))?;
    }
    Ok(Outcome::Folded)
}

fn folder_of(layer: &Arc<dyn Layer>) -> Option<PathBuf> {
    Path::new(&layer.store().name()).parent().map(Path::to_owned)
}

/// What stood on the child finds the parent under another name; the id is the child's.
fn rename_parent(child: &Arc<dyn Layer>, name: &str) -> image::Result<()> {
    let Some(link) = child.info().parent else { return Ok(()) };
    let link = ParentLink { relative_path: Some(format!(r".\{name}")), absolute_path: None, ..link };
    child.relink(None, Some(link))?;
    child.close()
}
