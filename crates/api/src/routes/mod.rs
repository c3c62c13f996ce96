//! The routes, by noun.

mod jobs;
mod vms;
mod worker;

pub(crate) use worker::HandOver;

use crate::problem::Failure;
use crate::types::{Hello, Problem};
use crate::version::Version;
use axum::Router;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Json, Query, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use machine::actor::Handle;
use tokio::sync::{mpsc, watch};

/// The header in which a client names its version.
pub(crate) const VERSION: &str = "tenby-version";

/// The longest request that is read: a machine's settings with every disk it can have are far below.
const LONGEST_BODY: usize = 1 << 20;

/// What the routes answer from.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) handle: Handle,
    pub(crate) hello: Hello,
    pub(crate) ends: watch::Receiver<bool>,
    pub(crate) hand_over: mpsc::Sender<()>,
}

/// What a route returns.
type Answer<T> = Result<Json<T>, Failure>;

pub(crate) fn router(service: Service) -> Router {
    Router::new()
        .route("/v1/hello", get(worker::hello))
        .route("/v1/handover", post(worker::hand_over))
        .route("/v1/vms/{vm}", get(vms::show))
        .route("/v1/vms/{vm}/snapshots", get(vms::snapshots))
        .route("/v1/vms/{vm}/requests", post(vms::submit))
        .route("/v1/vms/{vm}/delete-plan", get(vms::delete_plan))
        .route("/v1/vms/{vm}/ledger", get(vms::ledger))
        .route("/v1/vms/{vm}/log", get(vms::log))
        .route("/v1/vms/{vm}/screenshot", get(vms::screenshot))
        .route("/v1/jobs", get(jobs::list))
        .route("/v1/jobs/{id}", get(jobs::show))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel))
        .route("/v1/jobs/{id}/pause", post(jobs::pause))
        .route("/v1/jobs/{id}/resume", post(jobs::resume))
        .route("/v1/jobs/{id}/throttle", post(jobs::throttle))
        .fallback(no_such_route)
        .layer(from_fn_with_state(service.clone(), refuse_older_clients))
        .layer(DefaultBodyLimit::max(LONGEST_BODY))
        .with_state(service)
}

async fn no_such_route(request: Request) -> Failure {
    Failure(Problem::not_found(format!("no such route: {} {}", request.method(), request.uri().path())))
}

/// An older client might misread what it is told. (One that names no version is a person with curl.)
async fn refuse_older_clients(State(service): State<Service>, request: Request, next: Next) -> Response {
    let client = request
        .headers()
        .get(VERSION)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse::<Version>().ok());
    match client {
        Some(client) if client < service.hello.version => {
            Failure(too_old(client, service.hello.version)).into_response()
        }
        _ => next.run(request).await,
    }
}

/// The refusal of an older client.
pub(crate) fn too_old(client: Version, worker: Version) -> Problem {
    Problem::refused(format!("this is tenby {client}, but the machine's worker is a newer one, {worker}"))
        .hint(format!("install tenby {worker}, or turn the machine off with it; then this one can serve it"))
}

/// The body, or why it is none.
fn body<T>(body: Result<Json<T>, JsonRejection>) -> Result<T, Failure> {
    body.map(|Json(value)| value).map_err(|rejection| Failure(Problem::usage(rejection.body_text())))
}

/// The query, or why it is none.
fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Failure> {
    query.map(|Query(value)| value).map_err(|rejection| Failure(Problem::usage(rejection.body_text())))
}
