//! The disk as all connections share it: the chain, who may change it, and what is under way.

use crate::pool::{Window, lock};
use crate::{BeforeChange, Options};
use image::Chain;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) chain: Arc<Chain>,
    pub(crate) name: String,
    pub(crate) read_only: bool,
    /// Small reads go through io_uring where there is one.
    pub(crate) ring: bool,
    /// Most threads that work for one connection beside its reader.
    pub(crate) threads: usize,
    /// Bounds the payloads that wait to be written, of all connections.
    pub(crate) window: Window,
    /// Bytes of the window that one connection may take: the others go on when one is stuck.
    pub(crate) share: usize,
    gate: Gate,
    busy: AtomicUsize,
}

impl Disk {
    pub(crate) fn new(chain: Arc<Chain>, options: Options) -> Self {
        Self {
            chain,
            name: options.name,
            read_only: options.read_only,
            ring: options.ring,
            threads: options.threads,
            window: Window::new(options.window),
            share: options.window / 2,
            gate: Gate::new(options.before_first_change),
            busy: AtomicUsize::new(0),
        }
    }

    /// To be asked before each change; see [`Options::before_first_change`].
    pub(crate) fn admit_change(&self) -> io::Result<()> {
        self.gate.pass()
    }

    /// Something is under way until the answer is dropped.
    pub(crate) fn begin(&self) -> Busy<'_> {
        self.busy.fetch_add(1, Ordering::AcqRel);
        Busy(&self.busy)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.busy.load(Ordering::Acquire) == 0
    }
}

#[derive(Debug)]
pub(crate) struct Busy<'a>(&'a AtomicUsize);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Holds changes back until the hook has said yes, once (invariant 6: the first change commits `running` before it is taken).
struct Gate {
    open: AtomicBool,
    hook: Mutex<Option<BeforeChange>>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("open", &self.open).finish_non_exhaustive()
    }
}

impl Gate {
    fn new(hook: Option<BeforeChange>) -> Self {
        Self { open: AtomicBool::new(hook.is_none()), hook: Mutex::new(hook) }
    }

    fn pass(&self) -> io::Result<()> {
        if self.open.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut hook = lock(&self.hook);
        if let Some(ask) = hook.as_mut() {
            ask()?;
            *hook = None;
        }
        self.open.store(true, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_asks_until_it_is_told_yes_and_then_never_again() {
        let asked = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&asked);
        let gate = Gate::new(Some(Box::new(move || match counter.fetch_add(1, Ordering::Relaxed) {
            0 => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        })));
        assert!(gate.pass().is_err());
        assert!(gate.pass().is_ok());
        assert!(gate.pass().is_ok());
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }
}
