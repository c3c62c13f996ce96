//! QEMU's migration stream, parsed from pieces of any size.
//!
//! Rule beside the limits: how the stream is cut makes no difference.

use super::change_stream;
use crate::run::{MEMORY, words};
use crate::{Input, Random, Target};
use memory::stream::{Block, DeviceState, Emitter, Event, MAX_BLOCKS, PAGE, Parser};

pub(super) const TARGET: Target = Target {
    name: "stream",
    about: "the migration stream: header, blocks of RAM, pages, the devices' state",
    quick: 8000,
    memory: MEMORY,
    seeds: || (0..24).map(|seed| Input::stream(&stream(&mut Random::new(seed), seed > 8))).collect(),
    mutate,
    run,
};

/// The longest stream that is made, bytes.
pub(super) const MOST: usize = 256 << 10;

/// What the format says in a few bytes.
pub(super) const WORDS: [&[u8]; 28] = [
    b"QEVM",
    b"\x07\0\0\0\x02pc\x04\0\0\0\0",
    b"\x7e\0\0\0\x02\x04\0\0\0\0",
    b"QEVM\0\0\0\x03",
    b"\0\0\0\x03",
    b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04",
    b"\x01\0\0\0\x02\x05block\0\0\0\0\0\0\0\x01",
    b"\x02\0\0\0\x02",
    b"\x03\0\0\0\x02",
    b"\x04\0\0\0\x02\x03cpu",
    b"\x05\x0dconfiguration",
    b"\x00\x06",
    b"\x00\x06\0\0\0\x02{}",
    b"\x07\0\0\0\x02pc",
    b"\x07\0\0\x01\x00",
    b"\x08\0\x0b\0\0",
    b"\x08\0\x01\0\0",
    b"\x7e\0\0\0\x02",
    b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
    b"\0\0\0\0\0\0\0\x22\0",
    b"\0\0\0\0\0\0\x10\x22\0",
    b"\0\0\0\0\0\0\0\x22\x55",
    b"\0\0\0\0\0\x10\x00\x04",
    b"\0\0\x20\0\0\0\0\x04",
    b"\0\0\0\0\0\0\0\x28",
    b"\0\0\0\0\0\0\0\x48",
    b"\0\0\0\0\0\0\x01\x02",
    b"\xff\xff",
];

/// A sound stream, of any shape.
pub(super) fn sound(random: &mut Random) -> Vec<u8> {
    stream(random, false)
}

/// A stream that is made as sound ones are, and may have something that those never have.
pub(super) fn stream(random: &mut Random, odd: bool) -> Vec<u8> {
    let names = ["pc.ram", "pc.bios", "0000:00:02.0/vga.vram", "r", "/rom@etc/acpi/tables"];
    let count = random.index(names.len()) + 1;
    let pages = |random: &mut Random| if random.one_in(5) { 0 } else { random.below(6) };
    let mut blocks: Vec<Block> = names[..count]
        .iter()
        .map(|name| Block { name: (*name).to_owned(), len: pages(random) * PAGE as u64 })
        .collect();
    blocks[count - 1].len += PAGE as u64;
    match random.below(12) + if odd { 0 } else { 12 } {
        0 => {
            let twin = blocks[0].clone();
            blocks.push(twin);
        }
        1 => {
            let many = MAX_BLOCKS - 3 + random.index(5);
            blocks.extend((0..many).map(|index| Block { name: format!("b{index}"), len: 0 }));
            blocks.push(Block { name: "last".to_owned(), len: PAGE as u64 });
        }
        _ => (),
    }
    let section = random.below(4) as u32;
    let mut emitter = Emitter::new(section, &blocks);
    let mut out = Vec::new();
    let machine = random.pick::<&str>(&["pc-q35-10.0", "pc", ""]);
    Emitter::prelude(&mut out, machine);
    emitter.start(&mut out);
    let parts = random.below(3) + 1;
    for part in 1..=parts {
        if part < parts {
            emitter.open_part(&mut out);
        } else {
            emitter.open_end(&mut out);
        }
        for (index, block) in blocks.iter().enumerate() {
            for offset in (0..block.len).step_by(PAGE) {
                match random.below(3) {
                    0 if parts == 1 || part < parts => {
                        emitter.page(&mut out, index, offset, &[random.number() as u8; PAGE]);
                    }
                    // A page that is missing.
                    _ if odd && random.one_in(40) => (),
                    _ => emitter.zero_page(&mut out, index, offset),
                }
            }
        }
        emitter.close(&mut out);
        if odd && part == 1 && random.one_in(8) {
            // Devices too early.
            out.push(4);
        }
        if random.one_in(6) {
            out.extend_from_slice(b"\x08\0\x0b\0\0");
        }
    }
    let state = (0..random.index(300)).map(|_| random.number() as u8);
    let state = std::iter::once(4).chain(state).collect();
    Emitter::finish(&mut out, &DeviceState { state, description: br#"{"devices":[]}"#.to_vec() });
    out
}

fn mutate(input: &mut Input, random: &mut Random, _: &[Input]) {
    if random.one_in(3) {
        *input = Input::stream(&stream(random, true));
    }
    change_stream(input, &WORDS, MOST, random);
}

/// What the parser makes of the pieces: its events, as numbers that stand for them, and its end.
fn parse<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<String>, String) {
    let (mut parser, mut events, mut state) = (Parser::new(), Vec::new(), Vec::new());
    for mut piece in pieces {
        loop {
            match parser.next(&mut piece) {
                Ok(Some(Event::DeviceState(bytes))) => state.extend_from_slice(bytes),
                Ok(Some(Event::Page { block, offset, data })) => {
                    events.push(format!("page {block} {offset} {:08x}", crc32c::crc32c(data)));
                }
                Ok(Some(event)) => events.push(format!("{event:?}")),
                Ok(None) => break,
                Err(error) => return (events, error.to_string()),
            }
        }
    }
    let end = match parser.finish() {
        Ok(()) => match DeviceState::split(state) {
            Ok(devices) => format!("{} bytes of state", devices.state.len()),
            Err(error) => error.to_string(),
        },
        Err(error) => error.to_string(),
    };
    (events, end)
}

fn run(input: &Input) -> String {
    let bytes = input.bytes();
    let whole = parse(std::iter::once(&bytes[..]));
    let mut random = Random::new(bytes.len() as u64);
    for most in [7, 5000] {
        let mut rest = &bytes[..];
        let pieces = std::iter::from_fn(|| {
            let (piece, left) = rest.split_at_checked(random.index(most) + 1).unwrap_or((rest, &[]));
            rest = left;
            (!piece.is_empty()).then_some(piece)
        });
        let cut = parse(pieces);
        assert!(cut == whole, "cut in pieces it is another stream: {:?} {:?}", cut.1, whole.1);
    }
    words(&whole.1)
}
