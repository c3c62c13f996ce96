//! An undo file, with the image that it is for.
//!
//! Rule beside the limits: an undo file that is refused changes nothing, and one that is followed is gone afterwards.

use super::check::{NAME, repaired};
use crate::file::{Disk, File, Shelf};
use crate::mutate::{self, Field, checksum_without};
use crate::run::{MEMORY, words};
use crate::{Input, Random, Target};
use image::check;
use std::sync::Arc;
use store::Folder;

pub(super) const TARGET: Target =
    Target { name: "undo", about: "an undo file of a repair", quick: 3000, memory: MEMORY, seeds, mutate, run };

/// Where an undo file's records begin.
const RECORDS: u64 = 4096;
const HEAD: usize = 48;
const RECORD: usize = 24;

fn seeds() -> Vec<Input> {
    (0..40).filter_map(repaired).map(|(image, undo)| Input(vec![image, undo])).take(12).collect()
}

/// Where records lie, and how many bytes they are of.
fn records(undo: &File) -> Vec<(u64, usize)> {
    let mut all = Vec::new();
    let mut at = RECORDS;
    while at + RECORD as u64 <= undo.len() && undo.array(at) == *b"undo" && all.len() < 64 {
        let len = undo.number(at + 16, 4).min(1 << 20) as usize;
        all.push((at, len));
        at += (RECORD + 2 * len) as u64;
    }
    all
}

fn mutate(input: &mut Input, random: &mut Random, _: &[Input]) {
    let [image, undo] = &mut input.0[..] else { return };
    if random.one_in(8) {
        mutate::change_bytes(image, random);
    }
    let records = records(undo);
    let field = |at: u64, width: usize| Field { at, width };
    let mut fields: Vec<_> = [(0, 8), (12, 4), (24, 8), (32, 8), (40, 8)].map(|(at, width)| field(at, width)).into();
    fields.extend(records.iter().flat_map(|(at, _)| [field(*at, 4), field(at + 8, 8), field(at + 16, 4)]));
    for _ in 0..random.below(3) {
        match random.below(6) {
            0 => mutate::resize(undo, random),
            1 => mutate::change_bytes(undo, random),
            2 => undo.put(16, 4, random.below(3)),
            _ => mutate::change_field(undo, &fields, random),
        }
    }
    if random.one_in(8) {
        return;
    }
    for (at, len) in records {
        let sum = checksum_without(&undo.bytes(at, RECORD + 2 * len), 4);
        undo.put(at + 4, 4, sum.into());
    }
    let sum = checksum_without(&undo.bytes(0, HEAD), 8);
    undo.put(8, 4, sum.into());
}

fn run(input: &Input) -> String {
    let [file, undo] = &input.0[..] else { return "no pair".to_owned() };
    let name = check::undo_name(NAME, "1");
    let image = Disk::new(NAME, file.clone());
    let folder: Arc<dyn Folder> = Arc::new(Shelf::new([Arc::clone(&image), Disk::new(&name, undo.clone())]));
    let left = |folder: &Arc<dyn Folder>| folder.list().expect("a list").contains(&name);
    let taken = check::take_back(&folder, NAME, &name);
    match &taken {
        Ok(()) => assert!(!left(&folder), "what is taken back leaves nothing"),
        Err(error) => {
            assert!(image.file() == *file && left(&folder), "it was refused, and has done something: {error}");
        }
    }
    // A repair looks at it too: what was cut off is taken back before anything else.
    let image = Disk::new(NAME, file.clone());
    let folder: Arc<dyn Folder> = Arc::new(Shelf::new([Arc::clone(&image), Disk::new(&name, undo.clone())]));
    let repaired = check::repair(&folder, NAME, None, &check::undo_name(NAME, "2")).map(|repaired| repaired.changed);
    let words = |text: String| words(&text);
    format!(
        "{} {:?}",
        words(format!("{:?}", taken.map_err(|e| e.to_string()))),
        repaired.map_err(|e| words(e.to_string()))
    )
}
