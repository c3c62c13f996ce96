//! `tenby disk`: every verb, run as a process, with good input and bad, in little memory.

mod place;

use place::{Ended, Place, content};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn tenby(place: &Place, words: &[&str]) -> Ended {
    place.in_little_memory(words)
}

fn json(place: &Place, words: &[&str]) -> Value {
    let words: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
    tenby(place, &words).well().json()
}

fn hash(place: &Place, file: &str) -> String {
    json(place, &["disk", "hash", file])["sha256"].as_str().unwrap().to_owned()
}

/// Writes into an image as anybody else would: through a raw copy.
fn raw(place: &Place, name: &str, size: u64, parts: &[(u64, &[u8])]) {
    let file = fs::File::create(place.path(name)).unwrap();
    file.set_len(size).unwrap();
    for (at, bytes) in parts {
        file.write_all_at(bytes, *at).unwrap();
    }
}

/// Whether a tool is here; tests that need it pass politely where it is not.
fn has(tool: &str) -> bool {
    let there = Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success());
    if !there {
        println!("SKIPPED: no {tool}");
    }
    there
}

/// Writes into a served image. Needs `qemu-io`.
fn write(place: &Place, file: &str, commands: &[&str]) {
    let socket = place.path("s.sock");
    let mut serving =
        place.command(&["disk", "serve", file, "--socket", &socket]).stdout(Stdio::piped()).spawn().unwrap();
    place::eventually("the socket", || Path::new(&socket).exists());
    let mut io = Command::new("qemu-io");
    io.args(["-f", "raw", &format!("nbd+unix:///?socket={socket}")]);
    for command in commands.iter().chain(&["flush"]) {
        io.args(["-c", command]);
    }
    let done = io.output().unwrap();
    assert!(done.status.success(), "{done:?}");
    rustix::process::kill_process(rustix::process::Pid::from_child(&serving), rustix::process::Signal::TERM).unwrap();
    assert!(serving.wait().unwrap().success());
}

/// base.vhdx (8 MiB) with data, and child.avhdx over it with other data.
fn pair(place: &Place) {
    raw(place, "base.raw", 8 * MIB, &[(0, &[1; 4096]), (5 * MIB, &vec![2; 100_000])]);
    tenby(place, &["disk", "convert", "base.raw", "base.vhdx"]).well();
    tenby(place, &["disk", "create", "child.avhdx", "--parent", "base.vhdx"]).well();
    write(place, "child.avhdx", &["write -P 3 4096 4096", "write -z 5M 64k", "write -P 4 7M 512"]);
}

/// Whether the served child of [`pair`] reads as it was written. Needs `qemu-io`.
fn reads_well(socket: &str) {
    let mut io = Command::new("qemu-io");
    io.args(["-r", "-f", "raw", &format!("nbd+unix:///?socket={socket}")]);
    for read in
        ["-P 1 0 4k", "-P 3 4k 4k", "-P 0 8k 60k", "-P 0 5M 64k", "-P 2 5308416 30000", "-P 4 7M 512", "-P 0 6M 1M"]
    {
        io.args(["-c", &format!("read {read}")]);
    }
    let done = io.output().unwrap();
    assert!(done.status.success() && !String::from_utf8_lossy(&done.stdout).contains("failed"), "{done:?}");
}

#[test]
fn a_chain_is_served_where_there_is_no_io_uring_as_where_there_is() {
    if !has("qemu-io") || !place::can_watch() {
        return;
    }
    let place = Place::new();
    pair(&place);
    let (socket, log) = (place.path("s.sock"), place.path("refused"));
    let serve = place.command(&["disk", "serve", "child.avhdx", "--read-only", "--socket", &socket]);
    // `-D`: the server is our child, and strace its.
    let mut refused = Command::new("strace");
    refused.args(["-D", "-f", "-qq", "-e", "trace=io_uring_setup", "-e", "inject=io_uring_setup:error=EPERM", "-o"]);
    refused.arg(&log).arg(serve.get_program()).args(serve.get_args()).current_dir(place.dir.path());
    for mut command in [serve, refused] {
        let mut serving = command.stdout(Stdio::null()).spawn().unwrap();
        place::eventually("the socket", || Path::new(&socket).exists());
        reads_well(&socket);
        rustix::process::kill_process(rustix::process::Pid::from_child(&serving), rustix::process::Signal::TERM)
            .unwrap();
        assert!(serving.wait().unwrap().success());
    }
    place::eventually("strace's end", || std::fs::read_to_string(&log).is_ok_and(|said| said.contains("EPERM")));
}

