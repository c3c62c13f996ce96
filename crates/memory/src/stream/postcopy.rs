//! What a source says beside the pages when the guest runs before its memory is complete (QEMU's *postcopy*), and what QEMU answers.
//!
//! ```text
//!   anew    prelude ► OPEN_RETURN_PATH ► ADVISE ► ram START ► DISCARD a block ► PACKAGED { LISTEN ► devices ► RUN } ► parts of pages … ► END ► EOF
//!   again   RECV_BITMAP a block ◄► Answer::Received ► RESUME ◄► Answer::Resumed ► parts of pages … ► END ► EOF
//!   between any of them   PING ◄► Answer::Pong
//! ```
//!
//! A command is `08`, its number (u16), the length of its body (u16), its body. An answer is its number (u16), the length of its body (u16), its
//! body. As everything in the stream they are big-endian, but for the bits of a bitmap. The source of all this: QEMU's
//! `migration/savevm.c`, `migration/migration.c` and `migration/ram.c`, 7.2 and 10.0, which are alike in it.

use super::format::{COMMAND, EOF, MAX_RAM, PAGE};
use super::{Block, emitter};
use crate::{Error, ErrorKind, Result};
use std::io::Read;

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
const POSTCOPY_LISTEN: u16 = 4;
const POSTCOPY_RUN: u16 = 5;
const POSTCOPY_RAM_DISCARD: u16 = 6;
const PACKAGED: u16 = 7;
const POSTCOPY_RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECEIVED: u16 = 5;
const RESUME_ACK: u16 = 6;

/// The most bytes that QEMU takes in a package (`MAX_VM_CMD_PACKAGED_SIZE` of 7.2).
const MAX_PACKAGE: usize = 1 << 24;

/// What follows a bitmap.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// Whether the devices' state is small enough to be sent before the pages.
pub fn fits(devices: &[u8]) -> bool {
    devices.len() + 64 <= MAX_PACKAGE
}

/// After the prelude: QEMU is to answer, and pages come late.
pub fn advise(out: &mut Vec<u8>) {
    command(out, OPEN_RETURN_PATH, &[]);
    let page = (PAGE as u64).to_be_bytes();
    command(out, POSTCOPY_ADVISE, &[page, page].concat());
}

/// After the list of blocks: nothing of a block is there yet. (Without this QEMU 7.2 to 10.0 waits for itself for ever.)
pub fn discard(out: &mut Vec<u8>, block: &Block) {
    let mut body = vec![0];
    emitter::put_name(&mut body, &block.name);
    body.push(0);
    body.extend_from_slice(&0u64.to_be_bytes());
    body.extend_from_slice(&block.len.to_be_bytes());
    command(out, POSTCOPY_RAM_DISCARD, &body);
}

/// The devices' state; then the guest can run. See [`fits`].
pub fn package(out: &mut Vec<u8>, devices: &[u8]) {
    let mut body = Vec::with_capacity(devices.len() + 64);
    command(&mut body, POSTCOPY_LISTEN, &[]);
    body.extend_from_slice(devices);
    command(&mut body, POSTCOPY_RUN, &[]);
    command(out, PACKAGED, &(body.len() as u32).to_be_bytes());
    out.extend_from_slice(&body);
}

/// Asks which pages of a block have arrived: [`Answer::Received`].
pub fn ask_received(out: &mut Vec<u8>, block: &Block) {
    let mut body = Vec::new();
    emitter::put_name(&mut body, &block.name);
    command(out, RECV_BITMAP, &body);
}

/// Asks for [`Answer::Pong`] once everything before has been taken in.
pub fn ping(out: &mut Vec<u8>, number: u32) {
    command(out, PING, &number.to_be_bytes());
}

/// Another source goes on with the pages: [`Answer::Resumed`].
pub fn resume(out: &mut Vec<u8>) {
    command(out, POSTCOPY_RESUME, &[]);
}

/// After the last section: no more comes.
pub fn end(out: &mut Vec<u8>) {
    out.push(EOF);
}

fn command(out: &mut Vec<u8>, number: u16, body: &[u8]) {
    out.push(COMMAND);
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&(body.len() as u16).to_be_bytes());
    out.extend_from_slice(body);
}

/// What QEMU says to the source of its pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It needs no more: 0, or it failed.
    Shut(u32),
    /// The guest waits for these pages.
    Pages {
        /// The block; `None` is that of the last request.
        block: Option<String>,
        /// Offset in the block, bytes.
        start: u64,
        /// Bytes.
        len: u32,
    },
    /// Which pages of a block have arrived: a bit each, the lowest bit of a byte first.
    Received {
        /// The block.
        block: String,
        /// The bits.
        bits: Vec<u8>,
    },
    /// It is ready to take pages again.
    Resumed,
    /// What came before the ping of this number has been taken in.
    Pong(u32),
    /// Nothing that matters here.
    Other,
}

