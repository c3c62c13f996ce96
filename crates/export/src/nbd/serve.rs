//! One connection: greets, negotiates, answers requests.
//!
//! ```text
//!              ┌─ small reads: begun here, many under way, replies gathered ───────────────────────┐
//!              ├─ small and cheap: done here, replies gathered, one send for all that had arrived ─┤
//!   socket ──► reader                                                                              ├──► socket
//!              └─ the rest ──► pool: up to `threads` at work, each sends its own reply ────────────┘
//! ```
//!
//! Handing a request to another thread and back costs more than to read four kilobytes. So small reads go through io_uring, whether
//! their data is in the page cache or not ([`Flights`]). Small writes, and small reads where there is no io_uring, are done by the
//! reader unless they have to wait for a disk: [`Pace`] measures whether they do. A client that breaks the protocol, or that stops in the middle of a message, is
//! disconnected; nothing it sends ends more than its own connection.

use super::flights::Flights;
use super::handshake::{self, ALLOCATION_ID, Agreed, MAX_OPTION, Negotiation, Offer, OptionHeader, Step};
use super::proto::{self, Command, Errno, Request, chunk, flag, state, transmission};
use super::wire::{Deadline, Input, Output};
use crate::disk::{Busy, Disk};
use crate::pool::{self, Held, Pool, Window, lock};
use crate::socket::Socket;
use image::{ChainRun, ErrorKind, Located, Received, RunKind};
use std::io;
use std::net::Shutdown;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Scope;
use std::time::{Duration, Instant};

/// A client must have come through the handshake in this time.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A message that has begun must be complete in this time, and a reply be taken.
const STALL: Duration = Duration::from_secs(30);

/// Data moved in one piece: large reads are sent in chunks of it. Bytes.
const PIECE: usize = 256 << 10;
/// Requests up to this length may be done by the reader. Bytes.
const SMALL: u32 = 64 << 10;
/// Replies gathered by the reader are sent when they are this long, though more requests wait: the client works on them meanwhile.
/// Bytes.
const EAGER: usize = 32 << 10;
/// Capacity of the buffers, bytes: a piece and some headers.
const BUFFER: usize = PIECE + 4096;
/// Requests of one connection that may wait for a thread.
const QUEUE: usize = 256;
/// Extents in one reply to `BLOCK_STATUS`.
const MAX_EXTENTS: usize = 1024;
/// Runs of a large read that are looked up at a time.
const MAX_RUNS: usize = 256;

/// A client as the export knows it.
#[derive(Debug)]
pub(crate) struct Client {
    socket: Socket,
    leaving: AtomicBool,
}

impl Client {
    pub(crate) fn new(socket: Socket) -> Self {
        Self { socket, leaving: AtomicBool::new(false) }
    }

    /// Takes no further request; what is under way is answered.
    pub(crate) fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
        self.socket.shutdown(Shutdown::Read);
    }

    /// Gives up on the client: answers go nowhere.
    pub(crate) fn cut(&self) {
        self.leaving.store(true, Ordering::Release);
        self.socket.shutdown(Shutdown::Both);
    }

    fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }
}

/// Serves a client until it leaves, breaks the protocol or is dismissed.
pub(crate) fn serve(disk: &Disk, client: &Client) -> io::Result<()> {
    let mut input = Input::new(&client.socket, BUFFER);
    let offer = offer(disk);
    client.socket.set_write_timeout(STALL)?;
    client.socket.set_read_timeout(HANDSHAKE)?;
    let Some(agreed) = negotiate(&mut input, client, &offer)? else { return Ok(()) };
    client.socket.set_read_timeout(STALL)?;

    let window = Window::new(disk.share);
    let connection = Connection::new(disk, client, &window, agreed, offer.size);
    let result = std::thread::scope(|scope| {
        let _close = CloseOnDrop(&connection.pool);
        connection.transmit(scope, &mut input)
    });
    client.socket.shutdown(Shutdown::Both);
    result
}

