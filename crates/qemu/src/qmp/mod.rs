//! A client of QEMU's monitor (QMP).
//!
//! ```text
//!   execute ──▶ queue ──▶ writer task ──▶ socket ──▶ QEMU
//!      ▲                                               │
//!      └──── answer, by id ◀── reader task ◀───────────┤
//!   Events ◀──────────────────────┘  (also: observer)  ┘
//! ```
//!
//! One line is one message. Lines are written whole by one task, so a caller that gives up waiting leaves nothing half-said. The
//! observer sees each event before any later answer is handed out: when a command's answer is there, so are its consequences.
//! The connection ends with the last [`Qmp`]; QEMU then waits for the next client.
//!
//! QEMU takes a client before it lets go of what it has to say to the one before (`monitor/qmp.c`: the state of a connection begins anew
//! only with the greeting, and a command that is being carried out is answered to whoever is there then). So events may come before the
//! greeting, and answers to another's commands at any time: both are dropped, and ids tell whose an answer is.

mod command;
mod event;
#[cfg(test)]
mod tests;
mod wire;

pub use command::{BlockImage, BlockNode, Capability, MigrationInfo, Status};
pub use event::{Event, EventKind, Events, MigrationStatus, Stamp};
pub use wire::Version;

use crate::error::{Error, Result};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;

/// Events that a subscriber may lag behind before it is told that it missed some.
const EVENT_BACKLOG: usize = 4096;

/// A connection to a monitor. Clones share it.
#[derive(Debug, Clone)]
pub struct Qmp {
    link: Arc<Link>,
}

/// What the last handle takes with it.
#[derive(Debug)]
struct Link {
    shared: Arc<Shared>,
    requests: mpsc::UnboundedSender<Request>,
    next_id: AtomicU64,
    /// QEMU keeps only the last descriptor that it was sent: one `getfd` at a time.
    passing: tokio::sync::Mutex<()>,
    out_of_band: bool,
    version: Version,
    tasks: [AbortHandle; 2],
}

impl Drop for Link {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// What callers and the reader share. `None` once the connection has ended.
#[derive(Debug)]
struct Shared {
    open: Mutex<Option<Open>>,
}

#[derive(Debug)]
struct Open {
    pending: HashMap<u64, oneshot::Sender<Result<Value, String>>>,
    events: broadcast::Sender<Event>,
}

#[derive(Debug)]
struct Request {
    line: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Callers that wait get [`Error::Disconnected`], subscribers too.
    fn close(&self) {
        self.open().take();
    }
}

impl Qmp {
    /// Greets the monitor at the other end of `stream`. `observe` is called for every event, in order; it must not block.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the peer does not speak QMP, [`Error::Disconnected`] if it hangs up.
    pub async fn connect(stream: UnixStream, observe: impl FnMut(&Event) + Send + 'static) -> Result<Self> {
        let (requests, queue) = mpsc::unbounded_channel();
        let (greeted, greeting) = oneshot::channel();
        let open = Open { pending: HashMap::new(), events: broadcast::Sender::new(EVENT_BACKLOG) };
        let shared = Arc::new(Shared { open: Mutex::new(Some(open)) });
        let stream = Arc::new(stream);
        let first_id = first_id();
        let reader =
            Reader { stream: stream.clone(), shared: shared.clone(), greeted: Some(greeted), first_id, observe };
        let reader = tokio::spawn(reader.run()).abort_handle();
        let writer = tokio::spawn(write(stream, queue, shared.clone())).abort_handle();
        let mut link = Link {
            shared,
            requests,
            next_id: AtomicU64::new(first_id),
            passing: tokio::sync::Mutex::default(),
            out_of_band: false,
            version: Version { major: 0, minor: 0, micro: 0 },
            tasks: [reader, writer],
        };
        let greeting = greeting.await.map_err(|_| Error::Disconnected)??;
        link.out_of_band = greeting.capabilities.iter().any(|word| word == "oob");
        link.version = greeting.version();
        let enable: &[&str] = if link.out_of_band { &["oob"] } else { &[] };
        let qmp = Self { link: Arc::new(link) };
        let _: Value = qmp.execute("qmp_capabilities", json!({ "enable": enable })).await?;
        Ok(qmp)
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.link.version
    }

    /// The events from now on.
    pub fn events(&self) -> Events {
        Events::new(self.link.shared.open().as_ref().map(|open| open.events.subscribe()))
    }

    /// Executes a command. `Value::Null` stands for no arguments. A caller that gives up waiting does not take the command back.
    ///
    /// # Errors
    /// [`Error::Refused`] with QEMU's words; [`Error::Disconnected`]; [`Error::Protocol`] if the answer has another shape than `T`.
    pub async fn execute<T: DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T> {
        self.submit("execute", command, arguments, None).await
    }

    /// Executes a command that QEMU carries out even while its main loop is busy: `migrate-recover`, `migrate-pause`.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; [`Error::Unsupported`] if this monitor cannot.
    pub async fn execute_out_of_band<T: DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T> {
        if !self.link.out_of_band {
            return Err(Error::Unsupported(format!("this QEMU does not carry out {command} out of band")));
        }
        self.submit("exec-oob", command, arguments, None).await
    }

