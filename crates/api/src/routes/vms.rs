//! The machine that this worker owns.

use super::{Answer, Service, body, query};
use crate::problem::Failure;
use crate::types::{DeletePlan, Job, Log, Problem, Submit, TreeView, View};
use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::Deserialize;

/// What a delete would be of.
#[derive(Debug, Deserialize)]
pub(super) struct Deleting {
    snapshot: String,
    #[serde(default)]
    subtree: bool,
}

/// `GET /v1/vms/{vm}`
pub(super) async fn show(State(service): State<Service>, Path(vm): Path<String>) -> Answer<View> {
    service.own(&vm).map(Json)
}

/// `GET /v1/vms/{vm}/snapshots`
pub(super) async fn snapshots(State(service): State<Service>, Path(vm): Path<String>) -> Answer<TreeView> {
    service.own(&vm)?;
    Ok(Json(service.handle.tree()?))
}

/// `POST /v1/vms/{vm}/requests`
pub(super) async fn submit(
    State(service): State<Service>,
    Path(vm): Path<String>,
    asked: Result<Json<Submit>, JsonRejection>,
) -> Result<(StatusCode, Json<Job>), Failure> {
    let Submit { job, request } = body(asked)?;
    service.own(&vm)?;
    let job = service.handle.submit(job, request)?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// `GET /v1/vms/{vm}/delete-plan?snapshot=S&subtree=false`
pub(super) async fn delete_plan(
    State(service): State<Service>,
    Path(vm): Path<String>,
    deleting: Result<Query<Deleting>, QueryRejection>,
) -> Answer<DeletePlan> {
    let Deleting { snapshot, subtree } = query(deleting)?;
    service.own(&vm)?;
    Ok(Json(service.handle.plan_delete(&snapshot, subtree)?))
}

/// `GET /v1/vms/{vm}/ledger`
pub(super) async fn ledger(State(service): State<Service>, Path(vm): Path<String>) -> Answer<serde_json::Value> {
    service.own(&vm)?;
    Ok(Json(service.handle.ledger()))
}

/// `GET /v1/vms/{vm}/log`
pub(super) async fn log(State(service): State<Service>, Path(vm): Path<String>) -> Answer<Log> {
    service.own(&vm)?;
    Ok(Json(Log { log: service.handle.log() }))
}

/// `GET /v1/vms/{vm}/screenshot`
pub(super) async fn screenshot(
    State(service): State<Service>,
    Path(vm): Path<String>,
) -> Result<impl IntoResponse, Failure> {
    service.own(&vm)?;
    let picture = service.handle.screenshot().await?;
    Ok(([(header::CONTENT_TYPE, "image/png")], picture))
}

impl Service {
    /// The machine, if `vm` is its id or its name.
    fn own(&self, vm: &str) -> Result<crate::types::View, Failure> {
        let view = self.handle.view()?;
        let named = vm == view.name || uuid::Uuid::parse_str(vm).is_ok_and(|id| id == view.id.0);
        if named {
            Ok(view)
        } else {
            Err(Failure(Problem::not_found(format!("this worker's machine is \"{}\", not \"{vm}\"", view.name))))
        }
    }
}
