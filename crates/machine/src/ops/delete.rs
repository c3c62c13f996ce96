//! Deleting snapshots, and the machine.

use crate::actor::Owner;
use crate::job::Task;
use crate::keeper::Keeper;
use crate::log;
use crate::plan::quoted;
use crate::request::Problem;
use crate::tree::SnapshotState;
use serde_json::{Value, json};

impl Keeper {
    /// Deletes a snapshot, or it and everything below: the rows go in one transaction. What that leaves without a name is the
    /// collector's.
    pub fn delete(&self, task: &Task, snapshot: &str, subtree: bool) -> Result<Value, Problem> {
        let rows = self.rows();
        let id = rows.machine.resolve(snapshot)?;
        let gone = rows.machine.below(id, subtree);
        let names: Vec<&str> =
            gone.iter().filter_map(|id| rows.machine.snapshots.get(id)).map(|s| s.name.as_str()).collect();
        if let Some(name) = rows
            .machine
            .snapshots
            .values()
            .find_map(|s| (gone.contains(&s.id) && s.state == SnapshotState::Creating).then_some(&s.name))
        {
            return Err(Problem::refused(format!("{name} is still being written"))
                .hint(format!("tenby job list {}", quoted(&rows.machine.name))));
        }
        let result = json!({ "deleted": gone, "undo_for": rows.machine.policy.undo_for });
        self.settle(task, &result, |machine| {
            machine.throw_away(id, subtree, jiff::Timestamp::now());
        })?;
        self.steps.at("delete:committed");
        log::write(&self.files, Some(task.id()), &format!("deleted {}", names.join(", ")));
        Ok(result)
    }
}

impl Owner {
    /// Deletes the machine: its folder goes out of sight in one step.
    pub(crate) async fn delete_machine(&mut self, task: &Task, discard: bool) -> Result<Value, Problem> {
        let rows = self.machine();
        let in_place = rows.machine.layers.values().any(|row| row.in_place);
        let alone =
            rows.machine.layers.values().filter(|row| row.kind == crate::tree::LayerKind::Disk).all(|row| row.in_place);
        if in_place && !alone && !discard {
            // What is merged must be this machine's alone.
            self.detach_first(task).await?;
            self.merge_now_into_base(task).await?;
        }
        let rows = self.machine();
        if let Some(making) = self.reserving.take() {
            // It would come to lie in a folder that is being emptied.
            let _ = making.await;
        }
        self.deleted = true;
        let root = &self.shared.root;
        if let Err(problem) = root.hide(self.shared.id) {
            self.deleted = false;
            return Err(problem);
        }
        self.keeper.steps.at("delete-machine:hidden");
        root.give_up(self.shared.id);
        self.keeper.steps.at("delete-machine:gone");
        for row in rows.machine.layers.values().filter(|row| row.in_place) {
            crate::mark::clear(std::path::Path::new(&row.file));
        }
        Ok(Value::Null)
    }

    /// Folds what Now holds into the bases that were taken in place: every snapshot goes, then the collector leaves one file a disk.
    async fn merge_now_into_base(&mut self, task: &Task) -> Result<(), Problem> {
        let rows = self.machine();
        let roots: Vec<_> = rows.machine.snapshots.values().filter(|s| s.parent.is_none()).map(|s| s.id).collect();
        self.keeper.book.commit(|rows| {
            let trash: Vec<_> = rows.machine.trash.keys().copied().collect();
            for id in trash {
                rows.machine.give_up(id);
            }
            for root in roots {
                rows.machine.delete(root, true);
            }
        })?;
        loop {
            task.check()?;
            self.collect();
            if self.folding.is_none() {
                break;
            }
            let ended = crate::collect::Underway::next(&mut self.folding).await;
            self.folded(&ended);
        }
        let machine = &self.machine().machine;
        match machine.now.disks.values().all(|leaf| machine.chain(*leaf).len() == 1) {
            true => Ok(()),
            false => Err(Problem::failed(format!("what {} holds could not be merged into its base", machine.name))
                .hint(format!("tenby vm log {}", quoted(&machine.name)))),
        }
    }
}
