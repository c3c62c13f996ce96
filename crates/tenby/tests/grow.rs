//! `vm set --grow-disk`: a machine's disk becomes larger, with snapshots and without.

mod place;

use place::{Ended, Place};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn sizes(place: &Place) -> Vec<u64> {
    let disks = place.machine("web")["disks"].take();
    disks.as_array().unwrap().iter().map(|disk| disk["size"].as_u64().unwrap()).collect()
}

fn grow(place: &Place, words: &[&str]) -> Ended {
    let grown = words.iter().flat_map(|word| ["--grow-disk", word]);
    place.tenby(&["vm", "set", "web"].into_iter().chain(grown).collect::<Vec<_>>())
}

/// The worker that is there ends, so that the next one is another.
fn end_worker(place: &Place) {
    let worker = place.machine("web")["worker"].as_i64();
    if let Some(pid) = worker.and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    place::eventually("its end", || place.machine("web")["worker"].is_null());
}

fn file(machine: &Value, disk: usize) -> String {
    machine["disks"][disk]["file"].as_str().unwrap().to_owned()
}

fn size_of(place: &Place, file: &str) -> u64 {
    place.tenby(&["disk", "info", file, "--json"]).well().json()["size"].as_u64().unwrap()
}

fn machine(disks: &[&str]) -> Place {
    let place = Place::new();
    let disks = disks.iter().flat_map(|disk| ["--disk", disk]);
    let words: Vec<&str> = ["vm", "create", "web", "--memory", "64M"].into_iter().chain(disks).collect();
    place.tenby(&words).well();
    place
}

#[test]
fn disks_grow_together() {
    let place = machine(&["new:8M", "new:9M,format=vhd"]);
    grow(&place, &["disk0=20M", "disk1=21M"]).well();
    assert_eq!(sizes(&place), [20 * MIB, 21 * MIB]);
    let machine = place.machine("web");
    assert_eq!([0, 1].map(|disk| size_of(&place, &file(&machine, disk))), [20 * MIB, 21 * MIB]);
    // To be as large as it is is no mistake.
    grow(&place, &["disk0=20M"]).well();
    // All of them or none.
    let refused = grow(&place, &["disk0=30M", "disk1=20M"]).with(2);
    assert!(refused.err.contains("a machine's disk only grows"), "{refused:?}");
    assert!(grow(&place, &["disk0=30M", "disk0=31M"]).with(2).err.contains("twice"));
    assert!(grow(&place, &["disk0=30M", "disk7=31M"]).with(4).err.contains("has no disk \"disk7\""));
    // A VHD has an end.
    let refused = grow(&place, &["disk0=30M", "disk1=3T"]).with(3);
    assert!(refused.err.contains("VHD"), "{refused:?}");
    grow(&place, &["disk0=1000"]).with(2);
    assert_eq!(sizes(&place), [20 * MIB, 21 * MIB]);
    place.tenby(&["vm", "check", "web"]).well();
}

/// What stands under a larger disk stays as it is; merged in either direction, the disk keeps its size and what is on it.
#[test]
fn a_disk_grows_over_its_snapshots() {
    let place = Place::new();
    std::fs::write(place.path("base.raw"), vec![7; 8 << 20]).unwrap();
    let disks = ["--disk", "base.raw", "--disk", "new:8M,format=vhd"];
    place.tenby(&[&["vm", "create", "web", "--memory", "64M"], &disks[..]].concat()).well();
    let hash = |disk| place.tenby(&["disk", "hash", &file(&place.machine("web"), disk)]).well().out[..64].to_owned();
    for (name, size) in [("one", "20M"), ("two", "31M"), ("three", "33M")] {
        place.tenby(&["snapshot", "create", "web", name]).well();
        grow(&place, &[&format!("disk0={size}"), &format!("disk1={size}")]).well();
    }
    let content = [hash(0), hash(1)];
    for name in ["two", "one", "three"] {
        place.tenby(&["snapshot", "create", "web", &format!("after {name}")]).well();
        place.tenby(&["snapshot", "apply", "web", name, "--discard"]).well();
        let before = [8, 20, 31][["one", "two", "three"].iter().position(|one| *one == name).unwrap()];
        assert_eq!(sizes(&place), [before * MIB; 2], "{name}");
        place.tenby(&["snapshot", "apply", "web", &format!("after {name}"), "--discard"]).well();
        place.tenby(&["snapshot", "delete", "web", name, "--wait"]).well();
        place.tenby(&["snapshot", "delete", "web", &format!("after {name}"), "--wait"]).well();
        assert_eq!(sizes(&place), [33 * MIB; 2]);
        assert_eq!([hash(0), hash(1)], content, "{name}");
    }
    assert_eq!(place.machine("web")["disks"][0]["depth"], 1);
    place.tenby(&["vm", "check", "web"]).well();
}

#[test]
fn a_worker_that_dies_leaves_a_larger_disk_and_the_next_says_so() {
    let place = machine(&["new:8M"]);
    end_worker(&place);
    let mut dying = place.command(&["vm", "set", "web", "--grow-disk", "disk0=20M", "--memory", "128M"]);
    let died: Ended = dying.env("TENBY_DIE_AT", "set:grown").output().unwrap().into();
    assert_ne!(died.code, 0, "{died:?}");
    place.tenby(&["vm", "set", "web", "--note", "mine"]).well();
    assert_eq!((sizes(&place), place.machine("web")["memory"].as_u64()), (vec![20 * MIB], Some(64 * MIB)));
    let log = place.tenby(&["vm", "log", "web"]).well().out;
    assert!(log.contains("it had grown when a worker ended"), "{log}");
}
