//! VHDX: everything in any place, all states of blocks, and a log that ends at any entry.
//!
//! A file has a history: versions of what it holds, each one log entry after the one before. Data goes to places that no version
//! before exposed. The file is what it is when the log has been written up to some entry: pages in their places are as old as the
//! entry's tail allows, or newer.

use super::{Canvas, Forged, Held, Order, Sector};
use crate::dice::Dice;
use image::Kind;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use store::Store;
use uuid::{Uuid, uuid};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

const BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");
const PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const LOGICAL: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
const PHYSICAL: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
const LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");
const LOCATOR_TYPE: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");
/// An item that real files have and nobody needs: the geometry that some tools write.
const CHS: Uuid = uuid!("da02d7bc-6d2a-4b2a-a4c3-9c8a7d5b2d1f");

/// How a version of a block stands in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// State and, in some states, an old place that counts for nothing.
    Placeless(u64, Option<usize>),
    Full(usize),
    Partial(usize),
}

/// Pages of metadata by their file offsets.
type Pages = BTreeMap<u64, Vec<u8>>;

fn put(pages: &mut Pages, at: u64, bytes: &[u8]) {
    let first = (PAGE - at % PAGE).min(bytes.len() as u64) as usize;
    let (here, rest) = bytes.split_at(first);
    let page = pages.entry(at / PAGE * PAGE).or_insert_with(|| vec![0; PAGE as usize]);
    page[(at % PAGE) as usize..][..first].copy_from_slice(here);
    if !rest.is_empty() {
        put(pages, at + first as u64, rest);
    }
}

fn seal(bytes: &mut [u8]) {
    let sum = crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&bytes[..4]), &[0; 4]), &bytes[8..]);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// A part of the file whose place is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Log,
    Metadata,
    Table,
    /// A region that nobody knows.
    Other,
    /// A block's place.
    Place(usize),
    /// A chunk's bitmap.
    Bitmap(u64),
}

struct Forge<'a> {
    order: &'a Order,
    dice: &'a mut Dice,
    /// Every version of what is held.
    versions: Vec<Held>,
    forms: Vec<BTreeMap<u64, Form>>,
    /// The block of each place.
    places: Vec<u64>,
    parts: BTreeMap<u64, Part>,
    /// Bits that count for nothing are set.
    junk: bool,
}

pub(crate) fn forge(store: &dyn Store, order: &Order, dice: &mut Dice) -> Forged {
    let mut forge = Forge {
        order,
        versions: vec![order.draw(dice)],
        forms: Vec::new(),
        places: Vec::new(),
        parts: BTreeMap::new(),
        junk: dice.one_in(2),
        dice,
    };
    let log = order.logs && forge.dice.one_in(2);
    let steps = if log { forge.dice.below(6) } else { 0 };
    forge.live(steps);
    forge.write(store, log)
}

