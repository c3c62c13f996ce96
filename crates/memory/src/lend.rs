//! From a memory disk into a guest that runs already: its devices first, then the pages that it asks for, and the rest when it asks for none.
//!
//! ```text
//!            lend, this thread                        the answers' thread
//!   chain ──► devices, then pages ──► QEMU ──► asked for ──► Asked
//!               ▲      the next one asked for, else the next of the disk      │
//!               └──────────────────────────────────────────────────┘
//! ```
//!
//! A guest that asks for a page stands still until it has come, so what is asked for goes first, and what is not is sent in small pieces
//! while somebody asks ([`Pace::Gentle`]): a large one would lie in the socket before the page that the guest waits for.
//!
//! What the guest asked for when the same memory was last lent it will soon ask for again: that is sent before everything else ([`Touched`]).
//!
//! A page that is not as it was captured is kept back like one that cannot be read: the guest waits for it, and somebody is told. While the guest
//! is still being loaded that is the end of it, for it can be done without then.
//!
//! Pages of zeros are sent only if they are asked for: what never came reads as zeros once everything has been sent.
//!
//! When this side dies the guest runs until it needs a page that is missing. Another [`lend`] goes on then, over the same socket, if somebody
//! has kept that open ([`Beginning::TakenOver`]): what was sent is told by a [`Trail`]. So that it finds the socket between two messages, each is
//! written and read in one go, which a socket does whole or not at all. What the guest had asked for and not got comes with the rest of the
//! pages. (QEMU's own way, a new connection that asks for what is missing, is [`Beginning::Recovered`]. It needs QEMU's monitor, which does not
//! answer while QEMU itself waits for a page.)

mod asked;
mod trail;

pub use trail::Trail;

use crate::restore::{Parts, Sealed, read_parts};
use crate::seen::{Seen, Stretch};
use crate::stream::{Block, Emitter, PAGE, postcopy};
use crate::{Error, Result};
use asked::{Asked, Next};
use image::{Chain, ChainRun, RunKind};
use rustix::net::sockopt::set_socket_send_buffer_size;
use std::collections::{BTreeSet, VecDeque};
use std::io::Write;
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use trail::Piece;

/// Pages that are looked at together: those around the one that was asked for, or the next ones.
const CLUSTER: u64 = 16;
/// Pages that are sent together. A socket takes so many bytes whole or not at all: Linux makes one buffer of up to 48 KiB of them
/// (`unix_stream_sendmsg`), if it may hold twice that ([`SEND_BUFFER`]).
const PIECE: usize = 8;
/// The number of a ping that is of no piece.
const SYNC: u32 = 0;
/// Bytes that the socket is to hold: few, so that what the guest waits for does not queue behind what it did not ask for.
const SEND_BUFFER: usize = 96 << 10;
/// The most pieces of RAM that are noted as asked for. A Linux guest that goes on, and answers, asks for some 330; what a guest asks for later has come by
/// then, and to send that first would only hold up the guest that has just begun to run.
pub const TOUCHED: usize = 512;
/// Runs of the disk that are looked up at a time.
const RUNS: usize = 1024;

/// How fast the pages come that nobody has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Pace {
    /// Not at all: the guest is being loaded.
    #[default]
    OnDemand,
    /// A few at a time while the guest asks for others; all that there are while it does not.
    Gentle,
    /// As fast as they can.
    Full,
}

/// A handle on a [`lend`] under way. A clone is the same.
#[derive(Debug, Clone, Default)]
pub struct Lending(Arc<Asked>);

impl Lending {
    /// Raises the pace; it never falls.
    pub fn pace(&self, pace: Pace) {
        self.0.raise_pace(pace);
    }

    /// Nothing that was not asked for is sent for so long, unless at [`Pace::Full`]: others on this host go first. To be said as the lending
    /// goes on.
    pub fn rest(&self, time: Duration) {
        self.0.rest(time);
    }
}

/// A piece of RAM that a guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touched {
    /// Which block of RAM, counted from 0 as the memory's table has them.
    pub block: usize,
    /// Which 64 KiB of it, counted from 0.
    pub cluster: u64,
}

/// What is known of a memory disk once it has been lent.
#[derive(Debug, Clone, Default)]
pub struct Lent {
    /// What of RAM is mostly in use.
    pub used: Vec<Stretch>,
    /// What the guest asked for, in this order.
    pub touched: Vec<Touched>,
}

/// How it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Beginning {
    /// With a QEMU that waits for a stream, and allows postcopy. What a guest asked for when the disk was lent before, if that is known.
    Anew(Vec<Touched>),
    /// With one whose earlier source of pages is gone, over the same socket.
    TakenOver,
    /// With one whose earlier source of pages is gone, and that was told to recover (`migrate-recover`), over a new socket.
    Recovered,
}

