//! A machine's memory out of QEMU and into it, as a byte stream.
//!
//! ```text
//!   capture, the guest running:  setup ── active ─ STOP ─ POINT ─ RESUME ─── pages ─── device state ── completed
//!                                                  └─ the pause ──┘
//!   capture, the guest stopped:  setup ── active ──────── POINT ──────────── pages ─── device state ── completed
//! ```
//!
//! The point is the moment whose memory is captured. With the guest running it lies between STOP and RESUME: no disk request is
//! outstanding there, and none is issued before RESUME is stamped. Only the first RESUME after `active` counts, and only if nothing else
//! stopped the guest in between; whoever captures gives no stop, cont or reset before [`Capture::point`] has returned.

use crate::error::{Error, Result};
use crate::process::{Identity, Process};
use crate::qemu::Qemu;
use crate::qmp::{Capability, Event, EventKind, Events, MigrationStatus, Stamp, Version};
use rustix::fs::{CWD, FileType, Mode, OFlags, fcntl_setfl, fstat, mknodat, open, unlink};
use rustix::pipe::fcntl_setpipe_size;
use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The name under which QEMU keeps its end of the stream.
const DESCRIPTOR: &str = "tenby-stream";

/// How far the wall clock may stray from the steady one in the window, microseconds, before stamps are no longer trusted. The gaps
/// around the point are milliseconds.
const CLOCK_TOLERANCE: u64 = 500;

/// The stream of a background capture, in the run folder: a named pipe. QEMU itself holds a reading end of it, so that it does not
/// break when the worker dies; whoever comes next reads it to its end ([`drain`]).
const PIPE: &str = "capture.pipe";

/// What fits into it, bytes; what an unprivileged user may ask for.
const PIPE_SIZE: usize = 1 << 20;

/// The name under which QEMU keeps that reading end.
const KEEPER: &str = "tenby-stream-keeper";

/// The source's end of the stream of a lazy restore, which QEMU itself keeps open too, so that it does not break when the worker dies; whoever
/// comes next takes it over ([`lent`]). Under this name QEMU keeps it; in the run folder this file has its inode.
const LENDER: &str = "tenby-memory";

/// The first QEMU that captures a guest in the background who stands still, and leaves him standing: 7.2 lets him run.
const STANDING: Version = Version { major: 9, minor: 0, micro: 0 };

/// How long a guest may stand still for the rest of a [`CaptureMode::Converging`], as far as QEMU can tell before.
const DOWNTIME: Duration = Duration::from_millis(20);

/// After so long without an end, twice that; and so on.
const LONGER_EVERY: Duration = Duration::from_secs(3);

/// How often it is asked whether QEMU has cleaned up.
const SETTLE_EVERY: Duration = Duration::from_millis(1);

/// How memory is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaptureMode {
    /// The guest runs on; its memory as of one moment is written (QEMU's `background-snapshot`). Also for a guest that stands
    /// still, who then may run again as soon as the first page has arrived ([`Capture::release`]). Not every QEMU and host
    /// can: see [`Qemu::captures_in_background`].
    Background,
    /// For a guest that runs, where the host does not let QEMU track memory: all of it is written while the guest runs on, and again what it has
    /// changed meanwhile, until little is left; for that it stands still ([`Capture::converged`]). It stays so: [`Qemu::resume`] lets it run on.
    Converging,
    /// For a guest that stands still and stays so until the end. The quicker way, and it needs nothing of the host; but it leaves the guest
    /// in a state in which it can be resumed, not captured again: see [`Qemu::pause_anew`].
    Stopped,
}

/// Between these two moments lies the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// The guest stood still from here on.
    pub stopped: Stamp,
    /// No disk request was issued before this.
    pub resumed: Stamp,
}

impl Point {
    /// How long the guest stood still, microseconds.
    pub fn pause_micros(&self) -> u64 {
        self.resumed.micros_since(self.stopped)
    }
}

