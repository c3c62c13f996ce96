//! Hashing what is sealed, in the background: the records that `vm check --deep` compares with ([`crate::records`]).
//!
//! ```text
//!   nothing asked, nothing to merge ──► sealed layers without a whole record ──► read, hash ──► hashes/<layer>
//!                                           ▲                                      │
//!                                           └── a request, a merge: stopped, and later gone on with ◄┘
//! ```
//!
//! It is nobody's job: no request waits for it, and it gives way to all of them. Nothing remembers what there is to do: it is what the rows
//! and the records say. Beside a guest it takes a quarter of the disk's time at most.

use crate::actor::Owner;
use crate::files::Files;
use crate::job::Cancel;
use crate::keeper::Keeper;
use crate::ledger::State as Rows;
use crate::live::Live;
use crate::records::{Opened, Recorded, sealed};
use crate::request::Problem;
use crate::tree::{LayerId, LayerKind, LayerRow, Machine};
use image::gate::MAX_DEPTH;
use image::hashes::{self, Hashed, Key, Pages, Record};
use image::{Access, Chain};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use store::Mode;
use tokio::task::JoinHandle;

/// A long record is written down whenever so many bytes were read for it.
const SAVE: u64 = 4 << 30;
/// When it is stopped, it is written down if so many bytes were.
const WORTH: u64 = 16 << 20;
/// Beside a guest it rests so many times as long as it read.
const REST: u32 = 3;
/// How often somebody who rests looks whether he is to stop.
const LOOK: Duration = Duration::from_millis(5);

/// What a worker knows of its machine's records, so as not to look at each of them again: those that are whole, and those that cannot be
/// made (what is wrong with those layers `vm check` says).
/// Each with the layer that it stood on: a record of a memory's pages is whole for that one alone.
#[derive(Debug, Default)]
pub struct Known(BTreeMap<LayerId, Option<LayerId>>);

/// How to go about it.
#[derive(Debug, Clone, Default)]
pub struct Manner {
    /// Layers that are left alone, for somebody has them open for writing.
    pub written: BTreeSet<LayerId>,
    /// A guest runs, and is not to be held up.
    pub beside_guest: bool,
}

impl Keeper {
    /// Makes the records that are missing, and removes those that nobody needs. `false` if it was stopped before all were there. Blocks. Nobody
    /// may fold meanwhile.
    ///
    /// # Errors
    /// A record that cannot be written. A layer that cannot be read is left out.
    pub fn hash(&self, known: &mut Known, manner: &Manner, stop: &Cancel) -> Result<bool, Problem> {
        let rows = self.rows();
        let machine = &rows.machine;
        known.0.retain(|id, below| machine.layers.get(id).is_some_and(|row| row.parent == *below));
        let mut opened = Opened::new(&self.files, machine).until(stop);
        for row in sealed(machine, &self.files) {
            if stop.asked() {
                return Ok(false);
            }
            if known.0.contains_key(&row.id) || manner.written.contains(&row.id) {
                continue;
            }
            let hashed = match row.kind {
                LayerKind::Disk => self.hash_layer(row, &mut opened, manner, stop),
                LayerKind::Memory => self.hash_memory(row, &mut opened, manner, stop),
            };
            match hashed {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(Trouble::Reading(_)) if stop.asked() => return Ok(false),
                Err(Trouble::Reading(problem)) => tracing::warn!("{} is not hashed: {problem}", row.file),
                Err(Trouble::Writing(problem)) => return Err(problem),
            }
            known.0.insert(row.id, row.parent);
        }
        // Not before: of what was merged into a memory the record was needed.
        self.files.tidy_records(machine)?;
        Ok(true)
    }

    /// Completes what its capture has recorded of a memory, if something is missing: what was merged into it, or all.
    fn hash_memory(
        &self,
        row: &LayerRow,
        opened: &mut Opened<'_>,
        manner: &Manner,
        stop: &Cancel,
    ) -> Result<bool, Trouble> {
        let below = row.parent.map(|id| id.0);
        let recorded = self.files.pages(row.id).record();
        if recorded.as_ref().is_some_and(|pages| pages.is_whole(below)) {
            return Ok(true);
        }
        let chain = Chain::new(opened.chain(row.id)?, Access::Read)?;
        let machine = &self.rows().machine;
        let mut pages = match recorded {
            Some(pages) => self.with_merged(pages, machine),
            None => Pages::new(row.id.0, chain.size(), self.files.key_of_pages(machine))?,
        };
        let (mut read, mut rest) = (0, Rest::new(manner.beside_guest));
        let ended = pages.is_whole(below)
            || pages.complete(&chain, below, &mut |bytes| {
                self.steps.at("hash:reading");
                read += bytes;
                rest.after(bytes, stop);
                !stop.asked()
            })?;
        if ended || read >= WORTH {
            let written = self.files.write_pages(&pages, || self.steps.at("hash:written"));
            written.map_err(Trouble::Writing)?;
        }
        Ok(ended)
    }

    /// The layers that a memory stood on, and that are gone, were merged into it: what was recorded of them is still there.
    fn with_merged(&self, mut pages: Pages, machine: &Machine) -> Pages {
        for _ in 0..MAX_DEPTH {
            let gone = pages.below().map(LayerId).filter(|id| !machine.layers.contains_key(id));
            let Some(merged) = gone.and_then(|id| self.files.pages(id).record()) else { break };
            pages.take_over(merged);
        }
        pages
    }

