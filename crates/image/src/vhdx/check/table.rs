//! The block table, entry by entry: what each says, what is wrong with it, and what it is to say instead.
//!
//! The table is read a MiB at a time, and never held as a whole: first every entry claims its place, then each is judged with all
//! claims known. Memory is a few bits for each MiB of the file, and the pages that change.

use super::claims::Claims;
use super::padded;
use crate::Result;
use crate::check::{Finding, Remedy, Report, Severity};
use crate::layer::Format;
use crate::vhdx::bat::{Entry, Geometry, State};
use crate::vhdx::format::{MIB, PAGE, PAGE_BYTES};
use crate::vhdx::header::Region;
use crate::vhdx::page::{PageBytes, WORDS};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use store::Store;

/// How much of the table is read at once, in bytes.
const STEP: u64 = MIB;
/// The most blocks that get a place of their own because they share one, and the most bytes that are copied for it.
const MAX_COPIES: usize = 4096;
const MAX_COPIED: u64 = 64 << 30;
/// Blocks that are moved are aligned like new ones.
const ALIGNMENT: u64 = 2 * MIB;
/// The bits of an entry that the format reserves.
const RESERVED_BITS: u64 = 0xF_FFF8;

/// The file that is looked at.
pub(super) struct Subject<'a> {
    /// The file as it is once its log is carried out.
    pub(super) store: &'a dyn Store,
    /// Where the table lies; large enough for the geometry.
    pub(super) region: Region,
    pub(super) geometry: Geometry,
    /// What lies in the file and is no block: in order, without overlaps.
    pub(super) fixed: Vec<(Region, &'static str)>,
    /// The metadata names a parent, whether the image says that it has one or not.
    pub(super) parent_named: bool,
}

impl Subject<'_> {
    /// Entries that are looked at: those of the disk, and what stands behind them in their last page.
    pub(super) fn entries(&self) -> u64 {
        self.geometry.entries().next_multiple_of(WORDS as u64).min(self.region.length / 8)
    }

    /// A page of the table as it lies in the file.
    pub(super) fn page(&self, page: u64) -> Result<PageBytes> {
        let bytes = padded(self.store, self.region.offset + page * PAGE_BYTES, PAGE)?;
        let mut page = Box::new([0; PAGE]);
        page.copy_from_slice(&bytes);
        Ok(page)
    }
}

/// The table with the pages that were changed.
#[derive(Debug, Default, Clone)]
pub(super) struct Pages(pub(super) BTreeMap<u64, PageBytes>);

impl Pages {
    fn get(&self, subject: &Subject<'_>, index: u64) -> Result<Entry> {
        let (page, at) = (index / WORDS as u64, (index % WORDS as u64) as usize * 8);
        let read = |bytes: &[u8]| Entry(u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
        match self.0.get(&page) {
            Some(bytes) => Ok(read(&bytes[at..at + 8])),
            None => Ok(read(&padded(subject.store, subject.region.offset + index * 8, 8)?)),
        }
    }

    fn set(&mut self, subject: &Subject<'_>, index: u64, entry: Entry) -> Result<()> {
        let (page, at) = (index / WORDS as u64, (index % WORDS as u64) as usize * 8);
        let bytes = match self.0.entry(page) {
            std::collections::btree_map::Entry::Occupied(bytes) => bytes.into_mut(),
            std::collections::btree_map::Entry::Vacant(vacant) => vacant.insert(subject.page(page)?),
        };
        bytes[at..at + 8].copy_from_slice(&entry.0.to_le_bytes());
        Ok(())
    }

    /// The entries of a step, with the changed pages laid over what is in the file.
    fn step(&self, subject: &Subject<'_>, start: u64, end: u64) -> Result<Vec<u8>> {
        let mut bytes = padded(subject.store, subject.region.offset + start, (end - start) as usize)?;
        for (page, changed) in self.0.range(start / PAGE_BYTES..end.div_ceil(PAGE_BYTES)) {
            let at = (page * PAGE_BYTES - start) as usize;
            let len = PAGE.min(bytes.len() - at);
            bytes[at..at + len].copy_from_slice(&changed[..len]);
        }
        Ok(bytes)
    }
}

/// A block's content, moved to a place of its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copy {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) len: u64,
}

