//! One VHD layer against a plain byte array, and what its file looks like.

mod layer;
mod model;

use image::vhd::{self, Options, Parent, VhdLayer};
use image::{ErrorKind, Kind, Layer, ParentLink};
use layer::{read, write, zero};
use model::{PARENT, Pair, ops};
use proptest::prelude::*;
use std::sync::Arc;
use store::sim::{At, Sim, Times};
use store::{Mode, Store};
use uuid::Uuid;

const MIB: u64 = 1 << 20;

fn new_file(sim: &Sim, name: &str) -> Arc<dyn Store> {
    sim.root().create(name).expect("a new file")
}

fn try_open(sim: &Sim, mode: Mode) -> image::Result<Arc<VhdLayer>> {
    vhd::open(sim.root().open("disk.vhd", mode).expect("the file"), mode)
}

fn open(sim: &Sim, mode: Mode) -> Arc<VhdLayer> {
    try_open(sim, mode).expect("open")
}

/// A layer `disk.vhd` of this shape.
fn new_layer(sim: &Sim, kind: Kind, size: u64, block_size: u32) -> Arc<VhdLayer> {
    let parent = (kind == Kind::Differencing).then(|| {
        let base = vhd::create(new_file(sim, "base.vhd"), &Options::dynamic(size)).expect("a base");
        Parent::of(&*base, Some("base.vhd")).expect("a parent")
    });
    vhd::create(new_file(sim, "disk.vhd"), &Options { size, block_size, kind, parent }).expect("a layer")
}

fn bytes(store: &dyn Store) -> Vec<u8> {
    let mut bytes = vec![0; store.len().expect("length") as usize];
    store.read_at(&mut bytes, 0).expect("read");
    bytes
}

fn shapes() -> impl Strategy<Value = (Kind, u64, u32)> {
    let kind = prop_oneof![3 => Just(Kind::Differencing), 2 => Just(Kind::Dynamic), 1 => Just(Kind::Fixed)];
    // The last block is cut off by the disk's end.
    (kind, 8000..10_000u64, prop_oneof![Just(512u32 << 10), Just(1 << 20), Just(2 << 20), Just(4 << 20)])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_layer_is_a_byte_array((shape, ops) in shapes().prop_flat_map(|shape| (Just(shape), ops(shape.1)))) {
        let (kind, sectors, block) = shape;
        let sim = Sim::new();
        let layer = new_layer(&sim, kind, sectors * 512, block);
        Pair::new(layer, move |mode| open(&sim, mode)).live(&ops);
    }
}

#[test]
fn threads_do_not_disturb_each_other() {
    for kind in [Kind::Differencing, Kind::Dynamic] {
        let sim = Sim::new();
        let layer: Arc<dyn Layer> = new_layer(&sim, kind, 12 * MIB, 1 << 20);
        model::threads(&layer, |mode| open(&sim, mode));
    }
}

#[test]
fn many_allocations_cost_two_syncs() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Differencing, 1 << 30, 2 << 20);
    write(&*layer, 0, &[1; 512]).expect("write");
    layer.flush().expect("flush");
    for block in 1..200 {
        write(&*layer, block * 2 * MIB + 4096, &[block as u8; 512]).expect("write");
    }
    let before = sim.counts().syncs;
    layer.flush().expect("flush");
    assert_eq!(sim.counts().syncs - before, 2, "one for the data and new bitmaps, one for the table");
    write(&*layer, 0, &[2; 512]).expect("write");
    layer.flush().expect("flush");
    assert_eq!(sim.counts().syncs - before, 3, "what lies in its place already needs one");
    let before = sim.counts().operations;
    layer.flush().expect("flush");
    assert_eq!(sim.counts().operations, before, "nothing to do");
}

#[test]
fn zeros_over_a_parent_stay_zeros_and_cost_no_space() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Differencing, 64 * MIB, 2 << 20);
    let before = layer.store().allocated().expect("allocated");
    zero(&*layer, 512, 40 * MIB).expect("zero");
    layer.flush().expect("flush");
    assert!(layer.store().allocated().expect("allocated") - before < MIB / 4);
    drop(layer);
    let layer = open(&sim, Mode::Write);
    let found = read(&*layer, 0, 64 * MIB, PARENT).expect("read");
    let zeros = 512..(512 + 40 * MIB) as usize;
    assert!(found[zeros.clone()].iter().all(|byte| *byte == 0));
    assert!(found[..512].iter().chain(&found[zeros.end..]).all(|byte| *byte == PARENT));
}

