//! Power cuts at every operation of a chain's life: writes, flushes, pushes, folds.
//!
//! The ledger is a list of file names here, changed at a commit and never torn. After each cut, in several of the states that a disk
//! may then be in, the chain is opened by that list and compared, sector by sector: what was flushed is there, what was not is old
//! or new; what was sealed is what it was; a fold that was under way is begun again and loses nothing.

use image::merge::{FoldError, Marks, Outcome, Progress, fold_run, fold_up};
use image::{
    Access, Chain, Change, Error, Format, Kind, Layer, LayerInfo, ParentLink, Received, Result, Run, Ticket, vhd, vhdx,
};
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use store::sim::{At, Crash, Sim};
use store::{Folder, Mode, Store};
use uuid::Uuid;

const SECTOR: u64 = 512;
/// Sizes of disks: in the middle of a block, at its end, and in other blocks.
const SIZES: [u64; 4] = [3 << 20, (2 << 20) + 777 * SECTOR, (5 << 20) + SECTOR, 4 << 20];

/// What each sector may hold: a version, 0 for zeros.
#[derive(Clone)]
struct Model {
    flushed: Vec<u32>,
    /// Versions written since, the last one as it reads.
    since: BTreeMap<u64, Vec<u32>>,
}

impl Model {
    fn put(&mut self, from: u64, count: u64, version: u32) {
        for sector in from..from + count {
            self.since.entry(sector).or_default().push(version);
        }
    }

    fn sectors(&self) -> u64 {
        self.flushed.len() as u64
    }

    /// A leaf of this size is on top.
    fn resize(&mut self, size: u64) {
        self.flushed.resize((size / SECTOR) as usize, 0);
        self.since.retain(|sector, _| *sector < size / SECTOR);
    }

    fn flush(&mut self) {
        self.flushed = self.latest();
        self.since.clear();
    }

    fn latest(&self) -> Vec<u32> {
        let mut latest = self.flushed.clone();
        for (sector, versions) in &self.since {
            latest[*sector as usize] = *versions.last().unwrap();
        }
        latest
    }

    fn allows(&self, sector: usize, version: u32) -> bool {
        self.flushed[sector] == version || self.since.get(&(sector as u64)).is_some_and(|all| all.contains(&version))
    }
}

/// What a layer leaves undone although it says that it was done.
#[derive(Debug, Default)]
struct Omits {
    flush: AtomicBool,
    relink: AtomicBool,
}

/// A layer that can be told to leave something out: what a mistake in the chain would do.
#[derive(Debug)]
struct Lazy {
    layer: Arc<dyn Layer>,
    omits: Arc<Omits>,
}

impl Layer for Lazy {
    fn info(&self) -> LayerInfo {
        self.layer.info()
    }

    fn store(&self) -> &Arc<dyn Store> {
        self.layer.store()
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Run>) -> Result<()> {
        self.layer.map(offset, len, out)
    }

    fn prepare(&self, offset: u64, len: u64, change: Change) -> Result<Ticket> {
        self.layer.prepare(offset, len, change)
    }

    fn commit(&self, ticket: Ticket) -> Result<()> {
        self.layer.commit(ticket)
    }

    fn flush(&self) -> Result<()> {
        if self.omits.flush.load(Ordering::SeqCst) { Ok(()) } else { self.layer.flush() }
    }

    fn wrote(&self) {
        self.layer.wrote();
    }

    fn relink(&self, data_id: Option<Uuid>, parent: Option<ParentLink>) -> Result<()> {
        if self.omits.relink.load(Ordering::SeqCst) { Ok(()) } else { self.layer.relink(data_id, parent) }
    }

    fn settle(&self) -> Result<()> {
        self.layer.settle()
    }

    fn check_resize(&self, size: u64) -> Result<()> {
        self.layer.check_resize(size)
    }

    fn resize(&self, size: u64, beneath: u64) -> Result<()> {
        self.layer.resize(size, beneath)
    }