/// What looking at a table comes to.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) report: Report,
    /// The table's pages as they are to be, by their numbers.
    pub(super) pages: BTreeMap<u64, PageBytes>,
    pub(super) copies: Vec<Copy>,
    /// The file is to be so long at least.
    pub(super) length: u64,
    pub(super) hopeless: Option<String>,
    /// Stretches of the file that belong to nothing; the first few.
    pub(super) holes: Vec<(u64, u64)>,
    /// Whether several blocks claim one place.
    pub(super) shared: bool,
    /// Blocks that have a place.
    pub(super) placed: u64,
    /// The first place of a block, bytes.
    pub(super) first: u64,
}

impl Outcome {
    pub(super) fn is_sound(&self) -> bool {
        self.report.clean()
    }
}

/// What is wrong with a block's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    PastEnd {
        partial: bool,
    },
    Misplaced {
        what: &'static str,
        partial: bool,
    },
    /// With another block, or with a bitmap.
    Shared {
        bitmap: bool,
    },
    Cut,
    Alone {
        parent_named: bool,
    },
    Reserved {
        state: u64,
        kept: bool,
    },
    ZeroPlaced,
    BitmapMissing,
    StalePlace,
    ReservedBits,
    Stray,
    StrayPlaced,
}

/// Faults of one sort are told apart from those of another, so that neighbours are joined.
const LANES: usize = 4;

impl Fault {
    fn lane(self) -> usize {
        match self {
            Self::PastEnd { .. } | Self::Misplaced { .. } | Self::Shared { .. } | Self::Cut => 0,
            Self::Alone { .. } | Self::Reserved { .. } | Self::ZeroPlaced => 1,
            Self::BitmapMissing => 2,
            Self::StalePlace | Self::ReservedBits | Self::Stray | Self::StrayPlaced => 3,
        }
    }

    fn is_note(self) -> bool {
        matches!(self, Self::StalePlace | Self::ReservedBits | Self::Stray)
    }

    fn kind(self) -> &'static str {
        match self {
            Self::PastEnd { .. } => "past-end",
            Self::Misplaced { .. } => "misplaced",
            Self::Shared { .. } => "shared",
            Self::Cut => "cut",
            Self::Alone { .. } => "partial-alone",
            Self::Reserved { .. } => "reserved-state",
            Self::ZeroPlaced => "zero-placed",
            Self::BitmapMissing => "bitmap-missing",
            Self::StalePlace => "stale-place",
            Self::ReservedBits => "reserved-bits",
            Self::Stray | Self::StrayPlaced => "stray-entry",
        }
    }

    fn what(self) -> String {
        match self {
            Self::PastEnd { .. } => "the place lies past the file's end".to_owned(),
            Self::Misplaced { what, .. } => format!("the place lies in {what}"),
            Self::Shared { bitmap: false } => "the place is another block's, too".to_owned(),
            Self::Shared { bitmap: true } => "the place is a bitmap's, too".to_owned(),
            Self::Cut => "the block is cut off by the file's end".to_owned(),
            Self::Alone { .. } => "the block is partly the parent's, and there is no parent".to_owned(),
            Self::Reserved { state, .. } => format!("the state {state} is none that the format knows"),
            Self::ZeroPlaced => "the block is zeros, and a place is left in its entry; Hyper-V refuses that".to_owned(),
            Self::BitmapMissing => {
                "the block is partly the parent's, and the bitmap that says which part is missing".to_owned()
            }
            Self::StalePlace => "the block is not there, and a place is left in its entry".to_owned(),
            Self::ReservedBits => "bits of the entry are set that the format reserves".to_owned(),
            Self::Stray | Self::StrayPlaced => "an entry that belongs to no block holds something".to_owned(),
        }
    }

    /// What it means for the data in `bytes` of the virtual disk.
    fn effect(self, bytes: &str) -> String {
        match self {
            Self::PastEnd { partial: true } | Self::Misplaced { partial: true, .. } => {
                format!("what this image held of {bytes} is lost; after a repair the parent's older content is there")
            }
            Self::PastEnd { .. } | Self::Misplaced { .. } => format!("{bytes} are lost; after a repair they are zeros"),
            Self::Shared { bitmap: false } => format!("{bytes} may hold another block's data"),
            Self::Shared { bitmap: true } => format!("{bytes} may hold what is none of the disk's data"),
            Self::Cut => format!("what lay behind the file's end of {bytes} is lost; after a repair it is zeros"),
            Self::Alone { .. } => format!("{bytes}: it is not known which sectors of them were written"),
            Self::Reserved { kept: true, .. } => format!("{bytes} may not be what the block held"),
            Self::Reserved { .. } => format!("{bytes} are lost; after a repair they are zeros"),
            Self::ZeroPlaced => format!("none here: {bytes} are zeros; others may refuse the image"),
            Self::BitmapMissing => {
                format!("{bytes}: it is not known which sectors are this image's and which the parent's")
            }
            Self::StalePlace | Self::ReservedBits | Self::Stray | Self::StrayPlaced => super::NO_DATA.to_owned(),
        }
    }

    /// Whether the content of the block is lost or in doubt.
    fn harms(self) -> bool {
        self.lane() != 3 && self != Self::ZeroPlaced
    }

    fn remedy(self) -> Remedy {
        let how = match self {
            Self::PastEnd { partial: true } | Self::Misplaced { partial: true, .. } => {
                "the block becomes one that is not there"
            }
            Self::PastEnd { .. } | Self::Misplaced { .. } => "the block becomes zeros",
            Self::Shared { bitmap: false } => "each of them gets a place of its own, with the same content",
            Self::Shared { bitmap: true } => {
                return super::cannot("it is not known whether data lies there or a bitmap");
            }
            Self::Cut => "the file is made longer",
            Self::Alone { parent_named: false } => "the block becomes a full one: all that lies in its place counts",
            Self::Alone { .. } => {
                return super::cannot("the metadata names a parent; the image may be a differencing one");
            }
            Self::Reserved { kept: true, .. } => "the block becomes a full one: all that lies in its place counts",
            Self::Reserved { .. } => "the block becomes zeros",
            Self::ZeroPlaced => "the place is taken out of the entry",
            Self::BitmapMissing => return super::cannot("it is written nowhere else"),
            Self::StrayPlaced => "the entry is emptied",
            Self::StalePlace | Self::ReservedBits | Self::Stray => return Remedy::Nothing,
        };
        super::mend(how)
    }
}

