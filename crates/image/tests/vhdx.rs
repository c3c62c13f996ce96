//! One VHDX layer against a plain byte array, in one thread and in many.

mod layer;

use image::vhdx::{self, VhdxLayer};
use image::{Change, ErrorKind, Kind, Layer, Source};
use layer::{read, write, zero};
use proptest::prelude::*;
use std::sync::Arc;
use store::sim::Sim;
use store::{Mode, Store};

const MIB: u64 = 1 << 20;
/// What sectors that the layer does not hold read as, for a differencing one.
const PARENT: u8 = 0xEE;
/// What tickets that are dropped have written.
const JUNK: u8 = 0xDD;

fn new_file(sim: &Sim, name: &str) -> Arc<dyn Store> {
    sim.root().create(name).expect("a new file")
}

fn open(sim: &Sim, name: &str, mode: Mode) -> image::Result<Arc<VhdxLayer>> {
    vhdx::open(sim.root().open(name, mode).expect("the file"), mode)
}

/// A layer `child.vhdx` of this shape.
fn new_layer(sim: &Sim, kind: Kind, size: u64, block_size: u32, sector_size: u32) -> Arc<VhdxLayer> {
    let parent = (kind == Kind::Differencing).then(|| {
        let options = vhdx::Options { size, sector_size, ..vhdx::Options::default() };
        let base = vhdx::create(new_file(sim, "base.vhdx"), &options).expect("a base");
        vhdx::Parent::of(&*base, Some("base.vhdx")).expect("a parent")
    });
    let options = vhdx::Options { size, block_size, sector_size, kind, parent };
    vhdx::create(new_file(sim, "child.vhdx"), &options).expect("a layer")
}

#[derive(Debug, Clone)]
enum Op {
    Write {
        at: u64,
        len: u64,
        fill: u8,
    },
    Zero {
        at: u64,
        len: u64,
    },
    /// Two tickets at once, committed in the other order.
    Cross {
        first: (u64, u64),
        second: (u64, u64),
        fill: u8,
    },
    /// A ticket whose data was written and that is then dropped, with another one open beside it.
    Drop {
        at: u64,
        len: u64,
        beside: u64,
        fill: u8,
    },
    Flush,
    Reopen {
        close: bool,
    },
}

fn ops(sectors: u64) -> impl Strategy<Value = Vec<Op>> {
    // Small ranges, ranges around blocks, and large ones.
    let range = move || {
        let len = prop_oneof![4 => 1..64u64, 1 => 1..sectors, 1 => Just(2048u64), 1 => Just(4096)];
        (0..sectors, len, any::<bool>()).prop_map(move |(at, len, aligned)| {
            let at = if aligned { at / 2048 * 2048 } else { at };
            (at, len.min(sectors - at))
        })
    };
    let op = prop_oneof![
        6 => (range(), any::<u8>()).prop_map(|((at, len), fill)| Op::Write { at, len, fill }),
        3 => range().prop_map(|(at, len)| Op::Zero { at, len }),
        2 => (range(), range(), any::<u8>()).prop_map(|(first, second, fill)| Op::Cross { first, second, fill }),
        2 => (range(), 0..sectors, any::<u8>()).prop_map(|((at, len), beside, fill)| Op::Drop { at, len, beside, fill }),
        2 => Just(Op::Flush),
        1 => any::<bool>().prop_map(|close| Op::Reopen { close }),
    ];
    prop::collection::vec(op, 1..40)
}

fn put(layer: &dyn Layer, extents: &[image::Extent], fill: u8) {
    for extent in extents {
        layer.store().write_at(&vec![fill; extent.len as usize], extent.at).expect("write");
    }
}

/// A layer and the bytes that it must read as.
struct Pair {
    sim: Sim,
    layer: Arc<VhdxLayer>,
    model: Vec<u8>,
    absent: u8,
    sector: u64,
}

impl Pair {
    fn new(kind: Kind, sectors: u64, block_size: u32, sector: u32) -> Self {
        let sim = Sim::new();
        let size = sectors * u64::from(sector);
        let layer = new_layer(&sim, kind, size, block_size, sector);
        let absent = if kind == Kind::Differencing { PARENT } else { 0 };
        Self { sim, layer, model: vec![absent; size as usize], absent, sector: sector.into() }
    }

    fn set(&mut self, (at, len): (u64, u64), fill: u8) {
        self.model[(at * self.sector) as usize..((at + len) * self.sector) as usize].fill(fill);
    }

