//! `tenby completions`

use super::Cli;
use crate::out::put;
use clap::CommandFactory;
use machine::request::Problem;

#[expect(clippy::unnecessary_wraps, reason = "every command returns what it came to")]
pub(crate) fn run(shell: clap_complete::Shell) -> Result<(), Problem> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tenby", &mut script);
    put(&mut std::io::stdout().lock(), &script);
    Ok(())
}
