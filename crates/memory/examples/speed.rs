//! How fast streams are captured and restored: `cargo run --release -p memory --example speed -- [MiB] [folder] [rounds]`.
//!
//! A thread writes the stream of a guest into a socket, as QEMU would; what is measured is bytes of guest RAM a second, from the
//! first byte of the stream to the flushed disk. *The guest's part* ends when the last page is read: until then a guest that
//! writes to a page may wait for it. `parse` only reads and parses. Of several rounds the median is told.
//!
//! A capture over a parent goes by what is recorded of that, or *reads* it: out of the page cache, or *cold*, from the disk.

use image::hashes::{Expected, Key, Pages};
use image::vhdx::{self, Options};
use image::{Access, Chain, Kind, Layer};
use memory::stream::{Block, DeviceState, Emitter, PAGE, Parser};
use memory::{Made, NewLayer, Sealed};
use rustix::fs::{Advice, fadvise};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::host::HostFolder;
use store::{Folder, Mode};
use uuid::Uuid;

/// What a guest's page holds: 0 for zeros.
type Fill = fn(u64) -> u64;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mib: u64 = arguments.next().map_or(512, |mib| mib.parse().expect("MiB of RAM"));
    let folder = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from).join("tenby-memory-speed");
    let _ = std::fs::remove_dir_all(&folder);
    let folder_of_disks = HostFolder::create(&folder).expect("a folder");
    let rounds = arguments.next().map_or(1, |rounds| rounds.parse().expect("how often"));
    let mut bench = Bench {
        path: folder.clone(),
        folder: folder_of_disks,
        len: mib << 20,
        rounds,
        key: Key::new(),
        records: BTreeMap::new(),
    };

    let filled: Fill = |page| page + 1;
    let zero: Fill = |_| 0;
    let changed: Fill = |page| if page % 20 == 0 { page + 7 } else { page + 1 };
    bench.parse("parse, all data", filled);
    bench.parse("parse, all zeros", zero);
    bench.capture("zeros over nothing", zero, "zeros", None);
    bench.capture("data over nothing", filled, "first", None);
    for (how, below) in [
        ("", Below::Recorded),
        (", read", Below::Read),
        (", cold", Below::RecordedCold),
        (", read cold", Below::ReadCold),
    ] {
        bench.capture(&format!("the same data{how}"), filled, "same", Some(("first", below)));
        bench.capture(&format!("5 % other data{how}"), changed, "second", Some(("first", below)));
        bench.capture(&format!("zeros over data{how}"), zero, "gone", Some(("first", below)));
        bench.capture(&format!("zeros over zeros{how}"), zero, "still", Some(("zeros", below)));
    }
    bench.read_record("record read", "first");
    bench.restore("restore, all data", &["first"], true);
    bench.restore("the same, unchecked", &["first"], false);
    bench.restore("restore, 5 % other data", &["first", "second"], true);
    bench.restore("restore, all zeros", &["zeros"], true);
    let _ = std::fs::remove_dir_all(&folder);
}

/// What is known of a parent, and where it lies.
#[derive(Clone, Copy, PartialEq)]
enum Below {
    Recorded,
    Read,
    RecordedCold,
    ReadCold,
}

struct Bench {
    path: PathBuf,
    folder: HostFolder,
    len: u64,
    rounds: usize,
    key: Key,
    /// What was recorded of each disk, and the id of the one below.
    records: BTreeMap<String, (Pages, Option<Uuid>)>,
}

fn id(name: &str) -> Uuid {
    Uuid::from_u128(name.bytes().fold(1, |id, byte| id * 256 + u128::from(byte)))
}

impl Bench {
    /// Does it as often as asked for, and says how long it takes.
    fn measure(&mut self, what: &str, mut once: impl FnMut(&mut Self) -> Duration) {
        let mut times: Vec<Duration> = (0..self.rounds).map(|_| once(self)).collect();
        times.sort();
        let seconds = times[self.rounds / 2].as_secs_f64();
        println!("{what:<28} {seconds:7.3} s {:8.0} MB/s", self.len as f64 / seconds / 1e6);
    }

