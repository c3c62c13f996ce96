//! The codec both ways: any stream, in pieces of any size; and bytes that are no stream.

use super::format::flag;
use super::{Block, DeviceState, Emitter, Event, MAX_BLOCKS, PAGE, Parser};
use crate::{ErrorKind, Result};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// A page of a block: which block, which page of it, and what it is filled with (`None`: a page of zeros).
type Record = (Index, Index, Option<u8>);

/// Everything that a stream says.
#[derive(Debug, Clone)]
struct Script {
    machine: String,
    section: u32,
    blocks: Vec<Block>,
    parts: Vec<Vec<Record>>,
    end: Option<Vec<Record>>,
    devices: DeviceState,
}

/// An [`Event`] that owns its data; adjacent pieces of device state joined.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Heard {
    Header,
    Configuration(String),
    Blocks(u32, Vec<Block>),
    Pages,
    Page(usize, u64, Vec<u8>),
    Zero(usize, u64),
    Devices(Vec<u8>),
}

impl Script {
    fn record(&self, (block, page, fill): &Record) -> (usize, u64, Option<u8>) {
        let with_pages: Vec<_> = (0..self.blocks.len()).filter(|&block| self.blocks[block].len > 0).collect();
        let block = *block.get(&with_pages);
        let page = page.index((self.blocks[block].len / PAGE as u64) as usize);
        (block, (page * PAGE) as u64, *fill)
    }

    fn sections(&self) -> impl Iterator<Item = (&Vec<Record>, bool)> {
        self.parts.iter().map(|part| (part, false)).chain(self.end.iter().map(|end| (end, true)))
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut emitter = Emitter::new(self.section, &self.blocks);
        Emitter::prelude(&mut out, &self.machine);
        emitter.start(&mut out);
        for (records, end) in self.sections() {
            if end {
                emitter.open_end(&mut out);
            } else {
                emitter.open_part(&mut out);
            }
            for record in records {
                match self.record(record) {
                    (block, offset, Some(fill)) => emitter.page(&mut out, block, offset, &[fill; PAGE]),
                    (block, offset, None) => emitter.zero_page(&mut out, block, offset),
                }
            }
            emitter.close(&mut out);
        }
        Emitter::finish(&mut out, &self.devices);
        out
    }

    fn expected(&self) -> Vec<Heard> {
        let mut heard = vec![Heard::Header, Heard::Configuration(self.machine.clone())];
        heard.push(Heard::Blocks(self.section, self.blocks.clone()));
        for (records, _) in self.sections() {
            heard.push(Heard::Pages);
            heard.extend(records.iter().map(|record| match self.record(record) {
                (block, offset, Some(fill)) => Heard::Page(block, offset, vec![fill; PAGE]),
                (block, offset, None) => Heard::Zero(block, offset),
            }));
        }
        let mut tail = Vec::new();
        self.devices.join(&mut tail);
        heard.push(Heard::Devices(tail));
        heard
    }
}

/// Parses bytes given in pieces that end at `cuts`; checks on the way that the parser holds no more than it says.
fn parse(bytes: &[u8], cuts: &[usize]) -> Result<Vec<Heard>> {
    let mut ends: Vec<_> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).chain([bytes.len()]).collect();
    ends.sort_unstable();
    let (mut parser, mut heard, mut at) = (Parser::new(), Vec::new(), 0);
    for end in ends {
        let mut piece = &bytes[at..end];
        while let Some(event) = parser.next(&mut piece)? {
            hear(&mut heard, event);
        }
        assert!(piece.is_empty(), "a piece is used up");
        assert!(parser.held() <= 4 * PAGE, "{} bytes held", parser.held());
        at = end;
    }
    parser.finish()?;
    Ok(heard)
}

fn hear(heard: &mut Vec<Heard>, event: Event<'_>) {
    let event = match event {
        Event::Header => Heard::Header,
        Event::Configuration(machine) => Heard::Configuration(machine.into()),
        Event::Blocks { section, blocks } => Heard::Blocks(section, blocks.into()),
        Event::Pages => Heard::Pages,
        Event::Page { block, offset, data } => Heard::Page(block, offset, data.to_vec()),
        Event::ZeroPage { block, offset } => Heard::Zero(block, offset),
        Event::DeviceState(bytes) => match heard.last_mut() {
            Some(Heard::Devices(before)) => return before.extend_from_slice(bytes),
            _ => Heard::Devices(bytes.into()),
        },
    };
    heard.push(event);
}

fn records() -> impl Strategy<Value = Vec<Record>> {
    vec((any::<Index>(), any::<Index>(), proptest::option::of(any::<u8>())), 0..6)
}