/// A capture under way. One in the background cannot be broken off: its stream must be read to the end, whatever becomes of it.
/// (QEMU 7.2 leaves the guest's memory protected for good if it is; and in any version QEMU's main loop may at that moment be
/// waiting for a page that only the capture can release.)
#[derive(Debug)]
pub struct Capture {
    qemu: Qemu,
    events: Events,
    reader: Option<Stream>,
    mode: CaptureMode,
    course: Course,
    was_running: bool,
    clock: ClockPair,
}

/// The stream of a capture. Blocks.
#[derive(Debug)]
pub struct Stream(File);

impl Stream {
    /// Reads what is left and throws it away.
    pub fn drain(&mut self) {
        let mut bytes = vec![0; 1 << 20];
        // An error is an end, too: there is nobody to tell.
        while self.0.read(&mut bytes).is_ok_and(|length| length > 0) {}
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Qemu {
    /// Whether a running guest can be captured while it runs. Otherwise it must stand still meanwhile ([`CaptureMode::Stopped`]).
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason: the host does not let QEMU track memory.
    pub fn captures_in_background(&self) -> Result<()> {
        crate::probe::userfaultfd().map_err(Error::Unsupported)
    }

    /// Whether this guest, who stands still, can be captured in the background.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason: as above, this QEMU is too old, or the guest has never run (QEMU 10.0 aborts then).
    pub async fn captures_standing(&self) -> Result<()> {
        let version = self.qmp().version();
        if version < STANDING {
            return Err(Error::Unsupported(format!(
                "QEMU {version} cannot capture a guest that stands still and leave it so"
            )));
        }
        if self.qmp().status().await?.status == "prelaunch" {
            return Err(Error::Unsupported("a guest that has never run is captured while it stands still only".into()));
        }
        self.captures_in_background()
    }

    /// Begins to capture the machine's memory. Give [`Capture::reader`] to a thread at once: a reader that stalls stalls the guest.
    /// Disks must be prepared before this is called.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the mode is not possible, [`Error::Refused`] with QEMU's words (another migration is under way, a device cannot
    /// be captured). Nothing has happened then.
    pub async fn capture(&self, mode: CaptureMode) -> Result<Capture> {
        let qmp = self.qmp();
        let was_running = qmp.status().await?.running;
        match mode {
            CaptureMode::Background if was_running => self.captures_in_background()?,
            CaptureMode::Background => self.captures_standing().await?,
            CaptureMode::Stopped if was_running => {
                return Err(Error::Unsupported("a running guest is captured in the background only".into()));
            }
            CaptureMode::Converging if !was_running => {
                return Err(Error::Unsupported("a guest that stands still is captured as it is".into()));
            }
            CaptureMode::Stopped | CaptureMode::Converging => {}
        }
        settle(self).await?;
        // A process that was restored lazily refuses the one while the other is set.
        let background = mode == CaptureMode::Background;
        qmp.set_capabilities(&[
            (Capability::PostcopyRam, false),
            (Capability::BackgroundSnapshot, background),
            (Capability::PauseBeforeSwitchover, mode == CaptureMode::Converging),
        ])
        .await?;
        // The default is 128 MiB/s. In the background there is no limit at all.
        qmp.set_bandwidth(1 << 40).await?;
        qmp.set_downtime(DOWNTIME).await?;
        let (reader, theirs) = match mode {
            CaptureMode::Background => {
                let pipe = pipe(self.run_dir())?;
                qmp.pass(KEEPER, pipe.keeper).await?;
                (pipe.reader, pipe.writer)
            }
            CaptureMode::Stopped | CaptureMode::Converging => {
                let (ours, theirs) = UnixStream::pair().map_err(Error::io("make a socket"))?;
                (OwnedFd::from(ours), OwnedFd::from(theirs))
            }
        };
        let reader = Some(Stream(File::from(reader)));
        let events = qmp.events();
        let clock = ClockPair::now();
        qmp.pass(DESCRIPTOR, theirs).await?;
        qmp.migrate_to(DESCRIPTOR).await?;
        Ok(Capture { qemu: self.clone(), events, reader, mode, course: Course::default(), was_running, clock })
    }

    /// Makes an ordinary pause of what [`CaptureMode::Stopped`] leaves, by letting the guest run for a moment; does nothing else. Not for a
    /// guest that will be taken back to what was captured.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn pause_anew(&self) -> Result<()> {
        if self.qmp().status().await?.status == "postmigrate" {
            self.resume().await?;
            self.pause().await?;
        }
        Ok(())
    }

    /// Begins to restore memory into a process launched with [`crate::Launch::incoming`]. Give [`Restore::writer`] to a thread at once.
    ///
    /// # Errors
    /// [`Error::Refused`] with QEMU's words.
    pub async fn restore(&self, mode: RestoreMode) -> Result<Restore> {
        let qmp = self.qmp();
        let lazy = mode == RestoreMode::Lazy;
        qmp.set_capabilities(&[(Capability::BackgroundSnapshot, false), (Capability::PostcopyRam, lazy)]).await?;
        let (writer, theirs) = UnixStream::pair().map_err(Error::io("make a socket"))?;
        if lazy {
            self.keep_lender(&writer).await?;
        }
        let events = qmp.events();
        qmp.pass(DESCRIPTOR, OwnedFd::from(theirs)).await?;
        qmp.migrate_from(DESCRIPTOR).await?;
        Ok(Restore { qemu: self.clone(), events, writer: Some(writer), mode })
    }

    /// QEMU keeps the source's end open, and whoever comes after us finds it.
    async fn keep_lender(&self, end: &UnixStream) -> Result<()> {
        let path = self.run_dir().join(LENDER);
        let inode = fstat(end).map_err(Error::os("look at a socket"))?.st_ino;
        std::fs::write(&path, inode.to_string()).map_err(Error::io(Error::at("write", &path)))?;
        let kept = end.try_clone().map_err(Error::io("keep a socket"))?;
        self.qmp().pass(LENDER, OwnedFd::from(kept)).await
    }

    /// All of the memory has arrived, or nobody will bring it: its stream need not be kept any more. No error if it was not.
    pub async fn let_lender_go(&self) {
        let _ = unlink(self.run_dir().join(LENDER));
        let _ = self.qmp().close(LENDER).await;
    }

    /// Takes up a lazy restore whose stream has broken, with a new one; `None` if it has ended meanwhile.
    ///
    /// # Errors
    /// [`Error::Refused`] with QEMU's words; those of the monitor.
    pub async fn restore_again(&self) -> Result<Option<Restore>> {
        self.let_lender_go().await;
        loop {
            match self.qmp().migration().await?.status {
                MigrationStatus::PostcopyPaused => break,
                MigrationStatus::PostcopyActive | MigrationStatus::PostcopyRecover => {
                    tokio::time::sleep(SETTLE_EVERY).await;
                }
                _ => return Ok(None),
            }
        }
        let (writer, theirs) = UnixStream::pair().map_err(Error::io("make a socket"))?;
        self.keep_lender(&writer).await?;
        let events = self.events();
        self.qmp().pass(DESCRIPTOR, OwnedFd::from(theirs)).await?;
        self.qmp().migrate_again(DESCRIPTOR).await?;
        Ok(Some(Restore { qemu: self.clone(), events, writer: Some(writer), mode: RestoreMode::Lazy }))
    }

    /// A restore that goes on: to wait for its end.
    pub fn restoring(&self) -> Restore {
        Restore { qemu: self.clone(), events: self.events(), writer: None, mode: RestoreMode::Lazy }
    }
}

/// The source's end of the stream over which a QEMU gets its memory, of which the worker that lent it has died; `None` if there is none. To be
/// asked before QEMU is asked for anything: it may wait for a page, and not answer.
///
/// # Errors
/// [`Error::Io`] if it cannot be taken over (not everybody may take a descriptor of another process): see [`Qemu::restore_again`].
pub fn lent(identity: Identity, run_dir: &Path) -> Result<Option<UnixStream>> {
    let Ok(inode) = std::fs::read_to_string(run_dir.join(LENDER)) else { return Ok(None) };
    let Some(process) = Process::adopt(identity)? else { return Ok(None) };
    let taken = process.take_socket(&inode)?;
    Ok(taken.map(UnixStream::from))
}

impl Capture {
    /// The stream, for a thread that does nothing but read it, to its end ([`Stream::drain`]). What comes of it: closing the stream of
    /// a [`CaptureMode::Stopped`] makes it fail; that of a background capture must not be closed.
    ///
    /// # Panics
    /// If it was taken before.
    pub fn reader(&mut self) -> Stream {
        self.reader.take().expect("the reader is taken once")
    }