impl Forge<'_> {
    /// The history: each version changes some blocks of the one before.
    fn live(&mut self, steps: u64) {
        self.form();
        let fixed = self.order.kind == Kind::Fixed;
        for step in 0..steps {
            let mut next = self.versions.last().expect("the first").clone();
            let blocks = self.order.touched();
            for _ in 0..if fixed { 0 } else { self.dice.below(4) } {
                if self.dice.one_in(8) {
                    // Nothing is left: whole pages of the table become zeros.
                    next.clear();
                }
                let block = self.dice.pick(&blocks);
                let stamp = self.order.stamp + 1 + step as u32;
                let drawn = self.order.draw_block(block, stamp, self.dice);
                let old = next.entry(block).or_insert_with(|| vec![Sector::Nothing; drawn.len()]);
                if self.dice.one_in(3) {
                    *old = drawn;
                } else {
                    // More sectors of the same block.
                    for (old, new) in old.iter_mut().zip(drawn).filter(|(old, _)| **old == Sector::Nothing) {
                        *old = new;
                    }
                }
            }
            self.versions.push(next);
            self.form();
        }
    }

    /// Finds forms for the newest version: a block whose exposed sectors stay may stay where it is.
    fn form(&mut self) {
        let version = self.versions.len() - 1;
        let mut forms = BTreeMap::new();
        let blocks: Vec<u64> = match self.order.kind {
            Kind::Fixed => (0..self.order.blocks()).collect(),
            _ => self.versions[version].keys().copied().collect(),
        };
        for block in blocks {
            let before = version.checked_sub(1).and_then(|before| {
                let form = *self.forms[before].get(&block)?;
                Some((form, self.versions[before][&block].clone()))
            });
            let nothing = vec![Sector::Nothing; (self.order.inside(block) / self.order.sector) as usize];
            let now = self.versions[version].get(&block).cloned().unwrap_or(nothing);
            let form = match &before {
                Some((form, old)) if *old == now => *form,
                _ => self.draw_form(block, &now, before),
            };
            forms.insert(block, form);
        }
        self.forms.push(forms);
    }

    fn draw_form(&mut self, block: u64, now: &[Sector], before: Option<(Form, Vec<Sector>)>) -> Form {
        let differencing = self.order.differencing();
        let all = |sector| now.iter().all(|found| *found == sector);
        let whole = now.iter().all(|found| *found != Sector::Nothing);
        let fixed = self.order.kind == Kind::Fixed;
        let old_place = match before {
            Some((Form::Full(place) | Form::Partial(place), _)) => Some(place),
            Some((Form::Placeless(_, anchor), _)) => anchor,
            None => None,
        };
        if !fixed && all(Sector::Nothing) && (differencing || self.dice.one_in(2)) {
            return Form::Placeless(0, None);
        }
        if !fixed && (all(Sector::Zeros) || all(Sector::Nothing)) && !self.dice.one_in(5) {
            // What is undefined or unmapped may keep a place.
            let state = self.dice.pick(&[1, 2, 3]);
            return Form::Placeless(state, old_place.filter(|_| state != 2));
        }
        let stays = before.and_then(|(form, old)| {
            let place = match form {
                Form::Full(place) | Form::Partial(place) => place,
                Form::Placeless(..) => return None,
            };
            // In a full block everything is exposed, as zeros if nothing was written.
            let exposed = |sector: Sector| sector != Sector::Nothing || matches!(form, Form::Full(_));
            old.iter().zip(now).all(|(old, now)| !exposed(*old) || old == now).then_some(place)
        });
        let place = stays.unwrap_or_else(|| {
            self.places.push(block);
            self.places.len() - 1
        });
        if !differencing || (whole && !self.dice.one_in(3)) { Form::Full(place) } else { Form::Partial(place) }
    }

    fn ratio(&self) -> u64 {
        (1 << 23) * self.order.sector / self.order.block
    }

    /// Where a part lies.
    fn at(&self, part: Part) -> u64 {
        *self.parts.iter().find(|(_, found)| **found == part).expect("placed").0
    }

    /// The chunks that have a bitmap in any version.
    fn chunks(&self) -> Vec<u64> {
        let partial = self.forms.iter().flatten().filter(|(_, form)| matches!(form, Form::Partial(_)));
        let mut chunks: Vec<u64> = partial.map(|(block, _)| block / self.ratio()).collect();
        chunks.sort_unstable();
        chunks.dedup();
        chunks
    }

    fn entries(&self) -> u64 {
        let blocks = self.order.blocks();
        match self.order.differencing() {
            true => blocks.div_ceil(self.ratio()) * (self.ratio() + 1),
            false => blocks + (blocks - 1) / self.ratio(),
        }
    }

    /// Finds places for all parts, and says where the file ends.
    fn lay_out(&mut self) -> u64 {
        let mut parts = vec![Part::Log, Part::Metadata, Part::Table];
        let mut data: Vec<_> = (0..self.places.len()).map(Part::Place).collect();
        data.extend(self.chunks().into_iter().map(Part::Bitmap));
        self.dice.shuffle(&mut data);
        parts.extend(data);
        if self.dice.one_in(3) {
            parts.push(Part::Other);
        }
        if self.dice.one_in(2) {
            self.dice.shuffle(&mut parts);
        }
        let mut at = MIB;
        for part in parts {
            if self.dice.one_in(4) {
                at += MIB * (1 + self.dice.below(3));
            }
            self.parts.insert(at, part);
            at += self.length(part);
        }
        at
    }

    fn length(&self, part: Part) -> u64 {
        match part {
            Part::Place(_) => self.order.block,
            Part::Table => (self.entries() * 8).next_multiple_of(MIB),
            Part::Log | Part::Metadata | Part::Other | Part::Bitmap(_) => MIB,
        }
    }

    /// The table and the bitmaps of a version.
    fn pages(&self, version: usize) -> Pages {
        let mut pages = Pages::new();
        let (table, ratio) = (self.at(Part::Table), self.ratio());
        let spot = |place: usize| self.at(Part::Place(place));
        let forms = &self.forms[version];
        let chunks: Vec<u64> = self.chunks();
        for (block, form) in forms {
            let entry = match form {
                Form::Placeless(state, anchor) => state | anchor.map_or(0, spot),
                Form::Full(place) => 6 | spot(*place),
                Form::Partial(place) => 7 | spot(*place),
            };
            put(&mut pages, table + (block + block / ratio) * 8, &entry.to_le_bytes());
            if !chunks.contains(&(block / ratio)) {
                continue;
            }
            let bitmap = self.at(Part::Bitmap(block / ratio));
            let sectors = (self.order.block / self.order.sector) as usize;
            let mut bits = vec![0_u8; sectors / 8];
            let held = self.versions[version].get(block).filter(|_| matches!(form, Form::Partial(_)));
            let inside = (self.order.inside(*block) / self.order.sector) as usize;
            for index in 0..sectors {
                let set = match held.map(|held| held.get(index)) {
                    Some(Some(sector)) => *sector != Sector::Nothing,
                    // Past the end of the disk, or of a block whose bits do not count.
                    _ => self.junk && (index >= inside || index % 3 == 0),
                };
                if set {
                    bits[index / 8] |= 1 << (index % 8);
                }
            }
            put(&mut pages, bitmap + block % ratio * sectors as u64 / 8, &bits);
        }
        for chunk in chunks {
            let needed = |block: &u64, form: &Form| block / ratio == chunk && matches!(form, Form::Partial(_));
            let bitmap = self.at(Part::Bitmap(chunk));
            // It is there from the first version that needs it on. Before that, anything may lie in its place.
            if self.forms[..=version].iter().flatten().any(|(block, form)| needed(block, form)) {
                put(&mut pages, table + (chunk * (ratio + 1) + ratio) * 8, &(6 | bitmap).to_le_bytes());
            } else if self.junk {
                put(&mut pages, bitmap, &vec![0xFF; MIB as usize]);
            }
        }
        pages
    }

    fn write(&mut self, store: &dyn Store, log: bool) -> Forged {
        let end = self.lay_out();
        let mut canvas = Canvas::new(store);
        let mut begun = BTreeSet::new();
        for (held, forms) in self.versions.iter().zip(&self.forms) {
            for (block, form) in forms {
                let (Form::Full(place) | Form::Partial(place)) = form else { continue };
                let Some(sectors) = held.get(block) else { continue };
                // What no version shows of a place is full of junk, if the parent's is to be seen there.
                let junk = begun.insert(*place) && self.junk && self.order.differencing();
                self.order.put_block(&mut canvas, self.at(Part::Place(*place)), *block, sectors, junk);
            }
        }
        let last = self.versions.len() - 1;
        let pages: Vec<Pages> = (0..=last).map(|version| self.pages(version)).collect();
        let log_id = if log { Uuid::new_v4() } else { Uuid::nil() };
        let entries = if log { self.history(&pages, log_id, end) } else { Vec::new() };
        let cut = if log { self.dice.within(1..entries.len() as u64 + 1) as usize } else { last };
        let oldest = if log { entries[cut - 1].tail - 1 } else { cut };
        self.put_pages(&mut canvas, &pages, oldest..cut + 1);
        let region = self.metadata();
        canvas.put(self.at(Part::Metadata), &region);
        let end = self.file_end(&canvas, end, log);
        let ring = self.ring(&entries, cut, end);
        canvas.put(self.at(Part::Log), &ring);
        let wounded = self.put_head(&mut canvas, log_id);
        store.set_len(end).expect("length");
        Forged { held: self.versions[cut.min(last)].clone(), log, wounded }
    }

    /// Where the file ends: a last block may be cut off behind the end of the disk; and where a log promises that the file is longer,
    /// zeros may be missing.
    fn file_end(&mut self, canvas: &Canvas<'_>, end: u64, log: bool) -> u64 {
        if log && !self.order.plain && self.dice.one_in(3) {
            let structures = [Part::Log, Part::Metadata, Part::Table].map(|part| self.at(part) + self.length(part));
            let least = structures.into_iter().max().expect("some").max(canvas.end.next_multiple_of(PAGE));
            let other = self.parts.iter().find(|(_, part)| **part == Part::Other).map_or(0, |(at, _)| at + MIB);
            return least.max(other).min(end);
        }
        match self.parts.iter().next_back() {
            Some((at, Part::Place(place))) if !self.order.plain && self.dice.one_in(2) => {
                at + self.order.inside(self.places[*place])
            }
            _ => end,
        }
    }

    /// The entries that lead from version to version, the first being that of version 1.
    fn history(&mut self, pages: &[Pages], id: Uuid, end: u64) -> Vec<Entry> {
        let first = self.dice.below(1 << 31) << 25 | 1;
        let table = self.at(Part::Table)..self.at(Part::Table) + self.length(Part::Table);
        let mut entries = Vec::new();
        let mut tail = 1;
        for version in 1..pages.len() {
            tail = self.dice.within(tail as u64..version as u64 + 1) as usize;
            let mut changed = Pages::new();
            for (at, page) in &pages[version] {
                let again = table.contains(at) && self.dice.one_in(8);
                if pages[version - 1].get(at) != Some(page) || again {
                    changed.insert(*at, page.clone());
                }
            }
            for at in pages[version - 1].keys().filter(|at| !pages[version].contains_key(at)) {
                changed.insert(*at, vec![0; PAGE as usize]);
            }
            entries.push(Entry { id, sequence: first + version as u64, tail, pages: changed, length: end });
        }
        if entries.is_empty() {
            // One without descriptors, as Windows begins a log with.
            entries.push(Entry { id, sequence: first, tail: 1, pages: Pages::new(), length: end });
        }
        entries
    }

    /// Puts pages in their places, as any of these versions has them.
    fn put_pages(&mut self, canvas: &mut Canvas<'_>, pages: &[Pages], versions: Range<usize>) {
        let all: BTreeSet<u64> = pages.iter().flat_map(|pages| pages.keys().copied()).collect();
        for at in all {
            let version = self.dice.within(versions.start as u64..versions.end as u64) as usize;
            if let Some(page) = pages[version.min(pages.len() - 1)].get(&at) {
                canvas.put(at, page);
            }
        }
    }

    /// The log, written up to the entry `cut`, counted from 1; of the next one a torn part; and what older logs left.
    fn ring(&mut self, entries: &[Entry], cut: usize, file_length: u64) -> Vec<u8> {
        let mut ring = vec![0; MIB as usize];
        let first = entries.first().map_or(1000, |entry| entry.sequence);
        let ids = [Uuid::new_v4(), entries.first().map_or(Uuid::from_u128(5), |entry| entry.id)];
        for id in ids {
            let sequence = first.saturating_sub(20).max(1);
            let nonsense = BTreeMap::from([(self.at(Part::Table), vec![0xDD; PAGE as usize])]);
            let stale = Entry { id, sequence, tail: 1, pages: nonsense, length: file_length };
            let at = self.dice.below(MIB / PAGE) * PAGE;
            place(&mut ring, at, &stale.encode(at, file_length));
        }
        let mut at = self.dice.below(MIB / PAGE) * PAGE;
        let mut starts = Vec::new();
        let mut room = MIB;
        for (index, entry) in entries.iter().enumerate().take(cut + 1) {
            starts.push(at);
            let mut bytes = entry.encode(starts[entry.tail - 1], file_length);
            if index == cut {
                let torn = self.dice.below(bytes.len() as u64 / PAGE) * PAGE;
                bytes[(torn + self.dice.below(PAGE)) as usize] ^= 0x40;
                if self.dice.one_in(2) {
                    bytes.truncate((torn + PAGE) as usize);
                }
            }
            room = room.checked_sub(bytes.len() as u64).expect("a log of short entries");
            place(&mut ring, at, &bytes);
            at = (at + bytes.len() as u64) % MIB;
        }
        ring
    }

    /// The metadata region.
    fn metadata(&mut self) -> Vec<u8> {
        let order = self.order;
        let flags = u32::from(order.kind == Kind::Fixed) | if order.differencing() { 2 } else { 0 };
        let parameters = [(order.block as u32).to_le_bytes(), flags.to_le_bytes()].concat();
        let mut items = vec![
            (PARAMETERS, 4_u32, parameters),
            (SIZE, 6, order.size.to_le_bytes().to_vec()),
            (DISK_ID, 6, Uuid::new_v4().to_bytes_le().to_vec()),
            (LOGICAL, 6, (order.sector as u32).to_le_bytes().to_vec()),
            (PHYSICAL, 6, 4096_u32.to_le_bytes().to_vec()),
        ];
        if let Some((id, name)) = &order.parent {
            items.push((LOCATOR, 4, locator(*id, name)));
        }
        if self.dice.one_in(3) {
            items.push((CHS, 2, vec![7; 8]));
        }
        self.dice.shuffle(&mut items);
        let mut region = vec![0; MIB as usize];
        region[..8].copy_from_slice(b"metadata");
        region[10..12].copy_from_slice(&(items.len() as u16).to_le_bytes());
        let mut at = 64 * KIB;
        for (index, (id, flags, bytes)) in items.iter().enumerate() {
            at += self.dice.below(3) * 8;
            let entry = &mut region[32 + index * 32..][..32];
            entry[..16].copy_from_slice(&id.to_bytes_le());
            entry[16..20].copy_from_slice(&(at as u32).to_le_bytes());
            entry[20..24].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
            entry[24..28].copy_from_slice(&flags.to_le_bytes());
            region[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
            at += bytes.len() as u64;
        }
        region
    }

    /// Identifier, headers, region tables. Says whether one of them is destroyed.
    fn put_head(&mut self, canvas: &mut Canvas<'_>, log: Uuid) -> bool {
        let creator = "forged".encode_utf16().flat_map(u16::to_le_bytes);
        canvas.put(0, &b"vhdxfile".iter().copied().chain(creator).collect::<Vec<_>>());
        let sequence = 1 + self.dice.below(1000);
        let header = |sequence: u64, data_write: Uuid, log: Uuid| {
            let mut bytes = vec![0; PAGE as usize];
            bytes[..4].copy_from_slice(b"head");
            bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
            bytes[16..32].copy_from_slice(&Uuid::new_v4().to_bytes_le());
            bytes[32..48].copy_from_slice(&data_write.to_bytes_le());
            bytes[48..64].copy_from_slice(&log.to_bytes_le());
            bytes[66] = 1;
            bytes[68..72].copy_from_slice(&(MIB as u32).to_le_bytes());
            bytes[72..80].copy_from_slice(&self.at(Part::Log).to_le_bytes());
            seal(&mut bytes);
            bytes
        };
        let current = header(sequence, Uuid::new_v4(), log);
        // The other one is older, and says what it likes; or it is the same.
        let other = header(sequence - 1, Uuid::new_v4(), Uuid::new_v4());
        let other = if self.dice.one_in(4) { current.clone() } else { other };
        let wound = if self.order.plain { 9 } else { self.dice.below(12) };
        let mut slots = [64 * KIB, 128 * KIB];
        self.dice.shuffle(&mut slots);
        canvas.put(slots[0], &current);
        if wound != 0 {
            canvas.put(slots[1], &other);
        }
        let mut regions = vec![(BAT, Part::Table), (METADATA, Part::Metadata)];
        let required = self.dice.below(2) as u32;
        if self.parts.values().any(|part| *part == Part::Other) {
            regions.push((Uuid::from_u128(77), Part::Other));
        }
        self.dice.shuffle(&mut regions);
        let mut table = vec![0; 64 * KIB as usize];
        table[..4].copy_from_slice(b"regi");
        table[8..12].copy_from_slice(&(regions.len() as u32).to_le_bytes());
        for (index, (id, part)) in regions.iter().enumerate() {
            let entry = &mut table[16 + index * 32..][..32];
            entry[..16].copy_from_slice(&id.to_bytes_le());
            entry[16..24].copy_from_slice(&self.at(*part).to_le_bytes());
            entry[24..28].copy_from_slice(&(self.length(*part) as u32).to_le_bytes());
            entry[28..32].copy_from_slice(&(if *part == Part::Other { 0 } else { required }).to_le_bytes());
        }
        seal(&mut table);
        for (index, at) in [192 * KIB, 256 * KIB].into_iter().enumerate() {
            if wound != 1 + index as u64 {
                canvas.put(at, &table);
            }
        }
        wound < 3
    }
}

