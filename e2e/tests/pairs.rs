//! Every request while every other is under way: it waits for its turn, and then has the answer of the state that it finds. One table says
//! both (see `machine/src/admit.rs`).

use e2e::{BASE, Lab, Witness, wait_for};
use serde_json::Value;

/// The snapshot of the saved machine, by which each pair gets to where it begins.
const BACK: &str = "as saved";
/// A snapshot that may go.
const SPARE: &str = "spare";

/// A request, and what state it leads to from off, running, paused and saved; `None` where it is refused.
struct Verb {
    name: &'static str,
    words: &'static [&'static str],
    leads_to: [Option<&'static str>; 4],
}

const STATES: [&str; 4] = ["off", "running", "paused", "saved"];
const ANY: [Option<&str>; 4] = [Some("off"), Some("running"), Some("paused"), Some("saved")];

const VERBS: [Verb; 15] = [
    Verb {
        name: "start",
        words: &["vm", "start", BASE],
        leads_to: [Some("running"), Some("running"), None, Some("running")],
    },
    Verb { name: "stop", words: &["vm", "stop", BASE], leads_to: [Some("off"), Some("off"), None, None] },
    Verb { name: "turn off", words: &["vm", "stop", BASE, "--turn-off"], leads_to: [Some("off"); 4] },
    Verb { name: "save", words: &["vm", "save", BASE], leads_to: [None, Some("saved"), Some("saved"), Some("saved")] },
    Verb { name: "pause", words: &["vm", "pause", BASE], leads_to: [None, Some("paused"), Some("paused"), None] },
    Verb { name: "resume", words: &["vm", "resume", BASE], leads_to: [None, Some("running"), Some("running"), None] },
    Verb { name: "restart", words: &["vm", "restart", BASE], leads_to: [None, Some("running"), None, None] },
    Verb { name: "snapshot", words: &["snapshot", "create", BASE, "new"], leads_to: ANY },
    Verb {
        name: "apply and keep",
        words: &["snapshot", "apply", BASE, BACK, "--keep-as", "kept"],
        leads_to: [Some("saved"), Some("running"), Some("saved"), Some("saved")],
    },
    Verb {
        name: "apply and discard",
        words: &["snapshot", "apply", BASE, BACK, "--discard"],
        leads_to: [Some("saved"), Some("running"), Some("saved"), Some("saved")],
    },
    Verb { name: "delete", words: &["snapshot", "delete", BASE, SPARE], leads_to: ANY },
    Verb { name: "undo", words: &["vm", "undo", BASE], leads_to: ANY },
    Verb { name: "rename", words: &["snapshot", "rename", BASE, BACK, BACK], leads_to: ANY },
    Verb { name: "note", words: &["vm", "set", BASE, "--note", "a note"], leads_to: ANY },
    Verb { name: "hardware", words: &["vm", "set", BASE, "--cpus", "1"], leads_to: [Some("off"), None, None, None] },
];

impl Verb {
    fn of(name: &str) -> &'static Self {
        VERBS.iter().find(|verb| verb.name == name).expect("a verb of the table")
    }

    fn from(&self, state: &str) -> Option<&'static str> {
        self.leads_to[STATES.iter().position(|known| *known == state).expect("a state")]
    }

    /// Asks for it, and gives its job.
    fn submit(&self, lab: &Lab) -> String {
        let job = lab.json(&[self.words, &["--async"]].concat());
        job["job"].as_str().expect("a job").to_owned()
    }
}

/// A saved machine with a snapshot that may go and one that can be taken back.
fn lab() -> Lab {
    let lab = Lab::with_base();
    lab.snapshot(BACK);
    lab
}

/// Without booting: by way of the snapshot.
fn put_into(lab: &Lab, state: &str) {
    lab.ok(&["vm", "set", BASE, "--undo-for", "0"]);
    lab.ok(&["snapshot", "apply", BASE, BACK, "--discard", "--no-start"]);
    for snapshot in lab.tree()["snapshots"].as_array().expect("a list").iter().filter(|one| one["name"] != BACK) {
        lab.ok(&["snapshot", "delete", BASE, snapshot["id"].as_str().expect("an id")]);
    }
    lab.ok(&["vm", "set", BASE, "--undo-for", "1h"]);
    lab.snapshot(SPARE);
    // Twice, for it is taken back twice.
    for _ in 0..2 {
        let lost = lab.snapshot("lost");
        lab.ok(&["snapshot", "delete", BASE, &lost]);
    }
    match state {
        "off" => lab.ok(&["vm", "stop", BASE, "--turn-off"]),
        "running" => lab.ok(&["vm", "start", BASE]),
        "paused" => lab.ok(&["vm", "start", BASE, "--paused"]),
        _ => String::new(),
    };
    assert_eq!(lab.state(BASE), state);
}

