//! A problem as an HTTP answer: `application/problem+json` (RFC 9457) whose extension members are the problem's own fields.

use crate::types::{Problem, ProblemKind};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// A problem, on its way out. Made by `?` from a [`Problem`].
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) Problem);

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

/// The document: RFC 9457's members beside the problem's.
#[derive(Serialize)]
struct Document<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: &'a str,
    #[serde(flatten)]
    problem: &'a Problem,
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = status(self.0.kind);
        let document = Document {
            r#type: format!("urn:tenby:{}", word(self.0.kind)),
            title: word(self.0.kind),
            status: status.as_u16(),
            detail: &self.0.message,
            problem: &self.0,
        };
        let body = serde_json::to_vec(&document).expect("a problem holds nothing but text");
        (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response()
    }
}

/// The status that a problem of this kind answers with.
fn status(kind: ProblemKind) -> StatusCode {
    match kind {
        ProblemKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        ProblemKind::Usage => StatusCode::BAD_REQUEST,
        ProblemKind::NotFound => StatusCode::NOT_FOUND,
        ProblemKind::Refused | ProblemKind::Ambiguous | ProblemKind::Cancelled => StatusCode::CONFLICT,
        ProblemKind::Damaged => StatusCode::UNPROCESSABLE_ENTITY,
    }
}

/// The kind's word, as in the document.
fn word(kind: ProblemKind) -> &'static str {
    match kind {
        ProblemKind::Failed => "failed",
        ProblemKind::Usage => "usage",
        ProblemKind::Refused => "refused",
        ProblemKind::NotFound => "not-found",
        ProblemKind::Ambiguous => "ambiguous",
        ProblemKind::Damaged => "damaged",
        ProblemKind::Cancelled => "cancelled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    async fn answer(problem: Problem) -> (StatusCode, String, serde_json::Value) {
        let response = Failure(problem).into_response();
        let status = response.status();
        let kind = response.headers()[header::CONTENT_TYPE].to_str().unwrap().to_owned();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, kind, serde_json::from_slice(&body).unwrap())
    }

    #[tokio::test]
    async fn a_problem_survives_the_journey() {
        let problem = Problem::refused("it runs").hint("tenby vm stop it");
        let (status, kind, document) = answer(problem.clone()).await;
        assert_eq!(status, StatusCode::CONFLICT);
        assert_eq!(kind, "application/problem+json");
        assert_eq!(document["title"], "refused");
        assert_eq!(document["detail"], "it runs");
        assert_eq!(serde_json::from_value::<Problem>(document).unwrap(), problem);
    }

    #[test]
    fn the_words_are_the_ones_that_serde_writes() {
        use ProblemKind::{Ambiguous, Cancelled, Damaged, Failed, NotFound, Refused, Usage};
        for kind in [Failed, Usage, Refused, NotFound, Ambiguous, Damaged, Cancelled] {
            assert_eq!(serde_json::to_value(kind).unwrap(), word(kind));
        }
    }
}
