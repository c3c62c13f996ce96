//! Copying what a machine shares with others: from then on all of its files are its own.

use crate::actor::Owner;
use crate::files::{copy_store, file_problem};
use crate::job::{Task, end};
use crate::keeper::{Keeper, remember};
use crate::ledger::Journal;
use crate::linked::own_name;
use crate::live::blocking;
use crate::log;
use crate::request::{Problem, ProblemKind};
use crate::tree::{JobId, LayerId, LayerRow};
use serde_json::{Value, json};
use store::Mode;

impl Owner {
    /// Copies each file that another machine has, too. A guest goes on meanwhile: what is shared is only read.
    pub(crate) async fn detach(&mut self, task: &Task) -> Result<Value, Problem> {
        let rows = self.machine();
        let (shared, bytes) = self.keeper.shared();
        if shared.is_empty() {
            return Ok(json!({ "said": format!("{} shares nothing", rows.machine.name), "bytes": 0 }));
        }
        let files = if shared.len() == 1 { "a file was".to_owned() } else { format!("{} files were", shared.len()) };
        let said = format!("{} shares nothing any more: {files} copied", rows.machine.name);
        let result = json!({ "said": said, "bytes": bytes });
        self.copy_all(task, shared, bytes, Some(result.clone())).await?;
        self.keeper.own_boot();
        log::write(&self.keeper.files, Some(task.id()), &said);
        Ok(result)
    }

    /// Copies what is shared, as a part of another request.
    pub(crate) async fn detach_first(&mut self, task: &Task) -> Result<(), Problem> {
        let (shared, bytes) = self.keeper.shared();
        if shared.is_empty() { Ok(()) } else { self.copy_all(task, shared, bytes, None).await }
    }

    async fn copy_all(
        &mut self,
        task: &Task,
        shared: Vec<(LayerRow, String)>,
        bytes: u64,
        result: Option<Value>,
    ) -> Result<(), Problem> {
        self.check_room(bytes)?;
        let moved: Vec<LayerId> = shared.iter().map(|(row, _)| row.id).collect();
        let (keeper, task) = (self.keeper.clone(), task.clone());
        let gone = blocking(move || keeper.copy_shared(&task, &shared, bytes, result.as_ref())).await?;
        if let Some(live) = &mut self.live {
            let rows = self.keeper.rows();
            let moved = moved.iter().filter_map(|id| rows.machine.layers.get(id));
            moved.into_iter().try_for_each(|row| live.disks().moved(row))?;
        }
        self.keeper.forget(&gone)
    }

    fn check_room(&self, bytes: u64) -> Result<(), Problem> {
        // What can be reflinked needs none; whether it can is only known when it is tried.
        let room = self.keeper.files.folder().room().map_err(|e| file_problem(&e))?;
        if self.keeper.files.can_reflink() || room > bytes {
            return Ok(());
        }
        let message = format!("{bytes} bytes are shared, and {room} are free: there is no room for a copy");
        Err(Problem::failed(message).hint("free some space on that file system, then try again"))
    }
}

impl Keeper {
    /// The layers whose files others have, too, with the names that their copies get; and how many bytes that are.
    pub fn shared(&self) -> (Vec<(LayerRow, String)>, u64) {
        let rows = self.rows();
        let shared = rows.machine.layers.values().filter(|row| self.files.is_shared(row));
        let shared: Vec<_> = shared.map(|row| (row.clone(), own_name(row, LayerId::new()))).collect();
        let bytes = shared.iter().map(|(row, _)| self.files.allocated(row)).sum();
        (shared, bytes)
    }

    /// Copies them, and commits that they live in the copies; with a result the job ends by that. The journal row of the names that go, which are
    /// to be forgotten once nobody has them open. Blocks.
    pub fn copy_shared(
        &self,
        task: &Task,
        shared: &[(LayerRow, String)],
        bytes: u64,
        result: Option<&Value>,
    ) -> Result<Journal, Problem> {
        self.journal(task, "detach", shared.iter().map(|(_, file)| file.clone()).collect())?;
        let mut done = 0;
        let mut progress = |copied| {
            done += copied;
            task.progress(done, bytes);
            !task.cancelled()
        };
        for (row, file) in shared {
            self.copy_layer(row, file, &mut progress)?;
            self.steps.at("detach:copied");
        }
        self.files.sync_names()?;
        task.check()?;
        let gone = Journal {
            job: JobId::new(),
            request: json!("remove"),
            files: shared.iter().map(|(row, _)| row.file.clone()).collect(),
            note: String::new(),
        };
        let mut job = task.job().ok_or_else(|| Problem::failed("the job is gone"))?;
        if let Some(result) = result {
            end(&mut job, &Ok(result.clone()));
        }
        self.book.commit(|rows| {
            for (row, file) in shared {
                if let Some(row) = rows.machine.layers.get_mut(&row.id) {
                    row.file.clone_from(file);
                }
            }
            rows.remove_journal(job.id);
            rows.insert_journal(gone.clone());
            remember(rows, job);
        })?;
        self.steps.at("detach:committed");
        Ok(gone)
    }

    fn copy_layer(&self, row: &LayerRow, file: &str, progress: &mut dyn FnMut(u64) -> bool) -> Result<(), Problem> {
        let (folder, name) = self.files.place(row)?;
        let mut copy = || {
            let from = folder.open(&name, Mode::Read)?;
            let to = folder.create(file.rsplit('/').next().unwrap_or(file))?;
            let whole = copy_store(&*from, &*to, progress)?;
            to.sync().map(|()| whole)
        };
        match copy() {
            Ok(true) => Ok(()),
            Ok(false) => Err(Problem::new(ProblemKind::Cancelled, "cancelled; nothing has changed")),
            Err(error) => Err(file_problem(&error)),
        }
    }

    /// The kernel that it boots is never written by anybody; a copy of it is made all the same, as well as that goes.
    pub fn own_boot(&self) {
        if let Err(error) = self.files.own_boot() {
            tracing::warn!("the kernel is still shared: {error}");
        }
    }
}
