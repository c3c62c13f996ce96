//! A page of a memory disk that is not what was captured: no guest gets it.

#[expect(dead_code, reason = "each test uses a part of the disks")]
mod support;

use image::Access;
use memory::stream::{Block, DeviceState, Emitter, PAGE};
use memory::table::Layout;
use memory::{Beginning, Error, ErrorKind, Lending, Lent, Pace, Sealed, Trail, lend, restore};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{JoinHandle, spawn};
use store::sim::Sim;
use support::Disks;

/// Pages of RAM; the last ones are zeros.
const PAGES: u64 = 100;
const ZEROS_FROM: u64 = 90;
/// The one that is damaged.
const HARMED: u64 = 21;

/// A page of this guest after so many weeks: the first half of them changes from week to week.
fn page(number: u64, week: u64) -> [u8; PAGE] {
    let value = match number {
        ZEROS_FROM.. => 0,
        0..50 => number + 1 + (week << 32),
        _ => number + 1,
    };
    std::array::from_fn(|at| value.to_le_bytes()[at % 8])
}

fn blocks() -> Vec<Block> {
    vec![Block { name: "ram".into(), len: PAGES * PAGE as u64 }]
}

fn stream(week: u64) -> Vec<u8> {
    let (mut out, blocks) = (Vec::new(), blocks());
    let mut emitter = Emitter::new(1, &blocks);
    Emitter::prelude(&mut out, "pc-test-1.0");
    emitter.start(&mut out);
    emitter.open_part(&mut out);
    for number in 0..PAGES {
        match page(number, week) {
            data if data == [0; PAGE] => emitter.zero_page(&mut out, 0, number * PAGE as u64),
            data => emitter.page(&mut out, 0, number * PAGE as u64, &data),
        }
    }
    emitter.close(&mut out);
    Emitter::finish(&mut out, &DeviceState { state: vec![4; 1000], description: b"{}".to_vec() });
    out
}

/// Where a page lies on the disk.
fn place(number: u64) -> u64 {
    Layout::of(&blocks()).blocks[0] + number * PAGE as u64
}

/// Two weeks of it.
fn disks() -> Disks {
    let mut disks = Disks::new();
    let (first, _) = disks.capture(&*stream(0), None, |_| {}).unwrap();
    disks.capture(&*stream(1), Some(first), |_| {}).unwrap();
    disks
}

/// Changes a byte of a page as a disk's own layer holds it.
fn flip(disks: &Disks, disk: usize, number: u64) {
    let chain = disks.open(disk, Access::Write);
    let mut byte = [0];
    chain.read(&mut byte, place(number) + 99).unwrap();
    chain.write(&[!byte[0]], place(number) + 99).unwrap();
    chain.close().unwrap();
}

/// Which page it is, and in which disk's file.
fn is_told(error: &Error, number: u64, disk: usize) {
    assert_eq!(error.kind, ErrorKind::Damaged, "{error}");
    let words = format!("byte {} ({:#x} of ram) is not as it was captured, in ", place(number), number * PAGE as u64);
    assert!(error.message.contains(&words) && error.message.ends_with(&format!("/{disk}")), "{error}");
}

#[test]
fn a_damaged_page_is_not_restored() {
    // Of either layer, and one that was zeros.
    for (disk, number) in [(0, HARMED), (1, HARMED), (0, 60), (0, 95)] {
        let disks = disks();
        flip(&disks, disk, number);
        is_told(&restore(&disks.sealed(disk), Vec::new(), |_, _| {}).unwrap_err(), number, disk);
        // Seen through the other one, too, unless that has a page of its own there.
        if disk == 0 {
            let other = restore(&disks.sealed(1), Vec::new(), |_, _| {});
            match other {
                Ok(_) => assert!(number < 50, "page {number}"),
                Err(error) => is_told(&error, number.max(50), 0),
            }
        }
    }
}

#[test]
fn a_page_that_was_lost_is_not_restored_as_zeros() {
    for (disk, number) in [(0, HARMED), (1, HARMED), (1, 60)] {
        let disks = disks();
        let chain = disks.open(disk, Access::Write);
        chain.zero(place(number), PAGE as u64).unwrap();
        chain.close().unwrap();
        is_told(&restore(&disks.sealed(disk), Vec::new(), |_, _| {}).unwrap_err(), number, disk);
    }
}

#[test]
fn what_is_not_recorded_is_not_checked() {
    let disks = disks();
    flip(&disks, 0, HARMED);
    flip(&disks, 1, HARMED);
    for disk in 0..2 {
        restore(&disks.open(disk, Access::Read).into(), Vec::new(), |_, _| {}).unwrap();
    }
}

