//! A chain's life.

use crate::bytes::{Bytes, Windows};
use crate::dice::Dice;
use crate::forge::{self, Forged, Order};
use crate::{others, peers};
use image::merge::{FoldError, Outcome, fold_down, fold_up, move_down};
use image::{Access, Chain, ErrorKind, Format, Kind, Layer, ParentLink, check, compact, convert, gate, raw, vhd, vhdx};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;
use store::sim::{Crash, Sim};
use store::{Folder, Mode};
use tempfile::TempDir;
use uuid::Uuid;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A file of the chain.
struct Plate {
    name: String,
    format: Format,
    /// The disk as this file and those below make it.
    truth: Bytes,
    /// It was forged with damage that a reader gets over.
    wounded: bool,
}

/// What kinds of chains there are.
struct Style {
    /// Only what others read.
    plain: bool,
    /// The only format, if there is one.
    only: Option<Format>,
    /// Bytes in a sector.
    sector: u64,
    /// Gigabytes of nothing between the windows.
    large: bool,
}

pub(crate) struct World {
    dice: Dice,
    style: Style,
    sim: Sim,
    windows: Windows,
    /// The files, base first.
    plates: Vec<Plate>,
    /// All of them, open for writing.
    chain: Option<Chain>,
    files: u32,
    stamp: u32,
}

impl World {
    /// A chain of anything.
    pub(crate) fn of_anything(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let sector = if dice.one_in(4) { 4096 } else { 512 };
        let large = dice.one_in(6);
        let only = (large && !dice.one_in(3)).then_some(Format::Vhdx);
        let style = Style { plain: false, only, sector, large };
        Self::new(dice, style)
    }

    /// A chain that others read.
    pub(crate) fn for_others(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let only = dice.pick(&[Format::Vhd, Format::Vhdx, Format::Vhdx]);
        let sector = if only == Format::Vhdx && dice.one_in(3) { 4096 } else { 512 };
        let style = Style { plain: true, only: Some(only), sector, large: false };
        Self::new(dice, style)
    }

    fn new(mut dice: Dice, style: Style) -> Self {
        let windows: Windows = if style.large {
            // The first chunk ends within the second window.
            let chunk = (1 << 23) * style.sector;
            let end = chunk + GIB + 3 * MIB;
            [0..2 * MIB, chunk - MIB..chunk + MIB, end - 2 * MIB..end].into()
        } else {
            std::iter::once(0..MIB * dice.within(1..11)).collect()
        };
        Self { dice, style, sim: Sim::new(), windows, plates: Vec::new(), chain: None, files: 0, stamp: 0 }
    }

    pub(crate) fn live(&mut self) {
        let depth = match self.dice.below(8) {
            0 => 1,
            1..6 => self.dice.within(2..6),
            6 => self.dice.within(6..12),
            _ => self.dice.within(12..21),
        };
        for _ in 0..depth {
            self.add();
        }
        self.check_files();
        self.ask_others();
        self.open();
        for step in 0..self.dice.within(5..30) {
            self.step();
            if self.dice.one_in(3) {
                self.check(&format!("after step {step}"));
            }
        }
        self.check("at the end");
        self.check_files();
        self.ask_others();
        self.fold_all();
        self.check_files();
        self.ask_others();
        self.convert();
    }

    fn folder(&self) -> Arc<dyn Folder> {
        self.sim.root()
    }

    fn truth(&mut self) -> &mut Bytes {
        &mut self.plates.last_mut().expect("a layer").truth
    }

    fn chain(&self) -> &Chain {
        self.chain.as_ref().expect("open")
    }

    /// The layers of the first `depth` files, base first, each of which must be the parent that the next one names.
    fn layers(&self, depth: usize, mode: Mode) -> Vec<Arc<dyn Layer>> {
        let folder = self.folder();
        let open = |plate: &Plate| {
            let format = (plate.format == Format::Raw).then_some(Format::Raw);
            let store = folder.open(&plate.name, mode).expect("there");
            image::open(store, format, mode).unwrap_or_else(|error| panic!("{error}"))
        };
        let layers: Vec<_> = self.plates[..depth].iter().map(open).collect();
        for pair in layers.windows(2) {
            gate::check_link(&*pair[1], &*pair[0]).expect("the parent");
        }
        layers
    }