    fn prepare(&self, (at, len): (u64, u64)) -> image::Ticket {
        self.layer.prepare(at * self.sector, len * self.sector, Change::Data).expect("prepare")
    }

    /// Whether nothing of the range lies in the file as far as can be read.
    fn is_hidden(&self, (at, len): (u64, u64)) -> bool {
        let mut runs = Vec::new();
        self.layer.map(at * self.sector, len * self.sector, &mut runs).expect("map");
        runs.iter().all(|run| !matches!(run.source, Source::Data(_)))
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Write { at, len, fill } => {
                write(&*self.layer, at * self.sector, &vec![fill; (len * self.sector) as usize]).expect("write");
                self.set((at, len), fill);
            }
            Op::Zero { at, len } => {
                zero(&*self.layer, at * self.sector, len * self.sector).expect("zero");
                self.set((at, len), 0);
            }
            Op::Cross { first, second, fill } => {
                let (one, two) = (self.prepare(first), self.prepare(second));
                put(&*self.layer, &one.extents, fill);
                put(&*self.layer, &two.extents, fill.wrapping_add(1));
                self.layer.commit(two).expect("commit");
                self.layer.commit(one).expect("commit");
                self.set(first, fill);
                self.set(second, fill.wrapping_add(1));
            }
            Op::Drop { at, len, beside, fill } => {
                let sectors = self.model.len() as u64 / self.sector;
                let beside = (if beside >= at && beside < at + len { at + len } else { beside }, 1);
                let beside = (beside.0 < sectors).then_some(beside);
                if !self.is_hidden((at, len)) {
                    return;
                }
                let other = beside.map(|range| self.prepare(range));
                let dropped = self.prepare((at, len));
                put(&*self.layer, &dropped.extents, JUNK);
                drop(dropped);
                if let (Some(other), Some(range)) = (other, beside) {
                    put(&*self.layer, &other.extents, fill);
                    self.layer.commit(other).expect("commit");
                    self.set(range, fill);
                }
            }
            Op::Flush => self.layer.flush().expect("flush"),
            Op::Reopen { close } => {
                if close {
                    self.layer.close().expect("close");
                } else {
                    self.layer.flush().expect("flush");
                }
                self.layer = open(&self.sim, "child.vhdx", Mode::Write).expect("open");
            }
        }
    }

    fn check(&self, layer: &dyn Layer) {
        let size = self.model.len() as u64;
        let found = read(layer, 0, size, self.absent).expect("read");
        if found != self.model {
            let at = (0..found.len()).find(|at| found[*at] != self.model[*at]).expect("they differ");
            panic!("byte {at} of {size} is {:#x} and should be {:#x}", found[at], self.model[at]);
        }
    }
}

fn shapes() -> impl Strategy<Value = (Kind, u64, u32, u32)> {
    let kind = prop_oneof![3 => Just(Kind::Differencing), 2 => Just(Kind::Dynamic), 1 => Just(Kind::Fixed)];
    // The last block is cut off by the disk's end.
    (
        kind,
        8000..10_000u64,
        prop_oneof![Just(1u32 << 20), Just(2 << 20)],
        prop_oneof![4 => Just(512u32), 1 => Just(4096)],
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_layer_is_a_byte_array((shape, ops) in shapes().prop_flat_map(|shape| (Just(shape), ops(shape.1)))) {
        let (kind, sectors, block, sector) = shape;
        let mut pair = Pair::new(kind, sectors, block, sector);
        for op in &ops {
            pair.run(op);
            if matches!(op, Op::Reopen { .. } | Op::Drop { .. }) {
                pair.check(&*pair.layer);
            }
        }
        pair.check(&*pair.layer);
        pair.layer.flush().expect("flush");
        // The log is in use: a reader replays it in memory.
        pair.check(&*open(&pair.sim, "child.vhdx", Mode::Read).expect("open"));
        pair.layer.close().expect("close");
        pair.check(&*open(&pair.sim, "child.vhdx", Mode::Read).expect("open"));
    }
}

#[test]
fn many_allocations_cost_one_log_write() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Differencing, 1 << 30, 2 << 20, 512);
    write(&*layer, 0, &[1; 512]).expect("write");
    layer.flush().expect("flush");
    for block in 1..200 {
        write(&*layer, block * 2 * MIB + 4096, &[block as u8; 512]).expect("write");
    }
    let before = sim.counts().syncs;
    layer.flush().expect("flush");
    assert_eq!(sim.counts().syncs - before, 2, "one for the data, one for the log");
    let before = sim.counts().operations;
    layer.flush().expect("flush");
    assert_eq!(sim.counts().operations, before, "nothing to do");
}

