//! Names, notes and settings.

use crate::actor::Owner;
use crate::job::Task;
use crate::plan::{check_name, shorten};
use crate::request::{Problem, Settings};
use crate::root::{TakenIn, add_disk, check_disk_size, check_hardware, note_name, take_in};
use crate::tree::{DiskId, LayerKind, Machine};
use serde_json::{Value, json};

impl Owner {
    /// Renames a snapshot.
    pub(crate) fn rename_snapshot(&self, task: &Task, snapshot: &str, name: &str) -> Result<Value, Problem> {
        check_name(name)?;
        self.edit_snapshot(task, snapshot, |s| name.clone_into(&mut s.name))
    }

    /// Notes something on a snapshot.
    pub(crate) fn note_snapshot(&self, task: &Task, snapshot: &str, note: &str) -> Result<Value, Problem> {
        self.edit_snapshot(task, snapshot, |s| note.clone_into(&mut s.note))
    }

    fn edit_snapshot(
        &self,
        task: &Task,
        snapshot: &str,
        edit: impl FnOnce(&mut crate::tree::Snapshot),
    ) -> Result<Value, Problem> {
        let id = self.machine().machine.resolve(snapshot)?;
        let result = json!({ "snapshot": id });
        self.keeper.settle(task, &result, |machine| {
            if let Some(snapshot) = machine.snapshots.get_mut(&id) {
                edit(snapshot);
            }
        })?;
        Ok(result)
    }

    /// Renames the machine, under the root's lock.
    pub(crate) fn rename(&self, task: &Task, name: &str) -> Result<Value, Problem> {
        check_name(name)?;
        let root = &self.shared.root;
        let _names = root.lock_names()?;
        root.check_free(name, Some(self.shared.id))?;
        let result = json!({ "name": name });
        self.keeper.settle(task, &result, |machine| name.clone_into(&mut machine.name))?;
        note_name(self.shared.id, name)?;
        Ok(result)
    }

    /// Changes settings, all of them or none.
    pub(crate) fn set(&self, task: &Task, settings: &Settings) -> Result<Value, Problem> {
        let rows = self.machine();
        let config = &rows.machine.now.config;
        check_hardware(settings.memory.unwrap_or(config.memory), settings.cpus.unwrap_or(config.cpus))?;
        let grown = settings.grow_disks.iter().map(|(disk, _)| disk);
        for disk in settings.remove_disks.iter().chain(grown) {
            check_disk(&rows.machine, disk)?;
        }
        let added = self.take_in_disks(task, settings)?;
        // Last of what can fail: it is not undone with the files of the others.
        self.keeper.grow(&rows.machine, &settings.grow_disks)?;
        self.keeper.steps.at("set:grown");
        self.keeper.settle(task, &Value::Null, |machine| {
            change(machine, settings);
            for (made, spec) in added.into_iter().zip(&settings.add_disks) {
                add_disk(machine, made, spec);
            }
        })?;
        self.shared.root.mark(self.shared.id, &settings.add_disks);
        Ok(Value::Null)
    }

    fn take_in_disks(&self, task: &Task, settings: &Settings) -> Result<Vec<TakenIn>, Problem> {
        if settings.add_disks.is_empty() {
            return Ok(Vec::new());
        }
        for disk in &settings.add_disks {
            if let crate::request::DiskSource::New { size, .. } = disk.source {
                check_disk_size(size)?;
            }
        }
        // The files' names are drawn before they are made, so that the journal can name them.
        let rows: Vec<_> = settings
            .add_disks
            .iter()
            .map(|disk| self.keeper.files.new_row(LayerKind::Disk, disk.source.format(), None))
            .collect();
        self.keeper.journal(task, "set", rows.iter().map(|row| row.file.clone()).collect())?;
        let mut made = Vec::new();
        for (row, disk) in rows.into_iter().zip(&settings.add_disks) {
            let mut progress = |done, total| {
                task.progress(done, total);
                !task.cancelled()
            };
            made.push(take_in(&self.keeper.files, row, disk, &mut progress)?);
            task.check()?;
        }
        self.keeper.files.sync_names()?;
        self.keeper.steps.at("set:files");
        Ok(made)
    }
}

fn check_disk(machine: &Machine, disk: &DiskId) -> Result<(), Problem> {
    if machine.now.config.disk(disk).is_some() {
        Ok(())
    } else {
        let mut problem = Problem::not_found(format!("{} has no disk \"{}\"", machine.name, shorten(&disk.0)));
        problem.candidates = machine.now.config.disks.iter().map(|disk| disk.id.0.clone()).collect();
        Err(problem)
    }
}

fn change(machine: &mut Machine, settings: &Settings) {
    let now = &mut machine.now;
    let config = &mut now.config;
    config.memory = settings.memory.unwrap_or(config.memory);
    config.cpus = settings.cpus.unwrap_or(config.cpus);
    config.boot = settings.boot.unwrap_or(config.boot);
    if let Some(cdrom) = &settings.cdrom {
        config.cdrom = (!cdrom.is_empty()).then(|| cdrom.clone());
    }
    if let Some(publish) = &settings.publish {
        config.net.publish.clone_from(publish);
    }
    if let Some(note) = &settings.note {
        machine.note.clone_from(note);
    }
    machine.policy.autostart = settings.autostart.unwrap_or(machine.policy.autostart);
    machine.policy.on_host_stop = settings.on_host_stop.unwrap_or(machine.policy.on_host_stop);
    machine.policy.undo_for = settings.undo_for.unwrap_or(machine.policy.undo_for);
    machine.resize(&settings.grow_disks);
    // By the new setting, a disk that is removed by the same request can be taken back.
    for disk in &settings.remove_disks {
        remove_disk(machine, disk);
    }
}

fn remove_disk(machine: &mut Machine, id: &DiskId) {
    let disk = machine.now.config.disk(id).cloned();
    if let (Some(disk), Some(leaf)) = (disk, machine.now.disks.remove(id)) {
        machine.now.config.disks.retain(|disk| &disk.id != id);
        machine.note_removed(&disk, leaf, jiff::Timestamp::now());
    }
}
