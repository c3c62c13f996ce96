//! Disks that change their size, images that are compacted: against plain bytes, and cut off at every operation.

mod layer;

use image::vhdx::{self, Options, VhdxLayer};
use image::{Access, Chain, Kind, Layer};
use layer::{read, write, zero};
use std::sync::Arc;
use store::sim::{At, Crash, Sim};
use store::{Folder, Mode};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// What the parent holds everywhere.
const PARENT: u8 = 0xEE;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn options(folder: &dyn Folder, kind: Kind, size: u64) -> Options {
    let parent = (kind == Kind::Differencing).then(|| {
        let base = vhdx::create(folder.create("base.vhdx").unwrap(), &Options::dynamic(MIB)).unwrap();
        vhdx::Parent::of(&*base, Some("base.vhdx")).unwrap()
    });
    Options { size, block_size: MIB as u32, kind, parent, ..Options::default() }
}

fn create(sim: &Sim, kind: Kind, size: u64) -> Arc<VhdxLayer> {
    let root = sim.root();
    let options = options(&*root, kind, size);
    let layer = vhdx::create(root.create("disk.vhdx").unwrap(), &options).unwrap();
    root.sync().unwrap();
    layer
}

fn open(sim: &Sim, mode: Mode) -> image::Result<Arc<VhdxLayer>> {
    vhdx::open(sim.root().open("disk.vhdx", mode)?, mode)
}

fn content(layer: &dyn Layer, kind: Kind) -> Vec<u8> {
    read(layer, 0, layer.info().size, if kind == Kind::Differencing { PARENT } else { 0 }).unwrap()
}

/// A size: at a block's end, in the middle of a block, and far away, where the table needs more than one region.
fn size(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => (1 + random.below(6)) * MIB,
        1 => (1 + random.below(4000)) * SECTOR,
        _ => MIB + random.below(10_000) * SECTOR,
    }
}

#[test]
fn a_disk_that_changes_its_size_reads_like_plain_bytes() {
    for (kind, seed) in
        [Kind::Dynamic, Kind::Differencing, Kind::Fixed].into_iter().flat_map(|k| (0..12).map(move |s| (k, s)))
    {
        let sim = Sim::new();
        let mut random = Random(seed);
        let mut layer = create(&sim, kind, 3 * MIB);
        let mut model = content(&*layer, kind);
        for step in 0..60u64 {
            let sectors = model.len() as u64 / SECTOR;
            let from = random.below(sectors);
            let len = 1 + random.below((sectors - from).min(3000));
            let range = (from * SECTOR) as usize..((from + len) * SECTOR) as usize;
            match random.below(8) {
                0..=2 => {
                    let data = vec![step as u8 + 1; range.len()];
                    write(&*layer, from * SECTOR, &data).unwrap();
                    model[range].copy_from_slice(&data);
                }
                3 => {
                    zero(&*layer, from * SECTOR, len * SECTOR).unwrap();
                    model[range].fill(0);
                }
                4 => layer.flush().unwrap(),
                5 => {
                    layer.close().unwrap();
                    drop(layer);
                    layer = open(&sim, Mode::Write).unwrap();
                }
                6 => {
                    layer.flush().unwrap();
                    assert!(layer.pack(&mut |_, _| true).unwrap());
                }
                _ => {
                    let size = size(&mut random);
                    layer.resize(size).unwrap();
                    model.resize(size as usize, 0);
                    assert_eq!(layer.info().size, size);
                }
            }
            assert!(content(&*layer, kind) == model, "{kind:?}, seed {seed}, step {step}");
        }
        layer.close().unwrap();
        drop(layer);
        assert!(content(&*open(&sim, Mode::Read).unwrap(), kind) == model);
    }
}

