//! A QEMU process with its monitor.

use crate::confine::{Confined, Rights};
use crate::console::{Console, make_pipe};
use crate::error::{Error, Result};
use crate::launch::{Launch, NETDEV, Publish, QMP_SOCKET, SERIAL_PIPE, VNC_SOCKET, through};
use crate::process::{Ending, Identity, Process, append_to, detached};
use crate::qmp::{Capability, Event, EventKind, Events, MigrationStatus, Qmp};
use rustix::fs::{Mode, OFlags, open};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::watch;

/// How often the monitor's socket is looked for while a process comes up.
const CONNECT_EVERY: Duration = Duration::from_millis(5);

/// How often a QEMU that lives may end the connection before that is a failure.
const MEETINGS: u32 = 100;

/// How long a process that has closed its sockets takes to end.
const ENDING: Duration = Duration::from_secs(1);

/// How much of QEMU's last words an error carries, bytes.
const LAST_WORDS: u64 = 2048;

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// It runs.
    Running,
    /// It stands still and can run.
    Paused,
    /// Its memory is still to come ([`Qemu::restore`]).
    Incoming,
    /// It powered off; the process is still there.
    Shutdown,
    /// It reported its own death.
    Panicked,
    /// It was stopped because a disk failed; resuming repeats the request.
    IoError,
    /// QEMU cannot let it run any further.
    Broken,
    /// The process has ended.
    Exited(Ending),
}

/// A QEMU process. Clones share it; dropping all of them leaves the process alone.
#[derive(Debug, Clone)]
pub struct Qemu {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    process: Arc<Process>,
    qmp: Qmp,
    tracker: Arc<Tracker>,
    state: watch::Receiver<RunState>,
    run_dir: PathBuf,
    words: Words,
}

impl Qemu {
    /// Brings a process up, the guest standing still ([`RunState::Paused`], or [`RunState::Incoming`]). Waits as long as QEMU takes.
    ///
    /// # Errors
    /// [`Error::Launch`]; [`Error::Exited`] with QEMU's words if it ends instead. No process is left then; nor if the future is dropped.
    pub async fn start(launch: &Launch) -> Result<Self> {
        let args = launch.args()?;
        let words = Words::from_here(&launch.log);
        let (typed, printed) = (make_pipe(&launch.run_dir.join(SERIAL_PIPE))?, append_to(&launch.console_log)?);
        let command = match launch.rights {
            Rights::Starter => detached(&launch.binary, &args),
            Rights::NoMore | Rights::User(..) => Confined::of(launch).command(&launch.binary, &args),
        };
        let process = Kill(Some(Process::spawn(command, &launch.run_dir, &launch.log, typed, printed)?));
        let connected = tokio::select! {
            connected = connect_when_up(&launch.run_dir) => connected,
            how = process.get().wait() => Err(words.ended(how)),
        };
        let stream = connected?;
        let tracker = Tracker::new();
        let qmp = tokio::select! {
            biased;
            qmp = greet(stream, &tracker) => qmp,
            how = process.get().wait() => Err(words.ended(how)),
        };
        let qmp = match qmp {
            Err(Error::Disconnected) => return Err(words.ended(process.get().wait().await)),
            other => other?,
        };
        Ok(Self::assemble(process.keep(), qmp, tracker, launch.run_dir.clone(), words))
    }

    /// Takes over a process that runs already. Its disks must be served before this is called: a QEMU that waits for a disk does not answer.
    ///
    /// # Errors
    /// [`Error::Gone`] if it does not run any more; those of the monitor.
    pub async fn adopt(identity: Identity, run_dir: &Path, log: &Path) -> Result<Self> {
        let gone = Error::Gone { pid: identity.pid };
        // A capture that has lost its reader holds up the guest, and with it the monitor.
        crate::migrate::drain(run_dir);
        let Some(process) = Process::adopt(identity)? else { return Err(gone) };
        let words = Words::from_here(log);
        let met = tokio::select! {
            biased;
            _ = process.wait() => return Err(gone),
            met = meet_again(run_dir) => met,
        };
        match met {
            Ok((qmp, tracker)) => Ok(Self::assemble(process, qmp, tracker, run_dir.into(), words)),
            // A process that ends closes its sockets first.
            Err(_) if tokio::time::timeout(ENDING, process.wait()).await.is_ok() => Err(gone),
            Err(error) => Err(error),
        }
    }

    fn assemble(process: Process, qmp: Qmp, tracker: Arc<Tracker>, run_dir: PathBuf, words: Words) -> Self {
        let process = Arc::new(process);
        let state = tracker.state.subscribe();
        let unexplained = tracker.unexplained.subscribe();
        tokio::spawn(watch_process(process.clone(), tracker.clone()));
        let inner = Arc::new(Inner { process, qmp, tracker, state, run_dir, words });
        tokio::spawn(explain_stops(Arc::downgrade(&inner), unexplained));
        Self { inner }
    }

