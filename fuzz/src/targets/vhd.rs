//! A whole VHD, with the rules of [`super::vhdx`]: what was flushed is there, and who only reads sees what a writer does.

use super::disk::{self, disk};
use super::{firsts, store_of};
use crate::file::File;
use crate::mutate;
use crate::run::MEMORY;
use crate::{Input, Random, Target};
use image::vhd::{self, Options, Parent};
use image::{Kind, Layer};

pub(super) const TARGET: Target = Target {
    name: "vhd",
    about: "a VHD file: footers, header, block table, bitmaps, parent locators",
    quick: 3000,
    memory: MEMORY,
    seeds: || images().into_iter().map(|file| Input(vec![file])).collect(),
    mutate,
    run: super::vhdx::TARGET.run,
};

const MIB: u64 = 1 << 20;
/// Bytes of a footer, and of a header.
const FOOTER: u64 = 512;
const HEADER: usize = 1024;
/// Who may have made a file, and where the footer says it.
const CREATORS: [&[u8; 4]; 4] = [b"win ", b"vpc ", b"qem2", b"tap\0"];
const CREATOR: u64 = 28;
/// Numbers of a footer: offset and width.
const FOOTER_FIELDS: [(u64, usize); 9] =
    [(0, 8), (8, 4), (12, 4), (16, 8), (40, 8), (48, 8), (60, 4), (68, 8), (84, 1)];
/// Numbers of a header, the locators' apart.
const HEADER_FIELDS: [(u64, usize); 7] = [(0, 8), (8, 8), (16, 8), (24, 4), (28, 4), (32, 4), (40, 8)];

/// Sound files of all shapes.
pub(super) fn images() -> Vec<File> {
    let shapes = [
        (Kind::Fixed, 3 * MIB + 512, 2 * MIB),
        (Kind::Dynamic, 7 * MIB + 512, 512 << 10),
        // The largest there is, and its table is still soon read.
        (Kind::Dynamic, 2040 << 30, 256 * MIB),
        (Kind::Differencing, 7 * MIB + 512, 512 << 10),
        (Kind::Differencing, 100 * MIB, 32 * MIB),
    ];
    let mut all = Vec::new();
    for (kind, size, block) in shapes {
        let parent = (kind == Kind::Differencing).then(|| super::base(size, 512).1);
        let parent = parent.map(|base| Parent::of(&*base, Some("base.vhdx")).expect("a name"));
        let parent = parent.map(|parent| parent.with_windows_path(r"C:\base.vhdx"));
        let store = disk(&File::default());
        let options = Options { size, block_size: block as u32, kind, parent };
        let layer = vhd::create(store_of(&store), &options).expect("a sound image");
        all.push(store.file());
        for round in 0..2 {
            disk::write(&*layer, round * block + 512, &[round as u8 + 1; 1024]).expect("room");
            disk::zero(&*layer, (round + 1) * MIB, 4096).expect("room");
            if round == 1 && kind != Kind::Fixed {
                layer.set_note(br#"{"format":1}"#).expect("a place for it");
            }
            layer.flush().expect("a sound image");
            all.push(store.file());
        }
        layer.close().expect("a sound image");
        // As we leave it, and as if others had made it.
        all.push(store.file());
        let mut file = store.file();
        for at in footers(&file) {
            file.write(at + CREATOR, CREATORS[all.len() % CREATORS.len()]);
        }
        all.push(file);
    }
    all.iter_mut().for_each(settle);
    all
}

/// Makes the file the same each time: no moments and no ids that were drawn.
fn settle(file: &mut File) {
    for at in footers(file) {
        file.put(at + 24, 4, 0);
        file.write(at + 68, &[7; 16]);
    }
    if let Some(at) = header(file) {
        file.put(at + 56, 4, 0);
    }
    mend(file, || false);
}

/// Where footers lie.
fn footers(file: &File) -> Vec<u64> {
    let ends = [512, 511].into_iter().filter_map(|back| file.len().checked_sub(back));
    // All but the last byte of the reserved ones must be there.
    let first = (file.len() >= FOOTER - 1).then_some(0);
    first.into_iter().chain(ends).filter(|at| file.array(*at) == *b"conectix").collect()
}

/// Where the header lies.
fn header(file: &File) -> Option<u64> {
    let places = footers(file).into_iter().map(|at| number(file, at + 16, 8));
    let inside = |at: &u64| at.checked_add(HEADER as u64).is_some_and(|end| end <= file.len());
    places.into_iter().find(|at| inside(at) && file.array(*at) == *b"cxsparse")
}

/// A big-endian number.
fn number(file: &File, at: u64, width: usize) -> u64 {
    file.bytes(at, width).into_iter().fold(0, |number, byte| number << 8 | u64::from(byte))
}

fn put(file: &mut File, at: u64, width: usize, value: u64) {
    file.write(at, &value.to_be_bytes()[8 - width..]);
}

/// Mends the checksums but those that `leave` leaves.
fn mend(file: &mut File, mut leave: impl FnMut() -> bool) {
    let sum = |bytes: &[u8], at: usize| {
        let others = bytes[..at].iter().chain(&bytes[at + 4..]);
        !others.fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()))
    };
    for at in footers(file).into_iter().filter(|_| !leave()).collect::<Vec<_>>() {
        let sum = sum(&file.bytes(at, FOOTER.min(file.len() - at) as usize), 64);
        put(file, at + 64, 4, sum.into());
    }
    if let Some(at) = header(file).filter(|_| !leave()) {
        let sum = sum(&file.bytes(at, HEADER), 36);
        put(file, at + 36, 4, sum.into());
    }
}