    fn close(&self) -> Result<()> {
        self.layer.close()
    }
}

/// What is left out on purpose, to see that the test sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    /// Flushes reach only the leaf.
    LowerLayers,
    /// A fold does not sync what it copies into.
    Folds,
    /// A fold does not change the parent's id.
    Ids,
}

struct World {
    /// Formats of the layers, one of which each new one gets.
    formats: &'static [Format],
    folder: Arc<dyn Folder>,
    fault: Fault,
    chain: Arc<Chain>,
    /// The switches of each [`Lazy`] layer, base first.
    omits: Vec<Arc<Omits>>,
    /// The ledger: file names, base first.
    names: Vec<String>,
    /// A file that is written when the ledger changes, for the moments before it has changed.
    ledger: Arc<dyn Store>,
    model: Model,
    /// Sealed content by the layer's position.
    sealed: BTreeMap<usize, Vec<u32>>,
    /// The fold under way: the positions of the layers that are folded with the one below.
    folding: Option<Range<usize>>,
    /// Folds committed, by direction.
    folds: [u32; 2],
    versions: u32,
    files: u32,
    dice: u64,
}

fn bytes(version: u32, sectors: u64) -> Vec<u8> {
    version.to_le_bytes().repeat((sectors * SECTOR / 4) as usize)
}

impl World {
    fn new(sim: &Sim, formats: &'static [Format], fault: Fault, seed: u64) -> Self {
        let folder = sim.root();
        let base = create(folder.create("0").unwrap(), formats[0], SIZES[0], 1 << 20, None);
        let ledger = folder.create("ledger").unwrap();
        folder.sync().unwrap();
        let omits = Arc::<Omits>::default();
        let layer = Arc::new(Lazy { layer: base.unwrap(), omits: Arc::clone(&omits) });
        Self {
            formats,
            folder,
            fault,
            chain: Arc::new(Chain::new(vec![layer], Access::Write).unwrap()),
            omits: vec![omits],
            names: vec!["0".into()],
            ledger,
            model: Model { flushed: vec![0; (SIZES[0] / SECTOR) as usize], since: BTreeMap::new() },
            sealed: BTreeMap::new(),
            folding: None,
            folds: [0; 2],
            versions: 0,
            files: 0,
            dice: seed,
        }
    }

