//! Where bytes lie: reading the table and the bitmaps, without a lock.

use super::Inner;
use super::format::SECTOR;
use crate::layer::{Kind, Run, Source, push_run};
use crate::{ErrorKind, Result};
use std::ops::Range;

/// A stretch of one block: offsets count from the block's beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) block: u64,
    pub(crate) bytes: Range<u64>,
}

impl Piece {
    /// The sectors that it covers, counted from its block's first.
    pub(crate) fn sectors(&self) -> Range<u64> {
        self.bytes.start / SECTOR..self.bytes.end / SECTOR
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }
}

impl Inner {
    /// Refuses a range that is not inside the disk or not made of sectors.
    pub(crate) fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let aligned = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        let size = self.geometry().size;
        if aligned && offset.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(self.error(ErrorKind::Invalid, format!("{len} bytes at {offset} are no sectors of a disk of {size} bytes")))
    }

    /// The range, block by block.
    pub(crate) fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> + use<> {
        let (size, end) = (self.shape.block, offset + len);
        let blocks = if len == 0 { 0..0 } else { offset / size..(end - 1) / size + 1 };
        blocks.map(move |block| {
            let start = block * size;
            Piece { block, bytes: offset.max(start) - start..end.min(start + size) - start }
        })
    }

    /// Where the data of a block begins whose bitmap begins at `place`.
    pub(crate) fn data_at(&self, place: u64) -> u64 {
        place + self.shape.bitmap()
    }

    /// Loads the bitmap of a block that lies at `place`.
    pub(crate) fn load_bitmap(&self, block: u64, place: u64) -> Result<()> {
        if !self.bitmaps.is_loaded(block) {
            let mut bytes = vec![0; self.shape.bitmap() as usize];
            self.store.read_at(&mut bytes, place)?;
            self.bitmaps.load(block, &bytes);
        }
        Ok(())
    }

    /// See [`crate::Layer::map`].
    pub(crate) fn map(&self, offset: u64, len: u64, out: &mut Vec<Run>) -> Result<()> {
        self.check_range(offset, len)?;
        let first = out.len();
        if self.shape.kind == Kind::Fixed {
            out.extend((len > 0).then_some(Run { offset, len, source: Source::Data(offset) }));
            return Ok(());
        }
        for piece in self.pieces(offset, len) {
            let offset = piece.block * self.shape.block + piece.bytes.start;
            let mut push = |run| push_run(out, first, run);
            match self.bat.get(piece.block) {
                None => push(Run { offset, len: piece.len(), source: Source::Absent }),
                Some(place) if self.shape.differencing() => self.map_partial(&piece, place, push)?,
                Some(place) => {
                    let source = Source::Data(self.data_at(place) + piece.bytes.start);
                    push(Run { offset, len: piece.len(), source });
                }
            }
        }
        Ok(())
    }

    fn map_partial(&self, piece: &Piece, place: u64, mut push: impl FnMut(Run)) -> Result<()> {
        self.load_bitmap(piece.block, place)?;
        let sectors = piece.sectors();
        let mut at = sectors.start;
        while at < sectors.end {
            let (present, count) = self.bitmaps.run(piece.block, &(at..sectors.end));
            let start = at * SECTOR;
            let source = if present { Source::Data(self.data_at(place) + start) } else { Source::Absent };
            push(Run { offset: piece.block * self.shape.block + start, len: count * SECTOR, source });
            at += count;
        }
        Ok(())
    }
}
