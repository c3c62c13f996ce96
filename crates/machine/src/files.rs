//! A machine's folder: where its files lie, how layers are made, opened and removed.
//!
//! ```text
//!   <root>/<id>/ledger          the rows (see ledger.rs)
//!               lock            held by the worker
//!               disks/          <layer>.vhdx, <layer>.avhdx
//!               memory/         <layer>.vhdx, <layer>.avhdx
//!               hashes/         <layer>: how a sealed layer reads (see records.rs)
//!               boot/           kernel and initrd, copied in
//!               log/            worker.log, qemu.log, serial.log, machine.log
//! ```
//!
//! Files are named by random ids. Only a row gives a file a meaning; a file that no row names is garbage if a journal row says
//! that we made it, and is left alone and reported otherwise.

use crate::garbage::{Fold, Garbage, garbage};
use crate::mark;
use crate::request::{Problem, ProblemKind};
use crate::tree::{Config, LayerFormat, LayerId, LayerKind, LayerRow, Machine};
use export::qcow2;
use image::{Kind, Layer, gate, vhd, vhdx};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::{Folder, Lock, Mode, Store};

/// The folders of a machine.
const FOLDERS: [&str; 5] = ["disks", "memory", "hashes", "boot", "log"];

/// The folders that hold layers.
pub(crate) const LAYER_FOLDERS: [&str; 2] = ["disks", "memory"];

/// How long somebody else may hold a file that is to be written.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// The sector size of a memory disk, bytes: a page.
pub const PAGE: u32 = 4096;

/// A machine's folder.
#[derive(Debug, Clone)]
pub struct Files {
    folder: Arc<dyn Folder>,
    path: PathBuf,
}

impl Files {
    /// The folder, and its path for messages and for QEMU.
    pub fn new(folder: Arc<dyn Folder>, path: &Path) -> Self {
        Self { folder, path: path.to_owned() }
    }

