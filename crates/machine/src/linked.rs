//! A machine that is made from another one's snapshot: rows of its own, and the sealed files of the other under one more name.
//!
//! ```text
//!   the one:    base ◄── Monday ◄── its leaf        base and Monday are one file each, with two names: as long as that is so nobody
//!                 ║        ║                        writes to them ([`Files::is_shared`]); each of the two removes its own name
//!   the other:  base ◄── Monday ◄── a leaf of its own
//! ```
//!
//! The one's worker makes the names, as one of its requests: so none of these files is just being merged. A request that was cut off in the
//! middle of a merge may have left a file half-changed; read through what stands on it, it reads the same, and stays as it is from now on.
//!
//! The layers get fresh ids, for both machines may have the same file twice in the course of time. The files keep their names where they can:
//! other tools find a parent by its name.

use crate::files::{Files, copy_store, file_problem, image_problem};
use crate::keeper::Keeper;
use crate::label::label_new;
use crate::ledger::Ledger;
use crate::ops::snapshot::make_leaf;
use crate::request::{Problem, ProblemKind};
use crate::root::mac_of;
use crate::table::Table;
use crate::tree::{
    Borrowed, Config, LayerId, LayerKind, LayerRow, Machine, MachineId, NetMode, Now, Policy, Snapshot, State,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use store::{Folder, Mode};

/// Told how many bytes of how many are copied; `false` stops.
type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// Who the new machine is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Named {
    /// Its id.
    pub id: MachineId,
    /// Its name.
    pub name: String,
}

/// A machine to be made from a snapshot.
#[derive(Debug, Clone)]
pub struct Linked {
    /// Its rows. Now has no leaves yet: it holds the snapshot's own layers.
    pub machine: Machine,
    /// Each layer's row in the machine that it comes from, and in the new one; base first.
    pub layers: Vec<(LayerRow, LayerRow)>,
}

impl Machine {
    /// A machine of its own from one of this one's snapshots, with its memory if that is wanted and there is any. Pure.
    pub fn linked(&self, snapshot: &Snapshot, new: &Named, note: &str, memory: bool) -> Linked {
        let memory = snapshot.memory.filter(|_| memory);
        let mut layers: Vec<LayerId> = Vec::new();
        for id in snapshot.disks.values().chain(&memory).flat_map(|top| self.chain(*top)) {
            if !layers.contains(&id) {
                layers.push(id);
            }
        }
        let fresh: BTreeMap<LayerId, LayerId> = layers.iter().map(|id| (*id, LayerId::new())).collect();
        let rows = layers.iter().filter_map(|id| self.layers.get(id));
        let layers: Vec<_> = rows.map(|row| (row.clone(), linked_row(row, &fresh))).collect();
        let mut config = snapshot.config.clone();
        // What its RAM holds may be a third machine's.
        let holds = || Borrowed { machine: self.id, mac: config.net.mac.clone() };
        config.borrowed = memory.map(|_| config.borrowed.clone().unwrap_or_else(holds));
        config.net.mac = mac_of(new.id);
        config.net.publish.clear();
        let machine = Machine {
            id: new.id,
            name: new.name.clone(),
            note: note.to_owned(),
            created: jiff::Timestamp::now(),
            policy: Policy::default(),
            next_disk: self.next_disk,
            now: Now {
                parent: None,
                under: None,
                state: if memory.is_some() { State::Saved } else { State::Off },
                config,
                disks: snapshot.disks.iter().map(|(disk, id)| (disk.clone(), fresh[id])).collect(),
                memory: memory.map(|id| fresh[&id]),
                memory_base: None,
                restoring: None,
                touched: true,
                generation: uuid::Uuid::new_v4(),
                run: None,
            },
            snapshots: Table::default(),
            trash: Table::default(),
            layers: layers.iter().map(|(_, row)| (row.id, row.clone())).collect(),
        };
        Linked { machine, layers }
    }

