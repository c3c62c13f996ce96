//! Whatever is deleted under a guest that writes, and whatever happens meanwhile.

use e2e::{BASE, Lab, Witness, wait_for};

/// Each stands on the one before; Now on the last.
const DAYS: [&str; 6] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Where a day's own piece of the first disk lies, how many MiB it has, and its seed.
fn piece(day: usize) -> String {
    format!("vda {}M 8 {}", 4 + 8 * day, day + 1)
}

fn witness(lab: &Lab) -> Witness {
    let mut witness = lab.witness(BASE);
    witness.resync();
    witness
}

/// Kills the worker while it merges, if it has not done so already. Whether it was in time.
fn dies_merging(lab: &Lab) -> bool {
    let merging = wait_for("a merge to begin, or all to have ended", || {
        let jobs = lab.json(&["job", "list", BASE]);
        let under_way = |job: &serde_json::Value| job["kind"] == "merge" && job["ended"].is_null();
        let merging = jobs["jobs"].as_array().expect("a list").iter().any(under_way);
        let pending = lab.tree()["pending"].as_array().is_some_and(|pending| !pending.is_empty());
        (merging || !pending).then_some(merging)
    });
    lab.kill_worker();
    merging
}

/// The base of all, one in the middle, and those that Now hangs under.
#[test]
fn anything_goes_while_everything_goes_wrong() {
    let lab = Lab::with_base();
    let small = lab.on_a_small_disk("640m");
    lab.ok(&["vm", "start", BASE]);
    let mut guest = witness(&lab);
    for (number, day) in DAYS.iter().enumerate() {
        guest.ask(&format!("fill-disk {}", piece(number)));
        lab.snapshot(day);
    }
    guest.ask("journal pace 0");
    drop(guest);

    lab.ok(&["snapshot", "delete", BASE, "Monday"]);
    let mut in_time = usize::from(dies_merging(&lab)) + usize::from(dies_merging(&lab));
    small.fill_up();
    lab.ok(&["snapshot", "delete", BASE, "Wednesday"]);
    in_time += usize::from(dies_merging(&lab));
    lab.ok(&["snapshot", "delete", BASE, "Friday", "--subtree"]);
    in_time += usize::from(dies_merging(&lab));
    small.make_room();
    in_time += usize::from(dies_merging(&lab));
    println!("{in_time} of 5 workers died in the middle of a merge");

    wait_for("the guest to go on", || (lab.state(BASE) == "running").then_some(()));
    witness(&lab).prove();
    lab.settle();
    let tree = lab.tree();
    let names: Vec<&str> =
        tree["snapshots"].as_array().expect("a list").iter().filter_map(|s| s["name"].as_str()).collect();
    assert_eq!(names, ["Tuesday", "Thursday"]);
    assert_eq!(tree["pending"].as_array().map(Vec::len), Some(0), "{tree}");
    assert_eq!(lab.wait_hashed()["clean"], true);
    lab.assert_tidy();
    for (day, pieces) in [("Thursday", 4), ("Tuesday", 2)] {
        lab.ok(&["snapshot", "apply", BASE, day, "--discard"]);
        let mut guest = witness(&lab);
        guest.prove();
        for (number, written) in DAYS.iter().enumerate() {
            let sum = guest.ask(&format!("sum-disk {}", piece(number)));
            assert_eq!(sum["ok"], number < pieces, "{day}, what {written} wrote");
        }
    }
}
