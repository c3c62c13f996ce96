//! What a VHDX looks like from outside: where its numbers lie, how its checksums are mended, and how to make a log or a parent
//! locator that a sound writer never would. Written from MS-VHDX, apart from the reader that it tests.

use crate::file::{File, PAGE};
use crate::mutate::{self, Field, checksum_without};
use crate::random::Random;
use uuid::{Uuid, uuid};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const HEADERS: [u64; 2] = [64 * KIB, 128 * KIB];
const REGIONS: [u64; 2] = [192 * KIB, 256 * KIB];
const TABLE: usize = 64 << 10;
const BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");
const LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");
const DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const LOCATOR_TYPE: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");
/// Every metadata item that the format names, our note, and one that nobody knows.
const ITEMS: [Uuid; 9] = [
    PARAMETERS,
    uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8"),
    DISK_ID,
    uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f"),
    uuid!("cda348c7-445d-4471-9cc9-e9885251c556"),
    LOCATOR,
    uuid!("71cc85f0-1b69-4e28-9558-c3bf83ae75d3"),
    uuid!("7e2d5b1c-0f53-4c0e-9a43-6d1f4a0c7b92"),
    Uuid::from_u128(77),
];
/// The id of the logs that are made here.
const LOG_ID: Uuid = Uuid::from_u128(0x10c);

/// Where a file's structures are, as far as they can be found.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// The newer header.
    header: u64,
    log: (u64, u64),
    metadata: u64,
    bat: (u64, u64),
}

impl Places {
    /// Those of `file`; where it says nothing sensible, those that our own files have.
    pub fn of(file: &File) -> Self {
        let newer = file.number(HEADERS[1] + 8, 8) > file.number(HEADERS[0] + 8, 8);
        let header = HEADERS[usize::from(newer)];
        let sane = |at: u64, len: u64| at >= MIB && at < file.len().max(MIB) && len > 0 && len <= 64 * MIB;
        let or = |(at, len): (u64, u64), other| if sane(at, len) { (at, len) } else { other };
        let region = |id: Uuid| {
            let entries = (0..8).map(|index| REGIONS[0] + 16 + index * 32);
            let found = entries.into_iter().find(|at| file.array(*at) == id.to_bytes_le());
            found.map_or((0, 0), |at| (file.number(at + 16, 8), file.number(at + 24, 4)))
        };
        Self {
            header,
            log: or((file.number(header + 72, 8), file.number(header + 68, 4)), (MIB, MIB)),
            metadata: or(region(METADATA), (2 * MIB, MIB)).0,
            bat: or(region(BAT), (3 * MIB, MIB)),
        }
    }

    /// Where the item of this id lies in the file and how long it is, and where its entry is.
    fn item(&self, file: &File, id: Uuid) -> Option<(u64, u64, u64)> {
        let entries = (1..16).map(|index| self.metadata + index * 32);
        let entry = entries.into_iter().find(|at| file.array(*at) == id.to_bytes_le())?;
        Some((self.metadata + file.number(entry + 16, 4), file.number(entry + 20, 4), entry))
    }

    /// Where in the log entries begin.
    fn entries(&self, file: &File) -> Vec<u64> {
        let (at, len) = self.log;
        file.pages().filter(|page| (at..at + len).contains(page) && file.array(*page) == *b"loge").collect()
    }
}

