//! A 4 KiB page of metadata in memory: the unit that is read from the file, changed, and logged.

use super::format::PAGE;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words in a page.
pub(crate) const WORDS: usize = PAGE / 8;
/// A page's bytes, as the log carries them.
pub(crate) type PageBytes = Box<[u8; PAGE]>;

/// 512 little-endian words.
///
/// Read without a lock at any time; changed only under the layer's metadata lock. A change that depends on others (an entry that
/// exposes bits) is stored last, with release order, and readers load it first, with acquire order.
pub(crate) struct Page(Box<[AtomicU64]>);

impl Page {
    /// A page of zeros.
    pub(crate) fn zeroed() -> Self {
        Self((0..WORDS).map(|_| AtomicU64::new(0)).collect())
    }

    /// The page that these bytes hold. What `bytes` lacks of a page is zero.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let page = Self::zeroed();
        for (word, bytes) in page.0.iter().zip(bytes.chunks_exact(8)) {
            word.store(u64::from_le_bytes(bytes.try_into().expect("chunks of eight")), Ordering::Relaxed);
        }
        page
    }

    /// The page as it lies in the file.
    pub(crate) fn to_bytes(&self) -> PageBytes {
        let mut bytes = Box::new([0; PAGE]);
        for (word, bytes) in self.0.iter().zip(bytes.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Acquire).to_le_bytes());
        }
        bytes
    }

    /// The word at `index`, which is below [`WORDS`].
    pub(crate) fn get(&self, index: usize) -> u64 {
        self.0[index].load(Ordering::SeqCst)
    }

    /// Replaces the word at `index`.
    pub(crate) fn set(&self, index: usize, value: u64) {
        self.0[index].store(value, Ordering::SeqCst);
    }
}
