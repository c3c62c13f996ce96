//! A guest that gets the better of QEMU has won little: QEMU runs under a user of its own, where root starts it, and everything works all the same.

use e2e::{BASE, Lab, Process, Screen, qemu_10, qemu_72, wait_for};
use rustix::process::geteuid;
use std::collections::BTreeMap;
use std::fs::Permissions;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const GRUB: &str = "/usr/lib/grub-rescue/grub-rescue-cdrom.iso";
/// The variable that leaves QEMU the privileges of root.
const PRIVILEGED: &str = "TENBY_PRIVILEGED_QEMU";
/// The users that machines have.
const USERS: std::ops::Range<u32> = 0x7800_0000..0x7C00_0000;

/// Whether there are any privileges to be taken.
fn as_root() -> bool {
    let root = geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: only root has what is given up here");
    }
    root
}

/// What the kernel says of the only QEMU.
fn status(lab: &Lab) -> BTreeMap<String, String> {
    let all = lab.processes();
    let qemu = all.iter().find(|process| Process::is_qemu(process)).expect("a QEMU runs");
    let text = std::fs::read_to_string(format!("/proc/{}/status", qemu.pid.as_raw_nonzero())).expect("its status");
    let line = |line: &str| line.split_once(':').map(|(key, value)| (key.to_owned(), value.trim().to_owned()));
    text.lines().filter_map(line).collect()
}

/// Its QEMU runs as a user of its own, with these capabilities and no way to more. The user.
#[track_caller]
fn assert_confined(lab: &Lab, capabilities: &str) -> u32 {
    let status = status(lab);
    let four = |key: &str| status[key].split_whitespace().map(|id| id.parse().expect("a number")).collect::<Vec<u32>>();
    let user = four("Uid")[0];
    assert!(USERS.contains(&user), "{user}");
    assert_eq!((four("Uid"), four("Gid")), (vec![user; 4], vec![user; 4]));
    assert_eq!(status["Groups"], "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], capabilities, "{set}");
    }
    assert_eq!((status["NoNewPrivs"].as_str(), status["Seccomp"].as_str()), ("1", "2"));
    user
}

/// Its QEMU runs as who started it, and gets no further.
#[track_caller]
fn assert_not_separate(lab: &Lab) {
    let status = status(lab);
    assert_eq!(status["Uid"].split_whitespace().next(), Some("0"));
    assert_eq!((status["NoNewPrivs"].as_str(), status["Seccomp"].as_str()), ("1", "2"));
}

const NONE: &str = "0000000000000000";
/// That to listen on a port below 1024.
const TO_LISTEN: &str = "0000000000000400";
/// That to track memory.
const TO_TRACK: &str = "0000000000080000";

/// What the doctor says of protection: whether there is any, and why not.
fn doctor(output: &serde_json::Value) -> (bool, String) {
    let checks = output["checks"].as_array().expect("a list");
    let check = checks.iter().find(|check| check["what"] == "protection").expect("it is looked at");
    (check["ok"] == true, check["found"].as_str().expect("words").to_owned())
}

