//! Shows a chain of images to a guest, or to anybody who speaks NBD.
//!
//! ```text
//!   QEMU ──► socket ──► reader ──┬─► io_uring ──► files          one reader a connection; it begins small reads, does small,
//!   fio  ──► socket ──► reader ──┼──────────────────► Chain      cheap writes itself, and hands the others over
//!                                └─► pool of threads ──┘
//! ```
//!
//! # Life
//!
//! [`Export::serve`] starts listening in threads of its own; [`Export::stop`] (or a drop) ends it: no further client or request is
//! taken, what is under way is finished and answered, then the connections are closed. A client that reconnects (QEMU's
//! `reconnect-delay`) asks again for what was not answered. The export neither flushes nor closes the chain at its end.
//!
//! # Rules
//!
//! - An answer to a write means that every later read sees it; an answer to a flush, that every change answered before is durable,
//!   whichever connection it came by.
//! - The first change waits for [`Options::before_first_change`] (house invariant 6).
//! - Nothing that a client sends ends more than its own connection, nor makes the server hold more than its window.
//!
//! [`qcow2`] is a client that we start ourselves: QEMU's own format, by QEMU's own tool.

mod disk;
pub mod nbd;
mod pool;
pub mod qcow2;
mod socket;
mod uring;

pub use socket::{Listener, listen_unix, uri};

use disk::Disk;
use image::Chain;
use nbd::serve::{self, Client};
use pool::lock;
use socket::{Socket, Stopper};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fmt, io};

/// What went wrong, coarsely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Somebody else listens there, or another file is in the way.
    InUse,
    /// The path cannot be reached: its folder is missing or closed to us.
    NotFound,
    /// Anything else that the system said.
    Io,
}

/// A service that could not begin.
#[derive(Debug, thiserror::Error)]
#[error("{operation}{}", self.place())]
pub struct Error {
    /// What went wrong, coarsely.
    pub kind: ErrorKind,
    /// What was tried.
    pub operation: &'static str,
    /// Where, if it is a place in the file system.
    pub path: Option<PathBuf>,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

impl Error {
    fn new(operation: &'static str, path: Option<&Path>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::AddrInUse | io::ErrorKind::AlreadyExists => ErrorKind::InUse,
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::NotADirectory => {
                ErrorKind::NotFound
            }
            _ => ErrorKind::Io,
        };
        Self { kind, operation, path: path.map(Into::into), source }
    }

    pub(crate) fn listen(path: &Path, source: io::Error) -> Self {
        Self::new("cannot listen on ", Some(path), source)
    }

    fn place(&self) -> String {
        self.path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
    }
}

/// The result of starting a service.
pub type Result<T> = std::result::Result<T, Error>;

/// Asked before the first change; see [`Options::before_first_change`].
pub type BeforeChange = Box<dyn FnMut() -> io::Result<()> + Send>;

/// How a disk is served.
pub struct Options {
    /// Changes are refused.
    pub read_only: bool,
    /// The export's name. The empty name leads to it in any case, and is its name by default.
    pub name: String,
    /// Small reads go through io_uring where the system has one: one thread of a connection keeps many under way. If not, or where it has
    /// none, threads do them.
    pub ring: bool,
    /// Most threads that work for one connection beside its reader; started as they are needed.
    pub threads: usize,
    /// Most clients at a time; who comes when they are there is turned away.
    pub connections: usize,
    /// Bytes of data that may wait to be written, of all connections together.
    pub window: usize,
    /// Called before the first write, trim or zeroing reaches the disk; that change, and every other, waits for it. If it fails, the
    /// change fails with it, and the next one asks again; once it has said yes, it is dropped.
    pub before_first_change: Option<BeforeChange>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            name: String::new(),
            ring: true,
            threads: 32,
            connections: 64,
            window: 128 << 20,
            before_first_change: None,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("read_only", &self.read_only)
            .field("name", &self.name)
            .field("ring", &self.ring)
            .field("threads", &self.threads)
            .field("connections", &self.connections)
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}

