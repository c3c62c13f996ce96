//! A machine on a simulated disk, and a guest that writes to it: everything that an owner does with a [`Keeper`], in the same order.

use crate::model::{Checked, Content, Live, Model, SECTOR, Written};
use crate::sample;
use image::Received;
use machine::carry::Carries;
use machine::collect::{Begin, Folded, Sizes};
use machine::disks::Disks;
use machine::files::Files;
use machine::hashing::{Known, Manner};
use machine::job::{Cancel, Task};
use machine::keeper::Keeper;
use machine::label::Labelled;
use machine::ledger::{Ledger, State as Rows};
use machine::ops::snapshot::{Leaves, Made};
use machine::plan::{Take, Written as Memory};
use machine::ram;
use machine::request::{JobState, Problem, ProblemKind};
use machine::steps::Steps;
use machine::tree::{
    DiskId, Firmware, JobId, LayerId, LayerRow, Machine, Run, SnapshotId, SnapshotState, State, Stats, TrashId,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use store::sim::Sim;
use uuid::Uuid;

/// Sizes of the disks: in the middle of a block, and less than one.
const SIZES: [u64; 2] = [(3 << 20) + 3 * SECTOR, 600 << 10];
/// Bytes that a fold has to make do with.
const ROOM: u64 = 4 << 20;
/// A merge notes how far it is, and a leaf gets another on top, for little.
const SIZES_OF_MERGES: Sizes = Sizes { mark_every: 128 << 10, split_from: 64 << 10 };
/// Pages of RAM.
pub(crate) const PAGES: usize = 24;

pub(crate) type Result<T> = std::result::Result<T, Problem>;

/// A guest that writes, flushes and forgets; also while something is done to its disks.
#[derive(Debug)]
pub(crate) struct Guest {
    /// Its disks, while it runs.
    chains: Live,
    /// What it has asked a disk for and got no answer to: it asks again.
    asked: Option<(DiskId, Ask)>,
    truth: Arc<Mutex<Truth>>,
    ram: Vec<u32>,
    versions: u32,
    dice: Dice,
}

/// What a guest asks a disk for.
#[derive(Debug, Clone, Copy)]
enum Ask {
    /// Sectors that get this version, 0 for zeros.
    Write {
        from: u64,
        count: u64,
        version: u32,
    },
    Flush,
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
        let Some(disk) = self.chains.keys().nth(nth) else { return Ok(()) };
        let mut truth = lock(&self.truth);
        let written = truth.disks.get_mut(disk).expect("its model");
        let from = self.dice.below(written.sectors());
        let most = if self.dice.one_in(6) { written.sectors() } else { 24 };
        let count = 1 + self.dice.below(most.min(written.sectors() - from));
        let ask = match self.dice.below(10) {
            0..=5 => Ask::Write { from, count, version: self.versions },
            6 | 7 => Ask::Write { from, count, version: 0 },
            _ => Ask::Flush,
        };
        if let Ask::Write { from, count, version } = ask {
            written.put(from, count, version);
        }
        drop(truth);
        self.asked = Some((disk.clone(), ask));
        self.ask()
    }

    /// Asks for what was not answered.
    fn ask(&mut self) -> image::Result<()> {
        let Some((disk, ask)) = &self.asked else { return Ok(()) };
        let Some(chain) = self.chains.get(disk) else { return Ok(()) };
        match *ask {
            Ask::Write { from, count, version: 0 } => chain.zero(from * SECTOR, count * SECTOR)?,
            Ask::Write { from, count, version } => {
                chain.write(&version.to_le_bytes().repeat((count * SECTOR / 4) as usize), from * SECTOR)?;
            }
            Ask::Flush => {
                chain.flush()?;
                lock(&self.truth).disks.get_mut(disk).expect("its model").flush();
            }
        }
        self.asked = None;
        Ok(())
    }

    fn flush(&mut self) -> image::Result<()> {
        self.chains.values().try_for_each(|chain| chain.flush())?;
        lock(&self.truth).disks.values_mut().for_each(Written::flush);
        Ok(())
    }
}