    /// The folder itself.
    pub fn folder(&self) -> &Arc<dyn Folder> {
        &self.folder
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A layer's path, for people.
    pub fn layer_path(&self, row: &LayerRow) -> PathBuf {
        self.path.join(&row.file)
    }

    /// Makes the folders of a new machine.
    pub fn create_folders(&self) -> Result<(), Problem> {
        for name in FOLDERS {
            self.folder.create_folder(name).map_err(|e| file_problem(&e))?;
        }
        Ok(())
    }

    /// Makes those that are not there.
    pub(crate) fn create_missing(&self) -> Result<(), Problem> {
        for name in FOLDERS {
            match self.folder.create_folder(name) {
                Err(e) if e.kind == store::ErrorKind::Exists => {}
                made => drop(made.map_err(|e| file_problem(&e))?),
            }
        }
        Ok(())
    }

    /// The row of a layer that is about to be made, in VHDX or VHD.
    pub fn new_row(&self, kind: LayerKind, format: LayerFormat, parent: Option<LayerId>) -> LayerRow {
        let id = LayerId::new();
        let folder = LAYER_FOLDERS[usize::from(kind == LayerKind::Memory)];
        let ending = if parent.is_some() { format!("a{format}") } else { format.to_string() };
        LayerRow {
            id,
            kind,
            file: format!("{folder}/{id}.{ending}"),
            in_place: false,
            format,
            parent,
            created: jiff::Timestamp::now(),
            folded: None,
            taken_on: None,
        }
    }

    /// Makes a layer's file: empty, `size` bytes of virtual disk, standing on `parent` if there is one. Durable when it returns, but
    /// for its name: see [`Files::sync_names`]. With `carry`, what is committed to it outlives this process.
    pub fn create_layer(
        &self,
        row: &LayerRow,
        size: u64,
        parent: Option<&Parent<'_>>,
        carry: Option<vhdx::Carry>,
    ) -> Result<Arc<dyn Layer>, Problem> {
        let (folder, name) = self.place(row)?;
        let store = folder.create(&name).map_err(|e| file_problem(&e))?;
        if row.format == LayerFormat::Vhd {
            return create_vhd(store, size, parent);
        }
        let sector_size = match (parent, row.kind) {
            (Some(parent), _) => parent.layer.info().sector_size,
            (None, LayerKind::Memory) => PAGE,
            (None, LayerKind::Disk) => 512,
        };
        let options = vhdx::Options {
            sector_size,
            kind: if parent.is_some() { Kind::Differencing } else { Kind::Dynamic },
            parent: parent.map(Parent::link_vhdx).transpose()?,
            ..vhdx::Options::dynamic(size)
        };
        let layer = match carry {
            Some(carry) => vhdx::create_carried(store, &options, carry),
            None => vhdx::create(store, &options),
        };
        Ok(layer.map_err(|e| image_problem(&e))?)
    }

    /// Makes the names in the layers' folders durable.
    pub fn sync_names(&self) -> Result<(), Problem> {
        for name in LAYER_FOLDERS {
            self.folder.folder(name).and_then(|folder| folder.sync()).map_err(|e| file_problem(&e))?;
        }
        Ok(())
    }

    /// Opens a layer's file. No lock is taken on it: the machine's own keeps others out, and one layer may have two handles for a
    /// moment, an old one that is only read and a new one. But a file that was taken in place lies where others may reach it: whoever
    /// writes it has it locked.
    pub fn open_layer(&self, row: &LayerRow, mode: Mode) -> Result<Arc<dyn Layer>, Problem> {
        let store = self.open_store(row, mode)?;
        match row.format {
            LayerFormat::Raw => image::raw::open(store, mode).map(|layer| layer as Arc<dyn Layer>),
            LayerFormat::Vhd => vhd::open(store, mode).map(|layer| layer as Arc<dyn Layer>),
            LayerFormat::Vhdx => vhdx::open(store, mode).map(|layer| layer as Arc<dyn Layer>),
        }
        .map_err(|e| image_problem(&e))
    }

    /// Opens a VHDX layer for writing, with the journal of what was committed and not flushed; works off what that holds.
    pub fn open_carried(&self, row: &LayerRow, carry: vhdx::Carry) -> Result<Arc<dyn Layer>, Problem> {
        let store = self.open_store(row, Mode::Write)?;
        vhdx::open_carried(store, carry).map(|layer| layer as Arc<dyn Layer>).map_err(|e| image_problem(&e))
    }

    fn open_store(&self, row: &LayerRow, mode: Mode) -> Result<Arc<dyn Store>, Problem> {
        if row.in_place {
            let store = store::host::open_file(Path::new(&row.file), mode).map_err(|e| missing_layer(&e, row))?;
            if mode == Mode::Write {
                lock_patiently(&*store).map_err(|e| file_problem(&e))?;
            }
            return Ok(store);
        }
        let (folder, name) = self.place(row)?;
        if mode == Mode::Write && folder.links(&name).map_err(|e| missing_layer(&e, row))? > 1 {
            return Err(not_ours_alone(row));
        }
        folder.open(&name, mode).map_err(|e| missing_layer(&e, row))
    }

    /// Whether another machine has this layer's file, too: it has more names than ours. Then it is not written, only read and removed. (It can
    /// get one only from a request of ours, so while that is not under way this cannot come to be true.)
    pub fn is_shared(&self, row: &LayerRow) -> bool {
        let links = || -> store::Result<u64> {
            match row.file.split_once('/') {
                Some((folder, name)) if !row.in_place => self.folder.folder(folder)?.links(name),
                _ => Ok(1),
            }
        };
        // What cannot be looked at cannot be opened either.
        links().is_ok_and(|links| links > 1)
    }

    /// What is to be done about the layers that nothing names, leaving alone what another machine has, too.
    pub fn garbage(&self, machine: &Machine) -> Garbage {
        let found = garbage(machine);
        let ends: BTreeSet<LayerId> = found.fold.iter().flat_map(|fold| [fold.into, fold.child]).collect();
        let shared = ends.into_iter().filter(|id| self.is_shared_layer(machine, *id)).collect();
        found.but(&shared)
    }

    /// The first of its runs ([`Garbage::runs`]); empty, if there is none. The file system is asked of no other's files.
    pub fn first_run(&self, machine: &Machine) -> Vec<Fold> {
        let mut found = garbage(machine);
        let ours = |fold: &Fold| ![fold.into, fold.child].iter().any(|id| self.is_shared_layer(machine, *id));
        let first = found.fold.iter().position(ours).unwrap_or(found.fold.len());
        found.fold.drain(..first);
        found.runs().next().map(|run| run.iter().copied().take_while(ours).collect()).unwrap_or_default()
    }

    fn is_shared_layer(&self, machine: &Machine, id: LayerId) -> bool {
        machine.layers.get(&id).is_some_and(|row| self.is_shared(row))
    }

    /// Opens the layers from base to `leaf` for reading, and checks that each stands on the one below.
    pub fn open_chain(&self, machine: &Machine, leaf: LayerId) -> Result<Vec<Arc<dyn Layer>>, Problem> {
        self.open_chain_with(machine, leaf, |row| self.open_layer(row, Mode::Read))
    }

    /// The same; the leaf is what `open_leaf` makes of its row.
    pub fn open_chain_with(
        &self,
        machine: &Machine,
        leaf: LayerId,
        open_leaf: impl FnOnce(&LayerRow) -> Result<Arc<dyn Layer>, Problem>,
    ) -> Result<Vec<Arc<dyn Layer>>, Problem> {
        let mut open_leaf = Some(open_leaf);
        let mut layers: Vec<Arc<dyn Layer>> = Vec::new();
        for id in machine.chain(leaf) {
            let row =
                machine.layers.get(&id).ok_or_else(|| Problem::damaged(format!("layer {id} is not in the ledger")))?;
            let layer = match open_leaf.take_if(|_| id == leaf) {
                Some(open_leaf) => open_leaf(row)?,
                None => self.open_layer(row, Mode::Read)?,
            };
            if let Some(parent) = layers.last() {
                gate::check_link(layer.as_ref(), parent.as_ref()).map_err(|e| image_problem(&e))?;
            }
            layers.push(layer);
        }
        Ok(layers)
    }

    /// Removes files by their names relative to the machine's folder. What is gone already is no error.
    pub fn remove(&self, files: &[String]) -> Result<(), Problem> {
        for file in files {
            let Some((folder, name)) = file.split_once('/') else { continue };
            let folder = self.folder.folder(folder).map_err(|e| file_problem(&e))?;
            // With a handle that outlives the name nobody waits until a thousand pieces of a file are given back.
            let last = folder.open(name, Mode::Read);
            match folder.unlink(name) {
                Ok(()) => drop(last),
                Err(e) if e.kind == store::ErrorKind::NotFound => {}
                Err(e) => return Err(file_problem(&e)),
            }
        }
        self.sync_names()
    }

    /// Bytes that a layer's file occupies, and its record of hashes; 0 for what cannot be opened.
    pub fn allocated(&self, row: &LayerRow) -> u64 {
        self.find(row).and_then(|store| store.allocated()).unwrap_or(0) + self.allocated_by_record(row.id)
    }

    /// Whether a layer's file is not there.
    pub fn is_missing(&self, row: &LayerRow) -> bool {
        self.find(row).is_err_and(|error| error.kind == store::ErrorKind::NotFound)
    }

    pub(crate) fn find(&self, row: &LayerRow) -> store::Result<Arc<dyn Store>> {
        match row.file.split_once('/') {
            Some((folder, name)) if !row.in_place => self.folder.folder(folder)?.open(name, Mode::Read),
            _ => store::host::open_file(Path::new(&row.file), Mode::Read),
        }
    }

    /// Files in the layers' folders that no row names, and files among the records that are none, relative to the machine's folder.
    pub fn unknown(&self, machine: &Machine) -> Result<Vec<String>, Problem> {
        let known: BTreeSet<&str> = machine.layers.values().map(|row| row.file.as_str()).collect();
        let mut unknown = Vec::new();
        for folder in LAYER_FOLDERS {
            let names = self.folder.folder(folder).and_then(|f| f.list()).map_err(|e| file_problem(&e))?;
            unknown.extend(names.into_iter().map(|n| format!("{folder}/{n}")).filter(|f| !known.contains(f.as_str())));
        }
        unknown.extend(self.unknown_records()?);
        Ok(unknown)
    }

    /// The files in the layers' folders, whoever knows them, relative to the machine's folder.
    pub(crate) fn names(&self) -> Result<BTreeSet<String>, Problem> {
        let mut all = BTreeSet::new();
        for folder in LAYER_FOLDERS {
            let names = self.folder.folder(folder).and_then(|f| f.list()).map_err(|e| file_problem(&e))?;
            all.extend(names.into_iter().map(|name| format!("{folder}/{name}")));
        }
        Ok(all)
    }

    /// Bytes of this machine's files that other machines have, too.
    pub fn shared_bytes(&self, machine: &Machine) -> u64 {
        let folders = LAYER_FOLDERS.map(|name| (name, self.folder.folder(name).ok()));
        let is_shared = |row: &&LayerRow| {
            let place = row.file.split_once('/').filter(|_| !row.in_place);
            place.is_some_and(|(folder, name)| {
                let folder = folders.iter().find(|(known, _)| *known == folder).and_then(|(_, folder)| folder.as_ref());
                folder.is_some_and(|folder| folder.links(name).is_ok_and(|links| links > 1))
            })
        };
        let bytes = |row: &LayerRow| self.find(row).and_then(|store| store.allocated()).unwrap_or(0);
        machine.layers.values().filter(is_shared).map(bytes).sum()
    }

    /// Whether a file here can share the places of another one.
    pub(crate) fn can_reflink(&self) -> bool {
        const PROBE: [&str; 2] = ["reflink.probe", "reflink.probe.copy"];
        let forget = || PROBE.iter().for_each(|name| drop(self.folder.unlink(name)));
        forget();
        let probe = || -> store::Result<bool> {
            let [from, to] = PROBE.map(|name| self.folder.create(name));
            let from = from?;
            from.write_at(&[1; 4096], 0)?;
            to?.reflink(&*from)
        };
        let can = probe().unwrap_or(false);
        forget();
        can
    }

    /// Removes what is started from that no configuration names any more.
    pub(crate) fn tidy_boot(&self, machine: &Machine) {
        let thrown_away = machine.trash.values().flat_map(|trash| &trash.snapshots);
        let configs = machine.snapshots.values().chain(thrown_away).map(|snapshot| &snapshot.config);
        let configs = configs.chain(std::iter::once(&machine.now.config));
        let needed: BTreeSet<&str> = configs.flat_map(Config::boot_files).collect();
        let Ok(boot) = self.folder.folder("boot") else { return };
        for name in boot.list().unwrap_or_default().iter().filter(|name| !needed.contains(name.as_str())) {
            // One that stays only takes room.
            let _ = boot.unlink(name);
        }
    }

    /// Puts a copy of its own in the place of each kernel that another machine has, too.
    pub(crate) fn own_boot(&self) -> store::Result<()> {
        const COPY: &str = "copy.new";
        let boot = self.folder.folder("boot")?;
        for name in boot.list()?.iter().filter(|name| boot.links(name).is_ok_and(|links| links > 1)) {
            let _ = boot.unlink(COPY);
            let copy = boot.create(COPY)?;
            copy_store(&*boot.open(name, Mode::Read)?, &*copy, &mut |_| true)?;
            copy.sync()?;
            boot.rename(COPY, name)?;
        }
        boot.sync()
    }

    /// Bytes that are free where a layer's file lies; `u64::MAX` if that cannot be told.
    pub(crate) fn room(&self, row: &LayerRow) -> u64 {
        let folder = || -> store::Result<u64> {
            match row.in_place {
                true => store::host::HostFolder::holding(Path::new(&row.file))?.0.room(),
                false => self.folder.room(),
            }
        };
        folder().unwrap_or(u64::MAX)
    }

    pub(crate) fn place(&self, row: &LayerRow) -> Result<(Arc<dyn Folder>, String), Problem> {
        let (folder, name) = row
            .file
            .split_once('/')
            .filter(|(folder, _)| LAYER_FOLDERS.contains(folder))
            .ok_or_else(|| Problem::damaged(format!("the ledger names a file outside its folder: {}", row.file)))?;
        Ok((self.folder.folder(folder).map_err(|e| file_problem(&e))?, name.to_owned()))
    }
}

/// Makes an empty file one of the content of another, holes included; by sharing its places where the file system can do that. Not durable
/// yet. `progress` is told bytes copied since the last time; if it says `false`, this stops, and says so.
pub(crate) fn copy_store(
    from: &dyn Store,
    to: &dyn Store,
    progress: &mut dyn FnMut(u64) -> bool,
) -> store::Result<bool> {
    if to.reflink(from)? {
        return Ok(true);
    }
    to.set_len(from.len()?)?;
    let (mut at, mut buffer) = (0, vec![0; 1 << 20]);
    while let Some((start, end)) = from.data(at)? {
        at = start;
        while at < end {
            let piece = &mut buffer[..(end - at).min(1 << 20) as usize];
            from.read_at(piece, at)?;
            to.write_at(piece, at)?;
            at += piece.len() as u64;
            if !progress(piece.len() as u64) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Locks a file that is about to be written. A handle of our own may be on its way out.
fn lock_patiently(store: &dyn Store) -> store::Result<()> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match store.lock(Lock::Exclusive) {
            Err(e) if e.kind == store::ErrorKind::Locked && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            locked => return locked,
        }
    }
}

/// What a new layer stands on.
#[derive(Debug)]
pub struct Parent<'a> {
    /// The layer, whose id will not change any more.
    pub layer: &'a dyn Layer,
    /// Its row.
    pub row: &'a LayerRow,
}

impl Parent<'_> {
    /// What the child says of it: its id, and its name where it lies beside the child.
    fn link_vhdx(&self) -> Result<vhdx::Parent, Problem> {
        vhdx::Parent::of(self.layer, name_beside(self.row)).map_err(|e| image_problem(&e))
    }

