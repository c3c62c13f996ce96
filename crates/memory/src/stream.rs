//! The QEMU migration stream, as a pure codec: no files, no sockets, no threads.
//!
//! ```text
//!   header  configuration  ram START(block list)  ram PART(pages)…  [ram END]  device state  EOF  description
//!   └───── prelude ─────┘  └────────── Parser / Emitter ────────────────────┘  └──── DeviceState::split ────┘
//! ```
//!
//! [`Parser`] takes the bytes in pieces of any size and yields [`Event`]s; [`Emitter`] makes the bytes again. Only RAM is
//! understood. The state of the devices is opaque: its sections carry no length, so it is everything between the last RAM
//! section and the description that ends the stream.
//!
//! The format was read off the sources and the streams of QEMU 7.2 and 10.0, which are alike in all that is used here. What
//! belongs to capabilities that Tenby never sets (multifd, xbzrle, mapped-ram, x-ignore-shared, …) is refused by name.

mod device;
mod emitter;
mod format;
mod parser;
pub mod postcopy;
#[cfg(test)]
mod tests;

pub use device::DeviceState;
pub use emitter::Emitter;
pub use format::{MAX_BLOCKS, PAGE};
pub use parser::{Event, Parser};

/// One RAM block: a contiguous piece of guest memory that QEMU knows by name (`pc.ram`, `pc.bios`, `0000:00:02.0/vga.vram`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// QEMU's name for it, unique in a machine; at most 255 bytes.
    pub name: String,
    /// The bytes of it that are in use; a multiple of [`PAGE`].
    pub len: u64,
}
