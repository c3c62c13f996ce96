//! A machine that runs: its QEMU, and the disks that this worker serves to it.
//!
//! ```text
//!   <runtime>/api.sock                  the worker's
//!             console.sock              the serial port, for any number of clients
//!             <run>/qmp.sock, vnc.sock  one folder a QEMU: while a snapshot is applied there are two
//!                   disk0.sock …        NBD, ours
//! ```
//!
//! Disks are served before QEMU is asked anything: a QEMU that waits for a disk does not answer (facts of NBD's `reconnect-delay`).

use crate::carry::{Carries, Kept};
use crate::files::{Files, image_problem};
use crate::garbage::Fold;
use crate::request::{Problem, Sockets};
use crate::root::Root;
use crate::tree::{Accel, Boot, Bus, Config, DiskId, LayerId, LayerRow, Machine, MachineId, NetMode, Run};
use export::Export;
use image::merge::Direction;
use image::{Access, Chain, Layer};
use qemu::{Identity, Installed, Launch, Qemu, RestoreMode, RunState};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use store::Mode;
use tokio::sync::watch;

/// How long QEMU gets to end by itself.
const GRACE: Duration = Duration::from_secs(10);

/// A QEMU and its disks.
#[derive(Debug)]
pub(crate) struct Live {
    machine: MachineId,
    pub(crate) qemu: Qemu,
    disks: Disks,
    run_dir: PathBuf,
    state: watch::Receiver<RunState>,
}

/// The disks of one QEMU, served.
#[derive(Debug)]
pub(crate) struct Disks {
    served: BTreeMap<DiskId, Served>,
}

#[derive(Debug)]
struct Served {
    chain: Arc<Chain>,
    export: Export,
    /// Base first; the same layers as the chain's.
    handles: Vec<Handle>,
}

#[derive(Debug)]
struct Handle {
    id: LayerId,
    layer: Arc<dyn Layer>,
    mode: Mode,
    /// What outlives this process of a layer that is written.
    kept: Option<Kept>,
}

impl Handle {
    fn read(id: LayerId, layer: Arc<dyn Layer>) -> Self {
        Self { id, layer, mode: Mode::Read, kept: None }
    }

    fn write(id: LayerId, Leaf { layer, kept }: Leaf) -> Self {
        Self { id, layer, mode: Mode::Write, kept }
    }
}

/// A layer that is written, whose changes outlive this process.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) layer: Arc<dyn Layer>,
    pub(crate) kept: Option<Kept>,
}

impl Leaf {
    fn open(files: &Files, carries: &Carries, row: &LayerRow) -> Result<Self, Problem> {
        match carries.keep(row)? {
            Some((carry, kept)) => Ok(Self { layer: files.open_carried(row, carry)?, kept: Some(kept) }),
            None => Ok(Self { layer: files.open_layer(row, Mode::Write)?, kept: None }),
        }
    }
}

impl Disks {
    /// Opens the leaves of Now and serves them in `run_dir`.
    pub(crate) fn serve(files: &Files, machine: &Machine, run_dir: &Path) -> Result<Self, Problem> {
        let carries = Carries::open(machine.id)?;
        let mut served = BTreeMap::new();
        for (disk, leaf) in &machine.now.disks {
            let mut kept = None;
            let layers = files.open_chain_with(machine, *leaf, |row| {
                let leaf = Leaf::open(files, &carries, row)?;
                kept = leaf.kept;
                Ok(leaf.layer)
            })?;
            let mut handles: Vec<Handle> = machine
                .chain(*leaf)
                .iter()
                .zip(&layers)
                .map(|(id, layer)| Handle::read(*id, Arc::clone(layer)))
                .collect();
            if let Some(leaf) = handles.last_mut() {
                (leaf.mode, leaf.kept) = (Mode::Write, kept);
            }
            // QEMU outlives this worker, and does not send again what was acknowledged.
            let chain = Chain::new(layers, Access::Write).map_err(|e| image_problem(&e))?.surviving();
            let chain = Arc::new(chain);
            let listener = export::listen_unix(&run_dir.join(disk_socket(disk)))
                .map_err(|e| Problem::failed(format!("serving {disk}: {e}")))?;
            let export = Export::serve(Arc::clone(&chain), listener, export::Options::default())
                .map_err(|e| Problem::failed(format!("serving {disk}: {e}")))?;
            served.insert(disk.clone(), Served { chain, export, handles });
        }
        Ok(Self { served })
    }

