//! The NBD protocol: its bytes ([`proto`]), the handshake ([`handshake`]), and the service of one connection.

mod flights;
pub mod handshake;
pub mod proto;
pub(crate) mod serve;
mod wire;