/// Far growth moves the table; what stands past the old end, from an earlier and larger life of the disk, does not come back.
#[test]
fn a_table_without_room_moves() {
    for (kind, fill) in [(Kind::Dynamic, 0), (Kind::Differencing, PARENT)] {
        let sim = Sim::new();
        let mut layer = create(&sim, kind, 3 * MIB);
        write(&*layer, MIB, &[7; 4096]).unwrap();
        // 131,072 entries fill a region of 1 MiB.
        for size in [300 << 30, MIB + SECTOR, 200 << 30, 900 << 30, 2 * MIB, 901 << 30] {
            layer.resize(size).unwrap();
            let far = size - 4096 - size % 4096;
            if far > 2 * MIB {
                assert!(read(&*layer, far, 4096, fill).unwrap().iter().all(|byte| *byte == 0), "{kind:?}, {size}");
                write(&*layer, far, &[9; 4096]).unwrap();
            }
            layer.close().unwrap();
            drop(layer);
            layer = open(&sim, Mode::Write).unwrap();
            assert_eq!(layer.info().size, size);
            assert_eq!(read(&*layer, MIB, SECTOR, fill).unwrap(), [7; SECTOR as usize]);
        }
    }
}

/// Resizes until the disk is cut off or all is done.
fn resizes(sim: &Sim, sizes: &[u64], seen: &mut u64) -> image::Result<()> {
    let layer = open(sim, Mode::Write)?;
    for size in sizes {
        *seen = *size;
        layer.resize(*size)?;
    }
    layer.close()
}

#[test]
fn wherever_a_resize_is_cut_off_the_disk_has_the_old_size_or_the_new_one() {
    // The last ones move the table.
    let lives: [&[u64]; 3] =
        [&[5 * MIB, 2 * MIB + SECTOR, 4 * MIB], &[MIB + 7 * SECTOR, 6 * MIB + SECTOR], &[140 << 30, 2 * MIB]];
    for kind in [Kind::Dynamic, Kind::Differencing, Kind::Fixed] {
        for sizes in lives {
            if kind == Kind::Fixed && sizes[0] > 1 << 30 {
                continue;
            }
            let made = |sim: &Sim| {
                let layer = create(sim, kind, 3 * MIB - 5 * SECTOR);
                write(&*layer, MIB / 2, &[1; 4096]).unwrap();
                write(&*layer, 3 * MIB - 10 * SECTOR, &[2; 5 * SECTOR as usize]).unwrap();
                layer.close().unwrap();
            };
            let (first, last) = {
                let sim = Sim::new();
                made(&sim);
                let first = sim.counts().operations;
                resizes(&sim, sizes, &mut 0).unwrap();
                (first, sim.counts().operations)
            };
            for cut in first..last {
                let sim = Sim::new();
                made(&sim);
                sim.cut(At::Operation(cut));
                let mut doing = 0;
                assert!(resizes(&sim, sizes, &mut doing).is_err());
                let before =
                    sizes.iter().position(|size| *size == doing).and_then(|n| n.checked_sub(1)).map(|n| sizes[n]);
                let before = before.unwrap_or(3 * MIB - 5 * SECTOR);
                for crash in Crash::several(cut, if sizes[0] > 1 << 30 { 1 } else { 3 }) {
                    let after = sim.after_crash(crash);
                    let what = format!("{kind:?}, {sizes:?}, cut at {cut} of {last}, {crash:?}");
                    check_resized(&after, kind, (before, doing), &what);
                }
            }
        }
    }
}