    /// Ends service: what is under way is finished, everything is flushed, the files are left clean.
    fn close(self) {
        for (disk, served) in self.served {
            served.export.stop();
            match served.chain.close() {
                Ok(()) => served.handles.into_iter().filter_map(|handle| handle.kept).for_each(Kept::forget),
                Err(error) => tracing::error!("{disk} was not closed cleanly: {error}"),
            }
        }
    }
}

fn disk_socket(disk: &DiskId) -> String {
    format!("{disk}.sock")
}

impl Live {
    /// Brings up a QEMU for Now as `machine` has it: standing still, its memory restored from `memory` if that is given.
    pub(crate) async fn bring_up(
        files: &Files,
        machine: &Machine,
        installed: &Installed,
        memory: Option<Vec<Arc<dyn Layer>>>,
    ) -> Result<Self, Problem> {
        let run_dir = new_run_dir(machine)?;
        let (f, m, dir) = (files.clone(), machine.clone(), run_dir.clone());
        let disks = blocking(move || Disks::serve(&f, &m, &dir)).await?;
        let launched = launch(files, machine, installed, &run_dir, memory.is_some());
        let qemu = match launched {
            Ok(launch) => Qemu::start(&launch).await.map_err(|e| qemu_problem(&machine.name, &e)),
            Err(problem) => Err(problem),
        };
        let qemu = match qemu {
            Ok(qemu) => qemu,
            Err(problem) => {
                blocking_quietly(move || disks.close()).await;
                remove_run_dir(&run_dir);
                return Err(problem);
            }
        };
        let live = Self { machine: machine.id, state: qemu.watch(), qemu, disks, run_dir };
        let Some(layers) = memory else { return Ok(live) };
        match restore(&live.qemu, layers, &machine.name).await {
            Ok(()) => Ok(live),
            Err(problem) => {
                live.end().await;
                Err(problem)
            }
        }
    }

    /// Takes over the QEMU that an earlier worker left running; `None` if it is gone.
    pub(crate) async fn adopt(files: &Files, machine: &Machine, run: &Run) -> Result<Option<Self>, Problem> {
        let run_dir = Root::runtime_folder(machine.id).join(&run.dir);
        let identity = Identity { pid: run.pid, started: run.started };
        if !qemu::alive(identity) {
            return Ok(None);
        }
        let (f, m, dir) = (files.clone(), machine.clone(), run_dir.clone());
        let disks = blocking(move || Disks::serve(&f, &m, &dir)).await?;
        match Qemu::adopt(identity, &run_dir, &qemu_log(files)).await {
            Ok(qemu) => Ok(Some(Self { machine: machine.id, state: qemu.watch(), qemu, disks, run_dir })),
            Err(qemu::Error::Gone { .. }) => {
                blocking_quietly(move || disks.close()).await;
                Ok(None)
            }
            Err(e) => Err(qemu_problem(&machine.name, &e)),
        }
    }

    /// How the next worker finds it.
    pub(crate) fn run(&self) -> Run {
        let Identity { pid, started } = self.qemu.identity();
        let dir = self.run_dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Run { pid, started, since: jiff::Timestamp::now(), dir }
    }

    /// Where its console and its screen are.
    pub(crate) fn sockets(&self, machine: &Machine) -> Sockets {
        let runtime = Root::runtime_folder(machine.id);
        Sockets {
            console: runtime.join(crate::console::SOCKET).to_string_lossy().into_owned(),
            vnc: self.run_dir.join(qemu::VNC_SOCKET).to_string_lossy().into_owned(),
        }
    }

    /// What the guest comes to; never, if there is none.
    pub(crate) async fn next(live: &mut Option<Self>) -> RunState {
        let Some(live) = live else { return std::future::pending().await };
        if live.state.changed().await.is_err() {
            // QEMU's follower has ended: with the process.
            return RunState::Exited(live.qemu.wait().await);
        }
        *live.state.borrow_and_update()
    }

