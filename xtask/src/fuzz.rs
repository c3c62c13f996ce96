//! Fuzzing for a time of one's own choice, and what the bounded runs of the fuzzer reach.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{call, cargo, number_after, output_of, root, step, target};

/// Processes that fuzz at once. Each has one thread: memory and panics are counted by the process.
const AT_ONCE: u64 = 2;
/// How long a target is fuzzed if nobody says, seconds.
const SECONDS: u64 = 60;

/// `cargo xtask fuzz [TARGET…] [--seconds N] [--seed S]`
pub(crate) fn run(words: &[String]) -> Result<()> {
    let (mut seconds, mut seed, mut targets) = (SECONDS, None, Vec::new());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--seconds" => seconds = number_after(word, &mut words)?,
            "--seed" => seed = Some(number_after(word, &mut words)?),
            other if other.starts_with('-') => bail!("there is no {other}"),
            _ => targets.push(word.clone()),
        }
    }
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs());
    let seed = seed.unwrap_or_else(clock);
    step("building the fuzzer");
    call(cargo().args(["build", "--profile", "fuzz", "--package", "fuzz"]))?;
    step(&format!("seeds {seed} to {}, {seconds} seconds a target", seed + AT_ONCE - 1));
    let start = |seed: u64| -> Result<Child> {
        let mut fuzzer = Command::new(target().join("fuzz/fuzz"));
        fuzzer.args([seconds.to_string(), seed.to_string()]).args(&targets).env("CARGO_TARGET_DIR", target());
        fuzzer.spawn().context("the fuzzer does not start")
    };
    let children = (seed..seed + AT_ONCE).map(start).collect::<Result<Vec<_>>>()?;
    let mut sound = true;
    for mut child in children {
        sound &= child.wait()?.success();
    }
    ensure!(sound, "something failed; run it again with `target/fuzz/fuzz replay TARGET FILE`");
    Ok(())
}

/// What reads what comes from outside: files, and the beginnings of names of files.
const PARSERS: &[&str] = &[
    "crates/image/src/check",
    "crates/image/src/vhdx/check",
    "crates/image/src/vhdx/header.rs",
    "crates/image/src/vhdx/metadata.rs",
    "crates/image/src/vhdx/log.rs",
    "crates/image/src/vhdx/replay.rs",
    "crates/image/src/vhdx/open.rs",
    "crates/image/src/vhdx/bat.rs",
    "crates/image/src/vhdx/bitmap.rs",
    "crates/image/src/vhdx/carry.rs",
    "crates/image/src/vhdx/map.rs",
    "crates/image/src/vhdx/units.rs",
    "crates/image/src/vhd/",
    "crates/image/src/gate.rs",
    "crates/image/src/hashes.rs",
    "crates/image/src/hashes/",
    "crates/image/src/open.rs",
    "crates/image/src/raw.rs",
    "crates/memory/src/stream/",
    "crates/memory/src/capture/seen.rs",
    "crates/memory/src/table.rs",
    "crates/export/src/nbd/handshake.rs",
    "crates/export/src/nbd/proto.rs",
    "crates/qemu/src/qmp/wire.rs",
    "crates/qemu/src/qmp/event.rs",
    "crates/qemu/src/agent.rs",
];

/// `cargo xtask coverage [--missing]`: the share of the parsers' lines that the bounded runs of the fuzzer alone reach, and
/// which they do not.
///
/// With rustc's own instrumentation and the tools that belong to it (`rustup component add llvm-tools`), or those that `LLVM_PROFDATA`
/// and `LLVM_COV` name: any that read what rustc's LLVM writes (those of 19 read what 22 does).
pub(crate) fn coverage(words: &[String]) -> Result<()> {
    let missing = words.iter().any(|word| word == "--missing");
    let (profdata, cov) = (tool("llvm-profdata")?, tool("llvm-cov")?);
    let folder = target().join("coverage");
    let profiles = folder.join("profiles");
    if profiles.exists() {
        std::fs::remove_dir_all(&profiles)?;
    }
    step("running the fuzzer's bounded runs, instrumented");
    let instrumented = |verb: &[&str]| {
        let mut cargo = cargo();
        cargo.args(verb).args(["--package", "fuzz", "--test", "bounded"]);
        cargo.env("CARGO_TARGET_DIR", &folder).env("RUSTFLAGS", "-C instrument-coverage");
        cargo.env("LLVM_PROFILE_FILE", profiles.join("%p-%m.profraw"));
        cargo
    };
    let built = output_of(instrumented(&["test"]).args(["--no-run", "--message-format", "json"]))?;
    call(&mut instrumented(&["test"]))?;
    let raw: Vec<PathBuf> =
        std::fs::read_dir(&profiles)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    let merged = folder.join("merged.profdata");
    call(Command::new(profdata).args(["merge", "--sparse", "-o"]).arg(&merged).args(raw))?;
    let report = output_of(
        Command::new(cov)
            .args(["export", "--format=text", "--skip-functions"])
            .arg("--instr-profile")
            .arg(&merged)
            .arg(executable(&built)?),
    )?;
    print(&serde_json::from_str(&report)?, missing)
}