fn mutate(input: &mut Input, random: &mut Random, pool: &[Input]) {
    change(&mut input.0[0], random, &firsts(pool));
}

/// Changes a file in one to four ways and mends it. `others` may lend parts.
pub(super) fn change(file: &mut File, random: &mut Random, others: &[&File]) {
    for _ in 0..=random.below(3) {
        match random.below(13) {
            12 => {
                let creator = *random.pick(&CREATORS);
                for at in footers(file) {
                    file.write(at + CREATOR, creator);
                }
            }
            0..4 => change_field(file, random),
            4..7 => change_table(file, random),
            7 => change_locator(file, random),
            8 => mutate::change_bytes(file, random),
            9 => mutate::copy_page(file, random),
            10 if random.one_in(2) => mutate::resize(file, random),
            10 => {
                // The footer at another end.
                let footer = file.bytes(0, FOOTER as usize);
                let end = file.len().saturating_sub(random.below(2048));
                file.write(end, &footer);
            }
            _ => file.take_over(
                others[random.index(others.len())],
                *random.pick(&[0, 512, 4096]),
                *random.pick(&[512, 4096, 8192]),
            ),
        }
    }
    mend(file, || random.one_in(32));
}

/// The same in both footers, most of the time: a reader takes either.
fn change_field(file: &mut File, random: &mut Random) {
    let footers = footers(file);
    let header = header(file).filter(|_| random.one_in(2) || footers.is_empty());
    let (fields, places) = match header {
        Some(at) => (&HEADER_FIELDS[..], vec![at]),
        None => (&FOOTER_FIELDS[..], footers),
    };
    let (field, width) = *random.pick(fields);
    let old = places.first().map_or(0, |at| number(file, at + field, width));
    let value = match random.below(4) {
        0 => 1 << random.below(32),
        1 => random.below(6),
        _ => mutate::number(random, old, file.len(), width),
    };
    for at in places {
        if !random.one_in(8) {
            put(file, at + field, width, value);
        }
    }
}

/// Places a block anywhere.
fn change_table(file: &mut File, random: &mut Random) {
    let Some(header) = header(file) else { return };
    let table = number(file, header + 16, 8).min(1 << 40);
    let entries = number(file, header + 28, 4).clamp(1, 4096);
    let taken = number(file, table + random.below(entries) * 4, 4);
    let end = file.len() / 512;
    let some = random.below(end + 2);
    let place = *random.pick(&[0, 1, 2, taken, taken + 1, end, end.saturating_sub(1), some, 0xffff_ffff, 0xffff_fffe]);
    put(file, table + random.below(entries.min(12)) * 4, 4, place);
}

