//! The Debian packages that building, demo and tests need: installs what is missing, and says what and why.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::debian::Apt;
use crate::{call, output_of, step};

/// Something that has to be here.
struct Need {
    /// A program of the search path, or the path of a file. Whoever provides it is welcome, whatever the version.
    sign: &'static str,
    /// The package that brings it.
    package: &'static str,
    why: &'static str,
}

const NEEDS: &[Need] = &[
    Need { sign: "cc", package: "gcc", why: "links Rust programs" },
    Need { sign: "/usr/include/stdlib.h", package: "libc6-dev", why: "links Rust programs" },
    Need { sign: "qemu-system-x86_64", package: "qemu-system-x86", why: "runs the machines" },
    Need { sign: OVMF, package: "ovmf", why: "UEFI for machines that want it" },
    Need { sign: "xz", package: "xz-utils", why: "unpacks kernel modules and disk images" },
    Need { sign: "qemu-img", package: "qemu-utils", why: "tests: another reader and writer of disk images" },
    Need { sign: "7z", package: "p7zip-full", why: "tests: another reader of disk images" },
    Need { sign: "nbdcopy", package: "libnbd-bin", why: "tests: another NBD client" },
    Need { sign: "fio", package: "fio", why: "tests and benches: disk load" },
    Need { sign: "strace", package: "strace", why: "tests: what is opened, and what is not" },
    Need { sign: GRUB_CDROM, package: "grub-rescue-pc", why: "tests: a CD-ROM that nobody here made" },
];

/// What the package ovmf brings, of two files.
const OVMF: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// The image that the package grub-rescue-pc brings.
const GRUB_CDROM: &str = "/usr/lib/grub-rescue/grub-rescue-cdrom.iso";

/// What only benches need.
const BENCH_NEEDS: &[Need] =
    &[Need { sign: "nbdkit", package: "nbdkit", why: "benches: an NBD server that is as fast as the protocol" }];

/// Installs what is missing; does nothing where nothing is.
pub(crate) fn run() -> Result<()> {
    provide(NEEDS)
}

/// The same of what only benches need.
pub(crate) fn for_benches() -> Result<()> {
    provide(BENCH_NEEDS)
}

fn provide(needs: &[Need]) -> Result<()> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !is_here(need.sign)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    step("installing Debian packages");
    for need in &missing {
        eprintln!("   {:16} {}", need.package, need.why);
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    install(&packages)?;
    match missing.iter().find(|need| !is_here(need.sign)) {
        Some(need) => bail!("{} is installed, yet there is no {}", need.package, need.sign),
        None => Ok(()),
    }
}

/// Installs `packages` unattended, and without what is merely recommended: no desktop comes along with QEMU.
fn install(packages: &[&str]) -> Result<()> {
    let apt = Apt::open()?;
    let words = ["-y", "--no-install-recommends", "--no-remove", "install"];
    // Where qemu-utils came from backports, Debian's own qemu-system-x86 would put it out; the one from backports fits it.
    let fits = output_of(apt.command("apt-get").arg("-s").args(words).args(packages)).is_ok();
    let suite: &[&str] = if fits { &[] } else { &["-t", &apt.backports] };
    call(as_root(&apt.command("apt-get"))?.arg("-qq").args(suite).args(words).args(packages))
}

/// The same command, by way of sudo if we are not root.
fn as_root(command: &Command) -> Result<Command> {
    let root = output_of(Command::new("id").arg("-u"))?.trim() == "0";
    let mut elevated = Command::new(if root { "env" } else { "sudo" });
    if !root {
        if !is_here("sudo") {
            bail!("installing packages needs root, and there is no sudo");
        }
        elevated.arg("env");
    }
    // sudo drops the environment, so that is said on the command line.
    for (name, value) in command.get_envs() {
        elevated.arg(format!("{}={}", name.display(), value.unwrap_or_default().display()));
    }
    elevated.arg(command.get_program()).args(command.get_args());
    Ok(elevated)
}

/// Whether a program or a file is there.
pub(crate) fn is_here(sign: &str) -> bool {
    if sign.starts_with('/') {
        return Path::new(sign).exists();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(sign).exists())
}

#[cfg(test)]
mod tests {
    use super::{BENCH_NEEDS, NEEDS, as_root, is_here};
    use std::process::Command;

    #[test]
    fn what_is_here_is_known() {
        assert!(is_here("sh") && is_here("/bin/sh") && !is_here("no-such-program") && !is_here("/no/such/file"));
    }

    #[test]
    fn root_gets_the_same_words_and_environment() {
        let Ok(elevated) = as_root(Command::new("apt-get").arg("update").env("LC_ALL", "C")) else { return };
        let words: Vec<_> = elevated.get_args().collect();
        assert!(words.ends_with(&["LC_ALL=C".as_ref(), "apt-get".as_ref(), "update".as_ref()]), "{words:?}");
    }

    #[test]
    fn every_need_has_a_reason() {
        assert!(NEEDS.iter().chain(BENCH_NEEDS).all(|need| !need.why.is_empty() && !need.package.contains('/')));
    }
}
