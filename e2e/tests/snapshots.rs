//! Snapshots of a machine in each state, apply in both ways, and the three fates of a differencing disk.

use e2e::{BASE, Lab, Witness, qemu_10, qemu_72, wait_for};
use serde_json::Value;
use std::time::Duration;

/// Leaves a mark in RAM and on both disks.
fn mark(witness: &mut Witness, day: &str) {
    witness.ask(&format!("set day {day}"));
    witness.ask(&format!("write vda 4M {day}"));
    witness.ask(&format!("write vdb 8M {day}"));
}

/// What RAM and the disks say, and that they agree in all else.
fn marks(witness: &mut Witness) -> (Value, String, String) {
    witness.resync();
    witness.prove();
    let mut text = |place| witness.ask(&format!("read {place}"))["text"].as_str().expect("a text").to_owned();
    let disks = (text("vda 4M"), text("vdb 8M"));
    (witness.ask("get day")["value"].clone(), disks.0, disks.1)
}

#[track_caller]
fn assert_day(witness: &mut Witness, day: &str) {
    assert_eq!(marks(witness), (Value::from(day), day.to_owned(), day.to_owned()));
}

/// The seed's week, on one QEMU.
fn a_week(lab: &Lab) {
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    witness.ask("fill-ram 16 1");
    witness.ask("journal pace 5");
    mark(&mut witness, "Monday");
    let monday = lab.snapshot("Monday");
    assert_day(&mut witness, "Monday");
    mark(&mut witness, "Tuesday");
    lab.snapshot("Tuesday");
    mark(&mut witness, "Wednesday");

    lab.ok(&["snapshot", "apply", BASE, "Monday", "--keep-as", "Wednesday"]);
    assert_eq!(lab.state(BASE), "running");
    assert_day(&mut witness, "Monday");
    mark(&mut witness, "Thursday");
    let thursday = lab.snapshot("Thursday");
    mark(&mut witness, "Friday");

    for (name, day) in
        [("Wednesday", "Wednesday"), ("Thursday", "Thursday"), ("Tuesday", "Tuesday"), ("Monday", "Monday")]
    {
        lab.ok(&["snapshot", "apply", BASE, name, "--discard"]);
        assert_day(&mut witness, day);
        assert_eq!(witness.ask("sum-ram")["ok"], true);
    }
    let tree = lab.tree();
    assert_eq!(tree["now"]["parent"], monday.as_str());
    let parent_of = |id: &str| {
        let all = tree["snapshots"].as_array().expect("a list");
        all.iter().find(|one| one["id"] == id).expect("it is there")["parent"].clone()
    };
    assert_eq!(parent_of(&thursday), monday.as_str());
    assert_eq!(parent_of(&monday), Value::Null);
    lab.settle();
    lab.assert_tidy();
}

#[test]
fn a_week_on_qemu_7_2() {
    let lab = Lab::empty().on_qemu(qemu_72());
    lab.create_guest(BASE);
    a_week(&lab);
}

#[test]
fn a_week_on_qemu_10_0() {
    let lab = Lab::empty().on_qemu(qemu_10());
    lab.create_guest(BASE);
    a_week(&lab);
}

/// Where QEMU cannot track memory.
#[test]
fn a_week_of_an_ordinary_user() {
    for qemu in [qemu_72(), qemu_10()] {
        let lab = Lab::empty().on_qemu(qemu).for_ordinary_users();
        lab.create_guest(BASE);
        a_week(&lab);
    }
}

/// The guest runs on while its memory is stored, and nothing that it does meanwhile is in the snapshot.
#[test]
fn a_busy_guest_is_caught_at_one_point() {
    let (lab, witness) = Lab::running();
    a_busy_guest(&lab, witness);
}

/// It is held up for what it changes, and is caught all the same.
#[test]
fn a_busy_guest_of_an_ordinary_user() {
    let lab = Lab::with_base().for_ordinary_users();
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    a_busy_guest(&lab, witness);
}

