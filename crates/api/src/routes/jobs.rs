//! The jobs of the machine.

use super::{Answer, Service, query};
use crate::problem::Failure;
use crate::serve::ended;
use crate::types::{Job, JobId, Jobs, Problem};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use std::time::Duration;

/// The longest that a client may wait in one request; it asks again.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How a client waits for a job.
#[derive(Debug, Deserialize)]
pub(super) struct Waiting {
    /// How long, milliseconds.
    #[serde(default)]
    wait_ms: u64,
    /// What it has seen; see [`Handle::job`](machine::actor::Handle::job).
    seen: Option<u64>,
}

/// `GET /v1/jobs`
pub(super) async fn list(State(service): State<Service>) -> Answer<Jobs> {
    Ok(Json(Jobs { jobs: service.handle.jobs() }))
}

/// `GET /v1/jobs/{id}?wait_ms=N&seen=N`: answers when the job has changed or ended, at the latest after `wait_ms`, and early when the
/// worker ends.
pub(super) async fn show(
    State(service): State<Service>,
    Path(id): Path<String>,
    waiting: Result<Query<Waiting>, QueryRejection>,
) -> Answer<Job> {
    let Waiting { wait_ms, seen } = query(waiting)?;
    let id = parse(&id)?;
    let wait = Duration::from_millis(wait_ms).min(LONGEST_WAIT);
    let job = tokio::select! {
        job = service.handle.job(id, seen, wait) => job,
        () = ended(service.ends.clone()) => service.handle.job(id, None, Duration::ZERO).await,
    };
    job.map(Json).ok_or_else(|| unknown(&id.to_string()))
}

/// `POST /v1/jobs/{id}/cancel`
pub(super) async fn cancel(State(service): State<Service>, Path(id): Path<String>) -> Answer<Job> {
    Ok(Json(service.handle.cancel(parse(&id)?)?))
}

/// `POST /v1/jobs/{id}/pause`
pub(super) async fn pause(State(service): State<Service>, Path(id): Path<String>) -> Answer<Job> {
    Ok(Json(service.handle.pause(parse(&id)?, true)?))
}

/// `POST /v1/jobs/{id}/resume`
pub(super) async fn resume(State(service): State<Service>, Path(id): Path<String>) -> Answer<Job> {
    Ok(Json(service.handle.pause(parse(&id)?, false)?))
}

/// How fast a job may go.
#[derive(Debug, Deserialize)]
pub(super) struct Speed {
    /// 0 for as fast as it can.
    bytes_per_second: u64,
}

/// `POST /v1/jobs/{id}/throttle?bytes_per_second=N`
pub(super) async fn throttle(
    State(service): State<Service>,
    Path(id): Path<String>,
    speed: Result<Query<Speed>, QueryRejection>,
) -> Answer<Job> {
    let Speed { bytes_per_second } = query(speed)?;
    Ok(Json(service.handle.throttle(parse(&id)?, bytes_per_second)?))
}

fn parse(id: &str) -> Result<JobId, Failure> {
    uuid::Uuid::parse_str(id).map(JobId).map_err(|_| unknown(id))
}

fn unknown(id: &str) -> Failure {
    Failure(Problem::not_found(format!("no job has the id {}", id.chars().take(40).collect::<String>())))
}
