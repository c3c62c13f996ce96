//! What has been sent, kept where it outlives the process: who takes the lending over must send the rest, and nothing twice (QEMU breaks off over a page
//! that comes twice).
//!
//! ```text
//!   record: number u32 │ block u16 │ which of the 16 pages u16 │ cluster u64          little-endian, 16 bytes
//! ```
//!
//! A piece of pages is recorded, then sent, with its number; QEMU answers with the number when it has taken it in, which is recorded before the
//! answer is taken off the socket. So of the last piece alone it may not be known whether it was sent. Who takes over asks QEMU for one more
//! answer: if that of the last piece has not come before it, it was not.

use super::CLUSTER;
use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use store::Store;
use zerocopy::byteorder::{LittleEndian, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The block of a record that says that a piece has arrived.
const ARRIVED: u16 = u16::MAX;
/// The number of the pages that QEMU itself has said it has.
const KNOWN: u32 = 0;

/// A file in which it is recorded. It need not outlive the host.
#[derive(Debug, Clone)]
pub struct Trail {
    file: Arc<dyn Store>,
    end: Arc<AtomicU64>,
}

/// Pages of one cluster that were sent together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) number: u32,
    block: u16,
    pages: u16,
    cluster: u64,
}

/// What a trail says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// Pieces that have certainly been sent.
    pub(super) sent: Vec<Piece>,
    /// One of which this is not known.
    pub(super) last: Option<Doubt>,
}

/// A piece that may have been sent or not, and where its record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doubt {
    at: u64,
    pub(super) piece: Piece,
}

impl Piece {
    /// These pages of a block, all of one cluster.
    pub(super) fn new(number: u32, block: usize, pages: impl IntoIterator<Item = u64>) -> Self {
        let mut piece = Self { number, block: block as u16, pages: 0, cluster: 0 };
        for page in pages {
            piece.cluster = page / CLUSTER;
            piece.pages |= 1 << (page % CLUSTER);
        }
        piece
    }

    /// The pages of a block that QEMU says it has: a bit each, those of a cluster in two bytes.
    pub(super) fn known(block: usize, bits: &[u8]) -> impl Iterator<Item = Self> {
        let pages = |two: &[u8]| two.iter().rev().fold(0, |pages, byte| pages << 8 | u16::from(*byte));
        let piece = move |(cluster, two)| Self { number: KNOWN, block: block as u16, pages: pages(two), cluster };
        (0..).zip(bits.chunks(CLUSTER as usize / 8)).map(piece).filter(|piece| piece.pages != 0)
    }

    pub(super) fn block(self) -> usize {
        self.block.into()
    }

    pub(super) fn pages(self) -> impl Iterator<Item = u64> {
        (0..CLUSTER).filter(move |page| self.pages >> page & 1 == 1).map(move |page| self.cluster * CLUSTER + page)
    }
}

impl Trail {
    /// A trail in `file`, which is empty or was written by another.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Stream`] if the file cannot be looked at.
    pub fn new(file: Arc<dyn Store>) -> Result<Self> {
        let len = file.len().map_err(failed)?;
        // A record that was not written whole is of a piece that was never sent.
        let end = len / RECORD as u64 * RECORD as u64;
        Ok(Self { file, end: Arc::new(end.into()) })
    }

    /// These pages are about to be sent.
    pub(super) fn sending(&self, piece: Piece) -> Result<()> {
        self.append(piece)
    }

    /// A piece has arrived.
    pub(super) fn arrived(&self, number: u32) -> Result<()> {
        self.append(Piece { number, block: ARRIVED, pages: 0, cluster: 0 })
    }

    /// QEMU itself tells what it has: the trail begins anew with that ([`Piece::known`]).
    pub(super) fn begin_anew(&self) -> Result<()> {
        self.file.set_len(0).map_err(failed)?;
        self.end.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// The last piece was not sent.
    pub(super) fn forget(&self, Doubt { at, piece }: Doubt) -> Result<()> {
        let unsent = Piece { pages: 0, ..piece };
        self.file.write_at(RawRecord::from(unsent).as_bytes(), at).map_err(failed)
    }

    fn append(&self, piece: Piece) -> Result<()> {
        let at = self.end.fetch_add(RECORD as u64, Ordering::Relaxed);
        self.file.write_at(RawRecord::from(piece).as_bytes(), at).map_err(failed)
    }

    /// Reads it.
    pub(super) fn read(&self) -> Result<Told> {
        let mut bytes = vec![0; self.end.load(Ordering::Relaxed) as usize];
        self.file.read_at(&mut bytes, 0).map_err(failed)?;
        let records = <[RawRecord]>::ref_from_bytes(&bytes).unwrap_or_default();
        let (mut told, mut arrived) = (Told::default(), KNOWN);
        for (at, record) in (0..).step_by(RECORD).zip(records) {
            let piece = Piece::from(record);
            if piece.block == ARRIVED {
                arrived = arrived.max(piece.number);
            } else if let Some(before) = told.last.replace(Doubt { at, piece }) {
                told.sent.push(before.piece);
            }
        }
        told.sent.extend(told.last.take_if(|last| last.piece.number <= arrived).map(|last| last.piece));
        Ok(told)
    }
}

/// As it lies in the file.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecord {
    number: U32<LittleEndian>,
    block: U16<LittleEndian>,
    pages: U16<LittleEndian>,
    cluster: U64<LittleEndian>,
}

