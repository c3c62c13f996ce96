//! One VHDX layer against a plain byte array.

use image::{Change, Kind, Layer, Source, vhdx};
use std::sync::Arc;
use store::sim::Sim;
use store::{Mode, Store};

const MIB: u64 = 1 << 20;

fn write(layer: &dyn Layer, offset: u64, data: &[u8]) {
    let ticket = layer.prepare(offset, data.len() as u64, Change::Data).expect("prepare");
    for extent in &ticket.extents {
        let at = (extent.offset - offset) as usize;
        layer.store().write_at(&data[at..at + extent.len as usize], extent.at).expect("write");
    }
    layer.commit(ticket).expect("commit");
}

fn zero(layer: &dyn Layer, offset: u64, len: u64) {
    let ticket = layer.prepare(offset, len, Change::Zero).expect("prepare");
    for extent in &ticket.extents {
        layer.store().write_at(&vec![0; extent.len as usize], extent.at).expect("write");
    }
    layer.commit(ticket).expect("commit");
}

/// What the layer holds; where it holds nothing, `absent`.
fn read(layer: &dyn Layer, offset: u64, len: u64, absent: u8) -> Vec<u8> {
    let (mut runs, mut out) = (Vec::new(), Vec::new());
    layer.map(offset, len, &mut runs).expect("map");
    for run in runs {
        assert_eq!(run.offset, offset + out.len() as u64, "runs without gaps");
        let mut bytes = vec![0; run.len as usize];
        match run.source {
            Source::Data(at) => layer.store().read_at(&mut bytes, at).expect("read"),
            Source::Zero => (),
            Source::Absent => bytes.fill(absent),
        }
        out.extend(bytes);
    }
    assert_eq!(out.len() as u64, len);
    out
}

fn new_file(sim: &Sim, name: &str) -> Arc<dyn Store> {
    sim.root().create(name).expect("create")
}

#[test]
fn what_was_flushed_is_there_again() {
    let sim = Sim::new();
    let layer = vhdx::create(new_file(&sim, "a.vhdx"), &vhdx::Options::dynamic(100 * MIB)).expect("create");
    assert_eq!(layer.info().kind, Kind::Dynamic);
    write(&*layer, 5 * MIB + 512, &[7; 4096]);
    write(&*layer, 3 * MIB, &vec![8; 2 * MIB as usize]);
    zero(&*layer, 4 * MIB, 512);
    layer.flush().expect("flush");
    drop(layer);
    for mode in [Mode::Read, Mode::Write] {
        let layer = vhdx::open(sim.root().open("a.vhdx", mode).expect("open"), mode).expect("open");
        assert_eq!(read(&*layer, 5 * MIB, 1024, 1), [[0; 512], [7; 512]].concat());
        assert_eq!(read(&*layer, 3 * MIB, 512, 1), [8; 512]);
        assert_eq!(read(&*layer, 4 * MIB - 512, 1536, 1), [[8; 512], [0; 512], [8; 512]].concat());
        assert_eq!(read(&*layer, 90 * MIB, 512, 1), [1; 512]);
    }
}