impl Answer {
    /// Reads the next answer; `None` at the end. Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Stream`] if `from` fails, [`ErrorKind::Damaged`] for what QEMU does not say.
    pub fn read(mut from: impl Read) -> Result<Option<Self>> {
        let mut head = [0; 4];
        match from.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(broken(error)),
        }
        let [a, b, c, d] = head;
        let (number, mut body) = (u16::from_be_bytes([a, b]), vec![0; u16::from_be_bytes([c, d]).into()]);
        from.read_exact(&mut body).map_err(broken)?;
        let word = || body.first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
        let answer = match number {
            SHUT => Self::Shut(word().ok_or_else(damaged)?),
            PONG => Self::Pong(word().ok_or_else(damaged)?),
            REQ_PAGES | REQ_PAGES_ID => Self::pages(&body, number == REQ_PAGES_ID)?,
            RECEIVED => Self::received(&body, from)?,
            RESUME_ACK => Self::Resumed,
            _ => Self::Other,
        };
        Ok(Some(answer))
    }

    fn pages(body: &[u8], named: bool) -> Result<Self> {
        let (start, rest) = body.split_first_chunk().ok_or_else(damaged)?;
        let (len, rest) = rest.split_first_chunk().ok_or_else(damaged)?;
        let block = if named { Some(name(rest)?) } else { None };
        Ok(Self::Pages { block, start: u64::from_be_bytes(*start), len: u32::from_be_bytes(*len) })
    }

    /// The bitmap itself is not counted in the length of the body.
    fn received(body: &[u8], mut from: impl Read) -> Result<Self> {
        let mut number = || -> Result<u64> {
            let mut bytes = [0; 8];
            from.read_exact(&mut bytes).map_err(broken)?;
            Ok(u64::from_be_bytes(bytes))
        };
        let len = number()?;
        if len > MAX_RAM / PAGE as u64 / 8 {
            return Err(damaged());
        }
        let mut bits = Vec::new();
        from.by_ref().take(len).read_to_end(&mut bits).map_err(broken)?;
        let mut end = [0; 8];
        from.read_exact(&mut end).map_err(broken)?;
        if bits.len() as u64 != len || u64::from_be_bytes(end) != BITMAP_END {
            return Err(damaged());
        }
        Ok(Self::Received { block: name(body)?, bits })
    }
}

/// A name with its length before it.
fn name(bytes: &[u8]) -> Result<String> {
    let (len, rest) = bytes.split_first().ok_or_else(damaged)?;
    let name = rest.get(..usize::from(*len)).ok_or_else(damaged)?;
    String::from_utf8(name.to_vec()).map_err(|_| damaged())
}

fn damaged() -> Error {
    Error::new(ErrorKind::Damaged, "QEMU's answer to the source of its memory is not sound")
}

pub(crate) fn broken(error: std::io::Error) -> Error {
    Error::stream("what QEMU answers to the source of its memory cannot be read", error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answers(mut bytes: &[u8]) -> Result<Vec<Answer>> {
        std::iter::from_fn(|| Answer::read(&mut bytes).transpose()).collect()
    }

    #[test]
    fn answers_are_understood() {
        let mut bytes = b"\x00\x03\x00\x0f\0\0\0\0\0\x12\x30\0\0\0\x10\0\x02ab".to_vec();
        bytes.extend_from_slice(b"\x00\x04\x00\x0c\0\0\0\0\0\0\x10\0\0\0\x20\0");
        bytes.extend_from_slice(b"\x00\x05\x00\x03\x02ab\0\0\0\0\0\0\0\x02\xff\x01\x01\x23\x45\x67\x89\xab\xcd\xef");
        bytes.extend_from_slice(b"\x00\x06\x00\x04\0\0\0\x01\x00\x02\x00\x04\0\0\0\x09\x00\x01\x00\x04\0\0\0\0");
        let block = Some("ab".to_owned());
        let told = [
            Answer::Pages { block, start: 0x12_3000, len: 4096 },
            Answer::Pages { block: None, start: 4096, len: 8192 },
            Answer::Received { block: "ab".into(), bits: vec![0xff, 1] },
            Answer::Resumed,
            Answer::Pong(9),
            Answer::Shut(0),
        ];
        assert_eq!(answers(&bytes).unwrap(), told);
        // Cut anywhere: the whole ones before it, then an error or the end.
        for end in 0..bytes.len() {
            if let Ok(fewer) = answers(&bytes[..end]) {
                assert_eq!(fewer, told[..fewer.len()]);
            }
        }
    }

    #[test]
    fn commands_have_their_lengths() {
        let mut out = Vec::new();
        package(&mut out, b"devices");
        let body = b"\x08\0\x04\0\0devices\x08\0\x05\0\0";
        assert_eq!(out, [b"\x08\0\x07\0\x04\0\0\0\x11".as_slice(), body].concat());
        let mut out = Vec::new();
        discard(&mut out, &Block { name: "r".into(), len: 0x3000 });
        assert_eq!(out, b"\x08\0\x06\0\x14\0\x01r\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x30\0");
    }

    proptest! {
        #[test]
        fn noise_is_borne(noise in proptest::collection::vec(any::<u8>(), 0..200), number in 0..8u8) {
            let mut bytes = vec![0, number, 0, 3];
            bytes.extend(noise);
            let _ = answers(&bytes);
        }
    }
}