    /// A moment that certainly lies before the point, if one can still be told: requests received before it belong to what is captured.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn before_point(&self) -> Result<Option<Stamp>> {
        let asked = Stamp::now();
        let status = self.qemu.qmp().migration().await?.status;
        Ok((status == MigrationStatus::Setup).then_some(asked))
    }

    /// Waits for the point of a guest that was running. Nothing is lost if the future is dropped.
    ///
    /// # Errors
    /// [`Error::Migration`] if there is none: the capture failed, or something else stopped or reset the guest meanwhile, or the clock was set. The
    /// capture is cancelled then and the guest runs on, if nothing but the capture stopped it.
    pub async fn point(&mut self) -> Result<Point> {
        loop {
            match self.course.point() {
                Err(reason) => return Err(self.abandon("interrupted", reason).await),
                Ok(Some(point)) if self.clock.strayed() > CLOCK_TOLERANCE => {
                    let reason = format!(
                        "the host's clock was set while the guest stood still (a pause of {} µs)",
                        point.pause_micros()
                    );
                    return Err(self.abandon("interrupted", reason).await);
                }
                Ok(Some(point)) => return Ok(point),
                Ok(None) => {}
            }
            if let Some(end) = self.course.end {
                let (how, reason) = self.reason(end).await;
                return Err(self.abandon(how, reason).await);
            }
            self.step().await?;
        }
    }

