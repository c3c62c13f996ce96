//! What a client asks of a machine, and what it is told: requests, jobs, views, problems. Pure values; the HTTP contract carries
//! them as they are.

use crate::tree::{
    Accel, Boot, Bus, Config, DiskId, Firmware, JobId, LayerFormat, MachineId, NetMode, OnHostStop, Policy, Publish,
    SnapshotId, SnapshotState, State, TrashId,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A machine to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// Its name.
    pub name: String,
    /// RAM in bytes.
    pub memory: u64,
    /// Processors.
    pub cpus: u32,
    /// The disks, in the guest's order.
    pub disks: Vec<DiskSpec>,
    /// An image for the CD drive.
    pub cdrom: Option<String>,
    /// What it boots from.
    pub boot: Boot,
    /// The firmware.
    pub firmware: Firmware,
    /// A kernel to boot directly (a path of the user's, copied in).
    pub kernel: Option<String>,
    /// Its initial RAM disk (a path of the user's, copied in).
    pub initrd: Option<String>,
    /// Its command line.
    pub append: String,
    /// The network.
    pub net: NetMode,
    /// Host ports that lead into the guest.
    pub publish: Vec<Publish>,
    /// How its processor runs.
    pub accel: Accel,
    /// The user's words.
    pub note: String,
}

/// A disk to be made or taken in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Where its content comes from.
    pub source: DiskSource,
    /// How it is attached.
    pub bus: Bus,
}

impl DiskSource {
    /// The format of a file that is made for it.
    pub(crate) fn format(&self) -> LayerFormat {
        match self {
            Self::New { format, .. } => *format,
            Self::Copy { .. } | Self::InPlace { .. } => LayerFormat::default(),
        }
    }
}

/// Where a disk's content comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskSource {
    /// A new, empty disk of this many bytes.
    New {
        /// Virtual size in bytes.
        size: u64,
        /// VHDX or VHD.
        #[serde(default)]
        format: LayerFormat,
    },
    /// A file whose content is copied in.
    Copy {
        /// Absolute path of the file.
        path: String,
        /// Its format, if its signature is not to be believed (`raw` must be said).
        format: Option<String>,
        /// Absolute paths of the folders in which its parents may lie, besides its own.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        parents: Vec<String>,
    },
    /// A file that becomes the base as it lies there.
    InPlace {
        /// Absolute path of the file.
        path: String,
        /// As above.
        format: Option<String>,
    },
}

