//! What a layer's file says of itself, so that the rows can be made again when the ledger is lost ([`crate::rescue`]).
//!
//! ```text
//!   rows ──► labels: one for each layer ──► those that differ from the labels of the rows before ──► a note in the layer's file
//! ```
//!
//! The rows decide, and nobody reads a label while there are any. A label is written after the transaction that it tells of, so it never
//! says what did not happen; one that could not be written is done without. What it says of a sealed layer counts only for the content that
//! it was written for ([`Label::content`]): a fold that changes a file takes its label's word away, and puts another there at its end.
//!
//! The format is in `docs/formats/note.md`.

use crate::disks::Disks;
use crate::files::{Files, image_problem};
use crate::garbage::garbage;
use crate::keeper::Keeper;
use crate::ledger::State as Rows;
use crate::log;
use crate::request::Problem;
use crate::tree::{
    Config, DiskId, LayerFormat, LayerId, LayerKind, LayerRow, Machine, MachineId, Policy, Snapshot, SnapshotId,
    SnapshotState,
};
use image::{Layer, MAX_NOTE};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use store::Mode;
use uuid::Uuid;

/// The version of labels that is written, and the newest that is read.
const FORMAT: u32 = 1;

/// What a layer's file says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Label {
    /// The version of the label.
    pub format: u32,
    /// Of when it is: of labels that say different things of one machine, the later one is right ([`Rows::at`]).
    pub at: Timestamp,
    /// The machine whose layer it is.
    pub machine: Head,
    /// The layer.
    pub layer: LayerId,
    /// What it holds.
    pub kind: LayerKind,
    /// The disk, unless it is memory.
    pub disk: Option<DiskId>,
    /// When the layer was made.
    pub made: Timestamp,
    /// What it stands on, if that is a file that was taken in place: only to be told, a path from an image is never opened.
    pub base: Option<Base>,
    /// The snapshots that name it.
    pub snapshots: Vec<Snapshot>,
    /// The present, if it names the layer.
    pub now: Option<Present>,
    /// Layers that nothing names, and that are being folded into one with this: none of them is a snapshot's any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub merging: Vec<LayerId>,
    /// The content that all this is said of, as the id by which a child knows it; none for a leaf that is written.
    pub content: Option<Uuid>,
}

/// What a label says of its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Who it is.
    pub id: MachineId,
    /// Its name, as it was when the label was written.
    pub name: String,
    /// The user's words.
    pub note: String,
    /// When it was made.
    pub created: Timestamp,
    /// Policies of the host.
    pub policy: Policy,
}

/// A file that was taken in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its path.
    pub file: String,
    /// Its format.
    pub format: LayerFormat,
}

/// What a label says of the present.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Present {
    /// The snapshot that it stands on.
    pub parent: Option<SnapshotId>,
    /// Its configuration.
    pub config: Config,
    /// Its leaves.
    pub disks: BTreeMap<DiskId, LayerId>,
    /// Its memory, if it is saved.
    pub memory: Option<LayerId>,
    /// Of a saved machine, in the label of its memory: what the leaves held then, as ids of content. Only over just that may it go on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub contents: BTreeMap<DiskId, Uuid>,
}

impl Label {
    /// The label in a note; `None` if it is none of ours, or of a newer program.
    pub fn parse(note: &[u8]) -> Option<Self> {
        let label: Self = serde_json::from_slice(note).ok()?;
        (label.format <= FORMAT).then_some(label)
    }

    /// The files that were in the CD drive.
    pub(crate) fn in_drive(&self) -> Vec<String> {
        let snapshots = self.snapshots.iter().map(|snapshot| &snapshot.config);
        snapshots.chain(self.now.iter().map(|now| &now.config)).filter_map(|config| config.cdrom.clone()).collect()
    }

    /// As a note. What is too long leaves out the user's words, which may be of any length.
    fn encode(&self) -> Result<Vec<u8>, Problem> {
        let json = |label: &Self| serde_json::to_vec(label).map_err(|e| Problem::failed(e.to_string()));
        let note = json(self)?;
        if note.len() <= MAX_NOTE {
            return Ok(note);
        }
        let mut short = self.clone();
        short.machine.note.clear();
        short.snapshots.iter_mut().for_each(|snapshot| snapshot.note.clear());
        let note = json(&short)?;
        let long = note.len();
        if long <= MAX_NOTE { Ok(note) } else { Err(Problem::failed(format!("a label of {long} bytes is too long"))) }
    }

    /// What makes it worth writing again. The machine's name is looked for in the leaves alone, so that a new one does not cost a write to
    /// each of a thousand files; and so is the parent of a snapshot, which only changes when that is deleted.
    fn essence(&self) -> Self {
        let mut essence = Self { format: FORMAT, at: Timestamp::UNIX_EPOCH, content: None, ..self.clone() };
        if let Some(now) = &mut essence.now {
            now.contents.clear();
        } else {
            let head = &mut essence.machine;
            (head.name, head.note, head.policy) = (String::new(), String::new(), Policy::default());
        }
        for snapshot in &mut essence.snapshots {
            (snapshot.parent, snapshot.under) = (None, None);
        }
        essence
    }

