//! Whether a layer still reads as it did: a record of hashes of its virtual content, and the comparison with it.
//!
//! ```text
//!   chain of a sealed layer ──► blocks of 2 MiB ──► Record { block: hash, … }       zeros have no entry
//!                                                     │
//!   later, the same layer in whatever file ──► compare ──► blocks that read otherwise, and whose data they are
//! ```
//!
//! What is hashed is what the layer reads as through its chain. A fold does not change that, so a record stays right whatever file the layer
//! comes to live in. A layer that holds nothing of a block itself reads as the layer below it does there: the hash is taken from that
//! layer's record, and nothing is read. So making or comparing the records of a whole chain reads each byte about once.
//!
//! Hashes are keyed, 128 bits: whoever writes a disk cannot make two blocks of one hash. Blocks have BLAKE3, pages HighwayHash. A record carries its key, and is of one piece:
//! nothing else has to be kept for it. Its format is that of `docs/formats/hashes.md`.
//!
//! A record may cover the beginning of a disk alone ([`Record::done`]): making it goes on from there.
//!
//! Of a memory layer its pages are recorded instead, as they are written ([`Pages`]).

mod format;
mod pages;
mod walk;

pub use pages::{Expected, MAX_PAGED, PAGE, Pages};

use crate::{Error, ErrorKind, Layer, Result};
use format::{ENTRY, Entry, HEAD, Head, MAGIC, VERSION};
use highway::{HighwayHash, HighwayHasher};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use store::Store;
use uuid::Uuid;
use walk::{Content, Walk};
use zerocopy::{FromBytes, IntoBytes};

/// Content is hashed in blocks of this many bytes. The last one of a disk is hashed as if zeros followed it.
pub const BLOCK: u64 = 2 << 20;
/// The largest disk that has a record, bytes: that of VHDX.
pub const MAX_SIZE: u64 = 64 << 40;
/// A record's file is read in pieces of about this many bytes.
const PIECE: usize = 1 << 20;

/// A keyed hash of a block's content.
pub type Hash = [u8; 16];

/// The key of a record's hashes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl Key {
    /// A new key that nobody can guess.
    #[expect(clippy::new_without_default, reason = "a default that differs each time would surprise")]
    pub fn new() -> Self {
        let mut key = [0; 32];
        let (one, other) = key.split_at_mut(16);
        one.copy_from_slice(Uuid::new_v4().as_bytes());
        other.copy_from_slice(Uuid::new_v4().as_bytes());
        Self(key)
    }

    fn hash(&self, content: &[u8]) -> Hash {
        truncated(blake3::keyed_hash(&self.0, content))
    }

    /// Of a page of memory: HighwayHash, which takes 4 KiB in a fifth of the time that BLAKE3 does. Words and their order are as in the file.
    fn hash_page(&self, page: &[u8]) -> Hash {
        let [low, high] = HighwayHasher::new(self.words()).hash128(page);
        (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
    }

    fn words(&self) -> highway::Key {
        let (words, _) = self.0.as_chunks::<8>();
        highway::Key(std::array::from_fn(|at| u64::from_le_bytes(words[at])))
    }
}

/// A key is nobody's business.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

fn truncated(hash: blake3::Hash) -> Hash {
    *hash.as_bytes().first_chunk().expect("a hash has 32 bytes")
}

/// The hashes of a layer's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    layer: Uuid,
    size: u64,
    key: Key,
    /// Blocks that were looked at, from the first on.
    done: u64,
    /// Of those the ones that are not all zeros, in order.
    entries: Vec<Entry>,
}

impl Record {
    /// An empty record of the layer that its owner knows by the id `layer`, and whose disk has `size` bytes. Layers that stand on each other
    /// ought to have one key. More than [`MAX_SIZE`]: [`ErrorKind::Unsupported`].
    pub fn new(layer: Uuid, size: u64, key: Key) -> Result<Self> {
        if size > MAX_SIZE {
            let message = format!("a disk of {size} bytes is too large for a record of hashes");
            return Err(Error::new(ErrorKind::Unsupported, layer.simple().to_string(), message));
        }
        Ok(Self { layer, size, key, done: 0, entries: Vec::new() })
    }

    /// Whose it is.
    pub fn layer(&self) -> Uuid {
        self.layer
    }

