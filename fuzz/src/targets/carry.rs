//! The journal of what a writer that died had committed and not flushed, with the image that it belongs to.
//!
//! Rule beside the limits: an image that opens without its journal opens with any journal.

use super::disk::{Look, disk, scribble, write, zero};
use super::{MIB, outcome, store_of};
use crate::file::{Disk, PAGE};
use crate::mutate::{self, Field, checksum_without};
use crate::run::MEMORY;
use crate::vhdx::settle_ids;
use crate::{File, Input, Random, Target};
use image::vhdx::{self, Carry, Options};
use image::{Kind, Layer};
use store::Mode;
use uuid::Uuid;

pub(super) const TARGET: Target = Target {
    name: "carry",
    about: "the carry-over journal of a VHDX",
    quick: 3000,
    memory: MEMORY,
    seeds,
    mutate,
    run,
};

const LIFE: Uuid = Uuid::from_u128(1);
/// Where the first record lies in a new journal.
const RECORDS: u64 = PAGE as u64;

fn seeds() -> Vec<Input> {
    let mut all = Vec::new();
    for (kind, block) in
        [(Kind::Dynamic, MIB), (Kind::Differencing, MIB), (Kind::Differencing, 2 * MIB), (Kind::Fixed, MIB)]
    {
        let size = 6 * MIB;
        let parent = (kind == Kind::Differencing).then(|| super::base(size, 512).1);
        let parent = parent.map(|base| vhdx::Parent::of(&*base, Some("base.vhdx")).expect("a name"));
        let options = Options { size, block_size: block as u32, kind, parent, ..Options::default() };
        let (store, journal) = (disk(&File::default()), Disk::new("journal", File::default()));
        let carry = Carry { store: store_of(&journal), life: LIFE };
        let layer = vhdx::create_carried(store_of(&store), &options, carry).expect("a sound image");
        for round in 0..4 {
            write(&*layer, round * MIB + 512, &[round as u8 + 1; 1024]).expect("room");
            zero(&*layer, (round + 1) * MIB, MIB).expect("room");
            write(&*layer, (round + 1) * MIB, &[5; 512]).expect("room");
            let (mut image, mut carried) = (store.file(), journal.file());
            settle_ids(&mut [&mut image]);
            // The journal knows its image by the id that was replaced.
            let session = image.array::<16>(0x1_0000 + 16);
            let newer = image.number(0x2_0008, 8) > image.number(0x1_0008, 8);
            let session = if newer { image.array(0x2_0000 + 16) } else { session };
            name_session(&mut carried, &session);
            all.push(Input(vec![image, carried]));
            if round == 2 {
                layer.flush().expect("a sound image");
            }
        }
    }
    all
}

/// The records of a journal: where each lies and how many edits it has.
fn records(journal: &File) -> Vec<(u64, u64)> {
    let mut all = Vec::new();
    let mut at = RECORDS;
    while at + 40 <= journal.len() && all.len() < 64 {
        let count = journal.number(at + 32, 4);
        if journal.array(at) != *b"tbcr" || count > 1 << 14 {
            at += 8;
            continue;
        }
        all.push((at, count));
        at += 40 + count * 24;
    }
    all
}

fn name_session(journal: &mut File, session: &[u8; 16]) {
    for at in [0, 512] {
        if journal.array(at) == *b"tbcj" {
            journal.write(at + 40, session);
        }
    }
    for (at, _) in records(journal) {
        journal.write(at + 16, session);
    }
    mend(journal, || false);
}

fn mend(journal: &mut File, mut leave: impl FnMut() -> bool) {
    let heads = [(0, 72), (512, 72)].into_iter();
    let all = heads.chain(records(journal).into_iter().map(|(at, count)| (at, 40 + count * 24)));
    for (at, len) in all.collect::<Vec<_>>() {
        if !leave() && at + len <= journal.len() {
            let sum = checksum_without(&journal.bytes(at, len as usize), 4);
            journal.put(at + 4, 4, sum.into());
        }
    }
}

