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
use crate::tree::{JobId, LayerId, Machine, SnapshotId};
use crate::views;
use image::merge::{self, Outcome};
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
    task: Task,
    cancel: Arc<Cancel>,
    thread: JoinHandle<Result<Outcome, Problem>>,
}

/// How a fold ended.
#[derive(Debug)]
pub(crate) struct Folded {
    run: Vec<Fold>,
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
        Folded { run: ended.run, task: ended.task, outcome }
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
        match garbage(&rows.machine).run() {
            [] => Ok(()),
            run => self.begin_fold(&rows.machine, run.to_vec()),
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
        let row = |id: LayerId| {
            machine.layers.get(&id).ok_or_else(|| Problem::damaged(format!("layer {id} is not in the ledger")))
        };
        let into = row(run[0].into)?;
        let children = run.iter().map(|fold| row(fold.child)).collect::<Result<Vec<_>, _>>()?;
        let top = children[children.len() - 1];
        // While QEMU runs on this chain, the fold goes through it; the handles of what changes are made writable.
        let chain = self.live.as_ref().and_then(|live| live.chain_of(machine, top.id));
        let mut open = |row, mode| match &mut self.live {
            Some(live) if chain.is_some() && mode == Mode::Write => live.writable(&self.files, row),
            Some(live) if chain.is_some() => live.layer(row),
            _ => self.files.open_layer(row, mode),
        };
        let into_layer = open(into, Mode::Write)?;
        let mode = |number| if number == 0 { Mode::Write } else { Mode::Read };
        let layers: Vec<_> =
            children.iter().enumerate().map(|(number, row)| open(row, mode(number))).collect::<Result<_, _>>()?;
        let task = self
            .shared
            .jobs
            .open(JobId::new(), &machine.name, "merge")
            .map_err(|_| Problem::failed("a fresh job id is taken"))?;
        task.running();
        let gone: Vec<String> = children.iter().map(|row| row.file.clone()).collect();
        log::write(&self.files, Some(task.id()), &format!("merging {} into {}", gone.join(", "), into.file));
        self.shared.set_moment(|moment| moment.doing = vec!["merging".to_owned()]);
        let cancel = Arc::<Cancel>::default();
        let (folds, top) = (run.clone(), top.id);
        let (book, steps) = (self.book.clone(), Arc::clone(&self.steps));
        let (told, stop) = (task.clone(), Arc::clone(&cancel));
        let live = chain.is_some();
        let thread = tokio::task::spawn_blocking(move || {
            let job = told.id();
            let commit = || {
                steps.at("merge:copied");
                book.commit(|rows| {
                    for fold in &folds {
                        folded(&mut rows.machine, fold.into, fold.child);
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
                if stop.asked() || told.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let g = uuid::Uuid::new_v4();
            let outcome = merge::fold_run(chain.as_deref(), &layers, &into_layer, g, &mut progress, commit).map_err(
                |e| match e {
                    merge::FoldError::Image(e) => image_problem(&e),
                    merge::FoldError::Commit(problem) => problem,
                },
            )?;
            // Left clean for other tools; a live leaf is closed with its chain.
            if !live {
                into_layer.close().map_err(|e| image_problem(&e))?;
            }
            Ok(outcome)
        });
        self.folding = Some(Folding { run, task, cancel, thread });
        Ok(())
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
        let Folded { run, task, outcome } = ended;
        self.shared.set_moment(|moment| moment.doing.retain(|what| what != "merging"));
        let cancelled =
            || Problem::new(crate::request::ProblemKind::Cancelled, "the merge was stopped; nothing is lost");
        let outcome = match outcome {
            Ok(Outcome::Folded) => self.folded_well(&run, &task),
            Ok(Outcome::Cancelled) => {
                // Its user's wish holds until the tree changes again; ours is only for a moment.
                self.resting = task.cancelled();
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

    fn folded_well(&mut self, run: &[Fold], task: &Task) -> Result<serde_json::Value, Problem> {
        if let Some(live) = &mut self.live {
            for fold in run {
                live.folded(fold.into, fold.child);
            }
        }
        let rows = self.machine();
        let top = run[run.len() - 1].child;
        let file = rows.machine.layers.get(&top).map(|row| row.file.clone()).unwrap_or_default();
        self.rename_parents(top)?;
        self.seal()?;
        if let Some(journal) = rows.journal(task.id()) {
            self.forget(journal)?;
        }
        log::write(&self.files, Some(task.id()), &format!("merged into {file}"));
        Ok(serde_json::json!({ "file": file }))
    }
}

impl Owner {
    /// What stands on a layer that has moved names the file that it lives in now. For other tools: we go by the ledger.
    pub(crate) fn rename_parents(&mut self, moved: LayerId) -> Result<(), Problem> {
        let rows = self.machine();
        let machine = &rows.machine;
        let Some(parent) = machine.layers.get(&moved) else { return Ok(()) };
        for row in machine.layers.values().filter(|row| row.parent == Some(moved)) {
            let (layer, served) = match &mut self.live {
                Some(live) if live.chain_of(machine, row.id).is_some() => (live.writable(&self.files, row)?, true),
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
