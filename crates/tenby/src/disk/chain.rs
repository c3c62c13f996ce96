//! `disk info --chain`: all that an image stands on, and which of the files could go.

use super::place::{Child, Neighbours};
use super::{Info, Place};
use crate::draw::{Look, plain};
use crate::out::Out;
use crate::work::look;
use image::Layer;
use jiff::Timestamp;
use machine::request::Problem;
use serde::Serialize;
use std::fmt::Write;
use store::Mode;

/// One file of a chain.
#[derive(Debug, Serialize)]
pub(super) struct Link {
    #[serde(flatten)]
    info: Info,
    /// When it was last written.
    modified: Option<Timestamp>,
    /// The images that stand on it, of those in this folder and in the ones that were named.
    children: Vec<String>,
    /// The machine that owns it.
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<String>,
    /// Nothing that is known needs it. What it holds itself would be lost all the same.
    deletable: bool,
}

/// What the file is, and all that it stands on, base first.
pub(crate) async fn chain(place: Place, out: &Out) -> Result<Info, Problem> {
    look(out, format!("looking at {}", place.path.display()), move || links(&place)).await
}

fn links(place: &Place) -> Result<Info, Problem> {
    let layers = place.layers(Mode::Read)?;
    let neighbours = place.neighbours()?;
    let links = layers.iter().map(|layer| Link::of(&**layer, &neighbours)).collect::<Result<Vec<_>, _>>()?;
    let leaf = layers.last().ok_or_else(|| Problem::failed("an image is a chain of one at least"))?;
    Ok(Info { chain: Some(links), ..Info::of(&**leaf)? })
}

impl Link {
    fn of(layer: &dyn Layer, neighbours: &Neighbours) -> Result<Self, Problem> {
        let info = Info::of(layer)?;
        let modified = std::fs::metadata(&info.file).and_then(|data| data.modified()).ok();
        let children: Vec<_> = neighbours.children(layer).iter().map(Child::to_string).collect();
        let machine = machine::mark::owner(&info.file).map(|owner| owner.machine.name);
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
