//! What travels: the machine's own values, as they are, and the few that belong to the conversation.

pub use machine::request::{
    Create, DeletePlan, DiskSource, DiskSpec, DiskView, Job, JobState, NowView, Pages, Pending, Present, Problem,
    ProblemKind, Request, Settings, SnapshotView, Sockets, TreeView, View,
};
pub use machine::root::LogLine;
pub use machine::tree::{JobId, MachineId, SnapshotId};

use crate::Version;
use serde::{Deserialize, Serialize};

/// What a worker says of itself: `GET /v1/hello`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Its version.
    pub version: Version,
    /// Its machine.
    pub id: MachineId,
    /// Its process id.
    pub pid: u32,
}

/// A request with the id that its job shall have: `POST /v1/vms/{vm}/requests`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submit {
    /// The job's id, chosen by the client: sent twice, it is one job.
    pub job: JobId,
    /// What is asked.
    pub request: Request,
}

/// The jobs that a worker remembers: `GET /v1/jobs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Jobs {
    /// Oldest first.
    pub jobs: Vec<Job>,
}

/// A machine's log: `GET /v1/vms/{vm}/log`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Log {
    /// Oldest first.
    pub log: Vec<LogLine>,
}