/// Neighbours with one fault.
#[derive(Debug)]
struct Neighbours {
    fault: Fault,
    /// Block numbers, or indices of the table for what belongs to no block.
    numbers: Range<u64>,
    /// What the first one's entry says of its place.
    at: u64,
    index: u64,
}

/// A table under examination.
struct Exam<'a> {
    subject: &'a Subject<'a>,
    file_length: u64,
    pages: Pages,
    claims: Claims,
    report: Report,
    lanes: [Option<Neighbours>; LANES],
    copies: Vec<Copy>,
    copied: u64,
    length: u64,
    /// Where the next block that is moved goes.
    free: u64,
    hopeless: Option<String>,
    placed: u64,
    first: u64,
    /// Chunks with partial blocks.
    partial: BTreeSet<u64>,
    /// The newest chunk with partial blocks that stay so, and whether its bitmap can be read.
    chunk: Option<(u64, bool)>,
}

/// Looks at the table as `pages` change it.
pub(super) fn examine(subject: &Subject<'_>, pages: Pages) -> Result<Outcome> {
    let file_length = subject.store.len()?;
    let mut exam = Exam {
        subject,
        file_length,
        pages,
        claims: Claims::default(),
        report: Report::new(Format::Vhdx),
        lanes: [const { None }; LANES],
        copies: Vec::new(),
        copied: 0,
        length: 0,
        free: file_length.next_multiple_of(ALIGNMENT.min(subject.geometry.block)),
        hopeless: None,
        placed: 0,
        first: u64::MAX,
        partial: BTreeSet::new(),
        chunk: None,
    };
    exam.walk(|exam, index, entry| {
        exam.claim(index, entry);
        Ok(())
    })?;
    if exam.claims.any_twice {
        exam.claim_bitmaps()?;
    }
    exam.walk(Exam::judge)?;
    (0..LANES).for_each(|lane| exam.tell(lane));
    Ok(exam.end())
}

impl<'a> Exam<'a> {
    /// Hands every entry that is not zero to `each`, with its index.
    fn walk(&mut self, mut each: impl FnMut(&mut Self, u64, Entry) -> Result<()>) -> Result<()> {
        let subject: &'a Subject<'a> = self.subject;
        let bytes = subject.entries() * 8;
        for start in (0..bytes).step_by(STEP as usize) {
            let step = self.pages.step(subject, start, (start + STEP).min(bytes))?;
            for (number, word) in step.chunks_exact(8).enumerate() {
                let entry = Entry(u64::from_le_bytes(word.try_into().expect("chunks of eight")));
                if entry.0 != 0 {
                    each(self, start / 8 + number as u64, entry)?;
                }
            }
        }
        Ok(())
    }

