//! Whatever is thrown at `tenby disk`: it ends with the right code and words that name the file, has changed nothing, or says what is
//! left to do.

mod place;

use place::{Ended, Place, content};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Every verb on a file, each in every part that a file can play.
fn verbs(file: &str) -> Vec<Vec<String>> {
    let words = [
        vec!["info", file],
        vec!["info", file, "--chain"],
        vec!["hash", file],
        vec!["map", file],
        vec!["check", file],
        vec!["check", file, "--repair"],
        vec!["check", "good.vhdx", "--undo", file],
        vec!["compare", file, "good.vhdx"],
        vec!["compare", "good.vhdx", file],
        vec!["convert", file, "new.vhdx"],
        vec!["convert", file, "new.qcow2"],
        vec!["convert", "good.vhdx", file, "--to", "raw"],
        vec!["create", file, "--size", "8M"],
        vec!["create", "new.avhdx", "--parent", file],
        vec!["resize", file, "16M"],
        vec!["compact", file],
        vec!["reconnect", file, "good.vhdx"],
        vec!["reconnect", "good.avhdx", file],
        vec!["merge", file],
        vec!["merge", file, "--into", "new.vhdx"],
        vec!["merge", "good.avhdx", "--into", file],
        vec!["serve", file, "--socket", "new.sock"],
        vec!["serve", file, "--socket", "new.sock", "--read-only"],
        vec!["hash", "good.avhdx", "--parents", file],
    ];
    words.into_iter().map(|words| std::iter::once("disk").chain(words).map(str::to_owned).collect()).collect()
}

/// What a new file would be: whatever is there is in the way.
fn makes(words: &[String], file: &str) -> bool {
    let target = match words[1].as_str() {
        "convert" => Some(&words[3]),
        "create" => Some(&words[2]),
        "merge" => words.get(4),
        _ => None,
    };
    target.is_some_and(|target| target == file)
}

/// Good images, and everything else that can lie in a folder. Beside each: the code that it is refused with.
fn zoo(place: &Place) -> Vec<(&'static str, i32)> {
    let path = |name: &str| place.path(name);
    place.tenby(&["disk", "create", "good.vhdx", "--size", "8M"]).well();
    place.tenby(&["disk", "create", "good.vhd", "--size", "8M"]).well();
    place.tenby(&["disk", "create", "good.avhdx", "--parent", "good.vhdx"]).well();
    let (vhdx, vhd) = (fs::read(path("good.vhdx")).unwrap(), fs::read(path("good.vhd")).unwrap());
    fs::remove_file(path("good.vhd")).unwrap();
    fs::create_dir(path("folder")).unwrap();
    symlink("nowhere", path("dangling.vhdx")).unwrap();
    symlink("loop.vhdx", path("loop.vhdx")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(path("socket.vhdx")).unwrap());
    let owner = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path("pipe.vhdx"), rustix::fs::FileType::Fifo, owner, 0).unwrap();
    let files: [(&'static str, &[u8]); 15] = [
        ("empty.vhdx", b""),
        ("empty.vhd", b""),
        ("empty.raw", b""),
        ("empty.img", b""),
        ("text.vhdx", b"this is no disk\n"),
        ("text.vhd", b"this is no disk\n"),
        ("text.img", b"this is no disk\n"),
        ("signature.vhdx", b"vhdxfile"),
        ("quarter.vhdx", &vhdx[..vhdx.len() / 4]),
        ("half.vhdx", &vhdx[..vhdx.len() / 2]),
        ("almost.vhdx", &vhdx[..vhdx.len() - 1]),
        ("head.vhd", &vhd[..600]),
        ("half.vhd", &vhd[..vhd.len() / 2]),
        ("disguise.raw", &vhdx),
        ("other.vhdx", b"KDMV\x01\0\0\0 a disk of another program"),
    ];
    for (name, bytes) in files {
        fs::write(path(name), bytes).unwrap();
    }
    let special = [
        ("folder", 5),
        ("/dev/null", 5),
        ("/", 5),
        ("socket.vhdx", 5),
        ("pipe.vhdx", 5),
        ("loop.vhdx", 5),
        ("good.vhdx/x", 5),
    ];
    let missing = [("dangling.vhdx", 4), ("missing.vhdx", 4), ("no/such.vhdx", 4)];
    files.into_iter().map(|(name, _)| (name, 5)).chain(special).chain(missing).collect()
}

