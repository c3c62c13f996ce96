//! The command line, run as a process: what needs no QEMU. Machines that are off live here with real workers.

mod place;

use place::{Ended, Place, content, eventually};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Stdio;

#[test]
fn words_that_make_no_sense_end_with_2() {
    let place = Place::new();
    for words in [
        &["foo"][..],
        &["vm"],
        &["vm", "create"],
        &["vm", "create", "a/b"],
        &["vm", "create", "a@b"],
        &["vm", "create", "a\nb"],
        &["vm", "create", ""],
        &["vm", "create", &"x".repeat(10_000)],
        &["vm", "create", "x", "--memory", "lots"],
        &["vm", "create", "x", "--memory", "1M"],
        &["vm", "create", "x", "--cpus", "0"],
        &["vm", "create", "x", "--disk", "new:0"],
        &["vm", "create", "x", "--firmware", "efi"],
        &["vm", "create", "x", "--publish", "80"],
        &["vm", "set", "x"],
        &["snapshot", "apply", "x", "y", "--keep", "--discard"],
        &["snapshot", "apply", "x", "y", "--start", "--no-start"],
        &["vm", "stop", "x", "--timeout", "soon"],
        &["disk", "create", "no-ending", "--size", "1M"],
        &["disk", "create", "x.vhdx"],
        &["--color", "sometimes"],
    ] {
        if words == ["vm", "set", "x"] {
            continue; // it needs a machine to be refused for its words alone
        }
        place.tenby(words).with(2);
        let json: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
        let failure = place.tenby(&json).with(2).json();
        assert_eq!(failure["error"]["code"], 2, "{words:?}");
        assert_eq!(failure["error"]["kind"], "usage", "{words:?}");
    }
    assert!(place.tenby(&["vm", "list"]).well().out.lines().count() == 1, "nothing was made");
}

#[test]
fn what_is_not_there_yet_ends_with_3_and_says_so() {
    let place = Place::with_machine("web");
    std::fs::write(place.path("a.img"), vec![0; 4096]).unwrap();
    let before = content(&place.root());
    for words in [
        &["vm", "import", "folder"][..],
        &["vm", "export", "web", "Monday", "--to", "folder"],
        &["disk", "create", "a.qcow2", "--size", "1M"],
        &["serve"],
        &["token", "list"],
        &["Checkpoint-VM", "-Name", "web"],
        &["Get-VM"],
        &["powershell", "-Command", "Get-VM"],
    ] {
        let ended = place.tenby(words).with(3);
        assert!(ended.err.contains("not there yet"), "{words:?}: {ended:?}");
        assert_eq!(ended.out, "", "{words:?}");
    }
    assert_eq!(content(&place.root()), before);
}

#[test]
fn what_does_not_exist_ends_with_4() {
    let place = Place::with_machine("web");
    for words in [
        &["vm", "show", "nix"][..],
        &["vm", "create", "new", "--from", "nix@Monday"],
        &["vm", "create", "new", "--from", "web@nix"],
        &["vm", "detach", "nix"],
        &["snapshot", "apply", "web", "nix@Monday", "--discard"],
        &["vm", "start", "nix"],
        &["vm", "delete", "nix", "--yes"],
        &["snapshot", "list", "nix"],
        &["snapshot", "show", "web", "nix"],
        &["snapshot", "apply", "web", "nix", "--discard"],
        &["snapshot", "delete", "web", "nix"],
        &["snapshot", "delete", "web", "nix", "--dry-run"],
        &["job", "show", "nix"],
        &["job", "cancel", "ffff"],
        &["job", "pause", "ffff"],
        &["job", "resume", "ffff"],
        &["job", "throttle", "ffff", "1M"],
        &["job", "list", "nix"],
        &["vm", "create", "new", "--disk", "nix.vhdx"],
        &["vm", "create", "new", "--cdrom", "nix.iso"],
        &["vm", "create", "new", "--kernel", "nix"],
        &["disk", "hash", "nix.vhdx"],
        &["disk", "info", "nix.vhdx"],
        &["disk", "convert", "nix.vhdx", "new.raw"],
    ] {
        place.tenby(words).with(4);
        let json: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
        assert_eq!(place.tenby(&json).with(4).json()["error"]["kind"], "not-found", "{words:?}");
    }
    assert_eq!(place.tenby(&["vm", "list", "--json"]).well().json()["vms"].as_array().unwrap().len(), 1);
    assert!(!place.dir.path().join("new.raw").exists());
}