    /// Opens the chain for writing, with an index of any size.
    fn open(&mut self) {
        let layers = self.layers(self.plates.len(), Mode::Write);
        let index = self.dice.pick(&[0, 100 << 10, 64 << 20]);
        let chain = Chain::with_index(layers, Access::Write, index).expect("a chain");
        self.chain = Some(if self.dice.one_in(6) { chain.surviving() } else { chain });
    }

    /// Leaves the chain: properly, or as if the process had died after a flush, or the power had gone.
    fn leave(&mut self) {
        let Some(chain) = self.chain.take() else { return };
        // Others do not carry out logs.
        if self.style.plain || self.dice.one_in(2) {
            chain.close().expect("close");
            return;
        }
        chain.flush().expect("flush");
        drop(chain);
        if self.dice.one_in(2) {
            let crash = match self.dice.below(4) {
                0 => Crash::Nothing,
                _ => Crash::seeded(self.dice.below(1 << 30)),
            };
            println!("the power goes: {crash:?}");
            self.sim = self.sim.after_crash(crash);
        }
    }

    fn check(&mut self, what: &str) {
        let chain = self.chain.as_ref().expect("open");
        let truth = &self.plates.last().expect("a layer").truth;
        truth.check(chain, &mut self.dice, what);
        truth.check_runs(chain, &mut self.dice, what);
    }

    /// Closes everything and looks at each file: it is sound, and with those below it is the disk that it was.
    fn check_files(&mut self) {
        self.leave();
        for index in 0..self.plates.len() {
            let plate = &self.plates[index];
            if self.plates.len() > 8 && index + 1 < self.plates.len() && self.dice.one_in(2) {
                continue;
            }
            let layers = self.layers(index + 1, Mode::Read);
            let chain = Chain::new(layers, Access::Read).expect("a chain");
            plate.truth.check(&chain, &mut self.dice, &format!("in file {}", plate.name));
        }
        for plate in &self.plates {
            let store = self.folder().open(&plate.name, Mode::Read).expect("there");
            let report = check::check(&store, Some(plate.format)).expect("checked");
            assert!(plate.wounded || report.clean(), "{}: {report:#?}", plate.name);
        }
    }

    // Layers.

    /// One layer more, forged or ours.
    fn add(&mut self) {
        if self.dice.one_in(2) {
            self.forge();
        } else {
            self.leave();
            let below = self.layers(self.plates.len(), Mode::Read).pop();
            drop(self.make(below));
            self.open();
            for _ in 0..self.dice.below(12) {
                self.change();
            }
            self.check("a new layer");
            self.leave();
        }
    }

    fn new_name(&mut self, format: Format) -> String {
        self.files += 1;
        let end = match (format, self.plates.is_empty()) {
            (Format::Raw, _) => "img",
            (Format::Vhd, true) => "vhd",
            (Format::Vhd, false) => "avhd",
            (Format::Vhdx, true) => "vhdx",
            (Format::Vhdx, false) => "avhdx",
        };
        format!("{}.{end}", self.files)
    }

    fn draw_format(&mut self) -> Format {
        if let Some(only) = self.style.only {
            return only;
        }
        let vhd = self.style.sector == 512 && self.dice.one_in(2);
        let raw = self.style.sector == 512 && self.plates.is_empty() && !self.style.large && self.dice.one_in(6);
        match (raw, vhd) {
            (true, _) => Format::Raw,
            (_, true) => Format::Vhd,
            _ => Format::Vhdx,
        }
    }

    /// The size of a new layer: its parent's, or another one.
    fn draw_size(&mut self) -> u64 {
        let most = self.windows.last().expect("a window").end;
        let below = self.plates.last().map(|plate| plate.truth.size());
        let sectors = |bytes: u64| bytes / self.style.sector * self.style.sector;
        if self.style.plain {
            // 7-Zip reads no VHDX that is not whole MiB, and nothing past the parent's end.
            let most = below.unwrap_or(most);
            return if below.is_none() || self.dice.one_in(4) {
                MIB * self.dice.within(1..most / MIB + 1)
            } else {
                most
            };
        }
        // A VHD has no zeros without a place: gigabytes that a layer grows by would be just that.
        let same = self.style.large && self.style.only.is_none();
        match (self.dice.below(8), below) {
            (number, Some(below)) if same || number < 5 => below,
            (5, _) => most,
            (6, _) => {
                let windows = &self.windows;
                let window = windows[self.dice.below(windows.len() as u64) as usize].clone();
                MIB * self.dice.within(window.start / MIB..window.end / MIB).max(1)
            }
            _ if self.style.large => most - sectors(self.dice.below(MIB)),
            _ => sectors(self.dice.below(most - self.style.sector)) + self.style.sector,
        }
    }