    /// Waits until so little is left to be written that the guest stands still for it ([`CaptureMode::Converging`]): its disks have drained. A guest
    /// that changes more than can be written is held up longer the longer this takes. [`Capture::go_on`] writes the rest. Since when it stands still.
    /// Nothing is lost if the future is dropped.
    ///
    /// # Errors
    /// As [`Capture::finished`].
    pub async fn converged(&mut self) -> Result<Stamp> {
        let mut downtime = DOWNTIME;
        let mut longer = tokio::time::interval_at(tokio::time::Instant::now() + LONGER_EVERY, LONGER_EVERY);
        loop {
            if self.course.waits {
                return Ok(self.course.stopped.unwrap_or_else(Stamp::now));
            }
            if let Some(end) = self.course.end {
                let (how, reason) = self.reason(end).await;
                return Err(self.abandon(how, reason).await);
            }
            tokio::select! {
                stepped = self.step() => stepped?,
                _ = longer.tick() => {
                    downtime *= 2;
                    self.qemu.qmp().set_downtime(downtime).await?;
                }
            }
        }
    }

    /// Writes what is left, see [`Capture::converged`].
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn go_on(&self) -> Result<()> {
        self.qemu.qmp().migrate_continue().await
    }

    /// Waits until QEMU has written everything. The stream must be read meanwhile. Nothing is lost if the future is dropped.
    ///
    /// # Errors
    /// [`Error::Migration`]: it failed or was cancelled. The guest runs on if it ran before.
    pub async fn finished(&mut self) -> Result<()> {
        loop {
            match self.course.end {
                Some(MigrationStatus::Completed) => return settle(&self.qemu).await,
                Some(end) => {
                    let (how, reason) = self.reason(end).await;
                    return Err(self.abandon(how, reason).await);
                }
                None => self.step().await?,
            }
        }
    }

