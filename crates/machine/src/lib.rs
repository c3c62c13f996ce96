//! Machines and their snapshots. (Map to come with the actor.)

pub mod actor;
pub mod admit;
pub mod plan;
pub mod request;
pub mod root;
pub mod tree;
