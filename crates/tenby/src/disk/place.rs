//! Where images lie: the file that was named, the folders in which its parents may be, and who else is there.

use super::problem::{problem, words};
use super::{holding, shown};
use image::gate::Gate;
use image::siblings::{Sibling, Siblings};
use image::{Access, Chain, Error, ErrorKind, Format, Layer, gate};
use machine::plan::quoted;
use machine::request::Problem;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::host::HostFolder;
use store::{Folder, Mode};

/// The folders that were named for parents.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parents(Vec<Arc<HostFolder>>);

impl Parents {
    /// Opens the folders.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self, Problem> {
        let open = |path: &PathBuf| HostFolder::open(path).map(Arc::new).map_err(|error| problem(&error.into()));
        paths.iter().map(open).collect::<Result<_, _>>().map(Self)
    }

    /// What looks into them.
    pub(super) fn gate(&self) -> Gate {
        Gate::new(self.0.iter().map(|folder| Arc::<HostFolder>::clone(folder) as Arc<dyn Folder>).collect())
    }

    /// Whether this folder is one of them.
    pub(super) fn has(&self, folder: &HostFolder) -> bool {
        self.0.iter().any(|named| named.is(folder))
    }
}

/// An image that is there, the format that it is to be read as, and where its parents may lie.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(super) path: PathBuf,
    pub(super) format: Option<Format>,
    pub(super) parents: Parents,
}

impl Place {
    /// The image at `path`. Its format is what was said, else raw for a name that ends in `.raw`, else what its signature says.
    /// Formats that are not read yet are refused here.
    pub(crate) fn of(path: &Path, said: Option<Format>, parents: Parents) -> Result<Self, Problem> {
        let raw = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("raw"));
        let format = said.or(raw.then_some(Format::Raw));
        let store = store::host::open_file(path, Mode::Read).map_err(|error| problem(&error.into()))?;
        match image::open::probe(&*store).map_err(|error| problem(&error))? {
            Some(image::open::Signature::Foreign("qcow2")) if format != Some(Format::Raw) => {
                let (file, new) = (path.display(), path.with_extension("vhdx"));
                let words = [quoted(&file.to_string()), quoted(&new.display().to_string())].join(" ");
                Err(Problem::refused(format!("{file} is a qcow2 image, which can only be converted"))
                    .hint(format!("tenby disk convert {words}")))
            }
            _ => Ok(Self { path: path.to_owned(), format, parents }),
        }
    }

    /// The folder that the image lies in, and its name there.
    pub(super) fn folder(&self) -> Result<(Arc<dyn Folder>, String), Problem> {
        let (folder, name) = holding(&self.path)?;
        Ok((Arc::new(folder), name))
    }

    /// The image alone, without its parents.
    pub(super) fn alone(&self, mode: Mode) -> Result<Arc<dyn Layer>, Problem> {
        let store = store::host::open_file(&self.path, mode).map_err(|error| problem(&error.into()))?;
        image::open(store, self.format, mode).map_err(|error| problem(&error))
    }

    /// The image with its parents, base first.
    pub(super) fn layers(&self, mode: Mode) -> Result<Vec<Arc<dyn Layer>>, Problem> {
        let layers = self.parents.gate().open_path(&self.path, self.format, mode);
        layers.map_err(|error| chain_problem(&error))
    }

    /// The image with its parents, as one disk.
    pub(super) fn chain(&self, access: Access) -> Result<Chain, Problem> {
        let mode = if access == Access::Write { Mode::Write } else { Mode::Read };
        Chain::new(self.layers(mode)?, access).map_err(|error| problem(&error))
    }

    /// The images around it.
    pub(super) fn neighbours(&self) -> Result<Neighbours, Problem> {
        Neighbours::of(holding(&self.path)?.0, &self.parents)
    }
}

/// What went wrong with a chain. A parent that is not where its child says may lie there under another name, or elsewhere.
pub(super) fn chain_problem(error: &Error) -> Problem {
    let said = problem(error);
    if error.kind != ErrorKind::Parent {
        return said;
    }
    let child = Path::new(&error.file);
    let Ok((folder, name)) = holding(child) else { return said };
    let Ok(images) = Siblings::of(&folder) else { return said };
    let link = images.images.iter().find(|image| image.name == name).and_then(|image| image.info.parent.as_ref());
    let Some(link) = link else { return said };
    let named = gate::parent_name(link).unwrap_or_default();
    if folder.open(&named, Mode::Read).is_ok() {
        return said;
    }
    let hint = match images.parents(link).next() {
        Some(parent) => {
            let words = [child.to_owned(), child.with_file_name(&parent.name)];
            let words = words.map(|path| quoted(&shown(&path.display().to_string()).display().to_string()));
            format!("tenby disk reconnect {}      (it has the right id)", words.join(" "))
        }
        None => format!("{} --parents FOLDER      (if it lies elsewhere)", words()),
    };
    said.hint(hint)
}

/// The images in all folders where those of a chain may lie, and what they say of their parents.
pub(super) struct Neighbours(Vec<(Arc<HostFolder>, Siblings)>);

/// An image that stands on another one.
pub(super) struct Child<'a> {
    pub(super) folder: &'a Arc<HostFolder>,
    pub(super) image: &'a Sibling,
    /// It lies in the same folder.
    beside: bool,
}

impl Child<'_> {
    /// The file, as its store is named.
    pub(super) fn file(&self) -> String {
        self.folder.path().join(&self.image.name).display().to_string()
    }

    /// The file as its user would write it.
    pub(super) fn path(&self) -> PathBuf {
        shown(&self.file())
    }

    /// Whether it names a file of this name as its parent.
    pub(super) fn names(&self, name: &str) -> bool {
        let link = self.image.info.parent.as_ref().and_then(|link| gate::parent_name(link).ok());
        link.is_some_and(|parent| parent.eq_ignore_ascii_case(name))
    }
}

/// Images, for people.
pub(super) fn told(children: &[Child<'_>]) -> String {
    children.iter().map(Child::to_string).collect::<Vec<_>>().join(", ")
}

/// A name says enough beside the parent.
impl fmt::Display for Child<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.beside { f.write_str(&self.image.name) } else { self.path().display().fmt(f) }
    }
}

impl Neighbours {
    fn of(own: HostFolder, parents: &Parents) -> Result<Self, Problem> {
        let mut folders = vec![Arc::new(own)];
        for named in &parents.0 {
            if !folders.iter().any(|folder| folder.is(named)) {
                folders.push(Arc::clone(named));
            }
        }
        let look = |folder: Arc<HostFolder>| Siblings::of(&*folder).map(|images| (folder, images));
        folders.into_iter().map(look).collect::<image::Result<_>>().map(Self).map_err(|error| problem(&error))
    }

    /// What stands on a layer: images beside it that name it, and those that have its id.
    pub(super) fn children(&self, layer: &dyn Layer) -> Vec<Child<'_>> {
        let file = PathBuf::from(layer.store().name());
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let id = layer.info().data_id;
        let mut children = Vec::new();
        for (folder, images) in &self.0 {
            let beside = file.parent() == Some(folder.path());
            // Elsewhere the same name says nothing.
            let found = images.children(if beside { &name } else { "" }, id);
            children.extend(found.map(|image| Child { folder, image, beside }));
        }
        children
    }

    /// Files that look like images and cannot be asked what they stand on.
    pub(super) fn unread(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|(_, images)| &images.unread).map(String::as_str)
    }
}
