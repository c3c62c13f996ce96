//! The stream's parser: bytes in pieces of any size, events out.
//!
//! Two parts: [`Grammar`] knows the format and looks at contiguous bytes; [`Parser`] makes bytes contiguous where the input broke
//! them, copying nothing otherwise.

use super::Block;
use super::format::{
    COMMAND, CONFIGURATION, EOF, FOOTER, MAGIC, MAX_BLOCKS, MAX_RAM, PAGE, RAM, RAM_INSTANCE, RAM_VERSION, SECTION_END,
    SECTION_FULL, SECTION_PART, SECTION_START, SUBSECTION, SWITCHOVER_START, VERSION, flag,
};
use crate::{Error, ErrorKind, Result};

/// What the parser found. Data is borrowed from the input, or from the parser where the input broke it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// The stream is QEMU's, of a version that is known.
    Header,
    /// The machine's type (`pc-q35-10.0`).
    Configuration(&'a str),
    /// The RAM section has begun: its section id and the blocks of RAM, which the numbers in later events index.
    Blocks {
        /// The id that the following RAM sections carry.
        section: u32,
        /// The blocks, in the stream's order.
        blocks: &'a [Block],
    },
    /// A section with pages begins. In a background snapshot the first one says that the devices' state has been taken and RAM
    /// is write-protected.
    Pages,
    /// A page of data.
    Page {
        /// Which block.
        block: usize,
        /// Byte offset in the block, a multiple of [`PAGE`], inside it.
        offset: u64,
        /// The page.
        data: &'a [u8; PAGE],
    },
    /// A page of zeros.
    ZeroPage {
        /// Which block.
        block: usize,
        /// Byte offset in the block, a multiple of [`PAGE`], inside it.
        offset: u64,
    },
    /// A piece of what follows RAM, to the stream's end: see [`DeviceState::split`](super::DeviceState::split).
    DeviceState(&'a [u8]),
}

/// The incremental parser.
///
/// It never panics, whatever the bytes, and holds a few pages at most. After an error it is not to be used again.
///
/// ```
/// use memory::stream::{Event, Parser};
/// let mut parser = Parser::new();
/// let mut piece: &[u8] = b"QEVM\0\0";
/// assert!(parser.next(&mut piece).unwrap().is_none()); // more bytes are needed; the piece is used up
/// piece = b"\0\x03";
/// assert_eq!(parser.next(&mut piece).unwrap(), Some(Event::Header));
/// ```
#[derive(Debug, Default)]
pub struct Parser {
    grammar: Grammar,
    /// The bytes of one item that the input broke, and sometimes a few of the next.
    carry: Vec<u8>,
    /// How many bytes of `carry` the last event took.
    spent: usize,
    /// Bytes taken in so far, those in `carry` included.
    taken: u64,
}

impl Parser {
    /// A parser at the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next event, or `None` when `input` is used up. `input` is moved past what was taken.
    pub fn next<'a, 'i: 'a>(&'a mut self, input: &mut &'i [u8]) -> Result<Option<Event<'a>>> {
        self.carry.drain(..std::mem::take(&mut self.spent));
        loop {
            let carried = !self.carry.is_empty();
            let bytes = if carried { self.carry.as_slice() } else { *input };
            if bytes.is_empty() {
                return Ok(None);
            }
            let at = self.taken - self.carry.len() as u64;
            match self.grammar.step(bytes).map_err(|error| locate(error, at))? {
                Step::Need(total) => {
                    let missing = (total - self.carry.len()).min(input.len());
                    if carried && missing == 0 {
                        return Ok(None);
                    }
                    self.take(input, missing);
                }
                Step::Skip(len) if carried => drop(self.carry.drain(..len)),
                Step::Skip(len) => drop(self.pass(input, len)),
                Step::Found(len, found) => {
                    let bytes = if carried {
                        self.spent = len;
                        &self.carry[..len]
                    } else {
                        self.pass(input, len)
                    };
                    return Ok(Some(found.event(bytes, &self.grammar.blocks)));
                }
            }
        }
    }

    /// To be called when the input has ended: an error unless the stream got as far as the devices' state.
    pub fn finish(&self) -> Result<()> {
        match self.grammar.state {
            State::Devices => Ok(()),
            _ => Err(locate(Error::new(ErrorKind::Truncated, "the stream ended early"), self.taken)),
        }
    }

    /// Bytes held until their item is whole.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.carry.capacity()
    }

    /// Moves `len` bytes of the input behind those carried.
    fn take(&mut self, input: &mut &[u8], len: usize) {
        let piece = self.pass(input, len);
        self.carry.extend_from_slice(piece);
    }

    /// Moves past `len` bytes of the input.
    fn pass<'i>(&mut self, input: &mut &'i [u8], len: usize) -> &'i [u8] {
        let (piece, rest) = input.split_at(len);
        *input = rest;
        self.taken += len as u64;
        piece
    }
}

