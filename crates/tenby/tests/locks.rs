//! Who may have which image open: several processes on one chain, and machines beside them.

mod place;

use place::{Ended, Place, content};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

/// A process that serves an image, until it is dropped.
struct Serving(Child);

impl Serving {
    fn begin(place: &Place, words: &[&str]) -> Self {
        let socket = place.path(&format!("{}.sock", words[0]));
        let words: Vec<&str> =
            ["disk", "serve", "--socket", &socket].into_iter().chain(words.iter().copied()).collect();
        let mut child = place.command(&words).stdout(Stdio::piped()).spawn().unwrap();
        // It has said where it listens: it has everything open.
        let mut uri = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut uri).unwrap();
        assert!(uri.starts_with("nbd+unix://"), "{uri}");
        Self(child)
    }

    fn id(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

/// base <- middle <- leaf and other, with something in each.
fn family() -> Place {
    let place = Place::new();
    fs::write(place.path("base.raw"), vec![7; 1 << 20]).unwrap();
    place.tenby(&["disk", "convert", "base.raw", "base.vhdx"]).well();
    for (child, parent) in [("middle", "base.vhdx"), ("leaf", "middle.avhdx"), ("other", "middle.avhdx")] {
        place.tenby(&["disk", "create", &format!("{child}.avhdx"), "--parent", parent]).well();
    }
    place
}

/// Every verb that opens the image for writing.
fn edits(file: &str) -> Vec<Vec<String>> {
    let words = [
        vec!["resize", file, "2M"],
        vec!["compact", file],
        vec!["merge", file],
        vec!["reconnect", file, "base.vhdx", "--force"],
        vec!["check", file, "--repair"],
        vec!["serve", file, "--socket", "edit.sock"],
    ];
    let whole = words.map(|words| std::iter::once("disk").chain(words).map(str::to_owned).collect());
    whole.into()
}

/// Every verb that only reads the image.
fn looks(file: &str) -> Vec<Vec<String>> {
    let words = [
        vec!["info", file],
        vec!["info", file, "--chain"],
        vec!["hash", file],
        vec!["map", file],
        vec!["check", file],
        vec!["compare", file, "base.raw"],
        vec!["convert", file, "look.raw"],
        vec!["convert", file, "look.qcow2"],
        vec!["merge", file, "--into", "look.vhdx"],
        vec!["create", "look.avhdx", "--parent", file],
    ];
    let whole = words.map(|words| std::iter::once("disk").chain(words).map(str::to_owned).collect());
    whole.into()
}

fn run(place: &Place, words: &[String]) -> Ended {
    let ended = place.tenby(&words.iter().map(String::as_str).collect::<Vec<_>>());
    for new in ["look.raw", "look.qcow2", "look.vhdx", "look.avhdx"] {
        let _ = fs::remove_file(place.path(new));
    }
    ended
}

/// What is not a socket, and its content.
fn images(place: &Place) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut all = content(place.dir.path());
    all.retain(|(path, _)| path.extension().is_some_and(|ending| ending != "sock"));
    all
}

#[test]
fn a_leaf_has_one_writer_and_nobody_beside_it() {
    let place = family();
    let serving = Serving::begin(&place, &["leaf.avhdx"]);
    let before = images(&place);
    for words in edits("leaf.avhdx").iter().chain(&looks("leaf.avhdx")) {
        let refused = run(&place, words).with(3);
        assert!(refused.err.contains("leaf.avhdx is in use by"), "{words:?}: {refused:?}");
        // Who it is is told where the system tells.
        let told = refused.err.contains(&serving.id()) || refused.err.contains("another process");
        assert!(told && refused.err.contains("\nhint: "), "{words:?}: {refused:?}");
        assert!(images(&place) == before, "{words:?}");
    }
    drop(serving);
    for words in looks("leaf.avhdx") {
        let ended = run(&place, &words);
        assert!(ended.code == 0, "{words:?}: {ended:?}");
    }
}

#[test]
fn ancestors_are_shared_by_readers_and_by_writers_of_different_leaves() {
    let place = family();
    let _leaf = Serving::begin(&place, &["leaf.avhdx"]);
    let _other = Serving::begin(&place, &["other.avhdx"]);
    let _reader = Serving::begin(&place, &["middle.avhdx", "--read-only"]);
    for file in ["middle.avhdx", "base.vhdx"] {
        for words in looks(file) {
            let ended = run(&place, &words);
            assert!(ended.code == 0, "{words:?}: {ended:?}");
        }
    }
}

