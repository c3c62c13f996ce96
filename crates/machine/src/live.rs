//! A machine that runs: its QEMU, and the disks that this worker serves to it.
//!
//! ```text
//!   <runtime>/api.sock                  the worker's
//!             console.sock              the serial port, for any number of clients
//!             <run>/qemu/qmp.sock, …    one folder a QEMU: while a snapshot is applied there are two. Below it, what QEMU makes
//!                   disk0.sock …        NBD, ours
//! ```
//!
//! Disks are served before QEMU is asked anything: a QEMU that waits for a disk does not answer (facts of NBD's `reconnect-delay`).

use crate::clock::Telling;
use crate::crowd::Crowd;
use crate::disks::Disks;
use crate::files::{Files, image_problem};
use crate::firmware;
use crate::keeper::Keeper;
use crate::lent::{self, Lent};
use crate::needs;
use crate::ram::{Pieces, of_memory};
use crate::records::downwards;
use crate::request::{Problem, ProblemKind, Sockets};
use crate::root::Root;
use crate::steps::Steps;
use crate::tree::{Accel, Boot, Bus, Config, DiskId, Firmware, Kernel, LayerId, Machine, NetMode, Now, Run, TakenOn};
use export::Export;
use image::hashes::Expected;
use image::{Access, Chain, Layer};
use memory::{Beginning, Sealed, Stretch, Touched};
use qemu::{Collapse, Identity, Installed, Launch, Qemu, RestoreMode, Rights, RunState, User};
use rustix::fs::Mode;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How long QEMU gets to end by itself.
const GRACE: Duration = Duration::from_secs(10);

/// Below this, to listen on a port takes a privilege.
const FIRST_FREE_PORT: u16 = 1024;

/// How long a snapshot waits for huge pages; without them it pauses the guest longer.
const COLLAPSE: Duration = Duration::from_secs(5);

/// A QEMU and its disks.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) qemu: Qemu,
    served: Served,
    /// Memory that is still on its way into it.
    lent: Option<Lent>,
    /// Its RAM is being put into huge pages again.
    collapsing: Option<Collapse>,
    /// Its guest is being told the time.
    telling: Option<Telling>,
    /// Its ports are open.
    published: AtomicBool,
    run_dir: PathBuf,
    state: watch::Receiver<RunState>,
}

/// A memory layer with what it stands on, base first.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) layer: LayerId,
    pub(crate) layers: Vec<Arc<dyn Layer>>,
    /// What was recorded of them; read while QEMU starts.
    pub(crate) expected: JoinHandle<Expected>,
    /// What its guest asked for first when it was lent before.
    pub(crate) touched: Vec<Touched>,
    /// On what its guest ran.
    pub(crate) taken_on: Option<TakenOn>,
    /// What a person can type to do without it.
    pub(crate) without: String,
}

impl Memory {
    /// Whether its guest can run before all of it has arrived.
    fn is_lendable(&self) -> bool {
        qemu::userfaultfd().is_ok() && crate::ram::can_lend(&self.layers)
    }

    /// RAM of the host that loading it takes at once, for a guest with so much, bytes.
    pub(crate) fn takes(&self, ram: u64) -> u64 {
        if self.is_lendable() { 0 } else { ram }
    }
}

/// What happens to a machine that runs.
#[derive(Debug)]
pub(crate) enum Happening {
    /// Its guest has come to something.
    Guest(RunState),
    /// So has the memory that is on its way.
    Memory(lent::Happening),
}

/// The disks of one QEMU, served.
#[derive(Debug)]
struct Served {
    disks: Disks,
    exports: Vec<Export>,
}

impl Served {
    /// Opens the disks of Now and serves them in `run_dir`.
    fn begin(keeper: &Keeper, machine: &Machine, run_dir: &Path) -> Result<Self, Problem> {
        let mut served = Self { disks: keeper.open_disks(machine)?, exports: Vec::new() };
        for (disk, chain) in served.disks.chains() {
            let failed = |e: &dyn std::fmt::Display| Problem::failed(format!("serving {disk}: {e}"));
            let socket = disk_socket(disk);
            let listener = export::listen_unix(&run_dir.join(&socket)).map_err(|e| failed(&e))?;
            qemu::hand_over(run_dir, &socket).map_err(|e| failed(&e))?;
            let export = Export::serve(Arc::clone(chain), listener, export::Options::default());
            served.exports.push(export.map_err(|e| failed(&e))?);
        }
        Ok(served)
    }

