//! The one owner of a machine.
//!
//! ```text
//!   Handle ──ask──► queue ──► Owner: one request after the other        Handle ──read──► Shared: rows as last committed,
//!                               │   commit ─► ledger ─► publish ─────────────────────►           jobs, what is under way
//!                               ├─ QEMU's events (the guest powered off, QEMU died)
//!                               └─ nothing asked: the collector removes and folds; then what is sealed is hashed
//! ```
//!
//! Everything that happens to a machine is done by its owner's task, in the process that holds the machine's lock (invariant 9).
//! Each request is journalled before it makes a file, becomes real in one transaction, and is undone by the next worker if this
//! one dies before that (invariant 2).

use crate::admit::{Admission, admit};
use crate::book::Book;
use crate::carry::Carries;
use crate::collect::Underway;
use crate::files::{Files, file_problem};
use crate::hashing::Hashing;
use crate::job::{Jobs, Pace, Task};
use crate::keeper::Keeper;
use crate::label::Labelled;
use crate::ledger::State as Rows;
use crate::lent::Habits;
use crate::live::Live;
use crate::log;
use crate::request::{DeletePlan, Job, Problem, Request, TreeView, View};
use crate::root::{LogLine, Root, note_name, open_or_create};
use crate::steps::Steps;
use crate::tree::{JobId, MachineId, State};
use crate::views;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use store::{Lock, Store};
use tokio::sync::{mpsc, watch};

/// How long a worker with nothing to do stays, for the next command.
const LINGER: Duration = Duration::from_secs(3);
/// How long a new worker waits for the lock: somebody may be reading the ledger, or the worker before is on its way out.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// What a worker's clients hold: asks the machine's one owner, and reads what it publishes.
#[derive(Debug, Clone)]
pub struct Handle {
    shared: Arc<Shared>,
    asks: mpsc::UnboundedSender<Ask>,
}

#[derive(Debug)]
enum Ask {
    Do(Task, Request),
    Screenshot(tokio::sync::oneshot::Sender<Result<Vec<u8>, Problem>>),
    Close,
}

/// What the owner publishes.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) root: Root,
    pub(crate) id: MachineId,
    pub(crate) files: Files,
    pub(crate) jobs: Arc<Jobs>,
    book: Book,
    moment: RwLock<views::Live>,
    life: watch::Sender<Life>,
}

/// How much longer the owner lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// It has something to do, or had a moment ago.
    Busy,
    /// It has nothing to do, and would still take a request.
    Idle,
    /// It takes no more requests.
    Ended,
}

impl Shared {
    /// The rows as last committed.
    pub(crate) fn rows(&self) -> Arc<Rows> {
        self.book.rows()
    }

