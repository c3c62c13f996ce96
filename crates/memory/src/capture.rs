//! From a migration stream to a memory disk.
//!
//! ```text
//!            this thread                                    the writer
//!   stream ─► Parser ─► batches of pages ──── bounded ────► sort, compare with what lies beneath ─► Chain
//!                             ▲──────────── used again ─────────┘
//! ```
//!
//! While QEMU takes a background snapshot, a guest that writes to a page waits until that page was read here. So reading goes on
//! while the writer works, until the batches run out, and waits for nothing but the writer's disk.
//!
//! Pages may come in any order, and several times (the last one counts): plain migration and background snapshots are both
//! captured. The table is written last: before it, the disk is not one.

mod batch;
mod writer;

use crate::restore::Sealed;
use crate::seen::{Seen, Stretch};
use crate::stream::{Block, DeviceState, Emitter, Event, PAGE, Parser};
use crate::table::{Content, DESCRIPTION_ROOM, Layout, PRELUDE_ROOM, STATE_ROOM, Table};
use crate::{Error, ErrorKind, Result};
use batch::Batch;
use image::Chain;
use image::hashes::{Expected, Pages};
use std::collections::HashSet;
use std::io::Read;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread;
use writer::Writer;

/// Bytes read from the stream at a time, at most.
const READ: usize = 1 << 20;
/// Batches in use, which bounds what the guest can be ahead of the disk.
const BATCHES: usize = 6;
/// The most bytes after RAM: the devices' state and its description.
const TAIL: usize = 32 << 20;

/// A new memory disk, and what is to be recorded of it.
#[derive(Debug)]
pub struct Made {
    /// The chain whose leaf is a new, empty layer.
    pub chain: Arc<Chain>,
    /// The record of that leaf's pages, empty.
    pub pages: Pages,
}

/// The memory disk that a capture needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewLayer {
    /// Its size in bytes; its sectors have 4096 bytes.
    pub size: u64,
    /// Whether it is to stand on the parent that the capture was given: that one holds RAM of the same shape. If not, the disk
    /// has no parent.
    pub on_parent: bool,
}

/// What is said while a capture runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// The first pages arrive: in a background snapshot, the devices' state has been taken and RAM is write-protected.
    Pages,
    /// Bytes of the guest's RAM seen so far, of all; never goes back.
    Progress {
        /// Seen.
        done: u64,
        /// All.
        total: u64,
    },
}

/// Pages by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Data that was not beneath: written.
    pub stored: u64,
    /// Zeros over data: recorded as zeros.
    pub zeroed: u64,
    /// Data that lay beneath already: not written.
    pub same: u64,
    /// Zeros over zeros: not written.
    pub empty: u64,
}

/// A memory disk, complete and durable.
#[derive(Debug)]
pub struct Captured {
    /// The chain that `new_layer` made, its leaf written and flushed.
    pub chain: Arc<Chain>,
    /// Every page that was written.
    pub pages: Pages,
    /// Whether it stands on the parent.
    pub on_parent: bool,
    /// The machine's type as QEMU names it (`pc-q35-10.0`).
    pub machine: String,
    /// Bytes of RAM, of all blocks together.
    pub ram: u64,
    /// What became of the pages.
    pub counts: Counts,
    /// What of RAM is mostly in use.
    pub used: Vec<Stretch>,
    /// What is mostly zeros.
    pub idle: Vec<Stretch>,
}

