//! What lies where on a memory disk.
//!
//! ```text
//!   0        2 MiB                                                                                      size
//!   │ table  │ RAM block │ RAM block │ … │ prelude (2 MiB) │ description (8 MiB) │ device state (32 MiB) │
//! ```
//!
//! Every region begins at a multiple of 2 MiB, in the stream's order of blocks. Places follow from the list of blocks alone, so
//! the disk can be made when that list has been read, and two disks with the same list agree on every place. The room for
//! what is not known yet is generous: the image is sparse.

use crate::format::{MAGIC, RawHead, RawRegion, VERSION, kind};
use crate::stream::{Block, MAX_BLOCKS, PAGE};
use crate::{Counts, Error, ErrorKind, Result};
use image::Chain;
use zerocopy::{FromBytes, IntoBytes};

/// Regions begin at multiples of this, bytes: an allocation unit of the image.
pub const STEP: u64 = 2 << 20;
/// Room for the table, bytes.
const TABLE_ROOM: u64 = STEP;
/// Room for the stream up to RAM, bytes.
pub(crate) const PRELUDE_ROOM: u64 = STEP;
/// Room for the description of the devices' state, bytes.
pub(crate) const DESCRIPTION_ROOM: u64 = 8 << 20;
/// Room for the devices' state, bytes.
pub(crate) const STATE_ROOM: u64 = 32 << 20;
const _: () = assert!(size_of::<RawHead>() + (MAX_BLOCKS + 3) * size_of::<RawRegion>() <= TABLE_ROOM as usize);

/// Where the regions of a memory disk begin, bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Each RAM block.
    pub blocks: Vec<u64>,
    /// The stream up to RAM.
    pub prelude: u64,
    /// The description of the devices' state.
    pub description: u64,
    /// The devices' state.
    pub state: u64,
    /// The size of the disk.
    pub size: u64,
}

impl Layout {
    /// The layout for these blocks.
    pub fn of(blocks: &[Block]) -> Self {
        let mut end = TABLE_ROOM;
        let mut place = |len: u64| {
            let at = end;
            end = (at + len).next_multiple_of(STEP);
            at
        };
        Self {
            blocks: blocks.iter().map(|block| place(block.len)).collect(),
            prelude: place(PRELUDE_ROOM),
            description: place(DESCRIPTION_ROOM),
            state: place(STATE_ROOM),
            size: end,
        }
    }
}

/// A region whose content is checked as a whole: everything but RAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Content {
    /// Its length in bytes.
    pub len: u64,
    /// CRC-32C of it.
    pub checksum: u32,
}

impl Content {
    /// What a region with these bytes is recorded as.
    pub fn of(bytes: &[u8]) -> Self {
        Self { len: bytes.len() as u64, checksum: crc32c::crc32c(bytes) }
    }
}

/// The table at the beginning of a memory disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The stream's id of the RAM section.
    pub section: u32,
    /// The blocks of RAM.
    pub blocks: Vec<Block>,
    /// What the capture did.
    pub counts: Counts,
    /// The stream up to RAM.
    pub prelude: Content,
    /// The description of the devices' state.
    pub description: Content,
    /// The devices' state.
    pub state: Content,
}

impl Table {
    /// The page of RAM that lies at `at` on the disk, in this file, is not what it was.
    pub(crate) fn not_as_captured(&self, at: u64, file: &str) -> Error {
        let mut blocks = self.blocks.iter().zip(self.layout().blocks);
        let block = blocks.find(|(block, start)| (*start..start + block.len).contains(&at));
        let place = block.map_or_else(String::new, |(block, start)| format!(" ({:#x} of {})", at - start, block.name));
        damaged(&format!("its page at byte {at}{place} is not as it was captured, in {file}"))
    }

    /// Where the regions are.
    pub fn layout(&self) -> Layout {
        Layout::of(&self.blocks)
    }

    /// Reads and checks the table of a memory disk: [`ErrorKind::Damaged`] if it is none, or not sound.
    pub fn read(chain: &Chain) -> Result<Self> {
        if chain.sector_size() as usize != PAGE || chain.size() < TABLE_ROOM {
            return Err(damaged("its sectors or its size are not those of a memory disk"));
        }
        let mut bytes = vec![0; PAGE];
        chain.read(&mut bytes, 0)?;
        let len = Self::encoded_len(&bytes)?;
        bytes.resize(len.max(PAGE), 0);
        chain.read(&mut bytes[PAGE..], PAGE as u64)?;
        let table = Self::decode(&bytes[..len])?;
        if table.layout().size != chain.size() {
            return Err(damaged("its table belongs to a disk of another size"));
        }
        Ok(table)
    }