#[test]
fn alone_it_tells_the_first_commands_and_then_the_machines() {
    let place = Place::new();
    let first = place.tenby(&[]).well();
    assert!(first.out.contains("tenby vm create"), "{}", first.out);
    assert!(first.out.lines().last().unwrap().starts_with("doctor: "), "{}", first.out);
    place.tenby(&["vm", "create", "web", "--disk", "new:8M"]).well();
    let then = place.tenby(&[]).well();
    assert!(then.out.contains("web") && then.out.contains("no snapshot yet"), "{}", then.out);
    assert_eq!(place.tenby(&["--json"]).well().json()["vms"][0]["name"], "web");
}

#[test]
fn one_machine_that_cannot_be_read_does_not_hide_the_others() {
    let place = Place::with_machine("good");
    place.tenby(&["vm", "create", "bad", "--disk", "new:8M"]).well();
    let id = place.machine("bad")["id"].as_str().unwrap().replace('-', "");
    std::fs::write(place.root().join(&id).join("ledger"), b"nonsense").unwrap();
    let list = place.tenby(&["vm", "list", "--json"]).well().json();
    assert_eq!(list["vms"].as_array().unwrap().len(), 1);
    assert_eq!(list["vms"][0]["name"], "good");
    place.tenby(&["snapshot", "create", "good", "Monday"]).well();
    let bad = place.tenby(&["vm", "show", &id]);
    assert_ne!(bad.code, 0, "{bad:?}");
}