    /// The same of another layer, which reads the same.
    #[must_use]
    pub fn of(self, layer: Uuid) -> Self {
        Self { layer, ..self }
    }

    /// The disk's size, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The key of its hashes.
    pub fn key(&self) -> Key {
        self.key
    }

    /// How much of the disk it covers, bytes from its beginning.
    pub fn done(&self) -> u64 {
        (self.done * BLOCK).min(self.size)
    }

    /// Whether it covers the whole disk.
    pub fn is_complete(&self) -> bool {
        self.done == blocks_of(self.size)
    }

    /// The hash of a block, `None` for zeros. Only of what it covers, or what lies beyond its disk's end.
    fn get(&self, block: u64) -> Option<Hash> {
        let at = self.entries.binary_search_by_key(&block, |entry| entry.block.get().into());
        at.ok().map(|at| self.entries[at].hash)
    }

    fn push(&mut self, hash: Option<Hash>) {
        let block = self.done as u32;
        self.entries.extend(hash.map(|hash| Entry { block: block.into(), hash }));
        self.done += 1;
    }

    /// Whether it says what a layer with a disk of `size` bytes, which stands on this record's, shows of a block that it does not hold itself.
    /// (A layer cuts off what lies under it beyond its own end.)
    fn shows(&self, block: u64, size: u64) -> bool {
        let end = (block + 1) * BLOCK;
        let known = block < self.done || block * BLOCK >= self.size;
        known && end.min(size) >= end.min(self.size)
    }

    /// Its file.
    pub fn encode(&self) -> Vec<u8> {
        let mut head = Head {
            magic: MAGIC,
            version: VERSION.into(),
            block: (BLOCK as u32).into(),
            checksum: [0; 16],
            layer: *self.layer.as_bytes(),
            size: self.size.into(),
            done: self.done.into(),
            count: (self.entries.len() as u64).into(),
            key: self.key.0,
            reserved: [0; 24],
        };
        let mut sum = blake3::Hasher::new();
        sum.update(head.as_bytes()).update(self.entries.as_bytes());
        head.checksum = truncated(sum.finalize());
        let mut bytes = Vec::with_capacity(HEAD + self.entries.len() * ENTRY);
        bytes.extend_from_slice(head.as_bytes());
        bytes.extend_from_slice(self.entries.as_bytes());
        bytes
    }

    /// Reads its file.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is not as [`Record::encode`] made it, [`ErrorKind::Unsupported`] if a newer program did. A file that says too
    /// much costs no more memory than what it really holds.
    pub fn read(store: &dyn Store) -> Result<Self> {
        let damaged = |what: &str| Error::new(ErrorKind::Damaged, store.name(), what);
        let length = store.len()?;
        let mut bytes = [0; HEAD];
        if length < HEAD as u64 {
            return Err(damaged("it is too short"));
        }
        store.read_at(&mut bytes, 0)?;
        let head = Head::read_from_bytes(&bytes).expect("it has the head's length");
        if head.magic != MAGIC {
            return Err(damaged("it is no record of hashes"));
        }
        if head.version.get() != VERSION {
            let message = format!("it is of version {}; this program knows version {VERSION}", head.version);
            return Err(Error::new(ErrorKind::Unsupported, store.name(), message));
        }
        let (size, done, count) = (head.size.get(), head.done.get(), head.count.get());
        let sound = u64::from(head.block.get()) == BLOCK
            && size <= MAX_SIZE
            && done <= blocks_of(size)
            && count <= done
            && length == HEAD as u64 + count * ENTRY as u64
            && head.reserved == [0; 24];
        if !sound {
            return Err(damaged("what its head says does not fit together"));
        }
        let mut sum = blake3::Hasher::new();
        sum.update(Head { checksum: [0; 16], ..head }.as_bytes());
        let mut entries = Vec::new();
        each_entry(store, done, count, &mut sum, &mut |entry| entries.push(entry))?;
        if truncated(sum.finalize()) != head.checksum {
            return Err(damaged("its checksum is wrong"));
        }
        Ok(Self { layer: Uuid::from_bytes(head.layer), size, key: Key(head.key), done, entries })
    }
}