#[test]
fn bad_input_is_refused_by_every_verb_and_stays_as_it_is() {
    let place = Place::new();
    for (file, code) in zoo(&place) {
        let before = content(place.dir.path());
        for words in verbs(file) {
            let making = makes(&words, file);
            if making && code == 4 && !file.contains('/') && file != "dangling.vhdx" {
                // There it can be made.
                continue;
            }
            let borrowed: Vec<&str> = words.iter().map(String::as_str).collect();
            let ended = place.in_little_memory(&borrowed);
            // A name that says no format; a parent or a folder for it that lies elsewhere; what is there is not written over.
            let usage =
                making || words.contains(&"--undo".to_owned()) || words[1] == "reconnect" || words[1] == "create";
            let fine = ended.code == code || usage && [2, 3, 4, 5].contains(&ended.code);
            // Some damage can be mended, and what is cut off behind all that counts is none.
            let whole = words[1] == "check" && (file.starts_with("almost") || file.starts_with("half.vhd"));
            let folder = words.contains(&"--parents".to_owned()) && Path::new(&place.path(file)).is_dir();
            assert!(fine || whole || folder, "{words:?}: {ended:?}");
            if ended.code != 0 {
                assert!(ended.err.starts_with("error: "), "{words:?}: {ended:?}");
                assert!(!ended.err.contains("os error 2)") && !ended.err.contains("panicked"), "{words:?}: {ended:?}");
            }
            if words.contains(&"--repair".to_owned()) {
                for (path, bytes) in &before {
                    if path.is_file() {
                        fs::write(path, bytes).unwrap();
                    }
                }
                for entry in fs::read_dir(place.dir.path()).unwrap().flatten() {
                    if entry.file_name().to_string_lossy().contains(".undo-") {
                        fs::remove_file(entry.path()).unwrap();
                    }
                }
            }
            assert!(!Path::new(&place.path("new.sock")).exists(), "{words:?}");
        }
        assert!(content(place.dir.path()) == before, "{file}: something has changed");
    }
}

#[test]
fn a_refusal_is_a_document_with_json() {
    let place = Place::new();
    zoo(&place);
    for (file, kind) in [("text.vhdx", "damaged"), ("missing.vhdx", "not-found"), ("pipe.vhdx", "damaged")] {
        for words in verbs(file) {
            let words: Vec<&str> = words.iter().map(String::as_str).chain(["--json"]).collect();
            if ["create", "reconnect"].contains(&words[1]) || words.contains(&"--undo") || makes_str(&words, file) {
                continue;
            }
            let ended = place.tenby(&words);
            let error = ended.json()["error"].clone();
            assert_eq!(error["kind"], kind, "{words:?}: {ended:?}");
            assert_eq!(error["code"], ended.code);
        }
    }
}

fn makes_str(words: &[&str], file: &str) -> bool {
    makes(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>(), file)
}

#[test]
fn an_empty_file_and_a_raw_parent_are_told_what_they_are() {
    let place = Place::new();
    zoo(&place);
    let said = place.tenby(&["disk", "hash", "empty.vhdx"]).with(5);
    assert!(said.err.contains("empty.vhdx: it is empty") && !said.err.contains("hint"), "{said:?}");
    let said = place.tenby(&["disk", "hash", "text.img"]).with(5);
    assert!(said.err.contains("hint: tenby disk hash text.img --from raw"), "{said:?}");
    place.tenby(&["disk", "hash", "text.img", "--from", "raw"]).well();
    let said = place.tenby(&["vm", "create", "x", "--disk", "text.img"]).with(5);
    assert!(said.err.contains("text.img,format=raw"), "{said:?}");
    let said = place.tenby(&["disk", "hash", "half.vhdx"]).with(5);
    assert!(said.err.contains("hint: tenby disk check half.vhdx"), "{said:?}");
    for file in ["pipe.vhdx", "folder", "/dev/null"] {
        place.tenby(&["vm", "create", "x", "--disk", file]).with(5);
    }
    // Nobody but a machine could open what stands on raw bytes: they have no id.
    fs::write(place.path("base.raw"), vec![7; 1 << 20]).unwrap();
    let refused = place.tenby(&["disk", "create", "over.avhdx", "--parent", "base.raw"]).with(3);
    assert!(refused.err.contains("hint: tenby disk convert base.raw base.vhdx"), "{refused:?}");
    assert!(!Path::new(&place.path("over.avhdx")).exists());
}