fn offer(disk: &Disk) -> Offer {
    let can =
        transmission::HAS_FLAGS | transmission::SEND_FLUSH | transmission::SEND_FUA | transmission::CAN_MULTI_CONN;
    let change = if disk.read_only {
        transmission::READ_ONLY
    } else {
        transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO
    };
    Offer {
        name: disk.name.clone(),
        size: disk.chain.size(),
        flags: can | change,
        // The chain takes any alignment; who keeps to sectors is served faster.
        min_block: disk.chain.sector_size(),
    }
}

/// The handshake's I/O; `None` if the client left in an orderly way.
fn negotiate(input: &mut Input, client: &Client, offer: &Offer) -> io::Result<Option<Agreed>> {
    let deadline = Deadline::after(HANDSHAKE);
    client.socket.send_all(&handshake::greeting())?;
    let flags = input.need(4, deadline)?;
    let flags = proto::Bytes(flags).u32().ok_or(io::ErrorKind::InvalidData)?;
    input.consume(4);
    let mut negotiation = Negotiation::new(offer, flags).ok_or(io::ErrorKind::InvalidData)?;
    let mut out = Vec::new();
    loop {
        let header = input.need(proto::OPTION_LEN, deadline)?;
        let header = header.try_into().ok().and_then(OptionHeader::decode).ok_or(io::ErrorKind::InvalidData)?;
        input.consume(proto::OPTION_LEN);
        out.clear();
        let step = if header.len > MAX_OPTION {
            Negotiation::too_long(header.option, &mut out)
        } else {
            let len = header.len as usize;
            let step = negotiation.option(header.option, input.need(len, deadline)?, &mut out);
            input.consume(len);
            step
        };
        client.socket.send_all(&out)?;
        match step {
            Step::Next => {}
            Step::Transmit => return Ok(Some(negotiation.agreed())),
            Step::Leave => return Ok(None),
        }
    }
}

/// A connection in transmission, shared by its reader and its workers.
struct Connection<'a> {
    disk: &'a Disk,
    client: &'a Client,
    agreed: Agreed,
    /// What the client was told, bytes; a disk that has grown shows at the next connection.
    size: u64,
    /// One message at a time.
    sending: Mutex<()>,
    pool: Pool<Job<'a>>,
    /// Bounds this connection's share of [`Disk::window`].
    window: &'a Window,
    /// Payload buffers to be used again.
    spare: Mutex<Vec<Vec<u8>>>,
}

/// A request that waits for a thread.
struct Job<'a> {
    request: Request,
    payload: Vec<u8>,
    received: Received,
    room: Option<[Held<'a>; 2]>,
    _busy: Busy<'a>,
}

impl<'a> Connection<'a> {
    fn new(disk: &'a Disk, client: &'a Client, window: &'a Window, agreed: Agreed, size: u64) -> Self {
        Self {
            disk,
            client,
            agreed,
            size,
            sending: Mutex::new(()),
            pool: Pool::new(disk.threads, QUEUE),
            window,
            spare: Mutex::new(Vec::new()),
        }
    }

