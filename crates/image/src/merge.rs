//! Folding a layer into its parent, whose file then plays the layer's part.
//!
//! ```text
//!   before            copying                       after the commit
//!   leaf   ──┐        leaf                          leaf ──┐
//!   child  ──┤        child ══ data, zeros ══╗             │
//!   parent ──┤        parent ◄═══════════════╝      parent ┤   (with the child's content and id)
//!   base   ──┘        base                          base ──┘
//! ```
//!
//! Until `commit` has returned the child is the truth: what is copied into the parent lies under the child's own copy, so the chain
//! reads the same at every moment, and a fold that was cut off anywhere is repeated or forgotten without loss. After it the parent
//! is, and the child's file is of no use.
//!
//! A run of layers that nothing else needs is folded as one: its top plays the child, and of each sector only the topmost copy moves,
//! however often it was written ([`fold_run`]). The link that is changed is then that of the run's lowest layer, and the id that the
//! parent takes at the end that of its top.
//!
//! If the child is the leaf, the guest goes on writing to it: passes copy again what was written meanwhile, and the last, short one
//! happens while requests wait.
//!
//! # Ids
//!
//! Somebody else's child must not take the mixture for the old parent, and what stands on the child must not be touched. `G` is fresh:
//!
//! | step | child links to | parent is | |
//! | --- | --- | --- | --- |
//! | | old | old | |
//! | 1 | old or G | old | |
//! | 2 | old or G | G | now the parent's content changes |
//! | 3 | child's id or G | G | all is copied and synced |
//! | 4 | child's id or G | child's id | what stands on the child accepts the parent |
//! | commit | – | child's id | |
//!
//! In every row the child accepts the parent, so a crash between two steps leaves a chain that opens. Each step is one
//! [`Layer::relink`], which every format makes atomic: VHDX by its log, VHD by a second header and a locator of our own for the second
//! id (`docs/formats/vhd.md`). So the two may stand on each other.
//!
//! # Sizes
//!
//! A layer cuts off what lies under it beyond its own end. So after step 2, where nobody but the child looks at the parent any more, the
//! parent gets the child's size: what it loses the child hides, and what it gains reads as zeros ([`Layer::resize`]), as it did through
//! the child.
//!
//! # Space
//!
//! [`move_down`] lets go of what the child holds as soon as the parent holds it durably, so that both together never need much
//! more than before. The child alone is not the truth then, but child and parent are, and nobody else stands on the parent.

use crate::chain::{Access, Chain, Found, Place, Slot, Stack, invalid, resolve};
use crate::{Error, Format, Layer, ParentLink, Result, Source};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// [`move_down`] lets go of what the parent holds durably once it is so many bytes, or less if room is scarce. Each time costs syncs.
const MOVED: u64 = 256 << 20;
/// Data moves in pieces of this many bytes.
const PIECE: u64 = 1 << 20;
/// A layer is looked at in windows of this many bytes, a multiple of every block size.
const WINDOW: u64 = 1 << 30;
/// Requests are held for the last pass when no more than this is left to copy, bytes.
const SMALL: u64 = 4 << 20;
/// A guest that writes faster than we copy is held after this many passes, whatever is left.
const PASSES: usize = 10;
/// How often to ask whether the push above a layer has been settled.
const PATIENCE: Duration = Duration::from_millis(5);

/// How far a fold is. Both only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes copied.
    pub done: u64,
    /// Bytes to copy, as far as is known by now.
    pub total: u64,
}

/// How a fold ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The child's content is the parent's now, and the child is out of the chain.
    Folded,
    /// `progress` said to stop. The chain reads as before; a later fold begins again.
    Cancelled,
}

