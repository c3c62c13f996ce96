//! VHDs made to do harm: sound ones with bytes changed and the checksums mended. Opening, reading and writing them may fail, but
//! never panics, hangs, or takes memory out of proportion.

mod layer;

use image::vhd::{self, Options, Parent};
use image::{ErrorKind, Kind, Layer};
use layer::{read, write, zero};
use std::sync::Arc;
use store::sim::Sim;
use store::{Mode, Store};

const MIB: usize = 1 << 20;
const SIZE: u64 = 7 * MIB as u64 + 512;

/// Gives a structure the checksum that its bytes ask for.
fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum = !bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
}

/// Mends the footers and the header.
fn mend(file: &mut [u8]) {
    let tail = file.len().saturating_sub(512);
    for at in [0, tail] {
        if let Some(footer) = file.get_mut(at..at + 512).filter(|footer| footer.starts_with(b"conectix")) {
            seal(footer, 64);
        }
    }
    if let Some(header) = file.get_mut(512..1536).filter(|header| header.starts_with(b"cxsparse")) {
        seal(header, 36);
    }
}

/// A small image with data in some of its blocks of 1 MiB.
fn sound(kind: Kind) -> Vec<u8> {
    let sim = Sim::new();
    let root = sim.root();
    let parent = (kind == Kind::Differencing).then(|| {
        let base = vhd::create(root.create("base").unwrap(), &Options::dynamic(SIZE)).unwrap();
        Parent::of(&*base, Some("base.vhd")).unwrap()
    });
    let options = Options { size: SIZE, block_size: 1 << 20, kind, parent };
    let layer = vhd::create(root.create("disk").unwrap(), &options).unwrap();
    write(&*layer, 512, &[1; 4096]).unwrap();
    write(&*layer, 5 * MIB as u64, &vec![2; MIB]).unwrap();
    zero(&*layer, 2 * MIB as u64, 5120).unwrap();
    layer.close().unwrap();
    let mut bytes = vec![0; layer.store().len().unwrap() as usize];
    layer.store().read_at(&mut bytes, 0).unwrap();
    bytes
}

fn file(bytes: &[u8]) -> Arc<dyn Store> {
    let file = Sim::new().root().create("disk").unwrap();
    file.write_at(bytes, 0).unwrap();
    file
}

/// Does everything to a file that can be done to it.
fn exercise(bytes: &[u8]) {
    let windows = |layer: &dyn Layer| {
        let size = layer.info().size;
        let window = size.min(8 * MIB as u64);
        [0, (size / 2 / 512 * 512).min(size - window), size - window].map(|at| (at, window))
    };
    if let Ok(layer) = vhd::open(file(bytes), Mode::Read) {
        for (at, len) in windows(&*layer) {
            let _ = read(&*layer, at, len, 0);
        }
    }
    if let Ok(layer) = vhd::open(file(bytes), Mode::Write) {
        for (at, len) in windows(&*layer) {
            let _ = write(&*layer, at, &[7; 512]);
            let _ = zero(&*layer, at + len / 2 / 512 * 512, (len / 4 / 512 * 512).max(512));
            let _ = read(&*layer, at, len, 0);
        }
        if let Some(mut link) = layer.info().parent {
            link.linkage2 = Some(link.linkage);
            let _ = layer.relink(None, Some(link));
        }
        let _ = layer.flush();
        let _ = layer.close();
    }
}

