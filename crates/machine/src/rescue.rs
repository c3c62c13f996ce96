//! A machine whose ledger is lost or damaged, made again from what its files say of themselves ([`crate::label`]).
//!
//! ```text
//!   lock ──► found: every image file, its ids, its label ──► links: which stands on which ──► rebuild: rows (pure)
//!                                                                                               │
//!        ledger, whole or not at all ◄── a damaged one is copied aside ◄── fresh leaves, if Now needs some
//! ```
//!
//! No image file is written or removed. The ledger is made last, so a rescue that is cut off has changed nothing but that files may lie there
//! which hold nothing. What could not be known is said, line by line. Files that fit nowhere stay, and no row names them.

mod found;
mod links;
mod rebuild;
mod sane;

pub use found::{Found, Unknown};
pub use rebuild::{Rebuilt, rebuild};

use crate::files::{Files, Parent, file_problem};
use crate::firmware::{self, Ovmf};
use crate::ledger::{self, Journal, Ledger};
use crate::log;
use crate::plan::quoted;
use crate::request::{Problem, TreeView};
use crate::root::{Root, open_or_create};
use crate::tree::{Config, DiskId, Firmware, JobId, LayerId, LayerKind, Machine, MachineId, SnapshotId};
use crate::views;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::{Folder, Lock, Mode, Store};

/// The journal's word for a link that is to be put right.
pub(crate) const MEND: &str = "rescue";

/// How long the machine's worker gets to end: with nothing to do it stays for a few seconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// A damaged ledger's name, from then on; with a number behind it if that is taken.
const ASIDE: &str = "ledger.damaged";

/// What came of a rescue.
#[derive(Debug, Clone, Serialize)]
pub struct Rescued {
    /// The machine.
    pub id: MachineId,
    /// Its name.
    pub name: String,
    /// Its snapshots and Now.
    pub tree: TreeView,
    /// The file that holds the damaged ledger, if there was one.
    pub aside: Option<String>,
    /// What could not be known or used.
    pub unknown: Vec<Unknown>,
}

/// Rescues the machine whose folder this is, which must be `<root>/<id>`. `named` are files of the user's own that the machine had: disks
/// taken in place, images in its CD drive.
///
/// # Errors
/// `Refused` if its ledger is sound, a worker or a QEMU has it, or the folder is elsewhere; `NotFound` if there is none; `Damaged` if nothing
/// in it can be rescued.
pub fn rescue(root: &Root, folder: &Path, named: &[String]) -> Result<Rescued, Problem> {
    let id = machine_of(root, folder)?;
    let files = root.files(id)?;
    let _lock = take_lock(&files)?;
    check_quiet(id)?;
    let _names = root.lock_names()?;
    rescue_files(&files, id, named, |name| free_name(root, id, name))
}

/// [`rescue`], of a folder that the caller has locked. `free_name` makes a name one that no other machine has.
///
/// # Errors
/// As [`rescue`].
pub fn rescue_files(
    files: &Files,
    id: MachineId,
    named: &[String],
    free_name: impl FnOnce(&str) -> Result<String, Problem>,
) -> Result<Rescued, Problem> {
    check_lost(files)?;
    let mut unknown = Vec::new();
    let found = found::look(files, named, &mut unknown)?;
    if found.is_empty() && unknown.is_empty() {
        return Err(Problem::damaged(format!("{} holds no disk and no memory of a machine", files.path().display())));
    }
    let rebuilt = rebuild(id, &found, named, jiff::Timestamp::now(), unknown).map_err(|why| nothing(files, &why))?;
    let Rebuilt { mut machine, at, over, mend, mut unknown } = rebuilt;
    machine.now.config.borrowed.take_if(|_| machine.now.memory.is_none());
    let name = free_name(&machine.name)?;
    if name != machine.name {
        let what = format!("its name, {}, is another machine's now: it comes back as {name}", machine.name);
        unknown.push(Unknown { file: None, what });
        machine.name = name;
    }
    check_boot(files, &machine, &mut unknown);
    renew_variables(files, &mut machine, over, &mut unknown)?;
    if let Some(over) = over {
        begin_anew(files, &mut machine, over)?;
    }
    machine
        .check()
        .map_err(|why| Problem::damaged(format!("what the files say of the machine makes no sense: {why}")))?;
    files.create_missing()?;
    let aside = keep_aside(files.folder())?;
    let ledger = Ledger::create_with(files.folder(), &machine, at, mend.into_iter().map(journal).collect());
    ledger.map_err(|e| e.problem(files.path()))?.close();
    log::write(files, None, &format!("rescued from its files: {} snapshots", machine.snapshots.len()));
    let tree = views::tree(&machine, files, machine.now.state);
    Ok(Rescued { id, name: machine.name, tree, aside, unknown })
}

