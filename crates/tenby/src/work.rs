//! Doing what may take long: on a thread of its own, with a bar for its user, who may end it with Ctrl-C.

use crate::out::Out;
use crate::session::cancelled;
use machine::request::Problem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
    signal(SignalKind::interrupt()).map_err(|error| Problem::failed(format!("Ctrl-C cannot be heard: {error}")))
}

#[expect(clippy::needless_pass_by_value, reason = "it is what an error is mapped with")]
fn broken(error: tokio::task::JoinError) -> Problem {
    Problem::failed(format!("the work broke off: {error}"))
}