/// A log entry, and the number of the entry that its tail is, counted from 1.
#[derive(Debug, Clone)]
struct Entry {
    id: Uuid,
    sequence: u64,
    tail: usize,
    pages: BTreeMap<u64, Vec<u8>>,
    /// How long the file is to be.
    length: u64,
}

impl Entry {
    fn encode(&self, tail: u64, file_length: u64) -> Vec<u8> {
        let (mut descriptors, mut sectors) = (Vec::new(), Vec::new());
        let mut describe = |signature: &[u8; 4], trailing: &[u8], leading: &[u8], at: u64| {
            descriptors.extend_from_slice(signature);
            descriptors.extend_from_slice(trailing);
            descriptors.extend_from_slice(leading);
            descriptors.extend_from_slice(&at.to_le_bytes());
            descriptors.extend_from_slice(&self.sequence.to_le_bytes());
        };
        for (at, len) in self.zeros() {
            describe(b"zero", &[0; 4], &len.to_le_bytes(), at);
        }
        for (at, page) in self.pages.iter().filter(|(_, page)| !is_zeros(page)) {
            let (body, trailing) = page.split_at(PAGE as usize - 4);
            describe(b"desc", trailing, &body[..8], *at);
            sectors.extend_from_slice(b"data");
            sectors.extend_from_slice(&((self.sequence >> 32) as u32).to_le_bytes());
            sectors.extend_from_slice(&body[8..]);
            sectors.extend_from_slice(&(self.sequence as u32).to_le_bytes());
        }
        let head = (64 + descriptors.len()).next_multiple_of(PAGE as usize);
        let mut bytes = vec![0; 64];
        bytes[..4].copy_from_slice(b"loge");
        bytes[8..12].copy_from_slice(&((head + sectors.len()) as u32).to_le_bytes());
        bytes[12..16].copy_from_slice(&(tail as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..28].copy_from_slice(&(descriptors.len() as u32 / 32).to_le_bytes());
        bytes[32..48].copy_from_slice(&self.id.to_bytes_le());
        bytes[48..56].copy_from_slice(&file_length.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.length.to_le_bytes());
        bytes.extend(descriptors);
        bytes.resize(head, 0);
        bytes.extend(sectors);
        seal(&mut bytes);
        bytes
    }

    /// Stretches that become zeros: at and length. Other pages of the entry that lie between are written over them.
    fn zeros(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut since = 0;
        let mut next = 0;
        for (at, page) in &self.pages {
            if *at != next {
                since = *at;
            }
            next = at + PAGE;
            match runs.last_mut() {
                Some((start, len)) if is_zeros(page) && *start >= since => *len = next - *start,
                _ if is_zeros(page) => runs.push((*at, PAGE)),
                _ => (),
            }
        }
        runs
    }
}

fn is_zeros(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// Puts bytes into a ring.
fn place(ring: &mut [u8], at: u64, bytes: &[u8]) {
    let len = ring.len();
    for (index, byte) in bytes.iter().enumerate() {
        ring[(at as usize + index) % len] = *byte;
    }
}

/// A parent locator as Windows writes it.
fn locator(id: Uuid, name: &str) -> Vec<u8> {
    let texts = [
        ("parent_linkage", id.braced().to_string().to_uppercase()),
        ("relative_path", format!(r".\{name}")),
        ("absolute_win32_path", format!(r"D:\somewhere\else\{name}")),
        ("volume_path", format!(r"\\?\Volume{{26A21BDA-A627-11D7-9931-806E6F6E6963}}\{name}")),
        ("parent_linkage2", Uuid::nil().braced().to_string()),
    ];
    let mut item = LOCATOR_TYPE.to_bytes_le().to_vec();
    item.extend([0, 0]);
    item.extend((texts.len() as u16).to_le_bytes());
    let mut heap: Vec<u8> = Vec::new();
    for (key, value) in &texts {
        let mut add = |text: &str| {
            let at = (20 + texts.len() * 12 + heap.len()) as u32;
            let before = heap.len();
            heap.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
            (at, (heap.len() - before) as u16)
        };
        let ((key_at, key_len), (value_at, value_len)) = (add(key), add(value));
        item.extend(key_at.to_le_bytes());
        item.extend(value_at.to_le_bytes());
        item.extend(key_len.to_le_bytes());
        item.extend(value_len.to_le_bytes());
    }
    item.extend(heap);
    item
}