/// Whether what a memory disk holds can be lent: its devices' state fits into a package.
///
/// # Errors
/// As [`crate::inspect`].
pub fn can_lend(chain: &Chain) -> Result<bool> {
    Ok(postcopy::fits(&read_parts(chain)?.devices.state))
}

/// Lends a memory disk to a QEMU, until it has everything. Blocks.
///
/// `socket` is read and written; what was sent is recorded in `trail`. `trouble` is told of pages that cannot be read or are not as recorded, once
/// each time that is tried (once a second, as long as QEMU is there): the guest waits for them. `progress` gets the bytes of RAM that need not be looked at any more, of all; it never goes back.
///
/// # Errors
/// Those of the disk's table before the first byte is sent; [`crate::ErrorKind::Damaged`] for a page that a guest needs while it is being loaded
/// ([`Pace::OnDemand`]), and that is not as recorded: it can still be given up then; [`crate::ErrorKind::Stream`] and [`crate::ErrorKind::Truncated`] if QEMU gives up,
/// or if somebody shuts the socket; [`crate::ErrorKind::Damaged`] for what QEMU does not say.
pub fn lend(
    sealed: &Sealed,
    socket: &UnixStream,
    beginning: Beginning,
    lending: &Lending,
    trail: &Trail,
    trouble: impl FnMut(&Error),
    progress: impl FnMut(u64, u64),
) -> Result<Lent> {
    let parts = read_parts(&sealed.chain)?;
    let asked = &*lending.0;
    set_socket_send_buffer_size(socket, SEND_BUFFER)
        .map_err(|error| Error::stream("a socket's buffer", error.into()))?;
    thread::scope(|scope| {
        let answers = thread::Builder::new().name("memory-asked".into());
        let blocks = &parts.table.blocks;
        let answers = answers.spawn_scoped(scope, move || asked.listen(socket, blocks, trail));
        let answers = answers.map_err(|error| Error::stream("no thread to hear what the guest asks for", error))?;
        let sent = Lender::new(sealed, socket, &parts, asked, trail, trouble, progress).run(beginning);
        if sent.is_err() {
            // Wakes the other thread; and QEMU, which keeps what it has.
            let _ = socket.shutdown(Shutdown::Both);
        }
        let heard = answers.join().expect("who listens does not panic");
        // If QEMU said something unsound, that is why no more was sent.
        sent.or_else(|error| heard.and(Err(error)))
    })
}

struct Lender<'a, T, P> {
    sealed: &'a Sealed,
    socket: &'a UnixStream,
    parts: &'a Parts,
    starts: Vec<u64>,
    emitter: Emitter<'a>,
    asked: &'a Asked,
    trail: &'a Trail,
    sent: Seen<'a>,
    /// The number of the last piece that was sent.
    piece: u32,
    /// What the disk holds from where the push is on, in order.
    runs: VecDeque<ChainRun>,
    /// Where in which block it is, bytes.
    at: (usize, u64),
    /// What is sent before all else, and what was asked for.
    first: VecDeque<Touched>,
    touched: Vec<Touched>,
    /// What could not be read, or was not as recorded: a page of a block each.
    unread: BTreeSet<(usize, u64)>,
    out: Vec<u8>,
    data: Vec<u8>,
    trouble: T,
    progress: P,
}

impl<'a, T: FnMut(&Error), P: FnMut(u64, u64)> Lender<'a, T, P> {
    fn new(
        sealed: &'a Sealed,
        socket: &'a UnixStream,
        parts: &'a Parts,
        asked: &'a Asked,
        trail: &'a Trail,
        trouble: T,
        progress: P,
    ) -> Self {
        let blocks = &parts.table.blocks;
        Self {
            sealed,
            socket,
            parts,
            starts: parts.table.layout().blocks,
            emitter: Emitter::new(parts.table.section, blocks),
            asked,
            trail,
            sent: Seen::new(blocks),
            piece: 0,
            runs: VecDeque::new(),
            at: (0, 0),
            first: VecDeque::new(),
            touched: Vec::new(),
            unread: BTreeSet::new(),
            out: Vec::new(),
            data: Vec::new(),
            trouble,
            progress,
        }
    }

