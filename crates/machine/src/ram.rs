//! A machine's memory to and from its layers.

use crate::files::{Files, Parent, image_problem};
use crate::job::Task;
use crate::keeper::Keeper;
use crate::live::{blocking, qemu_problem};
use crate::plan::{Written, quoted};
use crate::records::downwards;
use crate::request::{Problem, ProblemKind};
use crate::tree::{LayerId, LayerRow, Machine, Snapshot, Stats};
use image::hashes::{Expected, Key, Pages};
use image::{Access, Chain, Layer};
use memory::{Captured, Made, NewLayer, Sealed, Signal, Stretch};
use qemu::{Capture, Stream};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Why the reader stops before the end of the stream.
const GIVEN_UP: &str = "the capture was given up";

/// The memory layer that a capture is to make.
#[derive(Debug)]
pub struct Target {
    files: Files,
    row: LayerRow,
    /// What the RAM was last equal to, base first, with the row of the topmost.
    parent: Option<(Vec<Arc<dyn Layer>>, LayerRow)>,
    /// What is recorded of that.
    expected: Expected,
    /// Of the hashes of its pages.
    key: Key,
    name: String,
}

impl Target {
    /// A capture into `row`, over the parent that the row names. A parent that cannot be opened is done without: the new layer is
    /// then larger, which is better than no snapshot. Blocks: what is recorded of the parent is read here and now, not once a guest waits for the
    /// capture.
    pub fn new(files: &Files, machine: &Machine, row: LayerRow) -> Self {
        let parent = row.parent.and_then(|id| {
            let layers = files.open_chain(machine, id).inspect_err(|e| tracing::warn!("{e}")).ok()?;
            Some((layers, machine.layers.get(&id)?.clone()))
        });
        let expected = parent.as_ref().map(|(_, row)| files.expected(&downwards(machine, row.id))).unwrap_or_default();
        let key = expected.key().unwrap_or_else(|| files.key_of_pages(machine));
        Self { files: files.clone(), row, parent, expected, key, name: machine.name.clone() }
    }

    /// Reads the stream to its end into the new layer. Blocks.
    pub fn capture(mut self, stream: impl Read, signal: impl FnMut(Signal)) -> Result<(LayerRow, Captured), Problem> {
        let expected = std::mem::take(&mut self.expected);
        let parent = match &self.parent {
            Some((layers, _)) => {
                let chain = Chain::new(layers.clone(), Access::Read).map_err(|e| image_problem(&e))?;
                Some(Sealed { chain, expected })
            }
            None => None,
        };
        let (files, row, key) = (&self.files, &mut self.row, self.key);
        let below = &self.parent;
        let new_layer = |new: NewLayer| {
            let below = below.as_ref().filter(|_| new.on_parent);
            row.parent = below.map(|(_, row)| row.id);
            let chain = Self::make(files, row, new.size, below).map_err(|problem| problem.message)?;
            Ok(Made { chain, pages: Pages::new(row.id.0, new.size, key)? })
        };
        let mut captured =
            memory::capture(stream, parent.as_ref(), new_layer, signal).map_err(|e| memory_problem(&e))?;
        captured.pages = captured.pages.whole(self.row.parent.map(|id| id.0));
        // Without it the record is made anew, of what the layer reads as then.
        if let Err(problem) = files.write_pages(&captured.pages, || {}) {
            tracing::warn!("what {} holds is not recorded: {problem}", self.row.file);
        }
        files.sync_names()?;
        Ok((self.row, captured))
    }

    fn make(
        files: &Files,
        row: &LayerRow,
        size: u64,
        below: Option<&(Vec<Arc<dyn Layer>>, LayerRow)>,
    ) -> Result<Arc<Chain>, Problem> {
        let top = below.and_then(|(layers, row)| layers.last().map(|layer| (layer, row)));
        let parent = top.map(|(layer, row)| Parent { layer: layer.as_ref(), row });
        let layer = files.create_layer(row, size, parent.as_ref(), None)?;
        let mut layers = below.map(|(layers, _)| layers.clone()).unwrap_or_default();
        layers.push(layer);
        Chain::new(layers, Access::Write).map(Arc::new).map_err(|e| image_problem(&e))
    }
}

impl Keeper {
    /// See [`Target::new`].
    pub(crate) async fn target(&self, row: LayerRow) -> Result<Target, Problem> {
        let keeper = self.clone();
        blocking(move || Ok(Target::new(&keeper.files, &keeper.rows().machine, row))).await
    }
}

/// For captures of a guest that stands still: there is no point to wait for.
pub(crate) async fn no_point(_: &mut Capture) -> Result<Option<u64>, Problem> {
    Ok(None)
}

/// RAM by pieces of a huge page.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    /// Mostly in use.
    pub(crate) used: Vec<Stretch>,
    /// Mostly zeros.
    pub(crate) idle: Vec<Stretch>,
}

