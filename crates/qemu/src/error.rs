//! What can go wrong with a QEMU process.

use std::io;
use std::path::PathBuf;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of the host failed.
    #[error("cannot {what}")]
    Io {
        /// What was attempted, with its path: `open /dev/kvm`.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// There is no QEMU to run.
    #[error("no QEMU found: {0}")]
    NoQemu(String),
    /// This QEMU or this host cannot do what was asked.
    #[error("{0}")]
    Unsupported(String),
    /// The command line that was asked for cannot be made.
    #[error("cannot launch: {0}")]
    Launch(String),
    /// The process ended.
    #[error("QEMU {how}{}", said(.words))]
    Exited {
        /// How it ended: `exited with status 1`, `was killed by signal 9`, `ended`.
        how: String,
        /// The last lines that it wrote, if any.
        words: String,
    },
    /// The process to be adopted is not there any more.
    #[error("process {pid} is not the QEMU that was started")]
    Gone {
        /// The process id that was recorded.
        pid: i32,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// The QMP command.
        command: String,
        /// QEMU's words.
        reason: String,
    },
    /// The peer does not speak QMP, or not as documented.
    #[error("QMP: {0}")]
    Protocol(String),
    /// The connection to the monitor ended.
    #[error("the connection to QEMU's monitor ended")]
    Disconnected,
    /// The subscriber was too slow: what happened meanwhile must be asked for anew.
    #[error("{0} events of QEMU were missed")]
    EventsMissed(u64),
    /// A capture or a restore did not reach its end. The guest goes on as before.
    #[error("migration {how}: {reason}")]
    Migration {
        /// `failed`, `cancelled` or `interrupted`.
        how: &'static str,
        /// QEMU's words, or what interrupted it.
        reason: String,
    },
    /// Nobody is at the other end of the serial port.
    #[error("the serial port is not connected; {delivered} of {length} bytes were delivered")]
    ConsoleDetached {
        /// Bytes that QEMU took.
        delivered: usize,
        /// Bytes that were to be written.
        length: usize,
    },
}

impl Error {
    /// For `map_err`: what was attempted on which path.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// As [`Error::io`], for rustix.
    pub(crate) fn os(what: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source: source.into() }
    }

    /// For a path in a sentence.
    pub(crate) fn at(verb: &str, path: impl Into<PathBuf>) -> String {
        format!("{verb} {}", path.into().display())
    }
}

fn said(words: &str) -> String {
    if words.is_empty() { String::new() } else { format!("; it said: {words}") }
}
