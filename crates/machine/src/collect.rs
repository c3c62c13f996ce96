//! The collector: what no row names is removed or folded away, in the background, as jobs that one can watch and cancel.
//!
//! What there is to do is derived from the rows alone ([`garbage`]); nothing remembers it. So a crash needs no repair here: the
//! next worker derives the same, and does a fold that was cut off again (its child, read through its chain, is the truth until its
//! commit). Downwards the row of the layer that takes the rest in says how far that has come, unless a guest may write to what is folded.
//!
//! What a fold moves is in both files until then. Where there is no room for that, it moves from one layer into the one below, and is given up
//! piece by piece ([`merge::move_down`]). The leaf of a guest that goes on meanwhile can give nothing up: it gets a new leaf on top first.

use crate::actor::{Owner, Shared};
use crate::disks::Disks;
use crate::files::{Files, image_problem, name_beside};
use crate::garbage::{Fold, folded, garbage, removed};
use crate::job::{Cancel, Pace, Task};
use crate::keeper::Keeper;
use crate::ledger::Journal;
use crate::live::Live;
use crate::log;
use crate::mark;
use crate::ops::snapshot::{Leaves, files_of};
use crate::request::{DeletePlan, Pending, Problem, ProblemKind};
use crate::room::PLENTY;
use crate::tree::{JobId, LayerId, LayerRow, Machine, SnapshotId, TrashId};
use crate::views;
use image::merge::{self, Direction, Mark, Marks, Outcome, Plan};
use image::{Chain, Layer, ParentLink};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use store::Mode;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Sizes by which the collector goes.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// A merge notes how far it is each time that it has moved so many bytes: so many at most it does again, if it is cut off.
    pub mark_every: u64,
    /// A leaf that holds so many bytes and is merged, while a guest writes to it and room is scarce, is followed by a new one first.
    pub split_from: u64,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { mark_every: 128 << 20, split_from: 32 << 20 }
    }
}

/// How a fold begins.
#[derive(Debug)]
pub enum Begin {
    /// As a job of its own, at this pace.
    At(Arc<Pace>),
    /// As this job, which has waited.
    Again(Task),
}

impl Default for Begin {
    fn default() -> Self {
        Self::At(Arc::default())
    }
}

/// A fold that is to be done.
#[derive(Debug)]
pub struct Folding {
    /// From the base upwards; the last one's child is what stays.
    run: Vec<Fold>,
    direction: Direction,
    task: Task,
    /// Where a guest goes on meanwhile.
    chain: Option<Arc<Chain>>,
    /// What the run stands on.
    beneath: Option<Arc<dyn Layer>>,
    /// The run, lowest first.
    layers: Vec<Arc<dyn Layer>>,
    /// The files that are of no use afterwards.
    gone: Vec<String>,
    /// Bytes to make do with, if there are too few to have twice what moves.
    room: Option<u64>,
    /// Where an earlier fold of this came to.
    mark: Option<Mark>,
}

/// How a fold ended.
#[derive(Debug)]
pub struct Folded {
    run: Vec<Fold>,
    direction: Direction,
    task: Task,
    outcome: Result<Outcome, Problem>,
    /// It failed for want of room on the disk, and can be begun again when there is some.
    starved: bool,
}

impl Folded {
    /// Its job.
    pub fn task(&self) -> &Task {
        &self.task
    }
}

/// A fold under way, on a thread of its own.
#[derive(Debug)]
pub(crate) struct Underway {
    run: Vec<Fold>,
    direction: Direction,
    task: Task,
    cancel: Arc<Cancel>,
    thread: JoinHandle<Folded>,
}

impl Underway {
    /// The end of the fold under way; never, if there is none.
    pub(crate) async fn next(folding: &mut Option<Self>) -> Folded {
        let Some(running) = folding else { return std::future::pending().await };
        let ended = (&mut running.thread).await;
        let Self { run, direction, task, .. } = folding.take().expect("it was there, and nobody else takes it");
        ended.unwrap_or_else(|e| {
            let outcome = Err(Problem::failed(format!("a merge broke off: {e}")));
            Folded { run, direction, task, outcome, starved: false }
        })
    }
}

