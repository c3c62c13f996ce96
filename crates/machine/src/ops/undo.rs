//! Taking back what was deleted or discarded.

use crate::job::Task;
use crate::keeper::Keeper;
use crate::log;
use crate::plan::{quoted, shorten};
use crate::request::Problem;
use crate::trash::{Kind, Trash};
use crate::tree::{Machine, Snapshot, State};
use serde_json::{Value, json};

impl Keeper {
    /// Takes back what `name` means, or the latest. See [`Machine::resolve_trash`].
    pub fn take_back(&self, task: &Task, name: Option<&str>) -> Result<Value, Problem> {
        let rows = self.rows();
        let machine = &rows.machine;
        let id = machine.resolve_trash(name)?;
        let trash = &machine.trash[&id];
        if trash.disk.is_some() && machine.now.state != State::Off {
            return Err(attached_only_while_off(machine));
        }
        let said = said(trash);
        let snapshots: Vec<_> = trash.snapshots.iter().map(|snapshot| snapshot.id).collect();
        let result = json!({ "undone": id, "snapshots": snapshots, "said": said });
        self.settle(task, &result, |machine| {
            machine.take_back(id);
        })?;
        self.steps.at("undo:committed");
        log::write(&self.files, Some(task.id()), &format!("took back: {}", trash.what));
        Ok(result)
    }
}

fn attached_only_while_off(machine: &Machine) -> Problem {
    let name = quoted(&machine.name);
    let stop = if machine.now.state == State::Running { "" } else { " --turn-off" };
    Problem::refused(format!("{} is not off: a disk can be attached only while it is", machine.name))
        .hint(format!("tenby vm stop {name}{stop}"))
}

/// What comes back, for people.
fn said(trash: &Trash) -> String {
    if let Some((disk, _)) = &trash.disk {
        return format!("{} is attached again", disk.id);
    }
    match trash.snapshots.as_slice() {
        [one] if trash.kind == Kind::Discarded => discarded(one),
        [one] => format!("{} is back", shorten(&one.name)),
        many => format!("{} snapshots are back", many.len()),
    }
}

fn discarded(present: &Snapshot) -> String {
    let how = match (present.memory, present.vm_state) {
        (Some(_), _) => ", with its memory",
        (None, State::Running | State::Paused) => ", without memory: its disks are as after a power cut",
        _ => "",
    };
    format!("what was discarded is back as the snapshot \"{}\"{how}", shorten(&present.name))
}