fn script() -> impl Strategy<Value = Script> {
    let pages = vec(0u64..40, 1..6).prop_filter("some RAM", |pages| pages.iter().any(|&pages| pages > 0));
    let devices = (vec(any::<u8>(), 0..200), vec(32u8..127, 0..200)).prop_map(|(mut state, text)| {
        state.insert(0, 0x04);
        DeviceState { state, description: [b"{".to_vec(), text].concat() }
    });
    let ram = (pages, any::<u32>(), vec(records(), 1..4), proptest::option::of(records()));
    ("[a-z0-9.-]{0,40}", ram, devices).prop_map(|(machine, ram, devices)| {
        let (mut pages, section, parts, end) = ram;
        // A list that ends in empty blocks would leave them unread: QEMU's reader has the same limit.
        while pages.last() == Some(&0) {
            pages.pop();
        }
        let block = |(index, pages): (usize, u64)| Block { name: format!("block-{index}"), len: pages * PAGE as u64 };
        let blocks = pages.into_iter().enumerate().map(block).collect();
        Script { machine, section, blocks, parts, end, devices }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_was_said_is_heard(script in script(), cuts in vec(any::<usize>(), 0..20)) {
        prop_assert_eq!(parse(&script.bytes(), &cuts).unwrap(), script.expected());
    }

    #[test]
    fn the_devices_are_split_off(script in script()) {
        let heard = parse(&script.bytes(), &[]).unwrap();
        let Some(Heard::Devices(tail)) = heard.last() else { panic!("no devices") };
        prop_assert_eq!(DeviceState::split(tail.clone()).unwrap(), script.devices);
    }

    #[test]
    fn a_stream_cut_short_is_noticed(script in script(), cut in any::<Index>(), cuts in vec(any::<usize>(), 0..5)) {
        let bytes = script.bytes();
        let bytes = &bytes[..cut.index(bytes.len())];
        let error = parse(bytes, &cuts).and_then(|mut heard| match heard.pop() {
            Some(Heard::Devices(tail)) => DeviceState::split(tail),
            _ => panic!("a stream without devices was taken for whole"),
        });
        prop_assert_eq!(error.unwrap_err().kind, ErrorKind::Truncated);
    }

    /// A damaged stream is an error or another stream; it is never a panic, and the pieces make no difference.
    #[test]
    fn damage_is_borne(
        script in script(),
        damage in vec((any::<Index>(), any::<u8>(), 0..4u8), 1..6),
        cuts in vec(any::<usize>(), 0..20),
    ) {
        let mut bytes = script.bytes();
        for (at, value, how) in damage {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = value,
                1 => bytes[at] ^= 1 << (value % 8),
                2 => drop(bytes.drain(at..(at + usize::from(value)).min(bytes.len()))),
                _ => bytes.insert(at, value),
            }
        }
        let (whole, pieces) = (parse(&bytes, &[]), parse(&bytes, &cuts));
        match (whole, pieces) {
            (Ok(whole), Ok(pieces)) => prop_assert_eq!(whole, pieces),
            (Err(whole), Err(pieces)) => prop_assert_eq!(whole.kind, pieces.kind),
            (whole, pieces) => prop_assert!(false, "{whole:?} but {pieces:?}"),
        }
    }

    #[test]
    fn noise_is_borne(noise in vec(any::<u8>(), 0..300), at in 0..4usize) {
        // Noise after beginnings that are right, or else it would never get far.
        let mut out = Vec::new();
        let blocks = [Block { name: "a".into(), len: 8192 }];
        let mut emitter = Emitter::new(1, &blocks);
        if at > 0 { Emitter::prelude(&mut out, "m"); }
        if at > 1 { emitter.start(&mut out); }
        if at > 2 { emitter.open_part(&mut out); }
        out.extend(noise);
        let _ = parse(&out, &[]);
    }
}

/// A stream up to its records: one block `a` of two pages, its section open.
fn opened() -> Vec<u8> {
    let mut out = Vec::new();
    let blocks = [Block { name: "a".into(), len: 2 * PAGE as u64 }];
    let mut emitter = Emitter::new(1, &blocks);
    Emitter::prelude(&mut out, "m");
    emitter.start(&mut out);
    emitter.open_part(&mut out);
    out
}

fn record(offset: u64, flags: u64) -> [u8; 8] {
    (offset | flags).to_be_bytes()
}

fn refused(bytes: &[u8], kind: ErrorKind, word: &str) {
    let error = parse(bytes, &[]).unwrap_err();
    assert_eq!(error.kind, kind, "{error}");
    assert!(error.message.contains(word), "{error} does not say {word:?}");
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let prelude = |rest: &[u8]| {
        let mut out = Vec::new();
        Emitter::prelude(&mut out, "m");
        out.extend(rest);
        out
    };
    refused(b"not a stream", ErrorKind::Damaged, "not a QEMU migration stream");
    refused(b"QEVM\0\0\0\x02", ErrorKind::Unsupported, "version 2");
    refused(b"QEVM\0\0\0\x03\x01", ErrorKind::Unsupported, "machine type");
    refused(b"QEVM\0\0\0\x03\x07\0\0\x01\x00", ErrorKind::Damaged, "256 letters");
    refused(&prelude(b"\x05\x02uu\0\0\0\0"), ErrorKind::Unsupported, "\"uu\"");
    refused(&prelude(b"\x04\0\0\0\x01\x05early"), ErrorKind::Unsupported, "virtio-mem");
    refused(&prelude(b"\x08\0\x01\0\0"), ErrorKind::Unsupported, "command before RAM");
    refused(&prelude(b"\x01\0\0\0\x01\x05dirty\0\0\0\0\0\0\0\x01"), ErrorKind::Unsupported, "\"dirty\"");
    refused(&prelude(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x05"), ErrorKind::Unsupported, "version 5");

    let started = with_blocks(4096, &[("a", 4096)]);
    let footer = [&started[..], &record(0, flag::EOS), b"\x7e\0\0\0\x01\x04\0\0\0\x02\x05early"].concat();
    refused(&footer, ErrorKind::Unsupported, "virtio-mem");

    let open = opened();
    let close = [&record(0, flag::EOS)[..], b"\x7e\0\0\0\x01"].concat();
    let after = |rest: &[u8]| [&open[..], &close, rest].concat();
    refused(&after(b"\x02\0\0\0\x02"), ErrorKind::Unsupported, "section 2");
    refused(&after(b"\x01\0\0\0\x02\x04vfio\0\0\0\0\0\0\0\x01"), ErrorKind::Unsupported, "\"vfio\"");
    refused(&after(b"\x08\0\x01\0\0"), ErrorKind::Unsupported, "command after RAM");
    refused(&after(b"\x00"), ErrorKind::Truncated, "ended early, after RAM");
    refused(&after(b"\x33"), ErrorKind::Damaged, "0x33");
    refused(&[&open[..], &record(0, flag::EOS), b"\x7e\0\0\0\x02"].concat(), ErrorKind::Damaged, "footer");
    refused(&[&open[..], &record(0, flag::EOS), b"\x02"].concat(), ErrorKind::Damaged, "footer");

    let with = |offset, flags, body: &[u8]| [&open[..], &record(offset, flags), body].concat();
    for (bit, feature) in flag::REFUSED {
        refused(&with(0, bit, b"\x01a"), ErrorKind::Unsupported, feature);
    }
    refused(&with(0, flag::PAGE | flag::ZERO, b"\x01a"), ErrorKind::Damaged, "flags");
    refused(&with(0, flag::ZERO | flag::CONTINUE, b"\0"), ErrorKind::Damaged, "continues no RAM block");
    refused(&with(0, flag::ZERO, b"\x01b\0"), ErrorKind::Damaged, "\"b\"");
    refused(&with(0, flag::ZERO, b"\x01\xff\0"), ErrorKind::Damaged, "not text");
    refused(&with(0, flag::ZERO, b"\x01a\x01"), ErrorKind::Unsupported, "filled with 0x01");
    refused(&with(2 * PAGE as u64, flag::ZERO, b"\x01a\0"), ErrorKind::Damaged, "at 8192");
    parse(&with(PAGE as u64, flag::ZERO, b"\x01a\0"), &[]).map(drop).unwrap_err();
}

/// A stream with this block list.
fn with_blocks(total: u64, blocks: &[(&str, u64)]) -> Vec<u8> {
    let mut out = Vec::new();
    Emitter::prelude(&mut out, "m");
    out.extend(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    out.extend(record(total, flag::MEM_SIZE));
    for (name, len) in blocks {
        out.push(name.len() as u8);
        out.extend(name.as_bytes());
        out.extend(len.to_be_bytes());
    }
    out
}

#[test]
fn a_block_list_must_add_up_and_be_bounded() {
    refused(&with_blocks(0, &[]), ErrorKind::Damaged, "does not begin");
    refused(&with_blocks(1 << 60, &[]), ErrorKind::Unsupported, "bytes of RAM");
    refused(&with_blocks(4096, &[("a", 8192)]), ErrorKind::Damaged, "4096 are left");
    refused(&with_blocks(8192, &[("a", 4097)]), ErrorKind::Damaged, "4097");
    refused(&with_blocks(8192, &[("a", 4096), ("a", 4096)]), ErrorKind::Damaged, "two RAM blocks");
    refused(&with_blocks(8192, &[("a", 4096)]), ErrorKind::Truncated, "ended early");
    let names: Vec<_> = (0..=MAX_BLOCKS).map(|index| index.to_string()).collect();
    let many: Vec<_> = names.iter().map(|name| (name.as_str(), 0)).collect();
    refused(&with_blocks(4096, &many), ErrorKind::Unsupported, "more than 1024");
}
