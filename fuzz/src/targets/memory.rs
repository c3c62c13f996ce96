//! Memory disks: streams captured into them, and their tables, whose places the mutations know.
//!
//! Rule beside the limits: what was captured is restored, and captured again it is the same.

use super::stream::{MOST, WORDS, sound, stream};
use super::{outcome, store_of};
use crate::file::{Disk, File, PAGE};
use crate::mutate::{self, Field, checksum_without};
use crate::run::{MEMORY, words};
use crate::{Input, Random, Target};
use image::hashes::{Key, Pages};
use image::vhdx::{self, Options};
use image::{Access, Chain};
use memory::{Captured, Made, NewLayer, capture, inspect, restore};
use std::io::Write;
use std::sync::Arc;
use store::Mode;
use uuid::Uuid;

pub(super) const TARGET: Target = Target {
    name: "memory",
    about: "memory disks: capture of a stream, the table, restore",
    quick: 1500,
    memory: MEMORY,
    seeds,
    mutate,
    run,
};

/// The longest stream that a restore may write before it is broken off, bytes.
const MOST_RESTORED: usize = 8 << 20;

/// An input is a stream to capture, and a disk to restore.
fn seeds() -> Vec<Input> {
    let mut all = Vec::new();
    for seed in 0..6 {
        let stream = sound(&mut Random::new(seed));
        let disk = disk(File::default());
        captured(&stream, &disk).expect("a sound stream").chain.close().expect("a sound image");
        let mut file = disk.file();
        crate::vhdx::settle_ids(&mut [&mut file]);
        all.push(Input(vec![File::of(&stream), file]));
    }
    all
}

fn disk(file: File) -> Arc<Disk> {
    Disk::new("memory.avhdx", file)
}

fn captured(stream: &[u8], disk: &Arc<Disk>) -> memory::Result<Captured> {
    let new_layer = |new: NewLayer| {
        let options = Options { sector_size: PAGE as u32, ..Options::dynamic(new.size) };
        let layer = vhdx::create(store_of(disk), &options)?;
        let chain = Arc::new(Chain::new(vec![layer], Access::Write)?);
        Ok(Made { chain, pages: Pages::new(Uuid::nil(), new.size, Key::new())? })
    };
    capture(stream, None, new_layer, |_| ())
}

/// Where in the file the table begins: at the place of the disk's first block.
fn table(file: &File) -> u64 {
    let at = (file.number(3 << 20, 8) >> 20) << 20;
    if at < file.len() { at } else { 0 }
}

fn fields(file: &File) -> Vec<Field> {
    let at = table(file);
    let mut all = Vec::new();
    let mut put = |at: u64, parts: &[(u64, usize)]| {
        all.extend(parts.iter().map(|(offset, width)| Field { at: at + offset, width: *width }));
    };
    put(at, &[(0, 8), (8, 4), (16, 4), (20, 4), (24, 4), (32, 8), (40, 8)]);
    for index in 0..file.number(at + 16, 4).min(10) {
        put(at + 128 + index * 280, &[(0, 4), (4, 4), (8, 8), (16, 8), (24, 1), (25, 8)]);
    }
    all
}

fn mend(file: &mut File, random: &mut Random) {
    let at = table(file);
    let len = 128 + file.number(at + 16, 4).min(1027) as usize * 280;
    if !random.one_in(32) {
        let sum = checksum_without(&file.bytes(at, len), 12);
        file.put(at + 12, 4, sum.into());
    }
}

