//! Doing what may take long: on a thread of its own, with a bar for its user, who may end it with Ctrl-C.

use crate::out::Out;
use crate::session::cancelled;
use machine::request::Problem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// From here on people want to see that something is being done.
const LONG: Duration = Duration::from_secs(1);

/// Does something that says how far it is and stops when its progress says `false`: after Ctrl-C.
pub(crate) async fn interruptible<T: Send + 'static>(
    out: &Out,
    what: String,
    work: impl FnOnce(&mut dyn FnMut(u64, u64) -> bool) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let mut interrupt = interrupts()?;
    let stopped = Arc::new(AtomicBool::new(false));
    let (bar, began) = (out.progress(), Instant::now());
    let mut working = {
        let stopped = Arc::clone(&stopped);
        tokio::task::spawn_blocking(move || {
            work(&mut |done, total| {
                if began.elapsed() >= LONG {
                    bar.bytes(&what, done, total);
                }
                !stopped.load(Ordering::Relaxed)
            })
        })
    };
    let done = tokio::select! {
        done = &mut working => done,
        _ = interrupt.recv() => {
            stopped.store(true, Ordering::Relaxed);
            working.await
        }
    };
    done.map_err(broken)?
}

/// Looks at something, which may take long. It changes nothing and is left alone after Ctrl-C.
pub(crate) async fn look<T: Send + 'static>(
    out: &Out,
    what: String,
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let mut interrupt = interrupts()?;
    let bar = out.progress();
    let mut working = tokio::task::spawn_blocking(work);
    loop {
        tokio::select! {
            done = &mut working => return done.map_err(broken)?,
            _ = interrupt.recv() => return Err(cancelled(format!("{what} was cancelled; nothing was changed"))),
            () = tokio::time::sleep(LONG) => bar.say(&what),
        }
    }
}

fn interrupts() -> Result<Signal, Problem> {
    hear(SignalKind::interrupt())
}

fn hear(kind: SignalKind) -> Result<Signal, Problem> {
    signal(kind).map_err(|error| Problem::failed(format!("Ctrl-C cannot be heard: {error}")))
}

/// What the user of a command that waits for others wishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Ctrl-C: what it waits for is to be cancelled.
    Cancel,
    /// SIGTERM: it is to end, and leave that alone.
    Leave,
}

/// Hears these wishes. Whoever listens hears all that come from then on.
#[derive(Debug)]
pub(crate) struct Wishes {
    interrupt: Signal,
    terminate: Signal,
}

impl Wishes {
    pub(crate) fn hear() -> Result<Self, Problem> {
        Ok(Self { interrupt: interrupts()?, terminate: hear(SignalKind::terminate())? })
    }

    /// The next one.
    pub(crate) async fn next(&mut self) -> Wish {
        tokio::select! {
            _ = self.interrupt.recv() => Wish::Cancel,
            _ = self.terminate.recv() => Wish::Leave,
        }
    }

    /// Whether one has come that nobody has heard here yet.
    pub(crate) fn came(&mut self) -> bool {
        let mut now = Context::from_waker(Waker::noop());
        self.interrupt.poll_recv(&mut now).is_ready() || self.terminate.poll_recv(&mut now).is_ready()
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what an error is mapped with")]
fn broken(error: tokio::task::JoinError) -> Problem {
    Problem::failed(format!("the work broke off: {error}"))
}