#[test]
fn zeroed_data_becomes_a_hole() {
    for kind in [Kind::Dynamic, Kind::Differencing, Kind::Fixed] {
        let sim = Sim::new();
        let layer = new_layer(&sim, kind, 16 * MIB, 2 << 20);
        write(&*layer, 0, &vec![3; 8 << 20]).expect("write");
        layer.flush().expect("flush");
        let full = layer.store().allocated().expect("allocated");
        zero(&*layer, 0, 8 * MIB).expect("zero");
        layer.flush().expect("flush");
        assert!(layer.store().allocated().expect("allocated") + 7 * MIB < full, "{kind:?}");
    }
}

#[test]
fn the_file_is_as_others_expect_it() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Differencing, 5 * MIB + 512, 2 << 20);
    write(&*layer, 4 * MIB, &[7; 1024]).expect("write");
    layer.close().expect("close");
    let file = bytes(&**layer.store());
    let word = |at: usize| u32::from_be_bytes(file[at..at + 4].try_into().unwrap());
    assert_eq!(file[..512], file[file.len() - 512..], "two footers");
    assert_eq!(
        (&file[28..36], &file[36..40]),
        (&b"win \0\x0atn"[..], &b"Wi2k"[..]),
        "old QEMU takes its size for true"
    );
    assert_eq!(&file[512..520], b"cxsparse", "the header is where every reader finds it");
    assert_eq!((word(512 + 28), word(512 + 32)), (3, 2 << 20), "entries, block size");
    assert_eq!(&file[576..580], &[0, b'b', 0, b'a'], "the name in the header is big-endian");
    assert_eq!(&file[512 + 576..][..4], b"W2ru");
    let name = word(512 + 576 + 20) as usize;
    assert_eq!(&file[name..name + 4], b".\0\\\0", "the name in the locator is little-endian");
    let table = word(512 + 20) as usize;
    assert_eq!((word(table), word(table + 4)), (u32::MAX, u32::MAX));
    let place = word(table + 8) as usize * 512;
    assert!((place + 512).is_multiple_of(4096));
    assert_eq!(file[place..place + 2], [0xC0, 0]);
    assert_eq!(file[place + 512..][..1025], [vec![7; 1024], vec![0]].concat()[..]);
    assert_eq!(file.len(), place + 512 + (2 << 20) + 512, "nothing is left of what it grew ahead of need");

    let fixed = vhd::create(new_file(&sim, "fixed.vhd"), &Options { kind: Kind::Fixed, ..Options::dynamic(3 * MIB) });
    let file = bytes(&**fixed.expect("made").store());
    assert_eq!(file.len() as u64, 3 * MIB + 512);
    assert_eq!(file[3 * MIB as usize + 16..][..8], [0xFF; 8]);

    let dynamic = vhd::create(new_file(&sim, "dynamic.vhd"), &Options::dynamic(3 * MIB)).expect("made");
    write(&*dynamic, 512, &[7; 512]).expect("write");
    dynamic.flush().expect("flush");
    let file = bytes(&**dynamic.store());
    let place = u32::from_be_bytes(file[1536..1540].try_into().unwrap()) as usize * 512;
    assert_eq!(file[place..][..512], [0xFF; 512], "without a parent all of a block is here");
}

#[test]
fn ids_change_when_the_content_may_change_and_not_before() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        let sim = Sim::new();
        let first = new_layer(&sim, kind, 4 * MIB, 2 << 20);
        let made = first.info().data_id;
        write(&*first, 0, &[1; 512]).expect("write");
        first.close().expect("close");
        assert_eq!(first.info().data_id, made, "a new file's id is of this session");
        let again = open(&sim, Mode::Write);
        again.close().expect("close");
        assert_eq!(open(&sim, Mode::Read).info().data_id, made);
        // Also when the write goes to a place that is known.
        let again = open(&sim, Mode::Write);
        again.wrote();
        let changed = again.info().data_id;
        assert_ne!(changed, made);
        drop(again);
        let settled = open(&sim, Mode::Write);
        assert_eq!(settled.info().data_id, changed);
        Parent::of(&*settled, Some("disk.vhd")).expect("a parent");
        write(&*settled, 0, &[3; 512]).expect("write");
        assert_eq!(settled.info().data_id, changed, "a child was told this id");
    }
}

