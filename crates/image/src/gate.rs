//! Which file an image's parent may be, and whether a file is that parent.
//!
//! A path in an image is the word of whoever wrote the image. It is never opened as it stands: it is good for a *name*, which is
//! looked up beside the child and in the folders that the user has named ([`Gate`]), and the ids decide whether the file of that name
//! is the parent.

use crate::layer::{Format, Layer, LayerInfo, ParentLink};
use crate::{Error, ErrorKind, Result, open};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use store::host::HostFolder;
use store::{Folder, Mode, Store};
use uuid::Uuid;

/// The deepest chain, in layers.
pub const MAX_DEPTH: usize = 4096;
/// The longest name that a file can have on Linux, in bytes.
const MAX_NAME: usize = 255;

/// The name beside the child under which an image's parent is to be looked up.
///
/// `Err` says why what the image names may not be opened: it lies elsewhere (an absolute path, `..`, a share, a device), or it is
/// no name of a file.
pub fn parent_name(link: &ParentLink) -> std::result::Result<String, String> {
    let path = link.relative_path.as_deref().ok_or("it does not say its parent's name beside it")?;
    let mut path = path;
    // Windows writes `.\name`.
    while let Some(rest) = path.strip_prefix(".\\").or_else(|| path.strip_prefix("./")) {
        path = rest;
    }
    if path.contains(SEPARATORS) || path == ".." || path == "." {
        return Err(format!("it names a parent outside of its own folder, {path:?}, which is never opened"));
    }
    if path.is_empty() || path.len() > MAX_NAME || path.chars().any(char::is_control) {
        return Err(format!("it names a parent that is no file name, {:?}", path.chars().take(64).collect::<String>()));
    }
    Ok(path.to_owned())
}

/// What a path has between its parts, on Windows and here.
const SEPARATORS: [char; 3] = ['\\', '/', ':'];

/// The last part of a path, if it is the name of a file.
fn last_part(path: &str) -> Option<String> {
    let name = path.rsplit(SEPARATORS).next().map(str::to_owned);
    parent_name(&ParentLink { linkage: Uuid::nil(), linkage2: None, relative_path: name, absolute_path: None }).ok()
}

/// The names beside the child under which its parent may be found, the likeliest first.
///
/// A VHD often carries a full path of the machine that it was made on, and no other: its last part is a name like any other, since the
/// id decides.
pub(crate) fn parent_names(info: &LayerInfo, link: &ParentLink) -> std::result::Result<Vec<String>, String> {
    let first = parent_name(link);
    let last = link.absolute_path.as_deref().filter(|_| info.format == Format::Vhd).and_then(last_part);
    match (first, last) {
        (Ok(first), Some(last)) if first != last => Ok(vec![first, last]),
        (Ok(name), _) | (Err(_), Some(name)) => Ok(vec![name]),
        (Err(why), None) => Err(why),
    }
}

/// The names under which the parent may be found in a folder that the user has named for it: there, wherever the image says that it lies,
/// the last part of that is a name.
fn names_elsewhere(link: &ParentLink) -> Vec<String> {
    let mut names: Vec<String> =
        [&link.relative_path, &link.absolute_path].into_iter().flatten().filter_map(|path| last_part(path)).collect();
    names.dedup();
    names
}

/// Checks that `parent` is what `child` says that its parent is: the same content (by id) and the same sectors.
///
/// A raw parent has no id, and passes: what says that it is the one, and unchanged, is not in the images then, but with whoever opens
/// it as the parent (the ledger). What stood on a layer that was folded into it still names that layer.
pub fn check_link(child: &dyn Layer, parent: &dyn Layer) -> Result<()> {
    let (info, parent_info) = (child.info(), parent.info());
    let (file, parent_file) = (child.store().name(), parent.store().name());
    let refuse = |message: String| Err(Error::new(ErrorKind::Parent, file.clone(), message));
    let Some(link) = info.parent else {
        return refuse(format!("it is no differencing image and cannot stand on {parent_file}"));
    };
    if info.sector_size != parent_info.sector_size {
        let (own, other) = (info.sector_size, parent_info.sector_size);
        return refuse(format!("it has sectors of {own} bytes, but {parent_file} has sectors of {other}"));
    }
    let id = parent_info.data_id;
    if parent_info.format == Format::Raw || link.linkage == id || link.linkage2 == Some(id) {
        return Ok(());
    }
    refuse(format!(
        "{parent_file} is not the parent that it was made over, or was changed since: its id is {id}, not {}",
        link.linkage
    ))
}

