//! The two versions of QEMU that Tenby is tested with: Debian 12's own, and the one of its backports.
//!
//! Whichever of them is installed is used as it is. The other is unpacked beside the system, with what it needs, and started by a
//! script that shows it its libraries and firmware:
//!
//! ```text
//!   target/qemu/7.2/qemu-system-x86_64      target/qemu/7.2/root/usr/…
//!   target/qemu/10.0/qemu-system-x86_64     target/qemu/10.0/root/usr/…
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::debian::{self, Apt};
use crate::{output_of, step, target};

const PROGRAM: &str = "qemu-system-x86_64";
/// Where Debian's packages put what QEMU loads besides its libraries.
const FIRMWARE: [&str; 3] = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// The variables by which tests find the two, and the programs.
pub(crate) fn provide() -> Result<[(&'static str, PathBuf); 2]> {
    Ok([
        ("TENBY_QEMU_72", provide_one("7.2", Suite::Stock)?),
        ("TENBY_QEMU_10", provide_one("10.0", Suite::Backports)?),
    ])
}

/// Where a version comes from.
#[derive(Clone, Copy)]
enum Suite {
    Stock,
    Backports,
}

/// Makes target/qemu/VERSION/qemu-system-x86_64 start a QEMU of that version.
fn provide_one(version: &str, suite: Suite) -> Result<PathBuf> {
    let folder = target().join("qemu").join(version);
    let program = folder.join(PROGRAM);
    // Asked each time: the installed one may have been replaced by another version since.
    if is_version(&program, version) {
        return Ok(program);
    }
    debian::remove(&folder)?;
    fs::create_dir_all(&folder)?;
    if is_version(Path::new(PROGRAM), version) {
        write_script(&program, &format!("exec {PROGRAM} \"$@\""))?;
        return Ok(program);
    }
    step(&format!("unpacking QEMU {version} beside the installed one"));
    let apt = Apt::open()?;
    let suite = match suite {
        Suite::Stock => debian::codename()?,
        Suite::Backports => apt.backports.clone(),
    };
    let root = folder.join("root");
    let packages = apt.closure("qemu-system-x86", &suite, "qemu")?;
    apt.unpack(&packages, &root).with_context(|| format!("QEMU {version}"))?;
    write_script(&program, &start_in(&root))?;
    if !is_version(&program, version) {
        bail!("{suite} has no QEMU {version} that runs here");
    }
    Ok(program)
}

/// The command that starts the QEMU unpacked in `root`. What is installed serves where nothing was unpacked.
fn start_in(root: &Path) -> String {
    let libraries = LIBRARIES.map(|folder| root.join(folder).display().to_string()).join(":");
    let places = FIRMWARE
        .iter()
        .map(|folder| root.join(folder))
        .chain(FIRMWARE.iter().map(|folder| Path::new("/").join(folder)));
    let firmware: Vec<String> =
        places.filter(|place| place.exists()).map(|place| format!("-L '{}'", place.display())).collect();
    let modules = root.join(LIBRARIES[0]).join("qemu");
    format!(
        "export LD_LIBRARY_PATH='{libraries}' QEMU_MODULE_DIR='{}'\nexec '{}' {} \"$@\"",
        modules.display(),
        root.join("usr/bin").join(PROGRAM).display(),
        firmware.join(" ")
    )
}

fn write_script(path: &Path, body: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{body}\n"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn is_version(program: &Path, version: &str) -> bool {
    let said = output_of(Command::new(program).arg("--version"));
    said.is_ok_and(|said| said.starts_with(&format!("QEMU emulator version {version}.")))
}