    /// Ends the capture; the guest runs on if it ran before. What is read from the stream afterwards means nothing, but it must be
    /// read: one in the background goes on to its end.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn cancel(&mut self) -> Result<()> {
        if let Some(mut reader) = self.reader.take() {
            std::thread::spawn(move || reader.drain());
        }
        if self.course.end.is_none() && self.mode != CaptureMode::Background {
            self.qemu.qmp().migrate_cancel().await?;
        }
        while self.course.end.is_none() {
            self.step().await?;
        }
        self.let_go().await?;
        settle(&self.qemu).await?;
        self.let_run_on().await
    }

    /// The pipe is not needed any more.
    async fn let_go(&self) -> Result<()> {
        if self.mode == CaptureMode::Background {
            self.qemu.qmp().close(KEEPER).await?;
            // A pipe that stays is replaced by the next one.
            let _ = unlink(self.qemu.run_dir().join(PIPE));
        }
        Ok(())
    }

    /// Lets a guest that was standing still run while its memory is still being written ([`CaptureMode::Background`]): to be called once the
    /// first page has arrived on the stream.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn release(&self) -> Result<()> {
        // This round trip makes sure that QEMU's own step after the point has been taken: it would put the run state back.
        self.qemu.qmp().migration().await?;
        self.qemu.resume().await
    }

    async fn step(&mut self) -> Result<()> {
        match self.events.next().await {
            Ok(event) => self.course.take(&event),
            Err(Error::Disconnected) => return Err(self.qemu.ended().await),
            Err(error) => {
                self.course.disturbed.get_or_insert_with(|| error.to_string());
                self.resync().await?;
            }
        }
        Ok(())
    }

    /// Events were missed: only the end can still be told.
    async fn resync(&mut self) -> Result<()> {
        let status = self.qemu.qmp().migration().await?.status;
        self.course.take_status(status);
        Ok(())
    }

    async fn reason(&self, end: MigrationStatus) -> (&'static str, String) {
        let how = if end == MigrationStatus::Cancelled { "cancelled" } else { "failed" };
        let info = self.qemu.qmp().migration().await.unwrap_or_default();
        (how, info.error_desc.unwrap_or_else(|| "QEMU gives no reason".into()))
    }

    async fn abandon(&mut self, how: &'static str, reason: String) -> Error {
        match self.cancel().await {
            Ok(()) => Error::Migration { how, reason },
            Err(error) => error,
        }
    }

    /// QEMU does not restart a guest that it stopped for a capture which then failed.
    async fn let_run_on(&self) -> Result<()> {
        let failed = self.course.end != Some(MigrationStatus::Completed);
        let ours = self.was_running && failed && !self.course.stopped_by_others;
        if ours && self.qemu.qmp().status().await?.status == "paused" {
            self.qemu.resume().await?;
        }
        Ok(())
    }
}

/// The ends of a new pipe.
struct Pipe {
    reader: OwnedFd,
    keeper: OwnedFd,
    writer: OwnedFd,
}

fn pipe(run_dir: &Path) -> Result<Pipe> {
    let path = run_dir.join(PIPE);
    let fail = || Error::at("make the pipe", &path);
    match unlink(&path) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(Error::os(fail())(error)),
    }
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).map_err(Error::os(fail()))?;
    let reader = open_reader(&path)?;
    let keeper = open_reader(&path)?;
    let writer = open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).map_err(Error::os(fail()))?;
    // QEMU writes page by page: the more it can write ahead, the shorter the guest waits. A limit of the host leaves it as it is.
    let _ = fcntl_setpipe_size(&reader, PIPE_SIZE);
    Ok(Pipe { reader, keeper, writer })
}

/// A reading end that blocks, opened without waiting for a writer.
fn open_reader(path: &PathBuf) -> Result<OwnedFd> {
    let fail = || Error::at("open the pipe", path);
    let reader =
        open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).map_err(Error::os(fail()))?;
    fcntl_setfl(&reader, OFlags::empty()).map_err(Error::os(fail()))?;
    Ok(reader)
}

