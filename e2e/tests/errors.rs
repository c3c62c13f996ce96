//! Bad input: the right exit code, words that name what is wrong, and nothing changed.

use e2e::{BASE, Lab, SmallDisk, wait_for};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

/// A saved machine with a snapshot, and what must not change about it.
struct Untouched {
    lab: Lab,
    rows: Value,
    files: Vec<(String, u64)>,
}

impl Untouched {
    fn new() -> Self {
        let lab = Lab::with_base();
        lab.snapshot("Monday");
        // Its worker does this after it has written to the files what they are now.
        lab.ok(&["vm", "save", BASE]);
        let (rows, files) = (lab.json(&["vm", "ledger", BASE])["machine"].clone(), lab.files());
        Self { lab, rows, files }
    }

    /// Ends with `code` and a message with `words` in it; the machine is as it was, and it is the only one.
    #[track_caller]
    fn refuses(&self, code: i32, words: &str, args: &[&str]) -> Value {
        let error = self.lab.fails(code, words, args);
        assert_eq!(self.lab.json(&["vm", "ledger", BASE])["machine"], self.rows, "{args:?} changed the ledger");
        assert_eq!(self.lab.files(), self.files, "{args:?} changed the files");
        assert_eq!(self.lab.json(&["vm", "list"])["vms"].as_array().map(Vec::len), Some(1), "{args:?} left a machine");
        let entries = fs::read_dir(self.lab.root()).expect("the root").filter_map(Result::ok);
        let folders = entries.filter(|entry| entry.path().is_dir()).count();
        assert_eq!(folders, 1, "{args:?} left a folder");
        error
    }
}

#[test]
fn what_is_not_there() {
    let machine = Untouched::new();
    for verb in ["start", "stop", "save", "pause", "resume", "restart", "show", "log", "ledger", "delete", "console"] {
        machine.refuses(4, "Tenbi", &["vm", verb, "Tenbi"]);
    }
    for verb in ["show", "delete", "apply"] {
        let discard: &[&str] = if verb == "apply" { &["--discard"] } else { &[] };
        machine.refuses(4, "Tuesday", &[&["snapshot", verb, BASE, "Tuesday"], discard].concat());
    }
    machine.refuses(4, "Tenbi", &["snapshot", "create", "Tenbi"]);
    machine.refuses(4, "", &["job", "show", "ffff"]);
}

#[test]
fn words_that_make_no_sense() {
    let machine = Untouched::new();
    let usage: &[&[&str]] = &[
        &["vm", "create", "x", "--memory", "lots"],
        &["vm", "create", "x", "--memory", "1"],
        &["vm", "create", "x", "--memory", "99999999999999999999"],
        &["vm", "create", "x", "--cpus", "0"],
        &["vm", "create", "x", "--disk", "new:"],
        &["vm", "create", "x", "--disk", "new:0"],
        &["vm", "create", "x", "--disk", "new:1G,bus=floppy"],
        &["vm", "create", "x", "--publish", "99999:1"],
        &["vm", "frobnicate", BASE],
        &["vm", "set", BASE],
        &["snapshot", "apply", BASE, "Monday", "--keep", "--discard"],
        &["snapshot"],
    ];
    for args in usage {
        machine.refuses(2, "", args);
    }
}

#[test]
fn names_that_are_none() {
    let machine = Untouched::new();
    let long = "x".repeat(10_000);
    for name in ["", " ", "a/b", "../../etc/passwd", "a@b", "new\nline", "bell\u{7}", "\u{1b}[31mred", &long] {
        machine.refuses(2, "", &["vm", "create", name, "--disk", "new:1M"]);
        machine.refuses(2, "", &["vm", "rename", BASE, name]);
        machine.refuses(2, "", &["snapshot", "create", BASE, name]);
        machine.refuses(2, "", &["snapshot", "rename", BASE, "Monday", name]);
        machine.refuses(2, "", &["snapshot", "apply", BASE, "Monday", "--keep-as", name]);
    }
    // A name that leads a machine astray when it is looked up is merely not found.
    for name in ["../..", "a/b", &long] {
        let output = machine.lab.tenby(&["--json", "vm", "start", name]);
        assert!([2, 4].contains(&output.code), "{name:.20}: {output:?}");
    }
    machine.refuses(2, "", &["--", "vm", "create", "-x"]);
    // A hundred characters are a name, whatever they are.
    let name = "日本 ñ'\"$(rm -rf)`;&|".chars().cycle().take(100).collect::<String>();
    machine.lab.ok(&["snapshot", "create", BASE, &name]);
    machine.lab.ok(&["snapshot", "show", BASE, &name]);
}

