//! Checking and repairing VHDs: planted damage is found and told, what can be mended is, and nothing that could be read reads differently.

mod layer;

use image::check::{self, Finding, Remedy, Repaired, Report};
use image::vhd::{self, Options, Parent};
use image::{Kind, Layer};
use layer::{read, write, zero};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use store::Mode;
use store::sim::{At, Crash, Sim};

const MIB: usize = 1 << 20;
const SIZE: u64 = 7 * MIB as u64 + 512;
const NAME: &str = "disk.vhd";
/// What a differencing image's parent is made of here.
const PARENT: u8 = 0xEE;
const SPARSE: [Kind; 2] = [Kind::Dynamic, Kind::Differencing];
const KINDS: [Kind; 3] = [Kind::Dynamic, Kind::Differencing, Kind::Fixed];

/// Gives a structure the checksum that its bytes ask for.
fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum = !bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
}

/// Mends the checksums of the footers and the header.
fn mend(file: &mut [u8]) {
    let tail = file.len().saturating_sub(512);
    for at in [0, tail] {
        if let Some(footer) = file.get_mut(at..at + 512).filter(|footer| footer.starts_with(b"conectix")) {
            seal(footer, 64);
        }
    }
    if let Some(header) = file.get_mut(512..1536).filter(|header| header.starts_with(b"cxsparse")) {
        seal(header, 36);
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// A small image: of its eight blocks of 1 MiB, 0, 2, 5 and the last have something.
fn sound(kind: Kind) -> Vec<u8> {
    let sim = Sim::new();
    let root = sim.root();
    let parent = (kind == Kind::Differencing).then(|| {
        let base = vhd::create(root.create("base").unwrap(), &Options::dynamic(SIZE)).unwrap();
        Parent::of(&*base, Some("base.vhd")).unwrap()
    });
    let options = Options { size: SIZE, block_size: 1 << 20, kind, parent };
    let layer = vhd::create(root.create(NAME).unwrap(), &options).unwrap();
    write(&*layer, 512, &[1; 4096]).unwrap();
    write(&*layer, 5 * MIB as u64, &(0..MIB).map(|at| (at / 512 % 199) as u8 | 1).collect::<Vec<_>>()).unwrap();
    zero(&*layer, 2 * MIB as u64, 5120).unwrap();
    write(&*layer, 2 * MIB as u64 + 8192, &[3; 1024]).unwrap();
    write(&*layer, SIZE - 512, &[4; 512]).unwrap();
    layer.close().unwrap();
    drop(layer);
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

fn repair_as(sim: &Sim, stamp: &str) -> image::Result<Repaired> {
    check::repair(&sim.root(), NAME, None, &check::undo_name(NAME, stamp))
}

fn repair(sim: &Sim) -> image::Result<Repaired> {
    repair_as(sim, "1")
}

/// The beginning and the end of what an image holds.
fn content(bytes: &[u8]) -> image::Result<Vec<Vec<u8>>> {
    let layer = vhd::open(disk(bytes).root().open(NAME, Mode::Read)?, Mode::Read)?;
    let size = layer.info().size;
    let window = SIZE.min(size);
    let absent = if layer.info().parent.is_some() { PARENT } else { 0 };
    [0, size - window].into_iter().map(|at| read(&*layer, at, window, absent)).collect()
}

fn table(bytes: &[u8]) -> usize {
    u64::from_be_bytes(bytes[512 + 16..512 + 24].try_into().unwrap()) as usize
}

fn entry(bytes: &[u8], block: usize) -> u32 {
    u32::from_be_bytes(bytes[table(bytes) + block * 4..][..4].try_into().unwrap())
}

fn set(bytes: &mut [u8], block: usize, entry: u32) {
    let at = table(bytes) + block * 4;
    bytes[at..at + 4].copy_from_slice(&entry.to_be_bytes());
}

fn kinds(report: &Report) -> Vec<&'static str> {
    let mut kinds: Vec<_> = report.damage().map(|finding| finding.kind).collect();
    kinds.dedup();
    kinds
}

fn notes(bytes: &[u8]) -> Vec<&'static str> {
    let report = look(bytes);
    assert!(report.clean(), "{report:#?}");
    report.findings.iter().map(|finding| finding.kind).collect()
}

fn first(report: &Report) -> &Finding {
    report.damage().next().unwrap()
}

/// The one stretch of the disk that the first finding names.
fn in_doubt(report: &Report) -> Range<u64> {
    let [range] = first(report).ranges.as_slice() else { panic!("one range: {report:#?}") };
    range.clone()
}

/// Repairs an image with planted damage: only this kind is found; it is clean then, opens for writing, and reads as `expected`, but for
/// the lost blocks, which read as said there. And all can be taken back.
fn mended(bytes: &[u8], kind: &str, expected: &[Vec<u8>], lost: &[(Range<usize>, u8)]) -> Report {
    let report = look(bytes);
    assert_eq!(kinds(&report), [kind], "{report:#?}");
    for finding in report.damage() {
        assert!(matches!(finding.remedy, Remedy::Mend(_)), "{finding:#?}");
        assert!(!finding.place.is_empty() && !finding.what.is_empty() && !finding.effect.is_empty());
    }
    let sim = disk(bytes);
    let done = repair(&sim).unwrap();
    assert!(done.changed && done.after.clean(), "{:#?}", done.after);
    let mut expected = expected.to_vec();
    for (range, fill) in lost {
        for window in &mut expected {
            window[range.clone()].fill(*fill);
        }
    }
    assert!(content(&self::bytes(&sim)).unwrap() == expected, "{kind}: {:#?}", done.before);
    assert!(!repair(&sim).unwrap().changed, "a second repair finds nothing to do");
    drop(vhd::open(disk(&self::bytes(&sim)).root().open(NAME, Mode::Write).unwrap(), Mode::Write).unwrap());
    check::take_back(&sim.root(), NAME, &undo_name()).unwrap();
    assert!(self::bytes(&sim) == bytes, "the repair was taken back");
    assert_eq!(sim.root().list().unwrap(), [NAME]);
    report
}

/// Damage that is told and left alone.
fn left(bytes: &[u8], kind: &str) -> Report {
    let report = look(bytes);
    assert!(kinds(&report).contains(&kind), "{report:#?}");
    assert!(report.damage().all(|finding| matches!(finding.remedy, Remedy::Cannot(_))), "{report:#?}");
    let sim = disk(bytes);
    assert!(!repair(&sim).unwrap().changed);
    assert!(self::bytes(&sim) == bytes);
    report
}

#[test]
fn sound_images_are_clean_and_left_alone() {
    for kind in KINDS {
        let bytes = sound(kind);
        assert_eq!(notes(&bytes), [""; 0], "{kind:?}");
        let sim = disk(&bytes);
        assert!(!repair(&sim).unwrap().changed);
        assert!(self::bytes(&sim) == bytes);
    }
}

#[test]
fn one_footer_lost() {
    for kind in SPARSE {
        let sound = sound(kind);
        let (expected, tail) = (content(&sound).unwrap(), sound.len() - 512);
        mended(&sound[..tail], "footer", &expected, &[]);
        mended(&sound[..tail + 300], "footer", &expected, &[]);
        for (at, fill) in [(tail, 0), (tail, 0xA5), (0, 0), (0, 0xA5)] {
            let mut bytes = sound.clone();
            bytes[at..at + 512].fill(fill);
            mended(&bytes, "footer", &expected, &[]);
            // The signature alone, and a byte under the checksum.
            for byte in [3, 40] {
                let mut bytes = sound.clone();
                bytes[at + byte] ^= 0x10;
                mended(&bytes, "footer", &expected, &[]);
            }
        }
        // The signature alone is written again where it was.
        let mut bytes = sound.clone();
        bytes[tail] ^= 1;
        let sim = disk(&bytes);
        repair(&sim).unwrap();
        assert!(self::bytes(&sim) == sound);
    }
}

/// As a growth leaves it that was cut off, or a tool that pads files; and zeros that are not there.
#[test]
fn zeros_behind_a_fixed_disk() {
    let sound = sound(Kind::Fixed);
    let expected = content(&sound).unwrap();
    for zeros in [1, 512, 1000, MIB - 512, 3 * MIB] {
        let padded = [sound.as_slice(), &vec![0; zeros]].concat();
        if zeros < 1000 {
            mended(&padded, "footer", &expected, &[]);
            continue;
        }
        // As far as the file system knows of holes.
        let sim = disk(&sound);
        sim.root().open(NAME, Mode::Write).unwrap().set_len(padded.len() as u64).unwrap();
        let layer = image::open(sim.root().open(NAME, Mode::Write).unwrap(), None, Mode::Write).unwrap();
        assert!(read(&*layer, 0, SIZE, 0).unwrap() == expected[0]);
        write(&*layer, 512, &[7; 512]).unwrap();
        layer.close().unwrap();
        assert_eq!(bytes(&sim).len(), sound.len(), "the first change mends it");
    }
    mended(&sound[..sound.len() - 100], "footer", &expected, &[]);
    let mut other = sound.clone();
    other[SIZE as usize + 70] ^= 1;
    other.resize(sound.len() + 512, 0);
    let file = disk(&other).root().open(NAME, Mode::Read).unwrap();
    assert_eq!(check::check(&file, None).unwrap_err().kind, image::ErrorKind::Unsupported, "no footer but a sound one");
}

#[test]
fn footers_that_differ() {
    for kind in SPARSE {
        let sound = sound(kind);
        let mut bytes = sound.clone();
        bytes[70] ^= 1;
        seal(&mut bytes[..512], 64);
        mended(&bytes, "footers-differ", &content(&sound).unwrap(), &[]);
    }
}

#[test]
fn both_footers_lost() {
    for kind in SPARSE {
        let mut bytes = sound(kind);
        let tail = bytes.len() - 512;
        bytes[..8].fill(0);
        bytes[tail..].fill(0);
        left(&bytes, "footer");
    }
    let bytes = sound(Kind::Fixed);
    let sim = disk(&bytes[..bytes.len() - 512]);
    assert_eq!(repair(&sim).unwrap_err().kind, image::ErrorKind::Unsupported);
}

#[test]
fn wrong_checksums_of_what_agrees_with_the_file() {
    for kind in KINDS {
        let sound = sound(kind);
        let (expected, tail) = (content(&sound).unwrap(), sound.len() - 512);
        let mut bytes = sound.clone();
        bytes[tail + 64] ^= 1;
        if kind != Kind::Fixed {
            bytes[64] ^= 1;
        }
        mended(&bytes, "footer-checksum", &expected, &[]);
        if kind != Kind::Fixed {
            // Another disk size that does not fit to the rest; copies that differ.
            let mut other = bytes.clone();
            for at in [0, tail] {
                other[at + 48 + 5] ^= 0x80;
            }
            left(&other, "footer-checksum");
            bytes[70] ^= 1;
            left(&bytes, "footer-checksum");
            let mut header = sound.clone();
            header[512 + 36] ^= 1;
            mended(&header, "header-checksum", &expected, &[]);
            header[512 + 32 + 1] ^= 0x20;
            left(&header, "header-checksum");
            let mut signature = sound.clone();
            signature[512] ^= 1;
            mended(&signature, "header", &expected, &[]);
            signature[512 + 600] ^= 1;
            left(&signature, "header");
        }
    }
}

#[test]
fn blocks_that_lie_nowhere() {
    for kind in SPARSE {
        let sound = sound(kind);
        let expected = content(&sound).unwrap();
        let absent = if kind == Kind::Differencing { PARENT } else { 0 };
        for (place, found) in
            [(0, "misplaced"), (1, "misplaced"), (2, "misplaced"), (70_000, "past-end"), (u32::MAX - 1, "past-end")]
        {
            let mut bytes = sound.clone();
            set(&mut bytes, 5, place);
            let report = mended(&bytes, found, &expected, &[(5 * MIB..6 * MIB, absent)]);
            assert_eq!(in_doubt(&report), 5 * MIB as u64..6 * MIB as u64);
            set(&mut bytes, 6, place);
            let report = look(&bytes);
            assert_eq!(report.damage().count(), 1, "neighbours are one finding");
            assert_eq!(in_doubt(&report), 5 * MIB as u64..7 * MIB as u64);
        }
        // Over the table: nothing is thrown away.
        let mut bytes = sound.clone();
        let over = table(&sound) as u32 / 512;
        set(&mut bytes, 5, over);
        left(&bytes, "misplaced");
    }
}

#[test]
fn blocks_that_lie_over_each_other() {
    for kind in SPARSE {
        let sound = sound(kind);
        let mut bytes = sound.clone();
        let other = entry(&sound, 0);
        set(&mut bytes, 5, other);
        let report = left(&bytes, "overlap");
        assert_eq!(first(&report).ranges, [0..MIB as u64, 5 * MIB as u64..6 * MIB as u64]);
        // A writer that forgets the bitmaps.
        let mut bytes = sound.clone();
        for (step, block) in [(0, 0), (1, 2), (2, 5)] {
            let at = entry(&sound, 0) + step * 2048;
            set(&mut bytes, block, at);
        }
        set(&mut bytes, 7, u32::MAX);
        let report = left(&bytes, "overlap");
        assert!(first(&report).what.contains("bitmaps"), "{report:#?}");
    }
}

#[test]
fn cut_files() {
    for kind in SPARSE {
        let sound = sound(kind);
        let last = [0, 2, 5].into_iter().max_by_key(|block| entry(&sound, *block)).unwrap();
        let at = entry(&sound, last) as usize * 512;
        for cut in [MIB / 2, MIB / 2 + 100, 512, MIB - 1] {
            let mut bytes = sound[..at + 512 + cut].to_vec();
            set(&mut bytes, 7, u32::MAX);
            let report = look(&bytes);
            assert_eq!(kinds(&report), ["cut", "footer"]);
            let (lost, block) = (first(&report).ranges.clone(), (last * MIB) as u64);
            // Block 2, the last one, has two stretches that are not the parent's.
            let behind = match kind {
                Kind::Differencing => [(cut, 5120), (cut.max(8192), 9216)],
                _ => [(cut, MIB), (MIB, MIB)],
            };
            let behind = behind.into_iter().filter(|(from, to)| from < to);
            let behind: Vec<_> = behind.map(|(from, to)| block + from as u64..block + to as u64).collect();
            assert_eq!(lost, behind, "just what is behind the end is lost");
            // With a footer written into the block, and another block that lies nowhere.
            let mut footed = bytes.clone();
            footed.resize(footed.len().next_multiple_of(512), 0);
            footed.extend_from_slice(&sound[..512]);
            set(&mut footed, 3, 70_000);
            let told: &[&str] = if cut > MIB - 512 { &["past-end"] } else { &["past-end", "cut"] };
            for (damaged, found) in [(&bytes, &["cut", "footer"][..]), (&footed, told)] {
                let sim = disk(damaged);
                let done = repair(&sim).unwrap();
                assert_eq!(kinds(&done.before), found);
                assert!(done.changed && done.after.clean(), "{:#?}", done.after);
                let mut expected = content(&sound).unwrap();
                let absent = if kind == Kind::Differencing { PARENT } else { 0 };
                for window in &mut expected {
                    for lost in &lost {
                        window[lost.start as usize..lost.end as usize].fill(0);
                    }
                    // Block 7, the last one, was behind.
                    window[7 * MIB..].fill(absent);
                }
                assert!(content(&self::bytes(&sim)).unwrap() == expected, "{kind:?}, {cut}");
                check::take_back(&sim.root(), NAME, &undo_name()).unwrap();
                assert!(self::bytes(&sim) == *damaged, "the repair was taken back");
            }
            // What lies over it may be what is good.
            set(&mut bytes, 3, (at / 512) as u32 - 1);
            let report = left(&bytes, "cut");
            assert!(kinds(&report).contains(&"footer"), "no footer is put where the rest of it may be: {report:#?}");
        }
        for length in [0, 8, 512, 700, 1536, 1600, 2048, 4096, 5000, 9000] {
            let sim = disk(&sound[..length.min(sound.len())]);
            let file = sim.root().open(NAME, Mode::Read).unwrap();
            if let Ok(report) = check::check(&file, None) {
                assert!(!report.clean(), "{length}");
            }
        }
    }
    let fixed = sound(Kind::Fixed);
    let bytes = [&fixed[..3 * MIB], &fixed[fixed.len() - 512..]].concat();
    assert_eq!(in_doubt(&left(&bytes, "cut")), 3 * MIB as u64..SIZE);
}

#[test]
fn the_table_does_not_fit() {
    for kind in SPARSE {
        let sound = sound(kind);
        for (at, value) in [(16, [0xFF; 8].as_slice()), (28, &[0, 0, 0, 7]), (32, &[0, 0, 0, 3]), (16, &[0; 8])] {
            let mut bytes = sound.clone();
            bytes[512 + at..512 + at + value.len()].copy_from_slice(value);
            mend(&mut bytes);
            let report = look(&bytes);
            assert!(!report.clean() && report.damage().all(|finding| matches!(finding.remedy, Remedy::Cannot(_))));
        }
    }
}

#[test]
fn parent_locators() {
    let sound = sound(Kind::Differencing);
    let expected = content(&sound).unwrap();
    let locator = 512 + 576;
    assert_eq!(sound[locator..locator + 4], *b"W2ru");
    let at = u64::from_be_bytes(sound[locator + 16..locator + 24].try_into().unwrap()) as usize;
    let mut outside = sound.clone();
    outside[locator + 16] = 9;
    mend(&mut outside);
    let mut long = sound.clone();
    long[locator + 8] = 9;
    mend(&mut long);
    let mut garbage = sound.clone();
    garbage[at..at + 2].copy_from_slice(&[0, 0xDC]);
    for bytes in [outside, long, garbage] {
        mended(&bytes, "parent-locator", &expected, &[]);
    }
    let mut none = sound.clone();
    none[locator..locator + 24].fill(0);
    none[512 + 64..512 + 576].fill(0);
    mend(&mut none);
    assert_eq!(notes(&none), ["parent-unnamed"]);
    let mut over = sound.clone();
    over[locator + 16..locator + 24].copy_from_slice(&(table(&sound) as u64).to_be_bytes());
    over[locator..locator + 4].copy_from_slice(b"else");
    mend(&mut over);
    left(&over, "overlap");
}

#[test]
fn notes_are_no_damage() {
    let fixed = sound(Kind::Fixed);
    assert_eq!(notes(&fixed[..fixed.len() - 1]), ["short-footer"]);
    let longer = [&fixed[..SIZE as usize], &[0; 512], &fixed[SIZE as usize..]].concat();
    assert_eq!(notes(&longer), ["unused"]);
    let mut saved = fixed.clone();
    saved[SIZE as usize + 84] = 1;
    mend(&mut saved);
    assert_eq!(notes(&saved), ["saved-state"]);
    let dynamic = sound(Kind::Dynamic);
    let mut bitmap = dynamic.clone();
    bitmap[entry(&dynamic, 5) as usize * 512] = 0x7F;
    assert_eq!(notes(&bitmap), ["bitmap"]);
    let mut long = dynamic.clone();
    long[512 + 31] = 9;
    mend(&mut long);
    assert_eq!(notes(&long), ["long-table"]);
    let mut leaked = dynamic.clone();
    set(&mut leaked, 5, u32::MAX);
    assert_eq!(notes(&leaked), ["unused"]);
    let mut unaligned = dynamic.clone();
    let (from, to) = (entry(&dynamic, 7), entry(&dynamic, 7) - 1);
    unaligned.copy_within(from as usize * 512..(from + 2) as usize * 512, to as usize * 512);
    set(&mut unaligned, 7, to);
    assert_eq!(notes(&unaligned), ["unaligned"]);
    let differencing = sound(Kind::Differencing);
    let mut stray = differencing.clone();
    stray[entry(&differencing, 7) as usize * 512 + 3] = 1;
    assert_eq!(notes(&stray), ["stray-bits"]);
}

fn change(bytes: &mut [u8], sound: &[u8], random: &mut Random) {
    let tail = bytes.len().saturating_sub(512);
    let (at, len) = match random.below(6) {
        0 => (0, 90),
        1 => (tail, 90),
        2 => (512, 64),
        3 => (512 + 576, 48),
        _ => (table(sound), 40),
    };
    let at = at + random.below(len) as usize;
    if at + 8 > bytes.len() {
        return;
    }
    let wide = [0, 1, 2, 3, 9, 17, 0xFFFF_FFFF, 0x7FFF_FFFF, entry(sound, 0), entry(sound, 5), entry(sound, 7) + 1];
    match random.below(3) {
        0 => bytes[at] = random.below(256) as u8,
        1 => bytes[at] ^= 1 << random.below(8),
        _ => bytes[at / 4 * 4..][..4].copy_from_slice(&wide[random.below(wide.len() as u64) as usize].to_be_bytes()),
    }
}

/// Bytes changed at random: the check never panics and agrees with the opener; a repair leaves nothing that it said it would mend, and
/// what could be read reads the same.
#[test]
fn changed_files_are_checked_and_mended_without_harm() {
    for (number, kind) in KINDS.into_iter().enumerate() {
        let sound = sound(kind);
        let mut random = Random(number as u64 + 3);
        let (mut opened, mut repaired) = (0, 0);
        for _ in 0..150 {
            let mut bytes = sound.clone();
            if random.below(8) == 0 {
                bytes.truncate(2048 + random.below(bytes.len() as u64 - 2048) as usize);
            }
            for _ in 0..=random.below(3) {
                if kind == Kind::Fixed {
                    let tail = bytes.len() - 512;
                    bytes[tail + random.below(90) as usize] ^= 1 << random.below(8);
                } else {
                    change(&mut bytes, &sound, &mut random);
                }
            }
            if random.below(2) == 0 {
                mend(&mut bytes);
            }
            let before = content(&bytes);
            let sim = disk(&bytes);
            let Ok(report) = check::check(&sim.root().open(NAME, Mode::Read).unwrap(), None) else {
                continue;
            };
            assert!(!report.clean() || before.is_ok(), "what is clean opens: {before:?} {report:#?}");
            let done = repair(&sim).unwrap();
            assert!(!done.after.damage().any(|finding| matches!(finding.remedy, Remedy::Mend(_))), "{:#?}", done.after);
            repaired += u64::from(done.changed);
            if let Ok(before) = before {
                opened += 1;
                assert!(before == content(&self::bytes(&sim)).unwrap(), "it reads differently: {:#?}", done.before);
            }
            if done.changed {
                check::take_back(&sim.root(), NAME, &undo_name()).unwrap();
            }
            assert!(self::bytes(&sim) == bytes);
        }
        assert!(opened > 10 && (repaired > 10 || kind == Kind::Fixed), "{opened} opened, {repaired} repaired");
    }
}

/// The power goes at every operation of a repair. Then it is begun again, or taken back: both end as they should.
#[test]
fn cuts_at_every_operation_of_a_repair() {
    for kind in SPARSE {
        let mut bytes = sound(kind);
        set(&mut bytes, 5, 70_000);
        set(&mut bytes, 2, 1);
        if kind == Kind::Differencing {
            bytes[512 + 576 + 16] = 9;
            mend(&mut bytes);
        }
        bytes.truncate(bytes.len() - 512);
        let (expected, operations) = {
            let sim = disk(&bytes);
            let start = sim.counts().operations;
            assert!(repair(&sim).unwrap().after.clean());
            (content(&self::bytes(&sim)).unwrap(), start..sim.counts().operations)
        };
        for cut in operations {
            let sim = disk(&bytes);
            sim.cut(At::Operation(cut));
            let _ = repair(&sim);
            for crash in Crash::several(cut, 4) {
                let what = format!("cut at {cut}, {crash:?}");
                let after = sim.after_crash(crash);
                let done = repair_as(&after, "2").unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(done.after.clean(), "{what}: {:#?}", done.after);
                assert!(content(&self::bytes(&after)).unwrap() == expected, "{what}");
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

#[test]
fn a_repair_is_not_taken_back_from_an_image_that_was_used_since() {
    let mut bytes = sound(Kind::Dynamic);
    set(&mut bytes, 5, 70_000);
    let sim = disk(&bytes);
    assert!(repair(&sim).unwrap().changed);
    let layer = vhd::open(sim.root().open(NAME, Mode::Write).unwrap(), Mode::Write).unwrap();
    write(&*layer, 0, &[9; 512]).unwrap();
    layer.close().unwrap();
    drop(layer);
    let refused = check::take_back(&sim.root(), NAME, &undo_name()).unwrap_err();
    assert_eq!(refused.kind, image::ErrorKind::Invalid);
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

#[test]
fn every_image_of_the_corpus_is_clean() {
    let Some(root) = root() else { return };
    let manifest = fs::read_to_string(root.join("MANIFEST.tsv")).unwrap();
    let paths = manifest.lines().filter_map(|line| line.split('\t').next());
    for path in paths.filter(|path| Path::new(path).extension().is_some_and(|ending| ending == "vhd")) {
        let output = Command::new("xz").arg("-dc").arg(root.join(format!("{path}.xz"))).output().expect("xz is there");
        assert!(output.status.success(), "{path}");
        let report = look(&output.stdout);
        println!("{path}: {:?}", report.findings.iter().map(|finding| finding.kind).collect::<Vec<_>>());
        assert!(report.clean(), "{path}: {report:#?}");
    }
}