    /// What is going on just now.
    pub(crate) fn moment(&self) -> views::Live {
        self.moment.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what is said to go on just now.
    pub(crate) fn set_moment(&self, change: impl FnOnce(&mut views::Live)) {
        change(&mut self.moment.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The one who does everything.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) keeper: Keeper,
    /// QEMU and the disks that it is served, while there is one.
    pub(crate) live: Option<Live>,
    /// What its guest asks for first, by memory.
    pub(crate) habits: Habits,
    /// A fold under way.
    pub(crate) folding: Option<Underway>,
    /// Hashing of what is sealed.
    pub(crate) hashing: Hashing,
    /// That of a merge which was stopped for a request, for the one that begins again.
    pub(crate) merge_pace: Arc<Pace>,
    /// A merge that waits for room on the disk, and when it is to look again.
    pub(crate) starved: Option<(Task, tokio::time::Instant)>,
    /// The guest stands still because the disk is full; when to look whether it can go on.
    pub(crate) out_of_room: Option<tokio::time::Instant>,
    /// When a guest whose disk had failed was last let go on to see whether it fails again.
    pub(crate) tried_again: Option<tokio::time::Instant>,
    /// The reserve is being made.
    pub(crate) reserving: Option<tokio::task::JoinHandle<()>>,
    /// A fold was cancelled by its user, or failed: the collector rests until the next request that changes the tree.
    pub(crate) resting: bool,
    /// Something is not folded because another machine has it, too; that one may give it up at any time, and does not say so.
    pub(crate) shares: bool,
    /// Deletions whose clients wait for the merging, too.
    pub(crate) waiting: Vec<(Task, serde_json::Value)>,
    labelled: Labelled,
    pub(crate) deleted: bool,
    pub(crate) console: qemu::Console,
    console_server: tokio::task::JoinHandle<()>,
    _lock: Arc<dyn Store>,
}

impl Handle {
    /// Opens the machine: takes its lock, recovers, adopts a running QEMU. Fails with `Refused` if another worker has it.
    pub async fn open(root: &Root, id: MachineId) -> Result<Self, Problem> {
        Self::open_with(root, id, Steps::default()).await
    }

    /// [`Handle::open`], to die at a step.
    pub async fn open_with(root: &Root, id: MachineId, steps: Steps) -> Result<Self, Problem> {
        let files = root.files(id)?;
        let lock = take_lock(&files).await?;
        let keeper = Keeper::open(&files, Carries::open(id)?, steps)?;
        note_name(id, &keeper.rows().machine.name)?;
        let shared = Arc::new(Shared {
            root: root.clone(),
            id,
            files: files.clone(),
            jobs: Arc::clone(keeper.jobs()),
            book: keeper.book.clone(),
            moment: RwLock::new(views::Live {
                worker: Some(rustix::process::getpid().as_raw_nonzero().get()),
                ..views::Live::default()
            }),
            life: watch::Sender::new(Life::Busy),
        });
        let console = qemu::Console::open(&crate::live::console_log(&files))
            .map_err(|e| Problem::failed(format!("the console's log: {e}")))?;
        let console_server = crate::console::serve(id, console.clone())?;
        let mut owner = Owner {
            shared: Arc::clone(&shared),
            keeper,
            live: None,
            habits: Habits::default(),
            folding: None,
            hashing: Hashing::default(),
            merge_pace: Arc::default(),
            starved: None,
            out_of_room: None,
            tried_again: None,
            reserving: None,
            resting: false,
            shares: false,
            waiting: Vec::new(),
            labelled: Labelled::default(),
            deleted: false,
            console,
            console_server,
            _lock: lock,
        };
        owner.recover().await?;
        let (asks, queue) = mpsc::unbounded_channel();
        let working = tokio::spawn(owner.work(queue));
        tokio::spawn(async move {
            // It would do nothing any more and hold the machine: as by `kill -9`, the next worker takes over.
            if working.await.is_err_and(|error| error.is_panic()) {
                std::process::abort();
            }
        });
        Ok(Self { shared, asks })
    }

    /// The machine, as it is now.
    pub fn view(&self) -> Result<View, Problem> {
        Ok(views::view(&self.shared.rows().machine, &self.shared.files, &self.shared.moment()))
    }

    /// Its snapshots.
    pub fn tree(&self) -> Result<TreeView, Problem> {
        let rows = self.shared.rows();
        let state = self.shared.moment().state.unwrap_or(rows.machine.now.state);
        Ok(views::tree(&rows.machine, &self.shared.files, state))
    }

    /// Asks for something, and returns its job at once. The same job id again is the same request: its job is returned. A refusal
    /// is the job's `error`.
    pub fn submit(&self, job: JobId, request: Request) -> Result<Job, Problem> {
        let vm = self.shared.rows().machine.name.clone();
        let task = match self.shared.jobs.open(job, &vm, request.kind()) {
            Ok(task) => task,
            Err(known) => return Ok(*known),
        };
        let job = task.job();
        if matches!(request, Request::Stop { turn_off: true, .. }) {
            // Nobody waits for a guest that is being turned off.
            self.shared.jobs.cancel_kind("stop", task.id());
        }
        self.asks
            .send(Ask::Do(task, request))
            .map_err(|_| Problem::failed("the worker is on its way out; try again"))?;
        job.ok_or_else(|| Problem::failed("the job is gone"))
    }

    /// All jobs that are remembered, oldest first.
    pub fn jobs(&self) -> Vec<Job> {
        self.shared.jobs.all()
    }

    /// A job; waits up to `wait` for it to change from what its client has `seen` of it (its `bytes_done`), or to end.
    pub async fn job(&self, id: JobId, seen: Option<u64>, wait: Duration) -> Option<Job> {
        self.shared.jobs.wait(id, seen, wait).await
    }

    /// Asks a job to cancel.
    pub fn cancel(&self, id: JobId) -> Result<Job, Problem> {
        self.shared.jobs.cancel(id)
    }

    /// Pauses a merge, or lets it go on.
    pub fn pause(&self, id: JobId, paused: bool) -> Result<Job, Problem> {
        self.shared.jobs.pause(id, paused)
    }

    /// Limits a merge to so many bytes a second; 0 lifts the limit.
    pub fn throttle(&self, id: JobId, bytes_per_second: u64) -> Result<Job, Problem> {
        self.shared.jobs.throttle(id, bytes_per_second)
    }

    /// What deleting would do.
    pub fn plan_delete(&self, snapshot: &str, subtree: bool) -> Result<DeletePlan, Problem> {
        let rows = self.shared.rows();
        let id = rows.machine.resolve(snapshot)?;
        Ok(crate::collect::plan_delete(&rows.machine, &self.shared.files, id, subtree))
    }

    /// A picture of the screen, PNG.
    pub async fn screenshot(&self) -> Result<Vec<u8>, Problem> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.asks.send(Ask::Screenshot(reply)).map_err(|_| Problem::failed("the worker is on its way out"))?;
        answer.await.map_err(|_| Problem::failed("the worker is on its way out"))?
    }

    /// The ledger's rows.
    pub fn ledger(&self) -> serde_json::Value {
        serde_json::to_value(&*self.shared.rows()).unwrap_or_default()
    }

    /// The machine's log.
    pub fn log(&self) -> Vec<LogLine> {
        log::read(&self.shared.files)
    }

    /// Returns when nothing is left to do (no QEMU, no job, no request for a while), or the machine was deleted. A request that
    /// comes even so is still taken, until [`Handle::close`].
    pub async fn idle(&self) {
        let mut life = self.shared.life.subscribe();
        let _ = life.wait_for(|life| *life != Life::Busy).await;
    }

    /// Ends in good order, leaving QEMU running (the next worker adopts it): finishes the request under way.
    pub async fn close(&self) {
        let _ = self.asks.send(Ask::Close);
        let mut life = self.shared.life.subscribe();
        let _ = life.wait_for(|life| *life == Life::Ended).await;
    }
}

async fn take_lock(files: &Files) -> Result<Arc<dyn Store>, Problem> {
    let lock = open_or_create(files.folder(), "lock")?;
    let deadline = tokio::time::Instant::now() + LOCK_PATIENCE;
    loop {
        match lock.lock(Lock::Exclusive) {
            Ok(()) => return Ok(lock),
            Err(e) if e.kind == store::ErrorKind::Locked && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(e) if e.kind == store::ErrorKind::Locked => {
                return Err(Problem::refused("another worker has this machine"));
            }
            Err(e) => return Err(file_problem(&e)),
        }
    }
}

impl Owner {
    async fn work(mut self, mut queue: mpsc::UnboundedReceiver<Ask>) {
        self.keep_reserve();
        while !self.deleted {
            self.say_off();
            self.label();
            self.collect();
            self.hash();
            let (quiet, due) = (self.is_quiet(), self.due());
            let ask = tokio::select! {
                biased;
                ask = queue.recv() => ask.unwrap_or(Ask::Close),
                folded = Underway::next(&mut self.folding) => { self.folded(&folded); continue }
                () = self.hashing.ended() => continue,
                happening = Live::next(&mut self.live) => { self.happened(happening).await; continue }
                () = until(due) => { self.look_for_room().await; continue }
                () = tokio::time::sleep(LINGER), if quiet => {
                    self.shared.life.send_replace(Life::Idle);
                    queue.recv().await.unwrap_or(Ask::Close)
                }
            };
            self.shared.life.send_replace(Life::Busy);
            match ask {
                Ask::Do(task, request) => self.carry_out(&task, request).await,
                Ask::Screenshot(reply) => drop(reply.send(self.screenshot().await)),
                Ask::Close => break,
            }
        }
        self.stop_folding().await;
        if let Some(live) = self.live.take() {
            live.leave();
        }
        self.console_server.abort();
        if self.deleted {
            crate::live::remove_run_dir(&Root::runtime_folder(self.shared.id));
        }
        self.shared.life.send_replace(Life::Ended);
    }

