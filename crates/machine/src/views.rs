//! The rows as their users see them: with the sizes of files, the depth of chains, and what is pending.

use crate::collect::{Merge, foresee};
use crate::files::Files;
use crate::linked::is_isolated;
use crate::request::f64_ms::Millis;
use crate::request::{DiskView, NowView, Pages, Pending, SnapshotView, Sockets, TreeView, Undo, VariablesView, View};
use crate::trash::Trash;
use crate::tree::{Config, DiskId, LayerId, LayerRow, Machine, Snapshot, State};
use image::Source;
use std::collections::{BTreeMap, BTreeSet};
use store::Mode;

/// What is not in the rows: what the worker knows of the moment.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// The state as it is just now, if it differs from the ledger's (`starting`, `stopping`, `saving`).
    pub state: Option<State>,
    /// What is under way.
    pub doing: Vec<String>,
    /// Something that a person should know.
    pub alert: Option<String>,
    /// Where QEMU can be reached.
    pub sockets: Option<Sockets>,
    /// The worker's process id.
    pub worker: Option<i32>,
    /// QEMU's process id.
    pub qemu: Option<i32>,
}

/// The machine.
pub fn view(machine: &Machine, files: &Files, live: &Live) -> View {
    let config = &machine.now.config;
    View {
        id: machine.id,
        name: machine.name.clone(),
        note: machine.note.clone(),
        state: live.state.unwrap_or(machine.now.state),
        doing: live.doing.clone(),
        alert: live.alert.clone(),
        memory: config.memory,
        cpus: config.cpus,
        disks: disks(machine, files, config, &machine.now.disks),
        variables: variables(machine, files),
        policy: machine.policy.clone(),
        net: config.net.clone(),
        config: config.clone(),
        sockets: live.sockets.clone(),
        worker: live.worker,
        qemu: live.qemu,
        clock: machine.now.run.as_ref().and_then(|run| run.clock.clone()),
        created: machine.created,
        shared: files.shared_bytes(machine),
        isolated: is_isolated(config),
    }
}

/// The snapshots, and what the collector has still to do.
pub fn tree(machine: &Machine, files: &Files, state: State) -> TreeView {
    let now = &machine.now;
    let now_disks = disks(machine, files, &now.config, &now.disks);
    let disk_bytes = disk_bytes(machine, files, &now_disks, &now.disks);
    let mut snapshots: Vec<&Snapshot> = machine.snapshots.values().collect();
    snapshots.sort_by_key(|s| (s.created, s.id));
    TreeView {
        vm: machine.name.clone(),
        now: NowView { parent: now.parent, state, changed: changed(machine, files), disk_bytes, disks: now_disks },
        snapshots: snapshots.into_iter().map(|s| snapshot(machine, files, s)).collect(),
        pending: pending(machine, files),
        undo: undo(machine, files),
    }
}

fn snapshot(machine: &Machine, files: &Files, snapshot: &Snapshot) -> SnapshotView {
    let disks = disks(machine, files, &snapshot.config, &snapshot.disks);
    let stats = &snapshot.stats;
    SnapshotView {
        id: snapshot.id,
        name: snapshot.name.clone(),
        note: snapshot.note.clone(),
        parent: snapshot.parent,
        created: snapshot.created,
        state: snapshot.state,
        vm_state: snapshot.vm_state,
        memory: snapshot.memory.is_some(),
        memory_bytes: snapshot.memory.map_or(0, |id| bytes(machine, files, id)),
        disk_bytes: disk_bytes(machine, files, &disks, &snapshot.disks),
        pause_ms: stats.pause_us.map(|micros| Millis { micros }),
        save_ms: stats.save_ms,
        pages: Pages { stored: stats.pages_stored, same: stats.pages_same, zero: stats.pages_zero },
        disks,
        config: snapshot.config.clone(),
    }
}

/// The guest's disks.
fn disks(machine: &Machine, files: &Files, config: &Config, leaves: &BTreeMap<DiskId, LayerId>) -> Vec<DiskView> {
    let view = |disk: &crate::tree::Disk| {
        let leaf = leaves.get(&disk.id)?;
        let row = machine.layers.get(leaf)?;
        Some(DiskView {
            id: disk.id.clone(),
            file: files.layer_path(row).to_string_lossy().into_owned(),
            format: row.format.to_string(),
            size: disk.size,
            bytes: files.allocated(row),
            depth: machine.chain(*leaf).len() as u32,
        })
    };
    config.disks.iter().filter_map(view).collect()
}

fn variables(machine: &Machine, files: &Files) -> Option<VariablesView> {
    let leaf = *machine.now.disks.get(&DiskId::firmware())?;
    let row = machine.layers.get(&leaf)?;
    Some(VariablesView {
        file: files.layer_path(row).to_string_lossy().into_owned(),
        bytes: files.allocated(row),
        depth: machine.chain(leaf).len() as u32,
    })
}

