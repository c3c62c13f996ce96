//! The first serial port, for several clients at once, over all processes that a machine has had.
//!
//! ```text
//!   guest ──▶ QEMU ──▶ console log ──▶ ConsoleReader (each at its own pace)
//!               ▲ serial.pipe
//!               └───── Console::write
//! ```
//!
//! QEMU itself appends what the port prints to the log, its standard output, whether anybody is attached or not. So the log is the only
//! truth about the output: nothing is missing or doubled when a worker dies or one QEMU follows another. What is typed goes through a
//! pipe, QEMU's standard input; QEMU holds both of its ends, so it never sees it closed. The log's front is punched out as it grows, so that it takes a bounded space while positions in it stay what they are.

use crate::error::{Error, Result};
use rustix::fs::{CWD, FallocateFlags, FileType, Mode, OFlags, fallocate, fstat, inotify, mknodat, open, unlink};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};

/// How much of what was printed a client is shown at first, bytes.
pub const KEPT: u64 = 64 << 10;

/// Space that is taken from the log at a time, bytes.
const PUNCH_STEP: u64 = 1 << 20;

/// A serial port. Clones share it.
#[derive(Debug, Clone)]
pub struct Console {
    hub: Arc<Hub>,
}

#[derive(Debug)]
struct Hub {
    log: Arc<OwnedFd>,
    length: watch::Receiver<u64>,
    input: Mutex<Option<Input>>,
    attached: watch::Sender<bool>,
    /// Keystrokes of two clients do not mix within one write.
    typing: tokio::sync::Mutex<()>,
    follower: AbortHandle,
}

#[derive(Debug)]
struct Input {
    pipe: Arc<AsyncFd<OwnedFd>>,
    watch: JoinHandle<()>,
}

impl Drop for Input {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Console {
    /// The port whose output is appended to `log`, which is made if it is not there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(log: &Path) -> Result<Self> {
        let what = || Error::at("follow", log);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let file = Arc::new(open(log, flags, Mode::RUSR | Mode::WUSR).map_err(Error::os(what()))?);
        let watch =
            inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).map_err(Error::os(what()))?;
        inotify::add_watch(&watch, log, inotify::WatchFlags::MODIFY).map_err(Error::os(what()))?;
        #[expect(deprecated, reason = "an owned descriptor keeps the promise for which the new way asks unsafe")]
        let watch = AsyncFd::with_interest(watch, Interest::READABLE).map_err(Error::io(what()))?;
        // Read after the watch was set: growth in between is seen twice rather than never.
        let (grown, length) = watch::channel(size(&file).map_err(Error::os(what()))?);
        let follower = tokio::spawn(follow(watch, file.clone(), grown)).abort_handle();
        let hub = Hub {
            log: file,
            length,
            input: Mutex::default(),
            attached: watch::Sender::new(false),
            typing: tokio::sync::Mutex::default(),
            follower,
        };
        Ok(Self { hub: Arc::new(hub) })
    }

    /// Sends what is typed into `pipe` from now on, until its reader ends or another one is attached.
    ///
    /// # Errors
    /// [`Error::Io`] if nobody reads it.
    pub(crate) fn attach(&self, pipe: &Path) -> Result<()> {
        let what = || Error::at("write to", pipe);
        // Without waiting for a reader: that there is none is an error.
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let end = open(pipe, flags, Mode::empty()).map_err(Error::os(what()))?;
        #[expect(deprecated, reason = "an owned descriptor keeps the promise for which the new way asks unsafe")]
        let end = AsyncFd::with_interest(end, Interest::WRITABLE | Interest::ERROR).map_err(Error::io(what()))?;
        let pipe = Arc::new(end);
        // Held over the start of the task, which may see the end at once.
        let mut input = self.hub.input();
        let watch = tokio::spawn(watch_reader(pipe.clone(), Arc::downgrade(&self.hub)));
        *input = Some(Input { pipe, watch });
        self.hub.attached.send_replace(true);
        Ok(())
    }

    /// Whether what is typed has somewhere to go.
    pub fn attached(&self) -> watch::Receiver<bool> {
        self.hub.attached.subscribe()
    }

    /// What the port printed: first the last [`KEPT`] bytes, then everything as it comes.
    pub fn reader(&self) -> ConsoleReader {
        let length = self.hub.length.clone();
        let position = length.borrow().saturating_sub(KEPT);
        ConsoleReader { log: self.hub.log.clone(), length, position }
    }

    /// Types. Returns when QEMU's pipe has taken all of it. Writes of several clients do not mix.
    ///
    /// # Errors
    /// [`Error::ConsoleDetached`] with what was delivered.
    pub async fn write(&self, bytes: &[u8]) -> Result<()> {
        let _turn = self.hub.typing.lock().await;
        let pipe = self.hub.input().as_ref().map(|input| input.pipe.clone());
        let mut delivered = 0;
        let detached = |delivered| Error::ConsoleDetached { delivered, length: bytes.len() };
        let pipe = pipe.ok_or(detached(0))?;
        while delivered < bytes.len() {
            let mut ready = pipe.writable().await.map_err(|_| detached(delivered))?;
            let written = ready.try_io(|pipe| Ok(rustix::io::write(pipe, &bytes[delivered..])?));
            match written {
                Ok(Ok(length)) => delivered += length,
                // Full: it is waited for.
                Err(_) => {}
                Ok(Err(_)) => return Err(detached(delivered)),
            }
        }
        Ok(())
    }
}

