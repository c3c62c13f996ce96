//! A worker that is killed at each step of each request, and at no step in particular. The next command recovers; the guest lives on;
//! a request is either done or has changed nothing.

use e2e::{BASE, Lab, Output, Process, Witness, qemu_10, qemu_72, wait_for};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

/// A running machine with the snapshots `one` and `two` and later changes; its journal runs flat out.
struct Scene {
    lab: Lab,
    witness: Option<Witness>,
}

impl Scene {
    fn new() -> Self {
        Self::on("vhdx")
    }

    /// The scene on disks of this format.
    fn on(format: &str) -> Self {
        let (lab, witness) = Lab::running_on(format);
        Self::of(lab, witness)
    }

    fn of(lab: Lab, witness: Witness) -> Self {
        Self::with_more(lab, witness, 0)
    }

    /// The scene where `two` holds so many MiB on the first disk that nobody writes later.
    fn with_more(lab: Lab, mut witness: Witness, mib: u64) -> Self {
        witness.ask("fill-ram 8 3");
        witness.ask("journal pace 1");
        let mut scene = Self { lab, witness: Some(witness) };
        for day in ["one", "two"] {
            scene.mark(day);
            if mib > 0 && day == "two" {
                scene.witness().ask(&format!("fill-disk vda 32M {mib} 7"));
            }
            scene.lab.snapshot(day);
        }
        scene.mark("now");
        scene
    }

    /// The conversation, begun anew where it was ended.
    fn witness(&mut self) -> &mut Witness {
        self.witness.get_or_insert_with(|| self.lab.witness(BASE))
    }

    /// Leaves a mark in RAM and on both disks, and a few MiB by which a merge has something to do.
    fn mark(&mut self, day: &str) {
        self.witness().ask(&format!("set day {day}"));
        self.witness().ask(&format!("write vda 4M {day}"));
        self.witness().ask(&format!("write vdb 8M {day}"));
        self.witness().ask(&format!("fill-disk vda 16M 8 {}", day.len()));
    }

    /// What the machine remembers, in RAM and on both disks alike; the witness vouches for the rest.
    #[track_caller]
    fn day(&mut self) -> String {
        self.witness().resync();
        self.witness().prove();
        assert_eq!(self.witness().ask("sum-ram")["ok"], true);
        let day = self.witness().ask("get day")["value"].as_str().expect("a day").to_owned();
        for place in ["vda 4M", "vdb 8M"] {
            assert_eq!(self.witness().ask(&format!("read {place}"))["text"], day.as_str(), "{place}");
        }
        assert_eq!(self.witness().ask(&format!("sum-disk vda 16M 8 {}", day.len()))["ok"], true);
        day
    }

    /// Another worker takes the machine over, and will die at `step`.
    fn arm(&mut self, step: &str) {
        // A console would wake a worker of its own as soon as this one is dead.
        self.witness = None;
        self.lab.kill_worker();
        let mut resume = self.lab.command(&["vm", "resume", BASE]);
        let status = resume.env("TENBY_DIE_AT", step).stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(status.expect("the program runs").success(), "the next worker takes the machine over");
    }

    /// Carries out `request`, at whose `step` the worker dies.
    #[track_caller]
    fn dies_at(&mut self, step: &str, request: &[&str]) -> Output {
        self.arm(step);
        let doomed = self.lab.worker().expect("a worker");
        let output = self.lab.tenby(request);
        assert!([0, 1].contains(&output.code), "{}: {} {}", output.command, output.code, output.stderr);
        assert_ne!(self.lab.worker(), Some(doomed), "the worker never came to {step}");
        output
    }

    fn has(&self, name: &str) -> bool {
        let tree = self.lab.tree();
        tree["snapshots"].as_array().expect("a list").iter().any(|snapshot| snapshot["name"] == name)
    }

    /// Nothing is left over, and every snapshot is what it was.
    fn assert_whole(&mut self) {
        self.lab.settle();
        self.lab.assert_tidy();
        for name in ["one", "two", "three"] {
            if self.has(name) {
                self.lab.ok(&["snapshot", "apply", BASE, name, "--discard", "--start"]);
                let expected = if name == "three" { "now" } else { name };
                assert_eq!(self.day(), expected, "what {name} holds");
            }
        }
        self.lab.settle();
        self.lab.assert_tidy();
        self.lab.wait_hashed();
    }
}

