//! Files and their durability: the floor that everything in Tenby stands on.
//!
//! Two traits, each with two implementations:
//!
//! ```text
//!                 Folder                          Store
//!   names: create, link, rename, unlink   one file: read, write, zero, sync
//!        ------------------------------   ------------------------------
//! host   a directory of this machine      a file descriptor
//! sim    a volatile and a durable map     volatile and durable bytes
//! ```
//!
//! The rules of durability are those of POSIX at its strictest, and [`sim`] enforces them:
//!
//! - What was written to a file survives a crash only after [`Store::sync`] on that file.
//! - A name that was created, renamed or removed survives only after [`Folder::sync`] on its folder.
//! - A failed sync is never retried and trusted: what it covered is lost or not, nobody knows.
//!
//! Everything here is synchronous and takes `&self`: a [`Store`] may be used from many threads at once, as `pread` and
//! `pwrite` may. Ranges that overlap in time must be ordered by the caller.

pub mod host;
mod lax;
pub mod sim;

pub use lax::Lax;

use std::any::Any;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Reading only; writes fail.
    Read,
    /// Reading and writing.
    Write,
}

/// An advisory lock on a whole file (`flock` on the host: a second handle conflicts, also one of the same process). It is given up when the [`Store`] is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// Not locked.
    None,
    /// Shared: any number of readers.
    Shared,
    /// Exclusive: one writer, no reader.
    Exclusive,
}

/// One file: bytes at offsets.
pub trait Store: Send + Sync + fmt::Debug {
    /// The file as the user would name it, for messages.
    fn name(&self) -> String {
        format!("{self:?}")
    }
    /// The file's length in bytes.
    fn len(&self) -> Result<u64>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Makes the file exactly `len` bytes long; what is added reads as zeros.
    fn set_len(&self, len: u64) -> Result<()>;
    /// Fills `buf` from `offset`. Reading past the end is an error of kind [`ErrorKind::PastEnd`].
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;
    /// Writes all of `buf` at `offset`, growing the file if need be.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;
    /// Makes `len` bytes at `offset` read as zeros, giving their space back to the file system where it can. Within the file's length.
    fn punch(&self, offset: u64, len: u64) -> Result<()>;
    /// Makes everything written so far durable, the length included. After a sync that failed, every later one through this
    /// handle fails too: what the failed one covered is lost or not, and the system would not say so again.
    fn sync(&self) -> Result<()>;
    /// Changes the lock held through this handle; fails at once with [`ErrorKind::Locked`] if another handle is in the way, the
    /// lock held so far being kept. (The host may lose it to another process that asks at that very moment.) What was removed since it was
    /// opened is not there to be locked: [`ErrorKind::NotFound`].
    fn lock(&self, lock: Lock) -> Result<()>;
    /// The next stretch, from and to, that may hold other bytes than zeros, at `offset` or after it; `None` if there is none up to the
    /// end. What is left out reads as zeros: holes, where the file system tells.
    fn data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let len = self.len()?;
        Ok((offset < len).then_some((offset, len)))
    }
    /// Makes this file, which is empty, one of the content of `from` without copying it: both share their places until one of them is
    /// written (a *reflink*). `false` where that is not possible, and nothing has changed.
    fn reflink(&self, from: &dyn Store) -> Result<bool> {
        let _ = from;
        Ok(false)
    }
    /// Bytes that the file occupies on its file system (allocated blocks, not its length).
    fn allocated(&self) -> Result<u64>;
    /// The open file, for who reads it in a way of his own (io_uring): its bytes are what [`Store::read_at`] gives. `None` if there is no
    /// such file.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A folder: names of files and of folders below it.