impl Owner {
    /// Does what little there is to do at once, and begins a fold if one is due.
    pub(crate) fn collect(&mut self) {
        self.empty_trash();
        let waits = self.starved.as_ref().is_some_and(|(_, due)| *due > Instant::now());
        if self.folding.is_none() && !self.resting && !waits {
            if self.hashing.holds_up(&self.shared.rows().machine, &self.keeper.files) {
                return;
            }
            let begun = self.keeper.remove_garbage().and_then(|()| self.begin_next_fold());
            self.shares = self.folding.is_none() && self.keeper.waits_for_others();
            if let Err(problem) = begun {
                self.rest(&problem);
            }
        }
        self.answer_waiting();
    }

    fn begin_next_fold(&mut self) -> Result<(), Problem> {
        let starved = self.starved.take().map(|(task, _)| task);
        let begin = match &starved {
            Some(task) => Begin::Again(task.clone()),
            None => Begin::At(std::mem::take(&mut self.merge_pace)),
        };
        let folding = match self.keeper.next_fold(self.live.as_mut().map(Live::disks), begin) {
            Ok(Some(folding)) => folding,
            // What it waited for is not wanted any more, or something else is in the way now.
            other => {
                let outcome = other.map(|_| serde_json::Value::Null);
                if let Some(task) = starved {
                    self.finish(&task, &outcome);
                }
                return outcome.map(drop);
            }
        };
        self.shared.set_moment(|moment| moment.doing = vec!["merging".to_owned()]);
        let cancel = Arc::<Cancel>::default();
        let (run, direction, task) = (folding.run.clone(), folding.direction, folding.task.clone());
        let (keeper, stop) = (self.keeper.clone(), Arc::clone(&cancel));
        let thread = tokio::task::spawn_blocking(move || keeper.fold(folding, &stop));
        self.folding = Some(Underway { run, direction, task, cancel, thread });
        Ok(())
    }

    /// Something is in the way: left for the next request that changes the tree, or the next worker.
    fn rest(&mut self, problem: &Problem) {
        self.resting = true;
        if let Some((task, _)) = self.starved.take() {
            self.finish(&task, &Err(problem.clone()));
        }
        log::write(&self.keeper.files, None, &format!("cleaning up rests: {problem}"));
        let words = problem.message.clone();
        self.shared.set_moment(|moment| moment.alert = Some(format!("cleaning up rests: {words}")));
        for (task, _) in std::mem::take(&mut self.waiting) {
            let words = format!("it is deleted, but its files could not be cleaned up: {words}");
            self.finish(&task, &Err(Problem { message: words, ..problem.clone() }));
        }
    }

    /// Deletions that wait for merging have ended when nothing more can be done. (What memory is being lent from is merged when it has arrived.)
    fn answer_waiting(&mut self) {
        let lent = self.live.as_ref().and_then(Live::lent);
        lent.filter(|_| !self.waiting.is_empty()).inspect(|lent| lent.hurry());
        if lent.is_none() && self.folding.is_none() && self.starved.is_none() {
            for (task, result) in std::mem::take(&mut self.waiting) {
                self.finish(&task, &Ok(result));
            }
        }
    }

    /// Stops a fold or hashing under way, for a request that wants the tree to itself. It goes on afterwards.
    pub(crate) async fn stop_folding(&mut self) {
        self.hashing.stop().await;
        if let Some(folding) = &self.folding {
            folding.cancel.ask();
            let ended = Underway::next(&mut self.folding).await;
            self.folded(&ended);
        }
    }

    /// A fold has ended.
    pub(crate) fn folded(&mut self, ended: &Folded) {
        self.shared.set_moment(|moment| moment.doing.retain(|what| what != "merging"));
        if ended.starved && !ended.task.cancelled() {
            return self.wait_for_room(&ended.task);
        }
        let outcome = self.keeper.folded(ended, self.live.as_mut().map(Live::disks));
        match &outcome {
            // Its user's wish holds until the tree changes again; ours is only for a moment, and the next one goes on as fast.
            Err(problem) if problem.kind == ProblemKind::Cancelled => {
                self.resting = ended.task.cancelled();
                if !self.resting {
                    self.merge_pace = Arc::clone(ended.task.pace());
                }
            }
            Err(problem) => self.rest(problem),
            Ok(_) => self.keep_reserve(),
        }
        self.finish(&ended.task, &outcome);
    }
}