#[test]
fn a_map_covers_the_disk_and_names_the_layers() {
    if !has("qemu-io") {
        return;
    }
    let place = Place::new();
    pair(&place);
    let map = json(&place, &["disk", "map", "child.avhdx"]);
    let runs = map["runs"].as_array().unwrap();
    let mut at = 0;
    for run in runs {
        assert_eq!(run["offset"], at);
        at += run["length"].as_u64().unwrap();
        assert!(["data", "zero", "absent"].contains(&run["state"].as_str().unwrap()));
        assert_eq!(run["layer"].is_null(), run["state"] == "absent");
    }
    assert_eq!(at, 8 * MIB);
    let layer_at = |offset: u64| {
        let inside = |run: &&Value| {
            let start = run["offset"].as_u64().unwrap();
            (start..start + run["length"].as_u64().unwrap()).contains(&offset)
        };
        runs.iter().find(inside).unwrap()["layer"].clone()
    };
    assert_eq!((layer_at(0), layer_at(4096), layer_at(7 * MIB)), (0.into(), 1.into(), 1.into()));
    let text = tenby(&place, &["disk", "map", "child.avhdx"]).well().out;
    assert_eq!(text.lines().count(), runs.len() + 1);
}

#[test]
fn a_comparison_says_where_and_ends_with_1() {
    let place = Place::new();
    raw(&place, "a.raw", 8 * MIB, &[(MIB, &[7; 8192])]);
    tenby(&place, &["disk", "convert", "a.raw", "a.vhdx"]).well();
    assert_eq!(json(&place, &["disk", "compare", "a.raw", "a.vhdx"])["equal"], true);
    tenby(&place, &["disk", "compare", "a.raw", "a.vhdx"]).well();
    raw(&place, "b.raw", 8 * MIB, &[(MIB, &[7; 4096]), (MIB + 8192, &[1; 1])]);
    let differs = tenby(&place, &["disk", "compare", "a.vhdx", "b.raw", "--json"]);
    assert_eq!((differs.code, differs.err.as_str()), (1, ""));
    let differs = differs.json();
    assert_eq!(differs["equal"], false);
    assert_eq!(differs["ranges"], serde_json::json!([{ "offset": MIB + 4096, "length": 4096 + 512 }]));
    raw(&place, "c.raw", 9 * MIB, &[(MIB, &[7; 8192])]);
    let longer = tenby(&place, &["disk", "compare", "a.raw", "c.raw", "--json"]).json();
    assert_eq!(longer["ranges"], serde_json::json!([{ "offset": 8 * MIB, "length": MIB }]));
}

#[test]
fn a_disk_grows_and_shrinks_as_far_as_it_is_empty() {
    let place = Place::new();
    raw(&place, "a.raw", 8 * MIB, &[(3 * MIB, &[9; 1000])]);
    for file in ["a.vhdx", "a.vhd", "fixed.vhd", "a.raw"] {
        let kind = if file == "fixed.vhd" { "fixed" } else { "dynamic" };
        if file != "a.raw" {
            tenby(&place, &["disk", "convert", "a.raw", file, "--type", kind]).well();
        }
        let before = hash(&place, file);
        assert_eq!(json(&place, &["disk", "resize", file, "100M"])["size"], 100 * MIB);
        let refused = tenby(&place, &["disk", "resize", file, "1M"]).with(3);
        assert!(refused.err.contains("hint: tenby disk resize"), "{refused:?}");
        assert_eq!(json(&place, &["disk", "info", file])["size"], 100 * MIB);
        tenby(&place, &["disk", "resize", file, "8M"]).well();
        assert_eq!(hash(&place, file), before);
        tenby(&place, &["disk", "resize", file, "100"]).with(2);
    }
    tenby(&place, &["disk", "resize", "a.vhdx", "2000G"]).well();
    assert_eq!(json(&place, &["disk", "info", "a.vhdx"])["size"], 2000_u64 << 30);
    tenby(&place, &["disk", "resize", "a.vhdx", "8M"]).well();
    assert!(tenby(&place, &["disk", "compare", "a.vhdx", "a.raw"]).well().out.contains("same"));
    tenby(&place, &["disk", "resize", "a.vhd", "2040G"]).well();
    let refused = tenby(&place, &["disk", "resize", "a.vhd", "2041G"]).with(3);
    assert!(refused.err.contains("hint: tenby disk convert a.vhd a.vhdx"), "{refused:?}");
    tenby(&place, &["disk", "resize", "a.vhd", "8M"]).well();
    assert!(tenby(&place, &["disk", "compare", "a.vhd", "a.raw"]).well().out.contains("same"));
    assert_eq!(fs::metadata(place.path("fixed.vhd")).unwrap().len(), 8 * MIB + 512);
}

