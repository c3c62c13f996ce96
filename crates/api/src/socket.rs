//! Unix sockets in folders of any depth. A socket's address holds 107 bytes of path; a longer one goes through a descriptor of its
//! folder, as `/proc/self/fd/N/name`.

use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tokio::net::{UnixListener, UnixStream};

/// The worker's socket, in its machine's runtime folder.
pub(crate) const NAME: &str = "api.sock";

/// Bytes of path that fit into an address, without the closing zero.
const LONGEST: usize = 107;

/// A listening socket's file: removed when dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
}

impl Socket {
    /// Listens in `folder`, which is made (mode 0700) if it is not there. The caller holds the machine's lock: a socket that lies
    /// there is a dead worker's, and is replaced.
    pub fn bind(folder: &Path) -> io::Result<(UnixListener, Self)> {
        std::fs::create_dir_all(folder)?;
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))?;
        let path = folder.join(NAME);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let address = Address::of(&path)?;
        Ok((UnixListener::bind(&address.path)?, Self { path }))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Nothing depends on it: a socket that stays behind refuses connections, and the next worker replaces it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Connects to the unix socket at `path`, however long that is.
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = Address::of(path)?;
    UnixStream::connect(&address.path).await
}

/// A path that fits into a socket's address, and what keeps it alive.
struct Address {
    path: PathBuf,
    _folder: Option<OwnedFd>,
}

impl Address {
    fn of(path: &Path) -> io::Result<Self> {
        if path.as_os_str().len() <= LONGEST {
            return Ok(Self { path: path.to_owned(), _folder: None });
        }
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a socket's path names a file in a folder"));
        };
        let folder = rustix::fs::open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
        Ok(Self { path, _folder: Some(folder) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_deep_folder_is_no_obstacle_and_nobody_else_may_look_in() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("deep".repeat(40));
        let (listener, socket) = Socket::bind(&folder).unwrap();
        assert_eq!(std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        let path = folder.join(NAME);
        let (theirs, ours) = tokio::join!(connect(&path), listener.accept());
        theirs.unwrap();
        ours.unwrap();
        drop(socket);
        assert!(!folder.join(NAME).exists());
    }

    #[tokio::test]
    async fn a_dead_workers_socket_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let (listener, socket) = Socket::bind(root.path()).unwrap();
        std::mem::forget(socket);
        drop(listener);
        Socket::bind(root.path()).unwrap();
    }
}