/// Captures a migration stream into a new memory disk.
///
/// `stream` blocks. It ends early when QEMU gives up or its socket is shut down: [`ErrorKind::Truncated`]. `parent` is the memory that the guest was restored from or last
/// captured into; it is read only where it is not recorded what it holds. `new_layer` is called once, when the blocks of RAM are known, and answers with a chain whose leaf is a new,
/// empty layer, over the parent's layers if [`NewLayer::on_parent`] says so. Whatever is written there is recorded, page by page. `signal` is called from this thread and must not
/// wait for anything.
///
/// When this fails, the stream is not read any further, and the new layer holds rubbish without a table and is to be removed. A
/// background snapshot's stream must be read to its end nevertheless, by the caller: the guest waits for its pages, and QEMU before
/// 8.1 leaves them protected for ever when the stream breaks. When it succeeds, the stream was complete:
/// every page of every block was seen.
pub fn capture(
    stream: impl Read,
    parent: Option<&Sealed>,
    new_layer: impl FnOnce(NewLayer) -> std::result::Result<Made, Box<dyn std::error::Error + Send + Sync>>,
    mut signal: impl FnMut(Signal),
) -> Result<Captured> {
    let mut source = Source::new(stream);
    let prelude = source.prelude()?;
    let parent = parent.filter(|parent| holds(&parent.chain, &prelude.blocks));
    let layout = Layout::of(&prelude.blocks);
    let Made { chain, pages } =
        new_layer(NewLayer { size: layout.size, on_parent: parent.is_some() }).map_err(|source| Error {
            source: Some(source),
            ..Error::new(ErrorKind::Image, "the memory disk could not be made")
        })?;
    if chain.size() != layout.size || chain.sector_size() as usize != PAGE {
        return Err(Error::new(
            ErrorKind::Image,
            "the memory disk has not the size or the sectors that were asked for",
        ));
    }

    let nothing = Expected::zeros(pages.key());
    let writer = Writer::new(&chain, pages, parent.map_or(&nothing, |parent| &parent.expected));
    let (Tail { devices, used, idle }, mut writer) = copy_pages(&mut source, &prelude, &layout, writer, &mut signal)?;
    let counts = writer.counts();
    write_rest(&mut writer, &layout, &prelude, DeviceState::split(devices)?, counts)?;
    let pages = writer.end();
    chain.flush()?;
    let ram = prelude.blocks.iter().map(|block| block.len).sum();
    let on_parent = parent.is_some();
    Ok(Captured { chain, pages, on_parent, machine: prelude.machine, ram, counts, used, idle })
}

/// Whether a disk holds RAM of these very blocks. One that cannot be read holds nothing to stand on: the new disk is then larger,
/// which is better than no snapshot.
fn holds(parent: &Chain, blocks: &[Block]) -> bool {
    match Table::read(parent) {
        Ok(table) => table.blocks == blocks,
        Err(error) => {
            tracing::warn!(%error, "the parent memory is not used");
            false
        }
    }
}

/// What is known once the stream has ended.
struct Tail {
    /// What followed the pages.
    devices: Vec<u8>,
    used: Vec<Stretch>,
    idle: Vec<Stretch>,
}

/// Reads the pages to the stream's end and has them written.
fn copy_pages<'c>(
    source: &mut Source<impl Read>,
    prelude: &Prelude,
    layout: &Layout,
    writer: Writer<'c>,
    signal: &mut impl FnMut(Signal),
) -> Result<(Tail, Writer<'c>)> {
    let (full, to_write) = sync_channel(BATCHES);
    let (written, empty) = channel();
    for _ in 0..BATCHES {
        written.send(Batch::default()).expect("both ends are here");
    }
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("memory-writer".into());
        let writing = thread.spawn_scoped(scope, move || writer.run(&to_write, &written));
        let writing = writing.map_err(|error| Error::stream("no thread to write the memory disk", error))?;
        let collector = Collector::new(prelude, layout, full, empty, signal);
        let collected = collector.run(source);
        // The writer's end comes first: it is why the collector's channel closed, if it did.
        let writer = writing.join().expect("the writer does not panic")?;
        Ok((collected?, writer))
    })
}

/// Writes what is not RAM, the table last.
fn write_rest(
    writer: &mut Writer<'_>,
    layout: &Layout,
    prelude: &Prelude,
    devices: DeviceState,
    counts: Counts,
) -> Result<()> {
    let mut head = Vec::new();
    Emitter::prelude(&mut head, &prelude.machine);
    let table = Table {
        section: prelude.section,
        blocks: prelude.blocks.clone(),
        counts,
        prelude: write_region(writer, layout.prelude, PRELUDE_ROOM, head)?,
        description: write_region(writer, layout.description, DESCRIPTION_ROOM, devices.description)?,
        state: write_region(writer, layout.state, STATE_ROOM, devices.state)?,
    };
    writer.write(&table.encode(), 0)
}

fn write_region(writer: &mut Writer<'_>, at: u64, room: u64, mut bytes: Vec<u8>) -> Result<Content> {
    let content = Content::of(&bytes);
    if content.len > room {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{} bytes of device state; {room} at most", content.len),
        ));
    }
    bytes.resize(bytes.len().next_multiple_of(PAGE), 0);
    writer.write(&bytes, at)?;
    Ok(content)
}

/// The stream up to RAM.
struct Prelude {
    machine: String,
    section: u32,
    blocks: Vec<Block>,
}

/// The stream, with what was read of it and not parsed yet.
struct Source<R> {
    stream: R,
    parser: Parser,
    buffer: Vec<u8>,
    /// The unparsed part of `buffer`.
    unread: std::ops::Range<usize>,
}

impl<R: Read> Source<R> {
    fn new(stream: R) -> Self {
        Self { stream, parser: Parser::new(), buffer: vec![0; READ], unread: 0..0 }
    }

