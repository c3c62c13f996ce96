//! Fuzzing of every parser of what comes from outside: image files, streams of memory, clients, QEMU's monitor.
//!
//! ```text
//!   seeds ──► pool ──► mutate ──► run ──► outcome ──► new? into the pool
//!   (made by our own writers)      └─► panic, too long, too much memory, a broken rule ──► target/fuzz/TARGET/
//! ```
//!
//! Everything runs on stable Rust and is driven through the crates' public entries. What stands in for a coverage guide: mutations
//! know the format and mend its checksums, so that they reach what lies behind them, and an input whose outcome (a message
//! without its numbers) is new joins the pool.
//!
//! - Bounded: `cargo test -p fuzz` runs some thousands of executions a target, always the same, and all that once failed
//!   (`regressions/TARGET/`).
//! - Long: `cargo xtask fuzz [TARGET] [--seconds N] [--seed S]`.
//! - What it reaches: `cargo xtask coverage`.
//!
//! A target is one file in [`targets`]. To add one, write the file and name it in [`targets::ALL`].

mod file;
mod input;
mod memory;
pub mod mutate;
mod random;
pub mod run;
pub mod targets;
pub mod vhdx;

pub use file::{Disk, File, MAX_OPERATIONS, PAGE, Shelf};
pub use input::Input;
pub use random::Random;

/// A parser, or several that work on one input.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: a word.
    pub name: &'static str,
    /// What it reads.
    pub about: &'static str,
    /// Executions in the bounded run: some seconds' worth in a debug build.
    pub quick: u64,
    /// The most memory that one execution may hold at a time, bytes, besides [`run::MEMORY_PER_BYTE`].
    pub memory: u64,
    /// Sound inputs of many shapes, made by our own writers. The same each time.
    pub seeds: fn() -> Vec<Input>,
    /// Changes an input; the others of the pool may lend parts.
    pub mutate: fn(&mut Input, &mut Random, &[Input]),
    /// Lets the parser read it, and says what came of it. Panics if a rule is broken.
    pub run: fn(&Input) -> String,
}