/// Reads to its end, in the background, the stream of a capture whose worker has died: until then QEMU and its guest may hang.
pub(crate) fn drain(run_dir: &Path) {
    let path = run_dir.join(PIPE);
    if let Ok(reader) = open_reader(&path) {
        std::thread::spawn(move || {
            Stream(File::from(reader)).drain();
            let _ = unlink(&path);
        });
    }
}

/// QEMU reports an end before it has cleaned up after it, and until then refuses to run the guest or to begin anew. The cleaning
/// ends with its giving up the means to break the connection by force (`yank`). Waits for nothing if a migration is under way.
async fn settle(qemu: &Qemu) -> Result<()> {
    while qemu.qmp().migration_held().await? && qemu.qmp().migration().await?.status.is_end() {
        tokio::time::sleep(SETTLE_EVERY).await;
    }
    Ok(())
}

/// What a capture's events tell. Pure.
#[derive(Debug, Default)]
struct Course {
    active: bool,
    stopped: Option<Stamp>,
    resumed: Option<Stamp>,
    disturbed: Option<String>,
    stopped_by_others: bool,
    /// QEMU waits for an order to write the rest.
    waits: bool,
    end: Option<MigrationStatus>,
}

impl Course {
    fn take(&mut self, event: &Event) {
        match &event.kind {
            EventKind::Migration(status) => self.take_status(*status),
            _ if self.resumed.is_some() => {}
            EventKind::Stop if self.active && self.stopped.is_none() => self.stamp(event, |course| &mut course.stopped),
            EventKind::Resume if self.stopped.is_some() => self.stamp(event, |course| &mut course.resumed),
            kind => {
                self.stopped_by_others |= *kind == EventKind::Stop;
                if let Some(cause) = disturbance(kind) {
                    self.disturbed.get_or_insert_with(|| cause.into());
                }
            }
        }
    }

    fn take_status(&mut self, status: MigrationStatus) {
        match status {
            MigrationStatus::Active => self.active = true,
            MigrationStatus::PreSwitchover => self.waits = true,
            end if end.is_end() => self.end = Some(end),
            _ => {}
        }
    }

    fn stamp(&mut self, event: &Event, field: impl Fn(&mut Self) -> &mut Option<Stamp>) {
        match event.at {
            Some(at) => *field(self) = Some(at),
            None => self.disturbed = Some("QEMU could not read the clock".into()),
        }
    }

    /// The point, if it is known; an error if there will be none.
    fn point(&self) -> Result<Option<Point>, String> {
        match (&self.disturbed, self.stopped, self.resumed) {
            (Some(cause), ..) => Err(cause.clone()),
            (None, Some(stopped), Some(resumed)) => Ok(Some(Point { stopped, resumed })),
            (None, ..) if self.end == Some(MigrationStatus::Completed) => {
                Err("it completed without letting the guest run on".into())
            }
            _ => Ok(None),
        }
    }
}

/// Why a guest stopped, ran or began anew by something else than the capture.
fn disturbance(kind: &EventKind) -> Option<&'static str> {
    match kind {
        EventKind::Stop => Some("the guest was stopped by something else"),
        EventKind::Resume => Some("the guest was resumed by something else"),
        EventKind::Shutdown { .. } => Some("the guest shut down"),
        EventKind::Reset { .. } => Some("the guest was reset"),
        EventKind::GuestPanicked => Some("the guest panicked"),
        EventKind::BlockIoError { stops: true, .. } => Some("a disk failed"),
        _ => None,
    }
}

/// The wall clock beside the steady one.
#[derive(Debug, Clone, Copy)]
struct ClockPair {
    wall: u64,
    steady: u64,
}