impl Keeper {
    /// Gives up what can be taken back, of these; what it held is the collector's then.
    pub fn give_up(&self, trash: &[TrashId], why: &str) -> Result<(), Problem> {
        if trash.is_empty() {
            return Ok(());
        }
        let rows = self.rows();
        self.book.commit(|rows| trash.iter().for_each(|id| rows.machine.give_up(*id)))?;
        self.steps.at("undo:given-up");
        for given_up in trash.iter().filter_map(|id| rows.machine.trash.get(id)) {
            log::write(&self.files, None, &format!("{}: cannot be taken back any more, {why}", given_up.what));
        }
        Ok(())
    }

    /// Removes the files of layers that nothing names and nothing stands on. First the rows, then the files: a file without a row
    /// is harmless, and the journal knows it.
    pub fn remove_garbage(&self) -> Result<(), Problem> {
        let rows = self.rows();
        let gone = garbage(&rows.machine).remove;
        if gone.is_empty() {
            return Ok(());
        }
        let doomed: Vec<_> = gone.iter().filter_map(|id| rows.machine.layers.get(id)).collect();
        let files: Vec<String> = doomed.iter().filter(|row| !row.in_place).map(|row| row.file.clone()).collect();
        let journal = Journal {
            job: JobId::new(),
            request: serde_json::json!("remove"),
            files: files.clone(),
            note: String::new(),
        };
        let row = journal.clone();
        self.book.commit(|rows| {
            removed(&mut rows.machine, &gone);
            rows.insert_journal(row);
        })?;
        self.steps.at("remove:committed");
        doomed.iter().filter(|row| row.in_place).for_each(|row| mark::clear(Path::new(&row.file)));
        self.forget(&journal)?;
        for file in files {
            log::write(&self.files, None, &format!("removed {file}: nothing needs it"));
        }
        Ok(())
    }

    /// Whether something would be folded if another machine did not have it, too.
    fn waits_for_others(&self) -> bool {
        let machine = &self.rows().machine;
        self.files.garbage(machine).fold.len() < garbage(machine).fold.len()
    }

    /// The next fold that is due, its layers open and its job begun. `disks` are those of a guest that runs meanwhile.
    pub fn next_fold(&self, disks: Option<&mut Disks>, begin: Begin) -> Result<Option<Folding>, Problem> {
        let rows = self.rows();
        match &self.files.first_run(&rows.machine)[..] {
            [] => Ok(None),
            run => self.open_fold(&rows.machine, run, disks, begin).map(Some),
        }
    }

