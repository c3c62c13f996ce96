//! Guest memory: the QEMU migration stream, captured into image layers and restored from them.
//!
//! Memory is a disk: a *memory disk* holds a guest's RAM and the state of its devices, as a VHDX with 4096-byte sectors whose
//! parent is the memory disk of the snapshot before. Only pages that differ from the parent's are written.
//!
//! ```text
//!   QEMU ──migrate──► stream::Parser ──► Capture ──► image::Chain     table │ RAM blocks… │ prelude │ description │ state
//!   QEMU ◄─incoming── stream::Emitter ◄─ restore ◄── image::Chain     (docs/formats/memory.md)
//!   QEMU ◄─pages──► it asks for ◄──────── lend ◄──────── image::Chain
//! ```
//!
//! - [`stream`]: the codec, pure.
//! - [`table`]: what lies where on a memory disk.
//! - [`capture`](mod@capture): from a stream to a chain.
//! - [`restore`](mod@restore): from a chain to a stream, all of it before the guest runs (*eager*).
//! - [`lend`](mod@lend): from a chain into a guest that runs already, first what it asks for (*lazy*).
//!
//! Rules. A memory disk is written once, by one capture, its table last; afterwards it is sealed. A disk without a table whose
//! checksum holds is no memory disk. Nothing here knows what a snapshot is, opens a file, or speaks to QEMU other than through
//! the stream it is handed.
//!
//! A capture hands back hashes of the pages that it wrote. Whoever reads the disk again says what is to be there ([`Sealed`]): a page that is
//! otherwise goes to no guest. The next capture compares with that, and does not read the disk.

pub mod capture;
mod format;
pub mod lend;
pub mod restore;
mod seen;
mod spans;
pub mod stream;
pub mod table;

pub use capture::{Captured, Counts, Made, NewLayer, Signal, capture};
pub use lend::{Beginning, Lending, Lent, Pace, TOUCHED, Touched, Trail, can_lend, lend};
pub use restore::{MemoryInfo, Sealed, inspect, restore};
pub use seen::Stretch;

/// What went wrong, coarsely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The stream breaks its format, or the disk is no sound memory disk.
    Damaged,
    /// The stream uses something that is refused here (a migration capability, an unknown section, too many or too large parts).
    Unsupported,
    /// The stream ended early: QEMU or the other side gave up, or the capture was cancelled.
    Truncated,
    /// The stream ended well but pages are missing.
    Incomplete,
    /// Reading or writing the stream failed.
    Stream,
    /// The chain failed; `source` is the [`image::Error`].
    Image,
}

/// A failed capture, restore or inspection.
#[derive(Debug, thiserror::Error)]
#[error("memory: {message}")]
pub struct Error {
    /// What went wrong, coarsely.
    pub kind: ErrorKind,
    /// What happened, for people.
    pub message: String,
    /// What lies beneath: an [`image::Error`] or a [`std::io::Error`].
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with nothing beneath it.
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// An error of the stream's socket or file.
    pub(crate) fn stream(message: &str, source: std::io::Error) -> Self {
        Self { kind: ErrorKind::Stream, message: message.into(), source: Some(Box::new(source)) }
    }
}

impl From<image::Error> for Error {
    fn from(source: image::Error) -> Self {
        Self { kind: ErrorKind::Image, message: "the memory disk failed".into(), source: Some(Box::new(source)) }
    }
}

/// The result of an operation on guest memory.
pub type Result<T> = std::result::Result<T, Error>;
