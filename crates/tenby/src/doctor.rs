//! What this host offers: QEMU, KVM, userfaultfd, protection from its guests, UEFI, the file system's features; what is missing, and what that costs.

use crate::draw::{Look, plain, size};
use machine::firmware::Ovmf;
use machine::request::Problem;
use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, XattrFlags};
use serde::Serialize;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// All that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Findings {
    /// Whether machines can run here.
    pub(crate) ok: bool,
    /// Where machines would lie.
    pub(crate) root: PathBuf,
    /// One for each thing that was looked at.
    pub(crate) checks: Vec<Check>,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    /// What.
    pub(crate) what: &'static str,
    /// Whether it is there.
    pub(crate) ok: bool,
    /// What was found.
    pub(crate) found: String,
    /// What its absence costs, or how to get it.
    pub(crate) cost: Option<&'static str>,
}

impl Check {
    fn new(what: &'static str, found: Result<String, String>, cost: &'static str) -> Self {
        let ok = found.is_ok();
        Self { what, ok, found: found.unwrap_or_else(|why| why), cost: (!ok).then_some(cost) }
    }
}

/// Looks at everything. Nothing is changed, and the root is not made.
pub(crate) async fn examine(root: &Path) -> Findings {
    let qemu = qemu::Installed::find().await;
    let found = match &qemu {
        Ok(found) => {
            let newest = found.newest_machine_type().map(|name| format!(", machines up to {name}")).unwrap_or_default();
            Ok(format!("{} ({}){newest}", found.version, found.binary.display()))
        }
        Err(error) => Err(error.to_string()),
    };
    let mut checks = vec![
        Check::new("QEMU", found, "no machine can run: apt install qemu-system-x86"),
        Check::new(
            "KVM",
            qemu::kvm().map(|()| "guests run on the processor itself".to_owned()),
            "guests run in software (TCG): the same in everything but speed, about 10 times slower",
        ),
        Check::new(
            "userfaultfd",
            qemu::userfaultfd().map(|()| "a running machine's memory can be captured behind its back".to_owned()),
            "a snapshot writes a running guest's memory more than once and holds it up for the rest, and apply holds it up until its memory is read: run tenby as root, or set the sysctl vm.unprivileged_userfaultfd=1",
        ),
        Check::new(
            "protection",
            protection(qemu.as_ref().ok()).await,
            "a guest that gets the better of QEMU is root on this host (but for QEMU's own sandbox): what keeps QEMU from running under a user of its own is named above",
        ),
        Check::new(
            "huge pages",
            qemu::collapses()
                .map(|()| "a guest's memory is put into huge pages again after each snapshot".to_owned())
                .map_err(|error| error.to_string()),
            "a guest's second snapshot pauses it longer, by some 25 ms for each GiB of its memory: run tenby as root",
        ),
        Check::new(
            "UEFI",
            Ovmf::find().map(|ovmf| format!("OVMF ({})", ovmf.folder().display())).map_err(|problem| problem.message),
            "machines have a BIOS, and `vm create --firmware uefi` makes none: apt-get install ovmf",
        ),
    ];
    checks.extend(file_system(root));
    Findings { ok: qemu.is_ok(), root: root.to_owned(), checks }
}

/// What a guest that gets the better of QEMU would be on this host.
async fn protection(qemu: Option<&qemu::Installed>) -> Result<String, String> {
    let Some(found) = qemu else { return Err("there is no QEMU".to_owned()) };
    if !qemu::privileged() {
        return Ok("QEMU may do what you may, less what its sandbox refuses, and never more".to_owned());
    }
    let privileges = match qemu::separates(&found.binary).await? {
        qemu::Tracking::Device => "without privileges",
        qemu::Tracking::Privilege => "with one privilege, to track memory (QEMU 8.0 and later need none)",
    };
    Ok(format!("QEMU runs under a user of the machine's own, {privileges}, in its sandbox"))
}