/// What the layers of the guest's disks and of its firmware occupy.
fn disk_bytes(machine: &Machine, files: &Files, disks: &[DiskView], leaves: &BTreeMap<DiskId, LayerId>) -> u64 {
    let firmware = leaves.get(&DiskId::firmware()).map_or(0, |leaf| bytes(machine, files, *leaf));
    disks.iter().map(|disk| disk.bytes).sum::<u64>() + firmware
}

fn bytes(machine: &Machine, files: &Files, id: LayerId) -> u64 {
    machine.layers.get(&id).map_or(0, |row| files.allocated(row))
}

/// Whether Now differs from the snapshot that it stands on.
pub fn changed(machine: &Machine, files: &Files) -> bool {
    let now = &machine.now;
    let Some(parent) = now.parent.and_then(|id| machine.snapshots.get(&id)) else { return true };
    let running = matches!(now.state, State::Running | State::Paused);
    let memory = now.memory != parent.memory;
    // A leaf may have been followed by another without a snapshot in between.
    let since = |(disk, leaf): (_, &LayerId)| {
        let chain = machine.chain(*leaf);
        let held = parent.disks.get(disk).and_then(|held| chain.iter().position(|id| id == held));
        held.is_none_or(|held| chain[held + 1..].iter().any(|id| written(machine, files, *id) > 0))
    };
    let written = || now.disks.iter().any(since);
    now.touched || running || memory || now.config != parent.config || written()
}

/// Bytes of the virtual disk that a leaf holds itself. Only while nobody writes it; what cannot be read counts as changed.
pub fn written(machine: &Machine, files: &Files, leaf: LayerId) -> u64 {
    let held = || {
        let layer = files.open_layer(machine.layers.get(&leaf)?, Mode::Read).ok()?;
        let mut runs = Vec::new();
        layer.map(0, layer.info().size, &mut runs).ok()?;
        Some(runs.iter().filter(|run| run.source != Source::Absent).map(|run| run.len).sum())
    };
    held().unwrap_or(u64::MAX)
}

/// What can be taken back. Bytes are those of the files that nothing else names.
fn undo(machine: &Machine, files: &Files) -> Vec<Undo> {
    let now = machine.now.disks.values().chain(&machine.now.memory).copied();
    let snapshots = machine.snapshots.values().flat_map(Snapshot::layers);
    let elsewhere: BTreeSet<LayerId> = now.chain(snapshots).collect();
    let mut times: BTreeMap<LayerId, u32> = BTreeMap::new();
    for trash in machine.trash.values() {
        for layer in trash.layers().collect::<BTreeSet<_>>() {
            *times.entry(layer).or_default() += 1;
        }
    }
    let own = |layer: &LayerId| !elsewhere.contains(layer) && times.get(layer) == Some(&1);
    let view = |trash: &Trash| Undo {
        id: trash.id,
        what: trash.what.clone(),
        until: machine.until(trash),
        bytes: trash
            .layers()
            .collect::<BTreeSet<_>>()
            .iter()
            .filter(|l| own(l))
            .map(|l| bytes(machine, files, *l))
            .sum(),
    };
    let expired = machine.expired(jiff::Timestamp::now());
    machine.trash_by_time().into_iter().filter(|trash| !expired.contains(&trash.id)).map(view).collect()
}

/// What a merge is assumed to move in a millisecond, bytes.
const MERGED_PER_MS: u64 = 200_000;

/// How long a merge of so many bytes takes, in milliseconds, roughly.
pub(crate) fn merge_ms(bytes: u64) -> u64 {
    bytes / MERGED_PER_MS
}

/// What the collector has still to do, and why it waits where it waits.
pub fn pending(machine: &Machine, files: &Files) -> Vec<Pending> {
    let name = |id: &LayerId| machine.layers.get(id).map(|row| row.file.clone()).unwrap_or_default();
    let entry = |kind: &str, id: &LayerId| Pending {
        kind: kind.to_owned(),
        file: name(id),
        into: None,
        bytes: bytes(machine, files, *id),
        estimated_ms: None,
        reason: None,
    };
    let found = files.garbage(machine);
    let children = machine.children();
    let remove = found.remove.iter().map(|id| entry("remove", id));
    let merge = |stays: &LayerRow, (row, bytes): (&LayerRow, u64)| Pending {
        into: Some(stays.file.clone()),
        estimated_ms: Some(merge_ms(bytes)),
        bytes,
        ..entry("merge", &row.id)
    };
    let fold = found.runs().flat_map(|run| match foresee(machine, files, run) {
        Ok(Merge { stays, gone }) => gone.into_iter().map(|gone| merge(stays, gone)).collect::<Vec<_>>(),
        // What is in the way the merge will say itself.
        Err(_) => run.iter().map(|fold| entry("merge", &fold.into)).collect(),
    });
    let wait = found.wait.iter().map(|id| {
        let reason = match children.get(id).map_or(0, Vec::len) {
            1 => "another machine has it, too".to_owned(),
            n => format!("{n} files stand on it"),
        };
        Pending { reason: Some(reason), ..entry("wait", id) }
    });
    remove.chain(fold).chain(wait).collect()
}
