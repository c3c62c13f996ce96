//! The rows of a machine: pure values and their invariants.
//!
//! ```text
//!   Machine ─┬─ snapshots ── Snapshot ─┬─ disks:  DiskId → LayerId      Layer ── file, parent
//!            │                         └─ memory: LayerId                 ▲
//!            ├─ now ─────── Now ───────┬─ disks, memory (the same) ───────┤
//!            ├─ trash ───── Trash ─────┴─ snapshots that were, a disk ────┘
//!            └─ layers: every file there is
//! ```
//!
//! Nothing but a row refers to a file. A *sealed* layer never changes as read through a chain; only the leaf of Now is written.
//! Deleting a snapshot is deleting its row; what that leaves without a name is [`garbage`](crate::garbage).

use crate::table::Table;
use crate::trash::Trash;
use image::merge::Mark;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(#[serde(with = "uuid::serde::simple")] pub Uuid);

        impl $name {
            /// A new random id.
            #[expect(clippy::new_without_default, reason = "a default that differs each time would surprise")]
            pub fn new() -> Self {
                Self(Uuid::new_v4())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.simple().fmt(f)
            }
        }
    };
}

id!(
    /// A machine.
    MachineId
);
id!(
    /// A snapshot.
    SnapshotId
);
id!(
    /// A layer: one image file's part in the tree. Stays the same when a fold moves the layer into another file.
    LayerId
);
id!(
    /// Something that can be taken back.
    TrashId
);
id!(
    /// A job: one request and how it went. Chosen by the client, so that a request repeated after a lost answer is the same request.
    JobId
);

/// A disk of a machine: `disk0`, `disk1`, …; stable for the machine's life, never reused. Or `firmware`: the variables of its UEFI, a disk like
/// any other in all but what the guest sees of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskId(pub String);

impl DiskId {
    /// The variables of a machine's UEFI.
    pub fn firmware() -> Self {
        Self("firmware".to_owned())
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Everything a machine's ledger holds of its tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Who it is.
    pub id: MachineId,
    /// Its name, unique in its root.
    pub name: String,
    /// The user's words.
    pub note: String,
    /// When it was made.
    pub created: Timestamp,
    /// What stays over an apply: policies of the host.
    pub policy: Policy,
    /// The next disk gets this number.
    pub next_disk: u32,
    /// The present.
    pub now: Now,
    /// The snapshots.
    pub snapshots: Table<SnapshotId, Snapshot>,
    /// What was deleted or discarded and can still be taken back.
    pub trash: Table<TrashId, Trash>,
    /// The layers: every file that the machine knows.
    pub layers: Table<LayerId, LayerRow>,
}

/// Settings of the host, not of the machine: an apply leaves them alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Started with the host.
    #[serde(default)]
    pub autostart: bool,
    /// What happens when the host stops.
    #[serde(default)]
    pub on_host_stop: OnHostStop,
    /// How long what is deleted or discarded can be taken back, seconds; 0: not at all.
    #[serde(default)]
    pub undo_for: u64,
}

/// What happens to a running machine when its host stops.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnHostStop {
    /// Its memory is saved.
    #[default]
    Save,
    /// It is asked to shut down.
    Stop,
    /// It is turned off.
    Off,
}

/// The whole configuration of a machine: what an apply brings back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// RAM in bytes; a multiple of 2 MiB.
    pub memory: u64,
    /// Processors, 1 to 255.
    pub cpus: u32,
    /// The pinned machine type (`pc-q35-7.2`); chosen at the first start, never an alias.
    pub machine_type: Option<String>,
    /// The CPU model (`qemu64`, `max`, `host`); chosen at the first start.
    pub cpu_model: Option<String>,
    /// Whether there is an HPET. What was made before this was asked has one, and its memory holds it; what is made today has none: guests leave
    /// it ticking, which costs the host more than all else that an idle one does.
    #[serde(default = "yes")]
    pub hpet: bool,
    /// Whether there is a port for an agent in the guest. What was made before this was asked has none, and its memory holds none.
    #[serde(default)]
    pub agent: bool,
    /// The accelerator that was asked for.
    pub accel: Accel,
    /// What it boots from.
    pub boot: Boot,
    /// The firmware.
    pub firmware: Firmware,
    /// A kernel to boot directly: files in the machine's folder.
    pub kernel: Option<Kernel>,
    /// An image in the CD drive: the user's own file, never written.
    pub cdrom: Option<String>,
    /// The network.
    pub net: Net,
    /// The disks, in the order in which the guest sees them. ([`Config::disk_ids`] has the firmware's, too.)
    pub disks: Vec<Disk>,
    /// Whom the guest takes itself for, if it goes on from another machine's memory. Only with a memory, or while it runs from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub borrowed: Option<Borrowed>,
}

/// For what a row does not say since it is older than the question.
fn yes() -> bool {
    true
}