/// Adds the place in the stream to an error of the grammar.
fn locate(error: Error, at: u64) -> Error {
    Error { message: format!("{} (at byte {at} of the stream)", error.message), ..error }
}

/// What [`Grammar::step`] made of the bytes.
enum Step {
    /// Nothing yet: it needs this many bytes, always more than it was given.
    Need(usize),
    /// So many bytes are done with and mean nothing to the caller.
    Skip(usize),
    /// So many bytes make up an event.
    Found(usize, Found),
}

/// An event without its borrows: ranges count from the step's first byte.
enum Found {
    Header,
    Configuration(std::ops::Range<usize>),
    Blocks(u32),
    Pages,
    Page { block: usize, offset: u64 },
    ZeroPage { block: usize, offset: u64 },
    DeviceState,
}

impl Found {
    /// The event, with its data in `bytes`, which are exactly those that the step took.
    fn event<'a>(self, bytes: &'a [u8], blocks: &'a [Block]) -> Event<'a> {
        match self {
            Self::Header => Event::Header,
            Self::Configuration(name) => {
                Event::Configuration(std::str::from_utf8(&bytes[name]).expect("the grammar checked the name"))
            }
            Self::Blocks(section) => Event::Blocks { section, blocks },
            Self::Pages => Event::Pages,
            Self::Page { block, offset } => {
                let data = bytes.last_chunk().expect("a page record ends with its page");
                Event::Page { block, offset, data }
            }
            Self::ZeroPage { block, offset } => Event::ZeroPage { block, offset },
            Self::DeviceState => Event::DeviceState(bytes),
        }
    }
}

/// Where in the stream the grammar stands.
#[derive(Debug, Default, Clone, Copy)]
enum State {
    #[default]
    Header,
    Configuration,
    /// Before the RAM section.
    Prelude,
    /// At the first record of the RAM section, which opens the block list.
    MemSize,
    /// In the block list; so many bytes of RAM have not been named yet.
    Blocks {
        left: u64,
    },
    /// In the records of a RAM section.
    Records,
    /// At the footer of a RAM section.
    Footer,
    /// Between RAM sections.
    Between,
    /// Past RAM.
    Devices,
}

/// The format, as a state machine over contiguous bytes: each step sees the bytes from where the last one ended.
#[derive(Debug, Default)]
struct Grammar {
    state: State,
    /// The RAM section's id.
    section: u32,
    blocks: Vec<Block>,
    /// The block of the last record, which `CONTINUE` refers to.
    current: Option<usize>,
    /// Whether a section with pages has begun.
    pages: bool,
}

impl Grammar {
    /// Looks at `bytes`, which are not empty.
    fn step(&mut self, bytes: &[u8]) -> Result<Step> {
        match self.state {
            State::Header => self.header(bytes),
            State::Configuration => self.configuration(bytes),
            State::Prelude => self.prelude(bytes),
            State::MemSize => self.mem_size(bytes),
            State::Blocks { left } => self.block(bytes, left),
            State::Records => self.record(bytes),
            State::Footer => self.footer(bytes),
            State::Between => self.between(bytes),
            State::Devices => Ok(Step::Found(bytes.len(), Found::DeviceState)),
        }
    }

    /// Moves on with bytes that carry no event.
    fn skip(&mut self, len: usize, next: State) -> Step {
        self.state = next;
        Step::Skip(len)
    }

    /// Moves on with an event.
    fn found(&mut self, len: usize, found: Found, next: State) -> Step {
        self.state = next;
        Step::Found(len, found)
    }

    fn header(&mut self, bytes: &[u8]) -> Result<Step> {
        let Some(magic) = bytes.first_chunk::<4>() else { return Ok(Step::Need(8)) };
        if *magic != MAGIC {
            return Err(damaged("not a QEMU migration stream"));
        }
        let Some(version) = be32(bytes, 4) else { return Ok(Step::Need(8)) };
        if version != VERSION {
            return Err(unsupported(format!("migration stream of version {version}; {VERSION} is known")));
        }
        Ok(self.found(8, Found::Header, State::Configuration))
    }

