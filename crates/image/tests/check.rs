//! Checking and repairing: planted damage is found and told, what can be mended is, and nothing that could be read reads differently.

mod layer;

use image::check::{self, Finding, Remedy, Repaired, Report, Severity};
use image::vhdx::{self, Options, VhdxLayer};
use image::{Kind, Layer};
use layer::{read, write, zero};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use store::Mode;
use store::sim::{At, Crash, Sim};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Where our files have their table.
const TABLE: usize = 3 * MIB;
const SIZE: u64 = 8 * MIB as u64;
const NAME: &str = "disk.vhdx";
/// The index of the bitmap's entry: behind those of the 4,096 blocks that a chunk can have.
const BITMAP: usize = 4096;
/// What a differencing image's parent is made of here.
const PARENT: u8 = 0xEE;

fn checksum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&bytes[..4]), &[0; 4]), &bytes[8..]).to_le_bytes()
}

fn mend(file: &mut [u8]) {
    for (at, len) in [(64 * KIB, 4 * KIB), (128 * KIB, 4 * KIB), (192 * KIB, 64 * KIB), (256 * KIB, 64 * KIB)] {
        if let Some(bytes) = file.get_mut(at..at + len) {
            let sum = checksum(bytes);
            bytes[4..8].copy_from_slice(&sum);
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Makes a small image: of its eight blocks of 1 MiB, 0 and 1 are full, 2 is zeros, 3 has something (partial over a parent), 5 is
/// full, the others are not there.
fn make(sim: &Sim, kind: Kind) -> Arc<VhdxLayer> {
    let root = sim.root();
    let parent = (kind == Kind::Differencing).then(|| {
        let base = vhdx::create(root.create("base").unwrap(), &Options::dynamic(SIZE)).unwrap();
        vhdx::Parent::of(&*base, Some("base.vhdx")).unwrap()
    });
    let options = Options { size: SIZE, block_size: MIB as u32, kind, parent, ..Options::default() };
    let layer = vhdx::create(root.create(NAME).unwrap(), &options).unwrap();
    for block in [0, 1, 5] {
        write(&*layer, block * MIB as u64, &filled(block as u8)).unwrap();
    }
    layer.flush().unwrap();
    zero(&*layer, 2 * MIB as u64, MIB as u64).unwrap();
    write(&*layer, 3 * MIB as u64 + 1024, &[3; 512]).unwrap();
    layer.flush().unwrap();
    layer
}

fn filled(block: u8) -> Vec<u8> {
    (0..MIB).map(|at| (at / 512 % 199) as u8 ^ block.wrapping_mul(37) | 1).collect()
}

/// A small image's bytes; its log is empty.
fn sound(kind: Kind) -> Vec<u8> {
    let sim = Sim::new();
    make(&sim, kind).close().unwrap();
    bytes(&sim)
}

fn bytes(sim: &Sim) -> Vec<u8> {
    let file = sim.root().open(NAME, Mode::Read).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A disk with an image of these bytes, all of it durable.
fn disk(bytes: &[u8]) -> Sim {
    let sim = Sim::new();
    let file = sim.root().create(NAME).unwrap();
    file.write_at(bytes, 0).unwrap();
    file.sync().unwrap();
    sim.root().sync().unwrap();
    sim
}

fn look(bytes: &[u8]) -> Report {
    check::check(&disk(bytes).root().open(NAME, Mode::Read).unwrap(), None).unwrap()
}

fn undo_name() -> String {
    check::undo_name(NAME, "1")
}

fn repair(sim: &Sim) -> image::Result<Repaired> {
    check::repair(&sim.root(), NAME, None, &undo_name())
}

fn entry(bytes: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(bytes[TABLE + index * 8..][..8].try_into().unwrap())
}

fn set(bytes: &mut [u8], index: usize, entry: u64) {
    bytes[TABLE + index * 8..][..8].copy_from_slice(&entry.to_le_bytes());
}

fn place(mib: u64, state: u64) -> u64 {
    mib << 20 | state
}

fn content(bytes: &[u8]) -> image::Result<Vec<u8>> {
    let layer = vhdx::open(disk(bytes).root().open(NAME, Mode::Read).unwrap(), Mode::Read)?;
    read(&*layer, 0, SIZE, absent(&*layer))
}

/// What is read where the image holds nothing.
fn absent(layer: &dyn Layer) -> u8 {
    if layer.info().parent.is_some() { PARENT } else { 0 }
}

fn damage(report: &Report) -> Vec<&Finding> {
    report.damage().collect()
}

/// The one stretch of the disk that a finding names.
fn in_doubt(finding: &Finding) -> Range<u64> {
    let [range] = finding.ranges.as_slice() else { panic!("one range: {finding:#?}") };
    range.clone()
}

fn kinds(report: &Report) -> Vec<&'static str> {
    let mut kinds: Vec<_> = report.damage().map(|finding| finding.kind).collect();
    kinds.dedup();
    kinds
}

/// Repairs an image with planted damage: only this kind is found, it is clean then, opens, and reads as `expected`, but for the
/// blocks in `lost`, which read as said there. And all can be taken back.
fn mended(bytes: &[u8], kind: &str, expected: &[u8], lost: &[(usize, u8)]) -> Report {
    let report = look(bytes);
    assert_eq!(kinds(&report), [kind], "{report:#?}");
    for finding in damage(&report) {
        assert!(matches!(finding.remedy, Remedy::Mend(_)), "{finding:#?}");
        assert!(!finding.place.is_empty() && !finding.what.is_empty() && !finding.effect.is_empty());
    }
    let sim = disk(bytes);
    let done = repair(&sim).unwrap();
    assert!(done.changed && done.after.clean(), "{:#?}", done.after);
    assert_eq!(done.before, report);
    let after = self::bytes(&sim);
    let mut expected = expected.to_vec();
    for (block, fill) in lost {
        expected[block * MIB..(block + 1) * MIB].fill(*fill);
    }
    let now = content(&after).unwrap();
    let differing = (0..SIZE as usize).find(|at| now[*at] != expected[*at]);
    assert_eq!(differing, None, "{kind}: {:#?}", done.before);
    let again = repair(&sim).unwrap();
    assert!(!again.changed, "a second repair finds nothing to do: {:#?}", again.before);
    check::take_back(&sim.root(), NAME, &undo_name()).unwrap();
    assert!(self::bytes(&sim) == bytes, "the repair was taken back");
    assert_eq!(sim.root().list().unwrap(), [NAME]);
    report
}

const KINDS: [Kind; 3] = [Kind::Dynamic, Kind::Fixed, Kind::Differencing];

#[test]
fn sound_images_are_clean_and_left_alone() {
    for kind in KINDS {
        let bytes = sound(kind);
        let report = look(&bytes);
        assert!(report.clean(), "{report:#?}");
        let sim = disk(&bytes);
        assert!(!repair(&sim).unwrap().changed);
        assert!(self::bytes(&sim) == bytes);
        assert_eq!(sim.root().list().unwrap(), [NAME]);
    }
}

#[test]
fn what_looks_odd_and_is_fine_is_clean() {
    for kind in KINDS {
        let sound = sound(kind);
        // Two equal headers; headers with different DataWriteGuids; a length that is no multiple of a MiB.
        let mut equal = sound.clone();
        equal.copy_within(64 * KIB..68 * KIB, 128 * KIB);
        let mut ids = sound.clone();
        ids[64 * KIB + 32] ^= 1;
        mend(&mut ids);
        let odd = [sound.as_slice(), &[7; 700]].concat();
        for bytes in [equal, ids, odd] {
            let report = look(&bytes);
            assert!(report.clean(), "{report:#?}");
        }
    }
    // Bits behind the disk's end.
    let mut bits = sound(Kind::Differencing);
    let bitmap = (entry(&bits, BITMAP) >> 20) as usize * MIB;
    assert_eq!(entry(&bits, BITMAP) & 7, 6, "the bitmap is where it is looked for");
    bits[bitmap + SIZE as usize / 512 / 8..bitmap + 4096].fill(0xFF);
    assert!(look(&bits).clean());
    // An unmapped block that keeps its place.
    let mut anchored = sound(Kind::Dynamic);
    let kept = entry(&anchored, 5) & !7 | 3;
    set(&mut anchored, 5, kept);
    assert!(look(&anchored).clean());
}

#[test]
fn one_header_destroyed() {
    for kind in KINDS {
        let sound = sound(kind);
        let expected = content(&sound).unwrap();
        for at in [64 * KIB, 128 * KIB] {
            let mut bytes = sound.clone();
            bytes[at..at + 4 * KIB].fill(0xA5);
            mended(&bytes, "header", &expected, &[]);
        }
    }
}

#[test]
fn one_region_table_destroyed() {
    for kind in KINDS {
        let sound = sound(kind);
        let expected = content(&sound).unwrap();
        for at in [192 * KIB, 256 * KIB] {
            let mut bytes = sound.clone();
            bytes[at..at + 64 * KIB].fill(0);
            mended(&bytes, "region-table", &expected, &[]);
        }
        // A copy with a good checksum that says nonsense.
        let mut bytes = sound.clone();
        bytes[192 * KIB + 16 + 16] ^= 1;
        mend(&mut bytes);
        mended(&bytes, "region-table", &expected, &[]);
    }
}

#[test]
fn both_region_tables_destroyed() {
    for kind in KINDS {
        let sound = sound(kind);
        let mut bytes = sound.clone();
        bytes[192 * KIB..320 * KIB].fill(0xA5);
        mended(&bytes, "region-table", &content(&sound).unwrap(), &[]);
        // A table without any block cannot be told from zeros.
        bytes[TABLE..TABLE + MIB].fill(0);
        let report = look(&bytes);
        assert!(matches!(damage(&report)[0].remedy, Remedy::Cannot(_)), "{report:#?}");
    }
}

#[test]
fn both_headers_destroyed() {
    for kind in KINDS {
        let sound = sound(kind);
        let mut bytes = sound.clone();
        bytes[64 * KIB..132 * KIB].fill(0xA5);
        mended(&bytes, "header", &content(&sound).unwrap(), &[]);
    }
    // What the log holds is not in its place: it may be needed.
    let sim = Sim::new();
    drop(make(&sim, Kind::Dynamic));
    let mut bytes = bytes(&sim);
    bytes[64 * KIB..132 * KIB].fill(0xA5);
    mended(&bytes, "header", &content(&self::bytes(&sim)).unwrap(), &[]);
    bytes[TABLE..TABLE + 4096].fill(0);
    let report = look(&bytes);
    assert!(matches!(damage(&report)[0].remedy, Remedy::Cannot(_)), "{report:#?}");
    assert!(!repair(&disk(&bytes)).unwrap().changed);
}

#[test]
fn the_signature_destroyed() {
    let mut bytes = sound(Kind::Dynamic);
    let expected = content(&bytes).unwrap();
    bytes[..8].fill(0);
    mended(&bytes, "signature", &expected, &[]);
}

#[test]
fn stale_flags() {
    for kind in KINDS {
        let sound = sound(kind);
        let mut bytes = sound.clone();
        set(&mut bytes, 2, place(5, 2));
        // (In a fixed disk block 2 stays where it is.)
        let mut empty = sound.clone();
        set(&mut empty, 2, 2);
        mended(&bytes, "zero-placed", &content(&empty).unwrap(), &[]);
    }
    let sound = sound(Kind::Dynamic);
    let expected = content(&sound).unwrap();
    let mut partial = sound.clone();
    let flagged = entry(&sound, 1) & !7 | 7;
    set(&mut partial, 1, flagged);
    let report = mended(&partial, "partial-alone", &expected, &[]);
    assert_eq!(in_doubt(damage(&report)[0]), MIB as u64..2 * MIB as u64);
    // One bit of the state.
    let mut reserved = sound.clone();
    let flagged = entry(&sound, 1) & !7 | 4;
    set(&mut reserved, 1, flagged);
    mended(&reserved, "reserved-state", &expected, &[]);
    let mut reserved = sound.clone();
    set(&mut reserved, 6, 5);
    mended(&reserved, "reserved-state", &expected, &[]);
}

#[test]
fn places_that_cannot_be() {
    for kind in KINDS {
        let sound = sound(kind);
        let expected = content(&sound).unwrap();
        for (mib, found) in [
            (0, "misplaced"),
            (1, "misplaced"),
            (2, "misplaced"),
            (3, "misplaced"),
            (9000, "past-end"),
            (1 << 43, "past-end"),
        ] {
            let mut bytes = sound.clone();
            set(&mut bytes, 1, place(mib, 6));
            let report = mended(&bytes, found, &expected, &[(1, 0)]);
            assert_eq!(in_doubt(damage(&report)[0]), MIB as u64..2 * MIB as u64, "the lost bytes are named");
            if kind == Kind::Differencing {
                // What a partial block lacks is still the parent's.
                let mut bytes = sound.clone();
                set(&mut bytes, 3, place(mib, 7));
                mended(&bytes, found, &expected, &[(3, PARENT)]);
            }
        }
    }
}

#[test]
fn a_place_used_twice() {
    for kind in KINDS {
        let sound = sound(kind);
        let mut bytes = sound.clone();
        let first = entry(&sound, 0);
        set(&mut bytes, 6, first);
        let mut expected = content(&sound).unwrap();
        expected.copy_within(0..MIB, 6 * MIB);
        let report = mended(&bytes, "shared", &expected, &[]);
        let found = damage(&report);
        assert_eq!(found.len(), 2, "both are named: {found:#?}");
        assert_eq!(in_doubt(found[1]), 6 * MIB as u64..7 * MIB as u64);
    }
}

#[test]
fn cut_files() {
    for kind in KINDS {
        let sound = sound(kind);
        let expected = content(&sound).unwrap();
        let blocks: Vec<_> = (0..8).map(|block| (block, entry(&sound, block))).filter(|(_, e)| e & 7 >= 6).collect();
        let (last, at) = *blocks.iter().max_by_key(|(_, entry)| entry >> 20).unwrap();
        let at = (at >> 20) as usize * MIB;
        if kind != Kind::Differencing {
            // In the middle of the last block, and before it.
            let bytes = &sound[..at + MIB / 2];
            let mut half = expected.clone();
            half[last * MIB + MIB / 2..(last + 1) * MIB].fill(0);
            mended(bytes, "cut", &half, &[]);
            mended(&sound[..at], "past-end", &expected, &[(last, 0)]);
        }
        for length in [0, 8, 64 * KIB, 100 * KIB, 300 * KIB, MIB, MIB + 1, 2 * MIB, 3 * MIB - 1, 3 * MIB + 1] {
            let bytes = &sound[..length];
            let sim = disk(bytes);
            let file = sim.root().open(NAME, Mode::Read).unwrap();
            if let Ok(report) = check::check(&file, None) {
                assert!(!report.clean(), "{length}");
            }
        }
    }
}

#[test]
fn a_missing_bitmap() {
    let sound = sound(Kind::Differencing);
    for gone in [0, place(9000, 6), place(1, 6), 2] {
        let mut bytes = sound.clone();
        set(&mut bytes, BITMAP, gone);
        let report = look(&bytes);
        let found = damage(&report);
        let missing = found.iter().find(|finding| finding.kind == "bitmap-missing").unwrap();
        assert_eq!(in_doubt(missing), 3 * MIB as u64..4 * MIB as u64);
        assert!(matches!(missing.remedy, Remedy::Cannot(_)));
        // Nothing can be done, and nothing is.
        let sim = disk(&bytes);
        assert!(!repair(&sim).unwrap().after.clean());
        // Where no block needs it, it is no loss.
        set(&mut bytes, 3, 0);
        let report = look(&bytes);
        assert!(report.damage().all(|finding| matches!(finding.remedy, Remedy::Mend(_))), "{report:#?}");
        repair(&disk(&bytes)).unwrap();
    }
}

#[test]
fn a_log_in_use_is_taken_into_account_and_carried_out() {
    for kind in [Kind::Dynamic, Kind::Differencing] {
        let sim = Sim::new();
        let layer = make(&sim, kind);
        let (waiting, expected) = (bytes(&sim), read(&*layer, 0, SIZE, absent(&*layer)).unwrap());
        drop(layer);
        // The places of the pages are as before the log was carried out.
        let mut old = waiting.clone();
        old[TABLE..TABLE + 4096].fill(0);
        let report = look(&old);
        assert!(report.clean(), "{report:#?}");
        assert!(report.findings.iter().any(|finding| finding.kind == "log" && finding.severity == Severity::Note));
        let sim = disk(&old);
        assert!(repair(&sim).unwrap().changed);
        assert_ne!(entry(&bytes(&sim), 0), 0, "it is in its place");
        assert!(content(&bytes(&sim)).unwrap() == expected);
        assert!(look(&bytes(&sim)).findings.iter().all(|finding| finding.kind != "log"));
        check::take_back(&sim.root(), NAME, &undo_name()).unwrap();
        assert!(bytes(&sim) == old);

        // A log that holds nothing valid.
        let mut bad = waiting.clone();
        bad[MIB..2 * MIB].fill(0x11);
        mended(&bad, "log", &expected, &[]);
    }
}

#[test]
fn unknown_and_unfinished_things() {
    // A metadata item with this id and these flags, empty.
    let with_item = |id: [u8; 16], flags: u32| {
        let mut bytes = sound(Kind::Dynamic);
        let count = usize::from(u16::from_le_bytes(bytes[2 * MIB + 10..][..2].try_into().unwrap()));
        bytes[2 * MIB + 10..][..2].copy_from_slice(&(count as u16 + 1).to_le_bytes());
        let item = [id.as_slice(), &[0; 8], &flags.to_le_bytes(), &[0; 4]].concat();
        bytes[2 * MIB + 32 * (count + 1)..][..32].copy_from_slice(&item);
        bytes
    };
    let optional = look(&with_item([7; 16], 0));
    assert!(optional.clean() && optional.findings.iter().any(|finding| finding.kind == "unknown-item"));
    let required = look(&with_item([7; 16], 4));
    assert_eq!(kinds(&required), ["unknown-item"]);
    let incomplete = uuid::uuid!("71cc85f0-1b69-4e28-9558-c3bf83ae75d3").to_bytes_le();
    let unfinished = look(&with_item(incomplete, 0));
    assert_eq!(kinds(&unfinished), ["incomplete"]);
    for report in [&required, &unfinished] {
        assert!(matches!(damage(report)[0].remedy, Remedy::Cannot(_)));
    }
    let with_region = |flags: u32| {
        let mut bytes = sound(Kind::Dynamic);
        let end = bytes.len() as u64;
        bytes.resize(bytes.len() + MIB, 9);
        for at in [192 * KIB, 256 * KIB] {
            bytes[at + 8] = 3;
            let region =
                [[5; 16].as_slice(), &end.to_le_bytes(), &(MIB as u32).to_le_bytes(), &flags.to_le_bytes()].concat();
            bytes[at + 16 + 64..][..32].copy_from_slice(&region);
        }
        mend(&mut bytes);
        bytes
    };
    let optional = look(&with_region(0));
    assert!(optional.clean() && optional.findings.iter().any(|finding| finding.kind == "unknown-region"));
    assert_eq!(kinds(&look(&with_region(1))), ["region-table"]);
}

/// The mistake of QEMU before 8.0, in a file of its own: the first block of a page gets its place after others.
mod shifted {
    use super::*;

    fn by(creator: &str, mut bytes: Vec<u8>) -> Vec<u8> {
        bytes[8..520].fill(0);
        for (at, unit) in creator.encode_utf16().enumerate() {
            bytes[8 + 2 * at..][..2].copy_from_slice(&unit.to_le_bytes());
        }
        bytes
    }

    /// Blocks 2, 4 and 7 have places before block 0 gets one: before and after.
    fn shift() -> (Vec<u8>, Vec<u8>) {
        let sim = Sim::new();
        let options = Options { block_size: MIB as u32, ..Options::dynamic(SIZE) };
        let layer = vhdx::create(sim.root().create(NAME).unwrap(), &options).unwrap();
        for block in [2, 4, 7, 0] {
            write(&*layer, block * MIB as u64, &filled(block as u8)).unwrap();
        }
        layer.close().unwrap();
        let mut right = bytes(&sim);
        for block in [1, 3, 5, 6] {
            set(&mut right, block, 2);
        }
        let mut wrong = right.clone();
        wrong.copy_within(TABLE..TABLE + 4088, TABLE + 8);
        set(&mut wrong, 1, 2);
        (right, wrong)
    }

    #[test]
    fn it_is_found_and_put_right() {
        let (right, wrong) = shift();
        let (right, wrong) = (by("QEMU v5.2.0", right), by("QEMU v5.2.0", wrong));
        assert!(look(&right).clean(), "{:#?}", look(&right));
        assert!(content(&wrong).unwrap() != content(&right).unwrap(), "it opens, and reads wrong");
        mended(&wrong, "shifted-table", &content(&right).unwrap(), &[]);
        // A block that got its place afterwards stands where it belongs.
        let sim = disk(&right);
        let layer = vhdx::open(sim.root().open(NAME, Mode::Write).unwrap(), Mode::Write).unwrap();
        write(&*layer, 5 * MIB as u64, &filled(5)).unwrap();
        layer.close().unwrap();
        let later = bytes(&sim);
        let mut wrong = [&wrong[..TABLE], &later[TABLE..]].concat();
        wrong[TABLE..TABLE + 4096].copy_from_slice(&shift().1[TABLE..TABLE + 4096]);
        set(&mut wrong, 5, entry(&later, 5));
        // Its entry was that of block 4, which is lost by it: that is not put right in silence.
        assert!(!look(&wrong).clean());
    }

    #[test]
    fn without_proof_it_is_said_and_left() {
        for creator in ["Tenby 0.1.0", "QEMU v8.2.0", "Microsoft Windows 10.0.19041.0"] {
            let wrong = by(creator, shift().1);
            let report = look(&wrong);
            assert_eq!(kinds(&report), ["shifted-table"], "{report:#?}");
            assert!(matches!(damage(&report)[0].remedy, Remedy::Cannot(_)));
            let sim = disk(&wrong);
            assert!(!repair(&sim).unwrap().changed);
        }
    }

    #[test]
    fn with_the_first_entry_twice_it_is_certain() {
        let (right, _) = shift();
        let mut wrong = right.clone();
        wrong.copy_within(TABLE..TABLE + 4088, TABLE + 8);
        assert!(content(&wrong).is_err());
        mended(&wrong, "shifted-table", &content(&right).unwrap(), &[]);
    }

    #[test]
    fn an_entry_that_fell_out_of_its_page_is_found() {
        let sim = Sim::new();
        let options = Options { block_size: MIB as u32, ..Options::dynamic(600 * MIB as u64) };
        let layer = vhdx::create(sim.root().create(NAME).unwrap(), &options).unwrap();
        for block in [3, 511, 0, 513] {
            write(&*layer, block * MIB as u64, &filled(block as u8)).unwrap();
        }
        layer.close().unwrap();
        let right = bytes(&sim);
        let mut wrong = right.clone();
        wrong.copy_within(TABLE..TABLE + 4088, TABLE + 8);
        assert_eq!(kinds(&look(&wrong)), ["shifted-table"]);
        let sim = disk(&wrong);
        assert!(repair(&sim).unwrap().after.clean());
        for block in [0, 3, 511, 513] {
            assert_eq!(entry(&bytes(&sim), block), entry(&right, block));
        }
    }

    /// Large blocks have an entry for a bitmap in every page. Blocks 3, 400 and 600 before 0; then 512 of the next page, then 5.
    #[test]
    fn a_block_in_the_place_of_a_bitmap_tells_too() {
        const BLOCK: u64 = 32 << 20;
        let sim = Sim::new();
        let options = Options { block_size: BLOCK as u32, ..Options::dynamic(1000 * BLOCK) };
        let layer = vhdx::create(sim.root().create(NAME).unwrap(), &options).unwrap();
        // Block 127 stands before the first bitmap's entry.
        for block in [3, 127, 400, 600, 0, 5] {
            write(&*layer, block * BLOCK, &[block as u8; 512]).unwrap();
        }
        layer.close().unwrap();
        let right = by("QEMU v4.1.0", bytes(&sim));
        let mut wrong = right.clone();
        wrong.copy_within(TABLE..TABLE + 4088, TABLE + 8);
        // The second block had no place before; block 5 got its own afterwards.
        set(&mut wrong, 1, 2);
        set(&mut wrong, 5, entry(&right, 5));
        set(&mut wrong, 6, 0);
        let report = look(&wrong);
        assert_eq!(kinds(&report), ["shifted-table"], "{report:#?}");
        let sim = disk(&wrong);
        assert!(repair(&sim).unwrap().after.clean());
        let full = |bytes: &[u8], index: usize| Some(entry(bytes, index)).filter(|entry| entry & 7 == 6);
        let now = bytes(&sim);
        for index in 0..1007 {
            assert_eq!(full(&now, index), full(&right, index), "entry {index}");
        }
    }

    #[test]
    fn zeros_that_moved_alone_are_no_damage() {
        let mut bytes = by("QEMU v5.2.0", shift().0);
        set(&mut bytes, 2, 2);
        set(&mut bytes, 4, 2);
        set(&mut bytes, 7, 2);
        set(&mut bytes, 8, 2);
        assert!(look(&bytes).clean(), "{:#?}", look(&bytes));
    }
}

/// Where the file's structures are, and how long.
const TARGETS: [(usize, usize); 10] = [
    (0, 16),
    (64 * KIB, 80),
    (128 * KIB, 80),
    (192 * KIB, 16 + 3 * 32),
    (256 * KIB, 16 + 3 * 32),
    (MIB, 12 * KIB),
    (2 * MIB, 32 + 7 * 32),
    (2 * MIB + 64 * KIB, 48),
    (2 * MIB + 128 * KIB, 300),
    (TABLE, 10 * 8),
];

fn change(bytes: &mut [u8], random: &mut Random) {
    let (at, len) = TARGETS[random.below(TARGETS.len() as u64) as usize];
    let at = at + random.below(len as u64) as usize;
    let wide =
        [0, 1, 6, 7, 0xffff_ffff, u64::MAX, 1 << 40, 1 << 20, place(5, 6), place(7, 6), place(9, 2), place(6, 7)];
    match random.below(4) {
        0 => bytes[at] = random.below(256) as u8,
        1 => bytes[at] ^= 1 << random.below(8),
        _ => {
            let value = wide[random.below(wide.len() as u64) as usize];
            let at = at / 8 * 8;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Bytes changed at random: the check never panics and agrees with the opener; a repair leaves nothing that it said it would mend, and
/// what could be read reads the same.
#[test]
fn changed_files_are_checked_and_mended_without_harm() {
    for (number, kind) in KINDS.into_iter().enumerate() {
        let sim = Sim::new();
        let layer = make(&sim, kind);
        let in_use = bytes(&sim);
        layer.close().unwrap();
        let images = [in_use, bytes(&sim)];
        let mut random = Random(number as u64 + 5);
        let (mut opened, mut repaired) = (0, 0);
        for round in 0..160 {
            let mut bytes = images[round % 2].clone();
            for _ in 0..=random.below(3) {
                change(&mut bytes, &mut random);
            }
            if random.below(8) == 0 {
                bytes.truncate(random.below(bytes.len() as u64) as usize);
            }
            if random.below(4) != 0 {
                mend(&mut bytes);
            }
            let before = content_of_any_size(&bytes);
            let sim = disk(&bytes);
            let Ok(report) = check::check(&sim.root().open(NAME, Mode::Read).unwrap(), None) else {
                assert!(before.is_err(), "what opens can be checked");
                continue;
            };
            assert!(!report.clean() || before.is_ok(), "what is clean opens: {before:?} {report:#?}");
            let done = repair(&sim).unwrap();
            let left = done.after.damage().filter(|finding| matches!(finding.remedy, Remedy::Mend(_))).count();
            assert_eq!(left, 0, "{:#?}", done.after);
            repaired += u64::from(done.changed);
            if let Ok(before) = before {
                opened += 1;
                let after = content_of_any_size(&self::bytes(&sim)).expect("it opened before");
                assert!(before == after, "it reads differently: {:#?}", done.before);
            }
            if done.changed {
                check::take_back(&sim.root(), NAME, &undo_name()).unwrap();
            }
            assert!(self::bytes(&sim) == bytes);
        }
        assert!(opened > 20 && repaired > 20, "{opened} opened, {repaired} repaired");
    }
}

/// The beginning and the end of what an image holds.
fn content_of_any_size(bytes: &[u8]) -> image::Result<Vec<Vec<u8>>> {
    let layer = vhdx::open(disk(bytes).root().open(NAME, Mode::Read)?, Mode::Read)?;
    let (size, sector) = (layer.info().size, u64::from(layer.info().sector_size));
    let window = SIZE.min(size);
    [0, (size - window) / sector * sector].into_iter().map(|at| read(&*layer, at, window, absent(&*layer))).collect()
}

/// The power goes at every operation of a repair. Then it is begun again, or taken back: both end as they should.
#[test]
fn cuts_at_every_operation_of_a_repair() {
    let mut planted = Vec::new();
    for kind in [Kind::Dynamic, Kind::Differencing] {
        let mut bytes = sound(kind);
        let first = entry(&bytes, 0);
        set(&mut bytes, 6, first);
        set(&mut bytes, 2, place(5, 2));
        set(&mut bytes, 1, place(9000, 6));
        bytes[64 * KIB..68 * KIB].fill(0xA5);
        bytes[192 * KIB..256 * KIB].fill(0);
        planted.push(bytes);
    }
    let sim = Sim::new();
    drop(make(&sim, Kind::Dynamic));
    let mut in_use = bytes(&sim);
    in_use[TABLE..TABLE + 4096].fill(0);
    planted.push(in_use);
    for bytes in planted {
        let expected = {
            let sim = disk(&bytes);
            assert!(repair(&sim).unwrap().after.clean());
            content(&self::bytes(&sim)).unwrap()
        };
        let operations = {
            let sim = disk(&bytes);
            let start = sim.counts().operations;
            repair(&sim).unwrap();
            start..sim.counts().operations
        };
        for cut in operations {
            let sim = disk(&bytes);
            sim.cut(At::Operation(cut));
            let _ = repair(&sim);
            for crash in Crash::several(cut, 6) {
                let what = format!("cut at {cut}, {crash:?}");
                let after = sim.after_crash(crash);
                let done = repair_as(&after, "2").unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(done.after.clean(), "{what}: {:#?}", done.after);
                assert!(content(&self::bytes(&after)).unwrap() == expected, "{what}");
                // What was cut off was taken back first, so that the newest undo file leads to the beginning.
                let newest = check::undo_name(NAME, if done.changed { "2" } else { "1" });
                check::take_back(&after.root(), NAME, &newest).unwrap();
                assert!(self::bytes(&after) == bytes, "{what}: the second repair, taken back");

                let after = sim.after_crash(crash);
                match check::take_back(&after.root(), NAME, &undo_name()) {
                    Ok(()) => {}
                    // It was cut off before anything was changed.
                    Err(error) => assert_eq!(error.kind, image::ErrorKind::NotFound, "{error} ({what})"),
                }
                assert!(self::bytes(&after) == bytes, "{what}");
            }
        }
    }
}

fn repair_as(sim: &Sim, stamp: &str) -> image::Result<Repaired> {
    check::repair(&sim.root(), NAME, None, &check::undo_name(NAME, stamp))
}

/// Cuts while a repair is taken back: taking it back again finishes that.
#[test]
fn cuts_while_it_is_taken_back() {
    let mut bytes = sound(Kind::Dynamic);
    let first = entry(&bytes, 0);
    set(&mut bytes, 6, first);
    bytes[64 * KIB..68 * KIB].fill(0xA5);
    let repaired = || {
        let sim = disk(&bytes);
        repair(&sim).unwrap();
        sim
    };
    let operations = {
        let sim = repaired();
        let start = sim.counts().operations;
        check::take_back(&sim.root(), NAME, &undo_name()).unwrap();
        start..sim.counts().operations
    };
    for cut in operations {
        let sim = repaired();
        sim.cut(At::Operation(cut));
        let _ = check::take_back(&sim.root(), NAME, &undo_name());
        for crash in Crash::several(cut, 6) {
            let after = sim.after_crash(crash);
            match check::take_back(&after.root(), NAME, &undo_name()) {
                Ok(()) => {}
                Err(error) => assert_eq!(error.kind, image::ErrorKind::NotFound, "{error}"),
            }
            assert!(self::bytes(&after) == bytes, "cut at {cut}, {crash:?}");
        }
    }
}

#[test]
fn failures_leave_the_image_to_be_mended_or_taken_back() {
    let mut bytes = sound(Kind::Dynamic);
    let expected = content(&bytes).unwrap();
    set(&mut bytes, 2, place(5, 2));
    let operations = {
        let sim = disk(&bytes);
        let start = sim.counts().operations;
        repair(&sim).unwrap();
        start..sim.counts().operations
    };
    for at in operations {
        for kind in [store::ErrorKind::Io, store::ErrorKind::NoSpace] {
            let sim = disk(&bytes);
            sim.fail(At::Operation(at), kind, store::sim::Times::Once);
            assert!(repair(&sim).is_err(), "operation {at}");
            sim.heal();
            assert!(repair_as(&sim, "2").unwrap().after.clean(), "operation {at}");
            assert!(content(&self::bytes(&sim)).unwrap() == expected);
        }
    }
}

#[test]
fn a_repair_is_not_taken_back_from_an_image_that_was_used_since() {
    let mut bytes = sound(Kind::Dynamic);
    set(&mut bytes, 2, place(5, 2));
    let sim = disk(&bytes);
    repair(&sim).unwrap();
    let layer = vhdx::open(sim.root().open(NAME, Mode::Write).unwrap(), Mode::Write).unwrap();
    write(&*layer, 0, &[9; 512]).unwrap();
    layer.close().unwrap();
    drop(layer);
    let used = self::bytes(&sim);
    let refused = check::take_back(&sim.root(), NAME, &undo_name()).unwrap_err();
    assert_eq!(refused.kind, image::ErrorKind::Invalid);
    assert!(self::bytes(&sim) == used);
    // Nor is another file taken for an undo file.
    sim.root().create("other").unwrap().write_at(&[1; 9000], 0).unwrap();
    assert_eq!(check::take_back(&sim.root(), NAME, "other").unwrap_err().kind, image::ErrorKind::Invalid);
}

/// The largest disks take little memory, also where every block is damaged.
#[test]
fn the_largest_disk() {
    let sim = Sim::new();
    let options = Options { block_size: 32 << 20, ..Options::dynamic(64 << 40) };
    let layer = vhdx::create(sim.root().create(NAME).unwrap(), &options).unwrap();
    write(&*layer, (64 << 40) - 512, &[1; 512]).unwrap();
    layer.close().unwrap();
    drop(layer);
    let report = check::check(&sim.root().open(NAME, Mode::Read).unwrap(), None).unwrap();
    assert!(report.clean(), "{report:#?}");
}

fn root() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus");
    let root = std::env::var_os("TENBY_CORPUS").map_or(beside, PathBuf::from);
    if root.join("MANIFEST.tsv").exists() {
        return Some(root);
    }
    println!("SKIPPED: no corpus at {} (say where with TENBY_CORPUS)", root.display());
    None
}

/// The images of the corpus: their paths and bytes.
fn corpus() -> Vec<(String, Vec<u8>)> {
    let Some(root) = root() else { return Vec::new() };
    let manifest = fs::read_to_string(root.join("MANIFEST.tsv")).unwrap();
    let paths = manifest
        .lines()
        .filter_map(|line| line.split('\t').next())
        .filter(|path| Path::new(path).extension().is_some_and(|ending| ending == "vhdx"));
    let unpack = |path: &str| {
        let output = Command::new("xz").arg("-dc").arg(root.join(format!("{path}.xz"))).output().expect("xz is there");
        assert!(output.status.success(), "{path}");
        (path.to_owned(), output.stdout)
    };
    paths.map(unpack).collect()
}

#[test]
fn every_image_of_the_corpus_is_clean() {
    for (path, bytes) in corpus() {
        let report = look(&bytes);
        assert!(report.clean(), "{path}: {report:#?}");
        let in_use = report.findings.iter().any(|finding| finding.kind == "log");
        assert_eq!(in_use, path.contains("dirtylog"), "{path}");
    }
}

/// Damage planted in real images: found, mended, and what was readable reads the same.
#[test]
fn damage_in_images_of_the_corpus() {
    for (path, sound) in
        corpus().into_iter().filter(|(path, bytes)| bytes.len() < 40 * MIB && !path.contains("dirtylog"))
    {
        let table = (0..2)
            .map(|region| 192 * KIB + 16 + 32 * region)
            .find(|at| sound[*at..*at + 4] == [0x66, 0x77, 0xc2, 0x2d])
            .map(|at| u64::from_le_bytes(sound[at + 16..at + 24].try_into().unwrap()) as usize)
            .unwrap();
        let layer = vhdx::open(disk(&sound).root().open(NAME, Mode::Read).unwrap(), Mode::Read).unwrap();
        let info = layer.info();
        let window = info.size.min(SIZE);
        let expected = read(&*layer, 0, window, absent(&*layer)).unwrap();
        let plant = |entry: u64| {
            let mut bytes = sound.clone();
            bytes[table..table + 8].copy_from_slice(&entry.to_le_bytes());
            bytes
        };
        let first = u64::from_le_bytes(sound[table..table + 8].try_into().unwrap());
        let mut one_header = sound.clone();
        one_header[64 * KIB..68 * KIB].fill(0);
        let mut one_table = sound.clone();
        one_table[192 * KIB..256 * KIB].fill(0);
        let mut cases = vec![("header", one_header, true), ("region-table", one_table, true)];
        if first & 7 >= 6 {
            cases.extend([
                ("misplaced", plant(place(1, first & 7)), false),
                ("past-end", plant(place(70_000, first & 7)), false),
                ("zero-placed", plant(first & !7 | 2), false),
            ]);
            if info.parent.is_none() {
                cases.push(("partial-alone", plant(first & !7 | 7), true));
            }
        }
        for (kind, bytes, same) in cases {
            let report = look(&bytes);
            assert_eq!(kinds(&report), [kind], "{path}: {report:#?}");
            let sim = disk(&bytes);
            assert!(repair(&sim).unwrap().after.clean(), "{path}, {kind}");
            let layer = vhdx::open(sim.root().open(NAME, Mode::Read).unwrap(), Mode::Read).unwrap();
            let now = read(&*layer, 0, window, absent(&*layer)).unwrap();
            let damaged = if same { 0 } else { u64::from(info.block_size).min(window) as usize };
            assert!(now[damaged..] == expected[damaged..], "{path}, {kind}");
        }
    }
}