/// The disk has one of two sizes, reads right, and can be resized and written.
fn check_resized(sim: &Sim, kind: Kind, (before, doing): (u64, u64), what: &str) {
    let fill = if kind == Kind::Differencing { PARENT } else { 0 };
    let check = |layer: &dyn Layer| {
        let size = layer.info().size;
        assert!(size == before || size == doing, "{size} ({what})");
        assert!(read(layer, MIB / 2, 4096, fill).unwrap() == [1; 4096], "{what}");
        assert!(read(layer, 0, SECTOR, fill).unwrap() == [fill; SECTOR as usize], "{what}");
        size
    };
    check(&*open(sim, Mode::Read).unwrap_or_else(|error| panic!("{error} ({what})")));
    let layer = open(sim, Mode::Write).unwrap_or_else(|error| panic!("{error} ({what})"));
    let size = check(&*layer);
    let grown = size + 3 * MIB;
    layer.resize(grown).unwrap_or_else(|error| panic!("{error} ({what})"));
    let tail = read(&*layer, size, 3 * MIB, fill).unwrap();
    assert!(tail.iter().all(|byte| *byte == 0), "something old came back ({what})");
    write(&*layer, grown - SECTOR, &[3; SECTOR as usize]).unwrap();
    layer.close().unwrap();
    drop(layer);
    let layer = open(sim, Mode::Read).unwrap_or_else(|error| panic!("{error} ({what})"));
    assert_eq!(read(&*layer, grown - SECTOR, SECTOR, fill).unwrap(), [3; SECTOR as usize]);
}

/// A disk with holes between its blocks, and zeros in some.
fn scattered(sim: &Sim, kind: Kind) -> Vec<u8> {
    let layer = create(sim, kind, 12 * MIB);
    for block in 0..12 {
        write(&*layer, block * MIB, &vec![block as u8 + 1; MIB as usize - 4096]).unwrap();
    }
    layer.flush().unwrap();
    zero(&*layer, MIB, 4 * MIB).unwrap();
    write(&*layer, 6 * MIB, &vec![0; MIB as usize]).unwrap();
    layer.close().unwrap();
    content(&*layer, kind)
}

fn compact(sim: &Sim) -> image::Result<bool> {
    let layer = open(sim, Mode::Write)?;
    image::compact::compact(&Chain::new(vec![layer], Access::Write)?, &mut |_, _| true)
}

#[test]
fn a_compacted_file_is_short_and_reads_as_before() {
    for kind in [Kind::Dynamic, Kind::Differencing] {
        let sim = Sim::new();
        let before = scattered(&sim, kind);
        let length = || sim.root().open("disk.vhdx", Mode::Read).unwrap().len().unwrap();
        let (long, id) = (length(), open(&sim, Mode::Read).unwrap().info().data_id);
        assert!(compact(&sim).unwrap());
        assert!(length() + 5 * MIB <= long, "{} of {long}", length());
        let layer = open(&sim, Mode::Read).unwrap();
        assert!(content(&*layer, kind) == before);
        assert_eq!(layer.info().data_id, id, "what stands on it still does");
        drop(layer);
        let short = length();
        assert!(compact(&sim).unwrap());
        assert_eq!(length(), short);
    }
}

#[test]
fn wherever_a_compaction_is_cut_off_nothing_is_lost_and_it_goes_on() {
    for kind in [Kind::Dynamic, Kind::Differencing] {
        let (first, last, short) = {
            let sim = Sim::new();
            scattered(&sim, kind);
            let first = sim.counts().operations;
            compact(&sim).unwrap();
            (first, sim.counts().operations, sim.root().open("disk.vhdx", Mode::Read).unwrap().len().unwrap())
        };
        for cut in first..last {
            let sim = Sim::new();
            let before = scattered(&sim, kind);
            sim.cut(At::Operation(cut));
            assert!(compact(&sim).is_err());
            for crash in Crash::several(cut, 4) {
                let after = sim.after_crash(crash);
                let what = format!("{kind:?}, cut at {cut} of {last}, {crash:?}");
                let layer = open(&after, Mode::Read).unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(content(&*layer, kind) == before, "{what}");
                drop(layer);
                compact(&after).unwrap_or_else(|error| panic!("{error} ({what})"));
                let layer = open(&after, Mode::Read).unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(content(&*layer, kind) == before, "compacted again, {what}");
                assert!(layer.store().len().unwrap() <= short + MIB, "{what}");
            }
        }
    }
}
