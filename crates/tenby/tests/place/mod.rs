//! A root of its own for each test, and commands run in it as processes.
#![allow(dead_code, reason = "each test file uses its part")]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A root of its own, with workers of its own.
pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ended {
    #[track_caller]
    pub(crate) fn well(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    #[track_caller]
    pub(crate) fn with(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        assert_ne!(self.err, "", "a failure says why");
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tenby"));
        command
            .args(words)
            .env("TENBY_ROOT", self.root())
            .env("TENBY_RUNTIME", self.dir.path().join("run"))
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC")
            .env_remove("TENBY_LOG")
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn tenby(&self, words: &[&str]) -> Ended {
        self.command(words).output().unwrap().into()
    }

    /// Runs a command in no more than two gigabytes of address space.
    pub(crate) fn in_little_memory(&self, words: &[&str]) -> Ended {
        let command = self.command(words);
        let mut shell = Command::new("sh");
        shell.args(["-c", r#"ulimit -v 2000000; exec "$0" "$@""#]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        shell.current_dir(self.dir.path()).stdin(Stdio::null()).output().unwrap().into()
    }

    /// A machine with one small disk.
    pub(crate) fn with_machine(name: &str) -> Self {
        let place = Self::new();
        place.tenby(&["vm", "create", name, "--memory", "64M", "--disk", "new:8M"]).well();
        place
    }

    pub(crate) fn machine(&self, name: &str) -> Value {
        self.tenby(&["vm", "show", name, "--json"]).well().json()
    }

    pub(crate) fn tree(&self, name: &str) -> Value {
        self.tenby(&["snapshot", "list", name, "--json"]).well().json()
    }

    pub(crate) fn names(&self, vm: &str) -> Vec<String> {
        let tree = self.tree(vm);
        tree["snapshots"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
    }

    pub(crate) fn runtime(&self, machine: &Value) -> PathBuf {
        self.dir.path().join("run").join(machine["id"].as_str().unwrap().replace('-', ""))
    }
}

/// Every file below a folder, with its content (a pipe has none): to see that nothing has changed.
pub(crate) fn content(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            all.extend(content(&path));
        } else {
            let content = if path.is_file() { std::fs::read(&path).unwrap_or_default() } else { Vec::new() };
            all.push((path, content));
        }
    }
    all.sort();
    all
}

/// Whether system calls can be watched here (`strace`).
pub(crate) fn can_watch() -> bool {
    let can =
        Command::new("strace").args(["-qq", "-e", "trace=none", "true"]).output().is_ok_and(|o| o.status.success());
    if !can {
        println!("SKIPPED: no strace, or it may not trace");
    }
    can
}

/// Waits for something that must come, however slow the host is.
#[track_caller]
pub(crate) fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}
