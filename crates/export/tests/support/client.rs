//! An NBD client for tests: it checks every byte of a reply's frame, and sends whatever it is given.

use export::nbd::handshake::greeting;
use export::nbd::proto::{self, Bytes, Command, Request, chunk, option, reply};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A reply, its chunks put together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    /// The protocol's number, 0 for success.
    pub(crate) error: u32,
    /// Data of a read, in order of its chunks; holes are zeros.
    pub(crate) data: Vec<u8>,
    /// Lengths and states of a block status.
    pub(crate) extents: Vec<(u32, u32)>,
    /// How many bytes came as holes.
    pub(crate) holes: usize,
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) size: u64,
    pub(crate) flags: u16,
    structured: bool,
    cookie: u64,
    /// Lengths of reads under way, by cookie: a simple reply does not say how much data follows.
    reads: std::collections::HashMap<u64, (u64, u32)>,
}

/// A client that hears nothing for so long fails its test rather than waiting for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection that has seen the greeting and sent its flags.
pub(crate) fn greet(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("somebody listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut hello = [0; 18];
    stream.read_exact(&mut hello).expect("a greeting");
    assert_eq!(hello, greeting());
    stream.write_all(&3u32.to_be_bytes()).expect("flags");
    stream
}

pub(crate) fn send_option(stream: &mut UnixStream, option: u32, data: &[u8]) {
    let mut message = proto::OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend_from_slice(&option.to_be_bytes());
    message.extend_from_slice(&(data.len() as u32).to_be_bytes());
    message.extend_from_slice(data);
    stream.write_all(&message).expect("an option");
}

/// The kinds and data of the replies to an option, up to the last.
pub(crate) fn option_replies(stream: &mut UnixStream, option: u32) -> Vec<(u32, Vec<u8>)> {
    let mut replies = Vec::new();
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header).expect("a reply");
        let mut header = Bytes(&header);
        assert_eq!(header.u64(), Some(proto::OPTION_REPLY_MAGIC));
        assert_eq!(header.u32(), Some(option));
        let kind = header.u32().expect("a kind");
        let mut data = vec![0; header.u32().expect("a length") as usize];
        stream.read_exact(&mut data).expect("the reply's data");
        replies.push((kind, data));
        if kind == reply::ACK || kind >> 31 == 1 {
            return replies;
        }
    }
}

impl Client {
    /// With structured replies and block status.
    pub(crate) fn new(socket: &Path) -> Self {
        Self::connect(socket, true)
    }

    /// With simple replies.
    pub(crate) fn simple(socket: &Path) -> Self {
        Self::connect(socket, false)
    }

