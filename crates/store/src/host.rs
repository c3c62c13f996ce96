//! The real files of this machine.
//!
//! Everything below a folder is opened relative to the folder's descriptor, one name at a time, and symbolic links are not
//! followed: a name cannot lead out of the folder, and a folder that is renamed or moved stays the same folder. The kernel holds that
//! as well (`openat2`). Only regular files are opened: what else bears the name is not touched. Files belong to their owner alone
//! (0600, folders 0700), and no descriptor is inherited by a program that we start.
//!
//! # Locks
//!
//! Locks are `flock`'s. They belong to the open file, so that a second handle conflicts even inside one process, and they are not
//! dropped when some other handle of the file is closed, as POSIX record locks would be. (Open file description locks would do as
//! well, and convert atomically; but they would also meet QEMU's own byte locks, and `qemu-img info` on a file of a running
//! machine would fail.) A conversion between shared and exclusive is not atomic: see [`Store::lock`].

mod reclaim;

use crate::{Error, ErrorKind, Folder, Lax, Lock, Mode, Result, Store, check_name};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    self, AtFlags, CWD, Dir, FallocateFlags, FileType, FlockOperation, OFlags, RenameFlags, ResolveFlags, SeekFrom,
};
use rustix::io::{Errno, pread, pwrite, retry_on_intr};
use rustix::process::{Resource, getrlimit};
use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Readable and writable by the owner alone.
const FILE_MODE: fs::Mode = fs::Mode::RUSR.union(fs::Mode::WUSR);
const FOLDER_MODE: fs::Mode = fs::Mode::RWXU;

const FOLDER_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// A directory of this machine.
#[derive(Debug)]
pub struct HostFolder {
    fd: OwnedFd,
    /// Where it was when it was opened; for messages.
    path: PathBuf,
}

impl HostFolder {
    /// Opens an existing folder. Symbolic links on the way to it are followed: the user named it.
    pub fn open(path: &Path) -> Result<Self> {
        let fd = retry_on_intr(|| fs::openat(CWD, path, FOLDER_FLAGS, fs::Mode::empty()))
            .map_err(|errno| failed("open", path, errno))?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Opens a folder, making it (0700) and those above it if they are not there, durably.
    pub fn create(path: &Path) -> Result<Self> {
        match Self::open(path) {
            Err(error) if error.kind == ErrorKind::NotFound => {}
            opened => return opened,
        }
        let above = match path.parent() {
            Some(above) if above.as_os_str().is_empty() => Self::open(Path::new("."))?,
            Some(above) => Self::create(above)?,
            None => return Self::open(path),
        };
        match retry_on_intr(|| fs::mkdirat(CWD, path, FOLDER_MODE)) {
            // Somebody else made it just now: as good.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("create folder", path, errno)),
        }
        above.sync()?;
        Self::open(path)
    }

    /// The folder that holds the file `path`, and the file's name there. For a user's own file, there or to be made. A link leads to
    /// the file that it names: the user named it.
    pub fn holding(path: &Path) -> Result<(Self, String)> {
        let is_link = fs::lstat(path).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink);
        let real = match is_link {
            true => std::fs::canonicalize(path)
                .map_err(|error| failed("open", path, Errno::from_io_error(&error).unwrap_or(Errno::IO)))?,
            false => path.to_owned(),
        };
        let name = real.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| {
            Error::new(ErrorKind::BadName, "open", path.display().to_string(), "not the name of a file in UTF-8")
        })?;
        let above = match real.parent() {
            Some(above) if !above.as_os_str().is_empty() => above,
            _ => Path::new("."),
        };
        Ok((Self::open(above)?, name.to_owned()))
    }

    /// Whether both are the same folder, whatever path led there.
    pub fn is(&self, other: &Self) -> bool {
        let place = |folder: &Self| fs::fstat(&folder.fd).map(|stat| (stat.st_dev, stat.st_ino));
        place(self).is_ok_and(|own| place(other) == Ok(own))
    }

    /// Where it was when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new file: without a name if that is wanted and can be, else with one that nobody has chosen.
    fn nameless(&self, unnamed: bool) -> rustix::io::Result<(OwnedFd, Option<String>)> {
        let flags = file_flags(Mode::Write);
        if unnamed && let Ok(fd) = retry_on_intr(|| fs::openat(&self.fd, ".", flags | OFlags::TMPFILE, FILE_MODE)) {
            return Ok((fd, None));
        }
        let mut number = 0_u64;
        loop {
            let name = format!(".tenby-{}-{number}.part", std::process::id());
            match open_beneath(self.fd.as_fd(), &name, flags | OFlags::CREATE | OFlags::EXCL) {
                // Left by a process of the same number.
                Err(Errno::EXIST) => number += 1,
                opened => return Ok((opened?, Some(name))),
            }
        }
    }

    fn open_file(&self, name: &str, flags: OFlags, mode: Mode, operation: &'static str) -> Result<Arc<dyn Store>> {
        check_name(name, operation)?;
        let path = self.path.join(name);
        let failed = |errno| failed(operation, &path, errno);
        if !flags.contains(OFlags::CREATE) {
            let stat = retry_on_intr(|| fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)).map_err(failed)?;
            check_regular(&stat, &path, operation)?;
        }
        let fd = open_beneath(self.fd.as_fd(), name, flags | file_flags(mode)).map_err(failed)?;
        Ok(Arc::new(HostFile::new(fd, path, mode, operation)?))
    }
}