#[test]
fn only_the_leaf_changes_its_size_and_a_child_may_be_larger() {
    if !has("qemu-io") {
        return;
    }
    let place = Place::new();
    pair(&place);
    for words in [&["disk", "resize", "base.vhdx", "20M"][..], &["disk", "compact", "base.vhdx"]] {
        let before = fs::read(place.path("base.vhdx")).unwrap();
        let refused = tenby(&place, words).with(3);
        assert!(refused.err.contains("child.avhdx"), "{refused:?}");
        assert!(fs::read(place.path("base.vhdx")).unwrap() == before);
    }
    tenby(&place, &["disk", "resize", "child.avhdx", "20M"]).well();
    tenby(&place, &["disk", "convert", "child.avhdx", "all.raw"]).well();
    tenby(&place, &["disk", "merge", "child.avhdx"]).well();
    assert!(!Path::new(&place.path("child.avhdx")).exists());
    assert_eq!(json(&place, &["disk", "info", "base.vhdx"])["size"], 20 * MIB);
    tenby(&place, &["disk", "compare", "base.vhdx", "all.raw"]).well();
}

#[test]
fn a_compaction_gives_space_back_and_changes_nothing() {
    let place = Place::new();
    raw(&place, "a.raw", 64 * MIB, &[(0, &vec![1; 8 * MIB as usize]), (40 * MIB, &[2; 4096])]);
    tenby(&place, &["disk", "convert", "a.raw", "a.vhdx", "--type", "fixed", "--dense"]).well();
    tenby(&place, &["disk", "convert", "a.vhdx", "b.vhdx"]).well();
    tenby(&place, &["disk", "convert", "a.vhdx", "c.vhd", "--dense"]).well();
    for file in ["a.vhdx", "b.vhdx", "c.vhd"] {
        let (before, id) = (hash(&place, file), json(&place, &["disk", "info", file])["id"].clone());
        let compacted = json(&place, &["disk", "compact", file]);
        assert!(compacted["bytes"].as_u64().unwrap() < 16 * MIB, "{compacted}");
        assert_eq!(hash(&place, file), before);
        assert_eq!(json(&place, &["disk", "info", file])["id"], id, "what stands on it still does");
    }
}

#[test]
fn a_merge_leaves_one_file_that_holds_all() {
    if !has("qemu-io") {
        return;
    }
    let place = Place::new();
    pair(&place);
    tenby(&place, &["disk", "create", "top.avhdx", "--parent", "child.avhdx"]).well();
    write(&place, "top.avhdx", &["write -P 9 1M 4096"]);
    let (middle, top) = (hash(&place, "child.avhdx"), hash(&place, "top.avhdx"));
    tenby(&place, &["disk", "merge", "top.avhdx", "--into", "all.vhdx"]).well();
    assert_eq!(hash(&place, "all.vhdx"), top);
    assert_eq!(hash(&place, "top.avhdx"), top);
    // The middle one goes; what stands on it stands on the base.
    let merged = json(&place, &["disk", "merge", "child.avhdx"]);
    assert_eq!(merged["children"], serde_json::json!(["top.avhdx"]));
    assert_eq!((hash(&place, "base.vhdx"), hash(&place, "top.avhdx")), (middle, top.clone()));
    let ended = tenby(&place, &["disk", "merge", "top.avhdx"]).well();
    assert!(ended.err.contains("to copy"), "the estimate comes first: {ended:?}");
    assert_eq!(hash(&place, "base.vhdx"), top);
    tenby(&place, &["disk", "merge", "base.vhdx"]).with(3);
    if has("qemu-img") {
        tenby(&place, &["disk", "convert", "base.vhdx", "ours.raw"]).well();
        let theirs = place.path("theirs.raw");
        let done = Command::new("qemu-img").args(["convert", "-O", "raw", &place.path("base.vhdx"), &theirs]).output();
        assert!(done.unwrap().status.success());
        assert!(fs::read(theirs).unwrap() == fs::read(place.path("ours.raw")).unwrap());
    }
}

