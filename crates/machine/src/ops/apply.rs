//! Applying a snapshot: in any direction of the tree, the present kept or given up.
//!
//! On a running machine it is a swap that can still fail harmlessly: the old QEMU stands still while the new one loads; one
//! transaction decides; only then the old one ends and the new one runs. Where the host has not the RAM for two, that is said, and the old one is given
//! up first: if the new one then does not come up, the machine is saved, at the snapshot.

use crate::actor::Owner;
use crate::disks::Disks;
use crate::job::Task;
use crate::keeper::Keeper;
use crate::lent::Lent;
use crate::live::{Live, Memory, qemu_problem};
use crate::log;
use crate::ops::snapshot::{Leaves, files_of};
use crate::plan::{Take, Written, quoted, shorten};
use crate::request::{Present, Problem};
use crate::tree::{Config, LayerRow, Machine, Snapshot, SnapshotId, SnapshotState, State};
use crate::views;
use serde_json::{Value, json};

/// What an apply is going to do.
struct Plan {
    to: SnapshotId,
    leaves: Leaves,
    present: Fate,
    memory: bool,
    run: bool,
    was_running: bool,
    /// The snapshot's memory, if the machine goes on from it at once.
    load: Option<Memory>,
}

/// RAM that a QEMU takes for itself, bytes.
const OWN_RAM: u64 = 256 << 20;

/// What becomes of the present.
enum Fate {
    /// It becomes a snapshot of its own; its memory must be written first, if there is a layer for it.
    Kept(Box<Take>, Option<Box<LayerRow>>),
    /// It can be taken back.
    ThrownAway,
    Forgotten,
}

impl Fate {
    fn kept(&self) -> Option<&Take> {
        if let Self::Kept(take, _) = self { Some(take) } else { None }
    }

    /// The layer that the present's memory goes to.
    fn memory(&self) -> Option<&LayerRow> {
        if let Self::Kept(_, memory) = self { memory.as_deref() } else { None }
    }
}

impl Keeper {
    /// Begins: makes the leaves that are to be Now's. `memory` is the layer that the present's memory goes to, if that is kept.
    pub async fn begin_apply(
        &self,
        task: &Task,
        leaves: &Leaves,
        memory: Option<&LayerRow>,
        disks: Option<&Disks>,
    ) -> Result<(), Problem> {
        let files = files_of(leaves).into_iter().chain(memory.map(|row| row.file.clone())).collect();
        self.journal(task, "apply", files)?;
        self.make_leaves(leaves, disks).await?;
        self.steps.at("apply:files");
        task.check()
    }

    /// The transaction: `next` is the machine, as [`Machine::apply`] makes it; `outcome` is what the request has come to with it.
    pub fn end_apply(&self, task: &Task, outcome: &Result<Value, Problem>, next: Machine) -> Result<(), Problem> {
        self.settle_as(task, outcome, |machine| *machine = next)?;
        self.steps.at("apply:committed");
        Ok(())
    }
}

impl Owner {
    /// The snapshot that Now stands on.
    pub(crate) fn revert_target(&self) -> Result<SnapshotId, Problem> {
        let rows = self.machine();
        let name = &rows.machine.name;
        rows.machine.now.parent.ok_or_else(|| {
            Problem::refused(format!("{name} stands on no snapshot"))
                .hint(format!("tenby snapshot list {}", quoted(name)))
        })
    }

    /// Makes a snapshot the present.
    pub(crate) async fn apply(
        &mut self,
        task: &Task,
        to: SnapshotId,
        present: &Present,
        start: Option<bool>,
        memory: bool,
    ) -> Result<Value, Problem> {
        self.doing("applying");
        let mut plan = self.plan_apply(to, present, start, memory)?;
        plan.load = self.memory_to_load(&plan, present).await?;
        let alone = self.no_way_back(task, &plan);
        if plan.present.memory().is_some() {
            self.fill(task).await?;
            self.doing("applying");
        }
        self.live.iter_mut().for_each(Live::stop_collapsing);
        let disks = self.live.as_mut().map(Live::disks);
        self.keeper.begin_apply(task, &plan.leaves, plan.present.memory(), disks.as_deref()).await?;
        let (name, kept) = (self.name_of(to), plan.present.kept().map(|take| (take.id, take.name.clone())));
        let undo_for =
            if matches!(plan.present, Fate::ThrownAway) { self.machine().machine.policy.undo_for } else { 0 };
        let result = json!({ "snapshot": to, "undo_for": undo_for, "kept": kept.as_ref().map(|(id, _)| id), "kept_name": kept.as_ref().map(|(_, name)| name) });
        let was_running = plan.was_running;
        let applied = self.carry_out_apply(task, plan, alone, &result).await;
        // Still journalled: not committed, so the old QEMU is the machine's, and goes on.
        if applied.is_err() && self.machine().journal(task.id()).is_some() {
            self.go_on(was_running).await;
        }
        applied?;
        let words = kept.map_or_else(String::new, |(_, kept)| format!("; kept the present as {kept}"));
        log::write(&self.keeper.files, Some(task.id()), &format!("applied {name}{words}"));
        Ok(result)
    }

