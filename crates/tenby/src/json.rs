//! The documents of `--json`, where they are more than a machine's own values. Fields are added, never renamed.

use machine::request::{Job, Problem, ProblemKind, View};
use machine::root::LogLine;
use machine::tree::JobId;
use serde::Serialize;

/// `vm list`
#[derive(Debug, Serialize)]
pub(crate) struct Machines<'a> {
    pub(crate) vms: &'a [View],
}

/// `job list`
#[derive(Debug, Serialize)]
pub(crate) struct Jobs<'a> {
    pub(crate) jobs: &'a [Job],
}

/// `vm log`
#[derive(Debug, Serialize)]
pub(crate) struct Log<'a> {
    pub(crate) log: &'a [LogLine],
}

/// `--async`
#[derive(Debug, Serialize)]
pub(crate) struct Asked {
    pub(crate) job: JobId,
}

/// Any failure.
#[derive(Debug, Serialize)]
pub(crate) struct Failure<'a> {
    error: Error<'a>,
}

#[derive(Debug, Serialize)]
struct Error<'a> {
    kind: ProblemKind,
    code: u8,
    message: &'a str,
    hint: Option<&'a str>,
    candidates: &'a [String],
}

impl<'a> Failure<'a> {
    pub(crate) fn new(problem: &'a Problem) -> Self {
        Self {
            error: Error {
                kind: problem.kind,
                code: problem.kind.code(),
                message: &problem.message,
                hint: problem.hint.as_deref(),
                candidates: &problem.candidates,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_every_field_of_the_contract() {
        let problem = Problem::refused("it runs");
        insta::assert_snapshot!(serde_json::to_string_pretty(&Failure::new(&problem)).unwrap(), @r#"
        {
          "error": {
            "kind": "refused",
            "code": 3,
            "message": "it runs",
            "hint": null,
            "candidates": []
          }
        }
        "#);
    }
}
