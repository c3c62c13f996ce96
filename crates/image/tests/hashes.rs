//! Records of hashes: what is taken from the layer below is what is read, folds leave it right, and a byte that was changed is found.

use image::hashes::{BLOCK, Difference, Hashed, Key, Record, compare, record, to_read};
use image::merge::{Direction, can_fold_up, fold_down, fold_up};
use image::{Access, Chain, Error, ErrorKind, Format, Layer, vhd, vhdx};
use std::ops::ControlFlow;
use std::sync::Arc;
use store::sim::Sim;
use store::{Folder, Mode};
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// A chain in a folder, base first, each layer in a file of its own.
struct Images {
    folder: Arc<dyn Folder>,
    layers: Vec<(String, Format)>,
}

impl Images {
    /// A chain of layers of many sizes and formats, each with data, zeros and nothing.
    fn new(random: &mut Random, depth: u64) -> Self {
        let mut images = Self { folder: Sim::new().root(), layers: Vec::new() };
        let formats = match random.below(4) {
            0 => [Format::Vhd; 2],
            1 => [Format::Raw, Format::Vhdx],
            _ => [Format::Vhdx; 2],
        };
        for nth in 0..depth {
            images.add(random, formats[usize::from(nth > 0)]);
        }
        images
    }

    fn add(&mut self, random: &mut Random, format: Format) {
        let file = self.folder.create(&self.layers.len().to_string()).expect("a new file");
        // In the middle of a block, mostly; less and more than what is below.
        let size = (1 + random.below(9 * MIB / SECTOR)) * SECTOR;
        let below = self.layers.len().checked_sub(1).map(|below| self.open(below, Mode::Read));
        let name = (self.layers.len().max(1) - 1).to_string();
        let layer: Arc<dyn Layer> = match format {
            Format::Raw => image::raw::create(file, size).expect("raw"),
            Format::Vhd => {
                let options = below.map(|below| vhd::Options::differencing(&*below, &name).expect("a parent"));
                let options = vhd::Options { size, block_size: 1 << 20, ..options.unwrap_or_default() };
                vhd::create(file, &options).expect("VHD")
            }
            Format::Vhdx => {
                let parent = below.map(|below| vhdx::Parent::of(&*below, Some(&name)).expect("a parent"));
                let options = vhdx::Options { size, block_size: 1 << 20, ..vhdx::Options::default() };
                let kind = if parent.is_some() { image::Kind::Differencing } else { image::Kind::Dynamic };
                vhdx::create(file, &vhdx::Options { kind, parent, ..options }).expect("VHDX")
            }
        };
        layer.close().expect("closed");
        self.layers.push((self.layers.len().to_string(), format));
        self.write(random);
    }

    /// Writes to the topmost layer.
    fn write(&self, random: &mut Random) {
        let chain = self.chain(self.layers.len() - 1, Access::Write);
        for _ in 0..random.below(5) {
            let from = random.below(chain.size() / SECTOR) * SECTOR;
            let most = if random.below(3) == 0 { 8000 } else { 20 };
            let len = ((1 + random.below(most)) * SECTOR).min(chain.size() - from);
            match random.below(3) {
                0 => chain.zero(from, len).expect("zeroed"),
                _ => chain.write(&vec![1 + random.below(255) as u8; len as usize], from).expect("written"),
            }
        }
        chain.close().expect("closed");
    }

    fn open(&self, nth: usize, mode: Mode) -> Arc<dyn Layer> {
        let (name, format) = &self.layers[nth];
        let format = (*format == Format::Raw).then_some(Format::Raw);
        image::open::open_unlocked(self.folder.open(name, mode).expect("a file"), format, mode).expect("an image")
    }

    fn opened(&self, top: usize) -> Vec<Arc<dyn Layer>> {
        (0..=top).map(|nth| self.open(nth, Mode::Read)).collect()
    }

    fn chain(&self, top: usize, access: Access) -> Chain {
        let mut layers = self.opened(top);
        if access == Access::Write {
            layers.pop();
            layers.push(self.open(top, Mode::Write));
        }
        Chain::new(layers, access).expect("a chain")
    }

