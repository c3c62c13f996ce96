//! Which file an image's parent may be, and whether a file is that parent.
//!
//! A path in an image is the word of whoever wrote the image. It is never opened as it stands: it may name one file *beside* the
//! child, and the ids decide whether that file is the parent.

use crate::layer::{Format, Layer, LayerInfo, ParentLink};
use crate::{Error, ErrorKind, Result, open};
use std::path::Path;
use std::sync::Arc;
use store::host::HostFolder;
use store::{Folder, Mode};

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
    let elsewhere = path.contains(['/', '\\', ':']) || path == ".." || path == ".";
    if elsewhere {
        return Err(format!("it names a parent outside of its own folder, {path:?}, which is never opened"));
    }
    if path.is_empty() || path.len() > MAX_NAME || path.chars().any(char::is_control) {
        return Err(format!("it names a parent that is no file name, {:?}", path.chars().take(64).collect::<String>()));
    }
    Ok(path.to_owned())
}

/// The names beside the child under which its parent may be found, the likeliest first.
///
/// A VHD often carries a full path of the machine that it was made on, and no other: its last part is a name like any other, since the
/// id decides.
pub(crate) fn parent_names(info: &LayerInfo, link: &ParentLink) -> std::result::Result<Vec<String>, String> {
    let first = parent_name(link);
    if info.format != Format::Vhd {
        return first.map(|name| vec![name]);
    }
    let last = link.absolute_path.as_deref().and_then(|path| path.rsplit(['\\', '/', ':']).next());
    let last = last.map(|name| parent_name(&ParentLink { relative_path: Some(name.to_owned()), ..link.clone() }));
    match (first, last) {
        (Ok(first), Some(Ok(last))) if first != last => Ok(vec![first, last]),
        (Ok(name), _) | (Err(_), Some(Ok(name))) => Ok(vec![name]),
        (Err(why), _) => Err(why),
    }
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

/// Opens an image of `folder` with all its parents, which must lie beside it: base first. The image itself is opened for `mode`,
/// the parents for reading.
///
/// # Errors
/// [`ErrorKind::Parent`] if a parent is missing, may not be opened, is another one or was changed, if an image is its own
/// ancestor, or if there are more than [`MAX_DEPTH`] layers; and those of [`open::open`].
pub fn open_chain(folder: &Arc<dyn Folder>, name: &str, mode: Mode) -> Result<Vec<Arc<dyn Layer>>> {
    open_chain_as(folder, name, None, mode)
}

/// [`open_chain`] for an image whose format is said: a raw file opens only so, and is its own base.
pub fn open_chain_as(
    folder: &Arc<dyn Folder>,
    name: &str,
    format: Option<Format>,
    mode: Mode,
) -> Result<Vec<Arc<dyn Layer>>> {
    open_some(folder, name, format, mode, usize::from(mode == Mode::Write))
}

/// [`open_chain`] with the image and its parent open for writing: for a merge.
pub fn open_to_merge(folder: &Arc<dyn Folder>, name: &str, format: Option<Format>) -> Result<Vec<Arc<dyn Layer>>> {
    open_some(folder, name, format, Mode::Write, 2)
}

/// Opens a chain; the image for `mode`, the first `writable` layers from it on for writing.
fn open_some(
    folder: &Arc<dyn Folder>,
    name: &str,
    format: Option<Format>,
    mode: Mode,
    writable: usize,
) -> Result<Vec<Arc<dyn Layer>>> {
    let mut layers = vec![open::open(folder.open(name, mode)?, format, mode)?];
    let mut names = vec![name.to_owned()];
    while let Some(link) = layers.last().and_then(|child| child.info().parent) {
        let child = layers.last().expect("there is the leaf");
        let refuse = |message: String| Error::new(ErrorKind::Parent, child.store().name(), message);
        if layers.len() == MAX_DEPTH {
            return Err(refuse(format!("it stands on more than {MAX_DEPTH} layers")));
        }
        let wanted = parent_names(&child.info(), &link).map_err(refuse)?;
        let found = wanted.iter().map(|name| find(&**folder, name)).find_map(Result::transpose);
        let name = found.unwrap_or_else(|| Err(refuse(format!("its parent {} is missing", wanted[0]))))?;
        if names.contains(&name) {
            return Err(refuse(format!("it is its own ancestor, by {name}")));
        }
        let mode = if layers.len() < writable { Mode::Write } else { Mode::Read };
        let parent = open::open(folder.open(&name, mode)?, None, mode)?;
        check_link(&**child, &*parent)?;
        names.push(name);
        layers.push(parent);
    }
    layers.reverse();
    Ok(layers)
}

/// Opens the image at `path` with its parents, base first; see [`open_chain_as`]. Only the image's own folder is looked into.
pub fn open_path(path: &Path, format: Option<Format>, mode: Mode) -> Result<Vec<Arc<dyn Layer>>> {
    let (folder, name) = HostFolder::holding(path)?;
    let folder: Arc<dyn Folder> = Arc::new(folder);
    open_chain_as(&folder, &name, format, mode)
}

/// The file of this name in the folder; if there is none, the only one whose name differs in upper and lower case alone, for names
/// that were written on Windows.
pub fn find(folder: &dyn Folder, name: &str) -> Result<Option<String>> {
    let all = folder.list()?;
    if all.iter().any(|found| found == name) {
        return Ok(Some(name.to_owned()));
    }
    let lower = name.to_lowercase();
    let mut alike = all.into_iter().filter(|found| found.to_lowercase() == lower);
    Ok(alike.next().filter(|_| alike.next().is_none()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

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