fn fields(journal: &File) -> Vec<Field> {
    let mut all = Vec::new();
    let mut put = |at: u64, parts: &[(u64, usize)]| {
        all.extend(parts.iter().map(|(offset, width)| Field { at: at + offset, width: *width }));
    };
    for at in [0, 512] {
        put(at, &[(0, 4), (8, 4), (16, 8), (24, 8), (40, 8), (56, 8), (64, 8)]);
    }
    for (at, count) in records(journal) {
        put(at, &[(0, 4), (8, 8), (16, 8), (32, 4)]);
        (0..count.min(32))
            .for_each(|edit| put(at + 40 + edit * 24, &[(0, 4), (4, 4), (8, 8), (16, 8), (8, 8), (16, 8)]));
    }
    all
}

fn mutate(input: &mut Input, random: &mut Random, pool: &[Input]) {
    let other = random.pick(pool).clone();
    let [image, journal] = &mut input.0[..] else { return };
    if random.one_in(8) {
        crate::vhdx::mutate(image, random, &[&other.0[0]]);
    }
    for _ in 0..=random.below(3) {
        match random.below(8) {
            0..4 => mutate::change_field(journal, &fields(journal), random),
            4 => append(journal, random),
            5 => mutate::change_bytes(journal, random),
            6 => journal.set_len(random.below(journal.len() + 1)),
            _ => *journal = other.0[1].clone(),
        }
    }
    mend(journal, || random.one_in(32));
}

/// Appends a record of edits that are as good as any.
fn append(journal: &mut File, random: &mut Random) {
    let Some((last, count)) = records(journal).last().copied() else { return };
    let at = last + 40 + count * 24;
    let mut record = journal.bytes(last, 40);
    let sequence = journal.number(last + 8, 8).wrapping_add(1);
    let edits = if random.one_in(16) { 1 << 14 } else { random.below(6) };
    record[8..16].copy_from_slice(&sequence.to_le_bytes());
    record[32..36].copy_from_slice(&(edits as u32).to_le_bytes());
    let same = random.one_in(4);
    let mut edit = [0_u64; 3];
    for index in 0..edits {
        if index == 0 || !same {
            let kind = random.below(4) + 1;
            let sectors = random.below(5000);
            let block = random.below(8);
            let place = (random.below(24) << 20) | *random.pick(&[6, 6, 7]);
            let some = random.below(5000);
            let second = if kind == 1 { place } else { *random.pick(&[0, 1, 2, 6, 2048, some]) };
            edit = [kind | sectors << 32, *random.pick(&[block, block, 2048, 4096]), second];
        }
        record.extend(edit.iter().flat_map(|word| word.to_le_bytes()));
    }
    journal.set_len(at);
    journal.write(at, &record);
}

fn run(input: &Input) -> String {
    let [image, journal] = &input.0[..] else { return "no input".to_owned() };
    let alone = image::open(store_of(&disk(image)), None, Mode::Read);
    let (store, journal) = (disk(image), Disk::new("journal", journal.clone()));
    let carry = Carry { store: store_of(&journal), life: LIFE };
    let carried = vhdx::open_carried(store_of(&store), carry);
    // Redoing needs another number for the image's header, as every change does.
    let numbered_out = outcome(&carried).contains("numbered to the end");
    assert!(carried.is_ok() || alone.is_err() || numbered_out, "a journal is why an image does not open: {carried:?}");
    let Ok(layer) = carried else { return outcome(&carried) };
    let redone = store.file() != *image;
    let Ok(now) = Look::at(&*layer) else { return "not looked at".to_owned() };
    let dead = image::open(store_of(&disk(&store.file())), None, Mode::Read).expect("a recovered file opens");
    assert_eq!(Look::at(&*dead).expect("it is read"), now, "what was recovered is durable");
    let used = scribble(&*layer).and_then(|()| layer.close());
    format!("{:?} redone {redone} {}", layer.info().kind, outcome(&used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_has_something_to_redo() {
        let outcomes: Vec<_> = seeds().iter().map(run).collect();
        assert!(outcomes.iter().filter(|outcome| outcome.contains("redone true")).count() > 8, "{outcomes:?}");
    }

    #[test]
    fn journals_are_taken_apart() {
        let all = seeds();
        let with_records = all.iter().filter(|input| !records(&input.0[1]).is_empty());
        // After a flush a fixed disk has nothing new to write down.
        assert!(with_records.count() + 4 >= all.len());
    }
}
