//! Against the real thing: QEMU's own streams captured, ours loaded by QEMU; and streams of both versions kept as they were.

mod lending;
mod qemu;
mod recorded;
#[expect(dead_code, reason = "each test uses a part of the disks")]
#[path = "../support/mod.rs"]
mod support;

use image::{Access, Chain};
use memory::stream::PAGE;
use memory::{ErrorKind, Sealed, Signal};
use qemu::{Guest, LARGE, PAGES, Qemu, SMALL, emulator};
use std::io::Read;
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use support::Disks;

/// The machines that are tried: emulator's version, machine's type.
const MACHINES: [(&str, &str); 3] = [("7.2", "pc-q35-7.2"), ("10.0", "pc-q35-10.0"), ("10.0", "pc-i440fx-7.2")];

fn machines() -> impl Iterator<Item = (PathBuf, &'static str)> {
    MACHINES.into_iter().filter_map(|(version, machine)| Some((emulator(version)?, machine)))
}

/// Guest-physical memory on a memory disk: `pc.ram`, which begins at 0.
fn memory_of(chain: &Chain, at: u64, len: u64) -> Vec<u8> {
    let info = memory::inspect(chain).unwrap();
    let ram = info.blocks.iter().position(|block| block.name == "pc.ram").unwrap();
    let mut bytes = vec![0; len as usize];
    chain.read(&mut bytes, memory::table::Layout::of(&info.blocks).blocks[ram] + at).unwrap();
    bytes
}

/// Whether the disk holds what the firmware wrote, where it wrote it.
fn check_firmware_pages(chain: &Chain, guest: Guest) {
    let bytes = memory_of(chain, guest.pages_at.into(), PAGES * PAGE as u64);
    for (page, bytes) in bytes.chunks_exact(PAGE).enumerate() {
        assert_eq!(bytes[..2], (0xbe00 + page as u16).to_le_bytes(), "page {page}");
    }
}

fn background_snapshot(qemu: &mut Qemu, disks: &mut Disks, parent: Option<usize>) -> (usize, memory::Captured) {
    let stream = qemu.migrate();
    let captured = disks.capture(stream, parent, |_| {}).unwrap();
    assert_eq!(qemu.migration_end(), "completed");
    captured
}

/// Starts a machine from a memory disk; it stands still.
fn restored(emulator: &Path, machine: &str, guest: Guest, sealed: &Sealed) -> Qemu {
    let mut qemu = Qemu::start_incoming(emulator, machine, guest);
    let stream = qemu.incoming();
    memory::restore(sealed, stream, |_, _| {}).unwrap();
    assert_eq!(qemu.migration_end(), "completed");
    assert_eq!(qemu.status(), "paused");
    qemu
}

#[test]
fn a_running_machine_comes_back() {
    for (emulator, machine) in machines() {
        let mut disks = Disks::new();
        let mut qemu = Qemu::start(&emulator, machine, LARGE, &[]);
        qemu.capability("background-snapshot");
        qemu.run_until_it_speaks();
        let (first, captured) = background_snapshot(&mut qemu, &mut disks, None);
        assert_eq!(captured.machine, machine);
        check_firmware_pages(&disks.open(first, Access::Read), LARGE);
        assert_eq!(qemu.status(), "running");

        // The guest has gone on, in one page; nothing else is stored.
        qemu.run_until_it_speaks();
        let (second, captured) = background_snapshot(&mut qemu, &mut disks, Some(first));
        assert!(captured.on_parent);
        assert_eq!((captured.counts.stored, captured.counts.zeroed), (1, 0), "{machine}");
        let (all, changes) = (disks.allocated(first), disks.allocated(second));
        assert!(all < 8 << 20 && changes < 8 << 20, "{all} and {changes} bytes");
        drop(qemu);

        // The new QEMU has what the disk has, in every block, and goes on from there.
        let mut qemu = restored(&emulator, machine, LARGE, &disks.sealed(second));
        let at_rest = qemu.memory(LARGE.pages_at.into(), PAGES * PAGE as u64);
        assert_eq!(at_rest, memory_of(&disks.open(second, Access::Read), LARGE.pages_at.into(), PAGES * PAGE as u64));
        qemu.capability("background-snapshot");
        let (third, captured) = background_snapshot(&mut qemu, &mut disks, Some(second));
        assert_eq!((captured.counts.stored, captured.counts.zeroed), (0, 0), "{machine}: RAM is what was restored");
        qemu.run_until_it_speaks();
        check_firmware_pages(&disks.open(third, Access::Read), LARGE);
    }
}

