//! The bytes of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md), without any I/O.
//!
//! Everything is big-endian. Decoders take whole messages and never fail on what a field says: whether a request makes sense
//! is decided where the disk is known ([`super::serve`]).

/// Both sides' first word, `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Announces newstyle and starts every option, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Starts every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Starts every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Starts a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Starts a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Largest payload of one request, and the largest that we announce, in bytes.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// Longest string of the protocol (export and context names), in bytes.
pub const MAX_STRING: usize = 4096;
/// Bytes of a request before its payload.
pub const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply before its data.
pub const SIMPLE_LEN: usize = 16;
/// Bytes of a chunk's header.
pub const CHUNK_LEN: usize = 20;
/// Bytes of an option's header.
pub const OPTION_LEN: usize = 16;
/// The one metadata context that is offered.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Flags of the first message, both ways.
pub mod hello {
    /// Options other than `EXPORT_NAME` get replies.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zeros after the answer to `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Options of the handshake.
pub mod option {
    /// Start transmission, without any way to refuse.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Switch to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start transmission.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there?
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use 64-bit headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of reply to an option.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Option not known.
    pub const ERR_UNSUP: u32 = (1 << 31) | 1;
    /// Option malformed.
    pub const ERR_INVALID: u32 = (1 << 31) | 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) | 6;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = (1 << 31) | 9;
}

/// Kinds of information in an `INFO` reply.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The export's name.
    pub const NAME: u16 = 1;
    /// Smallest, preferred and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do, told when transmission starts.
pub mod transmission {
    /// The other flags mean something.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` is there.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is there.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM` is there.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` is there.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// A flush on one connection covers what all of them wrote.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// The `FAST_ZERO` flag is there.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Flags of a request.
pub mod flag {
    /// What this request wrote is durable when the reply comes.
    pub const FUA: u16 = 1;
    /// Zeros, but no hole.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zeros only if that is faster than writing them.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Kinds of chunk in a structured reply.
pub mod chunk {
    /// Flag: this is the reply's last chunk.
    pub const DONE: u16 = 1;
    /// Nothing but an end.
    pub const NONE: u16 = 0;
    /// An offset and the data there.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and how many zeros there are.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error of the whole request.
    pub const ERROR: u16 = (1 << 15) | 1;
}

/// States of an extent in [`BASE_ALLOCATION`].
pub mod state {
    /// No space is allocated.
    pub const HOLE: u32 = 1;
    /// Reads as zeros.
    pub const ZERO: u32 = 2;
}

/// Why a request failed, as the protocol numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: a change to a read-only export.
    Perm = 1,
    /// The disk failed.
    Io = 5,
    /// The request makes no sense.
    Invalid = 22,
    /// No space left, or a write past the disk's end.
    NoSpace = 28,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Data, please.
    Read,
    /// The data follows.
    Write,
    /// Goodbye; there is no reply.
    Disconnect,
    /// Make what was answered so far durable.
    Flush,
    /// The range is not needed any more.
    Trim,
    /// The range shall read as zeros.
    WriteZeroes,
    /// Which parts are allocated?
    BlockStatus,
    /// Something else.
    Other(u16),
}

impl Command {
    fn from_wire(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Other(other),
        }
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Other(other) => other,
        }
    }

    /// Whether the request changes the disk.
    pub fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// See [`flag`].
    pub flags: u16,
    /// What is asked for.
    pub command: Command,
    /// The client's name for this request, repeated in the reply.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes; for [`Command::Write`] the length of the payload that follows.
    pub len: u32,
}

impl Request {
    /// Reads a header; `None` if its magic is wrong, and then nothing that follows can be made sense of.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let mut bytes = Bytes(bytes);
        if bytes.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: bytes.u16()?,
            command: Command::from_wire(bytes.u16()?),
            cookie: bytes.u64()?,
            offset: bytes.u64()?,
            len: bytes.u32()?,
        })
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut out = [0; REQUEST_LEN];
        out[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_wire().to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..28].copy_from_slice(&self.len.to_be_bytes());
        out
    }
}

