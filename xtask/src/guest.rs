//! The test guest: Debian's cloud kernel, busybox, a few drivers, and the witness as its first process.
//!
//! ```text
//!   target/guest/kernel      as packaged          target/guest/append    the kernel's command line
//!   target/guest/initrd      init = the witness, /bin = busybox, /modules in the order of their dependencies
//! ```
//! Nothing is installed: packages are only unpacked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::debian::{self, Apt};
use crate::{call, cargo, output_of, root, step, target};

/// Quiet, without what an emulated processor does slowly, and dead at once when it panics.
const APPEND: &str =
    "console=ttyS0 quiet loglevel=0 tsc=reliable no_timer_check random.trust_cpu=on mitigations=off panic=-1";

/// What the guest drives, in the order wanted; what each needs comes before it. One that this kernel has built in is not there as a
/// file, and not needed.
const DRIVERS: [&str; 10] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "button",
    "evdev",
    "virtio_rng",
    "virtio_console",
    "pvpanic_mmio",
    "pvpanic_pci",
    "efivarfs",
];

/// Builds whatever is not up to date, and says where it lies.
pub(crate) fn build() -> Result<PathBuf> {
    let guest = target().join("guest");
    step("building the test guest");
    let witness = build_witness()?;
    let unpacked = unpack_packages(&guest)?;
    let kernel = debian::find(&unpacked.join("boot"), &|name| name.starts_with("vmlinuz"))?
        .context("the package holds no kernel")?;
    replace(&guest.join("kernel"), &fs::read(kernel)?)?;
    replace(&guest.join("initrd"), &initrd(&unpacked, &witness)?)?;
    replace(&guest.join("append"), APPEND.as_bytes())?;
    Ok(guest)
}

/// The witness, linked statically: there is no library in the guest.
fn build_witness() -> Result<PathBuf> {
    let folder = target().join("witness");
    // With an explicit target the flags are not applied to what runs on the host (build scripts, macros).
    let host = host_triple()?;
    let manifest = root().join("e2e/witness/Cargo.toml");
    let mut build = cargo();
    build.args(["build", "--quiet", "--release", "--locked", "--target", &host, "--manifest-path"]).arg(manifest);
    call(build.env("CARGO_TARGET_DIR", &folder).env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    Ok(folder.join(host).join("release/witness"))
}

fn host_triple() -> Result<String> {
    let version = output_of(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not say for which host it builds")?.to_owned())
}

/// The kernel that the metapackage stands for today, and busybox. What was unpacked once is kept: a build needs no network again.
fn unpack_packages(guest: &Path) -> Result<PathBuf> {
    let unpacked = guest.join("debian");
    if !unpacked.exists() {
        fs::create_dir_all(guest)?;
        let apt = Apt::open()?;
        let kernel = apt.dependency("linux-image-cloud-amd64", "linux-image-")?;
        apt.unpack(&[kernel, "busybox-static".to_owned()], &unpacked)?;
    }
    Ok(unpacked)
}

fn initrd(unpacked: &Path, witness: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "modules", "proc", "sys", "tmp"] {
        archive.folder(folder);
    }
    // The kernel gives its first process this console before that can mount anything.
    archive.char_device("dev/console", (5, 1));
    archive.program("init", &fs::read(witness)?);
    add_busybox(&mut archive, unpacked)?;
    add_modules(&mut archive, unpacked)?;
    Ok(archive.finish())
}

fn add_busybox(archive: &mut Archive, unpacked: &Path) -> Result<()> {
    let places = ["bin/busybox", "usr/bin/busybox"].map(|place| unpacked.join(place));
    let busybox = places.iter().find(|place| place.exists()).context("the package holds no busybox")?;
    archive.program("bin/busybox", &fs::read(busybox)?);
    for applet in output_of(Command::new(busybox).arg("--list"))?.lines().filter(|&applet| applet != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    Ok(())
}

fn add_modules(archive: &mut Archive, unpacked: &Path) -> Result<()> {
    let mut order = Vec::new();
    for driver in DRIVERS {
        add_module(archive, unpacked, driver, &mut order)?;
    }
    archive.program("modules/order", order.join("\n").as_bytes());
    Ok(())
}

fn add_module(archive: &mut Archive, unpacked: &Path, name: &str, order: &mut Vec<String>) -> Result<()> {
    // File names take - or _, and the suffix of a compression.
    let is_it = |file: &str| file.split_once(".ko").is_some_and(|(stem, _)| stem.replace('-', "_") == name);
    if order.iter().any(|done| is_it(done)) {
        return Ok(());
    }
    let Some(path) = debian::find(unpacked, &is_it)? else { return Ok(()) };
    let content = module(&path)?;
    for needed in dependencies(&content) {
        add_module(archive, unpacked, &needed, order)?;
    }
    let file = format!("{name}.ko");
    archive.program(&format!("modules/{file}"), &content);
    order.push(file);
    Ok(())
}

fn module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").arg("-dc").arg(path).output().context("cannot run xz")?;
        if !output.status.success() {
            bail!("xz cannot unpack {}", path.display());
        }
        return Ok(output.stdout);
    }
    Ok(fs::read(path)?)
}

/// The modules that `module` names as its own needs, in its `depends=` record.
fn dependencies(module: &[u8]) -> Vec<String> {
    let record = module.split(|&byte| byte == 0).find_map(|text| text.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(record.unwrap_or_default()).into_owned();
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// Puts `content` at `path` in one step, and only if it differs: a machine that boots from it never sees half a file.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|have| have == content) {
        return Ok(());
    }
    let new = path.with_extension("new");
    fs::write(&new, content)?;
    fs::rename(&new, path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::dependencies;

    #[test]
    fn a_module_names_what_it_needs() {
        assert_eq!(
            dependencies(b"\x7fELF\0license=GPL\0depends=virtio_ring,virtio-pci\0x"),
            ["virtio_ring", "virtio_pci"]
        );
        assert!(dependencies(b"depends=\0").is_empty() && dependencies(b"").is_empty());
    }
}
