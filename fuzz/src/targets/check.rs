//! Checking a VHDX or a VHD, repairing it, and taking the repair back.
//!
//! Rules beside the limits:
//! - What is clean opens; so what the opener refuses is not clean.
//! - A repair that fails, or finds nothing to do, leaves the file as it was.
//! - What a repair leaves is clean or named as not repairable, and a second one finds nothing to do.
//! - What could be read before reads the same afterwards.
//! - A repair that is taken back leaves the file that was, byte for byte, and no undo file.

use super::disk::{disk, to_read, windows};
use super::{firsts, images, outcome, store_of, vhd};
use crate::file::{Disk, File, Shelf};
use crate::run::{MEMORY, words};
use crate::vhdx;
use crate::{Input, Random, Target};
use image::check::{self, Remedy, Report, repair, take_back};
use image::{Format, Layer, Source, open};
use std::sync::Arc;
use store::{Folder, Mode};

pub(super) const TARGET: Target = Target {
    name: "check",
    about: "a VHDX or VHD file that is checked, repaired, and taken back",
    quick: 1500,
    // The files that are written live in memory here: the image, and the undo file with old and new bytes.
    memory: 3 * MEMORY,
    seeds,
    mutate,
    run,
};

/// What the image is called.
pub(super) const NAME: &str = "disk";
/// Between two looks at a disk's content, bytes.
const STRIDE: usize = 64 << 10;

fn seeds() -> Vec<Input> {
    images().into_iter().chain(vhd::images()).map(|file| Input(vec![file])).collect()
}

fn mutate(input: &mut Input, random: &mut Random, pool: &[Input]) {
    let file = &mut input.0[0];
    if !random.one_in(3) {
        let others = firsts(pool);
        if vhdx::is_one(file) { vhdx::mutate(file, random, &others) } else { vhd::change(file, random, &others) }
    }
    if random.one_in(60) {
        file.write(0, b"QFI\xfb");
    }
    if random.one_in(2) {
        if vhdx::is_one(file) { vhdx::wound(file, random) } else { vhd::wound(file, random) }
    }
}

/// What a disk reads as, here and there: where sectors come from, and their bytes.
fn content(layer: &dyn Layer) -> image::Result<Vec<(u64, &'static str, Vec<u8>)>> {
    let info = layer.info();
    let sector = u64::from(info.sector_size);
    let mut all = Vec::new();
    for (start, len) in windows(&info) {
        for at in (start..start + len).step_by(STRIDE) {
            let mut runs = Vec::new();
            layer.map(at, sector, &mut runs)?;
            let mut bytes = vec![0; sector as usize];
            let from = match runs[0].source {
                Source::Data(place) => {
                    layer.store().read_at(&mut bytes, place)?;
                    "data"
                }
                Source::Zero => "zeros",
                Source::Absent => "nothing",
            };
            all.push((at, from, bytes));
        }
    }
    Ok(all)
}

fn only_what_cannot_be_mended(report: &Report) -> bool {
    report.more > 0 || report.damage().all(|finding| matches!(finding.remedy, Remedy::Cannot(_)))
}

/// The kinds of what was found.
fn kinds(report: &Report) -> String {
    let mut kinds: Vec<_> =
        report.findings.iter().map(|finding| format!("{} {:?}", finding.kind, finding.severity)).collect();
    kinds.sort();
    kinds.dedup();
    kinds.join(", ")
}

fn run(input: &Input) -> String {
    let file = &input.0[0];
    let opened = open(store_of(&to_read(file)), None, Mode::Read);
    let found = check::check(&store_of(&to_read(file)), None);
    match &found {
        Ok(report) if report.clean() => {
            assert!(opened.is_ok(), "it is clean, and does not open: {opened:?}");
            let written = open(store_of(&disk(file)), None, Mode::Write);
            // Only a writer needs another number for its header.
            let numbered = words(&outcome(&written)).contains("numbered to the end");
            assert!(written.is_ok() || numbered, "it is clean, and cannot be written: {written:?}");
        }
        Ok(_) => (),
        Err(error) => assert!(opened.is_err(), "it opens, and cannot be checked: {error}"),
    }
    // Whoever says what it is is not believed against its signature.
    for format in [Format::Raw, Format::Vhd, Format::Vhdx] {
        let said = check::check(&store_of(&to_read(file)), Some(format));
        let signed = said.as_ref().ok().filter(|_| format != Format::Raw).zip(found.as_ref().ok());
        assert!(signed.is_none_or(|(said, found)| said == found), "said to be {format:?}, it is something else");
    }
    let before = opened.as_ref().ok().map(|layer| content(&**layer));
    let image = Disk::new(NAME, file.clone());
    let folder: Arc<dyn Folder> = Arc::new(Shelf::new([Arc::clone(&image)]));
    let undo = check::undo_name(NAME, "1");
    let repaired = match repair(&folder, NAME, None, &undo) {
        Ok(repaired) => repaired,
        Err(error) => {
            assert!(image.file() == *file, "a repair that fails has changed something: {error}");
            return format!("{}, {}", words(&error.to_string()), found.as_ref().map(kinds).unwrap_or_default());
        }
    };
    assert_eq!(Some(&repaired.before), found.as_ref().ok(), "the repair finds something else than the check");
    let words = format!("{} -> {} {}", kinds(&repaired.before), repaired.changed, repaired.after.clean());
    if !repaired.changed {
        assert!(image.file() == *file, "nothing was to be done, and something is changed");
        assert!(only_what_cannot_be_mended(&repaired.after), "nothing was done: {:?}", repaired.after);
        return words;
    }
    assert!(only_what_cannot_be_mended(&repaired.after), "it is not mended: {:?}", repaired.after);
    if let Some(Ok(before)) = before {
        let after = open(store_of(&to_read(&image.file())), None, Mode::Read).expect("what opened before opens");
        assert!(content(&*after).expect("it could be read") == before, "it reads otherwise: {:?}", repaired.before);
    }
    if repaired.after.clean() {
        open(store_of(&disk(&image.file())), None, Mode::Write).expect("what is clean opens");
    }
    let again = repair(&folder, NAME, None, &check::undo_name(NAME, "2")).expect("once more");
    assert!(!again.changed, "a second repair finds something: {:?}", again.before);
    take_back(&folder, NAME, &undo).expect("nobody has used it");
    assert!(image.file() == *file, "what was taken back is not what was");
    assert_eq!(folder.list().expect("a list"), [NAME], "the undo file is gone");
    words
}

/// A damaged image as a repair leaves it, and its undo file.
pub(super) fn repaired(seed: u64) -> Option<(File, File)> {
    let mut random = Random::new(seed);
    let seeds = seeds();
    let mut file = seeds[random.index(seeds.len())].0[0].clone();
    if vhdx::is_one(&file) {
        vhdx::wound(&mut file, &mut random);
    } else {
        vhd::wound(&mut file, &mut random);
    }
    let image = Disk::new(NAME, file);
    let shelf = Arc::new(Shelf::new([Arc::clone(&image)]));
    let folder: Arc<dyn Folder> = Arc::<Shelf>::clone(&shelf);
    let undo = check::undo_name(NAME, "1");
    let changed = repair(&folder, NAME, None, &undo).is_ok_and(|repaired| repaired.changed);
    changed.then(|| (image.file(), shelf.file(&undo)))
}