    fn run(mut self, beginning: Beginning) -> Result<Lent> {
        match beginning {
            Beginning::Anew(touched) => self.begin(&touched),
            Beginning::TakenOver => self.take_over(),
            Beginning::Recovered => self.recover(),
        }?;
        let mut more = true;
        while more || !self.unread.is_empty() {
            if let Some(Touched { block, cluster }) = self.first.front().copied()
                && !self.asked.is_waiting()
            {
                self.first.pop_front();
                self.lend_cluster(block, cluster, None)?;
                continue;
            }
            match self.asked.next(more, !self.unread.is_empty())? {
                Next::Asked(block, page) => {
                    self.note_touched(block, page);
                    self.lend_around(block, page)?;
                }
                Next::Push => more = self.push()?,
                Next::Retry => {
                    for (block, page) in std::mem::take(&mut self.unread) {
                        self.lend_around(block, page)?;
                    }
                }
            }
        }
        self.end()
    }

    /// Devices first: the guest can run then.
    fn begin(&mut self, touched: &[Touched]) -> Result<()> {
        let blocks = &self.parts.table.blocks;
        let is_there = |one: &&Touched| blocks.get(one.block).is_some_and(|block| one.cluster * CLUSTER < pages(block));
        self.first = touched.iter().filter(is_there).copied().collect();
        self.out.extend_from_slice(&self.parts.prelude);
        postcopy::advise(&mut self.out);
        self.emitter.start(&mut self.out);
        for block in &self.parts.table.blocks {
            postcopy::discard(&mut self.out, block);
        }
        postcopy::package(&mut self.out, &self.parts.devices.state);
        self.send()
    }

    /// The trail says what was sent; of the last piece, QEMU.
    fn take_over(&mut self) -> Result<()> {
        let told = self.trail.read()?;
        postcopy::ping(&mut self.out, SYNC);
        self.send()?;
        let arrived = self.asked.synced()?;
        let mut sent = told.sent;
        if let Some(last) = told.last {
            // Its number is not used again.
            self.piece = last.piece.number;
            match last.piece.number == arrived {
                true => sent.push(last.piece),
                false => self.trail.forget(last)?,
            }
        }
        for piece in sent {
            self.piece = self.piece.max(piece.number);
            piece.pages().for_each(|page| self.sent.mark_page(piece.block(), page));
        }
        Ok(())
    }

    /// QEMU says what it has.
    fn recover(&mut self) -> Result<()> {
        self.trail.begin_anew()?;
        for (block, asked) in self.parts.table.blocks.iter().enumerate() {
            postcopy::ask_received(&mut self.out, asked);
            self.send()?;
            let bits = self.asked.received(&asked.name)?;
            for piece in Piece::known(block, &bits) {
                self.trail.sending(piece)?;
                piece.pages().for_each(|page| self.sent.mark_page(block, page));
            }
        }
        postcopy::resume(&mut self.out);
        self.send()?;
        self.asked.resumed()
    }

    /// The page that was asked for, with its neighbours.
    fn lend_around(&mut self, block: usize, page: u64) -> Result<()> {
        if self.sent.has(block, page) {
            return Ok(());
        }
        self.lend_cluster(block, page / CLUSTER, Some(page))
    }

    fn lend_cluster(&mut self, block: usize, cluster: u64, wanted: Option<u64>) -> Result<()> {
        let (first, pages) = (cluster * CLUSTER, pages(&self.parts.table.blocks[block]));
        self.lend_pages(block, first, CLUSTER.min(pages - first), wanted)
    }

    fn note_touched(&mut self, block: usize, page: u64) {
        if self.touched.len() < TOUCHED {
            self.touched.push(Touched { block, cluster: page / CLUSTER });
        }
    }

    /// Sends some more of what nobody has asked for; `false` if there is no more.
    fn push(&mut self) -> Result<bool> {
        let Some((block, first, count)) = self.next_unsent()? else { return Ok(false) };
        self.lend_pages(block, first, count, None)?;
        Ok(true)
    }

    /// The next pages that the disk holds and that were not sent: of one cluster at most.
    fn next_unsent(&mut self) -> Result<Option<(usize, u64, u64)>> {
        loop {
            let (block, at) = self.at;
            let Some(len) = self.parts.table.blocks.get(block).map(|block| block.len) else { return Ok(None) };
            if at == len {
                self.at = (block + 1, 0);
                self.runs.clear();
                continue;
            }
            let Some(run) = self.runs.front().copied() else {
                self.runs = self.sealed.chain.runs(self.starts[block] + at, len - at, RUNS)?.into();
                continue;
            };
            let (page, end) = (at / PAGE as u64, (run.offset + run.len - self.starts[block]) / PAGE as u64);
            // What reads as zeros and is to be something else is looked at, too: who is not sent it takes it for zeros.
            let page = if run.kind == RunKind::Data { page } else { self.next_data(block, page..end) };
            if page == end {
                self.advance(block, end);
                self.runs.pop_front();
                continue;
            }
            let next = end.min((page / CLUSTER + 1) * CLUSTER);
            self.advance(block, next);
            if (page..next).any(|page| !self.sent.has(block, page)) {
                return Ok(Some((block, page, next - page)));
            }
        }
    }

