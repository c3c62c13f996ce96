//! A disk that is soon full.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system in memory with a limit. (Only root can make one.)
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of this size (`256m`) in a new folder.
    ///
    /// # Panics
    /// If that cannot be done.
    pub fn mount(at: &Path, size: &str) -> Self {
        fs::create_dir(at).expect("it is ours");
        let mut mount = Command::new("mount");
        let status = mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(at).status();
        assert!(status.expect("mount is there").success());
        Self(at.to_owned())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Leaves no room at all.
    ///
    /// # Panics
    /// If it is not mounted.
    pub fn fill_up(&self) {
        let mut ballast = fs::File::create(self.ballast()).expect("it is mounted");
        for size in [1 << 20, 4096, 1] {
            while ballast.write_all(&vec![7; size]).is_ok() {}
        }
    }

    /// Leaves so much room, bytes.
    ///
    /// # Panics
    /// If it is not mounted.
    pub fn fill_up_to(&self, room: u64) {
        let mut ballast = fs::File::create(self.ballast()).expect("it is mounted");
        // Never more than that: a guest may be writing.
        while self.room() > room {
            let size = (self.room() - room).min(1 << 20);
            ballast.write_all(&vec![7; size as usize]).expect("there is room");
        }
    }

    fn room(&self) -> u64 {
        let about = rustix::fs::statvfs(&self.0).expect("it is mounted");
        about.f_bavail * about.f_frsize
    }

    /// Takes away what filled it up.
    ///
    /// # Panics
    /// If nothing did.
    pub fn make_room(&self) {
        fs::remove_file(self.ballast()).expect("it is ours");
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What lies on it is gone in a moment.
            crate::lab::tell(&self.0);
        }
        // Even while something still looks at it.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