    fn open_fold(
        &self,
        machine: &Machine,
        run: &[Fold],
        mut disks: Option<&mut Disks>,
        begin: Begin,
    ) -> Result<Folding, Problem> {
        let rows = rows_of(machine, run)?;
        let (lowest, top) = (rows[0], rows[rows.len() - 1]);
        // While a guest runs on this chain, the fold goes through it.
        let chain = disks.as_ref().and_then(|disks| disks.chain_of(machine, top.id));
        let beneath = lowest.parent.map(|id| row(machine, id)).transpose()?;
        // What an earlier fold has left open for writing need not be now.
        disks.as_deref_mut().map_or(Ok(()), |disks| disks.seal(machine))?;
        let mut open = |row| self.handle(row, Mode::Read, disks.as_deref_mut());
        let beneath = beneath.map(&mut open).transpose()?;
        let mut layers = rows.iter().map(|row| open(row)).collect::<Result<Vec<_>, _>>()?;
        let plan = plan(beneath.as_ref(), &layers)?;
        let mut direction = way(lowest, &plan);
        let mut moves = plan.moves(direction).iter().sum();
        let scarce = self.scarce_room(lowest, moves);
        if scarce.is_some() && plan.down.is_some() && direction == Direction::Up {
            // More moves that way, but it can be given up piece by piece.
            direction = Direction::Down;
            moves = plan.moves(direction).iter().sum();
        }
        let room = scarce.filter(|_| direction == Direction::Down);
        if room.is_some() && run.len() > 1 {
            return self.open_fold(machine, &run[..1], disks, begin);
        }
        if room.is_some() && moves >= self.sizes.split_from && self.push_empty(machine, top.id, disks.as_deref_mut()) {
            return self.open_fold(&self.rows().machine, run, disks, begin);
        }
        // The handles of what changes are made writable: down the parent and its child's link, up the top.
        let filled = if direction == Direction::Down { 0 } else { rows.len() - 1 };
        layers[filled] = self.filled(rows[filled], disks.as_deref_mut())?;
        if direction == Direction::Down {
            layers[1] = self.handle(rows[1], Mode::Write, disks)?;
        }
        let (stays, gone) =
            if direction == Direction::Down { (lowest, &rows[1..]) } else { (top, &rows[..rows.len() - 1]) };
        let gone: Vec<String> = gone.iter().map(|row| row.file.clone()).collect();
        let task = match begin {
            Begin::Again(task) => task,
            Begin::At(pace) => {
                let task = self.jobs.open_at(JobId::new(), &machine.name, "merge", pace);
                task.map_err(|_| Problem::failed("a fresh job id is taken"))?
            }
        };
        task.running();
        if direction == Direction::Down {
            self.label_run(&rows, &*layers[1]);
        }
        log::write(&self.files, Some(task.id()), &format!("merging {} into {}", gone.join(", "), stays.file));
        let mark = lowest.folded;
        Ok(Folding { run: run.to_vec(), direction, task, chain, beneath, layers, gone, room, mark })
    }

    /// The room there is, if it is not enough for so many bytes more.
    fn scarce_room(&self, stays: &LayerRow, bytes: u64) -> Option<u64> {
        let room = self.files.room(stays);
        (room < bytes.saturating_add(PLENTY)).then_some(room)
    }

    /// A layer's handle: the one of the chain that is served, or one of its own.
    pub(crate) fn handle(
        &self,
        row: &LayerRow,
        mode: Mode,
        disks: Option<&mut Disks>,
    ) -> Result<Arc<dyn Layer>, Problem> {
        let served = disks.and_then(|disks| disks.handle(row, mode));
        served.unwrap_or_else(|| self.files.open_layer(row, mode))
    }

    /// A handle of the layer that others fold into.
    fn filled(&self, row: &LayerRow, disks: Option<&mut Disks>) -> Result<Arc<dyn Layer>, Problem> {
        let served = disks.and_then(|disks| disks.filled(row));
        served.unwrap_or_else(|| self.files.open_layer(row, Mode::Write))
    }

    /// Gives a leaf that a guest writes a new one on top, so that it can be folded piece by piece. Whether that was possible; if it was not, it is done
    /// without.
    fn push_empty(&self, machine: &Machine, leaf: LayerId, disks: Option<&mut Disks>) -> bool {
        let disk = machine.now.disks.iter().find(|(_, id)| **id == leaf).map(|(disk, _)| disk.clone());
        let (Some(disk), Some(disks)) = (disk, disks) else { return false };
        let leaves = self.leaf_rows(&BTreeMap::from([(disk, leaf)]));
        let pushed = self.push_unasked(disks, &leaves);
        if let Err(problem) = &pushed {
            tracing::warn!("a leaf could not be followed by a new one: {problem}");
        }
        pushed.is_ok()
    }

    /// Puts these fresh leaves on top, for no request.
    fn push_unasked(&self, disks: &mut Disks, leaves: &Leaves) -> Result<(), Problem> {
        let journal = Journal {
            job: JobId::new(),
            request: serde_json::json!("split"),
            files: files_of(leaves),
            note: String::new(),
        };
        self.book.commit(|rows| rows.insert_journal(journal.clone()))?;
        self.steps.at("split:journalled");
        let committed = self.make_leaves_now(leaves, Some(disks)).and_then(|made| {
            // The ledger knows them before the first write is acknowledged into one (invariant 3).
            self.book.commit(|rows| {
                rows.machine.follow(leaves.clone());
                rows.remove_journal(journal.job);
            })?;
            Ok(made)
        });
        let made = match committed {
            Ok(made) => made,
            Err(problem) => {
                self.forget(&journal)?;
                return Err(problem);
            }
        };
        self.steps.at("split:committed");
        self.push(disks, leaves, made);
        disks.seal(&self.rows().machine)
    }