/// Compacts and resizes what can be written: it reads as before. Says whether it can.
fn reshape(bytes: &[u8]) -> bool {
    const FILL: u8 = 0xEE;
    let store = file(bytes);
    let open = |mode| vhd::open(Arc::clone(&store), mode);
    let Ok(layer) = open(Mode::Write) else { return false };
    let size = layer.info().size;
    if size > 32 * MIB as u64 {
        return false;
    }
    let fill = if layer.info().kind == Kind::Differencing { FILL } else { 0 };
    let Ok(mut content) = read(&*layer, 0, size, fill) else { return false };
    let expect = |layer: &dyn Layer, content: &[u8], what: &str| {
        assert!(read(layer, 0, content.len() as u64, fill).unwrap() == content, "{what}: another content");
    };
    layer.pack(&mut |_, _| true).unwrap();
    expect(&*layer, &content, "packed");
    let larger = size + 140 * MIB as u64 + 512;
    layer.resize(larger, size + 3 * MIB as u64).unwrap();
    content.resize(size as usize + 3 * MIB, 0);
    expect(&*layer, &content, "grown");
    write(&*layer, larger - 512, &[7; 512]).unwrap();
    layer.close().unwrap();
    drop(layer);
    let layer = open(Mode::Write).unwrap();
    expect(&*layer, &content, "grown and opened again");
    layer.resize(size / 2 / 512 * 512 + 512, 0).unwrap();
    content.truncate(size as usize / 2 / 512 * 512 + 512);
    layer.pack(&mut |_, _| true).unwrap();
    layer.close().unwrap();
    drop(layer);
    expect(&*open(Mode::Read).unwrap(), &content, "shrunk");
    true
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn change(bytes: &mut [u8], random: &mut Random) {
    let tail = bytes.len() - 512;
    // Footers, header, locators, name, and where the table lies with a parent and without.
    let targets = [(0, 90), (tail, 90), (512, 64), (1088, 192), (1536, 64), (8192, 64)];
    let (at, len) = targets[random.below(targets.len() as u64) as usize];
    let at = at + random.below(len) as usize;
    let wide = [
        0,
        1,
        2,
        8,
        17,
        0x7fff_ffff,
        0xffff_fffe,
        u64::MAX,
        1 << 40,
        0x0010_0000_0000_0200,
        random.below(u64::MAX >> 1),
    ];
    let value = wide[random.below(wide.len() as u64) as usize];
    match random.below(4) {
        0 => bytes[at] = value as u8,
        1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes[at / 8 * 8..][..8].copy_from_slice(&value.to_be_bytes()),
        _ => bytes[at / 4 * 4..][..4].copy_from_slice(&(value as u32).to_be_bytes()),
    }
}

#[test]
fn changed_files_do_no_harm() {
    for kind in [Kind::Differencing, Kind::Dynamic, Kind::Fixed] {
        let sound = sound(kind);
        exercise(&sound);
        assert!(reshape(&sound));
        let mut reshaped = 0;
        let mut random = Random(kind as u64 + 1);
        for _ in 0..600 {
            let mut bytes = sound.clone();
            for _ in 0..=random.below(3) {
                change(&mut bytes, &mut random);
            }
            // The copy is what the footer is, or is not.
            if random.below(2) == 0 && kind != Kind::Fixed {
                let tail = bytes.len() - 512;
                bytes.copy_within(tail.., 0);
            }
            if random.below(16) == 0 {
                bytes.truncate(random.below(sound.len() as u64) as usize);
            }
            mend(&mut bytes);
            exercise(&bytes);
            if random.below(4) == 0 {
                reshaped += u64::from(reshape(&bytes));
            }
        }
        assert!(reshaped > 20, "{reshaped} could be written");
    }
}

/// A sound dynamic file with a number of its header or footer replaced.
fn with(change: impl FnOnce(&mut Vec<u8>)) -> image::Result<()> {
    let mut bytes = sound(Kind::Dynamic);
    change(&mut bytes);
    mend(&mut bytes);
    vhd::open(file(&bytes), Mode::Write).map(drop)
}

fn both_footers(bytes: &mut [u8], at: usize, value: &[u8]) {
    let tail = bytes.len() - 512;
    for footer in [0, tail] {
        bytes[footer + at..][..value.len()].copy_from_slice(value);
    }
}

#[test]
fn what_breaks_the_rules_is_refused() {
    with(|_| ()).expect("sound");
    let entry = |bytes: &[u8], block: usize| bytes[1536 + block * 4..][..4].to_vec();
    let place = |at: u32| move |bytes: &mut Vec<u8>| bytes[1536 + 6 * 4..][..4].copy_from_slice(&at.to_be_bytes());
    let refused: Vec<(&str, image::Result<()>)> = vec![
        (
            "a place used twice",
            with(|bytes| {
                let first = entry(bytes, 0);
                bytes[1536 + 6 * 4..][..4].copy_from_slice(&first);
            }),
        ),
        (
            "a block that begins in another's bitmap and data",
            with(|bytes| {
                let first = u32::from_be_bytes(entry(bytes, 0).try_into().unwrap());
                place(first + 2048)(bytes);
            }),
        ),
        ("a block in the footer's copy", with(place(0))),
        ("a block in the header", with(place(1))),
        ("a block in the table", with(place(3))),
        ("a block past the end", with(place(1_000_000))),
        ("a block past everything", with(place(u32::MAX - 1))),
        ("a table past the end", with(|bytes| bytes[512 + 16..][..8].copy_from_slice(&(1u64 << 40).to_be_bytes()))),
        ("a table past everything", with(|bytes| bytes[512 + 16..][..8].copy_from_slice(&[0xFF; 8]))),
        ("a table that is no sector", with(|bytes| bytes[512 + 16..][..8].copy_from_slice(&1540u64.to_be_bytes()))),
        ("a table over the header", with(|bytes| bytes[512 + 16..][..8].copy_from_slice(&1024u64.to_be_bytes()))),
        ("a table that is too short", with(|bytes| bytes[512 + 28..][..4].copy_from_slice(&7u32.to_be_bytes()))),
        (
            "blocks of no power of two",
            with(|bytes| bytes[512 + 32..][..4].copy_from_slice(&(3u32 << 20).to_be_bytes())),
        ),
        ("blocks of a byte", with(|bytes| bytes[512 + 32..][..4].copy_from_slice(&1u32.to_be_bytes()))),
        ("blocks of nothing", with(|bytes| bytes[512 + 32..][..4].fill(0))),
        ("a header past the end", with(|bytes| both_footers(bytes, 16, &(1u64 << 50).to_be_bytes()))),
        ("a header in the footer", with(|bytes| both_footers(bytes, 16, &0u64.to_be_bytes()))),
        ("a size of nothing", with(|bytes| both_footers(bytes, 48, &[0; 8]))),
        ("a size of everything", with(|bytes| both_footers(bytes, 48, &[0xFF; 8]))),
        ("a size that is no sectors", with(|bytes| both_footers(bytes, 48, &1000u64.to_be_bytes()))),
        (
            "a disk of more blocks than its table has",
            with(|bytes| both_footers(bytes, 48, &(1u64 << 40).to_be_bytes())),
        ),
        (
            "a fixed disk that is longer than its file",
            with(|bytes| {
                both_footers(bytes, 60, &2u32.to_be_bytes());
                both_footers(bytes, 48, &(1u64 << 40).to_be_bytes());
            }),
        ),
    ];
    for (what, result) in refused {
        assert_eq!(result.expect_err(what).kind, ErrorKind::Damaged, "{what}");
    }
    for (what, result) in [
        ("another type", with(|bytes| both_footers(bytes, 60, &5u32.to_be_bytes()))),
        ("another version", with(|bytes| both_footers(bytes, 12, &0x0002_0000u32.to_be_bytes()))),
        ("another header", with(|bytes| bytes[512 + 24..][..4].copy_from_slice(&0x0002_0000u32.to_be_bytes()))),
    ] {
        assert_eq!(result.expect_err(what).kind, ErrorKind::Unsupported, "{what}");
    }
}
