//! The folder of all machines: finding one by name, id or prefix, making one, looking without waking anybody.
//!
//! ```text
//!   <root>/lock        held while a name is given: names are unique in a root
//!          <id>/       a machine (see files.rs)
//!          .new-<id>/  a machine that is being made; renamed at the end, swept away by the next creation if its maker died
//! ```
//!
//! A ledger belongs to the worker that holds the machine's lock; while one does, its name is read off the runtime folder, where
//! the worker notes it.

use crate::files::{Files, copy_store, file_problem, image_problem, qcow2_problem};
use crate::firmware::Ovmf;
use crate::label::label_new;
use crate::ledger::{self, Ledger, State as Rows};
use crate::mark;
use crate::plan::{check_name, quoted, shorten};
use crate::request::{Create, DiskSource, DiskSpec, Job, Problem, ProblemKind, TreeView, View};
use crate::table::Table;
use crate::tree::{
    Config, Disk, DiskId, Firmware, Kernel, LayerKind, LayerRow, Machine, MachineId, Net, Now, Policy, State,
};
use crate::views;
use export::qcow2::{self, Qcow2};
use image::gate::Gate;
use image::siblings::Siblings;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::host::HostFolder;
use store::{Folder, Lock, Mode, Store};

/// Prefix of the folder of a machine that is being made.
const NEW: &str = ".new-";

/// The folder that holds the machines: `$TENBY_ROOT`, else `/var/lib/tenby` for root and `$XDG_DATA_HOME/tenby` otherwise.
#[derive(Debug, Clone)]
pub struct Root {
    path: PathBuf,
    folder: Arc<dyn Folder>,
}

/// A machine that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Who it is.
    pub id: MachineId,
    /// Its name.
    pub name: String,
}

/// A machine read off its ledger, while no worker runs.
#[derive(Debug, Clone)]
pub struct Peek {
    /// The machine.
    pub view: View,
    /// Its snapshots.
    pub tree: TreeView,
    /// Its jobs, oldest first.
    pub jobs: Vec<Job>,
    /// Its whole ledger.
    pub ledger: serde_json::Value,
    /// Its log.
    pub log: Vec<LogLine>,
}

/// A line of a machine's log: what was done, by which request, when, how it ended.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LogLine {
    /// When.
    pub at: jiff::Timestamp,
    /// The job, if one.
    pub job: Option<crate::tree::JobId>,
    /// What.
    pub what: String,
}

impl Root {
    /// The root at `path`; made if it is not there.
    pub fn open(path: &Path) -> Result<Self, Problem> {
        let path = std::path::absolute(path).map_err(|e| Problem::failed(format!("{}: {e}", path.display())))?;
        let folder = HostFolder::create(&path).map_err(|e| file_problem(&e))?;
        Ok(Self::over(Arc::new(folder), &path))
    }

