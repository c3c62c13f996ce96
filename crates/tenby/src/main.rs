//! The command line, and the worker process of a machine. Start reading at [`cli`].

mod cli;
mod connect;
mod console;
mod demo;
mod disk;
mod doctor;
mod draw;
mod follow;
mod json;
mod out;
mod session;
mod worker;

use clap::Parser;
use cli::{Cli, Color, Command};
use machine::request::Problem;
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
    let out = Out::new(cli.global.json, cli.global.quiet);
    match drive(cli, worker) {
        Ok(()) => ExitCode::SUCCESS,
        // A worker has said it already, to who started it.
        Err(problem) if worker => ExitCode::from(problem.kind.code()),
        Err(problem) => {
            out.problem(&problem);
            ExitCode::from(problem.kind.code())
        }
    }
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
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}
