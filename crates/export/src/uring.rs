//! Many reads of files under way at a time, begun and awaited by one thread: an io_uring.
//!
//! Unsafe code. The kernel writes into buffers while we do something else; what keeps that sound:
//!
//! - A buffer belongs to the [`Ring`] from [`Ring::read`] until the read's completion was seen, and nobody touches it in between.
//! - A ring that is dropped waits for what is under way. If it cannot, those buffers are never freed; nor are they if the ring itself
//!   is forgotten.
#![expect(unsafe_code, reason = "the kernel is lent memory for longer than a call, which no borrow can say")]

use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use rustix::event::PollFlags;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// The name of the socket's entry; reads go by their number.
const WATCH: u64 = u64::MAX;

/// Reads under way, and a socket that is watched beside them.
pub(crate) struct Ring<'a, T> {
    uring: IoUring,
    /// By number.
    reads: Vec<Option<Read<T>>>,
    free: Vec<usize>,
    socket: BorrowedFd<'a>,
    watching: bool,
}

/// A read: whose it is, and where its bytes go.
#[derive(Debug)]
pub(crate) struct Read<T> {
    /// Holds the file open, and whatever else must stay as it is meanwhile.
    pub(crate) owner: T,
    pub(crate) buffer: Vec<u8>,
    /// The buffer is filled from here to its end.
    pub(crate) from: usize,
}

/// A read that has ended: the buffer is full, or why it is not. [`io::ErrorKind::WouldBlock`]: files of this kind cannot be read like
/// this. [`io::ErrorKind::UnexpectedEof`]: it got less than was asked for.
#[derive(Debug)]
pub(crate) struct Landed<T> {
    pub(crate) read: Read<T>,
    pub(crate) result: io::Result<()>,
}

impl<'a, T: AsFd> Ring<'a, T> {
    /// For at most `depth` reads at a time, to be used by this thread alone. Fails where there is no io_uring, or not enough of it: an
    /// old kernel, a container that forbids it.
    pub(crate) fn new(depth: usize, socket: BorrowedFd<'a>) -> io::Result<Self> {
        // One for each read and one for the socket: neither queue is ever full.
        let entries = depth as u32 + 1;
        let mut frugal = IoUring::builder();
        frugal.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        // Kernels before 6.1 refuse that.
        let uring = frugal.build(entries).or_else(|_| IoUring::new(entries))?;
        let mut probe = Probe::new();
        uring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::PollAdd::CODE) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let reads = (0..depth).map(|_| None).collect();
        Ok(Self { uring, reads, free: (0..depth).rev().collect(), socket, watching: false })
    }

    /// Begins a read of the owner's file at offset `at`, bytes: with the next [`Ring::land`]. There must be room.
    pub(crate) fn read(&mut self, at: u64, read: Read<T>) {
        let number = self.free.pop().expect("there is room");
        let read = self.reads[number].insert(read);
        let file = types::Fd(read.owner.as_fd().as_raw_fd());
        let into = &mut read.buffer[read.from..];
        let entry = opcode::Read::new(file, into.as_mut_ptr(), into.len() as u32).offset(at).build();
        // SAFETY: buffer and owner stay in `reads`, untouched, until the completion is seen; a `Vec`'s bytes stay where they are when
        // the `Vec` moves. For the ring's end see `drop`.
        unsafe { self.push(&entry.user_data(number as u64)) };
    }
}

impl<T> Ring<'_, T> {
    /// Whether nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.free.len() == self.reads.len()
    }

    /// Whether no further read can begin.
    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Appends the reads that have ended, and says whether the socket has something (also: its end). If `wait`, waits until there is
    /// anything to tell; otherwise the socket is not looked at.
    pub(crate) fn land(&mut self, wait: bool, landed: &mut Vec<Landed<T>>) -> io::Result<bool> {
        if wait && !self.watching {
            let watch = opcode::PollAdd::new(types::Fd(self.socket.as_raw_fd()), u32::from(PollFlags::IN.bits()));
            // SAFETY: it refers to no memory.
            unsafe { self.push(&watch.build().user_data(WATCH)) };
            self.watching = true;
        }
        self.enter(usize::from(wait))?;
        Ok(self.collect(landed))
    }

    /// Waits until nothing is under way.
    pub(crate) fn land_all(&mut self, landed: &mut Vec<Landed<T>>) -> io::Result<()> {
        while !self.is_idle() {
            self.enter(1)?;
            self.collect(landed);
        }
        Ok(())
    }

    /// Tells the kernel what was pushed, and waits for so many completions.
    fn enter(&self, completions: usize) -> io::Result<()> {
        loop {
            match self.uring.submit_and_wait(completions) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn collect(&mut self, landed: &mut Vec<Landed<T>>) -> bool {
        let mut readable = false;
        for entry in self.uring.completion() {
            if entry.user_data() == WATCH {
                (self.watching, readable) = (false, true);
                continue;
            }
            let number = entry.user_data() as usize;
            let read = self.reads[number].take().expect("each read ends once");
            self.free.push(number);
            let result = outcome(&entry, read.buffer.len() - read.from);
            landed.push(Landed { read, result });
        }
        readable
    }

    /// # Safety
    /// What the entry refers to must stay until its completion was seen.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's promise.
        unsafe { self.uring.submission().push(entry) }.expect("one for each read and one for the socket");
    }
}

