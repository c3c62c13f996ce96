//! The records of hashes of a machine's sealed layers (see [`image::hashes`]): a small file each, named after its layer.
//!
//! ```text
//!   hashes/<layer>        how the layer reads through its chain, whatever file it lives in: a fold leaves it right. Of a memory layer only
//!                         its own pages, made as they are written
//!          <layer>.new    while it is being written
//! ```
//!
//! No row names them and no journal: a record is made from its layer at any time, and is good for nothing without it. One that is damaged, or
//! whose layer has no row any more, is nobody's loss; the worker removes it or makes it anew ([`crate::hashing`]).

use crate::files::{Files, file_problem, image_problem};
use crate::garbage::from_the_base;
use crate::job::Cancel;
use crate::request::{Problem, ProblemKind};
use crate::tree::{LayerId, LayerKind, LayerRow, Machine, SnapshotState};
use image::hashes::{Expected, Key, Pages, Record};
use std::collections::BTreeSet;
use std::sync::Arc;
use store::{Folder, Mode, Store};
use uuid::Uuid;

/// The folder of the records.
const FOLDER: &str = "hashes";
/// How a record's name ends while it is being written.
const NEW: &str = ".new";

/// What is recorded of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recorded<R = Record> {
    /// Nothing yet.
    Nothing,
    /// There is a record, which is no use: why.
    Damaged(String),
    /// This.
    Record(R),
}

impl<R> Recorded<R> {
    /// The record, if there is one.
    pub fn record(self) -> Option<R> {
        match self {
            Self::Record(record) => Some(record),
            Self::Nothing | Self::Damaged(_) => None,
        }
    }
}

impl Files {
    /// What is recorded of a disk's layer.
    pub fn record(&self, id: LayerId) -> Recorded {
        self.recorded(id, Record::read, Record::layer)
    }

    /// What is recorded of a memory layer.
    pub fn pages(&self, id: LayerId) -> Recorded<Pages> {
        self.recorded(id, Pages::read, Pages::layer)
    }

    fn recorded<R>(
        &self,
        id: LayerId,
        read: impl FnOnce(&dyn Store) -> image::Result<R>,
        layer: impl FnOnce(&R) -> Uuid,
    ) -> Recorded<R> {
        let store = match self.open_record(id) {
            Ok(store) => store,
            Err(error) if error.kind == store::ErrorKind::NotFound => return Recorded::Nothing,
            Err(error) => return Recorded::Damaged(error.to_string()),
        };
        match read(&*store) {
            Ok(record) if layer(&record) == id.0 => Recorded::Record(record),
            Ok(_) => Recorded::Damaged("it is another layer's".to_owned()),
            Err(error) => Recorded::Damaged(error.message),
        }
    }

    fn open_record(&self, id: LayerId) -> store::Result<Arc<dyn Store>> {
        self.folder().folder(FOLDER)?.open(&id.to_string(), Mode::Read)
    }

    /// The key of the hashes of a machine's memory. All of its layers have the same one: hashes of one hold where it was merged into another.
    pub(crate) fn key_of_pages(&self, machine: &Machine) -> Key {
        let mut memory = machine.layers.values().filter(|row| row.kind == LayerKind::Memory);
        let key = |row: &LayerRow| Pages::read_key(&*self.open_record(row.id).ok()?).ok();
        memory.find_map(key).unwrap_or_else(Key::new)
    }

    /// What a memory is to read as: `layers`, from the top downwards, each with the one that it stands on.
    pub fn expected(&self, layers: &[(LayerId, Option<LayerId>)]) -> Expected {
        let mut expected = Expected::default();
        for (id, below) in layers {
            let Some(pages) = self.pages(*id).record() else { break };
            if !expected.add(pages, below.map(|id| id.0)) {
                break;
            }
        }
        expected
    }