/// Something that a machine is asked to do. Each becomes a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum Request {
    /// Starts the guest: boots it, or resumes its saved memory.
    Start {
        /// Leave it standing at its first instruction (or where it was saved).
        #[serde(default)]
        paused: bool,
    },
    /// Asks the guest to shut down, or turns it off.
    Stop {
        /// How long to wait for the guest, milliseconds.
        timeout_ms: u64,
        /// Turn it off at once.
        #[serde(default)]
        turn_off: bool,
    },
    /// Writes the memory out and ends QEMU.
    Save,
    /// Halts the processors.
    Pause,
    /// Lets them go on.
    Resume,
    /// Resets the guest.
    Restart,
    /// Takes a snapshot.
    Snapshot {
        /// Its name; a default is made if there is none.
        name: Option<String>,
        /// The user's words.
        #[serde(default)]
        note: String,
    },
    /// Makes a snapshot the present.
    Apply {
        /// Which: an id, a unique prefix of one, or a name.
        snapshot: String,
        /// What happens to the present.
        present: Present,
        /// Whether to run afterwards; unsaid: if it was running just before.
        start: Option<bool>,
        /// Whether to take the snapshot's memory.
        memory: bool,
    },
    /// Applies Now's parent.
    Revert {
        /// What happens to the present.
        present: Present,
        /// As in `Apply`.
        start: Option<bool>,
        /// As in `Apply`.
        memory: bool,
    },
    /// Deletes a snapshot.
    Delete {
        /// Which.
        snapshot: String,
        /// With everything below it.
        #[serde(default)]
        subtree: bool,
        /// The job ends only when merging has ended, too.
        #[serde(default)]
        wait: bool,
    },
    /// Takes back what was deleted or discarded.
    Undo {
        /// Which: an id, a unique prefix of one, or the name of a snapshot that was deleted; without it, the latest.
        id: Option<String>,
    },
    /// Renames a snapshot.
    RenameSnapshot {
        /// Which.
        snapshot: String,
        /// The new name.
        name: String,
    },
    /// Notes something on a snapshot.
    NoteSnapshot {
        /// Which.
        snapshot: String,
        /// The user's words.
        note: String,
    },
    /// Changes settings.
    Set(Box<Settings>),
    /// Renames the machine.
    Rename {
        /// The new name.
        name: String,
    },
    /// Makes new machines from a snapshot, which share its files; all of them, or none.
    Clone {
        /// Which snapshot: an id, a unique prefix of one, or a name.
        snapshot: String,
        /// The new machines' names.
        names: Vec<String>,
        /// The user's words.
        #[serde(default)]
        note: String,
    },
    /// Makes a snapshot's files ready for another machine, which takes them over. The result's `lent` says under which id.
    Lend {
        /// As in `Clone`.
        snapshot: String,
        /// Whether with the snapshot's memory.
        memory: bool,
    },
    /// Becomes what another machine has made ready; only for a machine without snapshots.
    TakeOver {
        /// Under which id it is ready.
        lent: MachineId,
        /// Whose snapshot it is, for people: `VM@SNAP`.
        origin: String,
        /// What happens to the present.
        present: Present,
    },
    /// Copies what the machine shares with others.
    Detach,
    /// Removes the machine and its folder.
    DeleteMachine {
        /// Leave a base that was taken in place as it was, instead of merging what Now holds into it.
        #[serde(default)]
        discard: bool,
    },
}

/// What an apply does with the present.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Present {
    /// Keep it as a snapshot of its own, memory too.
    Keep {
        /// Its name; a default is made if there is none.
        name: Option<String>,
    },
    /// Give it up.
    Discard,
    /// Go on only if there is nothing to lose.
    IfUnchanged,
}

/// Settings to change; what is `None` stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// RAM in bytes.
    pub memory: Option<u64>,
    /// Processors.
    pub cpus: Option<u32>,
    /// The user's words.
    pub note: Option<String>,
    /// Disks to add.
    pub add_disks: Vec<DiskSpec>,
    /// Disks to remove.
    pub remove_disks: Vec<DiskId>,
    /// Disks to grow, to how many bytes.
    pub grow_disks: Vec<(DiskId, u64)>,
    /// The CD drive: an image's path, or an empty string for none.
    pub cdrom: Option<String>,
    /// What it boots from.
    pub boot: Option<Boot>,
    /// Host ports that lead into the guest (all of them; replaces the list).
    pub publish: Option<Vec<Publish>>,
    /// Started with the host.
    pub autostart: Option<bool>,
    /// What happens when the host stops.
    pub on_host_stop: Option<OnHostStop>,
    /// How long what is deleted or discarded can be taken back, seconds.
    pub undo_for: Option<u64>,
}

/// A job: one request and how it goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Who it is.
    pub id: JobId,
    /// The machine's name when it was asked.
    pub vm: String,
    /// What it does: `snapshot`, `apply`, `delete`, `merge`, `start`, …
    pub kind: String,
    /// Where it stands.
    pub state: JobState,
    /// 0 to 100, never falling.
    pub percent: u8,
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes to do, as far as known.
    pub bytes_total: u64,
    /// When it will end, by its speed so far.
    pub eta: Option<Timestamp>,
    /// Why it waits, while `waiting`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What its user should know before it goes on, in the order in which it was said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// How it failed.
    pub error: Option<Problem>,
    /// What it brought: `{"snapshot": id}` and the like; and `"said"`, a line for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    /// When it was asked.
    pub started: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Asked for.
    New,
    /// Admitted.
    Starting,
    /// Under way.
    Running,
    /// Waits for something; see `reason`.
    Waiting,
    /// Paused by its user.
    Paused,
    /// Done.
    Completed,
    /// Cancelled by its user.
    Cancelled,
    /// Failed; see `error`.
    Failed,
}

