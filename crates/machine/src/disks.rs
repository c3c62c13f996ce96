//! A machine's disks while they are written: a chain for each, and the handles of its layers.

use crate::carry::{Carries, Kept};
use crate::files::{Files, image_problem};
use crate::garbage::Fold;
use crate::request::Problem;
use crate::tree::{DiskId, LayerId, LayerRow, Machine};
use image::merge::Direction;
use image::{Access, Chain, Layer};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use store::Mode;

/// The disks of one machine, open for writing.
#[derive(Debug)]
pub struct Disks {
    files: Files,
    carries: Carries,
    open: BTreeMap<DiskId, Open>,
}

#[derive(Debug)]
struct Open {
    chain: Arc<Chain>,
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
pub struct Leaf {
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
    /// Opens the disks of Now: the leaves for writing.
    pub fn open(files: &Files, carries: &Carries, machine: &Machine) -> Result<Self, Problem> {
        let mut disks = Self { files: files.clone(), carries: carries.clone(), open: BTreeMap::new() };
        for (disk, leaf) in &machine.now.disks {
            let mut kept = None;
            let layers = files.open_chain_with(machine, *leaf, |row| {
                let leaf = Leaf::open(files, carries, row)?;
                kept = leaf.kept;
                Ok(leaf.layer)
            })?;
            let ids = machine.chain(*leaf);
            let mut handles: Vec<_> =
                ids.iter().zip(&layers).map(|(id, layer)| Handle::read(*id, Arc::clone(layer))).collect();
            if let Some(leaf) = handles.last_mut() {
                (leaf.mode, leaf.kept) = (Mode::Write, kept);
            }
            // QEMU outlives this worker, and does not send again what was acknowledged.
            let chain = Chain::new(layers, Access::Write).map_err(|e| image_problem(&e))?.surviving();
            disks.open.insert(disk.clone(), Open { chain: Arc::new(chain), handles });
        }
        Ok(disks)
    }

    /// What is under way is finished, everything is flushed, the files are left clean. Fails if a disk did not take its last writes.
    pub fn close(self) -> Result<(), Problem> {
        let mut closed = Ok(());
        for open in self.open.into_values() {
            match open.chain.close() {
                Ok(()) => open.handles.into_iter().filter_map(|handle| handle.kept).for_each(Kept::forget),
                Err(error) => closed = closed.and(Err(image_problem(&error))),
            }
        }
        closed
    }

    /// The disks' chains.
    pub fn chains(&self) -> impl Iterator<Item = (&DiskId, &Arc<Chain>)> {
        self.open.iter().map(|(id, open)| (id, &open.chain))
    }

    /// The chain of a disk.
    pub fn chain(&self, disk: &DiskId) -> Option<&Arc<Chain>> {
        self.open.get(disk).map(|open| &open.chain)
    }

    /// The chain that has this layer in it.
    pub(crate) fn chain_of(&self, machine: &Machine, layer: LayerId) -> Option<Arc<Chain>> {
        let (disk, _) = machine.now.disks.iter().find(|(_, leaf)| machine.chain(**leaf).contains(&layer))?;
        self.chain(disk).cloned()
    }

    /// The layers that are open for writing.
    pub fn written(&self) -> BTreeSet<LayerId> {
        let handles = self.open.values().flat_map(|open| &open.handles);
        handles.filter(|handle| handle.mode == Mode::Write).map(|handle| handle.id).collect()
    }

    /// The leaf of a disk, as it is open: what a new leaf stands on.
    pub(crate) fn leaf(&self, disk: &DiskId) -> Option<Arc<dyn Layer>> {
        self.open.get(disk)?.handles.last().map(|handle| Arc::clone(&handle.layer))
    }

    /// A disk's chain has a new leaf.
    pub(crate) fn pushed(&mut self, disk: &DiskId, id: LayerId, leaf: Leaf) {
        if let Some(open) = self.open.get_mut(disk) {
            open.handles.push(Handle::write(id, leaf));
        }
    }

