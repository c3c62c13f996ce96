//! What the guest has asked for, and when.

use super::Pace;
use crate::stream::postcopy::Answer;
use crate::stream::{Block, PAGE};
use crate::{Error, ErrorKind, Result};
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
    given_up: bool,
    /// Pages that were asked for: block, number in the block.
    pages: VecDeque<(usize, u64)>,
    /// When a page was last asked for, sent unasked, or tried in vain.
    asked_at: Option<Instant>,
    pushed_at: Option<Instant>,
    tried_at: Option<Instant>,
    /// What arrived earlier, by block, until it is taken.
    received: BTreeMap<String, Vec<u8>>,
    resumed: bool,
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
    pub(super) fn set_pace(&self, pace: Pace) {
        self.state().pace = pace;
        self.changed.notify_all();
    }

    pub(super) fn give_up(&self) {
        self.state().given_up = true;
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
    pub(super) fn listen(&self, socket: &UnixStream, blocks: &[Block]) -> Result<()> {
        let heard = self.hear(socket, blocks);
        self.state().deaf = true;
        self.changed.notify_all();
        heard
    }

    fn hear(&self, socket: &UnixStream, blocks: &[Block]) -> Result<()> {
        let mut last = None;
        while let Some(answer) = Answer::read(socket)? {
            match answer {
                Answer::Pages { block, start, len } => {
                    if let Some(name) = block {
                        last = blocks.iter().position(|block| block.name == name);
                    }
                    let block = last.filter(|block| start.saturating_add(len.into()) <= blocks[*block].len);
                    let block = block.ok_or_else(|| {
                        Error::new(ErrorKind::Damaged, "QEMU asks for a page that the machine does not have")
                    })?;
                    let pages = start / PAGE as u64..(start + u64::from(len)).div_ceil(PAGE as u64);
                    let mut state = self.state();
                    state.asked_at = Some(Instant::now());
                    state.pages.extend(pages.map(|page| (block, page)));
                }
                Answer::Received { block, bits } => drop(self.state().received.insert(block, bits)),
                Answer::Resumed => self.state().resumed = true,
                // It has everything; or it says why not in its own log.
                Answer::Shut(_) => return Ok(()),
                Answer::Other => {}
            }
            self.changed.notify_all();
        }
        Ok(())
    }
}

impl State {
    fn check(&self) -> Result<()> {
        match (self.given_up, self.deaf) {
            (true, _) => Err(Error::new(ErrorKind::Truncated, "lending the memory was given up")),
            (_, true) => Err(Error::new(ErrorKind::Truncated, "QEMU has hung up before it had all of its memory")),
            _ => Ok(()),
        }
    }

    /// When something may be sent that was not asked for.
    fn push_at(&self, now: Instant) -> Option<Instant> {
        match self.pace {
            Pace::OnDemand => None,
            Pace::Full => Some(now),
            Pace::Gentle => {
                let quiet = self.asked_at.is_none_or(|asked| now - asked >= QUIET);
                Some(if quiet { now } else { self.pushed_at.map_or(now, |pushed| pushed + BREATH) })
            }
        }
    }
}