/// Cancelled before or after the disks have taken their new leaves: nothing that is written later is missing.
#[test]
fn a_cancelled_snapshot_of_an_ordinary_user() {
    let lab = Lab::with_base().for_ordinary_users();
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    witness.ask("journal pace 1");
    for round in 0..6 {
        let job = lab.json(&["snapshot", "create", BASE, "never", "--async"]);
        std::thread::sleep(Duration::from_millis(round * 30));
        lab.tenby(&["job", "cancel", job["job"].as_str().expect("a job")]);
        lab.tenby(&["job", "watch", job["job"].as_str().expect("a job")]);
        mark(&mut witness, &format!("round {round}"));
        lab.settle();
        lab.assert_tidy();
        witness.prove();
    }
    lab.kill_worker();
    assert_day(&mut witness, "round 5");
    lab.settle();
    lab.assert_tidy();
    assert_eq!(lab.json(&["vm", "check", BASE])["clean"], true);
}

fn a_busy_guest(lab: &Lab, mut witness: Witness) {
    witness.ask("fill-ram 24 9");
    witness.ask("dirty 8 4000");
    witness.ask("journal pace 0");
    for round in 0..4 {
        witness.ask(&format!("set round {round}"));
        lab.snapshot(&format!("round {round}"));
        witness.prove();
    }
    for round in [2, 0, 3, 1] {
        lab.ok(&["snapshot", "apply", BASE, &format!("round {round}"), "--discard"]);
        witness.resync();
        witness.prove();
        assert_eq!(witness.ask("get round")["value"], round.to_string());
        assert_eq!(witness.ask("sum-ram")["ok"], true);
    }
}

#[test]
fn of_a_machine_that_is_off() {
    let lab = Lab::with_base();
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.snapshot("off");
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    mark(&mut witness, "later");
    let before = witness.nonce();
    lab.ok(&["snapshot", "apply", BASE, "off", "--discard", "--no-start"]);
    assert_eq!(lab.state(BASE), "off");
    let snapshot = lab.json(&["snapshot", "show", BASE, "off"]);
    assert_eq!((&snapshot["memory"], &snapshot["vm_state"]), (&Value::Bool(false), &Value::from("off")));
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    assert_ne!(witness.resync()["nonce"], before.as_str());
    assert_eq!(marks(&mut witness), (Value::Null, String::new(), String::new()));
}

#[test]
fn of_a_saved_and_of_a_paused_machine() {
    let (lab, mut witness) = Lab::running();
    mark(&mut witness, "saved");
    lab.ok(&["vm", "save", BASE]);
    lab.snapshot("saved");
    assert_eq!(lab.state(BASE), "saved");
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    assert_day(&mut witness, "saved");
    mark(&mut witness, "paused");
    lab.ok(&["vm", "pause", BASE]);
    lab.snapshot("paused");
    assert_eq!(lab.state(BASE), "paused");
    lab.ok(&["vm", "resume", BASE]);
    assert_day(&mut witness, "paused");
    mark(&mut witness, "later");

    lab.ok(&["snapshot", "apply", BASE, "saved", "--discard", "--no-start"]);
    assert_eq!(lab.state(BASE), "saved");
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    assert_day(&mut witness, "saved");
    lab.ok(&["snapshot", "apply", BASE, "paused", "--discard", "--start"]);
    assert_eq!(lab.state(BASE), "running");
    assert_day(&mut witness, "paused");
    let show = |name| lab.json(&["snapshot", "show", BASE, name]);
    assert_eq!(
        (&show("saved")["vm_state"], &show("paused")["vm_state"]),
        (&Value::from("saved"), &Value::from("paused"))
    );
}

/// What Now holds is not lost by an apply that was not told to.
#[test]
fn apply_asks_before_it_loses_anything() {
    let (lab, mut witness) = Lab::running();
    lab.snapshot("first");
    mark(&mut witness, "unsaved");
    let refusal = lab.fails(3, "", &["snapshot", "apply", BASE, "first"]);
    let hint = refusal["hint"].as_str().expect("a hint");
    assert!(hint.contains("--keep") && hint.contains("--discard"), "{hint}");
    assert_day(&mut witness, "unsaved");
    lab.ok(&["snapshot", "apply", BASE, "first", "--discard", "--no-start"]);
    // Now is just what the snapshot holds.
    lab.ok(&["snapshot", "apply", BASE, "first"]);
    lab.ok(&["snapshot", "revert", BASE]);
}