/// Somebody who may not read or write what is there.
#[test]
fn without_permission_nothing_is_done() {
    let place = Place::new();
    zoo(&place);
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for (file, mode) in [("good.vhdx", 0o444), ("half.vhdx", 0o000), ("good.avhdx", 0o444)] {
        fs::set_permissions(place.path(file), fs::Permissions::from_mode(mode)).unwrap();
    }
    let root = rustix::process::getuid().is_root();
    // Root may do everything; somebody else must also be able to run the program.
    let program = place.path("tenby");
    if root {
        fs::copy(env!("CARGO_BIN_EXE_tenby"), &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    } else {
        fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o555)).unwrap();
    }
    let run = |words: &[&str]| -> Ended {
        let mut command = if root { Command::new(&program) } else { Command::new(env!("CARGO_BIN_EXE_tenby")) };
        if root {
            command.uid(65534).gid(65534);
        }
        command.args(words).current_dir(place.dir.path()).stdin(Stdio::null()).output().unwrap().into()
    };
    let before = content(place.dir.path());
    for words in [&["disk", "hash", "good.avhdx"][..], &["disk", "info", "good.avhdx", "--chain"]] {
        run(words).well();
    }
    for words in verbs("half.vhdx").iter().chain(&verbs("good.vhdx")).filter(|words| words[1] != "serve") {
        let writes = ["resize", "compact", "create", "convert"].contains(&words[1].as_str())
            || words.contains(&"--repair".to_owned())
            || words.contains(&"--into".to_owned());
        if words.contains(&"half.vhdx".to_owned()) || writes {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let ended = run(&words);
            assert!(
                ended.code == 1 && ended.err.contains("Permission denied") || [2, 3, 5].contains(&ended.code),
                "{words:?}: {ended:?}"
            );
        }
    }
    for words in [&["disk", "resize", "good.avhdx", "16M"][..], &["disk", "hash", "half.vhdx"]] {
        let ended = run(words).with(1);
        assert!(ended.err.contains("Permission denied"), "{ended:?}");
    }
    if !root {
        fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    }
    assert!(content(place.dir.path()) == before);
}

