//! Down: what the child holds goes into the parent.

use super::run::{Run, shows_through};
use super::work::{PIECE, Stop, Work, outcome};
use super::{FoldError, Mark, Marks, Outcome, check_down};
use crate::chain::{Chain, Mirror, Place, Slot, invalid, pieces};
use crate::{Format, Layer, ParentLink, Result};
use std::sync::Arc;
use uuid::Uuid;

/// A fold downwards; the leaf's writes are mirrored as long as it lives.
pub(super) struct Down<'a> {
    pub(super) work: Work<'a>,
    run: Arc<Run>,
    parent: Arc<Slot>,
    /// The child gives up what was copied before it is more than so many bytes (or one block).
    pub(super) most: Option<u64>,
    pub(super) marks: Marks,
    /// The child is the leaf: what is written to it since the copying began is in the parent as well.
    mirrored: bool,
}

impl Drop for Down<'_> {
    fn drop(&mut self) {
        self.work.chain.alone().set_mirror(None);
    }
}

impl<'a> Down<'a> {
    pub(super) fn begin(work: Work<'a>, run: &[Arc<dyn Layer>], parent: &Arc<dyn Layer>) -> Result<Self> {
        let chain: &Chain = work.chain;
        let stack = chain.shared();
        let run = Run::within(&stack, run)?;
        let below = stack.position(run.lowest().layer()).and_then(|at| at.checked_sub(1));
        let parent = below.map(|at| Arc::clone(stack.slot(at))).filter(|slot| slot.is(parent));
        let parent = parent.ok_or_else(|| invalid("child and parent are not neighbours in this chain"))?;
        check_down(run.top(), &parent)?;
        drop(stack);
        Ok(Self { work, run: Arc::new(run), parent, most: None, marks: Marks::default(), mirrored: false })
    }

    fn child(&self) -> &Arc<Slot> {
        self.run.top()
    }

    pub(super) fn run<E>(
        mut self,
        g: Option<Uuid>,
        commit: impl FnOnce() -> Result<(), E>,
    ) -> Result<Outcome, FoldError<E>> {
        let mut commit = Some(commit);
        let ended = self.prepare(g).and_then(|()| {
            loop {
                match self.copy_and_end(g, &mut commit) {
                    Err(Stop::Again) => self.work.wait()?,
                    ended => return ended,
                }
            }
        });
        outcome(ended)
    }

    /// Steps 1 and 2 of the module's table, and the child's size.
    fn prepare(&mut self, g: Option<Uuid>) -> Result<(), Stop> {
        // Writing must not change the ids by which a child knows its parent: only the steps below do.
        self.parent.layer().settle()?;
        self.child().layer().settle()?;
        self.marks.from = self.marks.from.filter(|mark| self.mark_at(mark.until) == Some(*mark));
        if let Some(g) = g.filter(|_| self.marks.from.is_none()) {
            self.take_apart(g)?;
        }
        if self.parent.size() != self.child().size() {
            self.work.chain.resize_slot(&self.parent, self.child().size())?;
        }
        Ok(())
    }

    fn copy_and_end<E, F: FnOnce() -> Result<(), E>>(
        &mut self,
        g: Option<Uuid>,
        commit: &mut Option<F>,
    ) -> Result<Result<(), E>, Stop> {
        self.begin_mirror()?;
        let begin = self.marks.from.map_or(0, |mark| mark.until.min(self.child().size()));
        let bytes = |from: u64, to: u64| self.run.bytes(from, to - from).map(|bytes| bytes.iter().sum());
        self.work.begin_pass(bytes(0, begin)?, bytes(begin, self.child().size())?)?;
        // What is written gives nothing up.
        match self.most.filter(|_| !self.mirrored) {
            Some(most) => self.copy_and_forget(most)?,
            None => self.copy(begin, self.child().size() - begin)?,
        }
        // So that the last one, for which a flush may wait, is short.
        self.parent.sync()?;
        self.work.tell()?;
        self.end(g, commit)
    }

    /// What there is to be said for a fold that goes on, once all below `until` is durable in the parent. Only ids say what a mark is of; a
    /// raw parent has none.
    fn mark_at(&self, until: u64) -> Option<Mark> {
        let (parent, child) = (self.parent.layer().info().data_id, self.child().layer().info().data_id);
        (!self.is_written() && !parent.is_nil()).then_some(Mark { parent, child, until })
    }

    /// Whether the child is the leaf of a guest.
    fn is_written(&self) -> bool {
        let stack = self.work.chain.shared();
        self.work.live && stack.position(self.child().layer()).is_none_or(|at| stack.is_leaf(at))
    }

    fn begin_mirror(&mut self) -> Result<(), Stop> {
        let mut stack = self.work.chain.alone();
        let position = stack.position(self.child().layer()).ok_or_else(|| invalid("the child left the chain"))?;
        if stack.is_ambiguous(position) {
            return Err(Stop::Again);
        }
        // A sealed child does not change any more.
        self.mirrored = self.work.live && stack.is_leaf(position);
        stack.set_mirror(self.mirrored.then(|| Mirror::new(Arc::clone(&self.parent))));
        Ok(())
    }

