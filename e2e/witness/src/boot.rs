//! What PID 1 owes to the guest: file systems, drivers, the network, and an end when the power button is pressed.

use std::ffi::CStr;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::system::RebootCommand;

use crate::verbs::Witness;

/// The drivers, in the order in which they depend on each other; `cargo xtask guest` writes it.
const MODULES: &str = "/modules/order";

/// Mounts what the kernel offers. A guest that cannot is of no use; the panic is read on the console.
pub(crate) fn mount() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        rustix::mount::mount(kind, target, kind, MountFlags::empty(), None::<&CStr>)
            .expect("the kernel offers this file system");
    }
}

/// Loads the drivers. One that is missing shows by its device, and one may have nothing to drive here.
pub(crate) fn load_modules() {
    let Ok(order) = std::fs::read_to_string(MODULES) else { return };
    for name in order.lines() {
        let Ok(file) = File::open(Path::new("/modules").join(name)) else { continue };
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::NODEV) => {}
            Err(error) => eprintln!("{name}: {error}"),
        }
    }
}

/// Mounts the variables of the firmware, if that is a UEFI. Needs the drivers.
pub(crate) fn mount_firmware() {
    let place = "/sys/firmware/efi/efivars";
    if !Path::new(place).exists() {
        return;
    }
    if let Err(error) = rustix::mount::mount("efivarfs", place, "efivarfs", MountFlags::empty(), None::<&CStr>) {
        eprintln!("{place}: {error}");
    }
}

/// Takes the address that QEMU's user network gives to its first guest, without asking for it: the answer is known.
pub(crate) fn bring_up_network() {
    let run = |line: &str| Command::new("/bin/sh").args(["-c", line]).status();
    if Path::new("/sys/class/net/eth0").exists() {
        // Not waited for: nothing else in the guest needs it.
        std::thread::spawn(move || {
            run(
                "ip link set lo up; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2",
            )
        });
    }
}

/// Powers the guest off in order when somebody presses its power button.
pub(crate) fn watch_power_button(witness: Arc<Witness>) {
    let Some(mut events) = power_button() else { return };
    std::thread::spawn(move || {
        // struct input_event: time (16 bytes), type, code (u16 each), value (i32).
        let mut event = [0; 24];
        while events.read_exact(&mut event).is_ok() {
            let (kind, code, value) =
                (u16::from_le_bytes([event[16], event[17]]), u16::from_le_bytes([event[18], event[19]]), event[20]);
            if (kind, code, value) == (EV_KEY, KEY_POWER, 1) {
                end(&witness, RebootCommand::PowerOff);
            }
        }
    });
}

const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

fn power_button() -> Option<File> {
    let inputs = std::fs::read_dir("/sys/class/input").ok()?;
    let button = inputs.filter_map(Result::ok).find(|input| {
        let name = std::fs::read_to_string(input.path().join("device/name")).unwrap_or_default();
        input.file_name().to_string_lossy().starts_with("event") && name.trim() == "Power Button"
    })?;
    File::open(Path::new("/dev/input").join(button.file_name())).ok()
}

/// Ends the guest between two steps of the journal.
pub(crate) fn end(witness: &Witness, how: RebootCommand) {
    let _between_steps = witness.hold_journal();
    rustix::fs::sync();
    // The kernel breaks its virtio devices as it ends, and one that has a packet to send just then waits for its card for ever (seen with 6.1:
    // `start_xmit` asks a broken queue again and again). After a restore there often is one: the announcement of its address.
    let _ = Command::new("/bin/sh").args(["-c", "ip link set eth0 down"]).status();
    let error = rustix::system::reboot(how);
    eprintln!("cannot end the guest: {error:?}");
}
