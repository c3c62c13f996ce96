//! The command line: one definition for parsing, help, completions and the documentation's reference.

mod clone;
mod completions;
mod disk;
mod doctor;
mod home;
mod job;
mod rest;
mod snapshot;
mod vm;
pub(crate) mod words;

pub(crate) use vm::{quoted, quoted_loosely};

use crate::out::Out;
use crate::session::Session;
use clap::{Args, Parser, Subcommand};
use machine::request::Problem;
use machine::tree::MachineId;
use std::path::PathBuf;

/// Virtual machines with a tree of snapshots
///
/// Tenby runs virtual machines with QEMU and gives them Hyper-V's snapshots: take one of a running machine, go back to any of them,
/// delete any of them; disks and memory both. `tenby` alone lists the machines.
#[derive(Debug, Parser)]
#[command(name = "tenby", version, max_term_width = 100, after_help = EXAMPLES, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

const EXAMPLES: &str = "Examples:
  tenby vm create web --disk new:20G --cdrom debian.iso --boot cdrom
  tenby vm start web
  tenby snapshot create web \"before the update\"
  tenby snapshot apply web \"before the update\" --discard

Exit codes: 0 done, 1 failed, 2 usage, 3 refused in this state, 4 no such thing or ambiguous,
5 the input is damaged or not what it claims to be, 130 cancelled.";

/// What holds for every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// The folder that holds the machines [default: $TENBY_ROOT, else /var/lib/tenby for root, else $XDG_DATA_HOME/tenby]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    pub(crate) root: Option<PathBuf>,
    /// Print one JSON document, and nothing else, on standard output
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) json: bool,
    /// Say only what was asked for
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub(crate) quiet: bool,
    /// When to use colours
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto", help_heading = "Global options")]
    pub(crate) color: Color,
}

/// When to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// The nouns.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Virtual machines: make, run, change, look at them
    #[command(subcommand, after_help = "Example:\n  tenby vm list")]
    Vm(vm::Verb),
    /// Snapshots of a machine: take, list, apply, delete them
    #[command(subcommand, alias = "snap", after_help = "Example:\n  tenby snapshot list web")]
    Snapshot(snapshot::Verb),
    /// What is under way, and what was
    #[command(subcommand, after_help = "Example:\n  tenby job list")]
    Job(job::Verb),
    /// Disk image files, without any machine
    #[command(subcommand, after_help = "Example:\n  tenby disk info data.vhdx")]
    Disk(disk::Verb),
    /// What is here, what is missing, and what that costs
    #[command(after_help = "Example:\n  tenby doctor")]
    Doctor,
    /// Stories on a real guest
    #[command(subcommand, after_help = "Example:\n  tenby demo week")]
    Demo(rest::Demo),
    /// Completions for a shell
    #[command(after_help = "Example:\n  tenby completions bash > /etc/bash_completion.d/tenby")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// The web page and HTTP API (not there yet)
    #[command(after_help = "Example:\n  tenby serve --listen 127.0.0.1:8080")]
    Serve(rest::Serve),
    /// Tokens for `serve` (not there yet)
    #[command(subcommand, after_help = "Example:\n  tenby token list")]
    Token(rest::Token),
    /// The process that owns a machine
    #[command(hide = true, after_help = "Example:\n  tenby worker 0199c0ffee00c0ffee00c0ffee00c0ff")]
    Worker {
        /// The machine's id
        id: MachineIdArg,
    },
    /// Becomes QEMU, with as few rights as it needs
    #[command(hide = true, after_help = "Example:\n  tenby launch --user 2013265920 -- qemu-system-x86_64 -version")]
    Launch(crate::launch::Launch),
    /// Hyper-V's cmdlets, by their own names (not there yet)
    #[command(
        name = "powershell",
        disable_help_flag = true,
        after_help = "Example:\n  tenby powershell -Command \"Checkpoint-VM -Name web\""
    )]
    PowerShell(rest::Anything),
    /// Hyper-V's cmdlets, by their own names
    #[command(
        name = "Checkpoint-VM",
        aliases = rest::CMDLETS,
        hide = true,
        disable_help_flag = true,
        after_help = "Example:\n  tenby Checkpoint-VM -Name web -SnapshotName Monday"
    )]
    Cmdlet(rest::Anything),
}

/// A machine's id in full.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MachineIdArg(MachineId);

impl std::str::FromStr for MachineIdArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        uuid::Uuid::parse_str(text).map(|id| Self(MachineId(id))).map_err(|_| "a machine's id in full".to_owned())
    }
}

/// Carries a command out.
pub(crate) async fn run(cli: Cli) -> Result<(), Problem> {
    let out = Out::new(cli.global.json, cli.global.quiet).at_root(cli.global.root.clone());
    let open = || Session::open(cli.global.root.as_deref(), out.clone());
    match cli.command {
        None => home::run(&open()?).await,
        Some(Command::Vm(verb)) => verb.run(&open()?).await,
        Some(Command::Snapshot(verb)) => verb.run(&open()?).await,
        Some(Command::Job(verb)) => verb.run(&open()?).await,
        Some(Command::Disk(verb)) => verb.run(&out).await,
        Some(Command::Doctor) => doctor::run(cli.global.root.as_deref(), &out).await,
        Some(Command::Demo(demo)) => demo.run(cli.global.root.as_deref()).await,
        Some(Command::Completions { shell }) => completions::run(shell),
        Some(Command::Worker { id }) => crate::worker::run(&open()?, id.0).await,
        Some(Command::Launch(launch)) => Err(launch.run()),
        Some(Command::Serve(_)) => Err(later("`tenby serve`")),
        Some(Command::Token(_)) => Err(later("`tenby token`")),
        Some(Command::PowerShell(_)) => Err(later("`tenby powershell`")),
        Some(Command::Cmdlet(_)) => {
            Err(later("Hyper-V's cmdlets").hint("tenby --help      (the same by Tenby's own names)"))
        }
    }
}

/// The refusal of what the contract promises and this version does not have.
pub(crate) fn later(what: &str) -> Problem {
    Problem::refused(format!("{what}: not there yet in this version of tenby; nothing was done"))
        .hint("tenby --help      (what is there)")
}

/// How a command waits for its job.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Waiting {
    /// Print the job's id at once instead of waiting for its end
    #[arg(long = "async")]
    pub(crate) at_once: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_help_has_an_example() {
        fn check(command: &clap::Command, path: &str) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{path} has no example");
            assert!(help.contains("tenby"), "the example of {path} cannot be pasted");
            for sub in command.get_subcommands() {
                check(sub, &format!("{path} {}", sub.get_name()));
            }
        }
        check(&Cli::command(), "tenby");
    }

    /// Examples are for pasting: each must parse.
    #[test]
    fn every_example_parses() {
        fn examples(command: &clap::Command, into: &mut Vec<String>) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            into.extend(help.lines().map(str::trim).filter(|line| line.starts_with("tenby")).map(str::to_owned));
            command.get_subcommands().for_each(|sub| examples(sub, into));
        }
        let mut all = Vec::new();
        examples(&Cli::command(), &mut all);
        assert!(all.len() > 40);
        for example in all {
            let line = example.split(" > ").next().unwrap_or_default();
            let mut words = vec![String::new()];
            let mut quoted = false;
            for c in line.chars() {
                match c {
                    '"' => quoted = !quoted,
                    ' ' if !quoted => words.push(String::new()),
                    c => words.last_mut().expect("there is one").push(c),
                }
            }
            Cli::try_parse_from(&words).unwrap_or_else(|error| panic!("{example}: {error}"));
        }
    }
}