    /// Which bitmap an entry is for, if bitmaps count.
    fn chunk_of(&self, index: u64) -> Option<u64> {
        let geometry = &self.subject.geometry;
        let chunk = index / (geometry.ratio() + 1);
        (geometry.differencing && chunk < geometry.chunks() && index == geometry.bitmap_index(chunk)).then_some(chunk)
    }

    fn claim(&mut self, index: u64, entry: Entry) {
        let geometry = self.subject.geometry;
        let len = match (geometry.block_of(index), self.chunk_of(index)) {
            (Some(block), _) => {
                if geometry.differencing && entry.state() == Some(State::Partial) {
                    self.partial.insert(block / geometry.ratio());
                }
                geometry.block
            }
            (None, Some(_)) => MIB,
            (None, None) => return,
        };
        if entry.place().is_some_and(|at| at < self.file_length) {
            self.claims.claim(entry.offset(), len);
            self.placed += 1;
            self.first = self.first.min(entry.offset());
        }
    }

    /// Finds the bitmaps that are needed. A block that lies over one stays where it is.
    fn claim_bitmaps(&mut self) -> Result<()> {
        for chunk in std::mem::take(&mut self.partial) {
            let entry = self.pages.get(self.subject, self.subject.geometry.bitmap_index(chunk))?;
            if let Some(at) = entry.place().filter(|at| *at < self.file_length) {
                self.claims.bitmaps.mark(at, MIB);
            }
        }
        let len = self.subject.geometry.block;
        self.walk(|exam, index, entry| {
            let is_block = exam.subject.geometry.block_of(index).is_some();
            if let Some(at) = entry.place().filter(|at| is_block && exam.claims.bitmaps.any(*at, len)) {
                exam.claims.kept.mark(at, len);
            }
            Ok(())
        })
    }

    fn judge(&mut self, index: u64, entry: Entry) -> Result<()> {
        if let Some(block) = self.subject.geometry.block_of(index) {
            self.judge_block(index, block, entry)
        } else if let Some(chunk) = self.chunk_of(index) {
            self.judge_bitmap(index, chunk, entry)
        } else {
            self.judge_stray(index, entry)
        }
    }

    fn judge_block(&mut self, index: u64, block: u64, entry: Entry) -> Result<()> {
        let placed = entry.offset() != 0;
        match entry.state() {
            Some(state @ (State::Full | State::Partial)) => {
                self.judge_place(index, block, entry, state == State::Partial)
            }
            None => self.judge_reserved(index, block, entry),
            Some(State::NotPresent) if placed => {
                self.put(Fault::StalePlace, block, index, entry);
                Ok(())
            }
            Some(State::Zero) if placed && entry.state_number() == Entry::zero().0 => {
                self.put(Fault::ZeroPlaced, block, index, entry);
                self.set(index, Entry::zero())
            }
            Some(State::NotPresent | State::Zero) => {
                // An unmapped block may keep its place: it is its own old data, and nobody else's free space.
                if placed && entry.offset() < self.file_length {
                    self.claims.used.mark(entry.offset(), self.subject.geometry.block);
                }
                if entry.0 & RESERVED_BITS != 0 {
                    self.put(Fault::ReservedBits, block, index, entry);
                }
                Ok(())
            }
        }
    }

    /// A block in a state that has a place.
    fn judge_place(&mut self, index: u64, block: u64, entry: Entry, partial: bool) -> Result<()> {
        let Geometry { block: len, differencing, .. } = self.subject.geometry;
        let (at, needed) = (entry.offset(), self.subject.geometry.inside(block));
        let partial_here = partial && differencing;
        let lost = if at >= self.file_length {
            Some(Fault::PastEnd { partial: partial_here })
        } else {
            self.fixed_at(at, len).map(|what| Fault::Misplaced { what, partial: partial_here })
        };
        if let Some(fault) = lost {
            self.put(fault, block, index, entry);
            let left = if differencing && !partial { Entry::zero() } else { Entry(0) };
            return self.set(index, left);
        }
        let mut new = entry;
        if self.claims.any_twice && self.claims.twice.any(at, len) {
            let bitmap = self.claims.bitmaps.any(at, len);
            self.put(Fault::Shared { bitmap }, block, index, entry);
            if !bitmap {
                new = self.own_place(at, len, needed, partial);
            }
        }
        if at + needed > self.file_length {
            self.put(Fault::Cut, block, index, entry);
            self.length = self.length.max((at + needed).next_multiple_of(MIB));
        }
        if partial && !differencing {
            let parent_named = self.subject.parent_named;
            self.put(Fault::Alone { parent_named }, block, index, entry);
            if !parent_named {
                new = Entry::full(new.offset());
            }
        }
        if partial_here && !self.bitmap_is_sound(block / self.subject.geometry.ratio())? {
            self.put(Fault::BitmapMissing, block, index, entry);
        }
        if new == entry && entry.0 & RESERVED_BITS != 0 {
            self.put(Fault::ReservedBits, block, index, entry);
        }
        if new == entry { Ok(()) } else { self.set(index, new) }
    }