/// With these capabilities and no others.
fn everything_works(qemu: PathBuf, capabilities: &str) {
    if !as_root() {
        return;
    }
    let lab = Lab::empty().on_qemu(qemu);
    assert!(doctor(&lab.json(&["doctor"])).0);
    // A CD that only root can read, where only root can go.
    let iso = lab.path("only root's/cd.iso");
    std::fs::create_dir(iso.parent().expect("it has one")).expect("made");
    std::fs::copy(GRUB, &iso).expect("copied");
    std::fs::set_permissions(&iso, Permissions::from_mode(0o600)).expect("it is ours");
    std::fs::set_permissions(iso.parent().expect("it has one"), Permissions::from_mode(0o700)).expect("it is ours");
    lab.create_uefi_guest(BASE);
    lab.ok(&["vm", "set", BASE, "--cdrom", &iso.to_string_lossy()]);

    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    let nonce = witness.resync()["nonce"].clone();
    let user = assert_confined(&lab, capabilities);
    witness.ask("fill-ram 8 3");
    witness.ask("write vda 4M Monday");
    // It fails where QEMU may not track memory; as does what applies it to the running guest.
    lab.snapshot("Monday");
    witness.ask("write vda 4M Tuesday");
    lab.ok(&["snapshot", "apply", BASE, "Monday", "--keep-as", "Tuesday"]);
    assert_eq!(witness.resync()["nonce"], nonce);
    assert_eq!(witness.ask("read vda 4M")["text"], "Monday");
    assert_eq!(assert_confined(&lab, capabilities), user);
    lab.settle();
    private(&lab);

    // The next worker is the same to QEMU, and QEMU to it.
    lab.kill_worker();
    lab.ok(&["vm", "pause", BASE]);
    lab.ok(&["vm", "resume", BASE]);
    witness.resync();
    witness.ask("write vda 4M Wednesday");
    lab.snapshot("Wednesday");
    let picture = lab.path("screen.png");
    for _ in 0..2 {
        lab.ok(&["vm", "screenshot", BASE, &picture.to_string_lossy()]);
        assert!(std::fs::read(&picture).expect("a picture").starts_with(b"\x89PNG\r\n\x1a\n"));
    }
    lab.ok(&["vm", "save", BASE]);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    assert_eq!(witness.resync()["nonce"], nonce);
    assert_eq!(witness.ask("read vda 4M")["text"], "Wednesday");
    assert_eq!(witness.ask("sum-ram")["ok"], true);
    witness.prove();
    assert_eq!(assert_confined(&lab, capabilities), user);
    lab.ok(&["vm", "stop", BASE]);
    assert_eq!(lab.json(&["vm", "check", BASE])["clean"], true);
}

/// Nobody but root reads a disk or a memory, nor gets to the folders that they lie in; and what QEMU may change of its run folder is its own folder.
#[track_caller]
fn private(lab: &Lab) {
    let about = |path: &Path| path.symlink_metadata().expect("it is there");
    let mode = |path: &Path| about(path).permissions().mode() & 0o7777;
    let folder = lab.machine_folder();
    let files = lab.files();
    assert!(files.iter().any(|(file, _)| file.starts_with("memory/")), "{files:?}");
    for (file, _) in files {
        assert_eq!((mode(&folder.join(&file)), about(&folder.join(&file)).uid()), (0o600, 0), "{file}");
    }
    assert_eq!([mode(&folder), mode(&folder.join("memory")), mode(&folder.join("boot"))], [0o700; 3]);
    let run = lab.sockets().into_iter().next().expect("one QEMU");
    assert_eq!((about(&run).uid(), mode(&run)), (0, 0o710));
    assert_eq!((about(&run.join("qemu")).uid(), mode(&run.join("qemu"))), (about(&run).gid(), 0o700));
}

#[test]
fn everything_works_on_qemu_7_2() {
    everything_works(qemu_72(), TO_TRACK);
}

#[test]
fn everything_works_on_qemu_10_0() {
    everything_works(qemu_10(), NONE);
}

/// The firmware reads the CD, and shows what it found.
fn a_cd_is_read(qemu: PathBuf) {
    let lab = Lab::empty().on_qemu(qemu);
    let iso = lab.path("cd, the.iso");
    std::fs::copy(GRUB, &iso).expect("copied");
    std::fs::set_permissions(&iso, Permissions::from_mode(0o600)).expect("it is ours");
    let iso = iso.to_string_lossy();
    lab.ok(&[
        "vm", "create", "cd", "--memory", "64M", "--accel", "tcg", "--disk", "new:1G", "--cdrom", &iso, "--boot",
        "cdrom",
    ]);
    lab.ok(&["vm", "start", "cd"]);
    let menu = || {
        let socket = lab.json(&["vm", "show", "cd"])["sockets"]["vnc"].as_str().expect("a screen").to_owned();
        let mut screen = Screen::connect(Path::new(&socket));
        wait_for("GRUB's menu", || screen.reads("GNU GRUB  version 2.").then_some(()));
    };
    menu();
    lab.ok(&["snapshot", "create", "cd", "at the menu"]);
    lab.ok(&["snapshot", "apply", "cd", "at the menu", "--discard"]);
    // It reads its CD again.
    lab.ok(&["vm", "restart", "cd"]);
    menu();
}

