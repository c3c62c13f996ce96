//! Machines that are made from another one's snapshot: they go on from its memory, share its files, and outlive it; a worker that dies in the
//! middle of anything loses no layer and leaks none.

use e2e::{BASE, Lab, Output, Process, Witness, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, Stdio};

/// The folder of a machine.
fn folder(lab: &Lab, name: &str) -> PathBuf {
    lab.root().join(lab.json(&["vm", "show", name])["id"].as_str().expect("a machine has an id"))
}

/// The files of a machine's layers, with how many names each has.
fn files(lab: &Lab, name: &str) -> Vec<(String, u64)> {
    let folder = folder(lab, name);
    let mut files = Vec::new();
    for kind in ["disks", "memory"] {
        for entry in std::fs::read_dir(folder.join(kind)).expect("a machine has this folder") {
            let entry = entry.expect("the folder can be read");
            let links = entry.metadata().expect("it is there").nlink();
            files.push((format!("{kind}/{}", entry.file_name().to_string_lossy()), links));
        }
    }
    files.sort();
    files
}

/// A machine's folder holds the files that its ledger names, no more and no fewer; and all of them are sound.
#[track_caller]
fn assert_whole(lab: &Lab, name: &str) {
    // A worker looks what there is to do.
    lab.ok(&["vm", "set", name, "--note", "looked at"]);
    wait_for("all work to end", || {
        let arrived = lab.json(&["vm", "ledger", name])["machine"]["now"]["restoring"].is_null();
        let tree = lab.json(&["snapshot", "list", name]);
        let pending = tree["pending"].as_array().expect("a list").iter().any(|work| work["kind"] != "wait");
        let ledger = lab.json(&["vm", "ledger", name]);
        (!pending && arrived && ledger["journal"].as_object().expect("a journal").is_empty()).then_some(())
    });
    let ledger = lab.json(&["vm", "ledger", name]);
    let rows = ledger["machine"]["layers"].as_object().expect("layers");
    let named: BTreeSet<&str> = rows.values().map(|row| row["file"].as_str().expect("a name")).collect();
    let there = files(lab, name);
    let there: BTreeSet<&str> = there.iter().map(|(file, _)| file.as_str()).collect();
    assert_eq!(there, named, "the files of {name}, and those of its ledger");
    let audit = lab.json(&["vm", "check", name, "--deep"]);
    assert_eq!(audit["clean"], true, "{audit}");
    assert!(audit["findings"].as_array().expect("a list").iter().all(|found| found["kind"] != "unknown"), "{audit}");
}

/// What QEMU was started with, of the machine whose sockets lie in `name`'s runtime folder.
fn qemu_line(lab: &Lab, name: &str) -> String {
    let pid = lab.json(&["vm", "show", name])["qemu"].as_i64().expect("it runs");
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).expect("it is there");
    String::from_utf8_lossy(&line).replace('\0', " ")
}

fn after<'a>(line: &'a str, word: &str) -> &'a str {
    line.split(word)
        .nth(1)
        .unwrap_or_else(|| panic!("no {word} in {line}"))
        .split([',', ' '])
        .next()
        .unwrap_or_default()
}

fn mark(witness: &mut Witness, day: &str) {
    witness.ask(&format!("set day {day}"));
    witness.ask(&format!("write vda 4M {day}"));
    witness.ask(&format!("write vdb 8M {day}"));
}

#[track_caller]
fn assert_day(witness: &mut Witness, day: &str) {
    witness.resync();
    witness.prove();
    assert_eq!(witness.ask("get day")["value"], day);
    for place in ["vda 4M", "vdb 8M"] {
        assert_eq!(witness.ask(&format!("read {place}"))["text"], day, "{place}");
    }
}

fn names(lab: &Lab) -> Vec<String> {
    let list = lab.json(&["vm", "list"]);
    let vms = list["vms"].as_array().expect("a list");
    vms.iter().map(|vm| vm["name"].as_str().expect("a name").to_owned()).collect()
}