#[test]
fn a_disk_for_azure_is_a_fixed_vhd_of_whole_mib() {
    let place = Place::new();
    let size = 30 * MIB + 1024;
    raw(&place, "a.raw", size, &[(0, &[5; 4096]), (size - 512, &[6; 512])]);
    let made = tenby(&place, &["disk", "convert", "a.raw", "a.vhd", "--azure"]).well();
    assert!(made.err.contains("a.vhd gets 31M, 1047552 bytes more"), "{made:?}");
    let info = json(&place, &["disk", "info", "a.vhd"]);
    assert_eq!((&info["size"], &info["type"]), (&(31 * MIB).into(), &"fixed".into()));
    let file = fs::read(place.path("a.vhd")).unwrap();
    assert_eq!(file.len() as u64, 31 * MIB + 512, "and the footer behind it");
    assert!(file.starts_with(&fs::read(place.path("a.raw")).unwrap()));
    assert!(file[size as usize..31 * MIB as usize].iter().all(|byte| *byte == 0));
    // Once fit there is nothing to say.
    assert_eq!(tenby(&place, &["disk", "convert", "a.vhd", "b.vhd", "--azure", "--type", "fixed"]).well().err, "");
    assert_eq!(tenby(&place, &["disk", "convert", "a.vhd", "c.vhd", "--type", "fixed"]).well().err, "");
    let unfit = tenby(&place, &["disk", "convert", "a.raw", "d.vhd", "--type", "fixed"]).well();
    assert!(unfit.err.contains("tenby disk convert a.raw d.vhd --type fixed --azure"), "{unfit:?}");
    let unfit = tenby(&place, &["disk", "create", "e.vhd", "--size", "1000448", "--type", "fixed"]).well();
    assert!(unfit.err.contains("tenby disk create e.vhd --size 20M --type fixed"), "{unfit:?}");
    tenby(&place, &["disk", "convert", "e.vhd", "f", "--azure"]).well();
    assert_eq!(json(&place, &["disk", "info", "f"])["size"], 20 * MIB);
    for words in [&["g.vhdx", "--azure"][..], &["g.vhd", "--azure", "--type", "dynamic"], &["g.img", "--azure"]] {
        let words = [&["disk", "convert", "a.raw"], words].concat();
        assert!(tenby(&place, &words).with(2).err.contains("fixed VHD"));
    }
    tenby(&place, &["disk", "create", "large.vhdx", "--size", "40T"]).well();
    let refused = tenby(&place, &["disk", "convert", "large.vhdx", "g.vhd", "--azure"]).with(3);
    assert!(refused.err.contains("32767G") && !Path::new(&place.path("g.vhd")).exists(), "{refused:?}");
    if has("qemu-img") {
        for file in ["a.vhd", "d.vhd"] {
            let done =
                Command::new("qemu-img").args(["info", "--output=json", "-f", "vpc", &place.path(file)]).output();
            let info: Value = serde_json::from_slice(&done.unwrap().stdout).unwrap();
            assert_eq!(info["virtual-size"], json(&place, &["disk", "info", file])["size"], "{file}");
        }
    }
}

#[test]
fn vhd_is_compared_merged_compacted_and_resized_too() {
    let place = Place::new();
    raw(&place, "a.raw", 8 * MIB, &[(3 * MIB, &[1; 4096])]);
    tenby(&place, &["disk", "convert", "a.raw", "base.vhd"]).well();
    tenby(&place, &["disk", "create", "child.avhd", "--parent", "base.vhd"]).well();
    tenby(&place, &["disk", "compare", "child.avhd", "a.raw"]).well();
    let info = json(&place, &["disk", "info", "child.avhd", "--chain"]);
    assert_eq!(info["chain"][0]["children"], serde_json::json!(["child.avhd"]));
    tenby(&place, &["disk", "merge", "child.avhd"]).well();
    tenby(&place, &["disk", "compact", "base.vhd"]).well();
    tenby(&place, &["disk", "compare", "base.vhd", "a.raw"]).well();
    // A child of another size, and a grandchild.
    tenby(&place, &["disk", "create", "child.avhd", "--parent", "base.vhd"]).well();
    tenby(&place, &["disk", "resize", "child.avhd", "700M"]).well();
    assert!(fs::metadata(place.path("child.avhd")).unwrap().len() < MIB, "what nothing shows through takes no place");
    tenby(&place, &["disk", "create", "grandchild.avhd", "--parent", "child.avhd"]).well();
    tenby(&place, &["disk", "resize", "grandchild.avhd", "6M"]).well();
    let before = hash(&place, "grandchild.avhd");
    tenby(&place, &["disk", "merge", "grandchild.avhd"]).well();
    assert_eq!(
        (hash(&place, "child.avhd"), &json(&place, &["disk", "info", "child.avhd"])["size"]),
        (before.clone(), &(6 * MIB).into())
    );
    tenby(&place, &["disk", "merge", "child.avhd"]).well();
    assert_eq!(hash(&place, "base.vhd"), before);
    tenby(&place, &["disk", "check", "base.vhd"]).well();
}

