//! Files of the simulated disk, for others to read.

use crate::bytes::{Bytes, Windows};
use crate::dice::Dice;
use crate::forge::{self, Order};
use crate::peers;
use image::{Access, Chain, Kind};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use store::sim::Sim;
use store::{Mode, Store};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// Copies a file onto the real disk, without its zeros.
pub(crate) fn copy_out(store: &dyn Store, path: &Path) {
    let (length, mut buffer, zeros) = (store.len().expect("length"), vec![0; 64 << 10], vec![0; 64 << 10]);
    let file = File::create(path).expect("new");
    file.set_len(length).expect("length");
    for at in (0..length).step_by(buffer.len()) {
        let bytes = &mut buffer[..(64 << 10).min(length - at) as usize];
        store.read_at(bytes, at).expect("read");
        if *bytes != zeros[..bytes.len()] {
            file.write_all_at(bytes, at).expect("written");
        }
    }
}

/// A VHDX whose log is in use, carried out by QEMU and by us: both find what the log's last entry makes of it.
pub(crate) fn carry_out_a_log(seed: u64) {
    let mut dice = Dice(seed);
    let size = MIB * dice.within(1..9);
    let windows: Windows = std::iter::once(0..size).collect();
    let order = Order {
        kind: Kind::Dynamic,
        size,
        sector: 512,
        block: dice.pick(&[MIB, 2 * MIB]),
        windows: windows.to_vec(),
        parent: None,
        plain: true,
        logs: true,
        stamp: 1,
    };
    let root = Sim::new().root();
    let store = root.create("disk.vhdx").expect("new");
    let forged = forge::vhdx::forge(&*store, &order, &mut dice);
    let mut truth = Bytes::zeros(size, &windows);
    truth.lay(&forged.held, order.block, order.sector);
    for mode in [Mode::Read, Mode::Write] {
        let layer = image::open(root.open("disk.vhdx", mode).expect("there"), None, mode).expect("open");
        truth.check(&Chain::new(vec![layer], Access::Read).expect("a chain"), &mut dice, "as we read it");
        let dir = TempDir::new().expect("a temporary folder");
        let path = dir.path().join("disk.vhdx");
        copy_out(&*store, &path);
        if mode == Mode::Read && forged.log {
            // Who only reads is refused; who repairs carries it out.
            peers::content("qemu-img", &["check", "-r", "all", "-f", "vhdx", peers::text(&path)]);
        }
        if let Some(theirs) = peers::qemu(&path) {
            assert!(theirs == truth.whole(), "qemu-img reads it otherwise");
        }
        fs::remove_file(path).expect("removed");
    }
}
