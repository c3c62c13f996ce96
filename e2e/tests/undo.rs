//! What was deleted or discarded comes back as it was, as long as it is kept.

use e2e::{BASE, Lab, Witness, wait_for};
use serde_json::Value;

fn mark(witness: &mut Witness, day: &str) {
    witness.ask(&format!("set day {day}"));
    witness.ask(&format!("write vda 4M {day}"));
}

#[track_caller]
fn assert_day(witness: &mut Witness, day: &str) {
    witness.resync();
    witness.prove();
    assert_eq!((&witness.ask("get day")["value"], &witness.ask("read vda 4M")["text"]), (&day.into(), &day.into()));
}

/// What can be taken back, oldest first.
fn undo(lab: &Lab) -> Vec<Value> {
    lab.tree()["undo"].as_array().expect("a list").clone()
}

fn names(lab: &Lab) -> Vec<String> {
    let tree = lab.tree();
    let snapshots = tree["snapshots"].as_array().expect("a list");
    snapshots.iter().map(|snapshot| snapshot["name"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn what_was_deleted_or_discarded_comes_back() {
    let (lab, mut witness) = Lab::running();
    lab.fails(4, "could take back", &["vm", "undo", BASE]);
    lab.ok(&["vm", "set", BASE, "--undo-for", "1h"]);
    mark(&mut witness, "Monday");
    lab.snapshot("Monday");
    mark(&mut witness, "Tuesday");
    let tuesday = lab.snapshot("Tuesday");
    mark(&mut witness, "Wednesday");
    let before = lab.tree();

    lab.ok(&["snapshot", "delete", BASE, "Monday", "--subtree", "--wait"]);
    let tree = lab.tree();
    assert_eq!(
        (&tree["snapshots"], &tree["pending"], &tree["now"]["parent"]),
        (&[0; 0].into(), &[0; 0].into(), &Value::Null)
    );
    let [deleted] = undo(&lab).try_into().expect("one");
    assert_eq!(deleted["what"], "deleted Monday and Tuesday");
    assert!(deleted["bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{deleted}");
    lab.kill_worker();
    let said = lab.ok(&["vm", "undo", BASE, deleted["id"].as_str().expect("an id")]);
    assert!(said.contains("2 snapshots are back"), "{said}");
    let after = lab.tree();
    let hung = |tree: &Value| {
        tree["snapshots"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|s| (s["id"].clone(), s["parent"].clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!((hung(&after), &after["now"]["parent"]), (hung(&before), &tuesday.clone().into()));

    // The present of a running machine comes back without its memory; of a saved one with it.
    lab.ok(&["snapshot", "apply", BASE, "Monday", "--discard"]);
    assert_day(&mut witness, "Monday");
    let said = lab.ok(&["vm", "undo", BASE]);
    assert!(said.contains("before Monday") && said.contains("as after a power cut"), "{said}");
    lab.ok(&["snapshot", "apply", BASE, "Tuesday", "--discard"]);
    assert_day(&mut witness, "Tuesday");
    mark(&mut witness, "Thursday");
    lab.ok(&["vm", "save", BASE]);
    lab.ok(&["snapshot", "apply", BASE, "Monday", "--discard", "--no-start"]);
    let said = lab.ok(&["vm", "undo", BASE]);
    assert!(said.contains("before Monday") && said.contains("with its memory"), "{said}");
    let back = lab.tree()["snapshots"].as_array().and_then(|all| all.last().cloned()).expect("it is there");
    lab.ok(&["snapshot", "apply", BASE, back["id"].as_str().expect("an id"), "--discard", "--start"]);
    assert_day(&mut witness, "Thursday");

    // Turned off, what was saved comes back as well; what is no other than a snapshot needs not.
    mark(&mut witness, "Friday");
    lab.ok(&["vm", "save", BASE]);
    let said = lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    assert!(said.contains("what was saved can be taken back"), "{said}");
    let said = lab.ok(&["vm", "undo", BASE]);
    assert!(said.contains("before it was turned off") && said.contains("with its memory"), "{said}");
    lab.ok(&["snapshot", "apply", BASE, "before it was turned off", "--discard", "--no-start"]);
    let kept = undo(&lab).len();
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    assert_eq!(undo(&lab).len(), kept);
    lab.ok(&["snapshot", "apply", BASE, "before it was turned off", "--discard", "--start"]);
    assert_day(&mut witness, "Friday");

    // A shorter time counts for what is there already.
    lab.ok(&["snapshot", "delete", BASE, "Tuesday"]);
    lab.ok(&["vm", "set", BASE, "--undo-for", "0"]);
    wait_for("what is kept to go", || undo(&lab).is_empty().then_some(()));
    lab.fails(4, "could take back", &["vm", "undo", BASE]);
    lab.settle();
    lab.assert_tidy();
    witness.prove();
}

/// A removed disk is attached again, with what it held, and only while the machine is off.
#[test]
fn a_removed_disk_comes_back() {
    let (lab, mut witness) = Lab::running();
    witness.ask("write vdb 4M kept");
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.ok(&["vm", "set", BASE, "--undo-for", "1h", "--remove-disk", "disk1"]);
    lab.ok(&["vm", "start", BASE]);
    lab.fails(3, "is not off", &["vm", "undo", BASE]);
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.ok(&["vm", "undo", BASE]);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    assert_eq!(witness.ask("read vdb 4M")["text"], "kept");
    lab.assert_tidy();
}

/// On a full disk the oldest goes first, and the log says so.
#[test]
fn a_full_disk_takes_what_could_be_taken_back() {
    if !rustix::process::getuid().is_root() {
        // Only root can make a small file system.
        return;
    }
    let lab = Lab::with_base();
    let small = lab.on_a_small_disk("256m");
    lab.ok(&["vm", "set", BASE, "--undo-for", "1h"]);
    for name in ["Monday", "Tuesday"] {
        lab.snapshot(name);
        lab.ok(&["snapshot", "delete", BASE, name]);
    }
    assert_eq!(undo(&lab).len(), 2);
    small.fill_up();
    wait_for("the oldest to go", || (undo(&lab).len() < 2).then_some(()));
    small.make_room();
    assert!(undo(&lab).iter().all(|kept| kept["what"] == "deleted Tuesday"));
    let log = lab.ok(&["vm", "log", BASE]);
    assert!(log.contains("deleted Monday: cannot be taken back any more, the disk is full"), "{log}");
    assert!(names(&lab).is_empty());

    // There is no room to keep what was saved either; the machine is turned off nevertheless.
    lab.ok(&["vm", "start", BASE]);
    lab.ok(&["vm", "save", BASE]);
    small.fill_up();
    let output = lab.tenby(&["vm", "stop", BASE, "--turn-off"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(output.stderr.contains("what was saved cannot be taken back"), "{}", output.stderr);
    assert_eq!(lab.state(BASE), "off");
    assert!(undo(&lab).iter().all(|kept| kept["what"] != "discarded what was saved"));
    small.make_room();
    lab.settle();
    lab.assert_tidy();
}