#[test]
fn the_link_to_the_parent_is_changed_in_one_step() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Differencing, 4 * MIB, 2 << 20);
    write(&*layer, 0, &[9; 512]).expect("write");
    let length = layer.store().len().expect("length");
    let mut link = layer.info().parent.expect("a parent");
    assert_eq!(link.relative_path.as_deref(), Some(r".\base.vhd"));
    for round in 0..5u128 {
        let before = layer.info();
        link.linkage2 = (round != 4).then_some(Uuid::from_u128(round));
        link.relative_path = Some(format!(r".\other{round}.vhd"));
        layer.relink(Some(Uuid::from_u128(100 + round)), Some(link.clone())).expect("relink");
        write(&*layer, 2048, &[8; 512]).expect("write");
        layer.flush().expect("flush");
        let read = open(&sim, Mode::Read);
        assert_eq!(read.info().parent, Some(link.clone()));
        assert_eq!(read.info().data_id, Uuid::from_u128(100 + round), "an id that was set stays");
        assert_ne!(read.info().data_id, before.data_id);
    }
    assert_eq!(layer.store().len().expect("length"), length, "headers take turns");
    link.relative_path = Some(format!(r".\{}", "long".repeat(500)));
    link.absolute_path = Some(r"D:\disks\base.vhd".to_owned());
    layer.relink(None, Some(link.clone())).expect("relink");
    layer.close().expect("close");
    assert_eq!(open(&sim, Mode::Read).info().parent, Some(link));
    let root = sim.root();
    let base = vhd::open(root.open("base.vhd", Mode::Write).expect("there"), Mode::Write).expect("open");
    let link = ParentLink { linkage: Uuid::nil(), linkage2: None, relative_path: None, absolute_path: None };
    assert_eq!(base.relink(None, Some(link)).expect_err("no parent").kind, ErrorKind::Invalid);
}

#[test]
fn a_lost_footer_is_mended_by_the_first_change() {
    for kind in [Kind::Dynamic, Kind::Differencing] {
        for tail in [true, false] {
            for damage in ["cut off", "zeroed", "changed"] {
                let sim = Sim::new();
                let layer = new_layer(&sim, kind, 8 * MIB, 2 << 20);
                write(&*layer, MIB, &[5; 512]).expect("write");
                layer.close().expect("close");
                drop(layer);
                let file = sim.root().open("disk.vhd", Mode::Write).expect("there");
                let length = file.len().expect("length");
                match (tail, damage) {
                    (true, "cut off") => file.set_len(length - 512).expect("cut"),
                    (false, "cut off") => continue,
                    (_, "zeroed") => file.punch(if tail { length - 512 } else { 0 }, 512).expect("zeroed"),
                    _ => file.write_at(&[0x55], if tail { length - 200 } else { 200 }).expect("changed"),
                }
                let before = bytes(&*file);
                drop(file);
                let absent = model::absent(kind);
                let layer = open(&sim, Mode::Read);
                assert_eq!(read(&*layer, MIB, 1024, absent).expect("read"), [[5; 512], [absent; 512]].concat());
                drop(layer);
                let layer = open(&sim, Mode::Write);
                assert!(bytes(&**layer.store()) == before, "opening changes nothing");
                write(&*layer, 5 * MIB, &[6; 512]).expect("write");
                layer.close().expect("close");
                let file = bytes(&**layer.store());
                assert_eq!(file[..512], file[file.len() - 512..], "{kind:?}, {damage}");
                drop(layer);
                assert_eq!(read(&*open(&sim, Mode::Read), MIB, 512, absent).expect("read"), [5; 512]);
            }
        }
    }
}

#[test]
fn wrong_checksums_are_for_looking_only() {
    let refused = |kind: Kind, change: &[u64]| {
        let sim = Sim::new();
        let layer = new_layer(&sim, kind, 4 * MIB, 2 << 20);
        write(&*layer, 0, &[5; 512]).expect("write");
        layer.close().expect("close");
        let length = layer.store().len().expect("length");
        for at in change {
            layer.store().write_at(&[0x55], if *at < 2048 { *at } else { length - *at % 2048 }).expect("changed");
        }
        drop(layer);
        assert_eq!(read(&*open(&sim, Mode::Read), 0, 512, 0).expect("read"), [5; 512]);
        let error = try_open(&sim, Mode::Write).expect_err("refused");
        assert!(error.kind == ErrorKind::Damaged && error.message.contains("repair"), "{error}");
    };
    refused(Kind::Dynamic, &[200, 2048 + 200]);
    refused(Kind::Fixed, &[2048 + 200]);
    refused(Kind::Dynamic, &[512 + 900]);
}