    fn plan_apply(
        &self,
        to: SnapshotId,
        present: &Present,
        start: Option<bool>,
        memory: bool,
    ) -> Result<Plan, Problem> {
        let rows = self.machine();
        let machine = &rows.machine;
        let snapshot = machine.snapshots.get(&to).ok_or_else(|| Problem::not_found("the snapshot is gone"))?;
        if snapshot.state == SnapshotState::Creating {
            return Err(Problem::refused(format!("{} is still being written", snapshot.name)));
        }
        if *present == Present::IfUnchanged && views::changed(machine, &self.keeper.files) {
            return Err(self.would_lose(machine, snapshot, memory));
        }
        let was_running = machine.now.state == State::Running;
        let live = matches!(machine.now.state, State::Running | State::Paused);
        let undoable = || machine.policy.undo_for > 0 && views::changed(machine, &self.keeper.files);
        let present = match present {
            Present::Keep { name } => {
                let created = jiff::Timestamp::now();
                let take = Take {
                    id: SnapshotId::new(),
                    name: machine.snapshot_name(name.as_deref(), created)?,
                    note: String::new(),
                    created,
                    vm_state: machine.now.state,
                    memory: machine.now.memory,
                    state: SnapshotState::Ready,
                };
                Fate::Kept(Box::new(take), live.then(|| Box::new(self.keeper.memory_row())))
            }
            Present::Discard if undoable() => Fate::ThrownAway,
            Present::Discard | Present::IfUnchanged => Fate::Forgotten,
        };
        let leaves = self.keeper.leaf_rows(&snapshot.disks);
        Ok(Plan { to, leaves, present, memory, run: start.unwrap_or(was_running), was_running, load: None })
    }

    /// The snapshot's memory, if the machine is to go on from it: refused, before anything has changed, where what it needs is not here.
    async fn memory_to_load(&self, plan: &Plan, present: &Present) -> Result<Option<Memory>, Problem> {
        let rows = self.machine();
        let machine = &rows.machine;
        let Some(snapshot) = machine.snapshots.get(&plan.to) else { return Ok(None) };
        let Some(layer) = snapshot.memory.filter(|_| plan.run && plan.memory) else { return Ok(None) };
        let fate = match present {
            Present::Keep { name: Some(name) } => format!(" --keep-as {}", quoted(name)),
            Present::Keep { name: None } => " --keep".to_owned(),
            Present::Discard => " --discard".to_owned(),
            Present::IfUnchanged => String::new(),
        };
        let start = if plan.was_running { "" } else { " --start" };
        let without = format!("{}{fate}{start} --no-memory", apply_words(machine, snapshot));
        let what = format!("the memory of {}", shorten(&snapshot.name));
        self.open_memory(machine, &snapshot.config, layer, &what, without).await.map(Some)
    }

    /// Whether the host has not the RAM for the old QEMU and the new one side by side; that is said.
    fn no_way_back(&self, task: &Task, plan: &Plan) -> bool {
        let rows = self.machine();
        let ram = rows.machine.snapshots.get(&plan.to).map_or(0, |snapshot| snapshot.config.memory);
        let needed = OWN_RAM + plan.load.as_ref().map_or(0, |memory| memory.takes(ram));
        let two = plan.run && self.live.is_some();
        let Some(available) = qemu::available_ram().filter(|available| two && *available < needed) else {
            return false;
        };
        let words = format!(
            "the host has {} of RAM to spare, and another QEMU beside the one that runs takes {}: that one is given up before {} is loaded, and there is no way back",
            size(available),
            size(needed),
            shorten(&self.name_of(plan.to)),
        );
        self.warn(task, &words);
        true
    }

    async fn carry_out_apply(&mut self, task: &Task, plan: Plan, alone: bool, result: &Value) -> Result<(), Problem> {
        let written = self.leave_present(task, &plan).await?;
        self.keeper.steps.at("apply:kept");
        let mut next = self.machine().machine.clone();
        let Plan { to, leaves, present, memory, run, load, .. } = plan;
        match present {
            Fate::Kept(take, _) => next.keep(*take, written),
            Fate::ThrownAway => next.note_discarded(to, jiff::Timestamp::now()),
            Fate::Forgotten => {}
        }
        next.apply(to, leaves, memory);
        let live = match run && !alone {
            true => Some(self.bring_up_applied(task, &mut next, load).await?),
            false => None,
        };
        self.keeper.steps.at("apply:loaded");
        let before = self.machine();
        let outcome = match alone {
            true => Err(not_running(&next, Problem::failed("the worker died before it was started"))),
            false => Ok(result.clone()),
        };
        if let Err(problem) = self.keeper.end_apply(task, &outcome, next) {
            if let Some(live) = live {
                self.end(live).await;
            }
            return Err(problem);
        }
        self.swap(live, &before.machine.now.config).await?;
        if alone { self.run_applied(task, result).await } else { Ok(()) }
    }

