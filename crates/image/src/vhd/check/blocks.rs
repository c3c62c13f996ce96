//! The block table against the file: where blocks lie, and what their bitmaps say.

use super::{Exam, Header, NO_DATA, cannot, mend, padded};
use crate::Result;
use crate::check::{Finding, Remedy, Severity};
use crate::vhd::bat::{Bat, Geometry};
use crate::vhd::footer::Found;
use crate::vhd::format::{HEADER_BYTES, SECTOR};
use crate::vhd::open::load_table;
use crate::vhd::resize::held;
use std::collections::BTreeSet;
use std::ops::Range;

/// Data that does not begin at multiples of this makes the host read before it writes.
const ALIGNMENT: u64 = 4096;
/// The most ranges of the disk that one finding names.
const MOST_RANGES: usize = 256;

/// What is wrong with a single block's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    PastEnd,
    OverHeader,
    OverTable,
}

/// A block that has a place.
#[derive(Debug, Clone, Copy)]
struct Placed {
    at: u64,
    block: u64,
}

/// Whether a sector's bit is set in its block's bitmap.
fn is_set(bits: &[u8], sector: u64) -> bool {
    bits[(sector / 8) as usize] & 0x80 >> (sector % 8) != 0
}

/// Neighbouring blocks with the same fault.
struct Neighbours {
    fault: Fault,
    blocks: Range<u64>,
    /// Of the first of them.
    at: u64,
}

impl Exam {
    /// Checks the block table and what it says of the file.
    pub(super) fn table(&mut self, found: &Found, header: &Header, geometry: &Geometry) -> Result<()> {
        let table = header.raw.table_offset.get();
        let bat = load_table(&*self.store, table, geometry)?;
        let limit = found.tail.unwrap_or(self.length);
        let (placed, cut) = self.single(&bat, header, geometry, limit);
        self.cut_off(&cut, &placed, header, geometry, limit)?;
        self.over_locators(&placed, header, geometry);
        // A table may name more blocks than the file can hold: their bitmaps are not read one by one.
        if !self.shared(&placed, geometry) {
            self.bitmaps(&placed, geometry)?;
        }
        let fixed = [0..SECTOR, header.at..header.at + HEADER_BYTES, table..table + geometry.table()];
        self.space(&placed, fixed.into_iter().chain(header.locators.iter().cloned()), geometry, limit);
        Ok(())
    }

    /// Looks at each block by itself; those that lie where they can, in the order of their places, and those that are cut off by the
    /// file's end.
    fn single(&mut self, bat: &Bat, header: &Header, geometry: &Geometry, limit: u64) -> (Vec<Placed>, Vec<Placed>) {
        let table = header.raw.table_offset.get();
        let (table, header_place) = (table..table + geometry.table(), header.at..header.at + HEADER_BYTES);
        let (mut good, mut cut, mut changed, mut last) = (Vec::new(), Vec::new(), BTreeSet::new(), None::<Neighbours>);
        for block in 0..geometry.blocks() {
            let Some(at) = bat.get(block) else { continue };
            let end = at + geometry.bitmap() + geometry.inside(block);
            let over = |place: &Range<u64>| at < place.end && place.start < end;
            let fault = if at < SECTOR || header_place.contains(&at) {
                Fault::OverHeader
            } else if at + geometry.bitmap() >= limit {
                Fault::PastEnd
            } else if over(&table) || over(&header_place) {
                Fault::OverTable
            } else {
                let list = if end > limit { &mut cut } else { &mut good };
                list.push(Placed { at, block });
                continue;
            };
            self.doubt = true;
            if matches!(fault, Fault::PastEnd | Fault::OverHeader) {
                changed.insert(bat.clear(block));
            }
            match &mut last {
                Some(last) if last.fault == fault && last.blocks.end == block => last.blocks.end += 1,
                _ => {
                    let before = last.replace(Neighbours { fault, blocks: block..block + 1, at });
                    self.tell(before, geometry);
                }
            }
        }
        self.tell(last, geometry);
        for sector in changed {
            self.plan.write(table.start + sector * SECTOR, bat.sector(sector));
        }
        good.sort_by_key(|placed| placed.at);
        (good, cut)
    }