#[test]
fn a_fixed_disk_without_its_end_is_never_taken_for_another() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Fixed, 4 * MIB, 2 << 20);
    // What the guest has in its first sector is no footer of ours.
    let mut head = bytes(&**layer.store())[4 * MIB as usize..].to_vec();
    head[63] = 3;
    write(&*layer, 0, &head).expect("write");
    layer.close().expect("close");
    drop(layer);
    assert_eq!(open(&sim, Mode::Read).info().kind, Kind::Fixed);
    let file = sim.root().open("disk.vhd", Mode::Write).expect("there");
    // Virtual PC before 2004 wrote one byte less.
    file.set_len(4 * MIB + 511).expect("cut");
    let old = open(&sim, Mode::Write);
    assert_eq!((old.info().size, old.info().kind), (4 * MIB, Kind::Fixed));
    write(&*old, 512, &[1; 512]).expect("write");
    old.close().expect("close");
    assert_eq!(file.len().expect("length"), 4 * MIB + 512, "a whole footer");
    file.write_at(&[0; 512], 0).expect("no head");
    // As long as nothing but zeros of it is lost it can be told.
    for cut in [2, 100] {
        file.set_len(4 * MIB + 512 - cut).expect("cut");
        let store = sim.root().open("disk.vhd", Mode::Read).expect("there");
        assert_eq!(image::open(store, None, Mode::Read).expect("a VHD").info().size, 4 * MIB);
    }
    for cut in [440, 512, MIB] {
        file.set_len(4 * MIB + 512 - cut).expect("cut");
        let store = || sim.root().open("disk.vhd", Mode::Read).expect("there");
        let refused = image::open(store(), None, Mode::Read).expect_err("no footer");
        assert_eq!(refused.kind, ErrorKind::Unsigned, "{refused}");
        assert!(image::open(store(), Some(image::Format::Vhd), Mode::Read).is_err());
    }
}

#[test]
fn what_a_crash_left_behind_is_used_again() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Dynamic, 64 * MIB, 2 << 20);
    write(&*layer, 0, &[1; 512]).expect("write");
    layer.flush().expect("flush");
    for block in 1..10 {
        write(&*layer, block * 2 * MIB, &vec![2; 2 << 20]).expect("write");
    }
    // Not flushed, not closed: places with data that no table names.
    drop(layer);
    let layer = open(&sim, Mode::Write);
    let length = layer.store().len().expect("length");
    for block in 1..10 {
        write(&*layer, block * 2 * MIB, &[3; 512]).expect("write");
        assert_eq!(read(&*layer, block * 2 * MIB, 1024, 0).expect("read"), [[3; 512], [0; 512]].concat());
    }
    assert_eq!(layer.store().len().expect("length"), length);
    layer.close().expect("close");
}

#[test]
fn without_space_nothing_changes_and_with_space_it_goes_on() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Differencing, 64 * MIB, 2 << 20);
    write(&*layer, 0, &[1; 512]).expect("write");
    layer.close().expect("close");
    drop(layer);
    let layer = open(&sim, Mode::Write);
    layer.wrote();
    sim.set_capacity(Some(0));
    assert_eq!(write(&*layer, 4 * MIB, &[2; 512]).expect_err("no space").kind, ErrorKind::NoSpace);
    sim.set_capacity(None);
    assert_eq!(read(&*layer, 4 * MIB, 512, PARENT).expect("read"), [PARENT; 512]);
    drop(open(&sim, Mode::Read));
    write(&*layer, 4 * MIB, &[2; 512]).expect("write");
    layer.flush().expect("flush");
    assert_eq!(read(&*open(&sim, Mode::Read), 4 * MIB, 512, PARENT).expect("read"), [2; 512]);
}