    /// Ends service: what is under way is finished, everything is flushed, the files are left clean.
    fn end(self) -> Result<(), Problem> {
        self.exports.iter().for_each(Export::stop);
        self.disks.close()
    }
}

fn disk_socket(disk: &DiskId) -> String {
    format!("{disk}.sock")
}

impl Live {
    /// Brings up a QEMU for Now as `machine` has it: standing still, its memory restored from `memory` if that is given.
    pub(crate) async fn bring_up(
        keeper: &Keeper,
        machine: &Machine,
        installed: &Installed,
        memory: Option<Memory>,
    ) -> Result<Self, Problem> {
        let rights = rights(machine, installed).await;
        let run_dir = new_run_dir(machine, rights)?;
        let (k, m, dir) = (keeper.clone(), machine.clone(), run_dir.clone());
        let served = blocking(move || Served::begin(&k, &m, &dir)).await?;
        let launched = launch(&keeper.files, machine, installed, rights, &run_dir, memory.as_ref());
        let qemu = match launched {
            Ok(launch) => Qemu::start(&launch).await.map_err(|e| qemu_problem(&machine.name, &e)),
            Err(problem) => Err(problem),
        };
        let qemu = match qemu {
            Ok(qemu) => qemu,
            Err(problem) => {
                // Nobody has written to them.
                let _ = blocking(move || served.end()).await;
                remove_run_dir(&run_dir);
                return Err(problem);
            }
        };
        let mut live = Self::of(qemu, served, None, run_dir);
        let Some(memory) = memory else { return Ok(live) };
        let (layer, writer, without) = (memory.layer, memory.taken_on.clone(), memory.without.clone());
        match restore(&live.qemu, memory, &machine.name, &live.run_dir, &keeper.steps).await {
            Ok(lent) => {
                live.lent = lent;
                Ok(live)
            }
            Err(problem) => {
                live.end().await?;
                let mut problem = of_memory(problem, machine, layer);
                if problem.kind != ProblemKind::Damaged {
                    problem.message += &of_another_qemu(writer.as_ref(), installed);
                }
                problem.hint.get_or_insert(without);
                Err(problem)
            }
        }
    }

    fn of(qemu: Qemu, served: Served, lent: Option<Lent>, run_dir: PathBuf) -> Self {
        Self {
            state: qemu.watch(),
            qemu,
            served,
            lent,
            collapsing: None,
            telling: None,
            published: AtomicBool::new(false),
            run_dir,
        }
    }

    /// Takes over the QEMU that an earlier worker left running; `None` if it is gone.
    pub(crate) async fn adopt(keeper: &Keeper, machine: &Machine, run: &Run) -> Result<Option<Self>, Problem> {
        let run_dir = Root::runtime_folder(machine.id).join(&run.dir);
        let identity = Identity { pid: run.pid, started: run.started };
        if !qemu::alive(identity) {
            remove_run_dir(&run_dir);
            return Ok(None);
        }
        let (k, m, dir) = (keeper.clone(), machine.clone(), run_dir.clone());
        let served = blocking(move || Served::begin(&k, &m, &dir)).await?;
        // Before QEMU is asked for anything: it may wait for a page, and not answer.
        let lent = take_over(keeper, machine, identity, &run_dir)?;
        match Qemu::adopt(identity, &run_dir, &qemu_log(&keeper.files)).await {
            Ok(qemu) => {
                let mut live = Self::of(qemu, served, lent, run_dir);
                live.take_up_again(keeper, machine).await?;
                Ok(Some(live))
            }
            Err(qemu::Error::Gone { .. }) => {
                blocking(move || served.end()).await?;
                remove_run_dir(&run_dir);
                Ok(None)
            }
            Err(e) => Err(qemu_problem(&machine.name, &e)),
        }
    }

