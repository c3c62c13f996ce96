//! The HTTP contract between a client and a machine's worker: both ends of it.
//!
//! ```text
//!   tenby (client) ── GET/POST /v1/… over DIR/api.sock ──► worker: routes ──► machine::actor::Handle
//!                  ◄── JSON: View, TreeView, Job, … or problem+json ──
//! ```
//!
//! A worker serves one machine. Its socket lies in the machine's runtime folder (mode 0700), and only the worker's own user and
//! root are answered. Every answer is a value of [`types`] as JSON, or a [`types::Problem`] as `application/problem+json`.
//!
//! - [`serve`]: the worker's end.
//! - [`Client`]: the other end. One connection a request: a worker that died is noticed at once, and nothing is left half-read.
//!
//! A request is safe to send again: the client chooses its job's id, and the same id is the same request.
//!
//! Both ends greet with a version. A newer client asks an older worker to hand over (`POST /v1/handover`): it finishes its
//! transaction and ends, and the client starts a worker of its own version. An older client is refused, both versions named.

mod client;
mod problem;
mod routes;
mod serve;
mod socket;
pub mod types;
mod version;

pub use client::{Client, Error};
pub use serve::{End, serve};
pub use socket::{Socket, connect};
pub use version::Version;
