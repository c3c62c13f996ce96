//! Against real QEMUs, without a kernel: the firmware alone is guest enough here.
//!
//! Every test runs with each QEMU that is there: `TENBY_QEMU_72`, `TENBY_QEMU_10`, else the one that Tenby would use.

use qemu::{
    Accel, Boot, Bus, CaptureMode, Console, Disk, Ending, Error, EventKind, Installed, Launch, MigrationStatus, Nic,
    Publish, Qemu, RestoreMode, RunState,
};
use std::future::Future;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// No test waits longer than this for anything. Far beyond what a loaded machine needs: it turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(120);

fn binaries() -> Vec<PathBuf> {
    let named: Vec<_> =
        ["TENBY_QEMU_72", "TENBY_QEMU_10"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    if !named.is_empty() {
        return named;
    }
    match qemu::find_binary() {
        Ok(binary) => vec![binary],
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            vec![]
        }
    }
}

/// Runs `test` with each QEMU, in a runtime of its own.
fn with_each<F: Future<Output = ()>>(test: impl Fn(Place) -> F) {
    for binary in binaries() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let installed = Installed::probe(&binary).await.expect("it answers");
            eprintln!("QEMU {} at {}", installed.version, binary.display());
            let place = Place { dir: tempfile::tempdir().expect("a folder"), installed };
            tokio::time::timeout(PATIENCE, test(place)).await.expect("it did not hang");
        });
    }
}

/// A folder for the machines of a test.
struct Place {
    dir: TempDir,
    installed: Installed,
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A machine of 64 MiB whose sockets lie in `run`.
    fn launch(&self, run: &str) -> Launch {
        let run_dir = self.path(run);
        std::fs::create_dir_all(&run_dir).expect("the run folder");
        Launch {
            binary: self.installed.binary.clone(),
            machine_type: "pc-q35-7.2".into(),
            accel: Accel::Tcg,
            cpu_model: qemu::cpu_model(Accel::Tcg).into(),
            memory: 64 << 20,
            cpus: 1,
            name: "a, machine".into(),
            uuid: "8d3cc1c7-3c1d-4c0e-9a0e-2f7e4f3a4b10".into(),
            generation: Some("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87".into()),
            run_dir,
            log: self.path("qemu, its log"),
            console_log: self.path("console, its log"),
            disks: vec![],
            cdrom: None,
            boot: Boot::Disk,
            kernel: None,
            nic: None,
            incoming: false,
            sandbox: true,
        }
    }
}

/// A process that does not outlive its test.
struct Guard(Qemu);

impl std::ops::Deref for Guard {
    type Target = Qemu;
    fn deref(&self) -> &Qemu {
        &self.0
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_raw(self.0.identity().pid).expect("a process id");
        if self.0.state() == RunState::Running || std::thread::panicking() {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

async fn start(launch: &Launch) -> Guard {
    Guard(Qemu::start(launch).await.expect("it starts"))
}

async fn reach(qemu: &Qemu, state: RunState) {
    qemu.watch().wait_for(|now| *now == state).await.expect("the watch lives");
}

#[test]
fn it_starts_stops_and_goes_on() {
    with_each(|place| async move {
        let qemu = start(&place.launch("run")).await;
        assert_eq!(qemu.state(), RunState::Paused);
        let mut events = qemu.events();
        qemu.resume().await.expect("resume");
        assert_eq!(qemu.state(), RunState::Running);
        qemu.pause().await.expect("pause");
        assert_eq!(qemu.state(), RunState::Paused);
        let (first, second) = (events.next().await.expect("RESUME"), events.next().await.expect("STOP"));
        assert_eq!((first.kind, second.kind), (EventKind::Resume, EventKind::Stop));
        assert!(first.at.expect("a stamp") <= second.at.expect("a stamp"));
        qemu.resume().await.expect("resume");
        qemu.reset().await.expect("reset");
        assert_eq!(qemu.state(), RunState::Running);
        assert_eq!(qemu.quit(PATIENCE).await.expect("quit"), Ending::Exited(0));
        reach(&qemu, RunState::Exited(Ending::Exited(0))).await;
        assert!(matches!(qemu.pause().await, Err(Error::Disconnected)));
    });
}