    fn connect(socket: &Path, structured: bool) -> Self {
        let mut stream = greet(socket);
        if structured {
            send_option(&mut stream, option::STRUCTURED_REPLY, &[]);
            assert_eq!(option_replies(&mut stream, option::STRUCTURED_REPLY)[0].0, reply::ACK);
            let mut context = vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15];
            context.extend_from_slice(proto::BASE_ALLOCATION.as_bytes());
            send_option(&mut stream, option::SET_META_CONTEXT, &context);
            assert_eq!(option_replies(&mut stream, option::SET_META_CONTEXT).len(), 2);
        }
        send_option(&mut stream, option::GO, &[0; 6]);
        let replies = option_replies(&mut stream, option::GO);
        let mut info = Bytes(&replies[0].1);
        info.take(2);
        let (size, flags) = (info.u64().expect("a size"), info.u16().expect("flags"));
        Self { stream, size, flags, structured, cookie: 0, reads: std::collections::HashMap::new() }
    }

    /// Sends a request without waiting for its reply; says its cookie.
    pub(crate) fn send(&mut self, command: Command, flags: u16, offset: u64, len: u32, payload: &[u8]) -> u64 {
        self.cookie += 1;
        let request = Request { flags, command, cookie: self.cookie, offset, len };
        if command == Command::Read {
            self.reads.insert(self.cookie, (offset, len));
        }
        let mut message = request.encode().to_vec();
        message.extend_from_slice(payload);
        self.stream.write_all(&message).expect("a request");
        self.cookie
    }

    /// The next reply; `None` if the server has closed.
    pub(crate) fn receive(&mut self) -> Option<Reply> {
        let mut out = Reply::default();
        loop {
            let mut magic = [0; 4];
            match self.stream.read(&mut magic[..1]) {
                Ok(0) => return None,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                result => result.expect("a reply"),
            };
            self.stream.read_exact(&mut magic[1..]).expect("a magic");
            if u32::from_be_bytes(magic) == proto::SIMPLE_REPLY_MAGIC {
                self.simple_reply(&mut out);
                return Some(out);
            }
            assert_eq!(u32::from_be_bytes(magic), proto::CHUNK_MAGIC);
            assert!(self.structured, "a chunk, unasked");
            if self.chunk(&mut out) {
                if let Some((_, len)) = self.reads.remove(&out.cookie) {
                    assert!(out.error != 0 || out.data.len() == len as usize, "all of the read");
                }
                return Some(out);
            }
        }
    }

    fn simple_reply(&mut self, out: &mut Reply) {
        let mut rest = [0; 12];
        self.stream.read_exact(&mut rest).expect("a simple reply");
        let mut rest = Bytes(&rest);
        out.error = rest.u32().expect("an error");
        out.cookie = rest.u64().expect("a cookie");
        if let Some((_, len)) = self.reads.remove(&out.cookie) {
            assert!(!self.structured, "reads are answered in chunks");
            if out.error == 0 {
                out.data = vec![0; len as usize];
                self.stream.read_exact(&mut out.data).expect("the data");
            }
        }
    }

    /// Takes a chunk in; `true` if it is the last. (The tests read one reply at a time when chunks may interleave.)
    fn chunk(&mut self, out: &mut Reply) -> bool {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).expect("a chunk's header");
        let mut header = Bytes(&header);
        let done = header.u16().expect("flags") == chunk::DONE;
        let kind = header.u16().expect("a kind");
        let cookie = header.u64().expect("a cookie");
        assert!(out.cookie == 0 || out.cookie == cookie, "chunks of one reply at a time");
        out.cookie = cookie;
        let mut payload = vec![0; header.u32().expect("a length") as usize];
        self.stream.read_exact(&mut payload).expect("a chunk's payload");
        let mut payload = Bytes(&payload);
        match kind {
            chunk::NONE => assert!(payload.is_empty()),
            chunk::OFFSET_DATA | chunk::OFFSET_HOLE => {
                let expected = self.reads[&cookie].0 + out.data.len() as u64;
                assert_eq!(payload.u64(), Some(expected), "pieces in order");
                if kind == chunk::OFFSET_DATA {
                    out.data.extend_from_slice(payload.0);
                } else {
                    let len = payload.u32().expect("a hole's length") as usize;
                    out.data.resize(out.data.len() + len, 0);
                    out.holes += len;
                }
            }
            chunk::BLOCK_STATUS => {
                assert_eq!(payload.u32(), Some(1));
                while !payload.is_empty() {
                    out.extents.push((payload.u32().expect("a length"), payload.u32().expect("a state")));
                }
            }
            chunk::ERROR => out.error = payload.u32().expect("an error"),
            other => panic!("a chunk of kind {other}"),
        }
        done
    }

    /// Sends a request and waits for its reply.
    pub(crate) fn ask(&mut self, command: Command, flags: u16, offset: u64, len: u32, payload: &[u8]) -> Reply {
        let cookie = self.send(command, flags, offset, len, payload);
        let reply = self.receive().expect("the server is there");
        assert_eq!(reply.cookie, cookie);
        reply
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.ask(Command::Write, 0, offset, data.len() as u32, data).error
    }

    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Reply {
        self.ask(Command::Read, 0, offset, len, &[])
    }

    /// Whether the server has closed: nothing more comes.
    pub(crate) fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }
}