    /// Who the process is, to adopt it later.
    pub fn identity(&self) -> Identity {
        self.inner.process.identity()
    }

    pub(crate) fn process(&self) -> &Process {
        &self.inner.process
    }

    pub(crate) fn run_dir(&self) -> &Path {
        &self.inner.run_dir
    }

    /// The monitor.
    pub fn qmp(&self) -> &Qmp {
        &self.inner.qmp
    }

    /// What happens from now on.
    pub fn events(&self) -> Events {
        self.inner.qmp.events()
    }

    /// What the guest does now.
    pub fn state(&self) -> RunState {
        *self.inner.state.borrow()
    }

    /// What the guest does, as it changes. Every order given here has taken effect in it when the order returns.
    pub fn watch(&self) -> watch::Receiver<RunState> {
        self.inner.state.clone()
    }

    /// Stops the guest. Its disks are drained and flushed when this returns.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn pause(&self) -> Result<()> {
        self.inner.qmp.stop().await
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn resume(&self) -> Result<()> {
        self.inner.qmp.cont().await
    }

    /// Asks the guest to power off. Whether it does is seen by [`RunState::Shutdown`].
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn powerdown(&self) -> Result<()> {
        self.inner.qmp.system_powerdown().await
    }

    /// Lets the guest begin anew, as if its reset button were pressed.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn reset(&self) -> Result<()> {
        self.inner.qmp.system_reset().await
    }

    /// Writes the screen as PNG into a file, which QEMU must be able to write. A relative path begins in the run folder.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn screendump(&self, file: &Path) -> Result<()> {
        self.inner.qmp.screendump(file).await
    }

    /// Leads ports of the host into the guest. Not part of the command line, so that two processes of one machine can hand them over.
    ///
    /// # Errors
    /// [`Error::Refused`] if one is taken; those before it are published.
    pub async fn publish(&self, ports: &[Publish]) -> Result<()> {
        for port in ports {
            let answer = self.inner.qmp.human(&format!("hostfwd_add {NETDEV} {}", port.rule())).await?;
            if !answer.trim().is_empty() {
                let command = format!("publish {}:{}", port.address, port.host);
                return Err(Error::Refused { command, reason: answer.trim().to_owned() });
            }
        }
        Ok(())
    }

    /// Closes ports that were published. Those that were not are no error.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn unpublish(&self, ports: &[Publish]) -> Result<()> {
        for port in ports {
            self.inner.qmp.human(&format!("hostfwd_remove {NETDEV} {}", port.listener())).await?;
        }
        Ok(())
    }

    /// Sends what is typed on `console` to this guest from now on.
    ///
    /// # Errors
    /// [`Error::Io`] if nobody is at the other end of the serial port's pipe.
    pub fn attach_console(&self, console: &Console) -> Result<()> {
        console.attach(&self.inner.run_dir.join(SERIAL_PIPE))
    }

    /// A connection to the screen (RFB).
    ///
    /// # Errors
    /// [`Error::Io`] if its socket is not there.
    pub async fn screen(&self) -> Result<UnixStream> {
        connect(&self.inner.run_dir, VNC_SOCKET).await
    }

    /// Ends the process: asks it, and kills it after `grace`. (It flushes its disks first, and waits for them if they are away.)
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be killed.
    pub async fn quit(&self, grace: Duration) -> Result<Ending> {
        // A monitor that does not take the order is the case for which there is the second step.
        let asked = async {
            let _ = self.inner.qmp.quit().await;
            self.inner.process.wait().await
        };
        match tokio::time::timeout(grace, asked).await {
            Ok(how) => Ok(how),
            Err(_) => self.kill().await,
        }
    }

    /// Ends the process at once, as a power cut does.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be killed.
    pub async fn kill(&self) -> Result<Ending> {
        self.inner.process.kill()?;
        Ok(self.inner.process.wait().await)
    }

    /// Waits for the process's end.
    pub async fn wait(&self) -> Ending {
        self.inner.process.wait().await
    }

    /// Why the monitor hung up: waits for the process's end and tells its last words.
    pub(crate) async fn ended(&self) -> Error {
        self.inner.words.ended(self.inner.process.wait().await)
    }
}

/// Kills a process that came up only half.
struct Kill(Option<Process>);

impl Kill {
    fn get(&self) -> &Process {
        self.0.as_ref().expect("held until kept")
    }

    fn keep(mut self) -> Process {
        self.0.take().expect("held until kept")
    }
}