#[test]
fn a_failed_sync_poisons_the_layer() {
    for kind in [Kind::Dynamic, Kind::Differencing, Kind::Fixed] {
        let sim = Sim::new();
        let layer = new_layer(&sim, kind, 64 * MIB, 2 << 20);
        write(&*layer, 0, &[1; 512]).expect("write");
        sim.fail(At::Sync(sim.counts().syncs), store::ErrorKind::Io, Times::Once);
        assert!(layer.flush().is_err());
        assert_eq!(layer.flush().expect_err("poisoned").kind, ErrorKind::Poisoned);
        assert_eq!(write(&*layer, 0, &[1; 512]).expect_err("poisoned").kind, ErrorKind::Poisoned);
        assert_eq!(layer.relink(Some(Uuid::nil()), None).expect_err("poisoned").kind, ErrorKind::Poisoned);
    }
}

#[test]
fn a_table_that_ends_in_a_sector_with_others_keeps_what_is_there() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Dynamic, 4 * MIB, 2 << 20);
    // More entries than the disk needs, as some tools write them; the header says so.
    let store = Arc::clone(layer.store());
    drop(layer);
    store.write_at(&[0x12; 8], 1536 + 16).expect("write");
    let mut header = bytes(&*store)[512..1536].to_vec();
    header[28..32].copy_from_slice(&128u32.to_be_bytes());
    header[36..40].fill(0);
    let sum = !header.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    header[36..40].copy_from_slice(&sum.to_be_bytes());
    store.write_at(&header, 512).expect("write");
    let layer = open(&sim, Mode::Write);
    write(&*layer, 0, &[1; 512]).expect("write");
    layer.flush().expect("flush");
    assert_eq!(bytes(&*store)[1536 + 16..][..8], [0x12; 8]);
}

#[test]
fn options_out_of_range_are_refused() {
    let sim = Sim::new();
    let good = Options::dynamic(MIB);
    let bad = [
        Options { size: 0, ..good.clone() },
        Options { size: 513, ..good.clone() },
        Options { size: (2040 << 30) + 512, ..good.clone() },
        Options { size: (64 << 40) + 512, kind: Kind::Fixed, ..good.clone() },
        Options { block_size: 3 << 20, ..good.clone() },
        Options { block_size: 512 << 20, ..good.clone() },
        Options { block_size: 256 << 10, ..good.clone() },
        Options { kind: Kind::Differencing, ..good.clone() },
    ];
    for (index, options) in bad.iter().enumerate() {
        let file = new_file(&sim, &index.to_string());
        let refused = vhd::create(Arc::clone(&file), options).expect_err("refused");
        assert_eq!(refused.kind, ErrorKind::Invalid, "{options:?}");
        assert!(file.is_empty().expect("length"));
    }
    let largest = vhd::create(new_file(&sim, "largest"), &Options::dynamic(2040 << 30)).expect("made");
    write(&*largest, (2040 << 30) - 512, &[1; 512]).expect("write");
    largest.close().expect("close");
    let native = image::vhdx::Options { sector_size: 4096, ..image::vhdx::Options::dynamic(MIB) };
    let native = image::vhdx::create(new_file(&sim, "native"), &native).expect("made");
    assert_eq!(Parent::of(&*native, None).expect_err("refused").kind, ErrorKind::Unsupported);
}

fn word(file: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(file[at..at + 4].try_into().unwrap())
}

/// Gives the structures of a small file the checksums that their bytes ask for, and both ends the footer of the beginning.
fn seal(file: &mut [u8]) {
    for (from, to, at) in [(0, 512, 64), (512, 1536, 36)] {
        let bytes = &mut file[from..to];
        bytes[at..at + 4].fill(0);
        let sum = !bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
        bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
    }
    let tail = file.len() - 512;
    file.copy_within(..512, tail);
}