    /// Seals the layers below the leaves that are still open for writing: flushed, their files left clean, then only read.
    pub(crate) fn seal(&mut self, machine: &Machine) -> Result<(), Problem> {
        for open in self.open.values_mut() {
            let below = open.handles.len().saturating_sub(1);
            for handle in open.handles[..below].iter_mut().filter(|handle| handle.mode == Mode::Write) {
                let Some(row) = machine.layers.get(&handle.id) else { continue };
                handle.layer.close().map_err(|e| image_problem(&e))?;
                let layer = self.files.open_layer(row, Mode::Read)?;
                open.chain.replace(&handle.layer, Arc::clone(&layer)).map_err(|e| image_problem(&e))?;
                let sealed = std::mem::replace(handle, Handle::read(handle.id, layer));
                sealed.kept.into_iter().for_each(Kept::forget);
            }
        }
        Ok(())
    }

    /// A layer of an open chain, open for writing: reopened and put in its place if it is not. With `kept`, what it comes to hold outlives this
    /// process.
    fn writable(&mut self, row: &LayerRow, kept: bool) -> Result<Arc<dyn Layer>, Problem> {
        let find = |open: &mut Open| open.handles.iter().position(|handle| handle.id == row.id);
        let open = self.open.values_mut().find_map(|open| find(open).map(|at| (open, at)));
        let Some((open, at)) = open else {
            return Err(Problem::failed(format!("{} is not being served", row.file)));
        };
        if open.handles[at].mode == Mode::Read {
            let leaf = match kept {
                true => Leaf::open(&self.files, &self.carries, row)?,
                false => Leaf { layer: self.files.open_layer(row, Mode::Write)?, kept: None },
            };
            open.chain.replace(&open.handles[at].layer, Arc::clone(&leaf.layer)).map_err(|e| image_problem(&e))?;
            open.handles[at] = Handle::write(row.id, leaf);
        }
        Ok(Arc::clone(&open.handles[at].layer))
    }

    /// A sealed layer's file has been copied, and the layer lives in the copy from now on.
    pub(crate) fn moved(&mut self, row: &LayerRow) -> Result<(), Problem> {
        for open in self.open.values_mut() {
            for handle in open.handles.iter_mut().filter(|handle| handle.id == row.id) {
                let layer = self.files.open_layer(row, Mode::Read)?;
                open.chain.replace(&handle.layer, Arc::clone(&layer)).map_err(|e| image_problem(&e))?;
                *handle = Handle::read(handle.id, layer);
            }
        }
        Ok(())
    }

    /// A layer as it is open.
    fn layer(&self, row: &LayerRow) -> Result<Arc<dyn Layer>, Problem> {
        let mut handles = self.open.values().flat_map(|open| &open.handles);
        let handle = handles.find(|handle| handle.id == row.id);
        let handle = handle.ok_or_else(|| Problem::failed(format!("{} is not being served", row.file)))?;
        Ok(Arc::clone(&handle.layer))
    }

    /// A layer's handle: as it is open here, reopened for writing if need be; `None` if no chain has it.
    pub(crate) fn handle(&mut self, row: &LayerRow, mode: Mode) -> Option<Result<Arc<dyn Layer>, Problem>> {
        let has = |open: &Open| open.handles.iter().any(|handle| handle.id == row.id);
        let open = |disks: &mut Self| match mode {
            Mode::Write => disks.writable(row, false),
            Mode::Read => disks.layer(row),
        };
        self.open.values().any(has).then(|| open(self))
    }

    /// The handle of a layer that others fold into, if a chain has it.
    pub(crate) fn filled(&mut self, row: &LayerRow) -> Option<Result<Arc<dyn Layer>, Problem>> {
        let has = |open: &Open| open.handles.iter().any(|handle| handle.id == row.id);
        self.open.values().any(has).then(|| self.writable(row, true))
    }

    /// Two layers are one now: down, in `into`'s file, which has taken the child's id; up, in the child's.
    pub(crate) fn folded(&mut self, Fold { into, child }: Fold, direction: Direction) {
        let (stays, goes) = if direction == Direction::Down { (into, child) } else { (child, into) };
        for handles in self.open.values_mut().map(|open| &mut open.handles) {
            // A file that goes takes with it what was kept of it.
            let gone = handles.extract_if(.., |handle| handle.id == goes);
            gone.filter_map(|handle| handle.kept).for_each(Kept::forget);
            handles.iter_mut().filter(|handle| handle.id == stays).for_each(|handle| handle.id = child);
        }
    }
}
