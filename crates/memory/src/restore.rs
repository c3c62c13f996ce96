//! From a memory disk to a migration stream: all of RAM, then the devices, before the guest runs.

use crate::spans::spans;
use crate::stream::{Block, DeviceState, Emitter, Event, PAGE, Parser};
use crate::table::{Content, Table, damaged};
use crate::{Counts, Error, Result};
use image::Chain;
use image::hashes::Expected;
use std::io::Write;

/// Bytes read from the disk at a time, at most.
const READ: usize = 1 << 20;
/// Zeros in larger blocks are not sent: only guest RAM is that large, and a new QEMU that waits for a stream begins with zeros
/// there. Smaller ones may be ROM, which QEMU fills from files when it starts.
const ZEROS_SENT_UP_TO: u64 = 64 << 20;

/// A memory disk whose content stays as it is, and what its pages are to read as, as far as that is known.
#[derive(Debug)]
pub struct Sealed {
    /// Its layers.
    pub chain: Chain,
    /// What was recorded of them.
    pub expected: Expected,
}

/// Of which nothing is known.
impl From<Chain> for Sealed {
    fn from(chain: Chain) -> Self {
        Self { chain, expected: Expected::default() }
    }
}

impl Sealed {
    /// The first of these pages of the disk, read from `at` on, that is not as recorded.
    pub(crate) fn wrong(&self, at: u64, pages: &[u8]) -> Option<u64> {
        let mut all = (at..).step_by(PAGE).zip(pages.chunks_exact(PAGE));
        all.find(|(at, page)| !self.expected.allows(*at, page)).map(|(at, _)| at)
    }

    /// What is to be said of such a page: also in which file it lies; what was lost, in the topmost.
    pub(crate) fn not_as_captured(&self, table: &Table, at: u64) -> Error {
        let layers = self.chain.layers();
        let holds = self.chain.runs(at, PAGE as u64, 1).ok().and_then(|runs| runs.first()?.layer);
        let file = layers.get(holds.unwrap_or(layers.len() - 1)).map(|layer| layer.store().name());
        table.not_as_captured(at, &file.unwrap_or_default())
    }
}

/// What a memory disk holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryInfo {
    /// The machine's type as QEMU names it (`pc-q35-10.0`): only the very same can load it.
    pub machine: String,
    /// The blocks of RAM.
    pub blocks: Vec<Block>,
    /// What the capture that wrote this disk did with its pages.
    pub counts: Counts,
    /// Bytes of the devices' state.
    pub device_state: u64,
}

impl MemoryInfo {
    /// Bytes of RAM, of all blocks together.
    pub fn ram(&self) -> u64 {
        self.blocks.iter().map(|block| block.len).sum()
    }
}

/// What a memory disk holds: [`crate::ErrorKind::Damaged`] if it is none, or not sound. Reads a few kilobytes.
pub fn inspect(chain: &Chain) -> Result<MemoryInfo> {
    let table = Table::read(chain)?;
    let machine = machine_of(&read_content(chain, table.layout().prelude, table.prelude)?)?;
    Ok(MemoryInfo { machine, blocks: table.blocks, counts: table.counts, device_state: table.state.len })
}

/// Writes the whole stream of a memory disk to a QEMU that was started with `-incoming defer`.
///
/// The table and everything that is not RAM is read and checked before the first byte is written; each page before it is written itself: one
/// that is not as recorded ends it, [`crate::ErrorKind::Damaged`]. `progress` gets the bytes of RAM
/// done, of all; it never goes back. Returns the bytes written.
pub fn restore(sealed: &Sealed, to: impl Write, progress: impl FnMut(u64, u64)) -> Result<u64> {
    let Parts { table, prelude, devices } = read_parts(&sealed.chain)?;
    let mut sender = Sender { sealed, to, out: Vec::with_capacity(READ * 2), sent: 0, progress };
    let mut emitter = Emitter::new(table.section, &table.blocks);
    sender.out.extend_from_slice(&prelude);
    emitter.start(&mut sender.out);
    emitter.open_end(&mut sender.out);
    sender.ram(&mut emitter, &table)?;
    emitter.close(&mut sender.out);
    Emitter::finish(&mut sender.out, &devices);
    sender.send()?;
    sender.to.flush().map_err(write_error)?;
    Ok(sender.sent)
}

