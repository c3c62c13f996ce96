//! Jobs: a line each.

use super::vm::seconds;
use super::{Align, Look, Table, duration, plain, short, size};
use jiff::Timestamp;
use machine::plan::quoted;
use machine::request::{Job, JobState};

/// A job's state, exactly the contract's word.
fn state(state: JobState) -> &'static str {
    match state {
        JobState::New => "new",
        JobState::Starting => "starting",
        JobState::Running => "running",
        JobState::Waiting => "waiting",
        JobState::Paused => "paused",
        JobState::Completed => "completed",
        JobState::Cancelled => "cancelled",
        JobState::Failed => "failed",
    }
}

/// How a job goes: "snapshot of Tenby: running, 42%, 61M of 145M, 3 s left".
pub(crate) fn describe(job: &Job, now: Timestamp) -> String {
    let reason = job.reason.as_ref().map(|reason| format!(" ({})", plain(reason))).unwrap_or_default();
    let state = format!("{} of {}: {}{reason}", plain(&job.kind), plain(&job.vm), state(job.state));
    match (&job.error, job.ended) {
        _ if !job.state.ended() => {
            let bytes = (job.bytes_total > 0).then(|| format!("{} of {}", size(job.bytes_done), size(job.bytes_total)));
            let parts = [Some(state), Some(format!("{}%", job.percent)), bytes, eta(job, now)];
            parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
        }
        (Some(error), _) => format!("{state}: {}", plain(&error.message)),
        (None, Some(ended)) => format!("{state} in {}", between(job.started, ended)),
        (None, None) => state,
    }
}

/// What a job that ended well has brought: its own words for people, or a sentence by its kind.
pub(crate) fn done(job: &Job, now: Timestamp) -> String {
    let vm = plain(&job.vm);
    let word = |key: &str| job.result.as_ref().and_then(|result| result.get(key)?.as_str()).map(plain);
    if let Some(said) = word("said") {
        return said;
    }
    match (job.kind.as_str(), word("state"), word("name")) {
        ("snapshot", _, Some(name)) => format!("{vm}: snapshot \"{name}\" is taken"),
        ("apply" | "revert", ..) => {
            let kept = word("kept_name").map(|name| format!("; what was is kept as \"{name}\"")).unwrap_or_default();
            format!("{vm}: the snapshot is applied{kept}{}", undoable(job, "that"))
        }
        ("delete", ..) => {
            let gone = job.result.as_ref().and_then(|result| result.get("deleted")?.as_array()).map_or(1, Vec::len);
            let what = if gone == 1 { "the snapshot is".to_owned() } else { format!("{gone} snapshots are") };
            format!("{vm}: {what} deleted{}", undoable(job, "that"))
        }
        ("delete-machine", ..) => format!("{vm} is deleted"),
        ("rename", _, Some(name)) => format!("{vm} is now named {name}"),
        ("rename", ..) => format!("{vm}: the snapshot is renamed"),
        ("note", ..) => format!("{vm}: the note is changed"),
        ("set", ..) => format!("{vm}: the settings are changed"),
        (_, Some(state), _) => format!("{vm} is {state}{}", undoable(job, "what was saved")),
        _ => describe(job, now),
    }
}

/// How long `what` a job deleted or discarded can be taken back, and how.
fn undoable(job: &Job, what: &str) -> String {
    let time = job.result.as_ref().and_then(|result| result.get("undo_for")?.as_u64()).filter(|time| *time > 0);
    let told = |time| format!("; for {} {what} can be taken back: tenby vm undo {}", seconds(time), quoted(&job.vm));
    time.map(told).unwrap_or_default()
}

/// The time from one moment to another.
fn between(from: Timestamp, to: Timestamp) -> String {
    duration((to.as_millisecond() - from.as_millisecond()).max(0) as u64)
}

/// "3 s left", if that is known.
fn eta(job: &Job, now: Timestamp) -> Option<String> {
    let left = job.eta?.as_millisecond() - now.as_millisecond();
    (left >= 1000).then(|| format!("{} left", duration(left as u64)))
}