    fn hash_layer(
        &self,
        row: &LayerRow,
        opened: &mut Opened<'_>,
        manner: &Manner,
        stop: &Cancel,
    ) -> Result<bool, Trouble> {
        let recorded = self.files.record(row.id);
        if matches!(&recorded, Recorded::Record(record) if record.is_complete()) {
            return Ok(true);
        }
        let layer = self.files.open_layer(row, Mode::Read)?;
        let below = row.parent.and_then(|id| self.files.record(id).record());
        let mut record = begun(row, recorded, layer.info().size, below.as_ref())?;
        let (mut unsaved, mut rest) = (0, Rest::new(manner.beside_guest));
        loop {
            let mut open = || opened.chain(row.id);
            let hashed = Hashed { layer: &*layer, below: below.as_ref(), open: &mut open };
            let ended = hashes::record(&mut record, hashed, &mut |bytes| {
                self.steps.at("hash:reading");
                unsaved += bytes;
                rest.after(bytes, stop);
                unsaved < SAVE && !stop.asked()
            })?;
            if ended || unsaved >= WORTH {
                unsaved = 0;
                let written = self.files.write_record(&record, || self.steps.at("hash:written"));
                written.map_err(Trouble::Writing)?;
            }
            if ended || stop.asked() {
                return Ok(ended);
            }
        }
    }
}

/// The record to go on with.
fn begun(row: &LayerRow, recorded: Recorded, size: u64, below: Option<&Record>) -> image::Result<Record> {
    match recorded {
        Recorded::Record(record) => Ok(record),
        // With the key of what is below, its hashes can be taken over.
        Recorded::Nothing | Recorded::Damaged(_) => {
            Record::new(row.id.0, size, below.map_or_else(Key::new, Record::key))
        }
    }
}

/// What was in the way.
enum Trouble {
    Reading(Problem),
    Writing(Problem),
}

impl From<Problem> for Trouble {
    fn from(problem: Problem) -> Self {
        Self::Reading(problem)
    }
}

impl From<image::Error> for Trouble {
    fn from(error: image::Error) -> Self {
        Self::Reading(error.into())
    }
}

/// Rests after what was read.
struct Rest {
    wanted: bool,
    since: Instant,
}

impl Rest {
    fn new(wanted: bool) -> Self {
        Self { wanted, since: Instant::now() }
    }

    fn after(&mut self, bytes: u64, stop: &Cancel) {
        if !self.wanted || bytes == 0 {
            return;
        }
        let now = Instant::now();
        let until = now + (now - self.since) * REST;
        while !stop.asked() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(LOOK));
        }
        self.since = Instant::now();
    }
}

/// The owner's part: hashing under way, on a thread of its own.
#[derive(Debug, Default)]
pub(crate) struct Hashing {
    known: Arc<Mutex<Known>>,
    /// The rows that were looked at last: nothing is left to do until there are others.
    seen: Option<Arc<Rows>>,
    under_way: Option<UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    rows: Arc<Rows>,
    stop: Arc<Cancel>,
    thread: JoinHandle<Result<bool, Problem>>,
}

impl Owner {
    /// Begins to hash what is sealed, if something may be left to do and nothing else is.
    pub(crate) fn hash(&mut self) {
        let rows = self.shared.rows();
        let seen = self.hashing.seen.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, &rows));
        if seen || self.hashing.is_under_way() || self.folding.is_some() || self.starved.is_some() {
            return;
        }
        let written = self.live.as_mut().map(Live::disks).map(|disks| disks.written()).unwrap_or_default();
        let manner = Manner { written, beside_guest: self.live.is_some() };
        let stop = Arc::<Cancel>::default();
        let (keeper, known, asked) = (self.keeper.clone(), Arc::clone(&self.hashing.known), Arc::clone(&stop));
        let thread = tokio::task::spawn_blocking(move || {
            keeper.hash(&mut known.lock().unwrap_or_else(PoisonError::into_inner), &manner, &asked)
        });
        self.hashing.under_way = Some(UnderWay { rows, stop, thread });
    }
}

impl Hashing {
    pub(crate) fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Returns when the hashing under way has ended; never, if there is none.
    pub(crate) async fn ended(&mut self) {
        let Some(UnderWay { thread, .. }) = &mut self.under_way else { return std::future::pending().await };
        let ended = thread.await;
        let rows = self.under_way.take().map(|ended| ended.rows);
        match ended {
            Ok(Ok(false)) => {}
            Ok(Ok(true)) => self.seen = rows,
            // Tried again when something has changed.
            Ok(Err(problem)) => {
                tracing::warn!("hashing: {problem}");
                self.seen = rows;
            }
            Err(error) => {
                tracing::error!("hashing broke off: {error}");
                self.seen = rows;
            }
        }
    }

    /// Stops it, if it is under way; it goes on later.
    pub(crate) async fn stop(&mut self) {
        if let Some(under_way) = &self.under_way {
            under_way.stop.ask();
            self.ended().await;
        }
    }

    /// What is recorded of these layers was given up.
    pub(crate) fn forget(&mut self, layers: &BTreeSet<LayerId>) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).0.retain(|id, _| !layers.contains(id));
        self.seen = None;
    }

    /// Whether the collector has to wait for it: it is told to stop if there is anything to collect.
    pub(crate) fn holds_up(&self, machine: &Machine, files: &Files) -> bool {
        let Some(under_way) = &self.under_way else { return false };
        let found = files.garbage(machine);
        let wanted = !(found.remove.is_empty() && found.fold.is_empty());
        if wanted {
            under_way.stop.ask();
        }
        wanted
    }
}