#[test]
fn a_cd_that_only_its_owner_reads_on_qemu_7_2() {
    a_cd_is_read(qemu_72());
}

#[test]
fn a_cd_that_only_its_owner_reads_on_qemu_10_0() {
    a_cd_is_read(qemu_10());
}

#[test]
fn a_low_port_is_published_with_just_the_right_to_it() {
    if !as_root() {
        return;
    }
    let port = (600..1024).find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok()).expect("one is free");
    let lab = Lab::empty().on_qemu(qemu_10());
    lab.create_guest(BASE);
    lab.ok(&["vm", "set", BASE, "--publish", &format!("127.0.0.1:{port}:80")]);
    lab.ok(&["vm", "start", BASE]);
    assert_confined(&lab, TO_LISTEN);
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("somebody listens");
}

#[test]
fn it_is_switched_off_where_it_must_be() {
    if !as_root() {
        return;
    }
    let lab = Lab::with_base();
    let mut command = lab.command(&["vm", "start", BASE]);
    assert!(command.env(PRIVILEGED, "1").output().expect("the program runs").status.success());
    assert_not_separate(&lab);
    lab.snapshot("as root");
    let mut command = lab.command(&["--json", "doctor"]);
    let output = command.env(PRIVILEGED, "1").output().expect("the program runs");
    let said = doctor(&serde_json::from_slice(&output.stdout).expect("a document"));
    assert_eq!(said, (false, format!("switched off by {PRIVILEGED}")));
}

#[test]
fn what_is_missing_for_it_keeps_no_machine_from_running() {
    if !as_root() {
        return;
    }
    // A QEMU that only root can start.
    let lab = Lab::with_base();
    let qemu = lab.path("only root's");
    std::fs::create_dir(&qemu).expect("made");
    std::fs::set_permissions(&qemu, Permissions::from_mode(0o700)).expect("it is ours");
    let qemu = qemu.join("qemu-system-x86_64");
    std::fs::write(&qemu, "#!/bin/sh\nexec qemu-system-x86_64 \"$@\"\n").expect("written");
    std::fs::set_permissions(&qemu, Permissions::from_mode(0o755)).expect("it is ours");
    let lab = lab.on_qemu(qemu.clone());
    let (ok, why) = doctor(&lab.json(&["doctor"]));
    assert!(!ok && why.contains(&*qemu.to_string_lossy()) && why.contains("Permission denied"), "{why}");
    lab.ok(&["vm", "start", BASE]);
    assert_not_separate(&lab);
    lab.witness(BASE).resync();
    let log = std::fs::read_to_string(lab.machine_folder().join("log/worker.log")).expect("a log");
    assert!(log.contains("runs as root") && log.contains("Permission denied"), "{log}");
}

/// Who may track memory by a privilege may also look into every process: by system calls, which are refused, and by files, which others own.
#[test]
fn the_privilege_to_track_memory_opens_no_other_process() {
    if !as_root() {
        return;
    }
    let lab = Lab::empty();
    let user = ["launch", "--user", "2013265920"];
    let own = ["--", "/bin/sh", "-c", "strace -o /dev/null /bin/true"];
    let others = ["--", "/bin/sh", "-c", "cat /proc/1/environ || cat /proc/1/mem"];
    // Without the privilege it may look into its own, which shows that the program is there and what refuses it.
    lab.ok(&[&user[..], &own].concat());
    for words in [own, others] {
        let output = lab.tenby(&[&user[..], &["--tracks"], &words].concat());
        assert_ne!(output.code, 0, "{}", output.command);
        let refused = ["Operation not permitted", "Permission denied"].iter().any(|why| output.stderr.contains(why));
        assert!(refused && output.stdout.is_empty(), "{}: {}{}", output.command, output.stdout, output.stderr);
    }
}
