//! `disk compare`: whether two images hold the same, and where not.

use super::problem::problem;
use super::{Place, edit};
use crate::out::Out;
use crate::session::cancelled;
use crate::work::interruptible;
use image::Access;
use machine::request::Problem;
use serde::Serialize;
use std::fmt::Write;

/// More ranges than this are not told apart: what lies between them is counted as different too.
const MOST: usize = 1 << 20;

/// What two images have in common. The contract's `disk compare`.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    pub(crate) equal: bool,
    ranges: Vec<Range>,
    /// The sizes of the two disks in bytes.
    sizes: [u64; 2],
}

#[derive(Debug, Serialize)]
struct Range {
    offset: u64,
    length: u64,
}

/// Compares all of two images.
pub(crate) async fn compare(one: Place, other: Place, out: &Out) -> Result<Comparison, Problem> {
    edit::check_still(&one.path, out).await?;
    edit::check_still(&other.path, out).await?;
    let what = format!("comparing {}", one.path.display());
    let compared = interruptible(out, what, move |progress| {
        let (one, other) = (one.chain(Access::Read)?, other.chain(Access::Read)?);
        let mut ranges: Vec<Range> = Vec::new();
        let each = |offset, length| {
            let full = ranges.len() == MOST;
            match ranges.last_mut().filter(|_| full) {
                Some(last) => last.length = offset + length - last.offset,
                None => ranges.push(Range { offset, length }),
            }
        };
        let complete = image::compare::compare(&one, &other, progress, each).map_err(|error| problem(&error))?;
        let sizes = [one.size(), other.size()];
        Ok(complete.then_some(Comparison { equal: ranges.is_empty(), ranges, sizes }))
    })
    .await?;
    compared.ok_or_else(|| cancelled("the comparison was cancelled; nothing was changed"))
}

impl Comparison {
    /// For people: a line, and one for each range.
    pub(crate) fn draw(&self) -> String {
        if self.equal {
            return "the two hold the same\n".to_owned();
        }
        let mut text = String::new();
        if self.sizes[0] != self.sizes[1] {
            text = format!("the first has {} bytes, the second {}\n", self.sizes[0], self.sizes[1]);
        }
        writeln!(text, "{:>16}  {:>16}", "offset", "length").expect("writing to a string never fails");
        for range in &self.ranges {
            writeln!(text, "{:>16}  {:>16}", range.offset, range.length).expect("writing to a string never fails");
        }
        text
    }
}