    /// Reports blocks that are cut off by the file's end. If nothing else lies over them they get the rest of their places back.
    fn cut_off(
        &mut self,
        cut: &[Placed],
        good: &[Placed],
        header: &Header,
        geometry: &Geometry,
        limit: u64,
    ) -> Result<()> {
        let place = |placed: &Placed| held(geometry, placed.block, placed.at);
        let is_alone = |index: usize| {
            let whole = place(&cut[index]);
            let others = good.iter().chain(&cut[..index]).chain(&cut[index + 1..]).map(place);
            let over = |other: Range<u64>| other.start < whole.end && whole.start < other.end;
            !others.chain(header.locators.iter().cloned()).any(over)
        };
        let (remedy, end) = match (0..cut.len()).all(is_alone) {
            true => (
                mend("the file is made longer again: what is lost reads as zeros"),
                cut.iter().map(|block| block.at + geometry.bitmap() + geometry.block).max(),
            ),
            false => (cannot("something else lies over it, and which of them is good is not known"), None),
        };
        if let Some(end) = end {
            self.plan.grow(end);
            if limit < self.length {
                // The footer, which lies in the block and goes behind it: up to where it goes, for writes do not overlap.
                let behind = self.length.min(end.next_multiple_of(SECTOR));
                self.plan.write(limit, vec![0; (behind - limit) as usize]);
            }
        }
        (self.cut, self.regrown) = (!cut.is_empty() && end.is_none(), end);
        self.doubt |= !cut.is_empty();
        for block in cut {
            let lost = self.lost(block, geometry, limit)?;
            let effect = match (lost.first(), lost.last()) {
                (Some(first), Some(last)) => {
                    format!("of bytes {} to {} of the disk what was written is lost", first.start, last.end - 1)
                }
                _ => "none: what lay behind the end is the parent's".to_owned(),
            };
            self.report.add(Finding {
                severity: Severity::Damage,
                kind: "cut",
                place: format!("block {}, at {}", block.block, block.at),
                what: "it is cut off by the end of the file".to_owned(),
                effect,
                ranges: lost,
                remedy: remedy.clone(),
            });
        }
        Ok(())
    }

    /// The bytes of the disk that a block held behind the file's end. Where its bits are clear the parent has them.
    fn lost(&self, placed: &Placed, geometry: &Geometry, limit: u64) -> Result<Vec<Range<u64>>> {
        let start = placed.block * geometry.block;
        let behind = limit.saturating_sub(placed.at + geometry.bitmap())..geometry.inside(placed.block);
        if !geometry.differencing() {
            return Ok(std::iter::once(start + behind.start..start + behind.end).collect());
        }
        let bits = padded(&*self.store, placed.at, geometry.bitmap() as usize)?;
        let mut lost: Vec<Range<u64>> = Vec::new();
        for sector in (behind.start / SECTOR..behind.end / SECTOR).filter(|sector| is_set(&bits, *sector)) {
            let bytes = start + (sector * SECTOR).max(behind.start)..start + (sector + 1) * SECTOR;
            let room = lost.len() < MOST_RANGES;
            match lost.last_mut() {
                Some(last) if last.end == bytes.start => last.end = bytes.end,
                _ if room => lost.push(bytes),
                _ => break,
            }
        }
        Ok(lost)
    }

    /// Reports a fault of single blocks.
    fn tell(&mut self, neighbours: Option<Neighbours>, geometry: &Geometry) {
        let Some(Neighbours { fault, blocks, at }) = neighbours else { return };
        let bytes = blocks.start * geometry.block..(blocks.end * geometry.block).min(geometry.size);
        let absent = if geometry.differencing() {
            "the block loses its place: its bytes read as the parent's"
        } else {
            "the block loses its place: its bytes read as zeros"
        };
        let (kind, what, remedy) = match fault {
            Fault::PastEnd => ("past-end", "its place lies past the end of the file", mend(absent)),
            Fault::OverHeader => ("misplaced", "its place lies in a header", mend(absent)),
            Fault::OverTable => {
                let why = "most of it may be good, or the table may be: it is not thrown away";
                ("misplaced", "it lies over the block table or the header", cannot(why))
            }
        };
        let place = if blocks.end - blocks.start == 1 {
            format!("block {}, at {at}", blocks.start)
        } else {
            format!("blocks {} to {}", blocks.start, blocks.end - 1)
        };
        let doubt = if matches!(fault, Fault::OverTable) { "in doubt" } else { "lost" };
        self.report.add(Finding {
            severity: Severity::Damage,
            kind,
            place,
            what: what.to_owned(),
            effect: format!("bytes {} to {} of the disk are {doubt}", bytes.start, bytes.end - 1),
            ranges: vec![bytes],
            remedy,
        });
    }

    /// Blocks that lie over each other; whether there are any.
    fn shared(&mut self, placed: &[Placed], geometry: &Geometry) -> bool {
        let mut any = false;
        let end = |placed: &Placed| placed.at + geometry.bitmap() + geometry.inside(placed.block);
        let mut start = 0;
        while start < placed.len() {
            let (mut next, mut reach) = (start + 1, end(&placed[start]));
            while let Some(other) = placed.get(next).filter(|other| other.at < reach) {
                reach = reach.max(end(other));
                next += 1;
            }
            if next - start > 1 {
                any = true;
                self.tell_shared(&placed[start..next], geometry);
            }
            start = next;
        }
        any
    }

