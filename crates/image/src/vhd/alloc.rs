//! Places for new blocks: always at the end, before a footer that keeps moving away.
//!
//! ```text
//!   … block │ block │ grown ahead of need: zeros …   │footer│
//!                   ▲ next                           ▲ footer_at
//! ```
//!
//! When the file has to grow, the footer is written behind its new end first, and the old one stays where it was, in the
//! padding before the next block: there is a whole footer at every moment, and the copy at the file's beginning besides.

use super::bat::MAX_PLACE;
use super::footer::Footer;
use super::format::SECTOR;
use crate::{Error, ErrorKind, Result};
use std::ops::Range;
use store::Store;

/// Data starts at multiples of this, bytes: a guest's 4 KiB write is one of the host's. (Multiples of a block would double the
/// file's length, for each block has its bitmap before it.)
const ALIGNMENT: u64 = 4096;
/// A file grows by an eighth of itself, but not by more than this at once.
const MAX_STEP: u64 = 1 << 30;
/// Smaller gaps are forgotten: every block has one before it.
const MIN_GAP: u64 = ALIGNMENT;

/// A place that was handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// File offset in bytes.
    pub(crate) at: u64,
    /// Whether old bytes may lie there; else it reads as zeros.
    pub(crate) stale: bool,
}

/// The file's free space.
///
/// Invariant: from `fresh` on the file reads as zeros, but for footers, and no footer's place is handed out.
#[derive(Debug)]
pub(crate) struct Space {
    /// Where the footer lies that the file ends with.
    footer_at: u64,
    /// The end of everything that is used.
    next: u64,
    /// Below, old bytes may lie.
    fresh: u64,
    /// Places of blocks that are not used.
    returned: Vec<u64>,
    /// What else is free, in order; headers go there.
    gaps: Vec<Range<u64>>,
    /// Bytes of a bitmap and of a block.
    block: (u64, u64),
}

impl Space {
    /// Space for blocks with bitmaps, in a file whose used part ends at `end` and whose footer is at `footer_at`.
    pub(crate) fn new(footer_at: u64, end: u64, bitmap: u64, block: u64) -> Self {
        let block = (bitmap, block);
        Self { footer_at, next: end, fresh: footer_at, returned: Vec::new(), gaps: Vec::new(), block }
    }

    /// Makes what lies between the stretches of `used` free: what a crash left behind, or room that was kept. Before the table, at
    /// `front`, small gaps count too: a header goes there.
    pub(crate) fn with_gaps(mut self, mut used: Vec<Range<u64>>, front: u64) -> Self {
        used.sort_unstable_by_key(|place| place.start);
        let mut at = 0;
        for place in used {
            if place.start >= at + MIN_GAP || (at < place.start && place.start <= front) {
                self.gaps.push(at..place.start);
            }
            at = at.max(place.end.next_multiple_of(SECTOR));
        }
        self
    }

    /// The same space when something else is used. The file has not changed.
    pub(crate) fn around(&self, used: Vec<Range<u64>>, front: u64) -> Self {
        let end = used.iter().map(|place| place.end).max().unwrap_or(0).next_multiple_of(SECTOR);
        let (bitmap, block) = self.block;
        // What was handed out may have been written.
        let fresh = self.fresh.max(self.next);
        Self { fresh, ..Self::new(self.footer_at, end, bitmap, block) }.with_gaps(used, front)
    }

    /// Whether there is room for a header of `length` bytes before `front`.
    pub(crate) fn has_room(&self, length: u64, front: u64) -> bool {
        self.gaps.iter().any(|gap| gap.end - gap.start >= length && gap.end <= front)
    }

    /// Takes a place for a block and its bitmap out of a gap.
    fn carve(&mut self) -> Option<u64> {
        let (bitmap, block) = self.block;
        let fits = |gap: &&mut Range<u64>| Self::fit(gap.start, bitmap) + bitmap + block <= gap.end;
        let gap = self.gaps.iter_mut().find(fits)?;
        let at = Self::fit(gap.start, bitmap);
        gap.start = at + bitmap + block;
        Some(at)
    }

    /// A place for a header of `length` bytes, whole sectors. `footer` is written if the file has to grow.
    pub(crate) fn header(&mut self, store: &dyn Store, footer: &Footer, length: u64) -> Result<u64> {
        let Some(gap) = self.gaps.iter_mut().find(|gap| gap.end - gap.start >= length) else {
            return Ok(self.place(store, footer, 0, length)?.at);
        };
        let at = gap.start;
        gap.start += length;
        Ok(at)
    }

    /// Takes back what a header occupied.
    pub(crate) fn give_header(&mut self, places: &[Range<u64>]) {
        self.gaps.extend_from_slice(places);
        self.gaps.sort_by_key(|gap| gap.start);
        self.gaps.dedup_by(|next, gap| {
            let joins = next.start <= gap.end;
            if joins {
                gap.end = gap.end.max(next.end);
            }
            joins
        });
    }