impl AsFd for HostFolder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Folder for HostFolder {
    fn open(&self, name: &str, mode: Mode) -> Result<Arc<dyn Store>> {
        self.open_file(name, OFlags::empty(), mode, "open")
    }

    fn create(&self, name: &str) -> Result<Arc<dyn Store>> {
        self.open_file(name, OFlags::CREATE | OFlags::EXCL, Mode::Write, "create")
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        check_name(from, "rename")?;
        check_name(to, "rename")?;
        retry_on_intr(|| fs::renameat(&self.fd, from, &self.fd, to))
            .map_err(|errno| failed("rename", &self.path.join(from), errno))
    }

    fn link(&self, name: &str, into: &dyn Folder, new: &str) -> Result<()> {
        check_name(name, "link")?;
        check_name(new, "link")?;
        let path = self.path.join(name);
        let into: &dyn Any = into;
        let Some(into) = into.downcast_ref::<Self>() else { return Err(failed("link", &path, Errno::XDEV)) };
        let stat = retry_on_intr(|| fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW));
        check_regular(&stat.map_err(|errno| failed("link", &path, errno))?, &path, "link")?;
        retry_on_intr(|| fs::linkat(&self.fd, name, &into.fd, new, AtFlags::empty())).map_err(|errno| match errno {
            // Said by file systems without links; whether the file may be read shows when it is copied.
            Errno::PERM | Errno::OPNOTSUPP => failed("link", &path, Errno::XDEV),
            Errno::EXIST => failed("link", &into.path.join(new), errno),
            errno => failed("link", &path, errno),
        })
    }

    fn links(&self, name: &str) -> Result<u64> {
        check_name(name, "look at")?;
        let path = self.path.join(name);
        let stat = retry_on_intr(|| fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW))
            .map_err(|errno| failed("look at", &path, errno))?;
        check_regular(&stat, &path, "look at")?;
        Ok(stat.st_nlink)
    }

    fn unlink(&self, name: &str) -> Result<()> {
        check_name(name, "remove")?;
        retry_on_intr(|| fs::unlinkat(&self.fd, name, AtFlags::empty()))
            .map_err(|errno| failed("remove", &self.path.join(name), errno))
    }

    fn create_folder(&self, name: &str) -> Result<Arc<dyn Folder>> {
        check_name(name, "create folder")?;
        retry_on_intr(|| fs::mkdirat(&self.fd, name, FOLDER_MODE))
            .map_err(|errno| failed("create folder", &self.path.join(name), errno))?;
        self.folder(name)
    }

    fn folder(&self, name: &str) -> Result<Arc<dyn Folder>> {
        check_name(name, "open")?;
        let path = self.path.join(name);
        let fd = open_beneath(self.fd.as_fd(), name, FOLDER_FLAGS).map_err(|errno| failed("open", &path, errno))?;
        Ok(Arc::new(Self { fd, path }))
    }

    fn remove_folder(&self, name: &str) -> Result<()> {
        check_name(name, "remove")?;
        retry_on_intr(|| fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR))
            .map_err(|errno| failed("remove", &self.path.join(name), errno))
    }

    fn list(&self) -> Result<Vec<String>> {
        let names = || -> rustix::io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in Dir::read_from(&self.fd)? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                if name != "." && name != ".." {
                    names.push(name);
                }
            }
            names.sort_unstable();
            Ok(names)
        };
        names().map_err(|errno| failed("list", &self.path, errno))
    }

    fn sync(&self) -> Result<()> {
        retry_on_intr(|| fs::fsync(&self.fd)).map_err(|errno| failed("sync", &self.path, errno))
    }

    fn room(&self) -> Result<u64> {
        let stat = retry_on_intr(|| fs::fstatvfs(&self.fd)).map_err(|errno| failed("statvfs", &self.path, errno))?;
        let device = fs::fstat(&self.fd).map(|stat| stat.st_dev).map_err(|errno| failed("stat", &self.path, errno))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize).saturating_add(reclaim::soon_free(device)))
    }
}

