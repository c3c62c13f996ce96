//! Space of files that have lost their last name, given back behind everybody's back.
//!
//! The kernel frees a file's pieces when its last descriptor is closed, and whoever closes it waits for that: 50 us a piece where the file
//! system passes each on to its device (`discard`), and far longer where that device is busy. A layer of a disk may well have 20,000
//! pieces. So the last descriptor is left to a thread that has nothing else to do.
//!
//! Nor is all of it given back at once: the file system tells its device as it commits, and whoever waits for a commit waits for that.
//! The file becomes shorter by a few pieces, and rests. If the process ends the kernel does what is left.

#![expect(unsafe_code, reason = "a lease, for which there is no safe binding")]

use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{self, OFlags, SeekFrom, Stat};
use rustix::io::{Errno, Result};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Files that may wait for it. Each holds a descriptor; who comes with one more waits.
const WAITING: usize = 64;

/// Pieces that are given back at a time, and the most bytes.
const PIECES: usize = 16;
const STRETCH: usize = 64 << 20;

/// The most steps in which a file goes: of one with more pieces, more are given back at a time.
const STEPS: usize = 1000;

/// How often, and how many times, it is asked whether a file has handles left.
const ASK_EVERY: Duration = Duration::from_millis(10);
const ASKED: u32 = 200;

/// How long the device is left to others, of the time that it was taken from them.
const REST: u32 = 4;

/// Bytes of a file that is worth it.
const LARGE: u64 = 1 << 20;

/// What is still to be given back.
static LEFT: Mutex<Vec<Left>> = Mutex::new(Vec::new());

#[derive(Clone, Copy)]
struct Left {
    device: u64,
    file: u64,
    bytes: u64,
}

impl Left {
    fn of(stat: &Stat) -> Self {
        Self { device: stat.st_dev, file: stat.st_ino, bytes: stat.st_blocks.cast_unsigned() * 512 }
    }

    fn is(&self, other: Self) -> bool {
        (self.device, self.file) == (other.device, other.file)
    }
}

/// A descriptor is about to be closed. If it may be the last one of a file without a name, it is not.
pub(super) fn before_close(fd: BorrowedFd<'_>) {
    let Ok(stat) = fs::fstat(fd) else { return };
    let left = Left::of(&stat);
    if stat.st_nlink > 0 || left.bytes < LARGE {
        return;
    }
    if let (Some(thread), Ok(last)) = (thread(), fd.try_clone_to_owned()) {
        LEFT.lock().unwrap_or_else(PoisonError::into_inner).push(left);
        if let Err(back) = thread.send((last, left)) {
            give_back(back.0);
        }
    }
}

/// Bytes on this device that will be free soon.
pub(super) fn soon_free(device: u64) -> u64 {
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner).clone();
    // A file may have had several descriptors.
    left.sort_unstable_by_key(|left| (left.device, left.file));
    left.dedup_by_key(|left| (left.device, left.file));
    left.iter().filter(|left| left.device == device).map(|left| left.bytes).sum()
}

/// The thread, if this process can have one.
fn thread() -> Option<&'static SyncSender<(OwnedFd, Left)>> {
    static THREAD: OnceLock<Option<SyncSender<(OwnedFd, Left)>>> = OnceLock::new();
    let start = || {
        let (to, from) = sync_channel(WAITING);
        let work = move || Receiver::into_iter(from).for_each(give_back);
        thread::Builder::new().name("reclaim".to_owned()).spawn(work).is_ok().then_some(to)
    };
    THREAD.get_or_init(start).as_ref()
}

fn give_back((last, left): (OwnedFd, Left)) {
    // What this does not come to, closing does.
    let _ = shorten(last);
    let mut all = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(at) = all.iter().position(|other| other.is(left)) {
        all.remove(at);
    }
}