    fn next(&mut self, below: u64) -> u64 {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.dice >> 33) % below
    }

    fn range(&mut self) -> (u64, u64) {
        let sectors = self.model.sectors();
        let from = self.next(sectors);
        let most = if self.next(6) == 0 { sectors } else { 20 };
        (from, 1 + self.next(most.min(sectors - from)))
    }

    fn live(&mut self, steps: u32) -> Result<()> {
        for _ in 0..steps {
            match self.next(20) {
                0..=6 => self.write()?,
                7..=8 => self.zero()?,
                9..=11 => self.flush()?,
                12..=14 => self.push()?,
                15 => self.push_ambiguous()?,
                16 => self.pop()?,
                _ => self.fold()?,
            }
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        let (from, count) = self.range();
        self.versions += 1;
        self.model.put(from, count, self.versions);
        self.chain.write(&bytes(self.versions, count), from * SECTOR)
    }

    fn zero(&mut self) -> Result<()> {
        let (from, count) = self.range();
        self.model.put(from, count, 0);
        self.chain.zero(from * SECTOR, count * SECTOR)
    }

    fn flush(&mut self) -> Result<()> {
        if self.fault == Fault::LowerLayers {
            let (leaf, lower) = self.omits.split_last().unwrap();
            leaf.flush.store(false, Ordering::SeqCst);
            for lower in lower {
                lower.flush.store(true, Ordering::SeqCst);
            }
        }
        self.chain.flush()?;
        self.model.flush();
        Ok(())
    }

    /// Makes the next leaf and commits it, before it is switched to.
    fn new_leaf(&mut self, size: u64) -> Result<Arc<dyn Layer>> {
        self.files += 1;
        let name = self.files.to_string();
        let layers = self.chain.layers();
        let below = layers.last().unwrap();
        let block_size = 1 << (20 + self.next(2));
        let format =
            self.formats[if self.formats.len() > 1 { self.next(self.formats.len() as u64) as usize } else { 0 }];
        let parent = Some((&**below, self.names.last().unwrap().as_str()));
        let layer = create(self.folder.create(&name)?, format, size, block_size, parent)?;
        self.folder.sync()?;
        self.names.push(name);
        self.model.resize(size);
        let omits = Arc::<Omits>::default();
        self.omits.push(Arc::clone(&omits));
        Ok(Arc::new(Lazy { layer, omits }))
    }

    fn push(&mut self) -> Result<()> {
        let position = self.names.len() - 1;
        let (then, size) = (self.model.latest(), SIZES[self.next(4) as usize]);
        let leaf = self.new_leaf(size)?;
        self.chain.push(leaf)?;
        self.flush()?;
        self.sealed.insert(position, then);
        Ok(())
    }

    fn push_ambiguous(&mut self) -> Result<()> {
        let position = self.names.len() - 1;
        let leaf = self.new_leaf(self.chain.size())?;
        let mut ambiguous = self.chain.push_ambiguous(leaf, u64::MAX)?;
        for _ in 0..self.next(4) {
            self.write()?;
        }
        if self.next(3) == 0 {
            self.flush()?;
        }
        if self.next(2) == 0 {
            ambiguous.settle_before(Received::now())?;
        }
        if self.next(3) == 0 {
            // No point: the leaf goes again, like any leaf.
            let run = position + 1..position + 2;
            self.folding = Some(run.clone());
            let names = &mut self.names;
            ambiguous.cancel(|| drop_names(names, &run)).map_err(image)?;
            self.after_fold(run, false);
            return Ok(());
        }
        let then = self.model.latest();
        let point = Received(Received::now().0 + 1);
        ambiguous.finish(point)?;
        self.sealed.insert(position, then);
        Ok(())
    }

    fn pop(&mut self) -> Result<()> {
        let position = self.names.len() - 1;
        if position == 0 {
            return Ok(());
        }
        let run = position..position + 1;
        self.begin_fold(&run, false);
        let names = &mut self.names;
        self.chain.pop_leaf(|| drop_names(names, &run)).map_err(image)?;
        self.after_fold(run, false);
        Ok(())
    }

    fn fold(&mut self) -> Result<()> {
        if self.names.len() == 1 {
            return Ok(());
        }
        // Upwards if anything can be: it takes three layers.
        let up = self.names.len() > 2 && self.next(4) > 0;
        let lowest = if up { 2 } else { 1 };
        let position = lowest + self.next((self.names.len() - lowest) as u64) as usize;
        let most = if self.next(2) == 0 { 1 } else { self.names.len() - position };
        let run = position..position + 1 + self.next(most as u64) as usize;
        self.begin_fold(&run, up);
        let layers = self.chain.layers();
        let (chain, g) = (Arc::clone(&self.chain), Uuid::new_v4());
        let during: Vec<_> = (0..5).map(|_| self.range()).collect();
        let (late, names) = (self.range(), std::cell::RefCell::new(std::mem::take(&mut self.names)));
        let guest = std::cell::RefCell::new((&mut self.model, &mut self.versions));
        let refused = std::cell::Cell::new(false);
        // The guest goes on while the fold copies and while it commits. A cut shows again at once in the fold itself.
        let write = |(from, count): (u64, u64)| {
            let (model, versions) = &mut *guest.borrow_mut();
            **versions += 1;
            let kind = **versions % 5;
            let version = if kind == 0 { 0 } else { **versions };
            model.put(from, count, version);
            let written = match kind {
                0 => chain.zero(from * SECTOR, count * SECTOR),
                _ => chain.write(&bytes(version, count), from * SECTOR),
            };
            refused.set(refused.get() || written.is_err());
        };
        let flush = || {
            refused.set(refused.get() || chain.flush().is_err());
            if !refused.get() {
                guest.borrow_mut().0.flush();
            }
        };
        let (mut begun, mut ended) = (0, 0);
        let mut progress = |now: Progress| {
            // At first, and when all is copied: what is flushed then is in the parent only by the last sync.
            let turn = if now.done < now.total { &mut begun } else { &mut ended };
            *turn += 1;
            match (*turn, now.done < now.total) {
                (1..4, true) => write(during[*turn]),
                (1, false) => write(during[0]),
                (2, false) => {
                    write(during[4]);
                    flush();
                }
                _ => {}
            }
            if *turn == 3 {
                flush();
            }
            ControlFlow::Continue(())
        };
        // The ledger's transaction is durable somewhere in the middle of the commit. Without power there is none, and no life after it.
        let powered = || match refused.get() {
            true => Err(Error::new(image::ErrorKind::Io, "ledger", "the power is gone")),
            false => Ok(()),
        };
        let ledger = Arc::clone(&self.ledger);
        let early = late.0.is_multiple_of(2);
        let commit = || {
            if early {
                write(late);
                flush();
            }
            powered()?;
            ledger.write_at(&[1], 0)?;
            ledger.sync()?;
            commit_names(&mut names.borrow_mut(), &run, up);
            write(during[0]);
            flush();
            powered()
        };
        let folded = fold_some(Some(&chain), &layers, &run, up, g, &mut progress, commit);
        self.names = names.into_inner();
        assert_eq!(folded.map_err(image)?, Outcome::Folded);
        self.folds[usize::from(up)] += 1;
        self.after_fold(run, up);
        Ok(())
    }

    fn begin_fold(&mut self, run: &Range<usize>, up: bool) {
        self.folding = Some(run.clone());
        // From now on the parent is nobody's snapshot any more, nor is what lies below the top.
        self.sealed.retain(|at, _| !(run.start - 1..run.end - 1).contains(at));
        let target = &self.omits[if up { run.end - 1 } else { run.start - 1 }];
        target.flush.store(self.fault == Fault::Folds, Ordering::SeqCst);
        target.relink.store(self.fault == Fault::Ids, Ordering::SeqCst);
    }

    fn after_fold(&mut self, run: Range<usize>, up: bool) {
        self.folding = None;
        let moved = |at: usize| if at >= run.start { at - run.len() } else { at };
        self.sealed = std::mem::take(&mut self.sealed).into_iter().map(|(at, content)| (moved(at), content)).collect();
        self.omits.drain(gone(&run, up));
    }

    /// Opens what the ledger names on another disk, and compares.
    fn check(&self, sim: &Sim) -> std::result::Result<(), String> {
        let layers = open_all(sim, &self.names, Mode::Read)?;
        // A fold under way has renumbered nothing yet, or all: the ledger's length says which.
        let committed = self.folding.as_ref().filter(|_| self.names.len() < self.omits.len());
        compare(&layers, |sector, version| self.model.allows(sector, version))?;
        for (position, content) in &self.sealed {
            let moved = committed.filter(|run| *position >= run.start).map_or(0, Range::len);
            let position = position - moved;
            compare(&layers[..=position], |sector, version| content[sector] == version)
                .map_err(|error| format!("sealed layer {position}: {error}"))?;
        }
        drop(layers);
        if let Some(run) = self.folding.clone().filter(|_| committed.is_none()) {
            let mut layers = open_all(sim, &self.names, Mode::Read)?;
            if layers[run.start - 1].info().data_id == layers[run.end - 1].info().data_id {
                // Whoever has no ledger takes it for done.
                layers.drain(run.clone());
                compare(&layers, |sector, version| self.model.allows(sector, version))
                    .map_err(|error| format!("without what was folded: {error}"))?;
            }
            drop(layers);
            // In whichever direction it is begun again.
            let up = run.start > 1 && self.dice.is_multiple_of(2);
            let layers = open_all(sim, &self.names, Mode::Write)?;
            let go_on = &mut |_| ControlFlow::Continue(());
            let commit = || Ok::<_, Error>(());
            fold_some(None, &layers, &run, up, Uuid::new_v4(), go_on, commit)
                .map_err(|error| format!("fold again, up: {up}: {error:?}"))?;
            let mut names = self.names.clone();
            commit_names(&mut names, &run, up);
            drop(layers);
            let layers = open_all(sim, &names, Mode::Read)?;
            compare(&layers, |sector, version| self.model.allows(sector, version))
                .map_err(|error| format!("after the second fold, up: {up}: {error}"))?;
        }
        Ok(())
    }
}