    /// The end of everything that was handed out.
    pub(crate) fn end(&self) -> u64 {
        self.next
    }

    /// Where the footer lies that the file ends with.
    pub(crate) fn footer_at(&self) -> u64 {
        self.footer_at
    }

    /// The place, at `from` or behind, of something whose first `head` bytes stand before an aligned rest.
    fn fit(from: u64, head: u64) -> u64 {
        (from + head).next_multiple_of(ALIGNMENT) - head
    }

    /// Whether data that begins at `at` is where we would put it.
    pub(crate) fn is_aligned(at: u64) -> bool {
        at.is_multiple_of(ALIGNMENT)
    }

    /// Places for blocks with their bitmaps between the stretches of `used`, the lowest first: aligned, or at any sector.
    pub(crate) fn holes(mut used: Vec<Range<u64>>, bitmap: u64, block: u64, aligned: bool) -> Vec<u64> {
        let fit = |from: u64| if aligned { Self::fit(from, bitmap) } else { from };
        used.sort_unstable_by_key(|place| place.start);
        let (mut holes, mut at) = (Vec::new(), 0);
        for place in used {
            let mut hole = fit(at);
            while hole + bitmap + block <= place.start {
                holes.push(hole);
                hole = fit(hole + bitmap + block);
            }
            at = at.max(place.end.next_multiple_of(SECTOR));
        }
        holes
    }

    /// A place for a block and its bitmap. `footer` is written if the file has to grow. If it cannot, nothing has changed.
    pub(crate) fn block(&mut self, store: &dyn Store, footer: &Footer) -> Result<Place> {
        if let Some(at) = self.returned.pop().or_else(|| self.carve()) {
            return Ok(Place { at, stale: true });
        }
        let (bitmap, block) = self.block;
        self.place(store, footer, bitmap, block)
    }

    /// Takes back places of blocks that nobody uses any more.
    pub(crate) fn give(&mut self, places: impl IntoIterator<Item = u64>) {
        self.returned.extend(places);
    }

    /// A place for `head` and `body` bytes, both whole sectors, of which the body is aligned.
    pub(crate) fn place(&mut self, store: &dyn Store, footer: &Footer, head: u64, body: u64) -> Result<Place> {
        let length = head + body;
        let mut at = Self::fit(self.next, head);
        if at + length > self.footer_at {
            // Not over the footer: until another one is durable it is the file's.
            at = Self::fit(self.next.max(self.footer_at + SECTOR), head);
        }
        if at > MAX_PLACE {
            let message = "it cannot grow any more: the places of a VHD end at 2 TiB";
            return Err(Error::new(ErrorKind::Unsupported, store.name(), message));
        }
        if at + length > self.footer_at {
            self.grow(store, footer, at + length)?;
        }
        self.next = at + length;
        Ok(Place { at, stale: at < self.fresh })
    }

    /// Moves the footer to `need` or behind.
    fn grow(&mut self, store: &dyn Store, footer: &Footer, need: u64) -> Result<()> {
        let (bitmap, block) = self.block;
        let stride = Self::fit(need, bitmap) + bitmap + block - need;
        let steps = (self.footer_at / 8).min(MAX_STEP) / stride;
        match self.move_footer(store, footer, need + steps * stride) {
            Err(error) if error.kind == ErrorKind::NoSpace && steps > 0 => self.move_footer(store, footer, need),
            result => result,
        }
    }

    /// Makes the file reach `need`: no further, unlike what grows for blocks. The footer is not synced.
    pub(crate) fn reach(&mut self, store: &dyn Store, footer: &Footer, need: u64) -> Result<()> {
        if need <= self.footer_at {
            return Ok(());
        }
        // Not over the old one: the file's end has a whole footer at every moment.
        self.move_footer(store, footer, need.max((self.footer_at + SECTOR).next_multiple_of(SECTOR)))
    }

    fn move_footer(&mut self, store: &dyn Store, footer: &Footer, at: u64) -> Result<()> {
        if let Err(error) = store.write_at(footer.bytes(), at) {
            // A part of a footer must not be the file's end.
            store.set_len(self.footer_at + SECTOR)?;
            return Err(error.into());
        }
        self.footer_at = at;
        Ok(())
    }