fn outcome(entry: &cqueue::Entry, wanted: usize) -> io::Result<()> {
    match usize::try_from(entry.result()) {
        Ok(got) if got == wanted => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
    }
}

impl<T> Drop for Ring<'_, T> {
    fn drop(&mut self) {
        if self.land_all(&mut Vec::new()).is_err() {
            // The kernel may still write into them.
            self.reads.drain(..).flatten().for_each(|read| std::mem::forget(read.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    const PAGE: usize = 4096;

    /// A file whose pages each hold their number, on the disk alone as far as the system lets go of it.
    fn numbered(pages: u8) -> Arc<File> {
        let mut file = tempfile::tempfile().expect("a file");
        (0..pages).for_each(|page| file.write_all(&[page; PAGE]).expect("written"));
        file.sync_all().expect("synced");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("let go");
        Arc::new(file)
    }

    /// `None` where the system has none: then there is nothing to test.
    fn ring(depth: usize, socket: &UnixStream) -> Option<Ring<'_, Arc<File>>> {
        Ring::new(depth, socket.as_fd()).inspect_err(|error| eprintln!("no io_uring here: {error}")).ok()
    }

    fn of(owner: &Arc<File>, len: usize) -> Read<Arc<File>> {
        Read { owner: Arc::clone(owner), buffer: vec![0xee; 16 + len], from: 16 }
    }

    #[test]
    fn each_read_brings_its_bytes_and_nothing_else() {
        let (file, socket) = (numbered(64), UnixStream::pair().expect("a pair").0);
        let Some(mut ring) = ring(7, &socket) else { return };
        let mut landed = Vec::new();
        let mut seen = [0; 64];
        for page in 0..64u8 {
            while ring.is_full() {
                ring.land(true, &mut landed).expect("a ring");
            }
            ring.read(u64::from(page) * PAGE as u64, of(&file, PAGE));
        }
        ring.land_all(&mut landed).expect("a ring");
        assert!(ring.is_idle());
        for Landed { read, result } in landed {
            result.expect("a whole page");
            assert_eq!(read.buffer[..16], [0xee; 16]);
            assert_eq!(read.buffer[16..], [read.buffer[16]; PAGE]);
            seen[usize::from(read.buffer[16])] += 1;
        }
        assert_eq!(seen, [1; 64]);
    }

    #[test]
    fn less_than_was_asked_for_is_told() {
        let (file, socket) = (numbered(2), UnixStream::pair().expect("a pair").0);
        let Some(mut ring) = ring(2, &socket) else { return };
        let mut landed = Vec::new();
        ring.read(PAGE as u64, of(&file, 2 * PAGE));
        ring.land_all(&mut landed).expect("a ring");
        let result = landed.pop().expect("it has ended").result;
        assert_eq!(result.expect_err("half").kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn the_socket_wakes_who_waits() {
        let (own, mut other) = UnixStream::pair().expect("a pair");
        let Some(mut ring) = ring(2, &own) else { return };
        let mut landed = Vec::new();
        assert!(!ring.land(false, &mut landed).expect("a ring"), "nobody has looked");
        other.write_all(b"hello").expect("sent");
        assert!(ring.land(true, &mut landed).expect("a ring"));
        drop(other);
        assert!(ring.land(true, &mut landed).expect("a ring"), "its end too");
    }

    #[test]
    fn a_ring_waits_for_its_reads_at_its_end() {
        let (file, socket) = (numbered(64), UnixStream::pair().expect("a pair").0);
        let Some(mut ring) = ring(64, &socket) else { return };
        (0..64).for_each(|page| ring.read(page * PAGE as u64, of(&file, PAGE)));
        ring.land(false, &mut Vec::new()).expect("a ring");
        drop(ring);
        assert_eq!(Arc::strong_count(&file), 1, "every owner is gone");
    }
}
