//! Where bytes lie: reading the table and the bitmaps, without a lock.

use super::Inner;
use super::bat::{Entry, State};
use super::bitmap::BitmapPage;
use super::format::{PAGE, PAGE_BYTES};
use crate::layer::{Run, Source, push_run};
use crate::{Error, ErrorKind, Result};
use std::ops::Range;

/// A stretch of one block: offsets count from the block's beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) block: u64,
    pub(crate) bytes: Range<u64>,
}

impl Inner {
    /// Refuses a range that is not inside the disk or not made of sectors.
    pub(crate) fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let geometry = self.geometry();
        let aligned = offset.is_multiple_of(geometry.sector) && len.is_multiple_of(geometry.sector);
        if aligned && offset.checked_add(len).is_some_and(|end| end <= geometry.size) {
            return Ok(());
        }
        Err(self.error(
            ErrorKind::Invalid,
            format!("{len} bytes at {offset} are no sectors of a disk of {} bytes", geometry.size),
        ))
    }

    /// The range, block by block.
    pub(crate) fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> + use<> {
        let (size, end) = (self.geometry().block, offset + len);
        let blocks = if len == 0 { 0..0 } else { offset / size..(end - 1) / size + 1 };
        blocks.map(move |block| {
            let start = block * size;
            Piece { block, bytes: offset.max(start) - start..end.min(start + size) - start }
        })
    }

    /// The sectors that a piece covers, counted from its block's first.
    pub(crate) fn sectors(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start / self.geometry().sector..bytes.end / self.geometry().sector
    }

    /// The block's entry as it stands now.
    pub(crate) fn entry(&self, block: u64) -> Entry {
        self.bat.get(self.geometry().payload_index(block))
    }

    /// Loads the bitmap pages of these sectors. Pages of a bitmap block that has no place yet are zeros.
    pub(crate) fn load_bitmaps(&self, block: u64, sectors: &Range<u64>) -> Result<()> {
        for at in self.bitmaps.pages(block, sectors) {
            if self.bitmaps.is_loaded(at) {
                continue;
            }
            let mut bytes = [0; PAGE];
            if let Some(place) = self.bitmap_place(at.chunk) {
                self.store.read_at(&mut bytes, place + at.page * PAGE_BYTES)?;
            }
            self.bitmaps.load(at, &bytes);
        }
        Ok(())
    }

    /// Where a chunk's bitmap block lies.
    pub(crate) fn bitmap_place(&self, chunk: u64) -> Option<u64> {
        self.bat.get(self.geometry().bitmap_index(chunk)).place()
    }

    /// Where a bitmap page lies.
    pub(crate) fn bitmap_page_place(&self, at: BitmapPage) -> Option<u64> {
        self.bitmap_place(at.chunk).map(|place| place + at.page * PAGE_BYTES)
    }

    /// See [`crate::Layer::map`].
    pub(crate) fn map(&self, offset: u64, len: u64, out: &mut Vec<Run>) -> Result<()> {
        self.check_range(offset, len)?;
        let first = out.len();
        for piece in self.pieces(offset, len) {
            let virtual_offset = piece.block * self.geometry().block + piece.bytes.start;
            let length = piece.bytes.end - piece.bytes.start;
            let entry = self.entry(piece.block);
            let mut push = |run| push_run(out, first, run);
            match entry.state() {
                Some(State::NotPresent) => push(Run { offset: virtual_offset, len: length, source: Source::Absent }),
                Some(State::Zero) => push(Run { offset: virtual_offset, len: length, source: Source::Zero }),
                Some(State::Full) => {
                    let source = Source::Data(entry.offset() + piece.bytes.start);
                    push(Run { offset: virtual_offset, len: length, source });
                }
                Some(State::Partial) => self.map_partial(&piece, entry.offset(), push)?,
                None => return Err(self.bad_state(piece.block, entry)),
            }
        }
        Ok(())
    }

    fn map_partial(&self, piece: &Piece, place: u64, mut push: impl FnMut(Run)) -> Result<()> {
        let sectors = self.sectors(&piece.bytes);
        self.load_bitmaps(piece.block, &sectors)?;
        let mut at = sectors.start;
        while at < sectors.end {
            let (present, count) = self.bitmaps.run(piece.block, &(at..sectors.end));
            let start = at * self.geometry().sector;
            let source = if present { Source::Data(place + start) } else { Source::Absent };
            push(Run {
                offset: piece.block * self.geometry().block + start,
                len: count * self.geometry().sector,
                source,
            });
            at += count;
        }
        Ok(())
    }

    pub(crate) fn bad_state(&self, block: u64, entry: Entry) -> Error {
        let state = entry.state_number();
        self.error(ErrorKind::Damaged, format!("block {block} is in state {state}, which is reserved here"))
    }
}
