//! The collector: what no row names is removed or folded away, in the background, as jobs that one can watch and cancel.
//!
//! What there is to do is derived from the rows alone ([`garbage`]); nothing remembers it. So a crash needs no repair here: the
//! next worker derives the same, and a fold that was cut off begins again (its child is the truth until its commit).

use crate::actor::{Owner, Shared};
use crate::files::{Files, image_problem, name_beside};
use crate::garbage::{Fold, folded, garbage};
use crate::job::{Cancel, Task};
use crate::ledger::Journal;
use crate::log;
use crate::mark;
use crate::request::{DeletePlan, Pending, Problem};
use crate::tree::{JobId, LayerId, LayerRow, Machine, SnapshotId};
use crate::views;
use image::merge::{self, Direction, Outcome, Plan};
use image::{Layer, ParentLink};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use store::Mode;
use tokio::task::JoinHandle;

/// A fold under way, on a thread of its own.
#[derive(Debug)]
pub(crate) struct Folding {
    /// From the base upwards; the last one's child is what stays.
    run: Vec<Fold>,
    direction: Direction,
    task: Task,
    cancel: Arc<Cancel>,
    thread: JoinHandle<Result<Outcome, Problem>>,
}

/// How a fold ended.
#[derive(Debug)]
pub(crate) struct Folded {
    run: Vec<Fold>,
    direction: Direction,
    task: Task,
    outcome: Result<Outcome, Problem>,
}

impl Folding {
    /// The end of the fold under way; never, if there is none.
    pub(crate) async fn next(folding: &mut Option<Self>) -> Folded {
        let Some(running) = folding else { return std::future::pending().await };
        let outcome = (&mut running.thread).await;
        let ended = folding.take().expect("it was there, and nobody else takes it");
        let outcome = outcome.unwrap_or_else(|e| Err(Problem::failed(format!("a merge broke off: {e}"))));
        Folded { run: ended.run, direction: ended.direction, task: ended.task, outcome }
    }
}

impl Owner {
    /// Does what little there is to do at once, and begins a fold if one is due.
    pub(crate) fn collect(&mut self) {
        if self.folding.is_none() && !self.resting {
            let begun = self.remove_garbage().and_then(|()| self.begin_next_fold());
            if let Err(problem) = begun {
                self.rest(&problem);
            }
        }
        self.answer_waiting();
    }

    fn begin_next_fold(&mut self) -> Result<(), Problem> {
        let rows = self.machine();
        match garbage(&rows.machine).runs().next() {
            None => Ok(()),
            Some(run) => self.begin_fold(&rows.machine, run.to_vec()),
        }
    }

    /// Something is in the way: left for the next request that changes the tree, or the next worker.
    fn rest(&mut self, problem: &Problem) {
        self.resting = true;
        log::write(&self.files, None, &format!("cleaning up rests: {problem}"));
        let words = problem.message.clone();
        self.shared.set_moment(|moment| moment.alert = Some(format!("cleaning up rests: {words}")));
        for (task, _) in std::mem::take(&mut self.waiting) {
            let words = format!("it is deleted, but its files could not be cleaned up: {words}");
            self.finish(&task, &Err(Problem { message: words, ..problem.clone() }));
        }
    }

    /// Deletions that wait for merging have ended when nothing more can be done.
    fn answer_waiting(&mut self) {
        if self.folding.is_none() {
            for (task, result) in std::mem::take(&mut self.waiting) {
                self.finish(&task, &Ok(result));
            }
        }
    }

