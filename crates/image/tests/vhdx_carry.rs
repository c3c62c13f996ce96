//! The carry-over journal: the process dies, the machine and the guest go on. Nothing that was committed may be lost then, flushed
//! or not; and a power cut still finds what was flushed.

mod layer;

use image::vhdx::{self, Carry, VhdxLayer};
use image::{Change, ErrorKind, Kind, Layer, Result, Source};
use layer::{read, write, zero};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use store::sim::{At, Crash, Sim, Times};
use store::{Lock, Mode, Store};
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
const PARENT: u8 = 0xEE;
const BLOCK: u64 = MIB;
const BLOCK_SECTORS: u64 = BLOCK / SECTOR;
const BLOCKS: u64 = 4;
const SECTORS: u64 = BLOCKS * BLOCK_SECTORS - 100;
const LIFE: Uuid = Uuid::from_u128(1);
const NEXT_LIFE: Uuid = Uuid::from_u128(2);

/// What a sector holds. 0 is zeros, 1 is the parent's.
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

/// What each sector holds, and what it held when it was last flushed.
#[derive(Clone)]
struct Model {
    now: Vec<Stamp>,
    /// What was under way when the process died: not acknowledged, so it may be there or not, sector by sector.
    under_way: Option<(Range<usize>, Stamp)>,
    flushed: Vec<Stamp>,
    since: Vec<Vec<Stamp>>,
}

impl Model {
    fn new(absent: Stamp) -> Self {
        let all = vec![absent; SECTORS as usize];
        Self { now: all.clone(), under_way: None, flushed: all, since: vec![Vec::new(); SECTORS as usize] }
    }

    fn begins(&mut self, at: u64, len: u64, stamp: Stamp) {
        let range = at as usize..(at + len) as usize;
        self.since[range.clone()].iter_mut().for_each(|stamps| stamps.push(stamp));
        self.under_way = Some((range, stamp));
    }

    fn committed(&mut self) {
        let (range, stamp) = self.under_way.take().expect("something was under way");
        self.now[range].fill(stamp);
    }

    fn flushed(&mut self) {
        self.flushed.clone_from(&self.now);
        self.since.iter_mut().for_each(Vec::clear);
    }

    /// After the process died: what was committed is there. Takes over which of what was under way is.
    fn check_death(&mut self, found: &[u8], what: &str) {
        let under_way = self.under_way.take();
        for (at, sector) in found.chunks_exact(SECTOR as usize).enumerate() {
            if sector == stamped(self.now[at]) {
                continue;
            }
            match &under_way {
                Some((range, stamp)) if range.contains(&at) && sector == stamped(*stamp) => self.now[at] = *stamp,
                _ => panic!("sector {at} is {:?}…, not {} ({what})", &sector[..8], self.now[at]),
            }
        }
    }