#[track_caller]
fn delete_all(lab: &Lab) {
    for name in names(lab) {
        lab.tenby(&["vm", "stop", &name, "--turn-off"]).exits(0);
        lab.ok(&["vm", "delete", &name]);
    }
    wait_for("the workers to leave", || lab.worker().is_none().then_some(()));
    assert_eq!(lab.left(), Vec::<String>::new(), "nothing is left");
}

/// With the memory of its snapshot: the guest goes on in the clone, under the other's address and cut off from everybody, until it is started
/// anew. The source changes, gets another name and goes; the clone does not notice.
#[test]
fn a_clone_goes_on_from_memory_and_outlives_its_source() {
    let (lab, mut witness) = Lab::running();
    mark(&mut witness, "fresh");
    let nonce = witness.nonce();
    lab.snapshot("fresh");
    mark(&mut witness, "later");
    let made = lab.json(&["vm", "create", "twin", "--from", "Tenby@fresh", "--start"]);
    assert_eq!((&made["state"], &made["isolated"]), (&Value::from("running"), &Value::from(true)), "{made}");
    assert!(made["shared"].as_u64() > Some(0), "{made}");
    let mut twin = lab.witness("twin");
    assert_day(&mut twin, "fresh");
    assert_eq!(twin.nonce(), nonce, "the same boot of the same guest");
    assert_day(&mut witness, "later");
    let (one, other) = (qemu_line(&lab, BASE), qemu_line(&lab, "twin"));
    for same in ["-uuid ", ",mac="] {
        assert_eq!(after(&one, same), after(&other, same), "its RAM and its devices hold that");
    }
    assert_ne!(after(&one, ",guid="), after(&other, ",guid="), "the guest is told that there are two of it now");
    assert!(other.contains("restrict=on") && !one.contains("restrict=on"), "{other}");
    assert!(lab.ok(&["vm", "show", "twin"]).contains("isolated"));
    mark(&mut twin, "twin");
    assert_day(&mut witness, "later");
    lab.ok(&["vm", "rename", BASE, "old"]);
    lab.ok(&["vm", "stop", "old", "--turn-off"]);
    lab.ok(&["snapshot", "delete", "old", "fresh", "--wait"]);
    assert_whole(&lab, "old");
    lab.ok(&["vm", "delete", "old"]);
    assert_day(&mut twin, "twin");
    assert_whole(&lab, "twin");
    // A snapshot of it holds that identity, too.
    lab.ok(&["snapshot", "create", "twin", "own"]);
    drop(twin);
    lab.ok(&["vm", "stop", "twin", "--turn-off"]);
    lab.ok(&["vm", "start", "twin"]);
    let mut twin = lab.witness("twin");
    assert_ne!(twin.resync()["nonce"], nonce.as_str(), "another boot");
    let (line, view) = (qemu_line(&lab, "twin"), lab.json(&["vm", "show", "twin"]));
    assert_eq!(after(&line, "-uuid ").replace('-', ""), view["id"], "its own");
    assert_eq!(after(&line, ",mac="), view["net"]["mac"]);
    assert_ne!(after(&line, ",mac="), after(&one, ",mac="));
    assert!(!line.contains("restrict=on") && view["isolated"] == false, "{line}");
    lab.ok(&["snapshot", "apply", "twin", "own", "--discard", "--start"]);
    assert_day(&mut twin, "twin");
    assert_eq!(after(&qemu_line(&lab, "twin"), ",mac="), after(&one, ",mac="));
    // Restarted from outside it comes up as itself.
    lab.ok(&["vm", "restart", "twin"]);
    assert_eq!(lab.json(&["vm", "show", "twin"])["isolated"], false);
    assert_eq!(after(&qemu_line(&lab, "twin"), ",mac="), view["net"]["mac"]);
    drop((twin, witness));
    delete_all(&lab);
}