    fn configuration(&mut self, bytes: &[u8]) -> Result<Step> {
        if bytes[0] != CONFIGURATION {
            return Err(unsupported("the stream does not name its machine type"));
        }
        let Some(len) = be32(bytes, 1) else { return Ok(Step::Need(5)) };
        if len > 255 {
            return Err(damaged(format!("a machine type of {len} letters")));
        }
        let end = 5 + len as usize;
        let Some(name) = bytes.get(5..end) else { return Ok(Step::Need(end)) };
        text(name)?;
        Ok(self.found(end, Found::Configuration(5..end), State::Prelude))
    }

    fn prelude(&mut self, bytes: &[u8]) -> Result<Step> {
        match bytes[0] {
            SECTION_START => self.start(bytes),
            SECTION_FULL => Err(early_state()),
            SUBSECTION => match name_at(bytes, 1)? {
                Name::Need(total) => Ok(Step::Need(total)),
                Name::Is(name, _) => Err(unsupported(format!("the subsection {name:?}"))),
            },
            other => unexpected(other, "before RAM"),
        }
    }

    /// The START of a section, which must be that of RAM.
    fn start(&mut self, bytes: &[u8]) -> Result<Step> {
        let Some(section) = be32(bytes, 1) else { return Ok(Step::Need(5)) };
        let (name, end) = match name_at(bytes, 5)? {
            Name::Need(total) => return Ok(Step::Need(total)),
            Name::Is(name, end) => (name, end),
        };
        if name != RAM || !self.blocks.is_empty() {
            return Err(unsupported(format!("the iterable section {name:?}")));
        }
        let (Some(instance), Some(version)) = (be32(bytes, end), be32(bytes, end + 4)) else {
            return Ok(Step::Need(end + 8));
        };
        if (instance, version) != (RAM_INSTANCE, RAM_VERSION) {
            return Err(unsupported(format!("RAM section of version {version}, instance {instance}")));
        }
        self.section = section;
        Ok(self.skip(end + 8, State::MemSize))
    }

    fn mem_size(&mut self, bytes: &[u8]) -> Result<Step> {
        let Some(record) = be64(bytes, 0) else { return Ok(Step::Need(8)) };
        let left = record & !flag::MASK;
        if record & flag::MASK != flag::MEM_SIZE || left == 0 {
            return Err(damaged("the RAM section does not begin with the blocks of RAM"));
        }
        if left > MAX_RAM {
            return Err(unsupported(format!("{left} bytes of RAM; {MAX_RAM} at most")));
        }
        Ok(self.skip(8, State::Blocks { left }))
    }

    fn block(&mut self, bytes: &[u8], left: u64) -> Result<Step> {
        let (name, end) = match name_at(bytes, 0)? {
            Name::Need(total) => return Ok(Step::Need(total)),
            Name::Is(name, end) => (name, end),
        };
        let Some(len) = be64(bytes, end) else { return Ok(Step::Need(end + 8)) };
        if !len.is_multiple_of(PAGE as u64) || len > left {
            return Err(damaged(format!("the RAM block {name:?} has {len} bytes, {left} are left")));
        }
        if self.blocks.iter().any(|block| block.name == name) {
            return Err(damaged(format!("two RAM blocks named {name:?}")));
        }
        if self.blocks.len() == MAX_BLOCKS {
            return Err(unsupported(format!("more than {MAX_BLOCKS} RAM blocks")));
        }
        self.blocks.push(Block { name: name.to_owned(), len });
        match left - len {
            0 => Ok(self.found(end + 8, Found::Blocks(self.section), State::Records)),
            left => Ok(self.skip(end + 8, State::Blocks { left })),
        }
    }

    fn record(&mut self, bytes: &[u8]) -> Result<Step> {
        let Some(record) = be64(bytes, 0) else { return Ok(Step::Need(8)) };
        let (offset, flags) = (record & !flag::MASK, record & flag::MASK);
        let body = match flags & !flag::CONTINUE {
            flag::PAGE => PAGE,
            flag::ZERO => 1,
            flag::EOS if flags == flag::EOS => return Ok(self.skip(8, State::Footer)),
            _ => return Err(refuse_flags(flags)),
        };
        let (block, at) = match self.block_of(bytes, flags)? {
            Place::Need(total) => return Ok(Step::Need(total + body)),
            Place::Is(block, at) => (block, at),
        };
        let Some(data) = bytes.get(at..at + body) else { return Ok(Step::Need(at + body)) };
        let in_block = &self.blocks[block];
        if offset >= in_block.len {
            return Err(damaged(format!(
                "a page at {offset} of the RAM block {:?} of {} bytes",
                in_block.name, in_block.len
            )));
        }
        self.current = Some(block);
        if flags & flag::PAGE != 0 {
            return Ok(self.found(at + body, Found::Page { block, offset }, State::Records));
        }
        if data[0] != 0 {
            return Err(unsupported(format!("a page filled with {:#04x}", data[0])));
        }
        Ok(self.found(at + body, Found::ZeroPage { block, offset }, State::Records))
    }

