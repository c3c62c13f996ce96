//! `disk map`: where an image's content lies.

use super::problem::problem;
use super::{Place, edit, shown};
use crate::draw::plain;
use crate::out::Out;
use crate::work::look;
use image::{Access, RunKind};
use machine::request::Problem;
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;

/// How far one look reaches, in bytes, and how many runs it returns at most.
const LOOK: u64 = 1 << 30;
const RUNS: usize = 4096;

/// The runs that an image's content is made of. The contract's `disk map`.
#[derive(Debug, Serialize)]
pub(crate) struct Map {
    runs: Vec<Run>,
    /// The files, by the numbers of layers in the runs.
    layers: Vec<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Run {
    offset: u64,
    length: u64,
    /// `data`, `zero` (a layer says so) or `absent` (no layer says anything: zeros).
    state: &'static str,
    /// The layer that says so, counted from the base, 0.
    layer: Option<usize>,
}

/// All of an image with its parents.
pub(crate) async fn map(place: Place, out: &Out) -> Result<Map, Problem> {
    edit::check_still(&place.path, out).await?;
    look(out, format!("looking at {}", place.path.display()), move || runs(&place)).await
}

fn runs(place: &Place) -> Result<Map, Problem> {
    let chain = place.chain(Access::Read)?;
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    while at < chain.size() {
        for run in chain.runs(at, LOOK.min(chain.size() - at), RUNS).map_err(|error| problem(&error))? {
            at = run.offset + run.len;
            let state = match run.kind {
                RunKind::Data => "data",
                RunKind::Zero => "zero",
                RunKind::Absent => "absent",
            };
            match runs.last_mut().filter(|last| last.state == state && last.layer == run.layer) {
                Some(last) => last.length += run.len,
                None => runs.push(Run { offset: run.offset, length: run.len, state, layer: run.layer }),
            }
        }
    }
    let layers = chain.layers().iter().map(|layer| shown(&layer.store().name())).collect();
    Ok(Map { runs, layers })
}

impl Map {
    /// For people: a line for each run.
    pub(crate) fn draw(&self) -> String {
        let mut text = format!("{:>16}  {:>16}  {:<6}  file\n", "offset", "length", "state");
        for run in &self.runs {
            let file = run.layer.and_then(|layer| self.layers.get(layer));
            let file = file.map(|file| plain(&file.display().to_string())).unwrap_or_default();
            let line = format!("{:>16}  {:>16}  {:<6}  {file}", run.offset, run.length, run.state);
            writeln!(text, "{}", line.trim_end()).expect("writing to a string never fails");
        }
        text
    }
}