    /// Halts the guest, and writes its memory if the present is kept.
    async fn leave_present(&self, task: &Task, plan: &Plan) -> Result<Option<Written>, Problem> {
        let Some(live) = &self.live else { return Ok(None) };
        if let Some(row) = plan.present.memory() {
            return self.save_memory(task, row.clone()).await.map(Some);
        }
        live.qemu.pause().await.map_err(|e| qemu_problem(&self.shared.name(), &e))?;
        live.flush().await?;
        Ok(None)
    }

    async fn bring_up_applied(&self, task: &Task, next: &mut Machine, load: Option<Memory>) -> Result<Live, Problem> {
        let memory = next.now.memory;
        let live = self.bring_up(task, next, load).await?;
        next.start(State::Running, memory, live.run());
        next.now.restoring = live.lent().map(Lent::layer);
        Ok(live)
    }

    /// The old QEMU has ended; the machine goes on from what was applied.
    async fn run_applied(&mut self, task: &Task, result: &Value) -> Result<(), Problem> {
        let started = self.start_for(task, State::Running, result).await;
        started.map_err(|problem| match &self.machine().machine {
            machine if machine.now.state == State::Running => problem,
            machine => not_running(machine, problem),
        })
    }

    /// The new QEMU runs, the old one ends. It stands still and stands on files of its own: the guest need not wait for its end, but for its ports.
    async fn swap(&mut self, live: Option<Live>, before: &Config) -> Result<(), Problem> {
        self.shared.set_moment(|moment| {
            moment.sockets = None;
            moment.qemu = None;
        });
        let old = self.live.take();
        let mut ran = Ok(());
        if let Some(live) = live {
            if let Some(old) = &old {
                old.retract(before).await;
            }
            self.go_live(live);
            self.keeper.steps.at("apply:swapped");
            ran = self.let_run().await;
        }
        if let Some(old) = old {
            self.end(old).await;
        }
        self.keeper.steps.at("apply:old-ended");
        ran
    }

    /// The refusal of an apply that would lose something, saying what.
    fn would_lose(&self, machine: &Machine, target: &Snapshot, memory: bool) -> Problem {
        let name = &machine.name;
        let now = &machine.now;
        let what = match now.parent.and_then(|id| machine.snapshots.get(&id)) {
            None => format!("{name} stands on no snapshot"),
            Some(parent) => format!("{name} has changed since {}{}", parent.name, self.changes(machine, parent)),
        };
        let memory = if memory { "" } else { " --no-memory" };
        let shell = format!("{}{memory}", apply_words(machine, target));
        Problem::refused(format!("{what}; applying {} would lose that", shorten(&target.name)))
            .hint(format!("{shell} --keep      (or --discard)"))
    }

    /// ` (12M on 1 disk, and its memory)`.
    fn changes(&self, machine: &Machine, parent: &Snapshot) -> String {
        let now = &machine.now;
        let live = matches!(now.state, State::Running | State::Paused);
        let written = |leaf: &crate::tree::LayerId| match machine.layers.get(leaf) {
            Some(row) if live => self.keeper.files.allocated(row),
            Some(_) => views::written(machine, &self.keeper.files, *leaf),
            None => 0,
        };
        // The guest's: what its firmware keeps, every start changes.
        let disks = now.config.disks.iter().filter_map(|disk| now.disks.get(&disk.id));
        let disks: Vec<u64> = disks.map(written).filter(|bytes| *bytes > 0).collect();
        let mut parts = Vec::new();
        if !disks.is_empty() {
            let plural = if disks.len() == 1 { "" } else { "s" };
            parts.push(format!("{} on {} disk{plural}", size(disks.iter().sum()), disks.len()));
        }
        if live || now.memory != parent.memory {
            parts.push("its memory".to_owned());
        }
        if now.config != parent.config {
            parts.push("its settings".to_owned());
        }
        if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", and ")) }
    }

    fn name_of(&self, id: SnapshotId) -> String {
        self.machine().machine.snapshots.get(&id).map(|s| s.name.clone()).unwrap_or_default()
    }
}

/// What is told of a machine that was to run after the apply, and does not.
fn not_running(machine: &Machine, why: Problem) -> Problem {
    let (name, state) = (&machine.name, crate::admit::word(machine.now.state));
    let mut problem =
        Problem { message: format!("{name} is {state}, at the snapshot, and does not run: {why}"), ..why };
    problem.hint.get_or_insert(format!("tenby vm start {}", quoted(name)));
    problem
}

/// The command that applies a snapshot, without what it is to do with the present.
fn apply_words(machine: &Machine, target: &Snapshot) -> String {
    let alone = machine.snapshots.values().filter(|other| other.name == target.name).count() == 1;
    let target_word = if alone { quoted(&target.name) } else { machine.short_id(target.id) };
    format!("tenby snapshot apply {} {target_word}", quoted(&machine.name))
}

/// Bytes in the contract's short form: `12M`, `1.2G`.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["", "K", "M", "G", "T", "P"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit > 0 && value < 9.95 { format!("{value:.1}{}", UNITS[unit]) } else { format!("{value:.0}{}", UNITS[unit]) }
}
