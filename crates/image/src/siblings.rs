//! Who stands on an image: what the images beside it say of their parents.
//!
//! An image does not know its children. Only those that lie in its own folder can be asked; they are read without a lock, for
//! others may be using them.

use crate::layer::{LayerInfo, ParentLink};
use crate::{Layer, Result, gate, open};
use std::sync::Arc;
use store::{Folder, Mode};
use uuid::Uuid;

/// An image in a folder, and what it says of itself.
#[derive(Debug, Clone)]
pub struct Sibling {
    /// Its file's name.
    pub name: String,
    /// What it says.
    pub info: LayerInfo,
}

/// The images of a folder.
#[derive(Debug, Clone, Default)]
pub struct Siblings {
    /// Those that could be read, by name.
    pub images: Vec<Sibling>,
    /// Files that look like images and could not be read: whether they stand on anything is not known.
    pub unread: Vec<String>,
}

impl Siblings {
    /// Looks at every file of the folder. Files that are no images, or cannot be opened at all, are none.
    pub fn of(folder: &dyn Folder) -> Result<Self> {
        let mut siblings = Self::default();
        for name in folder.list()? {
            let Ok(store) = folder.open(&name, Mode::Read) else { continue };
            // An image of another program stands on none of ours.
            if !open::probe(&*store).is_ok_and(|signature| signature.is_some_and(ours)) {
                continue;
            }
            match open::open_unlocked(store, None, Mode::Read) {
                Ok(layer) => siblings.images.push(Sibling { name, info: layer.info() }),
                Err(_) => siblings.unread.push(name),
            }
        }
        Ok(siblings)
    }

    /// The images that name the file `name`, or an image of the id `data_id` (unless that is nil), as their parent.
    pub fn children<'a>(&'a self, name: &str, data_id: Uuid) -> impl Iterator<Item = &'a Sibling> + use<'a> {
        let name = name.to_lowercase();
        self.images.iter().filter(move |sibling| {
            let Some(link) = &sibling.info.parent else { return false };
            let named = gate::parent_names(&sibling.info, link).unwrap_or_default();
            let names_it = named.iter().any(|parent| parent.to_lowercase() == name);
            let own = sibling.name.to_lowercase() == name;
            !own && (names_it || (!data_id.is_nil() && accepts(link, data_id)))
        })
    }

    /// The images that a link accepts as parents, by their ids.
    pub fn parents<'a>(&'a self, link: &'a ParentLink) -> impl Iterator<Item = &'a Sibling> {
        self.images.iter().filter(move |sibling| !sibling.info.data_id.is_nil() && accepts(link, sibling.info.data_id))
    }
}

fn ours(signature: open::Signature) -> bool {
    !matches!(signature, open::Signature::Foreign(_))
}

/// Whether a link accepts a parent of this id.
pub fn accepts(link: &ParentLink, data_id: Uuid) -> bool {
    link.linkage == data_id || link.linkage2 == Some(data_id)
}

/// The name of a layer's file without its folder.
pub fn file_name(layer: &Arc<dyn Layer>) -> String {
    let name = layer.store().name();
    name.rsplit('/').next().unwrap_or_default().to_owned()
}
