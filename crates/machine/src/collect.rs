//! The collector: what no row names is removed or folded away, in the background, as jobs that one can watch and cancel.
//!
//! What there is to do is derived from the rows alone ([`garbage`]); nothing remembers it. So a crash needs no repair here: the
//! next worker derives the same, and a fold that was cut off begins again (its child is the truth until its commit).

use crate::actor::{Owner, Shared};
use crate::disks::Disks;
use crate::files::{Files, image_problem, name_beside};
use crate::garbage::{Fold, folded, garbage};
use crate::job::{Cancel, Task};
use crate::keeper::Keeper;
use crate::ledger::Journal;
use crate::live::Live;
use crate::log;
use crate::mark;
use crate::request::{DeletePlan, Pending, Problem, ProblemKind};
use crate::tree::{JobId, LayerId, Machine, SnapshotId};
use crate::views;
use image::merge::{self, Outcome};
use image::{Chain, Layer, ParentLink};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use store::Mode;
use tokio::task::JoinHandle;

/// A fold that is to be done.
#[derive(Debug)]
pub struct Folding {
    /// From the base upwards; the last one's child is what stays.
    run: Vec<Fold>,
    task: Task,
    /// Where a guest goes on meanwhile.
    chain: Option<Arc<Chain>>,
    layers: Vec<Arc<dyn Layer>>,
    into: Arc<dyn Layer>,
    /// The files that are of no use afterwards.
    gone: Vec<String>,
}

/// How a fold ended.
#[derive(Debug)]
pub struct Folded {
    run: Vec<Fold>,
    task: Task,
    outcome: Result<Outcome, Problem>,
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
    task: Task,
    cancel: Arc<Cancel>,
    thread: JoinHandle<Folded>,
}

impl Underway {
    /// The end of the fold under way; never, if there is none.
    pub(crate) async fn next(folding: &mut Option<Self>) -> Folded {
        let Some(running) = folding else { return std::future::pending().await };
        let ended = (&mut running.thread).await;
        let Self { run, task, .. } = folding.take().expect("it was there, and nobody else takes it");
        ended.unwrap_or_else(|e| {
            let outcome = Err(Problem::failed(format!("a merge broke off: {e}")));
            Folded { run, task, outcome }
        })
    }
}

impl Owner {
    /// Does what little there is to do at once, and begins a fold if one is due.
    pub(crate) fn collect(&mut self) {
        if self.folding.is_none() && !self.resting {
            let begun = self.keeper.remove_garbage().and_then(|()| self.begin_next_fold());
            if let Err(problem) = begun {
                self.rest(&problem);
            }
        }
        self.answer_waiting();
    }

    fn begin_next_fold(&mut self) -> Result<(), Problem> {
        let Some(folding) = self.keeper.next_fold(self.live.as_mut().map(Live::disks))? else { return Ok(()) };
        self.shared.set_moment(|moment| moment.doing = vec!["merging".to_owned()]);
        let cancel = Arc::<Cancel>::default();
        let (run, task) = (folding.run.clone(), folding.task.clone());
        let (keeper, stop) = (self.keeper.clone(), Arc::clone(&cancel));
        let thread = tokio::task::spawn_blocking(move || keeper.fold(folding, &stop));
        self.folding = Some(Underway { run, task, cancel, thread });
        Ok(())
    }

    /// Something is in the way: left for the next request that changes the tree, or the next worker.
    fn rest(&mut self, problem: &Problem) {
        self.resting = true;
        log::write(&self.keeper.files, None, &format!("cleaning up rests: {problem}"));
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

    /// Stops a fold under way, for a request that wants the tree to itself. It begins again afterwards.
    pub(crate) async fn stop_folding(&mut self) {
        if let Some(folding) = &self.folding {
            folding.cancel.ask();
            let ended = Underway::next(&mut self.folding).await;
            self.folded(&ended);
        }
    }

    /// A fold has ended.
    pub(crate) fn folded(&mut self, ended: &Folded) {
        self.shared.set_moment(|moment| moment.doing.retain(|what| what != "merging"));
        let outcome = self.keeper.folded(ended, self.live.as_mut().map(Live::disks));
        match &outcome {
            // Its user's wish holds until the tree changes again; ours is only for a moment.
            Err(problem) if problem.kind == ProblemKind::Cancelled => self.resting = ended.task.cancelled(),
            Err(problem) => self.rest(problem),
            Ok(_) => {}
        }
        self.finish(&ended.task, &outcome);
    }
}

impl Keeper {
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

    /// The next fold that is due, its layers open and its job begun. `disks` are those of a guest that runs meanwhile.
    pub fn next_fold(&self, disks: Option<&mut Disks>) -> Result<Option<Folding>, Problem> {
        let rows = self.rows();
        match garbage(&rows.machine).run() {
            [] => Ok(None),
            run => self.open_fold(&rows.machine, run.to_vec(), disks).map(Some),
        }
    }

