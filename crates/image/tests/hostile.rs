//! Files made to do harm: sound ones with bytes changed and the checksums mended. Opening, reading and writing them may fail, but
//! never panics, hangs, or takes memory out of proportion.

mod layer;

use image::vhdx;
use image::{ErrorKind, Kind, Layer};
use layer::{read, write, zero};
use std::sync::Arc;
use store::sim::Sim;
use store::{Mode, Store};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

fn checksum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&bytes[..4]), &[0; 4]), &bytes[8..]).to_le_bytes()
}

/// Gives every structure the checksum that its bytes ask for.
fn mend(file: &mut [u8]) {
    let mut seal = |at: usize, len: usize| {
        if let Some(bytes) = file.get_mut(at..at + len) {
            let sum = checksum(bytes);
            bytes[4..8].copy_from_slice(&sum);
        }
    };
    for (at, len) in [(64 * KIB, 4 * KIB), (128 * KIB, 4 * KIB), (192 * KIB, 64 * KIB), (256 * KIB, 64 * KIB)] {
        seal(at, len);
    }
    for at in (MIB..2 * MIB).step_by(4 * KIB) {
        let Some(head) = file.get(at..at + 12) else { return };
        let len = u32::from_le_bytes(head[8..].try_into().unwrap()) as usize;
        if &head[..4] == b"loge" && len.is_multiple_of(4 * KIB) && len > 0 && at + len <= 2 * MIB {
            let sum = checksum(&file[at..at + len]);
            file[at + 4..at + 8].copy_from_slice(&sum);
        }
    }
}