    /// The folder of its sockets.
    pub(crate) fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// The disks' chains.
    pub(crate) fn chains(&self) -> impl Iterator<Item = (&DiskId, &Arc<Chain>)> {
        self.disks.served.iter().map(|(id, served)| (id, &served.chain))
    }

    /// The chain of a disk.
    pub(crate) fn chain(&self, disk: &DiskId) -> Option<&Arc<Chain>> {
        self.disks.served.get(disk).map(|served| &served.chain)
    }

    /// The chain that has this layer in it.
    pub(crate) fn chain_of(&self, machine: &Machine, layer: LayerId) -> Option<Arc<Chain>> {
        let (disk, _) = machine.now.disks.iter().find(|(_, leaf)| machine.chain(**leaf).contains(&layer))?;
        self.disks.served.get(disk).map(|served| Arc::clone(&served.chain))
    }

    /// The leaf of a disk, as it is served: what a new leaf stands on.
    pub(crate) fn leaf(&self, disk: &DiskId) -> Option<Arc<dyn Layer>> {
        self.disks.served.get(disk)?.handles.last().map(|handle| Arc::clone(&handle.layer))
    }

    /// A disk's chain has a new leaf.
    pub(crate) fn pushed(&mut self, disk: &DiskId, id: LayerId, leaf: Leaf) {
        if let Some(served) = self.disks.served.get_mut(disk) {
            served.handles.push(Handle::write(id, leaf));
        }
    }

    /// Seals the layers below the leaves that are still open for writing: flushed, their files left clean, then only read.
    pub(crate) fn seal(&mut self, files: &Files, machine: &Machine) -> Result<(), Problem> {
        for served in self.disks.served.values_mut() {
            let below = served.handles.len().saturating_sub(1);
            for handle in served.handles[..below].iter_mut().filter(|handle| handle.mode == Mode::Write) {
                let Some(row) = machine.layers.get(&handle.id) else { continue };
                handle.layer.close().map_err(|e| image_problem(&e))?;
                let layer = files.open_layer(row, Mode::Read)?;
                served.chain.replace(&handle.layer, Arc::clone(&layer)).map_err(|e| image_problem(&e))?;
                let sealed = std::mem::replace(handle, Handle::read(handle.id, layer));
                sealed.kept.into_iter().for_each(Kept::forget);
            }
        }
        Ok(())
    }

    /// A layer of a served chain, open for writing: reopened and put in its place if it is not.
    pub(crate) fn writable(&mut self, files: &Files, row: &LayerRow) -> Result<Arc<dyn Layer>, Problem> {
        let find = |served: &mut Served| served.handles.iter().position(|handle| handle.id == row.id);
        let served = self.disks.served.values_mut().find_map(|served| find(served).map(|at| (served, at)));
        let Some((served, at)) = served else {
            return Err(Problem::failed(format!("{} is not being served", row.file)));
        };
        if served.handles[at].mode == Mode::Read {
            let leaf = Leaf::open(files, &Carries::open(self.machine)?, row)?;
            served.chain.replace(&served.handles[at].layer, Arc::clone(&leaf.layer)).map_err(|e| image_problem(&e))?;
            served.handles[at] = Handle::write(row.id, leaf);
        }
        Ok(Arc::clone(&served.handles[at].layer))
    }

    /// A layer as it is served.
    pub(crate) fn layer(&self, row: &LayerRow) -> Result<Arc<dyn Layer>, Problem> {
        let mut handles = self.disks.served.values().flat_map(|served| &served.handles);
        let handle = handles.find(|handle| handle.id == row.id);
        let handle = handle.ok_or_else(|| Problem::failed(format!("{} is not being served", row.file)))?;
        Ok(Arc::clone(&handle.layer))
    }

    /// Two layers are one now: down, in `into`'s file, which has taken the child's id; up, in the child's.
    pub(crate) fn folded(&mut self, Fold { into, child }: Fold, direction: Direction) {
        let (stays, goes) = if direction == Direction::Down { (into, child) } else { (child, into) };
        for handles in self.disks.served.values_mut().map(|served| &mut served.handles) {
            // A file that goes takes with it what was kept of it.
            let gone = handles.extract_if(.., |handle| handle.id == goes);
            gone.filter_map(|handle| handle.kept).for_each(Kept::forget);
            handles.iter_mut().filter(|handle| handle.id == stays).for_each(|handle| handle.id = child);
        }
    }

