//! A machine whose ledger is gone comes back from its files, with its guest's memory.

use e2e::{BASE, Lab, Witness};
use serde_json::Value;

fn mark(witness: &mut Witness, day: &str) {
    witness.ask(&format!("set day {day}"));
    witness.ask(&format!("write vda 4M {day}"));
    witness.ask(&format!("write vdb 8M {day}"));
}

#[track_caller]
fn assert_day(lab: &Lab, day: &str) {
    let mut witness = lab.witness(BASE);
    witness.resync();
    witness.prove();
    let text = |witness: &mut Witness, place: &str| witness.ask(&format!("read {place}"))["text"].clone();
    assert_eq!(witness.ask("get day")["value"], day);
    assert_eq!((text(&mut witness, "vda 4M"), text(&mut witness, "vdb 8M")), (Value::from(day), Value::from(day)));
    assert_eq!(witness.ask("sum-ram")["ok"], true);
}

/// What there is to say of each snapshot, by its name.
fn week_of(lab: &Lab) -> Vec<Value> {
    let mut all = lab.tree()["snapshots"].as_array().expect("a list").clone();
    // Sizes of files are not what this is about.
    for snapshot in &mut all {
        let fields = snapshot.as_object_mut().expect("an object");
        fields.retain(|name, _| !["disk_bytes", "memory_bytes", "disks"].contains(&name.as_str()));
    }
    all
}

fn rescued_week(format: &str) {
    let (lab, mut witness) = Lab::running_on(format);
    witness.ask("fill-ram 16 1");
    mark(&mut witness, "Monday");
    lab.snapshot("Monday");
    mark(&mut witness, "Tuesday");
    lab.snapshot("Tuesday");
    mark(&mut witness, "gone");
    lab.snapshot("gone");
    mark(&mut witness, "Wednesday");
    lab.ok(&["snapshot", "delete", BASE, "gone", "--wait"]);
    lab.ok(&["snapshot", "apply", BASE, "Monday", "--keep-as", "Wednesday"]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    mark(&mut witness, "Thursday");
    lab.snapshot("Thursday");
    lab.ok(&["snapshot", "rename", BASE, "Thursday", "Thursday evening"]);
    mark(&mut witness, "Friday");
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.settle();
    let (week, now) = (week_of(&lab), lab.tree()["now"]["parent"].clone());
    let machine = lab.json(&["vm", "show", BASE]);

    let folder = lab.root().join(machine["id"].as_str().expect("an id").replace('-', ""));
    let path = folder.to_string_lossy().into_owned();
    lab.fails(3, "nothing to rescue", &["vm", "rescue", &path]);
    std::fs::remove_file(folder.join("ledger")).expect("it was there");
    let said = lab.json(&["vm", "rescue", &path]);
    assert_eq!((&said["name"], &said["unknown"]), (&machine["name"], &Value::Array(Vec::new())), "{said}");
    assert_eq!(week_of(&lab), week);
    assert_eq!(lab.tree()["now"]["parent"], now);
    assert_eq!(lab.json(&["vm", "show", BASE])["config"], machine["config"]);
    assert_eq!(lab.state(BASE), "off");

    for (name, day) in
        [("Wednesday", "Wednesday"), ("Tuesday", "Tuesday"), ("Thursday evening", "Thursday"), ("Monday", "Monday")]
    {
        let keep = if name == "Wednesday" { "--keep-as" } else { "--discard" };
        let mut words = vec!["snapshot", "apply", BASE, name, keep];
        words.extend((keep == "--keep-as").then_some("Friday"));
        words.push("--start");
        lab.ok(&words);
        assert_day(&lab, day);
    }
    // What was Now when the ledger went: its disks, as after a power cut.
    lab.ok(&["snapshot", "apply", BASE, "Friday", "--discard", "--start"]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    assert_eq!(witness.ask("read vda 4M")["text"], "Friday");
    lab.settle();
    lab.assert_tidy();
    assert_eq!(lab.json(&["vm", "check", BASE])["clean"], true);
}

#[test]
fn a_week_comes_back() {
    rescued_week("vhdx");
}

#[test]
fn a_week_on_vhds_comes_back() {
    rescued_week("vhd");
}

/// Of a machine that was saved, its memory comes back as a snapshot of its own; a damaged ledger is kept.
#[test]
fn a_saved_state_comes_back() {
    let (lab, mut witness) = Lab::running();
    witness.ask("fill-ram 16 1");
    mark(&mut witness, "saved");
    lab.ok(&["vm", "save", BASE]);
    let machine = lab.json(&["vm", "show", BASE]);
    lab.settle();
    let folder = lab.root().join(machine["id"].as_str().expect("an id").replace('-', ""));
    // The worker that saved it has it open for a moment longer; this waits for its end.
    lab.fails(3, "nothing to rescue", &["vm", "rescue", &folder.to_string_lossy()]);
    let mut ledger = std::fs::read(folder.join("ledger")).expect("it is there");
    ledger[..4096].fill(0xa5);
    std::fs::write(folder.join("ledger"), &ledger).expect("harmed");
    let text = lab.ok(&["vm", "rescue", &folder.to_string_lossy()]);
    assert!(text.contains("saved state") && text.contains("ledger.damaged"), "{text}");
    assert_eq!(std::fs::read(folder.join("ledger.damaged")).expect("it is kept"), ledger);
    lab.ok(&["snapshot", "apply", BASE, "saved state", "--discard", "--start"]);
    assert_day(&lab, "saved");
}
