//! Whether each page of a memory layer still reads as it was captured: a record of hashes of the layer's own pages.
//!
//! ```text
//!   capture ──► pages that are written ──► Pages { page: hash, … }   one layer's, made as it is written
//!                                            │
//!   top ─ … ─ base ──► Expected ─────────────┘   what a disk is to read as; asked of every page before a guest gets it, and by the next capture
//! ```
//!
//! An entry says how the layer reads *through its chain*, so a fold leaves it right, and those of a layer that was merged into this one can be
//! taken over ([`Pages::take_over`]). A page without an entry reads as the layer below does, zeros where there is none: so it is as long as
//! the record is *whole*. It is so for one layer below, which it names; once that has been merged, the record has to be completed.

use super::format::{ENTRY, Entry, HEAD, PAGES_MAGIC, PAGES_VERSION, PagesHead};
use super::{Difference, Hash, Key, PIECE, check_size, each_entry, truncated};
use crate::{Chain, Error, ErrorKind, Layer, Result, RunKind, Source};
use std::collections::{BTreeMap, btree_map};
use std::ops::Range;
use std::sync::Arc;
use store::Store;
use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// The largest disk whose pages have a record, bytes.
pub const MAX_PAGED: u64 = PAGE << 32;
/// What is looked at together when a layer is recorded or compared, bytes.
const WINDOW: u64 = 2 << 20;
/// Pages whose hashes lie together in memory.
const GROUP: u64 = 64;
/// No hash is known. (That a hash is this happens to nobody; its page would not be checked.)
const NONE: Hash = [0; 16];
const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];

/// Hashes by the number of their page: 16 bytes each, and little besides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Table(BTreeMap<u32, Box<[Hash; GROUP as usize]>>);

impl Table {
    fn get(&self, page: u64) -> Option<Hash> {
        let group = self.0.get(&((page / GROUP) as u32))?;
        Some(group[(page % GROUP) as usize]).filter(|hash| *hash != NONE)
    }

    fn set(&mut self, page: u64, hash: Hash) {
        let group = self.0.entry((page / GROUP) as u32).or_insert_with(|| Box::new([NONE; GROUP as usize]));
        group[(page % GROUP) as usize] = hash;
    }

    /// Takes over the hashes of pages that have none.
    fn fill(&mut self, below: Self) {
        for (group, hashes) in below.0 {
            match self.0.entry(group) {
                btree_map::Entry::Vacant(free) => _ = free.insert(hashes),
                btree_map::Entry::Occupied(mut ours) => {
                    let missing = ours.get_mut().iter_mut().zip(hashes.iter()).filter(|(ours, _)| **ours == NONE);
                    missing.for_each(|(ours, hash)| *ours = *hash);
                }
            }
        }
    }

    fn entries(&self, pages: Range<u64>) -> impl Iterator<Item = (u64, Hash)> {
        let groups = (pages.start / GROUP) as u32..pages.end.div_ceil(GROUP).min(1 << 32) as u32;
        let all = self.0.range(groups).flat_map(|(group, hashes)| (u64::from(*group) * GROUP..).zip(hashes.iter()));
        all.map(|(page, hash)| (page, *hash)).filter(move |(page, hash)| pages.contains(page) && *hash != NONE)
    }
}

/// The hashes of a memory layer's own pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pages {
    layer: Uuid,
    /// The layer below, for which it is whole.
    below: Option<Uuid>,
    whole: bool,
    size: u64,
    key: Key,
    table: Table,
}

impl Pages {
    /// An empty record of the layer that its owner knows by the id `layer`, with a disk of `size` bytes. It is not whole. More than
    /// [`MAX_PAGED`]: [`ErrorKind::Unsupported`].
    pub fn new(layer: Uuid, size: u64, key: Key) -> Result<Self> {
        if size > MAX_PAGED {
            let message = format!("a disk of {size} bytes is too large for a record of its pages");
            return Err(Error::new(ErrorKind::Unsupported, layer.simple().to_string(), message));
        }
        Ok(Self { layer, below: None, whole: false, size, key, table: Table::default() })
    }

    /// Whose it is.
    pub fn layer(&self) -> Uuid {
        self.layer
    }

    /// The layer that it was whole for last, if there was one.
    pub fn below(&self) -> Option<Uuid> {
        self.below
    }

