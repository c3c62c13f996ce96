//! The console and the questions at a terminal, with a guest of 512 bytes that echoes what is typed on its serial port.

mod place;

use place::{Place, eventually};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex};

/// A boot sector: prints `!`, then echoes what comes on the first serial port. It sleeps between two ticks of the clock, for a guest
/// that polls without a rest leaves QEMU no time to take what is typed.
fn echoing_boot_sector() -> Vec<u8> {
    let mut sector = vec![
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'!', // mov al, '!'
        0xee, // out dx, al
        0xfb, // again: sti
        0xf4, // hlt
        0xba, 0xfd, 0x03, // mov dx, 0x3fd
        0xec, // in al, dx
        0xa8, 0x01, // test al, 1
        0x74, 0xf6, // jz again
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xec, // in al, dx
        0xee, // out dx, al
        0xeb, 0xef, // jmp again
    ];
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    sector
}

/// A machine that echoes, running.
fn echoing() -> Place {
    let place = Place::new();
    std::fs::write(place.path("boot.raw"), echoing_boot_sector()).unwrap();
    let words =
        ["vm", "create", "echo", "--memory", "32M", "--disk", "boot.raw,format=raw", "--accel", "tcg", "--net", "none"];
    place.tenby(&words).well();
    place.tenby(&["vm", "start", "echo"]).well();
    place
}

/// Turns the machine off at the end of a test, however that ends.
struct Off<'a>(&'a Place);

impl Drop for Off<'_> {
    fn drop(&mut self) {
        self.0.tenby(&["vm", "stop", "echo", "--turn-off"]);
    }
}

/// What a command prints, as it comes.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<u8>>>);

impl Heard {
    fn from(mut source: impl Read + Send + 'static) -> Self {
        let heard = Self::default();
        let ours = heard.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = source.read(&mut bytes) {
                ours.0.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        });
        heard
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    #[track_caller]
    fn hears(&self, words: &str) {
        eventually(&format!("{words:?} in {:?}", self.text()), || self.text().contains(words));
    }
}

/// A console with pipes at both ends.
fn piped(place: &Place) -> (Child, ChildStdin, Heard, Heard) {
    let mut command = place.command(&["vm", "console", "echo"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let out = Heard::from(child.stdout.take().unwrap());
    let err = Heard::from(child.stderr.take().unwrap());
    let stdin = child.stdin.take().unwrap();
    (child, stdin, out, err)
}

/// A command on a terminal: the terminal's other end, and the command.
fn on_terminal(place: &Place, words: &[&str]) -> (Child, File, Heard) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
    let theirs = || -> OwnedFd { rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap() };
    let child = place.command(words).stdin(theirs()).stdout(theirs()).stderr(theirs()).spawn().unwrap();
    let ours = File::from(ours);
    let heard = Heard::from(ours.try_clone().unwrap());
    (child, ours, heard)
}

#[test]
fn the_console_works_with_pipes_and_over_a_workers_death() {
    let place = echoing();
    let _off = Off(&place);
    let (mut child, mut stdin, out, err) = piped(&place);
    out.hears("!");
    stdin.write_all(b"first;").unwrap();
    out.hears("!first;");

    let worker = place.machine("echo")["worker"].as_i64().unwrap();
    kill_process(Pid::from_raw(i32::try_from(worker).unwrap()).unwrap(), Signal::KILL).unwrap();
    stdin.write_all(b"second;").unwrap();
    eventually("the second word, delivered or reported", || {
        out.text().contains("second;") || err.text().contains("second;")
    });
    stdin.write_all(b"third;").unwrap();
    out.hears("third;");
    drop(stdin);
    assert!(child.wait().unwrap().success());
    assert_eq!(out.text().matches("first;").count(), 1, "what was shown is not shown again: {:?}", out.text());

    // Recorded with nobody attached, too; and the end of input detaches.
    let again = place.tenby(&["vm", "console", "echo"]).well();
    assert!(again.out.contains("!first;") && again.out.ends_with("third;"), "{:?}", again.out);
}

/// Whether every thread of a process is stopped: on a busy machine some run on for a while after the signal was sent.
fn stands(process: Pid) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).unwrap();
    tasks.flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T'))
    })
}

