//! Jobs under way: their progress, their cancellation, and who waits for them.

use crate::request::{Job, JobState, Problem, ProblemKind};
use crate::tree::JobId;
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
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
    pace: Arc<Pace>,
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

/// How fast its user wants a job to go.
#[derive(Debug, Default)]
pub struct Pace {
    wish: Mutex<Wish>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, Default)]
struct Wish {
    paused: bool,
    limit: Option<Limit>,
}

/// So many bytes a second, counted from what was done when it was first kept to.
#[derive(Debug, Clone, Copy)]
struct Limit {
    bytes_per_second: u64,
    from: Option<(Instant, u64)>,
}

impl Wish {
    /// The limit counts from now on: what was not done before is not made up for.
    fn begin(&mut self) {
        self.limit = self.limit.map(|limit| Limit { from: None, ..limit });
    }
}

impl Limit {
    /// How long to wait before more than `done` is done.
    fn wait(&mut self, done: u64, now: Instant) -> Duration {
        let (since, first) = *self.from.get_or_insert((now, done));
        let due = Duration::from_secs_f64(done.saturating_sub(first) as f64 / self.bytes_per_second as f64);
        due.saturating_sub(now.saturating_duration_since(since))
    }
}

impl Pace {
    /// How often somebody who waits looks whether he is to stop.
    const LOOK: Duration = Duration::from_millis(50);

