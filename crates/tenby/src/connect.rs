//! The way to a machine's worker: connects, starts one where there is none, and lets the newer version win.
//!
//! ```text
//!   hello? ──yes──► same version ──────────────────────────────► connected
//!     │              older worker: POST /v1/handover ─┐
//!     └──no──► start `tenby worker ID` ◄──────────────┘
//!                │  its standard output says one line: ready, or the problem
//!                ├─ ready ───────────────────────────────► hello
//!                ├─ another worker has the lock ─► wait ─► hello      (two clients raced; both connect to the winner)
//!                └─ anything else ───────────────────────► the problem
//! ```

use crate::out::Out;
use crate::session::problem;
use crate::worker::Announcement;
use api::{Client, Error, Version};
use machine::request::{Problem, ProblemKind};
use machine::root::{Found, Root};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// How long a worker may take to recover a machine and answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A worker's log is begun anew beyond this.
const LONGEST_LOG: u64 = 4 << 20;

/// The worker that answers now, if one does; nobody is started.
pub(crate) async fn answering(found: &Found) -> Result<Client, Problem> {
    let client = Client::new(&Root::runtime_folder(found.id));
    let hello = client.hello().await.map_err(problem)?;
    if hello.version > Version::own() {
        return Err(newer(found, hello.version));
    }
    Ok(client)
}

/// A worker that answers; it is started if there is none.
pub(crate) async fn worker(root: &Root, found: &Found, out: &Out) -> Result<Client, Problem> {
    let client = Client::new(&Root::runtime_folder(found.id));
    let began = Instant::now();
    let progress = out.progress();
    let mut pause = Duration::from_millis(20);
    loop {
        match client.hello().await {
            Ok(hello) if hello.id != found.id => {
                return Err(Problem::failed(format!("the worker of {} says that it is another machine's", found.name)));
            }
            Ok(hello) if hello.version == Version::own() => return Ok(client),
            Ok(hello) if hello.version > Version::own() => return Err(newer(found, hello.version)),
            Ok(hello) => {
                tracing::info!("the worker is an older one, {}", hello.version);
                match client.hand_over().await {
                    // Gone is what was wanted; somebody else may have been first.
                    Ok(()) | Err(Error::Gone(_)) => {}
                    Err(error) => return Err(problem(error)),
                }
            }
            Err(Error::Gone(_)) => match start(root, found, &client).await? {
                Started::Ready => continue,
                Started::Raced(refusal) if began.elapsed() > PATIENCE => {
                    return Err(Problem::failed(format!(
                        "the worker of {} has had its lock for {} s and does not answer ({})",
                        found.name,
                        PATIENCE.as_secs(),
                        refusal.message
                    )));
                }
                Started::Raced(_) => progress.say(&format!("waiting for the worker of {}", found.name)),
            },
            Err(error) => return Err(problem(error)),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}

fn newer(found: &Found, worker: Version) -> Problem {
    let own = Version::own();
    Problem::refused(format!("this is tenby {own}, but the worker of {} is a newer one, {worker}", found.name))
        .hint(format!("install tenby {worker}, or turn the machine off with it; then this one can serve it"))
}

/// What became of a worker that was started.
enum Started {
    /// It serves.
    Ready,
    /// Another worker has the machine.
    Raced(Problem),
}

/// Starts a worker in a session of its own and waits until it serves or says why it does not.
async fn start(root: &Root, found: &Found, client: &Client) -> Result<Started, Problem> {
    let failed =
        |what: &str, error: io::Error| Problem::failed(format!("{what} for the worker of {}: {error}", found.name));
    let folder = root.machine_folder(found.id);
    if !folder.is_dir() {
        return Err(Problem::not_found(format!("{} is gone", found.name)));
    }
    let log = log(&folder).map_err(|error| failed("no log", error))?;
    let program = std::env::current_exe().map_err(|error| failed("no program", error))?;
    // The worker leaves this terminal's session itself (setsid), and outlives this process.
    let mut child = Command::new(program)
        // `tenby worker ID`, and nothing else: that is how people and scripts know it.
        .env("TENBY_ROOT", root.path())
        .arg("worker")
        .arg(found.id.to_string())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .kill_on_drop(false)
        .spawn()
        .map_err(|error| failed("no process", error))?;
    let mut said = Vec::new();
    let mut stdout = child.stdout.take().expect("standard output was asked for as a pipe").take(1 << 16);
    tokio::select! {
        read = stdout.read_to_end(&mut said) => { read.map_err(|error| failed("no word", error))?; }
        // Another client's worker was first: this one finds the lock taken and ends by itself.
        () = greeted(client) => return Ok(Started::Ready),
    }
    match serde_json::from_slice::<Announcement>(&said) {
        Ok(Announcement::Ready) => Ok(Started::Ready),
        Ok(Announcement::Problem(problem)) if problem.kind == ProblemKind::Refused => Ok(Started::Raced(problem)),
        Ok(Announcement::Problem(problem)) => Err(problem),
        Err(_) => Err(died(found, &folder)),
    }
}

/// Returns when a worker answers.
async fn greeted(client: &Client) {
    while client.hello().await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The worker's log, open at its end.
fn log(folder: &Path) -> io::Result<File> {
    let folder = folder.join("log");
    // Only the last folder: a machine that was just deleted must not come back as an empty one.
    match std::fs::create_dir(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let path = folder.join("worker.log");
    if std::fs::metadata(&path).is_ok_and(|about| about.len() > LONGEST_LOG) {
        std::fs::rename(&path, folder.join("worker.log.1"))?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

/// What to say of a worker that ended without a word: its log's last line knows more.
fn died(found: &Found, folder: &Path) -> Problem {
    let path = folder.join("log/worker.log");
    let text = std::fs::read(&path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(4096)..]).into_owned();
    let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it left no word");
    Problem::failed(format!("the worker of {} died as it began: {}", found.name, last.trim()))
        .hint(format!("less {}", path.display()))
}