#[test]
fn ctrl_c_asks_the_job_to_cancel_and_a_second_one_leaves_it() {
    let place = echoing();
    let _off = Off(&place);
    // The guest knows nothing of a power button: this waits.
    let stopping = || {
        let mut command = place.command(&["vm", "stop", "echo", "--timeout", "10m"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let err = Heard::from(child.stderr.take().unwrap());
        eventually("stopping", || place.machine("echo")["state"] == "stopping");
        (child, err)
    };
    let interrupt = |child: &Child| kill_process(Pid::from_child(child), Signal::INT).unwrap();
    let (mut child, err) = stopping();
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    err.hears("error: ");
    assert_eq!(place.machine("echo")["state"], "running", "cancelled: nothing has changed");

    // A worker that is stopped does not answer: only the second Ctrl-C helps.
    let (mut child, err) = stopping();
    let worker = Pid::from_raw(i32::try_from(place.machine("echo")["worker"].as_i64().unwrap()).unwrap()).unwrap();
    kill_process(worker, Signal::STOP).unwrap();
    eventually("a stop of all of its threads", || stands(worker));
    interrupt(&child);
    err.hears("cancelling");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    err.hears("hint: tenby job watch ");
    kill_process(worker, Signal::CONT).unwrap();
    let told = err.text();
    let id = told.split("tenby job watch ").nth(1).unwrap().split_whitespace().next().unwrap();
    // The first Ctrl-C may have got through after all.
    place.tenby(&["job", "cancel", id]);
    place.tenby(&["job", "watch", id]).with(130);
}

#[test]
fn a_console_ends_when_its_machine_is_turned_off() {
    let place = echoing();
    let _off = Off(&place);
    let (mut child, _stdin, out, err) = piped(&place);
    out.hears("!");
    place.tenby(&["vm", "stop", "echo", "--turn-off"]).well();
    assert!(child.wait().unwrap().success());
    err.hears("echo is off");
}

#[test]
fn a_key_leaves_the_console_and_the_terminal_is_as_it_was() {
    use rustix::termios::{LocalModes, tcgetattr};
    let place = echoing();
    let _off = Off(&place);
    let (mut child, mut terminal, heard) = on_terminal(&place, &["vm", "console", "echo"]);
    let cooked = |terminal: &File| tcgetattr(terminal).unwrap().local_modes.contains(LocalModes::ICANON);
    heard.hears("Ctrl-] leaves");
    assert!(!cooked(&terminal));
    terminal.write_all(b"ab\x03c").unwrap();
    heard.hears("ab\x03c");
    terminal.write_all(b"\x1d").unwrap();
    assert!(child.wait().unwrap().success());
    assert!(cooked(&terminal));
}

#[test]
fn apply_asks_at_a_terminal_what_becomes_of_the_present() {
    let place = Place::with_machine("web");
    place.tenby(&["snapshot", "create", "web", "Monday"]).well();
    place.tenby(&["vm", "set", "web", "--cpus", "2"]).well();
    let answer = |answer: &str| {
        let (mut child, mut terminal, heard) = on_terminal(&place, &["snapshot", "apply", "web", "Monday"]);
        heard.hears("[k/d/C]");
        terminal.write_all(answer.as_bytes()).unwrap();
        child.wait().unwrap().code()
    };
    assert_eq!(answer("\n"), Some(130));
    assert_eq!(place.machine("web")["cpus"], 2, "cancelled: nothing has changed");
    assert_eq!(answer("keep\n"), Some(0));
    assert_eq!(place.machine("web")["cpus"], 1);
    assert_eq!(place.names("web").len(), 2);
    place.tenby(&["vm", "set", "web", "--cpus", "3"]).well();
    assert_eq!(answer("d\n"), Some(0));
    assert_eq!(place.names("web").len(), 2);
}

#[test]
fn delete_asks_at_a_terminal() {
    let place = Place::with_machine("web");
    let answer = |answer: &str| {
        let (mut child, mut terminal, heard) = on_terminal(&place, &["vm", "delete", "web"]);
        heard.hears("[y/N]");
        terminal.write_all(answer.as_bytes()).unwrap();
        child.wait().unwrap().code()
    };
    assert_eq!(answer("\n"), Some(130));
    place.tenby(&["vm", "show", "web"]).well();
    assert_eq!(answer("y\n"), Some(0));
    place.tenby(&["vm", "show", "web"]).with(4);
}