fn snapshot_dies_at(step: &str) {
    snapshot_dies(Scene::new(), step);
}

fn snapshot_dies(mut scene: Scene, step: &str) {
    let output = scene.dies_at(step, &["snapshot", "create", BASE, "three"]);
    assert_eq!(scene.day(), "now");
    assert_eq!(scene.has("three"), output.code == 0, "{step}: {output:?}");
    scene.assert_whole();
}

fn ordinary_snapshot_dies_at(step: &str) {
    let (lab, witness) = Lab::running();
    snapshot_dies(Scene::of(lab.for_ordinary_users(), witness), step);
}

fn apply_dies_at(step: &str, keep: bool) {
    let mut scene = Scene::new();
    let present: &[&str] = if keep { &["--keep-as", "three"] } else { &["--discard"] };
    let output = scene.dies_at(step, &[&["snapshot", "apply", BASE, "one"], present].concat());
    let applied = output.code == 0;
    assert_eq!(scene.lab.state(BASE), "running", "{step}: {output:?}");
    assert_eq!(scene.day(), if applied { "one" } else { "now" }, "{step}: {output:?}");
    assert_eq!(scene.has("three"), applied && keep, "{step}: {output:?}");
    scene.assert_whole();
}

/// The guest runs, and has not got all of its memory: what is missing comes from the next worker, and the one after that.
fn lending_dies_at(step: &str) {
    let mut scene = Scene::new();
    scene.arm(step);
    let doomed = scene.lab.worker().expect("a worker");
    scene.lab.ok(&["snapshot", "apply", BASE, "one", "--discard"]);
    scene.lab.wait_gone(doomed);
    // The next one is killed at once, in the middle of this or after it.
    scene.lab.json(&["vm", "show", BASE]);
    scene.lab.kill_worker();
    assert_eq!(scene.day(), "one");
    let log = scene.lab.ok(&["vm", "log", BASE]);
    assert!(!log.contains("tried once more"), "{log}");
    // A guest whose memory has not come is not captured: this waits for it.
    scene.lab.snapshot("three");
    scene.mark("later");
    scene.lab.ok(&["snapshot", "apply", BASE, "three", "--discard"]);
    assert_eq!(scene.day(), "one");
    scene.lab.ok(&["snapshot", "delete", BASE, "three"]);
    scene.assert_whole();
}

/// The socket over which memory comes cannot be had by the next worker, as where one may not take another process's: QEMU is told of a new one.
/// (The guest stands still meanwhile: while it runs, QEMU's monitor may itself wait for a page, and hear nobody.)
fn lending_is_taken_up_anew(qemu: PathBuf) {
    let lab = Lab::empty().on_qemu(qemu);
    lab.create_guest(BASE);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.wait_ready();
    let mut scene = Scene::of(lab, witness);
    scene.witness = None;
    scene.lab.ok(&["vm", "save", BASE]);
    wait_for("the worker to leave", || scene.lab.worker().is_none().then_some(()));
    let mut start = scene.lab.command(&["vm", "start", BASE, "--paused"]);
    // It dies, and so does who comes after it, if the command has not heard of its end yet: a part of what there is to send is left in any case.
    start.env("TENBY_DIE_AT", "restore:sending#60").stdout(Stdio::null()).stderr(Stdio::null());
    start.status().expect("the program runs");
    wait_for("the worker to die", || scene.lab.worker().is_none().then_some(()));
    let [sockets] = &scene.lab.sockets()[..] else { panic!("one QEMU") };
    std::fs::remove_file(sockets.join("tenby-memory")).expect("QEMU has its end of a socket");
    scene.lab.ok(&["vm", "resume", BASE]);
    assert_eq!(scene.day(), "now");
    scene.assert_whole();
}

#[test]
fn lending_is_taken_up_anew_on_qemu_7_2() {
    lending_is_taken_up_anew(qemu_72());
}

#[test]
fn lending_is_taken_up_anew_on_qemu_10_0() {
    lending_is_taken_up_anew(qemu_10());
}

fn delete_dies_at(step: &str, name: &str) {
    delete_dies(Scene::new(), step, name);
}