impl Hub {
    fn input(&self) -> MutexGuard<'_, Option<Input>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads what the port prints.
#[derive(Debug)]
pub struct ConsoleReader {
    log: Arc<OwnedFd>,
    length: watch::Receiver<u64>,
    position: u64,
}

impl ConsoleReader {
    /// What was printed next, at most 16 KiB; waits for it. A reader that fell more than a few [`KEPT`] behind goes on with the last [`KEPT`]
    /// bytes. Nothing is lost if the future is dropped. `None` when the [`Console`] is gone.
    ///
    /// # Errors
    /// [`Error::Io`] if the log cannot be read.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            let length = *self.length.borrow_and_update();
            if self.position < length {
                return self.read(length).map(Some);
            }
            // The log was cut off by someone else: what comes now is new.
            self.position = length;
            if self.length.changed().await.is_err() {
                return Ok(None);
            }
        }
    }

    fn read(&mut self, length: u64) -> Result<Vec<u8>> {
        if length - self.position > PUNCH_STEP / 2 {
            self.position = length - KEPT;
        }
        let mut bytes = vec![0; (length - self.position).min(16 << 10) as usize];
        let count =
            rustix::io::pread(&*self.log, &mut bytes, self.position).map_err(Error::os("read the console's log"))?;
        bytes.truncate(count);
        self.position += count as u64;
        Ok(bytes)
    }
}

/// Tells readers how long the log is, and bounds its space.
async fn follow(watch: AsyncFd<OwnedFd>, log: Arc<OwnedFd>, grown: watch::Sender<u64>) {
    let mut punched = 0;
    loop {
        let Ok(mut ready) = watch.readable().await else { return };
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut changes = inotify::Reader::new(watch.get_ref(), &mut space);
        while changes.next().is_ok() {}
        ready.clear_ready();
        let Ok(length) = size(&log) else { return };
        punch(&log, length, &mut punched);
        grown.send_if_modified(|known| std::mem::replace(known, length) != length);
    }
}

/// Gives back the space of what no reader will be shown any more.
fn punch(log: &OwnedFd, length: u64, punched: &mut u64) {
    let keep_from = length.saturating_sub(PUNCH_STEP) / PUNCH_STEP * PUNCH_STEP;
    if keep_from > *punched {
        // A file system that cannot do it keeps the whole log: that costs space, nothing else.
        let _ = fallocate(log, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, keep_from);
        *punched = keep_from;
    }
}

fn size(log: &OwnedFd) -> rustix::io::Result<u64> {
    Ok(fstat(log)?.st_size as u64)
}