#[test]
fn a_plain_migration_of_a_stopped_machine_comes_back() {
    for (emulator, machine) in machines() {
        let mut disks = Disks::new();
        let mut qemu = Qemu::start(&emulator, machine, SMALL, &[]);
        qemu.run_until_it_speaks();
        qemu.command("stop", &serde_json::json!({}));
        let counter = qemu.memory(SMALL.counter(), 4);
        let (disk, captured) = disks.capture(qemu.migrate(), None, |_| {}).unwrap();
        assert_eq!(qemu.migration_end(), "completed");
        assert_eq!(captured.machine, machine);
        check_firmware_pages(&disks.open(disk, Access::Read), SMALL);
        let mut qemu = restored(&emulator, machine, SMALL, &disks.sealed(disk));
        assert_eq!(qemu.memory(SMALL.counter(), 4), counter);
        qemu.run_until_it_speaks();
    }
}

/// Memory taken by the old QEMU is resumed by the new one, as the same machine.
#[test]
fn memory_outlives_an_upgrade_of_qemu() {
    let (Some(old), Some(new)) = (emulator("7.2"), emulator("10.0")) else { return };
    let mut disks = Disks::new();
    let mut qemu = Qemu::start(&old, "pc-q35-7.2", SMALL, &[]);
    qemu.capability("background-snapshot");
    qemu.run_until_it_speaks();
    let (disk, _) = background_snapshot(&mut qemu, &mut disks, None);
    drop(qemu);
    let mut qemu = restored(&new, "pc-q35-7.2", SMALL, &disks.sealed(disk));
    assert_eq!(qemu.memory(SMALL.counter(), 4), memory_of(&disks.open(disk, Access::Read), SMALL.counter(), 4));
    qemu.run_until_it_speaks();
}

/// A background snapshot cannot be broken off: QEMU before 8.1 leaves the guest's memory protected for ever. When our side fails, the
/// stream is read to its end, and the guest is none the worse, nor is the next capture.
#[test]
fn a_capture_that_fails_is_read_to_its_end() {
    for (emulator, machine) in machines() {
        let mut disks = Disks::new();
        let mut qemu = Qemu::start(&emulator, machine, LARGE, &[]);
        qemu.capability("background-snapshot");
        qemu.run_until_it_speaks();
        let mut stream = qemu.migrate();
        let full = memory::capture(&mut stream, None, |_| Err("no room".into()), |_| {});
        assert_eq!(full.unwrap_err().kind, ErrorKind::Image);
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
        assert_eq!(qemu.migration_end(), "completed");
        qemu.run_until_it_speaks();
        let (disk, _) = background_snapshot(&mut qemu, &mut disks, None);
        check_firmware_pages(&disks.open(disk, Access::Read), LARGE);
    }
}

/// The capture of a machine that stands still may be broken off, by either side.
#[test]
fn a_plain_migration_may_be_cancelled() {
    for (emulator, machine) in machines() {
        let mut disks = Disks::new();
        let mut qemu = Qemu::start(&emulator, machine, LARGE, &[]);
        let stream = qemu.migrate();
        let cancelled = disks.capture(Crumbs(stream), None, |signal| {
            if signal == Signal::Pages {
                qemu.command("migrate_cancel", &serde_json::json!({}));
            }
        });
        assert_eq!(cancelled.unwrap_err().kind, ErrorKind::Truncated);
        assert_eq!(qemu.migration_end(), "cancelled");

        let stream = qemu.migrate();
        let end = stream.try_clone().unwrap();
        let cancelled = disks.capture(Crumbs(stream), None, |signal| {
            if signal == Signal::Pages {
                end.shutdown(Shutdown::Both).unwrap();
            }
        });
        assert_eq!(cancelled.unwrap_err().kind, ErrorKind::Truncated);
        assert_eq!(qemu.migration_end(), "failed");
        qemu.run_until_it_speaks();
    }
}

/// Reads little at a time: the stream of [`LARGE`] cannot have ended when its first pages are seen.
struct Crumbs<R>(R);

impl<R: Read> Read for Crumbs<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = buf.len().min(512);
        self.0.read(&mut buf[..len])
    }
}
