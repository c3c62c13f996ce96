//! Machines and their snapshots. (Map to come with the actor.)

pub mod actor;
pub mod request;
pub mod root;
pub mod tree;