impl JobState {
    /// Whether the job has ended.
    pub fn ended(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Failed)
    }
}

/// What kind of failure or refusal a [`Problem`] is; each has one exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// It was tried and failed (1).
    Failed,
    /// The words make no sense (2).
    Usage,
    /// Not in this state (3).
    Refused,
    /// No such thing (4).
    NotFound,
    /// The name means several things (4); see `candidates`.
    Ambiguous,
    /// The input is damaged or not what it claims to be (5).
    Damaged,
    /// Cancelled (130).
    Cancelled,
}

impl ProblemKind {
    /// The exit code of a command that ends like this.
    pub fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::NotFound | Self::Ambiguous => 4,
            Self::Damaged => 5,
            Self::Cancelled => 130,
        }
    }
}

/// A failure or a refusal, for people: what happened, to which machine or file, and what to type next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// What kind.
    pub kind: ProblemKind,
    /// What happened, to which machine or file.
    pub message: String,
    /// The next command, complete, ready to paste.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What an ambiguous name may mean.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<String>,
}

impl Problem {
    /// A problem of this kind.
    pub fn new(kind: ProblemKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, candidates: Vec::new() }
    }

    /// Something was tried and failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ProblemKind::Failed, message)
    }

    /// Not possible in this state.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(ProblemKind::Refused, message)
    }

    /// No such thing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ProblemKind::NotFound, message)
    }

    /// Damaged input.
    pub fn damaged(message: impl Into<String>) -> Self {
        Self::new(ProblemKind::Damaged, message)
    }

    /// The words make no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ProblemKind::Usage, message)
    }

    /// With what to type next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A machine as its users see it. The contract's `VM`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Who it is.
    pub id: MachineId,
    /// Its name.
    pub name: String,
    /// The user's words.
    pub note: String,
    /// What it is.
    pub state: State,
    /// What is under way: `snapshotting`, `applying`, `deleting`, `merging`.
    pub doing: Vec<String>,
    /// Something a person should know: "QEMU is gone; the disks are as after a power cut".
    pub alert: Option<String>,
    /// RAM in bytes.
    pub memory: u64,
    /// Processors.
    pub cpus: u32,
    /// Now's disks.
    pub disks: Vec<DiskView>,
    /// What holds the variables of its UEFI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variables: Option<VariablesView>,
    /// The whole configuration.
    pub config: Config,
    /// What stays over an apply.
    #[serde(default)]
    pub policy: Policy,
    /// The network's mode, address and ports.
    pub net: crate::tree::Net,
    /// The serial console's, VNC's sockets, if QEMU runs.
    pub sockets: Option<Sockets>,
    /// The worker's process id, if one runs; the QEMU's too.
    pub worker: Option<i32>,
    /// QEMU's process id.
    pub qemu: Option<i32>,
    /// How its guest's clock goes, if it goes on from a memory and has not come up anew since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<crate::tree::Clock>,
    /// When it was made.
    pub created: Timestamp,
    /// Bytes of its files that other machines have, too: they are there once for all of them.
    #[serde(default)]
    pub shared: u64,
    /// Whether its network leads nowhere, for its guest goes on from another machine's memory, under that one's address.
    #[serde(default)]
    pub isolated: bool,
}

/// Where a running machine can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sockets {
    /// The console hub's unix socket (the worker's): replays the last 64 KiB, then live.
    pub console: String,
    /// VNC.
    pub vnc: String,
}

/// A disk, as its users see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskView {
    /// Who it is.
    pub id: DiskId,
    /// Its leaf's file.
    pub file: String,
    /// The leaf's format.
    pub format: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes that the leaf occupies on the host.
    pub bytes: u64,
    /// The leaf's depth: how many files make up the disk.
    pub depth: u32,
}

/// What holds the variables of a machine's UEFI: boot entries and the like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VariablesView {
    /// The leaf's file.
    pub file: String,
    /// Bytes that the leaf occupies on the host.
    pub bytes: u64,
    /// How many files make it up.
    pub depth: u32,
}