    fn link_vhd(&self) -> Result<vhd::Parent, Problem> {
        vhd::Parent::of(self.layer, name_beside(self.row)).map_err(|e| image_problem(&e))
    }
}

fn create_vhd(store: Arc<dyn Store>, size: u64, parent: Option<&Parent<'_>>) -> Result<Arc<dyn Layer>, Problem> {
    let options = vhd::Options {
        kind: if parent.is_some() { Kind::Differencing } else { Kind::Dynamic },
        parent: parent.map(Parent::link_vhd).transpose()?,
        ..vhd::Options::dynamic(size)
    };
    let layer = vhd::create(store, &options).map_err(|e| image_problem(&e))?;
    Ok(layer)
}

/// The name under which a layer's file lies beside those that stand on it; `None` for one that was taken in place, elsewhere.
pub(crate) fn name_beside(row: &LayerRow) -> Option<&str> {
    row.file.split_once('/').map(|(_, name)| name).filter(|_| !row.in_place)
}

/// A failed file operation, as a problem.
pub fn file_problem(error: &store::Error) -> Problem {
    if error.kind == store::ErrorKind::Locked {
        return mark::in_use(Path::new(&error.name));
    }
    let kind = match error.kind {
        store::ErrorKind::NotFound => ProblemKind::NotFound,
        store::ErrorKind::PastEnd | store::ErrorKind::WrongType => ProblemKind::Damaged,
        _ => ProblemKind::Failed,
    };
    let problem = Problem::new(kind, error.to_string());
    if error.kind == store::ErrorKind::NoSpace {
        problem.hint("free some space on that file system, then try again")
    } else {
        problem
    }
}

