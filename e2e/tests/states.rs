//! Every request in every state: carried out, already so, or refused with the command to type next.

use e2e::{BASE, Lab};

/// What a request leads to.
enum Outcome {
    /// It succeeds, and the machine is in this state.
    Becomes(&'static str),
    /// It is refused with a hint, and nothing has changed.
    Refused,
}
use Outcome::{Becomes, Refused};

/// The words of a request, and its outcome.
type Row = (&'static [&'static str], Outcome);

const START: &[&str] = &["vm", "start", BASE];
const STOP: &[&str] = &["vm", "stop", BASE];
const TURN_OFF: &[&str] = &["vm", "stop", BASE, "--turn-off"];
const SAVE: &[&str] = &["vm", "save", BASE];
const PAUSE: &[&str] = &["vm", "pause", BASE];
const RESUME: &[&str] = &["vm", "resume", BASE];
const RESTART: &[&str] = &["vm", "restart", BASE];
const SNAPSHOT: &[&str] = &["snapshot", "create", BASE, "another"];
const RENAME: &[&str] = &["snapshot", "rename", BASE, BACK, BACK];
const HARDWARE: &[&str] = &["vm", "set", BASE, "--memory", "160M"];
const NOTE: &[&str] = &["vm", "set", BASE, "--note", "a note"];
const DELETE: &[&str] = &["vm", "delete", BASE, "--yes"];
/// The snapshot of the saved machine, by which each row gets back to where it begins.
const BACK: &str = "as saved";

/// Puts the machine into `state` before each request, and looks what comes of it.
fn from(state: &str, rows: &[Row]) {
    let lab = Lab::with_base();
    lab.snapshot(BACK);
    for (request, outcome) in rows {
        put_into(&lab, state);
        lab.settle();
        let before = lab.json(&["vm", "ledger", BASE])["machine"].clone();
        match outcome {
            Becomes(next) => {
                lab.ok(request);
                assert_eq!(lab.state(BASE), *next, "{request:?} from {state}");
            }
            Refused => {
                let error = lab.fails(3, BASE, request);
                let hint = error["hint"].as_str().unwrap_or_default();
                assert!(hint.contains("tenby "), "{request:?} from {state}: {error}");
                assert_eq!(lab.json(&["vm", "ledger", BASE])["machine"], before, "{request:?} from {state}");
            }
        }
    }
}

/// Without booting: by way of the snapshot.
fn put_into(lab: &Lab, state: &str) {
    if lab.state(BASE) == state {
        return;
    }
    lab.ok(&["snapshot", "apply", BASE, BACK, "--discard", "--no-start"]);
    match state {
        "off" => lab.ok(TURN_OFF),
        "running" => lab.ok(START),
        "paused" => lab.ok(&["vm", "start", BASE, "--paused"]),
        _ => String::new(),
    };
    assert_eq!(lab.state(BASE), state);
}

#[test]
fn off() {
    from(
        "off",
        &[
            (STOP, Becomes("off")),
            (TURN_OFF, Becomes("off")),
            (SAVE, Refused),
            (PAUSE, Refused),
            (RESUME, Refused),
            (RESTART, Refused),
            (SNAPSHOT, Becomes("off")),
            (RENAME, Becomes("off")),
            (HARDWARE, Becomes("off")),
            (NOTE, Becomes("off")),
            (&["vm", "start", BASE, "--paused"], Becomes("paused")),
            (START, Becomes("running")),
        ],
    );
}

#[test]
fn running() {
    from(
        "running",
        &[
            (START, Becomes("running")),
            (RESUME, Becomes("running")),
            (SNAPSHOT, Becomes("running")),
            (RENAME, Becomes("running")),
            (HARDWARE, Refused),
            (NOTE, Becomes("running")),
            (DELETE, Refused),
            (PAUSE, Becomes("paused")),
            (SAVE, Becomes("saved")),
            (TURN_OFF, Becomes("off")),
            (STOP, Becomes("off")),
            (RESTART, Becomes("running")),
        ],
    );
}

#[test]
fn paused() {
    from(
        "paused",
        &[
            (START, Refused),
            (STOP, Refused),
            (PAUSE, Becomes("paused")),
            (RESTART, Refused),
            (SNAPSHOT, Becomes("paused")),
            (RENAME, Becomes("paused")),
            (HARDWARE, Refused),
            (DELETE, Refused),
            (SAVE, Becomes("saved")),
            (RESUME, Becomes("running")),
            (TURN_OFF, Becomes("off")),
        ],
    );
}

#[test]
fn saved() {
    from(
        "saved",
        &[
            (STOP, Refused),
            (SAVE, Becomes("saved")),
            (PAUSE, Refused),
            (RESUME, Refused),
            (RESTART, Refused),
            (SNAPSHOT, Becomes("saved")),
            (RENAME, Becomes("saved")),
            (HARDWARE, Refused),
            (&["vm", "start", BASE, "--paused"], Becomes("paused")),
            (START, Becomes("running")),
            (TURN_OFF, Becomes("off")),
        ],
    );
}

#[test]
fn a_machine_is_deleted_off_or_saved() {
    let lab = Lab::with_base();
    let folder = lab.machine_folder();
    lab.ok(&["vm", "delete", BASE, "--dry-run"]);
    assert_eq!(lab.state(BASE), "saved");
    lab.ok(DELETE);
    assert!(!folder.exists());
    lab.fails(4, BASE, START);
}