/// Why a fold did not happen. The chain reads as before.
#[derive(Debug, thiserror::Error)]
pub enum FoldError<E> {
    /// An image failed.
    #[error(transparent)]
    Image(#[from] Error),
    /// The caller's commit failed. If it is not certain that nothing was committed, nothing more may be written to this chain.
    #[error("the commit failed")]
    Commit(E),
}

/// Bytes of data that a fold of `child` into `parent` moves.
pub fn plan(child: &Arc<dyn Layer>, parent: &Arc<dyn Layer>) -> Result<u64> {
    let (child, parent) = (Slot::new(Arc::clone(child)), Slot::new(Arc::clone(parent)));
    check_pair(&child, &parent)?;
    Run::new(vec![Arc::new(child)]).bytes()
}

/// Folds `child` into `parent`, live in `chain` (where they stand next to each other; see [`Chain::replace`]) or offline (`None`).
///
/// Both must be writable: the child's link and the parent's content and id change. `g` is the fresh id of the module's table; a fold
/// that was begun before goes on with the id it finds. `progress` is called after each piece. `commit` runs once, when all is
/// durable; neither it nor `progress` may use the chain, for requests may be held. Ends with neither layer closed; the child's file is the caller's to remove.
///
/// Refused: a child whose size the parent cannot have ([`Layer::check_resize`]).
pub fn fold_down<E>(
    chain: Option<&Chain>,
    child: &Arc<dyn Layer>,
    parent: &Arc<dyn Layer>,
    g: Uuid,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    commit: impl FnOnce() -> Result<(), E>,
) -> Result<Outcome, FoldError<E>> {
    fold_run(chain, std::slice::from_ref(child), parent, g, progress, commit)
}

/// [`fold_down`] of several layers at once, lowest first, each standing on the one before and the first on `parent`: of each sector only
/// the topmost copy moves. The top is the child; what lies between is left as it is, and out of the chain with the rest at the end. Only
/// the lowest of them and the parent need be writable.
pub fn fold_run<E>(
    chain: Option<&Chain>,
    run: &[Arc<dyn Layer>],
    parent: &Arc<dyn Layer>,
    g: Uuid,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    commit: impl FnOnce() -> Result<(), E>,
) -> Result<Outcome, FoldError<E>> {
    let offline;
    let chain = if let Some(chain) = chain {
        chain
    } else {
        let layers = std::iter::once(parent).chain(run).cloned().collect();
        offline = Chain::new(layers, Access::Write)?;
        &offline
    };
    let _one = chain.folding();
    let mut fold = Fold::begin(chain, run, parent, progress)?;
    fold.run(Some(g), commit)
}

/// [`fold_down`] of the last of these layers, base first, which nobody uses, into the one below: what was copied is given up in the
/// child, so that the fold never needs the space twice. (What lies below the two is only asked for its size.) Cancelled or cut off, it has changed neither what the child reads as nor what stands on it, and goes on when it is called again.
///
/// About `room` bytes may be taken twice for a moment; two blocks of either at least. Less room means more syncs.
pub fn move_down<E>(
    layers: &[Arc<dyn Layer>],
    room: u64,
    g: Uuid,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    commit: impl FnOnce() -> Result<(), E>,
) -> Result<Outcome, FoldError<E>> {
    let [.., parent, child] = layers else {
        return Err(invalid("there is nothing to fold the only layer into").into());
    };
    let chain = Chain::new(layers.to_vec(), Access::Write)?;
    let _one = chain.folding();
    let mut fold = Fold::begin(&chain, std::slice::from_ref(child), parent, progress)?;
    fold.most = Some((room / 2).min(MOVED));
    fold.run(Some(g), commit)
}

/// Folds the leaf back into the layer below, whose id stays: nothing else stands on either.
pub(crate) fn fold_back<E>(
    chain: &Chain,
    commit: impl FnOnce() -> Result<(), E>,
) -> Result<Arc<dyn Layer>, FoldError<E>> {
    let _one = chain.folding();
    let layers = chain.layers();
    let [.., parent, leaf] = layers.as_slice() else {
        return Err(invalid("the only layer of a chain cannot be taken away").into());
    };
    if chain.shared().is_ambiguous(layers.len() - 1) {
        return Err(invalid("the last push is still ambiguous: cancel it").into());
    }
    let progress = &mut |_| ControlFlow::Continue(());
    Fold::begin(chain, std::slice::from_ref(leaf), parent, progress)?.run(None, commit)?;
    Ok(Arc::clone(leaf))
}

/// Why copying stopped early.
enum Stop {
    Cancelled,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The layers that are folded as one, lowest first.
struct Run {
    slots: Vec<Arc<Slot>>,
    /// Where the first layer below the top ends: what the top does not say beyond it is zeros, whatever lies below.
    cut: u64,
}

impl Run {
    fn new(slots: Vec<Arc<Slot>>) -> Self {
        let below = slots.split_last().map_or(&[][..], |(_, below)| below);
        let cut = below.iter().map(|slot| slot.size()).min().unwrap_or(u64::MAX);
        Self { slots, cut }
    }

    /// The one whose link names the parent.
    fn lowest(&self) -> &Slot {
        &self.slots[0]
    }

    /// Hands out what the run says of a range, topmost copies only; what it does not say is left out.
    fn each<E: From<Error>>(
        &self,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(u64, u64, Place) -> Result<(), E>,
    ) -> Result<(), E> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let next = end.min((at / WINDOW + 1) * WINDOW);
            for Found { offset, len, place } in resolve(&self.slots, at, next - at)? {
                let cut = self.cut.clamp(offset, offset + len);
                match place {
                    Place::Hole if cut < offset + len => {
                        visit(cut, offset + len - cut, Place::Zero { layer: self.slots.len() - 1 })?;
                    }
                    Place::Hole => {}
                    _ => visit(offset, len, place)?,
                }
            }
            at = next;
        }
        Ok(())
    }

