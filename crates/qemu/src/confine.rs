//! What a QEMU may do on its host, should its guest get the better of it.
//!
//! ```text
//!   worker ── fork, exec ──► `tenby launch …` ───────────────────────────────────────── exec ──► QEMU
//!     │                        a session of its own
//!     │                        opens the files that only root reads                               /dev/fdset/100 …
//!     │                        a mount namespace in which the devices are the user's              /dev/userfaultfd, /dev/kvm
//!     │                        its user, no groups, no capabilities, no_new_privs                 seccomp
//!     └─ the run folder: root's, but for `qemu/`, in which QEMU makes its own sockets
//! ```
//!
//! All is given up before QEMU is there (its own `-runasid` and its seccomp filter exclude each other), by a program of one thread: ours, started
//! again. So no privileged code runs between a fork and an exec.
//!
//! QEMU 8.0 and later open `/dev/userfaultfd` before they try the system call, and who can open it may track memory as root may. The host's node
//! stays as it is; QEMU sees another one, which is its user's. Before 8.0 it takes a privilege (`untraced.rs`).

use crate::error::{Error, Result};
use crate::launch::{Accel, Launch, PID_FILE, QEMU_FOLDER};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, chmod, chownat, mkdir, mknodat, open, stat};
use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount};
use rustix::process::{Gid, Uid, geteuid, setsid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};
use serde_json::{Value, json};
use std::ffi::{CStr, OsStr, OsString};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use tokio::io::AsyncWriteExt;

/// The variable that leaves QEMU the privileges of root, if root starts it.
pub const PRIVILEGED_VARIABLE: &str = "TENBY_PRIVILEGED_QEMU";

const USERFAULTFD: &str = "/dev/userfaultfd";
const KVM: &str = "/dev/kvm";

/// The program that this is, even if its file has been replaced since.
const OURSELVES: &str = "/proc/self/exe";

/// Where device nodes are made, in a mount namespace of their own: a folder that is everywhere.
const WORKSHOP: &str = "/tmp";

/// The number of the first file that QEMU is given; the others follow. Out of the way of what may be open already.
const FIRST_FILE: RawFd = 100;

/// What QEMU may do on its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rights {
    /// What who starts it may. It is started just so, for tests.
    Starter,
    /// The same, and never more (`no_new_privs`).
    NoMore,
    /// What this user may, and what is handed to it. Only root can give it that.
    User(User, Tracking),
}

/// How a QEMU under a user of its own tracks its guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// By a device that it is handed.
    Device,
    /// By a privilege that it keeps, of whose other uses it is deprived. For QEMU before 8.0.
    Privilege,
}

/// A user for one machine, apart from those of all others. It is a number and no account: nothing has to be set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User(u32);

impl User {
    /// The first user's number; its group has the same. Above what container managers (to 1,879,048,191) and directory services (to
    /// 2,000,200,000) give away, and below 2³¹, beyond which programs err.
    pub const FIRST: u32 = 2_013_265_920;
    /// So many there are: of 1,000 machines, two share one with a probability of 0.7 %, and are then no worse off than with one for all.
    pub const COUNT: u32 = 1 << 26;

    /// The one for a machine of this random id.
    pub fn of(id: u128) -> Self {
        Self(Self::FIRST + (id % u128::from(Self::COUNT)) as u32)
    }
}

/// Whether QEMU would have privileges, were it started just so.
pub fn privileged() -> bool {
    geteuid().is_root()
}

/// Whether the QEMU `binary` can run under a user of its own here and lacks nothing there that it would have as root. It is tried, with all
/// that belongs to it; how it tracks memory comes of it. `Err` says why not.
///
/// # Errors
/// The reason, in words.
pub async fn separates(binary: &Path) -> Result<Tracking, String> {
    // What once went well will again; what is missing may come.
    static TRIED: Mutex<Option<(PathBuf, Tracking)>> = Mutex::new(None);
    if std::env::var_os(PRIVILEGED_VARIABLE).is_some_and(|value| !value.is_empty()) {
        return Err(format!("switched off by {PRIVILEGED_VARIABLE}"));
    }
    let tried = || TRIED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, tracking)) = tried().as_ref().filter(|(known, _)| known == binary) {
        return Ok(*tracking);
    }
    let confined = |tracking| Confined::under(User(User::FIRST), tracking, crate::probe::best_accel());
    let tracking = match try_it(&confined(Tracking::Device), binary).await {
        Ok(()) => Tracking::Device,
        Err(why) => {
            try_it(&confined(Tracking::Privilege), binary).await.map(|()| Tracking::Privilege).map_err(|_| why)?
        }
    };
    *tried() = Some((binary.to_owned(), tracking));
    Ok(tracking)
}