/// The identity of another machine, as a guest has it that goes on from that machine's memory: its RAM and QEMU's devices hold it, until it
/// is started anew. Two of one address must not meet, so its network leads nowhere meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Borrowed {
    /// The machine, whose id is the SMBIOS UUID.
    pub machine: MachineId,
    /// Its network card's address.
    pub mac: String,
}

/// How a guest's processor runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// KVM where the processor really offers it, else TCG.
    #[default]
    Auto,
    /// The processor's own virtualisation.
    Kvm,
    /// Software.
    Tcg,
}

/// What a machine boots from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Boot {
    /// The first disk.
    #[default]
    Disk,
    /// The CD drive.
    Cdrom,
    /// The network.
    Net,
}

/// A machine's firmware.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    /// SeaBIOS.
    #[default]
    Bios,
    /// OVMF. Its code lies in the machine's `boot` folder; its variables are the disk [`DiskId::firmware`].
    Uefi,
}

/// A kernel that is booted directly. The files were copied into the machine's `boot` folder; the names are theirs there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// The kernel image's file name.
    pub kernel: String,
    /// The initial RAM disk's file name.
    pub initrd: Option<String>,
    /// The kernel's command line.
    pub append: String,
}

impl Kernel {
    /// The names of its files.
    pub(crate) fn files(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.kernel).chain(&self.initrd)
    }
}

impl Config {
    /// The names of what a machine is started from, in its `boot` folder.
    pub fn boot_files(&self) -> impl Iterator<Item = &str> {
        let kernel = self.kernel.iter().flat_map(Kernel::files).map(String::as_str);
        kernel.chain((self.firmware == Firmware::Uefi).then_some(crate::firmware::CODE_NAME))
    }
}

/// A machine's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// User-mode network, or none.
    pub mode: NetMode,
    /// The network card's address, `52:54:00:xx:xx:xx`.
    pub mac: String,
    /// Host ports that lead into the guest.
    pub publish: Vec<Publish>,
}

/// The kind of network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetMode {
    /// QEMU's user-mode network: outward connections, and published ports.
    #[default]
    User,
    /// No network card.
    None,
}

/// A host port that leads into the guest (TCP).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// The host's address to listen on.
    pub address: String,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

/// A disk as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Who it is.
    pub id: DiskId,
    /// How it is attached.
    pub bus: Bus,
    /// Virtual size in bytes.
    pub size: u64,
}

/// How a disk is attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bus {
    /// virtio-blk: `vda`, `vdb`, …
    #[default]
    Virtio,
    /// AHCI.
    Sata,
    /// IDE (on q35: the same controller as SATA).
    Ide,
    /// virtio-scsi.
    Scsi,
}

/// What a machine is doing, as its users see it. Exactly the contract's words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Not running, no memory.
    #[default]
    Off,
    /// QEMU comes up.
    Starting,
    /// The guest runs.
    Running,
    /// The guest stands still, its memory in QEMU.
    Paused,
    /// Its memory is being written out.
    Saving,
    /// Not running; its memory is in `Now::memory`.
    Saved,
    /// The guest was asked to shut down.
    Stopping,
}

/// The present of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Now {
    /// The snapshot that the present stands on.
    pub parent: Option<SnapshotId>,
    /// The one that it stood on, if that was deleted and can be taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub under: Option<SnapshotId>,
    /// As last committed: `off`, `running`, `paused` or `saved`.
    pub state: State,
    /// The configuration.
    pub config: Config,
    /// Each disk's leaf.
    pub disks: BTreeMap<DiskId, LayerId>,
    /// The memory to start from: only while `saved`.
    pub memory: Option<LayerId>,
    /// What the RAM of this run was last equal to, or what is left of that: the parent of the next capture. Only a hint, which holds nothing: a capture
    /// compares every page.
    pub memory_base: Option<LayerId>,
    /// The memory that its RAM is still being filled from, while it may run already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restoring: Option<LayerId>,
    /// Set by the first start, save or settings change after the snapshot that Now stands on was taken or applied.
    /// (That disks changed is read off the leaves.)
    pub touched: bool,
    /// The generation id that the guest sees (VMGENID): new after each apply, never after a plain resume.
    pub generation: Uuid,
    /// The QEMU that runs it.
    pub run: Option<Run>,
}

/// A QEMU process, as recorded to find it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Process id.
    pub pid: i32,
    /// The process's start time, clock ticks since boot (`/proc/PID/stat`, field 22): pids are reused.
    pub started: u64,
    /// When it came up.
    pub since: Timestamp,
    /// The folder of its sockets, below the machine's runtime folder.
    pub dir: String,
    /// How its guest's clock went, if it goes on from a memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<Clock>,
}