/// Jobs, a row each.
pub(crate) fn jobs(jobs: &[Job], look: &Look) -> String {
    use Align::{Left, Right};
    let columns =
        [("ID", Left), ("VM", Left), ("KIND", Left), ("STATE", Left), ("%", Right), ("STARTED", Left), ("TOOK", Right)];
    let mut table = Table::new(&columns);
    for job in jobs {
        let took = job.ended.map(|ended| between(job.started, ended));
        table.row([
            short(job.id),
            look.cut(&plain(&job.vm), 24),
            plain(&job.kind),
            state(job.state).to_owned(),
            job.percent.to_string(),
            look.date(job.started),
            took.unwrap_or_default(),
        ]);
    }
    table.draw()
}

#[cfg(test)]
mod tests {
    use super::super::tests::look;
    use super::*;
    use machine::request::Problem;
    use machine::tree::JobId;

    fn job(state: JobState) -> Job {
        Job {
            id: JobId("3f9c0000-0000-4000-8000-000000000000".parse().unwrap()),
            vm: "Tenby".to_owned(),
            kind: "snapshot".to_owned(),
            state,
            percent: 42,
            bytes_done: 61 << 20,
            bytes_total: 145 << 20,
            eta: Some("2026-11-27T08:00:03Z".parse().unwrap()),
            reason: None,
            warnings: Vec::new(),
            error: None,
            result: None,
            started: "2026-11-27T07:59:58Z".parse().unwrap(),
            ended: None,
        }
    }

    #[test]
    fn what_a_job_has_brought() {
        use serde_json::json;
        let ended = |kind: &str, result: serde_json::Value| {
            let kind = kind.to_owned();
            done(&Job { kind, result: Some(result), ..job(JobState::Completed) }, look().now)
        };
        assert_eq!(ended("snapshot", json!({"name": "Monday"})), "Tenby: snapshot \"Monday\" is taken");
        assert_eq!(ended("start", json!({"state": "running"})), "Tenby is running");
        assert_eq!(ended("start", json!({"said": "Tenby runs already"})), "Tenby runs already");
        assert_eq!(ended("apply", json!({"kept_name": null})), "Tenby: the snapshot is applied");
        assert_eq!(
            ended("apply", json!({"kept_name": "Wednesday"})),
            "Tenby: the snapshot is applied; what was is kept as \"Wednesday\""
        );
        assert_eq!(ended("delete", json!({"deleted": ["a", "b"]})), "Tenby: 2 snapshots are deleted");
        assert_eq!(ended("delete-machine", json!({})), "Tenby is deleted");
        assert_eq!(ended("rename", json!({"name": "lab"})), "Tenby is now named lab");
        assert_eq!(ended("rename", json!(null)), "Tenby: the snapshot is renamed");
        assert_eq!(ended("note", json!(null)), "Tenby: the note is changed");
        assert_eq!(ended("set", json!(null)), "Tenby: the settings are changed");
        assert_eq!(
            ended("stop", json!({"state": "off", "undo_for": 60})),
            "Tenby is off; for 1 minute what was saved can be taken back: tenby vm undo Tenby"
        );
    }

    #[test]
    fn a_job_is_told_in_a_line() {
        let running = job(JobState::Running);
        insta::assert_snapshot!(describe(&running, look().now), @"snapshot of Tenby: running, 42%, 61M of 145M, 3.0 s left");
        let waiting = Job { reason: Some("space".to_owned()), eta: None, ..job(JobState::Waiting) };
        insta::assert_snapshot!(describe(&waiting, look().now), @"snapshot of Tenby: waiting (space), 42%, 61M of 145M");
        let failed = Job { error: Some(Problem::failed("no space left on /srv")), ..job(JobState::Failed) };
        insta::assert_snapshot!(describe(&failed, look().now), @"snapshot of Tenby: failed: no space left on /srv");
        let done = Job { ended: Some("2026-11-27T08:00:00Z".parse().unwrap()), ..job(JobState::Completed) };
        insta::assert_snapshot!(describe(&done, look().now), @"snapshot of Tenby: completed in 2.0 s");
        insta::assert_snapshot!(jobs(&[done, running], &look()), @r"
        ID        VM     KIND      STATE       %  STARTED        TOOK
        3f9c0000  Tenby  snapshot  completed  42  27 Nov 07:59  2.0 s
        3f9c0000  Tenby  snapshot  running    42  27 Nov 07:59
        ");
    }
}
