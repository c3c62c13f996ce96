//! `tenby worker ID`: the process that owns a machine. It recovers the machine, serves its socket, and ends when nothing is left to
//! do, on SIGTERM, or for a newer version; QEMU runs on, and the next worker adopts it.

use crate::session::Session;
use api::types::Hello;
use api::{End, Socket, Version, serve};
use machine::actor::Handle;
use machine::request::Problem;
use machine::root::Root;
use machine::steps::Steps;
use machine::tree::MachineId;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use tokio::signal::unix::{SignalKind, signal};

/// The one line that a worker says to who started it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Announcement {
    /// It serves.
    Ready,
    /// It does not, and why.
    Problem(Problem),
}

/// Owns the machine until the end.
pub(crate) async fn run(session: &Session, id: MachineId) -> Result<(), Problem> {
    leave_session();
    let result = own(&session.root, id).await;
    if let Err(problem) = &result {
        tracing::error!("{problem}");
        announce(&Announcement::Problem(problem.clone()));
    }
    result
}

async fn own(root: &Root, id: MachineId) -> Result<(), Problem> {
    let folder = Root::runtime_folder(id);
    let die_at = std::env::var("TENBY_DIE_AT").ok();
    let handle = Handle::open_with(root, id, Steps::die_at(die_at.as_deref())).await?;
    tracing::info!("worker {} of {id}: tenby {}", std::process::id(), Version::own());
    let mut announced = false;
    let reason = loop {
        let (listener, socket) =
            Socket::bind(&folder).map_err(|error| Problem::failed(format!("{}: {error}", folder.display())))?;
        if !announced {
            announce(&Announcement::Ready);
            announced = true;
        }
        let hello = Hello { version: Version::own(), id, pid: std::process::id() };
        let mut told = false;
        let end = serve(listener, handle.clone(), hello, async { told = until_end(&handle).await }).await;
        drop(socket);
        // Between "nothing is left to do" and the last answer a client may have asked for something: then there is.
        if end == End::Asked && !told && handle.jobs().iter().any(|job| !job.state.ended()) {
            continue;
        }
        break match (end, told) {
            (End::HandedOver, _) => "handed over to a newer worker",
            (End::Asked, true) => "told to",
            (End::Asked, false) => "nothing left to do",
        };
    };
    handle.close().await;
    tracing::info!("worker {} ends: {reason}", std::process::id());
    Ok(())
}

/// Returns at the end: `true` if a signal asked for it, `false` if nothing is left to do.
async fn until_end(handle: &Handle) -> bool {
    let terminated = async {
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => {
                terminate.recv().await;
            }
            Err(error) => {
                tracing::warn!("SIGTERM cannot be heard: {error}");
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = terminated => true,
        () = handle.idle() => false,
    }
}

/// Leaves the session of the terminal that it was started from: its Ctrl-C and its end are none of the machine's business.
fn leave_session() {
    // Refused only to the leader of a process group (a shell's direct child): then it is in a group of its own already.
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!("setsid: {error}");
    }
}

/// Says the line, and closes standard output, which the starter reads to its end.
fn announce(announcement: &Announcement) {
    let line = serde_json::to_string(announcement).expect("an announcement is text");
    // The starter may have gone on already, with another worker or with this one: that is no reason to end.
    let _ = writeln!(io::stdout().lock(), "{line}");
    let closed = rustix::fs::open("/dev/null", rustix::fs::OFlags::WRONLY, rustix::fs::Mode::empty())
        .and_then(|null| rustix::stdio::dup2_stdout(&null));
    if let Err(error) = closed {
        tracing::warn!("standard output cannot be closed: {error}");
    }
}