#[test]
fn a_name_twice() {
    let machine = Untouched::new();
    machine.refuses(3, BASE, &["vm", "create", BASE, "--disk", "new:1M"]);
}

#[test]
fn an_ambiguous_prefix_lists_its_candidates() {
    let lab = Lab::with_base();
    // Among seventeen ids two begin with the same digit.
    let mut ids: Vec<String> = (0..17).map(|number| lab.snapshot(&format!("number {number}"))).collect();
    ids.sort();
    let digit = |id: &str| id.chars().next().expect("an id");
    let twin = ids.windows(2).find(|pair| digit(&pair[0]) == digit(&pair[1])).expect("seventeen ids, sixteen digits");
    let prefix = twin[0][..1].to_owned();
    let error = lab.fails(4, "", &["snapshot", "delete", BASE, &prefix]);
    assert!(error["candidates"].as_array().expect("a list").len() >= 2, "{error}");
    assert_eq!(lab.tree()["snapshots"].as_array().expect("a list").len(), 17);
}

/// A disk that is no disk, or not what its name says.
#[test]
fn files_that_are_not_what_they_claim() {
    let machine = Untouched::new();
    let lab = &machine.lab;
    let file = |name: &str, content: &[u8]| {
        let path = lab.path(name);
        fs::write(&path, content).expect("there is room");
        path.to_string_lossy().into_owned()
    };
    let good = lab.path("good.vhdx").to_string_lossy().into_owned();
    lab.ok(&["disk", "create", &good, "--size", "16M"]);
    let image = fs::read(&good).expect("it was made");

    let cut = file("cut.vhdx", &image[..image.len() / 2]);
    let mut bytes = image.clone();
    // Both headers: without them nothing in the file can be believed.
    bytes[64 << 10..192 << 10].fill(0xa5);
    let beheaded = file("beheaded.vhdx", &bytes);
    let text = file("letter.vhdx", b"Dear Sir or Madam");
    let empty = file("empty.vhdx", b"");
    for broken in [&cut, &beheaded, &text, &empty] {
        machine.refuses(5, "", &["vm", "create", "x", "--disk", broken]);
        machine.refuses(5, "", &["vm", "create", "x", "--disk", &format!("{broken},in-place")]);
        machine.refuses(5, "", &["disk", "info", broken]);
        machine.refuses(5, "", &["disk", "hash", broken]);
    }
    // What a guest wrote into a raw disk must not make it another format.
    let disguised = file("disguised.raw", &image);
    let error = machine.refuses(5, "", &["vm", "create", "x", "--disk", &disguised]);
    let message = error["message"].as_str().unwrap_or_default().to_lowercase();
    assert!(message.contains("raw") && message.contains("vhdx"), "both readings: {message}");
    // Without a signature nobody guesses.
    let unknown = file("unknown.img2", &[0; 4096]);
    machine.refuses(5, "", &["vm", "create", "x", "--disk", &unknown]);
    for absent in ["/nowhere/disk.vhdx", "/dev/null/x"] {
        let output = lab.tenby(&["--json", "vm", "create", "x", "--disk", absent]);
        assert!([1, 4].contains(&output.code), "{output:?}");
    }
    machine.refuses(5, "", &["vm", "create", "x", "--disk", "/etc"]);
}