    /// Removes the files of layers that nothing names and nothing stands on. First the rows, then the files: a file without a row
    /// is harmless, and the journal knows it.
    fn remove_garbage(&self) -> Result<(), Problem> {
        let rows = self.machine();
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
            for id in &gone {
                rows.machine.layers.remove(id);
            }
            let machine = &mut rows.machine;
            machine.now.memory_base = machine.now.memory_base.filter(|id| machine.layers.contains_key(id));
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

    fn begin_fold(&mut self, machine: &Machine, run: Vec<Fold>) -> Result<(), Problem> {
        let rows = rows_of(machine, &run)?;
        let (lowest, top) = (rows[0], rows[rows.len() - 1]);
        // While QEMU runs on this chain, the fold goes through it.
        let chain = self.live.as_ref().and_then(|live| live.chain_of(machine, top.id));
        let beneath = lowest.parent.map(|id| row(machine, id)).transpose()?;
        let beneath = beneath.map(|row| self.handle(row, Mode::Read)).transpose()?;
        let mut layers = rows.iter().map(|row| self.handle(row, Mode::Read)).collect::<Result<Vec<_>, _>>()?;
        let direction = way(lowest, &plan(beneath.as_ref(), &layers)?);
        // The handles of what changes are made writable: down the parent and its child's link, up the top.
        let written = if direction == Direction::Down { 0..2 } else { rows.len() - 1..rows.len() };
        for number in written {
            layers[number] = self.handle(rows[number], Mode::Write)?;
        }
        let (stays, gone) =
            if direction == Direction::Down { (lowest, &rows[1..]) } else { (top, &rows[..rows.len() - 1]) };
        let gone: Vec<String> = gone.iter().map(|row| row.file.clone()).collect();
        let task = self
            .shared
            .jobs
            .open_at(JobId::new(), &machine.name, "merge", std::mem::take(&mut self.merge_pace))
            .map_err(|_| Problem::failed("a fresh job id is taken"))?;
        task.running();
        log::write(&self.files, Some(task.id()), &format!("merging {} into {}", gone.join(", "), stays.file));
        self.shared.set_moment(|moment| moment.doing = vec!["merging".to_owned()]);
        let cancel = Arc::<Cancel>::default();
        let (folds, top) = (run.clone(), top.id);
        let (book, steps) = (self.book.clone(), Arc::clone(&self.steps));
        let (told, stop) = (task.clone(), Arc::clone(&cancel));
        let thread = tokio::task::spawn_blocking(move || {
            let job = told.id();
            let commit = || {
                steps.at("merge:copied");
                book.commit(|rows| {
                    for fold in &folds {
                        folded(&mut rows.machine, *fold, direction);
                    }
                    rows.insert_journal(Journal {
                        job,
                        request: serde_json::json!("merge"),
                        files: gone,
                        note: top.to_string(),
                    });
                })?;
                steps.at("merge:committed");
                Ok::<(), Problem>(())
            };
            let mut progress = |progress: merge::Progress| {
                told.progress(progress.done, progress.total);
                steps.at("merge:copying");
                told.keep_pace(progress.done, || stop.asked());
                if stop.asked() || told.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let live = chain.as_deref();
            let (stays, outcome) = if let (Direction::Up, Some(beneath)) = (direction, &beneath) {
                (layers.last(), merge::fold_up(live, beneath, &layers, &mut progress, commit))
            } else {
                let g = uuid::Uuid::new_v4();
                (layers.first(), merge::fold_run(live, &layers[1..], &layers[0], g, &mut progress, commit))
            };
            let outcome = outcome.map_err(|e| match e {
                merge::FoldError::Image(e) => image_problem(&e),
                merge::FoldError::Commit(problem) => problem,
            })?;
            // Left clean for other tools; a live leaf is closed with its chain.
            if live.is_none() {
                stays.map_or(Ok(()), |stays| stays.close()).map_err(|e| image_problem(&e))?;
            }
            Ok(outcome)
        });
        self.folding = Some(Folding { run, direction, task, cancel, thread });
        Ok(())
    }

    /// A layer's handle: the one of the chain that is served, or one of its own.
    fn handle(&mut self, row: &LayerRow, mode: Mode) -> Result<Arc<dyn Layer>, Problem> {
        let rows = self.machine();
        match &mut self.live {
            Some(live) if live.chain_of(&rows.machine, row.id).is_none() => self.files.open_layer(row, mode),
            Some(live) if mode == Mode::Write => live.writable(&self.files, row),
            Some(live) => live.layer(row),
            None => self.files.open_layer(row, mode),
        }
    }

    /// Stops a fold under way, for a request that wants the tree to itself. It begins again afterwards.
    pub(crate) async fn stop_folding(&mut self) {
        if let Some(folding) = &self.folding {
            folding.cancel.ask();
            let ended = Folding::next(&mut self.folding).await;
            self.folded(ended);
        }
    }

    /// A fold has ended.
    pub(crate) fn folded(&mut self, ended: Folded) {
        let Folded { run, direction, task, outcome } = ended;
        self.shared.set_moment(|moment| moment.doing.retain(|what| what != "merging"));
        let cancelled =
            || Problem::new(crate::request::ProblemKind::Cancelled, "the merge was stopped; nothing is lost");
        let outcome = match outcome {
            Ok(Outcome::Folded) => self.folded_well(&run, direction, &task),
            Ok(Outcome::Cancelled) => {
                // Its user's wish holds until the tree changes again; ours is only for a moment, and the next one goes on as fast.
                self.resting = task.cancelled();
                if !self.resting {
                    self.merge_pace = Arc::clone(task.pace());
                }
                Err(cancelled())
            }
            Err(problem) => Err(problem),
        };
        if let Err(problem) = &outcome
            && problem.kind != crate::request::ProblemKind::Cancelled
        {
            self.rest(problem);
        }
        self.finish(&task, &outcome);
    }

    fn folded_well(&mut self, run: &[Fold], direction: Direction, task: &Task) -> Result<serde_json::Value, Problem> {
        if let Some(live) = &mut self.live {
            for fold in run {
                live.folded(*fold, direction);
            }
        }
        let rows = self.machine();
        let top = run[run.len() - 1].child;
        let file = rows.machine.layers.get(&top).map(|row| row.file.clone()).unwrap_or_default();
        self.name_neighbours(top)?;
        self.seal()?;
        if let Some(journal) = rows.journal(task.id()) {
            self.forget(journal)?;
        }
        log::write(&self.files, Some(task.id()), &format!("merged into {file}"));
        Ok(serde_json::json!({ "file": file }))
    }
}

impl Owner {
    /// After a fold: what stands on the layer names the file that it lives in now, and it names what it stands on itself, and nothing
    /// else. The names are for other tools, we go by the ledger; but a second id that was left would be taken for a fold under way.
    pub(crate) fn name_neighbours(&mut self, folded: LayerId) -> Result<(), Problem> {
        let rows = self.machine();
        let machine = &rows.machine;
        let Some(row) = machine.layers.get(&folded) else { return Ok(()) };
        if let Some(parent) = row.parent.and_then(|id| machine.layers.get(&id)) {
            let id = self.handle(parent, Mode::Read)?.info().data_id;
            // A raw file has none.
            let linkage = |link: &ParentLink| if id.is_nil() { link.linkage } else { id };
            self.change_link(row, |link| ParentLink {
                linkage: linkage(&link),
                linkage2: None,
                ..named(link, parent)
            })?;
        }
        for child in machine.layers.values().filter(|child| child.parent == Some(folded)) {
            self.change_link(child, |link| named(link, row))?;
        }
        Ok(())
    }

    /// Changes what a layer says of its parent, if there is anything to change.
    fn change_link(&mut self, row: &LayerRow, change: impl FnOnce(ParentLink) -> ParentLink) -> Result<(), Problem> {
        let rows = self.machine();
        let served = self.live.as_ref().is_some_and(|live| live.chain_of(&rows.machine, row.id).is_some());
        let link = self.handle(row, Mode::Read)?.info().parent;
        let Some(changed) = link.clone().map(change).filter(|changed| Some(changed) != link.as_ref()) else {
            return Ok(());
        };
        let layer = self.handle(row, Mode::Write)?;
        layer.relink(None, Some(changed)).map_err(|e| image_problem(&e))?;
        if served { Ok(()) } else { layer.close().map_err(|e| image_problem(&e)) }
    }
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
    let gone = |row: &&LayerRow| pending.iter().any(|p| p.kind != "wait" && p.file == row.file);
    DeletePlan {
        snapshots,
        bytes_moved: moved,
        bytes_freed: machine.layers.values().filter(gone).map(|row| files.allocated(row)).sum(),
        estimated_ms: views::merge_ms(moved),
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
