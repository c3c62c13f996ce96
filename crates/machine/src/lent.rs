//! Memory on its way into a guest that runs already ([`memory::lend`]).
//!
//! ```text
//!   bring up ── Lent::begin ─► devices loaded ── committed, the guest runs ─► pages … ─► Happening::Ended
//!                                                       │ the worker dies
//!                                                       └─► Lent::take_over: over the socket that QEMU has kept
//! ```
//!
//! Until it has ended, Now names the memory that it comes from ([`crate::tree::Now::restoring`]): whatever becomes of the snapshot, that is needed. What
//! it stands on is not folded meanwhile. And QEMU does not let such a guest be captured.

use crate::crowd::Crowd;
use crate::files::file_problem;
use crate::ram::memory_problem;
use crate::request::{Problem, ProblemKind};
use crate::steps::Steps;
use crate::tree::LayerId;
use memory::{Beginning, Lending, Pace, Sealed, TOUCHED, Touched, Trail, lend};
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::host::HostFolder;
use store::{Folder, Mode};
use tokio::sync::mpsc;

/// The file in which it is recorded what was sent, in the folder of QEMU's sockets.
const TRAIL: &str = "memory.trail";

/// A memory layer whose pages are being lent.
#[derive(Debug)]
pub(crate) struct Lent {
    layer: LayerId,
    /// Its first source had broken off.
    again: bool,
    lending: Lending,
    happens: mpsc::UnboundedReceiver<Happening>,
}

/// What guests asked for, of each memory that this worker has lent: when it is lent again, that comes first. Of a memory that never was, the guest
/// is likely to ask for what it asked for the last time: it is the same machine.
#[derive(Debug, Default)]
pub(crate) struct Habits {
    known: BTreeMap<LayerId, Vec<Touched>>,
    latest: Vec<Touched>,
}

/// Memories of which that is remembered.
const HABITS: usize = 16;

impl Habits {
    /// Of this memory.
    pub(crate) fn of(&self, layer: LayerId) -> Vec<Touched> {
        self.known.get(&layer).unwrap_or(&self.latest).clone()
    }

    /// What was asked for of it beside what [`Habits::of`] told. That came first, and stays first.
    pub(crate) fn note(&mut self, layer: LayerId, touched: Vec<Touched>) {
        let mut habit = self.of(layer);
        habit.extend(touched);
        habit.truncate(TOUCHED);
        self.latest.clone_from(&habit);
        if self.known.len() >= HABITS && !self.known.contains_key(&layer) {
            self.known.pop_first();
        }
        self.known.insert(layer, habit);
    }
}

/// How long pages that no guest asks for give way to others on a busy host.
const PATIENCE: Duration = Duration::from_secs(10);

/// What there is to tell of it.
#[derive(Debug)]
pub(crate) enum Happening {
    /// A page cannot be read, or is not as it was captured; it is tried again.
    Trouble(Problem),
    /// Everything has been sent; or no more will be.
    Ended(Result<memory::Lent, Problem>),
}

impl Lent {
    /// Lends a memory, whose topmost layer is `layer`, on a thread of its own.
    pub(crate) fn begin(
        layer: LayerId,
        memory: Sealed,
        socket: UnixStream,
        beginning: Beginning,
        run_dir: &Path,
        steps: Arc<Steps>,
    ) -> Result<Self, Problem> {
        let trail = trail(run_dir, &beginning)?;
        let lending = Lending::default();
        let again = beginning == Beginning::Recovered;
        if !matches!(beginning, Beginning::Anew(_)) {
            // What its guest had asked for was heard by somebody else: it comes with the rest.
            lending.pace(Pace::Full);
        }
        let (tell, happens) = mpsc::unbounded_channel();
        let ours = lending.clone();
        let work = move || {
            let trouble = |error: &memory::Error| drop(tell.send(Happening::Trouble(memory_problem(error))));
            let (began, mut crowd) = (Instant::now(), Crowd::default());
            let sending = |_, _| {
                steps.at("restore:sending");
                if began.elapsed() < PATIENCE {
                    ours.rest(crowd.rest());
                }
            };
            let ended = lend(&memory, &socket, beginning, &ours, &trail, trouble, sending);
            if ended.is_err() {
                // QEMU holds our end as well: nobody else would tell it.
                let _ = socket.shutdown(Shutdown::Both);
            }
            // Who is told may merge these files at once.
            drop(memory);
            let _ = tell.send(Happening::Ended(ended.map_err(|e| memory_problem(&e))));
        };
        std::thread::Builder::new()
            .name("memory-lent".into())
            .spawn(work)
            .map_err(|e| Problem::failed(format!("no thread for the guest's memory: {e}")))?;
        Ok(Self { layer, again, lending, happens })
    }