///
/// A name is one path component: never empty, `.`, `..`, and never with a `/` ([`ErrorKind::BadName`]).
pub trait Folder: Any + Send + Sync + fmt::Debug {
    /// Opens an existing file. Symbolic links are not followed.
    fn open(&self, name: &str, mode: Mode) -> Result<Arc<dyn Store>>;
    /// Makes a new file, empty, readable by its owner alone (0600), opened for writing. Fails if the name is taken.
    fn create(&self, name: &str) -> Result<Arc<dyn Store>>;
    /// Renames a file or folder inside this folder, replacing a file of the new name.
    fn rename(&self, from: &str, to: &str) -> Result<()>;
    /// Gives a file of this folder one more name, in the folder `into`: a hard link. Both are names of one file, which lives as long as one
    /// of them. [`ErrorKind::CannotLink`] where the two folders have no file system in common that can do that.
    fn link(&self, name: &str, into: &dyn Folder, new: &str) -> Result<()>;
    /// How many names a file has, here and elsewhere.
    fn links(&self, name: &str) -> Result<u64>;
    /// Removes a file's name. Its content goes with its last name and its last handle; whoever has a handle until after that need not wait until
    /// the space is given back.
    fn unlink(&self, name: &str) -> Result<()>;
    /// Makes a folder (0700) below this one.
    fn create_folder(&self, name: &str) -> Result<Arc<dyn Folder>>;
    /// Opens a folder below this one. Symbolic links are not followed.
    fn folder(&self, name: &str) -> Result<Arc<dyn Folder>>;
    /// Removes an empty folder; one that is not empty is an error of kind [`ErrorKind::Exists`].
    fn remove_folder(&self, name: &str) -> Result<()>;
    /// The names in this folder, sorted.
    fn list(&self) -> Result<Vec<String>>;
    /// Makes the names in this folder durable.
    fn sync(&self) -> Result<()>;
    /// Bytes that are free on the file system that this folder is on, for whoever is not its root, or will be in a moment: what a file without
    /// a name had is given back when its last handle is gone, and that takes its time.
    fn room(&self) -> Result<u64>;
}

/// What went wrong, coarsely: what a caller may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No file or folder of that name.
    NotFound,
    /// The name is taken.
    Exists,
    /// Another handle holds a lock that conflicts.
    Locked,
    /// The file cannot have a name there: another file system, or one that has no links, or no more of them.
    CannotLink,
    /// No space left on the device (or quota exceeded).
    NoSpace,
    /// Not allowed: permissions, or a write through a handle opened for reading.
    Denied,
    /// A read past the end of the file.
    PastEnd,
    /// Not a name that a folder can hold.
    BadName,
    /// Something of another type has that name: a folder, link, device, pipe or socket where a file is wanted, or a file where
    /// a folder is.
    WrongType,
    /// This process has as many files open as it may.
    TooManyFiles,
    /// The simulated machine has lost power ([`sim`] only).
    PowerLost,
    /// Anything else the system said.
    Io,
}

/// A failed file operation: what was tried, on which file, and what the system said.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {name}: {detail}")]
pub struct Error {
    /// What went wrong, coarsely.
    pub kind: ErrorKind,
    /// What was tried: `open`, `write`, `sync`, …
    pub operation: &'static str,
    /// The file or folder, as the user would name it.
    pub name: String,
    /// The system's words.
    pub detail: String,
}

impl Error {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, operation: &'static str, name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { kind, operation, name: name.into(), detail: detail.into() }
    }
}

/// Fails unless `name` is one component of a path: what a [`Folder`] can hold.
pub(crate) fn check_name(name: &str, operation: &'static str) -> Result<()> {
    let detail = match name {
        "" => "the name is empty",
        "." | ".." => "not a name of a file",
        _ if name.contains(['/', '\0']) => "a name holds no slash and no zero byte",
        _ if name.len() > NAME_MAX => "the name is too long",
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::BadName, operation, name.escape_debug().to_string(), detail))
}

/// The longest name, bytes: Linux's limit.
const NAME_MAX: usize = 255;

/// The result of a file operation.
pub type Result<T> = std::result::Result<T, Error>;