    /// Whether there is nothing left to do, now or later.
    fn is_quiet(&self) -> bool {
        let waits = self.is_off_unsaid() || self.starved.is_some() || !self.machine().machine.trash.is_empty();
        self.live.is_none() && self.folding.is_none() && !self.hashing.is_under_way() && !waits
    }

    /// The files say what the rows say of them. What is being folded will say so at its end, and what is being read when that has ended.
    fn label(&mut self) {
        if self.folding.is_none() && !self.hashing.is_under_way() {
            self.keeper.label(&mut self.labelled, self.live.as_mut().map(Live::disks));
        }
    }

    async fn carry_out(&mut self, task: &Task, request: Request) {
        self.say_off();
        let rows = self.shared.rows();
        let machine = &rows.machine;
        task.running();
        if request.says_whether_it_runs() {
            self.out_of_room = None;
        }
        let outcome = match task.check().and_then(|()| admit(&request, machine.now.state, &machine.name)) {
            Ok(Admission::Already(words)) => Ok(serde_json::json!({ "said": words })),
            Ok(Admission::Go) => {
                self.stop_folding().await;
                self.resting = false;
                let outcome = self.run(task, &request).await;
                self.shared.set_moment(|moment| {
                    moment.state = None;
                    moment.doing.clear();
                });
                if let Err(problem) = &outcome {
                    self.keeper.undo(task);
                    log::write(&self.keeper.files, Some(task.id()), &format!("{}: {problem}", request.kind()));
                }
                outcome
            }
            Err(problem) => Err(problem),
        };
        if let (Request::Delete { wait: true, .. }, Ok(result)) = (&request, &outcome) {
            self.waiting.push((task.clone(), result.clone()));
            return;
        }
        self.finish(task, &outcome);
    }

