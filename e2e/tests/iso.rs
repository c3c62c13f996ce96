//! A CD-ROM that nobody here made: Debian's GRUB rescue image.

use e2e::{Lab, Screen, wait_for};
use std::path::Path;

const GRUB: &str = "/usr/lib/grub-rescue/grub-rescue-cdrom.iso";

#[test]
fn a_foreign_cd_boots_and_is_typed_at() {
    let lab = Lab::empty();
    lab.ok(&[
        "vm", "create", "rescue", "--memory", "64M", "--accel", "tcg", "--disk", "new:1G", "--cdrom", GRUB, "--boot",
        "cdrom",
    ]);
    lab.ok(&["vm", "start", "rescue"]);
    let socket = lab.json(&["vm", "show", "rescue"])["sockets"]["vnc"]
        .as_str()
        .expect("a running machine has a screen")
        .to_owned();
    let mut screen = Screen::connect(Path::new(&socket));
    wait_for("GRUB's menu", || screen.reads("GNU GRUB  version 2.").then_some(()));
    screen.press('c');
    wait_for("GRUB's command line", || screen.reads("grub>").then_some(()));
    // One key at a time: a keyboard's buffer holds few.
    let typed = "grub> echo tenby was here";
    for (at, key) in typed.char_indices().skip("grub> ".len()) {
        screen.press(key);
        wait_for("what was typed", || screen.reads(typed[..=at].trim_end()).then_some(()));
    }

    let picture = lab.path("screen.png");
    lab.ok(&["vm", "screenshot", "rescue", &picture.to_string_lossy()]);
    assert!(std::fs::read(picture).expect("a picture").starts_with(b"\x89PNG\r\n\x1a\n"));
    lab.ok(&["snapshot", "create", "rescue", "at the prompt"]);
    lab.ok(&["vm", "stop", "rescue", "--turn-off"]);
    lab.ok(&["snapshot", "apply", "rescue", "at the prompt", "--discard", "--start"]);
    let socket = lab.json(&["vm", "show", "rescue"])["sockets"]["vnc"].as_str().expect("a screen").to_owned();
    let mut screen = Screen::connect(Path::new(&socket));
    wait_for("what was typed before", || screen.reads(typed).then_some(()));
}