/// Opens images with their parents. A parent is looked for beside its child, then in the folders that the user has named.
///
/// ```text
///   child ──► "base.vhdx" ──► beside it? ──► in a named folder? ──► in the next?      the first one whose id fits
/// ```
#[derive(Debug, Clone, Default)]
pub struct Gate {
    named: Vec<Arc<dyn Folder>>,
}

impl Gate {
    /// A gate that looks into these folders, in this order, after the child's own. The default one looks nowhere else.
    pub fn new(named: Vec<Arc<dyn Folder>>) -> Self {
        Self { named }
    }

    /// Opens the image `name` of `folder` with all its parents, base first. The image is opened for `mode`, its parents for reading. Its
    /// format is what its signature says, or what is said here: a raw file opens only so, and is its own base.
    ///
    /// # Errors
    /// [`ErrorKind::Parent`] if a parent is nowhere that it may be, may not be opened, is another one or was changed, if an image is its
    /// own ancestor, or if there are more than [`MAX_DEPTH`] layers; and those of [`open::open`].
    pub fn open(
        &self,
        folder: &Arc<dyn Folder>,
        name: &str,
        format: Option<Format>,
        mode: Mode,
    ) -> Result<Vec<Arc<dyn Layer>>> {
        self.open_some(folder, name, format, usize::from(mode == Mode::Write))
    }

    /// [`Gate::open`] of the image at `path`.
    pub fn open_path(&self, path: &Path, format: Option<Format>, mode: Mode) -> Result<Vec<Arc<dyn Layer>>> {
        let (folder, name) = HostFolder::holding(path)?;
        let folder: Arc<dyn Folder> = Arc::new(folder);
        self.open(&folder, &name, format, mode)
    }

    /// [`Gate::open`] with the image and its parent open for writing: for a merge.
    pub fn open_to_merge(
        &self,
        folder: &Arc<dyn Folder>,
        name: &str,
        format: Option<Format>,
    ) -> Result<Vec<Arc<dyn Layer>>> {
        self.open_some(folder, name, format, 2)
    }

    /// Whether an image can have a child: with it the chain has no more than [`MAX_DEPTH`] layers.
    ///
    /// A chain lies in these folders and has no more layers than they have files: mostly their lists say enough, and nothing is opened.
    pub fn has_room(&self, folder: &Arc<dyn Folder>, name: &str) -> Result<bool> {
        let mut files = 0;
        for folder in std::iter::once(folder).chain(&self.named) {
            files += folder.list()?.len();
        }
        Ok(files < MAX_DEPTH || self.open(folder, name, None, Mode::Read)?.len() < MAX_DEPTH)
    }

    /// Opens a chain; the image itself and those below it, `writable` in all, for writing.
    fn open_some(
        &self,
        own: &Arc<dyn Folder>,
        name: &str,
        format: Option<Format>,
        writable: usize,
    ) -> Result<Vec<Arc<dyn Layer>>> {
        let mode = |depth: usize| if depth < writable { Mode::Write } else { Mode::Read };
        let mut layers = vec![open::open(own.open(name, mode(0))?, format, mode(0))?];
        let mut search = Search {
            folders: std::iter::once(own).chain(&self.named).map(|folder| &**folder).collect(),
            at: 0,
            seen: HashSet::from([(0, name.to_owned())]),
        };
        while let Some(link) = layers.last().and_then(|child| child.info().parent) {
            let child = layers.last().expect("there is the leaf");
            if layers.len() == MAX_DEPTH {
                return Err(refused(
                    &*layers[0],
                    format!("it stands on more than the {} layers that a chain may have", MAX_DEPTH - 1),
                ));
            }
            let parent = search.parent(&**child, &link, mode(layers.len()))?;
            layers.push(parent);
        }
        layers.reverse();
        Ok(layers)
    }
}

/// The way down a chain.
struct Search<'a> {
    /// Where its files may lie: the leaf's own folder, then those that were named.
    folders: Vec<&'a dyn Folder>,
    /// The folder in which the last one was found.
    at: usize,
    /// All that were found: folder and name.
    seen: HashSet<(usize, String)>,
}