    fn transmit<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        input: &'scope mut Input<'a>,
    ) -> io::Result<()> {
        let start = Box::new(|| pool::start(scope, "nbd-work", || self.work()));
        let (out, pace, received) = (Output::new(BUFFER), Pace::default(), Received::now());
        let flights = Flights::new(self.disk, &self.client.socket);
        Reader { connection: self, start, input, out, flights, begun: 0, pace, received }.run()
    }

    /// A worker's life.
    fn work(&self) {
        let _cut = CutOnPanic(self.client);
        let mut out = Output::new(BUFFER);
        self.pool.work(|job| {
            if let Err(error) = self.do_job(job, &mut out) {
                tracing::debug!(%error, "an NBD client does not take its replies");
                out.clear();
                self.client.cut();
            }
        });
    }

    fn do_job(&self, job: Job<'_>, out: &mut Output) -> io::Result<()> {
        let Job { request, payload, received, room, _busy } = job;
        let len = if request.command == Command::Write { request.len as usize } else { 0 };
        self.execute(&request, &payload[..len], received, out)?;
        // The data has arrived where it belongs: a client that is slow to take the reply holds no room.
        drop(room);
        self.put_away(payload);
        self.send(out)
    }

    fn send(&self, out: &mut Output) -> io::Result<()> {
        if out.bytes().is_empty() {
            return Ok(());
        }
        let sent = {
            let _one = lock(&self.sending);
            self.client.socket.send_all(out.bytes())
        };
        out.clear();
        sent
    }

    fn make_room(&self, len: usize, out: &mut Output) -> io::Result<()> {
        if out.room() < len { self.send(out) } else { Ok(()) }
    }

    /// A buffer of at least `len` bytes.
    fn take_buffer(&self, len: usize) -> Vec<u8> {
        let mut buffer = lock(&self.spare).pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        buffer
    }

    fn put_away(&self, buffer: Vec<u8>) {
        let mut spare = lock(&self.spare);
        if (1..=MAX_SPARE).contains(&buffer.len()) && spare.len() < self.disk.threads {
            spare.push(buffer);
        }
    }

    /// Whether a request makes sense.
    fn check(&self, request: &Request) -> Result<(), Errno> {
        let Request { command, flags, offset, len, .. } = *request;
        let known = flag::FUA
            | match command {
                Command::WriteZeroes => flag::NO_HOLE | flag::FAST_ZERO,
                Command::BlockStatus => flag::REQ_ONE,
                _ => 0,
            };
        if flags & !known != 0 || matches!(command, Command::Other(_)) {
            return Err(Errno::Invalid);
        }
        if command == Command::Flush {
            return Ok(());
        }
        if command.changes() && self.disk.read_only {
            return Err(Errno::Perm);
        }
        let too_long = matches!(command, Command::Read | Command::Write) && len > proto::MAX_PAYLOAD;
        let no_context = command == Command::BlockStatus && (len == 0 || !self.agreed.allocation);
        if too_long || no_context {
            return Err(Errno::Invalid);
        }
        match offset.checked_add(u64::from(len)) {
            Some(end) if end <= self.size => Ok(()),
            _ if matches!(command, Command::Write | Command::WriteZeroes) => Err(Errno::NoSpace),
            _ => Err(Errno::Invalid),
        }
    }

    /// Does a request that makes sense; its reply is in `out` or, in part, sent. Fails only if the client cannot be answered.
    fn execute(&self, request: &Request, payload: &[u8], received: Received, out: &mut Output) -> io::Result<()> {
        match request.command {
            Command::Read if self.agreed.structured => self.read_chunks(request, out),
            Command::Read => self.read_simple(request, out),
            Command::BlockStatus => self.block_status(request, out),
            _ => {
                let result = self.change(request, payload, received);
                self.answer(request, result.err(), out)
            }
        }
    }

    /// A reply without data.
    fn answer(&self, request: &Request, error: Option<Errno>, out: &mut Output) -> io::Result<()> {
        self.make_room(SMALL_REPLY, out)?;
        let chunks = self.agreed.structured && matches!(request.command, Command::Read | Command::BlockStatus);
        match error {
            Some(error) if chunks => out.put(&proto::error_chunk(request.cookie, error)),
            _ => out.put(&proto::simple_reply(request.cookie, error)),
        }
        Ok(())
    }

    /// Changes the disk, or makes changes durable.
    fn change(&self, request: &Request, payload: &[u8], received: Received) -> Result<(), Errno> {
        let chain = &self.disk.chain;
        let (offset, len) = (request.offset, u64::from(request.len));
        if request.command.changes() {
            self.disk.admit_change().map_err(|error| refused(request, &error))?;
        }
        let result = match request.command {
            Command::Write => chain.write_received(payload, offset, received),
            Command::Trim => chain.discard_received(offset, len, received),
            // Zeros are as good as any other content, so a disk that grows as it is written keeps no promise to those who ask
            // for no holes, and zeroing is never slower than writing.
            Command::WriteZeroes => chain.zero_received(offset, len, received),
            _ => chain.flush(),
        };
        let durable = || if request.flags & flag::FUA != 0 { chain.flush() } else { Ok(()) };
        result.and_then(|()| durable()).map_err(|error| failed(request, &error))
    }

    /// A read, as one chunk or a chunk a piece.
    fn read_chunks(&self, request: &Request, out: &mut Output) -> io::Result<()> {
        let end = request.offset + u64::from(request.len);
        let mut at = request.offset;
        if request.len == 0 {
            self.make_room(SMALL_REPLY, out)?;
            out.put(&proto::chunk_header(request.cookie, chunk::NONE, true, 0));
        }
        while at < end {
            let len = (end - at).min(PIECE as u64) as usize;
            let done = at + len as u64 == end;
            self.make_room(len + SMALL_REPLY, out)?;
            let head = proto::data_chunk(request.cookie, done, at, len as u32);
            let mut zeros = false;
            let read = out.put_with(&head, len, |buf| {
                self.disk.chain.read(buf, at)?;
                zeros = buf.len() > SMALL as usize && is_zero(buf);
                Ok(())
            });
            if let Err(error) = read {
                return self.answer(request, Some(failed(request, &error)), out);
            }
            if zeros {
                out.take_back(head.len() + len);
                out.put(&proto::hole_chunk(request.cookie, done, at, len as u32));
            }
            at += len as u64;
        }
        Ok(())
    }

    /// A read for a client without structured replies: data follows a header that says that all went well, so an error after the
    /// first piece can only be told by closing the connection.
    fn read_simple(&self, request: &Request, out: &mut Output) -> io::Result<()> {
        let chain = &self.disk.chain;
        let head = proto::simple_reply(request.cookie, None);
        let first = (request.len as usize).min(PIECE);
        self.make_room(first + SMALL_REPLY, out)?;
        if let Err(error) = out.put_with(&head, first, |buf| chain.read(buf, request.offset)) {
            return self.answer(request, Some(failed(request, &error)), out);
        }
        let (mut at, end) = (request.offset + first as u64, request.offset + u64::from(request.len));
        if at == end {
            return Ok(());
        }
        let _one = lock(&self.sending);
        while at < end {
            self.client.socket.send_all(out.bytes())?;
            out.clear();
            let len = (end - at).min(PIECE as u64) as usize;
            out.put_with(&[], len, |buf| chain.read(buf, at)).map_err(|error| {
                failed(request, &error);
                io::Error::other("the disk failed in the middle of a reply")
            })?;
            at += len as u64;
        }
        self.client.socket.send_all(out.bytes())?;
        out.clear();
        Ok(())
    }

    fn block_status(&self, request: &Request, out: &mut Output) -> io::Result<()> {
        let extents = match self.extents(request) {
            Ok(extents) => extents,
            Err(error) => return self.answer(request, Some(failed(request, &error)), out),
        };
        let len = 4 + extents.len() * 8;
        self.make_room(SMALL_REPLY + len, out)?;
        out.put(&proto::chunk_header(request.cookie, chunk::BLOCK_STATUS, true, len as u32));
        out.put(&ALLOCATION_ID.to_be_bytes());
        for (len, state) in extents {
            out.put(&len.to_be_bytes());
            out.put(&state.to_be_bytes());
        }
        Ok(())
    }

    /// Lengths and states from the request's offset on, neighbours of one state joined. They may end early, for what they say is
    /// bounded, and so is the work behind it.
    fn extents(&self, request: &Request) -> image::Result<Vec<(u32, u32)>> {
        let limit = if request.flags & flag::REQ_ONE != 0 { 1 } else { MAX_EXTENTS };
        let (mut at, end) = (request.offset, request.offset + u64::from(request.len));
        let mut extents: Vec<(u32, u32)> = Vec::new();
        let mut looks = 0;
        while at < end && looks < MAX_LOOKS {
            for run in self.disk.chain.runs(at, end - at, MAX_RUNS)? {
                let state = state_of(&run);
                let full = extents.len() == limit;
                match extents.last_mut() {
                    Some((len, last)) if *last == state => *len += run.len as u32,
                    _ if full => return Ok(extents),
                    _ => extents.push((run.len as u32, state)),
                }
                at = run.offset + run.len;
            }
            looks += 1;
        }
        Ok(extents)
    }
}