/// The test binary, of cargo's messages.
fn executable(messages: &str) -> Result<PathBuf> {
    let mut messages = messages.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let found = messages.find_map(|message| message["executable"].as_str().map(PathBuf::from));
    found.context("cargo names no executable")
}

/// A tool that belongs to rustc, or another one that the user names.
fn tool(name: &str) -> Result<PathBuf> {
    let variable = name.replace('-', "_").to_uppercase();
    if let Some(path) = std::env::var_os(&variable) {
        return Ok(path.into());
    }
    let libraries = output_of(Command::new("rustc").current_dir(root()).args(["--print", "target-libdir"]))?;
    let path = Path::new(libraries.trim()).with_file_name("bin").join(name);
    ensure!(path.exists(), "{name} is missing: rustup component add llvm-tools, or name one in {variable}");
    Ok(path)
}

/// One file's lines.
struct Lines {
    /// Those with code.
    all: usize,
    missed: Vec<u64>,
}

fn print(report: &Value, missing: bool) -> Result<()> {
    let files = report["data"][0]["files"].as_array().context("no report")?;
    let (mut all, mut reached) = (0, 0);
    for parser in PARSERS {
        let of = files.iter().filter_map(|file| {
            let name = file["filename"].as_str()?;
            let path = name.strip_prefix(root().to_str()?)?.trim_start_matches('/');
            path.starts_with(parser).then_some((path.to_owned(), file))
        });
        for (path, file) in of.filter(|(path, _)| !path.ends_with("tests.rs")) {
            let Lines { all: lines, missed } = lines(file);
            all += lines;
            reached += lines - missed.len();
            println!(
                "{:>6.1} %  {:>4} of {:>4} lines  {path}",
                percent(lines - missed.len(), lines),
                lines - missed.len(),
                lines
            );
            if missing && !missed.is_empty() {
                let text = std::fs::read_to_string(root().join(&path))?;
                for line in missed {
                    println!("    {line:>4}  {}", text.lines().nth(line as usize - 1).unwrap_or_default());
                }
            }
        }
    }
    println!("{:>6.1} %  {reached:>4} of {all:>4} lines of all parsers", percent(reached, all));
    Ok(())
}

fn percent(part: usize, of: usize) -> f64 {
    if of == 0 { 100.0 } else { part as f64 * 100.0 / of as f64 }
}

/// The lines with code of a file, from its segments: [line, column, count, has a count, begins a region, is a gap].
fn lines(file: &Value) -> Lines {
    let segments = file["segments"].as_array().map(Vec::as_slice).unwrap_or_default();
    let number = |segment: &Value, index: usize| segment[index].as_u64().unwrap_or_default();
    let flag = |segment: &Value, index: usize| segment[index].as_bool().unwrap_or_default();
    let last = segments.last().map_or(0, |segment| number(segment, 0));
    let (mut all, mut missed) = (0, Vec::new());
    let mut wrapped: Option<&Value> = None;
    let mut at = 0;
    for line in 1..=last {
        let begin = at;
        while at < segments.len() && number(&segments[at], 0) == line {
            at += 1;
        }
        let here = &segments[begin..at];
        let starts = |segment: &&Value| flag(segment, 3) && flag(segment, 4) && !flag(segment, 5);
        let skipped = here.first().is_some_and(|first| !flag(first, 3) && flag(first, 4));
        let counted = wrapped.is_some_and(|segment| flag(segment, 3)) || here.iter().any(|segment| starts(&segment));
        if counted && !skipped {
            all += 1;
            let over = wrapped.map_or(0, |segment| number(segment, 2));
            let most = here.iter().filter(starts).map(|segment| number(segment, 2)).fold(over, u64::max);
            if most == 0 {
                missed.push(line);
            }
        }
        wrapped = here.last().or(wrapped);
    }
    Lines { all, missed }
}

#[cfg(test)]
mod tests {
    use super::lines;
    use serde_json::json;

    #[test]
    fn lines_are_counted_as_the_tools_do() {
        // A function on lines 1 to 5, of which a branch on lines 2 and 3 was never taken.
        let file = json!({ "segments": [
            [1, 1, 7, true, true, false],
            [2, 9, 0, true, true, false],
            [3, 10, 7, true, false, false],
            [5, 2, 0, false, false, false],
        ]});
        let found = lines(&file);
        assert_eq!((found.all, found.missed), (5, vec![3]));
    }
}
