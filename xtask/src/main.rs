//! `cargo xtask`: everything that is done to the repository rather than by the product.
//!
//! ```text
//!   setup   Debian packages that are missing           check   the direction of dependencies
//!   guest   the test guest, into target/guest          test    everything that CI runs
//!   qemu    both versions of QEMU, into target/qemu    bench   the numbers of SPECIFICATION.md
//!   demo    a week in the life of a machine            fuzz    the parsers, for as long as one likes
//!   crash   the whole stack under power cuts           coverage what of them the fuzzer's tests reach
//!   soak    a live machine, killed at random
//! ```

mod bench;
mod check;
mod cpio;
mod crash;
mod debian;
mod emulators;
mod fuzz;
mod guest;
mod setup;
mod soak;
mod suite;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
usage: cargo xtask <command>

  setup    install the Debian packages that are missing, and say which and why
  guest    build the test guest into target/guest
  qemu     provide both versions of QEMU that the tests use, in target/qemu
  demo     build Tenby and play a week on a real guest
  test     format, lints, direction, unit tests and the whole system
  check    only the direction of dependencies between the crates
  bench    measure the numbers that SPECIFICATION.md promises
  crash    cut the power of the whole stack: [--states N] [--seed S] [--syncs]
  soak     ask and kill a live machine at random: [--minutes N] [--seed S]
  fuzz     fuzz the parsers: [TARGET...] [--seconds N] [--seed S]
  coverage what of the parsers the fuzzer's tests reach: [--missing]
";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    let rest: Vec<String> = words.collect();
    match run(&command, &rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &str, rest: &[String]) -> Result<()> {
    match command {
        "setup" => setup::run(),
        "guest" => guest::build().map(|_| ()),
        "qemu" => emulators::provide().map(|_| ()),
        "demo" => demo(rest),
        "test" => suite::run(rest),
        "check" => check::run(),
        "bench" => bench::run(rest),
        "crash" => crash::run(rest),
        "soak" => soak::run(rest),
        "fuzz" => fuzz::run(rest),
        "coverage" => fuzz::coverage(rest),
        "" | "help" | "-h" | "--help" => {
            print!("{USAGE}");
            Ok(())
        }
        other => bail!("there is no `{other}`\n\n{USAGE}"),
    }
}

/// Builds what the demo needs and plays it. It lives in target/demo, never in the user's own place.
fn demo(rest: &[String]) -> Result<()> {
    setup::run()?;
    step("building Tenby");
    call(cargo().args(["build", "--release", "--package", "tenby"]))?;
    let guest = guest::build()?;
    step("the week");
    let tenby = target().join("release/tenby");
    call(
        Command::new(tenby)
            .arg("--root")
            .arg(target().join("demo"))
            .args(["demo", "week"])
            .args(rest)
            .env("TENBY_GUEST", guest),
    )
}

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository").to_owned()
}

/// Where everything goes that is made.
fn target() -> PathBuf {
    root().join("target")
}

/// The cargo that started us, in the repository.
fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).env("CARGO_TARGET_DIR", target());
    cargo
}

/// Says what comes next.
fn step(what: &str) {
    eprintln!("== {what}");
}

/// Runs `command` to its end, which has to be a good one.
fn call(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{} ended with {status}", in_a_line(command));
    }
    Ok(())
}

/// Runs `command` and gives what it printed.
fn output_of(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{} ended with {}: {}",
            in_a_line(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} printed something else than text", in_a_line(command)))
}

/// The number that follows `word` on the command line.
fn number_after(word: &str, words: &mut std::slice::Iter<'_, String>) -> Result<u64> {
    let value = words.next().with_context(|| format!("{word} wants a number"))?;
    value.parse().with_context(|| format!("{word} wants a number, not {value:?}"))
}

/// A command as one would type it.
fn in_a_line(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
