//! The test guest in a plain QEMU: what it does when nobody takes snapshots of it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::{Witness, guest, wait_for};

/// Bytes of each of its two disks.
const DISK: u64 = 16 << 20;

/// A running QEMU without Tenby. It is killed when this is dropped.
pub struct Bare {
    qemu: Child,
    folder: tempfile::TempDir,
}

impl Bare {
    /// Boots the guest with two empty disks.
    ///
    /// # Panics
    /// If QEMU cannot be started.
    pub fn boot(qemu: &Path) -> Self {
        let folder = tempfile::Builder::new().prefix("tenby-e2e-").tempdir().expect("there is room for a folder");
        for disk in ["vda", "vdb"] {
            File::create(folder.path().join(disk))
                .and_then(|file| file.set_len(DISK))
                .expect("there is room for a disk");
        }
        let child = start(qemu, folder.path());
        Self { qemu: child, folder }
    }

    /// Cuts the power and boots again from the same disks.
    ///
    /// # Panics
    /// If QEMU cannot be started.
    pub fn cut_power(&mut self, qemu: &Path) {
        self.kill();
        for socket in ["serial", "qmp"] {
            let _ = std::fs::remove_file(self.folder.path().join(socket));
        }
        self.qemu = start(qemu, self.folder.path());
    }

    /// Connects to the serial port.
    pub fn witness(&self) -> Witness {
        let stream = self.connect("serial");
        Witness::new(stream.try_clone().expect("a socket can be shared"), stream, None)
    }

    /// Presses the power button and waits for the end.
    ///
    /// # Panics
    /// If the guest does not heed it.
    pub fn press_power_button(&mut self) {
        let mut monitor = self.connect("qmp");
        let mut greeting = String::new();
        BufReader::new(&monitor).read_line(&mut greeting).expect("QEMU greets");
        monitor.write_all(br#"{"execute":"qmp_capabilities"}{"execute":"system_powerdown"}"#).expect("QEMU listens");
        let status = wait_for("the guest to power off", || self.qemu.try_wait().expect("QEMU is our child"));
        assert!(status.success(), "QEMU ended with {status}");
    }

    fn connect(&self, name: &str) -> UnixStream {
        let path = self.folder.path().join(name);
        wait_for("QEMU to listen", || UnixStream::connect(&path).ok())
    }

    fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.kill();
    }
}

fn start(qemu: &Path, folder: &Path) -> Child {
    let guest = guest();
    let mut command = Command::new(qemu);
    command.args(["-machine", "q35,accel=tcg", "-m", "128", "-nodefaults", "-no-user-config", "-no-reboot"]);
    command
        .args(["-display", "none", "-append", &guest.append])
        .arg("-kernel")
        .arg(guest.kernel)
        .arg("-initrd")
        .arg(guest.initrd);
    // The boot waits for us: nothing that is said is missed.
    command.args(["-serial", "unix:serial,server=on,wait=on", "-qmp", "unix:qmp,server=on,wait=off"]);
    for disk in ["vda", "vdb"] {
        command.args(["-drive", &format!("file={disk},format=raw,if=virtio")]);
    }
    command.current_dir(folder).stdin(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("QEMU can be started")
}
