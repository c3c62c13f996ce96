//! A machine on a simulated disk, and a guest that writes to it: everything that an owner does with a [`Keeper`], in the same order.

use crate::model::{Content, Model, SECTOR, Written};
use image::{Chain, Received};
use machine::carry::Carries;
use machine::collect::Folded;
use machine::disks::Disks;
use machine::files::Files;
use machine::job::{Cancel, Task};
use machine::keeper::Keeper;
use machine::ledger::Ledger;
use machine::ops::snapshot::{Leaves, Made};
use machine::plan::{Take, Written as Memory};
use machine::ram;
use machine::request::{Problem, ProblemKind};
use machine::steps::Steps;
use machine::tree::{DiskId, JobId, LayerId, LayerRow, Machine, Run, SnapshotId, SnapshotState, State, Stats};
use memory::stream::{Block, DeviceState, Emitter, PAGE};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use store::sim::Sim;
use uuid::Uuid;

/// Sizes of the disks: in the middle of a block, and less than one.
const SIZES: [u64; 2] = [(3 << 20) + 3 * SECTOR, 600 << 10];
/// Pages of RAM.
const PAGES: usize = 24;

pub(crate) type Result<T> = std::result::Result<T, Problem>;

/// A guest that writes, flushes and forgets; also while something is done to its disks.
#[derive(Debug)]
pub(crate) struct Guest {
    /// Its disks, while it runs.
    chains: BTreeMap<DiskId, Arc<Chain>>,
    disks: BTreeMap<DiskId, Written>,
    ram: Vec<u32>,
    versions: u32,
    dice: Dice,
}

/// Numbers that follow from a seed.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

impl Guest {
    /// Does `count` things.
    fn act(&mut self, count: u64) -> image::Result<()> {
        (0..count).try_for_each(|_| self.act_once())
    }

    fn act_once(&mut self) -> image::Result<()> {
        let page = self.dice.below(PAGES as u64) as usize;
        self.versions += 1;
        self.ram[page] = if self.dice.one_in(4) { 0 } else { self.versions };
        let nth = self.dice.below(self.chains.len().max(1) as u64) as usize;
        let Some((disk, chain)) = self.chains.iter().nth(nth) else { return Ok(()) };
        let (written, chain) = (self.disks.get_mut(disk).expect("its model"), Arc::clone(chain));
        let from = self.dice.below(written.sectors());
        let most = if self.dice.one_in(6) { written.sectors() } else { 24 };
        let count = 1 + self.dice.below(most.min(written.sectors() - from));
        match self.dice.below(10) {
            0..=5 => {
                written.put(from, count, self.versions);
                chain.write(&self.versions.to_le_bytes().repeat((count * SECTOR / 4) as usize), from * SECTOR)
            }
            6 | 7 => {
                written.put(from, count, 0);
                chain.zero(from * SECTOR, count * SECTOR)
            }
            _ => {
                chain.flush()?;
                written.flush();
                Ok(())
            }
        }
    }

    fn flush(&mut self) -> image::Result<()> {
        self.chains.values().try_for_each(|chain| chain.flush())?;
        self.disks.values_mut().for_each(Written::flush);
        Ok(())
    }

    fn content(&self, memory: Option<Vec<u32>>) -> Content {
        Content { disks: self.disks.iter().map(|(id, disk)| (id.clone(), disk.latest())).collect(), memory }
    }
}

/// The machine's files on a disk.
pub(crate) fn files(disk: &Sim) -> Files {
    Files::new(disk.root(), Path::new("/sim"))
}

/// What the host forgets when it stops.
pub(crate) fn carries(runtime: &Sim) -> Carries {
    Carries::new(runtime.root(), Uuid::from_u128(1))
}