/// Without memory the disks are as after a power cut.
#[test]
fn apply_without_memory() {
    let (lab, mut witness) = Lab::running();
    mark(&mut witness, "Monday");
    let nonce = witness.nonce();
    lab.snapshot("Monday");
    mark(&mut witness, "Tuesday");
    lab.ok(&["snapshot", "apply", BASE, "Monday", "--discard", "--no-memory", "--no-start"]);
    assert_eq!(lab.state(BASE), "off");
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    assert_ne!(witness.resync()["nonce"], nonce.as_str());
    assert_eq!(marks(&mut witness), (Value::Null, "Monday".to_owned(), "Monday".to_owned()));
}

/// Removed at once, merged, waiting because two stand on it; and all of a subtree.
#[test]
fn three_fates_of_a_differencing_disk() {
    let (lab, mut witness) = Lab::running();
    let day = |witness: &mut Witness, name: &str| {
        mark(witness, name);
        witness.ask(&format!("fill-disk vda 16M 2 {}", name.len()));
        lab.snapshot(name)
    };
    day(&mut witness, "root");
    day(&mut witness, "middle");
    day(&mut witness, "left");
    lab.ok(&["snapshot", "apply", BASE, "middle", "--discard"]);
    witness.resync();
    day(&mut witness, "right");
    mark(&mut witness, "now");

    // Two children stand on it: its files stay, although it is gone.
    let before = lab.files();
    lab.ok(&["snapshot", "delete", BASE, "middle", "--wait"]);
    let waiting = lab.tree()["pending"].as_array().expect("a list").clone();
    assert!(!waiting.is_empty() && waiting.iter().all(|work| work["kind"] == "wait"), "{waiting:?}");
    assert!(before.iter().all(|(name, _)| lab.files().iter().any(|(there, _)| there == name)));
    // Nobody stands on it: its files go at once. Then one child is left on the one that waited: they become one.
    lab.ok(&["snapshot", "delete", BASE, "left", "--wait"]);
    lab.settle();
    lab.assert_tidy();
    assert!(lab.files().len() < before.len());
    assert_eq!(lab.tree()["pending"], Value::Array(Vec::new()));
    assert_day(&mut witness, "now");
    // One child, which the guest is writing to: merged under it.
    lab.ok(&["snapshot", "delete", BASE, "right", "--wait"]);
    lab.settle();
    lab.assert_tidy();
    assert_day(&mut witness, "now");
    lab.ok(&["snapshot", "apply", BASE, "root", "--discard"]);
    assert_day(&mut witness, "root");
    assert_eq!(witness.ask("sum-disk vda 16M 2 4")["ok"], true);

    for name in ["a", "b", "c"] {
        day(&mut witness, name);
    }
    lab.ok(&["snapshot", "delete", BASE, "root", "--subtree", "--wait"]);
    lab.settle();
    let tree = lab.tree();
    assert_eq!((&tree["snapshots"], &tree["now"]["parent"]), (&Value::Array(Vec::new()), &Value::Null));
    // One file a disk, and at most the memory that this run came from.
    lab.assert_tidy();
    assert_eq!(lab.files().iter().filter(|(name, _)| name.starts_with("disks/")).count(), 2);
    assert_day(&mut witness, "c");
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    assert_eq!(marks(&mut witness).1, "c");
}