/// A new layer, over a parent of this name if there is one.
fn create(
    file: Arc<dyn Store>,
    format: Format,
    size: u64,
    block_size: u32,
    parent: Option<(&dyn Layer, &str)>,
) -> Result<Arc<dyn Layer>> {
    let kind = if parent.is_some() { Kind::Differencing } else { Kind::Dynamic };
    if format == Format::Vhd {
        let parent = parent.map(|(layer, name)| vhd::Parent::of(layer, Some(name))).transpose()?;
        return Ok(vhd::create(file, &vhd::Options { block_size, kind, parent, ..vhd::Options::dynamic(size) })?);
    }
    let parent = parent.map(|(layer, name)| vhdx::Parent::of(layer, Some(name))).transpose()?;
    Ok(vhdx::create(file, &vhdx::Options { block_size, kind, parent, ..vhdx::Options::dynamic(size) })?)
}

/// A commit to the ledger of this test.
#[expect(clippy::unnecessary_wraps, reason = "a commit may fail, this one does not")]
fn drop_names<E>(names: &mut Vec<String>, run: &Range<usize>) -> std::result::Result<(), E> {
    commit_names(names, run, false);
    Ok(())
}

/// The positions of the layers that a fold of these with the one below takes away.
fn gone(run: &Range<usize>, up: bool) -> Range<usize> {
    if up { run.start - 1..run.end - 1 } else { run.clone() }
}