    /// A new record of a layer, and how many bytes were read for it.
    fn record(&self, nth: usize, key: Key, below: Option<&Record>) -> (Record, u64) {
        let layer = self.open(nth, Mode::Read);
        let (id, size) = (Uuid::from_u128(nth as u128), layer.info().size);
        let (mut made, mut read) = (Record::new(id, size, key).expect("small"), 0);
        let mut open = || Ok::<_, Error>(self.opened(nth));
        let hashed = Hashed { layer: &*layer, below, open: &mut open };
        let mut progress = |bytes| {
            read += bytes;
            true
        };
        assert!(record(&mut made, hashed, &mut progress).expect("hashed"));
        assert!(made.is_complete() && made.done() == size);
        (made, read)
    }

    /// The records of all layers, each with what is below.
    fn records(&self, key: Key) -> Vec<Record> {
        let mut all: Vec<Record> = Vec::new();
        for nth in 0..self.layers.len() {
            all.push(self.record(nth, key, all.last()).0);
        }
        all
    }

    fn compare(&self, nth: usize, record: &Record, below: Option<&Record>) -> Vec<Difference> {
        let layer = self.open(nth, Mode::Read);
        let mut open = || Ok::<_, Error>(self.opened(nth));
        let mut found = Vec::new();
        let hashed = Hashed { layer: &*layer, below, open: &mut open };
        assert!(compare(record, hashed, &mut |_| true, &mut |found_here| found.push(found_here)).expect("compared"));
        found
    }
}

#[test]
fn what_is_taken_from_the_layer_below_is_what_is_read() {
    for seed in 0..60 {
        let images = Images::new(&mut Random(seed), 4);
        let (key, mut below) = (Key::new(), None);
        for nth in 0..images.layers.len() {
            let (made, read) = images.record(nth, key, below.as_ref());
            let (alone, all) = images.record(nth, key, None);
            assert!(made == alone && read <= all, "seed {seed}, layer {nth}");
            let layer = images.open(nth, Mode::Read);
            let bound = to_read(&*layer, below.as_ref(), u64::MAX).expect("looked at");
            assert!(bound >= read && bound <= layer.info().size, "seed {seed}, layer {nth}");
            for below in [None, below.as_ref()] {
                assert_eq!(images.compare(nth, &made, below), [], "seed {seed}, layer {nth}");
            }
            below = Some(made);
        }
    }
}

#[test]
fn a_layer_that_holds_nothing_is_not_read() {
    let mut random = Random(3);
    let mut images = Images::new(&mut random, 2);
    images.add(&mut Random(0), Format::Vhdx);
    let layer = images.opened(1).pop().expect("two layers");
    let parent = vhdx::Parent::of(&*layer, Some("1")).expect("a parent");
    let size = layer.info().size;
    let options = vhdx::Options { size, kind: image::Kind::Differencing, parent: Some(parent), ..Default::default() };
    vhdx::create(images.folder.create("empty").expect("new"), &options).expect("VHDX").close().expect("closed");
    images.layers[2] = ("empty".to_owned(), Format::Vhdx);
    let records = images.records(Key::new());
    assert_eq!(images.record(2, records[1].key(), Some(&records[1])).1, 0);
    assert!(images.record(2, records[1].key(), None).1 > 0);
    // Of another key nothing is taken.
    assert!(images.record(2, Key::new(), Some(&records[1])).1 > 0);
}

#[test]
fn a_record_that_was_stopped_goes_on() {
    let images = Images::new(&mut Random(7), 1);
    let (layer, key) = (images.open(0, Mode::Read), Key::new());
    let whole = images.record(0, key, None).0;
    let mut made = Record::new(whole.layer(), whole.size(), key).expect("small");
    let mut times = 0;
    loop {
        let mut open = || Ok::<_, Error>(images.opened(0));
        let hashed = Hashed { layer: &*layer, below: None, open: &mut open };
        times += 1;
        if record(&mut made, hashed, &mut |_| false).expect("hashed") {
            break;
        }
        assert_eq!(made.done(), times * BLOCK);
        assert_eq!(images.compare(0, &made, None), []);
    }
    assert!(made == whole && times == whole.size().div_ceil(BLOCK));
}

