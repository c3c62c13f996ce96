//! The NBD protocol: its bytes ([`proto`]), the handshake ([`handshake`]), and the service of one connection.

pub mod handshake;
pub mod proto;
pub(crate) mod serve;
mod wire;