    /// Puts a record in the place of the one that is there, if any. Whole and durable, or not at all; that it is there may be forgotten by a
    /// power cut.
    pub(crate) fn write_record(&self, record: &Record, at: impl FnOnce()) -> Result<(), Problem> {
        self.put_record(record.layer(), |store| Ok(store.write_at(&record.encode(), 0)?), at)
    }

    /// The same of a memory layer.
    pub(crate) fn write_pages(&self, pages: &Pages, at: impl FnOnce()) -> Result<(), Problem> {
        self.put_record(pages.layer(), |store| pages.write(store), at)
    }

    fn put_record(
        &self,
        layer: Uuid,
        fill: impl FnOnce(&dyn Store) -> image::Result<()>,
        at: impl FnOnce(),
    ) -> Result<(), Problem> {
        let folder = self.records_folder().map_err(|e| file_problem(&e))?;
        let name = LayerId(layer).to_string();
        let new = format!("{name}{NEW}");
        let write = || {
            match folder.unlink(&new) {
                Err(error) if error.kind != store::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            let store = folder.create(&new)?;
            fill(&*store)?;
            store.sync()?;
            at();
            Ok::<_, image::Error>(folder.rename(&new, &name)?)
        };
        let written = write();
        if written.is_err() {
            // If it stays, the next tidying takes it.
            let _ = folder.unlink(&new);
        }
        written.map_err(|e| image_problem(&e))
    }

    /// What is recorded of a layer is not to be relied on.
    pub(crate) fn forget_record(&self, id: LayerId) {
        // If it stays, a deep check says so.
        let _ = self.folder().folder(FOLDER).and_then(|folder| folder.unlink(&id.to_string()));
    }

    fn records_folder(&self) -> store::Result<Arc<dyn Folder>> {
        match self.folder().folder(FOLDER) {
            Err(error) if error.kind == store::ErrorKind::NotFound => self.folder().create_folder(FOLDER),
            folder => folder,
        }
    }

    /// Removes records that nobody needs, for their layers are gone, and what was left half-written. Nobody else may write records meanwhile.
    pub fn tidy_records(&self, machine: &Machine) -> Result<(), Problem> {
        let merged = self.merged_memories(machine);
        for name in self.record_names()? {
            let is_needed = |id: &LayerId| machine.layers.contains_key(id) || merged.contains(id);
            if owner(&name).is_some_and(|(id, whole)| !(whole && is_needed(&id))) {
                let removed = self.folder().folder(FOLDER).and_then(|folder| folder.unlink(&name));
                removed.map_err(|e| file_problem(&e))?;
            }
        }
        Ok(())
    }

    /// The memories that are gone, for they were merged into others, whose records do not say yet what theirs do.
    fn merged_memories(&self, machine: &Machine) -> BTreeSet<LayerId> {
        let below = |id| Pages::read_below(&*self.open_record(id).ok()?).ok()?.map(LayerId);
        let mut merged = BTreeSet::new();
        for row in machine.layers.values().filter(|row| row.kind == LayerKind::Memory) {
            let mut next = below(row.id);
            while let Some(id) = next.filter(|id| !machine.layers.contains_key(id) && merged.insert(*id)) {
                next = below(id);
            }
        }
        merged
    }

    /// Files among the records that are none, relative to the machine's folder.
    pub(crate) fn unknown_records(&self) -> Result<impl Iterator<Item = String>, Problem> {
        Ok(self.record_names()?.into_iter().filter(|name| owner(name).is_none()).map(|name| format!("{FOLDER}/{name}")))
    }

    fn record_names(&self) -> Result<Vec<String>, Problem> {
        match self.folder().folder(FOLDER).and_then(|folder| folder.list()) {
            // None was ever made.
            Err(error) if error.kind == store::ErrorKind::NotFound => Ok(Vec::new()),
            names => names.map_err(|e| file_problem(&e)),
        }
    }

    /// Bytes that the record of a layer occupies.
    pub(crate) fn allocated_by_record(&self, id: LayerId) -> u64 {
        self.open_record(id).and_then(|store| store.allocated()).unwrap_or(0)
    }
}

/// Whose record has this name, and whether it is whole. `None` for files that are not ours.
fn owner(name: &str) -> Option<(LayerId, bool)> {
    let (id, whole) = name.strip_suffix(NEW).map_or((name, true), |id| (id, false));
    let id = LayerId(Uuid::try_parse(id).ok()?);
    // The id as we write it, and no other way to write it.
    (name.strip_prefix(&id.to_string())? == if whole { "" } else { NEW }).then_some((id, whole))
}

/// The layers whose content stays as it is as long as they are there, each after the one that it stands on: all but Now's leaves, what is
/// still being written for a snapshot, and what is on its way out (a fold may have begun to change it).
pub fn sealed<'a>(machine: &'a Machine, files: &Files) -> Vec<&'a LayerRow> {
    let out = files.garbage(machine);
    let leaves = machine.now.disks.values();
    let creating = machine.snapshots.values().filter(|snapshot| snapshot.state == SnapshotState::Creating);
    let written = creating.flat_map(|snapshot| snapshot.disks.values().chain(&snapshot.memory));
    let open: BTreeSet<&LayerId> =
        leaves.chain(written).chain(&out.remove).chain(out.fold.iter().map(|fold| &fold.into)).collect();
    from_the_base(machine).iter().filter(|id| !open.contains(id)).filter_map(|id| machine.layers.get(id)).collect()
}

