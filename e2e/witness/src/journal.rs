//! A chain of hashed records over one or two disks, and the comparison of what they say with what RAM says.
//!
//! Record *n* goes to disk *n* mod 2 and is flushed before record *n+1* is begun. So at every moment
//! - what RAM calls flushed is on its disk,
//! - nothing newer than the one write that may be under way is on any disk,
//! - the disks differ by at most one record.
//!
//! A machine put together from an older RAM and a newer disk (or two disks of different age) breaks one of these.
//!
//! ```text
//!   disk, from AT:   | slot 0 | slot 1 | … | slot 255 |      a ring: record n lies in slot (n / disks) mod 256
//!   a record:        magic, journal, layout, disks, seq, prev, nonce[2], filler …, hash   4 KiB; prev is the hash of record seq-1
//! ```

use std::collections::BTreeMap;
use std::io::Result;

use crate::disk::{Aligned, Disk, UNIT};
use crate::pattern::{Hash, Pattern};

/// Where the ring begins on each disk, in bytes: past what partition tables and boot sectors use.
const AT: u64 = 1 << 20;
/// Records in the ring of one disk.
const SLOTS: u64 = 256;
const MAGIC: u64 = u64::from_le_bytes(*b"TENBYJNL");
const HEADER: usize = 8 * 8;
const HASH_AT: usize = UNIT as usize - 8;

/// The random number that this boot's RAM alone holds.
pub(crate) type Nonce = [u64; 2];

/// One entry of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    journal: u64,
    /// Over which disks the journal lies: see [`layout`].
    layout: u64,
    disks: u64,
    seq: u64,
    prev: u64,
    nonce: Nonce,
}

impl Record {
    fn encode(&self, to: &mut [u8]) {
        let [nonce, more] = self.nonce;
        let fields = [MAGIC, self.journal, self.layout, self.disks, self.seq, self.prev, nonce, more];
        for (field, place) in fields.iter().zip(to.chunks_exact_mut(8)) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        // The filler differs in every record: half of a new one and half of an old one is no record.
        Pattern::new(self.journal ^ self.seq).fill(HEADER as u64, &mut to[HEADER..HASH_AT]);
        let hash = Hash::of(&to[..HASH_AT]);
        to[HASH_AT..].copy_from_slice(&hash.to_le_bytes());
    }

    /// The record and its hash, if `from` holds a whole one.
    fn decode(from: &[u8]) -> Option<(Self, u64)> {
        let word = |at: usize| from[at..at + 8].iter().rev().fold(0_u64, |value, &byte| value << 8 | u64::from(byte));
        let hash = word(HASH_AT);
        if word(0) != MAGIC || hash != Hash::of(&from[..HASH_AT]) {
            return None;
        }
        let record = Self {
            journal: word(8),
            layout: word(16),
            disks: word(24),
            seq: word(32),
            prev: word(40),
            nonce: [word(48), word(56)],
        };
        (record.disks > 0).then_some((record, hash))
    }

    fn slot(&self) -> u64 {
        self.seq / self.disks % SLOTS
    }
}

/// A number for this very set of disks: one that is added, removed or replaced changes it.
fn layout(disks: &[Disk]) -> u64 {
    let names: Vec<u8> = disks.iter().flat_map(|disk| disk.serial.bytes().chain([0])).collect();
    Hash::of(&names) ^ disks.len() as u64
}

/// What the ring of one disk holds.
struct Ring {
    records: Vec<(Record, u64)>,
    /// Slots that hold neither zeros nor a record in its own place.
    damaged: u64,
}

impl Ring {
    fn read(disk: &Disk) -> Result<Self> {
        let mut bytes = Aligned::new(SLOTS * UNIT);
        disk.read(AT, &mut bytes)?;
        let mut ring = Self { records: Vec::new(), damaged: 0 };
        for (slot, block) in (0..).zip(bytes.chunks_exact(UNIT as usize)) {
            match Record::decode(block) {
                Some((record, hash)) if record.slot() == slot => ring.records.push((record, hash)),
                None if block.iter().all(|&byte| byte == 0) => {}
                _ => ring.damaged += 1,
            }
        }
        Ok(ring)
    }

    fn last(&self) -> Option<&(Record, u64)> {
        self.records.iter().max_by_key(|(record, _)| record.seq)
    }

    /// Nothing there that is not ours to overwrite.
    fn is_ours(&self) -> bool {
        self.damaged == 0 || !self.records.is_empty()
    }
}