/// Bytes in a record.
const RECORD: usize = size_of::<RawRecord>();

impl From<Piece> for RawRecord {
    fn from(Piece { number, block, pages, cluster }: Piece) -> Self {
        Self { number: number.into(), block: block.into(), pages: pages.into(), cluster: cluster.into() }
    }
}

impl From<&RawRecord> for Piece {
    fn from(raw: &RawRecord) -> Self {
        let RawRecord { number, block, pages, cluster } = raw;
        Self { number: number.get(), block: block.get(), pages: pages.get(), cluster: cluster.get() }
    }
}

fn failed(error: store::Error) -> Error {
    Error {
        source: Some(Box::new(error)),
        ..Error::new(crate::ErrorKind::Stream, "what was sent of the memory cannot be recorded")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::sim::Sim;

    fn trail(disk: &Sim) -> Trail {
        let file = disk.root().open("trail", store::Mode::Write).or_else(|_| disk.root().create("trail"));
        Trail::new(file.unwrap()).unwrap()
    }

    #[test]
    fn the_last_piece_is_in_doubt_until_it_has_arrived() {
        let disk = Sim::new();
        let (first, second) = (Piece::new(1, 0, [3, 5]), Piece::new(2, 7, [1 << 40]));
        let mut ours = trail(&disk);
        assert_eq!(ours.read().unwrap(), Told::default());
        ours.sending(first).unwrap();
        ours.sending(second).unwrap();
        ours.arrived(1).unwrap();
        assert_eq!(first.pages().collect::<Vec<_>>(), [3, 5]);
        assert_eq!(second.pages().collect::<Vec<_>>(), [1 << 40]);
        drop(ours);
        ours = trail(&disk);
        assert_eq!(ours.read().unwrap(), Told { sent: vec![first], last: Some(Doubt { at: 16, piece: second }) });
        ours.arrived(2).unwrap();
        assert_eq!(trail(&disk).read().unwrap(), Told { sent: vec![first, second], last: None });
        ours.sending(Piece::new(3, 0, [1])).unwrap();
        ours.forget(ours.read().unwrap().last.unwrap()).unwrap();
        ours.sending(Piece::new(4, 0, [2])).unwrap();
        let sent: Vec<u64> = trail(&disk).read().unwrap().sent.into_iter().flat_map(Piece::pages).collect();
        assert_eq!(sent, [3, 5, 1 << 40], "what was not sent is not told to be");
        let known: Vec<Piece> = Piece::known(1, &[0, 0, 0, 2, 1]).collect();
        assert_eq!(known, [Piece::new(KNOWN, 1, [25]), Piece::new(KNOWN, 1, [32])]);
        ours.begin_anew().unwrap();
        for piece in &known {
            ours.sending(*piece).unwrap();
        }
        assert_eq!(trail(&disk).read().unwrap(), Told { sent: known, last: None });
    }

    #[test]
    fn a_record_that_was_cut_off_was_not_sent() {
        let disk = Sim::new();
        trail(&disk).sending(Piece::new(1, 0, [3])).unwrap();
        let file = disk.root().open("trail", store::Mode::Write).unwrap();
        file.write_at(&[1; 7], RECORD as u64).unwrap();
        drop(file);
        let ours = trail(&disk);
        assert_eq!(ours.read().unwrap().last, Some(Doubt { at: 0, piece: Piece::new(1, 0, [3]) }));
        ours.sending(Piece::new(2, 0, [4])).unwrap();
        let told = trail(&disk).read().unwrap();
        assert_eq!(told.sent, [Piece::new(1, 0, [3])]);
        assert_eq!(told.last, Some(Doubt { at: 16, piece: Piece::new(2, 0, [4]) }));
    }
}
