//! A root of its own, and the program in it.

use std::fs::{File, TryLockError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{DEADLINE, SmallDisk, Witness, guest, place, wait_for};

/// The name of the machine that [`Lab::with_base`] begins with.
pub const BASE: &str = "Tenby";
/// RAM of that machine.
const BASE_MEMORY: &str = "128M";
/// RAM in which OVMF can unpack the guest's kernel.
const UEFI_MEMORY: &str = "256M";

/// How a command ended.
#[derive(Debug)]
pub struct Output {
    /// The exit code; -1 if a signal ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it said besides.
    pub stderr: String,
    /// The command, for messages.
    pub command: String,
}

impl Output {
    /// Itself, if the exit code is `code`.
    ///
    /// # Panics
    /// If it is another.
    #[track_caller]
    pub fn exits(&self, code: i32) -> &Self {
        assert_eq!(self.code, code, "{}\nstdout: {}\nstderr: {}", self.command, self.stdout, self.stderr);
        self
    }

    /// The document on standard output.
    ///
    /// # Panics
    /// If there is none, or something besides.
    #[track_caller]
    pub fn json(&self) -> Value {
        let parsed = serde_json::from_str(&self.stdout);
        parsed.unwrap_or_else(|error| {
            panic!("{}: {error}\nstdout: {}\nstderr: {}", self.command, self.stdout, self.stderr)
        })
    }
}

/// Machines of one test. What it started is killed, and what it made is removed, when it is dropped.
pub struct Lab {
    folder: tempfile::TempDir,
    qemu: Option<PathBuf>,
    /// It does without what takes privileges.
    ordinary: bool,
    /// RAM that its host has to spare, bytes; what it really has, if nothing is said.
    ram: Option<u64>,
}

impl Lab {
    /// An empty root.
    ///
    /// # Panics
    /// If there is no room for it.
    pub fn empty() -> Self {
        // Sockets are found below it, and their paths have to be short.
        let folder = tempfile::Builder::new().prefix("te-").tempdir_in("/tmp").expect("there is room for a folder");
        Self { folder, qemu: None, ordinary: false, ram: None }
    }

    /// The same lab with another QEMU.
    #[must_use]
    pub fn on_qemu(mut self, qemu: PathBuf) -> Self {
        self.qemu = Some(qemu);
        self
    }

    /// The same lab for somebody without privileges: QEMU cannot track memory.
    #[must_use]
    pub fn for_ordinary_users(mut self) -> Self {
        self.ordinary = true;
        self
    }

    /// The same lab on a host with so much RAM to spare, bytes.
    #[must_use]
    pub fn with_spare_ram(mut self, bytes: u64) -> Self {
        self.ram = Some(bytes);
        self
    }

    /// A root with the machine [`BASE`], saved just after its guest came up, and with the same nonce in each test.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn with_base() -> Self {
        Self::with_base_on("vhdx")
    }

    /// [`Lab::with_base`] with disks of another format: `vhdx` or `vhd`.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn with_base_on(format: &str) -> Self {
        let lab = Self::empty();
        copy(&base(format), &lab.root());
        lab
    }

    /// [`Lab::with_base`], the machine running.
    pub fn running() -> (Self, Witness) {
        Self::running_on("vhdx")
    }

    /// [`Lab::with_base_on`], the machine running.
    pub fn running_on(format: &str) -> (Self, Witness) {
        let lab = Self::with_base_on(format);
        lab.ok(&["vm", "start", BASE]);
        let mut witness = lab.witness(BASE);
        witness.resync();
        (lab, witness)
    }

    /// The root of the machines.
    pub fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Where the machines' sockets lie.
    fn runtime(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// A place for files of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program, ready to run in this root with `args`.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(place::tenby());
        command.args(args).env("TENBY_ROOT", self.root()).env("TENBY_RUNTIME", self.runtime());
        command.env("LC_ALL", "C.UTF-8").env("NO_COLOR", "1").env("COLUMNS", "80").stdin(Stdio::null());
        command.current_dir(self.folder.path());
        if let Some(qemu) = &self.qemu {
            command.env("TENBY_QEMU", qemu);
        }
        if self.ordinary {
            command.env("TENBY_NO_USERFAULTFD", "1");
        }
        if let Some(ram) = self.ram {
            command.env("TENBY_AVAILABLE_RAM", ram.to_string());
        }
        command
    }

    /// Runs the program to its end.
    ///
    /// # Panics
    /// If there is no end.
    #[track_caller]
    pub fn tenby(&self, args: &[&str]) -> Output {
        finish(&mut self.command(args))
    }

    /// Runs the program to its end; so long after it was started, there is a blow.
    ///
    /// # Panics
    /// If there is no end.
    pub fn struck(&self, args: &[&str], after: Duration, blow: impl FnOnce()) -> Output {
        std::thread::scope(|scope| {
            let command = scope.spawn(|| self.tenby(args));
            std::thread::sleep(after);
            blow();
            command.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs the program, which has to succeed, and gives what it printed.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        self.tenby(args).exits(0).stdout.clone()
    }

    /// Runs the program with `--json`; it has to succeed.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        self.tenby(&[&["--json"], args].concat()).exits(0).json()
    }

    /// Runs the program, which has to end with `code`, an error in JSON, and a message with `words` in it.
    ///
    /// # Panics
    /// If anything of that is otherwise.
    #[track_caller]
    pub fn fails(&self, code: i32, words: &str, args: &[&str]) -> Value {
        let output = self.tenby(&[&["--json"], args].concat());
        let error = output.exits(code).json()["error"].clone();
        let message = error["message"].as_str().unwrap_or_default();
        assert!(error["kind"].is_string() && !message.is_empty(), "{}: {error}", output.command);
        assert!(message.contains(words), "{}: \"{message}\" does not say \"{words}\"", output.command);
        error
    }

    /// Makes a machine of the test guest, with two disks of 64 MiB, off.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn create_guest(&self, name: &str) {
        self.create_guest_on(name, ["new:64M", "new:64M"]);
    }

    /// The same with so much RAM.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn create_guest_with(&self, name: &str, memory: &str) {
        self.create(name, ["new:64M", "new:64M"], &["--memory", memory]);
    }

    /// The same with these two disks.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn create_guest_on(&self, name: &str, disks: [&str; 2]) {
        self.create(name, disks, &["--memory", BASE_MEMORY]);
    }

    /// Makes a machine of the test guest that is booted by UEFI, with two disks of 64 MiB, off.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn create_uefi_guest(&self, name: &str) {
        self.create(name, ["new:64M", "new:64M"], &["--memory", UEFI_MEMORY, "--firmware", "uefi"]);
    }

    fn create(&self, name: &str, disks: [&str; 2], hardware: &[&str]) {
        let guest = guest();
        let (kernel, initrd) = (guest.kernel.to_string_lossy(), guest.initrd.to_string_lossy());
        let files = ["--kernel", &kernel, "--initrd", &initrd, "--append", guest.append.trim()];
        let disks = ["--accel", "tcg", "--disk", disks[0], "--disk", disks[1]];
        self.ok(&[&["vm", "create", name], hardware, &disks, &files].concat());
    }

    /// Opens the serial console of a machine.
    ///
    /// # Panics
    /// If it cannot be opened.
    pub fn witness(&self, name: &str) -> Witness {
        let mut command = self.command(&["vm", "console", name]);
        let said = File::options().create(true).append(true).open(self.path("console.log")).expect("a file of ours");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(said);
        let mut console = command.spawn().expect("the program can be started");
        let (from, to): (ChildStdout, ChildStdin) =
            (console.stdout.take().expect("it is a pipe"), console.stdin.take().expect("it is a pipe"));
        Witness::new(from, to, Some(Box::new(Console(console))))
    }

    /// The state of a machine.
    #[track_caller]
    pub fn state(&self, name: &str) -> String {
        self.json(&["vm", "show", name])["state"].as_str().unwrap_or_default().to_owned()
    }

    /// Takes a snapshot of [`BASE`], and gives its id.
    #[track_caller]
    pub fn snapshot(&self, name: &str) -> String {
        let job = self.json(&["snapshot", "create", BASE, name]);
        job["result"]["snapshot"].as_str().unwrap_or_else(|| panic!("no id in {job}")).to_owned()
    }

    /// The snapshots of [`BASE`].
    #[track_caller]
    pub fn tree(&self) -> Value {
        self.json(&["snapshot", "list", BASE])
    }

    /// Moves the root to a disk of this size (`256m`).
    ///
    /// # Panics
    /// If that cannot be done.
    pub fn on_a_small_disk(&self, size: &str) -> SmallDisk {
        let (root, aside) = (self.root(), self.path("aside"));
        std::fs::rename(&root, &aside).expect("it is ours");
        let small = SmallDisk::mount(&root, size);
        let copied = Command::new("cp").arg("-a").arg(aside.join(".")).arg(&root).status();
        assert!(copied.expect("cp is there").success());
        small
    }

    /// Waits until nothing is under way or pending, but for files that other files stand on. (What memory is being lent from is not merged before
    /// it has arrived.)
    ///
    /// # Panics
    /// If that does not come.
    pub fn settle(&self) {
        wait_for("all work to end", || {
            let arrived = self.json(&["vm", "ledger", BASE])["machine"]["now"]["restoring"].is_null();
            let jobs = self.json(&["job", "list", BASE]);
            let running = jobs["jobs"].as_array().expect("a list").iter().any(|job| job["ended"].is_null());
            let pending = self.tree()["pending"].as_array().expect("a list").iter().any(|work| work["kind"] != "wait");
            (arrived && !running && !pending).then_some(())
        });
    }

    /// Waits until all that is sealed of [`BASE`] was hashed, and reads it: it is as it was. What the check says.
    ///
    /// # Panics
    /// If that does not come, or something is not as it was.
    pub fn wait_hashed(&self) -> Value {
        wait_for("all that is sealed to be hashed", || {
            let audit = self.json(&["vm", "check", BASE, "--deep"]);
            let findings = audit["findings"].as_array().expect("findings");
            let unhashed = findings.iter().any(|finding| finding["kind"] == "unhashed");
            (audit["compared"]["layers"] == audit["compared"]["sealed"] && !unhashed).then_some(audit)
        })
    }

    /// Every snapshot can be applied, and the folder holds the files that the ledger names, no more and no fewer.
    ///
    /// # Panics
    /// If that is not so.
    pub fn assert_tidy(&self) {
        let tree = self.tree();
        for snapshot in tree["snapshots"].as_array().expect("a list") {
            assert_eq!(snapshot["state"], "ready", "{snapshot}");
        }
        let ledger = self.json(&["vm", "ledger", BASE]);
        let rows = ledger["machine"]["layers"].as_object().unwrap_or_else(|| panic!("no layers in {ledger}"));
        let ours = rows.values().filter(|row| row["in_place"] == false);
        let mut named: Vec<String> = ours.map(|row| row["file"].as_str().expect("a name").to_owned()).collect();
        named.sort();
        let there: Vec<String> = self.files().into_iter().map(|(name, _)| name).collect();
        assert_eq!(there, named, "the files of the folder, and those of the ledger");
        self.assert_linked(rows, &ledger["machine"]["now"]["disks"]);
    }

    /// Each file names the one that it stands on, so that other tools find it. (Those that are being written may be locked.)
    fn assert_linked(&self, rows: &serde_json::Map<String, Value>, leaves: &Value) {
        let leaves: Vec<&Value> = leaves.as_object().into_iter().flat_map(serde_json::Map::values).collect();
        let file = |row: &Value| row["file"].as_str().expect("a name").to_owned();
        for row in rows.values() {
            let Some(parent) = row["parent"].as_str().filter(|parent| rows[*parent]["in_place"] == false) else {
                continue;
            };
            let path = self.machine_folder().join(file(row));
            let output = self.tenby(&["--json", "disk", "info", &path.to_string_lossy()]);
            if output.code == 3 && leaves.contains(&&row["id"]) {
                continue;
            }
            let info = output.exits(0).json();
            let named = info["parent"]["path"].as_str().unwrap_or_default().trim_start_matches(r".\").to_owned();
            assert_eq!(file(&rows[parent]).rsplit('/').next(), Some(named.as_str()), "what {} stands on", file(row));
        }
    }

    /// The layers' files of [`BASE`], by name below its folder, with the bytes that each occupies.
    pub fn files(&self) -> Vec<(String, u64)> {
        let folder = self.machine_folder();
        let mut files = Vec::new();
        for kind in ["disks", "memory"] {
            for entry in std::fs::read_dir(folder.join(kind)).expect("a machine has this folder") {
                let entry = entry.expect("the folder can be read");
                let occupied = std::os::unix::fs::MetadataExt::blocks(&entry.metadata().expect("it is there")) * 512;
                files.push((format!("{kind}/{}", entry.file_name().to_string_lossy()), occupied));
            }
        }
        files.sort();
        files
    }

    /// What lies below the root and where the sockets are, by name: machines' folders, and whatever else was left there.
    pub fn left(&self) -> Vec<String> {
        let names =
            entries(&self.root()).chain(entries(&self.runtime())).filter_map(|path| Some(path.file_name()?.to_owned()));
        // The root's own lock stays, and what QEMU has said of itself.
        let names = names.map(|name| name.to_string_lossy().into_owned());
        names.filter(|name| !["lock", "qemu"].contains(&name.as_str())).collect()
    }

    /// The folders of the only machine's sockets: one a QEMU.
    pub fn sockets(&self) -> Vec<PathBuf> {
        let below = entries(&self.runtime()).flat_map(|machine| entries(&machine));
        below.filter(|path| path.join("qemu/qmp.sock").exists()).collect()
    }

    /// The folder of [`BASE`].
    pub fn machine_folder(&self) -> PathBuf {
        self.root().join(self.json(&["vm", "show", BASE])["id"].as_str().expect("a machine has an id"))
    }

    /// Every process of this lab: the program's, its workers' and their QEMUs'.
    pub fn processes(&self) -> Vec<Process> {
        let mark = self.folder.path().to_string_lossy().into_owned();
        let ours = |process: &Process| {
            process.environ.contains(&mark)
                || process.command.contains(&mark)
                || process.cwd.starts_with(self.folder.path())
        };
        processes().filter(ours).collect()
    }

    /// The worker of the only machine, if one runs.
    pub fn worker(&self) -> Option<Pid> {
        let workers = self.processes();
        workers.iter().find(|process| process.is_worker()).map(|process| process.pid)
    }

    /// Kills the worker as the kernel does when memory ends, and waits until it is gone.
    ///
    /// # Panics
    /// If there is none.
    pub fn kill_worker(&self) {
        assert!(self.kill(Process::is_worker) > 0, "a worker runs");
    }

    /// Kills QEMU in the same way.
    ///
    /// # Panics
    /// If there is none.
    pub fn kill_qemu(&self) {
        assert!(self.kill(Process::is_qemu) > 0, "a QEMU runs");
    }

    /// Kills those of its processes, whoever is there, waits until they are gone, and says how many they were.
    ///
    /// # Panics
    /// If one does not end.
    pub fn kill(&self, which: impl Fn(&Process) -> bool) -> usize {
        let doomed: Vec<Pid> =
            self.processes().iter().filter(|process| which(process)).map(|process| process.pid).collect();
        // One of them may be leaving just now.
        let killed: Vec<Pid> = doomed.into_iter().filter(|pid| kill_process(*pid, Signal::KILL).is_ok()).collect();
        for pid in &killed {
            self.wait_gone(*pid);
        }
        killed.len()
    }

    /// What a process has open: a path, or what else `/proc` calls it. Empty if it is gone.
    pub fn descriptors(&self, pid: Pid) -> Vec<String> {
        let links = entries(&PathBuf::from(format!("/proc/{}/fd", pid.as_raw_nonzero())));
        let targets = links.filter_map(|link| std::fs::read_link(link).ok());
        targets.map(|target| target.to_string_lossy().into_owned()).collect()
    }

    /// Waits until a process of this lab has ended.
    ///
    /// # Panics
    /// If it does not.
    pub fn wait_gone(&self, pid: Pid) {
        wait_for("a process to end", || self.processes().iter().all(|process| process.pid != pid).then_some(()));
    }
}