/// What the machine ought to hold, and what is under way. It can be looked at in the middle of an operation of the disk: nobody keeps it over one.
#[derive(Debug)]
struct Truth {
    snapshots: BTreeMap<SnapshotId, Content>,
    trash: BTreeMap<SnapshotId, Content>,
    disks: BTreeMap<DiskId, Written>,
    saved: Option<Vec<u32>>,
    /// How requests have ended, as their owners were told.
    ended: BTreeMap<JobId, JobState>,
    next: Option<Next>,
    /// What is under way.
    doing: &'static str,
}

impl Truth {
    /// What the machine holds, as far as was acknowledged; and what it may hold as well, if the request under way was committed.
    fn models(&self) -> Vec<Model> {
        let next = self.next.clone().map(|next| Model {
            snapshots: next.snapshots,
            trash: next.trash,
            disks: next.disks.unwrap_or_else(|| self.disks.clone()),
            saved: next.saved,
            ended: self.ended.clone(),
        });
        let (snapshots, trash, ended) = (self.snapshots.clone(), self.trash.clone(), self.ended.clone());
        let now = Model { snapshots, trash, disks: self.disks.clone(), saved: self.saved.clone(), ended };
        std::iter::once(now).chain(next).collect()
    }

    fn content(&self, memory: Option<Vec<u32>>) -> Content {
        Content { disks: self.disks.iter().map(|(id, disk)| (id.clone(), disk.latest())).collect(), memory }
    }

    /// The request of this task will change nothing but what is changed in what this returns.
    fn will(&mut self, task: &Task) -> &mut Next {
        self.will_by(By::Job(task.id()))
    }

    fn will_by(&mut self, by: By) -> &mut Next {
        let (snapshots, trash, saved) = (self.snapshots.clone(), self.trash.clone(), self.saved.clone());
        self.next.insert(Next { by, snapshots, trash, saved, disks: None, ram: None })
    }
}

/// What there was just before an operation of the disk.
#[derive(Debug)]
pub(crate) struct Moment {
    pub(crate) at: u64,
    pub(crate) disk: Sim,
    pub(crate) doing: &'static str,
    pub(crate) models: Vec<Model>,
}

/// Moments, as they come.
#[derive(Debug, Default, Clone)]
pub(crate) struct Moments(Arc<Mutex<Vec<Moment>>>);