/// The machine whose folder this is. Its id is the folder's name.
fn machine_of(root: &Root, folder: &Path) -> Result<MachineId, Problem> {
    let there = std::path::absolute(folder).map_err(|e| Problem::usage(format!("{}: {e}", folder.display())))?;
    let opened = store::host::HostFolder::open(&there).map_err(|e| match e.kind {
        store::ErrorKind::WrongType => Problem::damaged(format!("{} is no folder", folder.display())),
        _ => file_problem(&e),
    })?;
    if opened.folder("disks").is_err() {
        return Err(Problem::damaged(format!("{} is no machine's folder: it has no disks in it", folder.display())));
    }
    let id = there.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok()).map(MachineId);
    if let Some(id) = id.filter(|id| same(&root.machine_folder(*id), &there)) {
        return Ok(id);
    }
    let free = |id: &MachineId| !root.machine_folder(*id).exists();
    let place = root.machine_folder(id.filter(free).unwrap_or_else(MachineId::new));
    let (from, to) = (quoted_path(&there), quoted_path(&place));
    Err(Problem::refused(format!("{} does not lie where a machine's folder lies", folder.display()))
        .hint(format!("mv {from} {to} && tenby vm rescue {to}")))
}

fn same(one: &Path, other: &Path) -> bool {
    one == other || matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

fn quoted_path(path: &Path) -> String {
    let path = path.display().to_string();
    if path.chars().all(|c| c.is_alphanumeric() || "-_.:+,=/".contains(c)) { path } else { quoted(&path) }
}

fn take_lock(files: &Files) -> Result<Arc<dyn Store>, Problem> {
    let lock = open_or_create(files.folder(), "lock")?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match lock.lock(Lock::Exclusive) {
            Ok(()) => return Ok(lock),
            Err(e) if e.kind == store::ErrorKind::Locked && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(e) if e.kind == store::ErrorKind::Locked => {
                let folder = files.path().display();
                let message = format!("a worker has the machine in {folder}, and knows what its ledger says");
                return Err(Problem::refused(message).hint("tenby vm list"));
            }
            Err(e) => return Err(file_problem(&e)),
        }
    }
}

/// A guest that lives on would be lost, for nobody knows its memory.
fn check_quiet(id: MachineId) -> Result<(), Problem> {
    let runtime = Root::runtime_folder(id);
    let Ok(folder) = store::host::HostFolder::open(&runtime) else { return Ok(()) };
    for name in folder.list().unwrap_or_default().into_iter().filter(|name| name.starts_with("run-")) {
        if let Ok(Some(process)) = qemu::Process::find(&runtime.join(&name)) {
            let pid = process.identity().pid;
            return Err(Problem::refused(format!(
                "its guest still runs, in QEMU {pid}: a rescue would lose what it is doing"
            ))
            .hint(format!("kill {pid}      (as by pulling its plug)")));
        }
    }
    Ok(())
}

fn check_lost(files: &Files) -> Result<(), Problem> {
    match read_ledger(files) {
        Ok(state) => {
            let name = &state.machine.name;
            Err(Problem::refused(format!("the ledger of {name} is sound: there is nothing to rescue"))
                .hint(format!("tenby vm check {}", quoted(name))))
        }
        Err(error) => match error.kind {
            ledger::ErrorKind::Damaged | ledger::ErrorKind::Store(store::ErrorKind::NotFound) => Ok(()),
            _ => Err(error.problem(files.path())),
        },
    }
}

/// A worker that has just ended may have it open for a moment longer than the machine's lock.
fn read_ledger(files: &Files) -> ledger::Result<ledger::State> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match Ledger::read(files.folder()) {
            Err(e) if e.kind == ledger::ErrorKind::Store(store::ErrorKind::Locked) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            read => return read,
        }
    }
}

fn nothing(files: &Files, why: &[Unknown]) -> Problem {
    let line = |said: &Unknown| match &said.file {
        Some(file) => format!("{file}: {}", said.what),
        None => said.what.clone(),
    };
    let why: Vec<String> = why.iter().take(5).map(line).collect();
    Problem::damaged(format!("nothing of {} can be rescued: {}", files.path().display(), why.join("; ")))
}

