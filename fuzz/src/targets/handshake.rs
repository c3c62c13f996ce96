//! NBD's bytes without a socket: the handshake's options and the requests.
//!
//! Rules beside the limits: an option is answered with whole replies, the last one and no other final; a request's header that is
//! read is written as it was.

use super::change_stream;
use crate::run::MEMORY;
use crate::{Input, Random, Target};
use export::nbd::handshake::{MAX_OPTION, Negotiation, Offer, OptionHeader, Step};
use export::nbd::proto::{self, Bytes, Command, Request, option, reply};

pub(super) const TARGET: Target = Target {
    name: "handshake",
    about: "NBD options and requests, without a socket",
    quick: 30_000,
    memory: MEMORY,
    seeds,
    mutate,
    run,
};

/// What the protocol says in a few bytes.
pub(super) const WORDS: [&[u8]; 28] = [
    b"\0\0\0\x03",
    b"IHAVEOPT\0\0\0\x01\0\0\0\0",
    b"IHAVEOPT\0\0\0\x02\0\0\0\0",
    b"IHAVEOPT\0\0\0\x03\0\0\0\0",
    b"IHAVEOPT\0\0\0\x05\0\0\0\0",
    b"IHAVEOPT\0\0\0\x06\0\0\0\x06\0\0\0\0\0\0",
    b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0",
    b"IHAVEOPT\0\0\0\x08\0\0\0\0",
    b"IHAVEOPT\0\0\0\x09\0\0\0\x08\0\0\0\0\0\0\0\0",
    b"IHAVEOPT\0\0\0\x0a\0\0\0\x1b\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation",
    b"IHAVEOPT\0\0\0\x0a\0\x01\0\x01",
    b"IHAVEOPT",
    b"\0\0\0\x0fbase:allocation",
    b"\0\0\0\x04disk",
    b"\0\0\x10\x01",
    b"\x25\x60\x95\x13",
    b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x02\0",
    b"\x25\x60\x95\x13\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\x02\0\0\0\0\x04data",
    b"\x25\x60\x95\x13\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0",
    b"\x25\x60\x95\x13\0\0\0\x03\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0\0",
    b"\x25\x60\x95\x13\0\x01\0\x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\x10\0\0\0\x10\0",
    b"\x25\x60\x95\x13\0\x12\0\x06\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\x10\0\0\x10\0\0",
    b"\x25\x60\x95\x13\0\x08\0\x07\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\0\0\x40\0\0",
    b"\xff\xff\xff\xff",
    b"IHAVEOPT\0\0\0\x06\0\0\0\x0c\0\0\0\x04disk\0\x01\0\x01",
    b"IHAVEOPT\0\0\0\x07\0\0\0\x09\0\0\0\x03dis\0\0",
    b"IHAVEOPT\0\0\0\x0a\0\0\0\x0b\0\0\0\x03dis\0\0\0\0",
    b"IHAVEOPT\0\0\0\x09\0\0\0\x11\0\0\0\x04disk\0\0\0\x01\0\0\0\x05base:",
];

/// Sound conversations.
pub(super) fn seeds() -> Vec<Input> {
    let enter = |words: &[usize]| words.iter().flat_map(|word| WORDS[*word]).copied().collect::<Vec<u8>>();
    let all: [&[usize]; 8] = [
        &[0, 24, 25, 7, 26, 27, 2],
        &[0, 7, 9, 6, 16, 17, 19, 20, 21, 22, 18],
        &[0, 6, 16, 17, 19, 18],
        &[0, 1, 16, 18],
        &[0, 3, 5, 8, 2],
        &[0, 4, 8, 9, 7, 8, 9, 6, 22, 22, 16, 18],
        &[0, 10],
        &[0, 7, 9, 1, 17, 16, 22, 21, 20, 19, 18],
    ];
    let mut seeds: Vec<_> = all.iter().map(|words| Input::stream(&enter(words))).collect();
    for command in [Command::Read, Command::Write, Command::Trim, Command::WriteZeroes, Command::BlockStatus] {
        for (offset, len) in [(0, 512), (1, 3), (1 << 20, 1 << 20), (u64::MAX, 1), (0, 33 << 20)] {
            let mut bytes = enter(&[0, 7, 9, 6]);
            bytes.extend(Request { flags: 0, command, cookie: 9, offset, len }.encode());
            bytes.extend(vec![1; if command == Command::Write { len.min(2000) as usize } else { 0 }]);
            bytes.extend(enter(&[16, 19, 18]));
            seeds.push(Input::stream(&bytes));
        }
    }
    seeds
}

/// The kinds of the replies, which must be whole.
fn kinds(out: &[u8], option: u32) -> Vec<u32> {
    let (mut bytes, mut kinds) = (Bytes(out), Vec::new());
    while !bytes.is_empty() {
        assert_eq!((bytes.u64(), bytes.u32()), (Some(proto::OPTION_REPLY_MAGIC), Some(option)), "a reply's head");
        kinds.push(bytes.u32().expect("a kind"));
        let len = bytes.u32().expect("a length");
        bytes.take(len as usize).expect("the data");
    }
    kinds
}

fn run(input: &Input) -> String {
    let bytes = input.bytes();
    let mut rest = Bytes(&bytes);
    let offer = Offer { name: "disk".to_owned(), size: 8 << 20, flags: 0x16d, min_block: 512 };
    let Some(flags) = rest.u32() else { return "cut before the flags".to_owned() };
    let Some(mut negotiation) = Negotiation::new(&offer, flags) else { return "unknown flags".to_owned() };
    let mut words = Vec::new();
    loop {
        let Some(header) = rest.take(proto::OPTION_LEN) else { return format!("{words:?} cut") };
        let Some(header) = header.first_chunk().and_then(OptionHeader::decode) else {
            return format!("{words:?} no option");
        };
        let mut out = Vec::new();
        let step = if header.len > MAX_OPTION {
            Negotiation::too_long(header.option, &mut out)
        } else {
            let Some(data) = rest.take(header.len as usize) else { return format!("{words:?} cut") };
            negotiation.option(header.option, data, &mut out)
        };
        if header.option != option::EXPORT_NAME {
            let kinds = kinds(&out, header.option);
            let (last, before) = kinds.split_last().expect("an answer");
            let is_final = |kind: u32| kind == reply::ACK || kind >> 31 == 1;
            assert!(is_final(*last) && !before.iter().any(|kind| is_final(*kind)), "{kinds:?}");
            words.push((header.option.min(12), *last));
        }
        words.dedup();
        words.truncate(3);
        match step {
            Step::Next => (),
            Step::Leave => return format!("{words:?} left"),
            Step::Transmit => break,
        }
    }
    let mut commands = Vec::new();
    while let Some(bytes) = rest.take(proto::REQUEST_LEN).and_then(|bytes| bytes.first_chunk()) {
        let Some(request) = Request::decode(bytes) else { break };
        assert_eq!(request.encode(), *bytes, "a request is what it was");
        if request.command == Command::Write && rest.take(request.len as usize).is_none() {
            break;
        }
        let name = format!("{:?}", request.command);
        commands.push(name.chars().take(5).collect::<String>());
    }
    commands.sort();
    commands.dedup();
    format!("{:?} {commands:?}", negotiation.agreed())
}

/// Changes a conversation, which stays short enough for a socket's buffer.
pub(super) fn mutate(input: &mut Input, random: &mut Random, _: &[Input]) {
    change_stream(input, &WORDS, 64 << 10, random);
}
