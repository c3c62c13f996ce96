//! Machines and their snapshots. (Map to come with the actor.)

pub mod request;
pub mod tree;