fn mutate(input: &mut Input, random: &mut Random, pool: &[Input]) {
    let others: Vec<&File> = pool.iter().map(|input| &input.0[1]).collect();
    let [captured, disk] = &mut input.0[..] else { return };
    if random.one_in(2) {
        let mut bytes =
            if random.one_in(2) { stream(random, true) } else { captured.bytes(0, captured.len() as usize) };
        if !random.one_in(4) {
            mutate::change_stream(&mut bytes, &WORDS, MOST, random);
        }
        *captured = File::of(&bytes);
        return;
    }
    if random.one_in(6) {
        crate::vhdx::mutate(disk, random, &others);
    }
    let at = table(disk);
    for _ in 0..=random.below(3) {
        match random.below(8) {
            0 => mutate::change_bytes(disk, random),
            1 => {
                // One region more or less, and what follows from it moved.
                let entries = disk.number(at + 16, 4).min(1000);
                let region = disk.bytes(at + 128 + random.below(entries) * 280, 280);
                disk.write(at + 128 + entries * 280, &region);
                disk.put(at + 16, 4, entries + 1);
            }
            2 => {
                // Two regions exchanged.
                let entries = disk.number(at + 16, 4).min(1000);
                let [a, b] = [0, 0].map(|_: u64| at + 128 + random.below(entries) * 280);
                let (first, second) = (disk.bytes(a, 280), disk.bytes(b, 280));
                disk.write(a, &second);
                disk.write(b, &first);
            }
            3 => {
                // A large block of RAM, and everything in the place that follows from it.
                grow_ram(disk, at, random);
            }
            _ => mutate::change_field(disk, &fields(disk), random),
        }
    }
    mend(disk, random);
}

/// Makes a block of RAM longer and places everything as it follows from that, the disk's size too.
fn grow_ram(disk: &mut File, at: u64, random: &mut Random) {
    const STEP: u64 = 2 << 20;
    let entries = disk.number(at + 16, 4).clamp(4, 64);
    let region = |index: u64| at + 128 + index * 280;
    let grown = random.below(entries - 3);
    if random.one_in(4) {
        // Two blocks of one name.
        let name = disk.bytes(region(0) + 24, 256);
        disk.write(region(grown) + 24, &name);
    }
    disk.put(region(grown) + 16, 8, *random.pick(&[0, 4096, 1 << 20, 64 << 20, 65 << 20, 1 << 30, 1 << 40]));
    let rooms = [2 << 20, 8 << 20, 32 << 20];
    let mut end = STEP;
    for index in 0..entries {
        let room = match index.checked_sub(entries - 3) {
            Some(rest) => rooms[rest as usize],
            None => disk.number(region(index) + 16, 8).min(1 << 44),
        };
        disk.put(region(index) + 8, 8, end);
        end = (end + room).next_multiple_of(STEP);
    }
    disk.put(at + 32, 8, end);
    // The size of the disk is the second item of an image of ours.
    disk.put((2 << 20) + (64 << 10) + 8, 8, end);
}

/// Takes so much, and no more.
struct Sink(Vec<u8>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MOST_RESTORED {
            return Err(std::io::Error::other("enough"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn chain(file: File) -> image::Result<Chain> {
    Chain::new(vec![image::open(store_of(&disk(file)), None, Mode::Read)?], Access::Read)
}

/// The stream that a disk restores to.
fn restored(file: File) -> Result<Vec<u8>, String> {
    let chain = chain(file).map_err(|error| words(&error.to_string()))?;
    let info = inspect(&chain).map_err(|error| words(&error.to_string()))?;
    let mut sink = Sink(Vec::new());
    restore(&chain.into(), &mut sink, |done, all| assert!(done <= all && all == info.ram(), "progress"))
        .map_err(|error| words(&error.to_string()))?;
    Ok(sink.0)
}

fn run(input: &Input) -> String {
    let [stream, file] = &input.0[..] else { return "no input".to_owned() };
    let new = disk(File::default());
    let result = captured(&stream.bytes(0, stream.len() as usize), &new);
    if let Ok(first) = &result {
        first.chain.close().expect("nothing fails here");
        let again = restored(new.file()).expect("what was captured is restored");
        let chain = chain(new.file()).expect("what was captured is opened");
        let recorded = first.pages.clone().whole(None);
        let compared = recorded.compare(&chain, &mut |_| true, &mut |found| panic!("not as recorded: {found:?}"));
        assert!(compared.expect("it fits"), "what was captured is recorded");
        let second = captured(&again, &disk(File::default())).expect("what was restored is captured");
        let data = |captured: &Captured| (captured.ram, captured.machine.clone(), captured.counts.stored);
        assert_eq!(data(first), data(&second), "what was restored is what was captured");
    }
    let restored = restored(file.clone());
    format!("{}; {}", outcome(&result), restored.err().unwrap_or_else(|| "fine".to_owned()))
}