/// The snapshots of a machine. The contract's `snapshot list`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeView {
    /// The machine's name.
    pub vm: String,
    /// The present.
    pub now: NowView,
    /// The snapshots, by time.
    pub snapshots: Vec<SnapshotView>,
    /// What the collector has still to do.
    pub pending: Vec<Pending>,
    /// What can be taken back, oldest first.
    pub undo: Vec<Undo>,
}

/// The present in the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NowView {
    /// The snapshot it stands on.
    pub parent: Option<SnapshotId>,
    /// What the machine is.
    pub state: State,
    /// Whether anything changed since: disks, memory or settings.
    pub changed: bool,
    /// Bytes that its leaves occupy on the host, the firmware's among them.
    pub disk_bytes: u64,
    /// Its disks' files.
    pub disks: Vec<DiskView>,
}

/// A snapshot as its users see it. The contract's `SNAP`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotView {
    /// Who it is.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// The user's words.
    pub note: String,
    /// The snapshot it stands on.
    pub parent: Option<SnapshotId>,
    /// When it was taken.
    pub created: Timestamp,
    /// Whether it can be applied yet.
    pub state: SnapshotState,
    /// What the machine was doing.
    pub vm_state: State,
    /// Whether it holds memory.
    pub memory: bool,
    /// Bytes that its memory occupies on the host (this layer alone).
    pub memory_bytes: u64,
    /// Bytes that its disk layers occupy on the host (these layers alone), the firmware's among them.
    pub disk_bytes: u64,
    /// How long the guest stood still, milliseconds.
    pub pause_ms: Option<f64_ms::Millis>,
    /// How long writing the memory took, milliseconds.
    pub save_ms: Option<u64>,
    /// Its memory's pages.
    pub pages: Pages,
    /// Its disks.
    pub disks: Vec<DiskView>,
    /// Its configuration.
    pub config: Config,
}

/// Milliseconds with a fraction, comparable.
pub mod f64_ms {
    use serde::{Deserialize, Serialize};

    /// Milliseconds, kept in microseconds, written as a JSON number with a fraction.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
    #[serde(into = "f64", from = "f64")]
    pub struct Millis {
        /// Microseconds.
        pub micros: u64,
    }

    impl From<Millis> for f64 {
        fn from(value: Millis) -> Self {
            value.micros as Self / 1000.0
        }
    }

    impl From<f64> for Millis {
        fn from(value: f64) -> Self {
            Self { micros: (value * 1000.0).round() as u64 }
        }
    }
}

/// A memory's pages (4 KiB each).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Stored because they differ from the parent's.
    pub stored: u64,
    /// The parent's.
    pub same: u64,
    /// Zeros.
    pub zero: u64,
}

/// Something that the collector has still to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// `merge`, `remove` or `wait`.
    pub kind: String,
    /// The file.
    pub file: String,
    /// Into which file (merge).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub into: Option<String>,
    /// Bytes that the file occupies; of a merge, those that move out of it.
    pub bytes: u64,
    /// How long it takes, in milliseconds, roughly (merge).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimated_ms: Option<u64>,
    /// Why it waits: "2 files stand on it".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Something that can be taken back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    /// Who it is.
    pub id: TrashId,
    /// What was done: `deleted Monday`.
    pub what: String,
    /// Until when it can be taken back.
    pub until: Timestamp,
    /// Bytes that are kept on the host for it alone.
    pub bytes: u64,
}

/// What a delete would do. The contract's `--dry-run`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletePlan {
    /// The snapshots that go.
    pub snapshots: Vec<SnapshotId>,
    /// Each file's fate.
    pub files: Vec<Pending>,
    /// Bytes that a merge moves.
    pub bytes_moved: u64,
    /// Bytes that the files that go occupy.
    pub bytes_freed: u64,
    /// How long it takes, milliseconds, by this host's measured or assumed speed.
    pub estimated_ms: u64,
    /// How long it can be taken back, seconds; only then anything happens to the files.
    #[serde(default)]
    pub undo_for: u64,
}