/// Notices that nobody reads the pipe any more.
async fn watch_reader(pipe: Arc<AsyncFd<OwnedFd>>, hub: Weak<Hub>) {
    // Its writing end reports an error when the last reader is gone, and nothing else.
    let _ = pipe.ready(Interest::ERROR).await;
    let Some(hub) = hub.upgrade() else { return };
    let mut input = hub.input();
    if input.as_ref().is_some_and(|input| Arc::ptr_eq(&input.pipe, &pipe)) {
        *input = None;
        hub.attached.send_replace(false);
    }
}

/// Makes the pipe at `path` and opens it for QEMU: both ends, so that it does not come to its end with the process that types.
pub(crate) fn make_pipe(path: &Path) -> Result<OwnedFd> {
    let mode = Mode::RUSR | Mode::WUSR;
    // One that an earlier process left is not taken over: what was typed for that is not typed for this one.
    match unlink(path) {
        Err(rustix::io::Errno::NOENT) | Ok(()) => {}
        Err(error) => return Err(Error::os(Error::at("remove", path))(error)),
    }
    mknodat(CWD, path, FileType::Fifo, mode, 0).map_err(Error::os(Error::at("make", path)))?;
    open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(Error::os(Error::at("open", path)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::fs::MetadataExt;

    /// Stands for QEMU: it appends.
    fn printer(log: &Path) -> File {
        OpenOptions::new().append(true).open(log).expect("the log")
    }

    async fn read(reader: &mut ConsoleReader, wanted: usize) -> Vec<u8> {
        let mut all = vec![];
        while all.len() < wanted {
            all.extend(reader.next().await.expect("it reads").expect("the console lives"));
        }
        all
    }

    #[tokio::test]
    async fn each_reads_at_its_own_pace() {
        let dir = tempfile::tempdir().expect("a folder");
        let log = dir.path().join("log");
        std::fs::write(&log, "before ").expect("the log");
        let console = Console::open(&log).expect("the console");
        let (mut quick, mut slow) = (console.reader(), console.reader());
        assert_eq!(read(&mut quick, 7).await, b"before ");
        let mut port = printer(&log);
        for piece in ["one ", "two ", "three"] {
            port.write_all(piece.as_bytes()).expect("it prints");
            assert_eq!(read(&mut quick, piece.len()).await, piece.as_bytes());
        }
        assert_eq!(read(&mut slow, 20).await, b"before one two three");
        assert_eq!(read(&mut console.reader(), 20).await, b"before one two three");
        drop(console);
        assert_eq!(quick.next().await.expect("it ends"), None);
    }

    #[tokio::test]
    async fn the_log_takes_a_bounded_space() {
        let dir = tempfile::tempdir().expect("a folder");
        let log = dir.path().join("log");
        let console = Console::open(&log).expect("the console");
        let (mut quick, mut slow) = (console.reader(), console.reader());
        let mut port = printer(&log);
        let page: Vec<u8> = (0..1024u32).flat_map(u32::to_le_bytes).collect();
        for _ in 0..2048 {
            port.write_all(&page).expect("it prints");
            assert_eq!(read(&mut quick, page.len()).await, page);
        }
        let meta = std::fs::metadata(&log).expect("the log");
        assert_eq!(meta.len(), 8 << 20);
        assert!(meta.blocks() * 512 <= 3 * PUNCH_STEP, "{} blocks", meta.blocks());
        // Who fell behind goes on with the last part, never with holes.
        let late = read(&mut slow, KEPT as usize).await;
        assert_eq!(late, page.repeat(16));
        assert_eq!(read(&mut console.reader(), KEPT as usize).await, page.repeat(16));
    }

    #[tokio::test]
    async fn a_log_that_was_cut_off() {
        let dir = tempfile::tempdir().expect("a folder");
        let log = dir.path().join("log");
        std::fs::write(&log, "a long beginning").expect("the log");
        let console = Console::open(&log).expect("the console");
        let mut reader = console.reader();
        assert_eq!(read(&mut reader, 16).await, b"a long beginning");
        let mut port = printer(&log);
        port.set_len(0).expect("cut off");
        // The reader learns of it at its own pace; what is printed after it has is read.
        console.hub.length.clone().wait_for(|length| *length == 0).await.expect("the console lives");
        tokio::select! {
            biased;
            _ = reader.next() => panic!("there is nothing to read"),
            () = std::future::ready(()) => {}
        }
        port.write_all(b"anew").expect("it prints");
        assert_eq!(read(&mut reader, 4).await, b"anew");
    }

    /// Stands for QEMU: the other end of a serial port.
    struct Port {
        path: std::path::PathBuf,
        end: File,
    }

    fn port(dir: &Path, name: &str) -> Port {
        let path = dir.join(name);
        let end = make_pipe(&path).expect("a pipe");
        rustix::fs::fcntl_setfl(&end, OFlags::NONBLOCK).expect("it does not wait");
        Port { path, end: File::from(end) }
    }

    impl Port {
        async fn read(&mut self, wanted: usize) -> Vec<u8> {
            let mut all = vec![];
            while all.len() < wanted {
                let mut bytes = [0; 4096];
                match self.end.read(&mut bytes) {
                    Ok(count) => all.extend_from_slice(&bytes[..count]),
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::WouldBlock);
                        // Lets the runtime look at its descriptors.
                        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                    }
                }
            }
            all
        }
    }

    #[tokio::test]
    async fn what_is_typed_arrives_whole_or_is_reported() {
        let dir = tempfile::tempdir().expect("a folder");
        let console = Console::open(&dir.path().join("log")).expect("the console");
        let mut attached = console.attached();
        assert!(!*attached.borrow());
        let error = console.write(b"lost?").await.expect_err("nobody is there");
        assert!(matches!(error, Error::ConsoleDetached { delivered: 0, length: 5 }), "{error}");
        assert!(console.attach(&dir.path().join("no pipe")).is_err());

        let mut first = port(dir.path(), "first");
        console.attach(&first.path).expect("somebody reads");
        assert!(*attached.borrow_and_update());
        let mut tasks = tokio::task::JoinSet::new();
        for letter in *b"abc" {
            let console = console.clone();
            tasks.spawn(async move { console.write(&vec![letter; 100_000]).await });
        }
        let arrived = first.read(300_000).await;
        while let Some(written) = tasks.join_next().await {
            written.expect("the task").expect("delivered");
        }
        // Writes do not mix.
        assert_eq!(arrived.chunk_by(|a, b| a == b).count(), 3);

        // It ends, with somebody typing: what was taken is told.
        let writer = console.clone();
        let typing = tokio::spawn(async move { writer.write(&vec![b'x'; 1 << 20]).await });
        first.read(1).await;
        drop(first);
        attached.wait_for(|attached| !*attached).await.expect("the console lives");
        let error = typing.await.expect("the task").expect_err("it ended");
        assert!(matches!(error, Error::ConsoleDetached { delivered: 1.., length: 0x10_0000 }), "{error}");
        assert!(console.write(b"lost?").await.is_err());
    }

    #[tokio::test]
    async fn a_later_process_takes_over() {
        let dir = tempfile::tempdir().expect("a folder");
        let console = Console::open(&dir.path().join("log")).expect("the console");
        let (first, mut second) = (port(dir.path(), "first"), port(dir.path(), "second"));
        console.attach(&first.path).expect("somebody reads");
        console.attach(&second.path).expect("somebody reads");
        drop(first);
        console.write(b"x").await.expect("delivered");
        assert_eq!(second.read(1).await, b"x");
        assert!(*console.attached().borrow());
        // A pipe whose process is gone is not taken for one.
        let path = port(dir.path(), "third").path;
        assert!(console.attach(&path).is_err());
        // Nor is what was typed for an earlier process given to a later one of the same place.
        console.write(b"for the second").await.expect("delivered");
        let mut fourth = port(dir.path(), "second");
        console.attach(&fourth.path).expect("somebody reads");
        console.write(b"y").await.expect("delivered");
        assert_eq!(fourth.read(1).await, b"y");
    }
}
