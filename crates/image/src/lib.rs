//! Virtual disk files and chains of them.
//!
//! ```text
//!   open, gate ──► Layer (vhdx, …) ──┐             map: where bytes lie
//!                  Layer ──────────────┼─► Chain     prepare ► data ► commit: where they go
//!                  Layer ──────────────┘             flush: data, then the metadata that exposes it
//!                                          ▲
//!                            merge, convert, compare, resize, compact, the servers
//! ```
//!
//! Read [`layer`] first: the contract between a format and everything else. A format never moves guest data; [`chain`] does.
//!
//! Life of a disk: [`open_path`] (or [`gate::open_chain`], or the layers that a ledger names, opened with [`open()`] and checked with
//! [`gate::check_link`]) → [`Chain::new`] → reads, writes, zeroes and flushes from any number of threads; [`Chain::push`] for a
//! snapshot, [`merge`] for its deletion → [`Chain::close`]. [`siblings`] says what stands on an image, [`reconnect`] mends a link.
//! New files come from [`vhdx::create`], [`vhd::create`] and [`raw::create`]; what is wrong with one is said, and mended, by [`check`].
//! Whether a layer still reads as it did say [`hashes`].
//!
//! Rules:
//! - Everything that an image file says is checked when it is opened, and every length is bounded: a hostile file yields an error.
//! - No path from an image is opened: it names a file beside the image, and the ids decide (see [`gate`]).
//! - An image's format is what its signature says. A raw file has none, and is opened only by somebody who says that it is raw.
//! - After a failed write or sync of metadata a layer takes no more changes ([`ErrorKind::Poisoned`]).

mod cells;
pub mod chain;
pub mod check;
pub mod compact;
pub mod compare;
pub mod convert;
pub mod gate;
pub mod hashes;
pub mod layer;
pub mod merge;
pub mod open;
pub mod raw;
pub mod reconnect;
pub mod resize;
pub mod siblings;
pub mod vhd;
pub mod vhdx;

pub use chain::{Access, Ambiguous, Chain, ChainRun, Held, Located, Received, RunKind};
pub use gate::open_path;
pub use layer::{Change, Extent, Format, Kind, Layer, LayerInfo, MAX_NOTE, ParentLink, Pin, Run, Source, Ticket};
pub use open::open;

/// What went wrong, coarsely; the command line maps these to exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file is damaged, or not what it claims to be.
    Damaged,
    /// The file has no signature of an image format, and nobody said that it is raw.
    Unsigned,
    /// The file is sound but uses something that is not supported here.
    Unsupported,
    /// The parent is missing, is another one than the child names, or may not be named like this.
    Parent,
    /// An argument is out of range (a size, a block size, an offset).
    Invalid,
    /// The file is in use by somebody else.
    Locked,
    /// No space left.
    NoSpace,
    /// No such file.
    NotFound,
    /// The file exists already.
    Exists,
    /// An earlier write or sync of this layer failed; it is not trusted any more.
    Poisoned,
    /// Anything else that the store said.
    Io,
}

/// A failed operation on an image: which file, where, why.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {message}")]
pub struct Error {
    /// What went wrong, coarsely.
    pub kind: ErrorKind,
    /// The image file, as its store names it.
    pub file: String,
    /// What happened, for people; offsets in bytes.
    pub message: String,
    /// What the store said, if it was the store.
    #[source]
    pub source: Option<Box<store::Error>>,
}

impl Error {
    /// An error of this kind about `file`.
    pub fn new(kind: ErrorKind, file: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind, file: file.into(), message: message.into(), source: None }
    }
}

/// The kind that says most about what the store reported.
impl From<store::ErrorKind> for ErrorKind {
    fn from(kind: store::ErrorKind) -> Self {
        match kind {
            store::ErrorKind::NotFound => Self::NotFound,
            store::ErrorKind::Exists => Self::Exists,
            store::ErrorKind::Locked => Self::Locked,
            store::ErrorKind::NoSpace => Self::NoSpace,
            // A file that ends before what it promises is a damaged file.
            store::ErrorKind::PastEnd => Self::Damaged,
            _ => Self::Io,
        }
    }
}

impl From<store::Error> for Error {
    fn from(source: store::Error) -> Self {
        // A write that found no room has written nothing that counts. What a sync found no room for was written, and may be lost.
        let lost = source.operation == "sync" && source.kind == store::ErrorKind::NoSpace;
        Self {
            kind: if lost { ErrorKind::Io } else { source.kind.into() },
            file: source.name.clone(),
            message: format!("{} failed", source.operation),
            source: Some(Box::new(source)),
        }
    }
}

/// The result of an operation on an image.
pub type Result<T, E = Error> = std::result::Result<T, E>;