/// A guest that goes on from a memory takes it for the moment at which that was taken, until it is told the time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// How far its clock is behind the host's, milliseconds.
    pub behind_ms: u64,
    /// Since when.
    pub since: Timestamp,
    /// The name of the snapshot that was applied; none, if it was saved.
    pub snapshot: Option<String>,
}

/// A snapshot: a row that names layers and holds the whole configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Who it is.
    pub id: SnapshotId,
    /// Its name; need not be unique.
    pub name: String,
    /// The user's words.
    pub note: String,
    /// The snapshot it stands on.
    pub parent: Option<SnapshotId>,
    /// The one that it stood on, if that was deleted and can be taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub under: Option<SnapshotId>,
    /// When it was asked for.
    pub created: Timestamp,
    /// Whether it can be applied yet.
    pub state: SnapshotState,
    /// What the machine was doing: `running`, `saved`, `paused` or `off`.
    pub vm_state: State,
    /// The configuration.
    pub config: Config,
    /// Each disk's layer.
    pub disks: BTreeMap<DiskId, LayerId>,
    /// The memory.
    pub memory: Option<LayerId>,
    /// How taking it went.
    pub stats: Stats,
}

impl Snapshot {
    /// What it stood on when it was taken, as far as that is there or can be taken back.
    pub(crate) fn stood_on(&self) -> Option<SnapshotId> {
        self.under.or(self.parent)
    }

    /// The layers that it holds.
    pub fn layers(&self) -> impl Iterator<Item = LayerId> {
        self.disks.values().chain(&self.memory).copied()
    }
}

/// Whether a snapshot can be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotState {
    /// Its memory is still being written.
    Creating,
    /// Complete.
    Ready,
}

/// How taking a snapshot went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// How long the guest stood still, microseconds, by QEMU's STOP and RESUME stamps.
    pub pause_us: Option<u64>,
    /// How long writing the memory took, milliseconds.
    pub save_ms: Option<u64>,
    /// Pages (4 KiB) stored because they differ from the parent's.
    pub pages_stored: u64,
    /// Pages not stored because the parent holds the same.
    pub pages_same: u64,
    /// Pages of zeros.
    pub pages_zero: u64,
}

/// A layer: one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRow {
    /// Who it is.
    pub id: LayerId,
    /// What it holds.
    pub kind: LayerKind,
    /// The file: `disks/….vhdx`, `memory/….avhdx`, relative to the machine's folder; absolute if taken in place.
    pub file: String,
    /// Whether `file` is the user's own, taken in place.
    pub in_place: bool,
    /// The image's format.
    pub format: LayerFormat,
    /// The layer it stands on.
    pub parent: Option<LayerId>,
    /// When it was made.
    pub created: Timestamp,
    /// How far what stands on it was folded into it, if that was cut off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folded: Option<Mark>,
    /// Of a memory: on what its guest ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_on: Option<TakenOn>,
}

/// On what a guest ran when its memory was taken: it goes on only where there is as much. And when that was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenOn {
    /// QEMU's version: `10.0.2`.
    pub qemu: String,
    /// What its processor ran by; never [`Accel::Auto`].
    pub accel: Accel,
    /// What the host's processors could do, if the guest had them as they were (the model `host`); else nothing.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub features: BTreeSet<String>,
    /// When.
    pub at: Timestamp,
    /// How far the guest's clock was behind then, milliseconds.
    #[serde(default)]
    pub behind_ms: u64,
}

/// The image formats that a layer can have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerFormat {
    /// VHDX; what stands on it is AVHDX.
    #[default]
    Vhdx,
    /// VHD; what stands on it is AVHD.
    Vhd,
    /// Bytes as they are, taken in place; what stands on it is AVHDX, and only the ledger knows on what.
    Raw,
}

impl LayerFormat {
    /// The format of what stands on a layer of this one.
    #[must_use]
    pub fn of_child(self) -> Self {
        match self {
            Self::Vhd => Self::Vhd,
            Self::Vhdx | Self::Raw => Self::Vhdx,
        }
    }
}

impl fmt::Display for LayerFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vhdx => "vhdx",
            Self::Vhd => "vhd",
            Self::Raw => "raw",
        })
    }
}

impl From<image::Format> for LayerFormat {
    fn from(format: image::Format) -> Self {
        match format {
            image::Format::Vhdx => Self::Vhdx,
            image::Format::Vhd => Self::Vhd,
            image::Format::Raw => Self::Raw,
        }
    }
}

impl From<LayerFormat> for image::Format {
    fn from(format: LayerFormat) -> Self {
        match format {
            LayerFormat::Vhdx => Self::Vhdx,
            LayerFormat::Vhd => Self::Vhd,
            LayerFormat::Raw => Self::Raw,
        }
    }
}

/// What a layer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerKind {
    /// A disk's blocks.
    Disk,
    /// A machine's memory and device state.
    Memory,
}
