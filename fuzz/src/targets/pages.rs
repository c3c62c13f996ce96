//! Records of a memory's pages: read, completed, and compared with a disk that some of them fit.
//!
//! Rules beside the limits: what is read is written back as it was; completing a record makes nothing of the disk look changed, and leaves
//! nothing out.

use super::{MIB, base, disk::write, outcome, store_of};
use crate::file::{Disk, File};
use crate::mutate::{self, Field};
use crate::run::MEMORY;
use crate::{Input, Random, Target};
use image::hashes::{Key, MAX_PAGED, PAGE, Pages};
use image::{Access, Chain};
use uuid::Uuid;

pub(super) const TARGET: Target = Target {
    name: "pages",
    about: "records of the pages of a memory",
    quick: 3000,
    memory: MEMORY,
    seeds,
    mutate,
    run,
};

/// The disk's size, in the middle of a block.
const SIZE: u64 = 7 * MIB + PAGE;
const HEAD: u64 = 128;
const ENTRY: u64 = 20;

/// A disk with data in some pages.
fn chain() -> Chain {
    let (_, layer) = base(SIZE, PAGE);
    for (page, bytes) in [(3, 2), (600, 70), (1792, 1)] {
        write(&*layer, page * PAGE, &vec![7; bytes * PAGE as usize]).expect("room");
    }
    Chain::new(vec![layer], Access::Read).expect("a chain")
}

/// The file of a record, its key the same each time.
fn file_of(pages: &Pages) -> File {
    let disk = Disk::new("record", File::default());
    pages.write(&*store_of(&disk)).expect("room");
    disk.file()
}

fn empty(size: u64) -> File {
    let mut file = file_of(&Pages::new(Uuid::from_u128(7), size, Key::new()).expect("not too large"));
    file.write(80, &[0x5a; 32]);
    mend(&mut file);
    file
}

fn read(file: &File) -> image::Result<Pages> {
    Pages::read(&*store_of(&Disk::new("record", file.clone())))
}

fn seeds() -> Vec<Input> {
    let chain = chain();
    let mut files: Vec<File> = [0, PAGE, SIZE, 1 << 40, MAX_PAGED].map(empty).into();
    for below in [None, Some(Uuid::from_u128(6))] {
        for windows in 1..5 {
            let mut pages = read(&files[2]).expect("sound");
            let mut left = windows;
            let further = &mut |_| {
                left -= 1;
                left > 0
            };
            pages.complete(&chain, below, further).expect("it fits");
            files.push(file_of(&pages));
        }
    }
    files.into_iter().map(|file| Input(vec![file])).collect()
}

fn mend(file: &mut File) {
    file.write(16, &[0; 16]);
    let bytes = file.bytes(0, file.len().min(MIB) as usize);
    let sum = blake3::hash(&bytes);
    file.write(16, &sum.as_bytes()[..16]);
}

fn mutate(input: &mut Input, random: &mut Random, pool: &[Input]) {
    let Some(file) = input.0.first_mut() else { return };
    let head = [(0, 8), (8, 4), (12, 4), (48, 8), (64, 8), (72, 8), (80, 8), (112, 4), (120, 8)];
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
    let (at, count) = (file.len(), file.number(72, 8));
    let more = if random.one_in(8) { 1 << random.below(26) } else { 1 };
    file.set_len(at.saturating_add(more * ENTRY).min(1 << 40));
    let last = file.number(at.saturating_sub(ENTRY), 4);
    file.put(at, 4, last.wrapping_add(1 + random.below(3)));
    file.put(at + 4, 8, random.number());
    file.put(72, 8, count.wrapping_add(more));
}

fn run(input: &Input) -> String {
    let Some(file) = input.0.first() else { return "no input".to_owned() };
    let read = read(file);
    let Ok(mut pages) = read else { return outcome(&read) };
    assert!(file_of(&pages) == *file, "what is read is written back as it was");
    let (chain, was_whole) = (chain(), pages.is_whole(None));
    let before = differences(&pages, &chain);
    let completed = pages.complete(&chain, None, &mut |_| true);
    assert!(completed.as_ref().map_or(true, |ended| *ended && pages.is_whole(None)), "it comes to its end");
    let after = differences(&pages, &chain);
    // A record that says that it is whole and is not makes pages look changed that it now knows.
    let fits = if was_whole { after.as_ref().ok() <= before.as_ref().ok() } else { after == before };
    assert!(fits, "what was added is what the disk says: {before:?}, then {after:?}");
    format!("was whole: {was_whole}, {after:?}")
}

/// How many pages are not as recorded.
fn differences(pages: &Pages, chain: &Chain) -> Result<usize, String> {
    let mut found = 0;
    let compared = pages.compare(chain, &mut |_| true, &mut |_| found += 1);
    compared.map(|_| found).map_err(|error| crate::run::words(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_read() {
        let outcomes: Vec<_> = seeds().iter().map(run).collect();
        assert!(outcomes.iter().all(|outcome| outcome.starts_with("was whole")), "{outcomes:?}");
        assert_eq!(outcomes.iter().filter(|outcome| outcome.ends_with("Ok(0)")).count(), 9, "{outcomes:?}");
    }
}
