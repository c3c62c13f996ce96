//! What a new worker does first: the machine as the last transaction left it, nothing half-done, nothing lost.
//!
//! ```text
//!   0  what the last worker acknowledged and did not flush is worked off into the files of the disks
//!   1  QEMU: serve its disks again, then take it over; or it is gone and the machine is off
//!   2  machines that were being made from a snapshot are there, all of them, or none
//!      what else is journalled was not committed: its files go, its snapshot goes, its job has failed
//!   3  QEMU does what the ledger says: what was halted for a request that came to nothing goes on
//!   4  jobs that had not ended, have
//!   5  files that nobody knows stay, and are reported
//! ```

use crate::actor::Owner;
use crate::disks::Disks;
use crate::job::end;
use crate::keeper::Keeper;
use crate::live::{Live, end_strays, qemu_problem};
use crate::log;
use crate::request::Problem;
use crate::tree::{LayerId, Machine, SnapshotId, SnapshotState, State};
use qemu::RunState;

impl Keeper {
    /// What the guest was told is written is in the files of its disks, whatever becomes of QEMU.
    pub fn work_off_carries(&self) -> Result<(), Problem> {
        let machine = &self.rows().machine;
        for file in self.carries.work_off(&self.files, machine)? {
            log::write(&self.files, None, &format!("{file}: took over what the last worker had not flushed"));
        }
        Ok(())
    }

    /// What was journalled and not committed is undone. `disks` are those of a guest that lives on.
    pub fn undo_unfinished(&self, mut disks: Option<&mut Disks>) -> Result<(), Problem> {
        let rows = self.rows();
        let half: Vec<SnapshotId> = half_taken(&rows.machine);
        if !half.is_empty() {
            self.book.commit(|rows| half.iter().for_each(|id| rows.machine.abandon(*id)))?;
        }
        for journal in rows.journals() {
            if let Ok(folded) = journal.note.parse() {
                self.name_neighbours(LayerId(folded), disks.as_deref_mut())?;
            }
            // What a rescue has left to be done is no request that was cut off.
            if journal.request != crate::rescue::MEND {
                log::write(&self.files, Some(journal.job), "the worker died in the middle of this; it was undone");
            }
            self.forget(journal)?;
        }
        let died = Err(Problem::failed("the worker died in the middle of this; it was undone, nothing is lost"));
        let open: Vec<_> = rows.jobs().into_iter().filter(|job| !job.state.ended()).collect();
        if open.is_empty() {
            return Ok(());
        }
        self.book.commit(|rows| {
            for mut job in open {
                end(&mut job, &died);
                self.jobs.put(job.clone());
                rows.insert_job(job);
            }
        })
    }
}

impl Owner {
    /// Recovers. When it returns the machine can be asked for anything.
    pub(crate) async fn recover(&mut self) -> Result<(), Problem> {
        self.keeper.work_off_carries()?;
        self.find_qemu().await?;
        self.keeper.finish_clones(&self.shared.root)?;
        self.keeper.undo_unfinished(self.live.as_mut().map(Live::disks))?;
        self.agree_with_qemu().await?;
        // A full disk must not keep a worker from its machine for this.
        if self.live.is_none()
            && let Err(problem) = self.keeper.note_grown()
        {
            tracing::warn!("{problem}; the next worker tries again");
        }
        for file in self.keeper.files.unknown(&self.machine().machine)? {
            log::write(&self.keeper.files, None, &format!("{file} is not in the ledger; it is left alone"));
        }
        Ok(())
    }

    async fn find_qemu(&mut self) -> Result<(), Problem> {
        let rows = self.machine();
        end_strays(&rows.machine);
        let alive = matches!(rows.machine.now.state, State::Running | State::Paused);
        if !alive {
            return Ok(());
        }
        let live = match &rows.machine.now.run {
            Some(run) => Live::adopt(&self.keeper, &rows.machine, run).await?,
            None => None,
        };
        if let Some(live) = live {
            log::write(&self.keeper.files, None, "a new worker has taken over the running machine");
            self.go_live(live);
        } else {
            let words = format!("its QEMU is gone{}; the disks are as after a power cut", self.memory_lost());
            self.off(&words, Some(words.clone())).await;
        }
        Ok(())
    }

    async fn agree_with_qemu(&mut self) -> Result<(), Problem> {
        let Some(live) = &self.live else { return Ok(()) };
        if live.lent().is_none() && self.machine().machine.now.restoring.is_some() {
            // It arrived while nobody looked.
            self.keeper.book.commit(|rows| rows.machine.now.restoring = None)?;
        }
        let rows = self.machine();
        let name = &rows.machine.name;
        end_capture(&live.qemu).await.map_err(|e| qemu_problem(name, &e))?;
        match (live.qemu.state(), rows.machine.now.state) {
            (RunState::Shutdown | RunState::Exited(_), _) => self.off("the guest powered off", None).await,
            // Halted for a request that was undone; or started, or resumed, by one that was committed; or its disks were away for
            // longer than QEMU waits: they are back, and what failed is repeated.
            (RunState::Paused | RunState::IoError, State::Running) => self.let_run().await?,
            // A pause that was undone.
            (RunState::Running, State::Paused) => live.qemu.pause().await.map_err(|e| qemu_problem(name, &e))?,
            (state @ (RunState::IoError | RunState::Panicked | RunState::Broken), _) => self.react(state).await,
            _ => {}
        }
        Ok(())
    }
}

/// A capture that was under way when the last worker died comes to its end (it is read and thrown away, or it fails) before
/// anything else is asked of QEMU.
async fn end_capture(qemu: &qemu::Qemu) -> qemu::Result<()> {
    use qemu::MigrationStatus::{Active, Cancelling, Device, PreSwitchover, Setup};
    loop {
        match qemu.qmp().migration().await?.status {
            // It waits for an order of the worker's, and notices nothing.
            PreSwitchover => qemu.qmp().migrate_cancel().await?,
            Setup | Active | Device | Cancelling => {}
            _ => return Ok(()),
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

fn half_taken(machine: &Machine) -> Vec<SnapshotId> {
    machine.snapshots.values().filter(|s| s.state == SnapshotState::Creating).map(|s| s.id).collect()
}