/// A simple reply without its data; `error` is `None` for success.
pub fn simple_reply(cookie: u64, error: Option<Errno>) -> [u8; SIMPLE_LEN] {
    let mut out = [0; SIMPLE_LEN];
    out[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.map_or(0, |e| e as u32).to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// A chunk's header; `len` counts the payload that follows it.
pub fn chunk_header(cookie: u64, kind: u16, done: bool, len: u32) -> [u8; CHUNK_LEN] {
    let mut out = [0; CHUNK_LEN];
    out[0..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&(if done { chunk::DONE } else { 0 }).to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..20].copy_from_slice(&len.to_be_bytes());
    out
}

/// Bytes of [`data_chunk`]'s result, before the data.
pub const DATA_CHUNK_LEN: usize = CHUNK_LEN + 8;

/// A data chunk up to its data: `len` bytes from `offset`.
pub fn data_chunk(cookie: u64, done: bool, offset: u64, len: u32) -> [u8; DATA_CHUNK_LEN] {
    let mut out = [0; DATA_CHUNK_LEN];
    out[..CHUNK_LEN].copy_from_slice(&chunk_header(cookie, chunk::OFFSET_DATA, done, len + 8));
    out[CHUNK_LEN..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// A whole hole chunk: `len` zeros from `offset`.
pub fn hole_chunk(cookie: u64, done: bool, offset: u64, len: u32) -> [u8; CHUNK_LEN + 12] {
    let mut out = [0; CHUNK_LEN + 12];
    out[..CHUNK_LEN].copy_from_slice(&chunk_header(cookie, chunk::OFFSET_HOLE, done, 12));
    out[CHUNK_LEN..CHUNK_LEN + 8].copy_from_slice(&offset.to_be_bytes());
    out[CHUNK_LEN + 8..].copy_from_slice(&len.to_be_bytes());
    out
}

/// A whole error chunk, without a text, which ends its reply.
pub fn error_chunk(cookie: u64, error: Errno) -> [u8; CHUNK_LEN + 6] {
    let mut out = [0; CHUNK_LEN + 6];
    out[..CHUNK_LEN].copy_from_slice(&chunk_header(cookie, chunk::ERROR, true, 6));
    out[CHUNK_LEN..CHUNK_LEN + 4].copy_from_slice(&(error as u32).to_be_bytes());
    out
}

/// Appends a reply to an option.
pub fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// Bytes that are read from the front; every read says `None` when there are too few.
#[derive(Debug, Clone, Copy)]
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length before it, at most [`MAX_STRING`] bytes of UTF-8.
    pub fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        if len > MAX_STRING {
            return None;
        }
        std::str::from_utf8(self.take(len)?).ok()
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_have_the_documented_layout() {
        let read = Request { flags: flag::FUA, command: Command::Trim, cookie: 7, offset: 0x1000, len: 512 };
        let bytes = read.encode();
        assert_eq!(
            bytes,
            [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 4, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0]
        );
        assert_eq!(Request::decode(&bytes), Some(read));
    }

    #[test]
    fn replies_have_the_documented_layout() {
        assert_eq!(simple_reply(9, Some(Errno::Io)), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 9]);
        let data = data_chunk(9, true, 0x200, 512);
        assert_eq!(data[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1]);
        assert_eq!(data[16..], [0, 0, 2, 8, 0, 0, 0, 0, 0, 0, 2, 0]);
        let hole = hole_chunk(9, false, 0x200, 512);
        assert_eq!(hole[4..8], [0, 0, 0, 2]);
        assert_eq!(hole[16..], [0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2, 0]);
        let error = error_chunk(9, Errno::NoSpace);
        assert_eq!(error[4..8], [0, 1, 0x80, 1]);
        assert_eq!(error[16..], [0, 0, 0, 6, 0, 0, 0, 28, 0, 0]);
    }

    proptest! {
        #[test]
        fn every_header_with_the_magic_survives_both_ways(rest in prop::array::uniform24(any::<u8>())) {
            let mut bytes = [0; REQUEST_LEN];
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            bytes[4..].copy_from_slice(&rest);
            let request = Request::decode(&bytes).expect("the magic is right");
            prop_assert_eq!(request.encode(), bytes);
        }

        #[test]
        fn another_magic_is_refused(bytes in prop::array::uniform28(any::<u8>())) {
            prop_assume!(bytes[..4] != REQUEST_MAGIC.to_be_bytes());
            prop_assert_eq!(Request::decode(&bytes), None);
        }

        #[test]
        fn strings_are_bounded_by_what_is_there(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut reader = Bytes(&bytes);
            if let Some(text) = reader.string() {
                prop_assert_eq!(4 + text.len() + reader.0.len(), bytes.len());
            }
        }
    }
}