    /// The key of its hashes.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Whether it says all of a layer that stands on `below`.
    pub fn is_whole(&self, below: Option<Uuid>) -> bool {
        self.whole && self.below == below
    }

    /// Everything that its layer holds over `below` is recorded.
    #[must_use]
    pub fn whole(self, below: Option<Uuid>) -> Self {
        Self { below, whole: true, ..self }
    }

    /// The same of another layer, which reads the same, and stands on another one that reads the same.
    #[must_use]
    pub fn of(self, layer: Uuid, below: Option<Uuid>) -> Self {
        Self { layer, below, ..self }
    }

    /// Whole pages were written at `at`, bytes.
    pub fn set(&mut self, at: u64, pages: &[u8]) {
        for (page, content) in (at / PAGE..).zip(pages.chunks_exact(PAGE as usize)) {
            self.table.set(page, self.key.hash_page(content));
        }
    }

    /// The hash of a page that holds this, with the key of this record.
    pub fn hash(&self, page: &[u8]) -> Hash {
        self.key.hash_page(page)
    }

    /// A page was written at `at`, bytes, whose [`Pages::hash`] is known.
    pub fn set_hash(&mut self, at: u64, hash: Hash) {
        self.table.set(at / PAGE, hash);
    }

    /// The hash of what the page at `at`, bytes, reads as, if its layer stands on a disk that is to read as `below`. `None` where that is not
    /// recorded, or with another key.
    pub fn hash_over(&self, below: &Expected, at: u64) -> Option<Hash> {
        let page = at / PAGE;
        self.table.get(page).or_else(|| below.hash_of(page).filter(|_| below.key() == Some(self.key)))
    }

    /// Whole pages have become zeros.
    pub fn set_zeros(&mut self, at: u64, len: u64) {
        let zeros = self.key.hash_page(&ZEROS);
        (at / PAGE..(at + len) / PAGE).for_each(|page| self.table.set(page, zeros));
    }

    /// The layer below was merged into this one: what it recorded holds for this one, too.
    pub fn take_over(&mut self, below: Self) {
        if below.key == self.key && below.size == self.size {
            self.table.fill(below.table);
            (self.below, self.whole) = (below.below, self.whole && below.whole);
        } else {
            // What lies deeper may be hidden by what this says nothing of.
            (self.below, self.whole) = (None, false);
        }
    }

    /// Bytes that [`Pages::compare`] has to read, at least.
    pub fn to_read(&self) -> u64 {
        self.table.entries(0..self.size.div_ceil(PAGE)).count() as u64 * PAGE
    }

    /// Writes its file, which is empty.
    pub fn write(&self, store: &dyn Store) -> Result<()> {
        let all = || self.table.entries(0..self.size.div_ceil(PAGE));
        let mut head = PagesHead {
            magic: PAGES_MAGIC,
            version: PAGES_VERSION.into(),
            page: (PAGE as u32).into(),
            checksum: [0; 16],
            layer: *self.layer.as_bytes(),
            below: *self.below.unwrap_or_default().as_bytes(),
            size: self.size.into(),
            count: (all().count() as u64).into(),
            key: self.key.0,
            whole: u32::from(self.whole).into(),
            reserved: [0; 12],
        };
        let (mut sum, mut piece, mut at) = (blake3::Hasher::new(), Vec::new(), HEAD as u64);
        sum.update(head.as_bytes());
        let mut entries = all().peekable();
        while let Some((page, hash)) = entries.next() {
            piece.extend_from_slice(Entry { block: (page as u32).into(), hash }.as_bytes());
            if piece.len() >= PIECE || entries.peek().is_none() {
                sum.update(&piece);
                store.write_at(&piece, at)?;
                at += piece.len() as u64;
                piece.clear();
            }
        }
        head.checksum = truncated(sum.finalize());
        Ok(store.write_at(head.as_bytes(), 0)?)
    }