#[test]
fn a_table_grows_where_it_is_and_everything_else_makes_room() {
    for kind in [Kind::Dynamic, Kind::Differencing] {
        let sim = Sim::new();
        let layer = new_layer(&sim, kind, 40 * MIB, 1 << 20);
        for block in [7, 3, 20] {
            write(&*layer, block * MIB, &[block as u8; 4096]).expect("write");
        }
        layer.flush().expect("flush");
        let table = word(&bytes(&**layer.store()), 512 + 20);
        layer.resize(2000 << 30, 40 * MIB).expect("grown");
        layer.close().expect("close");
        let file = bytes(&**layer.store());
        assert_eq!(&file[512..520], b"cxsparse", "the header is where every reader finds it");
        assert_eq!((word(&file, 512 + 20), word(&file, 512 + 28)), (table, 2_048_000), "place and entries");
        assert_eq!(file[..512], file[file.len() - 512..], "two footers");
        assert_eq!(file[48..56], (2000u64 << 30).to_be_bytes());
        assert_eq!(
            (word(&file, 56), &file[40..48]),
            (0xFFFF_10FF, &(40 * MIB).to_be_bytes()[..]),
            "geometry, original"
        );
        let end = u64::from(table) + 4 * 2_048_000;
        let places: Vec<u64> = (0..40).map(|block| u64::from(word(&file, table as usize + 4 * block)) * 512).collect();
        assert!(places.iter().all(|place| *place > 1 << 40 || *place >= end), "no block in front of the table's end");
        assert!((file.len() as u64) < end + 5 * MIB, "and nothing else behind it");
        assert!(file[table as usize + 4 * 40..end as usize].iter().all(|byte| *byte == 0xFF));
        drop(layer);
        let fill = if kind == Kind::Differencing { PARENT } else { 0 };
        for block in [7, 3, 20] {
            assert_eq!(read(&*open(&sim, Mode::Read), block * MIB, 4096, fill).expect("read"), [block as u8; 4096]);
        }
    }
}

#[test]
fn sizes_that_a_vhd_cannot_have_are_refused_before_anything_changes() {
    let sim = Sim::new();
    let layer = new_layer(&sim, Kind::Dynamic, 4 * MIB, 2 << 20);
    let before = bytes(&**layer.store());
    for (size, kind) in [
        (0, ErrorKind::Invalid),
        (1000, ErrorKind::Invalid),
        ((2040 << 30) + 512, ErrorKind::Unsupported),
        (u64::MAX - 511, ErrorKind::Unsupported),
    ] {
        assert_eq!(layer.check_resize(size).expect_err("refused").kind, kind);
        assert_eq!(layer.resize(size, 0).expect_err("refused").kind, kind);
    }
    assert!(bytes(&**layer.store()) == before);
    let ticket = layer.prepare(0, 512, image::Change::Data).expect("a ticket");
    assert_eq!(layer.resize(8 * MIB, 0).expect_err("being written").kind, ErrorKind::Invalid);
    drop(ticket);
    layer.resize(8 * MIB, 0).expect("resized");
}

#[test]
fn a_growth_without_space_changes_nothing_and_with_space_it_goes_on() {
    for kind in [Kind::Dynamic, Kind::Differencing, Kind::Fixed] {
        let sim = Sim::new();
        let layer = new_layer(&sim, kind, 4 * MIB, 1 << 20);
        for block in 0..4 {
            write(&*layer, block * MIB, &vec![block as u8 + 1; 1 << 20]).expect("write");
        }
        layer.close().expect("close");
        drop(layer);
        let layer = open(&sim, Mode::Write);
        layer.wrote();
        let used = layer.store().allocated().expect("allocated");
        let base = sim.root().open("base.vhd", Mode::Read).map_or(0, |base| base.allocated().expect("allocated"));
        let mut size = 4 * MIB;
        // Each time it comes a bit further.
        for room in (0..).map(|page| page * 4096) {
            sim.set_capacity(Some(used + base + room));
            match layer.resize(300 << 30, 20 * MIB) {
                Ok(()) => {
                    size = 300 << 30;
                    break;
                }
                Err(error) => assert_eq!(error.kind, ErrorKind::NoSpace, "{error}, {kind:?}, {room}"),
            }
            assert_eq!(layer.info().size, size);
            for block in 0..4 {
                assert_eq!(read(&*layer, block * MIB, 512, 0).expect("read"), [block as u8 + 1; 512]);
            }
        }
        sim.set_capacity(None);
        write(&*layer, 4 * MIB, &[9; 512]).expect("write");
        layer.close().expect("close");
        drop(layer);
        let layer = open(&sim, Mode::Read);
        assert_eq!(layer.info().size, size);
        for block in 0..4 {
            assert_eq!(read(&*layer, block * MIB, 512, 0).expect("read"), [block as u8 + 1; 512], "{kind:?}");
        }
        assert_eq!(read(&*layer, 4 * MIB, 1024, PARENT).expect("read"), [[9; 512], [0; 512]].concat());
    }
}