/// A QEMU without a machine, asked whether it could capture one in the background, if it could do that as root.
async fn try_it(confined: &Confined, binary: &Path) -> Result<(), String> {
    let args = ["-no-user-config", "-nodefaults", "-machine", "none", "-display", "none", "-qmp", "stdio"];
    let mut orders = vec![json!({ "execute": "qmp_capabilities" })];
    if crate::probe::userfaultfd().is_ok() {
        let capability = json!({ "capability": "background-snapshot", "state": true });
        orders.push(json!({ "execute": "migrate-set-capabilities", "arguments": { "capabilities": [capability] } }));
    }
    orders.push(json!({ "execute": "quit" }));
    let command = confined.command(binary, &args.map(OsString::from));
    let mut command = tokio::process::Command::from(command);
    command.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let failed = |error: std::io::Error| format!("it cannot be tried: {error}");
    let mut child = command.spawn().map_err(failed)?;
    let mut stdin = child.stdin.take().expect("it is a pipe");
    let orders: String = orders.iter().map(Value::to_string).collect();
    // What could not be started takes no orders; it says why below.
    let _ = stdin.write_all(orders.as_bytes()).await;
    let output = child.wait_with_output().await.map_err(failed)?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let first = words.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it left no word");
        return Err(first.trim_start_matches("error: ").to_owned());
    }
    let answers = String::from_utf8_lossy(&output.stdout);
    let mut answers = answers.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    match answers.find_map(|answer| Some(answer["error"]["desc"].as_str()?.to_owned())) {
        Some(why) => Err(format!("under another user QEMU cannot track memory: {why}")),
        None => Ok(()),
    }
}

/// What is given up, and what is handed over, in becoming QEMU: how [`Launch`] is carried out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confined {
    /// The number of the user to become, and of its group; `None`: who it is already.
    pub user: Option<u32>,
    /// The devices that this user may use.
    pub devices: Vec<PathBuf>,
    /// The files that it is given open, to be read: descriptors 100, 101, …
    pub files: Vec<PathBuf>,
    /// Whether it may listen on ports below 1024.
    pub low_ports: bool,
    /// Whether it keeps the privilege to track memory (`CAP_SYS_PTRACE`), and loses the ways into other processes that come with it.
    pub tracks: bool,
    /// The file into which its process id is written.
    pub pid_file: Option<PathBuf>,
}

impl Confined {
    /// What `launch` asks for.
    pub(crate) fn of(launch: &Launch) -> Self {
        let pid_file = Some(PID_FILE.into());
        let Rights::User(user, tracking) = launch.rights else { return Self { pid_file, ..Self::default() } };
        let files = launch.files().into_iter().map(Path::to_owned).collect();
        Self { pid_file, files, low_ports: launch.low_ports, ..Self::under(user, tracking, launch.accel) }
    }

    fn under(User(user): User, tracking: Tracking, accel: Accel) -> Self {
        let tracks = tracking == Tracking::Privilege && crate::probe::userfaultfd().is_ok();
        Self { user: Some(user), devices: devices(accel), tracks, ..Self::default() }
    }

