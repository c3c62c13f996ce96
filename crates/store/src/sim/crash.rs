//! What a crash leaves: which of the unsynced operations took place.

use super::pages::{PAGE, Pages};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes that a device writes at once: a sector is old or new, never torn.
pub(super) const SECTOR: u64 = 512;

/// Which of the operations that no sync covers have taken place when the machine comes up again. Operations are numbered from 0
/// in the order in which they were made, over the whole disk; numbers beyond the last start over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// None.
    Nothing,
    /// All, as after a crash of a program alone.
    Everything,
    /// The first ones in order, and some sectors of the next: it is torn.
    Prefix {
        /// How many are whole.
        operations: u64,
        /// How many sectors of the next one.
        sectors: u64,
    },
    /// All but one, which a cache held back.
    Hold {
        /// Which.
        operation: u64,
    },
    /// One alone, which overtook the others.
    Only {
        /// Which.
        operation: u64,
    },
    /// Some, each whole or not at all.
    Operations {
        /// Chooses them.
        seed: u64,
    },
    /// Some sectors of each, and lengths apart from data.
    Sectors {
        /// Chooses them.
        seed: u64,
    },
}

impl Crash {
    /// One of all of these, `seed` says which: for going through many.
    pub fn seeded(seed: u64) -> Self {
        let dice = mix(seed);
        let number = dice >> 8;
        match dice % 8 {
            0 | 1 => Self::Prefix { operations: number, sectors: mix(number) % 16 },
            2 => Self::Hold { operation: number },
            3 => Self::Only { operation: number },
            4 | 5 => Self::Operations { seed: number },
            _ => Self::Sectors { seed: number },
        }
    }

    /// Nothing, everything, and `count` of the others.
    pub fn several(seed: u64, count: u64) -> impl Iterator<Item = Self> {
        let first = mix(seed);
        [Self::Nothing, Self::Everything]
            .into_iter()
            .chain((0..count).map(move |n| Self::seeded(first.wrapping_add(n))))
    }
}

/// A [`Crash`] over the operations of one disk.
pub(super) struct Choice<'a> {
    pub(super) crash: Crash,
    /// The unsynced operations' numbers on their disk, ascending.
    pub(super) unsynced: &'a [u64],
}

/// The part of an operation that is not a sector: a file's length.
const LENGTH: u64 = u64::MAX;

impl Choice<'_> {
    /// Whether this part of the operation took place.
    fn keeps(&self, operation: u64, part: u64) -> bool {
        let count = self.unsynced.len() as u64;
        let nth = self.unsynced.partition_point(|number| *number < operation) as u64;
        match self.crash {
            Crash::Nothing => false,
            Crash::Everything => true,
            Crash::Prefix { operations, sectors } => {
                let whole = operations % (count + 1);
                nth < whole || (nth == whole && part < sectors)
            }
            Crash::Hold { operation } => nth != operation % count,
            Crash::Only { operation } => nth == operation % count,
            Crash::Operations { seed } => chance(seed, nth, 0),
            Crash::Sectors { seed } => chance(seed, nth, part),
        }
    }
}

/// True for a share of all `(operation, part)` that differs from seed to seed: few, half or most.
fn chance(seed: u64, operation: u64, part: u64) -> bool {
    let eighths = [1, 4, 4, 7][(mix(seed) % 4) as usize];
    mix(mix(mix(seed ^ 1).wrapping_add(operation)).wrapping_add(part)) % 8 < eighths
}

/// SplitMix64's finaliser: a fixed, well-mixed function.
pub(super) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A change of a file.
#[derive(Clone)]
pub(super) enum FileOp {
    /// Whole sectors as they were in the cache after the write, which reached up to `end`.
    Write { offset: u64, data: Arc<[u8]>, end: u64 },
    /// Whole sectors that became zeros.
    Zero { offset: u64, len: u64 },
    /// A new length.
    SetLen(u64),
}

impl FileOp {
    /// Does the parts of this change that took place. Bytes may then lie beyond the length: a later change may show them.
    pub(super) fn apply(&self, pages: &mut Pages, operation: u64, choice: &Choice<'_>) {
        match self {
            Self::Write { offset, data, end } => {
                for (part, sector) in data.chunks(SECTOR as usize).enumerate() {
                    if choice.keeps(operation, part as u64) {
                        pages.write(sector, offset + part as u64 * SECTOR);
                    }
                }
                if choice.keeps(operation, LENGTH) && *end > pages.len() {
                    pages.set_len(*end);
                }
            }
            Self::Zero { offset, len } => {
                for page in pages.touched(*offset, *len) {
                    if choice.keeps(operation, page - offset / PAGE) {
                        let start = (page * PAGE).max(*offset);
                        let end = ((page + 1) * PAGE).min(offset + len);
                        pages.zero(start, end - start);
                    }
                }
            }
            Self::SetLen(len) => {
                // A file system journals a change of length whole.
                if choice.keeps(operation, 0) {
                    let shrinks = *len < pages.len();
                    pages.set_len(*len);
                    if shrinks {
                        pages.truncate();
                    }
                }
            }
        }
    }
}

/// A change of a folder's names.
#[derive(Clone)]
pub(super) enum NameOp {
    Add { name: String, inode: u64 },
    Remove { name: String, inode: u64 },
    Rename { from: String, to: String, inode: u64 },
}

impl NameOp {
    fn names(&self) -> [&str; 2] {
        match self {
            Self::Add { name, .. } | Self::Remove { name, .. } => [name, name],
            Self::Rename { from, to, .. } => [from, to],
        }
    }

    pub(super) fn inode(&self) -> u64 {
        match self {
            Self::Add { inode, .. } | Self::Remove { inode, .. } | Self::Rename { inode, .. } => *inode,
        }
    }

    /// Whether this change means nothing without the earlier one: they share a name or a file.
    pub(super) fn follows(&self, earlier: &Self) -> bool {
        self.inode() == earlier.inode() || self.names().iter().any(|name| earlier.names().contains(name))
    }

    pub(super) fn apply(&self, entries: &mut BTreeMap<String, u64>) {
        match self {
            Self::Add { name, inode } => {
                entries.insert(name.clone(), *inode);
            }
            Self::Remove { name, .. } => {
                entries.remove(name);
            }
            Self::Rename { from, to, inode } => {
                entries.remove(from);
                entries.insert(to.clone(), *inode);
            }
        }
    }
}

/// Does the changes of names that took place: each atomic, in any order, but never a later one of a name or file without the
/// earlier ones of it.
pub(super) fn apply_names(entries: &mut BTreeMap<String, u64>, pending: &[(u64, NameOp)], choice: &Choice<'_>) {
    let mut kept: Vec<bool> = pending.iter().map(|(operation, _)| choice.keeps(*operation, 0)).collect();
    for later in (0..pending.len()).rev() {
        for earlier in 0..later {
            kept[earlier] |= kept[later] && pending[later].1.follows(&pending[earlier].1);
        }
    }
    for ((_, change), _) in pending.iter().zip(kept).filter(|(_, kept)| *kept) {
        change.apply(entries);
    }
}