/// Opens a user's own file, wherever it lies; symbolic links are followed. Only a regular file will do: anything else is an error
/// of kind [`ErrorKind::WrongType`], and is not opened.
pub fn open_file(path: &Path, mode: Mode) -> Result<Arc<dyn Store>> {
    let failed = |errno| failed("open", path, errno);
    check_regular(&retry_on_intr(|| fs::stat(path)).map_err(failed)?, path, "open")?;
    let fd = retry_on_intr(|| fs::openat(CWD, path, file_flags(mode), fs::Mode::empty())).map_err(failed)?;
    Ok(Arc::new(HostFile::new(fd, path.to_owned(), mode, "open")?))
}

/// A file that is being made. It has its name when it is complete and not before, and nothing is left of it if it never is, whatever
/// becomes of the process. Until then it has no name at all; where the file system cannot do that it has one of its own, which is
/// left behind if the process is killed.
#[derive(Debug)]
pub struct NewFile {
    folder: HostFolder,
    name: String,
    file: Arc<HostFile>,
    /// The name of its own.
    partial: Option<String>,
    durable: bool,
}

impl NewFile {
    /// Begins the file `path`, whose folder is there. [`ErrorKind::Exists`] if something has that name, be it a link to nothing. Unless it
    /// is to be durable, nobody waits for its syncs: see [`Lax`].
    pub fn begin(path: &Path, durable: bool) -> Result<Self> {
        // An unnamed file gets its name by way of this.
        let unnamed = Path::new("/proc/self/fd").exists();
        Self::begin_as(path, durable, unnamed)
    }

    fn begin_as(path: &Path, durable: bool, unnamed: bool) -> Result<Self> {
        if fs::lstat(path).is_ok() {
            return Err(failed("create", path, Errno::EXIST));
        }
        let (folder, name) = HostFolder::holding(path)?;
        check_name(&name, "create")?;
        let path = folder.path.join(&name);
        let (fd, partial) = folder.nameless(unnamed).map_err(|errno| failed("create", &path, errno))?;
        let mut file = HostFile::new(fd, path, Mode::Write, "create")?;
        file.nameless = partial.is_none();
        let file = Arc::new(file);
        Ok(Self { folder, name, file, partial, durable })
    }

    /// The file.
    pub fn store(&self) -> Arc<dyn Store> {
        let file = Arc::<HostFile>::clone(&self.file);
        if self.durable { file } else { Arc::new(Lax(file)) }
    }

    /// A path by which another process of ours can open it now.
    pub fn path(&self) -> PathBuf {
        match &self.partial {
            Some(partial) => self.folder.path.join(partial),
            None => PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.fd.as_raw_fd())),
        }
    }

    /// Gives it its name, durably if that was wanted. [`ErrorKind::Exists`] if something has come to bear that name meanwhile.
    pub fn finish(mut self) -> Result<()> {
        let (folder, name) = (&self.folder.fd, self.name.as_str());
        let named = match &self.partial {
            Some(partial) => fs::renameat_with(folder, partial, folder, name, RenameFlags::NOREPLACE),
            None => fs::linkat(CWD, self.path(), folder, name, AtFlags::SYMLINK_FOLLOW),
        };
        named.map_err(|errno| failed("create", &self.folder.path.join(name), errno))?;
        self.partial = None;
        if self.durable { self.folder.sync() } else { Ok(()) }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(partial) = &self.partial {
            // If even that fails, a file of a telling name stays behind; there is nothing more to do about it.
            let _ = self.folder.unlink(partial);
        }
    }
}

/// A process that has a file locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The process.
    pub pid: u32,
    /// Its program's name and arguments, as far as we may see them.
    pub command: String,
}

/// Who has the file locked, as far as the system tells (`/proc/locks`): processes of other containers are not seen, nor locks on
/// some file systems. For messages.
pub fn holders(path: &Path) -> Vec<Holder> {
    let Ok(stat) = fs::stat(path) else { return Vec::new() };
    let file = format!("{:02x}:{:02x}:{}", fs::major(stat.st_dev), fs::minor(stat.st_dev), stat.st_ino);
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    // 1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF
    let of_file = locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let of_file = of_file.filter(|parts| parts.get(1) == Some(&"FLOCK") && parts.get(5) == Some(&file.as_str()));
    let mut pids: Vec<u32> = of_file.filter_map(|parts| parts[4].parse().ok()).collect();
    pids.sort_unstable();
    pids.dedup();
    let named = pids.into_iter().map(|pid| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = words.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        Holder { pid, command: words.collect::<Vec<_>>().join(" ").trim().to_owned() }
    });
    named.collect()
}