    /// A place for a block that shares the one at `at`: the first that comes keeps it, unless it must be left to one that shares it
    /// with a bitmap; the others get a copy.
    fn own_place(&mut self, at: u64, len: u64, needed: u64, partial: bool) -> Entry {
        let placed = |at| if partial { Entry::partial(at) } else { Entry::full(at) };
        if !self.claims.kept.any(at, len) {
            self.claims.kept.mark(at, len);
            return placed(at);
        }
        self.copied = self.copied.saturating_add(needed);
        if self.copies.len() >= MAX_COPIES || self.copied > MAX_COPIED {
            self.hopeless = Some("too many blocks share their places with others".to_owned());
            return placed(at);
        }
        let to = self.free;
        self.free = (to + len).next_multiple_of(ALIGNMENT.min(len));
        self.length = self.length.max(to + len);
        self.copies.push(Copy { from: at, to, len: needed });
        placed(to)
    }

    /// A block in a state that the format reserves. If nothing else lies in its place, that is taken for its content.
    fn judge_reserved(&mut self, index: u64, block: u64, entry: Entry) -> Result<()> {
        let Geometry { block: len, .. } = self.subject.geometry;
        let at = entry.offset();
        let inside = at.checked_add(self.subject.geometry.inside(block)).is_some_and(|end| end <= self.file_length);
        let kept = at != 0 && inside && self.fixed_at(at, len).is_none() && !self.claims.used.any(at, len);
        if kept {
            self.claims.used.mark(at, len);
        }
        self.put(Fault::Reserved { state: entry.state_number(), kept }, block, index, entry);
        self.set(index, if kept { Entry::full(at) } else { Entry::zero() })
    }