    /// Commits and takes the run out, while requests go on.
    fn end<E, F: FnOnce() -> Result<(), E>>(
        &self,
        g: Option<Uuid>,
        commit: &mut Option<F>,
    ) -> Result<Result<(), E>, Stop> {
        let chain = self.work.chain;
        let _ending = chain.ending();
        self.begin_last_phase()?;
        self.parent.sync()?;
        if g.is_some() {
            self.hand_over()?;
        }
        if let Some(mirror) = chain.shared().mirror() {
            mirror.check()?;
        }
        let commit = commit.take().expect("a fold ends once");
        if let Err(error) = commit() {
            return Ok(Err(error));
        }
        chain.splice(&self.run.slots);
        Ok(Ok(()))
    }

    /// From here on what the guest is told is durable is so in the parent too; what it was told before, after the next sync.
    fn begin_last_phase(&self) -> Result<(), Stop> {
        if self.mirrored {
            let mut stack = self.work.chain.alone();
            let mirror = stack.mirror_mut().ok_or(Stop::Again)?;
            mirror.check()?;
            mirror.begin_last_phase();
        }
        Ok(())
    }

    /// Steps 1 and 2 of the module's table: the parent is nobody else's parent any more. After an earlier fold that was cut off, `G` replaces its: what
    /// that one copied may be written over from here on.
    fn take_apart(&self, g: Uuid) -> Result<()> {
        let Some(link) = self.link() else { return Ok(()) };
        let id = self.parent.layer().info().data_id;
        self.run.lowest().layer().relink(None, Some(ParentLink { linkage: id, linkage2: Some(g), ..link }))?;
        self.parent.layer().relink(Some(g), None)
    }

    /// Steps 3 and 4: the parent takes the child's id.
    fn hand_over(&self) -> Result<()> {
        let Some(link) = self.link() else { return Ok(()) };
        let id = self.child().layer().info().data_id;
        let g = self.parent.layer().info().data_id;
        self.run.lowest().layer().relink(None, Some(ParentLink { linkage: id, linkage2: Some(g), ..link }))?;
        self.parent.layer().relink(Some(id), None)
    }

    /// The link to the parent, if ids matter: a raw parent has none, and only the ledger knows whose it is.
    fn link(&self) -> Option<ParentLink> {
        let raw = self.parent.layer().info().format == Format::Raw;
        self.run.lowest().layer().info().parent.filter(|_| !raw)
    }

    /// Copies all, and lets the child forget what the parent holds durably, in stretches of whole blocks. The last stretch goes with
    /// the child.
    fn copy_and_forget(&mut self, most: u64) -> Result<(), Stop> {
        // Whole blocks: the child forgets no others, and the parent lets go of no others that become zeros.
        let (size, block) = (self.child().size(), self.child().block().max(self.parent.block()));
        let (mut start, mut before) = (0, self.work.progress.done);
        for at in (0..size).step_by(block as usize) {
            let done = self.work.progress.done;
            if done - before + block > most && done != before {
                self.parent.sync()?;
                self.work.chain.forget(self.child(), (start, at - start))?;
                self.child().sync()?;
                (start, before) = (at, done);
            }
            self.copy(at, block.min(size - at))?;
        }
        Ok(())
    }

    /// Copies what the run holds of a range.
    fn copy(&mut self, offset: u64, len: u64) -> Result<(), Stop> {
        let run = Arc::clone(&self.run);
        // Whole blocks of the parent, so that it can let go of those that become zeros.
        let block = self.parent.block().max(PIECE);
        run.each(offset, len, |start, len, place| {
            let unit = if matches!(place, Place::Data { .. }) { PIECE } else { block };
            for (offset, len) in pieces(start, len, unit) {
                if self.mirrored {
                    self.put_still(offset, len)?;
                } else {
                    self.put(offset, len, place.skip(offset - start))?;
                }
                let every = self.marks.every;
                if self.work.sync_copied(&Arc::clone(&self.parent), every)? {
                    self.work.progress.mark = self.mark_at(offset + len);
                }
                self.work.tell()?;
            }
            Ok(())
        })
    }

    /// Copies a piece of the leaf as it is now, while nobody writes it.
    fn put_still(&mut self, offset: u64, len: u64) -> Result<(), Stop> {
        let (chain, run) = (self.work.chain, Arc::clone(&self.run));
        let child = Arc::clone(self.child());
        let done = chain.still(&child, (offset, len), |stack| {
            stack.mirror().ok_or(Stop::Again)?.check()?;
            run.each(offset, len, |offset, len, place| self.put(offset, len, place))
        })?;
        done.ok_or(Stop::Again)
    }

    fn put(&mut self, offset: u64, len: u64, place: Place) -> Result<(), Stop> {
        let Place::Data { layer, at } = place else {
            if shows_through(&self.parent, offset, len)? {
                self.parent.copy_zeros(offset, len)?;
            }
            return Ok(());
        };
        for (piece, len) in pieces(offset, len, PIECE) {
            let data = &mut self.work.buffer[..len as usize];
            self.run.slots[layer].read(data, at + (piece - offset))?;
            self.parent.copy_in(data, piece)?;
            self.work.moved(len);
        }
        Ok(())
    }
}