/// A machine that is there becomes a clone, again and again; copied by `detach`, while its guest runs.
#[test]
fn a_machine_takes_over_a_snapshot_of_another_and_is_detached() {
    let (lab, mut witness) = Lab::running();
    mark(&mut witness, "one");
    lab.snapshot("one");
    mark(&mut witness, "two");
    lab.snapshot("two");
    drop(witness);
    lab.ok(&["vm", "save", BASE]);
    lab.ok(&["vm", "create", "lab", "--disk", "new:16M", "--publish", "10022:22"]);
    let before = lab.json(&["vm", "show", "lab"]);
    lab.ok(&["snapshot", "apply", "lab", "Tenby@one", "--start"]);
    let mut guest = lab.witness("lab");
    assert_day(&mut guest, "one");
    mark(&mut guest, "mine");
    lab.fails(3, "running", &["snapshot", "apply", "lab", "Tenby@two", "--discard"]);
    lab.ok(&["vm", "detach", "lab"]);
    assert!(files(&lab, "lab").iter().all(|(_, links)| *links == 1), "{:?}", files(&lab, "lab"));
    assert_eq!(lab.json(&["vm", "show", "lab"])["shared"], 0);
    assert_day(&mut guest, "mine");
    assert_whole(&lab, "lab");
    drop(guest);
    lab.ok(&["vm", "save", "lab"]);
    let refused = lab.fails(3, "would lose", &["snapshot", "apply", "lab", "Tenby@two"]);
    assert!(refused["hint"].as_str().expect("a hint").contains("tenby snapshot apply lab Tenby@two --keep"));
    lab.ok(&["snapshot", "apply", "lab", "Tenby@two", "--keep-as", "mine", "--start"]);
    let mut guest = lab.witness("lab");
    assert_day(&mut guest, "two");
    let view = lab.json(&["vm", "show", "lab"]);
    assert_eq!((&view["id"], &view["net"]["mac"]), (&before["id"], &before["net"]["mac"]), "id and MAC stay");
    lab.fails(3, "snapshots of its own", &["snapshot", "apply", "lab", "Tenby@one", "--discard"]);
    lab.ok(&["snapshot", "apply", "lab", "mine", "--discard", "--start"]);
    assert_day(&mut guest, "mine");
    assert_whole(&lab, "lab");
    drop(guest);
    delete_all(&lab);
}

/// The source off, its disks a little filled: what needs no guest.
fn still() -> Lab {
    let lab = Lab::empty();
    lab.create_guest(BASE);
    lab.ok(&["snapshot", "create", BASE, "one"]);
    lab.ok(&["snapshot", "create", BASE, "two"]);
    lab
}

