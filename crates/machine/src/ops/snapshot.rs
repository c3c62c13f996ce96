//! Taking a snapshot.
//!
//! A machine that stands still with its memory on disk, or has none, takes one transaction. A running one goes by sequence A: QEMU
//! stops and resumes itself for a few milliseconds; what it writes to its disks around that moment is logged and sorted out by
//! QEMU's own stamps; its memory streams into the new layer while it runs on. Where the host does not let QEMU track memory, all of it is written
//! first, and the guest stands still for what it has changed meanwhile.

use crate::actor::Owner;
use crate::carry::Carries;
use crate::disks::{Disks, Leaf};
use crate::files::{Parent, image_problem};
use crate::garbage::base_of_capture;
use crate::job::Task;
use crate::keeper::Keeper;
use crate::live::{Live, blocking, qemu_problem};
use crate::log;
use crate::plan::{Take, Written};
use crate::ram;
use crate::request::Problem;
use crate::tree::{DiskId, LayerFormat, LayerId, LayerKind, LayerRow, Machine, SnapshotId, SnapshotState, State};
use image::{Chain, Layer, Received};
use qemu::{Capture, CaptureMode, Stamp};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use store::Mode;

/// What the window around the point may hold of the guest's writes, bytes, over all disks.
const WINDOW: u64 = 256 << 20;

/// Fresh leaves: their rows, and their files once they are made.
pub type Leaves = Vec<(DiskId, LayerRow)>;

/// Fresh leaves, open for writing.
pub type Made = BTreeMap<LayerId, Leaf>;

impl Owner {
    /// Takes a snapshot of the machine as it is.
    pub(crate) async fn snapshot(&mut self, task: &Task, name: Option<&str>, note: &str) -> Result<Value, Problem> {
        self.fill(task).await?;
        self.doing("snapshotting");
        let rows = self.machine();
        let machine = &rows.machine;
        let created = jiff::Timestamp::now();
        let running = matches!(machine.now.state, State::Running | State::Paused);
        let take = Take {
            id: SnapshotId::new(),
            name: machine.snapshot_name(name, created)?,
            note: note.to_owned(),
            created,
            vm_state: machine.now.state,
            memory: machine.now.memory,
            state: if running { SnapshotState::Creating } else { SnapshotState::Ready },
        };
        let result = json!({ "snapshot": take.id, "name": take.name });
        if running {
            self.snapshot_live(task, take, &result).await
        } else {
            self.keeper.snapshot_still(task, take, &result).await
        }?;
        log::write(
            &self.keeper.files,
            Some(task.id()),
            &format!("snapshot {}", result["name"].as_str().unwrap_or_default()),
        );
        Ok(result)
    }

    async fn snapshot_live(&mut self, task: &Task, take: Take, result: &Value) -> Result<(), Problem> {
        let (id, memory) = (take.id, self.keeper.memory_row());
        let disks = self.live.as_mut().map(Live::disks);
        let (leaves, made) = self.keeper.begin_snapshot(task, take, &memory, disks.as_deref()).await?;
        let captured = self.capture(task, memory, &leaves, made).await;
        self.keeper.steps.at("snapshot:captured");
        let Some(live) = &mut self.live else { return Err(Problem::failed("QEMU is gone")) };
        self.keeper.end_snapshot(task, id, captured, result, live.disks())
    }

    async fn capture(
        &mut self,
        task: &Task,
        mut memory: LayerRow,
        leaves: &Leaves,
        made: Made,
    ) -> Result<Written, Problem> {
        let running = self.machine().machine.now.state == State::Running;
        if let Some(live) = &self.live {
            memory.taken_on = live.taken_on(&self.machine().machine.now).await;
        }
        let in_background = self.running()?.0.qemu.captures_in_background().is_ok();
        let mut made = Some(made);
        let captured = match self.keeper.target(memory).await {
            Ok(target) if !running => self.capture_halted(task, target, leaves, &mut made).await,
            Ok(target) if in_background => self.capture_running(task, target, leaves, &mut made).await,
            Ok(target) => self.capture_converging(task, target, leaves, &mut made).await,
            Err(problem) => Err(problem),
        };
        // The ledger has these leaves as Now's: if it came to nothing before they were taken, they are taken now (invariant 3).
        if let Some(live) = &mut self.live {
            self.keeper.push(live.disks(), leaves, made.take().unwrap_or_default());
        }
        captured
    }