#[test]
fn the_life_of_a_machine_that_is_off() {
    let place = Place::with_machine("Tenby");
    place.tenby(&["vm", "create", "Tenby", "--disk", "new:8M"]).with(3);
    let machine = place.machine("Tenby");
    assert_eq!(machine["state"], "off");
    assert_eq!(machine["memory"], 64 << 20);
    assert_eq!(machine["disks"][0]["size"], 8 << 20);
    assert_eq!(machine["disks"][0]["format"], "vhdx");

    let taken = place.tenby(&["snapshot", "create", "Tenby", "Monday", "--note", "the first"]).well();
    assert_eq!(taken.out, "Tenby: snapshot \"Monday\" is taken\n");
    place.tenby(&["vm", "set", "Tenby", "--memory", "128M", "--cpus", "2"]).well();
    let told = place.tenby(&["snapshot", "apply", "Tenby", "Monday"]).with(3);
    assert!(told.err.starts_with("error: Tenby has changed since Monday"), "{}", told.err);
    assert!(told.err.contains("hint: tenby snapshot apply Tenby Monday --keep"), "{}", told.err);
    assert_eq!(place.machine("Tenby")["memory"], 128 << 20, "refused: nothing has changed");

    let job = place.tenby(&["snapshot", "apply", "Tenby", "Monday", "--keep-as", "Tuesday", "--json"]).well().json();
    assert_eq!(job["state"], "completed");
    assert_eq!(place.machine("Tenby")["memory"], 64 << 20, "a snapshot holds the configuration");
    assert_eq!(place.names("Tenby"), ["Monday", "Tuesday"]);

    let tree = place.tenby(&["snap", "list", "Tenby"]).well().out;
    let shape: Vec<String> = tree
        .lines()
        .map(|line| line.split("  ").find(|part| !part.trim().is_empty()).unwrap_or_default().trim().to_owned())
        .collect();
    assert_eq!(shape[..4], ["Tenby", "└─ Monday", "├─ Tuesday", "└─ Now"], "{tree}");
    let ascii: Ended = place.command(&["snap", "list", "Tenby"]).env("LC_ALL", "C").output().unwrap().into();
    assert!(ascii.well().out.is_ascii());

    let shown = place.tenby(&["snapshot", "show", "Tenby", "Tuesday"]).well().out;
    assert!(shown.contains("memory: 64M (then 128M)"), "{shown}");
    place.tenby(&["snapshot", "rename", "Tenby", "Tuesday", "Monday"]).well();
    let ambiguous = place.tenby(&["snapshot", "delete", "Tenby", "Monday", "--json"]).with(4).json();
    assert_eq!(ambiguous["error"]["kind"], "ambiguous");
    assert_eq!(ambiguous["error"]["candidates"].as_array().unwrap().len(), 2);
    let tuesday = place.tree("Tenby")["snapshots"][1]["id"].as_str().unwrap().to_owned();
    place.tenby(&["snapshot", "note", "Tenby", &tuesday, "by its id, with hyphens"]).well();
    let plan = place.tenby(&["snapshot", "delete", "Tenby", &tuesday[..8], "--dry-run", "--json"]).well().json();
    assert_eq!(plan["snapshots"][0], Value::String(tuesday.clone()));
    assert_eq!(place.names("Tenby").len(), 2, "a dry run deletes nothing");
    place.tenby(&["snapshot", "delete", "Tenby", &tuesday[..8], "--wait"]).well();
    assert_eq!(place.names("Tenby"), ["Monday"]);
    assert_eq!(place.tree("Tenby")["pending"].as_array().unwrap().len(), 0);

    place.tenby(&["vm", "rename", "Tenby", "Dale"]).well();
    place.tenby(&["vm", "show", "Tenby"]).with(4);
    place.tenby(&["vm", "stop", "Dale"]).well();
    place.tenby(&["vm", "console", "Dale"]).with(3);
    place.tenby(&["vm", "screenshot", "Dale", "a.png"]).with(3);
    assert!(place.tenby(&["vm", "log", "Dale"]).well().out.contains("Monday"));
    place.tenby(&["vm", "ledger", "Dale"]).well().json();
    let jobs = place.tenby(&["job", "list", "--json"]).well().json();
    let job = jobs["jobs"][0]["id"].as_str().unwrap();
    assert_eq!(place.tenby(&["job", "watch", &job[..8], "--json"]).well().json()["id"], job);
    for words in [&["job", "pause", job][..], &["job", "resume", job], &["job", "throttle", job, "50M"]] {
        assert!(place.tenby(words).with(3).err.contains("completed"), "{words:?}: a job that has ended has no pace");
    }
    place.tenby(&["vm", "delete", "Dale", "--dry-run"]).well();
    place.tenby(&["vm", "delete", "Dale"]).well();
    assert_eq!(place.tenby(&["vm", "list", "--json"]).well().json()["vms"].as_array().unwrap().len(), 0);
}

