//! `vm rescue`, run as a process, on machines that are off.

mod place;

use place::{Place, content, eventually};
use serde_json::Value;
use std::path::PathBuf;

/// A machine with two snapshots, and its folder.
fn week() -> (Place, PathBuf) {
    let place = Place::with_machine("web");
    for name in ["Monday", "Tuesday"] {
        place.tenby(&["snapshot", "create", "web", name]).well();
    }
    let folder = folder(&place, "web");
    (place, folder)
}

fn folder(place: &Place, name: &str) -> PathBuf {
    place.root().join(place.machine(name)["id"].as_str().unwrap().replace('-', ""))
}

fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_comes_back_is_drawn_and_what_is_not_known_is_said() {
    let (place, folder) = week();
    let (tree, machine) = (place.tree("web"), place.machine("web"));
    let refusal = place.tenby(&["vm", "rescue", text(&folder)]).with(3);
    assert!(refusal.err.contains("nothing to rescue") && refusal.err.contains("tenby vm check web"), "{refusal:?}");
    std::fs::remove_file(folder.join("ledger")).unwrap();
    std::fs::write(folder.join("disks/notes.txt"), "remember the milk").unwrap();
    let images = content(&folder.join("disks"));
    let rescued = place.tenby(&["vm", "rescue", text(&folder)]).well();
    assert!(rescued.out.contains("Monday") && rescued.out.contains("Tuesday"), "{rescued:?}");
    let line = "- disks/notes.txt: it cannot be read, and was left alone";
    assert!(rescued.out.contains(line), "{rescued:?}");
    assert_eq!(content(&folder.join("disks")), images, "no image is written");
    assert_eq!(place.tree("web")["snapshots"], tree["snapshots"]);
    assert_eq!(place.machine("web")["config"], machine["config"]);
    assert_eq!(place.tenby(&["vm", "check", "web", "--json"]).well().json()["clean"], true);
    place.tenby(&["snapshot", "apply", "web", "Monday", "--discard"]).well();
}

#[test]
fn a_name_that_is_taken_gets_a_number_and_a_damaged_ledger_is_kept() {
    let (place, folder) = week();
    place.tenby(&["vm", "rename", "web", "old"]).well();
    place.tenby(&["vm", "rename", "old", "web"]).well();
    // It waits for the worker, which would write to the ledger once more as it leaves.
    place.tenby(&["vm", "rescue", text(&folder)]).with(3);
    std::fs::write(folder.join("ledger"), "no ledger").unwrap();
    // Its worker's note of the name may be there a moment longer.
    eventually("another machine of the name", || place.tenby(&["vm", "create", "web", "--disk", "new:8M"]).code == 0);
    let said = place.tenby(&["vm", "rescue", text(&folder), "--json"]).well().json();
    assert_eq!((&said["name"], &said["aside"]), (&Value::from("web (2)"), &Value::from("ledger.damaged")));
    assert!(said["unknown"][0]["what"].as_str().unwrap().contains("another machine's now"), "{said}");
    assert_eq!(std::fs::read(folder.join("ledger.damaged")).unwrap(), b"no ledger");
    assert_eq!(place.names("web (2)"), ["Monday", "Tuesday"]);
}

#[test]
fn what_is_no_machines_folder_is_refused() {
    let (place, folder) = week();
    place.tenby(&["vm", "rescue", &place.path("nowhere")]).with(4);
    std::fs::create_dir_all(place.path("empty")).unwrap();
    place.tenby(&["vm", "rescue", &place.path("empty")]).with(5);
    std::fs::write(place.path("file"), "").unwrap();
    place.tenby(&["vm", "rescue", &place.path("file")]).with(5);
    // Elsewhere: the hint says where it belongs, and helps.
    std::fs::remove_file(folder.join("ledger")).unwrap();
    let away = place.path("away");
    std::fs::rename(&folder, &away).unwrap();
    let refusal = place.tenby(&["vm", "rescue", &away]).with(3);
    let hint = refusal.err.lines().find_map(|line| line.strip_prefix("hint: ")).unwrap().to_owned();
    let moved = hint.split_whitespace().nth(2).unwrap().to_owned();
    assert!(hint.starts_with("mv ") && hint.ends_with(&format!("tenby vm rescue {moved}")), "{hint}");
    std::fs::rename(&away, &moved).unwrap();
    let rescued = place.tenby(&["vm", "rescue", &moved]).well();
    assert!(rescued.out.contains("its files were those of the machine"), "{rescued:?}");
    assert_eq!(place.names("web"), ["Monday", "Tuesday"]);
}

/// A disk that was taken in place lies where only its user may say that it lies.
#[test]
fn a_file_that_was_taken_in_place_is_named_by_its_user() {
    for format in ["vhdx", "raw"] {
        let place = Place::new();
        let file = place.path(&format!("mine.{format}"));
        place.tenby(&["disk", "create", &file, "--size", "8M"]).well();
        place.tenby(&["vm", "create", "web", "--disk", &format!("{file},in-place")]).well();
        place.tenby(&["snapshot", "create", "web", "Monday"]).well();
        let folder = folder(&place, "web");
        std::fs::remove_file(folder.join("ledger")).unwrap();
        let failure = place.tenby(&["vm", "rescue", text(&folder)]).with(5);
        assert!(failure.err.contains(&file) && failure.err.contains("--with"), "{failure:?}");
        assert!(!folder.join("ledger").exists());
        let rescued = place.tenby(&["vm", "rescue", text(&folder), "--with", &file]).well();
        assert!(rescued.out.contains("found: mine."), "its base carries no label: {rescued:?}");
        assert_eq!(place.machine("web")["disks"][0]["depth"], 2);
        place.tenby(&["vm", "check", "web"]).well();
    }
}