fn commit_names(names: &mut Vec<String>, run: &Range<usize>, up: bool) {
    names.drain(gone(run, up));
}

/// Folds the layers at these positions with the one below them.
fn fold_some(
    chain: Option<&Chain>,
    layers: &[Arc<dyn Layer>],
    run: &Range<usize>,
    up: bool,
    g: Uuid,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    commit: impl FnOnce() -> Result<()>,
) -> std::result::Result<Outcome, FoldError<Error>> {
    if up {
        return fold_up(chain, &layers[run.start - 2], &layers[run.start - 1..run.end], progress, commit);
    }
    fold_run(chain, &layers[run.clone()], &layers[run.start - 1], g, Marks::default(), progress, commit)
}

fn image(error: FoldError<Error>) -> Error {
    match error {
        FoldError::Image(error) | FoldError::Commit(error) => error,
    }
}

/// Opens the layers, each of which must be the parent that the next one names.
fn open_all(sim: &Sim, names: &[String], mode: Mode) -> std::result::Result<Vec<Arc<dyn Layer>>, String> {
    let folder = sim.root();
    let mut layers: Vec<Arc<dyn Layer>> = Vec::new();
    for name in names {
        let store = folder.open(name, mode).map_err(|error| error.to_string())?;
        let layer = image::open(store, None, mode).map_err(|error| format!("{error:?}"))?;
        if let Some(parent) = layers.last() {
            let (id, link) = (parent.info().data_id, layer.info().parent.ok_or("not differencing")?);
            if link.linkage != id && link.linkage2 != Some(id) {
                return Err(format!("{name} names another parent than {id}: {link:?}"));
            }
        }
        layers.push(layer);
    }
    Ok(layers)
}