    /// The root in this folder, which lies at `path`.
    pub fn over(folder: Arc<dyn Folder>, path: &Path) -> Self {
        Self { path: path.to_owned(), folder }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A machine's folder.
    pub fn machine_folder(&self, id: MachineId) -> PathBuf {
        self.path.join(id.to_string())
    }

    /// A machine's files.
    pub fn files(&self, id: MachineId) -> Result<Files, Problem> {
        let folder = self.folder.folder(&id.to_string()).map_err(|e| file_problem(&e))?;
        Ok(Files::new(folder, &self.machine_folder(id)))
    }

    /// The folder of a machine's sockets: `$TENBY_RUNTIME/ID` if that is set (tests run copies of one machine side by side), else
    /// `/run/tenby/ID` for root and `$XDG_RUNTIME_DIR/tenby/ID` otherwise.
    pub fn runtime_folder(id: MachineId) -> PathBuf {
        Self::runtime().join(id.to_string())
    }

    /// Where it is noted what QEMU has said of itself, for all machines.
    pub(crate) fn qemu_note() -> PathBuf {
        Self::runtime().join("qemu")
    }

    fn runtime() -> PathBuf {
        let set = |name| std::env::var_os(name).filter(|dir| !dir.is_empty()).map(PathBuf::from);
        let uid = rustix::process::getuid();
        match (set("TENBY_RUNTIME"), set("XDG_RUNTIME_DIR")) {
            (Some(dir), _) => dir,
            _ if uid.is_root() => PathBuf::from("/run/tenby"),
            (None, Some(dir)) => dir.join("tenby"),
            (None, None) => std::env::temp_dir().join(format!("tenby-{}", uid.as_raw())).join("tenby"),
        }
    }

    /// The machines, by name.
    pub fn list(&self) -> Result<Vec<Found>, Problem> {
        let names = self.folder.list().map_err(|e| file_problem(&e))?;
        let ids = names.iter().filter_map(|name| name.parse().ok().map(MachineId));
        let mut found: Vec<Found> = ids.filter_map(|id| self.name_of(id).map(|name| Found { id, name })).collect();
        found.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        Ok(found)
    }

    /// The name in the ledger, or, while a worker holds that, in the runtime folder. A machine whose ledger cannot be read goes by
    /// its id: it is not hidden, and whoever asks for it is told why.
    fn name_of(&self, id: MachineId) -> Option<String> {
        // A worker that has just started or ended is between the two places for a moment.
        for _ in 0..20 {
            match self.peek_rows(id) {
                Ok(Some(rows)) => return Some(rows.machine.name.clone()),
                // Gone since it was listed.
                Err(problem) if problem.kind == ProblemKind::NotFound => return None,
                Err(_) => return Some(id.to_string()),
                Ok(None) => {}
            }
            if let Some(name) = read_name(id) {
                return Some(name);
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        None
    }

    /// The machine of this name, id, or unique prefix of an id.
    pub fn find(&self, name: &str) -> Result<Found, Problem> {
        let all = self.list()?;
        if let Some(found) = all.iter().find(|found| found.name == name) {
            return Ok(found.clone());
        }
        let prefix = name.to_ascii_lowercase().replace('-', "");
        let by_id: Vec<&Found> =
            all.iter().filter(|f| !prefix.is_empty() && f.id.to_string().starts_with(&prefix)).collect();
        match by_id.as_slice() {
            [one] => Ok((*one).clone()),
            [] => Err(unknown_machine(name, &all)),
            many => {
                let mut problem = Problem::new(
                    ProblemKind::Ambiguous,
                    format!("the ids of {} machines begin with \"{}\"", many.len(), shorten(name)),
                );
                problem.candidates = many.iter().map(|found| found.id.to_string()).collect();
                Err(problem)
            }
        }
    }

    /// Reads a machine's ledger, without a worker. `Ok(None)` if a worker holds it.
    pub fn peek(&self, id: MachineId) -> Result<Option<Peek>, Problem> {
        let Some(rows) = self.peek_rows(id)? else { return Ok(None) };
        let files = self.files(id)?;
        let alone = matches!(rows.machine.now.state, State::Running | State::Paused);
        let alert = alone.then(|| "nobody serves its disks; the next command for it takes over".to_owned());
        Ok(Some(Peek {
            view: views::view(&rows.machine, &files, &views::Live { alert, ..views::Live::default() }),
            tree: views::tree(&rows.machine, &files, rows.machine.now.state),
            jobs: rows.jobs(),
            ledger: serde_json::to_value(&rows).unwrap_or_default(),
            log: crate::log::read(&files),
        }))
    }

    fn peek_rows(&self, id: MachineId) -> Result<Option<Rows>, Problem> {
        let folder = self.folder.folder(&id.to_string()).map_err(|e| file_problem(&e))?;
        let lock = folder.open("lock", Mode::Read).map_err(|e| file_problem(&e))?;
        match lock.lock(Lock::Shared) {
            Ok(()) => {}
            Err(e) if e.kind == store::ErrorKind::Locked => return Ok(None),
            Err(e) => return Err(file_problem(&e)),
        }
        match Ledger::read(&folder) {
            Ok(rows) => Ok(Some(rows)),
            // A worker that is on its way out has given up the one lock, and not yet the other.
            Err(e) if e.kind == ledger::ErrorKind::Store(store::ErrorKind::Locked) => Ok(None),
            Err(e) => Err(e.problem(&self.machine_folder(id))),
        }
    }

    /// Holds the root's lock: names are given and changed under it.
    pub fn lock_names(&self) -> Result<Arc<dyn Store>, Problem> {
        let lock = open_or_create(&self.folder, "lock")?;
        // Held for milliseconds only; whoever holds it longer has been stopped in a debugger.
        for _ in 0..1000 {
            match lock.lock(Lock::Exclusive) {
                Ok(()) => return Ok(lock),
                Err(e) if e.kind == store::ErrorKind::Locked => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                Err(e) => return Err(file_problem(&e)),
            }
        }
        Err(Problem::failed(format!("another command holds the lock of {}", self.path.display())))
    }

    /// Fails if a machine other than `but` has this name. Under [`Root::lock_names`].
    pub fn check_free(&self, name: &str, but: Option<MachineId>) -> Result<(), Problem> {
        match self.list()?.iter().any(|found| found.name == name && Some(found.id) != but) {
            true => Err(Problem::refused(format!("there is a machine named \"{name}\" already"))
                .hint(format!("tenby vm show {}", quoted(name)))),
            false => Ok(()),
        }
    }

    /// Makes a machine. Nothing is left behind if it fails. `progress` is told bytes done and to do while disks are copied in; if it says
    /// `false`, this fails as cancelled.
    pub fn create(&self, spec: &Create, progress: Progress<'_>) -> Result<MachineId, Problem> {
        check_name(&spec.name)?;
        {
            let _names = self.lock_names()?;
            self.check_free(&spec.name, None)?;
            self.sweep()?;
        }
        let id = MachineId::new();
        let made = self.begin(id).and_then(|begun| {
            build(&begun.files, id, spec, progress)?;
            let _names = self.lock_names()?;
            self.check_free(&spec.name, None)?;
            self.show(&[id], || {})
        });
        match made {
            Ok(()) => self.mark(id, &spec.disks),
            Err(_) => self.give_up(id),
        }
        made.map(|()| id)
    }

    /// Begins a machine's folder, out of sight.
    pub fn begin(&self, id: MachineId) -> Result<Begun, Problem> {
        let name = hidden(id);
        let folder = self.folder.create_folder(&name).map_err(|e| file_problem(&e))?;
        let lock = folder.create("lock").map_err(|e| file_problem(&e))?;
        lock.lock(Lock::Exclusive).map_err(|e| file_problem(&e))?;
        let files = Files::new(folder, &self.path.join(name));
        files.create_folders()?;
        Ok(Begun { files, _lock: lock })
    }

    /// Takes over a folder that somebody has begun: what it holds can be read, and [`Root::give_up`] removes it.
    pub(crate) fn begun(&self, id: MachineId) -> Result<Begun, Problem> {
        let name = hidden(id);
        let folder = self.folder.folder(&name).map_err(|e| file_problem(&e))?;
        let lock = folder.open("lock", Mode::Write).map_err(|e| file_problem(&e))?;
        lock.lock(Lock::Exclusive).map_err(|e| file_problem(&e))?;
        Ok(Begun { files: Files::new(folder, &self.path.join(name)), _lock: lock })
    }

    /// These machines, whose folders are complete, are there from now on, whatever becomes of the host; as are all that were shown before.
    /// `shown` is told of each. Under [`Root::lock_names`].
    pub fn show(&self, ids: &[MachineId], mut shown: impl FnMut()) -> Result<(), Problem> {
        if ids.len() > 1 {
            // By the first that has its name it is known that all are made: none has it before all folders are certain to be there.
            self.folder.sync().map_err(|e| file_problem(&e))?;
        }
        let show = |id: &MachineId| self.folder.rename(&hidden(*id), &id.to_string()).map(|()| shown());
        ids.iter().try_for_each(show).and_then(|()| self.folder.sync()).map_err(|e| file_problem(&e))
    }

    /// Whether there is a machine of this id.
    pub(crate) fn has(&self, id: MachineId) -> bool {
        self.folder.folder(&id.to_string()).is_ok()
    }

    /// Removes a machine's folder that is out of sight. What cannot be removed is swept away later.
    pub fn give_up(&self, id: MachineId) {
        remove_tree(&self.folder, &hidden(id));
    }

    /// Marks the files that a machine has taken in place.
    pub(crate) fn mark(&self, id: MachineId, disks: &[DiskSpec]) {
        for disk in disks {
            if let DiskSource::InPlace { path, .. } = &disk.source {
                mark::set(Path::new(path), &self.path, id);
            }
        }
    }

    /// Removes what is left of a machine that was deleted, or made for another one to take over, if a worker died in the middle of that: it
    /// would keep others from what they shared with it. A process that was killed may take a moment to give up its lock.
    pub fn clear_away(&self, id: MachineId) {
        let name = hidden(id);
        for _ in 0..100 {
            let Ok(folder) = self.folder.folder(&name) else { break };
            if is_abandoned(&*folder) {
                remove_tree(&self.folder, &name);
            } else {
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
        }
        if !self.has(id) {
            crate::live::remove_run_dir(&Self::runtime_folder(id));
        }
    }

    /// Removes what a creation or a deletion that died has left. Under [`Root::lock_names`].
    pub fn sweep(&self) -> Result<(), Problem> {
        for name in self.folder.list().map_err(|e| file_problem(&e))? {
            let Some(id) = name.strip_prefix(NEW) else { continue };
            let Ok(folder) = self.folder.folder(&name) else { continue };
            if is_abandoned(&*folder) {
                remove_tree(&self.folder, &name);
                if let Ok(id) = id.parse() {
                    crate::live::remove_run_dir(&Self::runtime_folder(MachineId(id)));
                }
            }
        }
        Ok(())
    }

    /// Takes a machine's folder out of sight, in one step: what follows may be interrupted, and is swept away later ([`Root::give_up`]). Its worker
    /// calls this, with the machine's lock.
    pub fn hide(&self, id: MachineId) -> Result<(), Problem> {
        let hidden = self.folder.rename(&id.to_string(), &hidden(id)).and_then(|()| self.folder.sync());
        hidden.map_err(|e| file_problem(&e))
    }
}

/// A machine's folder that is being made, out of sight. It is swept away when nobody holds its lock.
#[derive(Debug)]
pub struct Begun {
    /// Its files.
    pub files: Files,
    _lock: Arc<dyn Store>,
}

/// Whether nobody makes, or removes, this folder any more.
fn is_abandoned(folder: &dyn Folder) -> bool {
    match folder.open("lock", Mode::Write) {
        Ok(lock) => lock.lock(Lock::Exclusive).is_ok(),
        Err(e) => e.kind == store::ErrorKind::NotFound,
    }
}

/// The name of a machine's folder that is out of sight: not there yet, or not any more.
fn hidden(id: MachineId) -> String {
    format!("{NEW}{id}")
}

/// Makes a machine's files in its folder.
fn build(files: &Files, id: MachineId, spec: &Create, progress: Progress<'_>) -> Result<(), Problem> {
    check_hardware(spec.memory, spec.cpus)?;
    let mut machine = new_machine(id, spec);
    machine.now.config.kernel = copy_kernel(files.folder(), spec)?;
    if spec.firmware == Firmware::Uefi {
        add_uefi(files, &mut machine)?;
    }
    for disk in &spec.disks {
        let row = files.new_row(LayerKind::Disk, disk.source.format(), None);
        let made = take_in(files, row, disk, progress)?;
        add_disk(&mut machine, made, disk);
    }
    files.sync_names()?;
    label_new(files, &machine)?;
    Ledger::create(files.folder(), &machine).map_err(|e| e.problem(files.path()))?;
    files.folder().sync().map_err(|e| file_problem(&e))
}

/// A disk that was made or taken in: its first layer, and its size in bytes.
#[derive(Debug)]
pub struct TakenIn {
    /// The layer.
    pub row: LayerRow,
    /// Virtual size in bytes.
    pub size: u64,
}

/// Told how many bytes of how many are copied; `false` stops.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// Makes the first layer of a disk: empty, copied from a file, or the file itself.
pub fn take_in(files: &Files, row: LayerRow, disk: &DiskSpec, progress: Progress<'_>) -> Result<TakenIn, Problem> {
    match &disk.source {
        DiskSource::New { size, .. } => {
            check_disk_size(*size)?;
            files.create_layer(&row, *size, None, None)?;
            Ok(TakenIn { row, size: *size })
        }
        DiskSource::Copy { path, format, .. } if is_qcow2(path, format.as_deref())? => {
            let source = Qcow2::open(Path::new(path)).map_err(|e| qcow2_problem(&e))?;
            let target = new_base(files, &row, source.size())?;
            let complete = source.copy_in(&target, progress).map_err(|e| qcow2_problem(&e))?;
            taken_in(row, &target, complete)
        }
        DiskSource::Copy { path, format, parents } => {
            let source = open_foreign(Path::new(path), said(path, format.as_deref()), parents)?;
            let target = new_base(files, &row, round_up_sector(source.size()))?;
            let complete = image::convert::copy(&source, &target, progress).map_err(|e| image_problem(&e))?;
            taken_in(row, &target, complete)
        }
        DiskSource::InPlace { path, format } if is_qcow2(path, format.as_deref())? => {
            let message = format!("{path} cannot be taken in place: qcow2 cannot be a layer");
            Err(Problem::refused(message).hint(format!("--disk {}      (copied in)", quoted(path))))
        }
        DiskSource::InPlace { path, format } => {
            check_free_to_take(Path::new(path))?;
            let source = open_foreign(Path::new(path), said(path, format.as_deref()), &[])?;
            let [base] = source.layers().try_into().map_err(|_| stands_on_others(path))?;
            let (size, format) = (source.size(), base.info().format.into());
            let row = LayerRow { file: path.clone(), in_place: true, format, ..row };
            Ok(TakenIn { row, size })
        }
    }
}

/// Refuses to take a file in place that another machine has, or on which another image stands: it would change under them.
fn check_free_to_take(path: &Path) -> Result<(), Problem> {
    let (file, copied) = (path.display(), format!("--disk {}      (copied in)", quoted(&path.display().to_string())));
    if let Some(owner) = mark::owner(path) {
        return Err(Problem::refused(format!("{file} belongs to the machine {}", owner.machine.name)).hint(copied));
    }
    let (folder, name) = HostFolder::holding(path).map_err(|e| file_problem(&e))?;
    let siblings = Siblings::of(&folder).map_err(|e| image_problem(&e))?;
    let own = siblings.images.iter().find(|image| image.name == name);
    let id = own.map_or(uuid::Uuid::nil(), |image| image.info.data_id);
    let children: Vec<_> = siblings.children(&name, id).map(|child| child.name.as_str()).collect();
    match children.as_slice() {
        [] => Ok(()),
        children => {
            Err(Problem::refused(format!("{} stands on {file}, which a machine would change", children.join(", ")))
                .hint(copied))
        }
    }
}

/// An empty base, to be copied into.
fn new_base(files: &Files, row: &LayerRow, size: u64) -> Result<Arc<image::Chain>, Problem> {
    let layer = files.create_layer(row, size, None, None)?;
    Ok(Arc::new(image::Chain::new(vec![layer], image::Access::Write).map_err(|e| image_problem(&e))?))
}

/// The base after the copy.
fn taken_in(row: LayerRow, target: &image::Chain, complete: bool) -> Result<TakenIn, Problem> {
    target.close().map_err(|e| image_problem(&e))?;
    match complete {
        true => Ok(TakenIn { row, size: target.size() }),
        false => Err(Problem::new(ProblemKind::Cancelled, "cancelled; nothing has changed")),
    }
}

/// Whether a file is to be read as qcow2: it was said, or its signature says so and nothing else was said.
fn is_qcow2(path: &str, format: Option<&str>) -> Result<bool, Problem> {
    match said(path, format) {
        None => qcow2::is_one(Path::new(path)).map_err(|e| qcow2_problem(&e)),
        Some(format) => Ok(format == "qcow2"),
    }
}

fn stands_on_others(path: &str) -> Problem {
    Problem::refused(format!("{path} stands on another file: only a disk that is one file can be taken in place"))
        .hint(format!("--disk {path}      (copied in)"))
}

/// The format that the user has said, if only by the ending `.raw`.
fn said<'a>(path: &str, format: Option<&'a str>) -> Option<&'a str> {
    let raw = Path::new(path).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("raw"));
    format.or(raw.then_some("raw"))
}

/// Opens a disk image of the user's for reading, with its parents, which lie beside it or in these folders.
fn open_foreign(path: &Path, format: Option<&str>, parents: &[String]) -> Result<image::Chain, Problem> {
    let format = match format {
        None => None,
        Some("raw") => Some(image::Format::Raw),
        Some("vhdx") => Some(image::Format::Vhdx),
        Some("vhd") => Some(image::Format::Vhd),
        Some(other) => return Err(Problem::usage(format!("the formats are raw, vhd, vhdx and qcow2, not {other}"))),
    };
    let named =
        parents.iter().map(|folder| HostFolder::open(Path::new(folder)).map(|f| Arc::new(f) as Arc<dyn Folder>));
    let gate = Gate::new(named.collect::<Result<_, _>>().map_err(|e| file_problem(&e))?);
    let layers = gate.open_path(path, format, Mode::Read).map_err(|e| match e.kind {
        image::ErrorKind::Unsigned => {
            image_problem(&e).hint(format!("--disk {}", quoted(&format!("{},format=raw", e.file))))
        }
        image::ErrorKind::Parent if parents.is_empty() => image_problem(&e).hint(format!(
            "--disk {}      (if its parents lie in FOLDER)",
            quoted(&format!("{},parents=FOLDER", path.display()))
        )),
        _ => image_problem(&e),
    })?;
    image::Chain::new(layers, image::Access::Read).map_err(|e| image_problem(&e))
}

/// A disk has at least a sector and at most 64 TiB, in whole sectors.
pub fn check_disk_size(size: u64) -> Result<(), Problem> {
    match size {
        0 => Err(Problem::usage("a disk needs a size of at least 512 bytes")),
        _ if size > 64 << 40 => Err(Problem::usage("a disk has at most 64T")),
        _ if !size.is_multiple_of(512) => Err(Problem::usage("a disk's size is a multiple of 512 bytes")),
        _ => Ok(()),
    }
}

fn round_up_sector(size: u64) -> u64 {
    size.next_multiple_of(512).max(512)
}

/// Adds a disk to the configuration of Now.
pub fn add_disk(machine: &mut Machine, made: TakenIn, spec: &DiskSpec) {
    let id = DiskId(format!("disk{}", machine.next_disk));
    machine.next_disk += 1;
    machine.now.config.disks.push(Disk { id: id.clone(), bus: spec.bus, size: made.size });
    machine.now.disks.insert(id, made.row.id);
    machine.layers.insert(made.row.id, made.row);
}

/// Gives a machine that is being made its UEFI.
fn add_uefi(files: &Files, machine: &mut Machine) -> Result<(), Problem> {
    let ovmf = Ovmf::find()?;
    ovmf.copy_code(files)?;
    let row = ovmf.new_variables(files)?;
    machine.now.disks.insert(DiskId::firmware(), row.id);
    machine.layers.insert(row.id, row);
    Ok(())
}

/// RAM from 16 MiB to 16 TiB, in steps of 2 MiB; 1 to 255 processors.
pub fn check_hardware(memory: u64, cpus: u32) -> Result<(), Problem> {
    const MIB: u64 = 1 << 20;
    if !(16 * MIB..=(16 << 40)).contains(&memory) || !memory.is_multiple_of(2 * MIB) {
        return Err(Problem::usage("memory goes from 16M to 16T in steps of 2M"));
    }
    if !(1..=255).contains(&cpus) {
        return Err(Problem::usage("a machine has 1 to 255 processors"));
    }
    Ok(())
}

fn new_machine(id: MachineId, spec: &Create) -> Machine {
    let config = Config {
        memory: spec.memory,
        cpus: spec.cpus,
        machine_type: None,
        cpu_model: None,
        hpet: false,
        agent: true,
        accel: spec.accel,
        boot: spec.boot,
        firmware: spec.firmware,
        kernel: None,
        cdrom: spec.cdrom.clone(),
        net: Net { mode: spec.net, mac: mac_of(id), publish: spec.publish.clone() },
        disks: Vec::new(),
        borrowed: None,
    };
    Machine {
        id,
        name: spec.name.clone(),
        note: spec.note.clone(),
        created: jiff::Timestamp::now(),
        policy: Policy::default(),
        next_disk: 0,
        now: Now {
            parent: None,
            under: None,
            state: State::Off,
            config,
            disks: BTreeMap::new(),
            memory: None,
            memory_base: None,
            restoring: None,
            touched: true,
            generation: uuid::Uuid::new_v4(),
            run: None,
        },
        snapshots: Table::default(),
        trash: Table::default(),
        layers: Table::default(),
    }
}

/// A network address in QEMU's range, drawn from the machine's id.
pub(crate) fn mac_of(id: MachineId) -> String {
    let b = id.0.as_bytes();
    format!("52:54:00:{:02x}:{:02x}:{:02x}", b[13], b[14], b[15])
}

fn copy_kernel(folder: &Arc<dyn Folder>, spec: &Create) -> Result<Option<Kernel>, Problem> {
    let Some(kernel) = &spec.kernel else {
        return match spec.initrd.is_some() || !spec.append.is_empty() {
            true => Err(Problem::usage("--initrd and --append go with --kernel")),
            false => Ok(None),
        };
    };
    let boot = folder.folder("boot").map_err(|e| file_problem(&e))?;
    copy_file(&boot, Path::new(kernel), "kernel")?;
    if let Some(initrd) = &spec.initrd {
        copy_file(&boot, Path::new(initrd), "initrd")?;
    }
    boot.sync().map_err(|e| file_problem(&e))?;
    let initrd = spec.initrd.as_ref().map(|_| "initrd".to_owned());
    Ok(Some(Kernel { kernel: "kernel".to_owned(), initrd, append: spec.append.clone() }))
}

pub(crate) fn copy_file(folder: &Arc<dyn Folder>, from: &Path, to: &str) -> Result<(), Problem> {
    let copy = || {
        let target = folder.create(to)?;
        copy_store(&*store::host::open_file(from, Mode::Read)?, &*target, &mut |_| true)?;
        target.sync()
    };
    copy().map_err(|e| file_problem(&e))
}

pub(crate) fn open_or_create(folder: &Arc<dyn Folder>, name: &str) -> Result<Arc<dyn Store>, Problem> {
    match folder.create(name) {
        Err(e) if e.kind == store::ErrorKind::Exists => folder.open(name, Mode::Write).map_err(|e| file_problem(&e)),
        made => made.map_err(|e| file_problem(&e)),
    }
}

/// Removes a folder and what is in it. What cannot be removed stays, and is tried again by the next sweep.
pub(crate) fn remove_tree(folder: &Arc<dyn Folder>, name: &str) {
    if let Ok(inner) = folder.folder(name) {
        for entry in inner.list().unwrap_or_default() {
            if inner.unlink(&entry).is_err() {
                remove_tree(&inner, &entry);
            }
        }
    }
    let _ = folder.remove_folder(name);
}

fn unknown_machine(name: &str, all: &[Found]) -> Problem {
    let problem = Problem::not_found(format!("no machine is named \"{}\"", shorten(name)));
    match all.is_empty() {
        true => problem.hint("tenby vm create NAME --disk new:20G --cdrom FILE.iso"),
        false => problem.hint("tenby vm list"),
    }
}

/// The runtime folder, as a folder; made if need be.
pub(crate) fn runtime(id: MachineId) -> Result<Arc<dyn Folder>, Problem> {
    HostFolder::create(&Root::runtime_folder(id))
        .map(|folder| Arc::new(folder) as Arc<dyn Folder>)
        .map_err(|e| file_problem(&e))
}

/// Notes the machine's name where [`Root::list`] finds it while the ledger is the worker's.
pub(crate) fn note_name(id: MachineId, name: &str) -> Result<(), Problem> {
    let folder = runtime(id)?;
    let _ = folder.unlink("name.new");
    let store = folder.create("name.new").map_err(|e| file_problem(&e))?;
    store.write_at(name.as_bytes(), 0).map_err(|e| file_problem(&e))?;
    folder.rename("name.new", "name").map_err(|e| file_problem(&e))
}

fn read_name(id: MachineId) -> Option<String> {
    let folder = HostFolder::open(&Root::runtime_folder(id)).ok()?;
    let store = folder.open("name", Mode::Read).ok()?;
    let mut name = vec![0; store.len().ok()?.min(4096) as usize];
    store.read_at(&mut name, 0).ok()?;
    String::from_utf8(name).ok()
}
