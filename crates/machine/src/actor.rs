//! The one owner of a machine.

use crate::request::{DeletePlan, Job, Problem, Request, TreeView, View};
use crate::root::{LogLine, Root};
use crate::tree::{JobId, MachineId};
use std::time::Duration;

/// What a worker's clients hold: asks the machine's one owner, and reads what it publishes.
#[derive(Debug, Clone)]
pub struct Handle {}

impl Handle {
    /// Opens the machine: takes its lock, recovers, adopts a running QEMU. Fails with `Refused` if another worker has it.
    pub async fn open(_root: &Root, _id: MachineId) -> Result<Self, Problem> {
        Err(Problem::failed("not yet"))
    }

    /// The machine, as it is now.
    pub fn view(&self) -> Result<View, Problem> {
        Err(Problem::failed("not yet"))
    }

    /// Its snapshots.
    pub fn tree(&self) -> Result<TreeView, Problem> {
        Err(Problem::failed("not yet"))
    }

    /// Asks for something. The same job id again is the same request: its job is returned. A refusal is a failed job's `error`
    /// as well as this error.
    pub async fn submit(&self, _job: JobId, _request: Request) -> Result<Job, Problem> {
        Err(Problem::failed("not yet"))
    }

    /// All jobs that are remembered, oldest first.
    pub fn jobs(&self) -> Vec<Job> {
        Vec::new()
    }

    /// A job; waits up to `wait` for it to change from what `seen` was or to end.
    pub async fn job(&self, _id: JobId, _seen: Option<u64>, _wait: Duration) -> Option<Job> {
        None
    }

    /// Asks a job to cancel.
    pub async fn cancel(&self, _id: JobId) -> Result<Job, Problem> {
        Err(Problem::failed("not yet"))
    }

    /// What deleting would do.
    pub fn plan_delete(&self, _snapshot: &str, _subtree: bool) -> Result<DeletePlan, Problem> {
        Err(Problem::failed("not yet"))
    }

    /// A picture of the screen, PNG.
    pub async fn screenshot(&self) -> Result<Vec<u8>, Problem> {
        Err(Problem::failed("not yet"))
    }

    /// The ledger's rows.
    pub fn ledger(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// The machine's log.
    pub fn log(&self) -> Vec<LogLine> {
        Vec::new()
    }

    /// Returns when the worker has nothing left to do: no QEMU, no job, no request for a while; or the machine was deleted.
    pub async fn idle(&self) {}

    /// Ends in good order, leaving QEMU running (the next worker adopts it): finishes the transaction under way.
    pub async fn close(&self) {}
}
