//! A whole VHDX: opened to be read, opened to be written, written, flushed, renamed its parent, closed and opened again.
//!
//! Rules beside the limits:
//! - Who reads a file with a log in use sees what whoever writes it finds after the replay.
//! - What was flushed is there when the file is opened as it lies there (the writer died), and what was closed too.

use super::disk::{Look, disk, misuse, scribble, to_read};
use super::{firsts, images, outcome, store_of};
use crate::run::MEMORY;
use crate::{Input, Random, Target};
use image::{Layer, open};
use store::Mode;

pub(super) const TARGET: Target = Target {
    name: "vhdx",
    about: "a VHDX file: headers, regions, metadata, log, block table, bitmaps",
    quick: 3000,
    memory: MEMORY,
    seeds: || images().into_iter().map(|file| Input(vec![file])).collect(),
    mutate,
    run,
};

fn mutate(input: &mut Input, random: &mut Random, pool: &[Input]) {
    crate::vhdx::mutate(&mut input.0[0], random, &firsts(pool));
}

fn run(input: &Input) -> String {
    let file = &input.0[0];
    let read = open(store_of(&to_read(file)), None, Mode::Read);
    let written = disk(file);
    let write = open(store_of(&written), None, Mode::Write);
    let words = outcome(&write);
    // Only a writer needs another number for its header, and a VHD both of its footers and a sound header.
    let only_written = words.contains("numbered to the end") || words.contains("must be repaired before it is written");
    assert!(outcome(&read) == words || only_written, "reading and writing differ: {read:?} {write:?}");
    let (Ok(read), Ok(write)) = (read, write) else { return words };
    misuse(&*read);
    if let Ok(Some(note)) = read.note() {
        assert!((1..=image::MAX_NOTE).contains(&note.len()), "a note of {} bytes", note.len());
    }
    let (seen, found) = (Look::at(&*read), Look::at(&*write));
    match (&seen, &found) {
        (Ok(seen), Ok(found)) => assert_eq!(seen, found, "what a reader sees is not what the replay leaves"),
        _ => assert_eq!(outcome(&seen), outcome(&found), "looks differ"),
    }
    if let Err(error) = &found {
        return format!("looked at: {}", outcome::<(), _>(&Err(error)));
    }
    let used = use_it(&*write);
    if let Err(error) = used {
        return format!("used: {}", outcome::<(), _>(&Err(error)));
    }
    let now = Look::at(&*write).expect("it was used");
    let dead = open(store_of(&disk(&written.file())), None, Mode::Read).expect("a flushed file opens");
    assert_eq!(Look::at(&*dead).expect("a flushed file is read"), now, "what was flushed is there");
    write.close().expect("nothing fails here");
    let closed = open(store_of(&disk(&written.file())), None, Mode::Read).expect("a closed file opens");
    assert_eq!(Look::at(&*closed).expect("a closed file is read"), now, "what was closed is there");
    format!("{:?} {:?}", write.info().kind, seen.map(|_| "used"))
}

fn use_it(layer: &dyn Layer) -> image::Result<()> {
    scribble(layer)?;
    layer.settle()?;
    layer.wrote();
    if let Some(mut link) = layer.info().parent {
        link.linkage2 = Some(link.linkage);
        link.relative_path = Some(r".\a longer name than before.vhdx".to_owned());
        match layer.relink(None, Some(link)) {
            // No room for the name, or none at all.
            Err(error) if matches!(error.kind, image::ErrorKind::Unsupported | image::ErrorKind::Damaged) => (),
            result => result?,
        }
    }
    match layer.set_note(&[b'n'; 5000]) {
        Err(error) if matches!(error.kind, image::ErrorKind::Unsupported | image::ErrorKind::Damaged) => (),
        result => result?,
    }
    layer.flush()
}
