//! Machines and their snapshots: the product, below its outside.
//!
//! ```text
//!   tree      the rows: pure values           plan      what each request does to them: pure
//!   admit     which request in which state    garbage   what no row names: pure
//!   ledger    the rows on disk, by transaction
//!   actor     Handle, Owner: the one who does everything          job    what is under way
//!   ops/      one file a verb                                      ram    memory to and from layers
//!   live      QEMU and the disks served to it                      files  the machine's folder
//!   carry     what outlives a worker of its unflushed writes
//!   collect   removing and folding, in the background              recover what a new worker does first
//!   root      the folder of all machines                           views  the rows as users see them
//! ```
//!
//! The life of a machine's worker: [`Handle::open`](actor::Handle::open) takes the lock, recovers, and serves requests one after
//! the other until nothing is left to do. Whatever it is in the middle of when it dies, the next one undoes or finishes.

pub mod actor;
pub mod admit;
mod carry;
mod check;
mod collect;
mod console;
pub mod files;
pub mod garbage;
pub mod job;
pub mod ledger;
mod live;
pub mod log;
pub mod mark;
mod ops;
pub mod plan;
mod ram;
mod recover;
pub mod request;
pub mod root;
pub mod steps;
pub mod tree;
pub mod views;