    /// Folds, until it is done or `stop` was asked for. Blocks. To be followed by [`Keeper::folded`].
    pub fn fold(&self, folding: Folding, stop: &Cancel) -> Folded {
        let mut starved = false;
        let outcome = self.carry_out_fold(&folding, stop, &mut starved);
        Folded { run: folding.run, direction: folding.direction, task: folding.task, outcome, starved }
    }

    fn carry_out_fold(&self, folding: &Folding, stop: &Cancel, starved: &mut bool) -> Result<Outcome, Problem> {
        let Folding { run, direction, task, chain, beneath, layers, gone, room, mark } = folding;
        let commit = || {
            self.steps.at("merge:copied");
            self.book.commit(|rows| {
                for fold in run {
                    folded(&mut rows.machine, *fold, *direction);
                }
                rows.insert_journal(Journal {
                    job: task.id(),
                    request: serde_json::json!("merge"),
                    files: gone.clone(),
                    note: top_of(run).to_string(),
                });
            })?;
            self.steps.at("merge:committed");
            Ok::<(), Problem>(())
        };
        // Whichever way it moves: a guest may come to write to a leaf, be it much later.
        let may_mark = !self.is_leaf(top_of(run));
        let mut marked = *mark;
        let mut progress = |progress: merge::Progress| {
            task.progress(progress.done, progress.total);
            if may_mark && progress.mark.is_some() && progress.mark != marked {
                marked = progress.mark;
                self.mark(run, marked);
            }
            self.steps.at("merge:copying");
            task.keep_pace(progress.done, || stop.asked());
            if stop.asked() || task.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let marks = match may_mark {
            true => Marks { from: *mark, every: self.sizes.mark_every },
            false => Marks { from: None, every: u64::MAX },
        };
        let live = chain.as_deref();
        let (stays, outcome) = if let (Direction::Up, Some(beneath)) = (direction, beneath) {
            (layers.last(), merge::fold_up(live, beneath, layers, &mut progress, commit))
        } else if let Some(room) = room {
            let all: Vec<_> = beneath.iter().chain(layers).cloned().collect();
            (layers.first(), merge::move_down(live, &all, *room, uuid::Uuid::new_v4(), &mut progress, commit))
        } else {
            let g = uuid::Uuid::new_v4();
            (layers.first(), merge::fold_run(live, &layers[1..], &layers[0], g, marks, &mut progress, commit))
        };
        let outcome = outcome.map_err(|e| match e {
            merge::FoldError::Image(e) => {
                *starved = e.kind == image::ErrorKind::NoSpace;
                image_problem(&e)
            }
            merge::FoldError::Commit(problem) => problem,
        })?;
        // Left clean for other tools; a live leaf is closed with its chain.
        if live.is_none() {
            stays.map_or(Ok(()), |stays| stays.close()).map_err(|e| image_problem(&e))?;
        }
        Ok(outcome)
    }

    fn is_leaf(&self, layer: LayerId) -> bool {
        self.rows().machine.now.disks.values().any(|leaf| *leaf == layer)
    }

    /// Notes how far a fold is. Without that it only has more to do again.
    fn mark(&self, run: &[Fold], mark: Option<Mark>) {
        let noted = self.book.commit(|rows| {
            if let Some(row) = run.first().and_then(|fold| rows.machine.layers.get_mut(&fold.into)) {
                row.folded = mark;
            }
        });
        self.steps.at("merge:marked");
        if let Err(problem) = noted {
            tracing::warn!("how far a merge is could not be noted: {problem}");
        }
    }

    /// What is left to do after a fold: the file that it emptied goes. `Cancelled` if it was stopped.
    pub fn folded(&self, ended: &Folded, mut disks: Option<&mut Disks>) -> Result<serde_json::Value, Problem> {
        let Folded { run, direction, task, outcome, .. } = ended;
        match outcome {
            Ok(Outcome::Folded) => {}
            Ok(Outcome::Cancelled) => {
                return Err(Problem::new(ProblemKind::Cancelled, "the merge was stopped; nothing is lost"));
            }
            Err(problem) => return Err(problem.clone()),
        }
        if let Some(disks) = disks.as_deref_mut() {
            for fold in run {
                disks.folded(*fold, *direction);
            }
        }
        let rows = self.rows();
        let top = top_of(run);
        let file = rows.machine.layers.get(&top).map(|row| row.file.clone()).unwrap_or_default();
        self.name_neighbours(top, disks.as_deref_mut())?;
        if let Some(disks) = disks {
            disks.seal(&rows.machine)?;
        }
        if let Some(journal) = rows.journal(task.id()) {
            self.forget(journal)?;
        }
        log::write(&self.files, Some(task.id()), &format!("merged into {file}"));
        Ok(serde_json::json!({ "file": file }))
    }

    /// After a fold: what stands on the layer names the file that it lives in now, and it names what it stands on itself, and nothing
    /// else. The names are for other tools, we go by the ledger; but a second id that was left would be taken for a fold under way.
    pub(crate) fn name_neighbours(&self, folded: LayerId, mut disks: Option<&mut Disks>) -> Result<(), Problem> {
        let rows = self.rows();
        let machine = &rows.machine;
        let Some(row) = machine.layers.get(&folded) else { return Ok(()) };
        self.label_moved(&rows, row, disks.as_deref_mut());
        if let Some(parent) = row.parent.and_then(|id| machine.layers.get(&id)) {
            let id = self.handle(parent, Mode::Read, disks.as_deref_mut())?.info().data_id;
            // A raw file has none.
            let linkage = |link: &ParentLink| if id.is_nil() { link.linkage } else { id };
            self.change_link(row, disks.as_deref_mut(), |link| ParentLink {
                linkage: linkage(&link),
                linkage2: None,
                ..named(link, parent)
            })?;
        }
        for child in machine.layers.values().filter(|child| child.parent == Some(folded)) {
            // Only a name, for other tools: a file of some branch that is in a bad way does not hold up the others.
            if let Err(problem) = self.change_link(child, disks.as_deref_mut(), |link| named(link, row)) {
                log::write(&self.files, None, &format!("{} does not name {} now: {problem}", child.file, row.file));
            }
        }
        Ok(())
    }

    /// Changes what a layer says of its parent, if there is anything to change, and the file is ours alone.
    fn change_link(
        &self,
        row: &LayerRow,
        mut disks: Option<&mut Disks>,
        change: impl FnOnce(ParentLink) -> ParentLink,
    ) -> Result<(), Problem> {
        if self.files.is_shared(row) {
            return Ok(());
        }
        let link = self.handle(row, Mode::Read, disks.as_deref_mut())?.info().parent;
        let Some(changed) = link.clone().map(change).filter(|changed| Some(changed) != link.as_ref()) else {
            return Ok(());
        };
        self.with_writable(row, disks, |layer| layer.relink(None, Some(changed)).map_err(|e| image_problem(&e)))
    }

    /// Changes something in the head of a layer's file: by the handle of the chain that is served, which stays open, or by one of its own.
    pub(crate) fn with_writable(
        &self,
        row: &LayerRow,
        disks: Option<&mut Disks>,
        change: impl FnOnce(&dyn Layer) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        if let Some(served) = disks.and_then(|disks| disks.handle(row, Mode::Write)).transpose()? {
            return change(&*served);
        }
        let layer = self.files.open_layer(row, Mode::Write)?;
        change(&*layer)?;
        layer.close().map_err(|e| image_problem(&e))
    }
}

/// The layer that stays of a run of folds.
fn top_of(run: &[Fold]) -> LayerId {
    run[run.len() - 1].child
}

/// The same link, to a parent that lies in the file of this row.
fn named(link: ParentLink, parent: &LayerRow) -> ParentLink {
    let relative_path = name_beside(parent).map(|name| format!(r".\{name}"));
    if link.relative_path == relative_path {
        return link;
    }
    ParentLink { relative_path, absolute_path: None, ..link }
}

fn row(machine: &Machine, id: LayerId) -> Result<&LayerRow, Problem> {
    machine.layers.get(&id).ok_or_else(|| Problem::damaged(format!("layer {id} is not in the ledger")))
}

/// The rows of all layers that are folded into one, lowest first.
fn rows_of<'a>(machine: &'a Machine, run: &[Fold]) -> Result<Vec<&'a LayerRow>, Problem> {
    let ids = run.first().map(|fold| fold.into).into_iter().chain(run.iter().map(|fold| fold.child));
    ids.map(|id| row(machine, id)).collect()
}

