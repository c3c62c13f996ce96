//! Records of hashes: read, gone on with, and compared with a disk that some of them fit.
//!
//! Rules beside the limits: what is read is written back as it was; what a record has come to say of the disk by going on is what the disk
//! says.

use super::{MIB, base, disk::write, outcome, store_of};
use crate::file::{Disk, File};
use crate::mutate::{self, Field};
use crate::run::MEMORY;
use crate::{Input, Random, Target};
use image::hashes::{self, Hashed, Key, Record};
use image::{Error, Layer};
use std::sync::Arc;
use uuid::Uuid;

pub(super) const TARGET: Target = Target {
    name: "hashes",
    about: "records of hashes of what a layer reads as",
    quick: 3000,
    memory: MEMORY,
    seeds,
    mutate,
    run,
};

/// The disk's size, in the middle of a block.
const SIZE: u64 = 7 * MIB + 512;
const HEAD: u64 = 128;
const ENTRY: u64 = 20;

/// A disk with data in some blocks.
fn layer() -> Arc<dyn Layer> {
    let (_, layer) = base(SIZE, 512);
    write(&*layer, 5 * MIB, &[7; 4096]).expect("room");
    layer
}

/// An empty record whose key is the same each time.
fn empty(size: u64) -> File {
    let mut file = File::of(&Record::new(Uuid::from_u128(7), size, Key::new()).expect("not too large").encode());
    file.write(72, &[0x5a; 32]);
    mend(&mut file);
    file
}

fn read(file: &File) -> image::Result<Record> {
    Record::read(&*store_of(&Disk::new("record", file.clone())))
}

fn seeds() -> Vec<Input> {
    let layer = layer();
    let mut files: Vec<File> = [0, 512, SIZE, 1 << 40, hashes::MAX_SIZE].map(empty).into();
    for blocks in 1..5 {
        let mut record = read(&files[2]).expect("sound");
        let mut left = blocks;
        go_on(&mut record, &layer, &mut || {
            left -= 1;
            left > 0
        })
        .expect("it fits");
        files.push(File::of(&record.encode()));
    }
    files.into_iter().map(|file| Input(vec![file])).collect()
}

fn go_on(record: &mut Record, layer: &Arc<dyn Layer>, further: &mut dyn FnMut() -> bool) -> image::Result<bool> {
    let mut open = || Ok::<_, Error>(vec![Arc::clone(layer)]);
    hashes::record(record, Hashed { layer: &**layer, below: None, open: &mut open }, &mut |_| further())
}

fn mend(file: &mut File) {
    file.write(16, &[0; 16]);
    let bytes = file.bytes(0, file.len().min(MIB) as usize);
    let sum = blake3::hash(&bytes);
    file.write(16, &sum.as_bytes()[..16]);
}

fn mutate(input: &mut Input, random: &mut Random, pool: &[Input]) {
    let Some(file) = input.0.first_mut() else { return };
    let head = [(0, 8), (8, 4), (12, 4), (48, 8), (56, 8), (64, 8), (72, 8), (104, 8)];
    let mut fields: Vec<Field> = head.map(|(at, width)| Field { at, width }).into();
    let count = file.len().saturating_sub(HEAD) / ENTRY;
    fields.extend((0..count.min(8)).map(|entry| Field { at: HEAD + entry * ENTRY, width: 4 }));
    for _ in 0..=random.below(2) {
        match random.below(8) {
            0..3 => mutate::change_field(file, &fields, random),
            3 | 4 => append(file, random),
            5 => mutate::change_bytes(file, random),
            6 => file.set_len(random.below(file.len() + 1)),
            _ => *file = random.pick(pool).0[0].clone(),
        }
    }
    if !random.one_in(16) {
        mend(file);
    }
}

/// Appends an entry, or holes for many.
fn append(file: &mut File, random: &mut Random) {
    let (at, count) = (file.len(), file.number(64, 8));
    let more = if random.one_in(8) { 1 << random.below(26) } else { 1 };
    file.set_len(at.saturating_add(more * ENTRY).min(1 << 40));
    let last = file.number(at.saturating_sub(ENTRY), 4);
    file.put(at, 4, last.wrapping_add(1 + random.below(3)));
    file.put(at + 4, 8, random.number());
    file.put(64, 8, count.wrapping_add(more));
    if random.one_in(2) {
        let done = file.number(56, 8).max(last.wrapping_add(4));
        file.put(56, 8, done);
        file.put(48, 8, file.number(48, 8).max(done.wrapping_mul(hashes::BLOCK)));
    }
}

fn run(input: &Input) -> String {
    let Some(file) = input.0.first() else { return "no input".to_owned() };
    let read = read(file);
    let Ok(mut record) = read else { return outcome(&read) };
    assert!(File::of(&record.encode()) == *file, "what is read is written back as it was");
    let layer = layer();
    let before = (record.done(), differences(&record, &layer));
    let gone_on = go_on(&mut record, &layer, &mut || true);
    assert!(gone_on.as_ref().map_or(true, |whole| *whole && record.is_complete()), "it comes to its end");
    let after = differences(&record, &layer);
    assert!(before.1 == after, "what was added is what the disk says: {before:?}, then {after:?}");
    format!("covers all: {}, {after:?}", before.0 == record.done())
}

/// How many blocks are not as recorded.
fn differences(record: &Record, layer: &Arc<dyn Layer>) -> Result<usize, String> {
    let (mut open, mut found) = (|| Ok::<_, Error>(vec![Arc::clone(layer)]), 0);
    let hashed = Hashed { layer: &**layer, below: None, open: &mut open };
    let compared = hashes::compare(record, hashed, &mut |_| true, &mut |_| found += 1);
    compared.map(|_| found).map_err(|error| crate::run::words(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_read() {
        let outcomes: Vec<_> = seeds().iter().map(run).collect();
        assert!(outcomes.iter().all(|outcome| outcome.starts_with("covers all")), "{outcomes:?}");
        assert_eq!(outcomes.iter().filter(|outcome| outcome.ends_with("Ok(0)")).count(), 5, "{outcomes:?}");
    }
}