#[test]
fn a_flush_of_more_pages_than_an_entry_holds_is_several_entries() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Differencing, 64 << 30, 1 << 20, 512);
    // A page of bitmaps is 16 MiB of disk, and an entry holds 84: so this takes several, more than the log holds at once.
    for round in 0..2u8 {
        for page in 0..600u64 {
            write(&*layer, page * 16 * MIB + u64::from(round) * 4096, &[round + 1; 512]).expect("write");
        }
        layer.flush().expect("flush");
    }
    let layer = open(&sim, "child.vhdx", Mode::Read).expect("open");
    for page in 0..600u64 {
        let found = read(&*layer, page * 16 * MIB, 8192, PARENT).expect("read");
        assert_eq!((found[0], found[512], found[4096], found[4608]), (1, PARENT, 2, PARENT));
    }
}

#[test]
fn zeroed_blocks_give_their_space_back_and_it_is_used_again() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Dynamic, 64 * MIB, 2 << 20, 512);
    for block in 0..16 {
        write(&*layer, block * 2 * MIB, &vec![3; 2 * MIB as usize]).expect("write");
    }
    layer.flush().expect("flush");
    let full = layer.store().allocated().expect("allocated");
    zero(&*layer, 0, 32 * MIB).expect("zero");
    layer.flush().expect("flush");
    assert!(layer.store().allocated().expect("allocated") + 31 * MIB < full);
    // One more flush, and the places are free.
    write(&*layer, 40 * MIB, &[4; 512]).expect("write");
    layer.flush().expect("flush");
    let length = layer.store().len().expect("length");
    for block in 0..16 {
        write(&*layer, block * 2 * MIB + 512, &[5; 512]).expect("write");
    }
    assert_eq!(layer.store().len().expect("length"), length, "no growth");
    assert_eq!(read(&*layer, 0, 1536, 0).expect("read"), [[0; 512], [5; 512], [0; 512]].concat());
}

#[test]
fn ids_change_when_the_content_may_change_and_not_before() {
    let sim = Sim::new();
    let first = new_layer(&sim, Kind::Dynamic, 4 * MIB, 2 << 20, 512);
    let made = first.info().data_id;
    write(&*first, 0, &[1; 512]).expect("write");
    first.close().expect("close");
    assert_eq!(first.info().data_id, made, "a new file's id is of this session");

    let again = open(&sim, "child.vhdx", Mode::Write).expect("open");
    assert_eq!(again.info().data_id, made);
    again.close().expect("close");
    let again = open(&sim, "child.vhdx", Mode::Write).expect("open");
    write(&*again, 0, &[2; 512]).expect("write");
    let changed = again.info().data_id;
    assert_ne!(changed, made);
    drop(again);

    // Also when the write goes to a place that is known.
    let again = open(&sim, "child.vhdx", Mode::Write).expect("open");
    again.wrote();
    again.flush().expect("flush");
    drop(again);
    let again = open(&sim, "child.vhdx", Mode::Write).expect("open");
    assert_ne!(again.info().data_id, changed);
    let changed = again.info().data_id;
    drop(again);

    let settled = open(&sim, "child.vhdx", Mode::Write).expect("open");
    assert_eq!(settled.info().data_id, changed);
    vhdx::Parent::of(&*settled, Some("child.vhdx")).expect("a parent");
    write(&*settled, 0, &[3; 512]).expect("write");
    assert_eq!(settled.info().data_id, changed, "a child was told this id");
}

#[test]
fn the_link_to_the_parent_is_changed_in_one_step() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Differencing, 4 * MIB, 2 << 20, 512);
    let mut link = layer.info().parent.expect("a parent");
    assert_eq!(link.relative_path.as_deref(), Some(r".\base.vhdx"));
    link.linkage2 = Some(uuid::Uuid::from_u128(5));
    link.relative_path = Some(format!(r".\{}", "long".repeat(50)));
    layer.relink(Some(uuid::Uuid::from_u128(6)), Some(link.clone())).expect("relink");
    write(&*layer, 0, &[9; 512]).expect("write");
    drop(layer);
    let layer = open(&sim, "child.vhdx", Mode::Read).expect("open");
    assert_eq!(layer.info().parent, Some(link));
    assert_eq!(layer.info().data_id, uuid::Uuid::from_u128(6), "an id that was set stays");
}

