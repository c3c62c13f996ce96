//! Saving: the guest stands still, its memory is written out, QEMU ends. The guest never runs past the point (invariant 7).

use crate::actor::Owner;
use crate::job::Task;
use crate::live::qemu_problem;
use crate::log;
use crate::plan::Written;
use crate::ram;
use crate::request::Problem;
use crate::tree::{LayerRow, State};
use qemu::CaptureMode;
use serde_json::{Value, json};

impl Owner {
    /// Writes the memory out and ends QEMU.
    pub(crate) async fn save(&mut self, task: &Task) -> Result<Value, Problem> {
        self.fill(task).await?;
        self.passing(State::Saving);
        let row = self.keeper.memory_row();
        self.keeper.journal(task, "save", vec![row.file.clone()])?;
        let was_running = self.machine().machine.now.state == State::Running;
        let saved = self.save_memory(task, row).await;
        let result = json!({ "state": State::Saved });
        let settled = saved.and_then(|written| {
            self.keeper.steps.at("save:written");
            self.keeper.settle(task, &result, |machine| machine.save(written))
        });
        if let Err(problem) = settled {
            self.go_on(was_running).await;
            return Err(problem);
        }
        self.keeper.steps.at("save:committed");
        if let Some(live) = self.live.take() {
            self.end(live).await;
        }
        self.shared.set_moment(|moment| {
            moment.sockets = None;
            moment.qemu = None;
        });
        log::write(&self.keeper.files, Some(task.id()), "saved");
        Ok(result)
    }

    /// Halts the guest, makes its disks durable, and writes its memory to `row`'s file. The guest stands still afterwards.
    pub(crate) async fn save_memory(&self, task: &Task, mut row: LayerRow) -> Result<Written, Problem> {
        let (live, name) = self.running()?;
        live.qemu.pause().await.map_err(|e| qemu_problem(&name, &e))?;
        row.taken_on = live.taken_on(&self.machine().machine.now).await;
        self.keeper.steps.at("save:paused");
        live.flush().await?;
        let target = self.keeper.target(row).await?;
        let mut capture = live.qemu.capture(CaptureMode::Stopped).await.map_err(|e| qemu_problem(&name, &e))?;
        ram::write(task, &mut capture, target, ram::no_point).await.map(|(written, _)| written)
    }

    /// Lets a guest that was running go on, after something that had halted it came to nothing.
    pub(crate) async fn go_on(&self, was_running: bool) {
        if let Some(live) = &self.live
            && was_running
            && let Err(error) = live.qemu.resume().await
        {
            tracing::error!("the guest could not be resumed: {error}");
        }
    }
}