#[test]
fn a_fold_keeps_a_record_right() {
    for seed in 0..40 {
        let mut images = Images::new(&mut Random(seed), 4);
        let records = images.records(Key::new());
        let (into, child) = (1, 2);
        let opened: Vec<Arc<dyn Layer>> = (0..4)
            .map(|nth| images.open(nth, if [into, child].contains(&nth) { Mode::Write } else { Mode::Read }))
            .collect();
        let up = seed % 2 == 0 && can_fold_up(&*opened[0], &*opened[child]);
        let mut go_on = |_| ControlFlow::Continue(());
        let commit = || Ok::<(), Error>(());
        if up {
            fold_up(None, &opened[0], &opened[into..=child], &mut go_on, commit).expect("folded");
        } else {
            fold_down(None, &opened[child], &opened[into], Uuid::new_v4(), &mut go_on, commit).expect("folded");
        }
        drop(opened);
        let direction = if up { Direction::Up } else { Direction::Down };
        images.layers.remove(if up { into } else { child });
        for (nth, record) in [(0, &records[0]), (1, &records[2]), (2, &records[3])] {
            assert_eq!(images.compare(nth, record, None), [], "seed {seed} {direction:?}, layer {nth}");
        }
    }
}

#[test]
fn a_byte_that_was_changed_is_found_where_it_lies() {
    let mut found = 0;
    for seed in 0..60 {
        let images = Images::new(&mut Random(seed), 3);
        let records = images.records(Key::new());
        // A place of data of some layer.
        let mut random = Random(!seed);
        let nth = random.below(3) as usize;
        let (layer, mut runs) = (images.open(nth, Mode::Read), Vec::new());
        layer.map(0, layer.info().size, &mut runs).expect("mapped");
        let data = runs.iter().filter_map(|run| match run.source {
            image::Source::Data(at) => Some((run, at)),
            _ => None,
        });
        let data: Vec<_> = data.collect();
        if data.is_empty() {
            continue;
        }
        let (run, at) = data[random.below(data.len() as u64) as usize];
        let within = random.below(run.len);
        let (name, _) = &images.layers[nth];
        let file = images.folder.open(name, Mode::Write).expect("a file");
        let mut byte = [0];
        file.read_at(&mut byte, at + within).expect("read");
        file.write_at(&[byte[0] ^ 0x10], at + within).expect("changed");
        let block = (run.offset + within) / BLOCK;
        let range = block * BLOCK..((block + 1) * BLOCK).min(layer.info().size);
        let differs = images.compare(nth, &records[nth], nth.checked_sub(1).map(|below| &records[below]));
        assert_eq!(differs.len(), 1, "seed {seed}");
        assert_eq!(differs[0].range, range, "seed {seed}");
        assert!(differs[0].layers.contains(&nth), "seed {seed}: {differs:?}");
        // Above, it is seen or hidden; below, there is nothing to see.
        for (other, record) in records.iter().enumerate().filter(|(other, _)| *other != nth) {
            let differs = images.compare(other, record, None).len();
            assert!(differs <= usize::from(other > nth), "seed {seed}, layer {other}");
        }
        found += 1;
    }
    assert!(found > 20, "{found}");
}

#[test]
fn a_disk_of_another_size_is_no_match() {
    let images = Images::new(&mut Random(5), 1);
    let layer = images.open(0, Mode::Read);
    let record = Record::new(Uuid::nil(), layer.info().size + BLOCK, Key::new()).expect("small");
    let mut open = || Ok::<_, Error>(images.opened(0));
    let hashed = Hashed { layer: &*layer, below: None, open: &mut open };
    let error = compare(&record, hashed, &mut |_| true, &mut |_| {}).expect_err("another size");
    assert_eq!(error.kind, ErrorKind::Invalid);
    assert_eq!(Record::new(Uuid::nil(), u64::MAX, Key::new()).expect_err("too large").kind, ErrorKind::Unsupported);
}
