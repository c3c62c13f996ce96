//! Stopping: the guest is asked, or the power goes.

use crate::actor::Owner;
use crate::job::Task;
use crate::keeper::Keeper;
use crate::live::qemu_problem;
use crate::log;
use crate::plan::{Take, quoted};
use crate::request::{Problem, ProblemKind};
use crate::tree::{Machine, SnapshotId, SnapshotState, State};
use crate::views;
use qemu::RunState;
use serde_json::{Value, json};
use std::time::Duration;

impl Owner {
    /// Asks the guest to power off and waits; or turns it off at once. Turning off a saved machine drops its memory, or keeps it as long as it can be
    /// taken back.
    pub(crate) async fn stop(&mut self, task: &Task, timeout: Duration, turn_off: bool) -> Result<Value, Problem> {
        if !turn_off {
            self.passing(State::Stopping);
            self.wait_for_power_off(task, timeout).await?;
        }
        let result = if let Some(result) = self.set_aside(task).await? {
            result
        } else {
            let result = json!({ "state": State::Off });
            // The ledger first: a worker that dies in between leaves a QEMU that the next one ends as a stray.
            self.keeper.settle(task, &result, Machine::turn_off)?;
            result
        };
        self.keeper.steps.at("stop:committed");
        self.off(if turn_off { "turned off" } else { "the guest powered off" }, None).await;
        Ok(result)
    }

    /// The machine is off, and what it was can be taken back: if it was saved, its setting says so, and there is room for that.
    async fn set_aside(&self, task: &Task) -> Result<Option<Value>, Problem> {
        let rows = self.machine();
        let undo_for = rows.machine.policy.undo_for;
        if rows.machine.now.state != State::Saved || undo_for == 0 || !views::changed(&rows.machine, &self.keeper.files)
        {
            return Ok(None);
        }
        let take = Take {
            id: SnapshotId::new(),
            name: "before it was turned off".to_owned(),
            note: String::new(),
            created: jiff::Timestamp::now(),
            vm_state: State::Saved,
            memory: rows.machine.now.memory,
            state: SnapshotState::Ready,
        };
        let result = json!({ "state": State::Off, "undo_for": undo_for });
        match self.keeper.set_aside(task, take, &result).await {
            Ok(()) => Ok(Some(result)),
            Err(problem) if problem.kind == ProblemKind::Cancelled => Err(problem),
            Err(problem) => {
                self.keeper.undo(task);
                self.warn(task, &format!("what was saved cannot be taken back: {problem}"));
                Ok(None)
            }
        }
    }

    async fn wait_for_power_off(&self, task: &Task, timeout: Duration) -> Result<(), Problem> {
        let (live, name) = self.running()?;
        let mut state = live.qemu.watch();
        live.qemu.powerdown().await.map_err(|e| qemu_problem(&name, &e))?;
        let off = state.wait_for(|state| matches!(state, RunState::Shutdown | RunState::Exited(_)));
        let shell = quoted(&name);
        tokio::select! {
            _ = off => Ok(()),
            () = task.cancel().wait() => task.check(),
            () = tokio::time::sleep(timeout) => {
                log::write(&self.keeper.files, Some(task.id()), "the guest was asked to power off and did not");
                Err(Problem::failed(format!("{name} was asked to power off and has not done so in {} s", timeout.as_secs_f32()))
                    .hint(format!("tenby vm stop {shell} --turn-off")))
            }
        }
    }
}

impl Keeper {
    /// Turns off a saved machine; what it was can be taken back. See [`Machine::set_aside`].
    pub async fn set_aside(&self, task: &Task, take: Take, result: &Value) -> Result<(), Problem> {
        self.follow_still(task, "stop", result, |machine, leaves| machine.set_aside(take, leaves)).await
    }
}
