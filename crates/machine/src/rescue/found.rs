//! What lies in a machine's folders, and what each file says of itself. Nothing is written.

use crate::files::{Files, LAYER_FOLDERS, file_problem};
use crate::label::Label;
use crate::request::Problem;
use crate::tree::{LayerFormat, LayerKind};
use image::{Layer, LayerInfo, Source};
use std::path::Path;
use std::sync::Arc;
use store::{Mode, Store};

/// An image file.
#[derive(Debug, Clone)]
pub struct Found {
    /// `disks/….vhdx`, `memory/….avhdx`; of a file that was taken in place, its path.
    pub file: String,
    /// Whether the file is the user's own, taken in place.
    pub in_place: bool,
    /// What it holds, by its folder.
    pub kind: LayerKind,
    /// What the image says of itself.
    pub info: LayerInfo,
    /// What its label says.
    pub label: Option<Label>,
    /// Whether it holds anything of its own.
    pub holds: bool,
}

/// Something that could not be known or used: about which file, and what.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Unknown {
    /// The file, if it is about one.
    pub file: Option<String>,
    /// What.
    pub what: String,
}

impl Unknown {
    /// About a file.
    pub(super) fn of(file: &str, what: impl Into<String>) -> Self {
        Self { file: Some(file.to_owned()), what: what.into() }
    }
}

/// Looks at all files: those in the machine's folders, and those that its user has named, unless they were in its CD drive.
pub(super) fn look(files: &Files, named: &[String], unknown: &mut Vec<Unknown>) -> Result<Vec<Found>, Problem> {
    let mut found = Vec::new();
    for (name, kind) in LAYER_FOLDERS.into_iter().zip([LayerKind::Disk, LayerKind::Memory]) {
        let folder = match files.folder().folder(name) {
            Err(error) if error.kind == store::ErrorKind::NotFound => continue,
            folder => folder.map_err(|e| file_problem(&e))?,
        };
        for entry in folder.list().map_err(|e| file_problem(&e))? {
            let file = format!("{name}/{entry}");
            let read = folder.open(&entry, Mode::Read).map_err(|e| e.to_string()).and_then(|store| open(store, None));
            match read.and_then(|layer| says(file.clone(), false, kind, &*layer)) {
                Ok(image) => found.push(image),
                Err(why) => unknown.push(Unknown::of(&file, format!("it cannot be read, and was left alone: {why}"))),
            }
        }
    }
    let in_drive: Vec<String> = found.iter().filter_map(|file| file.label.as_ref()).flat_map(Label::in_drive).collect();
    for file in named.iter().filter(|file| !in_drive.contains(file)) {
        let raw = Path::new(file).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("raw"));
        let store = store::host::open_file(Path::new(file), Mode::Read).map_err(|e| file_problem(&e))?;
        let layer = open(store, raw.then_some(image::Format::Raw))
            .map_err(|why| Problem::damaged(format!("{file} cannot be read: {why}")))?;
        found.push(says(file.clone(), true, LayerKind::Disk, &*layer).map_err(Problem::damaged)?);
    }
    Ok(found)
}

fn open(store: Arc<dyn Store>, format: Option<image::Format>) -> Result<Arc<dyn Layer>, String> {
    // The machine's lock keeps its workers out.
    image::open::open_unlocked(store, format, Mode::Read).map_err(|e| e.to_string())
}

fn says(file: String, in_place: bool, kind: LayerKind, layer: &dyn Layer) -> Result<Found, String> {
    let info = layer.info();
    let label = layer.note().map_err(|e| e.to_string())?.as_deref().and_then(Label::parse);
    let label = label.filter(|label| label.kind == kind);
    // Only of a layer that says nothing it matters, and it takes a look at all of its table.
    let holds = label.is_some() || info.parent.is_none() || holds(layer).map_err(|e| e.to_string())?;
    Ok(Found { file, in_place, kind, info, label, holds })
}

fn holds(layer: &dyn Layer) -> image::Result<bool> {
    let mut runs = Vec::new();
    layer.map(0, layer.info().size, &mut runs)?;
    Ok(runs.iter().any(|run| run.source != Source::Absent))
}

impl Found {
    /// The name without its folder.
    pub(super) fn name(&self) -> &str {
        self.file.rsplit('/').next().unwrap_or_default()
    }

    /// The format, as a row has it.
    pub(super) fn format(&self) -> LayerFormat {
        self.info.format.into()
    }
}