fn delete_dies(mut scene: Scene, step: &str, name: &str) {
    scene.dies_at(step, &["snapshot", "delete", BASE, name, "--wait"]);
    assert!(!scene.has(name), "what was committed is not taken back");
    assert_eq!(scene.day(), "now");
    scene.assert_whole();
}

fn undo_dies_at(step: &str) {
    let mut scene = Scene::new();
    scene.lab.ok(&["vm", "set", BASE, "--undo-for", "1h"]);
    scene.lab.ok(&["snapshot", "delete", BASE, "one", "--subtree"]);
    scene.dies_at(step, &["vm", "undo", BASE]);
    assert!(scene.has("one") && scene.has("two"), "what was committed is not undone");
    assert_eq!(scene.day(), "now");
    scene.assert_whole();
}

/// The layer of `two` and the guest's leaf, which holds 8 MiB, become one: in the file of whichever holds more that the other lacks.
fn merge_dies_at(step: &str, mib: u64) {
    let (lab, witness) = Lab::running_on("vhdx");
    let mut scene = Scene::with_more(lab, witness, mib);
    let leaf = |scene: &Scene| scene.lab.json(&["vm", "show", BASE])["disks"][0]["file"].clone();
    let before = leaf(&scene);
    scene.dies_at(step, &["snapshot", "delete", BASE, "two", "--wait"]);
    scene.lab.settle();
    assert_eq!(leaf(&scene) == before, mib < 8, "{mib} MiB against 8: {before}");
    assert_eq!(scene.day(), "now");
    assert_eq!(scene.witness().ask(&format!("sum-disk vda 32M {mib} 7"))["ok"], true);
    scene.assert_whole();
}

fn save_dies_at(step: &str) {
    let mut scene = Scene::new();
    let output = scene.dies_at(step, &["vm", "save", BASE]);
    let saved = scene.lab.state(BASE) == "saved";
    assert_eq!(saved, output.code == 0, "{step}: {output:?}");
    scene.lab.ok(&["vm", "start", BASE]);
    assert_eq!(scene.day(), "now");
    scene.assert_whole();
}

/// The worker that starts a machine is killed; so is each that follows it. A last one finds the machine as it was, or running.
fn start_dies_at(step: &str) {
    let mut scene = Scene::new();
    scene.witness = None;
    scene.lab.ok(&["vm", "save", BASE]);
    wait_for("the worker to leave", || scene.lab.worker().is_none().then_some(()));
    let mut start = scene.lab.command(&["vm", "start", BASE]);
    start.env("TENBY_DIE_AT", step).stdout(Stdio::null()).stderr(Stdio::null());
    start.status().expect("the program runs");
    scene.lab.ok(&["vm", "start", BASE]);
    assert_eq!(scene.day(), "now");
    scene.assert_whole();
}

/// The worker is killed while it hashes what a snapshot has sealed; the next one goes on.
fn hash_dies_at(step: &str) {
    let mut scene = Scene::new();
    // What is left to be hashed would kill one worker after the other before it has answered.
    scene.lab.wait_hashed();
    scene.arm(step);
    let doomed = scene.lab.worker().expect("a worker");
    scene.lab.ok(&["snapshot", "create", BASE, "three"]);
    scene.lab.wait_gone(doomed);
    assert_eq!(scene.day(), "now");
    let audit = scene.lab.wait_hashed();
    assert_eq!(audit["compared"]["layers"], 9, "{audit}");
    scene.assert_whole();
}

