//! Folding layers into one: a run of layers that nothing else needs, and the child that stands on it.
//!
//! ```text
//!   before          down: what the child holds        up: what the child lacks
//!   leaf   ──┐      leaf ──┐                          leaf  ──┐
//!   child  ──┤        │    │                          child ◄─┤ ══╗ (what only the parent holds)
//!   parent ──┤      parent ┤ ◄══ (the child's content)    ────┤ ══╝
//!   base   ──┘      base ──┘     (and the child's id)  base ──┘
//! ```
//!
//! *Down* the parent's file plays the child's part afterwards, *up* the child's own file does. Which of the two moves fewer bytes says
//! [`plan`]. Until `commit` has returned the chain reads the same at every moment, whichever of its layers are looked at: down, what is
//! copied into the parent lies under the child's own copy; up, what is copied into the child is what lies beneath it. So a fold that was
//! cut off anywhere is repeated, in either direction, or forgotten without loss. After the commit the files that go are of no use.
//!
//! A run of layers that nothing else needs is folded as one: its top plays the child, and of each sector only the topmost copy moves,
//! however often it was written ([`fold_run`], [`fold_up`]).
//!
//! # Beside a guest
//!
//! If the child is the leaf, the guest goes on writing to it. Requests are never held while something is copied, synced or committed.
//!
//! - *Down*, what is written to the leaf goes to the parent too from the moment when the copying begins (`chain/mirror.rs`), so that
//!   nothing has to be copied again. In the last phase a flush covers both, then the parent is synced, then the commit runs: whichever
//!   side of it a crash finds, what was flushed is there.
//! - *Up*, the guest's writes are where they belong already. A copy goes only where the child holds nothing, while no request can change
//!   that.
//!
//! # Ids, down
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
//! id (`docs/formats/vhd.md`). So the two may stand on each other. In a run the link is that of its lowest layer, and the id that the
//! parent takes at the end that of its top.
//!
//! # Ids, up
//!
//! What goes is not changed, so nobody can take it for something else; what stands on the child is not touched.
//!
//! | step | child links to |
//! | --- | --- |
//! | | parent |
//! | 1 | parent or base; all is copied and synced |
//! | commit | parent or base |
//! | 2 | base |
//!
//! A child whose parent stands on nothing would have to become a disk without a parent. No format can say so in one step (in a VHDX the
//! states of all blocks change their meaning), so that such a run is folded down ([`can_fold_up`]).
//!
//! # Sizes
//!
//! A layer cuts off what lies under it beyond its own end. Down, after step 2, where nobody but the child looks at the parent any more, the
//! parent gets the child's size: what it loses the child hides, and what it gains reads as zeros ([`Layer::resize`]), as it did through
//! the child. Up, what the layers that go cut off is written as zeros.
//!
//! # Space
//!
//! [`move_down`] lets go of what the child holds as soon as the parent holds it durably, so that both together never need much
//! more than before. The child alone is not the truth then, but child and parent are, and nobody else stands on the parent.
//!
//! # Going on
//!
//! Up, what the child holds by now is not looked at again. Down, the parent does not tell what it holds of the child, so a fold that was cut off
//! goes on from a [`Mark`], which it told of on its way. There is none while the child is a leaf that is written: its flushes do not cover the parent.

mod down;
mod run;
mod up;
mod work;

use crate::chain::{Access, Chain, Slot, invalid};
use crate::{Error, ErrorKind, Kind, Layer, Result, gate};
use down::Down;
use run::Run;
use std::ops::ControlFlow;
use std::sync::Arc;
use up::Up;
use uuid::Uuid;
use work::Work;

/// [`move_down`] lets go of what the parent holds durably once it is so many bytes, or less if room is scarce. Each time costs syncs.
const MOVED: u64 = 256 << 20;

/// How far a fold is. Both only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes copied.
    pub done: u64,
    /// Bytes to copy, as far as is known by now.
    pub total: u64,
    /// What a later fold may go on from, if this one is cut off.
    pub mark: Option<Mark>,
}

/// How far a fold downwards came, for one that goes on: below `until` the parent holds durably what the run does.
///
/// Counts only for just these contents. It must not be kept for a child that somebody may write to, be it later: that does not always change its
/// id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Mark {
    /// The parent's id (`G` of the module's table).
    pub parent: Uuid,
    /// The child's id, the last of a run's.
    pub child: Uuid,
    /// Bytes from the disk's beginning.
    pub until: u64,
}

