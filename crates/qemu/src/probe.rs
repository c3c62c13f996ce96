//! What this host and its QEMU can do.

mod noted;

use crate::error::{Error, Result};
use crate::launch::Accel;
use rustix::fs::{Access, Mode, OFlags, access, open};
use std::cmp::Reverse;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tokio::process::Command;

/// The variable that does without what only a privileged user can do: for tests.
const NO_USERFAULTFD: &str = "TENBY_NO_USERFAULTFD";

/// The variable that names the QEMU to use.
pub const BINARY_VARIABLE: &str = "TENBY_QEMU";

const BINARY: &str = "qemu-system-x86_64";
const MACHINE_FAMILY: &str = "pc-q35-";

/// An installed QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The program.
    pub binary: PathBuf,
    /// Its version: `10.0.2`.
    pub version: String,
    /// The pinned machine types (`pc-q35-…`) that it has, newest first.
    pub machine_types: Vec<String>,
}

/// A file as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Stamped {
    inode: (u64, u64),
    len: i64,
    modified: (i64, i64),
}

impl Stamped {
    fn of(path: &Path) -> Option<Self> {
        let stat = rustix::fs::stat(path).ok()?;
        let modified = (stat.st_mtime, stat.st_mtime_nsec as i64);
        Some(Self { inode: (stat.st_dev, stat.st_ino), len: stat.st_size, modified })
    }
}

impl Installed {
    /// Finds the QEMU of this host: [`BINARY_VARIABLE`], else `qemu-system-x86_64` on the search path.
    ///
    /// # Errors
    /// [`Error::NoQemu`] if there is none or if it does not answer as a QEMU does.
    pub async fn find() -> Result<Self> {
        Self::probe(&find_binary()?).await
    }

    /// [`Installed::find`], but what it has said before is not asked again, nor by other processes that note it in the same file `note`: in a
    /// folder that is there, and that is the user's alone. It is asked again when its file is another, as after an upgrade.
    ///
    /// # Errors
    /// As [`Installed::find`].
    pub async fn find_noted(note: &Path) -> Result<Self> {
        static ASKED: Mutex<Option<(Stamped, Installed)>> = Mutex::new(None);
        let binary = find_binary()?;
        let Some(stamp) = Stamped::of(&binary) else { return Self::probe(&binary).await };
        let asked = || ASKED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = asked().as_ref().filter(|(then, known)| *then == stamp && known.binary == binary) {
            return Ok(known.clone());
        }
        let found = match noted::read(note, &binary, stamp) {
            Some(noted) => noted,
            None => Self::probe(&binary).await.inspect(|found| noted::write(note, found, stamp))?,
        };
        *asked() = Some((stamp, found.clone()));
        Ok(found)
    }

    /// Asks `binary` what it has. Takes some 40 ms, of two processes.
    ///
    /// # Errors
    /// [`Error::NoQemu`] if it does not answer as a QEMU does.
    pub async fn probe(binary: &Path) -> Result<Self> {
        let (version, machines) = tokio::try_join!(ask(binary, &["-version"]), ask(binary, &["-machine", "help"]))?;
        let not_one = || Error::NoQemu(format!("{} does not answer as QEMU does", binary.display()));
        let version = parse_version(&version).ok_or_else(not_one)?;
        Ok(Self { binary: binary.into(), version, machine_types: parse_machines(&machines) })
    }

    /// The machine type for a new machine: the newest.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if this QEMU has no `pc-q35` machine.
    pub fn newest_machine_type(&self) -> Result<&str> {
        let newest = self.machine_types.first().map(String::as_str);
        newest.ok_or_else(|| Error::Unsupported(format!("QEMU {} has no {MACHINE_FAMILY} machine", self.version)))
    }

    /// Whether a machine that was pinned to `machine_type` can run.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if not.
    pub fn check_machine_type(&self, machine_type: &str) -> Result<()> {
        if self.machine_types.iter().any(|one| one == machine_type) {
            return Ok(());
        }
        let (version, binary) = (&self.version, self.binary.display());
        Err(Error::Unsupported(format!(
            "the machine is a {machine_type}, which QEMU {version} ({binary}) does not have"
        )))
    }
}

/// The program to run: [`BINARY_VARIABLE`], else on the search path.
///
/// # Errors
/// [`Error::NoQemu`] if there is none.
pub fn find_binary() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(BINARY_VARIABLE).filter(|named| !named.is_empty()) {
        let named = PathBuf::from(named);
        return match std::path::absolute(&named) {
            Ok(path) if runnable(&path) => Ok(path),
            _ => Err(Error::NoQemu(format!("{BINARY_VARIABLE} names {}, which is no program", named.display()))),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(BINARY))
        .find(|file| runnable(file));
    found.ok_or_else(|| {
        Error::NoQemu(format!("there is no {BINARY} on the search path, and {BINARY_VARIABLE} names none"))
    })
}

/// How processors can run here: KVM only where the processor really offers virtualisation and we may use it. (A nested, paravirtual
/// `/dev/kvm` opens without either flag and runs firmware slower than software does.) `Err` says why not.
///
/// # Errors
/// The reason, in words.
pub fn kvm() -> Result<(), String> {
    if !virtualisation(&read("/proc/cpuinfo", 1 << 20).unwrap_or_default()) {
        return Err("the processor offers no virtualisation (neither vmx nor svm)".into());
    }
    match open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("/dev/kvm cannot be opened: {}", std::io::Error::from(error))),
    }
}