/// This life of the host: a number that is another one after each start of its kernel (`/proc/sys/kernel/random/boot_id`).
pub fn boot_id() -> Result<u128> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let fd = retry_on_intr(|| fs::openat(CWD, path, file_flags(Mode::Read), fs::Mode::empty()))
        .map_err(|errno| failed("open", path, errno))?;
    let mut text = [0; 36];
    let length = retry_on_intr(|| rustix::io::read(&fd, &mut text)).map_err(|errno| failed("read", path, errno))?;
    let digits: String = String::from_utf8_lossy(&text[..length]).chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16)
        .map_err(|error| Error::new(ErrorKind::Io, "read", path.display().to_string(), error.to_string()))
}

/// Never to wait for what is opened (a pipe would wait for its other end).
fn file_flags(mode: Mode) -> OFlags {
    let access = match mode {
        Mode::Read => OFlags::RDONLY,
        Mode::Write => OFlags::RDWR,
    };
    access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY
}

/// Opens what has this name in the folder, and nothing that it may lead to.
fn open_beneath(folder: BorrowedFd<'_>, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW;
    let created = if flags.contains(OFlags::CREATE) { FILE_MODE } else { fs::Mode::empty() };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match retry_on_intr(|| fs::openat2(folder, name, flags, created, resolve)) {
        // Kernels before 5.6 do not have it, and some sandboxes let no call through that they do not know. A checked name has one
        // part, and its link is not followed: then this opens the same.
        Err(Errno::NOSYS | Errno::PERM) => retry_on_intr(|| fs::openat(folder, name, flags, created)),
        opened => opened,
    }
}

/// Fails unless it is a regular file. Asked before it is opened too: opening a device may start something (a tape, a watchdog), and
/// opening a pipe lets its writer go on.
fn check_regular(stat: &fs::Stat, path: &Path, operation: &'static str) -> Result<()> {
    let file_type = FileType::from_raw_mode(stat.st_mode);
    if file_type == FileType::RegularFile {
        return Ok(());
    }
    let detail = format!("{}, not a file", type_name(file_type));
    Err(Error::new(ErrorKind::WrongType, operation, path.display().to_string(), detail))
}

/// A regular file of this machine.
#[derive(Debug)]
pub struct HostFile {
    fd: OwnedFd,
    path: PathBuf,
    mode: Mode,
    /// It is being made and has no name yet.
    nameless: bool,
    lock: Mutex<Lock>,
    /// A sync failed: the kernel has told us once and forgets it, so we remember.
    sync_failed: AtomicBool,
}

impl HostFile {
    fn new(fd: OwnedFd, path: PathBuf, mode: Mode, operation: &'static str) -> Result<Self> {
        // The name may have come to mean something else since it was looked at.
        check_regular(&fs::fstat(&fd).map_err(|errno| failed(operation, &path, errno))?, &path, operation)?;
        let (lock, sync_failed) = (Mutex::new(Lock::None), AtomicBool::new(false));
        Ok(Self { fd, path, mode, nameless: false, lock, sync_failed })
    }

    fn failed(&self, operation: &'static str, errno: Errno) -> Error {
        failed(operation, &self.path, errno)
    }

    fn error(&self, kind: ErrorKind, operation: &'static str, detail: impl Into<String>) -> Error {
        Error::new(kind, operation, self.name(), detail)
    }

    fn check_writable(&self, operation: &'static str) -> Result<()> {
        match self.mode {
            Mode::Write => Ok(()),
            Mode::Read => Err(self.error(ErrorKind::Denied, operation, "the file was opened for reading")),
        }
    }

    fn held(&self) -> MutexGuard<'_, Lock> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flock(&self, lock: Lock) -> rustix::io::Result<()> {
        let operation = match lock {
            Lock::None => FlockOperation::NonBlockingUnlock,
            Lock::Shared => FlockOperation::NonBlockingLockShared,
            Lock::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        retry_on_intr(|| fs::flock(&self.fd, operation))
    }

