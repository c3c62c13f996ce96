//! The witness: PID 1 of the test guest.
//!
//! It knows two things that must never contradict each other, whatever is done to the machine: what its RAM says and what its
//! disks say. In RAM it holds a random nonce (this boot, and no other), a tick counter and the state of a *journal*; on the
//! disks it keeps that journal, a chain of hashed records written alternately to two disks, each durable before the next is begun.
//! Asked over the serial port (or TCP port 7777), it compares the two and says `ok`, or what is wrong.
//!
//! ```text
//!   harness or human ── ttyS0 ── console ─┐
//!                      TCP 7777 ─ server ─┴─ verbs ─┬─ journal ── vda, vdb     (O_DIRECT, flush after each write)
//!                                                   ├─ ram       patterns, pages dirtied at a rate, notes
//!                                                   └─ disk      patterns, texts at an offset
//! ```

mod agent;
mod boot;
mod console;
mod disk;
mod journal;
mod pattern;
mod ram;
mod verbs;

use std::sync::Arc;

fn main() {
    if std::process::id() == 1 {
        boot::mount();
        boot::load_modules();
        boot::mount_firmware();
    }
    let witness = Arc::new(verbs::Witness::wake());
    witness.start_threads();
    if std::process::id() == 1 {
        boot::bring_up_network();
        boot::watch_power_button(Arc::clone(&witness));
        console::serve_tcp(Arc::clone(&witness));
    }
    console::serve_serial(&witness);
}