/// The features of the file system that the root lies on, or will.
fn file_system(root: &Path) -> Vec<Check> {
    let place = root.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let with_file = |test: &dyn Fn(&OwnedFd) -> rustix::io::Result<()>| {
        // A file without a name: it leaves no trace, whatever happens.
        let file =
            rustix::fs::openat(CWD, place, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
        file.and_then(|file| rustix::io::pwrite(&file, &[1; 8192], 0).and_then(|_| test(&file)))
            .map_err(|error| std::io::Error::from(error).to_string())
    };
    let yes = |result: Result<(), String>, text: &str| result.map(|()| text.to_owned());
    let holes =
        with_file(&|file| rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 4096));
    let reflink = with_file(&|file| {
        let copy =
            rustix::fs::openat(CWD, place, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
        rustix::fs::ioctl_ficlone(&copy, file)
    });
    let marks = with_file(&|file| rustix::fs::fsetxattr(file, "user.tenby", b"1", XattrFlags::empty()));
    vec![
        Check::new("space", space(place), "the root's file system cannot be asked"),
        Check::new(
            "holes",
            yes(holes, "freed blocks go back to the file system"),
            "freed blocks stay allocated: files only grow",
        ),
        Check::new(
            "reflink",
            yes(reflink, "files are copied without copying"),
            "copies take their time and space (btrfs and XFS can do without)",
        ),
        Check::new(
            "marks",
            yes(marks, "a machine's files can be marked as its own"),
            "files do not say whose they are (no extended attributes here)",
        ),
    ]
}

fn space(place: &Path) -> Result<String, String> {
    let about = rustix::fs::statvfs(place).map_err(|error| std::io::Error::from(error).to_string())?;
    let free = about.f_bavail.saturating_mul(about.f_frsize);
    Ok(format!("{} free at {}", size(free), place.display()))
}

/// The findings, a line each.
pub(crate) fn draw(findings: &Findings, look: &Look) -> String {
    use anstyle::AnsiColor::{Green, Yellow};
    let mut lines = Vec::new();
    for check in &findings.checks {
        let word =
            if check.ok { look.paint("yes", Green.on_default()) } else { look.paint("no ", Yellow.on_default()) };
        lines.push(format!("{word}  {:12}  {}", check.what, plain(&check.found)));
        lines.extend(check.cost.map(|cost| format!("{:19}{cost}", "")));
    }
    lines.push(String::new());
    lines.push(verdict(findings));
    lines.join("\n") + "\n"
}

/// The findings in one line.
pub(crate) fn verdict(findings: &Findings) -> String {
    let check = |what| findings.checks.iter().find(|check| check.what == what);
    let Some(qemu) = check("QEMU").filter(|check| check.ok) else {
        return "doctor: no machine can run here, for there is no QEMU: apt install qemu-system-x86".to_owned();
    };
    let version = qemu.found.split(' ').next().unwrap_or_default();
    let speed = if check("KVM").is_some_and(|check| check.ok) { "with KVM" } else { "in software (no KVM)" };
    format!("doctor: machines can run here, by QEMU {version}, {speed}")
}

/// Where the machines are, or the problem of not knowing.
pub(crate) fn root(said: Option<&Path>) -> Result<PathBuf, Problem> {
    crate::session::place(said)
}

#[cfg(test)]
mod tests {
    use super::super::draw::tests::look;
    use super::*;

    #[test]
    fn what_is_missing_and_what_that_costs() {
        let findings = Findings {
            ok: true,
            root: "/srv".into(),
            checks: vec![
                Check::new(
                    "QEMU",
                    Ok("10.0.2 (/usr/bin/qemu-system-x86_64), machines up to pc-q35-10.0".to_owned()),
                    "none",
                ),
                Check::new("KVM", Err("the processor offers no virtualisation".to_owned()), "guests run in software"),
            ],
        };
        insta::assert_snapshot!(draw(&findings, &look()), @r"
        yes  QEMU          10.0.2 (/usr/bin/qemu-system-x86_64), machines up to pc-q35-10.0
        no   KVM           the processor offers no virtualisation
                           guests run in software

        doctor: machines can run here, by QEMU 10.0.2, in software (no KVM)
        ");
    }

    #[test]
    fn looking_at_a_place_that_is_not_there_leaves_nothing_behind() {
        let above = tempfile::tempdir().unwrap();
        let checks = file_system(&above.path().join("a/b"));
        assert!(checks.iter().any(|check| check.what == "space" && check.ok));
        assert_eq!(std::fs::read_dir(above.path()).unwrap().count(), 0);
    }
}