    /// What of the format's own lies somewhere in `len` bytes at `at`.
    fn fixed_at(&self, at: u64, len: u64) -> Option<&'static str> {
        let next = self.subject.fixed.partition_point(|(region, _)| region.end() <= at);
        let (region, name) = self.subject.fixed.get(next)?;
        (region.offset < at.saturating_add(len)).then_some(*name)
    }

    fn bitmap_is_sound(&mut self, chunk: u64) -> Result<bool> {
        if let Some((known, sound)) = self.chunk
            && known == chunk
        {
            return Ok(sound);
        }
        let entry = self.pages.get(self.subject, self.subject.geometry.bitmap_index(chunk))?;
        let sound = entry.place().is_some_and(|at| self.bitmap_fault(at).is_none());
        self.chunk = Some((chunk, sound));
        Ok(sound)
    }

    /// Why a bitmap cannot lie at `at`.
    fn bitmap_fault(&self, at: u64) -> Option<Fault> {
        if at >= self.file_length {
            Some(Fault::PastEnd { partial: true })
        } else if let Some(what) = self.fixed_at(at, MIB) {
            Some(Fault::Misplaced { what, partial: true })
        } else {
            self.claims.twice.any(at, MIB).then_some(Fault::Shared { bitmap: false })
        }
    }

    /// A bitmap's entry. That a partial block lacks its bitmap is said with the block.
    fn judge_bitmap(&mut self, index: u64, chunk: u64, entry: Entry) -> Result<()> {
        let Some(at) = entry.place() else {
            self.put(Fault::Stray, index, index, entry);
            return Ok(());
        };
        // The chunk's blocks stand before its bitmap: if any needs it, it was asked for by now.
        let needed = self.chunk.is_some_and(|(newest, _)| newest == chunk);
        let place =
            format!("the bitmap of blocks from {} on, entry {index}, at {at}", chunk * self.subject.geometry.ratio());
        let damage = |kind, what: &str, effect: &str, remedy| {
            super::finding(Severity::Damage, kind, &place, what, effect, remedy)
        };
        if let Some(fault) = self.bitmap_fault(at) {
            if needed {
                let effect = "the blocks that need it are named one by one";
                let remedy = super::cannot("what it said is written nowhere else");
                self.report.add(damage(fault.kind(), &fault.what(), effect, remedy));
                return Ok(());
            }
            let remedy = super::mend("the entry is emptied; no block needs it");
            self.report.add(damage(fault.kind(), &fault.what(), super::NO_DATA, remedy));
            return self.set(index, Entry(0));
        }
        if at + MIB > self.file_length {
            let effect = "sectors whose bits lay behind the file's end show the parent's content after a repair";
            let remedy = super::mend("the file is made longer");
            self.report.add(damage("cut", "the bitmap is cut off by the file's end", effect, remedy));
            self.length = self.length.max(at + MIB);
        }
        if entry.state() == Some(State::Partial) {
            let (what, remedy) = ("the state 7 is none of a bitmap's", super::mend("the state becomes 6"));
            self.report.add(damage("reserved-state", what, super::NO_DATA, remedy));
            return self.set(index, Entry::full(at));
        }
        Ok(())
    }

    /// An entry that is for nothing. Only in a differencing image do others look at it.
    fn judge_stray(&mut self, index: u64, entry: Entry) -> Result<()> {
        let in_the_way =
            |at: u64| at >= self.file_length || self.fixed_at(at, MIB).is_some() || self.claims.used.any(at, MIB);
        match entry.place().filter(|_| self.subject.geometry.differencing) {
            Some(at) if in_the_way(at) || at + MIB > self.file_length => {
                self.put(Fault::StrayPlaced, index, index, entry);
                self.set(index, Entry(0))
            }
            Some(at) => {
                self.claims.used.mark(at, MIB);
                self.put(Fault::Stray, index, index, entry);
                Ok(())
            }
            None => {
                self.put(Fault::Stray, index, index, entry);
                Ok(())
            }
        }
    }

    fn set(&mut self, index: u64, entry: Entry) -> Result<()> {
        self.pages.set(self.subject, index, entry)
    }

    /// Takes a fault down; it is told when it is known how far it goes.
    fn put(&mut self, fault: Fault, number: u64, index: u64, entry: Entry) {
        let lane = fault.lane();
        match &mut self.lanes[lane] {
            Some(last) if last.fault == fault && last.numbers.end == number => last.numbers.end += 1,
            _ => {
                self.tell(lane);
                self.lanes[lane] = Some(Neighbours { fault, numbers: number..number + 1, at: entry.offset(), index });
            }
        }
    }

    /// Reports what a lane holds.
    fn tell(&mut self, lane: usize) {
        let Some(Neighbours { fault, numbers, at, index }) = self.lanes[lane].take() else { return };
        let stray = matches!(fault, Fault::Stray | Fault::StrayPlaced);
        let place = match (stray, numbers.end - numbers.start) {
            (true, 1) => format!("entry {index}"),
            (true, _) => format!("entries {} to {}", numbers.start, numbers.end - 1),
            (false, 1) => format!("block {}, entry {index}, at {at}", numbers.start),
            (false, _) => format!("blocks {} to {}, from entry {index} on", numbers.start, numbers.end - 1),
        };
        let Geometry { block, size, .. } = self.subject.geometry;
        let bytes = numbers.start * block..(numbers.end * block).min(size);
        self.report.add(Finding {
            severity: if fault.is_note() { Severity::Note } else { Severity::Damage },
            kind: fault.kind(),
            place,
            what: fault.what(),
            effect: if stray {
                super::NO_DATA.to_owned()
            } else {
                fault.effect(&format!("bytes {} to {}", bytes.start, bytes.end - 1))
            },
            ranges: if fault.harms() { vec![bytes] } else { Vec::new() },
            remedy: fault.remedy(),
        });
    }

    fn end(mut self) -> Outcome {
        for (region, _) in &self.subject.fixed {
            self.claims.used.mark(region.offset, region.length.min(self.file_length));
        }
        let (mut holes, mut leaked) = (Vec::new(), 0);
        for hole in self.claims.used.holes(self.file_length) {
            leaked += hole.1;
            if holes.len() < 8 {
                holes.push(hole);
            }
        }
        if leaked > 0 {
            let what = format!("{leaked} bytes of the file belong to nothing");
            let effect = "none: they are used when the image grows";
            let place = format!("{} bytes from {} on", holes[0].1, holes[0].0);
            self.report.add(super::finding(Severity::Note, "unused", &place, &what, effect, Remedy::Nothing));
        }
        Outcome {
            report: self.report,
            pages: self.pages.0,
            copies: self.copies,
            length: self.length,
            hopeless: self.hopeless,
            holes,
            shared: self.claims.any_twice,
            placed: self.placed,
            first: self.first,
        }
    }
}