/// What something stands on is not written, whether it is in use or not; and the refusal says what stands on it.
#[test]
fn ancestors_are_never_written() {
    let place = family();
    for used in [false, true] {
        let serving = used.then(|| Serving::begin(&place, &["leaf.avhdx"]));
        let before = images(&place);
        for (file, child) in [("middle.avhdx", "leaf.avhdx"), ("base.vhdx", "middle.avhdx")] {
            for words in edits(file) {
                // A merge moves into the parent, and what stands on the child goes with it: only while that is in use it must not. And
                // of what is sound nothing is repaired.
                let fine = match words[1].as_str() {
                    "merge" | "reconnect" if file == "base.vhdx" => continue,
                    "merge" | "reconnect" | "check" => !used,
                    _ => false,
                };
                if fine {
                    continue;
                }
                let refused = run(&place, &words).with(3);
                let told = refused.err.contains(child) || refused.err.contains(&format!("{file} is in use"));
                assert!(told && refused.err.contains("\nhint: "), "{words:?}: {refused:?}");
                assert!(images(&place) == before, "{words:?}");
            }
        }
        drop(serving);
    }
}

#[test]
fn a_merge_waits_for_nobody_and_loses_nothing() {
    let place = family();
    // What stands on the child would have to be told.
    let serving = Serving::begin(&place, &["leaf.avhdx"]);
    let before = images(&place);
    let refused = place.tenby(&["disk", "merge", "middle.avhdx"]).with(3);
    assert!(refused.err.contains("is in use by"), "{refused:?}");
    assert!(images(&place) == before);
    drop(serving);
    // A reader of the parent.
    let serving = Serving::begin(&place, &["base.vhdx", "--read-only"]);
    let refused = place.tenby(&["disk", "merge", "middle.avhdx"]).with(3);
    assert!(refused.err.contains("base.vhdx is in use by"), "{refused:?}");
    assert!(images(&place) == before);
    drop(serving);
    place.tenby(&["disk", "merge", "middle.avhdx"]).well();
    place.tenby(&["disk", "compare", "leaf.avhdx", "base.raw"]).well();
}

/// Two that want the same: one of them does it, and the other has changed nothing.
#[test]
fn two_merges_of_one_child_are_one() {
    for _ in 0..5 {
        let place = family();
        place.tenby(&["disk", "merge", "other.avhdx", "--into", "all.vhdx"]).well();
        fs::remove_file(place.path("other.avhdx")).unwrap();
        let merging = || place.command(&["disk", "merge", "leaf.avhdx"]).stderr(Stdio::piped()).spawn().unwrap();
        let ended = [merging(), merging()].map(|child| Ended::from(child.wait_with_output().unwrap()));
        let mut codes = ended.each_ref().map(|ended| ended.code);
        codes.sort_unstable();
        assert!([[0, 3], [0, 4]].contains(&codes), "{ended:?}");
        assert!(!Path::new(&place.path("leaf.avhdx")).exists());
        place.tenby(&["disk", "compare", "middle.avhdx", "all.vhdx"]).well();
    }
}

#[test]
fn two_creations_of_one_file_are_one() {
    let place = Place::new();
    for round in 0..5 {
        let file = format!("{round}.vhdx");
        let creating =
            |size| place.command(&["disk", "create", &file, "--size", size]).stderr(Stdio::piped()).spawn().unwrap();
        let ended = [creating("8M"), creating("8M")].map(|child| Ended::from(child.wait_with_output().unwrap()));
        let mut codes = ended.each_ref().map(|ended| ended.code);
        codes.sort_unstable();
        assert_eq!(codes, [0, 3], "{ended:?}");
        place.tenby(&["disk", "check", &file]).well();
    }
    assert_eq!(fs::read_dir(place.dir.path()).unwrap().count(), 5, "nothing else is left");
}

fn own_disk(machine: &Value) -> String {
    machine["disks"][0]["file"].as_str().unwrap().to_owned()
}

