//! The witness in the guest: PID 1 of the test guest, which compares what its RAM and its disks remember. A request is a line
//! `>TAG verb …` on the serial console, its answer a line `<TAG {json}`.

use crate::session::Session;
use machine::request::Problem;
use machine::root::Found;
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Instant;

/// How long the guest may take to boot, and to answer. (Software emulation on a busy host is slow.)
const BOOT: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(5);

/// The longest line that is waited for.
const LONGEST: usize = 1 << 16;

/// Drops what the guest holds of an unfinished line: it may have been restored in the middle of one.
const KILL_LINE: &str = "\x15";

/// Tags are never used twice: the console repeats what it has said before.
static TAG: AtomicU32 = AtomicU32::new(1);

/// A conversation with the guest.
pub(super) struct Guest {
    from: BufReader<OwnedReadHalf>,
    to: OwnedWriteHalf,
}

impl Guest {
    /// Connects to the console of a running machine.
    pub(super) async fn meet(session: &Session, found: &Found) -> Result<Self, Problem> {
        let view = session.sure_reader(found).await?.view().await?;
        let sockets = view.sockets.ok_or_else(|| Problem::failed(format!("{} is not running", found.name)))?;
        let stream: UnixStream = api::connect(Path::new(&sockets.console)).await.map_err(|error| lost(&error))?;
        let (from, to) = stream.into_split();
        Ok(Self { from: BufReader::new(from), to })
    }

    /// Waits until the guest is up.
    pub(super) async fn wait_ready(&mut self) -> Result<(), Problem> {
        self.line_with("WITNESS READY", BOOT).await.map(drop)
    }

    /// Asks, and gives the answer. Harmless requests only: one that was lost is asked again.
    pub(super) async fn ask(&mut self, request: &str) -> Result<Value, Problem> {
        let began = Instant::now();
        loop {
            match self.ask_once(request).await {
                Err(_) if began.elapsed() < BOOT => {}
                answer => {
                    let answer = answer?;
                    return match answer["error"].as_str() {
                        Some(error) => Err(Problem::failed(format!("the guest to `{request}`: {error}"))),
                        None => Ok(answer),
                    };
                }
            }
        }
    }

    async fn ask_once(&mut self, request: &str) -> Result<Value, Problem> {
        let tag = format!("demo{}.{}", std::process::id(), TAG.fetch_add(1, Ordering::Relaxed));
        let line = format!("{KILL_LINE}>{tag} {request}\n");
        self.to.write_all(line.as_bytes()).await.map_err(|error| lost(&error))?;
        let answer = self.line_with(&format!("<{tag} "), ANSWER).await?;
        serde_json::from_str(&answer)
            .map_err(|error| Problem::failed(format!("the guest's answer is mangled: {error}")))
    }

    /// What follows `start` in the next line that has it.
    async fn line_with(&mut self, start: &str, patience: Duration) -> Result<String, Problem> {
        let deadline = Instant::now() + patience;
        let mut line = Vec::new();
        loop {
            let read = tokio::time::timeout_at(deadline, self.from.read_until(b'\n', &mut line)).await;
            let count =
                read.map_err(|_| Problem::failed("the guest does not answer"))?.map_err(|error| lost(&error))?;
            if count == 0 || line.len() > LONGEST {
                return Err(Problem::failed("the console has ended"));
            }
            let text = String::from_utf8_lossy(&line);
            if let Some((_, rest)) = text.split_once(start) {
                return Ok(rest.trim_end().to_owned());
            }
            line.clear();
        }
    }
}

fn lost(error: &std::io::Error) -> Problem {
    Problem::failed(format!("the console was lost: {error}"))
}
