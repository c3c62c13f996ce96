//! A guest that goes on from a memory is told the time, if it has an agent to be told by.

use crate::book::Book;
use crate::files::Files;
use crate::log;
use crate::plan::shorten;
use crate::tree::{Clock, Run};
use qemu::Agent;
use std::path::Path;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How long to wait before an agent that has broken off is asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// Tells it as soon as an agent listens, which may be never; in the background, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Telling(JoinHandle<()>);

impl Drop for Telling {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Telling {
    /// For the guest of `run`, whose sockets lie in `run_dir`.
    pub(crate) fn begin(book: &Book, files: &Files, run: &Run, run_dir: &Path) -> Self {
        let (book, files, run, run_dir) = (book.clone(), files.clone(), run.clone(), run_dir.to_owned());
        Self(tokio::spawn(async move {
            match tell(&run_dir).await {
                Ok(()) => told(&book, &files, &run),
                Err(reason) => log::write(&files, None, &format!("the guest's agent does not set its clock: {reason}")),
            }
        }))
    }
}

/// Until it was told, or refuses, for this reason.
async fn tell(run_dir: &Path) -> Result<(), String> {
    loop {
        let told = async { Agent::hail(run_dir).await?.set_time().await };
        match told.await {
            Ok(()) => return Ok(()),
            Err(qemu::Error::Refused { reason, .. }) => return Err(reason),
            Err(error) => tracing::debug!("the guest's agent: {error}"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Its clock is right: there is nothing to be said of it any more.
fn told(book: &Book, files: &Files, run: &Run) {
    let mut was = None;
    let noted = book.commit(|rows| {
        let now = rows.machine.now.run.as_mut();
        was = now.filter(|now| (now.pid, now.started) == (run.pid, run.started)).and_then(|now| now.clock.take());
    });
    match (noted, was) {
        (Err(problem), _) => tracing::error!("{problem}"),
        (Ok(()), Some(Clock { behind_ms, snapshot, .. })) => {
            let since =
                snapshot.map_or_else(|| "it was saved".to_owned(), |name| format!("{} was applied", shorten(&name)));
            let seconds = Duration::from_millis(behind_ms).as_secs();
            log::write(files, None, &format!("the guest's agent set its clock, {seconds} s behind since {since}"));
        }
        (Ok(()), None) => {}
    }
}