    /// Reads its file.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is not as [`Pages::write`] made it, [`ErrorKind::Unsupported`] if a newer program did. A file of many holes
    /// costs no more memory than one without.
    pub fn read(store: &dyn Store) -> Result<Self> {
        let damaged = |what: &str| Error::new(ErrorKind::Damaged, store.name(), what);
        let head = read_head(store)?;
        let (size, count) = (head.size.get(), head.count.get());
        let pages = size.div_ceil(PAGE);
        let sound = u64::from(head.page.get()) == PAGE
            && size <= MAX_PAGED
            && count <= pages
            && store.len()? == HEAD as u64 + count * ENTRY as u64
            && head.whole.get() <= 1
            && head.reserved == [0; 12];
        if !sound {
            return Err(damaged("what its head says does not fit together"));
        }
        let (mut sum, mut table) = (blake3::Hasher::new(), Table::default());
        sum.update(PagesHead { checksum: [0; 16], ..head }.as_bytes());
        each_entry(store, pages, count, &mut sum, &mut |entry| table.set(entry.block.get().into(), entry.hash))?;
        if truncated(sum.finalize()) != head.checksum {
            return Err(damaged("its checksum is wrong"));
        }
        let below = Some(Uuid::from_bytes(head.below)).filter(|below| !below.is_nil());
        let (layer, whole) = (Uuid::from_bytes(head.layer), head.whole.get() == 1);
        Ok(Self { layer, below, whole, size, key: Key(head.key), table })
    }

    /// The key that a file's hashes have. Nothing else of it is looked at.
    pub fn read_key(store: &dyn Store) -> Result<Key> {
        Ok(Key(read_head(store)?.key))
    }

    /// What a file says of [`Pages::below`]. Nothing else of it is looked at.
    pub fn read_below(store: &dyn Store) -> Result<Option<Uuid>> {
        Ok(Some(Uuid::from_bytes(read_head(store)?.below)).filter(|below| !below.is_nil()))
    }