/// A parent that is missing, changed, or elsewhere is not opened.
#[test]
fn parents_that_are_not_theirs() {
    let machine = Untouched::new();
    let lab = &machine.lab;
    let path = |name: &str| lab.path(name).to_string_lossy().into_owned();
    let (parent, child) = (path("parent.vhdx"), path("child.avhdx"));
    lab.ok(&["disk", "create", &parent, "--size", "16M"]);
    lab.ok(&["disk", "create", &child, "--parent", &parent, "--size", "16M"]);
    lab.ok(&["disk", "hash", &child]);

    let kept = fs::read(&parent).expect("it is there");
    fs::remove_file(&parent).expect("it is ours");
    machine.refuses(5, "parent", &["disk", "hash", &child]);
    machine.refuses(5, "parent", &["vm", "create", "x", "--disk", &child]);
    // Another disk of the same name and size has another identity.
    lab.ok(&["disk", "create", &parent, "--size", "16M"]);
    machine.refuses(5, "parent", &["disk", "hash", &child]);
    machine.refuses(5, "parent", &["vm", "create", "x", "--disk", &child]);
    fs::write(&parent, kept).expect("it is ours");
    lab.ok(&["disk", "hash", &child]);

    // In a folder that nobody named.
    fs::create_dir(lab.path("elsewhere")).expect("it is ours");
    fs::rename(&parent, lab.path("elsewhere/parent.vhdx")).expect("it is ours");
    machine.refuses(5, "parent", &["disk", "hash", &child]);
    machine.refuses(5, "parent", &["vm", "create", "x", "--disk", &child]);
}

/// No space left: a clear error, and nothing half-made.
#[test]
fn no_space() {
    if !rustix::process::getuid().is_root() {
        // Only root can make a small file system.
        return;
    }
    let lab = Lab::with_base();
    let small = SmallDisk::mount(&lab.path("small"), "24m");
    let root = small.path().to_string_lossy().into_owned();
    let big = lab.path("big.raw");
    fs::write(&big, vec![7; 64 << 20]).expect("there is room");
    let spec = format!("{},format=raw", big.display());
    let error = lab.fails(1, "", &["--root", &root, "vm", "create", "x", "--disk", &spec]);
    assert!(error["message"].as_str().unwrap_or_default().contains("no room for"), "{error}");
    assert_eq!(lab.json(&["--root", &root, "vm", "list"])["vms"], Value::Array(Vec::new()));
    let left: Vec<_> = fs::read_dir(small.path())
        .expect("it is mounted")
        .filter_map(Result::ok)
        .filter(|e| e.path().is_dir())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// `vm check` of a machine off and running, sound and with a file missing, which stops nobody but those who need it.
#[test]
fn a_machines_files_are_checked() {
    let (lab, _witness) = Lab::running();
    lab.snapshot("Monday");
    lab.snapshot("Tuesday");
    assert_eq!(lab.json(&["vm", "check", BASE])["clean"], true);
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    let audit = lab.json(&["vm", "check", BASE]);
    assert_eq!((&audit["clean"], &audit["findings"]), (&Value::Bool(true), &Value::Array(Vec::new())), "{audit}");
    assert!(lab.ok(&["vm", "check", BASE]).contains("files are sound"));

    let machine = lab.json(&["vm", "ledger", BASE])["machine"].take();
    let mut snapshots = machine["snapshots"].as_object().expect("snapshots").values();
    let tuesday = snapshots.find(|snapshot| snapshot["name"] == "Tuesday").expect("it is there");
    let file = machine["layers"][tuesday["memory"].as_str().expect("a layer")]["file"].as_str().expect("a file");
    fs::remove_file(lab.machine_folder().join(file)).expect("it is there");
    let output = lab.tenby(&["vm", "check", BASE]);
    output.exits(5);
    assert!(
        output.stdout.contains("is missing") && output.stdout.contains("Tuesday cannot be relied on"),
        "{}",
        output.stdout
    );
    lab.fails(5, "missing", &["snapshot", "apply", BASE, "Tuesday", "--discard", "--start"]);
    lab.ok(&["snapshot", "apply", BASE, "Monday", "--discard", "--start"]);
    assert_eq!(lab.state(BASE), "running");
}

/// Changes the last byte of a file that is not zero, and gives its place.
fn flip(path: &Path, at: Option<usize>) -> usize {
    let mut bytes = fs::read(path).expect("it is there");
    let at = at.or_else(|| bytes.iter().rposition(|byte| *byte != 0)).expect("it holds something");
    bytes[at] = !bytes[at];
    let file = fs::OpenOptions::new().write(true).open(path).expect("it is ours");
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes[at..=at], at as u64).expect("it is ours");
    at
}

