//! The rows, and the one way to change them.

use crate::files::Files;
use crate::ledger::{self, Ledger, State as Rows};
use crate::request::Problem;
use crate::steps::Steps;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// The ledger, and where its commits are published. Clones share it: an owner, its readers, and a fold that commits from its own
/// thread.
#[derive(Debug, Clone)]
pub struct Book {
    ledger: Arc<Mutex<Ledger>>,
    rows: Arc<RwLock<Arc<Rows>>>,
    files: Files,
    steps: Arc<Steps>,
}

impl Book {
    /// Opens a machine's ledger.
    pub(crate) fn open(files: &Files, steps: &Arc<Steps>) -> Result<Self, Problem> {
        let ledger = Ledger::open(files.folder()).map_err(|e| e.problem(files.path()))?;
        let rows = Arc::new(RwLock::new(ledger.shared()));
        Ok(Self { ledger: Arc::new(Mutex::new(ledger)), rows, files: files.clone(), steps: Arc::clone(steps) })
    }

    /// The rows as last committed.
    pub fn rows(&self) -> Arc<Rows> {
        Arc::clone(&self.rows.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the rows in one durable transaction.
    ///
    /// If nobody can tell whether the transaction is on the disk, nothing more may be done that depends on it: the worker ends on the
    /// spot, leaving QEMU alone, and the next one goes by what it reads.
    pub fn commit(&self, change: impl FnOnce(&mut Rows)) -> Result<(), Problem> {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = ledger.commit(change) {
            let problem = error.problem(self.files.path());
            if error.kind == ledger::ErrorKind::Unsure {
                self.steps.give_up(&problem);
            }
            return Err(problem);
        }
        *self.rows.write().unwrap_or_else(PoisonError::into_inner) = ledger.shared();
        Ok(())
    }
}
