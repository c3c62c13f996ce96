//! Image files written byte by byte, from the formats' texts and from what others' files look like: nothing of the crate is used.
//!
//! So states are there that we never write (undefined, unmapped, places kept for nothing), layouts that are not ours, logs in use that
//! end at any entry, and the damage that a reader must get over.

pub(crate) mod vhd;
pub(crate) mod vhdx;

use crate::dice::Dice;
use image::Kind;
use std::collections::BTreeMap;
use std::ops::Range;
use store::Store;
use uuid::Uuid;

/// What a layer holds of a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sector {
    Nothing,
    Zeros,
    /// Bytes that follow from this number and the sector's.
    Data(u32),
}

/// What a layer holds, block by block: the sectors inside the disk. A block that is not named is nothing.
pub(crate) type Held = BTreeMap<u64, Vec<Sector>>;

/// The bytes of a sector of data.
pub(crate) fn bytes(stamp: u32, sector: u64, len: u64) -> Vec<u8> {
    let word = (u64::from(stamp) + 1) << 32 | (sector & 0xFFFF_FFFF);
    word.to_le_bytes().repeat(len as usize / 8)
}

/// What is to be forged.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) kind: Kind,
    /// Bytes.
    pub(crate) size: u64,
    /// Bytes in a sector.
    pub(crate) sector: u64,
    /// Bytes in a block.
    pub(crate) block: u64,
    /// Where data may lie: the rest of the disk is nothing, or zeros.
    pub(crate) windows: Vec<Range<u64>>,
    /// The parent's id and name.
    pub(crate) parent: Option<(Uuid, String)>,
    /// Only what every reader copes with: nothing destroyed, no block cut off by the file's end.
    pub(crate) plain: bool,
    /// A log may be in use.
    pub(crate) logs: bool,
    /// Told apart from other layers' data by this.
    pub(crate) stamp: u32,
}

impl Order {
    fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// Bytes of the block that lie inside the disk.
    fn inside(&self, block: u64) -> u64 {
        self.block.min(self.size - block * self.block)
    }

    fn differencing(&self) -> bool {
        self.kind == Kind::Differencing
    }

    /// The blocks that a window touches.
    fn touched(&self) -> Vec<u64> {
        let mut all: Vec<u64> = Vec::new();
        for window in &self.windows {
            let end = window.end.min(self.size);
            if window.start < end {
                let first = all.last().map_or(0, |last| last + 1).max(window.start / self.block);
                all.extend(first..end.div_ceil(self.block));
            }
        }
        all
    }

    /// What a block may hold: nothing, zeros, data all over, or runs of all of them.
    fn draw_block(&self, block: u64, stamp: u32, dice: &mut Dice) -> Vec<Sector> {
        let count = self.inside(block) / self.sector;
        let mut all = match dice.below(8) {
            0 => vec![Sector::Nothing; count as usize],
            1 | 2 => return vec![Sector::Zeros; count as usize],
            3 | 4 => vec![Sector::Data(stamp); count as usize],
            _ => {
                let mut all = vec![dice.pick(&[Sector::Nothing, Sector::Nothing, Sector::Zeros]); count as usize];
                for _ in 0..=dice.below(6) {
                    let from = dice.below(count);
                    let most = if dice.one_in(2) { 9 } else { count };
                    let to = (from + 1 + dice.below(most)).min(count);
                    let some = dice.pick(&[Sector::Data(stamp), Sector::Data(stamp), Sector::Zeros, Sector::Nothing]);
                    all[from as usize..to as usize].fill(some);
                }
                all
            }
        };
        let start = block * self.block;
        for (index, sector) in (0..).zip(&mut all) {
            let at = start + index * self.sector;
            if !self.windows.iter().any(|window| window.contains(&at)) {
                *sector = Sector::Nothing;
            }
        }
        all
    }

    /// A whole layer.
    fn draw(&self, dice: &mut Dice) -> Held {
        let mut held: Held =
            self.touched().into_iter().map(|block| (block, self.draw_block(block, self.stamp, dice))).collect();
        // What is said to be zeros far from everything stays zeros.
        for _ in 0..2 {
            let block = dice.below(self.blocks());
            let untouched = |block| !held.contains_key(&block);
            if self.windows.len() > 1 && untouched(block) {
                held.insert(block, vec![Sector::Zeros; (self.inside(block) / self.sector) as usize]);
            }
        }
        held
    }

    /// Puts a block's data where its place is. What is not to be seen there is filled with `junk`.
    fn put_block(&self, canvas: &mut Canvas, at: u64, block: u64, sectors: &[Sector], junk: bool) {
        let first = block * self.block / self.sector;
        for (index, sector) in (0..).zip(sectors) {
            let place = at + index * self.sector;
            match sector {
                Sector::Data(stamp) => canvas.put(place, &bytes(*stamp, first + index, self.sector)),
                Sector::Zeros => canvas.put(place, &vec![0; self.sector as usize]),
                Sector::Nothing if junk => canvas.put(place, &vec![0xDD; self.sector as usize]),
                Sector::Nothing => (),
            }
        }
    }
}

/// What was forged.
#[derive(Debug)]
pub(crate) struct Forged {
    pub(crate) held: Held,
    /// A log is in use.
    pub(crate) log: bool,
    /// A reader gets over it, and a check names it.
    pub(crate) wounded: bool,
}

/// The file that is written. What is not put is zeros.
struct Canvas<'a> {
    store: &'a dyn Store,
    /// The end of what is not zeros.
    end: u64,
}

impl<'a> Canvas<'a> {
    fn new(store: &'a dyn Store) -> Self {
        Self { store, end: 0 }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.store.write_at(bytes, at).expect("room");
        let zeros = [0; 512];
        if let Some(last) = bytes.chunks(512).rposition(|bytes| *bytes != zeros[..bytes.len()]) {
            self.end = self.end.max(at + (last as u64 + 1) * 512);
        }
    }
}

/// A raw file, whose last sector may be cut off where it is zeros.
pub(crate) fn raw(store: &dyn Store, order: &Order, dice: &mut Dice) -> Forged {
    let mut canvas = Canvas::new(store);
    let held = order.draw(dice);
    for (block, sectors) in &held {
        order.put_block(&mut canvas, block * order.block, *block, sectors, false);
    }
    let cut = if canvas.end < order.size && dice.one_in(2) { dice.below(order.sector) } else { 0 };
    store.set_len((order.size - cut).max(canvas.end)).expect("length");
    Forged { held, log: false, wounded: false }
}