    fn is_sealed(&self) -> bool {
        self.kind == LayerKind::Memory || self.now.is_none()
    }
}

/// The labels that the layers of a machine are to have. There are none for what was taken in place (it is the user's file), and for raw files.
fn labels(machine: &Machine, at: Timestamp) -> BTreeMap<LayerId, Label> {
    let names = Names::of(machine, at);
    let labelled = machine.layers.values().filter(|row| takes_label(row));
    labelled.map(|row| (row.id, names.label(row))).collect()
}

/// All snapshots, also those that can be taken back.
fn snapshots(machine: &Machine) -> impl Iterator<Item = &Snapshot> {
    machine.snapshots.values().chain(machine.trash.values().flat_map(|trash| &trash.snapshots))
}

/// The snapshots that name each layer.
fn holders(machine: &Machine) -> BTreeMap<LayerId, Vec<&Snapshot>> {
    let mut holders: BTreeMap<LayerId, Vec<&Snapshot>> = BTreeMap::new();
    for snapshot in snapshots(machine).filter(|snapshot| snapshot.state == SnapshotState::Ready) {
        for layer in snapshot.layers() {
            holders.entry(layer).or_default().push(snapshot);
        }
    }
    holders
}

fn takes_label(row: &LayerRow) -> bool {
    !row.in_place && row.format != LayerFormat::Raw
}

/// Which disk each layer belongs to.
fn disks(machine: &Machine) -> BTreeMap<LayerId, DiskId> {
    let snapshots = snapshots(machine).flat_map(|snapshot| &snapshot.disks);
    let mut disks = BTreeMap::new();
    for (disk, leaf) in snapshots.chain(&machine.now.disks) {
        let mut next = Some(*leaf);
        while let Some(id) = next.filter(|id| !disks.contains_key(id)) {
            disks.insert(id, disk.clone());
            next = machine.layers.get(&id).and_then(|row| row.parent);
        }
    }
    disks
}

/// Who names a machine's layers.
struct Names<'a> {
    machine: &'a Machine,
    at: Timestamp,
    disks: BTreeMap<LayerId, DiskId>,
    holders: BTreeMap<LayerId, Vec<&'a Snapshot>>,
}

impl<'a> Names<'a> {
    fn of(machine: &'a Machine, at: Timestamp) -> Self {
        Self { machine, at, disks: disks(machine), holders: holders(machine) }
    }

    fn label(&self, row: &LayerRow) -> Label {
        let Self { machine, at, disks, holders } = self;
        let now = &machine.now;
        let is_now = now.memory == Some(row.id) || now.disks.values().any(|id| *id == row.id);
        let parent = row.parent.and_then(|id| machine.layers.get(&id));
        let base = parent.filter(|parent| parent.in_place);
        let Machine { id, name, note, created, policy, .. } = machine;
        Label {
            format: FORMAT,
            at: *at,
            machine: Head {
                id: *id,
                name: name.clone(),
                note: note.clone(),
                created: *created,
                policy: policy.clone(),
            },
            layer: row.id,
            kind: row.kind,
            disk: disks.get(&row.id).filter(|_| row.kind == LayerKind::Disk).cloned(),
            made: row.created,
            base: base.map(|base| Base { file: base.file.clone(), format: base.format }),
            snapshots: holders.get(&row.id).into_iter().flatten().map(|snapshot| Snapshot::clone(snapshot)).collect(),
            now: is_now.then(|| Present {
                parent: now.parent,
                config: now.config.clone(),
                disks: now.disks.clone(),
                memory: now.memory,
                contents: BTreeMap::new(),
            }),
            merging: Vec::new(),
            content: None,
        }
    }
}

/// The rows that the files were last labelled after.
#[derive(Debug, Default)]
pub struct Labelled(Option<Arc<Rows>>);

impl Labelled {
    /// The labels that the files do not have yet. Of rows that an earlier worker has committed: only those of the present and of what it
    /// stands on, where it may have died before it wrote them.
    fn due(&self, rows: &Rows) -> Vec<Label> {
        let machine = &rows.machine;
        let labels = labels(machine, rows.at()).into_values();
        match &self.0 {
            Some(before) => labels.filter(changed(machine, &before.machine)).collect(),
            None => labels.filter(|label| is_near(machine, label.layer)).collect(),
        }
    }
}

/// Whether a label says something else than before, and is worth it.
fn changed(machine: &Machine, before: &Machine) -> impl Fn(&Label) -> bool {
    let before = labels(before, Timestamp::UNIX_EPOCH);
    let found = garbage(machine);
    let remove: BTreeSet<LayerId> = found.remove.into_iter().collect();
    let fold: BTreeSet<LayerId> = found.fold.into_iter().map(|fold| fold.into).collect();
    move |label| {
        let (id, known) = (label.layer, before.get(&label.layer));
        // What is to be folded away and was a snapshot's is not told: there may be a thousand of them.
        let going = fold.contains(&id) && known.is_some_and(|label| label.now.is_none());
        !remove.contains(&id) && !going && known.map(Label::essence) != Some(label.essence())
    }
}