    fn draw_kind(&mut self) -> Kind {
        match (self.plates.is_empty(), self.style.large) {
            (false, _) => Kind::Differencing,
            (true, false) if self.dice.one_in(4) => Kind::Fixed,
            (true, _) => Kind::Dynamic,
        }
    }

    fn draw_block(&mut self, format: Format, forged: bool) -> u64 {
        let large = self.style.large;
        match format {
            Format::Vhdx if large => self.dice.pick(&[MIB, 2 * MIB, 4 * MIB]),
            Format::Vhdx => self.dice.pick(&[MIB, MIB, 2 * MIB, 2 * MIB, 4 * MIB, 32 * MIB]),
            _ if large => self.dice.pick(&[512 * KIB, 2 * MIB]),
            _ if forged && !self.style.plain => self.dice.pick(&[4 * KIB, 64 * KIB, 512 * KIB, 2 * MIB, 16 * MIB]),
            _ => self.dice.pick(&[512 * KIB, MIB, 2 * MIB, 16 * MIB]),
        }
    }

    /// The disk that a new layer of this size shows.
    fn below(&self, size: u64) -> Bytes {
        let mut truth =
            self.plates.last().map_or_else(|| Bytes::zeros(size, &self.windows), |plate| plate.truth.clone());
        truth.resize(size);
        truth
    }

    /// Makes a layer over `below` as Tenby does.
    fn make(&mut self, below: Option<Arc<dyn Layer>>) -> Arc<dyn Layer> {
        let format = self.draw_format();
        let (size, kind, block) = (self.draw_size(), self.draw_kind(), self.draw_block(format, false));
        let name = self.new_name(format);
        println!("{name}: {kind:?}, {size} bytes in blocks of {block}");
        let (folder, sector) = (self.folder(), self.style.sector);
        let store = folder.create(&name).expect("new");
        let beside = self.plates.last().map(|plate| plate.name.clone());
        let (block_size, sector_size) = (block as u32, sector as u32);
        let made: image::Result<Arc<dyn Layer>> = match format {
            Format::Raw => raw::create(store, size).map(|layer| layer as _),
            Format::Vhd => {
                let parent = below.map(|below| vhd::Parent::of(&*below, beside.as_deref()).expect("a parent"));
                vhd::create(store, &vhd::Options { size, block_size, kind, parent }).map(|layer| layer as _)
            }
            Format::Vhdx => {
                let parent = below.map(|below| vhdx::Parent::of(&*below, beside.as_deref()).expect("a parent"));
                let options = vhdx::Options { size, block_size, sector_size, kind, parent };
                vhdx::create(store, &options).map(|layer| layer as _)
            }
        };
        folder.sync().expect("sync");
        let truth = self.below(size);
        self.plates.push(Plate { name, format, truth, wounded: false });
        made.expect("a layer")
    }

    /// Forges a layer.
    fn forge(&mut self) {
        self.leave();
        let format = self.draw_format();
        let (size, kind, block) = (self.draw_size(), self.draw_kind(), self.draw_block(format, true));
        let name = self.new_name(format);
        let (folder, plain) = (self.folder(), self.style.plain);
        let parent = self.layers(self.plates.len(), Mode::Read).pop().map(|below| {
            let beside = self.plates.last().expect("it is there").name.clone();
            (below.info().data_id, beside)
        });
        self.stamp += 100;
        let (windows, stamp, sector) = (self.windows.to_vec(), self.stamp, self.style.sector);
        let order = Order { kind, size, sector, block, windows, parent, plain, logs: !plain, stamp };
        let store = folder.create(&name).expect("new");
        let Forged { held, log, wounded } = match format {
            Format::Raw => forge::raw(&*store, &order, &mut self.dice),
            Format::Vhd => forge::vhd::forge(&*store, &order, &mut self.dice),
            Format::Vhdx => forge::vhdx::forge(&*store, &order, &mut self.dice),
        };
        store.sync().expect("sync");
        folder.sync().expect("sync");
        println!("{name}: forged, {kind:?}, {size} bytes in blocks of {block}, log: {log}, wounded: {wounded}");
        let mut truth = self.below(size);
        truth.lay(&held, block, sector);
        self.plates.push(Plate { name, format, truth, wounded });
        self.read_only();
        if wounded {
            self.mend();
        }
    }

