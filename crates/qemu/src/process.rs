//! A process that outlives its starter.
//!
//! QEMU runs in a session of its own: logout, Ctrl-C and the death of the worker leave it running. A later worker finds it by its
//! process id and start time (ids are reused, the pair is not) and holds it by a pidfd from then on.

use crate::error::{Error, Result};
use rustix::fs::{Mode, OFlags};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitId, WaitIdOptions, pidfd_getfd, pidfd_open, pidfd_send_signal, waitid,
};
use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Who a process is, as recorded to find it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub started: u64,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// Unknown: it was not our child.
    Ended,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Killed(signal) => write!(f, "was killed by signal {signal}"),
            Self::Ended => write!(f, "ended"),
        }
    }
}

/// Whether the process still runs. It may end at any moment after this: [`Process::adopt`] takes hold of it.
pub fn alive(identity: Identity) -> bool {
    stat(identity.pid).is_some_and(|stat| stat.runs && stat.started == identity.started)
}

/// A running process, held by a pidfd. Dropping it leaves the process alone.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
    ending: OnceLock<Ending>,
}

impl Process {
    /// Starts `command` in `dir`, its complaints appended to `log`, with this input and output. It should begin a session of its own.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be started.
    pub(crate) fn spawn(
        mut command: Command,
        dir: &Path,
        log: &Path,
        input: impl Into<Stdio>,
        output: impl Into<Stdio>,
    ) -> Result<Self> {
        command.current_dir(dir).stdin(input).stdout(output).stderr(append_to(log)?);
        let child = command.spawn().map_err(Error::io(Error::at("run", command.get_program())))?;
        // Our unreaped child: its id cannot have been given to another process yet.
        let pid = Pid::from_child(&child);
        Self::hold(pid)?.ok_or(Error::Gone { pid: pid.as_raw_nonzero().get() })
    }

    /// Takes hold of a process that somebody else started; `None` if it is not there any more.
    ///
    /// # Errors
    /// [`Error::Io`] if the host does not let us.
    pub fn adopt(identity: Identity) -> Result<Option<Self>> {
        let Some(pid) = Pid::from_raw(identity.pid) else { return Ok(None) };
        // The pidfd is taken first: once the start time matches, it is this very process that it holds.
        Ok(Self::hold(pid)?.filter(|process| process.identity == identity && process.alive()))
    }

    /// Takes hold of the process that was launched in `run_dir`, by its [`PID_FILE`](crate::PID_FILE); `None` if it does not run
    /// there any more. For a process whose [`Identity`] nobody lived to record.
    ///
    /// # Errors
    /// [`Error::Io`] if the host does not let us.
    pub fn find(run_dir: &Path) -> Result<Option<Self>> {
        let pid = rustix::fs::open(run_dir.join(crate::PID_FILE), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        let mut text = String::new();
        let read = pid.and_then(|file| std::fs::File::from(file).take(32).read_to_string(&mut text).ok());
        let pid = read.and_then(|_| text.trim().parse().ok()).and_then(Pid::from_raw);
        let Some(process) = pid.map(Self::hold).transpose()?.flatten() else { return Ok(None) };
        // The id may have been given to another process since; the folder is that of one.
        let cwd = rustix::fs::readlink(format!("/proc/{}/cwd", process.identity.pid), Vec::new());
        let there = cwd.is_ok_and(|cwd| cwd.as_bytes() == run_dir.as_os_str().as_encoded_bytes());
        Ok(Some(process).filter(|_| there))
    }

    fn hold(pid: Pid) -> Result<Option<Self>> {
        let what = || format!("hold process {}", pid.as_raw_nonzero());
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(Error::os(what())(error)),
        };
        // It may have ended already: an unreaped process still has its start time.
        let Some(Stat { started, .. }) = stat(pid.as_raw_nonzero().get()) else { return Ok(None) };
        #[expect(deprecated, reason = "an owned descriptor keeps the promise for which the new way asks unsafe")]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE).map_err(Error::io(what()))?;
        Ok(Some(Self {
            identity: Identity { pid: pid.as_raw_nonzero().get(), started },
            pidfd,
            ending: OnceLock::new(),
        }))
    }

    /// Who it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Whether it still runs.
    pub fn alive(&self) -> bool {
        self.ending.get().is_none() && alive(self.identity)
    }

    /// Ends it at once. That it has ended already is no error.
    ///
    /// # Errors
    /// [`Error::Io`] if the host does not let us.
    pub fn kill(&self) -> Result<()> {
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(Error::os(format!("kill process {}", self.identity.pid))(error)),
        }
    }

    /// Another handle on it.
    pub(crate) fn pidfd(&self) -> Result<OwnedFd> {
        let again = self.pidfd.get_ref().try_clone();
        again.map_err(Error::io(format!("hold process {}", self.identity.pid)))
    }

    /// A duplicate of a socket that it has open; `None` if it has none of this inode.
    pub(crate) fn take_socket(&self, inode: &str) -> Result<Option<OwnedFd>> {
        let pid = self.identity.pid;
        let what = || format!("look at the descriptors of process {pid}");
        let wanted = format!("socket:[{inode}]");
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(Error::io(what()))?.flatten() {
            let is_it = std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == wanted.as_str());
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let (true, Some(number)) = (is_it, number) {
                let taken = pidfd_getfd(self.pidfd.get_ref(), number, PidfdGetfdFlags::empty());
                return taken.map(Some).map_err(Error::os(what()));
            }
        }
        Ok(None)
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Ending {
        // A pidfd becomes readable when the process ends and stays so. An error here would mean a runtime that shuts down.
        while self.ending.get().is_none() {
            if self.pidfd.readable().await.is_err() {
                break;
            }
            self.reap();
        }
        self.ending.get().copied().unwrap_or(Ending::Ended)
    }

    fn reap(&self) {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let ending = match waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ending::Exited(code),
                (_, Some(signal)) => Ending::Killed(signal),
                _ => Ending::Ended,
            },
            Ok(None) => return,
            // Not our child, or reaped by another holder.
            Err(_) => Ending::Ended,
        };
        // Only the first to reap knows; later ones find it here.
        let _ = self.ending.set(ending);
    }
}