impl Moments {
    pub(crate) fn take(&self) -> Vec<Moment> {
        std::mem::take(&mut *lock(&self.0))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The machine's files on a disk.
pub(crate) fn files(disk: &Sim) -> Files {
    Files::new(disk.root(), Path::new("/sim"))
}

/// What the host forgets when it stops.
pub(crate) fn carries(runtime: &Sim) -> Carries {
    Carries::new(runtime.root(), Uuid::from_u128(1))
}

/// What the request under way makes of the machine, once it is committed.
#[derive(Debug, Clone)]
struct Next {
    /// Its request; of what is given up, that.
    by: By,
    snapshots: BTreeMap<SnapshotId, Content>,
    trash: BTreeMap<SnapshotId, Content>,
    saved: Option<Vec<u32>>,
    /// Of Now, if that becomes another.
    disks: Option<BTreeMap<DiskId, Written>>,
    ram: Option<Vec<u32>>,
}

/// How it is seen whether something was committed.
#[derive(Debug, Clone, Copy)]
enum By {
    Job(JobId),
    GivingUp(TrashId),
}

impl By {
    fn committed(self, rows: &Rows) -> bool {
        match self {
            Self::Job(job) => rows.job(job).is_some_and(|job| job.state == JobState::Completed),
            Self::GivingUp(trash) => !rows.machine.trash.contains_key(&trash),
        }
    }
}

pub(crate) struct World {
    pub(crate) disk: Sim,
    pub(crate) runtime: Sim,
    files: Files,
    /// The worker.
    keeper: Option<Keeper>,
    labelled: Labelled,
    known: Known,
    /// How often there was nothing to collect.
    idle: u32,
    /// While the guest runs.
    disks: Option<Disks>,
    guest: Arc<Mutex<Guest>>,
    truth: Arc<Mutex<Truth>>,
    stopping: Stopping,
    /// In the order in which they were taken.
    order: Vec<SnapshotId>,
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
        if machine.now.config.firmware == Firmware::Uefi {
            let boot = files.folder().folder("boot").expect("it was made");
            boot.create("firmware").and_then(|code| code.sync()).and_then(|()| boot.sync()).expect("its code");
        }
        let mut machine = machine.clone();
        // Every other machine keeps what is deleted or discarded.
        machine.policy.undo_for = (seed % 2) * 3600;
        for (row, size) in machine.layers.values_mut().zip(SIZES) {
            row.file = format!("disks/{}.{}", row.id, row.format);
            files.create_layer(row, size, None, None).expect("a base").close().expect("closed");
        }
        files.sync_names().expect("names");
        files.folder().sync().expect("folders");
        Ledger::create(files.folder(), &machine).expect("a ledger").close();
        let size =
            |leaf: &LayerId| files.open_layer(&machine.layers[leaf], store::Mode::Read).expect("a base").info().size;
        let disks = machine.now.disks.iter().map(|(id, leaf)| (id.clone(), empty(size(leaf)))).collect();
        let (snapshots, trash) = (BTreeMap::new(), BTreeMap::new());
        let ended = BTreeMap::new();
        let truth = Truth { snapshots, trash, disks, saved: None, ended, next: None, doing: "nothing" };
        let (truth, ram) = (Arc::new(Mutex::new(truth)), vec![0; PAGES]);
        let (chains, dice) = (Live::new(), Dice::new(!seed));
        let guest = Guest { chains, asked: None, truth: Arc::clone(&truth), ram, versions: 0, dice };
        let (guest, stopping) = (Arc::new(Mutex::new(guest)), Stopping::default());
        let keeper = Keeper::open(&files, carries(&runtime), steps(&guest, &stopping))
            .expect("opens")
            .merging_by(SIZES_OF_MERGES);
        Self {
            disk,
            runtime,
            files,
            keeper: Some(keeper),
            labelled: Labelled::default(),
            known: Known::default(),
            idle: 0,
            disks: None,
            guest,
            truth,
            stopping,
            order: Vec::new(),
            diary: Vec::new(),
            dice: Dice::new(seed),
            numbers: 0,
        }
    }

    /// What there is just before each of these operations of the disk, once they have come: so one life is cut anywhere.
    pub(crate) fn moments(&self, operations: impl IntoIterator<Item = u64>) -> Moments {
        let (moments, truth) = (Moments::default(), Arc::clone(&self.truth));
        let all = moments.clone();
        self.disk.copy_before(operations.into_iter().collect(), move |at, disk| {
            let truth = lock(&truth);
            lock(&all.0).push(Moment { at, disk, doing: truth.doing, models: truth.models() });
        });
        moments
    }

    /// See [`Truth::models`].
    pub(crate) fn models(&self) -> Vec<Model> {
        self.truth().models()
    }

    /// What is under way.
    pub(crate) fn doing(&self) -> &'static str {
        self.truth().doing
    }