/// How a fold downwards that is cut off comes to go on.
#[derive(Debug, Clone, Copy)]
pub struct Marks {
    /// Where an earlier one came to. Not looked at if it is not of these layers as they are.
    pub from: Option<Mark>,
    /// A mark is told of ([`Progress::mark`]) each time that so many bytes have moved. Each costs a sync.
    pub every: u64,
}

impl Default for Marks {
    fn default() -> Self {
        Self { from: None, every: 128 << 20 }
    }
}

/// How a fold ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The layers are one now, and those that go are out of the chain.
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

/// Which way a fold goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Into the file of the lowest layer.
    Down,
    /// Into the file of the top.
    Up,
}

/// Bytes of data that a fold moves, by direction: out of each layer that goes, lowest first. `None`: that way is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What the layers above the lowest hold; closed if the lowest cannot have the top's size.
    pub down: Option<Vec<u64>>,
    /// What the top lacks; closed by [`can_fold_up`].
    pub up: Option<Vec<u64>>,
}

impl Plan {
    /// The way on which fewer bytes move; down if they are the same.
    pub fn direction(&self) -> Direction {
        let bytes = |way: &Option<Vec<u64>>| way.as_ref().map(|moves| moves.iter().sum::<u64>());
        match (bytes(&self.down), bytes(&self.up)) {
            (Some(down), Some(up)) if up < down => Direction::Up,
            (None, Some(_)) => Direction::Up,
            _ => Direction::Down,
        }
    }

    /// What moves out of each layer that goes on one of the ways; nothing if it is closed.
    pub fn moves(&self, direction: Direction) -> &[u64] {
        let way = if direction == Direction::Up { &self.up } else { &self.down };
        way.as_deref().unwrap_or_default()
    }

    /// Bytes that move on the cheaper way.
    pub fn bytes(&self) -> u64 {
        self.moves(self.direction()).iter().sum()
    }
}

/// What folding `layers` into one would move. They stand on each other, lowest first, two at least, and the lowest on `beneath`.
///
/// Refused: layers that can be folded neither way; the error says what is in the way downwards.
pub fn plan(beneath: Option<&dyn Layer>, layers: &[Arc<dyn Layer>]) -> Result<Plan> {
    let [parent, above @ ..] = layers else { return Err(alone()) };
    let top = above.last().ok_or_else(alone)?;
    let (run, all) = (Run::of(above), Run::of(layers));
    let down = check_down(run.top(), &Slot::new(Arc::clone(parent)));
    let up = beneath.is_some_and(|beneath| can_fold_up(beneath, &**top));
    let down = match down {
        Ok(()) => Some(run.bytes(0, run.top().size())?),
        Err(_) if up => None,
        Err(error) => return Err(error),
    };
    Ok(Plan { down, up: up.then(|| all.bytes_below_top()).transpose()? })
}

/// Whether `top`, the last of a run that stands on `beneath`, can come to stand on `beneath` itself.
pub fn can_fold_up(beneath: &dyn Layer, top: &dyn Layer) -> bool {
    let (info, beneath) = (top.info(), beneath.info());
    info.kind == Kind::Differencing && info.sector_size == beneath.sector_size
}

/// Folds `child` into `parent`, live in `chain` (where they stand next to each other; see [`Chain::replace`]) or offline (`None`).
///
/// Both must be writable: the child's link and the parent's content and id change. `g` is the fresh id of the module's table.
/// `progress` is called after each piece, while nothing is held: it may take its time. `commit` runs once, when all is durable; it must not change the layers of the chain. Ends with neither layer closed; the child's
/// file is the caller's to remove.
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
    fold_run(chain, std::slice::from_ref(child), parent, g, Marks::default(), progress, commit)
}