/// Room for any reply beside the data in it, bytes.
const SMALL_REPLY: usize = 64;
/// Largest payload buffer that is kept, bytes.
const MAX_SPARE: usize = 2 << 20;
/// How often the chain is asked for one `BLOCK_STATUS`.
const MAX_LOOKS: usize = 64;

fn state_of(run: &ChainRun) -> u32 {
    match run.kind {
        RunKind::Data => 0,
        RunKind::Zero | RunKind::Absent => state::HOLE | state::ZERO,
    }
}

/// Whether there is nothing but zeros: the first is one, and each equals the next. Data is mostly told by its first byte.
fn is_zero(buf: &[u8]) -> bool {
    buf.first().is_none_or(|first| *first == 0 && buf[1..] == buf[..buf.len() - 1])
}

/// Notes that the disk failed, and how the client is to be told.
fn failed(request: &Request, error: &image::Error) -> Errno {
    tracing::warn!(%error, ?request, "an NBD request failed");
    match error.kind {
        ErrorKind::NoSpace => Errno::NoSpace,
        ErrorKind::Invalid => Errno::Invalid,
        _ => Errno::Io,
    }
}

fn refused(request: &Request, error: &io::Error) -> Errno {
    tracing::warn!(%error, ?request, "the first change was not admitted");
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Errno::NoSpace,
        _ => Errno::Io,
    }
}