/// `vm check --deep` of a machine that runs and of one that is off: clean, with a byte of a sealed disk and of a memory changed, and without hashes.
#[test]
fn what_a_machine_holds_is_compared_with_what_was_recorded() {
    let (lab, mut witness) = Lab::running();
    witness.ask("fill-disk vda 16M 8 3");
    lab.snapshot("Monday");
    witness.ask("write vda 4M tuesday");
    lab.snapshot("Tuesday");
    let audit = lab.wait_hashed();
    // Two disks and a memory of each, and the memory that the machine was saved with has gone.
    assert_eq!((&audit["clean"], &audit["compared"]["layers"]), (&Value::Bool(true), &Value::from(6)), "{audit}");
    assert_eq!(audit["compared"]["sealed"], 6, "{audit}");

    let machine = lab.json(&["vm", "ledger", BASE])["machine"].take();
    let mut snapshots = machine["snapshots"].as_object().expect("snapshots").values();
    let monday = snapshots.find(|snapshot| snapshot["name"] == "Monday").expect("it is there");
    for layer in [&monday["disks"]["disk0"], &monday["memory"]] {
        let file = machine["layers"][layer.as_str().expect("a layer")]["file"].as_str().expect("a file");
        let path = lab.machine_folder().join(file);
        let at = flip(&path, None);
        let output = lab.tenby(&["--json", "vm", "check", BASE, "--deep"]);
        let audit = output.exits(5).json();
        let findings = audit["findings"].as_array().expect("findings");
        // Besides, the leaves that are being written are only looked at.
        let findings: Vec<_> = findings.iter().filter(|finding| finding["kind"] != "unread").collect();
        assert!(findings.len() == 1 && audit["clean"] == false, "{audit}");
        assert_eq!(
            (&findings[0]["kind"], &findings[0]["where"]),
            (&Value::from("changed"), &Value::from(path.to_string_lossy()))
        );
        assert!(findings[0]["effect"].as_str().is_some_and(|effect| effect.contains("Monday")), "{audit}");
        let output = lab.tenby(&["vm", "check", BASE, "--deep"]);
        assert!(output.exits(5).stdout.contains("are not as recorded"), "{}", output.stdout);
        flip(&path, Some(at));
    }

    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    wait_for("the worker to leave", || lab.worker().is_none().then_some(()));
    assert!(lab.ok(&["vm", "check", BASE, "--deep"]).contains("files are sound; 6 of 6"));
    assert_eq!(lab.worker(), None, "a check that finds nothing wakes nobody");
    // A record that is gone is missed, and made again.
    let hashes = lab.machine_folder().join("hashes");
    fs::remove_file(hashes.join(monday["memory"].as_str().expect("a layer"))).expect("it is there");
    let audit = lab.json(&["vm", "check", BASE, "--deep"]);
    assert_eq!(
        (&audit["clean"], &audit["findings"][0]["kind"]),
        (&Value::Bool(true), &Value::from("unhashed")),
        "{audit}"
    );
    lab.wait_hashed();
    lab.ok(&["snapshot", "delete", BASE, "Monday", "--wait"]);
    let audit = lab.wait_hashed();
    assert_eq!(audit["compared"]["layers"], 3, "{audit}");
}