    /// Completes the record: `chain` is the layer with what it stands on. `progress` is told how many bytes were read; if it says `false`, this
    /// returns `false`, and what was recorded so far is right.
    pub fn complete(
        &mut self,
        chain: &Chain,
        below: Option<Uuid>,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<bool> {
        let layer = own_layer(chain, self.size)?;
        let mut buffer = Vec::new();
        for at in (0..self.size).step_by(WINDOW as usize) {
            let wanted: Vec<u64> =
                own_pages(&*layer, at, self.size)?.into_iter().filter(|page| self.table.get(*page).is_none()).collect();
            let read = each_page(chain, &wanted, &mut buffer, &mut |page, content| {
                // What nobody holds is zeros without an entry.
                if below.is_some() || content != ZEROS {
                    self.table.set(page, self.key.hash_page(content));
                }
            })?;
            if !progress(read) {
                return Ok(false);
            }
        }
        (self.below, self.whole) = (below, true);
        Ok(true)
    }

    /// Compares a layer, with what it stands on, with the record. Tells `each` of pages that are not as recorded, in order; `progress` as with
    /// [`Pages::complete`].
    pub fn compare(
        &self,
        chain: &Chain,
        progress: &mut dyn FnMut(u64) -> bool,
        each: &mut dyn FnMut(Difference),
    ) -> Result<bool> {
        let layer = own_layer(chain, self.size)?;
        let is_base = self.is_whole(None);
        let mut buffer = Vec::new();
        for at in (0..self.size).step_by(WINDOW as usize) {
            let end = (at + WINDOW).min(self.size);
            let mut wanted: Vec<u64> = self.table.entries(at / PAGE..end.div_ceil(PAGE)).map(|entry| entry.0).collect();
            if is_base {
                wanted.extend(own_pages(&*layer, at, self.size)?);
                wanted.sort_unstable();
                wanted.dedup();
            }
            let mut wrong = Vec::new();
            let read = each_page(chain, &wanted, &mut buffer, &mut |page, content| {
                let sound = self.table.get(page).map_or(content == ZEROS, |hash| hash == self.key.hash_page(content));
                if !sound {
                    wrong.push(page);
                }
            })?;
            for page in wrong {
                let range = page * PAGE..(page + 1) * PAGE;
                let runs = chain.runs(range.start, PAGE, usize::MAX)?;
                let layers = runs.iter().filter(|run| run.kind == RunKind::Data).filter_map(|run| run.layer);
                each(Difference { range, layers: layers.collect() });
            }
            if !progress(read) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn read_head(store: &dyn Store) -> Result<PagesHead> {
    let damaged = |what: &str| Error::new(ErrorKind::Damaged, store.name(), what);
    let mut bytes = [0; HEAD];
    if store.len()? < bytes.len() as u64 {
        return Err(damaged("it is too short"));
    }
    store.read_at(&mut bytes, 0)?;
    let head = PagesHead::read_from_bytes(&bytes).expect("it has the head's length");
    if head.magic != PAGES_MAGIC {
        return Err(damaged("it is no record of a memory's pages"));
    }
    if head.version.get() != PAGES_VERSION {
        let message = format!("it is of version {}; this program knows version {PAGES_VERSION}", head.version);
        return Err(Error::new(ErrorKind::Unsupported, store.name(), message));
    }
    Ok(head)
}

/// The topmost layer, whose disk has `size` bytes, in whole pages.
fn own_layer(chain: &Chain, size: u64) -> Result<Arc<dyn Layer>> {
    let layer = chain.layers().pop().expect("a chain has a top");
    check_size(size, &*layer)?;
    Ok(layer)
}

/// The pages that a layer itself says something of, from `at` on in one window.
fn own_pages(layer: &dyn Layer, at: u64, size: u64) -> Result<Vec<u64>> {
    let mut runs = Vec::new();
    layer.map(at, WINDOW.min(size - at), &mut runs)?;
    let own = runs.iter().filter(|run| run.source != Source::Absent);
    let mut pages: Vec<u64> = own.flat_map(|run| run.offset / PAGE..(run.offset + run.len).div_ceil(PAGE)).collect();
    pages.dedup();
    Ok(pages)
}

/// Reads these pages, which are in order, and hands each out; the bytes that were read.
fn each_page(chain: &Chain, pages: &[u64], buffer: &mut Vec<u8>, each: &mut dyn FnMut(u64, &[u8])) -> Result<u64> {
    for run in pages.chunk_by(|a, b| a + 1 == *b) {
        let at = run[0] * PAGE;
        buffer.clear();
        buffer.resize(run.len() * PAGE as usize, 0);
        // The last page may not be whole: as if zeros followed.
        let held = (buffer.len() as u64).min(chain.size() - at) as usize;
        chain.read(&mut buffer[..held], at)?;
        run.iter().zip(buffer.chunks_exact(PAGE as usize)).for_each(|(page, content)| each(*page, content));
    }
    Ok(pages.len() as u64 * PAGE)
}

/// What a memory disk is to read as, as far as that is recorded.
#[derive(Debug, Clone, Default)]
pub struct Expected {
    /// With the hash of a page of zeros.
    key: Option<(Key, Hash)>,
    table: Table,
    /// What is not in the table is zeros.
    rest: bool,
}

impl Expected {
    /// Of a disk that holds nothing. Hashes have this key.
    pub fn zeros(key: Key) -> Self {
        Self { key: Some((key, key.hash_page(&ZEROS))), table: Table::default(), rest: true }
    }

    /// The key of the hashes; `None` if nothing is recorded.
    pub fn key(&self) -> Option<Key> {
        self.key.map(|(key, _)| key)
    }

    /// Adds the record of the next layer, from the top downwards, which stands on `below`. Whether what is recorded of that counts too: not
    /// if this record does not say which pages are that one's.
    pub fn add(&mut self, pages: Pages, below: Option<Uuid>) -> bool {
        if self.key.is_some_and(|(key, _)| key != pages.key) {
            return false;
        }
        let whole = pages.is_whole(below);
        self.key = Some((pages.key, pages.key.hash_page(&ZEROS)));
        self.rest = whole && below.is_none();
        self.table.fill(pages.table);
        whole && below.is_some()
    }

    /// What is to be there, as far as that is known.
    fn hash_of(&self, page: u64) -> Option<Hash> {
        let zeros = self.key.filter(|_| self.rest).map(|(_, zeros)| zeros);
        self.table.get(page).or(zeros)
    }

    /// Whether a page at `at`, bytes, may hold this: it is as recorded, or nothing is known of it.
    pub fn allows(&self, at: u64, page: &[u8]) -> bool {
        match (self.table.get(at / PAGE), self.key) {
            (Some(hash), Some((key, _))) => key.hash_page(page) == hash,
            _ => !self.rest || page == ZEROS,
        }
    }

    /// The first page of a range that is to hold something other than zeros, as far as that is known: where it begins, bytes.
    pub fn next_data(&self, range: Range<u64>) -> Option<u64> {
        let (_, zeros) = self.key?;
        let mut entries = self.table.entries(range.start / PAGE..range.end.div_ceil(PAGE));
        entries.find(|(_, hash)| *hash != zeros).map(|(page, _)| page * PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;
    use proptest::sample::Index;
    use store::sim::Sim;

    fn store(bytes: &[u8]) -> Arc<dyn Store> {
        let store = Sim::new().root().create("record").expect("a file");
        store.write_at(bytes, 0).expect("room");
        store
    }

    fn bytes(pages: &Pages) -> Vec<u8> {
        let store = store(&[]);
        pages.write(&*store).expect("room");
        let mut bytes = vec![0; store.len().expect("a length") as usize];
        store.read_at(&mut bytes, 0).expect("read");
        bytes
    }

    fn some_pages() -> impl Strategy<Value = Pages> {
        let below = proptest::option::of(1..u128::MAX);
        let hash = any::<Hash>().prop_filter("stands for none", |hash| *hash != NONE);
        (any::<u128>(), below, any::<bool>(), any::<[u8; 32]>(), btree_map(0..5000_u64, hash, 0..60), 0..9000_u64)
            .prop_map(|(layer, below, whole, key, entries, tail)| {
                let size = entries.keys().last().map_or(0, |last| (last + 1) * PAGE) + tail;
                let mut pages = Pages::new(Uuid::from_u128(layer), size, Key(key)).expect("small");
                for (page, hash) in entries {
                    pages.table.set(page, hash);
                }
                Pages { below: below.map(Uuid::from_u128), whole, ..pages }
            })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(pages in some_pages()) {
            prop_assert_eq!(Pages::read(&*store(&bytes(&pages))).expect("sound"), pages);
        }

        #[test]
        fn a_flipped_bit_is_noticed(pages in some_pages(), bit in any::<Index>()) {
            let mut bytes = bytes(&pages);
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            Pages::read(&*store(&bytes)).expect_err("it was changed");
        }

        #[test]
        fn a_record_that_is_cut_or_longer_is_noticed(pages in some_pages(), cut in any::<Index>(), more in vec(any::<u8>(), 1..50)) {
            let mut bytes = bytes(&pages);
            Pages::read(&*store(&bytes[..cut.index(bytes.len())])).expect_err("it was cut");
            bytes.extend(more);
            Pages::read(&*store(&bytes)).expect_err("it is longer");
        }

        #[test]
        fn noise_is_borne(mut noise in vec(any::<u8>(), HEAD..2000)) {
            noise[..8].copy_from_slice(&PAGES_MAGIC);
            noise[8..12].copy_from_slice(&PAGES_VERSION.to_le_bytes());
            Pages::read(&*store(&noise)).expect_err("it is noise");
        }
    }

    #[test]
    fn a_newer_version_and_the_record_of_a_disk_are_told_from_damage() {
        let mut bytes = bytes(&Pages::new(Uuid::nil(), PAGE, Key::new()).expect("small"));
        bytes[8] += 1;
        assert_eq!(Pages::read(&*store(&bytes)).expect_err("newer").kind, ErrorKind::Unsupported);
        let other = super::super::Record::new(Uuid::nil(), PAGE, Key::new()).expect("small").encode();
        assert_eq!(Pages::read(&*store(&other)).expect_err("a disk's").kind, ErrorKind::Damaged);
    }

    const A: [u8; PAGE as usize] = [1; PAGE as usize];
    const B: [u8; PAGE as usize] = [2; PAGE as usize];

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// Three layers: the base has pages 0 to 3, the next 1 and 2, the top 2, where it is zeros.
    fn three(key: Key) -> [Pages; 3] {
        let new = |number| Pages::new(id(number), 10 * PAGE, key).expect("small");
        let [mut base, mut middle, mut top] = [1, 2, 3].map(new);
        (0..4).for_each(|page| base.set(page * PAGE, &A));
        middle.set(PAGE, &[B, B].concat());
        top.set_zeros(2 * PAGE, PAGE);
        [base.whole(None), middle.whole(Some(id(1))), top.whole(Some(id(2)))]
    }

    /// What the three show, of the first five pages.
    fn shows(expected: &Expected) -> Vec<&'static str> {
        let allows = |page: u64| match [A, B, ZEROS].map(|content| expected.allows(page * PAGE, &content)) {
            [true, false, false] => "a",
            [false, true, false] => "b",
            [false, false, true] => "-",
            [true, true, true] => "?",
            other => panic!("{other:?}"),
        };
        (0..5).map(allows).collect()
    }

    #[test]
    fn what_a_disk_is_to_read_as_follows_from_its_records() {
        let [base, middle, top] = three(Key::new());
        let mut expected = Expected::default();
        assert_eq!(shows(&expected), ["?"; 5]);
        assert!(expected.add(top, Some(id(2))));
        assert_eq!(shows(&expected), ["?", "?", "-", "?", "?"]);
        assert!(expected.add(middle, Some(id(1))));
        assert!(!expected.add(base, None), "it ends here");
        assert_eq!(shows(&expected), ["a", "b", "-", "a", "-"]);
        assert_eq!(
            [0, 1, 2, 4].map(|page| expected.next_data(page * PAGE..10 * PAGE)),
            [Some(0), Some(PAGE), Some(3 * PAGE), None]
        );
    }

    #[test]
    fn a_page_reads_as_its_layer_says_or_else_as_the_disk_below() {
        let (key, other) = (Key::new(), Key::new());
        let [base, middle, _] = three(key);
        let mut pages = Pages::new(id(3), 10 * PAGE, key).expect("small");
        pages.set_hash(PAGE + 7, pages.hash(&A));
        let [a, b, zeros] = [A, B, ZEROS].map(|page| Some(pages.hash(&page)));
        let reads = |pages: &Pages, below: &Expected| [0, 1, 2, 4].map(|page| pages.hash_over(below, page * PAGE));
        // Nothing is known, all but the base's, all; and that there is nothing.
        let mut below = Expected::default();
        assert_eq!((reads(&pages, &below), below.key()), ([None, a, None, None], None));
        assert!(below.add(middle, Some(id(1))));
        assert_eq!((reads(&pages, &below), below.key()), ([None, a, b, None], Some(key)));
        below.add(base, None);
        assert_eq!(reads(&pages, &below), [a, a, b, zeros]);
        assert_eq!(reads(&pages, &Expected::zeros(key)), [zeros, a, zeros, zeros]);
        // Hashes of another key say nothing of this one's.
        assert_eq!(reads(&pages, &Expected::zeros(other)), [None, a, None, None]);
        let mut stranger = Pages::new(id(3), 10 * PAGE, other).expect("small");
        stranger.set(0, &A);
        assert_eq!(reads(&stranger, &below), [Some(stranger.hash(&A)), None, None, None]);
    }

    #[test]
    fn a_merge_is_taken_over_and_only_then_the_record_is_whole() {
        let [base, middle, mut top] = three(Key::new());
        assert!(!top.is_whole(Some(id(1))), "the middle was merged");
        let mut expected = Expected::default();
        assert!(!expected.add(top.clone(), Some(id(1))), "what is below may be hidden by what was merged");
        top.take_over(middle);
        assert!(top.is_whole(Some(id(1))));
        let mut expected = Expected::default();
        assert!(expected.add(top.clone(), Some(id(1))));
        assert!(!expected.add(base.clone(), None));
        assert_eq!(shows(&expected), ["a", "b", "-", "a", "-"]);
        top.take_over(base);
        assert!(top.is_whole(None));
        let mut expected = Expected::default();
        expected.add(top, None);
        assert_eq!(shows(&expected), ["a", "b", "-", "a", "-"]);
    }

    #[test]
    fn a_record_of_another_key_counts_for_nothing() {
        let ([_, middle, mut top], [base, other, _]) = (three(Key::new()), three(Key::new()));
        let mut expected = Expected::default();
        assert!(expected.add(top.clone(), Some(id(2))) && expected.add(middle, Some(id(1))));
        assert!(!expected.add(base, None));
        assert_eq!(shows(&expected), ["?", "b", "-", "?", "?"]);
        top.take_over(other);
        assert!(!top.is_whole(Some(id(1))) && top.table.get(1).is_none());
    }
}
