//! Asks a machine for something and stays until it has ended: shows how it goes, passes Ctrl-C on, rejoins after a worker's death. SIGTERM ends it
//! before: what was asked for goes on.
//!
//! The job's id is chosen here, so that asking twice is asking once: after a worker's death the same request is sent to the next one.
//! If it was recorded, its job is told (undone by recovery, or completed); if not, it has changed nothing and is carried out now.

use crate::out::Progress;
use crate::session::{Session, cancelled, problem};
use crate::work::{Wish, Wishes};
use api::{Client, Error};
use machine::request::{Job, JobState, Problem, ProblemKind, Request};
use machine::root::Found;
use machine::tree::JobId;
use std::pin::pin;
use std::time::{Duration, Instant};

/// How long one question to the worker waits for news.
const NEWS: Duration = Duration::from_secs(10);

/// How many workers may die under one request before it is given up.
const LIVES: u32 = 5;

/// Asks for `request` and waits for its end. A failed job is an error.
pub(crate) async fn ask(session: &Session, found: &Found, request: Request) -> Result<Job, Problem> {
    let mut asking = Asking::new(session, found, JobId::new(), Some(request))?;
    asking.see_through().await
}

/// Asks for `request` and returns as soon as it is a job.
pub(crate) async fn submit(session: &Session, found: &Found, request: Request) -> Result<Job, Problem> {
    let client = session.worker(found).await?;
    let job = JobId::new();
    match client.submit(found.id, job, request.clone()).await {
        Err(Error::Gone(_)) => {
            let client = session.worker(found).await?;
            client.submit(found.id, job, request).await.map_err(problem)
        }
        answer => answer.map_err(problem),
    }
}

/// Waits for the end of a job that somebody asked for.
pub(crate) async fn watch(session: &Session, found: &Found, job: JobId) -> Result<Job, Problem> {
    Asking::new(session, found, job, None)?.see_through().await
}

/// A request under way.
struct Asking<'a> {
    session: &'a Session,
    found: &'a Found,
    id: JobId,
    /// What to send again to the next worker; `None` if the job is somebody else's.
    request: Option<Request>,
    wishes: Wishes,
    /// Whether its user has asked for it to be cancelled.
    cancelling: bool,
    progress: Progress,
    deaths: u32,
    /// The last that was heard of the job.
    last: Option<Job>,
}

/// What happened first.
#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack")]
enum Event {
    News(Result<Job, Error>),
    Wish(Wish),
}

impl<'a> Asking<'a> {
    fn new(session: &'a Session, found: &'a Found, id: JobId, request: Option<Request>) -> Result<Self, Problem> {
        Ok(Self {
            session,
            found,
            id,
            request,
            wishes: Wishes::hear()?,
            cancelling: false,
            progress: session.out.progress(),
            deaths: 0,
            last: None,
        })
    }

    async fn see_through(&mut self) -> Result<Job, Problem> {
        let Some(mut client) = self.join().await? else { return self.vanished() };
        if self.cancelling && !self.ended() {
            self.cancel(&client).await?;
        }
        let mut asked_at = Instant::now();
        loop {
            if let Some(job) = self.last.as_ref().filter(|job| job.state.ended()) {
                return verdict(job.clone());
            }
            let seen = self.last.as_ref().map(seen);
            let event = tokio::select! {
                news = client.job(self.id, seen, NEWS) => Event::News(news),
                wish = self.wishes.next() => Event::Wish(wish),
            };
            match event {
                Event::News(Ok(job)) => {
                    if !job.state.ended() {
                        // An answer that comes at once with nothing new must not become a storm.
                        tokio::time::sleep(Duration::from_millis(20).saturating_sub(asked_at.elapsed())).await;
                        asked_at = Instant::now();
                    }
                    self.heard(job);
                }
                Event::News(Err(Error::Gone(error))) => {
                    tracing::info!("rejoining: {error}");
                    self.died(&error)?;
                    match self.join().await? {
                        Some(next) => client = next,
                        None => return self.vanished(),
                    }
                    if self.cancelling && !self.ended() {
                        self.cancel(&client).await?;
                    }
                }
                Event::News(Err(error)) => return Err(problem(error)),
                Event::Wish(Wish::Cancel) if !self.cancelling => self.cancel(&client).await?,
                Event::Wish(_) => return Err(self.left_running()),
            }
        }
    }