    fn wish(&self, change: impl FnOnce(&mut Wish)) {
        change(&mut self.wish.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn paused(&self) -> bool {
        self.wish.lock().unwrap_or_else(PoisonError::into_inner).paused
    }

    /// Waits as long as its user wants, now that so many bytes are done; no longer if `stop` says so.
    fn keep(&self, done: u64, stop: impl Fn() -> bool) {
        let mut wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        while !stop() {
            let paused = wish.paused;
            let wait = match &mut wish.limit {
                _ if paused => Self::LOOK,
                Some(limit) => limit.wait(done, Instant::now()),
                None => Duration::ZERO,
            };
            if wait.is_zero() {
                return;
            }
            let woken = self.changed.wait_timeout(wish, wait.min(Self::LOOK));
            wish = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Jobs {
    /// With what the ledger remembers.
    pub fn new(remembered: impl IntoIterator<Item = Job>) -> Self {
        let entry = |job: Job| (job.id, Entry { job, cancel: Arc::default(), pace: Arc::default() });
        Self { table: Mutex::new(remembered.into_iter().map(entry).collect()), changed: watch::Sender::new(0) }
    }

    /// A new job, or the one that has this id already.
    pub fn open(self: &Arc<Self>, id: JobId, vm: &str, kind: &str) -> Result<Task, Box<Job>> {
        self.open_at(id, vm, kind, Arc::default())
    }

    /// [`Jobs::open`] of a job that goes on at the pace of an earlier one.
    pub fn open_at(self: &Arc<Self>, id: JobId, vm: &str, kind: &str, pace: Arc<Pace>) -> Result<Task, Box<Job>> {
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
            warnings: Vec::new(),
            error: None,
            result: None,
            started: Timestamp::now(),
            ended: None,
        };
        let cancel = Arc::<Cancel>::default();
        table.insert(id, Entry { job, cancel: Arc::clone(&cancel), pace: Arc::clone(&pace) });
        Ok(Task { id, jobs: Arc::clone(self), cancel, pace })
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
        self.lock().insert(job.id, Entry { job, cancel: Arc::default(), pace: Arc::default() });
    }

    /// Asks a job to cancel.
    pub fn cancel(&self, id: JobId) -> Result<Job, Problem> {
        self.ask(id, |entry| {
            entry.cancel.ask();
            Ok(())
        })
    }

    /// Pauses a merge, which holds nothing meanwhile, or lets it go on.
    pub fn pause(&self, id: JobId, paused: bool) -> Result<Job, Problem> {
        let asked = self.ask(id, |entry| {
            entry.check_paced()?;
            entry.pace.wish(|wish| {
                wish.paused = paused;
                wish.begin();
            });
            entry.job.state = if paused { JobState::Paused } else { JobState::Running };
            Ok(())
        });
        self.changed.send_modify(|n| *n += 1);
        asked
    }

    /// Limits a merge to so many bytes a second; 0 lifts the limit.
    pub fn throttle(&self, id: JobId, bytes_per_second: u64) -> Result<Job, Problem> {
        self.ask(id, |entry| {
            entry.check_paced()?;
            let limit = (bytes_per_second > 0).then_some(Limit { bytes_per_second, from: None });
            entry.pace.wish(|wish| wish.limit = limit);
            Ok(())
        })
    }

    /// Does something to a job that has not ended.
    fn ask(&self, id: JobId, change: impl FnOnce(&mut Entry) -> Result<(), Problem>) -> Result<Job, Problem> {
        let mut table = self.lock();
        let entry =
            table.get_mut(&id).ok_or_else(|| Problem::not_found(format!("no job {id}")).hint("tenby job list"))?;
        if entry.job.state.ended() {
            return Err(Problem::refused(format!("job {id} has ended")).hint(format!("tenby job show {id}")));
        }
        change(entry)?;
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

impl Entry {
    /// Only merges can wait at any moment: nobody waits for them.
    fn check_paced(&self) -> Result<(), Problem> {
        let Job { id, kind, .. } = &self.job;
        if kind == "merge" {
            return Ok(());
        }
        let message = format!("a {kind} goes as fast as it can; only merges can be paused and throttled");
        Err(Problem::refused(message).hint(format!("tenby job cancel {id}")))
    }
}

/// A job under way, as the code that does it holds it.
#[derive(Debug, Clone)]
pub struct Task {
    id: JobId,
    jobs: Arc<Jobs>,
    cancel: Arc<Cancel>,
    pace: Arc<Pace>,
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
        self.pace.wish(Wish::begin);
        let state = if self.pace.paused() { JobState::Paused } else { JobState::Running };
        self.jobs.change(self.id, |job| (job.state, job.reason) = (state, None));
    }

    /// It waits, for this.
    pub fn waiting(&self, reason: &str) {
        self.jobs.change(self.id, |job| (job.state, job.reason) = (JobState::Waiting, Some(reason.to_owned())));
    }

    /// Its user should know this before it goes on.
    pub fn warn(&self, warning: &str) {
        self.jobs.change(self.id, |job| job.warnings.push(warning.to_owned()));
    }

    /// Waits as long as its user wants, now that so many bytes are done; no longer if it is to stop. Blocks.
    pub fn keep_pace(&self, done: u64, stop: impl Fn() -> bool) {
        self.pace.keep(done, || stop() || self.cancelled());
    }

    /// The pace at which its user wants it to go.
    pub fn pace(&self) -> &Arc<Pace> {
        &self.pace
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

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(jobs: &Arc<Jobs>, kind: &str) -> Task {
        jobs.open(JobId::new(), "web", kind).expect("a fresh id")
    }

    #[test]
    fn a_limit_is_counted_from_when_it_is_first_kept_to() {
        let mut limit = Limit { bytes_per_second: 100, from: None };
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        assert_eq!(limit.wait(5000, start), Duration::ZERO);
        assert_eq!(limit.wait(5050, after(100)), Duration::from_millis(400));
        assert_eq!(limit.wait(5050, after(500)), Duration::ZERO);
        assert_eq!(limit.wait(5050, after(900)), Duration::ZERO);
    }

    #[test]
    fn a_paused_merge_waits_until_it_is_resumed_or_stopped() {
        let jobs = Arc::new(Jobs::new([]));
        let task = merge(&jobs, "merge");
        task.running();
        task.keep_pace(1, || false);
        assert_eq!(jobs.pause(task.id(), true).expect("paused").state, JobState::Paused);
        let (passed, is_past) = std::sync::mpsc::channel();
        let waiting = task.clone();
        let thread = std::thread::spawn(move || {
            waiting.keep_pace(2, || false);
            passed.send(()).expect("somebody listens");
        });
        assert!(is_past.recv_timeout(Duration::from_millis(100)).is_err(), "it went on");
        assert_eq!(jobs.pause(task.id(), false).expect("resumed").state, JobState::Running);
        is_past.recv().expect("it goes on");
        thread.join().expect("it ends");
        // What follows it goes at its pace, and stops when it is told to.
        jobs.pause(task.id(), true).expect("paused");
        let next = jobs.open_at(JobId::new(), "web", "merge", Arc::clone(task.pace())).expect("a fresh id");
        next.running();
        assert_eq!(next.job().map(|job| job.state), Some(JobState::Paused));
        next.keep_pace(3, || true);
        next.cancel().ask();
        next.keep_pace(3, || false);
    }

    #[test]
    fn only_merges_that_go_on_have_a_pace() {
        let jobs = Arc::new(Jobs::new([]));
        let (snapshot, ended) = (merge(&jobs, "snapshot"), merge(&jobs, "merge"));
        ended.end(&Ok(serde_json::Value::Null));
        for id in [snapshot.id(), ended.id()] {
            assert_eq!(jobs.pause(id, true).expect_err("refused").kind, ProblemKind::Refused);
            assert_eq!(jobs.throttle(id, 1).expect_err("refused").kind, ProblemKind::Refused);
        }
        assert_eq!(jobs.pause(JobId::new(), true).expect_err("unknown").kind, ProblemKind::NotFound);
        let task = merge(&jobs, "merge");
        jobs.throttle(task.id(), 1).expect("throttled");
        task.keep_pace(0, || false);
        task.keep_pace(1 << 40, || true);
        jobs.throttle(task.id(), 0).expect("lifted");
        task.keep_pace(2 << 40, || false);
    }
}