#[test]
fn a_merge_into_a_parent_of_others_is_refused() {
    let place = Place::new();
    tenby(&place, &["disk", "create", "base.vhdx", "--size", "8M"]).well();
    tenby(&place, &["disk", "create", "one.avhdx", "--parent", "base.vhdx"]).well();
    tenby(&place, &["disk", "create", "two.avhdx", "--parent", "base.vhdx"]).well();
    let before = content(place.dir.path());
    let refused = tenby(&place, &["disk", "merge", "one.avhdx"]).with(3);
    assert!(refused.err.contains("two.avhdx") && refused.err.contains("--into"), "{refused:?}");
    assert!(content(place.dir.path()) == before);
}

/// Killed in the middle, as often as it takes: it goes on, and nothing is lost.
#[test]
fn a_merge_that_is_killed_goes_on() {
    if !has("qemu-io") {
        return;
    }
    let place = Place::new();
    tenby(&place, &["disk", "create", "base.vhdx", "--size", "400M"]).well();
    tenby(&place, &["disk", "create", "child.avhdx", "--parent", "base.vhdx"]).well();
    write(&place, "child.avhdx", &["write -P 5 0 200M", "write -P 6 300M 50M"]);
    let before = hash(&place, "child.avhdx");
    for wait in [20, 60, 120, 250] {
        let mut merging = place.command(&["disk", "merge", "child.avhdx", "--quiet"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        merging.kill().unwrap();
        merging.wait().unwrap();
        if !Path::new(&place.path("child.avhdx")).exists() {
            break;
        }
        assert_eq!(hash(&place, "child.avhdx"), before);
    }
    if Path::new(&place.path("child.avhdx")).exists() {
        tenby(&place, &["disk", "merge", "child.avhdx"]).well();
    }
    assert_eq!(hash(&place, "base.vhdx"), before);
}

#[test]
fn a_merge_that_is_cancelled_says_that_it_goes_on() {
    if !has("qemu-io") {
        return;
    }
    let place = Place::new();
    tenby(&place, &["disk", "create", "base.vhdx", "--size", "2G"]).well();
    tenby(&place, &["disk", "create", "child.avhdx", "--parent", "base.vhdx"]).well();
    write(&place, "child.avhdx", &["write -P 5 0 512M"]);
    let before = hash(&place, "child.avhdx");
    let merging =
        place.command(&["disk", "merge", "child.avhdx"]).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(150) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let pid = rustix::process::Pid::from_child(&merging);
    // It may have ended already on a fast host.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
    let ended: Ended = merging.wait_with_output().unwrap().into();
    if ended.code == 0 {
        assert_eq!(hash(&place, "base.vhdx"), before);
        return;
    }
    if ended.code == 130 {
        assert!(ended.err.contains("hint: tenby disk merge"), "{ended:?}");
    }
    assert_eq!(hash(&place, "child.avhdx"), before);
    tenby(&place, &["disk", "merge", "child.avhdx"]).well();
    assert_eq!(hash(&place, "base.vhdx"), before);
}

#[test]
fn a_child_is_reconnected_by_its_parents_id_or_by_force() {
    let place = Place::new();
    raw(&place, "base.raw", 8 * MIB, &[(0, &[1; 4096])]);
    tenby(&place, &["disk", "convert", "base.raw", "base.vhdx"]).well();
    tenby(&place, &["disk", "create", "child.avhdx", "--parent", "base.vhdx"]).well();
    let before = hash(&place, "child.avhdx");
    fs::rename(place.path("base.vhdx"), place.path("moved.vhdx")).unwrap();
    let lost = tenby(&place, &["disk", "info", "child.avhdx", "--chain"]).with(5);
    assert!(lost.err.contains("hint: tenby disk reconnect child.avhdx moved.vhdx"), "{lost:?}");
    let reconnected = json(&place, &["disk", "reconnect", "child.avhdx", "moved.vhdx"]);
    assert_eq!((&reconnected["fits"], &reconnected["forced"]), (&true.into(), &false.into()));
    assert_eq!(hash(&place, "child.avhdx"), before);

    tenby(&place, &["disk", "create", "other.vhdx", "--size", "8M"]).well();
    let unchanged = fs::read(place.path("child.avhdx")).unwrap();
    let refused = tenby(&place, &["disk", "reconnect", "child.avhdx", "other.vhdx"]).with(3);
    let ids = [json(&place, &["disk", "info", "moved.vhdx"]), json(&place, &["disk", "info", "other.vhdx"])];
    assert!(ids.iter().all(|info| refused.err.contains(info["id"].as_str().unwrap())), "{refused:?}");
    assert!(refused.err.contains("--force"));
    assert!(fs::read(place.path("child.avhdx")).unwrap() == unchanged);
    let forced = json(&place, &["disk", "reconnect", "child.avhdx", "other.vhdx", "--force"]);
    assert_eq!(forced["forced"], true);
    assert_eq!(json(&place, &["disk", "info", "child.avhdx"])["forced"], ids[0]["id"]);
    assert_ne!(hash(&place, "child.avhdx"), before);

    fs::create_dir(place.path("sub")).unwrap();
    fs::copy(place.path("moved.vhdx"), place.path("sub/moved.vhdx")).unwrap();
    tenby(&place, &["disk", "reconnect", "child.avhdx", "sub/moved.vhdx"]).with(2);
    tenby(&place, &["disk", "reconnect", "child.avhdx", "child.avhdx", "--force"]).with(3);
    tenby(&place, &["disk", "reconnect", "other.vhdx", "moved.vhdx", "--force"]).with(3);
}

#[test]
fn a_chain_says_which_files_are_needed() {
    let place = Place::new();
    tenby(&place, &["disk", "create", "base.vhdx", "--size", "8M"]).well();
    tenby(&place, &["disk", "create", "child.avhdx", "--parent", "base.vhdx"]).well();
    let info = json(&place, &["disk", "info", "child.avhdx", "--chain"]);
    let chain = info["chain"].as_array().unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!((&chain[0]["file"], &chain[0]["deletable"]), (&"base.vhdx".into(), &false.into()));
    assert_eq!(chain[0]["children"], serde_json::json!(["child.avhdx"]));
    assert_eq!((&chain[1]["file"], &chain[1]["deletable"]), (&"child.avhdx".into(), &true.into()));
    assert!(chain.iter().all(|link| link["modified"].is_string() && link["bytes"].is_u64()));
    let text = tenby(&place, &["disk", "info", "child.avhdx", "--chain"]).well().out;
    assert!(text.contains("needed    by child.avhdx") && text.contains("by nothing in this folder"), "{text}");
}

/// One document on standard output, and nothing else there.
#[test]
fn every_verb_answers_in_json() {
    let place = Place::new();
    raw(&place, "a.raw", 8 * MIB, &[(3 * MIB, &[1; 4096])]);
    let chain = ["--parents", "."];
    for words in [
        &["create", "base.vhdx", "--size", "8M"][..],
        &["create", "child.avhdx", "--parent", "base.vhdx"],
        &["info", "child.avhdx"],
        &["info", "child.avhdx", "--chain"],
        &["hash", "child.avhdx"],
        &["map", "child.avhdx"],
        &["check", "child.avhdx"],
        &["check", "child.avhdx", "--repair"],
        &["compare", "child.avhdx", "base.vhdx"],
        &["convert", "a.raw", "a.vhdx"],
        &["resize", "child.avhdx", "16M"],
        &["compact", "child.avhdx"],
        &["reconnect", "child.avhdx", "base.vhdx"],
        &["merge", "child.avhdx", "--into", "all.vhdx"],
        &["merge", "child.avhdx"],
    ] {
        let more = if words[0] == "check" { &[][..] } else { &chain };
        let words: Vec<&str> = ["disk"].iter().chain(words).chain(more).copied().collect();
        assert!(json(&place, &words).is_object(), "{words:?}");
    }
    let served = Command::new("sh")
        .args(["-c", r#"timeout 1 "$0" disk serve base.vhdx --socket s.sock --json || true"#])
        .arg(env!("CARGO_BIN_EXE_tenby"))
        .current_dir(place.dir.path())
        .output()
        .unwrap();
    assert!(Ended::from(served).json()["uri"].as_str().unwrap().starts_with("nbd+unix://"));
}

#[test]
fn a_dense_copy_has_no_holes() {
    let place = Place::new();
    raw(&place, "a.raw", 16 * MIB, &[(MIB, &[7; 4096])]);
    for (target, words) in [("b.raw", &[][..]), ("b.vhdx", &[]), ("c.vhdx", &["--type", "fixed"])] {
        let words: Vec<&str> =
            ["disk", "convert", "a.raw", target, "--dense"].into_iter().chain(words.iter().copied()).collect();
        let info = json(&place, &words);
        let length = fs::metadata(place.path(target)).unwrap().len();
        assert!(info["bytes"].as_u64().unwrap() >= length, "{target}: {info}, {length}");
        tenby(&place, &["disk", "compare", "a.raw", target]).well();
    }
}

#[test]
fn qcow2_comes_and_goes_by_qemu_img() {
    if !has("qemu-img") {
        return;
    }
    let place = Place::new();
    raw(&place, "a.raw", 9 * MIB + 512, &[(MIB, &vec![7; 70_000]), (9 * MIB, &[1; 512])]);
    let made = json(&place, &["disk", "convert", "a.raw", "a.qcow2"]);
    assert_eq!((&made["format"], &made["size"]), (&"qcow2".into(), &(9 * MIB + 512).into()));
    let check = Command::new("qemu-img").args(["check", "-f", "qcow2", &place.path("a.qcow2")]).output().unwrap();
    assert!(check.status.success(), "{check:?}");
    for target in ["b.vhdx", "b.raw"] {
        tenby(&place, &["disk", "convert", "a.qcow2", target]).well();
        tenby(&place, &["disk", "compare", "a.raw", target]).well();
    }
    let refused = tenby(&place, &["disk", "hash", "a.qcow2"]).with(3);
    assert!(refused.err.contains("hint: tenby disk convert a.qcow2 a.vhdx"), "{refused:?}");
    // One that names another file is not followed.
    let over = place.path("over.qcow2");
    let args = ["create", "-q", "-f", "qcow2", "-b", &place.path("a.qcow2"), "-F", "qcow2", &over];
    assert!(Command::new("qemu-img").args(args).status().unwrap().success());
    tenby(&place, &["disk", "convert", "over.qcow2", "c.vhdx"]).with(5);
    assert!(!Path::new(&place.path("c.vhdx")).exists());
    // Without the tool it says what to install.
    let missing: Ended =
        place.command(&["disk", "convert", "a.qcow2", "d.vhdx"]).env("PATH", "/nowhere").output().unwrap().into();
    let missing = missing.with(1);
    assert!(missing.err.contains("hint: sudo apt install qemu-utils"), "{missing:?}");
    assert!(!Path::new(&place.path("d.vhdx")).exists());
    let left = fs::read_dir(place.dir.path()).unwrap().flatten();
    assert!(left.into_iter().all(|entry| !entry.file_name().to_string_lossy().contains(".part")), "nothing is left");
}

/// The file of a machine's first disk.
fn first_disk(place: &Place, name: &str) -> String {
    place.machine(name)["disks"][0]["file"].as_str().unwrap().to_owned()
}

#[test]
fn a_qcow2_is_copied_into_a_machine() {
    if !has("qemu-img") {
        return;
    }
    let place = Place::new();
    raw(&place, "a.raw", 40 * MIB + 512, &[(MIB, &vec![7; 70_000]), (40 * MIB, &[1; 512])]);
    tenby(&place, &["disk", "convert", "a.raw", "a.qcow2"]).well();
    fs::copy(place.path("a.qcow2"), place.path("b.img")).unwrap();
    let before = fs::read(place.path("a.qcow2")).unwrap();
    for (name, disk) in [("one", "a.qcow2"), ("two", "b.img"), ("three", "b.img,format=qcow2")] {
        place.tenby(&["vm", "create", name, "--memory", "64M", "--disk", disk]).well();
        let file = first_disk(&place, name);
        let info = json(&place, &["disk", "info", &file]);
        assert_eq!((&info["format"], &info["size"]), (&"vhdx".into(), &(40 * MIB + 512).into()));
        tenby(&place, &["disk", "compare", &file, "a.raw"]).well();
    }
    place.tenby(&["vm", "set", "one", "--add-disk", "a.qcow2"]).well();
    let added = place.machine("one")["disks"][1]["file"].as_str().unwrap().to_owned();
    tenby(&place, &["disk", "compare", &added, "a.raw"]).well();
    assert!(fs::read(place.path("a.qcow2")).unwrap() == before);
    // One that names other files is refused before QEMU sees it; so is what is none, and one that is to be a layer.
    let qemu_img = |args: &[&str]| assert!(Command::new("qemu-img").args(args).status().unwrap().success());
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &place.path("a.qcow2"), "-F", "qcow2", &place.path("over.qcow2")]);
    let data = format!("data_file={}", place.path("data"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, &place.path("apart.qcow2"), "1M"]);
    let before = content(&place.root());
    for (disk, code, why) in [
        ("over.qcow2", 5, "stands on another image"),
        ("apart.qcow2", 5, "data lie in another file"),
        ("a.raw,format=qcow2", 5, "no qcow2"),
        ("a.qcow2,format=raw", 5, "qcow2"),
        ("a.qcow2,in-place", 3, "cannot be a layer"),
        ("b.img,format=qcow2,in-place", 3, "cannot be a layer"),
    ] {
        for words in [&["vm", "create", "no", "--disk", disk][..], &["vm", "set", "one", "--add-disk", disk]] {
            let mut command = place.command(words);
            let refused: Ended = command.output().unwrap().into();
            assert!(refused.with(code).err.contains(why), "{words:?}");
        }
    }
    let missing: Ended =
        place.command(&["vm", "create", "no", "--disk", "a.qcow2"]).env("PATH", "/nowhere").output().unwrap().into();
    assert!(missing.with(1).err.contains("hint: sudo apt install qemu-utils"));
    let after = content(&place.root());
    let disks = |all: &[(std::path::PathBuf, Vec<u8>)]| {
        all.iter()
            .map(|(path, _)| path.clone())
            .filter(|path| path.to_string_lossy().contains("/disks/"))
            .collect::<Vec<_>>()
    };
    assert_eq!(disks(&after), disks(&before), "nothing is left");
    assert_eq!(place.tenby(&["vm", "list"]).well().out.lines().count(), 4, "three machines and a head");
}

/// Cancelled while `qemu-img` is at work: neither that nor anything of the machine is left.
#[test]
fn a_creation_that_is_cancelled_leaves_nothing() {
    let place = Place::new();
    let mut head = vec![0; 4096];
    head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    head[24..32].copy_from_slice(&(8 * MIB).to_be_bytes());
    fs::write(place.path("a.qcow2"), &head).unwrap();
    // A tool that never ends, and says who it is.
    fs::create_dir(place.path("bin")).unwrap();
    let tool = place.path("bin/qemu-img");
    fs::write(
        &tool,
        format!("#!/bin/sh\necho $$ > '{0}.new' && mv '{0}.new' '{0}'\nexec sleep 1000\n", place.path("pid")),
    )
    .unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", place.path("bin"), std::env::var("PATH").unwrap());
    let creating = place
        .command(&["vm", "create", "web", "--disk", "a.qcow2"])
        .env("PATH", path)
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    place::eventually("the tool", || Path::new(&place.path("pid")).exists());
    let pid: i32 = fs::read_to_string(place.path("pid")).unwrap().trim().parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_child(&creating), rustix::process::Signal::INT).unwrap();
    let ended: Ended = creating.wait_with_output().unwrap().into();
    assert!(ended.with(130).err.contains("cancelled"));
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the tool is gone");
    let left: Vec<_> = fs::read_dir(place.root()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["lock"]);
}

#[test]
fn what_a_machine_owns_is_not_changed() {
    let place = Place::with_machine("web");
    let probe = rustix::fs::setxattr(place.dir.path(), "user.test", b"1", rustix::fs::XattrFlags::empty());
    if probe.is_err() {
        println!("SKIPPED: no extended attributes here");
        return;
    }
    tenby(&place, &["disk", "create", "mine.vhdx", "--size", "8M"]).well();
    tenby(&place, &["vm", "create", "db", "--memory", "64M", "--disk", "mine.vhdx,in-place"]).well();
    let own = place.machine("web")["disks"][0]["file"].as_str().unwrap().to_owned();
    for (file, name) in [(own.as_str(), "web"), ("mine.vhdx", "db")] {
        for words in [&["disk", "resize", file, "16M"][..], &["disk", "compact", file]] {
            let refused = tenby(&place, words).with(3);
            assert!(refused.err.contains(name), "{refused:?}");
        }
        tenby(&place, &["disk", "hash", file]).well();
    }
    tenby(&place, &["vm", "delete", "db", "--yes"]).well();
    tenby(&place, &["disk", "resize", "mine.vhdx", "16M"]).well();
}