#[test]
fn many_clients_at_once_find_one_worker() {
    let place = Place::with_machine("web");
    let clients: Vec<_> = (0..6)
        .map(|n| {
            let mut command = place.command(&["snapshot", "create", "web", &format!("s{n}")]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for client in clients {
        Ended::from(client.wait_with_output().unwrap()).well();
    }
    let mut names = place.names("web");
    names.sort();
    assert_eq!(names, ["s0", "s1", "s2", "s3", "s4", "s5"]);
}

#[test]
fn at_once_means_the_jobs_id_and_nothing_else() {
    let place = Place::with_machine("web");
    let id = place.tenby(&["snapshot", "create", "web", "one", "--async"]).well().out;
    let ended = place.tenby(&["job", "watch", id.trim(), "--json"]).well().json();
    assert_eq!(ended["state"], "completed");
    let job = place.tenby(&["snapshot", "create", "web", "two", "--async", "--json"]).well().json();
    assert_eq!(job.as_object().unwrap().len(), 1);
    place.tenby(&["job", "watch", job["job"].as_str().unwrap()]).well();
    assert_eq!(place.names("web"), ["one", "two"]);
}

/// Starts the machine's worker and returns its process id and its folder.
fn worker(place: &Place, name: &str) -> (rustix::process::Pid, PathBuf) {
    place.tenby(&["snapshot", "create", name]).well();
    let machine = place.machine(name);
    let pid = machine["worker"].as_i64().expect("the worker lingers");
    (rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), place.runtime(&machine))
}

#[test]
fn a_worker_that_was_killed_is_followed_by_the_next() {
    let place = Place::with_machine("web");
    let (pid, _) = worker(&place, "web");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    place.tenby(&["snapshot", "create", "web", "after"]).well();
    assert!(place.names("web").contains(&"after".to_owned()));
}

#[test]
fn a_worker_that_dies_in_the_middle_is_rejoined_and_the_real_outcome_told() {
    // Before the commit: undone. After it: done. Either way the command says what is true.
    for (step, code, taken) in [("snapshot:files", 1, 0), ("snapshot:committed", 0, 1)] {
        let place = Place::with_machine("web");
        let mut command = place.command(&["snapshot", "create", "web", "two"]);
        let ended: Ended = command.env("TENBY_DIE_AT", step).output().unwrap().into();
        assert_eq!(ended.code, code, "{step}: {ended:?}");
        assert_eq!(place.names("web").len(), taken, "{step}");
        let jobs = place.tenby(&["job", "list", "--json"]).well().json();
        assert_eq!(jobs["jobs"][0]["state"], if code == 0 { "completed" } else { "failed" }, "{step}");
    }
}

#[test]
fn a_worker_ends_in_good_order_when_told_to() {
    let place = Place::with_machine("web");
    let (pid, runtime) = worker(&place, "web");
    assert!(runtime.join("api.sock").exists());
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    eventually("the socket's removal", || !runtime.join("api.sock").exists());
    place.tenby(&["snapshot", "create", "web", "after"]).well();
}

#[test]
fn a_newer_client_takes_over_and_an_older_one_is_refused() {
    let place = Place::with_machine("web");
    let (_, runtime) = worker(&place, "web");
    let runtime_of = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime_of.block_on(async {
        let older = api::Client::new(&runtime).speaking(api::Version::new(0, 0, 1));
        let refusal = older.hello().await.unwrap_err().to_string();
        assert!(refusal.contains("0.0.1") && refusal.contains(&api::Version::own().to_string()), "{refusal}");
        older.hand_over().await.unwrap_err();
        let same = api::Client::new(&runtime);
        same.hand_over().await.unwrap_err();
        same.hello().await.unwrap();
        api::Client::new(&runtime).speaking(api::Version::new(999, 0, 0)).hand_over().await.unwrap();
    });
    eventually("the older worker's end", || !runtime.join("api.sock").exists());
    place.tenby(&["snapshot", "create", "web", "after"]).well();
}

#[test]
fn disks_without_any_machine() {
    let place = Place::new();
    let raw: Vec<u8> = (0..3_000_320u32).map(|i| (i / 997 % 251) as u8).collect();
    std::fs::write(place.path("a.raw"), &raw).unwrap();
    place.tenby(&["disk", "convert", "a.raw", "a.vhdx"]).well();
    place.tenby(&["disk", "convert", "a.vhdx", "b.img"]).well();
    assert_eq!(std::fs::read(place.path("b.img")).unwrap(), raw);
    let hash = |file: &str| place.tenby(&["disk", "hash", file, "--json"]).well().json()["sha256"].clone();
    assert_eq!(hash("a.vhdx"), hash("a.raw"));
    assert!(place.tenby(&["disk", "hash", "a.raw"]).well().out.ends_with("  a.raw\n"));

    place.tenby(&["disk", "create", "child.avhdx", "--parent", "a.vhdx"]).well();
    assert_eq!(hash("child.avhdx"), hash("a.raw"));
    let info = place.tenby(&["disk", "info", "child.avhdx", "--chain", "--json"]).well().json();
    assert_eq!(info["type"], "differencing");
    assert_eq!(info["size"], raw.len());
    assert_eq!(info["chain"].as_array().unwrap().len(), 2);
    assert_eq!(info["parent"]["id"], info["chain"][0]["id"]);

    place.tenby(&["disk", "convert", "a.vhdx", "a.vhd"]).well();
    place.tenby(&["disk", "convert", "a.vhd", "fixed.vhd", "--type", "fixed"]).well();
    assert_eq!(std::fs::metadata(place.path("fixed.vhd")).unwrap().len(), raw.len() as u64 + 512);
    place.tenby(&["disk", "create", "child.avhd", "--parent", "fixed.vhd"]).well();
    for file in ["a.vhd", "fixed.vhd", "child.avhd"] {
        assert_eq!(hash(file), hash("a.raw"), "{file}");
    }
    let info = place.tenby(&["disk", "info", "child.avhd", "--json"]).well().json();
    assert_eq!((&info["format"], &info["type"]), (&"vhd".into(), &"differencing".into()));
    assert_eq!(info["parent"]["path"], ".\\fixed.vhd");
    place.tenby(&["disk", "create", "x.vhd", "--size", "1M", "--sector-size", "4096"]).with(2);
    place.tenby(&["disk", "create", "x.vhd", "--size", "3T"]).with(2);

    // Bad input: refused, and nothing is made or changed.
    let before = content(place.dir.path());
    place.tenby(&["disk", "hash", "b.img"]).with(5);
    place.tenby(&["disk", "convert", "a.raw", "a.vhdx"]).with(3);
    place.tenby(&["disk", "create", "a.vhdx", "--size", "1M"]).with(3);
    place.tenby(&["disk", "create", "odd.vhdx", "--size", "1000"]).with(2);
    place.tenby(&["disk", "create", "sub/x.avhdx", "--parent", "a.vhdx"]).with(4);
    assert_eq!(content(place.dir.path()), before);
    std::fs::copy(place.path("a.vhdx"), place.path("lie.raw")).unwrap();
    let both = place.tenby(&["disk", "hash", "lie.raw"]).with(5).err;
    assert!(both.contains("raw") && both.contains("VHDX"), "{both}");
    std::fs::rename(place.path("a.vhdx"), place.path("moved.vhdx")).unwrap();
    place.tenby(&["disk", "hash", "child.avhdx"]).with(5);
    place.tenby(&["disk", "info", "child.avhdx"]).well();
    place.tenby(&["disk", "info", "child.avhdx", "--chain"]).with(5);
    std::fs::write(place.path("short.vhdx"), b"vhdxfile").unwrap();
    place.tenby(&["disk", "info", "short.vhdx"]).with(5);
}

#[test]
fn a_disk_is_checked_and_mended() {
    let place = Place::new();
    place.tenby(&["disk", "create", "a.vhdx", "--size", "8M"]).well();
    let sound = place.tenby(&["disk", "check", "a.vhdx", "--json"]).well().json();
    assert_eq!(sound["clean"], true);
    assert!(sound["findings"].as_array().unwrap().iter().all(|finding| finding["severity"] == "note"));
    assert!(place.tenby(&["disk", "check", "a.vhdx"]).well().out.ends_with("a.vhdx is sound\n"));

    // One header is destroyed, and a block lies in the log.
    let mut bytes = std::fs::read(place.path("a.vhdx")).unwrap();
    bytes[64 << 10..68 << 10].fill(0xA5);
    bytes[3 << 20..(3 << 20) + 8].copy_from_slice(&(1u64 << 20 | 6).to_le_bytes());
    std::fs::write(place.path("a.vhdx"), &bytes).unwrap();
    let damaged = place.tenby(&["disk", "check", "a.vhdx", "--json"]).with(5).json();
    assert_eq!(damaged["clean"], false);
    let kinds: Vec<&Value> = damaged["findings"].as_array().unwrap().iter().map(|finding| &finding["kind"]).collect();
    assert!(kinds.contains(&&Value::from("header")) && kinds.contains(&&Value::from("misplaced")), "{damaged}");
    for finding in damaged["findings"].as_array().unwrap() {
        assert!(finding["where"].is_string() && finding["effect"].is_string(), "{finding}");
        assert!(finding["repair"].is_string() || finding["severity"] == "note", "{finding}");
    }
    let told = place.tenby(&["disk", "check", "a.vhdx"]).with(5);
    assert!(told.out.contains("bytes 0 to 2097151 are lost"), "{told:?}");
    assert_eq!(std::fs::read(place.path("a.vhdx")).unwrap(), bytes, "a check changes nothing");

    let repaired = place.tenby(&["disk", "check", "a.vhdx", "--repair", "--json"]).well().json();
    assert_eq!(repaired["clean"], true);
    assert_eq!(repaired["repaired"].as_array().unwrap().len(), 2, "{repaired}");
    let undo = repaired["undo"].as_str().unwrap();
    place.tenby(&["disk", "check", "a.vhdx"]).well();
    place.tenby(&["disk", "hash", "a.vhdx"]).well();
    place.tenby(&["disk", "check", "a.vhdx", "--undo", undo]).well();
    assert_eq!(std::fs::read(place.path("a.vhdx")).unwrap(), bytes, "the repair is taken back");
    assert!(!place.dir.path().join(undo).exists());

    // Used since: it is refused.
    let undo = place.tenby(&["disk", "check", "a.vhdx", "--repair", "--json"]).well().json()["undo"].clone();
    let mut used = std::fs::read(place.path("a.vhdx")).unwrap();
    used[(64 << 10) + 8] ^= 1;
    std::fs::write(place.path("a.vhdx"), &used).unwrap();
    place.tenby(&["disk", "check", "a.vhdx", "--undo", undo.as_str().unwrap()]).with(3);
    assert_eq!(std::fs::read(place.path("a.vhdx")).unwrap(), used);

    place.tenby(&["disk", "check", "a.vhdx", "--undo", "nix"]).with(4);
    place.tenby(&["disk", "check", "nix.vhdx"]).with(4);
    std::fs::write(place.path("b.img"), vec![1; 4096]).unwrap();
    place.tenby(&["disk", "check", "b.img"]).with(5);
    std::fs::write(place.path("c.raw"), vec![1; 4096]).unwrap();
    place.tenby(&["disk", "check", "c.raw", "--repair"]).well();
}

#[test]
fn a_served_disk_prints_its_address_and_ends_in_good_order() {
    use std::io::{BufRead, BufReader};
    let place = Place::new();
    place.tenby(&["disk", "create", "a.vhdx", "--size", "8M"]).well();
    let mut serving =
        place.command(&["disk", "serve", "a.vhdx", "--socket", "s"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut uri = String::new();
    BufReader::new(serving.stdout.take().unwrap()).read_line(&mut uri).unwrap();
    assert_eq!(uri.trim(), format!("nbd+unix:///?socket={}", place.path("s")));
    std::os::unix::net::UnixStream::connect(place.path("s")).unwrap();
    let used = place.tenby(&["disk", "serve", "a.vhdx", "--socket", "other"]).with(3);
    assert!(used.err.contains("in use"), "{used:?}");
    rustix::process::kill_process(rustix::process::Pid::from_child(&serving), rustix::process::Signal::TERM).unwrap();
    assert!(serving.wait().unwrap().success());
    assert!(!place.dir.path().join("s").exists());
}

#[test]
fn completions_know_the_verbs() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = place.tenby(&["completions", shell]).well().out;
        assert!(script.contains("snapshot") && script.contains("revert"), "{shell}");
    }
}

#[test]
fn doctor_says_what_is_here_and_makes_nothing() {
    let place = Place::new();
    let findings = place.tenby(&["doctor", "--json"]).well().json();
    assert!(findings["checks"].as_array().unwrap().iter().any(|check| check["what"] == "KVM"));
    assert!(!place.root().exists());
}