/// What the disks held when the witness woke.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    /// The last record of an older journal that goes on here; 0 when a new one was begun.
    pub(crate) seq: u64,
    /// The nonce of the boot that wrote it.
    pub(crate) nonce: Nonce,
    /// What was wrong with it.
    pub(crate) problems: Vec<String>,
}

/// The journal as RAM remembers it.
pub(crate) struct Journal {
    disks: Vec<Disk>,
    id: u64,
    nonce: Nonce,
    /// The last record that its disk has acknowledged, flush included; 0 for none.
    flushed: u64,
    last_hash: u64,
    /// What was there at the start.
    pub(crate) found: Found,
}

impl Journal {
    /// Takes up the journal that `disks` hold, or begins a new one called `fresh_id`. At most two disks are used: the first ones
    /// that are large enough and hold either a journal or zeros where it would lie.
    pub(crate) fn open(disks: Vec<Disk>, nonce: Nonce, fresh_id: u64) -> Self {
        let mut found = Found::default();
        let mut used = Vec::new();
        let mut rings = Vec::new();
        for disk in disks.into_iter().filter(|disk| disk.bytes >= AT + SLOTS * UNIT) {
            match Ring::read(&disk) {
                Ok(ring) if ring.is_ours() && used.len() < 2 => {
                    used.push(disk);
                    rings.push(ring);
                }
                Ok(_) => {}
                Err(error) => found.problems.push(format!("{} cannot be read: {error}", disk.name)),
            }
        }
        let mut journal = Self { disks: used, id: fresh_id, nonce, flushed: 0, last_hash: 0, found };
        journal.take_up(&rings);
        journal
    }

    /// Continues what the rings agree on, or wipes them.
    fn take_up(&mut self, rings: &[Ring]) {
        let Some((record, hash)) = self.newest_of_all(rings) else { return self.wipe(rings) };
        self.id = record.journal;
        self.flushed = record.seq;
        self.last_hash = *hash;
        self.found.seq = record.seq;
        self.found.nonce = record.nonce;
        // A power cut may have torn the one record that was under way.
        let problems = self.compare(rings, 1);
        self.found.problems.extend(problems);
    }