/// A page of a snapshot's memory that has changed on the disk goes to no guest: that is said, and the snapshot can be had without its memory.
#[test]
fn a_damaged_page_of_a_memory_reaches_no_guest() {
    let (lab, _witness) = Lab::running();
    lab.snapshot("Monday");
    // The memory that the machine was saved with is merged into it.
    lab.wait_hashed();
    let machine = lab.json(&["vm", "ledger", BASE])["machine"].take();
    let monday = machine["snapshots"].as_object().expect("snapshots").values().next().expect("it is there");
    let file = machine["layers"][monday["memory"].as_str().expect("a layer")]["file"].as_str().expect("a file");
    let path = lab.machine_folder().join(file);
    // RAM comes first in the file, its devices' state last.
    let bytes = fs::read(&path).expect("it is there");
    let at = (bytes.len() / 3..bytes.len()).find(|at| bytes[*at] != 0).expect("it holds something");
    flip(&path, Some(at));

    let applied = lab.tenby(&["snapshot", "apply", BASE, "Monday", "--discard"]);
    let told = if applied.code == 0 {
        // Its guest runs, until it needs that page.
        wait_for("the alert", || lab.json(&["vm", "show", BASE])["alert"].as_str().map(str::to_owned))
    } else {
        applied.exits(5).stderr.clone()
    };
    assert!(told.contains("the memory of Monday") && told.contains("is not as it was captured"), "{told}");
    assert!(told.contains(file), "{told}");
    assert!(told.contains(&format!("tenby snapshot apply {BASE} Monday --no-memory")), "{told}");
    lab.ok(&["snapshot", "apply", BASE, "Monday", "--no-memory", "--discard"]);
    assert_eq!(lab.state(BASE), "running");
    let checked = lab.tenby(&["vm", "check", BASE, "--deep"]);
    let checked = &checked.exits(5).stdout;
    assert!(checked.contains(file) && checked.contains("are not as recorded"), "{checked}");

    // So much of it that no guest can be loaded: the one that runs goes on.
    let mut bytes = fs::read(&path).expect("it is there");
    let (from, to) = (8 << 20, bytes.len() - (16 << 20));
    bytes[from..to].iter_mut().for_each(|byte| *byte = !*byte);
    let file = fs::OpenOptions::new().write(true).open(&path).expect("it is ours");
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes[from..to], from as u64).expect("it is ours");
    let before = lab.json(&["vm", "show", BASE]);
    lab.fails(5, "the memory of Monday", &["snapshot", "apply", BASE, "Monday", "--discard"]);
    let after = lab.json(&["vm", "show", BASE]);
    assert_eq!((&after["state"], &after["qemu"]), (&Value::from("running"), &before["qemu"]));
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
}