    /// Who reads a file, its log carried out in memory, does not change it, and finds all of it.
    fn read_only(&mut self) {
        let plate = self.plates.last().expect("a layer");
        let store = self.folder().open(&plate.name, Mode::Read).expect("there");
        let contents = |store: &dyn store::Store| {
            let mut bytes = vec![0; store.len().expect("length") as usize];
            store.read_at(&mut bytes, 0).expect("read");
            bytes
        };
        let before = (!self.style.large).then(|| contents(&*store));
        let chain = Chain::new(self.layers(self.plates.len(), Mode::Read), Access::Read).expect("a chain");
        plate.truth.check(&chain, &mut self.dice, "for a reader");
        plate.truth.check_runs(&chain, &mut self.dice, "for a reader");
        drop(chain);
        assert!(before.is_none_or(|before| before == contents(&*store)), "reading has changed {}", plate.name);
        if self.plates[0].format != Format::Raw {
            let found = gate::open_chain(&self.folder(), &plate.name, Mode::Read).expect("a chain by its names");
            assert_eq!(found.len(), self.plates.len());
        }
    }

    /// A check names the wounds; a repair heals them and changes nothing else; what was repaired can be taken back.
    fn mend(&mut self) {
        let folder = self.folder();
        let plate = self.plates.last_mut().expect("a layer");
        let name = plate.name.clone();
        let report = check::check(&folder.open(&name, Mode::Read).expect("there"), None).expect("checked");
        assert!(!report.clean(), "the wound of {name} is not seen: {report:#?}");
        if self.dice.one_in(2) {
            return;
        }
        let undo = check::undo_name(&name, "1");
        let repaired = check::repair(&folder, &name, None, &undo).expect("repaired");
        assert!(repaired.changed && repaired.after.clean(), "{name}: {:#?}", repaired.after);
        plate.wounded = false;
        self.read_only();
        if self.dice.one_in(2) {
            check::take_back(&folder, &name, &undo).expect("taken back");
            self.plates.last_mut().expect("a layer").wounded = true;
            self.read_only();
        }
    }

    // Steps.

    fn step(&mut self) {
        match self.dice.below(24) {
            0..14 => self.change(),
            14 | 15 => self.push(),
            16 => self.pop(),
            17 | 18 => {
                let positions = self.plates.len() as u64;
                if positions > 2 && self.dice.one_in(2) {
                    let lowest = self.dice.within(1..positions - 1) as usize;
                    let top = self.dice.within(lowest as u64 + 1..positions) as usize;
                    self.lift(lowest, top);
                } else if positions > 1 {
                    let position = self.dice.within(1..positions) as usize;
                    self.fold(position);
                }
            }
            19 | 20 => self.resize(),
            21 => self.compact(),
            _ => {
                println!("reopen");
                self.leave();
                self.open();
            }
        }
    }

    /// A change of the disk's content.
    fn change(&mut self) {
        let (mut at, mut len) = self.plates.last().expect("a layer").truth.range(&mut self.dice);
        let (size, sector) = (self.chain().size(), self.style.sector);
        if self.dice.one_in(2) {
            at -= at % sector;
            len = len.next_multiple_of(sector).min(size - at);
            let end = self.windows.iter().rfind(|window| window.start <= at).expect("a window").end;
            len = len.min(end - at);
        }
        match self.dice.below(16) {
            0..8 => {
                self.stamp += 1;
                let data: Vec<u8> = (0..len).map(|byte| (byte / 5 + u64::from(self.stamp) * 37) as u8 | 1).collect();
                println!("write {len} at {at}");
                self.chain().write(&data, at).expect("write");
                self.truth().put(at, &data);
            }
            8..11 => {
                println!("zero {len} at {at}");
                self.chain().zero(at, len).expect("zero");
                self.truth().zero(at, len);
            }
            11..14 => {
                println!("discard {len} at {at}");
                self.chain().discard(at, len).expect("discard");
                let (from, to) = (at.next_multiple_of(sector), (at + len) / sector * sector);
                if from < to {
                    self.truth().zero(from, to - from);
                }
            }
            14 if self.dice.one_in(6) => {
                println!("zero all");
                self.chain().zero(0, size).expect("zero");
                self.truth().zero(0, size);
            }
            _ => {
                println!("flush");
                self.chain().flush().expect("flush");
            }
        }
    }

    /// A new leaf, between two requests.
    fn push(&mut self) {
        if self.plates.len() > 24 {
            return;
        }
        let below = self.chain().layers().pop();
        let leaf = self.make(below);
        self.chain().push(leaf).expect("pushed");
    }

