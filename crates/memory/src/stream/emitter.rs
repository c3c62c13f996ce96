//! Makes a migration stream: what [`Parser`](super::Parser) reads, and QEMU loads.

use super::format::{
    CONFIGURATION, FOOTER, MAGIC, PAGE, RAM, RAM_INSTANCE, RAM_VERSION, SECTION_END, SECTION_PART, SECTION_START,
    VERSION, flag,
};
use super::{Block, DeviceState};

/// Appends the parts of a stream to a buffer, which the caller writes out and empties when it likes.
///
/// ```text
///   prelude ► start ► (open_part ► page/zero_page… ► close)… ► open_end ► page/zero_page… ► close ► finish
/// ```
#[derive(Debug)]
pub struct Emitter<'a> {
    section: u32,
    blocks: &'a [Block],
    /// The block of the last record in this section.
    current: Option<usize>,
}

impl<'a> Emitter<'a> {
    /// An emitter for RAM of these blocks, in a section of this id (any; QEMU takes what the START says).
    pub fn new(section: u32, blocks: &'a [Block]) -> Self {
        Self { section, blocks, current: None }
    }

    /// What comes before RAM: the header and the machine's type (at most 255 bytes).
    pub fn prelude(out: &mut Vec<u8>, machine: &str) {
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_be_bytes());
        out.push(CONFIGURATION);
        out.extend_from_slice(&(machine.len() as u32).to_be_bytes());
        out.extend_from_slice(machine.as_bytes());
    }

    /// The RAM section's START with the block list.
    pub fn start(&mut self, out: &mut Vec<u8>) {
        self.open(out, SECTION_START);
        put_name(out, RAM);
        out.extend_from_slice(&RAM_INSTANCE.to_be_bytes());
        out.extend_from_slice(&RAM_VERSION.to_be_bytes());
        let total: u64 = self.blocks.iter().map(|block| block.len).sum();
        put_record(out, total, flag::MEM_SIZE);
        for block in self.blocks {
            put_name(out, &block.name);
            out.extend_from_slice(&block.len.to_be_bytes());
        }
        self.close(out);
    }

    /// Opens a section of pages with more to follow.
    pub fn open_part(&mut self, out: &mut Vec<u8>) {
        self.open(out, SECTION_PART);
    }

    /// Opens the last section of pages.
    pub fn open_end(&mut self, out: &mut Vec<u8>) {
        self.open(out, SECTION_END);
    }

    /// A page of data: `data` is [`PAGE`] bytes, `offset` a multiple of [`PAGE`].
    pub fn page(&mut self, out: &mut Vec<u8>, block: usize, offset: u64, data: &[u8]) {
        debug_assert_eq!(data.len(), PAGE);
        self.record(out, block, offset, flag::PAGE);
        out.extend_from_slice(data);
    }

    /// A page of zeros.
    pub fn zero_page(&mut self, out: &mut Vec<u8>, block: usize, offset: u64) {
        self.record(out, block, offset, flag::ZERO);
        out.push(0);
    }

    /// Closes the open section.
    pub fn close(&mut self, out: &mut Vec<u8>) {
        put_record(out, 0, flag::EOS);
        out.push(FOOTER);
        out.extend_from_slice(&self.section.to_be_bytes());
    }

    /// What follows RAM, to the stream's end.
    pub fn finish(out: &mut Vec<u8>, devices: &DeviceState) {
        devices.join(out);
    }

    fn open(&mut self, out: &mut Vec<u8>, section: u8) {
        self.current = None;
        out.push(section);
        out.extend_from_slice(&self.section.to_be_bytes());
    }

    fn record(&mut self, out: &mut Vec<u8>, block: usize, offset: u64, flags: u64) {
        if self.current == Some(block) {
            return put_record(out, offset, flags | flag::CONTINUE);
        }
        self.current = Some(block);
        put_record(out, offset, flags);
        put_name(out, &self.blocks[block].name);
    }
}

fn put_record(out: &mut Vec<u8>, offset: u64, flags: u64) {
    debug_assert_eq!(offset & flag::MASK, 0);
    out.extend_from_slice(&(offset | flags).to_be_bytes());
}

pub(super) fn put_name(out: &mut Vec<u8>, name: &str) {
    let len = u8::try_from(name.len()).expect("a name in a stream has at most 255 bytes");
    out.push(len);
    out.extend_from_slice(name.as_bytes());
}
