//! The folder of all machines: finding one by name, id or prefix, making one, looking without waking anybody.

use crate::request::{Create, Job, Problem, TreeView, View};
use crate::tree::MachineId;
use std::path::{Path, PathBuf};

/// The folder that holds the machines: `$TENBY_ROOT`, else `/var/lib/tenby` for root and `$XDG_DATA_HOME/tenby` otherwise.
#[derive(Debug, Clone)]
pub struct Root {
    path: PathBuf,
}

/// A machine that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Who it is.
    pub id: MachineId,
    /// Its name.
    pub name: String,
}

/// A machine read off its ledger, while no worker runs.
#[derive(Debug, Clone)]
pub struct Peek {
    /// The machine.
    pub view: View,
    /// Its snapshots.
    pub tree: TreeView,
    /// Its jobs, newest last.
    pub jobs: Vec<Job>,
    /// Its whole ledger.
    pub ledger: serde_json::Value,
    /// Its log.
    pub log: Vec<LogLine>,
}

/// A line of a machine's log: what was done, by which request, when, how it ended.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct LogLine {
    /// When.
    pub at: jiff::Timestamp,
    /// The job, if one.
    pub job: Option<crate::tree::JobId>,
    /// What.
    pub what: String,
}

impl Root {
    /// The root at `path`; made if it is not there.
    pub fn open(path: &Path) -> Result<Self, Problem> {
        Ok(Self { path: path.to_owned() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The machines, by name.
    pub fn list(&self) -> Result<Vec<Found>, Problem> {
        Ok(Vec::new())
    }

    /// The machine of this name, id, or unique prefix of an id.
    pub fn find(&self, name: &str) -> Result<Found, Problem> {
        Err(Problem::not_found(format!("no machine is named \"{name}\"")))
    }

    /// Makes a machine. Nothing is left behind if it fails.
    pub fn create(&self, _spec: &Create, _progress: &mut dyn FnMut(u64, u64)) -> Result<MachineId, Problem> {
        Err(Problem::failed("not yet"))
    }

    /// Reads a machine's ledger, without a worker. `Ok(None)` if a worker holds it.
    pub fn peek(&self, _id: MachineId) -> Result<Option<Peek>, Problem> {
        Ok(None)
    }

    /// A machine's folder.
    pub fn machine_folder(&self, id: MachineId) -> PathBuf {
        self.path.join(id.to_string())
    }

    /// The folder of a machine's sockets: `/run/tenby/ID` for root, `$XDG_RUNTIME_DIR/tenby/ID` otherwise.
    pub fn runtime_folder(id: MachineId) -> PathBuf {
        Path::new("/run/tenby").join(id.to_string())
    }
}