/// Reads entries, which are in order and of blocks before `done`. The first that is not ends it: a file of holes has no second entry.
fn each_entry(
    store: &dyn Store,
    done: u64,
    count: u64,
    sum: &mut blake3::Hasher,
    each: &mut dyn FnMut(Entry),
) -> Result<()> {
    let mut piece = vec![0; (PIECE / ENTRY).min(count as usize) * ENTRY];
    let (mut read, mut next) = (0, 0);
    while read < count {
        let now = (piece.len() / ENTRY).min((count - read) as usize);
        let piece = &mut piece[..now * ENTRY];
        store.read_at(piece, HEAD as u64 + read * ENTRY as u64)?;
        sum.update(piece);
        for entry in piece.chunks_exact(ENTRY) {
            let entry = Entry::read_from_bytes(entry).expect("it has an entry's length");
            let block = u64::from(entry.block.get());
            if block < next || block >= done {
                return Err(Error::new(ErrorKind::Damaged, store.name(), "its blocks are out of order"));
            }
            next = block + 1;
            each(entry);
        }
        read += now as u64;
    }
    Ok(())
}

/// How many blocks a disk of this many bytes has.
fn blocks_of(size: u64) -> u64 {
    size.div_ceil(BLOCK)
}

/// A layer whose content is to be hashed.
pub struct Hashed<'a, E> {
    /// The layer, as it lies in its file.
    pub layer: &'a dyn Layer,
    /// The record of the layer that it stands on, if what it does not hold itself may be taken from there.
    pub below: Option<&'a Record>,
    /// Opens the layers of its chain, base first, for reading. Asked at most once, and only if something has to be read.
    pub open: &'a mut dyn FnMut() -> Result<Vec<Arc<dyn Layer>>, E>,
}

impl<E> fmt::Debug for Hashed<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hashed").field("layer", &self.layer).finish_non_exhaustive()
    }
}

/// How many bytes of the first `until` of a layer's disk would have to be read to hash or compare them, at most, if the rest may be taken from
/// the record `below`. Nothing but the layer's own tables is looked at.
pub fn to_read(layer: &dyn Layer, below: Option<&Record>, until: u64) -> Result<u64> {
    let size = layer.info().size;
    let mut nothing = || Ok::<_, Error>(Vec::new());
    let mut walk = Walk::new(Hashed { layer, below, open: &mut nothing });
    let mut bytes = 0;
    for block in 0..blocks_of(until.min(size)) {
        if matches!(walk.look(block)?, Content::Read) {
            bytes += BLOCK.min(size - block * BLOCK);
        }
    }
    Ok(bytes)
}

/// Goes on with a record until it is complete. `progress` is told how many bytes were read for each block, 0 for one that was not; if
/// it says `false`, this returns `false`, and what was recorded so far is right.
///
/// # Errors
/// What a layer said, or `open`. [`ErrorKind::Invalid`] if the disk has another size than the record. What was recorded so far is right.
pub fn record<E: From<Error>>(
    record: &mut Record,
    hashed: Hashed<'_, E>,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<bool, E> {
    check_size(record.size, hashed.layer)?;
    let below = hashed.below.filter(|below| below.key == record.key);
    let mut walk = Walk::new(Hashed { below, ..hashed });
    while !record.is_complete() {
        let block = record.done;
        let (hash, read) = match walk.look(block)? {
            Content::Below(hash) => (hash, 0),
            Content::Zero => (None, 0),
            Content::Read => walk.read(block, &record.key)?,
        };
        record.push(hash);
        if !progress(read) {
            return Ok(record.is_complete());
        }
    }
    Ok(true)
}

/// A block that does not read as it was recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Where on the disk, bytes.
    pub range: Range<u64>,
    /// The layers whose data it is made of, counted from the base, 0. None if it reads as zeros.
    pub layers: Vec<usize>,
}

/// Compares a layer with its record, as far as that goes. What the layer does not hold itself is not read where `below`, which has been
/// compared, recorded the same. Tells `each` of differences, in order; `progress` as with [`record`].
///
/// # Errors
/// As with [`record`].
pub fn compare<E: From<Error>>(
    record: &Record,
    hashed: Hashed<'_, E>,
    progress: &mut dyn FnMut(u64) -> bool,
    each: &mut dyn FnMut(Difference),
) -> Result<bool, E> {
    check_size(record.size, hashed.layer)?;
    let below = hashed.below.filter(|below| below.key == record.key);
    let mut walk = Walk::new(Hashed { below, ..hashed });
    for block in 0..record.done {
        let recorded = record.get(block);
        let (hash, read) = match walk.look(block)? {
            Content::Below(hash) if hash == recorded => (hash, 0),
            Content::Zero => (None, 0),
            // What another record says counts only where it says the same.
            Content::Below(_) | Content::Read => walk.read(block, &record.key)?,
        };
        if hash != recorded {
            each(Difference { range: walk.range(block), layers: walk.holders(block)? });
        }
        if !progress(read) {
            return Ok(block + 1 == record.done);
        }
    }
    Ok(true)
}