/// `setsid` makes the session and becomes the program: the process id stays. Where it is missing, a process group of its own still keeps
/// the terminal's signals away.
pub(crate) fn detached(binary: &Path, args: &[OsString]) -> Command {
    const SETSID: &str = "/usr/bin/setsid";
    if rustix::fs::access(SETSID, rustix::fs::Access::EXEC_OK).is_ok() {
        let mut command = Command::new(SETSID);
        command.arg(binary).args(args);
        return command;
    }
    let mut command = Command::new(binary);
    command.args(args).process_group(0);
    command
}

/// Opens `log`, made if it is not there, so that each write lands at its end, whoever else writes.
pub(crate) fn append_to(log: &Path) -> Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC;
    rustix::fs::open(log, flags, Mode::RUSR | Mode::WUSR).map_err(Error::os(Error::at("open", log)))
}

/// What the kernel tells of a process.
#[derive(Debug, PartialEq)]
struct Stat {
    /// Whether it has not ended; one that has and was not reaped is still listed.
    runs: bool,
    started: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    let file = rustix::fs::open(format!("/proc/{pid}/stat"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut line = Vec::new();
    std::fs::File::from(file).take(4096).read_to_end(&mut line).ok()?;
    parse_stat(&String::from_utf8_lossy(&line))
}

/// Fields 3 and 22. The second field is a name in parentheses that may hold anything.
fn parse_stat(line: &str) -> Option<Stat> {
    let (_, rest) = line.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    Some(Stat { runs: !matches!(state, "Z" | "X"), started: fields.nth(18)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_hostile_name() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        let stat = |runs| Some(Stat { runs, started: 4711 });
        assert_eq!(parse_stat(&format!("12 (a) b) (c) {tail}")), stat(true));
        assert_eq!(parse_stat(&format!("12 (x) {}", tail.replace('S', "Z"))), stat(false));
        assert_eq!(parse_stat("12 (x) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[tokio::test]
    async fn a_process_lives_and_ends() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let log = dir.path().join("log");
        let args = ["-c".into(), "echo words; echo more >&2; read x; exec sleep 1000".into()];
        let process = Process::spawn(
            detached(Path::new("/bin/sh"), &args),
            dir.path(),
            &log,
            Stdio::null(),
            append_to(&log).expect("a log"),
        )
        .expect("sh runs");
        // `read` finds no input and sleep takes over: the process id is the one of setsid, sh and sleep.
        assert!(process.alive());
        let again = Process::adopt(process.identity()).expect("adopt").expect("it is there");
        let stranger = Identity { started: process.identity().started + 1, ..process.identity() };
        assert!(Process::adopt(stranger).expect("adopt").is_none());
        again.kill().expect("kill");
        assert_eq!(process.wait().await, Ending::Killed(9));
        assert_eq!(process.wait().await, Ending::Killed(9));
        assert_eq!(again.wait().await, Ending::Ended);
        assert!(!process.alive());
        process.kill().expect("a second kill is no error");
        assert!(Process::adopt(process.identity()).expect("adopt").is_none());
    }

    #[tokio::test]
    async fn its_status_and_words_are_kept() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let log = dir.path().join("log");
        let args = ["-c".into(), "echo words; echo more >&2; exit 3".into()];
        let process = Process::spawn(
            detached(Path::new("/bin/sh"), &args),
            dir.path(),
            &log,
            Stdio::null(),
            append_to(&log).expect("a log"),
        )
        .expect("sh runs");
        assert_eq!(process.wait().await, Ending::Exited(3));
        assert_eq!(std::fs::read_to_string(log).expect("the log"), "words\nmore\n");
    }

    #[tokio::test]
    async fn it_has_a_session_of_its_own() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let args = ["1000".into()];
        let process = Process::spawn(
            detached(Path::new("/bin/sleep"), &args),
            dir.path(),
            &dir.path().join("log"),
            Stdio::null(),
            Stdio::null(),
        )
        .expect("sleep runs");
        let pid = process.identity().pid;
        // setsid calls it just after the start: wait until sleep has taken over.
        while !std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n") {
            tokio::task::yield_now().await;
        }
        assert_eq!(session(pid), pid);
        assert_ne!(session(std::process::id().cast_signed()), pid);
        process.kill().expect("kill");
        process.wait().await;
    }

    /// The session of a process; 0 where its leader lies outside of our namespace of processes (as
    /// in a container that was entered from outside), which `getsid` of rustix takes for a fault.
    fn session(pid: i32) -> i32 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("its status");
        let fields = &stat[stat.rfind(')').expect("the end of its name") + 1..];
        fields.split_whitespace().nth(3).and_then(|id| id.parse().ok()).expect("its session")
    }
}
