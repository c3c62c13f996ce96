//! Everything that CI runs, the quick things first.

use std::process::Command;

use anyhow::Result;

use crate::{call, cargo, check, emulators, guest, root, setup, step, target};

/// The witness is a package of its own: it is linked for the guest.
const WITNESS: &str = "e2e/witness/Cargo.toml";

/// Runs it all; `rest` goes to the test runner. The last lines are the runner's own.
pub(crate) fn run(rest: &[String]) -> Result<()> {
    setup::run()?;
    step("format");
    call(cargo().args(["fmt", "--all", "--check"]))?;
    call(cargo().args(["fmt", "--check", "--manifest-path", WITNESS]))?;
    step("direction");
    check::run()?;
    step("lints");
    call(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    call(of_witness("clippy").args(["--all-targets", "--", "-D", "warnings"]))?;
    let guest = guest::build()?;
    step("the witness's own tests");
    call(&mut of_witness("test"))?;
    let emulators = emulators::provide()?;
    step("examples in the documentation");
    call(cargo().args(["test", "--quiet", "--workspace", "--doc"]))?;
    step("tests");
    // The tests of the whole system start it.
    call(cargo().args(["build", "--package", "tenby"]))?;
    call(runner().args(rest).env("TENBY_GUEST", guest).envs(emulators))
}

fn of_witness(verb: &str) -> Command {
    let mut command = cargo();
    command.args([verb, "--quiet", "--manifest-path", WITNESS]).env("CARGO_TARGET_DIR", target().join("witness"));
    command
}

/// nextest where it is installed: each test is a process and a hang is ended. Debian's Rust has only cargo's own.
fn runner() -> Command {
    let mut runner = cargo();
    if setup::is_here("cargo-nextest") {
        runner.args(["nextest", "run", "--workspace", "--no-fail-fast"]);
    } else {
        runner.args(["test", "--workspace", "--no-fail-fast", "--lib", "--bins", "--tests"]);
    }
    runner.current_dir(root());
    runner
}
