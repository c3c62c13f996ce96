//! Captures of random RAM, one over another, against plain arrays of pages.

mod support;

use image::hashes::{Key, Pages};
use image::{Access, Chain, Source};
use memory::stream::{Block, DeviceState, Emitter, Event, PAGE, Parser};
use memory::{Counts, ErrorKind, NewLayer, Sealed, Signal};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use std::io::Read;
use store::sim::{At, Sim, Times};
use support::Disks;
use uuid::Uuid;

/// A guest: its blocks, and what each page holds (0: zeros).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Guest {
    blocks: Vec<(String, Vec<u8>)>,
    devices: DeviceState,
}

/// What a new QEMU's small blocks hold.
const ROM: u8 = 0xee;

/// A page's bytes: all zeros but one, so that comparing a part of it is not enough.
fn page(seed: u8) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[usize::from(seed) * 16 + 15] = seed;
    page
}

impl Guest {
    fn blocks(&self) -> Vec<Block> {
        self.blocks.iter().map(|(name, pages)| Block { name: name.clone(), len: (pages.len() * PAGE) as u64 }).collect()
    }

    /// Its pages, in the order of the blocks: block, number, what it holds.
    fn pages(&self) -> Vec<(usize, usize, u8)> {
        let pages = |(block, (_, pages)): (usize, &(String, Vec<u8>))| -> Vec<_> {
            pages.iter().enumerate().map(|(at, seed)| (block, at, *seed)).collect()
        };
        self.blocks.iter().enumerate().flat_map(pages).collect()
    }

    /// Pages of it, with other data.
    fn others(&self, others: &[(Index, Index, u8)]) -> Vec<(usize, usize, u8)> {
        let other = |(block, at, seed): &(Index, Index, u8)| {
            let block = block.index(self.blocks.len());
            (block, at.index(self.blocks[block].1.len()), *seed)
        };
        others.iter().map(other).collect()
    }

    /// Its stream, pages in the order of the blocks, after `first`: pages that are sent once more, before, with other data.
    fn stream(&self, first: &[(Index, Index, u8)]) -> Vec<u8> {
        self.stream_of(&[self.others(first), self.pages()])
    }

    /// A stream of these pages, in this order.
    fn stream_of(&self, parts: &[Vec<(usize, usize, u8)>]) -> Vec<u8> {
        let mut out = Vec::new();
        let blocks = self.blocks();
        let mut emitter = Emitter::new(7, &blocks);
        Emitter::prelude(&mut out, "pc-test-1.0");
        emitter.start(&mut out);
        for pages in parts {
            emitter.open_part(&mut out);
            for (block, at, seed) in pages {
                send(&mut emitter, &mut out, *block, *at, *seed);
            }
            emitter.close(&mut out);
        }
        Emitter::finish(&mut out, &self.devices);
        out
    }

    /// The guest that a stream makes of one that is new: RAM is zero, smaller blocks are filled with what may be a ROM.
    fn of(stream: &[u8]) -> Self {
        let mut guest = Self { blocks: Vec::new(), devices: DeviceState::default() };
        let (mut parser, mut input, mut tail) = (Parser::new(), stream, Vec::new());
        while let Some(event) = parser.next(&mut input).unwrap() {
            match event {
                Event::Blocks { blocks, .. } => {
                    let fresh = |block: &Block| if block.len > 64 << 20 { 0 } else { ROM };
                    let pages = |block: &Block| (block.name.clone(), vec![fresh(block); block.len as usize / PAGE]);
                    guest.blocks = blocks.iter().map(pages).collect();
                }
                Event::Page { block, offset, data } => {
                    let seed = *data.iter().find(|byte| **byte != 0).expect("zeros are sent as zeros");
                    assert_eq!(*data, page(seed));
                    guest.blocks[block].1[offset as usize / PAGE] = seed;
                }
                Event::ZeroPage { block, offset } => guest.blocks[block].1[offset as usize / PAGE] = 0,
                Event::DeviceState(bytes) => tail.extend_from_slice(bytes),
                Event::Header | Event::Configuration(_) | Event::Pages => {}
            }
        }
        parser.finish().unwrap();
        guest.devices = DeviceState::split(tail).unwrap();
        guest
    }