    fn tell_shared(&mut self, together: &[Placed], geometry: &Geometry) {
        self.doubt = true;
        // What a writer does that forgets the bitmaps.
        let steps = together.windows(2).all(|pair| pair[1].at - pair[0].at == geometry.block);
        let what = if steps {
            "their places lie a block apart, without room for the bitmaps: each lies over the next one"
        } else {
            "blocks lie over each other"
        };
        let mut blocks: Vec<u64> = together.iter().map(|placed| placed.block).collect();
        blocks.sort_unstable();
        let named: Vec<_> = blocks.iter().take(8).map(u64::to_string).collect();
        let more = if blocks.len() > 8 { format!(" and {} more", blocks.len() - 8) } else { String::new() };
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for bytes in blocks.iter().map(|block| block * geometry.block..block * geometry.block + geometry.inside(*block))
        {
            let room = ranges.len() < MOST_RANGES;
            match ranges.last_mut() {
                Some(last) if last.end == bytes.start => last.end = bytes.end,
                _ if room => ranges.push(bytes),
                _ => break,
            }
        }
        self.report.add(Finding {
            severity: Severity::Damage,
            kind: "overlap",
            place: format!("blocks {}{more}, from {} on", named.join(", "), together[0].at),
            what: what.to_owned(),
            effect: "what was written to one of them last is in the others, too".to_owned(),
            ranges,
            remedy: cannot("which of them the bytes belong to is not known"),
        });
    }

    /// Blocks that lie over what a parent locator says.
    fn over_locators(&mut self, placed: &[Placed], header: &Header, geometry: &Geometry) {
        for locator in &header.locators {
            let over = |placed: &&Placed| {
                let end = placed.at + geometry.bitmap() + geometry.inside(placed.block);
                placed.at < locator.end && locator.start < end
            };
            let Some(Placed { at, block }) = placed.iter().find(over).copied() else { continue };
            self.doubt = true;
            let place = format!("block {block}, at {at}");
            let what = format!("it lies over a parent locator, at {}", locator.start);
            let effect = "the block, or what says where the parent is, was written over";
            self.damage("overlap", &place, &what, effect, cannot("it is not known which of them is good"));
        }
    }

    fn bitmaps(&mut self, placed: &[Placed], geometry: &Geometry) -> Result<()> {
        let (mut unaligned, mut clear) = (0u64, 0u64);
        for Placed { at, block } in placed {
            unaligned += u64::from(!(at + geometry.bitmap()).is_multiple_of(ALIGNMENT));
            let bits = padded(&*self.store, *at, geometry.bitmap() as usize)?;
            let is_set = |sector: u64| is_set(&bits, sector);
            let inside = geometry.inside(*block) / SECTOR;
            if geometry.differencing() {
                if (inside..geometry.block_sectors()).any(is_set) {
                    let place = format!("the bitmap of block {block}, at {at}");
                    self.note("stray-bits", &place, "bits behind the end of the disk are set", NO_DATA);
                }
            } else {
                let whole = (inside / 8) as usize;
                let all = bits[..whole].iter().all(|byte| *byte == 0xFF) && (whole as u64 * 8..inside).all(is_set);
                clear += u64::from(!all);
            }
        }
        if unaligned > 0 {
            let what = format!("the data of {unaligned} blocks does not begin at a multiple of 4096 bytes");
            self.note("unaligned", "the blocks", &what, "none for the data; writing is slow");
        }
        if clear > 0 {
            let what = format!("the bitmaps of {clear} blocks are not all ones");
            self.note(
                "bitmap",
                "the bitmaps",
                &what,
                "none here; some programs read sectors whose bit is clear as zeros",
            );
        }
        Ok(())
    }

    /// Space in which a block would fit and that belongs to nothing.
    fn space(&mut self, placed: &[Placed], fixed: impl Iterator<Item = Range<u64>>, geometry: &Geometry, limit: u64) {
        let whole = geometry.bitmap() + geometry.block;
        let blocks = placed.iter().map(|placed| placed.at..placed.at + whole);
        let mut used: Vec<_> = fixed.chain(blocks).collect();
        used.sort_by_key(|place| place.start);
        self.end = used.iter().map(|place| place.end).max().unwrap_or(0).min(self.length);
        used.push(limit..limit);
        let (mut at, mut leaked, mut first) = (0, 0, None);
        for place in used {
            if place.start >= at + whole {
                leaked += place.start - at;
                first = first.or(Some(at));
            }
            at = at.max(place.end);
        }
        if let Some(first) = first {
            let what = format!("{leaked} bytes of the file belong to nothing");
            let effect = "none: they may be used when the image grows";
            self.add(Severity::Note, "unused", &format!("from {first} on"), &what, effect, Remedy::Nothing);
        }
    }
}
