//! `tenby job`

use super::words;
use crate::session::{Reader, Session, problem};
use crate::{draw, follow, json};
use api::Client;
use clap::Subcommand;
use machine::request::{Job, Problem, ProblemKind};
use machine::root::Found;
use machine::tree::JobId;

/// What can be done with jobs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List the jobs of all machines, or of one
    #[command(after_help = "Examples:\n  tenby job list\n  tenby job list web")]
    List {
        /// The machine: its name, its id, or how its id begins
        #[arg(value_parser = words::name)]
        vm: Option<String>,
    },
    /// Show how a job stands
    #[command(after_help = "Example:\n  tenby job show 3f9c")]
    Show {
        /// The job's id, or how it begins
        #[arg(value_parser = words::name)]
        id: String,
    },
    /// Wait for a job's end, with progress
    #[command(after_help = "Example:\n  tenby job watch 3f9c")]
    Watch {
        /// The job's id, or how it begins
        #[arg(value_parser = words::name)]
        id: String,
    },
    /// Ask a job to cancel
    #[command(after_help = "Example:\n  tenby job cancel 3f9c")]
    Cancel {
        /// The job's id, or how it begins
        #[arg(value_parser = words::name)]
        id: String,
    },
    /// Pause a merge
    #[command(after_help = "Example:\n  tenby job pause 3f9c")]
    Pause {
        /// The job's id, or how it begins
        #[arg(value_parser = words::name)]
        id: String,
    },
    /// Let a paused merge go on
    #[command(after_help = "Example:\n  tenby job resume 3f9c")]
    Resume {
        /// The job's id, or how it begins
        #[arg(value_parser = words::name)]
        id: String,
    },
    /// Limit the speed of a merge
    #[command(after_help = "Examples:\n  tenby job throttle 3f9c 50M\n  tenby job throttle 3f9c 0")]
    Throttle {
        /// The job's id, or how it begins
        #[arg(value_parser = words::name)]
        id: String,
        /// Bytes a second; 0 for as fast as it can
        #[arg(value_parser = words::size, value_name = "BYTES/S")]
        speed: u64,
    },
}

impl Verb {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Problem> {
        match self {
            Self::List { vm } => list(session, vm.as_deref()).await,
            Self::Show { id } => {
                let (_, job) = find(session, &id).await?;
                let now = jiff::Timestamp::now();
                session.out.show(&job, |_| format!("{}\n", draw::job_line(&job, now)));
                Ok(())
            }
            Self::Watch { id } => {
                let (found, job) = find(session, &id).await?;
                let job = if job.state.ended() { job } else { follow::watch(session, &found, job.id).await? };
                told(session, &job)
            }
            Self::Cancel { id } => {
                let (client, job) = under_way(session, &id).await?;
                asked(session, "asked to cancel", &client.cancel(job).await.map_err(problem)?);
                Ok(())
            }
            Self::Pause { id } => {
                let (client, job) = under_way(session, &id).await?;
                asked(session, "paused", &client.pause(job).await.map_err(problem)?);
                Ok(())
            }
            Self::Resume { id } => {
                let (client, job) = under_way(session, &id).await?;
                asked(session, "goes on", &client.resume(job).await.map_err(problem)?);
                Ok(())
            }
            Self::Throttle { id, speed } => {
                let (client, job) = under_way(session, &id).await?;
                let words = match speed {
                    0 => "not limited any more".to_owned(),
                    speed => format!("limited to {}/s", draw::size(speed)),
                };
                asked(session, &words, &client.throttle(job, speed).await.map_err(problem)?);
                Ok(())
            }
        }
    }
}

/// The job whose id begins like this and the worker that does it; a refusal if it has ended.
async fn under_way(session: &Session, id: &str) -> Result<(Client, JobId), Problem> {
    let (found, job) = find(session, id).await?;
    if job.state.ended() {
        return Err(Problem::refused(draw::job_line(&job, jiff::Timestamp::now())));
    }
    Ok((session.worker(&found).await?, job.id))
}

/// Tells what a job was asked.
fn asked(session: &Session, what: &str, job: &Job) {
    if session.out.json() {
        session.out.document(job);
    }
    session.out.done(&format!("{what}: {}", draw::job_line(job, jiff::Timestamp::now())));
}

/// The job, if it ended well.
pub(crate) fn ended_well(job: &Job) -> Result<&Job, Problem> {
    job.error.as_ref().map_or(Ok(job), |error| Err(error.clone()))
}

/// Tells how a job that ended well ended.
pub(crate) fn told(session: &Session, job: &Job) -> Result<(), Problem> {
    if let Some(error) = &job.error {
        return Err(error.clone());
    }
    if session.out.json() {
        session.out.document(job);
    }
    session.out.done(&draw::done(job, jiff::Timestamp::now()));
    Ok(())
}

async fn list(session: &Session, vm: Option<&str>) -> Result<(), Problem> {
    let mut jobs = match vm {
        Some(name) => session.reader(&session.find(name)?).await?.jobs().await?,
        None => session.every(Reader::jobs).await?.into_iter().flat_map(|(_, jobs)| jobs).collect(),
    };
    jobs.sort_by_key(|job| (job.started, job.id));
    session.out.show(&json::Jobs { jobs: &jobs }, |look| draw::jobs(&jobs, look));
    Ok(())
}

/// The job whose id begins like this, and its machine.
async fn find(session: &Session, prefix: &str) -> Result<(Found, Job), Problem> {
    let wanted = prefix.to_ascii_lowercase();
    let mut matches = Vec::new();
    for (found, jobs) in session.every(Reader::jobs).await? {
        for job in jobs {
            if !wanted.is_empty() && job.id.to_string().starts_with(&wanted) {
                matches.push((found.clone(), job));
            }
        }
    }
    match matches.len() {
        0 => Err(Problem::not_found(format!("no job has an id that begins with \"{prefix}\"")).hint("tenby job list")),
        1 => Ok(matches.remove(0)),
        n => {
            let mut problem =
                Problem::new(ProblemKind::Ambiguous, format!("{n} jobs have ids that begin with \"{prefix}\""));
            problem.candidates = matches.iter().map(|(_, job)| job.id.to_string()).collect();
            Err(problem.hint("tenby job list"))
        }
    }
}
