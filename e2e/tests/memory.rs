//! What a snapshot's memory holds, where it can be loaded, and what its guest then takes for the time.

use e2e::{BASE, Lab, Process, Witness, qemu_10, qemu_72, wait_for};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

/// Pages in a MiB.
const PAGES: u64 = 256;

/// Pages that the guest itself changes between two snapshots, beside those that it is told to: stacks, page tables, the journal's.
const OWN: u64 = 4 * PAGES;

/// What a snapshot's memory occupies beside its pages, bytes: the file's own tables, the state of the devices.
const BESIDE: u64 = 8 << 20;

/// RAM of the guest of many snapshots, MiB: 256, or as many as `TENBY_TEST_RAM` says, for a large one by hand.
fn ram() -> u64 {
    std::env::var("TENBY_TEST_RAM").map_or(256, |mib| mib.parse().expect("TENBY_TEST_RAM is a number of MiB"))
}

/// What fills the guest's RAM, as it should be.
fn sum(witness: &mut Witness) -> Value {
    let sum = witness.ask("sum-ram");
    assert_eq!(sum["ok"], true, "{sum}");
    sum["sum"].clone()
}

/// The numbers below `count` in an order that is always the same, and none that anybody would choose.
fn shuffled(count: u64) -> Vec<u64> {
    let mut numbers: Vec<u64> = (0..count).collect();
    numbers.sort_by_key(|number| (number + 20_261_127).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    numbers
}

/// So many snapshots in a row, before each of which a part of RAM is filled anew; then each is applied, and the guest proves its RAM.
fn in_a_row(lab: &Lab, count: u64) {
    let (filled, part) = (ram() / 4, ram() / 64);
    lab.create_guest_with(BASE, &format!("{}M", ram()));
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.wait_ready();
    witness.ask(&format!("fill-ram {filled} 1"));
    let mut sums = Vec::new();
    for number in 0..count {
        if number > 0 {
            let at = number * part % filled;
            witness.ask(&format!("refill-ram {at} {part} {}", number + 1));
        }
        sums.push(sum(&mut witness));
        lab.snapshot(&number.to_string());
    }
    assert_only_what_changed(lab, part * PAGES);

    for number in shuffled(count) {
        lab.ok(&["snapshot", "apply", BASE, &number.to_string(), "--discard"]);
        witness.resync();
        assert_eq!(sum(&mut witness), sums[number as usize], "what {number} holds");
        witness.prove();
    }
    lab.settle();
    lab.assert_tidy();
}

/// Every snapshot but the first holds the pages that were filled anew, and few others.
fn assert_only_what_changed(lab: &Lab, refilled: u64) {
    let tree = lab.tree();
    for snapshot in &tree["snapshots"].as_array().expect("a list")[1..] {
        let stored = snapshot["pages"]["stored"].as_u64().expect("a number");
        let bytes = snapshot["memory_bytes"].as_u64().expect("a number");
        println!("{}: {stored} pages, {bytes} bytes, {} ms", snapshot["name"], snapshot["pause_ms"]);
        assert!((refilled..=refilled + OWN).contains(&stored), "{refilled} pages were changed: {snapshot}");
        assert!(bytes <= stored * 4096 + BESIDE, "{snapshot}");
    }
}

#[test]
fn twelve_in_a_row_on_qemu_7_2() {
    in_a_row(&Lab::empty().on_qemu(qemu_72()), 12);
}

#[test]
fn twelve_in_a_row_on_qemu_10_0() {
    in_a_row(&Lab::empty().on_qemu(qemu_10()), 12);
}

/// It takes longer where QEMU cannot track memory, and `doctor` says so.
#[test]
fn four_in_a_row_of_an_ordinary_user() {
    let lab = Lab::empty().for_ordinary_users();
    in_a_row(&lab, 4);
    let found = lab.json(&["doctor"]);
    let userfaultfd = found["checks"].as_array().expect("a list").iter().find(|check| check["what"] == "userfaultfd");
    let userfaultfd = userfaultfd.unwrap_or_else(|| panic!("{found}"));
    assert_eq!(userfaultfd["ok"], false, "{found}");
    let cost = userfaultfd["cost"].as_str().expect("a cost");
    assert!(cost.contains("more than once") && cost.contains("until its memory is read"), "{cost}");
}

/// A guest that came up on this lab's QEMU, running.
fn boot(lab: &Lab) -> Witness {
    lab.create_guest(BASE);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.wait_ready();
    witness
}

/// Its guest, once it answers, and its nonce. (What an earlier boot has said is still in the console.)
fn answers(lab: &Lab) -> (Witness, Value) {
    let mut witness = lab.witness(BASE);
    let nonce = witness.resync()["nonce"].take();
    (witness, nonce)
}

/// The machine off, and its worker gone: the next may be another.
fn turn_off(lab: &Lab) {
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.settle();
    lab.kill(Process::is_worker);
}

/// Types what a hint says; what is said beside it.
fn type_hint(lab: &Lab, error: &Value) -> String {
    let hint = error["hint"].as_str().unwrap_or_else(|| panic!("no hint in {error}"));
    // What follows the command is for people.
    let command = hint.split("   ").next().unwrap_or_default();
    let words: Vec<&str> = command.strip_prefix("tenby ").expect("a command").split(' ').collect();
    lab.tenby(&words).exits(0).stderr.clone()
}

/// A QEMU that gives every machine one device more, so that no other can load the memory that was captured in it.
fn odd_qemu(lab: &Lab) -> std::path::PathBuf {
    let (path, qemu) = (lab.path("qemu-system-odd"), qemu_10());
    let qemu = qemu.display();
    let more = "-device virtio-balloon-pci,id=odd,bus=pcie.0,addr=0x1e";
    let script = format!("#!/bin/sh\n[ \"$1\" = -no-user-config ] && exec {qemu} \"$@\" {more}\nexec {qemu} \"$@\"\n");
    std::fs::write(&path, script).expect("a file of ours");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
    path
}

/// A machine that is off, on QEMU 10.0, with a snapshot `odd` whose memory that cannot load.
fn with_odd_memory() -> Lab {
    let lab = Lab::empty();
    let odd = odd_qemu(&lab);
    let lab = lab.on_qemu(odd);
    let mut witness = boot(&lab);
    witness.ask("write vda 4M odd");
    lab.snapshot("odd");
    turn_off(&lab);
    lab.on_qemu(qemu_10())
}

/// What this QEMU does not have is said before anything has changed, and what can be done without it works.
#[test]
fn memory_of_a_machine_that_this_qemu_does_not_have() {
    let lab = Lab::empty().on_qemu(qemu_10());
    let mut witness = boot(&lab);
    witness.ask("write vda 4M ten");
    lab.snapshot("ten");
    turn_off(&lab);

    let lab = lab.on_qemu(qemu_72());
    let rows = || lab.json(&["vm", "ledger", BASE])["machine"].take();
    let before = rows();
    let apply = ["snapshot", "apply", BASE, "ten", "--discard"];
    let error =
        lab.fails(3, "the memory of ten is of a pc-q35-10.0, which QEMU 7.2", &[&apply[..], &["--start"]].concat());
    assert!(error["message"].as_str().is_some_and(|message| message.contains("; QEMU 10.0")), "{error}");
    assert_eq!(rows(), before);
    let said = type_hint(&lab, &error);
    let (mut witness, nonce) = answers(&lab);
    assert_eq!(witness.ask("read vda 4M")["text"], "ten");
    // It came up anew, so it is what this QEMU has; the snapshot is not.
    assert_eq!(rows()["now"]["config"]["machine_type"], "pc-q35-7.2");
    let other = "is a pc-q35-7.2 from now on, to its guest another main board: QEMU 7.2";
    assert!(said.contains(other) && lab.ok(&["vm", "log", BASE]).contains(other), "{said}");

    lab.fails(3, "the memory of ten is of a pc-q35-10.0", &apply);
    lab.fails(3, "the memory of ten is of a pc-q35-10.0", &["snapshot", "apply", BASE, "ten", "--keep"]);
    assert_eq!(witness.nonce(), nonce.as_str().expect("a nonce"));
    assert_eq!(lab.tree()["snapshots"].as_array().map(Vec::len), Some(1));

    // Not started, it is saved; where there is such a QEMU it could go on.
    lab.ok(&[&apply[..], &["--no-start"]].concat());
    assert_eq!(lab.state(BASE), "saved");
    let before = rows();
    let error = lab.fails(3, "was saved with is of a pc-q35-10.0", &["vm", "start", BASE]);
    assert_eq!(rows(), before);
    type_hint(&lab, &error);
    lab.ok(&["vm", "start", BASE]);
    assert_ne!(answers(&lab).1, nonce);
}

/// What only QEMU can tell it tells while the old machine is still there.
#[test]
fn memory_that_qemu_cannot_load() {
    let lab = with_odd_memory();
    lab.ok(&["vm", "start", BASE]);
    let (mut witness, nonce) = answers(&lab);
    witness.ask("write vda 4M now");
    let error = lab.fails(1, "virtio-balloon", &["snapshot", "apply", BASE, "odd", "--discard"]);
    assert_eq!(lab.state(BASE), "running");
    assert_eq!(witness.resync()["nonce"], nonce);
    assert_eq!(witness.ask("read vda 4M")["text"], "now");
    witness.prove();
    assert_eq!(lab.sockets().len(), 1, "one QEMU");
    lab.settle();
    lab.assert_tidy();
    type_hint(&lab, &error);
    let (mut witness, other) = answers(&lab);
    assert_ne!(other, nonce);
    assert_eq!(witness.ask("read vda 4M")["text"], "odd");
}

/// Where the host has not the RAM for two, the old QEMU is given up first, and that is said.
#[test]
fn there_is_no_way_back_where_ram_is_scarce() {
    let lab = with_odd_memory().with_spare_ram(0);
    lab.ok(&["vm", "start", BASE]);
    let (mut witness, nonce) = answers(&lab);
    witness.ask("write vda 4M fine");
    lab.snapshot("fine");
    witness.ask("write vda 4M now");
    let said = lab.tenby(&["snapshot", "apply", BASE, "fine", "--discard"]);
    assert!(said.exits(0).stderr.contains("there is no way back"), "{said:?}");
    assert!(lab.ok(&["vm", "log", BASE]).contains("there is no way back"));
    assert_eq!((lab.state(BASE).as_str(), &witness.resync()["nonce"]), ("running", &nonce));
    assert_eq!(witness.ask("read vda 4M")["text"], "fine");
    witness.prove();

    // It does not come up: it is at the snapshot, and what was is kept.
    let error = lab.fails(
        1,
        "is saved, at the snapshot, and does not run",
        &["snapshot", "apply", BASE, "odd", "--keep-as", "was"],
    );
    assert_eq!(lab.state(BASE), "saved");
    let tree = lab.tree();
    let named = |name: &str| {
        let all = tree["snapshots"].as_array().expect("a list");
        all.iter().find(|one| one["name"] == name).unwrap_or_else(|| panic!("{tree}"))["id"].clone()
    };
    assert_eq!((&tree["now"]["parent"], tree["now"]["changed"].as_bool()), (&named("odd"), Some(false)));
    lab.settle();
    lab.assert_tidy();
    type_hint(&lab, &error);
    lab.ok(&["snapshot", "apply", BASE, "was", "--discard", "--start"]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    assert_eq!(witness.ask("read vda 4M")["text"], "fine");
    witness.prove();
}

/// A worker that dies when there is no way back leaves the machine at the snapshot, and that is what the command tells.
#[test]
fn a_worker_dies_when_there_is_no_way_back() {
    for step in ["apply:committed", "apply:old-ended", "start:up"] {
        let lab = Lab::with_base().with_spare_ram(0);
        lab.ok(&["vm", "start", BASE]);
        let (mut witness, nonce) = answers(&lab);
        witness.ask("write vda 4M it");
        lab.snapshot("it");
        witness.ask("write vda 4M now");
        lab.kill(Process::is_worker);
        let mut apply = lab.command(&["snapshot", "apply", BASE, "it", "--discard", "--json"]);
        let told = apply.env("TENBY_DIE_AT", step).output().expect("the program runs");
        let told: Value = serde_json::from_slice(&told.stdout).expect("a document");
        let message = told["error"]["message"].as_str().unwrap_or_else(|| panic!("{step}: {told}"));
        assert!(
            message.ends_with("is saved, at the snapshot, and does not run: the worker died before it was started"),
            "{step}: {message}"
        );
        assert_eq!(lab.state(BASE), "saved", "{step}");
        assert_eq!(lab.sockets().len(), 0, "{step}: no QEMU");
        lab.settle();
        lab.assert_tidy();
        type_hint(&lab, &told["error"]);
        let (mut witness, same) = answers(&lab);
        assert_eq!(same, nonce, "{step}");
        assert_eq!(witness.ask("read vda 4M")["text"], "it", "{step}");
        witness.prove();
    }
}

/// A guest that runs before its memory has come takes no RAM beside the old one; one whose memory comes as a whole does.
#[test]
fn ram_for_two_is_needed_where_memory_comes_as_a_whole() {
    for ordinary in [false, true] {
        // QEMU's own, and less than the guest's besides.
        let lab = Lab::with_base().with_spare_ram(300 << 20);
        let lab = if ordinary { lab.for_ordinary_users() } else { lab };
        lab.ok(&["vm", "start", BASE]);
        lab.snapshot("it");
        let said = lab.tenby(&["snapshot", "apply", BASE, "it", "--discard"]);
        assert_eq!(said.exits(0).stderr.contains("there is no way back"), ordinary, "{said:?}");
        lab.witness(BASE).resync();
    }
}

/// With its memory on its way a guest is lost like any other, and the snapshot is not.
#[test]
fn qemu_is_killed_while_memory_is_on_its_way() {
    let lab = Lab::with_base();
    // The worker that sends it dies, and any that the command has come after it, so that it stays on its way.
    let mut start = lab.command(&["vm", "start", BASE]);
    start.env("TENBY_DIE_AT", "restore:sending#60").stdout(Stdio::null()).stderr(Stdio::null());
    lab.snapshot("saved");
    lab.kill(Process::is_worker);
    start.status().expect("the program runs");
    wait_for("the worker to die", || lab.worker().is_none().then_some(()));
    lab.kill_qemu();
    let machine = lab.json(&["vm", "show", BASE]);
    assert_eq!(machine["state"], "off");
    let alert = machine["alert"].as_str().unwrap_or_else(|| panic!("{machine}"));
    assert!(alert.contains("while its memory was on its way into it, and all snapshots are as they were"), "{alert}");
    lab.settle();
    lab.assert_tidy();
    lab.wait_hashed();
    lab.ok(&["snapshot", "apply", BASE, "saved", "--discard", "--start"]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    witness.prove();
}

/// Seconds since 1970, by the guest's own clock, by the machine's, and by the guest's again.
fn clocks(witness: &mut Witness) -> [i64; 3] {
    let told = witness.ask("sh date +%s; cat /sys/class/rtc/rtc0/since_epoch; date +%s");
    let numbers = told["stdout"].as_str().unwrap_or_else(|| panic!("{told}")).lines();
    let numbers: Vec<i64> = numbers.map(|line| line.parse().expect("a number")).collect();
    numbers.try_into().unwrap_or_else(|_| panic!("{told}"))
}

fn seconds(since: SystemTime) -> f64 {
    since.elapsed().expect("time goes on").as_secs_f64()
}

/// A guest with an agent is told the time after each apply, and when it goes on from where it was saved; and so is the next worker's, if the first died.
#[test]
fn an_agent_sets_the_guests_clock() {
    let lab = Lab::empty();
    let mut witness = boot(&lab);
    witness.ask("agent");
    lab.snapshot("one");
    std::thread::sleep(Duration::from_secs(3));
    drop(witness);
    let is_right = |after: &str| {
        wait_for(after, || lab.json(&["vm", "show", BASE])["clock"].is_null().then_some(()));
        // One that was there before the machine was saved is told that it is off.
        let mut witness = lab.witness(BASE);
        witness.resync();
        let [first, machine, last] = clocks(&mut witness);
        assert!(first - 1 <= machine && machine <= last + 1, "{after}: {first} {machine} {last}");
    };
    lab.ok(&["snapshot", "apply", BASE, "one", "--discard"]);
    is_right("the clock after an apply");
    let set = |lab: &Lab| lab.ok(&["vm", "log", BASE]).matches("the guest's agent set its clock").count();
    assert_eq!(set(&lab), 1);
    lab.ok(&["vm", "save", BASE]);
    std::thread::sleep(Duration::from_secs(3));
    lab.ok(&["vm", "start", BASE]);
    is_right("the clock after it was saved");
    lab.ok(&["snapshot", "apply", BASE, "one", "--discard"]);
    lab.kill_worker();
    is_right("the clock after a worker's death");
    assert!(set(&lab) >= 2);
}

/// The machine's clock goes right after an apply; the guest's own goes on from where it was, and it is said how far that is behind.
#[test]
fn what_time_it_is_after_an_apply() {
    let lab = Lab::empty();
    let mut witness = boot(&lab);
    assert_eq!(lab.json(&["vm", "show", BASE])["clock"], Value::Null);
    let (mut least, mut most) = (0.0, 0.0);
    for name in ["one", "two"] {
        let before = SystemTime::now();
        lab.snapshot(name);
        let after = SystemTime::now();
        std::thread::sleep(Duration::from_secs(3));
        least += seconds(after);
        lab.ok(&["snapshot", "apply", BASE, name, "--discard"]);
        most += seconds(before);

        // What is said lies where it must; what the guest says too, by whole seconds, of which each of its clocks began in the middle of one.
        let clock = lab.json(&["vm", "show", BASE])["clock"].take();
        let behind = clock["behind_ms"].as_f64().expect("a number") / 1000.0;
        assert!((least..=most).contains(&behind) && clock["snapshot"] == name, "{least} to {most}: {clock}");
        let asked = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_secs() as i64;
        witness.resync();
        let [first, machine, last] = clocks(&mut witness);
        let answered = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_secs() as i64;
        assert!((asked - 1..=answered + 1).contains(&machine), "the machine's clock: {asked} {machine} {answered}");
        let (nearest, farthest) = ((machine - last) as f64 - 2.0, (machine - first) as f64 + 2.0);
        assert!(nearest <= most && least <= farthest, "{first} {machine} {last}: {least} to {most}");
        assert!(lab.ok(&["vm", "show", BASE]).contains(&format!("behind since {name} was applied")));
    }
    // What comes up anew reads the machine's clock.
    lab.ok(&["vm", "restart", BASE]);
    assert_eq!(lab.json(&["vm", "show", BASE])["clock"], Value::Null);
}