/// Ends a process with Ctrl-C after a while: how it ended, by a code or by that signal.
fn interrupted(place: &Place, words: &[&str], after: Duration) -> (Option<i32>, String) {
    let child = place.command(words).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(after);
    // It may have ended already.
    let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT);
    let output = child.wait_with_output().unwrap();
    let by_signal = output.status.signal() == Some(2);
    assert!(by_signal || output.status.code().is_some(), "{output:?}");
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// At any moment, which is not to be known beforehand: the state is as before, or goes on from where it was; and that is said.
#[test]
fn ctrl_c_leaves_everything_as_it_was_or_says_what_is_left() {
    let place = Place::new();
    let disk = fs::File::create(place.path("data.raw")).unwrap();
    disk.set_len(256 * MIB).unwrap();
    for at in (0..256).step_by(4) {
        disk.write_all_at(&vec![at as u8 + 1; 2 << 20], at * MIB).unwrap();
    }
    place.tenby(&["disk", "convert", "data.raw", "base.vhdx"]).well();
    place.tenby(&["disk", "create", "child.avhdx", "--parent", "base.vhdx"]).well();
    let hash = |file: &str| place.tenby(&["disk", "hash", file, "--json"]).well().json()["sha256"].clone();
    let before = hash("data.raw");
    let names = || {
        let names = fs::read_dir(place.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.collect::<std::collections::BTreeSet<_>>()
    };
    let there = names();
    let waits = [0, 3, 6, 10, 20, 40, 80, 160, 320].map(Duration::from_millis);
    let looks: [&[&str]; 6] = [
        &["disk", "hash", "child.avhdx"],
        &["disk", "compare", "child.avhdx", "data.raw"],
        &["disk", "map", "data.raw"],
        &["disk", "check", "base.vhdx"],
        &["disk", "info", "child.avhdx", "--chain"],
        &["disk", "resize", "child.avhdx", "128M"],
    ];
    let makes: [&[&str]; 4] = [
        &["disk", "convert", "data.raw", "new.vhdx"],
        &["disk", "convert", "child.avhdx", "new.qcow2"],
        &["disk", "merge", "child.avhdx", "--into", "new.vhdx"],
        &["disk", "create", "new.vhdx", "--size", "1G"],
    ];
    for words in looks.iter().chain(&makes) {
        for wait in waits {
            let (code, said) = interrupted(&place, words, wait);
            match code {
                Some(0) | None => {}
                Some(130) => assert!(said.contains("was cancelled"), "{words:?}: {said}"),
                // It would have cut something off.
                Some(3) => assert_eq!(words[1], "resize", "{said}"),
                code => panic!("{words:?}: {code:?}: {said}"),
            }
            // What came too late found the new file complete.
            for new in ["new.vhdx", "new.qcow2"].map(|name| place.path(name)) {
                if Path::new(&new).exists() {
                    assert_ne!(code, Some(130), "{words:?}: {said}");
                    if new.ends_with("vhdx") {
                        place.tenby(&["disk", "check", &new]).well();
                    }
                    fs::remove_file(new).unwrap();
                }
            }
            assert_eq!(names(), there, "{words:?}: {said}");
        }
    }
    assert_eq!(hash("child.avhdx"), before);
    // These change something, and go on from where they were.
    place.tenby(&["disk", "convert", "data.raw", "fixed.vhdx", "--type", "fixed", "--dense"]).well();
    place.tenby(&["disk", "create", "leaf.avhdx", "--parent", "fixed.vhdx"]).well();
    for (words, file) in [
        (&["disk", "merge", "leaf.avhdx"][..], "leaf.avhdx"),
        (&["disk", "compact", "fixed.vhdx"], "fixed.vhdx"),
        (&["disk", "merge", "child.avhdx"], "child.avhdx"),
    ] {
        for wait in waits {
            let (code, said) = interrupted(&place, words, wait);
            if code == Some(130) {
                assert!(said.contains("hint: tenby disk") && said.contains("(goes on)"), "{words:?}: {said}");
            }
            if code == Some(0) {
                break;
            }
            assert_eq!(hash(file), before, "{words:?}");
        }
        if Path::new(&place.path(file)).exists() {
            place.tenby(words).well();
        }
    }
    assert_eq!((hash("base.vhdx"), hash("fixed.vhdx")), (before.clone(), before));
}

/// What runs on a file system of its own, of 24 MiB, mounted at `full`. `None` if that cannot be had here.
fn on_a_small_disk(place: &Place, script: &str) -> Option<String> {
    let full = place.path("full");
    fs::create_dir(&full).unwrap();
    let tenby = env!("CARGO_BIN_EXE_tenby");
    let script = format!(
        "mount -t tmpfs -o size=24m none '{full}' && cd '{full}' || exit 77\nT='{tenby} --quiet disk'\n{script}"
    );
    for namespaces in ["-m", "-Urm"] {
        let output = Command::new("unshare").args([namespaces, "sh", "-c", &script]).output();
        if let Ok(output) = output
            && output.status.success()
        {
            return Some(String::from_utf8(output.stdout).unwrap());
        }
    }
    println!("SKIPPED: no file system of our own can be mounted here");
    None
}

/// Bytes without zeros in a row.
fn noise(size: u64) -> Vec<u8> {
    (1..=size / 8).flat_map(|n| n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()).collect()
}

/// The shell's part: runs a verb and tells its code, what is there afterwards and what it said.
const TELL: &str = r#"tell() { said=$($T "$@" 2>&1 >/dev/null </dev/null); echo "$? | $(ls -A | tr '\n' ' ')| $(echo "$said" | tr '\n' ' ')"; }
fill() { rm -f fill; left=$(df --output=avail -k . | tail -1); head -c $(((left - $1) * 1024)) /dev/zero >fill; }
"#;

#[test]
fn a_full_disk_is_told_with_what_is_missing_and_nothing_is_left() {
    let place = Place::new();
    let random = |name: &str, size: u64| {
        fs::write(place.path(name), noise(size)).unwrap();
    };
    random("big.raw", 30 * MIB);
    let Some(told) = on_a_small_disk(
        &place,
        &format!(
            "{TELL}
for to in vhdx vhd raw qcow2; do tell convert ../big.raw new.$to; done
tell convert ../big.raw new.raw --dense
fill 0
for new in new.vhdx new.vhd; do tell create $new --size 400G; done"
        ),
    ) else {
        return;
    };
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines.len(), 7, "{told}");
    for (number, line) in lines.iter().enumerate() {
        let (code, rest) = line.split_once(" | ").unwrap();
        let (there, said) = rest.split_once("| ").unwrap();
        if said.contains("is not installed") {
            continue;
        }
        assert_eq!(code, "1", "{line}");
        assert_eq!(there, if number < 5 { "" } else { "fill " }, "{line}");
        let missing = if number < 5 { "more is needed (" } else { "no room for " };
        assert!(said.contains(missing) && said.contains("left)") && said.contains("hint: free some space"), "{line}");
    }
}