/// What a memory disk holds beside RAM.
pub(crate) struct Parts {
    pub(crate) table: Table,
    pub(crate) prelude: Vec<u8>,
    pub(crate) devices: DeviceState,
}

/// Reads and checks all that is not RAM.
pub(crate) fn read_parts(chain: &Chain) -> Result<Parts> {
    let table = Table::read(chain)?;
    let layout = table.layout();
    let prelude = read_content(chain, layout.prelude, table.prelude)?;
    machine_of(&prelude)?;
    let devices = DeviceState {
        state: read_content(chain, layout.state, table.state)?,
        description: read_content(chain, layout.description, table.description)?,
    };
    Ok(Parts { table, prelude, devices })
}

/// The stream on its way out.
struct Sender<'a, W, P> {
    sealed: &'a Sealed,
    to: W,
    /// What is not written yet.
    out: Vec<u8>,
    sent: u64,
    progress: P,
}

impl<W: Write, P: FnMut(u64, u64)> Sender<'_, W, P> {
    /// The pages of all blocks.
    fn ram(&mut self, emitter: &mut Emitter<'_>, table: &Table) -> Result<()> {
        let (chain, blocks, layout) = (&self.sealed.chain, &table.blocks, table.layout());
        let total = blocks.iter().map(|block| block.len).sum();
        let (mut below, mut data) = (Vec::new(), Vec::new());
        let mut before = 0;
        for (index, block) in blocks.iter().enumerate() {
            let start = layout.blocks[index];
            let zeros = block.len <= ZEROS_SENT_UP_TO;
            spans(chain, start, block.len, &mut below)?;
            for span in &below {
                for done in (0..span.len).step_by(READ) {
                    let (at, len) = (span.at + done, (span.len - done).min(READ as u64));
                    if span.data {
                        data.resize(len as usize, 0);
                        chain.read(&mut data, at)?;
                        if let Some(wrong) = self.sealed.wrong(at, &data) {
                            return Err(self.sealed.not_as_captured(table, wrong));
                        }
                        self.pages(emitter, index, at - start, &data, zeros);
                    } else if let Some(lost) = self.sealed.expected.next_data(at..at + len) {
                        return Err(self.sealed.not_as_captured(table, lost));
                    } else if zeros {
                        (0..len)
                            .step_by(PAGE)
                            .for_each(|page| emitter.zero_page(&mut self.out, index, at - start + page));
                    }
                    if self.out.len() >= READ {
                        self.send()?;
                    }
                }
                (self.progress)(before + span.at + span.len - start, total);
            }
            before += block.len;
        }
        Ok(())
    }

    /// Some pages of a block.
    fn pages(&mut self, emitter: &mut Emitter<'_>, block: usize, offset: u64, data: &[u8], zeros: bool) {
        for (page, offset) in data.chunks_exact(PAGE).zip((offset..).step_by(PAGE)) {
            if page != [0; PAGE] {
                emitter.page(&mut self.out, block, offset, page);
            } else if zeros {
                emitter.zero_page(&mut self.out, block, offset);
            }
        }
    }

    fn send(&mut self) -> Result<()> {
        self.to.write_all(&self.out).map_err(write_error)?;
        self.sent += self.out.len() as u64;
        self.out.clear();
        Ok(())
    }
}

fn write_error(error: std::io::Error) -> Error {
    Error::stream("the migration stream cannot be written", error)
}

/// Reads a region and checks it.
fn read_content(chain: &Chain, at: u64, content: Content) -> Result<Vec<u8>> {
    let mut bytes = vec![0; content.len as usize];
    chain.read(&mut bytes, at)?;
    if Content::of(&bytes) != content {
        return Err(damaged("the checksum of a region is wrong"));
    }
    Ok(bytes)
}

/// The machine's type that a prelude names.
fn machine_of(mut prelude: &[u8]) -> Result<String> {
    let mut parser = Parser::new();
    while let Some(event) = parser.next(&mut prelude)? {
        if let Event::Configuration(machine) = event {
            return Ok(machine.to_owned());
        }
    }
    Err(damaged("it does not name its machine's type"))
}
