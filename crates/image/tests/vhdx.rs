//! One VHDX layer against a plain byte array, in one thread and in many.

mod layer;
mod model;

use image::vhdx::{self, VhdxLayer};
use image::{ErrorKind, Kind, Layer};
use layer::{read, write, zero};
use model::{PARENT, Pair, ops};
use proptest::prelude::*;
use std::sync::Arc;
use store::sim::Sim;
use store::{Mode, Store};

const MIB: u64 = 1 << 20;

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
        let sim = Sim::new();
        let layer = new_layer(&sim, kind, sectors * u64::from(sector), block, sector);
        Pair::new(layer, move |mode| open(&sim, "child.vhdx", mode).expect("open")).live(&ops);
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

#[test]
fn threads_do_not_disturb_each_other() {
    for kind in [Kind::Differencing, Kind::Dynamic] {
        let sim = Sim::new();
        let layer: Arc<dyn Layer> = new_layer(&sim, kind, 12 * MIB, 1 << 20, 512);
        model::threads(&layer, |mode| open(&sim, "child.vhdx", mode).expect("open"));
    }
}