#[test]
fn many_are_made_at_once_or_none() {
    let lab = still();
    let made = lab.json(&["vm", "create", "t", "--from", "Tenby@two", "--count", "3", "--note", "for the class"]);
    assert_eq!(made["vms"].as_array().expect("a list").len(), 3);
    assert!(made["vms"][0]["note"] == "for the class" && made["vms"][0]["isolated"] == false);
    assert_eq!(names(&lab), [BASE, "t-1", "t-2", "t-3"]);
    // One file of each layer for all of them.
    assert_eq!(files(&lab, "t-1").iter().filter(|(_, links)| *links == 4).count(), 4);
    let macs: BTreeSet<String> =
        made["vms"].as_array().expect("a list").iter().map(|vm| vm["net"]["mac"].to_string()).collect();
    assert_eq!(macs.len(), 3, "each its own");
    lab.fails(3, "there is a machine named \"t-1\"", &["vm", "create", "t", "--from", "Tenby@one", "--count", "4"]);
    lab.fails(4, "no snapshot \"none\"", &["vm", "create", "x", "--from", "Tenby@none"]);
    lab.fails(4, "no machine is named", &["vm", "create", "x", "--from", "nobody@one"]);
    for words in [["--count", "0"], ["--count", "1001"], ["--memory", "1G"], ["--disk", "new:1G"]] {
        lab.tenby(&[&["vm", "create", "x", "--from", "Tenby@one"], &words[..]].concat()).exits(2);
    }
    assert_eq!(names(&lab), [BASE, "t-1", "t-2", "t-3"], "nothing has changed");
    // A clone of a clone, and a chain of layers that only the clones still need.
    lab.ok(&["snapshot", "create", "t-1", "own"]);
    lab.ok(&["vm", "create", "u", "--from", "t-1@own"]);
    lab.ok(&["snapshot", "delete", BASE, "one", "--wait"]);
    lab.ok(&["snapshot", "delete", BASE, "two", "--wait"]);
    assert_eq!(files(&lab, BASE).len(), 6, "what others have is not merged: {:?}", files(&lab, BASE));
    lab.ok(&["vm", "delete", "t-2"]);
    lab.ok(&["vm", "delete", "t-3"]);
    lab.ok(&["vm", "delete", "t-1"]);
    lab.ok(&["vm", "delete", "u"]);
    lab.ok(&["vm", "set", BASE, "--note", "alone again"]);
    wait_for("what nobody else has to be merged", || (files(&lab, BASE).len() == 2).then_some(()));
    assert_whole(&lab, BASE);
    delete_all(&lab);
}

#[test]
fn what_this_host_has_no_ram_for_is_not_begun() {
    let lab = Lab::empty();
    lab.ok(&["vm", "create", "big", "--memory", "4T", "--disk", "new:1G"]);
    lab.ok(&["snapshot", "create", "big", "one"]);
    lab.fails(3, "RAM", &["vm", "create", "t", "--from", "big@one", "--start"]);
    lab.fails(3, "2 machines of 4T", &["vm", "create", "t", "--from", "big@one", "--count", "2", "--start"]);
    assert_eq!(names(&lab), ["big"]);
    lab.ok(&["vm", "create", "t", "--from", "big@one"]);
}

/// Several are started side by side. One of them has a QEMU that does not come up: the others run, and it is said what became of each.
#[test]
fn one_that_cannot_be_started_keeps_no_other_from_it() {
    let lab = Lab::empty();
    let qemu = lab.path("qemu");
    let script = "#!/bin/sh\ncase \"$*\" in *guest=t-[24]*) echo not this one >&2; exit 7;; esac\nexec qemu-system-x86_64 \"$@\"\n";
    std::fs::write(&qemu, script).expect("there is room");
    std::fs::set_permissions(&qemu, PermissionsExt::from_mode(0o700)).expect("it is ours");
    let lab = lab.on_qemu(qemu);
    lab.ok(&["vm", "create", BASE, "--memory", "32M", "--accel", "tcg", "--disk", "new:16M"]);
    lab.ok(&["snapshot", "create", BASE, "one"]);
    let create = |name: &str, count: &str| {
        lab.tenby(&["vm", "create", name, "--from", "Tenby@one", "--count", count, "--start", "--json"])
    };
    let output = create("t", "5");
    let error = &output.exits(1).json()["error"];
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("started 3 of 5 machines, but not t-2, t-4: "), "{message}");
    assert!(message.contains("not this one"), "the reason of the first: {message}");
    assert_eq!(error["hint"], "tenby vm start t-2");
    for name in ["t-2", "t-4"] {
        assert!(output.stderr.contains(&format!("{name} was not started: ")), "{}", output.stderr);
    }
    let states = |prefix: &str| -> Vec<String> {
        let made = names(&lab).into_iter().filter(|name| name.starts_with(prefix));
        made.map(|name| lab.state(&name)).collect()
    };
    assert_eq!(states("t-"), ["running", "off", "running", "off", "running"]);
    let made = create("u", "3").exits(0).json();
    assert_eq!(made["vms"].as_array().expect("a list").len(), 3);
    assert_eq!(states("u-"), ["running"; 3]);
    delete_all(&lab);
}