    /// Sequence C: the guest stands still.
    async fn capture_halted(
        &mut self,
        task: &Task,
        target: ram::Target,
        leaves: &Leaves,
        made: &mut Option<Made>,
    ) -> Result<Written, Problem> {
        let name = self.shared.name();
        let Some(live) = &mut self.live else { return Err(Problem::failed(format!("{name} has no QEMU"))) };
        let captured = async {
            live.flush().await?;
            self.keeper.push(live.disks(), leaves, made.take().unwrap_or_default());
            // The quick way leaves a state that is no ordinary pause: only if there is no choice.
            let in_background = live.qemu.captures_standing().await.is_ok();
            let mode = if in_background { CaptureMode::Background } else { CaptureMode::Stopped };
            let mut capture = live.qemu.capture(mode).await.map_err(|e| qemu_problem(&name, &e))?;
            let (written, pieces) = ram::write(task, &mut capture, target, ram::no_point).await?;
            if in_background {
                live.collapse(pieces).await;
            }
            Ok(written)
        }
        .await;
        self.pause_anew().await?;
        captured
    }

    /// Where the host does not let QEMU track memory: the guest runs while it is written, again and again, until it stands still for what is left.
    async fn capture_converging(
        &mut self,
        task: &Task,
        target: ram::Target,
        leaves: &Leaves,
        made: &mut Option<Made>,
    ) -> Result<Written, Problem> {
        let name = self.shared.name();
        let Some(live) = &mut self.live else { return Err(Problem::failed(format!("{name} has no QEMU"))) };
        let mut stopped = None;
        let captured = async {
            let mut capture = live.qemu.capture(CaptureMode::Converging).await.map_err(|e| qemu_problem(&name, &e))?;
            ram::write(task, &mut capture, target, async |capture: &mut Capture| {
                stopped = Some(capture.converged().await.map_err(|e| qemu_problem(&name, &e))?);
                live.flush().await?;
                self.keeper.push(live.disks(), leaves, made.take().unwrap_or_default());
                self.keeper.steps.at("snapshot:point");
                capture.go_on().await.map_err(|e| qemu_problem(&name, &e))?;
                Ok(None)
            })
            .await
        }
        .await;
        // A capture that failed has let it run on already.
        self.go_on(stopped.is_some()).await;
        let pause = stopped.map(|stopped| Stamp::now().micros_since(stopped));
        let (mut written, _) = captured?;
        written.stats.pause_us = pause;
        if let (Some(taken_on), Some(pause)) = (&mut written.layer.taken_on, pause) {
            // The point is the end of this capture, not its beginning.
            taken_on.at = jiff::Timestamp::now() - jiff::SignedDuration::from_micros(pause as i64);
        }
        Ok(written)
    }

    /// Makes an ordinary pause of the state in which a capture may leave a guest that stood still: QEMU captures no guest a second time
    /// from there. What the guest does in this moment lies after the point, like everything that it does later.
    async fn pause_anew(&self) -> Result<(), Problem> {
        let (live, name) = self.running()?;
        live.qemu.pause_anew().await.map_err(|e| qemu_problem(&name, &e))
    }

    /// Sequence A: QEMU stops and resumes itself; the disks' writes around that are sorted out by its stamps.
    async fn capture_running(
        &mut self,
        task: &Task,
        target: ram::Target,
        leaves: &Leaves,
        made: &mut Option<Made>,
    ) -> Result<Written, Problem> {
        let name = self.shared.name();
        let Some(live) = &mut self.live else { return Err(Problem::failed(format!("{name} has no QEMU"))) };
        live.collapsed(&name).await;
        let mut windows = self.keeper.push_ambiguous(live.disks(), leaves, made.take().unwrap_or_default());
        let mut capture = live.qemu.capture(CaptureMode::Background).await.map_err(|e| qemu_problem(&name, &e))?;
        let steps = Arc::clone(&self.keeper.steps);
        let captured = ram::write(task, &mut capture, target, async |capture: &mut Capture| {
            steps.at("snapshot:window");
            let point = find_point(capture, &mut windows).await.map_err(|e| match e {
                Sorting::Qemu(e) => qemu_problem(&name, &e),
                Sorting::Problem(problem) => problem,
            })?;
            steps.at("snapshot:point");
            // The frozen leaves take what came before the point, and are durable before the snapshot is ready.
            let resumed = Received(point.resumed.micros() * 1000);
            let mut windows = std::mem::take(&mut windows);
            blocking(move || {
                windows.iter_mut().try_for_each(|window| window.finish(resumed)).map_err(|e| image_problem(&e))
            })
            .await?;
            Ok(Some(point.pause_micros()))
        })
        .await;
        let (written, pieces) = captured?;
        live.collapse(pieces).await;
        Ok(written)
    }
}