/// On a disk without room a snapshot is deleted all the same; its merge waits, and a guest that cannot write stands still. Both go on by
/// themselves when there is room, the merge when its user wants it to.
#[test]
fn a_full_disk_holds_work_up_and_loses_nothing() {
    let lab = Lab::with_base();
    let small = lab.on_a_small_disk("256m");
    let start = || {
        lab.ok(&["vm", "start", BASE]);
        let mut witness = lab.witness(BASE);
        witness.resync();
        witness
    };
    start().ask("fill-disk vda 4M 24 1");
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.snapshot("Monday");
    // What little a guest's leaf holds has to have room twice.
    start().ask("fill-disk vda 36M 24 2");
    lab.ok(&["vm", "pause", BASE]);

    small.fill_up();
    lab.ok(&["snapshot", "delete", BASE, "Monday"]);
    let waiting = || {
        let mut jobs = lab.json(&["job", "list", BASE])["jobs"].take();
        let waits = |job: &&mut Value| job["kind"] == "merge" && job["state"] == "waiting" && job["reason"] == "space";
        jobs.as_array_mut()?.iter_mut().find(waits).map(|job| job["id"].as_str().expect("an id").to_owned())
    };
    let merge = wait_for("the merge to wait for room", waiting);
    // Paused, it does not go on when there is room; then it goes on as slowly as it is told.
    lab.ok(&["job", "pause", &merge]);
    small.make_room();
    wait_for("the merge to find room", || {
        let job = lab.json(&["job", "show", &merge]);
        (job["state"] == "paused" && job["reason"].is_null()).then_some(())
    });
    lab.ok(&["job", "throttle", &merge, "16M"]);
    lab.ok(&["job", "resume", &merge]);
    lab.settle();
    assert_eq!(lab.json(&["job", "show", &merge])["state"], "completed");

    lab.ok(&["vm", "resume", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    small.fill_up();
    let asked = std::thread::spawn(move || {
        let answer = witness.ask("fill-disk vda 8M 24 3");
        (witness, answer)
    });
    wait_for("the guest to stand still", || {
        let machine = lab.json(&["vm", "show", BASE]);
        let alert = machine["alert"].as_str().unwrap_or_default().to_owned();
        (machine["state"] == "paused" && alert.contains("disk is full")).then_some(())
    });
    small.make_room();
    let (mut witness, _) = asked.join().expect("it was answered");
    assert_eq!(lab.state(BASE), "running");
    for (at, mib, seed) in [("8M", 24, 3), ("36M", 24, 2)] {
        assert_eq!(witness.ask(&format!("sum-disk vda {at} {mib} {seed}"))["ok"], true);
    }
    witness.prove();
    lab.assert_tidy();

    // Nor does it need the worker that knew.
    small.fill_up();
    let asked = std::thread::spawn(move || {
        let _ = witness.try_ask("fill-disk vda 8M 24 5", std::time::Duration::from_secs(5));
    });
    wait_for("the guest to stand still", || (lab.state(BASE) == "paused").then_some(()));
    lab.kill_worker();
    asked.join().expect("its console has ended");
    small.make_room();
    wait_for("the guest to go on", || (lab.state(BASE) == "running").then_some(()));
    let mut witness = lab.witness(BASE);
    witness.resync();
    assert_eq!(witness.ask("sum-disk vda 8M 24 5")["ok"], true);
    witness.prove();

    // One that is gone does not go on.
    lab.snapshot("Wednesday");
    small.fill_up();
    let asked = std::thread::spawn(move || {
        witness.try_ask("fill-disk vda 8M 24 4", std::time::Duration::from_secs(60)).is_err()
    });
    wait_for("the guest to stand still", || (lab.state(BASE) == "paused").then_some(()));
    lab.kill_qemu();
    wait_for("the machine to be off", || (lab.state(BASE) == "off").then_some(()));
    small.make_room();
    for _ in 0..30 {
        assert_eq!(lab.state(BASE), "off");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(asked.join().expect("it ended"), "nobody was there to answer");
}

/// What a merge moves is given up piece by piece where there is no room to have it twice.
#[test]
fn a_merge_makes_do_with_less_room_than_it_moves() {
    let lab = Lab::with_base();
    let small = lab.on_a_small_disk("384m");
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.snapshot("Monday");
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    witness.ask("fill-disk vda 4M 56 1");
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.snapshot("Tuesday");
    lab.settle();

    small.fill_up_to(20 << 20);
    let plan = lab.json(&["snapshot", "delete", BASE, "Monday", "--dry-run"]);
    assert!(plan["bytes_moved"].as_u64().is_some_and(|bytes| bytes > 50 << 20), "{plan}");
    lab.ok(&["snapshot", "delete", BASE, "Monday", "--wait"]);
    assert!(!lab.ok(&["vm", "log", BASE]).contains("waits for room"));
    lab.assert_tidy();
    small.make_room();
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    assert_eq!(witness.ask("sum-disk vda 4M 56 1")["ok"], true);
}

/// Beside a guest as well: what is sealed is given up, and a leaf that holds much is sealed for it.
#[test]
fn a_merge_beside_a_guest_makes_do_with_less_room_than_it_moves() {
    let lab = Lab::with_base();
    let small = lab.on_a_small_disk("384m");
    let start = || {
        lab.ok(&["vm", "start", BASE]);
        let mut witness = lab.witness(BASE);
        witness.resync();
        witness
    };
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.snapshot("Monday");
    start().ask("fill-disk vda 4M 56 1");
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.snapshot("Tuesday");
    let mut witness = start();
    let makes_do = |snapshot: &str| {
        lab.settle();
        small.fill_up_to(20 << 20);
        let plan = lab.json(&["snapshot", "delete", BASE, snapshot, "--dry-run"]);
        assert!(plan["bytes_moved"].as_u64().is_some_and(|bytes| bytes > 50 << 20), "{plan}");
        lab.ok(&["snapshot", "delete", BASE, snapshot, "--wait"]);
        assert!(!lab.ok(&["vm", "log", BASE]).contains("waits for room"));
        small.make_room();
    };
    makes_do("Monday");
    witness.prove();
    witness.ask("fill-disk vdb 4M 56 2");
    makes_do("Tuesday");
    assert_eq!(lab.state(BASE), "running");
    for (disk, seed) in [("vda", 1), ("vdb", 2)] {
        assert_eq!(witness.ask(&format!("sum-disk {disk} 4M 56 {seed}"))["ok"], true);
    }
    witness.prove();
    lab.assert_tidy();
}

/// A running machine's leaf changes from moment to moment: it is neither read nor written by anybody else. What is sealed may be read.
#[test]
fn a_disk_that_a_guest_writes_is_its_own() {
    let (lab, _witness) = Lab::running();
    let own = lab.json(&["vm", "show", BASE])["disks"][0]["file"].as_str().expect("a file").to_owned();
    let socket = lab.path("disk.sock").display().to_string();
    for words in [
        &["disk", "hash", &own][..],
        &["disk", "map", &own],
        &["disk", "compare", &own, &own],
        &["disk", "convert", &own, "copy.raw"],
        &["disk", "serve", &own, "--read-only", "--socket", &socket],
    ] {
        let error = lab.fails(3, "is being written", words);
        assert!(error["hint"].as_str().is_some_and(|hint| hint.starts_with("tenby snapshot create")), "{error}");
    }
    for words in [&["disk", "compact", &own][..], &["disk", "resize", &own, "1G"], &["disk", "check", &own, "--repair"]]
    {
        lab.fails(3, &format!("belongs to the machine {BASE}"), words);
    }
    assert!(!lab.path("copy.raw").exists());
    lab.snapshot("Monday");
    lab.settle();
    lab.ok(&["disk", "hash", &own]);
}

/// A file taken in place is the guest's alone while it is written, and everybody's to read once it is sealed.
#[test]
fn a_disk_in_place_is_locked_while_a_guest_writes_it() {
    let lab = Lab::empty();
    for name in ["a.vhdx", "b.vhdx"] {
        lab.ok(&["disk", "create", name, "--size", "64M"]);
    }
    lab.create_guest_on(BASE, ["a.vhdx,in-place", "b.vhdx,in-place"]);
    let socket = lab.path("disk.sock").display().to_string();
    let serving = ["disk", "serve", "a.vhdx", "--read-only", "--socket", &socket];
    let mut reader = lab.command(&serving).spawn().expect("the program can be started");
    while !lab.path("disk.sock").exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    lab.fails(3, "a.vhdx is in use by process", &["vm", "start", BASE]);
    reader.kill().expect("it can be ended");
    reader.wait().expect("it ends");
    lab.ok(&["vm", "start", BASE]);
    // For others than us, too.
    let is_free = || Command::new("flock").args(["-n", "-s"]).arg(lab.path("a.vhdx")).arg("true").status();
    assert!(!is_free().expect("flock runs").success());
    lab.fails(3, "a.vhdx is being written", &["disk", "hash", "a.vhdx"]);
    lab.snapshot("Monday");
    lab.settle();
    lab.ok(&["disk", "hash", "a.vhdx"]);
    assert!(is_free().expect("flock runs").success());
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
}
