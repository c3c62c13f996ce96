//! `disk info --chain`: all that an image stands on, and which of the files could go.

use super::{Info, Place, edit, problem};
use crate::draw::{Look, plain};
use image::siblings::{Siblings, file_name};
use image::{Error, ErrorKind, Layer};
use jiff::Timestamp;
use machine::plan::quoted;
use machine::request::Problem;
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;
use store::Mode;

/// One file of a chain.
#[derive(Debug, Serialize)]
pub(super) struct Link {
    #[serde(flatten)]
    info: Info,
    /// When it was last written.
    modified: Option<Timestamp>,
    /// The images in this folder that stand on it.
    children: Vec<String>,
    /// The machine that owns it.
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<String>,
    /// Nothing that is known needs it. What it holds itself would be lost all the same.
    deletable: bool,
}

/// What the file is, and all that it stands on, base first.
pub(crate) fn chain(place: &Place) -> Result<Info, Problem> {
    let (_, _, siblings) = edit::surroundings(&place.path)?;
    let layers = image::open_path(&place.path, place.format, Mode::Read)
        .map_err(|error| found_elsewhere(problem(&error), &error, &siblings))?;
    let links = layers.iter().map(|layer| Link::of(&**layer, &file_name(layer), &siblings));
    let links = links.collect::<Result<Vec<_>, _>>()?;
    let leaf = layers.last().ok_or_else(|| Problem::failed("an image is a chain of one at least"))?;
    Ok(Info { chain: Some(links), ..Info::of(&**leaf)? })
}

/// A parent that is not where its child says may lie beside it under another name.
fn found_elsewhere(problem: Problem, error: &Error, siblings: &Siblings) -> Problem {
    if error.kind != ErrorKind::Parent {
        return problem;
    }
    let child = Path::new(&error.file);
    let name = child.file_name().unwrap_or_default().to_string_lossy();
    let link = siblings.images.iter().find(|image| image.name == name).and_then(|image| image.info.parent.as_ref());
    match link.and_then(|link| siblings.parents(link).next()) {
        Some(parent) => {
            let words = [child.to_owned(), child.with_file_name(&parent.name)];
            let words = words.map(|path| quoted(&super::shown(&path.display().to_string()).display().to_string()));
            problem.hint(format!("tenby disk reconnect {}      (it has the right id)", words.join(" ")))
        }
        None => problem,
    }
}

impl Link {
    fn of(layer: &dyn Layer, name: &str, siblings: &Siblings) -> Result<Self, Problem> {
        let info = Info::of(layer)?;
        let modified = std::fs::metadata(&info.file).and_then(|data| data.modified()).ok();
        let children: Vec<_> = siblings.children(name, layer.info().data_id).map(|child| child.name.clone()).collect();
        let machine = machine::mark::owner(&info.file);
        let deletable = children.is_empty() && machine.is_none();
        let modified = modified.and_then(|time| Timestamp::try_from(time).ok());
        Ok(Self { info, modified, children, machine, deletable })
    }

    pub(super) fn block(&self, look: &Look) -> String {
        let mut text = self.info.block();
        if let Some(modified) = self.modified {
            writeln!(text, "  written   {}", look.date(modified)).expect("writing to a string never fails");
        }
        let needed = match (&self.machine, self.children.as_slice()) {
            (Some(machine), _) => format!("by the machine {}", plain(machine)),
            (None, []) => "by nothing in this folder; deleting it loses what it holds itself".to_owned(),
            (None, children) => format!("by {}; deleting it loses those too", plain(&children.join(", "))),
        };
        writeln!(text, "  needed    {needed}").expect("writing to a string never fails");
        text
    }
}
