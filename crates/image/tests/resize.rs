//! Disks that change their size, images that are compacted: against plain bytes, and cut off at every operation.

mod layer;

use image::{Access, Chain, Format, Kind, Layer, vhd, vhdx};
use layer::{read, write, zero};
use std::sync::Arc;
use store::Mode;
use store::sim::{At, Crash, Sim};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// What the parent holds everywhere.
const PARENT: u8 = 0xEE;

/// A format and a kind of it.
#[derive(Debug, Clone, Copy)]
struct Shape(Format, Kind);

impl Shape {
    /// All of these kinds in both formats.
    fn all(kinds: &[Kind]) -> Vec<Self> {
        [Format::Vhdx, Format::Vhd]
            .into_iter()
            .flat_map(|format| kinds.iter().map(move |kind| Self(format, *kind)))
            .collect()
    }

    /// What is read where nothing is here.
    fn absent(self) -> u8 {
        if self.1 == Kind::Differencing { PARENT } else { 0 }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn create(sim: &Sim, Shape(format, kind): Shape, size: u64) -> Arc<dyn Layer> {
    let (root, block_size) = (sim.root(), MIB as u32);
    let file = root.create("disk").unwrap();
    let base = (kind == Kind::Differencing)
        .then(|| vhdx::create(root.create("base").unwrap(), &vhdx::Options::dynamic(MIB)).unwrap());
    let layer: Arc<dyn Layer> = if format == Format::Vhd {
        let parent = base.map(|base| vhd::Parent::of(&*base, Some("base")).unwrap());
        vhd::create(file, &vhd::Options { size, block_size, kind, parent }).unwrap()
    } else {
        let parent = base.map(|base| vhdx::Parent::of(&*base, Some("base")).unwrap());
        vhdx::create(file, &vhdx::Options { size, block_size, kind, parent, ..vhdx::Options::default() }).unwrap()
    };
    root.sync().unwrap();
    layer
}

fn open(sim: &Sim, mode: Mode) -> image::Result<Arc<dyn Layer>> {
    image::open(sim.root().open("disk", mode)?, None, mode)
}

fn content(layer: &dyn Layer, shape: Shape) -> Vec<u8> {
    read(layer, 0, layer.info().size, shape.absent()).unwrap()
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
    let shapes = Shape::all(&[Kind::Dynamic, Kind::Differencing, Kind::Fixed]);
    for (shape, seed) in shapes.into_iter().flat_map(|shape| (0..12).map(move |seed| (shape, seed))) {
        let sim = Sim::new();
        let mut random = Random(seed);
        let mut layer = create(&sim, shape, 3 * MIB);
        let mut model = content(&*layer, shape);
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
                    layer.resize(size, u64::MAX).unwrap();
                    model.resize(size as usize, 0);
                    assert_eq!(layer.info().size, size);
                }
            }
            assert!(content(&*layer, shape) == model, "{shape:?}, seed {seed}, step {step}");
        }
        layer.close().unwrap();
        drop(layer);
        assert!(content(&*open(&sim, Mode::Read).unwrap(), shape) == model);
    }
}

/// So far something shows through from beneath, if there is something; behind, what is new may be absent.
const BENEATH: u64 = 8 * MIB;

