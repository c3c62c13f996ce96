//! Everything that the other tests show, where there is no io_uring.
#![expect(clippy::duplicate_mod, reason = "both have the same support")]

#[path = "clients.rs"]
mod clients;
#[path = "protocol.rs"]
mod protocol;