    /// What a capture over `parent` does, if every page comes once.
    fn counts_over(&self, parent: Option<&Self>) -> Counts {
        let mut counts = Counts::default();
        for (block, (_, pages)) in self.blocks.iter().enumerate() {
            for (at, &page) in pages.iter().enumerate() {
                let beneath = parent.map_or(0, |parent| parent.blocks[block].1[at]);
                *match (page, beneath) {
                    (0, 0) => &mut counts.empty,
                    (0, _) => &mut counts.zeroed,
                    _ if page == beneath => &mut counts.same,
                    _ => &mut counts.stored,
                } += 1;
            }
        }
        counts
    }
}

fn send(emitter: &mut Emitter<'_>, out: &mut Vec<u8>, block: usize, at: usize, seed: u8) {
    match seed {
        0 => emitter.zero_page(out, block, (at * PAGE) as u64),
        seed => emitter.page(out, block, (at * PAGE) as u64, &page(seed)),
    }
}

/// Reads in pieces of a length that suits nobody.
struct Crumbs<'a>(&'a [u8]);

impl Read for Crumbs<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = buf.len().min(5003);
        self.0.read(&mut buf[..len])
    }
}

fn restored(disks: &Disks, disk: usize) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut last = 0;
    let written = memory::restore(&disks.sealed(disk), &mut stream, |done, total| {
        assert!(last <= done && done <= total, "{last}, {done} of {total}");
        last = done;
    });
    assert_eq!(written.unwrap(), stream.len() as u64);
    stream
}

fn guest() -> impl Strategy<Value = Guest> {
    let seeds = prop_oneof![3 => Just(0u8), 2 => any::<u8>(), 2 => Just(9u8)];
    let runs = vec((seeds, 1..200usize), 1..8);
    let block = runs.prop_map(|runs| runs.into_iter().flat_map(|(seed, len)| vec![seed; len]).collect());
    let devices = (vec(any::<u8>(), 1..9000), "[a-z ]{0,5000}").prop_map(|(mut state, text)| {
        state[0] = 4;
        DeviceState { state, description: format!("{{{text}").into_bytes() }
    });
    (vec(block, 1..4), devices).prop_map(|(blocks, devices)| {
        let named = blocks.into_iter().enumerate().map(|(index, pages)| (format!("block{index}"), pages));
        Guest { blocks: named.collect(), devices }
    })
}

/// What happens between two captures: pages from here on, so many, are filled.
type Changes = Vec<(Index, Index, usize, u8)>;

fn change(guest: &mut Guest, changes: &Changes) {
    for (block, at, len, seed) in changes {
        let block = block.index(guest.blocks.len());
        let pages = &mut guest.blocks[block].1;
        let at = at.index(pages.len());
        let end = (at + len).min(pages.len());
        pages[at..end].fill(*seed);
    }
    guest.devices.state.push(1);
}

