//! Places where a test may kill the worker.
//!
//! Every request passes named steps: after its journal row, after its files, before and after its commit, after each thing that
//! it does to QEMU. [`Steps`] is a value that the worker is given; in everyday life it is empty and does nothing. A test names a
//! step (`TENBY_DIE_AT=snapshot:files`, with `#2` for its second passing) and the worker dies there as by `kill -9`: no
//! destructor runs and nothing is flushed.

use std::sync::atomic::{AtomicU32, Ordering};

/// Where the worker dies, if anywhere.
#[derive(Debug, Default)]
pub struct Steps {
    die_at: Option<(String, u32)>,
    passed: AtomicU32,
}

impl Steps {
    /// Dies at the step that `place` names: `snapshot:files`, or `snapshot:files#2` for its second passing.
    pub fn die_at(place: Option<&str>) -> Self {
        let die_at = place.map(|place| match place.split_once('#') {
            Some((step, n)) => (step.to_owned(), n.parse().unwrap_or(1)),
            None => (place.to_owned(), 1),
        });
        Self { die_at, passed: AtomicU32::new(0) }
    }

    /// The worker has come to this step.
    pub fn at(&self, step: &str) {
        let Some((place, nth)) = &self.die_at else { return };
        if place == step && self.passed.fetch_add(1, Ordering::SeqCst) + 1 == *nth {
            let me = rustix::process::getpid();
            // The kernel ends the process before this call returns.
            let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
            std::process::abort();
        }
    }
}