/// A command that goes on, until it is told to end.
struct Going {
    child: Child,
    said: PathBuf,
}

impl Going {
    fn begin(lab: &Lab, args: &[&str]) -> Self {
        let said = lab.path("said");
        let err = File::create(&said).expect("there is room");
        let child = lab.command(args).stdout(Stdio::null()).stderr(err).spawn().expect("the program runs");
        Self { child, said }
    }

    fn tell(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it is our child");
    }

    /// It stands still, until it is told to go on.
    fn halt(&self) {
        self.tell(Signal::STOP);
        let stat = format!("/proc/{}/stat", self.child.id());
        wait_for("the command to stand still", || {
            let stat = std::fs::read_to_string(&stat).expect("it is there");
            stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T')).then_some(())
        });
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.said).expect("it is there")
    }

    /// Its exit code, and what it has said.
    fn end(mut self) -> (Option<i32>, String) {
        let ended = wait_for("the command to end", || self.child.try_wait().expect("it is our child"));
        (ended.code(), self.said())
    }
}

/// A machine that needs next to nothing, and its snapshot `one`.
fn small() -> Lab {
    let lab = Lab::empty();
    lab.ok(&["vm", "create", BASE, "--memory", "32M", "--accel", "tcg", "--disk", "new:16M"]);
    lab.ok(&["snapshot", "create", BASE, "one"]);
    lab
}

/// The QEMUs that run a machine, or are about to.
fn qemus(lab: &Lab) -> usize {
    let line = |process: &Process| std::fs::read(format!("/proc/{}/cmdline", process.pid.as_raw_nonzero()));
    let runs = |process: &&Process| line(process).is_ok_and(|line| String::from_utf8_lossy(&line).contains("guest="));
    lab.processes().iter().filter(runs).count()
}

/// All machines that are left are whole, those that run are as many as QEMUs, and nothing is out of sight.
#[track_caller]
fn assert_nothing_is_half_done(lab: &Lab) {
    let names = names(lab);
    for name in &names {
        assert_whole(lab, name);
    }
    assert_eq!(hidden(lab), Vec::<String>::new());
    let running = names.iter().filter(|name| lab.state(name) == "running").count();
    wait_for("as many QEMUs as there are machines that run", || (qemus(lab) == running).then_some(()));
    assert_eq!(lab.sockets().len(), running);
}

/// Every second one of many has a QEMU that does not come up before it may. When no other can be begun, the command gets a signal. How it has
/// ended, and how many machines there are.
fn starting_many_is_struck(signal: Signal, heard: &str) -> (Lab, Going, u32) {
    let lab = small();
    let at_once = u32::try_from(std::thread::available_parallelism().map_or(1, usize::from)).expect("not so many");
    let all = 2 * at_once + 1;
    let (qemu, reached, go) = (lab.path("qemu"), lab.path("reached"), lab.path("go"));
    let waiting: Vec<String> = (1..=at_once).map(|n| format!("*\"guest=t-{} \"*", 2 * n)).collect();
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in {}) touch {reached}.$$; while [ ! -e {go} ]; do sleep 0.05; done;; esac\n\
         exec qemu-system-x86_64 \"$@\"\n",
        waiting.join("|"),
        reached = reached.display(),
        go = go.display(),
    );
    std::fs::write(&qemu, script).expect("there is room");
    std::fs::set_permissions(&qemu, PermissionsExt::from_mode(0o700)).expect("it is ours");
    let lab = lab.on_qemu(qemu);
    let count = all.to_string();
    let going = Going::begin(&lab, &["vm", "create", "t", "--from", "Tenby@one", "--count", &count, "--start"]);
    wait_for("all that are begun to wait", || {
        let there = std::fs::read_dir(lab.path("")).expect("it is there").flatten();
        let waiting = there.filter(|entry| entry.file_name().to_string_lossy().starts_with("reached.")).count();
        (waiting == at_once as usize).then_some(())
    });
    going.tell(signal);
    wait_for("the command to hear it", || going.said().contains(heard).then_some(()));
    (lab, going, all)
}

