//! Places where a test may look at the worker, or kill it.
//!
//! Every request passes named steps: after its journal row, after its files, before and after its commit, after each thing that
//! it does to QEMU. [`Steps`] is a value that the worker is given; in everyday life it is empty and does nothing. A test names a
//! step (`TENBY_DIE_AT=snapshot:files`, with `#2` for its second passing) and the worker dies there as by `kill -9`: no
//! destructor runs and nothing is flushed. Or it is told of each step, on a simulated disk.

use crate::request::Problem;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// Is told of each step.
type Watch = Box<dyn Fn(&str) + Send + Sync>;

/// Where the worker dies, if anywhere.
#[derive(Default)]
pub struct Steps {
    die_at: Option<(String, u32)>,
    passed: AtomicU32,
    watch: Option<Watch>,
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steps").field("die_at", &self.die_at).finish_non_exhaustive()
    }
}

impl Steps {
    /// Dies at the step that `place` names: `snapshot:files`, or `snapshot:files#2` for its second passing.
    pub fn die_at(place: Option<&str>) -> Self {
        let die_at = place.map(|place| match place.split_once('#') {
            Some((step, n)) => (step.to_owned(), n.parse().unwrap_or(1)),
            None => (place.to_owned(), 1),
        });
        Self { die_at, ..Self::default() }
    }

    /// Tells `watch` of each step. A worker that would end its process unwinds instead, with the [`Problem`].
    pub fn watched(watch: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self { watch: Some(Box::new(watch)), ..Self::default() }
    }

    /// The worker has come to this step.
    pub fn at(&self, step: &str) {
        if let Some(watch) = &self.watch {
            watch(step);
        }
        let Some((place, nth)) = &self.die_at else { return };
        if place == step && self.passed.fetch_add(1, Ordering::SeqCst) + 1 == *nth {
            let me = rustix::process::getpid();
            // The kernel ends the process before this call returns.
            let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
            std::process::abort();
        }
    }

    /// What this worker does and what the ledger says have come apart: it ends on the spot, leaving QEMU alone, and the next one goes
    /// by what it reads.
    pub(crate) fn give_up(&self, why: &Problem) -> ! {
        if self.watch.is_some() {
            std::panic::resume_unwind(Box::new(why.clone()));
        }
        tracing::error!("{why}; this worker ends");
        std::process::abort()
    }
}