    /// The words by which our own program is started to become `program`; it must then call [`Confined::becomes`].
    pub fn words(&self, program: &Path, args: &[OsString]) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["launch".into()];
        let mut option = |name: &str, value: &OsStr| words.extend([name.into(), value.to_owned()]);
        if let Some(user) = self.user {
            option("--user", user.to_string().as_ref());
        }
        self.devices.iter().for_each(|device| option("--device", device.as_os_str()));
        self.files.iter().for_each(|file| option("--file", file.as_os_str()));
        self.pid_file.iter().for_each(|file| option("--pid-file", file.as_os_str()));
        words.extend(self.low_ports.then(|| "--low-ports".into()));
        words.extend(self.tracks.then(|| "--tracks".into()));
        words.extend(["--".into(), program.into()]);
        words.extend_from_slice(args);
        words
    }

    /// Our own program, to become `program`.
    pub(crate) fn command(&self, program: &Path, args: &[OsString]) -> Command {
        let mut command = Command::new(OURSELVES);
        command.arg0("tenby").args(self.words(program, args));
        command
    }

    /// Becomes `program`, in this process. Comes back only if that fails; what has been given up by then is gone.
    pub fn becomes(&self, program: &OsStr, args: &[OsString]) -> Error {
        match self.enter() {
            Ok(_files) => {
                let mut command = Command::new(program);
                command.args(args);
                if self.user.is_some() {
                    // Who started the worker may have left secrets there.
                    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
                }
                Error::io(Error::at("run", program))(command.exec())
            }
            Err(error) => error,
        }
    }

    /// What it gives stays open as long as this process lives, whatever program it is.
    fn enter(&self) -> Result<Vec<OwnedFd>> {
        setsid().map_err(Error::os("begin a session"))?;
        if let Some(file) = &self.pid_file {
            write_pid(file).map_err(Error::io(Error::at("write", file)))?;
        }
        let numbered = self.files.iter().zip(FIRST_FILE..);
        let files = numbered.map(|(file, number)| open_as(file, number)).collect::<Result<_>>()?;
        if let Some(user) = self.user {
            if !self.devices.is_empty() {
                own_devices(&self.devices, user)?;
            }
            become_user(user, self.kept()).map_err(Error::os(format!("become user {user}")))?;
            for device in &self.devices {
                let opened = open(device, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
                opened.map_err(Error::os(format!("open {} as user {user}", device.display())))?;
            }
        }
        set_no_new_privs(true).map_err(Error::os("give up new privileges"))?;
        if self.tracks {
            crate::untraced::forbid().map_err(Error::io("forbid the ways into other processes"))?;
        }
        Ok(files)
    }

    /// The capabilities that are not given up.
    fn kept(&self) -> CapabilitySet {
        let mut kept = CapabilitySet::empty();
        kept.set(CapabilitySet::NET_BIND_SERVICE, self.low_ports);
        kept.set(CapabilitySet::SYS_PTRACE, self.tracks);
        kept
    }
}

/// The devices that a QEMU needs and root may use.
fn devices(accel: Accel) -> Vec<PathBuf> {
    let tracking = crate::probe::userfaultfd().is_ok().then_some(USERFAULTFD);
    let wanted = tracking.into_iter().chain((accel == Accel::Kvm).then_some(KVM)).map(PathBuf::from);
    wanted.filter(|device| open(device, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).is_ok()).collect()
}

/// The number of the descriptor by which QEMU has the file at this place of [`Confined::files`].
pub(crate) fn descriptor(place: usize) -> RawFd {
    FIRST_FILE + place as RawFd
}

/// This process keeps its id, whatever it becomes.
fn write_pid(file: &Path) -> std::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let file = open(file, flags, Mode::RUSR | Mode::WUSR)?;
    writeln!(std::fs::File::from(file), "{}", std::process::id())
}

/// Opens a file for whatever program this becomes.
fn open_as(file: &Path, number: RawFd) -> Result<OwnedFd> {
    let failed = || Error::at("open", file);
    let opened = open(file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(Error::os(failed()))?;
    let numbered = fcntl_dupfd_cloexec(opened, number).map_err(Error::os(failed()))?;
    if numbered.as_raw_fd() != number {
        return Err(Error::Launch(format!("descriptor {number} is in use")));
    }
    fcntl_setfd(&numbered, FdFlags::empty()).map_err(Error::os(failed()))?;
    Ok(numbered)
}

/// From now on this process sees other nodes of these devices, which are `user`'s. The host's own stay as they are.
fn own_devices(devices: &[PathBuf], user: u32) -> Result<()> {
    let failed = |what: &str| Error::os(format!("{what} in a mount namespace of its own"));
    #[expect(deprecated, reason = "descriptors stay shared among threads, for which alone the new way asks unsafe")]
    rustix::thread::unshare(UnshareFlags::NEWNS).map_err(Error::os("begin a mount namespace"))?;
    // What is mounted here is not seen elsewhere; what others unmount is not held here.
    let downstream = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", downstream).map_err(failed("stay apart"))?;
    mount("tmpfs", WORKSHOP, "tmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, None::<&CStr>)
        .map_err(failed("mount a tmpfs"))?;
    for (number, device) in devices.iter().enumerate() {
        let node = Path::new(WORKSHOP).join(number.to_string());
        let what = || format!("hand over {}", device.display());
        let rdev = stat(device).map_err(failed(&what()))?.st_rdev;
        mknodat(CWD, &node, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, rdev).map_err(failed(&what()))?;
        chownat(CWD, &node, Some(Uid::from_raw(user)), Some(Gid::from_raw(user)), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed(&what()))?;
        mount_bind(&node, device).map_err(failed(&what()))?;
    }
    unmount(WORKSHOP, UnmountFlags::DETACH).map_err(failed("unmount a tmpfs"))
}

/// The system calls change this thread, the only one, and what it becomes.
fn become_user(user: u32, kept: CapabilitySet) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    for (_, capability) in CapabilitySet::all().difference(kept).iter_names() {
        match remove_capability_from_bounding_set(capability) {
            // This kernel does not know it.
            Err(Errno::INVAL) | Ok(()) => {}
            Err(error) => return Err(error),
        }
    }
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_keep_capabilities(true)?;
    set_thread_res_uid(uid, uid, uid)?;
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: kept })?;
    kept.iter_names().try_for_each(|(_, capability)| configure_capability_in_ambient_set(capability, true))
}