/// Ctrl-C while many are started: those that run go on, those that have begun are cancelled, no more are begun; and it is said of each.
#[test]
fn starting_many_that_is_cancelled_says_what_became_of_each() {
    let (lab, going, all) = starting_many_is_struck(Signal::INT, "cancelling; once more leaves");
    std::fs::write(lab.path("go"), "").expect("there is room");
    let (code, said) = going.end();
    assert_eq!(code, Some(130), "{said}");
    let machines: Vec<String> = (1..=all).map(|n| format!("t-{n}")).collect();
    assert_eq!(names(&lab).len(), machines.len() + 1, "all are made: {said}");
    let is_off = |name: &&String| said.contains(&format!("{name} was not started: "));
    for name in &machines {
        assert_eq!(lab.state(name), if is_off(&name) { "off" } else { "running" }, "{name}: {said}");
    }
    let off: Vec<&String> = machines.iter().filter(is_off).collect();
    assert_eq!(off.last().map(|name| name.as_str()), machines.last().map(String::as_str), "it was not begun: {said}");
    let started = format!("started {} of {all} machines, but not {}", machines.len() - off.len(), off[0]);
    assert!(said.contains(&started), "{started}: {said}");
    let hint = format!("tenby vm start {}", off[0]);
    assert!(said.contains(&hint), "{said}");
    assert_nothing_is_half_done(&lab);
    lab.ok(&["vm", "start", off[0]]);
    delete_all(&lab);
}

/// SIGTERM ends the command only: what was begun goes on, and it is said how to follow it.
#[test]
fn a_command_that_is_ended_while_it_starts_many_leaves_what_it_has_begun() {
    let (lab, going, all) = starting_many_is_struck(Signal::TERM, "left running");
    let (code, said) = going.end();
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("tenby job watch ") && said.contains(&format!("t-{all} was not started: ")), "{said}");
    assert_eq!(lab.state(&format!("t-{all}")), "off");
    std::fs::write(lab.path("go"), "").expect("there is room");
    for n in 1..all {
        wait_for("what was begun to run", || (lab.state(&format!("t-{n}")) == "running").then_some(()));
    }
    assert_nothing_is_half_done(&lab);
    delete_all(&lab);
}

/// Ctrl-C while they are made: none are, or all, and none is started.
#[test]
fn making_many_that_is_cancelled_makes_all_or_none_and_starts_none() {
    // (Whether it is heard before they are made, or only afterwards.)
    for late in [false, true] {
        let lab = small();
        let names_lock = File::open(lab.root().join("lock")).expect("it is there");
        names_lock.lock().expect("locked");
        let going = Going::begin(&lab, &["vm", "create", "t", "--from", "Tenby@one", "--count", "3", "--start"]);
        wait_for("the worker to be asked", || {
            let jobs = lab.json(&["job", "list", BASE]);
            let clone = |job: &Value| job["kind"] == "clone" && job["ended"].is_null();
            jobs["jobs"].as_array().expect("a list").iter().any(clone).then_some(())
        });
        if late {
            going.halt();
            drop(names_lock);
            wait_for("all to be made", || (names(&lab).len() == 4).then_some(()));
            going.tell(Signal::INT);
            going.tell(Signal::CONT);
        } else {
            going.tell(Signal::INT);
            wait_for("the command to hear it", || going.said().contains("cancelling").then_some(()));
            drop(names_lock);
        }
        let (code, said) = going.end();
        assert_eq!(code, Some(130), "{said}");
        match names(&lab).len() {
            1 if !late => assert!(said.contains("cancelled; nothing has changed"), "{said}"),
            4 => {
                assert!(said.contains("started 0 of 3 machines, but not t-1, t-2, t-3: cancelled"), "{said}");
                assert!(said.contains("tenby vm start t-1"), "{said}");
            }
            made => panic!("{made} machines: {said}"),
        }
        assert_nothing_is_half_done(&lab);
        assert_eq!(qemus(&lab), 0);
        delete_all(&lab);
    }
}