/// A disk being served, in threads of its own. All methods may be called from any thread, but not from
/// [`Options::before_first_change`].
#[derive(Debug)]
pub struct Export {
    shared: Arc<Shared>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

/// How long clients are given to take their last replies.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Shared {
    disk: Disk,
    most_clients: usize,
    clients: Mutex<Clients>,
    /// A client has left.
    left: Condvar,
    stopper: Stopper,
}

#[derive(Debug, Default)]
struct Clients {
    next: u64,
    here: HashMap<u64, Arc<Client>>,
}

impl Export {
    /// Serves `chain` to whoever connects to `listener` (a `UnixListener` or a `TcpListener`).
    pub fn serve(chain: Arc<Chain>, listener: impl Into<Listener>, options: Options) -> Result<Self> {
        let listener = listener.into();
        let fail = |source| Error::new("cannot start the NBD server", None, source);
        listener.set_nonblocking().map_err(fail)?;
        let shared = Arc::new(Shared {
            most_clients: options.connections.max(1),
            disk: Disk::new(chain, options),
            clients: Mutex::default(),
            left: Condvar::new(),
            stopper: Stopper::new().map_err(fail)?,
        });
        let acceptor = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("nbd-accept".into())
                .spawn(move || shared.accept(&listener))
                .map_err(fail)?
        };
        Ok(Self { shared, acceptor: Mutex::new(Some(acceptor)) })
    }

    /// Ends the service: see the crate's text. Clients that do not take their last replies for some seconds are cut off. Does
    /// nothing the second time.
    pub fn stop(&self) {
        self.shared.stopper.stop();
        let acceptor = lock(&self.acceptor).take();
        if acceptor.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the NBD server's accepting thread panicked");
        }
        self.drop_connections();
    }

    /// Closes the connections that are there now, as [`Export::stop`] does, and goes on listening: clients that reconnect see a
    /// disk that has grown.
    pub fn drop_connections(&self) {
        self.shared.dismiss();
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        lock(&self.shared.clients).here.len()
    }

    /// Whether no request is under way: everything that came in has been done and answered.
    pub fn idle(&self) -> bool {
        self.shared.disk.is_idle()
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &Listener) {
        loop {
            match self
                .stopper
                .wait_for_client(listener)
                .and_then(|go_on| if go_on { listener.accept().map(Some) } else { Ok(None) })
            {
                Ok(Some(socket)) => self.welcome(socket),
                Ok(None) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    // Mostly: no descriptors left. Clients wait in the listener's queue until some are.
                    tracing::warn!(%error, "cannot accept an NBD client");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn welcome(self: &Arc<Self>, socket: Socket) {
        let client = Arc::new(Client::new(socket));
        let id = {
            let mut clients = lock(&self.clients);
            if clients.here.len() >= self.most_clients {
                tracing::warn!(limit = self.most_clients, "an NBD client is turned away: there are too many");
                return;
            }
            let id = clients.next;
            clients.next += 1;
            clients.here.insert(id, Arc::clone(&client));
            id
        };
        let shared = Arc::clone(self);
        let serve = move || {
            let _leave = Leave { shared: &shared, id };
            match serve::serve(&shared.disk, &client) {
                Ok(()) => tracing::debug!(id, "an NBD client has left"),
                Err(error) => tracing::info!(id, %error, "an NBD client was disconnected"),
            }
        };
        if let Err(error) = std::thread::Builder::new().name("nbd-client".into()).stack_size(pool::STACK).spawn(serve) {
            tracing::warn!(%error, "an NBD client is turned away: no thread");
            lock(&self.clients).here.remove(&id);
        }
    }

    /// Bids the clients that are here now farewell and waits until they are gone.
    fn dismiss(&self) {
        let mut clients = lock(&self.clients);
        clients.here.values().for_each(|client| client.leave());
        let last = clients.next;
        let until = Instant::now() + GRACE;
        while clients.here.keys().any(|id| *id < last) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                clients.here.iter().filter(|(id, _)| **id < last).for_each(|(_, client)| client.cut());
                clients = self.left.wait(clients).unwrap_or_else(PoisonError::into_inner);
            } else {
                clients = self.left.wait_timeout(clients, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

/// Strikes a client off, also after a panic.
struct Leave<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        lock(&self.shared.clients).here.remove(&self.id);
        self.shared.left.notify_all();
    }
}