pub(crate) struct World {
    pub(crate) disk: Sim,
    pub(crate) runtime: Sim,
    files: Files,
    /// The worker.
    keeper: Option<Keeper>,
    /// While the guest runs.
    disks: Option<Disks>,
    guest: Arc<Mutex<Guest>>,
    snapshots: BTreeMap<SnapshotId, Content>,
    /// In the order in which they were taken.
    order: Vec<SnapshotId>,
    saved: Option<Vec<u32>>,
    /// What the request under way makes of the machine, once it is committed.
    next: Option<Model>,
    /// What is under way.
    pub(crate) doing: &'static str,
    /// What was under way before, and the operation of the disk with which it began.
    pub(crate) diary: Vec<(u64, &'static str)>,
    dice: Dice,
    numbers: u32,
}

impl World {
    /// A new machine, off, its disks empty.
    pub(crate) fn new(machine: &Machine, seed: u64) -> Self {
        let (disk, runtime) = (Sim::new(), Sim::new());
        let files = files(&disk);
        files.create_folders().expect("folders");
        let mut machine = machine.clone();
        for (row, size) in machine.layers.values_mut().zip(SIZES) {
            row.file = format!("disks/{}.vhdx", row.id);
            files.create_layer(row, size, None, None).expect("a base").close().expect("closed");
        }
        files.sync_names().expect("names");
        files.folder().sync().expect("folders");
        Ledger::create(files.folder(), &machine).expect("a ledger").close();
        let size =
            |leaf: &LayerId| files.open_layer(&machine.layers[leaf], store::Mode::Read).expect("a base").info().size;
        let disks = machine.now.disks.iter().map(|(id, leaf)| (id.clone(), empty(size(leaf)))).collect();
        let guest = Guest { chains: BTreeMap::new(), disks, ram: vec![0; PAGES], versions: 0, dice: Dice::new(!seed) };
        let guest = Arc::new(Mutex::new(guest));
        let keeper = Keeper::open(&files, carries(&runtime), steps(&guest)).expect("opens");
        Self {
            disk,
            runtime,
            files,
            keeper: Some(keeper),
            disks: None,
            guest,
            snapshots: BTreeMap::new(),
            order: Vec::new(),
            saved: None,
            next: None,
            doing: "nothing",
            diary: Vec::new(),
            dice: Dice::new(seed),
            numbers: 0,
        }
    }

    /// What the machine holds, as far as was acknowledged.
    pub(crate) fn model(&self) -> Model {
        Model { snapshots: self.snapshots.clone(), disks: self.guest().disks.clone(), saved: self.saved.clone() }
    }

    /// What it may hold as well: the request under way may have been committed.
    pub(crate) fn next(&self) -> Option<Model> {
        self.next.clone()
    }

