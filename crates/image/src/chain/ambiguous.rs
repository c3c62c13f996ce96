//! Requests whose side of a point in time is not yet known.
//!
//! ```text
//!   push_ambiguous        settle_before(t)            finish(point)
//!        │  a   b   c   d       │      e   f   ┊   g       │
//!        └──────────────────────┴──────────────┊───────────┘──► time
//!   old leaf:          a b c d ◄┘           e f┊◄──────────┘     then synced, never written again
//!   new leaf:  a   b   c   d           e   f   ┊   g
//! ```
//!
//! The new leaf gets everything at once and shadows the old one, so what is written to the old leaf is never seen through this chain.

use super::slot::Slot;
use super::{Chain, Received, invalid, locked};
use crate::Result;
use crate::merge::FoldError;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// What a logged request costs beside its data, bytes.
const OVERHEAD: u64 = size_of::<Request>() as u64;

#[derive(Debug)]
struct Request {
    received: Received,
    offset: u64,
    change: Logged,
}

#[derive(Debug)]
enum Logged {
    Data(Vec<u8>),
    Zero(u64),
}

impl Request {
    fn bytes(&self) -> u64 {
        OVERHEAD
            + match &self.change {
                Logged::Data(data) => data.len() as u64,
                Logged::Zero(_) => 0,
            }
    }

    fn apply(&self, slot: &Slot) -> Result<()> {
        match &self.change {
            Logged::Data(data) => slot.copy_in(data, self.offset).map(|_| ()),
            Logged::Zero(len) => slot.copy_zeros(self.offset, *len),
        }
    }
}

/// Requests in the order in which they took effect.
#[derive(Debug)]
pub(crate) struct Log {
    limit: u64,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    requests: VecDeque<Request>,
    bytes: u64,
    /// Something is missing: it is of no use any more.
    void: bool,
}

impl Log {
    pub(crate) fn new(limit: u64) -> Self {
        Self { limit, inner: Mutex::default() }
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8], received: Received) {
        // The bound holds before the copy is made.
        if self.has_room(data.len() as u64) {
            self.push(Request { received, offset, change: Logged::Data(data.to_vec()) });
        }
    }

    pub(crate) fn zero(&self, offset: u64, len: u64, received: Received) {
        if self.has_room(0) {
            self.push(Request { received, offset, change: Logged::Zero(len) });
        }
    }

    fn has_room(&self, bytes: u64) -> bool {
        let mut inner = locked(&self.inner);
        if inner.bytes + bytes + OVERHEAD > self.limit {
            *inner = Inner { void: true, ..Inner::default() };
        }
        !inner.void
    }

    fn push(&self, request: Request) {
        let mut inner = locked(&self.inner);
        if !inner.void {
            inner.bytes += request.bytes();
            inner.requests.push_back(request);
        }
    }

    fn is_void(&self) -> bool {
        locked(&self.inner).void
    }

    fn void(&self) {
        *locked(&self.inner) = Inner { void: true, ..Inner::default() };
    }

    /// Takes the first request if it came in before `time`.
    fn pop_before(&self, time: Received) -> Option<Request> {
        let mut inner = locked(&self.inner);
        if inner.requests.front()?.received >= time {
            return None;
        }
        let request = inner.requests.pop_front()?;
        inner.bytes -= request.bytes();
        Some(request)
    }

    fn pop(&self) -> Option<Request> {
        self.pop_before(Received(u64::MAX))
    }
}

/// A push whose point in time is not yet known. See the module's text.
///
/// Dropping it ends the logging and leaves the new leaf in place; the old one then lacks what [`Ambiguous::finish`] would have
/// written, and only [`Chain::pop_leaf`] is left.
#[derive(Debug)]
pub struct Ambiguous {
    chain: Arc<Chain>,
    old: Arc<Slot>,
    log: Arc<Log>,
    /// The push is over, one way or the other; a later one is none of our business.
    over: bool,
}

impl Ambiguous {
    pub(super) fn new(chain: Arc<Chain>, old: Arc<Slot>, log: Arc<Log>) -> Self {
        Self { chain, old, log, over: false }
    }

    /// Whether more came in than the log may hold (or the old leaf failed). Requests are still served, but only
    /// [`Ambiguous::cancel`] is left.
    pub fn is_full(&self) -> bool {
        self.log.is_void()
    }

    /// Bytes that the log holds now.
    pub fn logged(&self) -> u64 {
        locked(&self.log.inner).bytes
    }

    /// The point is not before `time`: what came in earlier goes to the old leaf now and leaves the log.
    ///
    /// It stops at the first request that came in later, so that requests reach the old leaf in the order in which they took
    /// effect; what stands behind it waits for the next call.
    pub fn settle_before(&mut self, time: Received) -> Result<()> {
        self.check()?;
        while let Some(request) = self.log.pop_before(time) {
            request.apply(&self.old).inspect_err(|_| self.log.void())?;
        }
        self.check()
    }

    /// The point is `point`: what came in before it goes to the old leaf too, in order; the rest is the new leaf's alone. Nothing is
    /// logged any more. When this returns the old leaf is durable and is not written again. After an error: [`Ambiguous::cancel`].
    pub fn finish(&mut self, point: Received) -> Result<()> {
        if self.over {
            return Err(invalid("the point was set before"));
        }
        self.chain.stop_logging();
        self.check()?;
        while let Some(request) = self.log.pop() {
            if request.received < point {
                request.apply(&self.old).inspect_err(|_| self.log.void())?;
            }
        }
        self.chain.sync_slot(&self.old).inspect_err(|_| self.log.void())?;
        self.let_go();
        Ok(())
    }

    /// There is no point: the new leaf is folded back into the old one and taken away, as [`Chain::pop_leaf`] does.
    pub fn cancel<E>(mut self, commit: impl FnOnce() -> Result<(), E>) -> Result<Arc<dyn crate::Layer>, FoldError<E>> {
        self.let_go();
        self.chain.pop_leaf(commit)
    }

    fn let_go(&mut self) {
        if !std::mem::replace(&mut self.over, true) {
            self.chain.settled();
        }
    }

    fn check(&self) -> Result<()> {
        if self.log.is_void() {
            return Err(invalid("more was written around the point than can be kept"));
        }
        Ok(())
    }
}

impl Drop for Ambiguous {
    fn drop(&mut self) {
        self.let_go();
    }
}
