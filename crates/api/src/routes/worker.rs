//! The worker itself: who it is, and its end.

use super::{Answer, Service, body};
use crate::problem::Failure;
use crate::types::{Hello, Problem};
use crate::version::Version;
use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

/// Who wants the machine.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HandOver {
    /// The client's version.
    pub(crate) version: Version,
}

/// `GET /v1/hello`
pub(super) async fn hello(State(service): State<Service>) -> Answer<Hello> {
    Ok(Json(service.hello))
}

/// `POST /v1/handover`: ends this worker in favour of a newer one.
pub(super) async fn hand_over(
    State(service): State<Service>,
    wanted: Result<Json<HandOver>, JsonRejection>,
) -> Result<StatusCode, Failure> {
    let client = body(wanted)?.version;
    let own = service.hello.version;
    if client < own {
        return Err(Failure(super::too_old(client, own)));
    }
    if client == own {
        return Err(Failure(Problem::refused(format!("this worker is already tenby {own}"))));
    }
    tracing::info!("handing over to tenby {client}");
    // A full channel means that the end has been asked for already.
    let _ = service.hand_over.try_send(());
    Ok(StatusCode::ACCEPTED)
}