/// Makes it shorter bit by bit, unless somebody needs the room.
fn shorten(last: OwnedFd) -> Result<()> {
    // Who is about to close it would give all of it back, and waits for nothing as long as this is open.
    for _ in 0..ASKED {
        if is_alone(&last) || is_urgent(&last)? {
            break;
        }
        thread::sleep(ASK_EVERY);
    }
    if !is_alone(&last) {
        return Ok(());
    }
    let by_handle = format!("/proc/self/fd/{}", last.as_raw_fd());
    let file = fs::open(by_handle, OFlags::WRONLY | OFlags::CLOEXEC, fs::Mode::empty())?;
    drop(last);
    let cuts = cuts(&file)?;
    for length in cuts.iter().rev().step_by(1 + cuts.len() / STEPS) {
        if is_urgent(&file)? {
            break;
        }
        let began = Instant::now();
        fs::ftruncate(&file, *length)?;
        // A commit of its own: those of others shall not have more than this to tell the device.
        fs::fsync(&file)?;
        note(Left::of(&fs::fstat(&file)?));
        thread::sleep(began.elapsed() * REST);
    }
    Ok(())
}

/// Whether no other handle of the file is left anywhere, which would notice.
fn is_alone(last: &OwnedFd) -> bool {
    let lease = |kind: libc::c_int| {
        // SAFETY: the descriptor is open, and the call takes a number.
        unsafe { libc::fcntl(last.as_raw_fd(), libc::F_SETLEASE, kind) == 0 }
    };
    // A write lease is for the only handle of a file. It is asked for, not wanted: it would bring a signal if somebody broke it.
    lease(libc::F_WRLCK) && lease(libc::F_UNLCK)
}

/// Lengths between which the file has a few pieces.
fn cuts(file: &OwnedFd) -> Result<Vec<u64>> {
    let (mut cuts, mut pieces, mut at) = (vec![0], 0, 0);
    loop {
        let start = match fs::seek(file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => return Ok(cuts),
            start => start?,
        };
        at = fs::seek(file, SeekFrom::Hole(start))?;
        cuts.extend((start..at).step_by(STRETCH).skip(1));
        pieces += 1;
        if pieces % PIECES == 0 {
            cuts.push(at);
        }
    }
}

/// Whether there is less room than what is still to be given back, or many are waiting.
fn is_urgent(file: &OwnedFd) -> Result<bool> {
    let stat = fs::fstatvfs(file)?;
    let all = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(all.len() > WAITING / 2 || stat.f_bavail.saturating_mul(stat.f_frsize) < all.iter().map(|left| left.bytes).sum())
}

/// How much of it is left.
fn note(left: Left) {
    let mut all = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    all.iter_mut().filter(|other| other.is(left)).for_each(|other| *other = left);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn scattered(pieces: u64) -> (OwnedFd, OwnedFd) {
        let file = tempfile::tempfile().expect("a file without a name");
        (0..pieces).for_each(|piece| file.write_all_at(&[7; 4096], piece * 65536).expect("write"));
        let fd = OwnedFd::from(file);
        (fd.try_clone().expect("a second descriptor of the same handle"), fd)
    }

    #[test]
    fn a_file_without_other_handles_goes_in_steps() {
        let (last, look) = scattered(40);
        assert!(is_alone(&last));
        let cuts = cuts(&last).expect("look");
        assert!(cuts.is_sorted() && cuts[0] == 0, "{cuts:?}");
        assert!(cuts.iter().all(|cut| *cut < 40 * 65536), "{cuts:?}");
        shorten(last).expect("shorten");
        assert_eq!(fs::fstat(&look).expect("stat").st_size, 0);
    }

    #[test]
    fn a_file_with_another_handle_is_left_alone() {
        let (last, look) = scattered(40);
        let other = fs::open(format!("/proc/self/fd/{}", look.as_raw_fd()), OFlags::RDONLY, fs::Mode::empty());
        assert!(!is_alone(&last));
        shorten(last).expect("wait in vain");
        assert_eq!(fs::fstat(&look).expect("stat").st_size, 39 * 65536 + 4096);
        drop(other);
        assert!(is_alone(&look));
    }
}