    /// Bytes of data to be moved.
    fn bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        let size = self.slots.last().map_or(0, |top| top.size());
        self.each(0, size, |_, len, place| {
            bytes += if matches!(place, Place::Data { .. }) { len } else { 0 };
            Ok::<_, Error>(())
        })?;
        Ok(bytes)
    }
}

/// A fold under way; the child's writes are noted as long as it lives.
struct Fold<'a> {
    chain: &'a Chain,
    /// The top of the run.
    child: Arc<Slot>,
    run: Arc<Run>,
    parent: Arc<Slot>,
    report: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    progress: Progress,
    buffer: Vec<u8>,
    /// The child gives up what was copied before it is more than so many bytes (or one block).
    most: Option<u64>,
}

impl Drop for Fold<'_> {
    fn drop(&mut self) {
        self.child.touched().stop();
    }
}

impl<'a> Fold<'a> {
    fn begin(
        chain: &'a Chain,
        run: &[Arc<dyn Layer>],
        parent: &Arc<dyn Layer>,
        report: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Self> {
        let stack = chain.alone();
        let neighbours = || {
            let base = stack.position(parent)?;
            let at = |(number, layer): (usize, &Arc<dyn Layer>)| {
                stack.position(layer).filter(|at| *at == base + 1 + number).map(|at| Arc::clone(stack.slot(at)))
            };
            Some((Arc::clone(stack.slot(base)), run.iter().enumerate().map(at).collect::<Option<Vec<_>>>()?))
        };
        let not_neighbours = || invalid("child and parent are not neighbours in this chain");
        let (parent, slots) = neighbours().ok_or_else(not_neighbours)?;
        let child = Arc::clone(slots.last().ok_or_else(not_neighbours)?);
        check_pair(&child, &parent)?;
        child.touched().start();
        drop(stack);
        let (progress, buffer) = (Progress::default(), vec![0; PIECE as usize]);
        Ok(Self { chain, child, run: Arc::new(Run::new(slots)), parent, report, progress, buffer, most: None })
    }

    fn run<E>(&mut self, g: Option<Uuid>, commit: impl FnOnce() -> Result<(), E>) -> Result<Outcome, FoldError<E>> {
        let mut commit = Some(commit);
        let ended = self.copy_all(g).and_then(|()| {
            loop {
                if let Some(result) = self.end(g, &mut commit)? {
                    return Ok(result);
                }
                // A snapshot is just being taken: what belongs into the child is open until it is settled.
                self.tell()?;
                std::thread::sleep(PATIENCE);
            }
        });
        match ended {
            Ok(committed) => committed.map(|()| Outcome::Folded).map_err(FoldError::Commit),
            Err(Stop::Cancelled) => Ok(Outcome::Cancelled),
            Err(Stop::Failed(error)) => Err(error.into()),
        }
    }

    /// Everything, then what was written meanwhile, until little is left.
    fn copy_all(&mut self, g: Option<Uuid>) -> Result<(), Stop> {
        // Writing must not change the id by which the child knows its parent: only the steps below do.
        self.parent.layer().settle()?;
        if let Some(g) = g {
            self.take_apart(g)?;
        }
        if self.parent.size() != self.child.size() {
            self.chain.resize_slot(&self.parent, self.child.size())?;
        }
        self.progress.total = self.run.bytes()?;
        self.tell()?;
        match self.most {
            Some(most) => self.copy_and_forget(most)?,
            None => self.copy(0, self.child.size())?,
        }
        for _ in 0..PASSES {
            if self.child.touched().bytes() <= SMALL {
                break;
            }
            self.copy_touched()?;
        }
        // So that the last flush, while requests may wait, is short.
        Ok(self.chain.sync_slot(&self.parent)?)
    }

    /// Copies the rest, commits and splices. `None`: not yet, a push above the child is ambiguous.
    fn end<E, F: FnOnce() -> Result<(), E>>(
        &mut self,
        g: Option<Uuid>,
        commit: &mut Option<F>,
    ) -> Result<Option<Result<(), E>>, Stop> {
        let chain = self.chain;
        let Some((position, leaf)) = self.place(&chain.shared())? else { return Ok(None) };
        let _flushing = chain.flushing();
        // A sealed child does not change any more: requests go on beside the sync and the commit.
        let held = leaf.then(|| chain.alone());
        if let Some(stack) = &held
            && self.place(stack)? != Some((position, true))
        {
            return Ok(None);
        }
        self.copy_touched()?;
        self.parent.sync()?;
        if g.is_some() {
            self.hand_over()?;
        }
        let commit = commit.take().expect("a fold ends once");
        if let Err(error) = commit() {
            return Ok(Some(Err(error)));
        }
        let mut stack = held.unwrap_or_else(|| chain.alone());
        for slot in &self.run.slots {
            let position = stack.position(slot.layer()).expect("one fold at a time takes layers away");
            chain.splice(&mut stack, position);
        }
        Ok(Some(Ok(())))
    }

    /// Where the child stands and whether it is the leaf; `None` while that is ambiguous.
    fn place(&self, stack: &Stack) -> Result<Option<(usize, bool)>> {
        let position = stack.position(self.child.layer()).ok_or_else(|| invalid("the child left the chain"))?;
        Ok((!stack.is_ambiguous(position)).then(|| (position, stack.is_leaf(position))))
    }

    /// Steps 1 and 2 of the module's table: the parent is nobody else's parent any more.
    fn take_apart(&self, g: Uuid) -> Result<()> {
        let Some(link) = self.link() else { return Ok(()) };
        let id = self.parent.layer().info().data_id;
        if link.linkage2 == Some(id) {
            return Ok(()); // An earlier fold has come this far: its G serves.
        }
        self.run.lowest().layer().relink(None, Some(ParentLink { linkage: id, linkage2: Some(g), ..link }))?;
        self.parent.layer().relink(Some(g), None)
    }

    /// Steps 3 and 4: the parent takes the child's id.
    fn hand_over(&self) -> Result<()> {
        let Some(link) = self.link() else { return Ok(()) };
        let id = self.child.layer().info().data_id;
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
        let (size, block) = (self.child.size(), self.child.block().max(self.parent.block()));
        let (mut start, mut before) = (0, self.progress.done);
        for at in (0..size).step_by(block as usize) {
            if self.progress.done - before + block > most && self.progress.done != before {
                self.parent.sync()?;
                self.child.layer().forget(start, at - start)?;
                self.child.sync()?;
                (start, before) = (at, self.progress.done);
            }
            self.copy(at, block.min(size - at))?;
        }
        Ok(())
    }

    fn copy_touched(&mut self) -> Result<(), Stop> {
        let ranges = self.child.touched().take();
        self.progress.total += ranges.iter().map(|(_, len)| len).sum::<u64>();
        for (offset, len) in ranges {
            let end = self.progress.done + len;
            self.copy(offset, len)?;
            self.progress.done = end; // What is not data is done as well.
        }
        Ok(())
    }

    /// Copies what the child holds of a range. Beside writes of the guest the copy may be torn; it is then made again.
    fn copy(&mut self, offset: u64, len: u64) -> Result<(), Stop> {
        let run = Arc::clone(&self.run);
        run.each(offset, len, |offset, len, place| match place {
            Place::Data { layer, at } => self.copy_data(&run.slots[layer], offset, len, at),
            Place::Zero { .. } | Place::Hole => self.copy_zeros(offset, len),
        })
    }

    fn copy_data(&mut self, from: &Slot, offset: u64, len: u64, at: u64) -> Result<(), Stop> {
        let mut done = 0;
        while done < len {
            let piece = PIECE.min(len - done);
            let data = &mut self.buffer[..piece as usize];
            from.read(data, at + done)?;
            self.parent.copy_in(data, offset + done)?;
            done += piece;
            self.progress.done += piece;
            self.tell()?;
        }
        Ok(())
    }

    fn copy_zeros(&mut self, offset: u64, len: u64) -> Result<(), Stop> {
        // Whole blocks of the parent, so that it can let go of them.
        let unit = self.parent.block().max(PIECE);
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let next = end.min((at / unit + 1) * unit);
            if self.shows_through(at, next - at)? {
                self.parent.copy_zeros(at, next - at)?;
            }
            at = next;
        }
        self.tell()
    }

    /// Whether a range of the parent may read as anything but zeros.
    fn shows_through(&self, offset: u64, len: u64) -> Result<bool> {
        let mut runs = Vec::new();
        self.parent.map(offset, len, &mut runs)?;
        Ok(runs.iter().any(|run| match run.source {
            Source::Data(_) => true,
            Source::Zero => false,
            Source::Absent => self.parent.differencing(),
        }))
    }

    fn tell(&mut self) -> Result<(), Stop> {
        self.progress.total = self.progress.total.max(self.progress.done);
        match (self.report)(self.progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Stop::Cancelled),
        }
    }
}

/// After the fold the parent has the child's size.
fn check_pair(child: &Slot, parent: &Slot) -> Result<()> {
    if child.size() == parent.size() { Ok(()) } else { parent.layer().check_resize(child.size()) }
}
