//! Where the things lie that a test needs.

use std::path::{Path, PathBuf};

/// The test guest's files.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its first file system, with the witness as init.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub append: String,
}

/// The test guest that `cargo xtask guest` built.
///
/// # Panics
/// If there is none.
pub fn guest() -> Guest {
    let folder = named("TENBY_GUEST", "guest", "cargo xtask guest");
    let append = std::fs::read_to_string(folder.join("append")).expect("the guest has a command line");
    Guest { kernel: folder.join("kernel"), initrd: folder.join("initrd"), append }
}

/// QEMU 7.2: Debian 12's own.
pub fn qemu_72() -> PathBuf {
    named("TENBY_QEMU_72", "qemu/7.2/qemu-system-x86_64", "cargo xtask qemu")
}

/// QEMU 10.0: that of Debian 12's backports.
pub fn qemu_10() -> PathBuf {
    named("TENBY_QEMU_10", "qemu/10.0/qemu-system-x86_64", "cargo xtask qemu")
}

/// The program under test.
pub(crate) fn tenby() -> PathBuf {
    named("TENBY_BIN", "debug/tenby", "cargo build -p tenby")
}

/// The folder of everything that is made.
pub(crate) fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("e2e lies in the repository").join("target")
}

fn named(variable: &str, below_target: &str, made_by: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or_else(|| target().join(below_target), PathBuf::from);
    assert!(path.exists(), "{} is not there: run `{made_by}`, or set {variable}", path.display());
    path
}