fn compare(layers: &[Arc<dyn Layer>], allows: impl Fn(usize, u32) -> bool) -> std::result::Result<(), String> {
    let chain = Chain::new(layers.to_vec(), Access::Read).map_err(|error| error.to_string())?;
    let mut content = vec![0; chain.size() as usize];
    chain.read(&mut content, 0).map_err(|error| error.to_string())?;
    for (sector, bytes) in content.chunks(SECTOR as usize).enumerate() {
        let version = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        if bytes[4..] != bytes[..bytes.len() - 4] {
            return Err(format!("sector {sector} is torn"));
        }
        if !allows(sector, version) {
            return Err(format!("sector {sector} holds version {version}"));
        }
    }
    Ok(())
}

const STEPS: u32 = 40;

/// Cuts a life of this seed at every `stride`-th operation; returns the first thing that is wrong, or how many states were seen and how many folds
/// the life has, downwards and upwards.
fn cut_everywhere(
    formats: &'static [Format],
    fault: Fault,
    seed: u64,
    stride: u64,
    states: u64,
) -> std::result::Result<(u64, [u32; 2]), String> {
    let sim = Sim::new();
    let mut world = World::new(&sim, formats, fault, seed);
    let first = sim.counts().operations;
    world.live(STEPS).map_err(|error| format!("seed {seed}: {error}"))?;
    let folds = world.folds;
    let last = sim.counts().operations;
    let mut seen = 0;
    let offset = seed % stride;
    for at in (first + offset..last).step_by(stride as usize) {
        let sim = Sim::new();
        let mut world = World::new(&sim, formats, fault, seed);
        sim.cut(At::Operation(at));
        // (A fold's last step may fail without a word: it is done without it.)
        let _ = world.live(STEPS);
        assert!(!sim.powered(), "operation {at} of {last} was not reached");
        for crash in Crash::several(at, states) {
            world
                .check(&sim.after_crash(crash))
                .map_err(|error| format!("seed {seed}, cut at {at} of {last}, {crash:?}: {error}"))?;
            seen += 1;
        }
    }
    Ok((seen, folds))
}

const VHDX: &[Format] = &[Format::Vhdx];
const VHD: &[Format] = &[Format::Vhd];
const BOTH: &[Format] = &[Format::Vhd, Format::Vhdx];

fn nothing_is_lost(formats: &'static [Format], seeds: std::ops::Range<u64>) {
    let (mut seen, mut folds) = (0, [0; 2]);
    for seed in seeds {
        let (states, [down, up]) =
            cut_everywhere(formats, Fault::None, seed, 5, 4).unwrap_or_else(|error| panic!("{error}"));
        seen += states;
        folds = [folds[0] + down, folds[1] + up];
    }
    println!("{seen} states, folds down and up: {folds:?}");
    assert!(seen > 1000 && folds.iter().all(|folds| *folds > 4), "{seen} {folds:?}");
}

#[test]
fn nothing_is_lost_wherever_the_power_goes() {
    nothing_is_lost(VHDX, 0..8);
}

#[test]
fn nor_in_a_chain_of_vhds() {
    nothing_is_lost(VHD, 20..28);
}

#[test]
fn nor_in_one_of_both() {
    nothing_is_lost(BOTH, 40..46);
}

fn is_noticed(fault: Fault) {
    for formats in [VHDX, VHD] {
        assert!((0..8).any(|seed| cut_everywhere(formats, fault, seed, 4, 2).is_err()), "{formats:?}");
    }
}

#[test]
fn a_flush_that_leaves_out_lower_layers_is_noticed() {
    is_noticed(Fault::LowerLayers);
}

#[test]
fn a_fold_that_does_not_sync_the_parent_is_noticed() {
    is_noticed(Fault::Folds);
}

#[test]
fn a_fold_that_leaves_the_ids_alone_is_noticed() {
    is_noticed(Fault::Ids);
}
