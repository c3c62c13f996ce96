//! Machines and their snapshots: the product, below its outside.
//!
//! ```text
//!   tree      the rows: pure values           plan      what each request does to them: pure
//!   admit     which request in which state    garbage   what no row names: pure
//!   trash     what can be taken back: pure
//!   ledger    the rows on disk, by transaction                      book   the way to change them, and to read them
//!   reserve   room for the ledger on a full disk                    room   what waits for room
//!   keeper    files and rows in step, without QEMU                  files  the machine's folder
//!   disks     the chains of Now, open for writing                   carry  what outlives a worker of its unflushed writes
//!   actor     Handle, Owner: the one who does everything            job    what is under way
//!   live      QEMU, and the disks served to it                      ram    memory to and from layers
//!   ops/      one file a verb: its part for the keeper, its part for the owner
//!   collect   removing and folding, in the background               recover what a new worker does first
//!   audit     what is wrong with the files          label    what a layer's file says of itself
//!   linked    a machine from another one's snapshot, whose files it shares
//!   rescue    the rows made again from that, when the ledger is lost
//!   records   how sealed layers read                               hashing making the records, in the background
//!   needs     what a memory needs that is not here: pure
//!   root      the folder of all machines                           views  the rows as users see them
//!   firmware  UEFI, as this host has it, and as a machine keeps it
//! ```
//!
//! The life of a machine's worker: [`Handle::open`](actor::Handle::open) takes the lock, recovers, and serves requests one after
//! the other until nothing is left to do. Whatever it is in the middle of when it dies, the next one undoes or finishes.

pub mod actor;
pub mod admit;
pub mod audit;
pub mod book;
pub mod carry;
mod check;
mod clock;
pub mod collect;
mod console;
mod crowd;
pub mod disks;
pub mod files;
pub mod firmware;
pub mod garbage;
pub mod hashing;
pub mod job;
pub mod keeper;
pub mod label;
pub mod ledger;
mod lent;
pub mod linked;
mod live;
pub mod log;
pub mod mark;
mod needs;
pub mod ops;
pub mod plan;
pub mod ram;
pub mod records;
mod recover;
pub mod request;
pub mod rescue;
pub mod reserve;
mod room;
pub mod root;
pub mod steps;
pub mod table;
pub mod trash;
pub mod tree;
pub mod views;
