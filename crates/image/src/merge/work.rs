//! What folds in both directions share: how far they are, who is told, and when they make way for the guest.

use super::{FoldError, Outcome, Progress};
use crate::chain::{Chain, Slot};
use crate::{Error, Result};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Data moves in pieces of this many bytes.
pub(super) const PIECE: u64 = 1 << 20;
/// Beside a guest, what was copied is synced whenever it is this many bytes: a flush of the guest may have to wait for that.
const DIRTY: u64 = 384 << 10;
/// How often to ask whether the push above a layer has been settled.
const PATIENCE: Duration = Duration::from_millis(5);
/// The longest rest after a piece.
const REST: Duration = Duration::from_millis(100);

/// Why copying stopped early.
pub(super) enum Stop {
    Cancelled,
    /// A snapshot is being taken: what belongs into the child is open until that is settled.
    Again,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

pub(super) struct Work<'a> {
    pub(super) chain: &'a Chain,
    /// Somebody reads and writes the chain meanwhile.
    pub(super) live: bool,
    pub(super) progress: Progress,
    pub(super) buffer: Vec<u8>,
    report: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    /// Bytes copied since the last sync.
    dirty: u64,
    /// Bytes that were done when it was said last that all is durable.
    said: u64,
    /// The chain's requests, and when, at the end of the last piece.
    requests: u64,
    since: Instant,
}

impl<'a> Work<'a> {
    pub(super) fn new(chain: &'a Chain, live: bool, report: &'a mut dyn FnMut(Progress) -> ControlFlow<()>) -> Self {
        let (progress, buffer) = (Progress::default(), vec![0; PIECE as usize]);
        let (requests, since) = (chain.requests(), Instant::now());
        Self { chain, live, progress, buffer, report, dirty: 0, said: 0, requests, since }
    }

    /// A pass begins, of which so many bytes are done.
    pub(super) fn begin_pass(&mut self, done: u64, left: u64) -> Result<(), Stop> {
        self.progress.done += done;
        self.said = self.progress.done;
        self.progress.total = self.progress.done + left;
        self.tell()
    }

    /// So many bytes were moved.
    pub(super) fn moved(&mut self, bytes: u64) {
        self.progress.done += bytes;
        self.dirty += bytes;
    }

    /// Between two pieces, while nothing is held.
    pub(super) fn tell(&mut self) -> Result<(), Stop> {
        self.make_way();
        self.progress.total = self.progress.total.max(self.progress.done);
        let told = (self.report)(self.progress);
        self.since = Instant::now();
        match told {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Stop::Cancelled),
        }
    }

    /// After a piece was copied into `target`: makes it durable now and then. Whether all is durable now, and `every` bytes more than when that was
    /// said last.
    pub(super) fn sync_copied(&mut self, target: &Slot, every: u64) -> Result<bool> {
        if self.dirty < if self.live { DIRTY.min(every) } else { every } {
            return Ok(false);
        }
        target.sync()?;
        self.dirty = 0;
        let said = self.progress.done - self.said >= every;
        if said {
            self.said = self.progress.done;
        }
        Ok(said)
    }

    /// Until what is open is settled.
    pub(super) fn wait(&mut self) -> Result<(), Stop> {
        std::thread::sleep(PATIENCE);
        self.tell()
    }

    /// Beside requests of a guest the disk is ours for six sevenths of the time at most.
    fn make_way(&mut self) {
        let requests = self.chain.requests();
        if self.live && std::mem::replace(&mut self.requests, requests) != requests {
            std::thread::sleep((self.since.elapsed() / 6).min(REST));
        }
    }
}

/// What a fold comes to that ended like this; `Ok` of the commit's result.
pub(super) fn outcome<E>(ended: Result<Result<(), E>, Stop>) -> Result<Outcome, FoldError<E>> {
    match ended {
        Ok(committed) => committed.map(|()| Outcome::Folded).map_err(FoldError::Commit),
        Err(Stop::Cancelled | Stop::Again) => Ok(Outcome::Cancelled),
        Err(Stop::Failed(error)) => Err(error.into()),
    }
}
