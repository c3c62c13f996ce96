//! Sockets of both families as one: what is listened on, and what a client sits behind.

use crate::{Error, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest path that a socket address holds, in bytes (108 with the final zero).
const MAX_SUN_PATH: usize = 107;

/// What clients connect to.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A TCP port.
    Tcp(TcpListener),
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self::Unix(listener)
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl Listener {
    pub(crate) fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Unix(listener) => Ok(Socket::Unix(listener.accept()?.0)),
            Self::Tcp(listener) => {
                let stream = listener.accept()?.0;
                // Replies are batched here; the kernel shall not wait for more.
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }
        }
    }

    /// [`wait_or_stop`] needs an `accept` that does not block when the client has gone away in between.
    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// A client's end. Reading and writing go through shared references: one thread reads, several write in turn.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// A read that has waited this long says `WouldBlock`.
    pub(crate) fn set_read_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(Some(timeout)),
            Self::Tcp(stream) => stream.set_read_timeout(Some(timeout)),
        }
    }

    /// A write that has waited this long says `WouldBlock`.
    pub(crate) fn set_write_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_write_timeout(Some(timeout)),
            Self::Tcp(stream) => stream.set_write_timeout(Some(timeout)),
        }
    }

    /// Wakes whoever reads or writes. A socket that its client has closed already is fine as it is.
    pub(crate) fn shutdown(&self, how: Shutdown) {
        let _gone = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }

    pub(crate) fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => (&*stream).read(buf),
            Self::Tcp(stream) => (&*stream).read(buf),
        }
    }

    /// What is there now; `WouldBlock` if nothing is.
    pub(crate) fn recv_now(&self, buf: &mut [u8]) -> io::Result<usize> {
        let (_, received) = rustix::net::recv(self, buf, RecvFlags::DONTWAIT)?;
        Ok(received)
    }

    /// As much as it takes, one byte at least. If it takes none, waits or says `WouldBlock`.
    pub(crate) fn send(&self, parts: &[IoSlice<'_>], wait: bool) -> io::Result<usize> {
        let flags = if wait { SendFlags::NOSIGNAL } else { SendFlags::NOSIGNAL | SendFlags::DONTWAIT };
        Ok(rustix::net::sendmsg(self, parts, &mut SendAncillaryBuffer::default(), flags)?)
    }

    pub(crate) fn send_all(&self, buf: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => (&*stream).write_all(buf),
            Self::Tcp(stream) => (&*stream).write_all(buf),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// Ends a [`wait_or_stop`] from another thread.
#[derive(Debug)]
pub(crate) struct Stopper(OwnedFd);

impl Stopper {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(crate) fn stop(&self) {
        // Fails only if the counter is full: then it is set already.
        let _set = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Waits for a client; `false` if it was told to stop.
    pub(crate) fn wait_for_client(&self, listener: &Listener) -> io::Result<bool> {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&self.0, PollFlags::IN)];
        loop {
            match poll(&mut fds, None) {
                Ok(_) => return Ok(fds[1].revents().is_empty()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Listens on a unix socket at `path`. A socket there that nobody answers on is stale, left by a process that died, and is
/// replaced; one that answers, or a file of another kind, is an error.
///
/// The path may be longer than a socket address can hold. Who may connect follows from the folder and the umask.
pub fn listen_unix(path: &Path) -> Result<UnixListener> {
    let fail = |source| Error::listen(path, source);
    let address = Address::new(path).map_err(fail)?;
    match UnixListener::bind(&address.path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(&address.path).map_err(fail)? => {
            rustix::fs::unlink(&address.path).map_err(|error| fail(error.into()))?;
            UnixListener::bind(&address.path).map_err(fail)
        }
        result => result.map_err(fail),
    }
}

/// A path that fits into a socket address: a long one is named through a descriptor of its folder.
struct Address {
    path: PathBuf,
    _folder: Option<OwnedFd>,
}

impl Address {
    fn new(path: &Path) -> io::Result<Self> {
        if path.as_os_str().len() <= MAX_SUN_PATH {
            return Ok(Self { path: path.into(), _folder: None });
        }
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidFilename.into());
        };
        let folder = rustix::fs::open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
        Ok(Self { path, _folder: Some(folder) })
    }
}

fn is_stale(path: &Path) -> io::Result<bool> {
    let stat = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Ok(false);
    }
    Ok(UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
}

/// The URI of the disk that is served on a unix socket at this absolute path: the path is part of its query (RFC 3986).
pub fn uri(path: &Path) -> String {
    let kept = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    let escaped = |byte: &u8| if kept(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
    let path: String = path.as_os_str().as_bytes().iter().map(escaped).collect();
    format!("nbd+unix:///?socket={path}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.sock");
        let first = listen_unix(&path).expect("free");
        assert!(listen_unix(&path).is_err(), "somebody listens");
        drop(first);
        let _second = listen_unix(&path).expect("stale");
        UnixStream::connect(&path).expect("the new one answers");
    }

    #[test]
    fn another_file_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.sock");
        std::fs::write(&path, "precious").expect("written");
        assert!(listen_unix(&path).is_err());
        assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
    }

    #[test]
    fn long_paths_work() {
        let folder = tempfile::tempdir().expect("a folder");
        let deep = folder.path().join("x".repeat(90)).join("y".repeat(90));
        std::fs::create_dir_all(&deep).expect("made");
        drop(listen_unix(&deep.join("disk.sock")).expect("long"));
        let _again = listen_unix(&deep.join("disk.sock")).expect("long and stale");
        assert!(deep.join("disk.sock").exists());
    }
}
