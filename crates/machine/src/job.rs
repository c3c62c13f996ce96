//! Jobs under way: their progress, their cancellation, and who waits for them.

use crate::request::{Job, JobState, Problem, ProblemKind};
use crate::tree::JobId;
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Ended jobs that are remembered.
pub const REMEMBERED: usize = 500;

/// All jobs that this worker knows.
#[derive(Debug)]
pub struct Jobs {
    table: Mutex<BTreeMap<JobId, Entry>>,
    changed: watch::Sender<u64>,
}

#[derive(Debug)]
struct Entry {
    job: Job,
    cancel: Arc<Cancel>,
}

/// A wish that something stop; asked for once, looked at often.
#[derive(Debug, Default)]
pub struct Cancel {
    asked: AtomicBool,
    wake: tokio::sync::Notify,
}

impl Cancel {
    /// Asks.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        self.wake.notify_waiters();
    }

    /// Whether it was asked for.
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Waits until it is asked for.
    pub async fn wait(&self) {
        loop {
            let woken = self.wake.notified();
            if self.asked() {
                return;
            }
            woken.await;
        }
    }
}

impl Jobs {
    /// With what the ledger remembers.
    pub fn new(remembered: impl IntoIterator<Item = Job>) -> Self {
        let entry = |job: Job| (job.id, Entry { job, cancel: Arc::default() });
        Self { table: Mutex::new(remembered.into_iter().map(entry).collect()), changed: watch::Sender::new(0) }
    }

    /// A new job, or the one that has this id already.
    pub fn open(self: &Arc<Self>, id: JobId, vm: &str, kind: &str) -> Result<Task, Box<Job>> {
        let mut table = self.lock();
        if let Some(entry) = table.get(&id) {
            return Err(Box::new(entry.job.clone()));
        }
        let job = Job {
            id,
            vm: vm.to_owned(),
            kind: kind.to_owned(),
            state: JobState::New,
            percent: 0,
            bytes_done: 0,
            bytes_total: 0,
            eta: None,
            reason: None,
            error: None,
            result: None,
            started: Timestamp::now(),
            ended: None,
        };
        let cancel = Arc::<Cancel>::default();
        table.insert(id, Entry { job, cancel: Arc::clone(&cancel) });
        Ok(Task { id, jobs: Arc::clone(self), cancel })
    }

    /// All jobs, oldest first.
    pub fn all(&self) -> Vec<Job> {
        let mut jobs: Vec<Job> = self.lock().values().map(|entry| entry.job.clone()).collect();
        jobs.sort_by_key(|job| (job.started, job.id));
        jobs
    }

    /// One job.
    pub fn get(&self, id: JobId) -> Option<Job> {
        self.lock().get(&id).map(|entry| entry.job.clone())
    }

    /// One job, after up to `wait` for it to change from what was `seen` of it (its `bytes_done`), or to end.
    pub async fn wait(&self, id: JobId, seen: Option<u64>, wait: Duration) -> Option<Job> {
        let mut changed = self.changed.subscribe();
        let first = self.get(id)?;
        if seen.is_some_and(|seen| seen != first.bytes_done) {
            return Some(first);
        }
        let deadline = tokio::time::Instant::now() + wait;
        while !first.state.ended() {
            if tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
                break;
            }
            let now = self.get(id)?;
            if now != first {
                return Some(now);
            }
        }
        Some(first)
    }

    /// A job that recovery has ended.
    pub fn put(&self, job: Job) {
        self.lock().insert(job.id, Entry { job, cancel: Arc::default() });
    }

    /// Asks a job to cancel.
    pub fn cancel(&self, id: JobId) -> Result<Job, Problem> {
        let table = self.lock();
        let entry = table.get(&id).ok_or_else(|| Problem::not_found(format!("no job {id}")).hint("tenby job list"))?;
        if entry.job.state.ended() {
            return Err(Problem::refused(format!("job {id} has ended")).hint(format!("tenby job show {id}")));
        }
        entry.cancel.ask();
        Ok(entry.job.clone())
    }

    /// Asks every job of this kind under way to cancel, but `but`.
    pub fn cancel_kind(&self, kind: &str, but: JobId) {
        for (id, entry) in self.lock().iter() {
            if entry.job.kind == kind && *id != but && !entry.job.state.ended() {
                entry.cancel.ask();
            }
        }
    }

    /// Whether any job is under way.
    pub fn busy(&self) -> bool {
        self.lock().values().any(|entry| !entry.job.state.ended())
    }

    fn change(&self, id: JobId, change: impl FnOnce(&mut Job)) {
        if let Some(entry) = self.lock().get_mut(&id) {
            change(&mut entry.job);
        }
        self.changed.send_modify(|n| *n += 1);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<JobId, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job under way, as the code that does it holds it.
#[derive(Debug, Clone)]
pub struct Task {
    id: JobId,
    jobs: Arc<Jobs>,
    cancel: Arc<Cancel>,
}

impl Task {
    /// Its id.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// As it stands.
    pub fn job(&self) -> Option<Job> {
        self.jobs.get(self.id)
    }

    /// It is under way.
    pub fn running(&self) {
        self.jobs.change(self.id, |job| job.state = JobState::Running);
    }

    /// It has done this much. Never goes back; 100 percent only at its end.
    pub fn progress(&self, done: u64, total: u64) {
        self.jobs.change(self.id, |job| {
            job.bytes_done = done.max(job.bytes_done);
            job.bytes_total = total.max(job.bytes_done);
            let percent = job.bytes_done.saturating_mul(100).checked_div(job.bytes_total).unwrap_or(0);
            job.percent = job.percent.max(percent.min(99) as u8);
            job.eta = eta(job);
        });
    }

    /// Its user wants it to stop.
    pub fn cancelled(&self) -> bool {
        self.cancel.asked()
    }

    /// Fails if its user wants it to stop.
    pub fn check(&self) -> Result<(), Problem> {
        match self.cancelled() {
            true => Err(Problem::new(ProblemKind::Cancelled, "cancelled; nothing has changed")),
            false => Ok(()),
        }
    }

    /// The wish to stop.
    pub fn cancel(&self) -> &Arc<Cancel> {
        &self.cancel
    }

    /// It has ended. The first end counts.
    pub fn end(&self, outcome: &Result<serde_json::Value, Problem>) {
        self.jobs.change(self.id, |job| {
            if !job.state.ended() {
                end(job, outcome);
            }
        });
    }

    /// It failed after all, in what was left to do after its commit.
    pub fn fail_late(&self, problem: &Problem) {
        self.jobs.change(self.id, |job| end(job, &Err(problem.clone())));
    }
}

/// A job that has ended like this.
pub fn end(job: &mut Job, outcome: &Result<serde_json::Value, Problem>) {
    job.ended = Some(Timestamp::now());
    job.eta = None;
    job.reason = None;
    match outcome {
        Ok(result) => {
            job.state = JobState::Completed;
            job.percent = 100;
            job.result = (!result.is_null()).then(|| result.clone());
        }
        Err(problem) => {
            job.state = if problem.kind == ProblemKind::Cancelled { JobState::Cancelled } else { JobState::Failed };
            job.error = Some(problem.clone());
        }
    }
}

fn eta(job: &Job) -> Option<Timestamp> {
    let spent = Timestamp::now().duration_since(job.started).as_secs_f64();
    if job.bytes_done == 0 || spent < 0.5 {
        return None;
    }
    let left = (job.bytes_total - job.bytes_done) as f64 * spent / job.bytes_done as f64;
    Timestamp::now().checked_add(SignedDuration::try_from_secs_f64(left).ok()?).ok()
}