    /// Whether a fold into the layer below is to be refused, because that cannot have the size.
    fn refused(parent: &dyn Layer, child: &dyn Layer) -> bool {
        parent.info().size != child.info().size && parent.check_resize(child.info().size).is_err()
    }

    fn pop(&mut self) {
        let layers = self.chain().layers();
        let [.., parent, leaf] = layers.as_slice() else { return };
        println!("pop {}", leaf.store().name());
        let refused = Self::refused(&**parent, &**leaf);
        match self.chain().pop_leaf(|| Ok::<_, Infallible>(())) {
            Ok(_) => {
                assert!(!refused);
                self.gone(self.plates.len() - 1);
            }
            Err(FoldError::Image(error)) => assert!(refused, "{error}"),
            Err(error) => panic!("{error}"),
        }
    }

    /// The file at this position is folded into the one below.
    fn gone(&mut self, position: usize) {
        let child = self.plates.remove(position);
        let parent = &mut self.plates[position - 1];
        parent.truth = child.truth;
        self.folder().unlink(&child.name).expect("unlinked");
        self.folder().sync().expect("sync");
    }

    /// Folds a layer into the one below: live, or offline and giving up what was copied. Says whether it was possible.
    fn fold(&mut self, position: usize) -> bool {
        let layers = self.chain().layers();
        let (parent, child) = (Arc::clone(&layers[position - 1]), Arc::clone(&layers[position]));
        let up_to_child = layers[..=position].to_vec();
        drop(layers);
        let refused = Self::refused(&*parent, &*child);
        let (go_on, commit) = (&mut |_| ControlFlow::Continue(()), || Ok::<_, Infallible>(()));
        let id = Uuid::new_v4();
        let room = self.dice.pick(&[1, MIB, 64 * MIB]);
        let folded = match self.dice.below(4) {
            0 | 1 => {
                println!("fold {}", child.store().name());
                fold_down(Some(self.chain()), &child, &parent, id, go_on, commit)
            }
            2 => {
                println!("move {} down, live", child.store().name());
                move_down(Some(self.chain()), &up_to_child, room, id, go_on, commit)
            }
            _ => {
                println!("move {} down", child.store().name());
                self.chain.take().expect("open").flush().expect("flush");
                move_down(None, &up_to_child, room, id, go_on, commit)
            }
        };
        match folded {
            Ok(outcome) => assert!(outcome == Outcome::Folded && !refused),
            Err(FoldError::Image(error)) => assert!(refused && error.kind == ErrorKind::Unsupported, "{error}"),
            Err(error) => panic!("{error}"),
        }
        if !refused && self.plates[position - 1].format != Format::Raw {
            assert_eq!(parent.info().data_id, child.info().data_id, "what stands on the child accepts the parent");
        }
        drop((child, up_to_child));
        if self.chain.is_none() {
            parent.close().expect("close");
        }
        drop(parent);
        if !refused {
            self.gone(position);
        }
        if self.chain.is_none() {
            self.open();
        }
        if !refused {
            self.rename_parent(position);
        }
        !refused
    }

    /// Folds the layers from `lowest` on up into the one at `top`, live or offline.
    fn lift(&mut self, lowest: usize, top: usize) {
        let layers = self.chain().layers();
        println!("lift {} into {}", layers[lowest].store().name(), layers[top].store().name());
        let (go_on, commit) = (&mut |_| ControlFlow::Continue(()), || Ok::<_, Infallible>(()));
        let (beneath, run) = (&layers[lowest - 1], &layers[lowest..=top]);
        let id = layers[top].info().data_id;
        let folded = if self.dice.one_in(2) {
            fold_up(Some(self.chain()), beneath, run, go_on, commit)
        } else {
            self.chain.take().expect("open").flush().expect("flush");
            fold_up(None, beneath, run, go_on, commit)
        };
        assert_eq!(folded.expect("folded"), Outcome::Folded);
        assert_eq!(layers[top].info().data_id, id, "what stands on the top accepts it");
        if self.chain.is_none() {
            layers[top].close().expect("close");
        }
        drop(layers);
        for plate in self.plates.drain(lowest..top) {
            self.sim.root().unlink(&plate.name).expect("unlinked");
        }
        self.folder().sync().expect("sync");
        if self.chain.is_none() {
            self.open();
        }
    }

