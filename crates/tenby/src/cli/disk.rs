//! `tenby disk`

use super::later;
use crate::out::Out;
use clap::Subcommand;
use machine::request::Problem;

/// What can be done with disk image files.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// What a file is
    Info,
}

impl Verb {
    #[expect(clippy::unused_async, reason = "serving does")]
    pub(crate) async fn run(self, _out: &Out) -> Result<(), Problem> {
        Err(later("`tenby disk`"))
    }
}