    /// The first of these pages that is to hold something; their end, if none is known to.
    fn next_data(&self, block: usize, pages: Range<u64>) -> u64 {
        let [start, end] = [pages.start, pages.end].map(|page| self.starts[block] + page * PAGE as u64);
        let known = self.sealed.expected.next_data(start..end);
        known.map_or(pages.end, |at| (at - self.starts[block]) / PAGE as u64)
    }

    fn advance(&mut self, block: usize, page: u64) {
        self.at = (block, page * PAGE as u64);
        let before: u64 = self.parts.table.blocks[..block].iter().map(|block| block.len).sum();
        (self.progress)(before + self.at.1, self.sent.total());
    }

    /// Sends those of these pages that were not sent yet; `wanted` even if it is all zeros.
    fn lend_pages(&mut self, block: usize, first: u64, count: u64, wanted: Option<u64>) -> Result<()> {
        self.data.resize(count as usize * PAGE, 0);
        if let Err(error) = self.sealed.chain.read(&mut self.data, self.starts[block] + first * PAGE as u64) {
            (self.trouble)(&error.into());
            self.unread.insert((block, wanted.unwrap_or(first)));
            return Ok(());
        }
        let mut pages: Vec<u64> = (first..first + count).filter(|page| !self.sent.has(block, *page)).collect();
        self.keep_back(block, first, &mut pages)?;
        if let Some(wanted) = wanted {
            let before = pages.partition_point(|page| *page < wanted);
            pages.rotate_left(before);
        }
        pages.retain(|page| wanted == Some(*page) || *self.page(first, *page) != [0; PAGE]);
        pages.chunks(PIECE).try_for_each(|pages| self.send_pages(block, first, pages))
    }

    /// Takes those out of `pages` that are not as recorded. Nobody gets them; of several that are kept back one is told of.
    fn keep_back(&mut self, block: usize, first: u64, pages: &mut Vec<u64>) -> Result<()> {
        let place = |page: u64| self.starts[block] + page * PAGE as u64;
        let is_wrong = |page: &mut u64| !self.sealed.expected.allows(place(*page), self.page(first, *page));
        let wrong: Vec<u64> = pages.extract_if(.., is_wrong).collect();
        let Some(page) = wrong.first() else { return Ok(()) };
        let error = self.sealed.not_as_captured(&self.parts.table, place(*page));
        if self.asked.is_loading() {
            return Err(error);
        }
        if self.unread.is_empty() {
            (self.trouble)(&error);
        }
        self.unread.extend(wrong.into_iter().map(|page| (block, page)));
        Ok(())
    }

    fn send_pages(&mut self, block: usize, first: u64, pages: &[u64]) -> Result<()> {
        self.piece += 1;
        self.trail.sending(Piece::new(self.piece, block, pages.iter().copied()))?;
        self.asked.sending(self.piece);
        self.emitter.open_part(&mut self.out);
        for page in pages {
            self.sent.mark_page(block, *page);
            let data = &self.data[(page - first) as usize * PAGE..][..PAGE];
            match *data == [0; PAGE] {
                true => self.emitter.zero_page(&mut self.out, block, page * PAGE as u64),
                false => self.emitter.page(&mut self.out, block, page * PAGE as u64, data),
            }
        }
        self.emitter.close(&mut self.out);
        postcopy::ping(&mut self.out, self.piece);
        self.send()
    }

    /// Of what was read from page `first` on.
    fn page(&self, first: u64, page: u64) -> &[u8] {
        &self.data[(page - first) as usize * PAGE..][..PAGE]
    }

    fn end(mut self) -> Result<Lent> {
        self.emitter.open_end(&mut self.out);
        self.emitter.close(&mut self.out);
        postcopy::end(&mut self.out);
        self.send()?;
        let total = self.sent.total();
        (self.progress)(total, total);
        Ok(Lent { used: self.sent.stretches(), touched: self.touched })
    }

    fn send(&mut self) -> Result<()> {
        let written = (&mut &*self.socket).write_all(&self.out);
        self.out.clear();
        written.map_err(|error| Error::stream("QEMU takes no more of its memory", error))
    }
}

fn pages(block: &Block) -> u64 {
    block.len / PAGE as u64
}
