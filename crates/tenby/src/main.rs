//! The command line, and the worker process of a machine. Start reading at [`cli`].

mod audit;
mod cli;
mod connect;
mod console;
mod demo;
mod disk;
mod doctor;
mod draw;
mod follow;
mod json;
mod launch;
mod out;
mod rescue;
mod session;
mod work;
mod worker;

use clap::Parser;
use cli::{Cli, Color, Command};
use machine::plan::quoted;
use machine::request::{Problem, ProblemKind};
use out::Out;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misread(&error),
    };
    match cli.global.color {
        Color::Auto => anstream::ColorChoice::Auto,
        Color::Always => anstream::ColorChoice::Always,
        Color::Never => anstream::ColorChoice::Never,
    }
    .write_global();
    let worker = matches!(cli.command, Some(Command::Worker { .. }));
    open_many_files();
    log(if worker { "info" } else { "warn" });
    let out = Out::new(cli.global.json, cli.global.quiet).at_root(cli.global.root.clone());
    match drive(cli, worker) {
        Ok(()) => ExitCode::SUCCESS,
        // A worker has said it already, to who started it.
        Err(problem) if worker => ExitCode::from(problem.kind.code()),
        Err(problem) => {
            let problem = with_one_candidate(problem, std::env::args().skip(1));
            out.problem(&problem);
            ExitCode::from(problem.kind.code())
        }
    }
}

/// The hint for a name that means several things: the same command with the first of them, which its problem lists by id.
fn with_one_candidate(problem: Problem, words: impl Iterator<Item = String>) -> Problem {
    let ambiguous = problem.kind == ProblemKind::Ambiguous && problem.hint.is_none();
    let Some(first) = problem.candidates.first().filter(|_| ambiguous) else { return problem };
    let short = draw::named_by(&problem.message, first).unwrap_or(first).to_owned();
    let replaced = |word: String| {
        let meant = problem.message.contains(&format!("\"{word}\""));
        if meant { short.clone() } else { quoted(&word) }
    };
    let command: Vec<String> = std::iter::once("tenby".to_owned()).chain(words.map(replaced)).collect();
    problem.hint(command.join(" "))
}

/// A chain may be thousands of files deep; all that the system grants is asked for.
fn open_many_files() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let wish = rustix::process::Rlimit { current: limit.maximum, ..limit };
    // What is not granted is missed only where it is needed, and said there.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, wish);
}

fn drive(cli: Cli, worker: bool) -> Result<(), Problem> {
    let mut builder = if worker {
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    let runtime = builder.enable_all().build().map_err(|error| Problem::failed(format!("no runtime: {error}")))?;
    let result = runtime.block_on(cli::run(cli));
    // A thread may still wait for the terminal's next key; nobody waits for it.
    runtime.shutdown_background();
    result
}

/// What clap has to say: help and version are what was asked for; all else is a usage error, in JSON if the words say so.
fn misread(error: &clap::Error) -> ExitCode {
    if error.use_stderr() && std::env::args_os().any(|word| word == "--json") {
        let text = error.to_string();
        let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        Out::new(true, false).document(&json::Failure::new(&Problem::usage(message).hint("tenby --help")));
    }
    // Nobody is left to tell if this fails.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// Logs go to standard error; `TENBY_LOG` says how much (`debug`, `machine=trace`).
fn log(usual: &str) {
    let filter = EnvFilter::try_from_env("TENBY_LOG").unwrap_or_else(|_| EnvFilter::new(usual));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    // On a full disk there is no room for a worker's log, and for saying so in it even less: that would be a panic.
    lines.log_internal_errors(false).init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ambiguous_name_is_answered_with_the_same_command() {
        let mut problem = Problem::new(
            ProblemKind::Ambiguous,
            r#"two snapshots of My VM are named "back": 3f9c (Mon 23 Nov 10:02), a17e (Tue 24 Nov 18:30)"#,
        );
        problem.candidates = vec!["3f9c0000000000000000000000000000".into(), "a17e0000000000000000000000000000".into()];
        let words = ["snapshot", "apply", "My VM", "back", "--keep"].map(String::from);
        let hint = with_one_candidate(problem, words.into_iter()).hint;
        assert_eq!(hint.as_deref(), Some("tenby snapshot apply 'My VM' 3f9c --keep"));
    }
}
