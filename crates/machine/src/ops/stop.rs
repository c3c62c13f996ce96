//! Stopping: the guest is asked, or the power goes.

use crate::actor::Owner;
use crate::job::Task;
use crate::live::qemu_problem;
use crate::log;
use crate::plan::quoted;
use crate::request::Problem;
use crate::tree::{Machine, State};
use qemu::RunState;
use serde_json::{Value, json};
use std::time::Duration;

impl Owner {
    /// Asks the guest to power off and waits; or turns it off at once. Turning off a saved machine drops its memory.
    pub(crate) async fn stop(&mut self, task: &Task, timeout: Duration, turn_off: bool) -> Result<Value, Problem> {
        if !turn_off {
            self.passing(State::Stopping);
            self.wait_for_power_off(task, timeout).await?;
        }
        let result = json!({ "state": State::Off });
        // The ledger first: a worker that dies in between leaves a QEMU that the next one ends as a stray.
        self.keeper.settle(task, &result, Machine::turn_off)?;
        self.keeper.steps.at("stop:committed");
        self.off(if turn_off { "turned off" } else { "the guest powered off" }, None).await;
        Ok(result)
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
