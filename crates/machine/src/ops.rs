//! One file a verb: what each request does, in the order in which it must be done.
//!
//! All have the same shape (invariants 2 and 3):
//!
//! ```text
//!   journal ─► make files, synced ─► [commit the leaves, switch to them ─► QEMU …] ─► settle: one transaction ─► what cannot be undone
//!      └──────────────── fails or dies here: undone ───────────────────────┘              └── dies here: finished by the next worker
//! ```

pub mod apply;
pub mod clone;
mod delete;
mod detach;
mod grow;
mod save;
mod settings;
pub mod snapshot;
mod start;
mod stop;
mod undo;