/// What becomes of files and rows.
impl Keeper {
    /// Takes a snapshot of a machine that stands still, its memory on disk or without one: one transaction.
    pub async fn snapshot_still(&self, task: &Task, take: Take, result: &Value) -> Result<(), Problem> {
        self.follow_still(task, "snapshot", result, |machine, leaves| machine.take(take, leaves)).await?;
        self.steps.at("snapshot:committed");
        Ok(())
    }

    /// Of a machine that stands still: makes fresh leaves over Now's, which `change` gives it in the one transaction of this request.
    pub(crate) async fn follow_still(
        &self,
        task: &Task,
        request: &str,
        result: &Value,
        change: impl FnOnce(&mut Machine, Leaves),
    ) -> Result<(), Problem> {
        let leaves = self.leaf_rows(&self.rows().machine.now.disks);
        self.journal(task, request, files_of(&leaves))?;
        self.make_leaves(&leaves, None).await?;
        self.steps.at(&format!("{request}:files"));
        task.check()?;
        self.settle(task, result, |machine| change(machine, leaves))
    }

    /// Begins the snapshot of a machine that runs: its new leaves are Now's, but not yet in use. `memory` is the layer that its memory
    /// goes to.
    pub async fn begin_snapshot(
        &self,
        task: &Task,
        take: Take,
        memory: &LayerRow,
        disks: Option<&Disks>,
    ) -> Result<(Leaves, Made), Problem> {
        let leaves = self.leaf_rows(&self.rows().machine.now.disks);
        let mut files = files_of(&leaves);
        files.push(memory.file.clone());
        self.journal(task, "snapshot", files)?;
        let made = self.make_leaves(&leaves, disks).await?;
        self.steps.at("snapshot:files");
        // The ledger knows the new leaves before the first write is acknowledged into one (invariant 3).
        let rows = leaves.clone();
        self.book.commit(|state| state.machine.take(take, rows))?;
        self.steps.at("snapshot:leaves");
        Ok((leaves, made))
    }

    /// Ends it: with its memory, or without the snapshot.
    pub fn end_snapshot(
        &self,
        task: &Task,
        id: SnapshotId,
        captured: Result<Written, Problem>,
        result: &Value,
        disks: &mut Disks,
    ) -> Result<(), Problem> {
        let mut seal = || disks.seal(&self.rows().machine);
        let settled = captured.and_then(|written| {
            seal().and_then(|()| self.settle(task, result, |machine| machine.ready(id, Some(written))))
        });
        if let Err(problem) = settled {
            // The guest has gone on, on its new leaves; the collector folds what is below.
            self.book.commit(|state| state.machine.abandon(id))?;
            seal()?;
            return Err(problem);
        }
        self.steps.at("snapshot:committed");
        Ok(())
    }

    /// The chains take their new leaves, between two requests.
    pub fn push(&self, disks: &mut Disks, leaves: &Leaves, made: Made) {
        self.each_pushed(disks, leaves, made, |chain, leaf| chain.push(leaf));
    }

    /// The chains take their new leaves; what the guest writes is sorted out later, see [`image::Ambiguous`].
    pub fn push_ambiguous(&self, disks: &mut Disks, leaves: &Leaves, made: Made) -> Vec<image::Ambiguous> {
        let limit = WINDOW / leaves.len().max(1) as u64;
        self.each_pushed(disks, leaves, made, |chain, leaf| chain.push_ambiguous(leaf, limit))
    }

    fn each_pushed<T>(
        &self,
        disks: &mut Disks,
        leaves: &Leaves,
        mut made: Made,
        push: impl Fn(&Arc<Chain>, Arc<dyn Layer>) -> image::Result<T>,
    ) -> Vec<T> {
        let mut all = Vec::new();
        for (disk, row) in leaves {
            let (Some(chain), Some(leaf)) = (disks.chain(disk), made.remove(&row.id)) else { continue };
            // The ledger has this leaf as Now's already: a chain that does not take it must not serve another write (invariant 3).
            let pushed = push(chain, Arc::clone(&leaf.layer));
            all.push(pushed.unwrap_or_else(|e| self.steps.give_up(&image_problem(&e))));
            disks.pushed(disk, row.id, leaf);
        }
        all
    }