impl ClockPair {
    fn now() -> Self {
        let read = |id| {
            let time = clock_gettime(id);
            time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
        };
        // The steady clock is read around the wall clock: a preemption in between is not a step.
        let (before, wall, after) = (read(ClockId::Monotonic), read(ClockId::Realtime), read(ClockId::Monotonic));
        if after - before > CLOCK_TOLERANCE / 2 { Self::now() } else { Self { wall, steady: before } }
    }

    /// By how much the wall clock was set since then, microseconds; what a clock is slewed (500 ppm at most) does not count.
    fn strayed(self) -> u64 {
        let now = Self::now();
        let steady = now.steady - self.steady;
        let wall = now.wall as i64 - self.wall as i64;
        wall.abs_diff(steady as i64).saturating_sub(steady / 2000)
    }
}

/// How memory is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestoreMode {
    /// All of it before the guest can run.
    Eager,
    /// The guest can run as soon as its devices are loaded; pages follow, first those it asks for (QEMU's postcopy). The stream is written and read.
    Lazy,
}

/// A restore under way.
#[derive(Debug)]
pub struct Restore {
    qemu: Qemu,
    events: Events,
    writer: Option<UnixStream>,
    mode: RestoreMode,
}

impl Restore {
    /// The stream, for a thread (it blocks).
    ///
    /// # Panics
    /// If it was taken before, or there is none.
    pub fn writer(&mut self) -> UnixStream {
        self.writer.take().expect("the writer is taken once")
    }

    /// Waits until the machine stands ready to run. Nothing is lost if the future is dropped.
    ///
    /// # Errors
    /// [`Error::Exited`] with QEMU's words if it could not load the stream; [`Error::Migration`].
    pub async fn loaded(&mut self) -> Result<()> {
        match self.mode {
            RestoreMode::Eager => self.reached(MigrationStatus::Completed).await,
            RestoreMode::Lazy => self.devices_loaded().await,
        }
    }