    /// The table's bytes, padded with zeros to whole pages.
    pub fn encode(&self) -> Vec<u8> {
        let layout = self.layout();
        let ram = self
            .blocks
            .iter()
            .zip(&layout.blocks)
            .map(|(block, &at)| region(kind::RAM, &block.name, at, Content { len: block.len, checksum: 0 }));
        let rest = [
            region(kind::PRELUDE, "", layout.prelude, self.prelude),
            region(kind::DESCRIPTION, "", layout.description, self.description),
            region(kind::STATE, "", layout.state, self.state),
        ];
        let mut bytes = self.head(layout.size).as_bytes().to_vec();
        ram.chain(rest).for_each(|region| bytes.extend_from_slice(region.as_bytes()));
        let checksum = crc32c::crc32c(&bytes);
        bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(PAGE), 0);
        bytes
    }

    fn head(&self, size: u64) -> RawHead {
        RawHead {
            magic: MAGIC,
            version: VERSION.into(),
            checksum: 0.into(),
            entries: (self.blocks.len() as u32 + 3).into(),
            section: self.section.into(),
            page: (PAGE as u32).into(),
            reserved: 0.into(),
            size: size.into(),
            stored: self.counts.stored.into(),
            zeroed: self.counts.zeroed.into(),
            same: self.counts.same.into(),
            empty: self.counts.empty.into(),
            padding: [0; 56],
        }
    }

    /// The length of the table that these bytes begin, head and regions.
    fn encoded_len(bytes: &[u8]) -> Result<usize> {
        let Ok((head, _)) = RawHead::ref_from_prefix(bytes) else { return Err(damaged("its table is cut short")) };
        if head.magic != MAGIC {
            return Err(damaged("it has no table: not a memory disk, or one that was never finished"));
        }
        if head.version != VERSION {
            let message = format!("memory disk of version {}; {VERSION} is known", head.version);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let entries = head.entries.get() as usize;
        if !(4..=MAX_BLOCKS + 3).contains(&entries) {
            return Err(damaged("its table has an impossible number of regions"));
        }
        Ok(size_of::<RawHead>() + entries * size_of::<RawRegion>())
    }

    /// Makes a table of its bytes (zeros may follow them), checking all of it.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let len = Self::encoded_len(bytes)?;
        let bytes = bytes.get(..len).ok_or_else(|| damaged("its table is cut short"))?;
        let (head, regions) = RawHead::ref_from_prefix(bytes).map_err(|_| damaged("its table is cut short"))?;
        let regions = <[RawRegion]>::ref_from_bytes(regions).map_err(|_| damaged("its table is cut short"))?;
        let mut unsummed = bytes.to_vec();
        unsummed[CHECKSUM].fill(0);
        if crc32c::crc32c(&unsummed) != head.checksum.get() || head.page.get() as usize != PAGE {
            return Err(damaged("the checksum of its table is wrong"));
        }
        let (ram, rest) = regions.split_at(regions.len() - 3);
        let table = Self {
            section: head.section.get(),
            blocks: ram.iter().map(block).collect::<Result<_>>()?,
            counts: Counts {
                stored: head.stored.get(),
                zeroed: head.zeroed.get(),
                same: head.same.get(),
                empty: head.empty.get(),
            },
            prelude: content(&rest[0], kind::PRELUDE, PRELUDE_ROOM)?,
            description: content(&rest[1], kind::DESCRIPTION, DESCRIPTION_ROOM)?,
            state: content(&rest[2], kind::STATE, STATE_ROOM)?,
        };
        table.check_places(head, regions)?;
        Ok(table)
    }

    /// Places follow from the blocks; a table that says otherwise is not one of ours, whatever its checksum.
    fn check_places(&self, head: &RawHead, regions: &[RawRegion]) -> Result<()> {
        let Layout { blocks, prelude, description, state, size } = self.layout();
        let places = blocks.into_iter().chain([prelude, description, state]);
        if size != head.size.get() || !places.eq(regions.iter().map(|region| region.offset.get())) {
            return Err(damaged("its regions are not where they belong"));
        }
        let mut names: Vec<_> = self.blocks.iter().map(|block| &block.name).collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(damaged("two of its RAM blocks have one name"));
        }
        Ok(())
    }
}

/// Where the head's checksum lies.
const CHECKSUM: std::ops::Range<usize> = 12..16;

fn region(kind: u32, name: &str, offset: u64, content: Content) -> RawRegion {
    let mut padded = [0; 255];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    RawRegion {
        kind: kind.into(),
        checksum: content.checksum.into(),
        offset: offset.into(),
        len: content.len.into(),
        name_len: name.len() as u8,
        name: padded,
    }
}

fn block(region: &RawRegion) -> Result<Block> {
    let name = std::str::from_utf8(&region.name[..usize::from(region.name_len)]);
    let len = region.len.get();
    match name {
        Ok(name) if region.kind.get() == kind::RAM && len.is_multiple_of(PAGE as u64) && len <= MAX_LEN => {
            Ok(Block { name: name.to_owned(), len })
        }
        _ => Err(damaged("a RAM block in its table is not sound")),
    }
}