    /// Makes durable what the guest's disks have acknowledged.
    pub(crate) async fn flush(&self) -> Result<(), Problem> {
        let chains: Vec<_> = self.chains().map(|(_, chain)| Arc::clone(chain)).collect();
        blocking(move || chains.iter().try_for_each(|chain| chain.flush()).map_err(|e| image_problem(&e))).await
    }

    /// Ends QEMU, then the service of its disks.
    pub(crate) async fn end(self) {
        let Self { qemu, disks, run_dir, .. } = self;
        if let Err(error) = qemu.quit(GRACE).await {
            tracing::error!("QEMU could not be ended: {error}");
        }
        blocking_quietly(move || disks.close()).await;
        remove_run_dir(&run_dir);
    }

    /// Leaves QEMU running for the next worker; it holds its requests until that serves the disks again.
    pub(crate) fn leave(self) {
        self.disks.close();
    }
}

async fn restore(qemu: &Qemu, layers: Vec<Arc<dyn Layer>>, name: &str) -> Result<(), Problem> {
    let mut restore = qemu.restore(RestoreMode::Eager).await.map_err(|e| qemu_problem(name, &e))?;
    let writer = restore.writer();
    let written = tokio::task::spawn_blocking(move || crate::ram::restore(layers, writer));
    let loaded = restore.loaded().await.map_err(|e| qemu_problem(name, &e));
    let written = written.await.map_err(|e| Problem::failed(format!("restoring memory broke off: {e}")))?;
    // What our side says of a damaged layer is worth more than QEMU's "stream ended".
    match (written, loaded) {
        (Err(problem), _) if problem.kind == crate::request::ProblemKind::Damaged => Err(problem),
        (_, Err(problem)) | (Err(problem), Ok(())) => Err(problem),
        (Ok(()), Ok(())) => Ok(()),
    }
}

/// Chooses what a machine keeps for life, where that is still open: the machine type and the CPU model.
pub(crate) fn pin(config: &mut Config, installed: &Installed) -> Result<(), Problem> {
    let failed = |e: &qemu::Error| Problem::failed(e.to_string());
    if config.machine_type.is_none() {
        config.machine_type = Some(installed.newest_machine_type().map_err(|e| failed(&e))?.to_owned());
    }
    if config.cpu_model.is_none() {
        config.cpu_model = Some(qemu::cpu_model(accel(config)?).to_owned());
    }
    Ok(())
}

fn accel(config: &Config) -> Result<qemu::Accel, Problem> {
    match config.accel {
        Accel::Tcg => Ok(qemu::Accel::Tcg),
        Accel::Auto => Ok(qemu::best_accel()),
        Accel::Kvm => match qemu::kvm() {
            Ok(()) => Ok(qemu::Accel::Kvm),
            Err(why) => Err(Problem::refused(format!("KVM cannot be used: {why}")).hint("tenby doctor")),
        },
    }
}

fn launch(
    files: &Files,
    machine: &Machine,
    installed: &Installed,
    run_dir: &Path,
    incoming: bool,
) -> Result<Launch, Problem> {
    let config = &machine.now.config;
    let machine_type = config.machine_type.clone().ok_or_else(|| Problem::failed("no machine type was chosen"))?;
    installed.check_machine_type(&machine_type).map_err(|e| {
        Problem::refused(e.to_string()).hint("TENBY_QEMU=/path/to/another/qemu-system-x86_64 tenby vm start …")
    })?;
    let boot_file = |name: &String| files.path().join("boot").join(name);
    Ok(Launch {
        binary: installed.binary.clone(),
        machine_type,
        accel: accel(config)?,
        cpu_model: config.cpu_model.clone().unwrap_or_else(|| qemu::cpu_model(qemu::Accel::Tcg).to_owned()),
        memory: config.memory,
        cpus: config.cpus,
        name: machine.name.clone(),
        uuid: machine.id.0.to_string(),
        generation: Some(machine.now.generation.to_string()),
        run_dir: run_dir.to_owned(),
        log: qemu_log(files),
        console_log: console_log(files),
        disks: config.disks.iter().map(disk).collect(),
        cdrom: config.cdrom.as_ref().map(PathBuf::from),
        boot: match config.boot {
            Boot::Disk => qemu::Boot::Disk,
            Boot::Cdrom => qemu::Boot::Cdrom,
            Boot::Net => qemu::Boot::Net,
        },
        kernel: config.kernel.as_ref().map(|kernel| qemu::Kernel {
            image: boot_file(&kernel.kernel),
            initrd: kernel.initrd.as_ref().map(boot_file),
            append: kernel.append.clone(),
        }),
        nic: (config.net.mode == NetMode::User).then(|| qemu::Nic { mac: config.net.mac.clone() }),
        incoming,
        sandbox: true,
    })
}

