//! One invocation: the root, the output, and the ways to a machine.

use crate::connect;
use crate::out::Out;
use api::Client;
use machine::request::{Job, Problem, ProblemKind, TreeView, View};
use machine::root::{Found, LogLine, Peek, Root};
use machine::tree::{Machine, MachineId, State};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often it is looked again for a worker that is on its way out, and how long between.
const LEAVING: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);

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

    /// The same, for one of several things that are done side by side: it draws no bar, and says nothing beside its result.
    pub(crate) fn quietly(&self) -> Self {
        Self { out: self.out.quietly(), ..self.clone() }
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
        for _ in 0..LEAVING {
            if let Some(peek) = self.root.peek(found.id)? {
                return Ok(Reader::Ledger(Box::new(peek)));
            }
            match connect::answering(found).await {
                Ok(client) => return Ok(self.by_worker(client, found)),
                Err(problem) => last = Some(problem),
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(last.unwrap_or_else(|| Problem::failed(format!("{} cannot be read", found.name))))
    }

    fn by_worker(&self, client: Client, found: &Found) -> Reader {
        Reader::Worker { root: self.root.clone(), client, id: found.id }
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
                Ok(self.by_worker(self.worker(found).await?, found))
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
    Worker { root: Root, client: Client, id: MachineId },
}

impl Reader {
    pub(crate) async fn view(&self) -> Result<View, Problem> {
        self.ask(|peek| &peek.view, Client::view).await
    }

    pub(crate) async fn tree(&self) -> Result<TreeView, Problem> {
        self.ask(|peek| &peek.tree, Client::tree).await
    }

    pub(crate) async fn jobs(&self) -> Result<Vec<Job>, Problem> {
        self.ask(|peek| &peek.jobs, async |client: &Client, _| client.jobs().await).await
    }

    pub(crate) async fn ledger(&self) -> Result<serde_json::Value, Problem> {
        self.ask(|peek| &peek.ledger, Client::ledger).await
    }

    /// The rows of the machine.
    pub(crate) async fn machine(&self) -> Result<Machine, Problem> {
        let mut rows = self.ledger().await?;
        serde_json::from_value(rows["machine"].take())
            .map_err(|error| Problem::failed(format!("the rows of the machine make no sense: {error}")))
    }

    pub(crate) async fn log(&self) -> Result<Vec<LogLine>, Problem> {
        self.ask(|peek| &peek.log, Client::log).await
    }

    /// What the ledger held, or what the worker says. One that had said hello may have been on its way out: then its ledger can be read.
    async fn ask<T: Clone>(
        &self,
        of_ledger: impl Fn(&Peek) -> &T,
        of_worker: impl AsyncFn(&Client, MachineId) -> Result<T, api::Error>,
    ) -> Result<T, Problem> {
        let (root, client, id) = match self {
            Self::Ledger(peek) => return Ok(of_ledger(peek).clone()),
            Self::Worker { root, client, id } => (root, client, *id),
        };
        let mut last = None;
        for _ in 0..LEAVING {
            match of_worker(client, id).await {
                Err(gone @ api::Error::Gone(_)) => last = Some(problem(gone)),
                answer => return answer.map_err(problem),
            }
            if let Some(peek) = root.peek(id)? {
                return Ok(of_ledger(&peek).clone());
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(last.unwrap_or_else(|| Problem::failed("the worker does not answer")))
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