/// One test a step, named after it.
macro_rules! steps {
    ($($name:ident: $test:ident($($argument:expr),+);)+) => {
        $(#[test] fn $name() { $test($($argument),+); })+
    };
}

steps! {
    snapshot_files: snapshot_dies_at("snapshot:files");
    snapshot_leaves: snapshot_dies_at("snapshot:leaves");
    snapshot_window: snapshot_dies_at("snapshot:window");
    snapshot_point: snapshot_dies_at("snapshot:point");
    snapshot_captured: snapshot_dies_at("snapshot:captured");
    snapshot_committed: snapshot_dies_at("snapshot:committed");
    snapshot_point_ordinary: ordinary_snapshot_dies_at("snapshot:point");
    snapshot_captured_ordinary: ordinary_snapshot_dies_at("snapshot:captured");
    apply_files: apply_dies_at("apply:files", false);
    apply_kept: apply_dies_at("apply:kept", true);
    apply_loaded: apply_dies_at("apply:loaded", false);
    apply_loaded_kept: apply_dies_at("apply:loaded", true);
    apply_committed: apply_dies_at("apply:committed", false);
    apply_committed_kept: apply_dies_at("apply:committed", true);
    apply_swapped: apply_dies_at("apply:swapped", false);
    apply_old_ended: apply_dies_at("apply:old-ended", false);
    lending_begun: lending_dies_at("restore:sending");
    lending_under_way: lending_dies_at("restore:sending#150");
    delete_committed: delete_dies_at("delete:committed", "one");
    remove_committed: delete_dies_at("remove:committed", "two");
    undo_committed: undo_dies_at("undo:committed");
    merge_copying_sealed: delete_dies_at("merge:copying", "one");
    merge_copying_up: merge_dies_at("merge:copying", 3);
    merge_copied_up: merge_dies_at("merge:copied", 3);
    merge_committed_up: merge_dies_at("merge:committed", 3);
    merge_copying_down: merge_dies_at("merge:copying", 14);
    merge_copied_down: merge_dies_at("merge:copied", 14);
    merge_committed_down: merge_dies_at("merge:committed", 14);
    merge_committed_sealed: delete_dies_at("merge:committed", "one");
    save_paused: save_dies_at("save:paused");
    save_written: save_dies_at("save:written");
    save_committed: save_dies_at("save:committed");
    start_up: start_dies_at("start:up");
    start_committed: start_dies_at("start:committed");
    hash_reading: hash_dies_at("hash:reading");
    hash_written: hash_dies_at("hash:written");
}

/// VHD keeps no log: what a worker that died leaves of its files must be whole at every moment all the same.
#[test]
fn vhd_snapshot() {
    for step in ["snapshot:window", "snapshot:point", "snapshot:captured"] {
        snapshot_dies(Scene::on("vhd"), step);
    }
}

#[test]
fn vhd_merge() {
    for step in ["merge:copying", "merge:copied", "merge:committed"] {
        delete_dies(Scene::on("vhd"), step, "two");
    }
    delete_dies(Scene::on("vhd"), "merge:committed", "one");
}

/// Bases that lie where their user put them: they keep their names, and take what is folded down.
#[test]
fn bases_taken_in_place() {
    let lab = Lab::empty();
    let (raw, vhd) = (lab.path("base.raw"), lab.path("base.vhd"));
    std::fs::File::create(&raw).and_then(|file| file.set_len(64 << 20)).expect("a file");
    lab.ok(&["disk", "create", &vhd.to_string_lossy(), "--size", "64M"]);
    lab.create_guest_on(BASE, [&format!("{},in-place", raw.display()), &format!("{},in-place", vhd.display())]);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.wait_ready();
    let mut scene = Scene::of(lab, witness);
    scene.dies_at("merge:copying", &["snapshot", "delete", BASE, "one", "--wait"]);
    assert_eq!(scene.day(), "now");
    scene.assert_whole();
    scene.lab.ok(&["snapshot", "delete", BASE, "two", "--wait"]);
    assert_eq!(scene.day(), "two");
    scene.witness = None;
    scene.lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    scene.lab.ok(&["vm", "delete", BASE, "--yes"]);
    // What Now held is in the files.
    let bytes = std::fs::read(raw).expect("the base");
    assert!(bytes[4 << 20..].starts_with(b"two\0"), "{:?}", &bytes[4 << 20..][..8]);
    assert_eq!(bytes.len(), 64 << 20);
    let copy = scene.lab.path("copy.raw").to_string_lossy().into_owned();
    scene.lab.ok(&["disk", "convert", &vhd.to_string_lossy(), &copy]);
    assert!(std::fs::read(copy).expect("a copy")[8 << 20..].starts_with(b"two\0"));
}

/// Small and reproducible.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Kills the worker some time into `request`, and gives what came of the command.
fn killed_into(lab: &Lab, request: &[&str], after: Duration) -> i32 {
    lab.struck(request, after, || _ = lab.kill(Process::is_worker)).code
}

/// Wherever the blow falls, the command tells the truth.
#[test]
fn killed_at_any_moment() {
    let mut scene = Scene::new();
    let mut random = Random(20_261_124);
    for round in 0..6 {
        let name = format!("extra {round}");
        let code =
            killed_into(&scene.lab, &["snapshot", "create", BASE, &name], Duration::from_millis(random.below(900)));
        assert_eq!(scene.has(&name), code == 0, "snapshot, round {round}");
        assert_eq!(scene.day(), "now", "round {round}");
        if code == 0 {
            let delay = Duration::from_millis(random.below(600));
            killed_into(&scene.lab, &["snapshot", "delete", BASE, &name, "--wait"], delay);
            assert_eq!(scene.day(), "now", "round {round}");
        }
        if scene.has(&name) {
            scene.lab.ok(&["snapshot", "delete", BASE, &name]);
        }
    }
    for round in 0..6 {
        let before = scene.day();
        let target = if before == "one" { "two" } else { "one" };
        let delay = Duration::from_millis(random.below(1200));
        let code = killed_into(&scene.lab, &["snapshot", "apply", BASE, target, "--discard"], delay);
        assert_eq!(scene.day(), if code == 0 { target } else { &before }, "apply, round {round}");
    }
    scene.assert_whole();
}

/// A QEMU that dies takes its guest's memory with it, and nothing that was flushed.
#[test]
fn qemu_is_killed() {
    let mut scene = Scene::new();
    let flushed = scene.witness().prove()["flushed"].as_u64().expect("a number");
    let nonce = scene.witness().nonce();
    scene.lab.kill_qemu();
    wait_for("the machine to be known as off", || (scene.lab.state(BASE) == "off").then_some(()));
    scene.lab.ok(&["vm", "start", BASE]);
    let mut witness = scene.lab.witness(BASE);
    let found = witness.resync()["journal"]["found"].clone();
    assert_eq!(found["nonce"], nonce.as_str());
    assert!(found["seq"].as_u64().expect("a number") >= flushed, "{found}: {flushed} was flushed");
    witness.prove();
    assert_eq!(witness.ask("read vda 4M")["text"], "now");
    scene.witness = Some(witness);
    scene.assert_whole();
}

/// Both at once: as after a power cut of the host.
#[test]
fn everything_is_killed() {
    let mut scene = Scene::new();
    scene.lab.snapshot("three");
    let flushed = scene.witness().prove()["flushed"].as_u64().expect("a number");
    scene.lab.kill_worker();
    scene.lab.kill_qemu();
    assert_eq!(scene.lab.state(BASE), "off");
    assert_eq!(scene.lab.sockets(), Vec::<std::path::PathBuf>::new(), "those of a QEMU that is gone");
    scene.lab.ok(&["vm", "start", BASE]);
    let mut witness = scene.lab.witness(BASE);
    assert!(witness.resync()["journal"]["found"]["seq"].as_u64().expect("a number") >= flushed);
    witness.prove();
    scene.witness = Some(witness);
    scene.assert_whole();
}

/// What the guest was told is written, and never flushed, is there for the next worker, and in what it snaps.
#[test]
fn what_was_not_flushed_outlives_the_worker() {
    let mut scene = Scene::new();
    scene.witness().ask("journal pause");
    scene.witness().ask("pour-disk vda 32M 8 7");
    scene.witness().ask("zero vda 36M 2");
    scene.witness = None;
    scene.lab.kill_worker();
    scene.lab.snapshot("poured");
    assert!(scene.lab.ok(&["vm", "log", BASE]).contains("had not flushed"));
    scene.witness().ask("zero vda 32M 8");
    scene.lab.ok(&["snapshot", "apply", BASE, "poured", "--discard"]);
    scene.witness().resync();
    assert_eq!(scene.witness().ask("sum-disk vda 32M 4 7")["ok"], true);
    assert_eq!(scene.witness().ask("sum-disk vda 38M 2 7")["ok"], true);
    assert_eq!(scene.day(), "now");
    scene.assert_whole();
}

/// QEMU holds its disks' requests until the next worker serves them; none is lost or done twice in the wrong order.
#[test]
fn killed_over_and_over() {
    let mut scene = Scene::new();
    scene.witness().ask("journal pace 0");
    for round in 0..8 {
        scene.witness = None;
        scene.lab.kill_worker();
        scene.lab.ok(&["vm", "resume", BASE]);
        assert_eq!(scene.day(), "now", "round {round}");
    }
    scene.assert_whole();
}