fn free_name(root: &Root, id: MachineId, name: &str) -> Result<String, Problem> {
    let taken: Vec<String> = root.list()?.into_iter().filter(|found| found.id != id).map(|found| found.name).collect();
    if !taken.iter().any(|taken| taken == name) {
        return Ok(name.to_owned());
    }
    let base: String = name.chars().take(crate::plan::NAME_LIMIT - 8).collect();
    let numbered = (2u32..).map(|n| format!("{base} ({n})"));
    Ok(numbered.into_iter().find(|name| !taken.contains(name)).unwrap_or(base))
}

fn check_boot(files: &Files, machine: &Machine, unknown: &mut Vec<Unknown>) {
    let config = &machine.now.config;
    let kernel = config.kernel.iter().flat_map(|kernel| std::iter::once(&kernel.kernel).chain(&kernel.initrd));
    let firmware = (config.firmware == Firmware::Uefi).then(|| firmware::CODE.to_owned());
    for file in kernel.map(|name| format!("boot/{name}")).chain(firmware) {
        let (folder, name) = file.split_once('/').unwrap_or_default();
        if files.folder().folder(folder).and_then(|boot| boot.open(name, Mode::Read)).is_err() {
            unknown.push(Unknown::of(&file, "it is not there, and the machine boots from it"));
        }
    }
}

/// Gives those whose UEFI has lost its variables new ones, without which they could not start at all. Now gets its own; if it begins anew
/// `over` a snapshot, that one's.
fn renew_variables(
    files: &Files,
    machine: &mut Machine,
    over: Option<SnapshotId>,
    unknown: &mut Vec<Unknown>,
) -> Result<(), Problem> {
    let lacks = |config: &Config, disks: &BTreeMap<DiskId, LayerId>| {
        config.firmware == Firmware::Uefi && !disks.contains_key(&DiskId::firmware())
    };
    let mut tell = |whose: &str| {
        let what = "what its UEFI knew is lost, boot entries and all: it begins anew";
        unknown.push(Unknown { file: None, what: format!("{whose}: {what}") });
    };
    let (mut of_snapshots, mut of_now) = (Vec::new(), Vec::new());
    for snapshot in machine.snapshots.values_mut().filter(|s| lacks(&s.config, &s.disks)) {
        tell(&snapshot.name);
        of_snapshots.push(&mut snapshot.disks);
    }
    let now = &mut machine.now;
    if over.is_none() && lacks(&now.config, &now.disks) {
        tell("Now");
        of_now.push(&mut now.disks);
    }
    for disks in [of_snapshots, of_now].into_iter().filter(|disks| !disks.is_empty()) {
        files.create_missing()?;
        let row = Ovmf::find()?.new_variables(files)?;
        files.sync_names()?;
        for disks in disks {
            disks.insert(DiskId::firmware(), row.id);
        }
        machine.layers.insert(row.id, row);
    }
    Ok(())
}

/// Gives Now fresh leaves over a snapshot.
fn begin_anew(files: &Files, machine: &mut Machine, over: SnapshotId) -> Result<(), Problem> {
    files.create_missing()?;
    let mut disks = BTreeMap::new();
    for (disk, parent) in &machine.snapshots[&over].disks {
        let below = &machine.layers[parent];
        let row = files.new_row(LayerKind::Disk, below.format.of_child(), Some(*parent));
        let layer = files.open_layer(below, Mode::Read)?;
        let made = files.create_layer(&row, layer.info().size, Some(&Parent { layer: &*layer, row: below }), None)?;
        made.close().map_err(|e| crate::files::image_problem(&e))?;
        disks.insert(disk.clone(), row);
    }
    files.sync_names()?;
    for (disk, row) in disks {
        machine.now.disks.insert(disk, row.id);
        machine.layers.insert(row.id, row);
    }
    Ok(())
}

/// A damaged ledger is copied, so that at every moment one of its name is there.
fn keep_aside(folder: &Arc<dyn Folder>) -> Result<Option<String>, Problem> {
    let damaged = match folder.open(ledger::NAME, Mode::Read) {
        Err(error) if error.kind == store::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|e| file_problem(&e))?,
    };
    let taken = folder.list().map_err(|e| file_problem(&e))?;
    let numbered = (2u32..).map(|n| format!("{ASIDE}-{n}"));
    let name = std::iter::once(ASIDE.to_owned()).chain(numbered).find(|name| !taken.contains(name));
    let name = name.ok_or_else(|| Problem::failed("no name is free for the damaged ledger"))?;
    ledger::keep_copy(&**folder, &*damaged, &name).map_err(|e| file_problem(&e))?;
    Ok(Some(name))
}

/// For the next worker: this layer names its parent, and no other.
fn journal(layer: LayerId) -> Journal {
    Journal { job: JobId::new(), request: serde_json::json!(MEND), files: Vec::new(), note: layer.to_string() }
}