fn not_ours_alone(row: &LayerRow) -> Problem {
    Problem::refused(format!("{} has another name elsewhere: it is shared, and not written", row.file))
        .hint("tenby vm detach NAME      (gives the machine a copy of its own)")
}

fn missing_layer(error: &store::Error, row: &LayerRow) -> Problem {
    match error.kind {
        store::ErrorKind::NotFound => Problem::damaged(format!("a file of this machine is missing: {}", row.file)),
        _ => file_problem(error),
    }
}

/// A qcow2 that was not copied, as a problem.
pub fn qcow2_problem(error: &qcow2::Error) -> Problem {
    match error {
        qcow2::Error::NamesOthers { file, .. } => Problem::damaged(error.to_string()).hint(format!(
            "qemu-img convert -O qcow2 {} whole.qcow2      (if you trust it: one file of all)",
            file.display()
        )),
        qcow2::Error::Damaged { .. } => Problem::damaged(error.to_string()),
        qcow2::Error::NotInstalled => Problem::failed(error.to_string()).hint("sudo apt install qemu-utils"),
        qcow2::Error::Image(error) => image_problem(error),
        qcow2::Error::Serve(export::Error { source, .. }) => Problem::failed(format!("{error}: {source}")),
        qcow2::Error::Tool(_) | qcow2::Error::System(..) => Problem::failed(error.to_string()),
    }
}

impl From<image::Error> for Problem {
    fn from(error: image::Error) -> Self {
        image_problem(&error)
    }
}

/// A failed operation on an image, as a problem.
pub fn image_problem(error: &image::Error) -> Problem {
    if error.kind == image::ErrorKind::Locked {
        return mark::in_use(Path::new(&error.file));
    }
    let kind = match error.kind {
        image::ErrorKind::Damaged
        | image::ErrorKind::Parent
        | image::ErrorKind::Unsupported
        | image::ErrorKind::Unsigned => ProblemKind::Damaged,
        image::ErrorKind::Invalid => ProblemKind::Usage,
        image::ErrorKind::NotFound => ProblemKind::NotFound,
        _ if error.source.as_ref().is_some_and(|cause| cause.kind == store::ErrorKind::WrongType) => {
            ProblemKind::Damaged
        }
        _ => ProblemKind::Failed,
    };
    let cause = error.source.as_ref().map(|cause| format!(": {}", cause.detail)).unwrap_or_default();
    let problem = Problem::new(kind, format!("{error}{cause}"));
    match error.kind {
        image::ErrorKind::NoSpace => problem.hint("free some space on that file system, then try again"),
        _ => problem,
    }
}