fn changes() -> impl Strategy<Value = Changes> {
    vec((any::<Index>(), any::<Index>(), 1..100usize, prop_oneof![Just(0u8), Just(9), any::<u8>()]), 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Captured, changed, captured over it, again and again: every disk gives its own guest back, and stored no page too many.
    #[test]
    fn each_capture_gives_its_guest_back(mut now in guest(), weeks in vec(changes(), 0..4)) {
        let mut disks = Disks::new();
        let mut guests: Vec<Guest> = Vec::new();
        for week in std::iter::once(None).chain(weeks.iter().map(Some)) {
            if let Some(changes) = week {
                change(&mut now, changes);
            }
            let parent = guests.len().checked_sub(1);
            let (_, captured) = disks.capture(Crumbs(&now.stream(&[])), parent, |_| {}).unwrap();
            prop_assert_eq!(captured.on_parent, parent.is_some());
            prop_assert_eq!(captured.counts, now.counts_over(guests.last()));
            prop_assert_eq!(&captured.machine, "pc-test-1.0");
            guests.push(now.clone());
        }
        for (disk, guest) in guests.iter().enumerate() {
            prop_assert_eq!(&Guest::of(&restored(&disks, disk)), guest);
            let info = memory::inspect(&disks.open(disk, Access::Read)).unwrap();
            prop_assert_eq!((info.machine, info.blocks), ("pc-test-1.0".to_owned(), guest.blocks()));
            prop_assert_eq!(info.device_state, guest.devices.state.len() as u64);
            // What was recorded as it was written is what is recorded of what lies there.
            prop_assert_eq!(disks.record(disk), &disks.record_anew(disk));
        }
    }

    /// Plain migration sends pages again: the last one counts, over a parent and over none.
    #[test]
    fn the_last_page_counts(now in guest(), first in vec((any::<Index>(), any::<Index>(), any::<u8>()), 1..60), over in any::<bool>()) {
        let mut disks = Disks::new();
        let parent = over.then(|| disks.capture(&*now.stream(&[]), None, |_| {}).unwrap().0);
        let (disk, _) = disks.capture(&*now.stream(&first), parent, |_| {}).unwrap();
        prop_assert_eq!(Guest::of(&restored(&disks, disk)), now);
    }
}

/// How much is recorded of a layer.
#[derive(Debug, Clone)]
enum Recorded {
    All,
    /// These pages.
    Some(Vec<Index>),
    WithAnotherKey,
    Nothing,
}

fn recorded() -> impl Strategy<Value = Recorded> {
    prop_oneof![
        4 => Just(Recorded::All),
        2 => vec(any::<Index>(), 1..60).prop_map(Recorded::Some),
        1 => Just(Recorded::WithAnotherKey),
        1 => Just(Recorded::Nothing),
    ]
}

/// What a disk's own layer holds, without saying where in its file.
fn map(disks: &Disks, disk: usize) -> Vec<(u64, u64, std::mem::Discriminant<Source>)> {
    let (layer, mut runs) = (disks.layer(disk), Vec::new());
    layer.map(0, layer.info().size, &mut runs).unwrap();
    runs.iter().map(|run| (run.offset, run.len, std::mem::discriminant(&run.source))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is recorded of the parent, and in whatever order pages come, how often: a capture makes the same of them as one that reads the
    /// parent.
    #[test]
    fn what_is_recorded_of_the_parent_changes_nothing(
        mut now in guest(),
        weeks in vec(changes(), 1..4),
        records in vec(recorded(), 3),
        swaps in vec((any::<Index>(), any::<Index>()), 0..60),
        between in vec((any::<Index>(), any::<Index>(), any::<u8>()), 0..60),
    ) {
        let mut disks = Disks::new();
        let (last, weeks) = weeks.split_last().unwrap();
        let (mut parent, _) = disks.capture(&*now.stream(&[]), None, |_| {}).unwrap();
        for week in weeks {
            change(&mut now, week);
            (parent, _) = disks.capture(&*now.stream(&[]), Some(parent), |_| {}).unwrap();
        }
        change(&mut now, last);
        let (mut pages, count) = (now.pages(), now.pages().len());
        for (a, b) in &swaps {
            pages.swap(a.index(count), b.index(count));
        }
        let stream = now.stream_of(&[pages, now.others(&between), now.pages()]);

        let starts = memory::table::Layout::of(&now.blocks()).blocks;
        let place = |page: &Index| {
            let (block, at, _) = now.pages()[page.index(count)];
            starts[block] + (at * PAGE) as u64
        };
        let by_records = disks.sealed_by(parent, |disk| match &records[disk] {
            Recorded::All => Some(disks.record(disk).clone()),
            Recorded::Some(pages) => Some(disks.record_some(disk, pages.iter().map(place))),
            Recorded::WithAnotherKey => Some(disks.record_by(disk, Key::new())),
            Recorded::Nothing => None,
        });
        let by_reading = disks.open(parent, Access::Read).into();
        let (one, by_records) = disks.capture_over(&*stream, Some((parent, by_records)), |_| {}).unwrap();
        let (other, by_reading) = disks.capture_over(&*stream, Some((parent, by_reading)), |_| {}).unwrap();
        prop_assert_eq!(by_records.counts, by_reading.counts);
        prop_assert_eq!(map(&disks, one), map(&disks, other));
        let normal = |pages: &Pages| pages.clone().of(Uuid::nil(), None);
        prop_assert_eq!(normal(disks.record(one)), normal(disks.record(other)));
        prop_assert_eq!(disks.record(one), &disks.record_anew(one));
        prop_assert_eq!(restored(&disks, one), restored(&disks, other));
        prop_assert_eq!(Guest::of(&restored(&disks, one)), now);
    }
}

/// Once the layers' own tables are in memory nothing can be read any more.
#[test]
fn a_parent_that_is_recorded_is_not_read() {
    let sim = Sim::new();
    let mut disks = Disks::on(sim.root());
    let mut guest = small((0..3000u32).map(|at| (at % 7) as u8).collect());
    let (first, _) = disks.capture(&*guest.stream(&[]), None, |_| {}).unwrap();
    guest.blocks[0].1[1000..1010].fill(9);
    let (second, _) = disks.capture(&*guest.stream(&[]), Some(first), |_| {}).unwrap();
    let before = guest.clone();
    guest.blocks[0].1[2000..2010].fill(0);
    guest.blocks[0].1[7..70].fill(9);
    let stream = guest.stream_of(&[before.pages(), guest.pages()]);
    let (recorded, unknown) = (disks.sealed(second), Sealed::from(disks.open(second, Access::Read)));
    let mut capture = |sealed: &Sealed| {
        let new_layer = |new: NewLayer| {
            let made = disks.make(new, Some(second));
            made.chain.runs(0, new.size, usize::MAX)?;
            sim.fail(At::Read(sim.counts().reads), store::ErrorKind::Io, Times::Forever);
            Ok(made)
        };
        let captured = memory::capture(&*stream, Some(sealed), new_layer, |_| {});
        sim.heal();
        captured
    };
    assert_eq!(capture(&unknown).unwrap_err().kind, ErrorKind::Image);
    let captured = capture(&recorded).unwrap();
    let (once, again) = (before.counts_over(Some(&before)), guest.counts_over(Some(&before)));
    let counts = Counts { same: once.same + again.same, empty: once.empty + again.empty, ..again };
    assert_eq!(captured.counts, counts);
    let sealed = Sealed::from(Chain::new(captured.chain.layers(), Access::Read).unwrap());
    let mut restored = Vec::new();
    memory::restore(&sealed, &mut restored, |_, _| {}).unwrap();
    assert_eq!(Guest::of(&restored), guest);
}

/// A guest with one block of these pages.
fn small(pages: Vec<u8>) -> Guest {
    let devices = DeviceState { state: vec![4, 1, 2, 3], description: b"{}".to_vec() };
    Guest { blocks: vec![("ram".into(), pages)], devices }
}

#[test]
fn signals_come_once_and_in_order() {
    let guest = small((0..20_000u32).map(|at| at as u8).collect());
    let mut signals = Vec::new();
    Disks::new().capture(&*guest.stream(&[]), None, |signal| signals.push(signal)).unwrap();
    assert_eq!(signals[0], Signal::Pages);
    let done: Vec<_> = signals[1..]
        .iter()
        .map(|signal| match signal {
            Signal::Progress { done, total } => {
                assert_eq!(*total, 20_000 * PAGE as u64);
                *done
            }
            Signal::Pages => panic!("the first pages come once"),
        })
        .collect();
    assert!(done.len() > 2 && done.is_sorted());
    assert_eq!(done.last(), Some(&(20_000 * PAGE as u64)));
}

#[test]
fn ram_of_another_shape_is_no_parent() {
    let mut disks = Disks::new();
    let (first, _) = disks.capture(&*small(vec![1; 10]).stream(&[]), None, |_| {}).unwrap();
    let larger = small(vec![1; 11]);
    let (second, captured) = disks.capture(&*larger.stream(&[]), Some(first), |_| {}).unwrap();
    assert!(!captured.on_parent);
    assert_eq!(captured.counts.stored, 11);
    assert_eq!(Guest::of(&restored(&disks, second)), larger);
}

#[test]
fn a_damaged_parent_is_no_parent() {
    let mut disks = Disks::new();
    let guest = small(vec![1; 10]);
    let (first, _) = disks.capture(&*guest.stream(&[]), None, |_| {}).unwrap();
    let chain = disks.open(first, Access::Write);
    chain.write(&[1], 200).unwrap();
    chain.close().unwrap();
    let (_, captured) = disks.capture(&*guest.stream(&[]), Some(first), |_| {}).unwrap();
    assert!(!captured.on_parent);
}

#[test]
fn damage_is_found_before_anything_is_sent() {
    let mut disks = Disks::new();
    let guest = small(vec![1; 10]);
    let (disk, _) = disks.capture(&*guest.stream(&[]), None, |_| {}).unwrap();
    let layout = memory::table::Layout::of(&guest.blocks());
    for at in [8, 130, layout.prelude + 3, layout.description, layout.state + 3] {
        let chain = disks.open(disk, Access::Write);
        let mut byte = [0];
        chain.read(&mut byte, at).unwrap();
        chain.write(&[byte[0] ^ 0x80], at).unwrap();
        chain.flush().unwrap();
        let mut stream = Vec::new();
        let sealed = disks.open(disk, Access::Read).into();
        let error = memory::restore(&sealed, &mut stream, |_, _| {}).unwrap_err();
        let expected = if at == 8 { ErrorKind::Unsupported } else { ErrorKind::Damaged };
        assert_eq!((error.kind, stream.len()), (expected, 0), "at {at}: {error}");
        chain.write(&byte, at).unwrap();
        chain.close().unwrap();
    }
    assert_eq!(Guest::of(&restored(&disks, disk)), guest);
}

#[test]
fn a_capture_that_fails_leaves_no_memory_disk() {
    let guest = small(vec![1; 3000]);
    let stream = guest.stream(&[]);
    for cut in [stream.len() - 1, stream.len() - 10, stream.len() - 100_000, 5000] {
        let mut disks = Disks::new();
        let error = disks.capture(&stream[..cut], None, |_| {}).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Truncated, "cut at {cut}: {error}");
        assert_eq!(memory::inspect(&disks.open(0, Access::Read)).unwrap_err().kind, ErrorKind::Damaged);
    }
}

#[test]
fn a_missing_page_is_an_error() {
    let mut out = Vec::new();
    let blocks = small(vec![1; 3]).blocks();
    let mut emitter = Emitter::new(7, &blocks);
    Emitter::prelude(&mut out, "m");
    emitter.start(&mut out);
    emitter.open_end(&mut out);
    emitter.page(&mut out, 0, 0, &page(1));
    emitter.page(&mut out, 0, 8192, &page(1));
    emitter.close(&mut out);
    Emitter::finish(&mut out, &small(Vec::new()).devices);
    let error = Disks::new().capture(&*out, None, |_| {}).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete, "{error}");
}