/// Makes the folder in which a QEMU of these rights makes its sockets, in its run folder. QEMU can enter the run folder and change
/// nothing in it: whatever is made there later is what it seems to be.
///
/// # Errors
/// [`Error::Io`].
pub fn prepare(run_dir: &Path, rights: Rights) -> Result<()> {
    let own = run_dir.join(QEMU_FOLDER);
    mkdir(&own, Mode::RWXU).map_err(Error::os(Error::at("make", &own)))?;
    let Rights::User(User(user), _) = rights else { return Ok(()) };
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    let failed = || Error::at("hand over", run_dir);
    chownat(CWD, &own, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(Error::os(failed()))?;
    chownat(CWD, run_dir, None, Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(Error::os(failed()))?;
    chmod(run_dir, Mode::RWXU | Mode::XGRP).map_err(Error::os(failed()))
}

/// Gives what is called `name` in a run folder to the QEMU that runs there, or will.
///
/// # Errors
/// [`Error::Io`].
pub fn hand_over(run_dir: &Path, name: &str) -> Result<()> {
    let (own, given) = (run_dir.join(QEMU_FOLDER), run_dir.join(name));
    let owner = stat(&own).map_err(Error::os(Error::at("look at", &own)))?.st_uid;
    if owner == geteuid().as_raw() {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(owner), Gid::from_raw(owner));
    chownat(CWD, &given, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(Error::os(Error::at("hand over", &given)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn users_lie_in_their_range() {
        assert_eq!(User::of(0), User(User::FIRST));
        assert_eq!(User::of(u128::MAX), User(User::FIRST + User::COUNT - 1));
        assert_ne!(User::of(1), User::of(2));
        assert!(i32::try_from(User::FIRST + User::COUNT).is_ok());
    }

    #[test]
    fn qemu_owns_its_folder_and_what_it_is_given_and_nothing_else() {
        if !privileged() {
            eprintln!("SKIPPED: only root can give things away");
            return;
        }
        let above = tempfile::tempdir().expect("a folder");
        let run = above.path();
        prepare(run, Rights::User(User(User::FIRST), Tracking::Device)).expect("prepared");
        for name in ["given", "kept"] {
            std::fs::write(run.join(name), "").expect("written");
        }
        hand_over(run, "given").expect("given");
        let look = |name: &str| {
            let about = run.join(name).symlink_metadata().expect("it is there");
            (about.uid(), about.gid(), about.permissions().mode() & 0o7777)
        };
        assert_eq!(look(QEMU_FOLDER), (User::FIRST, User::FIRST, 0o700));
        assert_eq!(look(""), (0, User::FIRST, 0o710));
        assert_eq!((look("given").0, look("kept").0), (User::FIRST, 0));
    }

    #[test]
    fn without_a_user_everything_stays_the_starters() {
        let above = tempfile::tempdir().expect("a folder");
        let about = |name: &str| above.path().join(name).metadata().expect("it is there");
        let before = about("").permissions();
        prepare(above.path(), Rights::NoMore).expect("prepared");
        std::fs::write(above.path().join("file"), "").expect("written");
        hand_over(above.path(), "file").expect("nothing to do");
        assert_eq!(about("file").uid(), geteuid().as_raw());
        assert_eq!(about("").permissions(), before);
    }
}