/// The numbers of a file's structures.
fn fields(file: &File, places: &Places) -> Vec<Field> {
    let mut all = Vec::new();
    let mut put = |at: u64, parts: &[(u64, usize)]| {
        all.extend(parts.iter().map(|(offset, width)| Field { at: at + offset, width: *width }));
    };
    for at in HEADERS {
        put(at, &[(0, 4), (8, 8), (16, 8), (32, 8), (48, 8), (64, 2), (66, 2), (68, 4), (72, 8)]);
    }
    for at in REGIONS {
        put(at, &[(0, 4), (8, 4), (12, 4)]);
        for index in 0..file.number(at + 8, 4).min(5) {
            put(at + 16 + index * 32, &[(0, 8), (16, 8), (24, 4), (28, 4)]);
        }
    }
    put(places.metadata, &[(0, 8), (10, 2)]);
    for index in 1..=file.number(places.metadata + 10, 2).min(12) {
        let entry = places.metadata + index * 32;
        put(entry, &[(0, 8), (16, 4), (20, 4), (24, 4)]);
        let item = places.metadata + file.number(entry + 16, 4);
        let length = file.number(entry + 20, 4);
        (0..length.min(64) / 4).for_each(|word| put(item + word * 4, &[(0, 4)]));
    }
    if let Some((item, _, _)) = places.item(file, LOCATOR) {
        put(item, &[(0, 8), (18, 2)]);
        for index in 0..file.number(item + 18, 2).min(6) {
            put(item + 20 + index * 12, &[(0, 4), (4, 4), (8, 2), (10, 2)]);
        }
    }
    for page in file.pages().filter(|page| (places.bat.0..places.bat.0 + places.bat.1).contains(page)) {
        (0..PAGE as u64 / 8)
            .map(|word| page + word * 8)
            .filter(|at| file.number(*at, 8) != 0)
            .for_each(|at| put(at, &[(0, 8)]));
    }
    for entry in places.entries(file) {
        put(entry, &[(0, 4), (8, 4), (12, 4), (16, 8), (24, 4), (32, 8), (48, 8), (56, 8)]);
        let count = file.number(entry + 24, 4).min(6);
        for index in 0..count {
            put(entry + 64 + index * 32, &[(0, 4), (8, 8), (16, 8), (24, 8)]);
            let sector = entry + (index + 1) * PAGE as u64;
            put(sector, &[(0, 4), (4, 4), (PAGE as u64 - 4, 4)]);
        }
    }
    all
}

/// Gives every structure the checksum that its bytes ask for, most of the time.
pub fn mend(file: &mut File, random: &mut Random) {
    mend_unless(file, || random.one_in(32));
}

/// Mends every checksum but those that `leave` leaves.
pub fn mend_unless(file: &mut File, mut leave: impl FnMut() -> bool) {
    for (at, len) in HEADERS.map(|at| (at, PAGE)).into_iter().chain(REGIONS.map(|at| (at, TABLE))) {
        if !leave() && at + len as u64 <= file.len() {
            let sum = checksum_without(&file.bytes(at, len), 4);
            file.put(at + 4, 4, sum.into());
        }
    }
    let places = Places::of(file);
    let (at, len) = places.log;
    for entry in places.entries(file) {
        let length = file.number(entry + 8, 4);
        let sane = length > 0 && length <= len.min(8 * MIB) && length.is_multiple_of(PAGE as u64);
        if sane && !leave() {
            let ring = |offset: u64| at + (entry - at + offset) % len;
            let sectors = (0..length).step_by(PAGE).map(|offset| file.bytes(ring(offset), PAGE));
            let sum = checksum_without(&sectors.collect::<Vec<_>>().concat(), 4);
            file.put(entry + 4, 4, sum.into());
        }
    }
}

/// Changes a file in one to four ways and mends it. `others` may lend parts.
pub fn mutate(file: &mut File, random: &mut Random, others: &[&File]) {
    for _ in 0..=random.below(3) {
        let places = Places::of(file);
        match random.below(24) {
            0..8 => mutate::change_field(file, &fields(file, &places), random),
            8..10 => mutate::change_bytes(file, random),
            10..13 => make_log(file, &places, random),
            13..15 => make_locator(file, &places, random),
            15..18 => change_table(file, &places, random),
            18 => mutate::copy_page(file, random),
            19 => mutate::resize(file, random),
            20 if random.one_in(3) => number_alike(file, random),
            20 => add_region(file, random),
            21 => add_item(file, &places, random),
            22 => renumber(file, &places, random),
            _ => {
                let parts = [
                    (0, 2 * MIB),
                    places.log,
                    (places.metadata, MIB),
                    places.bat,
                    (HEADERS[0], 128 * KIB),
                    (0, 64 * MIB),
                ];
                let (at, len) = *random.pick(&parts);
                if let Some(other) = others.get(random.index(others.len())) {
                    file.take_over(other, at, len);
                }
            }
        }
    }
    mend(file, random);
}

/// Whether a file is a VHDX, or was one.
pub fn is_one(file: &File) -> bool {
    file.array(0) == *b"vhdxfile" || HEADERS.iter().any(|at| file.array(*at) == *b"head")
}

