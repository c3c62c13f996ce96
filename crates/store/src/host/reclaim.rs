//! Space of files that have lost their last name, given back behind everybody's back.
//!
//! The kernel frees a file's pieces when its last descriptor is closed, and whoever closes it waits for that: 50 us a piece where the file
//! system passes each on to its device (`discard`), and far longer where that device is busy. A layer of a disk may well have 20,000
//! pieces. So the last descriptor is left to a thread that has nothing else to do. If the process ends the kernel does the rest.

use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::fs;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

/// Files that may wait for it. Each holds a descriptor; who comes with one more waits.
const WAITING: usize = 64;

/// Bytes of a file that is worth it.
const LARGE: u64 = 1 << 20;

/// What is still to be given back.
static LEFT: Mutex<Vec<Left>> = Mutex::new(Vec::new());

#[derive(PartialEq, Clone, Copy)]
struct Left {
    device: u64,
    file: u64,
    bytes: u64,
}

/// A descriptor is about to be closed. If it may be the last one of a file without a name, it is not.
pub(super) fn before_close(fd: BorrowedFd<'_>) {
    let Ok(stat) = fs::fstat(fd) else { return };
    let left = Left { device: stat.st_dev, file: stat.st_ino, bytes: stat.st_blocks.cast_unsigned() * 512 };
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
    drop(last);
    let mut all = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(at) = all.iter().position(|other| *other == left) {
        all.remove(at);
    }
}