/// What the machines under a root noted, for the report of a test that failed.
pub(crate) fn tell(root: &Path) {
    let machines = std::fs::read_dir(root).into_iter().flatten().filter_map(Result::ok);
    let logs = machines.flat_map(|machine| {
        ["machine.log", "worker.log", "qemu.log", "serial.log"].map(|log| machine.path().join("log").join(log))
    });
    logs.for_each(|log| tell_end(&log));
}

/// The last lines of a log.
fn tell_end(log: &Path) {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    eprintln!("{}", log.display());
    lines[lines.len().saturating_sub(30)..].iter().for_each(|line| eprintln!("  {line}"));
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tell(&self.root());
            tell_end(&self.path("console.log"));
        }
        // A worker may be starting a QEMU just now, so this is repeated until nothing is left.
        for _ in 0..100 {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            for process in left {
                // It may be gone already.
                let _ = kill_process(process.pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A process, as /proc shows it; words end with zero bytes.
#[derive(Debug)]
pub struct Process {
    /// Its id.
    pub pid: Pid,
    command: String,
    environ: String,
    /// Where it is: a QEMU has nothing else of its lab's.
    cwd: PathBuf,
}

impl Process {
    /// Whether it is a machine's worker.
    pub fn is_worker(&self) -> bool {
        self.command.contains("\0worker\0")
    }

    /// Whether it is a QEMU that runs a machine (not one that is asked for its version).
    pub fn is_qemu(&self) -> bool {
        let program = self.command.split('\0').next().unwrap_or_default();
        program.contains("qemu-system") && self.command.contains("\0-qmp") || self.command.contains("\0-kernel\0")
    }
}

/// What a folder holds; nothing, if there is none.
fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}

fn processes() -> impl Iterator<Item = Process> {
    let entries = std::fs::read_dir("/proc").expect("there is a /proc");
    entries.filter_map(|entry| {
        let entry = entry.ok()?;
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let read = |name| Some(String::from_utf8_lossy(&std::fs::read(entry.path().join(name)).ok()?).into_owned());
        let cwd = std::fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        let process = Process { pid, command: read("cmdline")?, environ: read("environ")?, cwd };
        // One that has ended and waits for its parent has no command any more.
        (!process.command.is_empty() && pid != rustix::process::getpid()).then_some(process)
    })
}

/// A console that ends with the conversation.
struct Console(Child);

impl Drop for Console {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end, within the deadline.
#[track_caller]
fn finish(command: &mut Command) -> Output {
    let line = words(command);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program can be started");
    let pid = Pid::from_child(&child);
    let (send, done) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(child.wait_with_output()));
    let Ok(output) = done.recv_timeout(DEADLINE) else {
        // The thread still waits for it, so the id is still its own.
        let _ = kill_process(pid, Signal::KILL);
        panic!("{line} does not end");
    };
    let output = output.expect("the program is our child");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the program prints text");
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
        command: line,
    }
}

fn words(command: &Command) -> String {
    let words = command.get_args().map(|word| word.to_string_lossy().into_owned());
    std::iter::once("tenby".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// The saved machine that tests begin with: made by the first test that asks for it, again whenever the program, the guest or QEMU
/// has changed, and by one process at a time.
fn base(format: &str) -> PathBuf {
    let folder = place::target().join("e2e");
    std::fs::create_dir_all(&folder).expect("target can be written");
    let lock = File::create(folder.join("lock")).expect("target can be written");
    wait_for("another test to make the base machine", || match lock.try_lock() {
        Ok(()) => Some(()),
        Err(TryLockError::WouldBlock) => None,
        Err(TryLockError::Error(error)) => panic!("the base machine's lock: {error}"),
    });
    let version = format!("base-{:016x}-", version());
    let base = folder.join(format!("{version}{format}"));
    if !base.exists() {
        forget_others(&folder, &version);
        make_base(&base, format);
    }
    base
}

/// A number that changes with everything that a saved machine depends on.
fn version() -> u64 {
    let guest = guest();
    let mut hash = DefaultHasher::new();
    for file in [place::tenby(), guest.initrd, guest.kernel] {
        let about = std::fs::metadata(&file).expect("the file was found before");
        (about.len(), about.modified().ok()).hash(&mut hash);
    }
    (guest.append, std::env::var_os("TENBY_QEMU")).hash(&mut hash);
    hash.finish()
}

fn forget_others(folder: &Path, version: &str) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("base-") && !name.starts_with(version) {
            // What stays only takes room.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn make_base(base: &Path, format: &str) {
    let lab = Lab::empty();
    let disk = format!("new:64M,format={format}");
    lab.create_guest_on(BASE, [&disk, &disk]);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    witness.prove();
    drop(witness);
    lab.ok(&["vm", "save", BASE]);
    // The ledger is the worker's for as long as it runs.
    wait_for("the worker to leave", || lab.worker().is_none().then_some(()));
    copy(&lab.root(), base);
}

/// Copies a folder with its holes and marks.
fn copy(from: &Path, to: &Path) {
    let making = to.with_extension("making");
    let status = Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(&making).status();
    assert!(status.expect("cp is there").success(), "cannot copy {}", from.display());
    std::fs::rename(making, to).expect("the copy is ours");
}