/// Damages the file as hosts and tools do.
pub fn wound(file: &mut File, random: &mut Random) {
    let places = Places::of(file);
    match random.below(10) {
        0 => file.zero(*random.pick(&HEADERS), PAGE as u64),
        1 => HEADERS.iter().for_each(|at| file.zero(*at, PAGE as u64)),
        2 => file.zero(*random.pick(&REGIONS), TABLE as u64),
        3 => REGIONS.iter().for_each(|at| file.zero(*at, TABLE as u64)),
        4 => file.zero(0, 8),
        5 => file.set_len(file.len().saturating_sub(1 + random.below(4 * MIB))),
        6 => shift_table(file, &places, random),
        7 => file.zero(places.log.0, places.log.1),
        8 => number_alike(file, random),
        _ => {
            let one = file.number(places.bat.0, 8);
            file.put(places.bat.0 + random.below(8) * 8, 8, one);
        }
    }
}

/// What QEMU before 8.0 did to a page of the table: its first entry is lost, or there twice, and the others stand one further on.
fn shift_table(file: &mut File, places: &Places, random: &mut Random) {
    let at = places.bat.0 + random.below(2) * PAGE as u64;
    let page = file.bytes(at, PAGE - 8);
    file.write(at + 8, &page);
    if random.one_in(2) {
        file.put(at, 8, (file.len() >> 20) << 20 | 6);
        file.set_len(file.len() + 2 * MIB);
    }
    if random.one_in(2) {
        let creator: Vec<u8> = "QEMU v6.2.0".encode_utf16().flat_map(u16::to_le_bytes).collect();
        file.write(8, &creator);
    }
}

/// Numbers both headers alike: then they have to be alike.
fn number_alike(file: &mut File, random: &mut Random) {
    let number = file.number(HEADERS[0] + 8, 8);
    file.put(HEADERS[1] + 8, 8, number);
    if random.one_in(2) {
        let header = file.bytes(HEADERS[0], PAGE);
        file.write(HEADERS[1], &header);
    }
}

/// Puts an entry into the block table: any state, with a place that may be another's.
fn change_table(file: &mut File, places: &Places, random: &mut Random) {
    let (at, _) = places.bat;
    let taken = file.number(at + random.below(8) * 8, 8) >> 20;
    let end = file.len() >> 20;
    let place = match random.below(6) {
        0 => taken,
        1 => random.below(8),
        2 => end.wrapping_sub(random.below(3)),
        3 => random.below(end + 2),
        4 => mutate::number(random, taken, end, 8),
        _ => end,
    };
    let index = match random.below(6) {
        0 => 2048,
        1 => 4096 << random.below(3),
        2 => random.below(PAGE as u64 / 8),
        _ => random.below(8),
    };
    let state = *random.pick(&[0, 1, 2, 3, 6, 6, 6, 7, 7, 7, 4, 5]);
    file.put(at + index * 8, 8, place << 20 | state);
    if random.one_in(2) && place == end {
        // There is room for it.
        file.set_len((end + random.below(4)) << 20);
    }
}

/// Names one region more, in both tables.
fn add_region(file: &mut File, random: &mut Random) {
    let count = file.number(REGIONS[0] + 8, 4).min(2047);
    let id = *random.pick(&[BAT, METADATA, Uuid::from_u128(5), Uuid::from_u128(6)]);
    let offset = random.below(file.len() / MIB + 2) * MIB;
    let length = random.below(3) * MIB;
    let flags = random.below(2);
    for at in REGIONS {
        let entry = at + 16 + count * 32;
        file.write(entry, &id.to_bytes_le());
        file.put(entry + 16, 8, offset);
        file.put(entry + 24, 4, length);
        file.put(entry + 28, 4, flags);
        file.put(at + 8, 4, count + 1);
    }
    if random.one_in(2) && offset + length > file.len() {
        file.set_len(offset + length);
    }
}

/// Names one metadata item more.
fn add_item(file: &mut File, places: &Places, random: &mut Random) {
    let count = file.number(places.metadata + 10, 2).min(1023);
    let entry = places.metadata + 32 + count * 32;
    file.write(entry, &random.pick(&ITEMS).to_bytes_le());
    let some = random.below(MIB);
    file.put(entry + 16, 4, *random.pick(&[0, 64 * KIB, 512 * KIB, MIB - 8, some]));
    file.put(entry + 20, 4, *random.pick(&[0, 8, 16, 300 * KIB, MIB]));
    file.put(entry + 24, 4, random.below(8));
    file.put(places.metadata + 10, 2, count + 1);
}