/// The thread that takes a connection's requests off the socket.
struct Reader<'r, 'a> {
    connection: &'r Connection<'a>,
    /// Starts one more worker.
    start: Box<dyn Fn() -> io::Result<()> + 'r>,
    input: &'r mut Input<'a>,
    /// Replies of what was done here.
    out: Output,
    /// Small reads that were begun here.
    flights: Flights<'a>,
    /// Bytes of their replies, since it was last looked whether they have ended.
    begun: usize,
    pace: Pace,
    /// When the last bytes came in.
    received: Received,
}

/// Whether to go on after a request.
#[derive(Debug, PartialEq, Eq)]
enum Then {
    Next,
    End,
}

impl<'a> Reader<'_, 'a> {
    fn run(&mut self) -> io::Result<()> {
        while self.do_all_that_came()? == Then::Next && self.wait()? == Then::Next {}
        self.come_down()?;
        self.settle()
    }

    /// Waits for the client, and meanwhile answers what was begun.
    fn wait(&mut self) -> io::Result<Then> {
        loop {
            if self.connection.client.is_leaving() {
                return Ok(Then::End);
            }
            let idle = self.flights.is_idle();
            if !idle {
                let readable = self.flights.land(true)?;
                self.settle()?;
                if !readable {
                    continue;
                }
            }
            match if idle { self.input.fill() } else { self.input.fill_now() } {
                Ok(true) => break,
                Ok(false) => return Ok(Then::End),
                // Nobody waits for an idle client, not even in the middle of a header: it holds nothing.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        self.received = Received::now();
        Ok(Then::Next)
    }

    fn do_all_that_came(&mut self) -> io::Result<Then> {
        let _busy = self.connection.disk.begin();
        let mut then = Then::Next;
        while let Some(header) = self.input.available().first_chunk() {
            if self.connection.client.is_leaving() {
                then = Then::End;
                break;
            }
            let request = Request::decode(header).ok_or(io::ErrorKind::InvalidData)?;
            self.input.consume(proto::REQUEST_LEN);
            if request.command == Command::Disconnect {
                then = Then::End;
                break;
            }
            self.take(&request)?;
        }
        self.flights.land(false)?;
        self.settle()?;
        Ok(then)
    }

    fn take(&mut self, request: &Request) -> io::Result<()> {
        if let Err(error) = self.connection.check(request) {
            if request.command == Command::Write {
                self.come_down()?;
                self.send()?;
                self.input.skip(request.len as usize, Deadline::after(STALL))?;
            }
            self.make_room(SMALL_REPLY)?;
            return self.connection.answer(request, Some(error), &mut self.out);
        }
        if self.begin(request)? {
            Ok(())
        } else if is_small(request) && self.flights.is_idle() && self.pace.is_cheap() {
            self.do_here(request)
        } else {
            self.hand_over(request)
        }
    }

    /// Begins a small read; `false` if it is none, or one that cannot be begun.
    fn begin(&mut self, request: &Request) -> io::Result<bool> {
        if request.command != Command::Read || !is_small(request) || !self.flights.has_room()? {
            return Ok(false);
        }
        let connection = self.connection;
        let len = request.len as usize;
        let chunk = proto::data_chunk(request.cookie, true, request.offset, request.len);
        let simple = proto::simple_reply(request.cookie, None);
        let head = if connection.agreed.structured { &chunk[..] } else { &simple[..] };
        match connection.disk.chain.locate(request.offset, u64::from(request.len)) {
            Some(Located::Data(place)) => self.flights.begin(*request, head, place, connection.disk.begin()),
            Some(Located::Zeros) => {
                self.make_room(len + SMALL_REPLY)?;
                self.out.put(head);
                self.out.put_zeros(len);
            }
            None => return Ok(false),
        }
        self.begun += head.len() + len;
        if self.begun >= EAGER {
            self.begun = 0;
            self.flights.land(false)?;
            self.send()?;
        }
        Ok(true)
    }

    /// Sends the replies that are there, and lets threads read what could not be read as it was begun.
    fn settle(&mut self) -> io::Result<()> {
        loop {
            self.send()?;
            match self.flights.failed() {
                Some(request) => self.hand_over(&request)?,
                None => return Ok(()),
            }
        }
    }

    /// To be called before anything that may wait for anybody but the disk.
    fn come_down(&mut self) -> io::Result<()> {
        self.flights.land_all()
    }

    fn make_room(&mut self, len: usize) -> io::Result<()> {
        if self.out.room() < len { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> io::Result<()> {
        let connection = self.connection;
        let sent = self.flights.send(self.out.bytes(), &connection.client.socket, &connection.sending);
        self.out.clear();
        sent
    }

    /// Does a small request. Nothing may be under way: it waits for whom it has to.
    fn do_here(&mut self, request: &Request) -> io::Result<()> {
        self.make_room(SMALL as usize + SMALL_REPLY)?;
        let len = if request.command == Command::Write { request.len as usize } else { 0 };
        if self.input.available().len() < len {
            self.send()?;
            self.input.need(len, Deadline::after(STALL))?;
        }
        let began = Instant::now();
        let payload = &self.input.available()[..len];
        self.connection.execute(request, payload, self.received, &mut self.out)?;
        self.pace.note(began.elapsed());
        self.input.consume(len);
        if self.out.bytes().len() >= EAGER { self.send() } else { Ok(()) }
    }

    fn hand_over(&mut self, request: &Request) -> io::Result<()> {
        let connection = self.connection;
        // From here on it may have to wait; what is answered need not.
        self.send()?;
        let (payload, room) = self.payload(request)?;
        if connection.pool.is_full() {
            self.come_down()?;
        }
        let busy = connection.disk.begin();
        let job = Job { request: *request, payload, received: self.received, room, _busy: busy };
        match connection.pool.submit(job, &self.start) {
            Ok(()) => Ok(()),
            Err(job) => {
                self.come_down()?;
                connection.do_job(job, &mut self.out)
            }
        }
    }

    /// What a write brings, and the room it takes: the connection's share first, so that nobody waits with room of all in hand
    /// for room of his own.
    fn payload(&mut self, request: &Request) -> io::Result<(Vec<u8>, Option<[Held<'a>; 2]>)> {
        if request.command != Command::Write {
            return Ok((Vec::new(), None));
        }
        let len = request.len as usize;
        if self.input.available().len() < len {
            self.come_down()?;
        }
        let room = [self.room(self.connection.window, len)?, self.room(&self.connection.disk.window, len)?];
        let mut buffer = self.connection.take_buffer(len);
        self.input.read_exact(&mut buffer[..len], Deadline::after(STALL))?;
        Ok((buffer, Some(room)))
    }

    fn room(&mut self, window: &'a Window, len: usize) -> io::Result<Held<'a>> {
        if let Some(held) = window.try_take(len) {
            return Ok(held);
        }
        self.come_down()?;
        Ok(window.take(len))
    }
}

fn is_small(request: &Request) -> bool {
    matches!(request.command, Command::Read | Command::Write) && request.len <= SMALL && request.flags == 0
}

/// Whether small requests are better done by the reader itself than handed over: a score of how many of the last ones were slow
/// when it did them. One slow request in a while says nothing: the reader may only have lost its processor for a moment.
#[derive(Debug, Default)]
struct Pace {
    score: u32,
    passed_on: u32,
}

/// What handing over to another thread and its own send cost, roughly. A request that takes longer waits for a disk.
const HANDING_OVER: Duration = Duration::from_micros(40);
/// A slow request counts for so many fast ones: from a third of slow ones on it is worth handing over.
const SLOW: u32 = 2;
/// From this score on requests are handed over.
const DEAR: u32 = 8;
/// While they are, each so many-th is done by the reader to see whether they have become cheap.
const PROBE: u32 = 32;

impl Pace {
    fn is_cheap(&mut self) -> bool {
        if self.score < DEAR {
            return true;
        }
        self.passed_on = (self.passed_on + 1) % PROBE;
        self.passed_on == 0
    }

    fn note(&mut self, took: Duration) {
        self.score = if took > HANDING_OVER { (self.score + SLOW).min(2 * DEAR) } else { self.score.saturating_sub(1) };
    }
}

/// Lets the workers end, whatever happens to the reader: the scope waits for them.
struct CloseOnDrop<'a, J: Send>(&'a Pool<J>);

impl<J: Send> Drop for CloseOnDrop<'_, J> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A worker that panics has left a request without a reply: the client shall ask again, elsewhere.
struct CutOnPanic<'a>(&'a Client);

impl Drop for CutOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.cut();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_request_now_and_then_changes_nothing_but_many_do() {
        let (slow, fast) = (Duration::from_millis(1), Duration::from_micros(3));
        let mut pace = Pace::default();
        for _ in 0..100 {
            pace.note(Duration::from_secs(1));
            (0..3).for_each(|_| pace.note(fast));
            assert!(pace.is_cheap());
        }
        for _ in 0..100 {
            pace.note(slow);
            pace.note(fast);
        }
        assert_eq!((0..PROBE * 4).filter(|_| pace.is_cheap()).count(), 4, "only probes");
        (0..2 * DEAR).for_each(|_| pace.note(fast));
        assert!(pace.is_cheap());
    }

    #[test]
    fn zeros_are_told_from_data() {
        assert!(is_zero(&[]) && is_zero(&[0]) && is_zero(&[0; 4096]));
        for at in [0, 1, 2047, 4095] {
            let mut buf = [0; 4096];
            buf[at] = 1;
            assert!(!is_zero(&buf), "{at}");
        }
    }
}