/// A dry run says what would go, and changes nothing.
#[test]
fn a_dry_run_changes_nothing() {
    let (lab, mut witness) = Lab::running();
    lab.snapshot("one");
    mark(&mut witness, "two");
    lab.snapshot("two");
    lab.settle();
    let is = || (lab.json(&["vm", "ledger", BASE])["machine"].take(), lab.files().len());
    let before = is();
    let plan = lab.json(&["snapshot", "delete", BASE, "one", "--dry-run"]);
    assert_eq!(plan["snapshots"].as_array().expect("a list").len(), 1);
    let merges: Vec<&Value> =
        plan["files"].as_array().expect("a list").iter().filter(|file| file["kind"] == "merge").collect();
    // Of both disks and of memory what was written after the snapshot moves, not what the files occupy.
    let moved = |file: &&Value| file["bytes"].as_u64().expect("bytes");
    let of_disks = merges.iter().filter(|file| file["file"].as_str().is_some_and(|file| file.starts_with("disks/")));
    assert!(merges.len() == 3 && of_disks.map(moved).all(|bytes| 0 < bytes && bytes < 1 << 20), "{plan}");
    assert_eq!(merges.iter().map(moved).sum::<u64>(), plan["bytes_moved"].as_u64().expect("bytes"), "{plan}");
    assert!(plan["bytes_moved"].as_u64() < plan["bytes_freed"].as_u64(), "{plan}");
    assert_eq!(is(), before);
}

/// Memory size, processors and disks of a snapshot come back with it.
#[test]
fn apply_brings_the_configuration_back() {
    let lab = Lab::with_base();
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.ok(&["vm", "set", BASE, "--note", "mine"]);
    lab.snapshot("small");
    lab.ok(&["vm", "set", BASE, "--memory", "192M", "--cpus", "2", "--add-disk", "new:32M"]);
    lab.ok(&["vm", "set", BASE, "--remove-disk", "disk1", "--note", "still mine"]);
    lab.ok(&["vm", "set", BASE, "--grow-disk", "disk0=80M"]);
    let hardware = |witness: &mut Witness| {
        let status = witness.resync();
        let disks: Vec<u64> =
            status["disks"].as_array().expect("a list").iter().filter_map(|disk| disk["bytes"].as_u64()).collect();
        (status["memory"].as_u64().expect("a number") >> 20, status["cpus"].clone(), disks)
    };
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    let (memory, cpus, disks) = hardware(&mut witness);
    assert!((150..192).contains(&memory) && cpus == 2 && disks == [80 << 20, 32 << 20], "{memory} {cpus} {disks:?}");
    witness.ask("write vdb 4M on the new disk");
    lab.snapshot("large");

    lab.ok(&["snapshot", "apply", BASE, "small", "--discard", "--start"]);
    let mut witness = lab.witness(BASE);
    let (memory, cpus, disks) = hardware(&mut witness);
    assert!((90..128).contains(&memory) && cpus == 1 && disks == [64 << 20; 2], "{memory} {cpus} {disks:?}");
    witness.prove();
    assert_eq!(lab.json(&["vm", "show", BASE])["note"], "still mine");

    lab.ok(&["snapshot", "apply", BASE, "large", "--discard"]);
    let mut witness = lab.witness(BASE);
    let (memory, cpus, disks) = hardware(&mut witness);
    assert!((150..192).contains(&memory) && cpus == 2 && disks == [80 << 20, 32 << 20], "{memory} {cpus} {disks:?}");
    assert_eq!(witness.ask("read vdb 4M")["text"], "on the new disk");
    witness.prove();
}

/// Names need not be unique; ids are.
#[test]
fn two_of_one_name() {
    let lab = Lab::with_base();
    let (first, second) = (lab.snapshot("twin"), lab.snapshot("twin"));
    let error = lab.fails(4, "twin", &["snapshot", "delete", BASE, "twin"]);
    assert_eq!(error["candidates"].as_array().map(Vec::len), Some(2), "{error}");
    lab.ok(&["snapshot", "rename", BASE, &first, "other"]);
    lab.ok(&["snapshot", "note", BASE, "other", "the first"]);
    assert_eq!(lab.json(&["snapshot", "show", BASE, "other"])["note"], "the first");
    assert_eq!(lab.json(&["snapshot", "show", BASE, "twin"])["id"], second.as_str());
    lab.ok(&["snapshot", "delete", BASE, &second, "--wait"]);
    lab.settle();
    lab.assert_tidy();
}