/// A layer and those that it stands on, from the top downwards, each with the one below it.
pub fn downwards(machine: &Machine, top: LayerId) -> Vec<(LayerId, Option<LayerId>)> {
    let mut ids = machine.chain(top);
    ids.reverse();
    ids.into_iter().map(|id| (id, machine.layers.get(&id).and_then(|row| row.parent))).collect()
}

/// The layers of chains that are looked at one after the other: what the next one shares with the last is not opened again.
#[derive(Debug)]
pub(crate) struct Opened<'a> {
    files: &'a Files,
    machine: &'a Machine,
    layers: Vec<(LayerId, Arc<dyn image::Layer>)>,
    stop: Option<&'a Cancel>,
}

impl<'a> Opened<'a> {
    pub(crate) fn new(files: &'a Files, machine: &'a Machine) -> Self {
        Self { files, machine, layers: Vec::new(), stop: None }
    }

    /// The same, which opens no more once it is to stop: a chain may have thousands of layers.
    pub(crate) fn until(self, stop: &'a Cancel) -> Self {
        Self { stop: Some(stop), ..self }
    }

    /// The layers up to this one, base first, open for reading.
    pub(crate) fn chain(&mut self, top: LayerId) -> Result<Vec<Arc<dyn image::Layer>>, Problem> {
        let ids = self.machine.chain(top);
        let shared = self.layers.iter().zip(&ids).take_while(|((open, _), id)| open == *id).count();
        self.layers.truncate(shared);
        for id in &ids[shared..] {
            if self.stop.is_some_and(Cancel::asked) {
                return Err(Problem::new(ProblemKind::Cancelled, "stopped"));
            }
            let row = self.machine.layers.get(id);
            let row = row.ok_or_else(|| Problem::damaged(format!("layer {id} is not in the ledger")))?;
            let layer = self.files.open_layer(row, Mode::Read)?;
            if let Some((_, parent)) = self.layers.last() {
                image::gate::check_link(&*layer, &**parent)?;
            }
            self.layers.push((*id, layer));
        }
        Ok(self.layers.iter().map(|(_, layer)| Arc::clone(layer)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_we_write() {
        let id = LayerId(Uuid::from_u128(0xabc));
        let name = id.to_string();
        assert_eq!(owner(&name), Some((id, true)));
        assert_eq!(owner(&format!("{name}.new")), Some((id, false)));
        let others = [name.to_uppercase(), id.0.hyphenated().to_string(), format!("{name}.new.new"), "x".to_owned()];
        assert!(others.iter().all(|name| owner(name).is_none()), "{others:?}");
    }
}