    /// What stood on a layer that was folded learns its parent's new name.
    fn rename_parent(&mut self, position: usize) {
        let Some(above) = self.chain().layers().get(position).cloned() else { return };
        let link = above.info().parent.expect("a link");
        let name = format!(r".\{}", self.plates[position - 1].name);
        above.relink(None, Some(ParentLink { relative_path: Some(name), ..link })).expect("relink");
    }

    /// Another size for the leaf, if its format lets it change.
    fn resize(&mut self) {
        let size = self.draw_size();
        self.leave();
        let leaf = self.layers(self.plates.len(), Mode::Write).pop().expect("a leaf");
        println!("resize {} to {size}", leaf.store().name());
        let possible = leaf.check_resize(size).is_ok();
        let resized = leaf.resize(size, u64::MAX);
        assert_eq!(resized.is_ok(), possible, "{resized:?}");
        if possible {
            self.truth().resize(size);
        }
        leaf.close().expect("close");
        drop(leaf);
        self.open();
        self.check("resized");
    }

    fn compact(&mut self) {
        println!("compact");
        let chain = self.chain.take().expect("open");
        assert!(compact::compact(&chain, &mut |_, _| true).expect("compacted"));
        drop(chain);
        self.open();
        self.check("compacted");
    }

    // The end.

    /// Folds in any order until nothing can be folded.
    fn fold_all(&mut self) {
        self.open();
        let hash = self.hash();
        loop {
            let mut positions: Vec<usize> = (1..self.plates.len()).collect();
            self.dice.shuffle(&mut positions);
            let Some(_) = positions.into_iter().find(|position| self.fold(*position)) else { break };
            self.check("folded");
            if self.style.plain {
                self.leave();
                self.ask_others();
                self.open();
            }
        }
        assert_eq!(self.hash(), hash, "the hash changes");
        self.leave();
    }

    fn hash(&self) -> Option<[u8; 32]> {
        let small = self.plates.last().expect("a layer").truth.is_small();
        small.then(|| convert::hash(self.chain(), &mut |_, _| true).expect("hashed").expect("nobody stops it"))
    }

    /// Copies the disk into a new file of any format.
    fn convert(&mut self) {
        if self.style.large {
            return;
        }
        let source = Chain::new(self.layers(self.plates.len(), Mode::Read), Access::Read).expect("a chain");
        let truth = self.plates.pop().expect("a layer").truth;
        self.plates.clear();
        self.style.only = None;
        let format = self.draw_format();
        let (size, sector_size) = (truth.size(), self.style.sector as u32);
        let store = self.folder().create("copy").expect("new");
        let target: Arc<dyn Layer> = match format {
            Format::Raw => raw::create(store, size).expect("raw"),
            Format::Vhd => vhd::create(store, &vhd::Options::dynamic(size)).expect("a VHD"),
            Format::Vhdx => {
                vhdx::create(store, &vhdx::Options { sector_size, ..vhdx::Options::dynamic(size) }).expect("a VHDX")
            }
        };
        let target = Chain::new(vec![target], Access::Write).expect("a chain");
        assert!(convert::copy(&source, &target, &mut |_, _| true).expect("copied"));
        target.close().expect("close");
        drop((source, target));
        self.plates.push(Plate { name: "copy".to_owned(), format, truth, wounded: false });
        self.check_files();
    }

    /// What others read of the leaf, and of any layer below it.
    fn ask_others(&mut self) {
        if !self.style.plain {
            return;
        }
        let dir = TempDir::new().expect("a temporary folder");
        for plate in &self.plates {
            others::copy_out(
                &*self.folder().open(&plate.name, Mode::Read).expect("there"),
                &dir.path().join(&plate.name),
            );
        }
        let depth = self.plates.len() as u64;
        for index in [depth - 1, self.dice.below(depth)] {
            let plate = &self.plates[index as usize];
            let path = dir.path().join(&plate.name);
            if let Some(theirs) = peers::seven_zip(&path) {
                assert!(theirs == plate.truth.whole(), "7-Zip reads {} otherwise", plate.name);
            }
            // QEMU knows no parents, and no sectors of 4,096 bytes.
            if index > 0 || self.style.sector != 512 {
                continue;
            }
            let theirs = if plate.format == Format::Vhd { peers::qemu_vhd(&path) } else { peers::qemu(&path) };
            if let Some(theirs) = theirs {
                assert!(theirs == plate.truth.whole(), "qemu-img reads {} otherwise", plate.name);
            }
        }
    }
}