    fn open_fold(&self, machine: &Machine, run: Vec<Fold>, mut disks: Option<&mut Disks>) -> Result<Folding, Problem> {
        let row = |id: LayerId| {
            machine.layers.get(&id).ok_or_else(|| Problem::damaged(format!("layer {id} is not in the ledger")))
        };
        let into = row(run[0].into)?;
        let children = run.iter().map(|fold| row(fold.child)).collect::<Result<Vec<_>, _>>()?;
        let top = children[children.len() - 1];
        // While a guest runs on this chain, the fold goes through it; the handles of what changes are made writable.
        let chain = disks.as_ref().and_then(|disks| disks.chain_of(machine, top.id));
        let mut open = |row, mode| match &mut disks {
            Some(disks) if chain.is_some() && mode == Mode::Write => disks.writable(row),
            Some(disks) if chain.is_some() => disks.layer(row),
            _ => self.files.open_layer(row, mode),
        };
        let into_layer = open(into, Mode::Write)?;
        let mode = |number| if number == 0 { Mode::Write } else { Mode::Read };
        let layers = children.iter().enumerate().map(|(number, row)| open(row, mode(number)));
        let layers = layers.collect::<Result<_, _>>()?;
        let task = self.jobs.open(JobId::new(), &machine.name, "merge");
        let task = task.map_err(|_| Problem::failed("a fresh job id is taken"))?;
        task.running();
        let gone: Vec<String> = children.iter().map(|row| row.file.clone()).collect();
        log::write(&self.files, Some(task.id()), &format!("merging {} into {}", gone.join(", "), into.file));
        Ok(Folding { run, task, chain, layers, into: into_layer, gone })
    }

    /// Folds, until it is done or `stop` was asked for. Blocks. To be followed by [`Keeper::folded`].
    pub fn fold(&self, folding: Folding, stop: &Cancel) -> Folded {
        let outcome = self.carry_out_fold(&folding, stop);
        Folded { run: folding.run, task: folding.task, outcome }
    }

    fn carry_out_fold(&self, folding: &Folding, stop: &Cancel) -> Result<Outcome, Problem> {
        let Folding { run, task, chain, layers, into, gone } = folding;
        let commit = || {
            self.steps.at("merge:copied");
            self.book.commit(|rows| {
                for fold in run {
                    folded(&mut rows.machine, fold.into, fold.child);
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
        let mut progress = |progress: merge::Progress| {
            task.progress(progress.done, progress.total);
            self.steps.at("merge:copying");
            if stop.asked() || task.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let g = uuid::Uuid::new_v4();
        let outcome = merge::fold_run(chain.as_deref(), layers, into, g, &mut progress, commit);
        let outcome = outcome.map_err(|e| match e {
            merge::FoldError::Image(e) => image_problem(&e),
            merge::FoldError::Commit(problem) => problem,
        })?;
        // Left clean for other tools; a live leaf is closed with its chain.
        if chain.is_none() {
            into.close().map_err(|e| image_problem(&e))?;
        }
        Ok(outcome)
    }

    /// What is left to do after a fold: the file that it emptied goes. `Cancelled` if it was stopped.
    pub fn folded(&self, ended: &Folded, mut disks: Option<&mut Disks>) -> Result<serde_json::Value, Problem> {
        let Folded { run, task, outcome } = ended;
        match outcome {
            Ok(Outcome::Folded) => {}
            Ok(Outcome::Cancelled) => {
                return Err(Problem::new(ProblemKind::Cancelled, "the merge was stopped; nothing is lost"));
            }
            Err(problem) => return Err(problem.clone()),
        }
        if let Some(disks) = disks.as_deref_mut() {
            for fold in run {
                disks.folded(fold.into, fold.child);
            }
        }
        let rows = self.rows();
        let top = top_of(run);
        let file = rows.machine.layers.get(&top).map(|row| row.file.clone()).unwrap_or_default();
        self.rename_parents(top, disks.as_deref_mut())?;
        if let Some(disks) = disks {
            disks.seal(&rows.machine)?;
        }
        if let Some(journal) = rows.journal(task.id()) {
            self.forget(journal)?;
        }
        log::write(&self.files, Some(task.id()), &format!("merged into {file}"));
        Ok(serde_json::json!({ "file": file }))
    }

    /// What stands on a layer that has moved names the file that it lives in now. For other tools: we go by the ledger.
    pub(crate) fn rename_parents(&self, moved: LayerId, mut disks: Option<&mut Disks>) -> Result<(), Problem> {
        let rows = self.rows();
        let machine = &rows.machine;
        let Some(parent) = machine.layers.get(&moved) else { return Ok(()) };
        for row in machine.layers.values().filter(|row| row.parent == Some(moved)) {
            let (layer, served) = match &mut disks {
                Some(disks) if disks.chain_of(machine, row.id).is_some() => (disks.writable(row)?, true),
                _ => (self.files.open_layer(row, Mode::Write)?, false),
            };
            rename_parent(&*layer, name_beside(parent)).map_err(|e| image_problem(&e))?;
            if !served {
                layer.close().map_err(|e| image_problem(&e))?;
            }
        }
        Ok(())
    }
}

/// The layer that stays of a run of folds.
fn top_of(run: &[Fold]) -> LayerId {
    run[run.len() - 1].child
}

fn rename_parent(child: &dyn Layer, name: Option<&str>) -> image::Result<()> {
    let Some(link) = child.info().parent else { return Ok(()) };
    let relative_path = name.map(|name| format!(r".\{name}"));
    if link.relative_path == relative_path {
        return Ok(());
    }
    child.relink(None, Some(ParentLink { relative_path, absolute_path: None, ..link }))
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
    let of = |kind: &str| pending.iter().filter(|p| p.kind == kind).map(|p| p.bytes).sum::<u64>();
    let (moved, removed) = (of("merge"), of("remove"));
    DeletePlan {
        snapshots,
        bytes_moved: moved,
        bytes_freed: moved + removed,
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