    /// Waits for a page that the guest needs while it is being loaded, and that is damaged. For ever, if there is none; what else is in its way
    /// QEMU says.
    pub(crate) async fn damaged(&mut self) -> Problem {
        while let Some(happening) = self.happens.recv().await {
            match happening {
                Happening::Ended(Err(problem)) if problem.kind == ProblemKind::Damaged => return problem,
                Happening::Ended(_) | Happening::Trouble(_) => {}
            }
        }
        std::future::pending().await
    }

    /// Which memory it is.
    pub(crate) fn layer(&self) -> LayerId {
        self.layer
    }

    /// Whether it was taken up again after it had broken off.
    pub(crate) fn is_again(&self) -> bool {
        self.again
    }

    /// Its guest is about to run: what it does not ask for comes too.
    pub(crate) fn come(&self) {
        self.lending.pace(Pace::Gentle);
    }

    /// Somebody waits for the rest.
    pub(crate) fn hurry(&self) {
        self.lending.pace(Pace::Full);
    }

    /// What happens next; never, if there is none. Nothing is lost if the future is dropped.
    pub(crate) async fn next(lent: &mut Option<Self>) -> Happening {
        let Some(lent) = lent else { return std::future::pending().await };
        let broke = || Happening::Ended(Err(Problem::failed("lending the guest's memory broke off")));
        lent.happens.recv().await.unwrap_or_else(broke)
    }
}

fn trail(run_dir: &Path, beginning: &Beginning) -> Result<Trail, Problem> {
    let folder = HostFolder::open(run_dir).map_err(|e| file_problem(&e))?;
    let known = !matches!(beginning, Beginning::Anew(_));
    let file = folder.open(TRAIL, Mode::Write).ok().filter(|_| known).map_or_else(|| folder.create(TRAIL), Ok);
    file.map_err(|e| file_problem(&e)).and_then(|file| Trail::new(file).map_err(|e| memory_problem(&e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(clusters: std::ops::Range<u64>) -> Vec<Touched> {
        clusters.map(|cluster| Touched { block: 0, cluster }).collect()
    }

    #[test]
    fn what_was_asked_for_comes_first_the_next_time() {
        let [monday, tuesday] = [LayerId::new(), LayerId::new()];
        let mut habits = Habits::default();
        assert_eq!(habits.of(monday), []);
        habits.note(monday, pieces(0..4));
        assert_eq!(habits.of(monday), pieces(0..4));
        assert_eq!(habits.of(tuesday), pieces(0..4), "of a memory that was never lent, what is known of the last");
        habits.note(tuesday, pieces(4..5));
        assert_eq!(habits.of(tuesday), pieces(0..5), "what came first stays first");
        assert_eq!(habits.of(monday), pieces(0..4), "each has its own");
    }

    #[test]
    fn what_is_remembered_has_an_end() {
        let (memory, most) = (LayerId::new(), TOUCHED as u64);
        let mut habits = Habits::default();
        habits.note(memory, pieces(0..most));
        habits.note(memory, pieces(most..most + 1));
        assert_eq!(habits.of(memory), pieces(0..most));
        for _ in 0..2 * HABITS {
            habits.note(LayerId::new(), pieces(0..1));
        }
        assert_eq!(habits.known.len(), HABITS);
    }
}
