//! What the guest has asked for, and when.

use super::{Pace, SYNC, Trail};
use crate::stream::postcopy::{self, Answer};
use crate::stream::{Block, PAGE};
use crate::{Error, ErrorKind, Result};
use rustix::net::{RecvFlags, recv};
use std::collections::{BTreeMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A guest that has asked for nothing for so long is not held up by what it did not ask for.
const QUIET: Duration = Duration::from_millis(20);
/// Between two pieces of what a guest that is not quiet did not ask for.
const BREATH: Duration = Duration::from_millis(2);
/// When what could not be read is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How long another source waits for what QEMU has to say first.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is shared between the thread that sends, the one that hears, and who holds the handle.
#[derive(Debug, Default)]
pub(super) struct Asked {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    pace: Pace,
    /// Pages that were asked for: block, number in the block.
    pages: VecDeque<(usize, u64)>,
    /// When a page was last asked for, sent unasked, or tried in vain.
    asked_at: Option<Instant>,
    pushed_at: Option<Instant>,
    /// Until when nothing is sent unasked, unless somebody waits for all of it.
    rests_until: Option<Instant>,
    tried_at: Option<Instant>,
    /// What arrived earlier, by block, until it is taken.
    received: BTreeMap<String, Vec<u8>>,
    resumed: bool,
    /// The last piece that was sent, and the last that has arrived.
    sent: u32,
    arrived: u32,
    synced: bool,
    /// QEMU has hung up, or has said something unsound.
    deaf: bool,
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// This page of this block was asked for.
    Asked(usize, u64),
    /// Something that was not asked for can be sent.
    Push,
    /// It is time to try again what could not be read.
    Retry,
}

impl Asked {
    pub(super) fn raise_pace(&self, pace: Pace) {
        let mut state = self.state();
        state.pace = state.pace.max(pace);
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn rest(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut state = self.state();
        state.rests_until = state.rests_until.max(Some(until));
    }

    /// Whether the guest does not run yet.
    pub(super) fn is_loading(&self) -> bool {
        self.state().pace == Pace::OnDemand
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a guest waits for a page just now.
    pub(super) fn is_waiting(&self) -> bool {
        let state = self.state();
        state.deaf || !state.pages.is_empty()
    }

    /// Waits for what is to be done next. `more`: there is something that was not asked for; `unread`: something could not be read.
    pub(super) fn next(&self, more: bool, unread: bool) -> Result<Next> {
        let mut state = self.state();
        loop {
            state.check()?;
            if let Some((block, page)) = state.pages.pop_front() {
                return Ok(Next::Asked(block, page));
            }
            let now = Instant::now();
            let retry = unread.then(|| *state.tried_at.get_or_insert(now) + RETRY);
            if retry.is_some_and(|at| at <= now) {
                state.tried_at = Some(now);
                return Ok(Next::Retry);
            }
            let push = state.push_at(now).filter(|_| more);
            if push.is_some_and(|at| at <= now) {
                state.pushed_at = Some(now);
                return Ok(Next::Push);
            }
            let until = push.into_iter().chain(retry).min();
            state = match until {
                Some(until) => self.changed.wait_timeout(state, until - now).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Waits for what QEMU has of a block.
    pub(super) fn received(&self, block: &str) -> Result<Vec<u8>> {
        self.wait(|state| state.received.remove(block))
    }

    /// A piece is about to be sent.
    pub(super) fn sending(&self, number: u32) {
        self.state().sent = number;
    }

    /// Waits until QEMU has taken in everything: the last piece of which that was heard.
    pub(super) fn synced(&self) -> Result<u32> {
        self.wait(|state| state.synced.then_some(state.arrived))
    }

    /// Waits until QEMU takes pages again.
    pub(super) fn resumed(&self) -> Result<()> {
        self.wait(|state| state.resumed.then_some(()))
    }

    fn wait<T>(&self, mut has: impl FnMut(&mut State) -> Option<T>) -> Result<T> {
        let until = Instant::now() + PATIENCE;
        let mut state = self.state();
        loop {
            if let Some(it) = has(&mut state) {
                return Ok(it);
            }
            state.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Truncated, "QEMU does not say which pages it has"));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Hears QEMU to the end.
    pub(super) fn listen(&self, socket: &UnixStream, blocks: &[Block], trail: &Trail) -> Result<()> {
        let mut last = None;
        let heard = hear(socket, |answer| self.take(answer, blocks, &mut last, trail));
        self.state().deaf = true;
        self.changed.notify_all();
        heard
    }

    /// Notes what was said. `last` is the block of the last request.
    fn take(&self, answer: Answer, blocks: &[Block], last: &mut Option<usize>, trail: &Trail) -> Result<()> {
        match answer {
            Answer::Pages { block, start, len } => {
                if let Some(name) = block {
                    *last = blocks.iter().position(|block| block.name == name);
                }
                // Who has taken over does not know what the last block was: it comes with the rest.
                let Some(block) = *last else { return Ok(()) };
                if start.saturating_add(len.into()) > blocks[block].len {
                    let message = "QEMU asks for a page that the machine does not have";
                    return Err(Error::new(ErrorKind::Damaged, message));
                }
                let pages = start / PAGE as u64..(start + u64::from(len)).div_ceil(PAGE as u64);
                let mut state = self.state();
                state.asked_at = Some(Instant::now());
                state.pages.extend(pages.map(|page| (block, page)));
            }
            Answer::Received { block, bits } => drop(self.state().received.insert(block, bits)),
            Answer::Resumed => self.state().resumed = true,
            Answer::Pong(SYNC) => self.state().synced = true,
            Answer::Pong(number) => {
                // That an earlier one has arrived is told by the record of the next.
                if self.state().sent <= number {
                    trail.arrived(number)?;
                }
                self.state().arrived = number;
            }
            Answer::Shut(_) | Answer::Other => {}
        }
        self.changed.notify_all();
        Ok(())
    }
}

/// Hands out what QEMU says until it hangs up, or has all that it needs (or says in its own log why not). An answer is taken off the socket in one
/// go, once it was taken notice of: so who reads after us finds the next. (But for a bitmap, which is longer than a socket may hold, and comes only
/// when it was asked for.)
fn hear(socket: &UnixStream, mut take: impl FnMut(Answer) -> Result<()>) -> Result<()> {
    let failed = |error: rustix::io::Errno| postcopy::broken(error.into());
    loop {
        let mut seen = [0; 512];
        let (_, len) = recv(socket, &mut seen, RecvFlags::PEEK).map_err(failed)?;
        let mut rest = &seen[..len];
        let (answer, used) = match Answer::read(&mut rest) {
            Ok(answer @ Some(_)) => (answer, len - rest.len()),
            _ => (Answer::read(socket)?, 0),
        };
        let Some(answer) = answer else { return Ok(()) };
        let ends = matches!(answer, Answer::Shut(_));
        take(answer)?;
        if used > 0 {
            recv(socket, &mut [0; 512][..used], RecvFlags::empty()).map_err(failed)?;
        }
        if ends {
            return Ok(());
        }
    }
}

impl State {
    fn check(&self) -> Result<()> {
        match self.deaf {
            true => Err(Error::new(ErrorKind::Truncated, "QEMU has hung up before it had all of its memory")),
            false => Ok(()),
        }
    }

    /// When something may be sent that was not asked for.
    fn push_at(&self, now: Instant) -> Option<Instant> {
        match self.pace {
            Pace::OnDemand => None,
            Pace::Full => Some(now),
            Pace::Gentle => {
                let quiet = self.asked_at.is_none_or(|asked| now - asked >= QUIET);
                let breath = self.pushed_at.filter(|_| !quiet).map(|pushed| pushed + BREATH);
                Some(now).max(breath).max(self.rests_until)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_asked_for_waits() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let state = |pace| State { pace, ..State::default() };
        assert_eq!(state(Pace::OnDemand).push_at(now), None);
        assert_eq!(state(Pace::Gentle).push_at(now), Some(now));
        let busy = State { asked_at: Some(now), pushed_at: Some(now), ..state(Pace::Gentle) };
        assert_eq!(busy.push_at(now), Some(now + BREATH), "the guest asks");
        let rests = |pace| State { rests_until: Some(now + second), ..state(pace) };
        assert_eq!(rests(Pace::Gentle).push_at(now), Some(now + second), "others go first");
        assert_eq!(rests(Pace::Gentle).push_at(now + 2 * second), Some(now + 2 * second));
        assert_eq!(rests(Pace::Full).push_at(now), Some(now), "somebody waits");
        assert_eq!(rests(Pace::OnDemand).push_at(now), None);
    }
}
