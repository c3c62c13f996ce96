//! The files of a machine's first disk and of its memory, by the names that they have in the story: VHD, AVHD-1, AVHD-2, …

use crate::draw::{Align, Table, size};
use machine::request::Problem;
use machine::tree::{DiskId, LayerId, LayerKind, LayerRow, Machine};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The names that files were given, in the order in which they were first seen. A merge keeps the file, and so its name.
#[derive(Debug, Default)]
pub(super) struct Nicknames {
    names: BTreeMap<String, String>,
    seen: usize,
    last: Vec<String>,
}

impl Nicknames {
    /// The files as a table, and which came and went since the last one.
    pub(super) fn table(&mut self, ledger: &serde_json::Value, folder: &Path) -> Result<String, Problem> {
        let machine = ledger.get("machine").unwrap_or(ledger).clone();
        let machine: Machine = serde_json::from_value(machine)
            .map_err(|error| Problem::failed(format!("the ledger is not understood: {error}")))?;
        let disk = DiskId("disk0".to_owned());
        let files = files_of(&machine, &disk);
        for row in &files {
            self.name(row);
        }
        let mut table =
            Table::new(&[("FILE", Align::Left), ("SIZE", Align::Right), ("ON", Align::Left), ("", Align::Left)]);
        for row in &files {
            let parent = row.parent.and_then(|parent| machine.layers.get(&parent));
            let parent = parent.map(|parent| self.name(parent)).unwrap_or_default();
            table.row([self.name(row), size(bytes(folder, row)), parent, part(&machine, &disk, row.id)]);
        }
        let drawn = table.draw().replace('\n', "\n  ");
        let drawn = format!("  {}\n", drawn.trim_end());
        Ok(format!("{drawn}{}{}", self.changes(&files), memory(&machine, folder)))
    }

    fn name(&mut self, row: &LayerRow) -> String {
        let seen = &mut self.seen;
        let next = || {
            let name = if *seen == 0 { "VHD".to_owned() } else { format!("AVHD-{seen}") };
            *seen += 1;
            name
        };
        self.names.entry(row.file.clone()).or_insert_with(next).clone()
    }

    fn changes(&mut self, files: &[&LayerRow]) -> String {
        let now: Vec<String> = files.iter().map(|row| self.name(row)).collect();
        let new: Vec<&str> = now.iter().filter(|name| !self.last.contains(name)).map(String::as_str).collect();
        let gone: Vec<&str> = self.last.iter().filter(|name| !now.contains(name)).map(String::as_str).collect();
        let tell = |names: &[&str], word: &str| {
            if names.is_empty() { String::new() } else { format!("  {word}: {}\n", names.join(", ")) }
        };
        let told = format!("{}{}", tell(&new, "new"), tell(&gone, "gone"));
        self.last = now;
        told
    }
}

/// The layers of a disk, oldest first.
fn files_of<'a>(machine: &'a Machine, disk: &DiskId) -> Vec<&'a LayerRow> {
    let leaves = machine.snapshots.values().map(|snapshot| &snapshot.disks).chain([&machine.now.disks]);
    let mut ids: Vec<LayerId> =
        leaves.filter_map(|disks| disks.get(disk)).flat_map(|leaf| ancestors(machine, *leaf)).collect();
    ids.sort();
    ids.dedup();
    let mut rows: Vec<&LayerRow> = ids.iter().filter_map(|id| machine.layers.get(id)).collect();
    rows.sort_by_key(|row| (row.created, ancestors(machine, row.id).count()));
    rows
}

/// A layer and all that it stands on.
fn ancestors(machine: &Machine, leaf: LayerId) -> impl Iterator<Item = LayerId> {
    std::iter::successors(Some(leaf), |id| machine.layers.get(id)?.parent)
}

/// The part that a file plays.
fn part(machine: &Machine, disk: &DiskId, layer: LayerId) -> String {
    if machine.now.disks.get(disk) == Some(&layer) {
        return "takes the writes: Now".to_owned();
    }
    let of: Vec<&str> = machine
        .snapshots
        .values()
        .filter(|snapshot| snapshot.disks.get(disk) == Some(&layer))
        .map(|s| s.name.as_str())
        .collect();
    if !of.is_empty() {
        return format!("read only: the disk of {}", of.join(" and of "));
    }
    let children = machine.layers.values().filter(|row| row.parent == Some(layer)).count();
    format!("read only: no snapshot's any more, but {children} files stand on it")
}

/// How much the memories take.
fn memory(machine: &Machine, folder: &Path) -> String {
    let mut snapshots: Vec<_> = machine.snapshots.values().collect();
    snapshots.sort_by_key(|snapshot| snapshot.created);
    let told: Vec<String> = snapshots
        .into_iter()
        .filter_map(|snapshot| {
            let row = snapshot.memory.and_then(|layer| machine.layers.get(&layer))?;
            Some(format!("{}'s {}", snapshot.name, size(bytes(folder, row))))
        })
        .collect();
    let kept = machine.layers.values().any(|row| row.kind == LayerKind::Memory);
    if kept && !told.is_empty() { format!("  memory: {}\n", told.join(", ")) } else { String::new() }
}

/// Bytes that a layer's file occupies.
fn bytes(folder: &Path, row: &LayerRow) -> u64 {
    std::fs::metadata(folder.join(&row.file)).map_or(0, |about| about.blocks() * 512)
}
