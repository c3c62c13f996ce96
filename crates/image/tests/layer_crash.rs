//! One layer of each format, cut off at every operation: what was flushed is there, and every sector is an old one or a new one of its own.

mod layer;

use image::vhdx;
use image::{Format, Kind, Layer, ParentLink, vhd};
use layer::{read, write, zero};
use std::collections::BTreeSet;
use std::sync::Arc;
use store::sim::{At, Crash, Sim};
use store::{Lock, Mode};
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
const PARENT: u8 = 0xEE;
const BLOCK: u64 = MIB;
const BLOCKS: u64 = 6;
const SECTORS: u64 = BLOCKS * BLOCK / SECTOR - 100;

/// What one sector may hold: a stamp. 0 is zeros, 1 is the parent's.
type Stamp = u64;
const ZEROS: Stamp = 0;
const PARENTS: Stamp = 1;

fn stamped(stamp: Stamp) -> [u8; SECTOR as usize] {
    match stamp {
        ZEROS => [0; SECTOR as usize],
        PARENTS => [PARENT; SECTOR as usize],
        _ => {
            let mut sector = [0; SECTOR as usize];
            sector.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&stamp.to_le_bytes()));
            sector
        }
    }
}

/// What each sector held at the last flush, and what was written to it since: after a crash it is one of these.
struct Allowed {
    flushed: Vec<Stamp>,
    since: Vec<Vec<Stamp>>,
}

impl Allowed {
    fn new(absent: Stamp) -> Self {
        Self { flushed: vec![absent; SECTORS as usize], since: vec![Vec::new(); SECTORS as usize] }
    }

    fn wrote(&mut self, at: u64, len: u64, stamp: Stamp) {
        self.since[at as usize..(at + len) as usize].iter_mut().for_each(|stamps| stamps.push(stamp));
    }

    fn flushed(&mut self) {
        for (flushed, since) in self.flushed.iter_mut().zip(&mut self.since) {
            *flushed = since.last().copied().unwrap_or(*flushed);
            since.clear();
        }
    }