/// [`fold_down`] of several layers at once, lowest first, each standing on the one before and the first on `parent`: of each sector only
/// the topmost copy moves. The top is the child; what lies between is left as it is, and out of the chain with the rest at the end. Only
/// the lowest of them and the parent need be writable.
pub fn fold_run<E>(
    chain: Option<&Chain>,
    run: &[Arc<dyn Layer>],
    parent: &Arc<dyn Layer>,
    g: Uuid,
    marks: Marks,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    commit: impl FnOnce() -> Result<(), E>,
) -> Result<Outcome, FoldError<E>> {
    let offline = Offline::of(chain, parent, run)?;
    let (chain, live) = offline.chain(chain);
    let _one = chain.folding();
    let mut fold = Down::begin(Work::new(chain, live, progress), run, parent)?;
    fold.marks = marks;
    fold.run(Some(g), commit)
}

/// Folds `run` upwards: layers that stand on each other, lowest first, and the lowest on `beneath`. What the last one lacks, the others'
/// topmost copies, goes into it, and it stands on `beneath` afterwards. It must be writable; the others are not changed, and out of the
/// chain at the end. Their files are the caller's to remove. For the rest see [`fold_down`].
///
/// Refused: what [`can_fold_up`] denies.
pub fn fold_up<E>(
    chain: Option<&Chain>,
    beneath: &Arc<dyn Layer>,
    run: &[Arc<dyn Layer>],
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    commit: impl FnOnce() -> Result<(), E>,
) -> Result<Outcome, FoldError<E>> {
    let offline = Offline::of(chain, beneath, run)?;
    let (chain, live) = offline.chain(chain);
    let _one = chain.folding();
    Up::begin(Work::new(chain, live, progress), beneath, run)?.run(commit)
}

/// [`fold_down`] of the last of these layers, base first, into the one below, which gives up in the child what was copied: so the fold never needs
/// the space twice. (What lies below the two is only asked for its size.) Cancelled or cut off, it has changed neither what the child reads as
/// nor what stands on it, and goes on when it is called again.
///
/// About `room` bytes may be taken twice for a moment; two blocks of either at least. Less room means more syncs. A child that is the leaf of `chain`
/// gives nothing up: it is written.
pub fn move_down<E>(
    chain: Option<&Chain>,
    layers: &[Arc<dyn Layer>],
    room: u64,
    g: Uuid,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    commit: impl FnOnce() -> Result<(), E>,
) -> Result<Outcome, FoldError<E>> {
    let [beneath @ .., parent, child] = layers else { return Err(alone().into()) };
    let lowest = beneath.first().unwrap_or(parent);
    let offline = Offline::of(chain, lowest, &layers[1..])?;
    let (chain, live) = offline.chain(chain);
    let _one = chain.folding();
    let mut fold = Down::begin(Work::new(chain, live, progress), std::slice::from_ref(child), parent)?;
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
    Down::begin(Work::new(chain, true, progress), std::slice::from_ref(leaf), parent)?.run(None, commit)?;
    Ok(Arc::clone(leaf))
}

/// The chain of a fold that nobody else has made one for.
struct Offline(Option<Chain>);

impl Offline {
    fn of(live: Option<&Chain>, lowest: &Arc<dyn Layer>, above: &[Arc<dyn Layer>]) -> Result<Self> {
        let layers = || std::iter::once(lowest).chain(above).cloned().collect();
        let chain = live.is_none().then(|| Chain::new(layers(), Access::Write)).transpose()?;
        Ok(Self(chain))
    }

    /// The chain to work in, and whether others use it.
    fn chain<'a>(&'a self, live: Option<&'a Chain>) -> (&'a Chain, bool) {
        match (&self.0, live) {
            (Some(own), _) => (own, false),
            (None, live) => (live.expect("one of the two is there"), true),
        }
    }
}

fn alone() -> Error {
    invalid("there is nothing to fold the only layer into")
}

/// After a fold downwards the parent has the child's size.
fn check_down(child: &Slot, parent: &Slot) -> Result<()> {
    if child.size() == parent.size() { Ok(()) } else { parent.layer().check_resize(child.size()) }
}

fn check_up(run: &Run, beneath: &Slot) -> Result<()> {
    if run.slots.len() < 2 {
        return Err(alone());
    }
    gate::check_link(&**run.lowest().layer(), &**beneath.layer())?;
    if can_fold_up(&**beneath.layer(), &**run.top().layer()) {
        return Ok(());
    }
    let message = "it cannot stand on what lies below its parent";
    Err(Error::new(ErrorKind::Unsupported, run.top().layer().store().name(), message))
}
