//! `disk merge`: a child into its own parent.

use super::place::{Child, Neighbours, chain_problem, told};
use super::problem::{free_space, problem, words};
use super::{Place, edit, shown};
use crate::draw;
use crate::out::Out;
use crate::session::cancelled;
use crate::work::interruptible;
use image::ErrorKind;
use image::layer::{Layer, ParentLink};
use image::merge::{self, FoldError, Outcome};
use image::siblings::file_name;
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
    /// What stands on the child, open for writing, and its name for people.
    children: Vec<(Arc<dyn Layer>, String)>,
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
pub(crate) async fn merge(place: Place, out: &Out) -> Result<Merged, Problem> {
    edit::check_owner(&place.path, out).await?;
    let neighbours = place.neighbours()?;
    let pair = open(&place, &neighbours, out).await?;
    edit::tell_unread(&neighbours, out);
    let (parent_name, parent_file) = (file_name(pair.parent()), shown(&pair.parent().store().name()));
    let names = pair.children.iter().map(|(_, told)| told.clone()).collect();
    let bytes = estimate(&pair, &parent_file, &place.path, out)?;
    let what = format!("merging {}", place.path.display());
    let outcome = interruptible(out, what, move |progress| fold(&pair, &parent_name, progress)).await?;
    if outcome == Outcome::Cancelled {
        let message = "the merge was cancelled; nothing is lost, and the child is to be used as before";
        return Err(cancelled(message).hint(format!("{}      (goes on)", words())));
    }
    let (folder, name) = place.folder()?;
    folder.unlink(&name).and_then(|()| folder.sync()).map_err(|error| problem(&error.into()))?;
    Ok(Merged { file: parent_file, removed: place.path, bytes, children: names })
}

/// Opens all that a merge changes, or says why it must not.
async fn open(place: &Place, neighbours: &Neighbours, out: &Out) -> Result<Pair, Problem> {
    let file = place.path.display().to_string();
    let (folder, name) = place.folder()?;
    let layers = place.parents.gate().open_to_merge(&folder, &name, place.format);
    let layers = layers.map_err(|error| chain_problem(&error))?;
    let [.., parent, leaf] = layers.as_slice() else {
        return Err(Problem::refused(format!("{file} stands on nothing: there is nothing to merge it into")));
    };
    edit::check_owner(Path::new(&parent.store().name()), out).await?;
    let mut upper = neighbours.children(&**leaf);
    upper.retain(|child| child.file() != parent.store().name());
    // What stands on the child may name the parent by its id already, if this merge was cut off near its end.
    let is_upper = |other: &Child<'_>| upper.iter().any(|child| child.names(&name) && child.file() == other.file());
    let mut others = neighbours.children(&**parent);
    others.retain(|other| other.file() != leaf.store().name() && !is_upper(other));
    if !others.is_empty() {
        let (names, parent) = (told(&others), file_name(parent));
        let new = place.path.with_extension("new.vhdx").display().to_string();
        return Err(Problem::refused(format!("{names} stands on {parent}, too, and would be lost")).hint(format!(
            "tenby disk merge {} --into {}",
            quoted(&file),
            quoted(&new)
        )));
    }
    let mut children = Vec::new();
    for child in upper {
        let store = child.folder.open(&child.image.name, Mode::Write).map_err(|error| problem(&error.into()))?;
        let layer = image::open(store, None, Mode::Write).map_err(|error| problem(&error))?;
        children.push((layer, child.to_string()));
    }
    Ok(Pair { layers, children })
}

/// Says how much there is to do before anything is done.
fn estimate(pair: &Pair, parent: &Path, child: &Path, out: &Out) -> Result<u64, Problem> {
    let layers = [Arc::clone(pair.parent()), Arc::clone(pair.child())];
    let bytes = merge::plan(None, &layers).map_err(|error| problem(&error))?.bytes();
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
        let folded = merge::move_down(None, &pair.layers, room, uuid::Uuid::new_v4(), &mut told, commit);
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
    for (child, _) in &pair.children {
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
