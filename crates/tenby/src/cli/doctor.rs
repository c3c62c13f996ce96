//! `tenby doctor`: what is here, what is missing, what that costs.

use crate::out::Out;
use machine::request::Problem;
use std::path::Path;

#[expect(clippy::unused_async, reason = "asks QEMU, soon")]
pub(crate) async fn run(_root: Option<&Path>, _out: &Out) -> Result<(), Problem> {
    Err(super::later("`tenby doctor`"))
}

/// What `tenby doctor` finds, in a line.
#[expect(clippy::unused_async, reason = "asks QEMU, soon")]
pub(crate) async fn verdict(_root: Option<&Path>) -> String {
    "tenby doctor      (what is here, what is missing)".to_owned()
}
