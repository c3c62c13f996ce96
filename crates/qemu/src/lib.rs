//! One QEMU process: its command line, its life, its monitor, its serial port, the streams of its memory.
//!
//! ```text
//!   Launch ──start──▶ Qemu ──┬─ Process   pidfd; a session of its own; outlives us
//!   Identity ─adopt─▶        ├─ Qmp       qmp.sock: commands, Events
//!                            ├─ RunState  what the guest does, as a watch
//!                            ├─ Capture   memory out ─▶ a stream to read
//!                            └─ Restore   memory in  ◀─ a stream to write
//!   Agent ◀──▶ a program in the guest, over a serial port of its own
//!   Console ◀──── console log (written by QEMU, always) · serial.pipe (what is typed)
//! ```
//!
//! Life cycle: [`Qemu::start`] brings the process up with the guest standing still; [`Qemu::resume`] lets it run; [`Qemu::quit`] or
//! [`Qemu::kill`] ends it. Dropping a [`Qemu`] leaves the process alone: [`Qemu::adopt`] finds it again, from another process too.
//!
//! This crate knows nothing of image files and snapshots: disks are sockets, memory is a byte stream. It must run inside a tokio runtime.
//! It never waits with a time limit where the limit could be wrong; who wants one wraps the future (all may be dropped).

mod agent;
mod confine;
mod console;
mod error;
mod host;
mod hugepages;
mod launch;
mod migrate;
mod probe;
mod process;
mod qemu;
pub mod qmp;
mod untraced;

pub use agent::Agent;
pub use confine::{Confined, PRIVILEGED_VARIABLE, Rights, Tracking, User, hand_over, prepare, privileged, separates};
pub use console::{Console, ConsoleReader, KEPT};
pub use error::{Error, Result};
pub use host::{available_ram, processor_features};
pub use hugepages::{Collapse, HUGE_PAGE, collapses, has_ram_to_spare};
pub use launch::{
    Accel, Boot, Bus, Disk, Kernel, Launch, Nbd, Nic, PID_FILE, Publish, QMP_SOCKET, RECONNECT_DELAY, SERIAL_PIPE,
    SPARE_QMP_SOCKET, Uefi, VNC_SOCKET,
};
pub use migrate::{Capture, CaptureMode, Point, Restore, RestoreMode, Stream, lent};
pub use probe::{BINARY_VARIABLE, Installed, best_accel, cpu_model, find_binary, kvm, userfaultfd};
pub use process::{Ending, Identity, Process, alive};
pub use qemu::{Qemu, RunState};
pub use qmp::{Event, EventKind, Events, MigrationStatus, Qmp, Stamp, Version};
