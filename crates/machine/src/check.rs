//! The invariants of a machine's rows. [`crate::ledger`] commits no rows that break one, and opens none.

use crate::tree::{Config, DiskId, LayerId, LayerKind, LayerRow, Machine, State};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::{self, Display};
use std::hash::Hash;

impl Machine {
    /// Checks that the rows are sound:
    ///
    /// - every parent exists, and nothing stands on itself; a layer stands on one of its kind;
    /// - no two layers share a file;
    /// - what a snapshot or Now names exists, is of the right kind, and matches the disks of its configuration;
    /// - what can be taken back is as sound, and no snapshot is there twice;
    /// - Now's leaves are Now's alone: no layer stands on one, no snapshot or trash names one, no two disks share one. (Now writes
    ///   them, and nothing else may ever change.)
    pub fn check(&self) -> Result<(), String> {
        self.check_snapshots()?;
        self.check_layers()?;
        for (id, snapshot) in &self.snapshots {
            self.check_names(format_args!("snapshot {id}"), &snapshot.config, &snapshot.disks, snapshot.memory)?;
        }
        self.check_names(format_args!("now"), &self.now.config, &self.now.disks, self.now.memory)?;
        let is_none = |id: LayerId| self.layers.get(&id).is_none_or(|row| row.kind != LayerKind::Memory);
        if let Some(id) = self.now.restoring.filter(|id| is_none(*id)) {
            return Err(format!("now is being restored from {id}, which is no memory"));
        }
        self.check_trash()?;
        self.check_leaves()?;
        if self.now.state == State::Saved && self.now.memory.is_none() {
            return Err("now is saved without a memory".to_owned());
        }
        Ok(())
    }

    fn check_snapshots(&self) -> Result<(), String> {
        check_keys("snapshot", self.snapshots.iter().map(|(key, row)| (*key, row.id)))?;
        if let Some(parent) = self.now.parent.filter(|id| !self.snapshots.contains_key(id)) {
            return Err(format!("now stands on snapshot {parent}, which is not there"));
        }
        check_forest("snapshot", self.snapshots.iter().map(|(id, row)| (*id, row.parent)))
    }

    fn check_layers(&self) -> Result<(), String> {
        check_keys("layer", self.layers.iter().map(|(key, row)| (*key, row.id)))?;
        check_forest("layer", self.layers.iter().map(|(id, row)| (*id, row.parent)))?;
        let mut files = HashSet::new();
        for LayerRow { id, kind, file, parent, .. } in self.layers.values() {
            if !files.insert(file) {
                return Err(format!("two layers share the file {file}"));
            }
            if let Some(parent) = parent.filter(|parent| self.layers[parent].kind != *kind) {
                return Err(format!("layer {id} stands on layer {parent} of another kind"));
            }
        }
        Ok(())
    }

    fn check_names(
        &self,
        what: fmt::Arguments<'_>,
        config: &Config,
        disks: &BTreeMap<DiskId, LayerId>,
        memory: Option<LayerId>,
    ) -> Result<(), String> {
        let guests: BTreeSet<&DiskId> = config.disks.iter().map(|disk| &disk.id).collect();
        if guests.len() != config.disks.len() || guests.contains(&DiskId::firmware()) {
            return Err(format!("{what} has two disks of one id"));
        }
        if !config.disk_ids().iter().eq(disks.keys()) {
            return Err(format!("{what} has other disks than its configuration"));
        }
        let disks = disks.values().map(|id| (*id, LayerKind::Disk));
        for (id, kind) in disks.chain(memory.map(|id| (id, LayerKind::Memory))) {
            match self.layers.get(&id) {
                None => return Err(format!("{what} names layer {id}, which is not there")),
                Some(row) if row.kind != kind => {
                    return Err(format!("{what} names layer {id}, which is of another kind"));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn check_leaves(&self) -> Result<(), String> {
        let mut leaves = BTreeSet::new();
        for (disk, leaf) in &self.now.disks {
            if !leaves.insert(leaf) {
                return Err(format!("{disk} shares its leaf {leaf} with another disk"));
            }
        }
        if let Some(row) = self.layers.values().find(|row| row.parent.is_some_and(|parent| leaves.contains(&parent))) {
            return Err(format!("layer {} stands on a leaf of now", row.id));
        }
        let shared = |snapshot: &&crate::tree::Snapshot| snapshot.disks.values().any(|layer| leaves.contains(layer));
        if let Some(snapshot) = self.snapshots.values().find(shared) {
            return Err(format!("snapshot {} names a leaf of now", snapshot.id));
        }
        let kept = |trash: &&crate::trash::Trash| trash.layers().any(|layer| leaves.contains(&layer));
        if let Some(trash) = self.trash.values().find(kept) {
            return Err(format!("trash {} names a leaf of now", trash.id));
        }
        Ok(())
    }

    fn check_trash(&self) -> Result<(), String> {
        check_keys("trash", self.trash.iter().map(|(key, row)| (*key, row.id)))?;
        let mut seen: BTreeSet<_> = self.snapshots.keys().collect();
        for (id, trash) in &self.trash {
            for snapshot in &trash.snapshots {
                if !seen.insert(&snapshot.id) {
                    return Err(format!("snapshot {} is there twice, once in trash {id}", snapshot.id));
                }
                self.check_names(
                    format_args!("snapshot {} of trash {id}", snapshot.id),
                    &snapshot.config,
                    &snapshot.disks,
                    snapshot.memory,
                )?;
            }
            if let Some(layer) = trash.layers().find(|layer| !self.layers.contains_key(layer)) {
                return Err(format!("trash {id} names layer {layer}, which is not there"));
            }
        }
        Ok(())
    }
}

fn check_keys<K: Eq + Display>(what: &str, mut rows: impl Iterator<Item = (K, K)>) -> Result<(), String> {
    match rows.find(|(key, id)| key != id) {
        Some((key, id)) => Err(format!("{what} {id} is filed under {key}")),
        None => Ok(()),
    }
}

/// Every parent exists, and every row hangs on a root: a circle hangs on none.
fn check_forest<K>(what: &str, rows: impl Iterator<Item = (K, Option<K>)>) -> Result<(), String>
where
    K: Eq + Hash + Copy + Display,
{
    let parents: HashMap<K, Option<K>> = rows.collect();
    let mut rooted: HashSet<K> = HashSet::with_capacity(parents.len());
    for id in parents.keys() {
        let mut path = Vec::new();
        let mut next = Some(*id);
        while let Some(id) = next.filter(|id| !rooted.contains(id)) {
            let Some(parent) = parents.get(&id) else {
                return Err(format!("a {what} stands on {what} {id}, which is not there"));
            };
            path.push(id);
            if path.len() > parents.len() {
                return Err(format!("{what} {id} stands on itself"));
            }
            next = *parent;
        }
        rooted.extend(path);
    }
    Ok(())
}
