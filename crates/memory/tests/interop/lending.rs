//! Memory lent to a QEMU that runs already.

use super::{LARGE, background_snapshot, check_firmware_pages, machines, memory_of};
use crate::qemu::{PAGES, Qemu};
use crate::support::Disks;
use image::{Access, Chain};
use memory::stream::PAGE;
use memory::{Beginning, ErrorKind, Lending, Lent, Pace, Sealed, Touched, Trail};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{JoinHandle, spawn};
use std::time::Duration;
use store::sim::Sim;

/// A source of pages on a thread of its own.
struct Source {
    lending: Lending,
    socket: UnixStream,
    ended: JoinHandle<memory::Result<Lent>>,
}

impl Source {
    fn begin(sealed: Sealed, socket: UnixStream, beginning: Beginning) -> Self {
        let lending = Lending::default();
        let (ours, kept) = (lending.clone(), socket.try_clone().unwrap());
        let trail = Trail::new(Sim::new().root().create("trail").unwrap()).unwrap();
        let ended =
            spawn(move || memory::lend(&sealed, &socket, beginning, &ours, &trail, |e| panic!("{e}"), |_, _| {}));
        Self { lending, socket: kept, ended }
    }

    fn end(self) -> memory::Result<Lent> {
        self.ended.join().unwrap()
    }
}

/// A running machine was captured; what it was captured into.
fn captured(emulator: &Path, machine: &str) -> Disks {
    let mut disks = Disks::new();
    let mut qemu = Qemu::start(emulator, machine, LARGE, &[]);
    qemu.capability("background-snapshot");
    qemu.run_until_it_speaks();
    background_snapshot(&mut qemu, &mut disks, None);
    disks
}

/// A machine whose devices are loaded; it stands still, and has the pages that it asked for.
fn loaded(emulator: &Path, machine: &str, sealed: Sealed) -> (Qemu, Source) {
    loaded_with(emulator, machine, sealed, Vec::new())
}

fn loaded_with(emulator: &Path, machine: &str, sealed: Sealed, touched: Vec<Touched>) -> (Qemu, Source) {
    let mut qemu = Qemu::start_incoming(emulator, machine, LARGE);
    qemu.capability("postcopy-ram");
    let socket = qemu.incoming();
    let source = Source::begin(sealed, socket, Beginning::Anew(touched));
    while qemu.status() == "inmigrate" {}
    (qemu, source)
}

fn same_memory(qemu: &mut Qemu, chain: &Chain) {
    let at: u64 = LARGE.pages_at.into();
    // What the guest works on, and what it never touches; up to where other things than RAM are.
    for (at, len) in [(at, PAGES * PAGE as u64), (0, 0xa_0000)] {
        assert!(qemu.memory(at, len) == memory_of(chain, at, len));
    }
}

#[test]
fn a_machine_runs_before_its_memory_is_complete() {
    for (emulator, machine) in machines() {
        let mut disks = captured(&emulator, machine);
        let (mut qemu, source) = loaded(&emulator, machine, disks.sealed(0));
        assert_eq!(qemu.status(), "paused", "{machine}");
        // Nothing but what it asks for: enough to run.
        qemu.run_until_it_speaks();
        assert!(!source.ended.is_finished(), "{machine}");
        source.lending.pace(Pace::Gentle);
        let touched = source.end().unwrap().touched;
        assert_eq!(qemu.migration_end(), "completed");
        qemu.run_until_it_speaks();

        // It is as any other: captured again, only what it has counted differs.
        let off = serde_json::json!({"capabilities": [{"capability": "postcopy-ram", "state": false}]});
        qemu.command("migrate-set-capabilities", &off);
        qemu.capability("background-snapshot");
        let (second, captured) = background_snapshot(&mut qemu, &mut disks, Some(0));
        assert!(captured.counts.stored <= 1 && captured.counts.zeroed == 0, "{machine}: {:?}", captured.counts);
        check_firmware_pages(&disks.open(second, Access::Read), LARGE);

        // What it had to ask for it has at once the next time.
        assert!(!touched.is_empty(), "{machine}");
        let before = touched.len();
        let (mut qemu, source) = loaded_with(&emulator, machine, disks.sealed(0), touched);
        qemu.run_until_it_speaks();
        source.lending.pace(Pace::Full);
        let touched = source.end().unwrap().touched;
        assert!(touched.len() < before / 2 + 1, "{machine}: {} after {before}", touched.len());
    }
}

#[test]
fn a_machine_that_stands_still_gets_all_of_its_memory() {
    for (emulator, machine) in machines() {
        let disks = captured(&emulator, machine);
        let (mut qemu, source) = loaded(&emulator, machine, disks.sealed(0));
        // While others go first it has nothing but what it asks for, until somebody waits for the rest.
        source.lending.rest(Duration::from_secs(3600));
        source.lending.pace(Pace::Gentle);
        assert!(qemu.memory(LARGE.pages_at.into(), PAGE as u64).iter().any(|byte| *byte != 0), "{machine}");
        assert!(!source.ended.is_finished(), "{machine}");
        source.lending.pace(Pace::Full);
        source.end().unwrap();
        assert_eq!(qemu.migration_end(), "completed");
        same_memory(&mut qemu, &disks.open(0, Access::Read));
    }
}

/// The source of its pages dies; the next one goes on with what is missing.
#[test]
fn another_source_goes_on() {
    for (emulator, machine) in machines() {
        let disks = captured(&emulator, machine);
        let (mut qemu, source) = loaded(&emulator, machine, disks.sealed(0));
        source.socket.shutdown(Shutdown::Both).unwrap();
        assert_eq!(source.end().unwrap_err().kind, ErrorKind::Truncated);
        qemu.migration_is("postcopy-paused");
        let socket = qemu.recovering();
        let source = Source::begin(disks.sealed(0), socket, Beginning::Recovered);
        qemu.run_until_it_speaks();
        assert!(!source.ended.is_finished(), "{machine}");
        source.lending.pace(Pace::Full);
        source.end().unwrap();
        assert_eq!(qemu.migration_end(), "completed");
        qemu.run_until_it_speaks();
    }
}

/// A machine that ends in the middle ends the lending.
#[test]
fn a_machine_that_ends_takes_no_more() {
    for (emulator, machine) in machines() {
        let disks = captured(&emulator, machine);
        let (qemu, source) = loaded(&emulator, machine, disks.sealed(0));
        drop(qemu);
        source.lending.pace(Pace::Full);
        let kind = source.end().unwrap_err().kind;
        assert!(matches!(kind, ErrorKind::Truncated | ErrorKind::Stream), "{kind:?}");
    }
}