    /// The rows of fresh leaves over these layers.
    pub fn leaf_rows(&self, over: &BTreeMap<DiskId, LayerId>) -> Leaves {
        let rows = self.rows();
        let format =
            |parent: &LayerId| rows.machine.layers.get(parent).map(|row| row.format.of_child()).unwrap_or_default();
        let row = |parent: &LayerId| self.files.new_row(LayerKind::Disk, format(parent), Some(*parent));
        over.iter().map(|(disk, parent)| (disk.clone(), row(parent))).collect()
    }

    /// The row of a new memory layer: over what the RAM was last equal to, or what is left of that. Whether it fits is only known when the stream has told
    /// its blocks; see [`ram::Target`].
    pub fn memory_row(&self) -> LayerRow {
        let base = base_of_capture(&self.rows().machine);
        self.files.new_row(LayerKind::Memory, LayerFormat::Vhdx, base)
    }

    /// Makes the files of fresh leaves, durable in all but name. Over a leaf that is being written: by its own handle. What takes a
    /// running guest's writes (`disks` are given) outlives this process.
    pub(crate) async fn make_leaves(&self, leaves: &Leaves, disks: Option<&Disks>) -> Result<Made, Problem> {
        blocking(self.leaf_maker(leaves, disks)).await
    }

    /// The same, on this thread.
    pub(crate) fn make_leaves_now(&self, leaves: &Leaves, disks: Option<&Disks>) -> Result<Made, Problem> {
        self.leaf_maker(leaves, disks)()
    }

    fn leaf_maker(
        &self,
        leaves: &Leaves,
        disks: Option<&Disks>,
    ) -> impl FnOnce() -> Result<Made, Problem> + Send + use<> {
        let rows = self.rows();
        let carries = disks.is_some().then(|| self.carries.clone());
        let served = |(disk, row): &(DiskId, LayerRow)| {
            disks?.leaf(disk).filter(|_| rows.machine.now.disks.get(disk) == row.parent.as_ref())
        };
        let parents: Vec<_> = leaves.iter().map(served).collect();
        let (files, leaves) = (self.files.clone(), leaves.clone());
        move || {
            let mut made = BTreeMap::new();
            for ((_, row), served) in leaves.iter().zip(parents) {
                made.insert(row.id, make_leaf(&files, carries.as_ref(), &rows.machine.layers, row, served)?);
            }
            files.sync_names()?;
            Ok(made)
        }
    }
}

/// Makes the file of a fresh leaf over one of `layers`.
pub(crate) fn make_leaf(
    files: &crate::files::Files,
    carries: Option<&Carries>,
    layers: &BTreeMap<LayerId, LayerRow>,
    row: &LayerRow,
    served: Option<Arc<dyn Layer>>,
) -> Result<Leaf, Problem> {
    let parent_row = row.parent.and_then(|id| layers.get(&id));
    let parent_row = parent_row.ok_or_else(|| Problem::damaged("a leaf's parent is not in the ledger"))?;
    let parent = match served {
        Some(layer) => layer,
        None => files.open_layer(parent_row, Mode::Read)?,
    };
    let size = parent.info().size;
    // Only what takes a running guest's writes at once needs to be kept.
    let (carry, kept) = carries.map(|carries| carries.keep(row)).transpose()?.flatten().unzip();
    let layer = files.create_layer(row, size, Some(&Parent { layer: parent.as_ref(), row: parent_row }), carry)?;
    Ok(Leaf { layer, kept })
}

/// The names of files that are about to be made.
pub(crate) fn files_of(leaves: &Leaves) -> Vec<String> {
    leaves.iter().map(|(_, row)| row.file.clone()).collect()
}

enum Sorting {
    Qemu(qemu::Error),
    Problem(Problem),
}

/// Waits for the point. While QEMU has certainly not come to it, what the disks have received goes to the old leaves at once.
async fn find_point(capture: &mut Capture, windows: &mut [image::Ambiguous]) -> Result<qemu::Point, Sorting> {
    loop {
        let before = capture.before_point().await.map_err(Sorting::Qemu)?;
        let Some(before) = before else { return capture.point().await.map_err(Sorting::Qemu) };
        for window in windows.iter_mut() {
            window.settle_before(Received(before.micros() * 1000)).map_err(|e| Sorting::Problem(image_problem(&e)))?;
        }
        if windows.iter().any(image::Ambiguous::is_full) {
            return Err(Sorting::Problem(Problem::failed("the guest writes more than the window of a snapshot holds")));
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}