/// Gives a log entry another number everywhere, so that only the run is wrong.
fn renumber(file: &mut File, places: &Places, random: &mut Random) {
    let entries = places.entries(file);
    if entries.is_empty() {
        return;
    }
    let entry = *random.pick(&entries);
    let old = file.number(entry + 16, 8);
    let new = *random.pick(&[old.wrapping_add(1), old.wrapping_sub(1), 0, 1, u64::MAX, u64::MAX - 1]);
    file.put(entry + 16, 8, new);
    for index in 0..file.number(entry + 24, 4).min(100) {
        file.put(entry + 64 + index * 32 + 24, 8, new);
        let sector = entry + (index + 1) * PAGE as u64;
        file.put(sector + 4, 4, new >> 32);
        file.put(sector + PAGE as u64 - 4, 4, new);
    }
}

/// Writes a whole log of a few entries, which follow one another and say whatever they like, and says that it is in use.
fn make_log(file: &mut File, places: &Places, random: &mut Random) {
    let (log, len) = places.log;
    let (log_end, end) = (log + len, file.len());
    if random.one_in(4) {
        file.zero(log, len);
    }
    let mut start = random.below(len.min(MIB) / PAGE as u64) * PAGE as u64;
    let first = start;
    let mut sequence = 1 + random.below(3);
    for _ in 0..=random.below(3) {
        let count = random.below(6);
        let mut entry = vec![0; PAGE];
        let mut sectors = Vec::new();
        for index in 0..count as usize {
            let mut descriptor = [0; 32];
            let target = match random.below(8) {
                0 => places.metadata + random.below(34) * PAGE as u64,
                1 => random.below(MIB) / 4096 * 4096,
                2 => log + random.below(len) / 4096 * 4096,
                3 => end + random.below(3) * PAGE as u64,
                4 => end.saturating_sub(random.below(3) * PAGE as u64),
                5 => mutate::number(random, end, end, 8),
                _ => places.bat.0 + random.below(3) * PAGE as u64,
            };
            if random.one_in(3) {
                descriptor[..4].copy_from_slice(b"zero");
                let some = random.below(end) / 4096 * 4096;
                let length = *random.pick(&[0, 4096, 8192, MIB, 2 * MIB, log_end, end, 1 << 40, some]);
                descriptor[8..16].copy_from_slice(&length.to_le_bytes());
            } else {
                let mut page = file.bytes(target.min(end), PAGE);
                if random.one_in(2) {
                    let at = random.index(64) * 8;
                    let place = (random.below(end / MIB + 2) << 20) | *random.pick(&[0, 2, 6, 7]);
                    page[at..at + 8].copy_from_slice(&place.to_le_bytes());
                }
                descriptor[..4].copy_from_slice(b"desc");
                descriptor[4..8].copy_from_slice(&page[PAGE - 4..]);
                descriptor[8..16].copy_from_slice(&page[..8]);
                page[..4].copy_from_slice(b"data");
                page[4..8].copy_from_slice(&((sequence >> 32) as u32).to_le_bytes());
                page[PAGE - 4..].copy_from_slice(&(sequence as u32).to_le_bytes());
                sectors.extend(page);
            }
            descriptor[16..24].copy_from_slice(&target.to_le_bytes());
            descriptor[24..32].copy_from_slice(&sequence.to_le_bytes());
            entry[64 + index * 32..96 + index * 32].copy_from_slice(&descriptor);
        }
        entry.extend(sectors);
        let tail = *random.pick(&[first, first, first, start, 0]);
        let lengths = [end, end, end, end + MIB, end.saturating_sub(MIB), 1 << 44, 1 << 51];
        entry[..4].copy_from_slice(b"loge");
        let length = entry.len() as u32;
        entry[8..12].copy_from_slice(&length.to_le_bytes());
        entry[12..16].copy_from_slice(&(tail as u32).to_le_bytes());
        entry[16..24].copy_from_slice(&sequence.to_le_bytes());
        entry[24..28].copy_from_slice(&(count as u32).to_le_bytes());
        entry[32..48].copy_from_slice(&LOG_ID.to_bytes_le());
        entry[48..56].copy_from_slice(&random.pick(&lengths).to_le_bytes());
        entry[56..64].copy_from_slice(&random.pick(&lengths).to_le_bytes());
        for sector in entry.chunks(PAGE) {
            file.write(log + start % len, sector);
            start += PAGE as u64;
        }
        start %= len;
        sequence = sequence.wrapping_add(1);
    }
    for at in HEADERS {
        file.write(at + 48, &LOG_ID.to_bytes_le());
    }
    if random.one_in(8) {
        file.put(places.header + 8, 8, random.number());
    }
}