fn plan(beneath: Option<&Arc<dyn Layer>>, layers: &[Arc<dyn Layer>]) -> Result<Plan, Problem> {
    merge::plan(beneath.map(|beneath| &**beneath), layers).map_err(|e| image_problem(&e))
}

/// The way on which fewer bytes move. A file that was taken in place stays, and takes what stands on it.
fn way(lowest: &LayerRow, plan: &Plan) -> Direction {
    if lowest.in_place { Direction::Down } else { plan.direction() }
}

/// What a merge will do to the files of a run, as far as they say so now.
#[derive(Debug)]
pub(crate) struct Merge<'a> {
    /// The layer whose file stays.
    pub(crate) stays: &'a LayerRow,
    /// Those whose files go, and how many bytes move out of each.
    pub(crate) gone: Vec<(&'a LayerRow, u64)>,
}

/// Looks at the files of a run. A leaf that is being written says what it held at its last flush.
pub(crate) fn foresee<'a>(machine: &'a Machine, files: &Files, run: &[Fold]) -> Result<Merge<'a>, Problem> {
    let rows = rows_of(machine, run)?;
    let open = |row: &LayerRow| files.open_layer(row, Mode::Read);
    let layers = rows.iter().map(|row| open(row)).collect::<Result<Vec<_>, _>>()?;
    let beneath = rows[0].parent.map(|id| row(machine, id).and_then(open)).transpose()?;
    let plan = plan(beneath.as_ref(), &layers)?;
    let direction = way(rows[0], &plan);
    let (stays, gone) = match direction {
        Direction::Down => (rows[0], &rows[1..]),
        Direction::Up => (rows[rows.len() - 1], &rows[..rows.len() - 1]),
    };
    Ok(Merge { stays, gone: gone.iter().copied().zip(plan.moves(direction).iter().copied()).collect() })
}