fn disk(disk: &crate::tree::Disk) -> qemu::Disk {
    qemu::Disk {
        id: disk.id.0.clone(),
        bus: match disk.bus {
            Bus::Virtio => qemu::Bus::Virtio,
            Bus::Sata | Bus::Ide => qemu::Bus::Ahci,
            Bus::Scsi => qemu::Bus::Scsi,
        },
        socket: PathBuf::from(disk_socket(&disk.id)),
        export: String::new(),
        reconnect_delay: qemu::RECONNECT_DELAY,
    }
}

/// Ports of the host that lead into the guest, as QEMU takes them.
pub(crate) fn ports(config: &Config) -> Result<Vec<qemu::Publish>, Problem> {
    let port = |publish: &crate::tree::Publish| {
        let address = publish.address.parse();
        let address = address.map_err(|_| Problem::usage(format!("{} is no IPv4 address", publish.address)))?;
        Ok(qemu::Publish { address, host: publish.host, guest: publish.guest })
    };
    if config.net.mode == NetMode::None {
        return Ok(Vec::new());
    }
    config.net.publish.iter().map(port).collect()
}

fn qemu_log(files: &Files) -> PathBuf {
    files.path().join("log/qemu.log")
}

/// What the serial port prints.
pub(crate) fn console_log(files: &Files) -> PathBuf {
    files.path().join("log/serial.log")
}

fn new_run_dir(machine: &Machine) -> Result<PathBuf, Problem> {
    let name = format!("run-{}", &LayerId::new().to_string()[..8]);
    let dir = Root::runtime_folder(machine.id).join(name);
    store::host::HostFolder::create(&dir).map_err(|e| crate::files::file_problem(&e))?;
    Ok(dir)
}

/// Removes a folder of sockets.
pub(crate) fn remove_run_dir(dir: &Path) {
    if let (Some(parent), Some(name)) = (dir.parent(), dir.file_name())
        && let Ok(folder) = store::host::HostFolder::open(parent)
    {
        let folder: Arc<dyn store::Folder> = Arc::new(folder);
        crate::root::remove_tree(&folder, &name.to_string_lossy());
    }
}

/// Ends processes that an earlier worker had begun to bring up and did not live to record.
pub(crate) fn end_strays(machine: &Machine) {
    let runtime = Root::runtime_folder(machine.id);
    let Ok(folder) = store::host::HostFolder::open(&runtime) else { return };
    let ours = machine.now.run.as_ref().map(|run| run.dir.as_str());
    for name in store::Folder::list(&folder).unwrap_or_default() {
        if name.starts_with("run-") && Some(name.as_str()) != ours {
            let dir = runtime.join(&name);
            match qemu::Process::find(&dir).and_then(|found| found.map(|process| process.kill()).transpose()) {
                Ok(found) if found.is_some() => {
                    tracing::warn!("ended a QEMU that was never recorded, in {}", dir.display());
                }
                Ok(_) => {}
                Err(error) => tracing::warn!("a stray QEMU in {}: {error}", dir.display()),
            }
            remove_run_dir(&dir);
        }
    }
}

/// Runs what blocks on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|e| Err(Problem::failed(format!("broke off: {e}"))))
}

async fn blocking_quietly(work: impl FnOnce() + Send + 'static) {
    let _ = blocking(move || {
        work();
        Ok(())
    })
    .await;
}

/// What QEMU says, as a problem.
pub(crate) fn qemu_problem(name: &str, error: &qemu::Error) -> Problem {
    let problem = Problem::failed(format!("{name}: {error}"));
    match error {
        qemu::Error::NoQemu(_) => problem.hint("tenby doctor"),
        _ => problem,
    }
}
