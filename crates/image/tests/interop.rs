//! Our VHDX and VHD against those of others: qemu-img, 7-Zip, and images that Windows and QEMU made.

mod peers;

use image::merge::{Outcome, fold_down};
use image::vhdx::{self, Options};
use image::{Access, Chain, Error, ErrorKind, Kind, Layer, RunKind, convert, gate, vhd};
use peers::{content, qemu, qemu_vhd, seven_zip, text};
use std::fmt::Write as _;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::host::HostFolder;
use store::{Folder, Mode};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    hex(&Sha256::digest(bytes))
}

fn open(path: &Path) -> image::Result<Chain> {
    Chain::new(image::open_path(path, None, Mode::Read)?, Access::Read)
}

/// The SHA-256 of an image's content as we read it.
fn hash(path: &Path) -> image::Result<String> {
    Ok(hex(&convert::hash(&open(path)?, &mut |_, _| true)?.expect("nobody stops it")))
}

struct Disks {
    dir: TempDir,
    folder: Arc<dyn Folder>,
}

impl Disks {
    fn new() -> Self {
        let dir = TempDir::new().expect("a temporary folder");
        let folder = Arc::new(HostFolder::open(dir.path()).expect("opened"));
        Self { dir, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn create(&self, name: &str, options: &Options) -> Arc<dyn Layer> {
        vhdx::create(self.folder.create(name).expect("a new file"), options).expect("a new image")
    }

    fn create_vhd(&self, name: &str, options: &vhd::Options) -> Arc<dyn Layer> {
        vhd::create(self.folder.create(name).expect("a new file"), options).expect("a new image")
    }

    /// A VHD over `parent`, an image beside it.
    fn child_vhd(&self, name: &str, parent: &str) -> Arc<dyn Layer> {
        let parents = gate::open_chain(&self.folder, parent, Mode::Read).expect("a chain");
        let options = vhd::Options::differencing(&**parents.last().expect("a leaf"), parent).expect("a parent");
        self.create_vhd(name, &options)
    }

    /// Folds one file of a chain, base first, into the one below, whose name then stands for both.
    fn fold(&self, names: &mut Vec<&str>, child: usize) {
        let open = |name: &str| {
            image::open(self.folder.open(name, Mode::Write).expect("there"), None, Mode::Write).expect("opened")
        };
        let (lower, upper) = (open(names[child - 1]), open(names[child]));
        let go_on = &mut |_| ControlFlow::Continue(());
        let folded = fold_down(None, &upper, &lower, uuid::Uuid::new_v4(), go_on, || Ok::<_, Error>(()));
        assert_eq!(folded.expect("folded"), Outcome::Folded);
        lower.close().expect("close");
        names.remove(child);
    }

    /// The hash of a chain of these files, base first, each of which accepts the one below by its id.
    fn hash(&self, names: &[&str]) -> String {
        let open = |name: &&str| {
            image::open(self.folder.open(name, Mode::Read).expect("there"), None, Mode::Read).expect("opened")
        };
        let layers: Vec<_> = names.iter().map(open).collect();
        for pair in layers.windows(2) {
            gate::check_link(&*pair[1], &*pair[0]).expect("the parent");
        }
        let chain = Chain::new(layers, Access::Read).expect("a chain");
        hex(&convert::hash(&chain, &mut |_, _| true).expect("hashed").expect("nobody stops it"))
    }

    /// A child of `parent`, an image beside it.
    fn child(&self, name: &str, parent: &str, change: impl FnOnce(&mut Options)) -> Arc<dyn Layer> {
        let parents = gate::open_chain(&self.folder, parent, Mode::Read).expect("a chain");
        let mut options = Options::differencing(&**parents.last().expect("a leaf"), parent).expect("a parent");
        change(&mut options);
        self.create(name, &options)
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Writes and zeroes here and there, in sectors, runs and whole blocks.
fn scribble(chain: &Chain, seed: u64) {
    let mut random = Random(seed);
    let sector = u64::from(chain.sector_size());
    for step in 0..60u64 {
        let sectors = chain.size() / sector;
        let at = random.below(sectors);
        let len = match random.below(5) {
            0 => 4096,
            1 => 1 + random.below(3000),
            _ => 1 + random.below(9),
        };
        let at = if len == 4096 { at / 4096 * 4096 } else { at };
        let len = len.min(sectors - at);
        if random.below(4) == 0 {
            chain.zero(at * sector, len * sector).expect("zero");
        } else {
            let bytes: Vec<u8> = (0..len * sector).map(|byte| (byte / 7 + step * 31 + seed) as u8).collect();
            chain.write(&bytes, at * sector).expect("write");
        }
        if step % 20 == 19 {
            chain.flush().expect("flush");
        }
    }
    chain.close().expect("close");
}

/// Writes to an image through its chain, and leaves a note in it, where there is a place for one.
fn scribble_on(disks: &Disks, name: &str, seed: u64) {
    let layers = gate::open_chain(&disks.folder, name, Mode::Write).expect("a chain");
    leave_note(&**layers.last().expect("a leaf"), seed);
    scribble(&Chain::new(layers, Access::Write).expect("a chain"), seed);
}

fn leave_note(layer: &dyn Layer, seed: u64) {
    let note = vec![b'n'; 10 + (seed * 7919 % 60_000) as usize];
    match layer.set_note(&note) {
        Err(error) if error.kind == ErrorKind::Unsupported => {}
        left => {
            left.expect("a note");
            assert_eq!(layer.note().expect("a note"), Some(note));
        }
    }
}

/// Opens an image with its parents, for writing.
fn chain(disks: &Disks, name: &str) -> Chain {
    let layers = gate::open_chain(&disks.folder, name, Mode::Write).expect("a chain");
    Chain::new(layers, Access::Write).expect("a chain")
}

/// Makes a disk larger, writes to it, makes it smaller, and compacts it: each time others read it as we do. Larger, it has zeros behind
/// its old end; and as before it is only before that.
fn reshape(disks: &Disks, name: &str, larger: u64) {
    let path = disks.path(name);
    let agree = |what: &str| {
        let ours = hash(&path).expect("ours");
        let differencing = open(&path).expect("open").layers().len() > 1;
        // 7-Zip stops at a parent's end.
        if (!differencing || what != "grown")
            && let Some(theirs) = seven_zip(&path)
        {
            assert_eq!(ours, sha256(&theirs), "7-Zip reads {name}, {what}, as we do");
        }
        if !differencing && let Some(theirs) = qemu_vhd(&path) {
            assert_eq!(ours, sha256(&theirs), "qemu-img reads {name}, {what}, as we do");
        }
    };
    let before = chain(disks, name);
    let (size, mut content) = (before.size(), vec![0; before.size() as usize]);
    before.read(&mut content, 0).expect("read");
    before.resize(larger).expect("grown");
    content.resize(larger as usize, 0);
    let mut now = vec![1; larger as usize];
    before.read(&mut now, 0).expect("read");
    assert!(now == content, "{name}");
    before.close().expect("closed");
    drop(before);
    assert_eq!(hash(&path).expect("ours"), sha256(&content));
    agree("grown");
    let grown = chain(disks, name);
    grown.write(&[3; 5000], larger - 70_000).expect("write");
    grown.zero(size / 2 / 512 * 512, 4 * MIB).expect("zero");
    grown.close().expect("closed");
    drop(grown);
    agree("grown");
    let shrunk = chain(disks, name);
    shrunk.resize(size).expect("shrunk");
    shrunk.close().expect("closed");
    drop(shrunk);
    agree("shrunk");
    let before = hash(&path).expect("ours");
    assert!(image::compact::compact(&chain(disks, name), &mut |_, _| true).expect("compacted"));
    assert_eq!(hash(&path).expect("ours"), before, "{name}");
    agree("compacted");
    scribble_on(disks, name, 77);
    agree("written again");
    let report = image::check::check(&disks.folder.open(name, Mode::Read).expect("there"), None).expect("checked");
    assert!(report.clean(), "{name}: {report:#?}");
}

#[test]
fn others_read_what_we_write() {
    let disks = Disks::new();
    let shapes = [
        ("dynamic", Options::dynamic(100 * MIB)),
        ("odd", Options { block_size: 1 << 20, ..Options::dynamic(33 * MIB) }),
        ("large-blocks", Options { block_size: 32 << 20, ..Options::dynamic(70 * MIB) }),
        ("native", Options { sector_size: 4096, ..Options::dynamic(40 * MIB) }),
        ("fixed", Options { kind: Kind::Fixed, ..Options::dynamic(21 * MIB) }),
        ("sparse", Options::dynamic(9 << 30)),
    ];
    for (index, (name, options)) in shapes.iter().enumerate() {
        let file = format!("{name}.vhdx");
        drop(disks.create(&file, options));
        if *name == "sparse" {
            // The second chunk; too much to compare byte by byte.
            let layers = gate::open_chain(&disks.folder, &file, Mode::Write).expect("a chain");
            let chain = Chain::new(layers, Access::Write).expect("a chain");
            chain.write(&[7; 4096], 5 << 30).expect("write");
            chain.close().expect("close");
            content("7z", &["t", text(&disks.path(&file))]);
            content("qemu-img", &["check", "-f", "vhdx", text(&disks.path(&file))]);
            continue;
        }
        scribble_on(&disks, &file, index as u64);
        scribble_on(&disks, &file, index as u64 + 100);
        let ours = hash(&disks.path(&file)).expect("ours");
        if let Some(theirs) = seven_zip(&disks.path(&file)) {
            assert_eq!(ours, sha256(&theirs), "7-Zip reads {name} as we do");
        }
        // QEMU knows no sectors of 4,096 bytes.
        if options.sector_size == 512
            && let Some(theirs) = qemu(&disks.path(&file))
        {
            assert_eq!(ours, sha256(&theirs), "qemu-img reads {name} as we do");
        }
    }
}

#[test]
fn others_read_our_differencing_disks() {
    for (sector_size, base_block) in [(512, 2 << 20), (512, 32 << 20), (4096, 1 << 20)] {
        let disks = Disks::new();
        let size = 42 * MIB;
        drop(disks.create("base.vhdx", &Options { sector_size, block_size: base_block, ..Options::dynamic(size) }));
        scribble_on(&disks, "base.vhdx", 1);
        drop(disks.child("one.avhdx", "base.vhdx", |_| ()));
        scribble_on(&disks, "one.avhdx", 2);
        drop(disks.child("two.avhdx", "one.avhdx", |options| options.block_size = 1 << 20));
        scribble_on(&disks, "two.avhdx", 3);
        drop(disks.child("empty.avhdx", "two.avhdx", |_| ()));
        for name in ["base.vhdx", "one.avhdx", "two.avhdx", "empty.avhdx"] {
            let path = disks.path(name);
            if let Some(theirs) = seven_zip(&path) {
                assert_eq!(
                    hash(&path).expect("ours"),
                    sha256(&theirs),
                    "{name}, sectors of {sector_size}, blocks of {base_block}"
                );
            }
        }
        assert_eq!(hash(&disks.path("two.avhdx")).expect("ours"), hash(&disks.path("empty.avhdx")).expect("ours"));
        let base = fs::read(disks.path("base.vhdx")).expect("read");
        scribble_on(&disks, "empty.avhdx", 4);
        assert!(fs::read(disks.path("base.vhdx")).expect("read") == base, "parents are not touched");
    }
}

/// A check has nothing to say of a note, and the note stays where others' changes of a file leave it.
#[test]
fn a_note_is_no_finding() {
    let disks = Disks::new();
    drop(disks.create("base.vhdx", &Options::dynamic(9 * MIB)));
    scribble_on(&disks, "base.vhdx", 1);
    drop(disks.child("leaf.avhdx", "base.vhdx", |_| ()));
    scribble_on(&disks, "leaf.avhdx", 2);
    drop(disks.create_vhd("base.vhd", &vhd::Options::dynamic(9 * MIB)));
    scribble_on(&disks, "base.vhd", 3);
    drop(disks.child_vhd("leaf.avhd", "base.vhd"));
    scribble_on(&disks, "leaf.avhd", 4);
    // A base that is written is no parent any more.
    for name in ["leaf.avhdx", "base.vhdx", "leaf.avhd", "base.vhd"] {
        let report = image::check::check(&disks.folder.open(name, Mode::Read).expect("there"), None).expect("checked");
        // What was given back and not used again is told, too.
        assert!(report.findings.iter().all(|finding| finding.kind == "unused"), "{name}: {report:#?}");
        let note = || chain(&disks, name).layers().last().expect("a leaf").note().expect("it is read");
        let before = note();
        assert!(before.is_some(), "{name}");
        scribble(&chain(&disks, name), 5);
        assert_eq!(note(), before, "{name}");
    }
}

#[test]
fn we_read_and_write_what_qemu_writes() {
    let disks = Disks::new();
    let raw = disks.path("source.raw");
    let bytes: Vec<u8> = (0..37 * MIB).map(|at| if at / 70_000 % 3 == 0 { (at / 5) as u8 } else { 0 }).collect();
    fs::write(&raw, &bytes).expect("written");
    for (index, options) in [
        "subformat=dynamic",
        "subformat=fixed",
        "subformat=dynamic,block_size=1M",
        "block_size=16M,block_state_zero=off",
    ]
    .iter()
    .enumerate()
    {
        let name = format!("{index}.vhdx");
        let path = disks.path(&name);
        let made = content("qemu-img", &["convert", "-f", "raw", "-O", "vhdx", "-o", options, text(&raw), text(&path)]);
        if made.is_none() {
            return;
        }
        assert_eq!(hash(&path).expect("ours"), sha256(&bytes), "{options}");
        scribble_on(&disks, &name, 9);
        assert_eq!(hash(&path).expect("ours"), sha256(&qemu(&path).expect("installed")), "{options}, written by us");
    }
}

#[test]
fn others_read_our_vhds() {
    let disks = Disks::new();
    let dynamic = vhd::Options::dynamic;
    let shapes = [
        ("dynamic", dynamic(100 * MIB)),
        ("odd", dynamic(33 * MIB + 512)),
        ("large", dynamic(9 << 30)),
        ("small-blocks", vhd::Options { block_size: 512 << 10, ..dynamic(40 * MIB) }),
        ("large-blocks", vhd::Options { block_size: 16 << 20, ..dynamic(40 * MIB) }),
        ("fixed", vhd::Options { kind: Kind::Fixed, ..dynamic(21 * MIB) }),
    ];
    for (index, (name, options)) in shapes.iter().enumerate() {
        let file = format!("{name}.vhd");
        let path = disks.path(&file);
        drop(disks.create_vhd(&file, options));
        if *name == "large" {
            let layers = gate::open_chain(&disks.folder, &file, Mode::Write).expect("a chain");
            let chain = Chain::new(layers, Access::Write).expect("a chain");
            chain.write(&[7; 4096], 5 << 30).expect("write");
            chain.close().expect("close");
            content("7z", &["t", text(&path)]);
            continue;
        }
        scribble_on(&disks, &file, index as u64);
        scribble_on(&disks, &file, index as u64 + 100);
        let ours = hash(&path).expect("ours");
        if let Some(theirs) = seven_zip(&path) {
            assert_eq!(ours, sha256(&theirs), "7-Zip reads {name} as we do");
        }
        if let Some(theirs) = qemu_vhd(&path) {
            assert_eq!(ours, sha256(&theirs), "qemu-img reads {name} as we do");
        }
        // Of small blocks the table needs more room.
        reshape(&disks, &file, 190 * MIB + 512);
    }
}

#[test]
fn others_read_our_chains_of_vhds_and_a_fold_changes_nothing() {
    let disks = Disks::new();
    drop(disks.create_vhd("base.vhd", &vhd::Options::dynamic(42 * MIB)));
    let mut names = vec!["base.vhd", "one.avhd", "two.avhd", "three.avhd", "empty.avhd"];
    scribble_on(&disks, "base.vhd", 1);
    for (index, pair) in names.windows(2).enumerate() {
        drop(disks.child_vhd(pair[1], pair[0]));
        if pair[1] != "empty.avhd" {
            scribble_on(&disks, pair[1], index as u64 + 10);
        }
    }
    for name in &names {
        let path = disks.path(name);
        if let Some(theirs) = seven_zip(&path) {
            assert_eq!(hash(&path).expect("ours"), sha256(&theirs), "{name}");
        }
    }
    let expected = disks.hash(&names);
    for child in [2, 1, 2, 1] {
        disks.fold(&mut names, child);
        assert_eq!(disks.hash(&names), expected, "{names:?}");
    }
    assert_eq!(names, ["base.vhd"]);
    for theirs in [seven_zip(&disks.path("base.vhd")), qemu_vhd(&disks.path("base.vhd"))].into_iter().flatten() {
        assert_eq!(sha256(&theirs), expected);
    }
}

/// Others find a child's header where it lies while a fold is under way, and skip our second id.
#[test]
fn others_read_a_vhd_that_is_being_folded() {
    let disks = Disks::new();
    drop(disks.create_vhd("base.vhd", &vhd::Options::dynamic(8 * MIB)));
    scribble_on(&disks, "base.vhd", 1);
    let child = disks.child_vhd("child.avhd", "base.vhd");
    let mut link = child.info().parent.expect("a link");
    link.linkage2 = Some(uuid::Uuid::new_v4());
    child.relink(None, Some(link)).expect("relink");
    drop(child);
    scribble_on(&disks, "child.avhd", 2);
    let path = disks.path("child.avhd");
    if let Some(theirs) = seven_zip(&path) {
        assert_eq!(hash(&path).expect("ours"), sha256(&theirs));
    }
}

#[test]
fn we_read_and_write_vhds_that_qemu_writes() {
    let disks = Disks::new();
    let raw = disks.path("source.raw");
    let bytes: Vec<u8> = (0..37 * MIB).map(|at| if at / 70_000 % 3 == 0 { (at / 5) as u8 } else { 0 }).collect();
    fs::write(&raw, &bytes).expect("written");
    for (index, options) in
        ["subformat=dynamic", "subformat=fixed", "subformat=dynamic,force_size=on", "subformat=fixed,force_size=on"]
            .iter()
            .enumerate()
    {
        let name = format!("{index}.vhd");
        let path = disks.path(&name);
        let made = content("qemu-img", &["convert", "-f", "raw", "-O", "vpc", "-o", options, text(&raw), text(&path)]);
        if made.is_none() {
            return;
        }
        let mut expected = bytes.clone();
        // Without force_size it is rounded up to a whole geometry.
        expected.resize(open(&path).expect("open").size() as usize, 0);
        assert_eq!(hash(&path).expect("ours"), sha256(&expected), "{options}");
        scribble_on(&disks, &name, 9);
        let ours = hash(&path).expect("ours");
        assert_eq!(ours, sha256(&qemu_vhd(&path).expect("installed")), "{options}, written by us");
        if let Some(theirs) = seven_zip(&path) {
            assert_eq!(ours, sha256(&theirs), "{options}, written by us");
        }
        reshape(&disks, &name, 60 * MIB + 1024);
    }
}

#[test]
fn a_chain_of_both_formats_is_one_disk() {
    let disks = Disks::new();
    drop(disks.create_vhd("base.vhd", &vhd::Options { kind: Kind::Fixed, ..vhd::Options::dynamic(12 * MIB) }));
    scribble_on(&disks, "base.vhd", 1);
    drop(disks.child("one.avhdx", "base.vhd", |_| ()));
    scribble_on(&disks, "one.avhdx", 2);
    drop(disks.child_vhd("two.avhd", "one.avhdx"));
    scribble_on(&disks, "two.avhd", 3);
    let mut names = vec!["base.vhd", "one.avhdx", "two.avhd"];
    let expected = disks.hash(&names);
    assert_eq!(hash(&disks.path("two.avhd")).expect("by name"), expected);
    disks.fold(&mut names, 1);
    assert_eq!(disks.hash(&names), expected);
    disks.fold(&mut names, 1);
    assert_eq!(hash(&disks.path("base.vhd")).expect("ours"), expected);
    scribble_on(&disks, "base.vhd", 5);
}

#[test]
fn a_vhds_parent_is_found_by_whatever_names_it() {
    let disks = Disks::new();
    let base = disks.create_vhd("Base.vhd", &vhd::Options::dynamic(4 * MIB));
    let parent = vhd::Parent::of(&*base, None).expect("a parent");
    drop(base);
    let options = |parent: vhd::Parent| vhd::Options {
        kind: Kind::Differencing,
        parent: Some(parent),
        ..vhd::Options::dynamic(4 * MIB)
    };
    drop(disks.create_vhd("path.avhd", &options(parent.clone().with_windows_path(r"C:\VMs\base.vhd"))));
    assert_eq!(gate::open_chain(&disks.folder, "path.avhd", Mode::Read).expect("by the last part").len(), 2);
    let child = disks.create_vhd("none.avhd", &options(parent));
    child.store().lock(store::Lock::None).expect("unlocked");
    let open = || gate::open_chain(&disks.folder, "none.avhd", Mode::Read);
    assert_eq!(open().expect_err("no name").kind, image::ErrorKind::Parent);
    let link = child.info().parent.expect("a link");
    for (relative, absolute, fine) in [
        (r".\Base.vhd", None, true),
        (r".\gone.vhd", Some(r"D:\disks\base.vhd"), true),
        (r"..\elsewhere\Base.vhd", Some(r"D:\base.vhd"), true),
        (r"..\elsewhere\Base.vhd", None, false),
        (r".\gone.vhd", Some(r"D:\gone too.vhd"), false),
        (r".\none.avhd", None, false),
    ] {
        let link = image::ParentLink {
            relative_path: Some(relative.to_owned()),
            absolute_path: absolute.map(str::to_owned),
            ..link.clone()
        };
        child.relink(None, Some(link)).expect("relink");
        assert_eq!(open().is_ok(), fine, "{relative}, {absolute:?}");
    }
    scribble_on(&disks, "Base.vhd", 5);
    let link = image::ParentLink { relative_path: Some(r".\Base.vhd".to_owned()), absolute_path: None, ..link };
    child.relink(None, Some(link)).expect("relink");
    assert_eq!(open().expect_err("changed").kind, image::ErrorKind::Parent);
}

#[test]
fn raw_and_vhdx_become_each_other() {
    let disks = Disks::new();
    let bytes: Vec<u8> = (0..11 * MIB + 512).map(|at| if at / 50_000 % 4 == 0 { (at / 3) as u8 } else { 0 }).collect();
    fs::write(disks.path("source.raw"), &bytes).expect("written");
    let raw = image::open_path(&disks.path("source.raw"), Some(image::Format::Raw), Mode::Read).expect("raw");
    let raw = Chain::new(raw, Access::Read).expect("a chain");
    let target = disks.create("target.vhdx", &Options::dynamic(raw.size()));
    let target = Chain::new(vec![target], Access::Write).expect("a chain");
    let mut last = 0;
    let ended = convert::copy(&raw, &target, &mut |done, total| {
        assert!(done >= last && done <= total, "progress goes forward");
        last = done;
        true
    });
    assert!(ended.expect("copied"));
    assert_eq!(last, raw.size());
    target.close().expect("close");
    drop(target);
    assert_eq!(hash(&disks.path("target.vhdx")).expect("ours"), sha256(&bytes));

    let back = image::raw::create(disks.folder.create("back.raw").expect("new"), raw.size()).expect("raw");
    let back = Chain::new(vec![back], Access::Write).expect("a chain");
    assert!(convert::copy(&open(&disks.path("target.vhdx")).expect("open"), &back, &mut |_, _| true).expect("copied"));
    assert!(fs::read(disks.path("back.raw")).expect("read") == bytes);

    assert!(!convert::copy(&raw, &back, &mut |_, _| false).expect("stopped"), "a copy that is stopped says so");
}

#[test]
fn holes_of_a_raw_file_are_not_read() {
    let disks = Disks::new();
    let store = disks.folder.create("sparse.raw").expect("new");
    store.set_len(40 * MIB + 700).expect("length");
    store.write_at(&[5; 5000], 20 * MIB + 3).expect("write");
    store.write_at(&[6; 100], 40 * MIB + 600).expect("write");
    drop(store);
    let layers = image::open_path(&disks.path("sparse.raw"), Some(image::Format::Raw), Mode::Read).expect("raw");
    let (layer, size) = (Arc::clone(&layers[0]), 40 * MIB + 1024);
    let chain = Chain::new(layers, Access::Read).expect("a chain");
    assert_eq!(chain.size(), size);
    let runs = chain.runs(0, size, usize::MAX).expect("runs");
    let mut at = 0;
    for run in &runs {
        assert_eq!(run.offset, at, "no gaps");
        at += run.len;
    }
    assert_eq!(at, size);
    if layer.store().allocated().expect("allocated") < MIB {
        let data: u64 = runs.iter().filter(|run| run.kind == RunKind::Data).map(|run| run.len).sum();
        assert!(data < MIB, "{data} bytes of data");
    }
    let mut expected = fs::read(disks.path("sparse.raw")).expect("read");
    expected.resize(size as usize, 0);
    let found = convert::hash(&chain, &mut |_, _| true).expect("hashed").expect("to the end");
    assert_eq!(hex(&found), sha256(&expected));
}

#[test]
fn a_parent_is_found_checked_and_never_sought_elsewhere() {
    let disks = Disks::new();
    drop(disks.create("Base.VHDX", &Options::dynamic(4 * MIB)));
    let child = disks.child("child.avhdx", "Base.VHDX", |_| ());
    let link = child.info().parent.expect("a link");
    let relink = |path: &str| {
        child
            .relink(None, Some(image::ParentLink { relative_path: Some(path.to_owned()), ..link.clone() }))
            .expect("relink");
    };
    let open = || gate::open_chain(&disks.folder, "child.avhdx", Mode::Read);
    child.store().lock(store::Lock::None).expect("unlocked");
    assert_eq!(open().expect("a chain").len(), 2);
    relink(r".\base.vhdx");
    assert_eq!(open().expect("names are Windows'").len(), 2);
    for path in [r"..\Base.VHDX", "/etc/passwd", r".\missing.vhdx", r".\child.avhdx", r"C:\Base.VHDX"] {
        relink(path);
        assert_eq!(open().expect_err(path).kind, image::ErrorKind::Parent, "{path}");
    }
    relink(r".\Base.VHDX");
    scribble_on(&disks, "Base.VHDX", 5);
    assert_eq!(open().expect_err("changed").kind, image::ErrorKind::Parent);
    let base = gate::open_chain(&disks.folder, "Base.VHDX", Mode::Read).expect("a base");
    let mut link = link;
    link.linkage2 = Some(base[0].info().data_id);
    child.relink(None, Some(link)).expect("relink");
    assert_eq!(open().expect("the second linkage counts").len(), 2);
}

#[test]
fn formats_are_told_by_their_signature() {
    let disks = Disks::new();
    let files: [(&str, Vec<u8>, &str); 4] = [
        ("a.qcow2", [b"QFI\xfb".as_slice(), &[0; 508]].concat(), "qcow2"),
        ("a.vmdk", [b"KDMV".as_slice(), &[0; 508]].concat(), "VMDK"),
        ("a.vdi", [&[0; 64], b"\x7f\x10\xda\xbe".as_slice(), &[0; 444]].concat(), "VDI"),
        ("a.img", vec![1; 1024], "no signature"),
    ];
    for (name, bytes, word) in files {
        fs::write(disks.path(name), bytes).expect("written");
        let refused = image::open_path(&disks.path(name), None, Mode::Read).expect_err(name);
        let kind = if word == "no signature" { image::ErrorKind::Unsigned } else { image::ErrorKind::Unsupported };
        assert_eq!(refused.kind, kind);
        assert!(refused.to_string().contains(word), "{refused}");
        let as_raw = image::open_path(&disks.path(name), Some(image::Format::Raw), Mode::Read);
        assert_eq!(as_raw.is_ok(), name == "a.img", "{name}");
    }
}

#[test]
fn a_file_in_use_is_refused() {
    let disks = Disks::new();
    let writer = disks.create("a.vhdx", &Options::dynamic(4 * MIB));
    for mode in [Mode::Read, Mode::Write] {
        let refused = image::open_path(&disks.path("a.vhdx"), None, mode).expect_err("in use");
        assert_eq!(refused.kind, image::ErrorKind::Locked);
    }
    drop(writer);
    let reader = image::open_path(&disks.path("a.vhdx"), None, Mode::Read).expect("free");
    image::open_path(&disks.path("a.vhdx"), None, Mode::Read).expect("readers share");
    assert_eq!(
        image::open_path(&disks.path("a.vhdx"), None, Mode::Write).expect_err("in use").kind,
        image::ErrorKind::Locked
    );
    drop(reader);
}

/// Images that nobody here wrote: each must read to the hash that unrelated readers agree on.
mod corpus {
    use super::*;

    struct Image {
        /// Relative to the corpus, without `.xz`.
        path: String,
        format: String,
        hash: String,
        file_hash: String,
    }

    fn root() -> Option<PathBuf> {
        let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus");
        let root = std::env::var_os("TENBY_CORPUS").map_or(beside, PathBuf::from);
        if root.join("MANIFEST.tsv").exists() {
            return Some(root);
        }
        println!("skipped: no corpus at {} (say where with TENBY_CORPUS)", root.display());
        None
    }

    fn images(root: &Path) -> Vec<Image> {
        let manifest = fs::read_to_string(root.join("MANIFEST.tsv")).expect("a manifest");
        let mut lines = manifest.lines();
        let columns: Vec<_> = lines.next().expect("a head").split('\t').collect();
        let column = |name: &str| columns.iter().position(|column| *column == name).expect("a column");
        let (path, format, hash, file) =
            (column("path"), column("fmt"), column("virtual_sha256"), column("file_sha256"));
        let image = |line: &str| {
            let cells: Vec<_> = line.split('\t').collect();
            Image {
                path: cells[path].to_owned(),
                format: cells[format].to_owned(),
                hash: cells.get(hash).copied().unwrap_or_default().to_owned(),
                file_hash: cells[file].to_owned(),
            }
        };
        lines.map(image).collect()
    }

    fn unpack(root: &Path, disks: &Disks, path: &str) -> PathBuf {
        let name = Path::new(path).file_name().and_then(|name| name.to_str()).expect("a name");
        let packed = root.join(format!("{path}.xz"));
        let bytes = content("xz", &["-dc", text(&packed)]).expect("xz is needed for the corpus");
        fs::write(disks.path(name), bytes).expect("unpacked");
        disks.path(name)
    }

    #[test]
    fn every_image_reads_as_others_read_it() {
        let Some(root) = root() else { return };
        let images = images(&root);
        let mut read = 0;
        for image in images.iter().filter(|image| image.format == "vhdx") {
            let disks = Disks::new();
            let path = unpack(&root, &disks, &image.path);
            if image.path.contains("differential") {
                unpack(&root, &disks, &image.path.replace("differential", "parent"));
            }
            assert_eq!(hash(&path).expect(&image.path), image.hash, "{}", image.path);
            let bytes = fs::read(&path).expect("read");
            assert_eq!(
                sha256(&bytes),
                image.file_hash,
                "{}: reading changes nothing, also where a log waits",
                image.path
            );
            read += 1;
        }
        assert!(read >= 12, "only {read} images");
    }

    #[test]
    fn every_image_can_be_written() {
        let Some(root) = root() else { return };
        for image in images(&root).iter().filter(|image| image.format == "vhdx" && !image.path.contains("10G")) {
            let disks = Disks::new();
            let path = unpack(&root, &disks, &image.path);
            let differencing = image.path.contains("differential");
            if differencing {
                unpack(&root, &disks, &image.path.replace("differential", "parent"));
            }
            let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
            let size = open(&path).expect("open").size();
            if size > 64 * MIB {
                // Comparing gigabytes tells nothing more.
                continue;
            }
            scribble_on(&disks, name, 11);
            let ours = hash(&path).expect("ours");
            if let Some(theirs) = seven_zip(&path) {
                assert_eq!(ours, sha256(&theirs), "7-Zip reads {} as we do", image.path);
            }
            if !differencing && let Some(theirs) = qemu(&path) {
                assert_eq!(ours, sha256(&theirs), "qemu-img reads {} as we do", image.path);
            }
        }
    }

    #[test]
    fn a_waiting_log_is_carried_out_when_the_image_is_opened_for_writing() {
        let Some(root) = root() else { return };
        let images = images(&root);
        let image = images.iter().find(|image| image.path.contains("dirtylog")).expect("the image");
        let disks = Disks::new();
        let path = unpack(&root, &disks, &image.path);
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
        // That what is replayed in memory is right, the hash of the whole disk says in another test.
        let in_memory = data(&open(&path).expect("open"));
        drop(gate::open_chain(&disks.folder, name, Mode::Write).expect("open"));
        content("qemu-img", &["check", "-f", "vhdx", text(&path)]);
        assert_ne!(sha256(&fs::read(&path).expect("read")), image.file_hash);
        assert!(data(&open(&path).expect("open")) == in_memory);
    }

    /// Every stretch of data: offset and bytes.
    fn data(chain: &Chain) -> Vec<(u64, Vec<u8>)> {
        let runs = chain.runs(0, chain.size(), usize::MAX).expect("runs");
        let data = runs.into_iter().filter(|run| run.kind == RunKind::Data).map(|run| {
            let mut bytes = vec![0; run.len as usize];
            chain.read(&mut bytes, run.offset).expect("read");
            (run.offset, bytes)
        });
        data.collect()
    }

    #[test]
    fn every_vhd_reads_as_others_read_it_and_a_fold_changes_nothing() {
        let Some(root) = root() else { return };
        let mut read = 0;
        for image in images(&root).iter().filter(|image| image.format == "vhd") {
            let disks = Disks::new();
            let path = unpack(&root, &disks, &image.path);
            if image.path.contains("virtualpc") {
                // 127 GiB of zeros, of which there is no hash; by the geometry it would be smaller.
                let chain = open(&path).expect("open");
                assert_eq!(chain.size(), 136_365_211_648);
                assert!(chain.runs(0, chain.size(), 10).expect("runs").iter().all(|run| run.kind != RunKind::Data));
                continue;
            }
            if image.path.contains("differential") {
                let parent = unpack(&root, &disks, &image.path.replace("differential", "parent"));
                let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
                let (parent, child) = (name(&parent), name(&path));
                assert_eq!(hash(&path).expect(&image.path), image.hash, "{}", image.path);
                disks.fold(&mut vec![&parent, &child], 1);
                assert_eq!(hash(&disks.path(&parent)).expect("folded"), image.hash, "{}", image.path);
                read += 1;
                continue;
            }
            assert_eq!(hash(&path).expect(&image.path), image.hash, "{}", image.path);
            assert_eq!(
                sha256(&fs::read(&path).expect("read")),
                image.file_hash,
                "{}: reading changes nothing",
                image.path
            );
            read += 1;
        }
        assert!(read >= 9, "only {read} images");
    }

    #[test]
    fn every_vhd_can_be_written() {
        let Some(root) = root() else { return };
        for image in images(&root).iter().filter(|image| image.format == "vhd" && !image.path.contains("virtualpc")) {
            let disks = Disks::new();
            let path = unpack(&root, &disks, &image.path);
            let differencing = image.path.contains("differential");
            if differencing {
                unpack(&root, &disks, &image.path.replace("differential", "parent"));
            }
            let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
            let larger = open(&path).expect("open").size() + 5 * MIB + 512;
            reshape(&disks, name, larger);
            scribble_on(&disks, name, 11);
            scribble_on(&disks, name, 12);
            let ours = hash(&path).expect("ours");
            if let Some(theirs) = seven_zip(&path) {
                assert_eq!(ours, sha256(&theirs), "7-Zip reads {} as we do", image.path);
            }
            if !differencing && let Some(theirs) = qemu_vhd(&path) {
                assert_eq!(ours, sha256(&theirs), "qemu-img reads {} as we do", image.path);
            }
        }
    }
}