fn check_size(recorded: u64, layer: &dyn Layer) -> Result<()> {
    let size = layer.info().size;
    if size == recorded {
        return Ok(());
    }
    let message = format!("its disk has {size} bytes, {recorded} were recorded");
    Err(Error::new(ErrorKind::Invalid, layer.store().name(), message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;
    use std::sync::Arc;
    use store::sim::Sim;

    fn store(bytes: &[u8]) -> Arc<dyn Store> {
        let store = Sim::new().root().create("record").expect("a file");
        store.write_at(bytes, 0).expect("room");
        store
    }

    fn some_record() -> impl Strategy<Value = Record> {
        let entries = btree_map(0..5000_u32, any::<Hash>(), 0..60);
        (any::<u128>(), any::<[u8; 32]>(), entries, 0..3_u64, 0..BLOCK).prop_map(|(layer, key, entries, more, tail)| {
            let last = entries.keys().last().map_or(0, |last| u64::from(*last) + 1);
            let done = last + more;
            let entries = entries.into_iter().map(|(block, hash)| Entry { block: block.into(), hash }).collect();
            Record { layer: Uuid::from_u128(layer), size: done * BLOCK + tail, key: Key(key), done, entries }
        })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(record in some_record()) {
            prop_assert_eq!(Record::read(&*store(&record.encode())).expect("sound"), record);
        }

        #[test]
        fn a_flipped_bit_is_noticed(record in some_record(), bit in any::<proptest::sample::Index>()) {
            let mut bytes = record.encode();
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            Record::read(&*store(&bytes)).expect_err("it was changed");
        }

        #[test]
        fn a_record_that_is_cut_or_longer_is_noticed(record in some_record(), cut in any::<proptest::sample::Index>(), more in vec(any::<u8>(), 1..50)) {
            let mut bytes = record.encode();
            Record::read(&*store(&bytes[..cut.index(bytes.len())])).expect_err("it was cut");
            bytes.extend(more);
            Record::read(&*store(&bytes)).expect_err("it is longer");
        }
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let mut bytes = Record::new(Uuid::nil(), BLOCK, Key::new()).expect("small").encode();
        bytes[8] += 1;
        assert_eq!(Record::read(&*store(&bytes)).expect_err("newer").kind, ErrorKind::Unsupported);
        assert_eq!(Record::read(&*store(&[0; 200])).expect_err("zeros").kind, ErrorKind::Damaged);
    }

    #[test]
    fn the_record_of_an_empty_disk_is_its_head() {
        let mut record = Record::new(Uuid::nil(), 1 << 40, Key::new()).expect("small");
        (0..1 << 19).for_each(|_| record.push(None));
        assert!(record.is_complete());
        assert_eq!(record.encode().len(), HEAD);
    }

    #[test]
    fn a_key_does_not_show() {
        assert_eq!(format!("{:?}", Key::new()), "Key");
        assert_ne!(Key::new(), Key::new());
        assert_ne!(Key::new().hash(b"the same"), Key::new().hash(b"the same"));
        assert_ne!(Key::new().hash_page(b"the same"), Key::new().hash_page(b"the same"));
    }

    /// A record is read on other processors, and by later versions.
    #[test]
    fn a_page_has_the_same_hash_everywhere() {
        let key = Key(std::array::from_fn(|at| at as u8));
        let page: Vec<u8> = (0..PAGE).map(|at| (at % 251) as u8).collect();
        let [low, high] = highway::PortableHash::new(key.words()).hash128(&page);
        assert_eq!(key.hash_page(&page), (u128::from(high) << 64 | u128::from(low)).to_le_bytes());
        // The first of the reference implementation's own tests, under this key.
        assert_eq!(HighwayHasher::new(key.words()).hash64(b""), 0x907a_56de_22c2_6e53);
    }
}