/// However little is left when a merge begins, nothing is lost, and it goes on when there is more.
#[test]
fn a_merge_on_a_full_disk_loses_nothing() {
    let place = Place::new();
    fs::write(place.path("data.raw"), noise(8 * MIB)).unwrap();
    for format in ["vhdx", "vhd"] {
        let (base, child) = (format!("base.{format}"), format!("child.a{format}"));
        place.tenby(&["disk", "create", &base, "--size", "8M"]).well();
        place.tenby(&["disk", "create", &child, "--parent", &base]).well();
        let socket = place.path("s.sock");
        let mut serving =
            place.command(&["disk", "serve", &child, "--socket", &socket]).stdout(Stdio::null()).spawn().unwrap();
        place::eventually("the socket", || Path::new(&socket).exists());
        let uri = format!("nbd+unix:///?socket={socket}");
        let copied = Command::new("nbdcopy").arg(place.path("data.raw")).arg(&uri).arg("--flush").status();
        rustix::process::kill_process(rustix::process::Pid::from_child(&serving), rustix::process::Signal::TERM)
            .unwrap();
        assert!(serving.wait().unwrap().success());
        if !copied.is_ok_and(|status| status.success()) {
            println!("SKIPPED: no nbdcopy");
            return;
        }
        place.tenby(&["disk", "compare", &child, "data.raw"]).well();
        let Some(told) = on_a_small_disk(
            &place,
            &format!(
                "{TELL}
for left in 0 4 40 100 300 600 1000 2000 3000 5000; do
    rm -f *; cp --sparse=always ../{base} ../{child} .; fill $left
    tell merge {child}
    if [ -e {child} ]; then tell compare {child} ../data.raw; rm fill; tell merge {child}; fi
    tell compare {base} ../data.raw
    ls
done"
            ),
        ) else {
            return;
        };
        fs::remove_dir(place.path("full")).unwrap();
        let merged = told.lines().filter(|line| line.starts_with(&base)).count();
        assert_eq!(merged, 10, "{told}");
        for line in told.lines().filter(|line| line.contains(" | ")) {
            let no_room =
                line.starts_with("1 | ") && line.contains("no room for ") && line.contains("hint: free some space");
            assert!(line.starts_with("0 | ") || no_room && line.contains("then go on: tenby"), "{line}\n{told}");
        }
        assert!(told.contains("no room for "), "it was full: {told}");
    }
}
