//! Up: what the top of a run lacks goes into it.

use super::run::{Run, shows_through};
use super::work::{PIECE, Stop, Work, outcome};
use super::{FoldError, Outcome, check_up};
use crate::chain::{Chain, Place, Slot, invalid, pieces};
use crate::{Layer, ParentLink, Result, Source};
use std::sync::Arc;

/// A fold upwards. Nothing is changed but the top's file, and that only where it held nothing.
pub(super) struct Up<'a> {
    work: Work<'a>,
    /// The layers that go, and the top.
    run: Arc<Run>,
    /// What the run stands on.
    beneath: Arc<Slot>,
}

impl<'a> Up<'a> {
    pub(super) fn begin(work: Work<'a>, beneath: &Arc<dyn Layer>, run: &[Arc<dyn Layer>]) -> Result<Self> {
        let chain: &Chain = work.chain;
        let stack = chain.shared();
        let run = Run::within(&stack, run)?;
        let below = stack.position(run.lowest().layer()).and_then(|at| at.checked_sub(1));
        let beneath = below.map(|at| Arc::clone(stack.slot(at))).filter(|slot| slot.is(beneath));
        let beneath = beneath.ok_or_else(|| invalid("the layers do not stand on this one in this chain"))?;
        check_up(&run, &beneath)?;
        drop(stack);
        Ok(Self { work, run: Arc::new(run), beneath })
    }

    pub(super) fn run<E>(mut self, commit: impl FnOnce() -> Result<(), E>) -> Result<Outcome, FoldError<E>> {
        outcome(self.copy_and_end(commit))
    }

    fn copy_and_end<E>(&mut self, commit: impl FnOnce() -> Result<(), E>) -> Result<Result<(), E>, Stop> {
        // What stands on the top knows it by its id.
        self.top().layer().settle()?;
        self.work.begin_pass(0, self.run.bytes_below_top()?.iter().sum())?;
        self.copy()?;
        self.top().sync()?;
        self.accept_both()?;
        if let Err(error) = commit() {
            return Ok(Err(error));
        }
        let (_, gone) = self.run.slots.split_last().expect("a run has a top");
        self.work.chain.splice(gone);
        // It is done, whatever comes of this: the second id does no harm. What cannot be written has poisoned the layer, which says so
        // itself when it is used next.
        let _ = self.name_new_parent();
        Ok(Ok(()))
    }

    fn top(&self) -> &Slot {
        self.run.top()
    }

    fn link(&self) -> Result<ParentLink> {
        let link = self.top().layer().info().parent;
        link.ok_or_else(|| invalid("the top of the run names no parent"))
    }

    /// Step 1 of the module's table: the top accepts what it stands on now and what it will stand on.
    fn accept_both(&self) -> Result<()> {
        let below = &self.run.slots[self.run.slots.len() - 2];
        let (old, new) = (below.layer().info().data_id, self.beneath.layer().info().data_id);
        // A raw layer has no id, and passes for what the ledger says that it is.
        let link = ParentLink { linkage: old, linkage2: Some(new).filter(|id| !id.is_nil()), ..self.link()? };
        self.top().layer().relink(None, Some(link))
    }

    /// Step 2: it names what the lowest of the run named.
    fn name_new_parent(&self) -> Result<()> {
        let names = self.run.lowest().layer().info().parent.map_or_else(|| self.link(), Ok)?;
        let id = self.beneath.layer().info().data_id;
        let linkage = if id.is_nil() { names.linkage } else { id };
        self.top().layer().relink(None, Some(ParentLink { linkage, linkage2: None, ..names }))
    }

    fn copy(&mut self) -> Result<(), Stop> {
        let run = Arc::clone(&self.run);
        // Whole blocks of the top, so that zeros need no place.
        let block = run.top().block().max(PIECE);
        run.each_below_top(|start, len, place| {
            let unit = if matches!(place, Place::Data { .. }) { PIECE } else { block };
            for (offset, len) in pieces(start, len, unit) {
                match place.skip(offset - start) {
                    Place::Data { layer, at } => self.copy_data(&run.slots[layer], (offset, len), at)?,
                    Place::Zero { .. } | Place::Hole => self.copy_zeros(offset, len)?,
                }
                self.work.sync_copied(run.top(), u64::MAX)?;
                self.work.tell()?;
            }
            Ok(())
        })
    }

    fn copy_data(&mut self, from: &Slot, (start, len): (u64, u64), at: u64) -> Result<(), Stop> {
        // What lies below the top is sealed: it is read before anybody has to wait.
        let mut data = std::mem::take(&mut self.work.buffer);
        let top = Arc::clone(self.run.top());
        let copied = from.read(&mut data[..len as usize], at).map_err(Stop::from).and_then(|()| {
            self.where_nothing_is(start, len, |offset, len| {
                let from = (offset - start) as usize;
                top.copy_in(&data[from..from + len as usize], offset).map(drop)
            })
        });
        self.work.buffer = data;
        copied?;
        self.work.moved(len);
        Ok(())
    }

    fn copy_zeros(&mut self, offset: u64, len: u64) -> Result<(), Stop> {
        if !shows_through(&self.beneath, offset, len)? {
            return Ok(());
        }
        let top = Arc::clone(self.run.top());
        self.where_nothing_is(offset, len, |offset, len| top.copy_zeros(offset, len))
    }

    /// Does `work` to the parts of a range that the top does not hold, while no request can change that.
    fn where_nothing_is(
        &mut self,
        offset: u64,
        len: u64,
        mut work: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<(), Stop> {
        let (chain, top) = (self.work.chain, Arc::clone(self.run.top()));
        loop {
            let done = chain.still(&top, (offset, len), |_| {
                let mut runs = Vec::new();
                top.map(offset, len, &mut runs)?;
                let absent = runs.iter().filter(|run| run.source == Source::Absent);
                absent.into_iter().try_for_each(|run| work(run.offset, run.len))
            });
            if done?.is_some() {
                return Ok(());
            }
            self.work.wait()?;
        }
    }
}