    /// After a power cut: what was flushed is there, or something newer.
    fn check_power_cut(&self, found: &[u8], what: &str) {
        for (at, sector) in found.chunks_exact(SECTOR as usize).enumerate() {
            let mut allowed = std::iter::once(&self.flushed[at]).chain(&self.since[at]);
            assert!(
                allowed.any(|stamp| sector == stamped(*stamp)),
                "sector {at} is {:?}…, not {} or {:?} ({what})",
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

    /// A few sectors, much of a block, or whole blocks.
    fn range(&mut self) -> (u64, u64) {
        let (at, len) = match self.below(4) {
            0 => (self.below(BLOCKS) * BLOCK_SECTORS, BLOCK_SECTORS * (1 + self.below(2))),
            1 => (self.below(BLOCKS) * BLOCK_SECTORS + self.below(8), 150 + self.below(1800)),
            _ => (self.below(SECTORS), 1 + self.below(12)),
        };
        let at = at.min(SECTORS - 1);
        (at, len.min(SECTORS - at))
    }
}

fn absent(kind: Kind) -> (Stamp, u8) {
    if kind == Kind::Differencing { (PARENTS, PARENT) } else { (ZEROS, 0) }
}

fn carry(sim: &Sim, life: Uuid) -> Carry {
    Carry { store: sim.root().open("carry", Mode::Write).expect("the journal"), life }
}

fn create(sim: &Sim, kind: Kind) -> Arc<VhdxLayer> {
    let root = sim.root();
    let size = SECTORS * SECTOR;
    let parent = (kind == Kind::Differencing).then(|| {
        let base = vhdx::create(root.create("base.vhdx").expect("new"), &vhdx::Options::dynamic(size)).expect("a base");
        vhdx::Parent::of(&*base, Some("base.vhdx")).expect("a parent")
    });
    let options = vhdx::Options { size, block_size: BLOCK as u32, kind, parent, ..vhdx::Options::default() };
    root.create("carry").expect("new");
    let layer = vhdx::create_carried(root.create("disk.vhdx").expect("new"), &options, carry(sim, LIFE));
    root.sync().expect("sync");
    layer.expect("a layer")
}

fn open(sim: &Sim, life: Uuid) -> Result<Arc<VhdxLayer>> {
    vhdx::open_carried(sim.root().open("disk.vhdx", Mode::Write)?, carry(sim, life))
}

fn all(layer: &dyn Layer, absent: u8) -> Vec<u8> {
    read(layer, 0, SECTORS * SECTOR, absent).expect("read")
}

/// One step of a guest's life, and the model's.
fn step(sim: &Sim, layer: &mut Arc<VhdxLayer>, random: &mut Random, stamp: Stamp, model: &mut Model) -> Result<()> {
    match random.below(12) {
        0..=5 => {
            let (at, len) = random.range();
            model.begins(at, len, stamp);
            write(&**layer, at * SECTOR, &stamped(stamp).repeat(len as usize))?;
            model.committed();
        }
        6 | 7 => {
            let (at, len) = random.range();
            model.begins(at, len, ZEROS);
            zero(&**layer, at * SECTOR, len * SECTOR)?;
            model.committed();
        }
        8 => abandon(&**layer, random)?,
        9 | 10 => {
            layer.flush()?;
            model.flushed();
        }
        _ => {
            layer.close()?;
            model.flushed();
            *layer = open(sim, LIFE)?;
        }
    }
    Ok(())
}

/// A ticket whose data is written and that is never committed: what it covers stays what it was, unless it lies in place.
fn abandon(layer: &dyn Layer, random: &mut Random) -> Result<()> {
    let (at, len) = random.range();
    let ticket = layer.prepare(at * SECTOR, len * SECTOR, Change::Data)?;
    let mut runs = Vec::new();
    layer.map(at * SECTOR, len * SECTOR, &mut runs)?;
    if runs.iter().all(|run| !matches!(run.source, Source::Data(_))) {
        for extent in &ticket.extents {
            layer.store().write_at(&vec![0xDD; extent.len as usize], extent.at)?;
        }
    }
    Ok(())
}

/// Works until the process dies or `steps` are done.
fn work(sim: &Sim, kind: Kind, seed: u64, steps: u64, model: &mut Model) -> Result<()> {
    let mut layer = create(sim, kind);
    let mut random = Random(seed);
    (0..steps).try_for_each(|stamp| step(sim, &mut layer, &mut random, 1000 + stamp, model))
}

/// The number of operations that making the image takes, and those of the whole work.
fn operations(kind: Kind, seed: u64, steps: u64) -> Range<u64> {
    let sim = Sim::new();
    create(&sim, kind);
    let made = sim.counts().operations;
    let sim = Sim::new();
    work(&sim, kind, seed, steps, &mut Model::new(absent(kind).0)).expect("nothing fails");
    made..sim.counts().operations
}

/// Dies in the middle of every operation, on either file; then comes back, loses its power, or both.
fn dies_at_every_operation(kind: Kind, seed: u64, steps: u64) {
    let (stamp, fill) = absent(kind);
    for cut in operations(kind, seed, steps) {
        let what = format!("{kind:?}, seed {seed}, dead at {cut}");
        let sim = Sim::new();
        sim.cut(At::Operation(cut));
        let mut model = Model::new(stamp);
        assert!(work(&sim, kind, seed, steps, &mut model).is_err(), "dead ({what})");
        sim.revive();
        // The power goes instead: the journal, if it is still there, is of another life.
        for crash in Crash::several(seed ^ cut, 2) {
            let after = sim.after_crash(crash);
            let layer = open(&after, NEXT_LIFE).unwrap_or_else(|error| panic!("{error} ({what})"));
            model.check_power_cut(&all(&*layer, fill), &format!("{what}, {crash:?}"));
        }
        if cut % 5 == 0 {
            dies_while_it_comes_back(&sim, model.clone(), fill, &what);
        }
        let layer = open(&sim, LIFE).unwrap_or_else(|error| panic!("{error} ({what})"));
        let found = all(&*layer, fill);
        model.check_death(&found, &what);
        // It is durable, whatever the journal says from here on.
        let after =
            vhdx::open(sim.after_crash(Crash::Nothing).root().open("disk.vhdx", Mode::Read).unwrap(), Mode::Read);
        assert!(all(&*after.expect("sound"), fill) == found, "lost by a power cut after the death ({what})");
        // And it goes on: with another death, before and after a flush.
        let mut random = Random(cut);
        let mut layer = layer;
        for more in 0..4 {
            step(&sim, &mut layer, &mut random, 5000 + more, &mut model).expect("work");
        }
        drop(std::mem::replace(&mut layer, open(&sim, LIFE).expect("open")));
        model.check_death(&all(&*layer, fill), &format!("{what}, and again"));
    }
}

/// Dies at every operation of opening, and then opens.
fn dies_while_it_comes_back(sim: &Sim, mut model: Model, fill: u8, what: &str) {
    for cut in 0.. {
        let again = sim.after_crash(Crash::Everything);
        again.cut(At::Operation(cut));
        let opened = open(&again, LIFE);
        again.revive();
        let layer = open(&again, LIFE).unwrap_or_else(|error| panic!("{error} ({what}, and at {cut})"));
        model.check_death(&all(&*layer, fill), &format!("{what}, and while it came back at {cut}"));
        if opened.is_ok() {
            break;
        }
    }
}

#[test]
fn differencing() {
    (0..4).for_each(|seed| dies_at_every_operation(Kind::Differencing, seed, 24));
}

#[test]
fn dynamic() {
    (10..13).for_each(|seed| dies_at_every_operation(Kind::Dynamic, seed, 24));
}

#[test]
fn fixed() {
    dies_at_every_operation(Kind::Fixed, 20, 16);
}

/// Dies between operations only, a hundred times in a life, with tickets under way.
#[test]
fn dies_often() {
    for (kind, seed) in [(Kind::Differencing, 31), (Kind::Dynamic, 32)] {
        let (stamp, fill) = absent(kind);
        let sim = Sim::new();
        let (mut model, mut random) = (Model::new(stamp), Random(seed));
        let mut layer = create(&sim, kind);
        for round in 0..100 {
            for _ in 0..random.below(8) {
                let stamp = 1000 + random.below(1 << 20);
                step(&sim, &mut layer, &mut random, stamp, &mut model).expect("work");
            }
            let (at, len) = random.range();
            let stamp = 1000 + random.below(1 << 20);
            model.begins(at, len, stamp);
            let ticket = layer.prepare(at * SECTOR, len * SECTOR, Change::Data).expect("a ticket");
            for extent in ticket.extents.iter().take(random.below(3) as usize) {
                let data = stamped(stamp).repeat((extent.len / SECTOR) as usize);
                layer.store().write_at(&data, extent.at).expect("write");
            }
            sim.cut_now();
            drop((ticket, layer));
            sim.revive();
            layer = open(&sim, LIFE).expect("open");
            model.check_death(&all(&*layer, fill), &format!("{kind:?}, round {round}"));
        }
    }
}

/// Sectors of the first two blocks belong to the threads in turns, each of the other blocks to one thread.
const THREADS: u64 = 2;

fn own_range(random: &mut Random, thread: u64) -> (u64, u64) {
    if random.below(3) == 0 {
        let at = (2 + thread) * BLOCK_SECTORS;
        return (at, BLOCK_SECTORS.min(SECTORS - at));
    }
    let turns = 2 * BLOCK_SECTORS / (8 * THREADS);
    ((random.below(turns) * THREADS + thread) * 8, 1 + random.below(8))
}

/// What one thread did until the process died.
fn thread_works(layer: &VhdxLayer, kind: Kind, seed: u64, thread: u64) -> Model {
    let mut model = Model::new(absent(kind).0);
    let mut random = Random(seed * 10 + thread);
    let mut work = || -> Result<()> {
        for stamp in 1000 * (thread + 1).. {
            let (at, len) = own_range(&mut random, thread);
            match random.below(8) {
                0 => layer.flush()?,
                1 => {
                    model.begins(at, len, ZEROS);
                    zero(layer, at * SECTOR, len * SECTOR)?;
                    model.committed();
                }
                _ => {
                    model.begins(at, len, stamp);
                    write(layer, at * SECTOR, &stamped(stamp).repeat(len as usize))?;
                    model.committed();
                }
            }
        }
        Ok(())
    };
    work().expect_err("the process dies");
    model
}

#[test]
fn threads() {
    for seed in 0..60 {
        let kind = [Kind::Differencing, Kind::Dynamic][seed as usize % 2];
        let sim = Sim::new();
        let layer = create(&sim, kind);
        sim.cut(At::Operation(sim.counts().operations + 7 + seed * 3));
        let models: Vec<Model> = std::thread::scope(|scope| {
            let work = |thread| {
                let layer = &layer;
                scope.spawn(move || thread_works(layer, kind, seed, thread))
            };
            let threads: Vec<_> = (0..THREADS).map(work).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        drop(layer);
        sim.revive();
        let (stamp, fill) = absent(kind);
        let found = all(&*open(&sim, LIFE).expect("open"), fill);
        for (at, sector) in found.chunks_exact(SECTOR as usize).enumerate() {
            // Who has written the sector, or is about to.
            let owner = models.iter().find(|model| {
                model.now[at] != stamp || model.under_way.as_ref().is_some_and(|(range, _)| range.contains(&at))
            });
            let held = owner.map_or(stamp, |model| model.now[at]);
            let under_way = owner.and_then(|model| model.under_way.as_ref()).filter(|(range, _)| range.contains(&at));
            assert!(
                sector == stamped(held) || under_way.is_some_and(|(_, stamp)| sector == stamped(*stamp)),
                "sector {at} is {:?}…, not {held} or {under_way:?} (seed {seed})",
                &sector[..8]
            );
        }
    }
}

/// A store that does something in the middle of its next sync.
struct Hooked {
    inner: Arc<dyn Store>,
    hook: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl fmt::Debug for Hooked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hooked")
    }
}

impl Store for Hooked {
    fn len(&self) -> store::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> store::Result<()> {
        self.inner.set_len(len)
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> store::Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> store::Result<()> {
        self.inner.write_at(buf, offset)
    }
    fn punch(&self, offset: u64, len: u64) -> store::Result<()> {
        self.inner.punch(offset, len)
    }
    fn sync(&self) -> store::Result<()> {
        let hook = self.hook.lock().expect("no panic").take();
        if let Some(hook) = hook {
            hook();
        }
        self.inner.sync()
    }
    fn lock(&self, lock: Lock) -> store::Result<()> {
        self.inner.lock(lock)
    }
    fn allocated(&self) -> store::Result<u64> {
        self.inner.allocated()
    }
}

/// What is committed while a flush is under way is not that flush's: its end must not forget it.
#[test]
fn committed_during_a_flush() {
    let sim = Sim::new();
    drop(create(&sim, Kind::Differencing));
    let inner = sim.root().open("disk.vhdx", Mode::Write).expect("the file");
    let file = Arc::new(Hooked { inner, hook: Mutex::default() });
    let layer = vhdx::open_carried(Arc::clone(&file) as Arc<dyn Store>, carry(&sim, LIFE)).expect("open");
    write(&*layer, 0, &stamped(1000)).expect("write");
    let during = Arc::clone(&layer);
    *file.hook.lock().expect("no panic") = Some(Box::new(move || {
        write(&*during, 8 * SECTOR, &stamped(1001)).expect("write");
        zero(&*during, BLOCK, BLOCK).expect("zero");
    }));
    layer.flush().expect("flush");
    let layer = open(&sim, LIFE).expect("open");
    assert_eq!(read(&*layer, 0, SECTOR, PARENT).unwrap(), stamped(1000));
    assert_eq!(read(&*layer, 8 * SECTOR, SECTOR, PARENT).unwrap(), stamped(1001));
    assert!(read(&*layer, BLOCK, BLOCK, PARENT).unwrap().iter().all(|byte| *byte == 0));
}

/// An image whose journal lies on a disk of its own.
fn on_two_disks(image: &Sim, journal: &Sim, kind: Kind) -> Arc<VhdxLayer> {
    drop(create(image, kind));
    journal.root().create("carry").expect("new");
    reopen(image, journal)
}

fn reopen(image: &Sim, journal: &Sim) -> Arc<VhdxLayer> {
    vhdx::open_carried(image.root().open("disk.vhdx", Mode::Write).expect("the file"), carry(journal, LIFE))
        .expect("open")
}

/// A commit that cannot be written down fails and changes nothing; neither then nor after a death.
#[test]
fn an_append_that_fails() {
    for kind in [Kind::Differencing, Kind::Dynamic] {
        let (stamp, fill) = absent(kind);
        let mut failures = 0;
        for failing in 0..40 {
            let (image, journal) = (Sim::new(), Sim::new());
            let mut layer = on_two_disks(&image, &journal, kind);
            let now = journal.counts().operations;
            journal.fail(At::Operation(now + failing), store::ErrorKind::NoSpace, Times::Once);
            let (mut model, mut random) = (Model::new(stamp), Random(failing));
            for step_stamp in 1000..1030 {
                match step_without_reopening(&*layer, &mut random, step_stamp, &mut model) {
                    Ok(()) => continue,
                    Err(error) => assert_eq!(error.kind, ErrorKind::NoSpace, "{error}"),
                }
                failures += 1;
                // What lay in place may have changed; nothing else.
                model.check_death(&all(&*layer, fill), "after the failure");
                // The place goes to another block, which is never committed.
                let (at, len) = random.range();
                model.begins(at, len, 4000);
                if let Ok(ticket) = layer.prepare(at * SECTOR, len * SECTOR, Change::Data) {
                    for extent in &ticket.extents {
                        let data = stamped(4000).repeat((extent.len / SECTOR) as usize);
                        layer.store().write_at(&data, extent.at).expect("write");
                    }
                    image.cut_now();
                    drop(ticket);
                }
                image.cut_now();
                drop(layer);
                image.revive();
                layer = reopen(&image, &journal);
                model.check_death(&all(&*layer, fill), &format!("after a death, {failing} failed"));
            }
        }
        // Forgetting what is durable elsewhere may fail unnoticed, and a run may end before its operation comes: a dynamic
        // image of four blocks journals little.
        assert!(failures >= 8, "only {failures} of 40 failures were noticed");
    }
}

fn step_without_reopening(layer: &dyn Layer, random: &mut Random, stamp: Stamp, model: &mut Model) -> Result<()> {
    let (at, len) = random.range();
    match random.below(8) {
        0 => {
            layer.flush()?;
            model.flushed();
            return Ok(());
        }
        1 | 2 => {
            model.begins(at, len, ZEROS);
            zero(layer, at * SECTOR, len * SECTOR)?;
        }
        _ => {
            model.begins(at, len, stamp);
            write(layer, at * SECTOR, &stamped(stamp).repeat(len as usize))?;
        }
    }
    model.committed();
    Ok(())
}

/// If it cannot even be taken back, the layer takes no more changes.
#[test]
fn a_full_journal() {
    let (image, journal) = (Sim::new(), Sim::new());
    let layer = on_two_disks(&image, &journal, Kind::Dynamic);
    write(&*layer, 0, &stamped(1000)).expect("write");
    journal.fail(At::Operation(journal.counts().operations), store::ErrorKind::NoSpace, Times::Forever);
    write(&*layer, BLOCK, &stamped(1001)).expect_err("the journal is full");
    assert_eq!(layer.prepare(0, SECTOR, Change::Data).expect_err("poisoned").kind, ErrorKind::Poisoned);
    assert_eq!(read(&*layer, 0, 2 * BLOCK, 0).unwrap()[..512], stamped(1000));
    assert!(read(&*layer, BLOCK, BLOCK, 0).unwrap().iter().all(|byte| *byte == 0));
}

/// A journal that was damaged tells what it can, and never fails; each commit counts whole or not at all.
#[test]
fn a_damaged_journal() {
    let (image, journal) = (Sim::new(), Sim::new());
    let layer = on_two_disks(&image, &journal, Kind::Differencing);
    let mut model = Model::new(PARENTS);
    let mut states = vec![model.now.clone()];
    let mut random = Random(5);
    for stamp in 1000..1008 {
        // Each to sectors that were not exposed: what is in place needs no journal.
        let at = (stamp - 1000) * 600;
        let len = 1 + random.below(500);
        model.begins(at, len, stamp);
        write(&*layer, at * SECTOR, &stamped(stamp).repeat(len as usize)).expect("write");
        model.committed();
        states.push(model.now.clone());
    }
    let file = journal.root().open("carry", Mode::Read).expect("the journal");
    let mut bytes = vec![0; file.len().expect("a length") as usize];
    file.read_at(&mut bytes, 0).expect("read");
    let mut seen = std::collections::BTreeSet::new();
    for byte in (0..bytes.len()).filter(|byte| !(600..4096).contains(byte)) {
        for cut in [false, true] {
            let (image, journal) = (image.after_crash(Crash::Everything), journal.after_crash(Crash::Everything));
            let file = journal.root().open("carry", Mode::Write).expect("the journal");
            if cut {
                file.set_len(byte as u64).expect("cut");
            } else {
                file.write_at(&[bytes[byte] ^ 0x40], byte as u64).expect("write");
            }
            let found = all(&*reopen(&image, &journal), PARENT);
            let held = |state: &Vec<Stamp>| {
                found.chunks_exact(SECTOR as usize).zip(state).all(|(sector, stamp)| sector == stamped(*stamp))
            };
            let state =
                states.iter().position(held).unwrap_or_else(|| panic!("no state that ever was ({byte}, {cut})"));
            seen.insert(state);
        }
    }
    assert_eq!(seen.len(), states.len(), "every prefix is seen");
}

fn data_id(layer: &VhdxLayer) -> Uuid {
    layer.info().data_id
}

/// What a session that died has done is done under its ids, which a child may name; what comes next is not.
#[test]
fn ids() {
    let sim = Sim::new();
    drop(create(&sim, Kind::Dynamic));
    let layer = open(&sim, LIFE).expect("open");
    write(&*layer, 0, &stamped(1000)).expect("write");
    let died_with = data_id(&layer);
    let layer = open(&sim, LIFE).expect("open");
    assert_eq!(data_id(&layer), died_with);
    assert_eq!(read(&*layer, 0, SECTOR, 0).unwrap(), stamped(1000));
    write(&*layer, 0, &stamped(1001)).expect("write");
    assert_ne!(data_id(&layer), died_with, "changed by another session");
}

/// A journal of a session that is over is never redone: not after somebody else wrote the file, nor in another life.
#[test]
fn a_journal_of_another_session() {
    let sim = Sim::new();
    let layer = create(&sim, Kind::Dynamic);
    write(&*layer, 0, &stamped(1000)).expect("write");
    drop(layer);
    let other_life = sim.after_crash(Crash::Everything);
    let layer = open(&other_life, NEXT_LIFE).expect("open");
    assert!(read(&*layer, 0, SECTOR, 0).unwrap().iter().all(|byte| *byte == 0), "of another life");

    let somebody = vhdx::open(sim.root().open("disk.vhdx", Mode::Write).unwrap(), Mode::Write).expect("open");
    write(&*somebody, BLOCK, &stamped(2000)).expect("write");
    somebody.close().expect("close");
    drop(somebody);
    let layer = open(&sim, LIFE).expect("open");
    assert!(read(&*layer, 0, SECTOR, 0).unwrap().iter().all(|byte| *byte == 0), "of another session");
    assert_eq!(read(&*layer, BLOCK, SECTOR, 0).unwrap(), stamped(2000));
}

/// What is durable in the image takes no space in the journal, and none is left behind.
#[test]
fn the_journal_stays_small() {
    let (image, journal) = (Sim::new(), Sim::new());
    let layer = on_two_disks(&image, &journal, Kind::Differencing);
    let file = journal.root().open("carry", Mode::Read).expect("the journal");
    for round in 0..400 {
        for sector in 0..20 {
            // A new sector each time: its bit is written down.
            write(&*layer, (round * 20 + sector) * SECTOR, &stamped(1000)).expect("write");
        }
        layer.flush().expect("flush");
        assert!(file.allocated().unwrap() <= 5 << 12, "{} bytes", file.allocated().unwrap());
    }
    layer.close().expect("close");
    assert!(file.is_empty().unwrap());
}