impl Drop for Kill {
    fn drop(&mut self) {
        let Some(process) = self.0.take() else { return };
        if let Err(error) = process.kill() {
            tracing::warn!(%error, "a process that came up only half is left");
        }
        // Reaped in the background, if there is still a runtime.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { process.wait().await });
        }
    }
}

/// Connects to a socket in the run folder, whatever the length of the folder's name.
pub(crate) async fn connect(run_dir: &Path, name: &str) -> Result<UnixStream> {
    let what = || Error::at("connect to", run_dir.join(name));
    let dir: OwnedFd =
        open(run_dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(Error::os(what()))?;
    UnixStream::connect(through(&dir, name)).await.map_err(Error::io(what()))
}

async fn connect_when_up(run_dir: &Path) -> Result<UnixStream> {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    loop {
        match connect(run_dir, QMP_SOCKET).await {
            // Not bound yet; or bound by an earlier process that is no more.
            Err(Error::Io { source, .. }) if matches!(source.kind(), NotFound | ConnectionRefused) => {
                tokio::time::sleep(CONNECT_EVERY).await;
            }
            other => return other,
        }
    }
}

async fn greet(stream: UnixStream, tracker: &Arc<Tracker>) -> Result<Qmp> {
    let observer = tracker.clone();
    let qmp = Qmp::connect(stream, move |event| observer.take(event)).await?;
    match qmp.set_capabilities(&[(Capability::Events, true)]).await {
        // Refused while a capture is under way: then this was set when it began.
        Ok(()) | Err(Error::Refused { .. }) => {}
        Err(error) => return Err(error),
    }
    tracker.resync(&qmp).await?;
    Ok(qmp)
}

/// Connects to a QEMU whose last client has died.
///
/// A QEMU that notices that in two threads at once (one reads, one has something to tell) ends the next connection in place of the last.
async fn meet_again(run_dir: &Path) -> Result<(Qmp, Arc<Tracker>)> {
    let meet = async || {
        let tracker = Tracker::new();
        let qmp = greet(connect(run_dir, QMP_SOCKET).await?, &tracker).await?;
        Ok((qmp, tracker))
    };
    for _ in 1..MEETINGS {
        match meet().await {
            Err(Error::Disconnected) => tokio::time::sleep(CONNECT_EVERY).await,
            met => return met,
        }
    }
    meet().await
}

async fn watch_process(process: Arc<Process>, tracker: Arc<Tracker>) {
    let how = process.wait().await;
    tracker.state.send_replace(RunState::Exited(how));
}

/// Asks why the guest stopped, where no event has told.
async fn explain_stops(qemu: Weak<Inner>, mut unexplained: watch::Receiver<u64>) {
    while unexplained.changed().await.is_ok() {
        let Some(qemu) = qemu.upgrade() else { return };
        if let Err(error) = qemu.tracker.resync(&qemu.qmp).await {
            tracing::debug!(%error, "why the guest stopped could not be asked");
        }
    }
}

/// Follows the guest's state by QEMU's events, and by asking where they do not tell: `BLOCK_IO_ERROR` comes at most once a second from QEMU 10.0
/// on, which may be long after the STOP that it announces.
#[derive(Debug)]
struct Tracker {
    state: watch::Sender<RunState>,
    /// How often the guest has stopped for a reason that no event had told.
    unexplained: watch::Sender<u64>,
    progress: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    /// Events so far.
    seen: u64,
    /// Why the next STOP comes, if it was announced.
    cause: Option<RunState>,
}

impl Tracker {
    fn new() -> Arc<Self> {
        let (state, unexplained) = (watch::Sender::new(RunState::Paused), watch::Sender::new(0));
        Arc::new(Self { state, unexplained, progress: Mutex::default() })
    }

    fn take(&self, event: &Event) {
        let mut progress = self.progress();
        progress.seen += 1;
        let unexplained = event.kind == EventKind::Stop && progress.cause.is_none();
        self.state.send_if_modified(|state| {
            let next = progress.next(*state, &event.kind);
            std::mem::replace(state, next) != next
        });
        if unexplained {
            self.unexplained.send_modify(|count| *count += 1);
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the state; an answer that an event has overtaken is not believed.
    async fn resync(&self, qmp: &Qmp) -> Result<()> {
        loop {
            let seen = self.progress().seen;
            let status = qmp.status().await?.status;
            let progress = self.progress();
            if progress.seen == seen {
                let now = parse_state(&status);
                self.state.send_if_modified(|state| std::mem::replace(state, now) != now);
                return Ok(());
            }
        }
    }
}

impl Progress {
    fn next(&mut self, state: RunState, event: &EventKind) -> RunState {
        match event {
            EventKind::Shutdown { .. } => self.cause = Some(RunState::Shutdown),
            EventKind::GuestPanicked => self.cause = Some(RunState::Panicked),
            EventKind::Stop => return self.cause.take().unwrap_or(RunState::Paused),
            EventKind::Resume => {
                self.cause = None;
                return RunState::Running;
            }
            // After a reset of a guest that was off or dead it stands at its beginning.
            EventKind::Reset { .. } if matches!(state, RunState::Shutdown | RunState::Panicked | RunState::Broken) => {
                return RunState::Paused;
            }
            EventKind::Migration(MigrationStatus::Completed | MigrationStatus::PostcopyActive)
                if state == RunState::Incoming =>
            {
                return RunState::Paused;
            }
            _ => {}
        }
        state
    }
}

fn parse_state(status: &str) -> RunState {
    match status {
        "running" => RunState::Running,
        "inmigrate" => RunState::Incoming,
        "shutdown" => RunState::Shutdown,
        "guest-panicked" => RunState::Panicked,
        "io-error" => RunState::IoError,
        "internal-error" | "watchdog" => RunState::Broken,
        _ => RunState::Paused,
    }
}

/// The log of a process's own words, from where it began.
#[derive(Debug)]
struct Words {
    log: PathBuf,
    from: u64,
}

impl Words {
    fn from_here(log: &Path) -> Self {
        let from = rustix::fs::stat(log).map_or(0, |stat| stat.st_size as u64);
        Self { log: log.into(), from }
    }

    fn ended(&self, how: Ending) -> Error {
        Error::Exited { how: how.to_string(), words: self.last().unwrap_or_default() }
    }

    fn last(&self) -> rustix::io::Result<String> {
        let file = open(&self.log, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let length = rustix::fs::fstat(&file)?.st_size as u64;
        let mut bytes = vec![0; length.saturating_sub(self.from).min(LAST_WORDS) as usize];
        let from = length - bytes.len() as u64;
        let count = rustix::io::pread(&file, &mut bytes, from)?;
        Ok(String::from_utf8_lossy(&bytes[..count]).trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::slice::from_ref;

    fn after(mut state: RunState, events: &[(&str, serde_json::Value)]) -> RunState {
        let mut progress = Progress::default();
        for (name, data) in events {
            state = progress.next(state, &Event::new((*name).into(), data.clone(), Some(0)).kind);
        }
        state
    }

    #[test]
    fn what_a_guest_does_by_its_events() {
        let (stop, resume, reset) = (("STOP", json!({})), ("RESUME", json!({})), ("RESET", json!({ "guest": true })));
        let off = ("SHUTDOWN", json!({ "guest": true, "reason": "guest-shutdown" }));
        let panic = ("GUEST_PANICKED", json!({ "action": "pause" }));
        // Comes when it likes; the status tells.
        let outage = ("BLOCK_IO_ERROR", json!({ "action": "stop" }));
        let loaded = ("MIGRATION", json!({ "status": "completed" }));
        let run = RunState::Running;
        assert_eq!(after(run, from_ref(&stop)), RunState::Paused);
        assert_eq!(after(run, &[stop.clone(), resume.clone()]), RunState::Running);
        assert_eq!(after(run, &[off.clone(), stop.clone()]), RunState::Shutdown);
        assert_eq!(after(run, &[panic.clone(), stop.clone()]), RunState::Panicked);
        assert_eq!(after(run, &[stop.clone(), outage, resume.clone()]), RunState::Running);
        // A cause is spent once: what stops the guest later is another one.
        assert_eq!(after(run, &[panic, stop.clone(), resume, stop.clone()]), RunState::Paused);
        assert_eq!(after(run, from_ref(&reset)), RunState::Running);
        assert_eq!(after(run, &[off, stop.clone(), reset]), RunState::Paused);
        assert_eq!(after(RunState::Incoming, from_ref(&loaded)), RunState::Paused);
        assert_eq!(after(run, &[loaded]), RunState::Running);
    }

    #[test]
    fn the_last_words() {
        let dir = tempfile::tempdir().expect("a folder");
        let log = dir.path().join("log");
        let from_nothing = Words::from_here(&log);
        assert_eq!(from_nothing.last().unwrap_or_default(), "");
        std::fs::write(&log, "old\n").expect("the log");
        let words = Words::from_here(&log);
        assert_eq!(words.last().expect("the log"), "");
        std::fs::write(&log, format!("old\n{}the end\n", "x".repeat(10_000))).expect("the log");
        let last = words.last().expect("the log");
        assert!(last.len() < 2048 && last.ends_with("xthe end"), "{last}");
        // Cut off by somebody else meanwhile.
        std::fs::write(&log, "").expect("the log");
        assert_eq!(words.last().expect("the log"), "");
    }
}