/// A table without room moves, or what is in its way; what stands past the old end, from an earlier and larger life of the disk, does not
/// come back.
#[test]
fn far_growth_makes_room_for_the_table() {
    for shape in Shape::all(&[Kind::Dynamic, Kind::Differencing]) {
        let sim = Sim::new();
        let mut layer = create(&sim, shape, 3 * MIB);
        write(&*layer, MIB, &[7; 4096]).unwrap();
        // 131,072 entries fill a region of 1 MiB in a VHDX.
        for size in [300 << 30, MIB + SECTOR, 200 << 30, 900 << 30, 2 * MIB, 901 << 30] {
            layer.resize(size, BENEATH).unwrap();
            let far = size - 4096 - size % 4096;
            if far > 2 * MIB {
                let far_parent = if shape.0 == Format::Vhd { 0 } else { shape.absent() };
                assert_eq!(read(&*layer, far, 4096, far_parent).unwrap(), [0; 4096], "{shape:?}, {size}");
                let near = read(&*layer, 3 * MIB, BENEATH - 3 * MIB, shape.absent()).unwrap();
                assert!(near.iter().all(|byte| *byte == 0), "{shape:?}, {size}");
                write(&*layer, far, &[9; 4096]).unwrap();
            }
            layer.close().unwrap();
            drop(layer);
            layer = open(&sim, Mode::Write).unwrap();
            assert_eq!(layer.info().size, size);
            assert_eq!(read(&*layer, MIB, SECTOR, shape.absent()).unwrap(), [7; SECTOR as usize]);
        }
    }
}

/// Resizes until the disk is cut off or all is done. `doing` is the number of the last size that was begun.
fn resizes(sim: &Sim, sizes: &[u64], doing: &mut usize) -> image::Result<()> {
    let layer = open(sim, Mode::Write)?;
    for (number, size) in sizes.iter().enumerate() {
        *doing = number;
        layer.resize(*size, BENEATH)?;
    }
    layer.close()
}

/// The size that the disk is made with, before others come.
const FIRST: u64 = 3 * MIB - 5 * SECTOR;

#[test]
fn wherever_a_resize_is_cut_off_the_disk_has_the_old_size_or_the_new_one() {
    // The last ones move the table, or what is in its way.
    let lives: [&[u64]; 3] =
        [&[5 * MIB, 2 * MIB + SECTOR, 4 * MIB], &[MIB + 7 * SECTOR, 6 * MIB + SECTOR], &[140 << 30, 2 * MIB]];
    for shape in Shape::all(&[Kind::Dynamic, Kind::Differencing, Kind::Fixed]) {
        for sizes in lives {
            if shape.1 == Kind::Fixed && sizes[0] > 1 << 30 {
                continue;
            }
            let made = |sim: &Sim| {
                let layer = create(sim, shape, FIRST);
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
                for crash in Crash::several(cut, if sizes[0] > 1 << 30 { 1 } else { 3 }) {
                    let after = sim.after_crash(crash);
                    let what = format!("{shape:?}, {sizes:?}, cut at {cut} of {last}, {crash:?}");
                    check_resized(&after, shape, &sizes[..=doing], &what);
                }
            }
        }
    }
}

/// The disk has the last of these sizes or the one before, reads right, and can be resized and written.
fn check_resized(sim: &Sim, shape: Shape, sizes: &[u64], what: &str) {
    let sizes = [&[FIRST], sizes].concat();
    let fill = shape.absent();
    let check = |layer: &dyn Layer| {
        let size = layer.info().size;
        assert!(sizes[sizes.len() - 2..].contains(&size), "{size} ({what})");
        assert!(read(layer, MIB / 2, 4096, fill).unwrap() == [1; 4096], "{what}");
        assert!(read(layer, 0, SECTOR, fill).unwrap() == [fill; SECTOR as usize], "{what}");
        // What was cut off, or never was there.
        let low = sizes.iter().take(sizes.len() - usize::from(size != sizes[sizes.len() - 1])).min().unwrap();
        let new = read(layer, *low, size.min(BENEATH) - low, fill).unwrap();
        assert!(new.iter().all(|byte| *byte == 0), "something shows past {low} ({what})");
        if *low >= FIRST {
            assert!(read(layer, FIRST - 5 * SECTOR, SECTOR, fill).unwrap() == [2; SECTOR as usize], "{what}");
        }
        size
    };
    check(&*open(sim, Mode::Read).unwrap_or_else(|error| panic!("{error} ({what})")));
    let layer = open(sim, Mode::Write).unwrap_or_else(|error| panic!("{error} ({what})"));
    let size = check(&*layer);
    let grown = size + 3 * MIB;
    layer.resize(grown, u64::MAX).unwrap_or_else(|error| panic!("{error} ({what})"));
    let tail = read(&*layer, size, 3 * MIB, fill).unwrap();
    assert!(tail.iter().all(|byte| *byte == 0), "something old came back ({what})");
    write(&*layer, grown - SECTOR, &[3; SECTOR as usize]).unwrap();
    layer.close().unwrap();
    drop(layer);
    let layer = open(sim, Mode::Read).unwrap_or_else(|error| panic!("{error} ({what})"));
    assert_eq!(read(&*layer, grown - SECTOR, SECTOR, fill).unwrap(), [3; SECTOR as usize]);
}