    /// The stream of a guest, out of a socket.
    fn stream(&self, fill: Fill) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket");
        let len = self.len;
        std::thread::spawn(move || {
            let blocks = [Block { name: "pc.ram".into(), len }];
            let (mut out, mut emitter) = (Vec::new(), Emitter::new(1, &blocks));
            Emitter::prelude(&mut out, "pc-q35-10.0");
            emitter.start(&mut out);
            emitter.open_part(&mut out);
            let mut page = [0x5a; PAGE];
            for number in 0..len / PAGE as u64 {
                match fill(number) {
                    0 => emitter.zero_page(&mut out, 0, number * PAGE as u64),
                    value => {
                        page[PAGE - 8..].copy_from_slice(&value.to_le_bytes());
                        emitter.page(&mut out, 0, number * PAGE as u64, &page);
                    }
                }
                if out.len() > 256 << 10 {
                    theirs.write_all(&out).expect("the reader reads");
                    out.clear();
                }
            }
            emitter.close(&mut out);
            Emitter::finish(&mut out, &DeviceState { state: vec![4; 100_000], description: b"{}".to_vec() });
            theirs.write_all(&out).expect("the reader reads");
        });
        ours
    }

    fn parse(&mut self, what: &str, fill: Fill) {
        self.measure(what, |bench| {
            let start = Instant::now();
            let (mut stream, mut parser, mut buffer) = (bench.stream(fill), Parser::new(), vec![0; 1 << 20]);
            loop {
                let len = stream.read(&mut buffer).expect("the stream is read");
                let mut piece = &buffer[..len];
                while parser.next(&mut piece).expect("the stream is sound").is_some() {}
                if len == 0 {
                    break;
                }
            }
            parser.finish().expect("the stream is whole");
            start.elapsed()
        });
    }

    fn layer(&self, name: &str) -> Arc<dyn Layer> {
        vhdx::open(self.folder.open(name, Mode::Read).expect("a file"), Mode::Read).expect("an image")
    }

    fn chain(&self, names: &[&str]) -> Chain {
        Chain::new(names.iter().map(|name| self.layer(name)).collect(), Access::Read).expect("a chain")
    }

    /// What is recorded of a disk.
    fn expected(&self, names: &[&str]) -> Expected {
        let mut expected = Expected::default();
        let records = names.iter().rev().map(|name| self.records[*name].clone());
        records.for_each(|(pages, below)| _ = expected.add(pages, below));
        expected
    }

    fn capture(&mut self, what: &str, fill: Fill, name: &str, parent: Option<(&str, Below)>) {
        let mut read = Vec::new();
        self.measure(what, |bench| {
            let (whole, guests) = bench.capture_once(fill, name, parent);
            read.push(guests);
            whole
        });
        read.sort();
        println!("  the guest's part            {:7.3} s", read[self.rounds / 2].as_secs_f64());
    }

    /// How long it took, and the guest's part of that.
    fn capture_once(&mut self, fill: Fill, name: &str, parent: Option<(&str, Below)>) -> (Duration, Duration) {
        let _ = self.folder.unlink(name);
        let (parent, known) = parent.unzip();
        if let (Some(parent), Some(Below::RecordedCold | Below::ReadCold)) = (parent, known) {
            let file = std::fs::File::open(self.path.join(parent)).expect("a file");
            fadvise(&file, 0, None, Advice::DontNeed).expect("it leaves the page cache");
        }
        let start = Instant::now();
        let below = parent.map(|parent| match known {
            Some(Below::Recorded | Below::RecordedCold) => {
                Sealed { chain: self.chain(&[parent]), expected: self.expected(&[parent]) }
            }
            _ => self.chain(&[parent]).into(),
        });
        let new_layer = |new: NewLayer| {
            let mut layers: Vec<_> = parent.map(|parent| self.layer(parent)).into_iter().collect();
            let options = match layers.last() {
                Some(below) => Options::differencing(below.as_ref(), parent.unwrap_or_default())?,
                None => Options { sector_size: PAGE as u32, kind: Kind::Dynamic, ..Options::dynamic(new.size) },
            };
            layers.push(vhdx::create(self.folder.create(name)?, &options)?);
            let chain = Arc::new(Chain::new(layers, Access::Write)?);
            Ok(Made { chain, pages: Pages::new(id(name), new.size, self.key)? })
        };
        let mut read = Duration::ZERO;
        let captured = memory::capture(self.stream(fill), below.as_ref(), new_layer, |_| read = start.elapsed());
        let whole = start.elapsed();
        let captured = captured.expect("a capture");
        captured.chain.close().expect("closed");
        let below = parent.map(id);
        self.records.insert(name.to_owned(), (captured.pages.whole(below), below));
        (whole, read)
    }

    /// What is recorded of a disk, out of its file.
    fn read_record(&mut self, what: &str, name: &str) {
        let (pages, below) = &self.records[name];
        let below = *below;
        pages.write(&*self.folder.create("record").expect("a file")).expect("written");
        self.measure(what, |bench| {
            let start = Instant::now();
            let pages = Pages::read(&*bench.folder.open("record", Mode::Read).expect("a file")).expect("a record");
            Expected::default().add(pages, below);
            start.elapsed()
        });
    }

    fn restore(&mut self, what: &str, names: &[&str], checked: bool) {
        self.measure(what, |bench| {
            let start = Instant::now();
            let expected = if checked { bench.expected(names) } else { Expected::default() };
            let (mut ours, theirs) = UnixStream::pair().expect("a socket");
            let reader = std::thread::spawn(move || {
                let mut buffer = vec![0; 1 << 20];
                while ours.read(&mut buffer).expect("the stream is read") > 0 {}
            });
            memory::restore(&Sealed { chain: bench.chain(names), expected }, theirs, |_, _| {}).expect("a restore");
            reader.join().expect("the reader ends");
            start.elapsed()
        });
    }
}