/// A disk that was taken in place cannot be shared: it is copied, and that is said before. Deleted, the source merges into it what is its own.
#[test]
fn what_was_taken_in_place_is_copied() {
    let lab = Lab::empty();
    for (name, format) in [("base.vhdx", "vhdx"), ("base.raw", "raw")] {
        let path = lab.path(name).to_string_lossy().into_owned();
        lab.ok(&["disk", "create", &path, "--size", "8M"]);
        let disk = format!("{path},in-place,format={format}");
        lab.ok(&["vm", "create", "web", "--disk", &disk]);
        lab.ok(&["snapshot", "create", "web", "one"]);
        let made = lab.tenby(&["vm", "create", "twin", "--from", "web@one"]);
        assert!(made.exits(0).stderr.contains("taken in place"), "{}", made.stderr);
        assert!(files(&lab, "twin").iter().any(|(_, links)| *links == 1));
        assert_whole(&lab, "twin");
        lab.ok(&["vm", "delete", "web"]);
        assert!(lab.path(name).exists());
        assert_whole(&lab, "twin");
        delete_all(&lab);
    }
}

/// The next worker of `name` will die at `step`.
fn arm(lab: &Lab, name: &str, step: &str) {
    wait_for("the workers to leave", || lab.worker().is_none().then_some(()));
    let mut set = lab.command(&["vm", "set", name, "--note", step]);
    let status = set.env("TENBY_DIE_AT", step).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.expect("the program runs").success());
}

#[track_caller]
fn dies_at(lab: &Lab, name: &str, step: &str, request: &[&str]) -> Output {
    arm(lab, name, step);
    let doomed = lab.worker().expect("a worker");
    let output = lab.tenby(request);
    assert!([0, 1, 4].contains(&output.code), "{}: {} {}", output.command, output.code, output.stderr);
    let alive = lab.processes().iter().any(|process| process.pid == doomed);
    assert!(!alive, "the worker never came to {step}");
    output
}

/// Folders that are out of sight.
fn hidden(lab: &Lab) -> Vec<String> {
    lab.left().into_iter().filter(|name| name.starts_with('.')).collect()
}

#[test]
fn a_worker_that_dies_makes_all_or_none() {
    let lab = still();
    let before = files(&lab, BASE).len();
    for step in [
        "clone:journalled",
        "clone:linked",
        "clone:linked#6",
        "clone:made",
        "clone:made#2",
        "clone:named",
        "clone:named#2",
        "clone:committed",
    ] {
        let output = dies_at(&lab, BASE, step, &["vm", "create", "t", "--from", "Tenby@two", "--count", "2"]);
        let made = names(&lab).len() - 1;
        assert_eq!(made, if output.code == 0 { 2 } else { 0 }, "{step}: {output:?}");
        assert_eq!(
            output.code == 0,
            step.starts_with("clone:named") || step == "clone:committed",
            "{step}: {output:?}"
        );
        assert_eq!(hidden(&lab), Vec::<String>::new(), "{step}");
        for name in names(&lab) {
            assert_whole(&lab, &name);
        }
        assert_eq!(files(&lab, BASE).len(), before);
        if made > 0 {
            lab.ok(&["vm", "delete", "t-1"]);
            lab.ok(&["vm", "delete", "t-2"]);
        }
        assert!(files(&lab, BASE).iter().all(|(_, links)| *links == 1), "{step}: {:?}", files(&lab, BASE));
    }
    delete_all(&lab);
}