    fn keeper(&self) -> Keeper {
        self.keeper.clone().expect("a worker")
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `count` things, until one fails.
    pub(crate) async fn live(&mut self, count: u32) -> Result<()> {
        for _ in 0..count {
            self.next = None;
            self.step().await?;
        }
        self.begin("nothing");
        Ok(())
    }

    async fn step(&mut self) -> Result<()> {
        let running = self.disks.is_some();
        match self.dice.below(24) {
            0..=3 if running => {
                self.begin("guest");
                let count = 1 + self.dice.below(4);
                self.guest().act(count).map_err(|e| image(&e))
            }
            0..=3 => self.start(),
            4 if running => self.stop(),
            5 if running => self.save(),
            6 => self.die(),
            7..=11 => self.request("snapshot").await,
            12..=14 if !self.order.is_empty() => self.request("apply").await,
            15..=17 if !self.order.is_empty() => self.request("delete").await,
            _ => self.collect(),
        }
    }

    fn begin(&mut self, what: &'static str) {
        self.doing = what;
        self.diary.push((self.disk.counts().operations, what));
    }

    fn task(&self, kind: &str) -> Task {
        let task = self.keeper().jobs().open(JobId::new(), "lab", kind).expect("a fresh job");
        task.running();
        task
    }

    async fn request(&mut self, kind: &'static str) -> Result<()> {
        self.begin(kind);
        let task = self.task(kind);
        let outcome = match kind {
            "snapshot" => self.snapshot(&task).await,
            "apply" => self.apply(&task).await,
            _ => self.delete(&task),
        };
        if outcome.is_err() {
            self.keeper().undo(&task);
        }
        let cancelled = outcome.as_ref().is_err_and(|problem| problem.kind == ProblemKind::Cancelled);
        self.keeper().finish(&task, &outcome);
        if cancelled && self.disk.powered() { Ok(()) } else { outcome.map(drop) }
    }

    fn start(&mut self) -> Result<()> {
        self.begin("start");
        let task = self.task("start");
        let mut next = self.keeper().rows().machine.clone();
        let memory = next.now.memory;
        let disks = self.keeper().open_disks(&next)?;
        next.start(State::Running, memory, run());
        self.next = Some(Model { saved: None, ..self.model() });
        self.keeper().settle(&task, &Value::Null, |machine| *machine = next)?;
        if let Some(saved) = self.saved.take() {
            self.guest().ram = saved;
        }
        self.go_live(disks);
        Ok(())
    }

    fn go_live(&mut self, disks: Disks) {
        self.guest().chains = disks.chains().map(|(id, chain)| (id.clone(), Arc::clone(chain))).collect();
        self.disks = Some(disks);
    }

    fn end(&mut self) {
        self.guest().chains.clear();
        if let Some(disks) = self.disks.take() {
            disks.close();
        }
        if self.disk.powered() {
            self.guest().disks.values_mut().for_each(Written::flush);
        }
    }

    fn stop(&mut self) -> Result<()> {
        self.begin("stop");
        let task = self.task("stop");
        self.keeper().settle(&task, &Value::Null, Machine::turn_off)?;
        self.end();
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.begin("save");
        let task = self.task("save");
        let row = self.keeper().memory_row();
        self.keeper().journal(&task, "save", vec![row.file.clone()])?;
        self.guest().flush().map_err(|e| image(&e))?;
        let ram = self.guest().ram.clone();
        let written = self.write_memory(row, &ram)?;
        self.next = Some(Model { saved: Some(ram.clone()), ..self.model() });
        self.keeper().settle(&task, &Value::Null, |machine| machine.save(written))?;
        self.saved = Some(ram);
        self.end();
        Ok(())
    }

    /// As QEMU would send it.
    fn write_memory(&self, row: LayerRow, ram: &[u32]) -> Result<Memory> {
        let target = ram::Target::new(&self.files, &self.keeper().rows().machine, row);
        let (layer, _) = target.capture(stream(ram).as_slice(), |_| {})?;
        Ok(Memory { layer, stats: Stats::default() })
    }

    fn take(&mut self, state: SnapshotState) -> Take {
        let now = &self.keeper().rows().machine.now;
        self.numbers += 1;
        Take {
            id: SnapshotId::new(),
            name: format!("s{}", self.numbers),
            note: String::new(),
            created: jiff::Timestamp::UNIX_EPOCH,
            vm_state: now.state,
            memory: now.memory,
            state,
        }
    }

    async fn snapshot(&mut self, task: &Task) -> Result<Value> {
        if self.disks.is_some() {
            return self.snapshot_live(task).await;
        }
        let take = self.take(SnapshotState::Ready);
        let id = take.id;
        let content = self.guest().content(self.saved.clone());
        self.will_have(id, content);
        self.keeper().snapshot_still(task, take, &Value::Null).await?;
        self.taken(id);
        Ok(Value::Null)
    }

    /// The snapshot is there once its transaction is.
    fn will_have(&mut self, id: SnapshotId, content: Content) {
        let mut next = self.model();
        next.snapshots.insert(id, content);
        self.next = Some(next);
    }

    fn taken(&mut self, id: SnapshotId) {
        let content = self.next.take().and_then(|mut next| next.snapshots.remove(&id));
        self.snapshots.insert(id, content.expect("it was to come"));
        self.order.push(id);
    }

    async fn snapshot_live(&mut self, task: &Task) -> Result<Value> {
        let take = self.take(SnapshotState::Creating);
        let (id, memory) = (take.id, self.keeper().memory_row());
        let (leaves, made) = self.keeper().begin_snapshot(task, take, &memory, self.disks.as_ref()).await?;
        let captured = self.capture(id, memory, &leaves, made);
        // Whoever writes goes on meanwhile, and may be told so by a crash: what it wrote is Now's in either case.
        if let Some(next) = &mut self.next {
            next.disks = self.guest.lock().expect("the guest").disks.clone();
        }
        let (keeper, disks) = (self.keeper(), self.disks.as_mut().expect("it runs"));
        keeper.end_snapshot(task, id, captured, &Value::Null, disks)?;
        self.taken(id);
        Ok(Value::Null)
    }

    fn capture(&mut self, id: SnapshotId, memory: LayerRow, leaves: &Leaves, made: Made) -> Result<Memory> {
        if self.dice.one_in(3) {
            // The guest stands still.
            self.guest().flush().map_err(|e| image(&e))?;
            let keeper = self.keeper();
            keeper.push(self.disks.as_mut().expect("it runs"), leaves, made);
            return self.capture_memory(id, memory);
        }
        let keeper = self.keeper();
        let mut windows = keeper.push_ambiguous(self.disks.as_mut().expect("it runs"), leaves, made);
        self.act()?;
        if self.dice.one_in(2) {
            windows.iter_mut().try_for_each(|window| window.settle_before(Received::now())).map_err(|e| image(&e))?;
            self.act()?;
        }
        if self.dice.one_in(6) {
            return Err(cancelled());
        }
        let (ram, point) = (self.guest().ram.clone(), Received(Received::now().0 + 1));
        let content = self.guest().content(Some(ram));
        self.will_have(id, content);
        self.act()?;
        windows.iter_mut().try_for_each(|window| window.finish(point)).map_err(|e| image(&e))?;
        self.act()?;
        let ram = self.next.as_ref().and_then(|next| next.snapshots[&id].memory.clone()).expect("it has RAM");
        if self.dice.one_in(8) {
            return Err(cancelled());
        }
        self.write_memory(memory, &ram)
    }

    fn capture_memory(&mut self, id: SnapshotId, memory: LayerRow) -> Result<Memory> {
        let ram = self.guest().ram.clone();
        let content = self.guest().content(Some(ram.clone()));
        self.will_have(id, content);
        self.write_memory(memory, &ram)
    }

    fn act(&mut self) -> Result<()> {
        let count = self.dice.below(3);
        self.guest().act(count).map_err(|e| image(&e))
    }

    async fn apply(&mut self, task: &Task) -> Result<Value> {
        let to = self.order[self.dice.below(self.order.len() as u64) as usize];
        let (keep, run_on) = (self.dice.one_in(2), self.dice.one_in(2));
        let running = self.disks.is_some();
        let target = self.keeper().rows().machine.snapshots[&to].clone();
        let leaves = self.keeper().leaf_rows(&target.disks);
        let kept = keep.then(|| (self.take(SnapshotState::Ready), running.then(|| self.keeper().memory_row())));
        let memory = kept.as_ref().and_then(|(_, row)| row.clone());
        self.keeper().begin_apply(task, &leaves, memory.as_ref(), self.disks.as_ref()).await?;
        self.guest().flush().map_err(|e| image(&e))?;
        let ram = memory.as_ref().map(|_| self.guest().ram.clone()).or(self.saved.clone());
        let written = memory.map(|row| self.write_memory(row, ram.as_deref().expect("it runs"))).transpose()?;
        let mut next = self.keeper().rows().machine.clone();
        let mut model = self.model();
        let kept = kept.map(|(take, _)| take);
        let kept_id = kept.as_ref().map(|take| take.id);
        if let Some(take) = kept {
            model.snapshots.insert(take.id, self.guest().content(ram));
            next.keep(take, written);
        }
        next.apply(to, leaves, true);
        let content = self.snapshots[&to].clone();
        model.disks = content.disks.into_iter().map(|(id, sectors)| (id, Written::new(sectors))).collect();
        model.saved = content.memory.filter(|_| !run_on);
        let disks = run_on.then(|| self.keeper().open_disks(&next)).transpose()?;
        if run_on {
            let memory = next.now.memory;
            next.start(State::Running, memory, run());
        }
        self.next = Some(model.clone());
        self.keeper().end_apply(task, &Value::Null, next)?;
        self.end();
        let ram = self.snapshots[&to].memory.clone().unwrap_or_else(|| vec![0; PAGES]);
        (self.guest().disks, self.guest().ram) = (model.disks, ram);
        (self.snapshots, self.saved) = (model.snapshots, model.saved);
        self.order.extend(kept_id);
        if let Some(disks) = disks {
            self.go_live(disks);
        }
        Ok(Value::Null)
    }

    fn delete(&mut self, task: &Task) -> Result<Value> {
        let id = self.order[self.dice.below(self.order.len() as u64) as usize];
        let subtree = self.dice.one_in(5);
        let gone = self.keeper().rows().machine.below(id, subtree);
        let mut next = self.model();
        next.snapshots.retain(|id, _| !gone.contains(id));
        self.next = Some(next.clone());
        self.keeper().delete(task, &id.to_string(), subtree)?;
        self.snapshots = next.snapshots;
        self.order.retain(|id| !gone.contains(id));
        Ok(Value::Null)
    }

    fn collect(&mut self) -> Result<()> {
        self.begin("remove");
        self.keeper().remove_garbage()?;
        let keeper = self.keeper();
        let Some(folding) = keeper.next_fold(self.disks.as_mut())? else { return Ok(()) };
        self.begin("fold");
        let stop = Cancel::default();
        if self.dice.one_in(6) {
            stop.ask();
        }
        let folded = self.keeper().fold(folding, &stop);
        self.folded(&folded)
    }

    fn folded(&mut self, folded: &Folded) -> Result<()> {
        let keeper = self.keeper();
        let outcome = keeper.folded(folded, self.disks.as_mut());
        let cancelled = outcome.as_ref().is_err_and(|problem| problem.kind == ProblemKind::Cancelled);
        self.keeper().finish(folded.task(), &outcome);
        if cancelled { Ok(()) } else { outcome.map(drop) }
    }

    /// The worker dies as by `kill -9`, and the next one takes over. The guest lives on.
    fn die(&mut self) -> Result<()> {
        self.begin("recovery");
        self.disk.cut_now();
        self.runtime.cut_now();
        self.recover()
    }

    /// What a new worker does: the host has lived on.
    pub(crate) fn recover(&mut self) -> Result<()> {
        self.guest().chains.clear();
        drop(self.disks.take());
        drop(self.keeper.take());
        self.disk.revive();
        self.runtime.revive();
        self.keeper = Some(Keeper::open(&self.files, carries(&self.runtime), steps(&self.guest))?);
        self.keeper().work_off_carries()?;
        let rows = self.keeper().rows();
        if rows.machine.now.state == State::Running {
            let disks = self.keeper().open_disks(&rows.machine)?;
            self.go_live(disks);
        }
        let keeper = self.keeper();
        keeper.undo_unfinished(self.disks.as_mut())
    }
}

fn empty(size: u64) -> Written {
    Written::new(vec![0; (size / SECTOR) as usize])
}

/// While a fold copies, the guest writes.
fn steps(guest: &Arc<Mutex<Guest>>) -> Steps {
    let guest = Arc::clone(guest);
    let folds = Mutex::new(false);
    Steps::watched(move |step| {
        let mut begun = folds.lock().unwrap_or_else(PoisonError::into_inner);
        if step == "merge:copying" && !std::mem::replace(&mut *begun, true) {
            // A cut shows again at once in the fold itself.
            let _ = guest.lock().unwrap_or_else(PoisonError::into_inner).act(2);
        }
        *begun = step == "merge:copying";
    })
}

fn run() -> Run {
    Run { pid: 1, started: 1, since: jiff::Timestamp::UNIX_EPOCH, dir: String::new() }
}

fn cancelled() -> Problem {
    Problem::new(ProblemKind::Cancelled, "cancelled")
}

fn image(error: &image::Error) -> Problem {
    Problem::failed(error.to_string())
}

fn stream(ram: &[u32]) -> Vec<u8> {
    let blocks = [Block { name: "pc.ram".to_owned(), len: (ram.len() * PAGE) as u64 }];
    let (mut emitter, mut out) = (Emitter::new(2, &blocks), Vec::new());
    Emitter::prelude(&mut out, "pc-q35-7.2");
    emitter.start(&mut out);
    emitter.open_end(&mut out);
    for (page, version) in ram.iter().enumerate() {
        match version {
            0 => emitter.zero_page(&mut out, 0, (page * PAGE) as u64),
            version => emitter.page(&mut out, 0, (page * PAGE) as u64, &version.to_le_bytes().repeat(PAGE / 4)),
        }
    }
    emitter.close(&mut out);
    Emitter::finish(&mut out, &DeviceState { state: vec![4, 1, 2, 3], description: br#"{"devices":[]}"#.to_vec() });
    out
}
