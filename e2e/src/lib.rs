//! Tests of the whole system: the real program, a real QEMU, and a guest that proves its own RAM and disks.
//!
//! ```text
//!   Lab      a root of its own, the program run in it, and nothing left of it afterwards
//!   Witness  the guest's first process, asked over the serial console (e2e/witness says what can be asked)
//!   Screen   what a machine shows, over VNC
//!   Bare     the same guest in a plain QEMU, without Tenby
//!   Small    a disk that is soon full
//! ```
//!
//! The guest, both versions of QEMU and the program are looked for in `target/` (`cargo xtask guest`, `cargo xtask qemu`,
//! `cargo build -p tenby`), or where `TENBY_GUEST`, `TENBY_QEMU_72`, `TENBY_QEMU_10` and `TENBY_BIN` say.
//!
//! Booting takes seconds under emulation, so it is done once: [`Lab::with_base`] begins with a copy of a saved machine.
//! Everything here panics where a test has to fail.

mod bare;
mod lab;
mod place;
mod screen;
mod small;
mod witness;

pub use bare::Bare;
pub use lab::{BASE, Lab, Output, Process};
pub use place::{Guest, guest, qemu_10, qemu_72};
pub use screen::Screen;
pub use small::SmallDisk;
pub use witness::Witness;

use std::time::{Duration, Instant};

/// After this, what a test waits for is not coming any more. Far beyond what anything takes, even on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// Waits until `reached` gives something.
///
/// # Panics
/// If that does not happen before [`DEADLINE`].
pub fn wait_for<T>(what: &str, mut reached: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = reached() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