/// A capture goes by what is recorded of its parent: it stores again what is not, and the rest is told of when it is read.
#[test]
fn a_capture_over_a_damaged_page_relies_on_what_is_recorded() {
    let mut disks = disks();
    flip(&disks, 0, 60);
    let (by_record, captured) = disks.capture(&*stream(1), Some(1), |_| {}).unwrap();
    assert_eq!((captured.counts.same, captured.counts.stored), (ZEROS_FROM, 0));
    is_told(&restore(&disks.sealed(by_record), Vec::new(), |_, _| {}).unwrap_err(), 60, 0);
    let unknown = Some((1, disks.open(1, Access::Read).into()));
    let (by_reading, captured) = disks.capture_over(&*stream(1), unknown, |_| {}).unwrap();
    assert_eq!((captured.counts.same, captured.counts.stored), (ZEROS_FROM - 1, 1));
    restore(&disks.sealed(by_reading), Vec::new(), |_, _| {}).unwrap();
}

/// A guest that takes its pages, on a thread of its own.
struct Guest {
    socket: UnixStream,
    lending: Lending,
    told: Receiver<Error>,
    /// Told when all of RAM was looked at, and once more when all of it was sent.
    through: Receiver<()>,
    ended: JoinHandle<memory::Result<Lent>>,
    taken: JoinHandle<Vec<u8>>,
}

impl Guest {
    fn new(sealed: Sealed) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (lending, (tell, told), (pass, through)) = (Lending::default(), channel(), channel());
        let handle = lending.clone();
        let ended = spawn(move || {
            let trail = Trail::new(Sim::new().root().create("trail").unwrap()).unwrap();
            let trouble =
                |error: &Error| tell.send(Error { source: None, message: error.message.clone(), ..*error }).unwrap();
            let progress = |done, total| {
                if done == total {
                    pass.send(()).unwrap();
                }
            };
            lend(&sealed, &theirs, Beginning::Anew(Vec::new()), &handle, &trail, trouble, progress)
        });
        let mut socket = ours.try_clone().unwrap();
        let taken = spawn(move || {
            let mut all = Vec::new();
            socket.read_to_end(&mut all).unwrap();
            all
        });
        Self { socket: ours, lending, told, through, ended, taken }
    }

    /// Asks for a page, as QEMU does.
    fn ask(&mut self, number: u64) {
        let mut message = vec![0, 3, 0, 16];
        message.extend_from_slice(&(number * PAGE as u64).to_be_bytes());
        message.extend_from_slice(&(PAGE as u32).to_be_bytes());
        message.extend_from_slice(b"\x03ram");
        self.socket.write_all(&message).unwrap();
    }
}

/// Whether a stream brings a page.
fn brings(stream: &[u8], page: &[u8; PAGE]) -> bool {
    stream.windows(PAGE).any(|bytes| bytes == page)
}

#[test]
fn a_damaged_page_is_kept_back_until_it_is_right() {
    let disks = disks();
    flip(&disks, 1, HARMED);
    let mut guest = Guest::new(disks.sealed(1));
    guest.lending.pace(Pace::Full);
    guest.ask(HARMED);
    is_told(&guest.told.recv().unwrap(), HARMED, 1);
    assert!(!guest.ended.is_finished());
    flip(&disks, 1, HARMED);
    guest.through.recv().unwrap();
    guest.through.recv().unwrap();
    // It has all that it needs.
    guest.socket.write_all(&[0, 1, 0, 4, 0, 0, 0, 0]).unwrap();
    guest.ended.join().unwrap().unwrap();
    let stream = guest.taken.join().unwrap();
    for number in 0..ZEROS_FROM {
        assert!(brings(&stream, &page(number, 1)), "page {number}");
    }
    let mut harmed = page(HARMED, 1);
    harmed[99] = !harmed[99];
    assert!(!brings(&stream, &harmed));
}

#[test]
fn a_page_that_was_lost_is_not_taken_for_zeros() {
    let disks = disks();
    let chain = disks.open(1, Access::Write);
    chain.zero(place(60), PAGE as u64).unwrap();
    chain.close().unwrap();
    let guest = Guest::new(disks.sealed(1));
    guest.lending.pace(Pace::Full);
    is_told(&guest.told.recv().unwrap(), 60, 1);
    assert!(!guest.ended.is_finished());
    guest.socket.shutdown(std::net::Shutdown::Both).unwrap();
    guest.ended.join().unwrap().unwrap_err();
}

/// While it is being loaded it can still be given up.
#[test]
fn a_guest_that_does_not_run_yet_is_given_up_over_a_damaged_page() {
    let disks = disks();
    flip(&disks, 0, 60);
    let mut guest = Guest::new(disks.sealed(1));
    guest.ask(60);
    is_told(&guest.ended.join().unwrap().unwrap_err(), 60, 0);
}