/// Paths that a parent may be said to have.
const PATHS: [&str; 20] = [
    r".\base.vhdx",
    "base.vhdx",
    r".\BASE.VHDX",
    "./base.vhdx",
    r".\.\base.vhdx",
    r".\disk.avhdx",
    "disk.avhdx",
    r"..\base.vhdx",
    r"sub\base.vhdx",
    r"C:\base.vhdx",
    r"\\server\share\base.vhdx",
    "/etc/passwd",
    "..",
    ".",
    "",
    r".\",
    "nul\0l",
    "line\nbreak",
    "other.vhdx",
    "raw.img",
];
/// Keys of a locator.
const KEYS: [&str; 8] = [
    "parent_linkage",
    "parent_linkage2",
    "relative_path",
    "absolute_win32_path",
    "volume_path",
    "house",
    "",
    "parent_linkage",
];

/// Writes a parent locator of a few keys in place of the one that is there, or says that there is one.
fn make_locator(file: &mut File, places: &Places, random: &mut Random) {
    let Some((old, _, entry)) = places.item(file, LOCATOR) else {
        if let Some((parameters, _, _)) = places.item(file, PARAMETERS) {
            file.put(parameters + 4, 4, random.below(4));
        }
        return add_item(file, places, random);
    };
    let id = |random: &mut Random| match random.below(8) {
        0 => Uuid::nil().braced().to_string(),
        1 => Uuid::from_u128(9).to_string(),
        2 => "no id".to_owned(),
        3 => String::new(),
        _ => super::targets::BASE_ID.braced().to_string(),
    };
    let count = random.below(6) + 1;
    let mut head = LOCATOR_TYPE.to_bytes_le().to_vec();
    head.extend_from_slice(&[0, 0]);
    head.extend_from_slice(&(count as u16).to_le_bytes());
    let mut texts: Vec<u8> = Vec::new();
    let texts_at = 20 + count as usize * 12;
    for index in 0..count as usize {
        let key = if random.one_in(4) { *random.pick(&KEYS) } else { KEYS[index % 6] };
        let value = match key {
            "parent_linkage" | "parent_linkage2" => id(random),
            _ if random.one_in(12) => "x".repeat(random.index(70_000)),
            _ => (*random.pick(&PATHS)).to_owned(),
        };
        let mut put = |text: &str| {
            let at = (texts_at + texts.len()) as u32;
            texts.extend(text.encode_utf16().take(32_000).flat_map(u16::to_le_bytes));
            (at, texts_at as u32 + texts.len() as u32 - at)
        };
        let ((key_at, key_len), (value_at, value_len)) = (put(key), put(&value));
        head.extend_from_slice(&key_at.to_le_bytes());
        head.extend_from_slice(&value_at.to_le_bytes());
        head.extend_from_slice(&(key_len as u16).to_le_bytes());
        head.extend_from_slice(&(value_len as u16).to_le_bytes());
    }
    head.extend(texts);
    if random.one_in(16) && head.len() > 60 {
        // A half of a pair.
        let at = head.len() - 2;
        head[at..].copy_from_slice(&0xd800_u16.to_le_bytes());
    }
    file.put(entry + 20, 4, head.len() as u64);
    file.write(old, &head);
}

/// Replaces the ids that a writer has drawn by ones that are the same each time, in all of `files`: the file's own, and other files
/// that name them.
pub fn settle_ids(files: &mut [&mut File]) {
    let mut drawn: Vec<[u8; 16]> = Vec::new();
    for file in files.iter() {
        let ids = HEADERS.iter().flat_map(|at| [16, 32, 48].map(|offset| file.array(at + offset)));
        let disk = Places::of(file).item(file, DISK_ID).map(|(at, _, _)| file.array(at));
        for id in ids.chain(disk) {
            if id != [0; 16] && !drawn.contains(&id) {
                drawn.push(id);
            }
        }
    }
    let fixed = |id: &[u8]| {
        let index = drawn.iter().position(|drawn| drawn == id)?;
        Some(Uuid::from_u128(0xd1_0000 + index as u128).to_bytes_le())
    };
    for file in files.iter_mut() {
        for page in file.pages().collect::<Vec<_>>() {
            let bytes = file.bytes(page, PAGE);
            for (at, window) in bytes.windows(16).enumerate() {
                if let Some(id) = fixed(window) {
                    file.write(page + at as u64, &id);
                }
            }
        }
        mend_unless(file, || false);
    }
}

/// Says something else of the file's parent.
pub fn rename_parent(file: &mut File, random: &mut Random) {
    make_locator(file, &Places::of(file), random);
    mend(file, random);
}