/// Says something else of where the parent is.
fn change_locator(file: &mut File, random: &mut Random) {
    let Some(header) = header(file) else { return };
    let at = header + 576 + random.below(8) * 24;
    let code = *random.pick(&[*b"W2ru", *b"W2ku", *b"MacX", *b"tnby", *b"Wi2r", [0; 4]]);
    let (length, offset) = (random.below(600), random.below(file.len().min(1 << 20)) / 512 * 512);
    file.write(at, &code);
    put(file, at + 4, 4, *random.pick(&[0, 1, 512, 4096, 0xffff_ffff]));
    put(file, at + 8, 4, *random.pick(&[0, 1, 16, length, 1 << 16, 0xffff_ffff]));
    put(file, at + 16, 8, *random.pick(&[0, offset, file.len(), u64::MAX - 511]));
    if random.one_in(2) {
        let name = *random.pick::<&str>(&[
            r".\base.vhd",
            r"..\x",
            "/etc/passwd",
            "file://./a%20b%zz%",
            "file://localhost/C:/x%20y%zz",
        ]);
        let wide: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let (offset, text) = if code == *b"MacX" { (offset, name.as_bytes()) } else { (offset, &wide[..]) };
        if offset >= 4096 {
            file.write(offset, text);
            put(file, at + 8, 4, text.len() as u64);
            put(file, at + 16, 8, offset);
        }
    }
    if random.one_in(4) {
        // The parent's own name, and its id.
        file.write(header + 64, &[random.number() as u8; 20]);
        put(file, header + 40, 8, random.number());
    }
}

/// Damages the file as hosts and tools do.
pub(super) fn wound(file: &mut File, random: &mut Random) {
    let footers = footers(file);
    let tail = footers.last().copied().filter(|at| *at > 0);
    match random.below(12) {
        8 => file.set_len(file.len().saturating_sub(1)),
        9 => {
            // The end is lost, and the footer put behind what is left.
            if let Some(at) = tail {
                let footer = file.bytes(at, FOOTER as usize);
                let end = at.saturating_sub(random.below(MIB) / 512 * 512).max(FOOTER);
                file.set_len(end);
                file.write(end, &footer);
            }
        }
        10 => {
            // The parent's names are lost, or the table lies over something.
            if let Some(at) = header(file) {
                if random.one_in(2) {
                    file.zero(at + 64, 512 + 8 * 24);
                } else {
                    let locator = number(file, at + 576 + 16, 8);
                    put(file, at + 16, 8, *random.pick(&[512, 1024, 1536, locator, locator.saturating_sub(512)]));
                }
                mend(file, || false);
            }
        }
        11 => {
            // All bits of a block's bitmap.
            if let Some(at) = header(file) {
                let (table, entries) = (number(file, at + 16, 8).min(1 << 40), number(file, at + 28, 4).clamp(1, 4096));
                let block = number(file, table + random.below(entries) * 4, 4) * 512;
                if block != 0 && block < file.len() {
                    file.write(block, &[0xff; 512]);
                }
            }
        }
        0 => file.zero(0, FOOTER),
        1 => file.set_len(tail.unwrap_or(file.len())),
        2 => tail.into_iter().for_each(|at| file.zero(at, FOOTER)),
        3 => file.set_len(file.len().saturating_sub(1 + random.below(3 * MIB))),
        // Without a checksum that fits, or without the signature.
        4 | 5 => {
            let at = if random.one_in(2) { footers.first().copied() } else { header(file) };
            let at = at.unwrap_or_default() + *random.pick(&[0, 36, 64, 100]);
            file.put(at, 1, random.number());
        }
        6 => {
            // The two copies of the footer, each sound, say something else.
            if let Some(at) = tail {
                file.put(at + 68, 8, random.number());
                mend(file, || false);
            }
        }
        _ => change_table(file, random),
    }
}