    /// Hands out events until the stream ends (the parser has then been asked whether it may) or `visit` breaks.
    fn each(&mut self, mut visit: impl FnMut(Event<'_>) -> Result<ControlFlow<()>>) -> Result<()> {
        loop {
            let mut input = &self.buffer[self.unread.clone()];
            while let Some(event) = self.parser.next(&mut input)? {
                if visit(event)?.is_break() {
                    self.unread.start = self.unread.end - input.len();
                    return Ok(());
                }
            }
            self.unread = 0..self.fill()?;
            if self.unread.is_empty() {
                return self.parser.finish();
            }
        }
    }

    /// Reads something; 0 at the end.
    fn fill(&mut self) -> Result<usize> {
        loop {
            match self.stream.read(&mut self.buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // QEMU may go away with our half of the socket unread: for us the stream just ends.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(0),
                read => return read.map_err(|error| Error::stream("the migration stream cannot be read", error)),
            }
        }
    }

    /// Reads up to the pages.
    fn prelude(&mut self) -> Result<Prelude> {
        let mut prelude = Prelude { machine: String::new(), section: 0, blocks: Vec::new() };
        self.each(|event| {
            match event {
                Event::Configuration(machine) => machine.clone_into(&mut prelude.machine),
                Event::Blocks { section, blocks } => {
                    prelude.section = section;
                    blocks.clone_into(&mut prelude.blocks);
                    return Ok(ControlFlow::Break(()));
                }
                _ => {}
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(prelude)
    }
}

/// Takes the events of the stream apart: pages into batches, the rest kept.
struct Collector<'a, S> {
    layout: &'a Layout,
    seen: Seen<'a>,
    /// Of these, those that are not all zeros.
    used: Seen<'a>,
    batch: Batch,
    full: SyncSender<Batch>,
    empty: Receiver<Batch>,
    started: bool,
    tail: Vec<u8>,
    signal: &'a mut S,
}

impl<'a, S: FnMut(Signal)> Collector<'a, S> {
    fn new(
        prelude: &'a Prelude,
        layout: &'a Layout,
        full: SyncSender<Batch>,
        empty: Receiver<Batch>,
        signal: &'a mut S,
    ) -> Self {
        let (seen, used) = (Seen::new(&prelude.blocks), Seen::new(&prelude.blocks));
        Self { layout, seen, used, batch: Batch::default(), full, empty, started: false, tail: Vec::new(), signal }
    }

    /// Reads to the stream's end.
    fn run(mut self, source: &mut Source<impl Read>) -> Result<Tail> {
        source.each(|event| self.take(event).map(ControlFlow::Continue))?;
        self.hand_over()?;
        self.seen.check()?;
        let (used, mut idle) = (self.used.stretches(), self.seen.stretches());
        let known: HashSet<&Stretch> = used.iter().collect();
        idle.retain(|stretch| !known.contains(stretch));
        drop(known);
        Ok(Tail { used, idle, devices: self.tail })
    }

    fn take(&mut self, event: Event<'_>) -> Result<()> {
        match event {
            Event::Page { block, offset, data } => self.page(block, offset, Some(data)),
            Event::ZeroPage { block, offset } => self.page(block, offset, None),
            Event::Pages => {
                if !std::mem::replace(&mut self.started, true) {
                    (self.signal)(Signal::Pages);
                }
                Ok(())
            }
            Event::DeviceState(bytes) => {
                if self.tail.len() + bytes.len() > TAIL {
                    return Err(Error::new(ErrorKind::Unsupported, format!("more than {TAIL} bytes of device state")));
                }
                self.tail.extend_from_slice(bytes);
                Ok(())
            }
            Event::Header | Event::Configuration(_) | Event::Blocks { .. } => Ok(()),
        }
    }

    fn page(&mut self, block: usize, offset: u64, data: Option<&[u8; PAGE]>) -> Result<()> {
        self.seen.mark(block, offset);
        if data.is_some() {
            self.used.mark(block, offset);
        }
        self.batch.push(self.layout.blocks[block] + offset, data);
        if self.batch.is_full() { self.hand_over() } else { Ok(()) }
    }

    /// Gives the batch to the writer and takes an empty one.
    fn hand_over(&mut self) -> Result<()> {
        let stopped = || Error::new(ErrorKind::Image, "the memory disk is not written any more");
        let empty = self.empty.recv().map_err(|_| stopped())?;
        self.full.send(std::mem::replace(&mut self.batch, empty)).map_err(|_| stopped())?;
        (self.signal)(Signal::Progress { done: self.seen.bytes(), total: self.seen.total() });
        Ok(())
    }
}
