//! One invocation: the root, the output, and the ways to a machine.

use crate::connect;
use crate::out::Out;
use api::Client;
use machine::request::{Job, Problem, ProblemKind, TreeView, View};
use machine::root::{Found, LogLine, Peek, Root};
use machine::tree::{MachineId, State};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{SignalKind, signal};

/// What every command works with.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) root: Root,
    pub(crate) out: Out,
}

impl Session {
    /// At `root`, or where the environment says.
    pub(crate) fn open(root: Option<&Path>, out: Out) -> Result<Self, Problem> {
        Ok(Self { root: Root::open(&place(root)?)?, out })
    }

    /// The machine of this name, id, or beginning of an id.
    pub(crate) fn find(&self, name: &str) -> Result<Found, Problem> {
        self.root.find(name)
    }

    /// A connection to the machine's worker, which is started if there is none.
    pub(crate) async fn worker(&self, found: &Found) -> Result<Client, Problem> {
        connect::worker(&self.root, found, &self.out).await
    }

    /// Somebody to ask about a machine without waking anybody: its ledger if no worker runs, else the worker.
    pub(crate) async fn reader(&self, found: &Found) -> Result<Reader, Problem> {
        // A worker may end between the two questions; then the ledger can be read.
        let mut last = None;
        for _ in 0..50 {
            if let Some(peek) = self.root.peek(found.id)? {
                return Ok(Reader::Ledger(Box::new(peek)));
            }
            match connect::answering(found).await {
                Ok(client) => return Ok(Reader::Worker(client, found.id)),
                Err(problem) => last = Some(problem),
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        Err(last.unwrap_or_else(|| Problem::failed(format!("{} cannot be read", found.name))))
    }

    /// Asks every machine. One that cannot be asked is told of on standard error, and does not keep the others from being shown.
    pub(crate) async fn every<T>(
        &self,
        ask: impl AsyncFn(&Reader) -> Result<T, Problem>,
    ) -> Result<Vec<(Found, T)>, Problem> {
        let mut all = Vec::new();
        for found in self.root.list()? {
            let answer = match self.reader(&found).await {
                Ok(reader) => ask(&reader).await,
                Err(problem) => Err(problem),
            };
            match answer {
                Ok(answer) => all.push((found, answer)),
                Err(problem) => self.out.note(&format!("{} cannot be shown: {problem}", found.name)),
            }
        }
        Ok(all)
    }

    /// [`Session::reader`]; but where a worker has died and left a machine running, the next one is started: it recovers, and what it says is true.
    pub(crate) async fn sure_reader(&self, found: &Found) -> Result<Reader, Problem> {
        match self.reader(found).await? {
            Reader::Ledger(peek) if !matches!(peek.view.state, State::Off | State::Saved) => {
                Ok(Reader::Worker(self.worker(found).await?, found.id))
            }
            reader => Ok(reader),
        }
    }
}

/// Where the machines are: as said, else `$TENBY_ROOT`, else `/var/lib/tenby` for root and `$XDG_DATA_HOME/tenby` otherwise.
pub(crate) fn place(said: Option<&Path>) -> Result<PathBuf, Problem> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let path = match said.map(Path::to_owned).or_else(|| variable("TENBY_ROOT")) {
        Some(path) => path,
        None if rustix::process::geteuid().is_root() => PathBuf::from("/var/lib/tenby"),
        None => variable("XDG_DATA_HOME")
            .or_else(|| variable("HOME").map(|home| home.join(".local/share")))
            .map(|data| data.join("tenby"))
            .ok_or_else(|| Problem::usage("neither XDG_DATA_HOME nor HOME is set").hint("tenby --root DIR"))?,
    };
    std::path::absolute(&path).map_err(|error| Problem::usage(format!("{}: {error}", path.display())))
}

/// Somebody who can be asked about a machine.
#[derive(Debug)]
pub(crate) enum Reader {
    /// Its ledger, as it was read.
    Ledger(Box<Peek>),
    /// Its worker.
    Worker(Client, MachineId),
}

impl Reader {
    pub(crate) async fn view(&self) -> Result<View, Problem> {
        match self {
            Self::Ledger(peek) => Ok(peek.view.clone()),
            Self::Worker(client, id) => client.view(*id).await.map_err(problem),
        }
    }

    pub(crate) async fn tree(&self) -> Result<TreeView, Problem> {
        match self {
            Self::Ledger(peek) => Ok(peek.tree.clone()),
            Self::Worker(client, id) => client.tree(*id).await.map_err(problem),
        }
    }

    pub(crate) async fn jobs(&self) -> Result<Vec<Job>, Problem> {
        match self {
            Self::Ledger(peek) => Ok(peek.jobs.clone()),
            Self::Worker(client, _) => client.jobs().await.map_err(problem),
        }
    }

    pub(crate) async fn ledger(&self) -> Result<serde_json::Value, Problem> {
        match self {
            Self::Ledger(peek) => Ok(peek.ledger.clone()),
            Self::Worker(client, id) => client.ledger(*id).await.map_err(problem),
        }
    }

    pub(crate) async fn log(&self) -> Result<Vec<LogLine>, Problem> {
        match self {
            Self::Ledger(peek) => Ok(peek.log.clone()),
            Self::Worker(client, id) => client.log(*id).await.map_err(problem),
        }
    }
}

/// An answer that did not come, as a problem.
pub(crate) fn problem(error: api::Error) -> Problem {
    match error {
        api::Error::Problem(problem) => problem,
        error @ (api::Error::Gone(_) | api::Error::Nonsense(_)) => Problem::failed(error.to_string()),
    }
}

/// A problem that means that the command was cancelled by its user.
pub(crate) fn cancelled(message: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::Cancelled, message)
}

/// Does something long with a progress that says `false` after Ctrl-C.
pub(crate) async fn interruptible<T: Send + 'static>(
    out: &Out,
    what: String,
    work: impl FnOnce(&mut dyn FnMut(u64, u64) -> bool) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let stopped = Arc::new(AtomicBool::new(false));
    let bar = out.progress();
    let mut working = {
        let stopped = Arc::clone(&stopped);
        tokio::task::spawn_blocking(move || {
            work(&mut |done, total| {
                bar.bytes(&what, done, total);
                !stopped.load(Ordering::Relaxed)
            })
        })
    };
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(|error| Problem::failed(format!("Ctrl-C cannot be heard: {error}")))?;
    let done = tokio::select! {
        done = &mut working => done,
        _ = interrupt.recv() => {
            stopped.store(true, Ordering::Relaxed);
            working.await
        }
    };
    done.map_err(|error| Problem::failed(format!("the work broke off: {error}")))?
}
