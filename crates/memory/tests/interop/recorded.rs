//! Streams of both versions of QEMU as they once were: background snapshots of the small guest of `qemu.rs`.
//!
//! They were made by `cargo test -p memory --test interop -- --ignored record`, and are kept so that the codec is held against
//! QEMU's own bytes where there is no QEMU.

use crate::qemu::{PAGES, Qemu, SMALL, emulator};
use crate::support::Disks;
use memory::stream::{DeviceState, Event, PAGE, Parser};
use std::io::Read;
use std::path::{Path, PathBuf};

const MACHINES: [(&str, &str); 2] = [("7.2", "pc-q35-7.2"), ("10.0", "pc-q35-10.0")];

fn path(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/interop/streams/qemu-{version}.stream"))
}

/// What a stream says: blocks (name, length), pages that are not zeros (block, offset, data), how many are, and the devices.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    machine: String,
    blocks: Vec<(String, u64)>,
    pages: Vec<(usize, u64, Vec<u8>)>,
    zeros: u64,
    tail: Vec<u8>,
}

/// Reads a stream in pieces of this length.
fn told(stream: &[u8], piece: usize) -> Told {
    let (mut parser, mut told) = (Parser::new(), Told::default());
    for mut piece in stream.chunks(piece) {
        while let Some(event) = parser.next(&mut piece).unwrap() {
            match event {
                Event::Configuration(machine) => told.machine = machine.into(),
                Event::Blocks { blocks, .. } => {
                    told.blocks = blocks.iter().map(|block| (block.name.clone(), block.len)).collect();
                }
                Event::Page { block, offset, data } => told.pages.push((block, offset, data.to_vec())),
                Event::ZeroPage { .. } => told.zeros += 1,
                Event::DeviceState(bytes) => told.tail.extend_from_slice(bytes),
                Event::Header | Event::Pages => {}
            }
        }
    }
    parser.finish().unwrap();
    told.pages.sort();
    told
}

#[test]
fn recorded_streams_are_understood() {
    for (version, machine) in MACHINES {
        let stream = std::fs::read(path(version)).unwrap();
        let whole = told(&stream, stream.len());
        assert_eq!(whole.machine, machine);
        let ram = whole.blocks.iter().position(|block| *block == ("pc.ram".into(), 4 << 20)).unwrap();
        for name in ["pc.bios", "/rom@etc/acpi/tables", "/rom@etc/table-loader"] {
            assert!(whole.blocks.iter().any(|block| block.0 == name), "{name} of {version}");
        }
        // Every page once.
        let all: u64 = whole.blocks.iter().map(|block| block.1).sum();
        assert_eq!((whole.pages.len() as u64 + whole.zeros) * PAGE as u64, all);
        for page in 0..PAGES {
            let at = u64::from(SMALL.pages_at) + page * PAGE as u64;
            let found = whole.pages.iter().find(|found| (found.0, found.1) == (ram, at)).unwrap();
            assert_eq!(found.2[..2], (0xbe00 + page as u16).to_le_bytes());
        }
        let devices = DeviceState::split(whole.tail.clone()).unwrap();
        let description: serde_json::Value = serde_json::from_slice(&devices.description).unwrap();
        let names: Vec<_> = description["devices"].as_array().unwrap().iter().map(|device| &device["name"]).collect();
        assert!(names.contains(&&"cpu".into()) && names.contains(&&"globalstate".into()), "{names:?}");
        assert_eq!(devices.state[0], 4);
        for piece in [1, 7, 4096, 4097] {
            assert_eq!(told(&stream, piece), whole, "in pieces of {piece}");
        }
    }
}

#[test]
fn recorded_streams_come_back_from_a_disk() {
    for (version, _) in MACHINES {
        let stream = std::fs::read(path(version)).unwrap();
        let mut disks = Disks::new();
        let (disk, captured) = disks.capture(&*stream, None, |_| {}).unwrap();
        let before = told(&stream, stream.len());
        assert_eq!(captured.counts.stored, before.pages.len() as u64);
        let mut again = Vec::new();
        memory::restore(&disks.sealed(disk), &mut again, |_, _| {}).unwrap();
        assert_eq!(told(&again, again.len()), before);
        let (_, captured) = disks.capture(&*again, Some(disk), |_| {}).unwrap();
        assert_eq!((captured.counts.stored, captured.counts.zeroed), (0, 0));
        assert!(disks.allocated(disk) < 8 << 20);
    }
}

#[test]
#[ignore = "makes the recordings anew"]
fn record() {
    for (version, machine) in MACHINES {
        let mut qemu = Qemu::start(&emulator(version).unwrap(), machine, SMALL, &[]);
        qemu.capability("background-snapshot");
        qemu.run_until_it_speaks();
        let mut stream = Vec::new();
        qemu.migrate().read_to_end(&mut stream).unwrap();
        assert_eq!(qemu.migration_end(), "completed");
        std::fs::create_dir_all(path(version).parent().unwrap()).unwrap();
        std::fs::write(path(version), stream).unwrap();
    }
}