    /// Cuts the file behind `end`: the footer is written there, and durable, before that. The space is of no use afterwards, but for a
    /// fixed disk, which has none.
    pub(crate) fn trim(&mut self, store: &dyn Store, footer: &Footer, end: u64) -> Result<()> {
        let at = end.next_multiple_of(SECTOR);
        // Not over a part of the old one: it counts until the new one is durable.
        if at + SECTOR > self.footer_at {
            return Ok(());
        }
        store.write_at(footer.bytes(), at)?;
        store.sync()?;
        store.set_len(at + SECTOR)?;
        self.footer_at = at;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Kind;
    use store::sim::Sim;
    use uuid::Uuid;

    const BLOCK: u64 = 2 << 20;

    fn footer() -> Footer {
        Footer::new(Kind::Dynamic, 1 << 40, Uuid::nil(), 512)
    }

    #[test]
    fn blocks_are_aligned_and_the_footer_is_always_behind() {
        let store = Sim::new().root().create("disk").unwrap();
        let mut space = Space::new(2048, 2048, 512, BLOCK);
        let mut end = 2048;
        for _ in 0..40 {
            let footer_before = space.footer_at();
            let place = space.block(&*store, &footer()).unwrap();
            assert!((place.at + 512).is_multiple_of(ALIGNMENT) && place.at >= end && place.at < end + 5000);
            assert!(!place.stale && (place.at > footer_before || place.at + 512 + BLOCK <= footer_before));
            end = place.at + 512 + BLOCK;
            assert!(end <= space.footer_at());
            assert_eq!(store.len().unwrap(), space.footer_at() + 512);
        }
        assert!(space.footer_at() > end);
        space.trim(&*store, &footer(), end).unwrap();
        assert_eq!(store.len().unwrap(), end + 512);
    }

    #[test]
    fn a_file_that_cannot_grow_keeps_its_footer() {
        let sim = Sim::new();
        let store = sim.root().create("disk").unwrap();
        store.write_at(footer().bytes(), 2048).unwrap();
        let mut space = Space::new(2048, 2048, 512, BLOCK);
        sim.set_capacity(Some(0));
        assert_eq!(space.block(&*store, &footer()).unwrap_err().kind, ErrorKind::NoSpace);
        assert_eq!((store.len().unwrap(), space.footer_at()), (2560, 2048));
        sim.set_capacity(None);
        space.block(&*store, &footer()).unwrap();
    }

    #[test]
    fn headers_take_turns_in_the_room_that_is_kept() {
        let store = Sim::new().root().create("disk").unwrap();
        let mut space = Space::new(8192, 8192, 512, BLOCK).with_gaps(vec![8192..8704, 0..2560], 8192);
        let first = space.header(&*store, &footer(), 2560).unwrap();
        assert_eq!(first, 2560);
        space.give_header(&[512..1536, 1536..2560]);
        assert_eq!(space.header(&*store, &footer(), 2560).unwrap(), 5120);
        space.give_header(std::slice::from_ref(&(2560..5120)));
        assert_eq!(space.header(&*store, &footer(), 2560).unwrap(), 512);
        assert_eq!(space.header(&*store, &footer(), 8192).unwrap(), 12288, "behind the footer if there is no room");
        assert_eq!(store.len().unwrap(), 12288 + 8192 + 512);
    }

    #[test]
    fn what_a_crash_left_is_used_again() {
        let store = Sim::new().root().create("disk").unwrap();
        let used = vec![0..100 * 512, 2 * BLOCK..4 * BLOCK];
        let mut space = Space::new(4 * BLOCK, 4 * BLOCK, 512, BLOCK).with_gaps(used, 100 * 512);
        let place = space.block(&*store, &footer()).unwrap();
        assert!(place.stale && place.at + 512 + BLOCK <= 2 * BLOCK && (place.at + 512).is_multiple_of(ALIGNMENT));
        assert!(!space.block(&*store, &footer()).unwrap().stale);
    }

    #[test]
    fn holes_are_found_between_what_is_used() {
        let used = || vec![5 * BLOCK..6 * BLOCK, 0..2048, 2048 + 2 * (BLOCK + 512)..2048 + 2 * (BLOCK + 512) + 512];
        let anywhere = Space::holes(used(), 512, BLOCK, false);
        assert_eq!(anywhere[..2], [2048, 2048 + BLOCK + 512]);
        let aligned = Space::holes(used(), 512, BLOCK, true);
        assert_eq!((aligned[0], aligned.len()), (4096 - 512, anywhere.len() - 1));
        assert!(aligned.iter().all(|at| Space::is_aligned(at + 512) && at + 512 + BLOCK <= 5 * BLOCK));
    }

    #[test]
    fn places_end_where_entries_end() {
        let store = Sim::new().root().create("disk").unwrap();
        let mut space = Space::new(MAX_PLACE - 5000, MAX_PLACE - 5000, 512, BLOCK);
        assert!(space.block(&*store, &footer()).is_ok());
        assert_eq!(space.block(&*store, &footer()).unwrap_err().kind, ErrorKind::Unsupported);
    }
}