#[test]
fn a_disk_that_cannot_be_written_ends_the_capture() {
    let guest = small((0..100_000u32).map(|at| at as u8).collect());
    let stream = guest.stream(&[]);
    let mut disks = Disks::new();
    let error = memory::capture(&*stream, None, |_| Err("no room for it".into()), |_| {}).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Image);
    // A chain that refuses writes, and far more data than the batches hold.
    let new_layer = |new| {
        let memory::Made { chain, pages } = disks.make(new, None);
        chain.close().unwrap();
        Ok(memory::Made { chain: std::sync::Arc::new(disks.open(0, Access::Read)), pages })
    };
    let error = memory::capture(&*stream, None, new_layer, |_| {}).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Image, "{error}");
    assert!(error.source.is_some(), "the disk's own error is the one that is told");
}

/// Zeros of a large block are left out; what is data arrives all the same.
#[test]
fn zeros_of_large_blocks_are_not_sent() {
    let mut pages = vec![0; (65 << 20) / PAGE];
    pages[3] = 3;
    pages[9000] = 7;
    let guest = small(pages);
    let mut disks = Disks::new();
    let (disk, captured) = disks.capture(&*guest.stream(&[]), None, |_| {}).unwrap();
    assert_eq!(captured.counts.stored, 2);
    let stream = restored(&disks, disk);
    assert!(stream.len() < 3 * PAGE, "{} bytes", stream.len());
    assert_eq!(Guest::of(&stream), guest);
    assert!(disks.allocated(disk) < 8 << 20, "{} bytes", disks.allocated(disk));
}
