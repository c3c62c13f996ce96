//! A machine's files and rows, kept in step: every change of both, in an order that a crash at any point survives (invariant 2).
//!
//! ```text
//!   journal ──► files ──► settle: the one transaction that makes a request real
//!      │                     └──► what no row names any more is the collector's (collect.rs)
//!      └── a failure, or the next worker ──► forget: the files go that no row has come to name
//! ```
//!
//! It knows nothing of QEMU. What it does for each request stands with that request, in [`crate::ops`]; an owner adds the guest. So
//! the crash tests do with it what an owner does, on a simulated disk.

use crate::book::Book;
use crate::carry::Carries;
use crate::collect::Sizes;
use crate::disks::Disks;
use crate::files::Files;
use crate::job::{Jobs, REMEMBERED, Task, end};
use crate::ledger::{Journal, State as Rows};
use crate::request::{Job, Problem};
use crate::steps::Steps;
use crate::tree::Machine;
use std::sync::Arc;

/// The files and rows of one machine. Clones share them.
#[derive(Debug, Clone)]
pub struct Keeper {
    pub(crate) files: Files,
    pub(crate) book: Book,
    pub(crate) carries: Carries,
    pub(crate) jobs: Arc<Jobs>,
    pub(crate) steps: Arc<Steps>,
    pub(crate) sizes: Sizes,
}

impl Keeper {
    /// Opens the ledger. To be followed by recovery: [`Keeper::work_off_carries`], then [`Keeper::undo_unfinished`].
    pub fn open(files: &Files, carries: Carries, steps: Steps) -> Result<Self, Problem> {
        let steps = Arc::new(steps);
        let book = Book::open(files, &steps)?;
        let jobs = Arc::new(Jobs::new(book.rows().jobs()));
        Ok(Self { files: files.clone(), book, carries, jobs, steps, sizes: Sizes::default() })
    }

    /// Merges by these sizes.
    #[must_use]
    pub fn merging_by(mut self, sizes: Sizes) -> Self {
        self.sizes = sizes;
        self
    }

    /// The rows as last committed.
    pub fn rows(&self) -> Arc<Rows> {
        self.book.rows()
    }

    /// The machine's folder.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The way to change them.
    pub fn book(&self) -> &Book {
        &self.book
    }

    /// What was asked for, and how far it is.
    pub fn jobs(&self) -> &Arc<Jobs> {
        &self.jobs
    }

    /// Opens the disks of `machine`'s Now for writing.
    pub fn open_disks(&self, machine: &Machine) -> Result<Disks, Problem> {
        Disks::open(&self.files, &self.carries, machine)
    }

    /// Journals a request before it makes files: their names, relative to the machine's folder. From here on it is undone unless
    /// [`Keeper::settle`] makes it real.
    pub fn journal(&self, task: &Task, request: &str, files: Vec<String>) -> Result<(), Problem> {
        self.journal_noting(task, request, files, String::new())
    }

    /// The same, with a note of what else recovery has to know.
    pub(crate) fn journal_noting(
        &self,
        task: &Task,
        request: &str,
        files: Vec<String>,
        note: String,
    ) -> Result<(), Problem> {
        let job = task.job().ok_or_else(|| Problem::failed("the job is gone"))?;
        self.book.commit(|rows| {
            rows.insert_journal(Journal { job: job.id, request: serde_json::json!(request), files, note });
            remember(rows, job);
        })?;
        self.steps.at(&format!("{request}:journalled"));
        Ok(())
    }

    /// The transaction that makes a request real: `change`, the journal row gone, the job completed.
    pub fn settle(
        &self,
        task: &Task,
        result: &serde_json::Value,
        change: impl FnOnce(&mut Machine),
    ) -> Result<(), Problem> {
        self.settle_as(task, &Ok(result.clone()), change)
    }

    /// The same for a request with something left to do: `outcome` is what it has come to if this worker dies before that.
    pub fn settle_as(
        &self,
        task: &Task,
        outcome: &Result<serde_json::Value, Problem>,
        change: impl FnOnce(&mut Machine),
    ) -> Result<(), Problem> {
        let mut job = task.job().ok_or_else(|| Problem::failed("the job is gone"))?;
        end(&mut job, outcome);
        self.book.commit(|rows| {
            change(&mut rows.machine);
            rows.remove_journal(job.id);
            remember(rows, job);
        })
    }

    /// Undoes a request that was journalled and has failed: its files go, unless a row has come to name them.
    pub fn undo(&self, task: &Task) {
        let rows = self.rows();
        let Some(journal) = rows.journal(task.id()) else { return };
        if let Err(problem) = self.forget(journal) {
            tracing::error!("a failed request could not be undone: {problem}; the next worker will");
        }
    }

    /// Removes the files of a journal row that no layer's row names, and the journal row.
    pub fn forget(&self, journal: &Journal) -> Result<(), Problem> {
        let rows = self.rows();
        let named = |file: &String| rows.machine.layers.values().any(|row| &row.file == file);
        let orphans: Vec<String> = journal.files.iter().filter(|file| !named(file)).cloned().collect();
        self.files.remove(&orphans)?;
        let job = journal.job;
        self.book.commit(|rows| rows.remove_journal(job))
    }

    /// A job has ended: said in the ledger, unless its own transaction did, then to whoever waits.
    pub fn finish(&self, task: &Task, outcome: &Result<serde_json::Value, Problem>) {
        task.end(outcome);
        let Some(job) = task.job() else { return };
        // A refusal changed nothing: it is remembered while this worker lives, and leaves no row.
        let known = self.rows().job(job.id).is_some_and(|known| known.state != job.state);
        if known && let Err(problem) = self.book.commit(|rows| remember(rows, job)) {
            tracing::error!("the end of a job could not be noted: {problem}");
        }
    }
}

/// Keeps a job in the rows, and the newest of those that have ended.
pub(crate) fn remember(rows: &mut Rows, job: Job) {
    rows.insert_job(job);
    rows.prune_jobs(REMEMBERED);
}