    fn truth(&self) -> MutexGuard<'_, Truth> {
        lock(&self.truth)
    }

    /// The request under way was committed.
    fn has(&mut self) {
        let mut truth = lock(&self.truth);
        let Some(next) = truth.next.take() else { return };
        (truth.snapshots, truth.trash, truth.saved) = (next.snapshots, next.trash, next.saved);
        self.order.retain(|id| truth.snapshots.contains_key(id));
        let new: Vec<_> = truth.snapshots.keys().filter(|id| !self.order.contains(id)).copied().collect();
        self.order.extend(new);
        if let Some(disks) = next.disks {
            truth.disks = disks;
        }
        drop(truth);
        if let Some(ram) = next.ram {
            self.guest().ram = ram;
        }
    }

    fn keeper(&self) -> Keeper {
        self.keeper.clone().expect("a worker")
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        lock(&self.guest)
    }

    /// Does `count` things, until one fails.
    pub(crate) async fn live(&mut self, count: u32) -> Result<()> {
        for _ in 0..count {
            self.truth().next = None;
            self.label();
            self.step().await?;
        }
        self.label();
        self.begin("nothing");
        Ok(())
    }

    /// The files say what they are.
    fn label(&mut self) {
        self.begin("label");
        self.keeper().label(&mut self.labelled, self.disks.as_mut());
    }

    /// Two snapshots of a running guest, one on the other, and a little more; then it is off.
    pub(crate) async fn week(&mut self) -> Result<()> {
        self.start()?;
        for _ in 0..2 {
            self.guest().act(9).map_err(|e| image(&e))?;
            let taken = self.order.len();
            while self.order.len() == taken {
                self.request("snapshot").await?;
                self.label();
            }
        }
        self.guest().act(9).map_err(|e| image(&e))?;
        self.rest()
    }

    /// The guest's disks are left clean, as when its worker and QEMU end; a machine that is saved stays so.
    pub(crate) fn rest(&mut self) -> Result<()> {
        if self.disks.is_some() {
            self.stop()?;
        }
        self.label();
        Ok(())
    }

    /// Deletes a snapshot that can be taken back.
    pub(crate) fn throw_away(&mut self, name: &str) -> Result<()> {
        let task = self.task("set");
        self.keeper().settle(&task, &Value::Null, |machine| machine.policy.undo_for = 3600)?;
        self.keeper().delete(&self.task("delete"), name, false)?;
        self.label();
        Ok(())
    }

    /// The worker ends.
    pub(crate) fn leave(&mut self) {
        drop(self.keeper.take());
    }

    /// The rows as last committed.
    pub(crate) fn machine(&self) -> Machine {
        self.keeper().rows().machine.clone()
    }

    async fn step(&mut self) -> Result<()> {
        let running = self.disks.is_some();
        match self.dice.below(24) {
            0..=3 if running => {
                self.begin("guest");
                let count = 1 + self.dice.below(4);
                self.guest().act(count).map_err(|e| image(&e))
            }
            3 if self.truth().saved.is_some() => self.request("stop").await,
            0..=3 => self.start(),
            4 if running => self.stop(),
            5 if running => self.save(),
            6 => self.die(),
            7..=11 => self.request("snapshot").await,
            12..=14 if !self.order.is_empty() => self.request("apply").await,
            15..=17 if !self.order.is_empty() => self.request("delete").await,
            18 if !self.truth().trash.is_empty() => self.request("undo").await,
            19 if !self.truth().trash.is_empty() => self.give_up(),
            _ => self.collect().await,
        }
    }

    fn begin(&mut self, what: &'static str) {
        // The power may have gone while labels were written: they are done without.
        if !self.disk.powered() {
            return;
        }
        self.truth().doing = what;
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
            "undo" => self.undo(&task),
            "stop" => self.turn_off_saved(&task).await,
            _ => self.delete(&task),
        };
        if outcome.is_err() {
            self.keeper().undo(&task);
        }
        let cancelled = outcome.as_ref().is_err_and(|problem| problem.kind == ProblemKind::Cancelled);
        self.finish(&task, &outcome);
        if cancelled && self.disk.powered() { Ok(()) } else { outcome.map(drop) }
    }

    /// A request has ended, and that it has is known.
    fn finish(&self, task: &Task, outcome: &Result<Value>) {
        self.keeper().finish(task, outcome);
        // On a disk that fails it may not be noted; a refusal never is.
        let rows = self.keeper().rows();
        if let Some(job) = rows.job(task.id()).filter(|job| job.state.ended() && self.disk.powered()) {
            self.truth().ended.insert(job.id, job.state);
        }
    }

    fn start(&mut self) -> Result<()> {
        self.begin("start");
        let task = self.task("start");
        let mut next = self.keeper().rows().machine.clone();
        let memory = next.now.memory;
        let disks = self.keeper().open_disks(&next)?;
        next.start(State::Running, memory, run());
        {
            let mut truth = self.truth();
            let saved = truth.saved.clone();
            let will = truth.will(&task);
            (will.saved, will.ram) = (None, saved);
        }
        self.keeper().settle(&task, &Value::Null, |machine| *machine = next)?;
        self.has();
        self.go_live(disks);
        Ok(())
    }

    fn go_live(&mut self, disks: Disks) {
        self.guest().chains = disks.chains().map(|(id, chain)| (id.clone(), Arc::clone(chain))).collect();
        self.disks = Some(disks);
    }

    fn end(&mut self) -> Result<()> {
        self.guest().chains.clear();
        self.disks.take().map_or(Ok(()), Disks::close)
    }

    fn stop(&mut self) -> Result<()> {
        self.begin("stop");
        let task = self.task("stop");
        self.keeper().settle(&task, &Value::Null, Machine::turn_off)?;
        self.end()?;
        self.truth().disks.values_mut().for_each(Written::flush);
        Ok(())
    }

    /// Its memory goes, or can be taken back.
    async fn turn_off_saved(&mut self, task: &Task) -> Result<Value> {
        let (take, content) = (self.take(SnapshotState::Ready), self.present());
        let undoable = self.keeper().rows().machine.policy.undo_for > 0;
        self.truth().will(task).saved = None;
        if undoable {
            self.truth().next.as_mut().expect("it was said above").trash.insert(take.id, content);
            self.keeper().set_aside(task, take, &Value::Null).await?;
        } else {
            self.keeper().settle(task, &Value::Null, Machine::turn_off)?;
        }
        self.has();
        Ok(Value::Null)
    }

    fn save(&mut self) -> Result<()> {
        self.begin("save");
        let task = self.task("save");
        let row = self.keeper().memory_row();
        self.keeper().journal(&task, "save", vec![row.file.clone()])?;
        self.guest().flush().map_err(|e| image(&e))?;
        let ram = self.guest().ram.clone();
        let written = self.write_memory(row, &ram)?;
        self.truth().will(&task).saved = Some(ram);
        self.keeper().settle(&task, &Value::Null, |machine| machine.save(written))?;
        self.has();
        self.end()
    }

    /// As QEMU would send it.
    fn write_memory(&self, row: LayerRow, ram: &[u32]) -> Result<Memory> {
        let target = ram::Target::new(&self.files, &self.keeper().rows().machine, row);
        let (layer, _) = target.capture(sample::ram(ram).as_slice(), |_| {})?;
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
        let content = self.present();
        self.truth().will(task).snapshots.insert(take.id, content);
        self.keeper().snapshot_still(task, take, &Value::Null).await?;
        self.has();
        Ok(Value::Null)
    }

    async fn snapshot_live(&mut self, task: &Task) -> Result<Value> {
        let take = self.take(SnapshotState::Creating);
        let (id, memory) = (take.id, self.keeper().memory_row());
        let (leaves, made) = self.keeper().begin_snapshot(task, take, &memory, self.disks.as_ref()).await?;
        let captured = self.capture(task, id, memory, &leaves, made);
        let (keeper, disks) = (self.keeper(), self.disks.as_mut().expect("it runs"));
        keeper.end_snapshot(task, id, captured, &Value::Null, disks)?;
        self.has();
        Ok(Value::Null)
    }

    fn capture(&mut self, task: &Task, id: SnapshotId, row: LayerRow, leaves: &Leaves, made: Made) -> Result<Memory> {
        let keeper = self.keeper();
        if self.dice.one_in(3) {
            // The guest stands still.
            self.guest().flush().map_err(|e| image(&e))?;
            keeper.push(self.disks.as_mut().expect("it runs"), leaves, made);
            let ram = self.at_point(task, id);
            return self.write_memory(row, &ram);
        }
        let mut windows = keeper.push_ambiguous(self.disks.as_mut().expect("it runs"), leaves, made);
        self.act()?;
        if self.dice.one_in(2) {
            windows.iter_mut().try_for_each(|window| window.settle_before(Received::now())).map_err(|e| image(&e))?;
            self.act()?;
        }
        if self.dice.one_in(6) {
            return Err(cancelled());
        }
        let (ram, point) = (self.at_point(task, id), Received(Received::now().0 + 1));
        self.act()?;
        windows.iter_mut().try_for_each(|window| window.finish(point)).map_err(|e| image(&e))?;
        self.act()?;
        if self.dice.one_in(8) {
            return Err(cancelled());
        }
        self.write_memory(row, &ram)
    }

    /// What a machine that does not run holds now.
    fn present(&self) -> Content {
        let truth = self.truth();
        truth.content(truth.saved.clone())
    }

    /// The snapshot will hold what the machine holds now. Its RAM.
    fn at_point(&mut self, task: &Task, id: SnapshotId) -> Vec<u32> {
        let ram = self.guest().ram.clone();
        let content = self.truth().content(Some(ram.clone()));
        self.truth().will(task).snapshots.insert(id, content);
        ram
    }

    fn act(&mut self) -> Result<()> {
        let count = self.dice.below(3);
        self.guest().act(count).map_err(|e| image(&e))
    }

    /// A snapshot; rather one whose memory another stands on, which may come to be merged with it.
    fn any_to_apply(&mut self) -> SnapshotId {
        let rows = self.keeper().rows();
        let (snapshots, children) = (&rows.machine.snapshots, rows.machine.children());
        let bears = |id: &&SnapshotId| {
            snapshots[*id].memory.is_some_and(|memory| children.get(&memory).is_some_and(|above| above.len() == 1))
        };
        let bearing: Vec<SnapshotId> = self.order.iter().filter(bears).copied().collect();
        let among = if bearing.is_empty() || self.dice.one_in(2) { &self.order } else { &bearing };
        among[self.dice.below(among.len() as u64) as usize]
    }

    async fn apply(&mut self, task: &Task) -> Result<Value> {
        let to = self.any_to_apply();
        let (keep, run_on) = (self.dice.one_in(2), self.dice.one_in(2));
        let running = self.disks.is_some();
        let target = self.keeper().rows().machine.snapshots[&to].clone();
        let leaves = self.keeper().leaf_rows(&target.disks);
        let kept = keep.then(|| (self.take(SnapshotState::Ready), running.then(|| self.keeper().memory_row())));
        let memory = kept.as_ref().and_then(|(_, row)| row.clone());
        self.keeper().begin_apply(task, &leaves, memory.as_ref(), self.disks.as_ref()).await?;
        self.guest().flush().map_err(|e| image(&e))?;
        let ram = memory.as_ref().map(|_| self.guest().ram.clone()).or(self.truth().saved.clone());
        let written = memory.map(|row| self.write_memory(row, ram.as_deref().expect("it runs"))).transpose()?;
        let mut next = self.keeper().rows().machine.clone();
        let content = self.truth().snapshots[&to].clone();
        if let Some((take, _)) = kept {
            let present = self.truth().content(ram);
            self.truth().will(task).snapshots.insert(take.id, present);
            next.keep(take, written);
        } else if next.policy.undo_for > 0 {
            let present = self.present();
            let known: Vec<TrashId> = next.trash.keys().copied().collect();
            next.note_discarded(to, jiff::Timestamp::now());
            let new = next.trash.values().find(|trash| !known.contains(&trash.id)).expect("it was noted");
            self.truth().will(task).trash.insert(new.snapshots[0].id, present);
        } else {
            self.truth().will(task);
        }
        let mut truth = lock(&self.truth);
        let will = truth.next.as_mut().expect("it was said above");
        will.disks = Some(content.disks.into_iter().map(|(id, sectors)| (id, Written::new(sectors))).collect());
        will.ram = Some(content.memory.clone().unwrap_or_else(|| vec![0; PAGES]));
        will.saved = content.memory.filter(|_| !run_on);
        drop(truth);
        next.apply(to, leaves, true);
        let disks = run_on.then(|| self.keeper().open_disks(&next)).transpose()?;
        if run_on {
            let memory = next.now.memory;
            next.start(State::Running, memory, run());
        }
        self.keeper().end_apply(task, &Ok(Value::Null), next)?;
        let ended = self.end();
        self.has();
        ended?;
        if let Some(disks) = disks {
            self.go_live(disks);
        }
        Ok(Value::Null)
    }

    fn delete(&mut self, task: &Task) -> Result<Value> {
        // Rather what the guest was just restored from, or captured into.
        let under = self.keeper().rows().machine.now.parent.filter(|_| self.dice.one_in(3));
        let any = self.order[self.dice.below(self.order.len() as u64) as usize];
        let id = under.unwrap_or(any);
        let subtree = self.dice.one_in(5);
        let rows = self.keeper().rows();
        let gone = rows.machine.below(id, subtree);
        let mut truth = lock(&self.truth);
        let will = truth.will(task);
        for id in gone {
            let content = will.snapshots.remove(&id).expect("it is there");
            if rows.machine.policy.undo_for > 0 {
                will.trash.insert(id, content);
            }
        }
        drop(truth);
        self.keeper().delete(task, &id.to_string(), subtree)?;
        self.has();
        Ok(Value::Null)
    }

    fn undo(&mut self, task: &Task) -> Result<Value> {
        let (trash, back) = self.any_trash();
        let mut truth = lock(&self.truth);
        let will = truth.will(task);
        for id in back {
            let content = will.trash.remove(&id).expect("it is there");
            will.snapshots.insert(id, content);
        }
        drop(truth);
        self.keeper().take_back(task, Some(&trash.to_string()))?;
        self.has();
        Ok(Value::Null)
    }

    fn give_up(&mut self) -> Result<()> {
        self.begin("undo");
        let (trash, gone) = self.any_trash();
        self.truth().will_by(By::GivingUp(trash)).trash.retain(|id, _| !gone.contains(id));
        self.keeper().give_up(&[trash], "its time is over")?;
        self.has();
        Ok(())
    }

    /// Something that can be taken back, and its snapshots.
    fn any_trash(&mut self) -> (TrashId, Vec<SnapshotId>) {
        let rows = self.keeper().rows();
        let all = &rows.machine.trash_by_time();
        let one = all[self.dice.below(all.len() as u64) as usize];
        (one.id, one.snapshots.iter().map(|snapshot| snapshot.id).collect())
    }

    /// Removes, and folds until nothing is left to fold or a request comes.
    async fn collect(&mut self) -> Result<()> {
        self.begin("remove");
        self.keeper().remove_garbage()?;
        for folds in 0.. {
            let Some(stopped) = self.fold()? else { return if folds == 0 { self.hash() } else { Ok(()) } };
            if stopped {
                // It is stopped for a request.
                return self.request("snapshot").await;
            }
            if self.dice.one_in(2) {
                break;
            }
        }
        Ok(())
    }

    /// Whether what is to be folded next was stopped for a request; nothing if there is nothing.
    fn fold(&mut self) -> Result<Option<bool>> {
        let keeper = self.keeper();
        // Room for what moves, but not for having it twice with all that is wanted besides.
        let scarce = self.dice.one_in(3);
        self.disk.set_capacity(scarce.then(|| self.disk.used() + ROOM));
        let folding = keeper.next_fold(self.disks.as_mut(), Begin::default());
        self.disk.set_capacity(None);
        let Some(folding) = folding? else { return Ok(None) };
        self.begin("fold");
        let stop = Arc::<Cancel>::default();
        if self.dice.one_in(5) {
            // Before anything has moved, or when a piece has.
            *lock(&self.stopping) = Some((self.dice.below(2), Arc::clone(&stop)));
        }
        let folded = self.keeper().fold(folding, &stop);
        lock(&self.stopping).take();
        self.folded(&folded)?;
        // What failed while it copied has had no answer; its guest would stand still now.
        self.guest().ask().map_err(|e| image(&e))?;
        Ok(Some(stop.asked()))
    }

    /// Each third time: it takes longer than all the rest.
    fn hash(&mut self) -> Result<()> {
        self.idle += 1;
        if !self.idle.is_multiple_of(3) {
            return Ok(());
        }
        self.begin("hash");
        let written = self.disks.as_ref().map(Disks::written).unwrap_or_default();
        let manner = Manner { written, ..Manner::default() };
        self.keeper().hash(&mut self.known, &manner, &Cancel::default()).map(drop)
    }

    fn folded(&mut self, folded: &Folded) -> Result<()> {
        let keeper = self.keeper();
        let outcome = keeper.folded(folded, self.disks.as_mut());
        let cancelled = outcome.as_ref().is_err_and(|problem| problem.kind == ProblemKind::Cancelled);
        self.finish(folded.task(), &outcome);
        if cancelled { Ok(()) } else { outcome.map(drop) }
    }

    /// The worker dies as by `kill -9`, and the next one takes over. The guest lives on.
    pub(crate) fn die(&mut self) -> Result<()> {
        self.begin("recovery");
        self.disk.cut_now();
        self.runtime.cut_now();
        self.guest().chains.clear();
        drop(self.disks.take());
        drop(self.keeper.take());
        self.labelled = Labelled::default();
        self.known = Known::default();
        self.disk.revive();
        self.runtime.revive();
        let keeper = Keeper::open(&self.files, carries(&self.runtime), steps(&self.guest, &self.stopping))?;
        self.keeper = Some(keeper.merging_by(SIZES_OF_MERGES));
        self.keeper().work_off_carries()?;
        let rows = self.keeper().rows();
        if rows.machine.now.state == State::Running {
            let disks = self.keeper().open_disks(&rows.machine)?;
            self.go_live(disks);
        }
        let keeper = self.keeper();
        keeper.undo_unfinished(self.disks.as_mut())?;
        let by = self.truth().next.as_ref().map(|next| next.by);
        if by.is_some_and(|by| by.committed(&keeper.rows())) {
            self.has();
        }
        self.truth().next = None;
        self.guest().ask().map_err(|e| image(&e))
    }

    /// Whether the machine holds what it ought to.
    pub(crate) fn check(&self) -> Checked {
        let models = self.models();
        models[0].check(&self.keeper().rows(), &self.files, Some(&self.guest().chains))
    }
}

