//! The numbers of the migration stream. All integers in it are big-endian.

/// Bytes in a page: the unit of RAM in the stream (x86's target page).
pub const PAGE: usize = 4096;
/// The most RAM blocks that are accepted; a real machine has a dozen.
pub const MAX_BLOCKS: usize = 1024;
/// The most RAM accepted, bytes: what fits a VHDX (64 TiB) with room to spare.
pub(super) const MAX_RAM: u64 = 1 << 45;

pub(super) const MAGIC: [u8; 4] = *b"QEVM";
pub(super) const VERSION: u32 = 3;

pub(super) const EOF: u8 = 0x00;
pub(super) const SECTION_START: u8 = 0x01;
pub(super) const SECTION_PART: u8 = 0x02;
pub(super) const SECTION_END: u8 = 0x03;
pub(super) const SECTION_FULL: u8 = 0x04;
pub(super) const SUBSECTION: u8 = 0x05;
pub(super) const DESCRIPTION: u8 = 0x06;
pub(super) const CONFIGURATION: u8 = 0x07;
pub(super) const COMMAND: u8 = 0x08;
pub(super) const FOOTER: u8 = 0x7e;

/// The one command that plain migration sends (machine types from 10.0 on), and its length, 0.
pub(super) const SWITCHOVER_START: [u8; 4] = [0, 11, 0, 0];

/// The RAM section's name, instance and version, as they follow the section id of its START.
pub(super) const RAM: &str = "ram";
pub(super) const RAM_INSTANCE: u32 = 0;
pub(super) const RAM_VERSION: u32 = 4;

/// A RAM record is a page offset with these flags in its low 12 bits.
pub(super) mod flag {
    pub(in super::super) const MASK: u64 = 0xfff;
    pub(in super::super) const ZERO: u64 = 0x002;
    pub(in super::super) const MEM_SIZE: u64 = 0x004;
    pub(in super::super) const PAGE: u64 = 0x008;
    pub(in super::super) const EOS: u64 = 0x010;
    pub(in super::super) const CONTINUE: u64 = 0x020;
    /// Flags of features that are never switched on here, by the feature's name.
    pub(in super::super) const REFUSED: [(u64, &str); 5] =
        [(0x001, "full"), (0x040, "xbzrle"), (0x080, "rdma"), (0x100, "compress"), (0x200, "multifd")];
}