    fn write_zeros(&self, mut offset: u64, mut len: u64) -> Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        while len > 0 {
            let step = len.min(ZEROS.len() as u64);
            self.write_at(&ZEROS[..step as usize], offset)?;
            offset += step;
            len -= step;
        }
        Ok(())
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Store for HostFile {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn len(&self) -> Result<u64> {
        let stat = fs::fstat(&self.fd).map_err(|errno| self.failed("read the length of", errno))?;
        Ok(stat.st_size as u64)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.check_writable("set the length of")?;
        retry_on_intr(|| fs::ftruncate(&self.fd, len)).map_err(|errno| self.failed("set the length of", errno))
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let read = retry_on_intr(|| pread(&self.fd, &mut *buf, offset)).map_err(|e| self.failed("read", e))?;
            if read == 0 {
                let detail = format!("{} bytes at {offset} lie past the end of the file", buf.len());
                return Err(self.error(ErrorKind::PastEnd, "read", detail));
            }
            buf = &mut buf[read..];
            offset += read as u64;
        }
        Ok(())
    }

    fn write_at(&self, mut buf: &[u8], mut offset: u64) -> Result<()> {
        self.check_writable("write")?;
        while !buf.is_empty() {
            let written =
                retry_on_intr(|| pwrite(&self.fd, buf, offset)).map_err(|errno| match self.failed("write", errno) {
                    error if error.kind == ErrorKind::NoSpace => Error { detail: no_room(buf.len()), ..error },
                    error => error,
                })?;
            if written == 0 {
                return Err(self.error(ErrorKind::Io, "write", format!("nothing was written at {offset}")));
            }
            buf = &buf[written..];
            offset += written as u64;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable("zero")?;
        let end = offset.checked_add(len).filter(|end| self.len().is_ok_and(|length| *end <= length));
        if end.is_none() {
            let detail = format!("{len} bytes at {offset} lie past the end of the file");
            return Err(self.error(ErrorKind::PastEnd, "zero", detail));
        }
        if len == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| fs::fallocate(&self.fd, flags, offset, len)) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeros(offset, len),
            Err(errno) => Err(self.failed("zero", errno)),
        }
    }

    fn sync(&self) -> Result<()> {
        if self.sync_failed.load(Ordering::Acquire) {
            return Err(self.error(ErrorKind::Io, "sync", "an earlier sync of this file failed"));
        }
        // fdatasync covers the length and the places of the blocks: all that reading the data back needs.
        retry_on_intr(|| fs::fdatasync(&self.fd)).map_err(|errno| {
            self.sync_failed.store(true, Ordering::Release);
            self.failed("sync", errno)
        })
    }

    fn lock(&self, lock: Lock) -> Result<()> {
        let mut held = self.held();
        self.flock(lock).map_err(|errno| {
            // flock gives up the old lock before it asks for the new one, so it has to be taken again. If somebody took it in
            // between we hold nothing, and say so to ourselves.
            if *held != Lock::None && self.flock(*held).is_err() {
                *held = Lock::None;
            }
            self.failed("lock", errno)
        })?;
        *held = lock;
        // Whoever held it until now may have been removing it: what is written to it from here on would be gone with the last handle.
        let links = fs::fstat(&self.fd).map_err(|errno| self.failed("lock", errno))?.st_nlink;
        if lock != Lock::None && links == 0 && !self.nameless {
            return Err(self.error(ErrorKind::NotFound, "lock", "it was removed"));
        }
        Ok(())
    }

    fn data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        // Seeking moves the descriptor's offset, which nothing here uses.
        let seek = |to| retry_on_intr(|| fs::seek(&self.fd, to));
        match seek(SeekFrom::Data(offset)) {
            Ok(start) => {
                let end = seek(SeekFrom::Hole(start)).map_err(|errno| self.failed("look for holes in", errno))?;
                // Cut short in between, the file has nothing here any more.
                Ok((start < end).then_some((start, end)))
            }
            Err(Errno::NXIO) => Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                let len = self.len()?;
                Ok((offset < len).then_some((offset, len)))
            }
            Err(errno) => Err(self.failed("look for holes in", errno)),
        }
    }

    fn reflink(&self, from: &dyn Store) -> Result<bool> {
        self.check_writable("write")?;
        let Some(from) = from.descriptor() else { return Ok(false) };
        match retry_on_intr(|| fs::ioctl_ficlone(&self.fd, from)) {
            Ok(()) => Ok(true),
            Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::IO)) => Err(self.failed("write", errno)),
            Err(_) => Ok(false),
        }
    }

    fn allocated(&self) -> Result<u64> {
        let stat = fs::fstat(&self.fd).map_err(|errno| self.failed("read the size of", errno))?;
        // POSIX counts in units of 512 bytes, whatever the file system's blocks.
        Ok(stat.st_blocks as u64 * 512)
    }
}