fn empty(size: u64) -> Written {
    Written::new(vec![0; (size / SECTOR) as usize])
}

/// What is to be stopped, and after how many more of its pieces.
type Stopping = Arc<Mutex<Option<(u64, Arc<Cancel>)>>>;

/// While a fold copies, the guest writes; and it may be stopped.
fn steps(guest: &Arc<Mutex<Guest>>, stopping: &Stopping) -> Steps {
    let (guest, stopping) = (Arc::clone(guest), Arc::clone(stopping));
    let folds = Mutex::new(false);
    Steps::watched(move |step| {
        if step == "merge:copying"
            && let Some((left, stop)) = &mut *lock(&stopping)
        {
            match left {
                0 => stop.ask(),
                left => *left -= 1,
            }
        }
        let mut begun = lock(&folds);
        if step == "merge:copying" && !std::mem::replace(&mut *begun, true) {
            // What fails is asked for again, see `collect`.
            let _ = lock(&guest).act(2);
        }
        if step != "merge:marked" {
            *begun = step == "merge:copying";
        }
    })
}

fn run() -> Run {
    Run { pid: 1, started: 1, since: jiff::Timestamp::UNIX_EPOCH, dir: String::new(), clock: None }
}

fn cancelled() -> Problem {
    Problem::new(ProblemKind::Cancelled, "cancelled")
}

fn image(error: &image::Error) -> Problem {
    Problem::failed(error.to_string())
}