/// A file as others make it: unaligned blocks, more entries than blocks, things that only they know of between the table and the blocks,
/// the last block cut off where the disk ends.
fn foreign(sim: &Sim, kind: Kind) -> (Arc<VhdLayer>, Vec<u8>) {
    let layer = new_layer(sim, kind, 5 * MIB + 1024, 1 << 20);
    let block = 512 + MIB as usize;
    let mut file = bytes(&**layer.store());
    let table = word(&file, 512 + 20) as usize;
    file.truncate(table);
    file[28..36].copy_from_slice(b"tap\0\0\x01\0\x03");
    file[512 + 28..][..4].copy_from_slice(&200u32.to_be_bytes());
    file.resize(table + 1024, 0xFF);
    file.extend([0x77; 1024]);
    let mut content = vec![if kind == Kind::Differencing { PARENT } else { 0 }; 5 * MIB as usize + 1024];
    for (number, of_disk) in [2, 0, 4, 5].into_iter().enumerate() {
        let at = table + 2048 + number * block;
        file[table + 4 * of_disk..][..4].copy_from_slice(&(at as u32 / 512).to_be_bytes());
        let inside = (content.len() - of_disk * MIB as usize).min(MIB as usize);
        // All of the others' zeros, and of block 4 nothing at all.
        let (bits, byte) = if of_disk == 4 { (0, 0) } else { (0xFF, of_disk as u8 + 1) };
        file.resize(at + 512, bits);
        file.resize(at + 512 + inside, byte);
        if of_disk != 4 {
            content[of_disk * MIB as usize..][..inside].fill(byte);
        }
    }
    file.resize(file.len() + 512, 0);
    seal(&mut file);
    let store = Arc::clone(layer.store());
    drop(layer);
    store.set_len(file.len() as u64).expect("length");
    store.write_at(&file, 0).expect("write");
    (open(sim, Mode::Write), content)
}

#[test]
fn a_file_that_others_made_is_ours_once_its_shape_has_changed() {
    for kind in [Kind::Dynamic, Kind::Differencing] {
        let fill = if kind == Kind::Differencing { PARENT } else { 0 };
        let expect = |layer: &VhdLayer, content: &[u8], what: &str| {
            let found = read(layer, 0, layer.info().size, fill).expect("read");
            assert!(found == content, "{kind:?}, {what}");
        };
        // The last block is cut off: it moves, and another one has come behind it before.
        let sim = Sim::new();
        let (layer, mut content) = foreign(&sim, kind);
        expect(&layer, &content, "as it was made");
        write(&*layer, MIB, &[7; 512]).expect("write");
        content[MIB as usize..][..512].fill(7);
        layer.flush().expect("flush");
        assert_eq!(bytes(&**layer.store())[28..32], *b"tap\0", "a write changes nothing else");
        let table = word(&bytes(&**layer.store()), 512 + 20) as usize;
        assert_eq!(bytes(&**layer.store())[table + 1024..][..1024], [0x77; 1024]);
        layer.resize(130 * MIB, u64::MAX).expect("grown");
        content.resize(130 * MIB as usize, 0);
        expect(&layer, &content, "grown");
        layer.close().expect("close");
        drop(layer);
        let layer = open(&sim, Mode::Write);
        expect(&layer, &content, "grown and opened again");
        assert_eq!(bytes(&**layer.store())[28..36], *b"win \0\x0atn", "old QEMU takes its size for true");
        layer.resize(3 * MIB, 0).expect("shrunk");
        content.truncate(3 * MIB as usize);
        expect(&layer, &content, "shrunk");
        drop(layer);
        // Compacted: of block 4 there is nothing, and what is cut off stays so.
        let sim = Sim::new();
        let (layer, content) = foreign(&sim, kind);
        let before = layer.store().len().expect("length");
        assert!(layer.pack(&mut |_, _| true).expect("packed"));
        layer.close().expect("close");
        expect(&layer, &content, "packed");
        assert!(layer.store().len().expect("length") < before, "{kind:?}");
        let file = bytes(&**layer.store());
        let table = word(&file, 512 + 20) as usize;
        assert_eq!((word(&file, 512 + 28), word(&file, table + 16)), (6, u32::MAX), "entries, block 4");
        drop(layer);
        expect(&open(&sim, Mode::Read), &content, "packed and opened again");
    }
}