    /// The newest record of a journal that lies over just these disks. One over other disks is no longer kept (one was added, removed
    /// or replaced); two over the same disks, or one that is on one disk only, are a contradiction.
    fn newest_of_all<'a>(&mut self, rings: &'a [Ring]) -> Option<&'a (Record, u64)> {
        let layout = layout(&self.disks);
        let lasts: Vec<_> = rings.iter().filter_map(Ring::last).filter(|(record, _)| record.layout == layout).collect();
        let newest = *lasts.iter().max_by_key(|(record, _)| record.seq)?;
        // After a single record the second disk is still blank.
        let everywhere = lasts.len() as u64 >= newest.0.disks.min(newest.0.seq);
        if everywhere && lasts.iter().all(|(record, _)| record.journal == newest.0.journal) {
            return Some(newest);
        }
        self.found.problems.push("the disks hold different journals".to_owned());
        None
    }

    /// Removes older journals, whose records could be taken for newer ones.
    fn wipe(&mut self, rings: &[Ring]) {
        let blank = Aligned::new(SLOTS * UNIT);
        for (disk, ring) in self.disks.iter().zip(rings) {
            let blank_already = ring.records.is_empty() && ring.damaged == 0;
            if !blank_already && let Err(error) = disk.write(AT, &blank).and_then(|()| disk.flush()) {
                self.found.problems.push(format!("{} cannot be written: {error}", disk.name));
            }
        }
    }

    /// Writes one record and flushes it. Whatever fails leaves RAM's idea of the journal as it was.
    pub(crate) fn step(&mut self) -> Result<()> {
        if self.disks.is_empty() {
            return Ok(());
        }
        let disks = self.disks.len() as u64;
        let record = Record {
            journal: self.id,
            layout: layout(&self.disks),
            disks,
            seq: self.flushed + 1,
            prev: self.last_hash,
            nonce: self.nonce,
        };
        let mut block = Aligned::new(UNIT);
        record.encode(&mut block);
        let disk = &self.disks[(record.seq % disks) as usize];
        disk.write(AT + record.slot() * UNIT, &block)?;
        disk.flush()?;
        self.last_hash = Hash::of(&block[..HASH_AT]);
        self.flushed = record.seq;
        Ok(())
    }

    /// The last record that is certainly on its disk.
    pub(crate) fn flushed(&self) -> u64 {
        self.flushed
    }

    /// The name that the journal's records carry.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The disks that carry the journal.
    pub(crate) fn disk_names(&self) -> Vec<&str> {
        self.disks.iter().map(|disk| disk.name.as_str()).collect()
    }

    /// Reads the disks and says what contradicts RAM; no answer is a good answer.
    pub(crate) fn check(&self) -> Vec<String> {
        match self.disks.iter().map(Ring::read).collect::<Result<Vec<_>>>() {
            Ok(rings) => self.compare(&rings, 0),
            Err(error) => vec![format!("a disk cannot be read: {error}")],
        }
    }

    /// What in `rings` contradicts `self`, up to `torn` slots of which may hold the remains of a write under way.
    fn compare(&self, rings: &[Ring], torn: u64) -> Vec<String> {
        let mut problems = Vec::new();
        let disks = rings.len() as u64;
        let mut chain = BTreeMap::new();
        for (index, ring) in (0..).zip(rings) {
            let name = &self.disks[index as usize].name;
            let own =
                ring.records.iter().filter(|(record, _)| record.journal == self.id && record.seq % disks == index);
            chain.extend(own.map(|(record, hash)| (record.seq, (record.prev, *hash))));
            problems.extend(self.compare_ends(name, ring, index, disks));
        }
        let damaged: u64 = rings.iter().map(|ring| ring.damaged).sum();
        if damaged > torn {
            problems.push(format!("{damaged} records are damaged"));
        }
        problems.extend(self.compare_chain(&chain, disks));
        problems
    }

    /// Whether the newest record of one disk is the newest that RAM knows of there.
    fn compare_ends(&self, name: &str, ring: &Ring, index: u64, disks: u64) -> Option<String> {
        let expected =
            (self.flushed.saturating_sub(disks - 1)..=self.flushed).find(|seq| seq % disks == index).unwrap_or(0);
        let newest = ring.last().map_or(0, |(record, _)| if record.journal == self.id { record.seq } else { 0 });
        match newest.cmp(&expected) {
            std::cmp::Ordering::Less => {
                Some(format!("{name} is behind: its last record is {newest}, RAM saw {expected} flushed"))
            }
            std::cmp::Ordering::Greater => {
                Some(format!("{name} is ahead: its last record is {newest}, RAM knows of {expected}"))
            }
            std::cmp::Ordering::Equal => None,
        }
    }

    /// Whether every record that the rings should hold is there and names the one before it.
    fn compare_chain(&self, chain: &BTreeMap<u64, (u64, u64)>, disks: u64) -> Option<String> {
        // The slot of the record to be written next is left out: a write to it may be under way.
        let oldest = (self.flushed + 2).saturating_sub(disks * SLOTS).max(1);
        let mut before = None;
        for seq in oldest..=self.flushed {
            let Some(&(prev, hash)) = chain.get(&seq) else { return Some(format!("record {seq} is missing")) };
            let linked = before.is_none_or(|before| before == prev) && (seq > 1 || prev == 0);
            if !linked {
                return Some(format!("record {seq} does not continue the one before it"));
            }
            before = Some(hash);
        }
        (self.flushed > 0 && before != Some(self.last_hash))
            .then(|| format!("record {} is not the one that RAM wrote", self.flushed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};

    /// Two files that play the disks; removed at the end.
    struct Desk(PathBuf);

    impl Desk {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("witness-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            for disk in ["vda", "vdb"] {
                std::fs::File::create(folder.join(disk)).unwrap().set_len(4 << 20).unwrap();
            }
            Self(folder)
        }

        fn disks(&self, names: &[&str]) -> Vec<Disk> {
            names.iter().map(|name| Disk::open_path(&self.0.join(name)).unwrap()).collect()
        }

        fn both(&self) -> Vec<Disk> {
            self.disks(&["vda", "vdb"])
        }

        fn copy(&self, name: &str) -> Vec<u8> {
            std::fs::read(self.0.join(name)).unwrap()
        }

        fn put(&self, name: &str, content: &[u8]) {
            // In place: the journal holds the file open.
            open(&self.0.join(name)).write_all_at(content, 0).unwrap();
        }
    }

    impl Drop for Desk {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn open(path: &Path) -> std::fs::File {
        std::fs::OpenOptions::new().write(true).open(path).unwrap()
    }

    fn steps(journal: &mut Journal, count: usize) {
        for _ in 0..count {
            journal.step().unwrap();
        }
    }

    #[test]
    fn it_is_sound_at_every_length_and_taken_up_again() {
        let desk = Desk::new("sound");
        let mut journal = Journal::open(desk.both(), [1, 2], 99);
        for _ in 0..3 * SLOTS {
            assert_eq!(journal.check(), Vec::<String>::new(), "at {}", journal.flushed());
            journal.step().unwrap();
        }
        let again = Journal::open(desk.both(), [3, 4], 7);
        assert_eq!((again.id(), again.flushed(), again.found.nonce), (99, 3 * SLOTS, [1, 2]));
        assert!(again.found.problems.is_empty(), "{:?}", again.found.problems);
    }

    #[test]
    fn one_disk_or_none_is_enough() {
        let desk = Desk::new("one");
        let mut journal = Journal::open(desk.disks(&["vdb"]), [1, 2], 5);
        steps(&mut journal, 300);
        assert!(journal.check().is_empty());
        let mut none = Journal::open(Vec::new(), [1, 2], 5);
        steps(&mut none, 3);
        assert!(none.check().is_empty());
    }

    #[test]
    fn a_disk_of_another_age_is_noticed() {
        let desk = Desk::new("age");
        let mut journal = Journal::open(desk.both(), [1, 2], 99);
        steps(&mut journal, 10);
        let (old_a, old_b) = (desk.copy("vda"), desk.copy("vdb"));
        steps(&mut journal, 3);
        let new_a = desk.copy("vda");
        desk.put("vda", &old_a);
        assert!(journal.check()[0].contains("vda is behind"));
        desk.put("vda", &new_a);
        assert!(journal.check().is_empty());
        desk.put("vdb", &old_b);
        assert!(!journal.check().is_empty());
        let woken = Journal::open(desk.both(), [3, 4], 100);
        assert!(!woken.found.problems.is_empty(), "two disks of different age at boot");
    }

    #[test]
    fn an_old_ram_over_newer_disks_is_noticed() {
        let desk = Desk::new("ahead");
        let mut journal = Journal::open(desk.both(), [1, 2], 99);
        steps(&mut journal, 10);
        let mut later = Journal::open(desk.both(), [1, 2], 99);
        steps(&mut later, 1);
        assert!(journal.check()[0].contains("ahead"), "{:?}", journal.check());
    }

    #[test]
    fn another_past_of_the_same_length_is_noticed() {
        let desk = Desk::new("past");
        let mut journal = Journal::open(desk.both(), [1, 2], 99);
        steps(&mut journal, 10);
        let (a, b) = (desk.copy("vda"), desk.copy("vdb"));
        steps(&mut journal, 6);
        desk.put("vda", &a);
        desk.put("vdb", &b);
        let mut other = Journal::open(desk.both(), [5, 6], 1);
        steps(&mut other, 6);
        assert!(!journal.check().is_empty(), "the same numbers, written by another boot");
    }

    #[test]
    fn damage_and_a_lost_flush_are_noticed_but_one_torn_record_is_not() {
        let desk = Desk::new("torn");
        let mut journal = Journal::open(desk.both(), [1, 2], 99);
        steps(&mut journal, 20);
        let next = Record { journal: 99, layout: 0, disks: 2, seq: 21, prev: 0, nonce: [0; 2] };
        let torn_at = AT + next.slot() * UNIT;
        open(&desk.0.join("vdb")).write_all_at(&[7; 512], torn_at).unwrap();
        assert!(Journal::open(desk.both(), [3, 4], 1).found.problems.is_empty(), "the write under way at a power cut");
        open(&desk.0.join("vda")).write_all_at(&[7; 512], AT + 5 * UNIT).unwrap();
        assert!(!Journal::open(desk.both(), [3, 4], 1).found.problems.is_empty());
        assert!(journal.check().iter().any(|problem| problem.contains("damaged")));
    }

    #[test]
    fn a_disk_added_or_removed_begins_a_new_journal() {
        let desk = Desk::new("added");
        let mut journal = Journal::open(desk.disks(&["vda"]), [1, 2], 99);
        steps(&mut journal, 40);
        let mut journal = Journal::open(desk.both(), [1, 2], 100);
        assert_eq!((journal.id(), journal.flushed()), (100, 0));
        assert!(journal.found.problems.is_empty() && journal.check().is_empty(), "{:?}", journal.check());
        steps(&mut journal, 3);
        let journal = Journal::open(desk.disks(&["vda"]), [1, 2], 101);
        assert!(journal.found.problems.is_empty() && journal.check().is_empty());
    }

    #[test]
    fn a_disk_with_something_else_on_it_is_left_alone() {
        let desk = Desk::new("foreign");
        open(&desk.0.join("vda")).write_all_at(&[7; 512], AT).unwrap();
        let journal = Journal::open(desk.both(), [1, 2], 99);
        assert_eq!(journal.disk_names(), ["vdb"]);
    }
}