/// The accelerator to use if none was asked for.
pub fn best_accel() -> Accel {
    if kvm().is_ok() { Accel::Kvm } else { Accel::Tcg }
}

/// The CPU model to pin for a new machine: under KVM the host's own; in software the newest that QEMU emulates without gaps in every
/// version (x86-64-v2). `max` would change its meaning with each version.
pub fn cpu_model(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "host",
        Accel::Tcg => "Nehalem",
    }
}

/// Whether QEMU may track a guest's memory (userfaultfd), which a capture without a long pause needs. `Err` says why not.
///
/// # Errors
/// The reason, in words.
pub fn userfaultfd() -> Result<(), String> {
    if std::env::var_os(NO_USERFAULTFD).is_some_and(|value| !value.is_empty()) {
        return Err(format!("switched off by {NO_USERFAULTFD}"));
    }
    let everybody = read("/proc/sys/vm/unprivileged_userfaultfd", 16).is_some_and(|text| text.trim() == "1");
    let node = access("/dev/userfaultfd", Access::READ_OK | Access::WRITE_OK).is_ok();
    if everybody || node || rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err("/dev/userfaultfd cannot be opened by this user".into())
}

async fn ask(binary: &Path, args: &[&str]) -> Result<String> {
    let no = |why: String| Error::NoQemu(format!("{} {}: {why}", binary.display(), args.join(" ")));
    let output = Command::new(binary)
        .args(args)
        .stdin(std::process::Stdio::null())
        .output()
        .await
        .map_err(|error| no(error.to_string()))?;
    if !output.status.success() {
        return Err(no(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn runnable(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

fn read(path: &str, most: u64) -> Option<String> {
    let file = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut bytes = Vec::new();
    std::fs::File::from(file).take(most).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().filter(|line| line.split(':').next().is_some_and(|key| key.trim() == "flags"));
    flags.flat_map(str::split_whitespace).any(|flag| flag == "vmx" || flag == "svm")
}

fn parse_version(text: &str) -> Option<String> {
    let version = text.strip_prefix("QEMU emulator version ")?.split_whitespace().next()?;
    version.starts_with(|c: char| c.is_ascii_digit()).then(|| version.to_owned())
}

fn parse_machines(text: &str) -> Vec<String> {
    let names = text.lines().filter_map(|line| line.split_whitespace().next());
    let mut types: Vec<_> = names.filter_map(|name| Some((machine_version(name)?, name.to_owned()))).collect();
    types.sort_unstable_by_key(|(version, _)| Reverse(version.clone()));
    types.into_iter().map(|(_, name)| name).collect()
}

/// `pc-q35-4.0.1` is `[4, 0, 1]`.
fn machine_version(name: &str) -> Option<Vec<u32>> {
    name.strip_prefix(MACHINE_FAMILY)?.split('.').map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let text = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(parse_version(text).as_deref(), Some("7.2.22"));
        assert_eq!(parse_version("bash, version 5"), None);
        assert_eq!(parse_version("QEMU emulator version "), None);
    }

    #[test]
    fn machines_newest_first() {
        let text = "Supported machines are:\nmicrovm   microvm (i386)\nq35   Standard PC (alias of pc-q35-10.0)\n\
                    pc-q35-9.2   Standard PC\npc-q35-10.0  Standard PC\npc-q35-4.0.1 x (deprecated)\npc-q35-4.0 x\npc-q35-2.10 x\npc-i440fx-9.2 x\n";
        assert_eq!(parse_machines(text), ["pc-q35-10.0", "pc-q35-9.2", "pc-q35-4.0.1", "pc-q35-4.0", "pc-q35-2.10"]);
        let qemu = Installed { binary: "qemu".into(), version: "10.0.2".into(), machine_types: parse_machines(text) };
        assert_eq!(qemu.newest_machine_type().expect("one"), "pc-q35-10.0");
        qemu.check_machine_type("pc-q35-9.2").expect("it has it");
        let error = qemu.check_machine_type("pc-q35-11.0").expect_err("it does not have it").to_string();
        assert!(error.contains("pc-q35-11.0") && error.contains("10.0.2"), "{error}");
    }

    #[test]
    fn only_the_flag_itself_is_virtualisation() {
        assert!(virtualisation("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(virtualisation("flags : fpu svm\n"));
        assert!(!virtualisation("flags : fpu svm_lock vmxnet\nmodel name : vmx svm\nvmx flags : vnmi\nbugs : svm\n"));
        assert!(!virtualisation(""));
    }

    #[tokio::test]
    async fn what_is_no_qemu() {
        let error = Installed::probe(Path::new("/bin/false")).await.expect_err("no QEMU");
        assert!(matches!(error, Error::NoQemu(_)), "{error}");
        let error = Installed::probe(Path::new("/bin/echo")).await.expect_err("no QEMU");
        assert!(matches!(error, Error::NoQemu(_)), "{error}");
        let error = Installed::probe(Path::new("/nowhere/qemu")).await.expect_err("no QEMU");
        assert!(error.to_string().contains("/nowhere/qemu"), "{error}");
    }
}