    async fn run(&mut self, task: &Task, request: &Request) -> Result<serde_json::Value, Problem> {
        match request {
            Request::Start { paused } => self.start(task, *paused).await,
            Request::Stop { timeout_ms, turn_off } => {
                self.stop(task, Duration::from_millis(*timeout_ms), *turn_off).await
            }
            Request::Save => self.save(task).await,
            Request::Pause => self.pause(task).await,
            Request::Resume => self.resume(task).await,
            Request::Restart => self.restart(task).await,
            Request::Snapshot { name, note } => self.snapshot(task, name.as_deref(), note).await,
            Request::Apply { snapshot, present, start, memory } => {
                let id = self.shared.rows().machine.resolve(snapshot)?;
                self.apply(task, id, present, *start, *memory).await
            }
            Request::Revert { present, start, memory } => {
                let id = self.revert_target()?;
                self.apply(task, id, present, *start, *memory).await
            }
            Request::Delete { snapshot, subtree, .. } => self.keeper.delete(task, snapshot, *subtree),
            Request::Undo { id } => self.keeper.take_back(task, id.as_deref()),
            Request::RenameSnapshot { snapshot, name } => self.rename_snapshot(task, snapshot, name),
            Request::NoteSnapshot { snapshot, note } => self.note_snapshot(task, snapshot, note),
            Request::Set(settings) => self.set(task, settings),
            Request::Rename { name } => self.rename(task, name),
            Request::Clone { snapshot, names, note } => self.clone_machines(task, snapshot, names, note).await,
            Request::Lend { snapshot, memory } => self.lend(task, snapshot, *memory).await,
            Request::TakeOver { lent, origin, present } => self.take_over(task, *lent, origin, present).await,
            Request::Detach => self.detach(task).await,
            Request::DeleteMachine { discard } => self.delete_machine(task, *discard).await,
        }
    }

    /// The job has ended: said in the ledger, then to whoever waits.
    pub(crate) fn finish(&mut self, task: &Task, outcome: &Result<serde_json::Value, Problem>) {
        match self.deleted {
            true => task.end(outcome),
            false => self.keeper.finish(task, outcome),
        }
    }

    /// Says what is under way.
    pub(crate) fn doing(&self, what: &str) {
        self.shared.set_moment(|moment| moment.doing = vec![what.to_owned()]);
    }

    /// Says which state is on its way.
    pub(crate) fn passing(&self, state: State) {
        self.shared.set_moment(|moment| moment.state = Some(state));
    }

    /// The machine's rows.
    pub(crate) fn machine(&self) -> Arc<Rows> {
        self.shared.rows()
    }
}

async fn until(due: Option<tokio::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}