    /// Gives QEMU a descriptor, which it keeps under `name`; one that had the name is closed there.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn pass(&self, name: &str, descriptor: OwnedFd) -> Result<()> {
        let _turn = self.link.passing.lock().await;
        let _: Value = self.submit("execute", "getfd", json!({ "fdname": name }), Some(descriptor)).await?;
        Ok(())
    }

    /// Closes a descriptor that was passed. That there is none of this name is no error.
    ///
    /// # Errors
    /// As [`Qmp::execute`], but for a refusal.
    pub async fn close(&self, name: &str) -> Result<()> {
        match self.submit::<Value>("execute", "closefd", json!({ "fdname": name }), None).await {
            Ok(_) | Err(Error::Refused { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn submit<T: DeserializeOwned>(
        &self,
        verb: &str,
        command: &str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<T> {
        let id = self.link.next_id.fetch_add(1, Ordering::Relaxed);
        let (tell, answer) = oneshot::channel();
        self.link.shared.open().as_mut().ok_or(Error::Disconnected)?.pending.insert(id, tell);
        let line = wire::command(verb, command, &arguments, id);
        self.link.requests.send(Request { line, descriptor }).map_err(|_| Error::Disconnected)?;
        match answer.await.map_err(|_| Error::Disconnected)? {
            Ok(value) => serde_json::from_value(value)
                .map_err(|error| Error::Protocol(format!("{error} in the answer to {command}"))),
            Err(reason) => Err(Error::Refused { command: command.into(), reason }),
        }
    }
}

/// The task that reads.
struct Reader<F> {
    stream: Arc<UnixStream>,
    shared: Arc<Shared>,
    greeted: Option<oneshot::Sender<Result<wire::Greeting>>>,
    first_id: u64,
    observe: F,
}

impl<F: FnMut(&Event)> Reader<F> {
    async fn run(mut self) {
        if let Err(error) = self.read().await {
            tracing::debug!(%error, "the connection to a monitor ended");
            if let Some(greeted) = self.greeted.take() {
                // The one who connects may have given up: then nobody needs to know.
                let _ = greeted.send(Err(error));
            }
        }
        self.shared.close();
    }

    async fn read(&mut self) -> Result<()> {
        let mut lines = wire::Lines::default();
        let mut buffer = vec![0; 64 << 10];
        loop {
            self.stream.readable().await.map_err(|_| Error::Disconnected)?;
            match self.stream.try_read(&mut buffer) {
                Ok(0) => return Err(Error::Disconnected),
                Ok(length) => lines.feed(&buffer[..length], |line| self.take(line))?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(Error::Disconnected),
            }
        }
    }

    fn take(&mut self, line: &[u8]) -> Result<()> {
        match (wire::parse(line)?, &self.greeted) {
            (wire::Message::Greeting(greeting), Some(_)) => {
                let greeted = self.greeted.take().expect("matched above");
                // As above.
                let _ = greeted.send(Ok(greeting));
            }
            // What was meant for the client before.
            (wire::Message::Event(_) | wire::Message::Answer { .. }, Some(_)) => {}
            (wire::Message::Answer { id: Some(id), .. }, None) if id < self.first_id => {}
            (wire::Message::Event(event), None) => {
                tracing::trace!(?event);
                (self.observe)(&event);
                if let Some(open) = self.shared.open().as_ref() {
                    // Without subscribers there is nobody to tell.
                    let _ = open.events.send(event);
                }
            }
            (wire::Message::Answer { id: Some(id), answer }, None) => {
                let asked = self.shared.open().as_mut().and_then(|open| open.pending.remove(&id));
                let asked = asked.ok_or_else(|| Error::Protocol(format!("an answer to {id}, which was not asked")))?;
                // The caller may have given up waiting.
                let _ = asked.send(answer);
            }
            (message, _) => return Err(Error::Protocol(format!("{message:?} was not expected here"))),
        }
        Ok(())
    }
}

/// Where a connection's ids begin: beyond those of every connection before it, for nobody gives a command a microsecond.
fn first_id() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_micros() as u64)
}

/// The task that writes.
async fn write(stream: Arc<UnixStream>, mut queue: mpsc::UnboundedReceiver<Request>, shared: Arc<Shared>) {
    while let Some(request) = queue.recv().await {
        if let Err(error) = write_line(&stream, &request).await {
            tracing::debug!(%error, "a monitor takes nothing any more");
            break;
        }
    }
    shared.close();
}

async fn write_line(stream: &UnixStream, request: &Request) -> io::Result<()> {
    let mut rest = request.line.as_slice();
    // The descriptor travels with the line's first bytes.
    let mut descriptor = request.descriptor.as_ref();
    while !rest.is_empty() {
        let length = stream.async_io(Interest::WRITABLE, || send(stream, rest, descriptor)).await?;
        rest = &rest[length..];
        descriptor = None;
    }
    Ok(())
}

fn send(stream: &UnixStream, bytes: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|descriptor| [descriptor.as_fd()]);
    if let Some(descriptors) = &descriptors {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)), "there is space for one descriptor");
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}