#[test]
fn without_space_nothing_changes_and_with_space_it_goes_on() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Differencing, 64 * MIB, 2 << 20, 512);
    write(&*layer, 0, &[1; 512]).expect("write");
    layer.flush().expect("flush");
    sim.set_capacity(Some(0));
    let refused = write(&*layer, 4 * MIB, &[2; 512]).expect_err("no space");
    assert_eq!(refused.kind, ErrorKind::NoSpace);
    sim.set_capacity(None);
    assert_eq!(read(&*layer, 4 * MIB, 512, PARENT).expect("read"), [PARENT; 512]);
    write(&*layer, 4 * MIB, &[2; 512]).expect("write");
    layer.flush().expect("flush");
    assert_eq!(read(&*layer, 4 * MIB, 512, PARENT).expect("read"), [2; 512]);
}

#[test]
fn a_failed_sync_poisons_the_layer() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Dynamic, 64 * MIB, 2 << 20, 512);
    write(&*layer, 0, &[1; 512]).expect("write");
    sim.fail(store::sim::At::Sync(sim.counts().syncs), store::ErrorKind::Io, store::sim::Times::Once);
    assert!(layer.flush().is_err());
    assert_eq!(layer.flush().expect_err("poisoned").kind, ErrorKind::Poisoned);
    assert_eq!(write(&*layer, 0, &[1; 512]).expect_err("poisoned").kind, ErrorKind::Poisoned);
}

#[test]
fn options_out_of_range_are_refused() {
    let sim = Sim::new();
    let good = vhdx::Options::dynamic(MIB);
    let bad = [
        vhdx::Options { size: 0, ..good.clone() },
        vhdx::Options { size: 513, ..good.clone() },
        vhdx::Options { size: (64 << 40) + 512, ..good.clone() },
        vhdx::Options { block_size: 3 << 20, ..good.clone() },
        vhdx::Options { block_size: 512 << 20, ..good.clone() },
        vhdx::Options { block_size: 512 << 10, ..good.clone() },
        vhdx::Options { sector_size: 1024, ..good.clone() },
        vhdx::Options { size: 1536, sector_size: 4096, ..good.clone() },
        vhdx::Options { kind: Kind::Differencing, ..good.clone() },
    ];
    for (index, options) in bad.iter().enumerate() {
        let file = new_file(&sim, &index.to_string());
        assert_eq!(
            vhdx::create(Arc::clone(&file), options).expect_err("refused").kind,
            ErrorKind::Invalid,
            "{options:?}"
        );
        assert!(file.is_empty().expect("length"));
    }
}

/// Threads that each own every fourth sector write, zero and read theirs, while one flushes; at the end, and in the file, each finds
/// what it wrote last.
#[test]
fn threads_do_not_disturb_each_other() {
    const THREADS: u64 = 4;
    const SECTORS: u64 = 12 * MIB / 512;
    for kind in [Kind::Differencing, Kind::Dynamic] {
        let sim = Sim::new();
        let layer = new_layer(&sim, kind, 12 * MIB, 1 << 20, 512);
        let absent = if kind == Kind::Differencing { PARENT } else { 0 };
        let worker = |thread: u64| {
            let mut random = thread + 1;
            let mut own = vec![absent; (SECTORS / THREADS) as usize];
            for step in 0..3000u64 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let index = (random >> 33) % (SECTORS / THREADS);
                let offset = (index * THREADS + thread) * 512;
                let fill = (step % 200) as u8 + 1;
                match (random >> 20) % 8 {
                    0 => {
                        zero(&*layer, offset, 512).expect("zero");
                        own[index as usize] = 0;
                    }
                    1 => assert_eq!(read(&*layer, offset, 512, absent).expect("read"), [own[index as usize]; 512]),
                    _ => {
                        write(&*layer, offset, &[fill; 512]).expect("write");
                        own[index as usize] = fill;
                    }
                }
                if thread == 0 && step % 50 == 0 {
                    layer.flush().expect("flush");
                }
            }
            own
        };
        let owned: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || worker(thread))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        layer.flush().expect("flush");
        for layer in [layer, open(&sim, "child.vhdx", Mode::Read).expect("open")] {
            for sector in 0..SECTORS {
                let expected = owned[(sector % THREADS) as usize][(sector / THREADS) as usize];
                let found = read(&*layer, sector * 512, 512, absent).expect("read");
                assert_eq!(found, [expected; 512], "sector {sector} of a {kind:?} disk");
            }
        }
    }
}