/// A disk with holes between its blocks, and zeros in some.
fn scattered(sim: &Sim, shape: Shape) -> Vec<u8> {
    let layer = create(sim, shape, 12 * MIB);
    for block in 0..12 {
        write(&*layer, block * MIB, &vec![block as u8 + 1; MIB as usize - 4096]).unwrap();
    }
    layer.flush().unwrap();
    zero(&*layer, MIB, 4 * MIB).unwrap();
    write(&*layer, 6 * MIB, &vec![0; MIB as usize]).unwrap();
    layer.forget(8 * MIB, 2 * MIB).unwrap();
    layer.close().unwrap();
    content(&*layer, shape)
}

fn compact(sim: &Sim) -> image::Result<bool> {
    let layer = open(sim, Mode::Write)?;
    image::compact::compact(&Chain::new(vec![layer], Access::Write)?, &mut |_, _| true)
}

fn length(sim: &Sim) -> u64 {
    sim.root().open("disk", Mode::Read).unwrap().len().unwrap()
}

#[test]
fn a_compacted_file_is_short_and_reads_as_before() {
    for shape in Shape::all(&[Kind::Dynamic, Kind::Differencing]) {
        let sim = Sim::new();
        let before = scattered(&sim, shape);
        let (long, id) = (length(&sim), open(&sim, Mode::Read).unwrap().info().data_id);
        assert!(compact(&sim).unwrap());
        // A VHD has no zeros over a parent without a place.
        let given = if let Shape(Format::Vhd, Kind::Differencing) = shape { 2 } else { 5 };
        assert!(length(&sim) + given * MIB <= long, "{shape:?}: {} of {long}", length(&sim));
        let layer = open(&sim, Mode::Read).unwrap();
        assert!(content(&*layer, shape) == before);
        assert_eq!(layer.info().data_id, id, "what stands on it still does");
        assert!(layer.store().allocated().unwrap() < 8 * MIB);
        drop(layer);
        let short = length(&sim);
        assert!(compact(&sim).unwrap());
        assert_eq!(length(&sim), short);
    }
}

#[test]
fn wherever_a_compaction_is_cut_off_nothing_is_lost_and_it_goes_on() {
    for shape in Shape::all(&[Kind::Dynamic, Kind::Differencing]) {
        let (first, last, short) = {
            let sim = Sim::new();
            scattered(&sim, shape);
            let first = sim.counts().operations;
            compact(&sim).unwrap();
            (first, sim.counts().operations, length(&sim))
        };
        for cut in first..last {
            let sim = Sim::new();
            let before = scattered(&sim, shape);
            sim.cut(At::Operation(cut));
            assert!(compact(&sim).is_err());
            for crash in Crash::several(cut, 4) {
                let after = sim.after_crash(crash);
                let what = format!("{shape:?}, cut at {cut} of {last}, {crash:?}");
                let layer = open(&after, Mode::Read).unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(content(&*layer, shape) == before, "{what}");
                drop(layer);
                compact(&after).unwrap_or_else(|error| panic!("{error} ({what})"));
                let layer = open(&after, Mode::Read).unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(content(&*layer, shape) == before, "compacted again, {what}");
                assert!(layer.store().len().unwrap() <= short + MIB, "{what}");
            }
        }
    }
}