/// Whether a layer is of the present or of the snapshot that it stands on.
fn is_near(machine: &Machine, id: LayerId) -> bool {
    let now = &machine.now;
    let parent = now.parent.and_then(|id| machine.snapshots.get(&id));
    let below = parent.into_iter().flat_map(|snapshot| snapshot.disks.values().chain(&snapshot.memory));
    now.disks.values().chain(&now.memory).chain(below).any(|near| *near == id)
}

impl Keeper {
    /// Sees to it that the files say what the rows say of them. `disks` are those of a guest that runs. What cannot be written is done
    /// without: it would be missed only with the ledger.
    pub fn label(&self, labelled: &mut Labelled, mut disks: Option<&mut Disks>) {
        let rows = self.rows();
        let machine = &rows.machine;
        if labelled.0.as_ref().is_some_and(|before| Arc::ptr_eq(before, &rows)) {
            return;
        }
        // Most transactions only end a job.
        let due = labelled.0.as_ref().is_none_or(|before| before.machine != *machine);
        for label in due.then(|| labelled.due(&rows)).into_iter().flatten() {
            self.put_label(machine, label, disks.as_deref_mut());
        }
        if let Some(Err(problem)) = disks.map(|disks| disks.seal(machine)) {
            tracing::error!("{problem}");
        }
        labelled.0 = Some(rows);
    }

    /// The file of a layer that has come to live in another says so.
    pub(crate) fn label_moved(&self, rows: &Rows, row: &LayerRow, disks: Option<&mut Disks>) {
        if takes_label(row) {
            self.put_label(&rows.machine, Names::of(&rows.machine, rows.at()).label(row), disks);
        }
    }

    /// A run of layers is about to be folded into one, downwards: what stands between its ends reads as nothing sensible meanwhile. Its second
    /// layer, the one whose link changes, says so.
    pub(crate) fn label_run(&self, run: &[&LayerRow], second: &dyn Layer) {
        let rows = self.rows();
        let [lowest, between @ .., _top] = run else { return };
        let Some(row) = between.first().filter(|row| takes_label(row)) else { return };
        let mut label = Names::of(&rows.machine, rows.at()).label(row);
        label.merging = std::iter::once(lowest).chain(between).map(|row| row.id).collect();
        if let Err(problem) = write(second, label) {
            self.report(row, &problem);
        }
    }

    fn put_label(&self, machine: &Machine, mut label: Label, mut disks: Option<&mut Disks>) {
        // What another machine has, too, says what it said when it was shared.
        let Some(row) = machine.layers.get(&label.layer).filter(|row| !self.files.is_shared(row)) else { return };
        let put = self.saved_contents(machine, &mut label).and_then(|()| {
            if has(&*self.handle(row, Mode::Read, disks.as_deref_mut())?, &label)? {
                return Ok(());
            }
            self.with_writable(row, disks, |layer| write(layer, label))
        });
        if let Err(problem) = put {
            self.report(row, &problem);
        }
    }

    fn report(&self, row: &LayerRow, problem: &Problem) {
        log::write(&self.files, None, &format!("{} does not say what it is: {problem}", row.file));
    }

    /// A saved machine's memory belongs to what its disks hold now.
    fn saved_contents(&self, machine: &Machine, label: &mut Label) -> Result<(), Problem> {
        let Some(now) = label.now.as_mut().filter(|_| label.kind == LayerKind::Memory) else { return Ok(()) };
        for (disk, leaf) in &machine.now.disks {
            let Some(row) = machine.layers.get(leaf) else { continue };
            now.contents.insert(disk.clone(), self.files.open_layer(row, Mode::Read)?.info().data_id);
        }
        Ok(())
    }
}

/// Labels the layers of a machine that is being made.
pub(crate) fn label_new(files: &Files, machine: &Machine) -> Result<(), Problem> {
    for (id, label) in labels(machine, machine.created) {
        let row = &machine.layers[&id];
        if files.is_shared(row) {
            continue;
        }
        let layer = files.open_layer(row, Mode::Write)?;
        write(&*layer, label)?;
        layer.close().map_err(|e| image_problem(&e))?;
    }
    Ok(())
}

/// Whether a file says this already.
fn has(layer: &dyn Layer, label: &Label) -> Result<bool, Problem> {
    let note = layer.note().map_err(|e| image_problem(&e))?;
    let Some(there) = note.as_deref().and_then(Label::parse) else { return Ok(false) };
    let content = label.is_sealed().then(|| layer.info().data_id);
    let contents = |label: &Label| label.now.as_ref().map(|now| now.contents.clone());
    Ok(there.essence() == label.essence() && there.content == content && contents(&there) == contents(label))
}

fn write(layer: &dyn Layer, mut label: Label) -> Result<(), Problem> {
    label.content = label.is_sealed().then(|| layer.info().data_id);
    layer.set_note(&label.encode()?).map_err(|e| image_problem(&e))
}