    /// Waits until the devices are loaded. No event tells; and QEMU does not answer while it loads them.
    async fn devices_loaded(&mut self) -> Result<()> {
        loop {
            match self.qemu.qmp().status().await {
                Ok(status) if status.status == "inmigrate" => tokio::time::sleep(SETTLE_EVERY).await,
                Ok(_) => return Ok(()),
                // QEMU ends when it cannot load a machine.
                Err(Error::Disconnected) => return Err(self.qemu.ended().await),
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until all pages are there.
    ///
    /// # Errors
    /// As [`Restore::loaded`].
    pub async fn finished(&mut self) -> Result<()> {
        self.reached(MigrationStatus::Completed).await
    }

    async fn reached(&mut self, wanted: MigrationStatus) -> Result<()> {
        let mut status = self.qemu.qmp().migration().await.map(|info| info.status);
        loop {
            match status {
                Ok(now) if now == wanted || now == MigrationStatus::Completed => return Ok(()),
                Ok(MigrationStatus::Failed) => {
                    let info = self.qemu.qmp().migration().await.unwrap_or_default();
                    let reason = info.error_desc.unwrap_or_else(|| "QEMU gives no reason".into());
                    return Err(Error::Migration { how: "failed", reason });
                }
                // QEMU ends when it cannot load a machine.
                Err(Error::Disconnected) => return Err(self.qemu.ended().await),
                Err(error @ (Error::Refused { .. } | Error::Protocol(_))) => return Err(error),
                // Under way; or events were missed, and the state is asked for below.
                Ok(_) | Err(_) => {}
            }
            status = match self.events.next().await {
                Ok(Event { kind: EventKind::Migration(status), .. }) => Ok(status),
                Ok(_) => Ok(MigrationStatus::Other),
                Err(Error::EventsMissed(_)) => self.qemu.qmp().migration().await.map(|info| info.status),
                Err(error) => Err(error),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Events by their initials: `s`etup `a`ctive `c`ompleted `f`ailed `x` cancelled, `S`TOP `R`ESUME, `P`anic, reset `0`, power `O`ff, I/O
    /// error `E`, one that was only reported `e`; each a microsecond after the one before.
    fn course(events: &str) -> Course {
        let mut course = Course::default();
        for (time, letter) in events.chars().enumerate() {
            let (name, data) = match letter {
                's' => ("MIGRATION", json!({ "status": "setup" })),
                'a' => ("MIGRATION", json!({ "status": "active" })),
                'c' => ("MIGRATION", json!({ "status": "completed" })),
                'f' => ("MIGRATION", json!({ "status": "failed" })),
                'x' => ("MIGRATION", json!({ "status": "cancelled" })),
                '?' => ("MIGRATION", json!({ "status": "a word of the future" })),
                'S' => ("STOP", json!(null)),
                'R' => ("RESUME", json!(null)),
                'P' => ("GUEST_PANICKED", json!({ "action": "pause" })),
                '0' => ("RESET", json!({ "guest": true, "reason": "guest-reset" })),
                'O' => ("SHUTDOWN", json!({ "guest": true, "reason": "guest-shutdown" })),
                'E' => ("BLOCK_IO_ERROR", json!({ "action": "stop", "node-name": "disk0" })),
                'e' => ("BLOCK_IO_ERROR", json!({ "action": "report", "node-name": "disk0" })),
                _ => ("RTC_CHANGE", json!({})),
            };
            course.take(&Event::new(name.into(), data, Some(time as u64)));
        }
        course
    }

    #[test]
    fn the_point_lies_between_the_first_stop_and_resume_after_active() {
        for (events, stopped, resumed) in
            [("saSR", 2, 3), ("saSRc", 2, 3), ("s?aeSrR", 4, 6), ("saSRSR", 2, 3), ("saSRPSO0E", 2, 3)]
        {
            let point = course(events).point().expect(events).expect(events);
            assert_eq!((point.stopped.micros(), point.resumed.micros()), (stopped, resumed), "{events}");
            assert_eq!(point.pause_micros(), resumed - stopped, "{events}");
        }
    }

    #[test]
    fn not_yet() {
        for events in ["", "s", "sa", "saS", "se", "saf", "saSx"] {
            assert_eq!(course(events).point(), Ok(None), "{events}");
        }
    }

    #[test]
    fn there_is_no_point() {
        // Stopped by others, before or after `active`; run again by others; a death, a reset, an outage in the window; no RESUME at all.
        for events in [
            "sS", "sSR", "sSaR", "sSaSR", "sRaSR", "saSSR", "saPS", "saSPR", "s0aSR", "saS0R", "saSOR", "saES", "sac",
            "saSc",
        ] {
            assert!(course(events).point().is_err(), "{events}");
        }
    }

    #[test]
    fn who_stopped_the_guest() {
        assert!(course("sS").stopped_by_others);
        assert!(course("saSS").stopped_by_others);
        assert!(!course("saSf").stopped_by_others);
        assert!(!course("s0aS").stopped_by_others);
        assert!(!course("saSRS").stopped_by_others);
    }

    #[test]
    fn the_end() {
        assert_eq!(course("saSR").end, None);
        assert_eq!(course("saSRc").end, Some(MigrationStatus::Completed));
        assert_eq!(course("saSf").end, Some(MigrationStatus::Failed));
        assert_eq!(course("sx").end, Some(MigrationStatus::Cancelled));
    }

    #[test]
    fn an_event_without_a_stamp_is_no_point() {
        let mut course = course("sa");
        course.take(&Event::new("STOP".into(), json!(null), None));
        course.take(&Event::new("RESUME".into(), json!(null), Some(7)));
        assert!(course.point().is_err());
    }

    #[test]
    fn a_clock_that_is_set() {
        let pair = ClockPair::now();
        // Nothing sets the clock of the machine under this test by so much.
        assert!(pair.strayed() < 60_000_000);
        let hour = 3_600_000_000;
        assert!(ClockPair { wall: pair.wall - hour, ..pair }.strayed() > hour / 2);
        assert!(ClockPair { wall: pair.wall + hour, ..pair }.strayed() > hour / 2);
    }
}