/// How a job ended.
fn end_of(lab: &Lab, job: &str) -> Value {
    wait_for("a job to end", || {
        let job = lab.json(&["job", "show", job]);
        (!job["ended"].is_null()).then_some(job)
    })
}

#[track_caller]
fn assert_done(job: &Value, what: &str) {
    assert_eq!(job["state"], "completed", "{what}: {job}");
}

#[track_caller]
fn assert_failed(job: &Value, kind: &str, what: &str) {
    assert_eq!((&job["state"], &job["error"]["kind"]), (&"failed".into(), &kind.into()), "{what}: {job}");
    assert!(job["error"]["hint"].as_str().is_some_and(|hint| hint.contains("tenby ")), "{what}: {job}");
}

/// Two clients, one just after the other: the first request is under way when the second comes.
fn while_under_way(first: &str, state: &str) {
    let lab = lab();
    let first = Verb::of(first);
    let then = first.from(state).expect("it is carried out");
    for second in &VERBS {
        let what = format!("{} while {} is under way", second.name, first.name);
        put_into(&lab, state);
        let jobs = [first, second].map(|verb| verb.submit(&lab));
        let [one, two] = jobs.map(|job| end_of(&lab, &job));
        // Nobody waits for a guest that is being turned off.
        let cut_short = first.name == "stop" && second.name == "turn off" && one["state"] == "cancelled";
        if !cut_short {
            assert_done(&one, &what);
        }
        let next = second.from(then);
        match next {
            _ if (first.name, second.name) == ("delete", "delete") => assert_failed(&two, "not-found", &what),
            Some(_) => assert_done(&two, &what),
            None => assert_failed(&two, "refused", &what),
        }
        assert_eq!(lab.state(BASE), next.unwrap_or(then), "{what}");
    }
    lab.settle();
    lab.assert_tidy();
    put_into(&lab, "running");
    prove(&mut lab.witness(BASE));
}

fn prove(witness: &mut Witness) {
    witness.resync();
    witness.prove();
}

macro_rules! pairs {
    ($($name:ident: $verb:literal from $state:literal;)+) => {
        $(#[test] fn $name() { while_under_way($verb, $state); })+
    };
}

pairs! {
    start_from_saved: "start" from "saved";
    stop_of_a_running_machine: "stop" from "running";
    turning_off: "turn off" from "running";
    save_of_a_running_machine: "save" from "running";
    pause: "pause" from "running";
    resume: "resume" from "paused";
    snapshot_of_a_running_machine: "snapshot" from "running";
    apply_and_keep_on_a_running_machine: "apply and keep" from "running";
    apply_and_discard_on_a_running_machine: "apply and discard" from "running";
    delete_on_a_running_machine: "delete" from "running";
    undo_on_a_saved_machine: "undo" from "saved";
    settings_of_a_machine_that_is_off: "hardware" from "off";
}

/// A merge gives way to each request, and is done afterwards.
#[test]
fn while_merging() {
    let lab = lab();
    // What it could take back would be no garbage.
    for second in VERBS.iter().filter(|verb| verb.name != "undo") {
        put_into(&lab, "running");
        lab.ok(&["vm", "set", BASE, "--undo-for", "0"]);
        let mut witness = lab.witness(BASE);
        witness.resync();
        let gone = lab.snapshot("gone");
        witness.ask("fill-disk vda 16M 8 3");
        lab.snapshot("new");
        let merging = || {
            lab.json(&["vm", "show", BASE])["doing"].as_array().is_some_and(|doing| doing.contains(&"merging".into()))
        };
        lab.ok(&["snapshot", "delete", BASE, &gone, "--async"]);
        // It may be too fast to be seen; what counts is the end.
        let _seen = merging();
        drop(witness);
        if second.name == "undo" {
            // Nothing can be taken back here: see the other tests.
            continue;
        }
        let job = end_of(&lab, &second.submit(&lab));
        let next = second.from("running");
        match next {
            Some(_) => assert_done(&job, second.name),
            None => assert_failed(&job, "refused", second.name),
        }
        assert_eq!(lab.state(BASE), next.unwrap_or("running"), "{}", second.name);
        lab.settle();
        lab.assert_tidy();
    }
    lab.ok(&["snapshot", "apply", BASE, BACK, "--discard", "--start"]);
    prove(&mut lab.witness(BASE));
}