    /// The block that a record is about, and where the record's body begins.
    fn block_of(&self, bytes: &[u8], flags: u64) -> Result<Place> {
        if flags & flag::CONTINUE != 0 {
            let block = self.current.ok_or_else(|| damaged("a page that continues no RAM block"))?;
            return Ok(Place::Is(block, 8));
        }
        let (name, end) = match name_at(bytes, 8)? {
            Name::Need(total) => return Ok(Place::Need(total)),
            Name::Is(name, end) => (name, end),
        };
        let block = self.blocks.iter().position(|block| block.name == name);
        let block = block.ok_or_else(|| damaged(format!("a page of the unknown RAM block {name:?}")))?;
        Ok(Place::Is(block, end))
    }

    fn footer(&mut self, bytes: &[u8]) -> Result<Step> {
        if bytes[0] != FOOTER {
            return Err(damaged("a RAM section without its footer"));
        }
        let Some(section) = be32(bytes, 1) else { return Ok(Step::Need(5)) };
        if section != self.section {
            return Err(damaged(format!("the footer of section {section} ends section {}", self.section)));
        }
        Ok(self.skip(5, State::Between))
    }

    fn between(&mut self, bytes: &[u8]) -> Result<Step> {
        match bytes[0] {
            SECTION_PART | SECTION_END => {
                let Some(section) = be32(bytes, 1) else { return Ok(Step::Need(5)) };
                if section != self.section {
                    return Err(unsupported(format!("the iterable section {section}, which is not RAM")));
                }
                self.pages = true;
                Ok(self.found(5, Found::Pages, State::Records))
            }
            SECTION_FULL if !self.pages => Err(early_state()),
            SECTION_FULL => Ok(self.skip(0, State::Devices)),
            SECTION_START => self.start(bytes),
            COMMAND => match bytes.get(1..5) {
                None => Ok(Step::Need(5)),
                // It only says that the source has stopped.
                Some(command) if command == SWITCHOVER_START => Ok(self.skip(5, State::Between)),
                Some(_) => unexpected(COMMAND, "after RAM"),
            },
            other => unexpected(other, "after RAM"),
        }
    }
}

/// A name with its length before it, and where it ends; or how many bytes it takes to know.
enum Name<'a> {
    Need(usize),
    Is(&'a str, usize),
}

/// A record's block and where its body begins; or how many bytes it takes to know.
enum Place {
    Need(usize),
    Is(usize, usize),
}

fn name_at(bytes: &[u8], at: usize) -> Result<Name<'_>> {
    let Some(&len) = bytes.get(at) else { return Ok(Name::Need(at + 1)) };
    let end = at + 1 + usize::from(len);
    match bytes.get(at + 1..end) {
        Some(name) => Ok(Name::Is(text(name)?, end)),
        None => Ok(Name::Need(end)),
    }
}

fn text(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|_| damaged("a name that is not text"))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn damaged(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Damaged, message)
}

fn unsupported(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Unsupported, format!("not supported in a migration stream: {what}"))
}

/// State that devices have loaded before RAM has no length, and those devices (virtio-mem) leave pages of RAM out.
fn early_state() -> Error {
    unsupported("device state before the pages of RAM (virtio-mem)")
}

fn unexpected(byte: u8, place: &str) -> Result<Step> {
    match byte {
        COMMAND => Err(unsupported(format!("a command {place} (return path or postcopy is switched on)"))),
        // QEMU cancelled or failed ends a stream without the devices.
        EOF => Err(Error::new(ErrorKind::Truncated, format!("the stream ended early, {place}"))),
        _ => Err(damaged(format!("unexpected byte {byte:#04x} {place}"))),
    }
}

fn refuse_flags(flags: u64) -> Error {
    match flag::REFUSED.iter().find(|(bit, _)| flags & bit != 0) {
        Some((_, feature)) => unsupported(format!("RAM sent with the feature {feature}")),
        None => damaged(format!("a RAM record with the flags {flags:#05x}")),
    }
}