/// Everything below Now goes at once, while the guest runs: what lay in many files is moved in one merge a disk.
#[test]
fn a_run_of_files_is_merged_as_one() {
    let (lab, mut witness) = Lab::running();
    let days = ["one", "two", "three", "four", "five"];
    for day in days {
        mark(&mut witness, day);
        lab.snapshot(day);
    }
    mark(&mut witness, "now");
    lab.ok(&["snapshot", "delete", BASE, days[0], "--subtree", "--wait"]);
    assert_day(&mut witness, "now");
    let disks = lab.json(&["vm", "show", BASE])["disks"].clone();
    for disk in disks.as_array().expect("a list") {
        assert_eq!(disk["depth"], 1, "{disk}");
    }
    let log = lab.ok(&["vm", "log", BASE]);
    assert_eq!(log.matches("merging disks/").count(), 2, "{log}");
    lab.settle();
    lab.assert_tidy();
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    assert_eq!(witness.ask("read vda 4M")["text"], "now");
}

/// A layer that holds little goes into the one above that holds much, which the guest is writing to: its file stays where it is.
#[test]
fn what_is_little_moves_up_into_what_is_much() {
    let (lab, mut witness) = Lab::running();
    mark(&mut witness, "one");
    lab.snapshot("one");
    mark(&mut witness, "two");
    witness.ask("fill-disk vda 60M 1 3");
    lab.snapshot("two");
    mark(&mut witness, "now");
    witness.ask("fill-disk vda 16M 24 5");
    let leaf = || lab.json(&["vm", "show", BASE])["disks"][0]["file"].clone();
    let before = leaf();
    lab.ok(&["snapshot", "delete", BASE, "two", "--wait"]);
    assert_eq!(leaf(), before);
    assert_day(&mut witness, "now");
    for sum in ["sum-disk vda 60M 1 3", "sum-disk vda 16M 24 5"] {
        assert_eq!(witness.ask(sum)["ok"], true, "{sum}");
    }
    lab.settle();
    lab.assert_tidy();
    // Its files say so too, to whoever opens them without the ledger.
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    let copy = lab.path("copy.raw").to_string_lossy().into_owned();
    lab.ok(&["disk", "convert", before.as_str().expect("a path"), &copy]);
    assert!(std::fs::read(&copy).expect("a copy")[4 << 20..].starts_with(b"now\0"));
    lab.ok(&["snapshot", "apply", BASE, "one", "--discard", "--start"]);
    assert_day(&mut witness, "one");
    lab.settle();
    lab.assert_tidy();
}

/// Whatever is asked for while the memory of a snapshot is still on its way into the guest that runs already.
#[test]
fn right_after_an_apply() {
    let (lab, mut witness) = Lab::running();
    witness.ask("fill-ram 48 5");
    mark(&mut witness, "one");
    lab.snapshot("one");
    let apply = || lab.ok(&["snapshot", "apply", BASE, "one", "--discard"]);
    let proven = |witness: &mut Witness| {
        assert_day(witness, "one");
        assert_eq!(witness.ask("sum-ram")["ok"], true);
    };

    // It is taken back once more, saved, snapped, kept: with all of its memory.
    apply();
    apply();
    lab.ok(&["vm", "save", BASE]);
    lab.ok(&["vm", "start", BASE]);
    lab.snapshot("two");
    apply();
    lab.ok(&["snapshot", "apply", BASE, "two", "--keep-as", "three"]);
    witness.resync();
    proven(&mut witness);
    lab.ok(&["snapshot", "apply", BASE, "three", "--discard"]);
    lab.ok(&["vm", "pause", BASE]);
    lab.ok(&["vm", "resume", BASE]);
    witness.resync();
    proven(&mut witness);

    // QEMU dies, or is ended.
    apply();
    lab.kill_qemu();
    wait_for("the machine to be off", || (lab.state(BASE) == "off").then_some(()));
    apply();
    lab.ok(&["vm", "start", BASE]);
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);

    // The snapshot goes: what it held stays until it has arrived.
    apply();
    lab.ok(&["vm", "start", BASE]);
    lab.ok(&["snapshot", "delete", BASE, "one", "--subtree"]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    proven(&mut witness);
    lab.settle();
    lab.assert_tidy();
}