    /// Becomes what `lent` is, a machine made from another's snapshot, but stays who it is. Now has no leaves yet. The layers that it takes over.
    /// `taken` says which files are there already.
    pub fn take_over(&mut self, lent: &Machine, taken: impl Fn(&str) -> bool) -> Vec<(LayerRow, LayerRow)> {
        let leaves: BTreeSet<LayerId> = lent.now.disks.values().copied().collect();
        let rows = crate::garbage::from_the_base(lent);
        let rows = rows.iter().filter(|id| !leaves.contains(id)).filter_map(|id| lent.layers.get(id));
        let layers: Vec<_> = rows
            .map(|row| {
                let file = if taken(&row.file) { own_name(row, row.id) } else { row.file.clone() };
                (row.clone(), LayerRow { file, ..row.clone() })
            })
            .collect();
        let below = |leaf: &LayerId| lent.layers.get(leaf).and_then(|row| row.parent).unwrap_or(*leaf);
        let own = self.now.config.net.clone();
        let net = crate::tree::Net { mode: lent.now.config.net.mode, ..own };
        self.now = Now {
            config: Config { net, ..lent.now.config.clone() },
            disks: lent.now.disks.iter().map(|(disk, leaf)| (disk.clone(), below(leaf))).collect(),
            generation: uuid::Uuid::new_v4(),
            ..lent.now.clone()
        };
        self.next_disk = self.next_disk.max(lent.next_disk);
        self.layers.extend(layers.iter().map(|(_, row)| (row.id, row.clone())));
        layers
    }
}

/// A layer's row in the new machine. What was taken in place lies there in the machine's own folder, for it is copied.
fn linked_row(row: &LayerRow, fresh: &BTreeMap<LayerId, LayerId>) -> LayerRow {
    let id = fresh[&row.id];
    LayerRow {
        id,
        file: if row.in_place { own_name(row, id) } else { row.file.clone() },
        in_place: false,
        parent: row.parent.and_then(|parent| fresh.get(&parent).copied()),
        // How far a merge here had come is nothing that the other could go on from.
        folded: None,
        ..row.clone()
    }
}

/// A file's name that no other file has.
pub(crate) fn own_name(row: &LayerRow, id: LayerId) -> String {
    let folder = if row.kind == LayerKind::Memory { "memory" } else { "disks" };
    let ending = if row.parent.is_some() { format!("a{}", row.format) } else { row.format.to_string() };
    format!("{folder}/{id}.{ending}")
}

/// Files of a snapshot that a new machine cannot share: they are copied, or their places are shared where the file system can do that.
pub fn copied<'a>(machine: &'a Machine, snapshot: &Snapshot, memory: bool) -> Vec<&'a LayerRow> {
    let tops = snapshot.disks.values().chain(snapshot.memory.iter().filter(|_| memory));
    let ids: BTreeSet<LayerId> = tops.flat_map(|top| machine.chain(*top)).collect();
    ids.iter().filter_map(|id| machine.layers.get(id)).filter(|row| row.in_place).collect()
}

impl Files {
    /// Brings a layer's file into another machine's folder, where it has the row `new`: as one more name of it, or as a copy where it cannot
    /// have one. Not durable yet.
    pub(crate) fn share(
        &self,
        row: &LayerRow,
        into: &Self,
        new: &LayerRow,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), Problem> {
        let (to, name) = into.place(new)?;
        if !row.in_place {
            let (folder, from) = self.place(row)?;
            match folder.link(&from, &*to, &name) {
                Err(error) if error.kind == store::ErrorKind::CannotLink => {}
                linked => return linked.map_err(|e| file_problem(&e)),
            }
        }
        let from = self.find(row).map_err(|e| file_problem(&e))?;
        let copy = to.create(&name).map_err(|e| file_problem(&e))?;
        match copy_store(&*from, &*copy, progress).and_then(|whole| copy.sync().map(|()| whole)) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Problem::new(ProblemKind::Cancelled, "cancelled; nothing has changed")),
            Err(error) => Err(file_problem(&error)),
        }
    }

    /// What is recorded of a layer holds for it in the other machine, too, where its id is another.
    pub(crate) fn share_record(&self, row: &LayerRow, into: &Self, new: &LayerRow) {
        // Without it the other machine's worker makes it anew.
        let _ = match row.kind {
            LayerKind::Disk => {
                let record = self.record(row.id).record();
                record.map(|record| into.write_record(&record.of(new.id.0), || {}))
            }
            LayerKind::Memory => {
                let pages = self.pages(row.id).record().filter(|pages| pages.is_whole(row.parent.map(|id| id.0)));
                pages.map(|pages| into.write_pages(&pages.of(new.id.0, new.parent.map(|id| id.0)), || {}))
            }
        };
    }

    /// What a machine is started from, under these names. What has its name already is not brought a second time.
    pub(crate) fn share_boot(
        &self,
        config: &Config,
        into: &Self,
        name: impl Fn(&str) -> String,
    ) -> Result<(), Problem> {
        let folder = |files: &Self| files.folder().folder("boot").map_err(|e| file_problem(&e));
        let (from, to) = (folder(self)?, folder(into)?);
        for file in config.boot_files() {
            match link_or_copy(&from, file, &to, &name(file)) {
                Err(error) if error.kind == store::ErrorKind::Exists => {}
                brought => brought.map_err(|e| file_problem(&e))?,
            }
        }
        to.sync().map_err(|e| file_problem(&e))
    }
}