impl Drop for HostFile {
    /// Gives the lock up at once: a child that has forked and not yet executed its program still holds the open file.
    fn drop(&mut self) {
        if *self.held() != Lock::None {
            // Closing would do it too, only later: a failure here changes nothing.
            let _ = self.flock(Lock::None);
        }
        reclaim::before_close(self.fd.as_fd());
    }
}

fn type_name(file_type: FileType) -> &'static str {
    match file_type {
        FileType::RegularFile => "a file",
        FileType::Directory => "a folder",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Unknown => "of unknown type",
    }
}

fn failed(operation: &'static str, path: &Path, errno: Errno) -> Error {
    let kind = match errno {
        Errno::NOENT => ErrorKind::NotFound,
        Errno::EXIST | Errno::NOTEMPTY => ErrorKind::Exists,
        Errno::WOULDBLOCK => ErrorKind::Locked,
        Errno::XDEV | Errno::MLINK => ErrorKind::CannotLink,
        Errno::NOSPC | Errno::DQUOT => ErrorKind::NoSpace,
        Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::BADF => ErrorKind::Denied,
        Errno::NAMETOOLONG | Errno::ILSEQ => ErrorKind::BadName,
        Errno::ISDIR | Errno::NOTDIR | Errno::LOOP | Errno::NXIO => ErrorKind::WrongType,
        Errno::MFILE => ErrorKind::TooManyFiles,
        _ => ErrorKind::Io,
    };
    let detail = match errno {
        Errno::WOULDBLOCK => "in use by somebody else".to_owned(),
        Errno::LOOP => "a symbolic link, not a file".to_owned(),
        Errno::ISDIR => "a folder, not a file".to_owned(),
        Errno::NOTDIR => "a file, or below one, not a folder".to_owned(),
        Errno::NXIO => "a socket or a device, not a file".to_owned(),
        Errno::MFILE => too_many_files(),
        _ => std::io::Error::from(errno).to_string(),
    };
    Error::new(kind, operation, path.display().to_string(), detail)
}

fn no_room(bytes: usize) -> String {
    format!("no room for {bytes} bytes")
}