    /// Opens the ports of the host that lead into the guest, if that was not done. An earlier worker may have.
    pub(crate) async fn publish(&self, config: &Config) -> Result<(), Problem> {
        if self.published.load(Ordering::Relaxed) {
            return Ok(());
        }
        let ports = ports(config)?;
        let failed = |e: &qemu::Error| Problem::failed(e.to_string());
        self.qemu.unpublish(&ports).await.map_err(|e| failed(&e))?;
        self.qemu.publish(&ports).await.map_err(|e| failed(&e))?;
        self.published.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Closes them again, for another QEMU to open them.
    pub(crate) async fn retract(&self, config: &Config) {
        let closed = match ports(config) {
            Ok(ports) => self.qemu.unpublish(&ports).await.map_err(|e| e.to_string()),
            Err(problem) => Err(problem.to_string()),
        };
        if let Err(error) = closed {
            tracing::warn!("a port stays open for a while: {error}");
        }
    }

    /// How the next worker finds it.
    pub(crate) fn run(&self) -> Run {
        let Identity { pid, started } = self.qemu.identity();
        let dir = self.run_dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Run { pid, started, since: jiff::Timestamp::now(), dir, clock: None }
    }

    /// Where its console and its screen are.
    pub(crate) fn sockets(&self, machine: &Machine) -> Sockets {
        let runtime = Root::runtime_folder(machine.id);
        Sockets {
            console: runtime.join(crate::console::SOCKET).to_string_lossy().into_owned(),
            vnc: self.run_dir.join(qemu::VNC_SOCKET).to_string_lossy().into_owned(),
        }
    }

    /// What happens next; never, if there is none.
    pub(crate) async fn next(live: &mut Option<Self>) -> Happening {
        let Some(live) = live else { return std::future::pending().await };
        tokio::select! {
            biased;
            changed = live.state.changed() => match changed {
                Ok(()) => Happening::Guest(*live.state.borrow_and_update()),
                // QEMU's follower has ended: with the process.
                Err(_) => Happening::Guest(RunState::Exited(live.qemu.wait().await)),
            },
            happening = Lent::next(&mut live.lent) => Happening::Memory(happening),
        }
    }

    /// The memory that is still on its way into it.
    pub(crate) fn lent(&self) -> Option<&Lent> {
        self.lent.as_ref()
    }

    /// Nothing more comes from there.
    pub(crate) fn forget_lent(&mut self) {
        self.lent = None;
    }

    /// See [`Lent::next`].
    pub(crate) async fn next_of_memory(&mut self) -> lent::Happening {
        Lent::next(&mut self.lent).await
    }

    /// All of its memory has been sent: waits until it has arrived.
    pub(crate) async fn filled(&mut self) -> Result<(), qemu::Error> {
        self.lent = None;
        let finished = self.qemu.restoring().finished().await;
        self.qemu.let_lender_go().await;
        finished
    }

    /// Puts these pieces of its RAM into huge pages again, in the background: what a capture or a restore leaves makes the next pause longer.
    ///
    /// What is mostly zeros takes as much room then as what is not, and the pause needs it as well: only where the host has room to spare. (From
    /// Linux 6.12 on it takes such pages apart again when it runs short.)
    pub(crate) async fn collapse(&mut self, Pieces { used, mut idle }: Pieces) {
        if qemu::collapses().is_err() {
            return;
        }
        if !qemu::has_ram_to_spare(idle.len() as u64 * qemu::HUGE_PAGE) {
            idle.clear();
        }
        let pieces: Vec<_> = used.into_iter().chain(idle).map(|Stretch { block, offset }| (block, offset)).collect();
        let mut crowd = Crowd::default();
        match self.qemu.collapse(&pieces, move || crowd.rest()).await {
            Ok(collapse) => self.collapsing = Some(collapse),
            Err(error) => tracing::warn!("no huge pages for the guest's RAM: {error}"),
        }
    }

    /// Tells its guest the time, if that goes on from a memory and may have an agent.
    pub(crate) fn tell_the_time(&mut self, keeper: &Keeper) {
        let rows = keeper.rows();
        let Now { config, run, .. } = &rows.machine.now;
        let behind = run.as_ref().filter(|run| config.agent && run.clock.is_some());
        self.telling = behind.map(|run| Telling::begin(&keeper.book, &keeper.files, run, &self.run_dir));
    }

    /// No more of that: its RAM is about to be given up.
    pub(crate) fn stop_collapsing(&mut self) {
        self.collapsing = None;
    }

    /// Waits until that is done, but not for long.
    pub(crate) async fn collapsed(&mut self, name: &str) {
        let Some(mut collapse) = self.collapsing.take() else { return };
        if tokio::time::timeout(COLLAPSE, collapse.ended()).await.is_err() {
            tracing::info!("{name}: its RAM is not in huge pages yet; the pause may be longer");
        }
    }

    /// Goes on lending where that was broken off, if the guest still needs it.
    pub(crate) async fn take_up_again(&mut self, keeper: &Keeper, machine: &Machine) -> Result<(), Problem> {
        let Some(layer) = machine.now.restoring.filter(|_| self.lent.is_none()) else { return Ok(()) };
        let restore = self.qemu.restore_again().await.map_err(|e| qemu_problem(&machine.name, &e))?;
        let Some(mut restore) = restore else { return Ok(()) };
        self.lent = Some(Lent::begin(
            layer,
            sealed(keeper, machine, layer)?,
            restore.writer(),
            Beginning::Recovered,
            &self.run_dir,
            Arc::clone(&keeper.steps),
        )?);
        Ok(())
    }

    /// On what its guest runs; nothing, if QEMU does not say.
    pub(crate) async fn taken_on(&self, now: &Now) -> Option<TakenOn> {
        let kvm = self.qemu.qmp().runs_by_kvm().await;
        let kvm = kvm.inspect_err(|error| tracing::warn!("on what the guest runs is not known: {error}")).ok()?;
        Some(needs::taken_on(now, &self.qemu.qmp().version(), kvm))
    }

    /// The folder of its sockets.
    pub(crate) fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Its disks.
    pub(crate) fn disks(&mut self) -> &mut Disks {
        &mut self.served.disks
    }

    /// Makes durable what the guest's disks have acknowledged.
    pub(crate) async fn flush(&self) -> Result<(), Problem> {
        let chains: Vec<_> = self.served.disks.chains().map(|(_, chain)| Arc::clone(chain)).collect();
        blocking(move || chains.iter().try_for_each(|chain| chain.flush()).map_err(|e| image_problem(&e))).await
    }

    /// Ends QEMU, then the service of its disks. Fails if a disk did not take its last writes.
    pub(crate) async fn end(self) -> Result<(), Problem> {
        let Self { qemu, served, run_dir, collapsing, .. } = self;
        drop(collapsing);
        if let Err(error) = qemu.quit(GRACE).await {
            tracing::error!("QEMU could not be ended: {error}");
        }
        let ended = blocking(move || served.end()).await;
        remove_run_dir(&run_dir);
        ended
    }

    /// Leaves QEMU running for the next worker; it holds its requests until that serves the disks again.
    pub(crate) fn leave(self) {
        if let Err(problem) = self.served.end() {
            tracing::error!("{problem}; what was acknowledged is worked off by the next worker");
        }
    }
}

/// Brings memory into a new QEMU: all of it, or so that the guest can run while the rest is on its way.
async fn restore(
    qemu: &Qemu,
    memory: Memory,
    name: &str,
    run_dir: &Path,
    steps: &Arc<Steps>,
) -> Result<Option<Lent>, Problem> {
    let lendable = memory.is_lendable();
    let Memory { layer, layers, expected, touched, .. } = memory;
    // Whatever becomes of that, it can be done without.
    let expected = expected.await.unwrap_or_default();
    if !lendable {
        return restore_whole(qemu, layers, expected, name).await.map(|()| None);
    }
    let mut restore = qemu.restore(RestoreMode::Lazy).await.map_err(|e| qemu_problem(name, &e))?;
    let chain = Chain::new(layers, Access::Read).map_err(|e| image_problem(&e))?;
    let (memory, beginning) = (Sealed { chain, expected }, Beginning::Anew(touched));
    let mut lent = Lent::begin(layer, memory, restore.writer(), beginning, run_dir, Arc::clone(steps))?;
    // A QEMU that does not get a page while it loads waits for it, and says nothing.
    let loaded = tokio::select! {
        biased;
        damaged = lent.damaged() => Err(damaged),
        loaded = restore.loaded() => loaded.map_err(|e| qemu_problem(name, &e)),
    };
    loaded.map(|()| Some(lent))
}

/// If another version has written a memory that cannot be loaded, that may be why.
fn of_another_qemu(writer: Option<&TakenOn>, installed: &Installed) -> String {
    let here = &installed.version;
    match writer.filter(|writer| writer.qemu != *here) {
        Some(TakenOn { qemu, .. }) => format!("; its memory was written by QEMU {qemu}, and this is {here}"),
        None => String::new(),
    }
}

/// Goes on lending memory to a QEMU whose worker has died, over the socket that it kept.
fn take_over(keeper: &Keeper, machine: &Machine, qemu: Identity, run_dir: &Path) -> Result<Option<Lent>, Problem> {
    let Some(layer) = machine.now.restoring else { return Ok(None) };
    match qemu::lent(qemu, run_dir) {
        Ok(Some(socket)) => {
            let memory = sealed(keeper, machine, layer)?;
            Lent::begin(layer, memory, socket, Beginning::TakenOver, run_dir, Arc::clone(&keeper.steps)).map(Some)
        }
        Ok(None) => Ok(None),
        Err(error) => {
            tracing::warn!("the memory of {} cannot be lent as before, but anew: {error}", machine.name);
            Ok(None)
        }
    }
}

/// A memory, and what was recorded of it.
fn sealed(keeper: &Keeper, machine: &Machine, layer: LayerId) -> Result<Sealed, Problem> {
    let layers = keeper.files.open_chain(machine, layer)?;
    let chain = Chain::new(layers, Access::Read).map_err(|e| image_problem(&e))?;
    Ok(Sealed { chain, expected: keeper.files.expected(&downwards(machine, layer)) })
}

async fn restore_whole(
    qemu: &Qemu,
    layers: Vec<Arc<dyn Layer>>,
    expected: Expected,
    name: &str,
) -> Result<(), Problem> {
    let mut restore = qemu.restore(RestoreMode::Eager).await.map_err(|e| qemu_problem(name, &e))?;
    let writer = restore.writer();
    let written = tokio::task::spawn_blocking(move || crate::ram::restore(layers, expected, writer));
    let loaded = restore.loaded().await.map_err(|e| qemu_problem(name, &e));
    let written = written.await.map_err(|e| Problem::failed(format!("restoring memory broke off: {e}")))?;
    // What our side says of a damaged layer is worth more than QEMU's "stream ended".
    match (written, loaded) {
        (Err(problem), _) if problem.kind == ProblemKind::Damaged => Err(problem),
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
        config.cpu_model = Some(qemu::cpu_model(accel(config, None)?).to_owned());
    }
    Ok(())
}

/// What the machine's QEMU may do: as little as this host makes possible. What is missing costs protection, but no machine its run.
async fn rights(machine: &Machine, installed: &Installed) -> Rights {
    if !qemu::privileged() {
        return Rights::NoMore;
    }
    match qemu::separates(&installed.binary).await {
        Ok(tracking) => Rights::User(User::of(machine.id.0.as_u128()), tracking),
        Err(why) => {
            tracing::warn!("the QEMU of {} runs as root (`tenby doctor` says what that costs): {why}", machine.name);
            Rights::NoMore
        }
    }
}

/// How its processor is to run: as it did when the memory was taken that it goes on from.
fn accel(config: &Config, memory: Option<&Memory>) -> Result<qemu::Accel, Problem> {
    let before = memory.and_then(|memory| needs::accel(config, memory.taken_on.as_ref()));
    match before.unwrap_or(config.accel) {
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
    rights: Rights,
    run_dir: &Path,
    memory: Option<&Memory>,
) -> Result<Launch, Problem> {
    let config = &machine.now.config;
    let accel = accel(config, memory)?;
    let borrowed = config.borrowed.as_ref();
    let mac = borrowed.map_or(&config.net.mac, |borrowed| &borrowed.mac);
    let machine_type = config.machine_type.clone().ok_or_else(|| Problem::failed("no machine type was chosen"))?;
    installed.check_machine_type(&machine_type).map_err(|e| {
        let start = format!("tenby vm start {}", crate::plan::quoted(&machine.name));
        Problem::refused(format!("{}: {e}", machine.name))
            .hint(format!("{}=/path/to/another/qemu-system-x86_64 {start}", qemu::BINARY_VARIABLE))
    })?;
    let boot_file = |name: &String| files.path().join("boot").join(name);
    if matches!(rights, Rights::User(..)) {
        // QEMU opens them again by what it was given, as a user that is not theirs. Nobody else gets as far as into this folder.
        for name in config.kernel.iter().flat_map(Kernel::files) {
            let readable = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
            let path = boot_file(name);
            let failed = |e| Problem::failed(format!("{}: {}", path.display(), std::io::Error::from(e)));
            rustix::fs::chmod(&path, readable).map_err(failed)?;
        }
    }
    Ok(Launch {
        binary: installed.binary.clone(),
        machine_type,
        accel,
        cpu_model: needs::cpu_model(config, accel).to_owned(),
        hpet: config.hpet,
        agent: config.agent,
        memory: config.memory,
        cpus: config.cpus,
        name: machine.name.clone(),
        uuid: borrowed.map_or(machine.id, |borrowed| borrowed.machine).0.to_string(),
        generation: Some(machine.now.generation.to_string()),
        run_dir: run_dir.to_owned(),
        log: qemu_log(files),
        console_log: console_log(files),
        disks: config.disks.iter().map(disk).collect(),
        cdrom: config.cdrom.as_ref().map(PathBuf::from),
        uefi: (config.firmware == Firmware::Uefi)
            .then(|| qemu::Uefi { code: files.path().join(firmware::CODE), variables: nbd(&DiskId::firmware()) }),
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
        nic: (config.net.mode == NetMode::User).then(|| qemu::Nic { mac: mac.clone(), isolated: borrowed.is_some() }),
        incoming: memory.is_some(),
        sandbox: true,
        rights,
        low_ports: ports(config)?.iter().any(|port| port.host < FIRST_FREE_PORT),
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
        nbd: nbd(&disk.id),
    }
}

/// Where a disk is served to QEMU.
fn nbd(disk: &DiskId) -> qemu::Nbd {
    qemu::Nbd {
        socket: PathBuf::from(disk_socket(disk)),
        export: String::new(),
        reconnect_delay: qemu::RECONNECT_DELAY,
    }
}

/// Ports of the host that lead into the guest, as QEMU takes them.
fn ports(config: &Config) -> Result<Vec<qemu::Publish>, Problem> {
    let port = |publish: &crate::tree::Publish| {
        let address = publish.address.parse();
        let address = address.map_err(|_| Problem::usage(format!("{} is no IPv4 address", publish.address)))?;
        Ok(qemu::Publish { address, host: publish.host, guest: publish.guest })
    };
    if config.net.mode == NetMode::None || config.borrowed.is_some() {
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

fn new_run_dir(machine: &Machine, rights: Rights) -> Result<PathBuf, Problem> {
    let name = format!("run-{}", &LayerId::new().to_string()[..8]);
    let dir = Root::runtime_folder(machine.id).join(name);
    store::host::HostFolder::create(&dir).map_err(|e| crate::files::file_problem(&e))?;
    qemu::prepare(&dir, rights).map_err(|e| qemu_problem(&machine.name, &e))?;
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

/// What QEMU says, as a problem.
pub(crate) fn qemu_problem(name: &str, error: &qemu::Error) -> Problem {
    let problem = Problem::failed(format!("{name}: {error}"));
    match error {
        qemu::Error::NoQemu(_) => problem.hint("tenby doctor"),
        _ => problem,
    }
}