/// A machine whose worker died before it merged: what is to be merged is said, and how long that takes.
#[test]
fn a_machines_file_is_refused_with_what_is_pending() {
    let place = Place::with_machine("web");
    place.tenby(&["snapshot", "create", "web", "one"]).well();
    place.tenby(&["snapshot", "create", "web", "two"]).well();
    let edit = |file: &str| place.tenby(&["disk", "compact", file]).with(3);
    let refused = edit(&own_disk(&place.machine("web")));
    assert!(refused.err.contains("belongs to the machine web\n"), "{refused:?}");
    assert!(refused.err.contains("hint: tenby vm show web"), "{refused:?}");

    // The worker that is there ends, so that the next one is one that dies.
    let worker = place.machine("web")["worker"].as_i64();
    if let Some(pid) = worker.and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    let deleted = place.command(&["snapshot", "delete", "web", "one"]).env("TENBY_DIE_AT", "merge:copied").output();
    let deleted: Ended = deleted.unwrap().into();
    let pending = || place.tree("web")["pending"].clone();
    place::eventually("the death of the worker", || place.machine("web")["worker"].is_null());
    assert_eq!(pending()[0]["kind"], "merge", "{deleted:?}");
    assert!(pending()[0]["estimated_ms"].is_u64());
    let refused = edit(&own_disk(&place.machine("web")));
    assert!(refused.err.contains("belongs to the machine web; 1 file to merge ("), "{refused:?}");
    assert!(refused.err.contains(" pending, about "), "{refused:?}");
}

#[test]
fn a_file_that_a_machine_has_open_is_refused_with_its_name() {
    let place = Place::new();
    if rustix::fs::setxattr(place.dir.path(), "user.test", b"1", rustix::fs::XattrFlags::empty()).is_err() {
        println!("SKIPPED: no extended attributes here");
        return;
    }
    place.tenby(&["disk", "create", "mine.vhdx", "--size", "8M"]).well();
    place.tenby(&["disk", "create", "free.vhdx", "--size", "8M"]).well();
    place.tenby(&["vm", "create", "db", "--memory", "64M", "--disk", "mine.vhdx,in-place"]).well();
    for words in edits("mine.vhdx").iter().filter(|words| words[1] != "reconnect") {
        let refused = run(&place, words).with(3);
        assert!(refused.err.contains("mine.vhdx belongs to the machine db"), "{words:?}: {refused:?}");
    }
    // The parent of a merge, too; what reads it may.
    place.tenby(&["disk", "create", "child.avhdx", "--parent", "mine.vhdx"]).well();
    let refused = place.tenby(&["disk", "merge", "child.avhdx"]).with(3);
    assert!(refused.err.contains("mine.vhdx belongs to the machine db"), "{refused:?}");
    place.tenby(&["disk", "hash", "child.avhdx"]).well();
    fs::remove_file(place.path("child.avhdx")).unwrap();
    // A machine that merges into it has it for itself: a reader is in the way, and is named.
    let hash = |file: &str| place.tenby(&["disk", "hash", file]).well().out;
    let before = hash("mine.vhdx");
    place.tenby(&["snapshot", "create", "db", "one"]).well();
    let reading = Serving::begin(&place, &["mine.vhdx", "--read-only"]);
    place.tenby(&["snapshot", "delete", "db", "one", "--wait"]);
    let alert = || place.machine("db")["alert"].as_str().unwrap_or_default().to_owned();
    place::eventually("the alert", || alert().contains("mine.vhdx is in use"));
    assert_eq!(place.tree("db")["pending"][0]["kind"], "merge");
    let refused = place.tenby(&["vm", "set", "db", "--grow-disk", "disk0=20M"]).with(3);
    assert!(refused.err.contains("disk0 cannot be changed now: 1 file to merge, about 1 s"), "{refused:?}");
    drop(reading);
    place.tenby(&["snapshot", "create", "db", "two"]).well();
    place::eventually("the merge", || place.tree("db")["pending"].as_array().unwrap().is_empty());
    assert_eq!(hash("mine.vhdx"), before);
    // Nobody else takes it, nor what is in use, nor what something stands on.
    let take = |file: &str| {
        let disk = format!("{file},in-place");
        place.tenby(&["vm", "create", "other", "--memory", "64M", "--disk", &disk]).with(3)
    };
    assert!(take("mine.vhdx").err.contains("belongs to the machine db"));
    let serving = Serving::begin(&place, &["free.vhdx"]);
    let refused = take("free.vhdx");
    assert!(refused.err.contains("free.vhdx is in use by"), "{refused:?}");
    drop(serving);
    place.tenby(&["disk", "create", "child.avhdx", "--parent", "free.vhdx"]).well();
    assert!(take("free.vhdx").err.contains("child.avhdx stands on"));
}