impl Search<'_> {
    /// The first file that may be the parent and is it.
    fn parent(&mut self, child: &dyn Layer, link: &ParentLink, mode: Mode) -> Result<Arc<dyn Layer>> {
        let beside = parent_names(&child.info(), link);
        let named =
            (1..self.folders.len()).flat_map(|at| names_elsewhere(link).into_iter().map(move |name| (at, name)));
        let places: Vec<_> = beside.iter().flatten().map(|name| (self.at, name.clone())).chain(named).collect();
        let mut unfit = None;
        for (at, name) in places {
            match self.try_place(at, &name, child, mode) {
                Ok(Some(parent)) => return Ok(parent),
                Ok(None) => {}
                // What lies nearest says most about what is wrong.
                Err(error) => unfit = unfit.or(Some(error)),
            }
        }
        let nor_there = if self.folders.len() > 1 { ", nor in the folders that were named" } else { "" };
        Err(unfit.unwrap_or_else(|| match beside {
            Ok(names) => refused(child, format!("its parent {} is not beside it{nor_there}", names[0])),
            Err(why) => refused(child, why),
        }))
    }

    /// The parent, if the folder has a file of this name. It is an error if that is not the parent.
    fn try_place(&mut self, at: usize, name: &str, child: &dyn Layer, mode: Mode) -> Result<Option<Arc<dyn Layer>>> {
        let found = open_named(self.folders[at], name, mode).map_err(|error| match &error.source {
            Some(what) if what.kind == store::ErrorKind::WrongType => {
                refused(child, format!("its parent {name} is {}", what.detail))
            }
            _ => error,
        });
        let Some((name, store)) = found? else { return Ok(None) };
        if self.seen.contains(&(at, name.clone())) {
            return Err(refused(child, format!("it is its own ancestor, by {name}")));
        }
        if mode == Mode::Write {
            // What is not the parent is not to be changed, not even by a replay of its log.
            check_link(child, &*open::open_unlocked(self.folders[at].open(&name, Mode::Read)?, None, Mode::Read)?)?;
        }
        let parent = open::open(store, None, mode)?;
        check_link(child, &*parent)?;
        self.at = at;
        self.seen.insert((at, name));
        Ok(Some(parent))
    }
}

fn refused(child: &dyn Layer, message: String) -> Error {
    Error::new(ErrorKind::Parent, child.store().name(), message)
}

/// Opens the file of this name; if there is none, the only one whose name differs in upper and lower case alone, for names that were
/// written on Windows. `None` if there is neither.
fn open_named(folder: &dyn Folder, name: &str, mode: Mode) -> Result<Option<(String, Arc<dyn Store>)>> {
    match folder.open(name, mode) {
        Err(error) if error.kind == store::ErrorKind::NotFound => {}
        opened => return Ok(Some((name.to_owned(), opened?))),
    }
    let lower = name.to_lowercase();
    let mut alike = folder.list()?.into_iter().filter(|found| found.to_lowercase() == lower);
    match (alike.next(), alike.next()) {
        (Some(only), None) => Ok(Some((only.clone(), folder.open(&only, mode)?))),
        _ => Ok(None),
    }
}

/// [`Gate::open`] through the default gate: all parents must lie beside the image.
pub fn open_chain(folder: &Arc<dyn Folder>, name: &str, mode: Mode) -> Result<Vec<Arc<dyn Layer>>> {
    Gate::default().open(folder, name, None, mode)
}

/// [`Gate::open_path`] through the default gate: all parents must lie beside the image.
pub fn open_path(path: &Path, format: Option<Format>, mode: Mode) -> Result<Vec<Arc<dyn Layer>>> {
    Gate::default().open_path(path, format, mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(path: &str) -> std::result::Result<String, String> {
        let link = ParentLink {
            linkage: Uuid::nil(),
            linkage2: None,
            relative_path: Some(path.to_owned()),
            absolute_path: Some(r"C:\other.vhdx".to_owned()),
        };
        parent_name(&link)
    }

    #[test]
    fn a_parent_is_named_beside_the_child_or_not_at_all() {
        for path in [r".\base.vhdx", "base.vhdx", "./base.vhdx", r".\.\base.vhdx"] {
            assert_eq!(named(path).as_deref(), Ok("base.vhdx"), "{path}");
        }
        let outside = [
            r"..\base.vhdx",
            "../base.vhdx",
            r".\..\base.vhdx",
            r"sub\base.vhdx",
            "/etc/passwd",
            r"C:\base.vhdx",
            "C:base.vhdx",
            r"\\server\share\base.vhdx",
            r"\\?\C:\base.vhdx",
            r"\\.\PhysicalDrive0",
            "..",
            ".",
            "",
            r".\",
            "a\0b",
            "line\nbreak",
        ];
        for path in outside {
            assert!(named(path).is_err(), "{path:?}");
        }
        assert!(named(&"x".repeat(256)).is_err());
    }
}