    /// Connects, and asks (again). `None` if the machine is no more.
    async fn join(&mut self) -> Result<Option<Client>, Problem> {
        loop {
            let client = tokio::select! {
                client = self.session.worker(self.found) => client,
                _ = self.wishes.next() => return Err(self.interrupted_before()),
            };
            let client = match client {
                Err(problem)
                    if problem.kind == ProblemKind::NotFound && self.deletes_machine() && self.last.is_some() =>
                {
                    return Ok(None);
                }
                client => client?,
            };
            match self.ask(&client).await? {
                Ok(job) => {
                    self.heard(job);
                    return Ok(Some(client));
                }
                Err(Error::Gone(error)) => self.died(&error)?,
                Err(Error::Problem(unknown)) if self.cancelling && unknown.kind == ProblemKind::NotFound => {
                    return Err(cancelled("cancelled before it began; nothing has changed"));
                }
                Err(error) => return Err(problem(error)),
            }
        }
    }

    /// Sends the request, or asks what became of it.
    async fn ask(&mut self, client: &Client) -> Result<Result<Job, Error>, Problem> {
        let (vm, id, request) = (self.found.id, self.id, self.request.clone().filter(|_| !self.cancelling));
        let asking = async {
            match request {
                Some(request) => client.submit(vm, id, request).await,
                // What its user has given up is not asked for again: if nobody knows the job, nothing has changed.
                None => client.job(id, None, Duration::ZERO).await,
            }
        };
        let mut asking = pin!(asking);
        loop {
            tokio::select! {
                answer = &mut asking => return Ok(answer),
                wish = self.wishes.next() => {
                    if self.cancelling || wish == Wish::Leave {
                        return Err(self.left_running());
                    }
                    // What is on its way to the worker may be carried out: only its answer tells.
                    self.give_up();
                }
            }
        }
    }

    fn ended(&self) -> bool {
        self.last.as_ref().is_some_and(|job| job.state.ended())
    }

    fn heard(&mut self, job: Job) {
        let said = self.last.as_ref().map_or(0, |last| last.warnings.len());
        job.warnings.iter().skip(said).for_each(|warning| self.session.out.note(warning));
        self.progress.job(&job);
        self.last = Some(job);
    }

    /// Asks the job to cancel. Whatever the answer, the job itself tells how it ends.
    async fn cancel(&mut self, client: &Client) -> Result<(), Problem> {
        self.give_up();
        tokio::select! {
            answer = client.cancel(self.id) => {
                if let Err(Error::Problem(problem)) = answer {
                    self.session.out.note(&format!("it cannot be cancelled: {problem}"));
                }
                Ok(())
            }
            _ = self.wishes.next() => Err(self.left_running()),
        }
    }

    fn give_up(&mut self) {
        if !self.cancelling {
            self.cancelling = true;
            self.session.out.note("cancelling; once more leaves it running");
        }
    }

    fn deletes_machine(&self) -> bool {
        matches!(self.request, Some(Request::DeleteMachine { .. }))
    }

    /// The machine went, and its worker with it, before the last word was heard.
    fn vanished(&self) -> Result<Job, Problem> {
        let job = self.last.clone().ok_or_else(|| Problem::not_found(format!("{} is gone", self.found.name)))?;
        Ok(Job { state: JobState::Completed, percent: 100, ..job })
    }

    fn interrupted_before(&self) -> Problem {
        if self.last.is_none() && !self.cancelling {
            return cancelled(format!("cancelled; nothing was asked of {}", self.found.name));
        }
        self.left_running()
    }

    fn left_running(&self) -> Problem {
        cancelled(format!("left running: job {}", self.id)).hint(format!("tenby job watch {}", self.id))
    }

    /// One more worker has died under this request: too many, if it is what kills them.
    fn died(&mut self, error: &std::io::Error) -> Result<(), Problem> {
        self.deaths += 1;
        if self.deaths < LIVES {
            return Ok(());
        }
        let log = self.session.root.machine_folder(self.found.id).join("log/worker.log");
        let name = &self.found.name;
        Err(Problem::failed(format!("the worker of {name} died {LIVES} times over this request ({error})"))
            .hint(format!("less {}", log.display())))
    }
}

/// What the worker is told of what was seen of a job; see [`machine::actor::Handle::job`].
fn seen(job: &Job) -> u64 {
    job.bytes_done
}

/// An ended job, or its error.
fn verdict(job: Job) -> Result<Job, Problem> {
    match job.state {
        JobState::Failed => {
            Err(job.error.unwrap_or_else(|| Problem::failed(format!("the {} of {} failed", job.kind, job.vm))))
        }
        JobState::Cancelled => {
            let told = job.error.filter(|problem| problem.kind == ProblemKind::Cancelled);
            Err(told.unwrap_or_else(|| {
                cancelled(format!("the {} of {} was cancelled; nothing has changed", job.kind, job.vm))
            }))
        }
        _ => Ok(job),
    }
}