/// What deleting a snapshot (with everything below it) would do to the files.
pub(crate) fn plan_delete(machine: &Machine, files: &Files, id: SnapshotId, subtree: bool) -> DeletePlan {
    let before = pending_files(&views::pending(machine, files));
    let mut after = machine.clone();
    let snapshots = after.delete(id, subtree);
    let pending: Vec<Pending> = views::pending(&after, files)
        .into_iter()
        .filter(|p| !before.contains(&(p.kind.clone(), p.file.clone())))
        .collect();
    let moved = pending.iter().filter(|p| p.kind == "merge").map(|p| p.bytes).sum();
    let going = |row: &&LayerRow| pending.iter().any(|p| p.kind != "wait" && p.file == row.file);
    // What another machine has, too, frees nothing.
    let gone = |row: &&LayerRow| going(row) && !files.is_shared(row);
    DeletePlan {
        snapshots,
        bytes_moved: moved,
        bytes_freed: machine.layers.values().filter(gone).map(|row| files.allocated(row)).sum(),
        estimated_ms: views::merge_ms(moved),
        undo_for: machine.policy.undo_for,
        files: pending,
    }
}

fn pending_files(pending: &[Pending]) -> Vec<(String, String)> {
    pending.iter().map(|p| (p.kind.clone(), p.file.clone())).collect()
}

/// For messages: whose machine this is.
impl Shared {
    /// The machine's name.
    pub(crate) fn name(&self) -> String {
        self.rows().machine.name.clone()
    }
}