fn link_or_copy(from: &Arc<dyn Folder>, name: &str, to: &Arc<dyn Folder>, new: &str) -> store::Result<()> {
    match from.link(name, &**to, new) {
        Err(error) if error.kind == store::ErrorKind::CannotLink => {
            let copy = to.create(new)?;
            copy_store(&*from.open(name, Mode::Read)?, &*copy, &mut |_| true)?;
            copy.sync()
        }
        linked => linked,
    }
}

impl Keeper {
    /// Makes the files of a new machine in its folder, which has nothing but the machine's folders in it: all durable when it returns, and the
    /// ledger last. `progress` is told bytes copied and to copy, where files cannot be shared; it says `false` to stop. Blocks.
    ///
    /// # Errors
    /// A file that cannot be shared or copied, `Cancelled` if it was stopped. The folder is to be removed then.
    pub fn link_machine(
        &self,
        linked: Linked,
        into: &Files,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<(), Problem> {
        let Linked { mut machine, layers } = linked;
        self.share_layers(&layers, into, progress)?;
        self.files.share_boot(&machine.now.config, into, str::to_owned)?;
        for id in machine.now.disks.values_mut() {
            let leaf = leaf_over(into, &machine.layers, *id);
            make_leaf(into, None, &machine.layers, &leaf, None)?.layer.close().map_err(|e| image_problem(&e))?;
            *id = leaf.id;
            machine.layers.insert(leaf.id, leaf);
        }
        into.sync_names()?;
        label_new(into, &machine)?;
        Ledger::create(into.folder(), &machine).map_err(|e| e.problem(into.path()))?.close();
        into.folder().sync().map_err(|e| file_problem(&e))
    }

    /// Brings layers into another machine's folder, with what is recorded of them, unless nothing names them any more: a merge may have begun to
    /// change those.
    fn share_layers(
        &self,
        layers: &[(LayerRow, LayerRow)],
        into: &Files,
        progress: Progress<'_>,
    ) -> Result<(), Problem> {
        let merging: BTreeSet<LayerId> =
            crate::garbage::garbage(&self.rows().machine).fold.iter().map(|fold| fold.into).collect();
        let total: u64 = layers.iter().filter(|(row, _)| row.in_place).map(|(row, _)| self.files.allocated(row)).sum();
        let mut done = 0;
        for (row, new) in layers {
            let mut copied = |bytes| {
                done += bytes;
                progress(done, total.max(done))
            };
            self.files.share(row, into, new, &mut copied)?;
            if !merging.contains(&row.id) {
                self.files.share_record(row, into, new);
            }
            if !progress(done, total.max(done)) {
                return Err(Problem::new(ProblemKind::Cancelled, "cancelled; nothing has changed"));
            }
            self.steps.at("clone:linked");
        }
        Ok(())
    }

    /// What is recorded of layers that nothing names any more, and that a new machine shares from now on, may not be what they hold: a merge
    /// was perhaps under way. It is made anew.
    pub(crate) fn forget_merging(&self, linked: &Linked) -> BTreeSet<LayerId> {
        let merging = crate::garbage::garbage(&self.rows().machine).fold.into_iter().map(|fold| fold.into);
        let shared: BTreeSet<LayerId> = linked.layers.iter().map(|(row, _)| row.id).collect();
        let forgotten: BTreeSet<LayerId> = merging.filter(|id| shared.contains(id)).collect();
        for id in &forgotten {
            self.files.forget_record(*id);
        }
        forgotten
    }
}

/// The row of a fresh leaf.
pub(crate) fn leaf_over(files: &Files, layers: &BTreeMap<LayerId, LayerRow>, parent: LayerId) -> LayerRow {
    let format = layers.get(&parent).map(|row| row.format.of_child()).unwrap_or_default();
    files.new_row(LayerKind::Disk, format, Some(parent))
}

/// Whether a machine's network leads somewhere.
pub fn is_isolated(config: &Config) -> bool {
    config.borrowed.is_some() && config.net.mode == NetMode::User
}