/// A small image with data, a partial block, zeros and a log in use.
fn sound(kind: Kind) -> Vec<u8> {
    let sim = Sim::new();
    let root = sim.root();
    let size = 7 * MIB as u64 + 512;
    let parent = (kind == Kind::Differencing).then(|| {
        let base = vhdx::create(root.create("base").unwrap(), &vhdx::Options::dynamic(size)).unwrap();
        vhdx::Parent::of(&*base, Some("base.vhdx")).unwrap()
    });
    let options = vhdx::Options { size, block_size: 1 << 20, kind, parent, ..vhdx::Options::default() };
    let layer = vhdx::create(root.create("disk").unwrap(), &options).unwrap();
    write(&*layer, 512, &[1; 4096]).unwrap();
    write(&*layer, MIB as u64, &vec![2; MIB]).unwrap();
    layer.flush().unwrap();
    zero(&*layer, 2 * MIB as u64, MIB as u64).unwrap();
    write(&*layer, 3 * MIB as u64 + 1024, &[3; 512]).unwrap();
    layer.flush().unwrap();
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
        let (size, sector) = (layer.info().size, u64::from(layer.info().sector_size));
        let window = size.min(8 * MIB as u64);
        [0, (size / 2 / sector * sector).min(size - window), size - window].map(|at| (at, window))
    };
    if let Ok(layer) = vhdx::open(file(bytes), Mode::Read) {
        for (at, len) in windows(&*layer) {
            let _ = read(&*layer, at, len, 0);
        }
    }
    if let Ok(layer) = vhdx::open(file(bytes), Mode::Write) {
        for (at, len) in windows(&*layer) {
            let sector = u64::from(layer.info().sector_size);
            let _ = write(&*layer, at, &vec![7; sector as usize]);
            let _ = zero(&*layer, at + len / 2 / sector * sector, (len / 4 / sector * sector).max(sector));
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

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Where the file's structures are, and how long.
const TARGETS: [(usize, usize); 11] = [
    (0, 16),
    (64 * KIB, 80),
    (128 * KIB, 80),
    (192 * KIB, 16 + 3 * 32),
    (256 * KIB, 16 + 3 * 32),
    (MIB, 64 + 8 * 32),
    (MIB + 4 * KIB, 40 * KIB),
    (2 * MIB, 32 + 7 * 32),
    (2 * MIB + 64 * KIB, 48),
    (2 * MIB + 128 * KIB, 300),
    (3 * MIB, 10 * 8),
];

fn change(bytes: &mut [u8], random: &mut Random) {
    let (at, len) = TARGETS[random.below(TARGETS.len() as u64) as usize];
    let at = at + random.below(len as u64) as usize;
    let wide =
        [0, 1, 0x7fff_ffff, 0xffff_ffff, u64::MAX, 1 << 40, 1 << 20, 0x10_0000_0006, random.below(u64::MAX >> 1)];
    match random.below(4) {
        0 => bytes[at] = random.below(256) as u8,
        1 => bytes[at] ^= 1 << random.below(8),
        2 => {
            let value = wide[random.below(wide.len() as u64) as usize];
            let at = at / 8 * 8;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        _ => {
            let value = wide[random.below(wide.len() as u64) as usize] as u32;
            let at = at / 4 * 4;
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
}

#[test]
fn changed_files_do_no_harm() {
    for kind in [Kind::Differencing, Kind::Dynamic, Kind::Fixed] {
        let sound = sound(kind);
        exercise(&sound);
        let mut random = Random(kind as u64 + 1);
        for _ in 0..400 {
            let mut bytes = sound.clone();
            for _ in 0..=random.below(3) {
                change(&mut bytes, &mut random);
            }
            if random.below(16) == 0 {
                bytes.truncate(random.below(sound.len() as u64) as usize);
            }
            mend(&mut bytes);
            exercise(&bytes);
        }
    }
}

fn refused(bytes: &[u8], what: &str) -> ErrorKind {
    vhdx::open(file(bytes), Mode::Read).expect_err(what).kind
}

/// Writes a table entry and takes the log out of use, so that the table in its place counts.
fn with_entry(kind: Kind, index: usize, entry: u64) -> Vec<u8> {
    let mut bytes = vec![0; 0];
    // A file that was closed has no log in use.
    let sim = Sim::new();
    let disk = sim.root().create("disk").unwrap();
    disk.write_at(&sound(kind), 0).unwrap();
    vhdx::open(Arc::clone(&disk), Mode::Write).unwrap().close().unwrap();
    bytes.resize(disk.len().unwrap() as usize, 0);
    disk.read_at(&mut bytes, 0).unwrap();
    bytes[3 * MIB + index * 8..][..8].copy_from_slice(&entry.to_le_bytes());
    bytes
}

#[test]
fn a_table_that_lies_is_refused() {
    let place = |mib: u64, state: u64| mib << 20 | state;
    let sound = with_entry(Kind::Dynamic, 6, 0);
    assert!(vhdx::open(file(&sound), Mode::Read).is_ok());
    let first = u64::from_le_bytes(sound[3 * MIB..][..8].try_into().unwrap());
    for (entry, what) in [
        (first, "a place used twice"),
        (place(0, 6), "a block in the header"),
        (place(1, 6), "a block in the log"),
        (place(2, 6), "a block in the metadata"),
        (place(3, 6), "a block in the table"),
        (place(100_000, 6), "a block past the end"),
        (u64::MAX, "a block past everything"),
        (place(4, 4), "a reserved state"),
        (5, "a reserved state"),
        (place(20, 7), "a partial block without a parent"),
    ] {
        assert_eq!(refused(&with_entry(Kind::Dynamic, 6, entry), what), ErrorKind::Damaged, "{what}");
    }
    // The states without a place may keep an old one.
    for state in [0, 1, 2, 3] {
        let bytes = with_entry(Kind::Dynamic, 6, place(77_777, state));
        let layer = vhdx::open(file(&bytes), Mode::Write).expect("fine");
        write(&*layer, 6 * MIB as u64, &[5; 512]).expect("written");
        layer.close().expect("closed");
        assert_eq!(read(&*layer, 6 * MIB as u64, 1024, 0).unwrap(), [[5; 512], [0; 512]].concat());
    }
}

#[test]
fn bits_from_an_earlier_life_of_a_block_do_not_count() {
    // Block 0 has sectors 1 to 8. Its entry is taken away, its bits stay.
    let bytes = with_entry(Kind::Differencing, 0, 0);
    let disk = file(&bytes);
    let layer = vhdx::open(Arc::clone(&disk), Mode::Write).expect("open");
    write(&*layer, 0, &[9; 512]).expect("write");
    layer.flush().expect("flush");
    for layer in [layer, vhdx::open(disk, Mode::Read).expect("open")] {
        assert_eq!(read(&*layer, 0, 1536, 0xEE).expect("read"), [[9; 512], [0xEE; 512], [0xEE; 512]].concat());
    }
}

#[test]
fn zeros_in_a_child_hide_the_parent_in_every_state_that_means_them() {
    for state in [1, 2, 3] {
        let layer = vhdx::open(file(&with_entry(Kind::Differencing, 5, state)), Mode::Write).expect("open");
        assert_eq!(read(&*layer, 5 * MIB as u64, 512, 0xEE).expect("read"), [0; 512]);
        // And a sector written there leaves the others zeros.
        write(&*layer, 5 * MIB as u64, &[1; 512]).expect("write");
        assert_eq!(read(&*layer, 5 * MIB as u64, 1024, 0xEE).expect("read"), [[1; 512], [0; 512]].concat());
    }
}

#[test]
fn one_copy_of_a_header_or_region_table_is_enough() {
    for kind in [Kind::Dynamic, Kind::Differencing] {
        let sound = with_entry(kind, 6, 0);
        for at in [192 * KIB, 256 * KIB] {
            let mut bytes = sound.clone();
            bytes[at..at + 64].fill(0xFF);
            vhdx::open(file(&bytes), Mode::Read).expect("the other copy is good");
        }
        let mut bytes = sound.clone();
        bytes[64 * KIB..][..4096].fill(0);
        bytes[128 * KIB..][..4096].fill(0);
        assert_eq!(refused(&bytes, "no header"), ErrorKind::Damaged);
    }
}

#[test]
fn a_file_cut_below_what_its_log_counts_on_is_refused() {
    let mut bytes = sound(Kind::Dynamic);
    bytes.truncate(bytes.len() - 4 * MIB);
    assert_eq!(refused(&bytes, "cut"), ErrorKind::Damaged);
}