fn too_many_files() -> String {
    match getrlimit(Resource::Nofile).current {
        Some(limit) => format!("this process may have no more than {limit} files open"),
        None => "this process may have no more files open".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn folder() -> (tempfile::TempDir, HostFolder) {
        let place = tempfile::tempdir().expect("a temporary folder");
        let folder = HostFolder::open(place.path()).expect("open it");
        (place, folder)
    }

    fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
        result.expect_err("should fail").kind
    }

    #[test]
    fn bytes_come_back() {
        let (_place, folder) = folder();
        let file = folder.create("a").expect("create");
        file.write_at(b"hello", 100_000).expect("write");
        assert_eq!(file.len().expect("len"), 100_005);
        let mut buf = [1; 10];
        file.read_at(&mut buf, 99_995).expect("read");
        assert_eq!(&buf, b"\0\0\0\0\0hello");
        assert_eq!(kind(file.read_at(&mut buf, 99_996)), ErrorKind::PastEnd);
        file.sync().expect("sync");
        file.punch(100_000, 3).expect("punch");
        file.read_at(&mut buf, 99_995).expect("read");
        assert_eq!(&buf, b"\0\0\0\0\0\0\0\0lo");
        assert_eq!(kind(file.punch(100_000, 6)), ErrorKind::PastEnd);
        assert_eq!(kind(file.punch(u64::MAX, 6)), ErrorKind::PastEnd);
        file.set_len(100_003).expect("shrink");
        file.set_len(100_005).expect("grow");
        file.read_at(&mut buf, 99_995).expect("read");
        assert_eq!(buf, [0; 10]);
    }

    #[test]
    fn punching_gives_space_back() {
        let (_place, folder) = folder();
        let file = folder.create("a").expect("create");
        file.write_at(&vec![7; 1 << 20], 0).expect("write");
        file.sync().expect("sync");
        let before = file.allocated().expect("allocated");
        file.punch(0, 1 << 19).expect("punch");
        assert!(file.allocated().expect("allocated") <= before);
        assert_eq!(file.len().expect("len"), 1 << 20);
    }

    #[test]
    fn a_handle_for_reading_does_not_write() {
        let (_place, folder) = folder();
        folder.create("a").expect("create").write_at(b"x", 0).expect("write");
        let file = folder.open("a", Mode::Read).expect("open");
        assert_eq!(kind(file.write_at(b"y", 0)), ErrorKind::Denied);
        assert_eq!(kind(file.set_len(0)), ErrorKind::Denied);
        assert_eq!(kind(file.punch(0, 1)), ErrorKind::Denied);
        file.sync().expect("sync is harmless");
    }

    #[test]
    fn files_and_folders_belong_to_their_owner() {
        let (place, folder) = folder();
        folder.create("a").expect("create");
        folder.create_folder("b").expect("create folder").create("c").expect("create below");
        let mode = |name: &str| place.path().join(name).metadata().expect("metadata").permissions().mode() & 0o7777;
        assert_eq!((mode("a"), mode("b"), mode("b/c")), (0o600, 0o700, 0o600));
    }

    #[test]
    fn the_host_lives_one_life_at_a_time() {
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
    }

    #[test]
    fn a_file_has_as_many_names_as_it_is_given() {
        let (place, folder) = folder();
        let other = folder.create_folder("other").expect("create folder");
        folder.create("a").expect("create").write_at(b"x", 0).expect("write");
        folder.link("a", &*other, "b").expect("link");
        assert_eq!((folder.links("a").expect("links"), other.links("b").expect("links")), (2, 2));
        assert_eq!(kind(folder.link("a", &*other, "b")), ErrorKind::Exists);
        assert_eq!(kind(folder.link("other", &*other, "c")), ErrorKind::WrongType);
        assert_eq!(kind(folder.link("a", &*crate::sim::Sim::new().root(), "c")), ErrorKind::CannotLink);
        std::os::unix::fs::symlink("a", place.path().join("s")).expect("link");
        assert_eq!(kind(folder.link("s", &*other, "c")), ErrorKind::WrongType);
        folder.unlink("a").expect("unlink");
        assert_eq!(other.links("b").expect("links"), 1);
    }

    #[test]
    fn a_reflink_is_a_file_of_its_own() {
        let (_place, folder) = folder();
        let (one, two) = (folder.create("a").expect("create"), folder.create("b").expect("create"));
        one.write_at(b"one", 0).expect("write");
        // Not every file system can.
        if two.reflink(&*one).expect("asked") {
            two.write_at(b"two", 0).expect("write");
            let mut read = [0; 3];
            one.read_at(&mut read, 0).expect("read");
            assert_eq!(&read, b"one");
        } else {
            assert_eq!(two.len().expect("length"), 0);
        }
    }

    #[test]
    fn locks_conflict_between_handles_of_one_process() {
        let (_place, folder) = folder();
        let one = folder.create("a").expect("create");
        let two = folder.open("a", Mode::Read).expect("open");
        one.lock(Lock::Shared).expect("shared");
        two.lock(Lock::Shared).expect("shared");
        assert_eq!(kind(one.lock(Lock::Exclusive)), ErrorKind::Locked);
        // The shared lock was kept: nobody else gets an exclusive one.
        two.lock(Lock::None).expect("unlock");
        assert_eq!(kind(two.lock(Lock::Exclusive)), ErrorKind::Locked);
        one.lock(Lock::Exclusive).expect("convert");
        assert_eq!(kind(two.lock(Lock::Shared)), ErrorKind::Locked);
        drop(one);
        two.lock(Lock::Exclusive).expect("given up when dropped");
    }

    #[test]
    fn a_new_file_has_its_name_when_it_is_complete() {
        let (place, folder) = folder();
        for unnamed in [true, false] {
            let path = place.path().join(format!("new-{unnamed}"));
            let begin = || NewFile::begin_as(&path, true, unnamed);
            let dropped = begin().expect("begin");
            dropped.store().write_at(b"half", 0).expect("write");
            assert_eq!(open_file(&dropped.path(), Mode::Read).expect("others open it").len().expect("length"), 4);
            let (one, two) = (begin().expect("two at once"), begin().expect("three"));
            assert_eq!(one.store().name(), path.display().to_string(), "errors name what it is to be");
            drop(dropped);
            assert!(!path.exists());
            one.store().write_at(b"whole", 0).expect("write");
            one.finish().expect("finish");
            assert_eq!(kind(two.finish()), ErrorKind::Exists);
            assert_eq!(kind(begin()), ErrorKind::Exists);
            assert_eq!(std::fs::read(&path).expect("read"), b"whole");
        }
        assert_eq!(folder.list().expect("list"), ["new-false", "new-true"], "and nothing else");
    }

    #[test]
    fn what_was_removed_is_given_back_in_its_own_time() {
        let (_place, folder) = folder();
        let file = folder.create("a").expect("create");
        file.write_at(&vec![7; 4 << 20], 0).expect("write");
        file.sync().expect("sync");
        let (device, held) = (fs::fstat(&folder.fd).expect("stat").st_dev, folder.open("a", Mode::Read).expect("open"));
        folder.unlink("a").expect("unlink");
        drop(held);
        let mut read = [0; 3];
        file.read_at(&mut read, 0).expect("another handle does not notice");
        assert_eq!(read, [7; 3]);
        drop(file);
        while reclaim::soon_free(device) > 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_was_removed_is_not_locked() {
        let (_place, folder) = folder();
        folder.create("a").expect("create");
        let file = folder.open("a", Mode::Write).expect("open");
        folder.unlink("a").expect("remove");
        assert_eq!(kind(file.lock(Lock::Exclusive)), ErrorKind::NotFound);
        assert_eq!(kind(file.lock(Lock::Shared)), ErrorKind::NotFound);
    }

    #[test]
    fn a_lock_has_a_holder() {
        let (place, folder) = folder();
        let file = folder.create("a").expect("create");
        assert_eq!(holders(&place.path().join("a")), []);
        file.lock(Lock::Exclusive).expect("exclusive");
        let holders = holders(&place.path().join("a"));
        // Some file systems do not tell.
        assert!(holders.iter().all(|holder| holder.pid == std::process::id()), "{holders:?}");
    }

    #[test]
    fn names_lead_nowhere_else() {
        let (place, folder) = folder();
        std::fs::write(place.path().join("file"), "x").expect("write");
        std::os::unix::fs::symlink("file", place.path().join("link")).expect("link");
        std::os::unix::fs::symlink("/", place.path().join("away")).expect("link");
        for name in ["", ".", "..", "a/b", "/etc/passwd", "a\0b", "../file", &"n".repeat(256)] {
            assert_eq!(kind(folder.open(name, Mode::Read)), ErrorKind::BadName, "{name:?}");
            assert_eq!(kind(folder.create(name)), ErrorKind::BadName, "{name:?}");
            assert_eq!(kind(folder.rename("file", name)), ErrorKind::BadName, "{name:?}");
            assert_eq!(kind(folder.unlink(name)), ErrorKind::BadName, "{name:?}");
            assert_eq!(kind(folder.folder(name)), ErrorKind::BadName, "{name:?}");
            assert_eq!(kind(folder.create_folder(name)), ErrorKind::BadName, "{name:?}");
        }
        assert_eq!(kind(folder.open("link", Mode::Read)), ErrorKind::WrongType);
        assert_eq!(kind(folder.folder("away")), ErrorKind::WrongType);
        assert_eq!(kind(folder.folder("file")), ErrorKind::WrongType);
        assert_eq!(kind(folder.create("file")), ErrorKind::Exists);
        assert_eq!(kind(folder.open("none", Mode::Write)), ErrorKind::NotFound);
    }

    #[test]
    fn a_users_file_is_a_regular_file() {
        let (place, _folder) = folder();
        std::fs::write(place.path().join("file"), "x").expect("write");
        std::os::unix::fs::symlink("file", place.path().join("link")).expect("link");
        assert_eq!(open_file(&place.path().join("link"), Mode::Read).expect("follows").len().expect("len"), 1);
        fs::mknodat(CWD, place.path().join("pipe"), FileType::Fifo, FILE_MODE, 0).expect("make a pipe");
        let socket = std::os::unix::net::UnixListener::bind(place.path().join("socket")).expect("make a socket");
        for mode in [Mode::Read, Mode::Write] {
            for name in ["pipe", "socket", "", "/dev/null"] {
                assert_eq!(kind(open_file(&place.path().join(name), mode)), ErrorKind::WrongType, "{name:?}");
            }
        }
        drop(socket);
    }

    #[test]
    fn folders_are_made_with_those_above() {
        let place = tempfile::tempdir().expect("a temporary folder");
        let path = place.path().join("a/b/c");
        HostFolder::create(&path).expect("create").create("x").expect("create");
        let again = HostFolder::create(&path).expect("open");
        assert_eq!(again.list().expect("list"), ["x"]);
        let (folder, name) = HostFolder::holding(&path.join("x")).expect("the folder that holds it");
        assert_eq!((folder.list().expect("list"), name.as_str()), (vec!["x".to_owned()], "x"));
        let above = HostFolder::open(&place.path().join("a/b")).expect("open");
        assert_eq!(kind(above.remove_folder("c")), ErrorKind::Exists);
        assert_eq!(kind(above.unlink("c")), ErrorKind::WrongType);
        again.rename("x", "y").expect("rename");
        again.unlink("y").expect("unlink");
        above.remove_folder("c").expect("remove");
        assert_eq!(above.list().expect("list"), Vec::<String>::new());
    }
}