    fn check(&self, layer: &dyn Layer, absent: u8, what: &str) {
        let found = read(layer, 0, SECTORS * SECTOR, absent).expect("read");
        for (at, sector) in found.chunks_exact(SECTOR as usize).enumerate() {
            let mut allowed = std::iter::once(&self.flushed[at]).chain(&self.since[at]);
            assert!(
                allowed.any(|stamp| sector == stamped(*stamp)),
                "sector {at} is {:?}…, not one of {:?}, {:?} ({what})",
                &sector[..8],
                self.flushed[at],
                self.since[at]
            );
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    /// A few sectors, or whole blocks.
    fn range(&mut self) -> (u64, u64) {
        let block = BLOCK / SECTOR;
        let (at, len) = match self.below(4) {
            0 => (self.below(BLOCKS) * block, block * (1 + self.below(2))),
            1 => (self.below(BLOCKS) * block + self.below(8), 150 + self.below(1800)),
            _ => (self.below(SECTORS), 1 + self.below(12)),
        };
        let at = at.min(SECTORS - 1);
        (at, len.min(SECTORS - at))
    }
}

fn open(sim: &Sim, mode: Mode) -> image::Result<Arc<dyn Layer>> {
    image::open(sim.root().open("disk", mode)?, None, mode)
}

fn create(sim: &Sim, format: Format, kind: Kind) -> Arc<dyn Layer> {
    let root = sim.root();
    let size = SECTORS * SECTOR;
    let parent = (kind == Kind::Differencing)
        .then(|| vhdx::create(root.create("base").expect("new"), &vhdx::Options::dynamic(size)).expect("a base"));
    let file = root.create("disk").expect("new");
    let layer: image::Result<Arc<dyn Layer>> = if format == Format::Vhd {
        let parent = parent.map(|base| vhd::Parent::of(&*base, Some("base")).expect("a parent"));
        let options = vhd::Options { size, block_size: BLOCK as u32, kind, parent };
        vhd::create(file, &options).map(|layer| layer as _)
    } else {
        let parent = parent.map(|base| vhdx::Parent::of(&*base, Some("base")).expect("a parent"));
        let options = vhdx::Options { size, block_size: BLOCK as u32, kind, parent, ..vhdx::Options::default() };
        vhdx::create(file, &options).map(|layer| layer as _)
    };
    root.sync().expect("sync");
    layer.expect("a layer")
}

/// Writes, zeroes, flushes and reopens until the disk is cut off or `steps` are done.
fn work(sim: &Sim, format: Format, kind: Kind, seed: u64, steps: u64, allowed: &mut Allowed) -> image::Result<()> {
    let mut random = Random(seed);
    let mut layer = create(sim, format, kind);
    for step in 0..steps {
        let stamp = 1000 * (seed + 1) + step;
        match random.below(10) {
            0..=4 => {
                let (at, len) = random.range();
                allowed.wrote(at, len, stamp);
                write(&*layer, at * SECTOR, &stamped(stamp).repeat(len as usize))?;
            }
            5 | 6 => {
                let (at, len) = random.range();
                allowed.wrote(at, len, ZEROS);
                zero(&*layer, at * SECTOR, len * SECTOR)?;
            }
            7 => {
                // A ticket whose data is written and that is never committed: what it covers stays what it was, unless it lies in
                // place already.
                let (at, len) = random.range();
                let ticket = layer.prepare(at * SECTOR, len * SECTOR, image::Change::Data)?;
                let mut runs = Vec::new();
                layer.map(at * SECTOR, len * SECTOR, &mut runs)?;
                if runs.iter().all(|run| !matches!(run.source, image::Source::Data(_))) {
                    for extent in &ticket.extents {
                        layer.store().write_at(&vec![0xDD; extent.len as usize], extent.at)?;
                    }
                }
            }
            8 => {
                layer.flush()?;
                allowed.flushed();
            }
            _ => {
                layer.close()?;
                allowed.flushed();
                layer.store().lock(Lock::None)?;
                layer = open(sim, Mode::Write)?;
            }
        }
    }
    Ok(())
}

fn after_every_cut(format: Format, kind: Kind, seed: u64, steps: u64, crashes: u64) {
    let absent = if kind == Kind::Differencing { PARENTS } else { ZEROS };
    let fill = if kind == Kind::Differencing { PARENT } else { 0 };
    let made = {
        let sim = Sim::new();
        create(&sim, format, kind);
        sim.counts().operations
    };
    let all = {
        let sim = Sim::new();
        work(&sim, format, kind, seed, steps, &mut Allowed::new(absent)).expect("nothing fails");
        sim.counts().operations
    };
    let mut seen = BTreeSet::new();
    for cut in made..=all {
        let sim = Sim::new();
        sim.cut(At::Operation(cut));
        let mut allowed = Allowed::new(absent);
        let _ = work(&sim, format, kind, seed, steps, &mut allowed);
        for crash in Crash::several(seed.wrapping_mul(cut + 1), crashes) {
            let after = sim.after_crash(crash);
            if !seen.insert((cut, after.digest())) {
                continue;
            }
            let what = format!("seed {seed}, cut at {cut} of {all}, {crash:?}");
            let seen_by_reader = open(&after, Mode::Read).unwrap_or_else(|error| panic!("{error} ({what})"));
            allowed.check(&*seen_by_reader, fill, &what);
            drop(seen_by_reader);
            let layer = open(&after, Mode::Write).unwrap_or_else(|error| panic!("{error} ({what})"));
            allowed.check(&*layer, fill, &what);
            // What the crash left must be good to work with.
            let before = read(&*layer, 0, SECTORS * SECTOR, fill).expect("read");
            let at = cut * 37 % (SECTORS - 1);
            write(&*layer, at * SECTOR, &stamped(7)).expect("write");
            layer.flush().expect("flush");
            drop(layer);
            let mut now = read(&*open(&after, Mode::Read).expect("open"), 0, SECTORS * SECTOR, fill).expect("read");
            assert_eq!(now[(at * SECTOR) as usize..][..SECTOR as usize], stamped(7), "{what}");
            now[(at * SECTOR) as usize..][..SECTOR as usize]
                .copy_from_slice(&before[(at * SECTOR) as usize..][..SECTOR as usize]);
            assert!(now == before, "another sector changed ({what})");
        }
    }
}

#[test]
fn differencing_vhdx() {
    for seed in 0..4 {
        after_every_cut(Format::Vhdx, Kind::Differencing, seed, 24, 4);
    }
}

#[test]
fn differencing_vhd() {
    for seed in 0..4 {
        after_every_cut(Format::Vhd, Kind::Differencing, seed, 24, 4);
    }
}

#[test]
fn dynamic_vhdx() {
    for seed in 10..13 {
        after_every_cut(Format::Vhdx, Kind::Dynamic, seed, 24, 4);
    }
}

#[test]
fn dynamic_vhd() {
    for seed in 10..13 {
        after_every_cut(Format::Vhd, Kind::Dynamic, seed, 24, 4);
    }
}

#[test]
fn fixed() {
    for format in [Format::Vhdx, Format::Vhd] {
        after_every_cut(format, Kind::Fixed, 20, 20, 3);
    }
}

/// A cut while the file is made leaves one that opens empty, or one that is refused.
#[test]
fn while_it_is_made() {
    for format in [Format::Vhdx, Format::Vhd] {
        for kind in [Kind::Dynamic, Kind::Fixed] {
            while_one_is_made(format, kind);
        }
    }
}

fn while_one_is_made(format: Format, kind: Kind) {
    let make = |sim: &Sim| -> image::Result<()> {
        let (root, size) = (sim.root(), SECTORS * SECTOR);
        let file = root.create("disk")?;
        root.sync()?;
        if format == Format::Vhd {
            vhd::create(file, &vhd::Options { kind, ..vhd::Options::dynamic(size) }).map(drop)
        } else {
            vhdx::create(file, &vhdx::Options { kind, ..vhdx::Options::dynamic(size) }).map(drop)
        }
    };
    let sim = Sim::new();
    make(&sim).expect("nothing fails");
    for cut in 0..sim.counts().operations {
        let sim = Sim::new();
        sim.cut(At::Operation(cut));
        assert!(make(&sim).is_err());
        for crash in Crash::several(cut, 6) {
            let after = sim.after_crash(crash);
            if let Ok(layer) = open(&after, Mode::Write) {
                assert!(read(&*layer, 0, SECTORS * SECTOR, 0).expect("read").iter().all(|byte| *byte == 0));
            }
        }
    }
}

/// A VHD that gives back what it grew ahead of need ends with a footer at every moment: others want it there.
#[test]
fn while_a_vhd_is_closed() {
    let fill = |sim: &Sim| -> image::Result<Arc<dyn Layer>> {
        let file = sim.root().create("disk")?;
        sim.root().sync()?;
        let layer = vhd::create(file, &vhd::Options { block_size: BLOCK as u32, ..vhd::Options::dynamic(64 * MIB) })?;
        for block in 0..20 {
            write(&*layer, block * BLOCK, &stamped(5))?;
        }
        layer.flush()?;
        Ok(layer)
    };
    let sim = Sim::new();
    let layer = fill(&sim).expect("nothing fails");
    let (before, length) = (sim.counts().operations, layer.store().len().expect("length"));
    layer.close().expect("nothing fails");
    assert!(layer.store().len().expect("length") < length, "there is something to give back");
    // The last one is behind all of it, with its last steps not synced.
    for cut in before..=sim.counts().operations {
        let sim = Sim::new();
        sim.cut(At::Operation(cut));
        let _ = fill(&sim).expect("before the cut").close();
        for crash in Crash::several(cut, 20) {
            let file = sim.after_crash(crash).root().open("disk", Mode::Read).expect("there");
            let mut cookie = [0; 8];
            file.read_at(&mut cookie, file.len().expect("length") - SECTOR).expect("read");
            assert_eq!(&cookie, b"conectix", "cut at {cut}, {crash:?}");
        }
    }
}

/// A VHD whose link and ids change, cut off all along: it has the old ones or the new ones, all of them.
#[test]
fn while_it_is_linked_anew() {
    let link = |step: u128| {
        let second = (!step.is_multiple_of(3)).then_some(Uuid::from_u128(1000 + step));
        let name = format!(r".\{}{step}", "n".repeat(step as usize * 40));
        let (linkage, relative_path) = (Uuid::from_u128(step), Some(name));
        (Uuid::from_u128(2000 + step), ParentLink { linkage, linkage2: second, relative_path, absolute_path: None })
    };
    let work = |sim: &Sim, done: &mut u128| -> image::Result<()> {
        let layer = create(sim, Format::Vhd, Kind::Differencing);
        write(&*layer, SECTOR, &stamped(5))?;
        layer.flush()?;
        for step in 0..8 {
            let (id, parent) = link(step);
            layer.relink(Some(id), Some(parent))?;
            *done = step + 1;
        }
        layer.close()
    };
    let (made, all) = {
        let sim = Sim::new();
        create(&sim, Format::Vhd, Kind::Differencing);
        let made = sim.counts().operations;
        let sim = Sim::new();
        work(&sim, &mut 0).expect("nothing fails");
        (made + 4, sim.counts().operations)
    };
    for cut in made..all {
        let sim = Sim::new();
        sim.cut(At::Operation(cut));
        let mut done = 0;
        let _ = work(&sim, &mut done);
        for crash in Crash::several(cut, 8) {
            for mode in [Mode::Read, Mode::Write] {
                let layer =
                    open(&sim.after_crash(crash), mode).unwrap_or_else(|error| panic!("{error}, {cut}, {crash:?}"));
                let info = layer.info();
                let is = |step: u128| {
                    (info.data_id, info.parent.clone()) == {
                        let (id, link) = link(step);
                        (id, Some(link))
                    }
                };
                let first = done == 0 && info.data_id != link(0).0;
                assert!(first || is(done) || (done > 0 && is(done - 1)), "{cut} of {all}, {crash:?}: {info:?}");
                if done > 0 {
                    assert_eq!(read(&*layer, SECTOR, SECTOR, PARENT).expect("read"), stamped(5));
                }
            }
        }
    }
}

/// A note that is left in a layer which somebody stands on, cut off all along: the old one or the new one; what was flushed and the id by
/// which the layer is known stay.
#[test]
fn while_a_note_is_left() {
    for format in [Format::Vhdx, Format::Vhd] {
        for kind in [Kind::Dynamic, Kind::Differencing] {
            while_one_is_left(format, kind);
        }
    }
}

fn while_one_is_left(format: Format, kind: Kind) {
    let note = |step: usize| vec![step as u8; [9000, 3, 65_536, 20_000, 1][step]];
    let work = |sim: &Sim, done: &mut (Option<Uuid>, usize)| -> image::Result<()> {
        let layer = create(sim, format, kind);
        write(&*layer, SECTOR, &stamped(5))?;
        layer.settle()?;
        layer.flush()?;
        done.0 = Some(layer.info().data_id);
        for step in 1..5 {
            write(&*layer, 9 * SECTOR, &stamped(100))?;
            layer.set_note(&note(step))?;
            done.1 = step;
            assert_eq!(layer.note()?, Some(note(step)));
        }
        layer.close()
    };
    let all = {
        let sim = Sim::new();
        work(&sim, &mut (None, 0)).expect("nothing fails");
        sim.counts().operations
    };
    let made = {
        let sim = Sim::new();
        create(&sim, format, kind);
        sim.counts().operations
    };
    for cut in made..all {
        let sim = Sim::new();
        sim.cut(At::Operation(cut));
        let mut done = (None, 0);
        let _ = work(&sim, &mut done);
        let (Some(id), step) = done else { continue };
        for crash in Crash::several(cut, 6) {
            for mode in [Mode::Read, Mode::Write] {
                let after = sim.after_crash(crash);
                let layer = open(&after, mode).unwrap_or_else(|error| panic!("{error}, {cut}, {crash:?}"));
                assert_eq!(layer.info().data_id, id, "{cut} of {all}, {crash:?}");
                let found = layer.note().expect("it is read");
                let old = Some(note(step)).filter(|_| step > 0);
                assert!(found == old || found == Some(note((step + 1).min(4))), "{cut} of {all}, {crash:?}");
                assert_eq!(read(&*layer, SECTOR, SECTOR, PARENT).expect("read"), stamped(5));
            }
        }
    }
}

/// A flush that needs several log entries, cut off all along: what the flush before made durable stays, the rest is old or new.
#[test]
fn in_a_flush_of_several_entries() {
    const STRIDE: u64 = 16 * MIB;
    const PLACES: u64 = 280;
    let fill = |sim: &Sim| -> image::Result<Arc<dyn Layer>> {
        let root = sim.root();
        let base = vhdx::create(root.create("base")?, &vhdx::Options::dynamic(PLACES * STRIDE))?;
        let options = vhdx::Options { block_size: BLOCK as u32, ..vhdx::Options::differencing(&*base, "base")? };
        let layer = vhdx::create(root.create("disk")?, &options)?;
        root.sync()?;
        for place in 0..PLACES {
            write(&*layer, place * STRIDE + SECTOR, &stamped(100 + place))?;
            write(&*layer, place * STRIDE + 5 * BLOCK + 9 * SECTOR, &stamped(7))?;
        }
        layer.close()?;
        drop(layer);
        // The second block is taken out of the table, as others' tools may do it: its bits stay.
        let file = root.open("disk", Mode::Write)?;
        for block in (0..PLACES).map(|place| place * STRIDE / BLOCK + 5) {
            file.write_at(&[0; 8], 3 * MIB + (block + block / 4096) * 8)?;
        }
        file.sync()?;
        drop(file);
        let layer = open(sim, Mode::Write)?;
        // Another sector of the same block, and a block that is new; the bits of both are on one page.
        for place in 0..PLACES {
            write(&*layer, place * STRIDE + 3 * SECTOR, &stamped(1000 + place))?;
            write(&*layer, place * STRIDE + 5 * BLOCK, &stamped(2000 + place))?;
        }
        Ok(layer)
    };
    let (before, after) = {
        let sim = Sim::new();
        let layer = fill(&sim).expect("nothing fails");
        let before = sim.counts().operations;
        layer.flush().expect("nothing fails");
        (before, sim.counts().operations)
    };
    assert!(after - before > 2 * PLACES / 2, "several hundred operations");
    for cut in before..after {
        let sim = Sim::new();
        sim.cut(At::Operation(cut));
        let _ = fill(&sim).and_then(|layer| layer.flush());
        let held = [2, 30, 60].map(|operation| Crash::Hold { operation });
        for crash in held.into_iter().chain(Crash::several(cut, 2)) {
            let layer = open(&sim.after_crash(crash), Mode::Read)
                .unwrap_or_else(|error| panic!("{error} (cut at {cut}, {crash:?})"));
            for place in 0..PLACES {
                let sector = |offset: u64| read(&*layer, place * STRIDE + offset, SECTOR, PARENT).expect("read");
                let one_of = |offset: u64, stamp: Stamp| {
                    let found = sector(offset);
                    assert!(
                        found == stamped(PARENTS) || found == stamped(stamp),
                        "place {place}, cut at {cut}, {crash:?}"
                    );
                };
                assert_eq!(sector(SECTOR), stamped(100 + place), "place {place}, cut at {cut}, {crash:?}");
                assert_eq!(sector(2 * SECTOR), stamped(PARENTS));
                one_of(3 * SECTOR, 1000 + place);
                one_of(5 * BLOCK, 2000 + place);
                assert_eq!(
                    sector(5 * BLOCK + 9 * SECTOR),
                    stamped(PARENTS),
                    "old bits, place {place}, cut at {cut}, {crash:?}"
                );
            }
        }
    }
}