#[test]
fn a_worker_that_dies_detaches_or_changes_nothing() {
    let lab = still();
    for step in ["detach:journalled", "detach:copied", "detach:copied#2", "detach:committed"] {
        lab.ok(&["vm", "create", "t", "--from", "Tenby@two"]);
        let output = dies_at(&lab, "t", step, &["vm", "detach", "t"]);
        let shared = lab.json(&["vm", "show", "t"])["shared"].as_u64();
        assert_eq!(shared == Some(0), output.code == 0, "{step}: {output:?}");
        assert_whole(&lab, "t");
        assert_whole(&lab, BASE);
        lab.ok(&["vm", "delete", "t"]);
    }
    delete_all(&lab);
}

#[test]
fn a_worker_that_dies_deletes_the_machine_all_the_same() {
    let lab = still();
    for (step, victim) in
        [("delete-machine:hidden", "t"), ("delete-machine:gone", "t"), ("delete-machine:hidden", BASE)]
    {
        lab.ok(&["vm", "create", "t", "--from", "Tenby@two"]);
        dies_at(&lab, victim, step, &["vm", "delete", victim]);
        let rest = if victim == "t" { BASE } else { "t" };
        assert_eq!(names(&lab), [rest], "{step}");
        assert_eq!(hidden(&lab), Vec::<String>::new(), "{step}");
        assert!(files(&lab, rest).iter().all(|(_, links)| *links == 1), "{step}: {:?}", files(&lab, rest));
        assert_whole(&lab, rest);
    }
    delete_all(&lab);
}

#[test]
fn a_worker_that_dies_takes_over_or_changes_nothing() {
    let lab = still();
    lab.ok(&["vm", "create", "lab", "--disk", "new:16M"]);
    let steps = [
        (BASE, "lend:journalled"),
        (BASE, "clone:linked"),
        (BASE, "clone:made"),
        (BASE, "lend:committed"),
        ("lab", "take-over:journalled"),
        ("lab", "take-over:files"),
        ("lab", "take-over:committed"),
    ];
    for (victim, step) in steps {
        let output = dies_at(&lab, victim, step, &["snapshot", "apply", "lab", "Tenby@two", "--discard"]);
        let taken_over = lab.json(&["vm", "show", "lab"])["disks"].as_array().expect("a list").len() == 2;
        assert_eq!(taken_over, output.code == 0, "{step}: {output:?}");
        lab.ok(&["vm", "list"]);
        assert_whole(&lab, "lab");
        assert_whole(&lab, BASE);
        lab.ok(&["vm", "delete", "lab"]);
        assert_eq!(hidden(&lab), Vec::<String>::new(), "{step}");
        assert!(files(&lab, BASE).iter().all(|(_, links)| *links == 1), "{step}: {:?}", files(&lab, BASE));
        lab.ok(&["vm", "create", "lab", "--disk", "new:16M"]);
    }
    delete_all(&lab);
}

/// The ledger of a clone is lost: it comes back from its files, although most of them say whose they were.
#[test]
fn a_clone_is_rescued_like_any_other() {
    let lab = still();
    lab.ok(&["vm", "create", "t", "--from", "Tenby@two"]);
    lab.ok(&["snapshot", "create", "t", "own"]);
    let folder = folder(&lab, "t");
    wait_for("the workers to leave", || lab.worker().is_none().then_some(()));
    let before = files(&lab, "t");
    std::fs::remove_file(folder.join("ledger")).expect("it is there");
    let rescued = lab.json(&["vm", "rescue", &folder.to_string_lossy()]);
    assert_eq!(rescued["name"], "t", "{rescued}");
    let tree = lab.json(&["snapshot", "list", "t"]);
    let snapshots: Vec<&Value> = tree["snapshots"].as_array().expect("a list").iter().map(|s| &s["name"]).collect();
    assert_eq!(snapshots, ["own"], "not the other machine's: {rescued}");
    assert_eq!(files(&lab, "t"), before);
    assert_whole(&lab, "t");
    delete_all(&lab);
}