/// The most bytes of one RAM block; keeps the sum of all of them from overflowing.
const MAX_LEN: u64 = 1 << 46;

fn content(region: &RawRegion, kind: u32, room: u64) -> Result<Content> {
    if region.kind.get() != kind || region.len.get() > room {
        return Err(damaged("a region in its table is not sound"));
    }
    Ok(Content { len: region.len.get(), checksum: region.checksum.get() })
}

pub(crate) fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::Damaged, format!("the memory disk is damaged: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    fn block((name, pages): (String, u64)) -> Block {
        Block { name, len: pages * PAGE as u64 }
    }

    fn content(room: u64) -> impl Strategy<Value = Content> {
        (0..=room, any::<u32>()).prop_map(|(len, checksum)| Content { len, checksum })
    }

    fn table() -> impl Strategy<Value = Table> {
        let blocks = proptest::collection::btree_map("[a-z/.@]{0,255}", 0..1u64 << 34, 1..8);
        let blocks = blocks.prop_map(|blocks| blocks.into_iter().map(block).collect());
        let counts = any::<[u64; 4]>().prop_map(|[stored, zeroed, same, empty]| Counts { stored, zeroed, same, empty });
        (any::<u32>(), blocks, counts, content(PRELUDE_ROOM), content(DESCRIPTION_ROOM), content(STATE_ROOM)).prop_map(
            |(section, blocks, counts, prelude, description, state)| Table {
                section,
                blocks,
                counts,
                prelude,
                description,
                state,
            },
        )
    }

    /// Gives changed bytes a checksum that holds, so that the checks behind it are reached.
    fn seal(bytes: &mut [u8]) {
        let Ok(len) = Table::encoded_len(bytes) else { return };
        let Some(bytes) = bytes.get_mut(..len) else { return };
        bytes[CHECKSUM].fill(0);
        let checksum = crc32c::crc32c(bytes);
        bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(table in table()) {
            let bytes = table.encode();
            prop_assert_eq!(bytes.len() % PAGE, 0);
            prop_assert_eq!(Table::decode(&bytes).unwrap(), table);
        }

        #[test]
        fn regions_lie_apart_at_their_steps(table in table()) {
            let layout = table.layout();
            let ram = layout.blocks.iter().zip(&table.blocks).map(|(&at, block)| (at, block.len));
            let rest = [(layout.prelude, PRELUDE_ROOM), (layout.description, DESCRIPTION_ROOM), (layout.state, STATE_ROOM)];
            let mut end = TABLE_ROOM;
            for (at, len) in ram.chain(rest) {
                prop_assert!(at >= end && at % STEP == 0 && at < end + STEP);
                end = at + len;
            }
            prop_assert_eq!(layout.size, end);
        }

        /// One flipped bit anywhere in the table is noticed.
        #[test]
        fn a_flipped_bit_is_noticed(table in table(), bit in any::<proptest::sample::Index>()) {
            let mut bytes = table.encode();
            let len = Table::encoded_len(&bytes).unwrap();
            let bit = bit.index(len * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            Table::decode(&bytes).unwrap_err();
        }

        /// Whatever the bytes say, checksum or not: an error, or a table that is written back as the same bytes.
        #[test]
        fn damage_is_borne(table in table(), damage in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8), cut in any::<u16>()) {
            let mut bytes = table.encode();
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            seal(&mut bytes);
            if let Ok(table) = Table::decode(&bytes) {
                prop_assert_eq!(Table::decode(&table.encode()).unwrap(), table);
            }
            let _ = Table::decode(&bytes[..bytes.len().min(cut.into())]);
        }

        #[test]
        fn noise_is_borne(mut noise in vec(any::<u8>(), 0..2000)) {
            noise.splice(..0, RawHead::new_zeroed().as_bytes().iter().copied());
            noise[..8].copy_from_slice(&MAGIC);
            noise[8..12].copy_from_slice(&VERSION.to_le_bytes());
            noise[16..20].copy_from_slice(&5u32.to_le_bytes());
            noise[24..28].copy_from_slice(&(PAGE as u32).to_le_bytes());
            seal(&mut noise);
            let _ = Table::decode(&noise);
        }
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let table = Table {
            section: 1,
            blocks: vec![block(("ram".into(), 1))],
            counts: Counts::default(),
            prelude: Content::default(),
            description: Content::default(),
            state: Content::default(),
        };
        let mut bytes = table.encode();
        bytes[8] += 1;
        assert_eq!(Table::decode(&bytes).unwrap_err().kind, ErrorKind::Unsupported);
        assert_eq!(Table::decode(&[0; PAGE]).unwrap_err().kind, ErrorKind::Damaged);
    }
}