/// Writes a capture to its end; says also what of RAM is in use. `at_point` waits for the point, while the stream is being read, and says how long the guest stood
/// still (microseconds). When anything fails, or the task is cancelled, the capture ends and the guest is as it was before it.
pub(crate) async fn write(
    task: &Task,
    capture: &mut Capture,
    target: Target,
    at_point: impl AsyncFnOnce(&mut Capture) -> Result<Option<u64>, Problem>,
) -> Result<(Written, Pieces), Problem> {
    let began = Instant::now();
    let name = target.name.clone();
    let given_up = Arc::<AtomicBool>::default();
    let mut tap = Tap { stream: capture.reader(), given_up: Arc::clone(&given_up) };
    let told = task.clone();
    let signal = move |signal| {
        if let Signal::Progress { done, total } = signal {
            told.progress(done, total);
        }
    };
    let reader = tokio::task::spawn_blocking(move || {
        let read = target.capture(&mut tap, signal);
        if read.is_err() {
            // The guest waits for its pages to be read, whatever becomes of them.
            tap.stream.drain();
        }
        read
    });
    let ended = tokio::select! {
        ended = to_the_end(&name, capture, at_point) => ended,
        () = task.cancel().wait() => Err(Problem::new(ProblemKind::Cancelled, "cancelled; nothing has changed")),
    };
    if ended.is_err() {
        given_up.store(true, Ordering::Relaxed);
        if let Err(error) = capture.cancel().await {
            tracing::warn!("ending a capture: {error}");
        }
    }
    let read = reader.await.map_err(|e| Problem::failed(format!("reading {name}'s memory broke off: {e}")))?;
    // If our side failed (a full disk), what QEMU says of its end is only an echo.
    let ((layer, captured), pause_us) = match (read, ended) {
        (Ok(read), Ok(pause)) => (read, pause),
        (Err(problem), Ok(_)) => return Err(problem),
        (Err(ours), Err(theirs)) if theirs.kind != ProblemKind::Cancelled && !is_echo(&ours) => return Err(ours),
        (_, Err(problem)) => return Err(problem),
    };
    let stats = Stats {
        pause_us,
        save_ms: Some(began.elapsed().as_millis() as u64),
        pages_stored: captured.counts.stored + captured.counts.zeroed,
        pages_same: captured.counts.same,
        pages_zero: captured.counts.empty,
    };
    Ok((Written { layer, stats }, Pieces { used: captured.used, idle: captured.idle }))
}

/// The stream as the capture reads it: it fails as soon as the capture is given up.
struct Tap {
    stream: Stream,
    given_up: Arc<AtomicBool>,
}

impl Read for Tap {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(std::io::Error::other(GIVEN_UP));
        }
        self.stream.read(buffer)
    }
}

async fn to_the_end(
    name: &str,
    capture: &mut Capture,
    at_point: impl AsyncFnOnce(&mut Capture) -> Result<Option<u64>, Problem>,
) -> Result<Option<u64>, Problem> {
    let pause = at_point(capture).await?;
    capture.finished().await.map_err(|e| qemu_problem(name, &e))?;
    Ok(pause)
}

/// Whether the reader only saw the stream end, or was told to give up.
fn is_echo(problem: &Problem) -> bool {
    problem.message.contains("ended early") || problem.message.contains(GIVEN_UP)
}

/// Whether the guest can run before all of the memory in `layers` has arrived. What is not sound is found out later.
pub(crate) fn can_lend(layers: &[Arc<dyn Layer>]) -> bool {
    Chain::new(layers.to_vec(), Access::Read).is_ok_and(|chain| memory::can_lend(&chain).unwrap_or(false))
}

/// Writes the memory in `layers` (base first) to a QEMU that waits for it. Blocks.
pub(crate) fn restore(layers: Vec<Arc<dyn Layer>>, expected: Expected, to: UnixStream) -> Result<(), Problem> {
    let chain = Chain::new(layers, Access::Read).map_err(|e| image_problem(&e))?;
    memory::restore(&Sealed { chain, expected }, to, |_, _| {}).map(|_| ()).map_err(|e| memory_problem(&e))
}

/// A problem with a memory, whose it is, and what can be done without it.
pub(crate) fn of_memory(problem: Problem, machine: &Machine, layer: LayerId) -> Problem {
    if problem.kind != ProblemKind::Damaged {
        return problem;
    }
    let vm = quoted(&machine.name);
    let whose = machine.snapshots.values().find(|snapshot| snapshot.memory == Some(layer));
    let (whose, hint) = match whose {
        Some(Snapshot { name, .. }) => {
            (format!("the memory of {name}"), format!("tenby snapshot apply {vm} {} --no-memory", quoted(name)))
        }
        None => (format!("the memory that {} was saved with", machine.name), format!("tenby vm stop {vm} --turn-off")),
    };
    Problem { message: format!("{whose}: {}", problem.message), hint: Some(hint), ..problem }
}

pub(crate) fn memory_problem(error: &memory::Error) -> Problem {
    let kind = match error.kind {
        memory::ErrorKind::Damaged => ProblemKind::Damaged,
        _ => ProblemKind::Failed,
    };
    let mut message = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        source = cause.source();
    }
    Problem::new(kind, message)
}
