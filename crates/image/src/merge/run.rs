//! The layers that a fold makes one of.

use crate::chain::{Found, Place, Slot, Stack, invalid, resolve};
use crate::{Error, Layer, Result, Source};
use std::sync::Arc;

/// A layer is looked at in windows of this many bytes, a multiple of every block size.
const WINDOW: u64 = 1 << 30;

/// Layers that stand on each other, lowest first.
pub(super) struct Run {
    pub(super) slots: Vec<Arc<Slot>>,
    /// Where the first layer below the top ends: what the top does not say beyond it is zeros, whatever lies below.
    cut: u64,
}

impl Run {
    pub(super) fn new(slots: Vec<Arc<Slot>>) -> Self {
        let below = slots.split_last().map_or(&[][..], |(_, below)| below);
        let cut = below.iter().map(|slot| slot.size()).min().unwrap_or(u64::MAX);
        Self { slots, cut }
    }

    /// These layers where nobody uses them.
    pub(super) fn of(layers: &[Arc<dyn Layer>]) -> Self {
        Self::new(layers.iter().map(|layer| Arc::new(Slot::new(Arc::clone(layer)))).collect())
    }

    /// These layers as they stand in a chain, where they must be neighbours.
    pub(super) fn within(stack: &Stack, layers: &[Arc<dyn Layer>]) -> Result<Self> {
        let positions: Option<Vec<usize>> = layers.iter().map(|layer| stack.position(layer)).collect();
        let neighbours = positions.filter(|at| !at.is_empty() && at.windows(2).all(|pair| pair[1] == pair[0] + 1));
        let positions = neighbours.ok_or_else(|| invalid("the layers are not neighbours in this chain"))?;
        Ok(Self::new(positions.into_iter().map(|at| Arc::clone(stack.slot(at))).collect()))
    }

    pub(super) fn lowest(&self) -> &Slot {
        &self.slots[0]
    }

    pub(super) fn top(&self) -> &Arc<Slot> {
        &self.slots[self.slots.len() - 1]
    }

    /// Whether this is the number of the top.
    fn is_top(&self, layer: usize) -> bool {
        layer + 1 == self.slots.len()
    }

    /// Hands out what the run says of a range, topmost copies only; what it does not say is left out.
    pub(super) fn each<E: From<Error>>(
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
                    // Some layer below the top has ended before.
                    Place::Hole if cut < offset + len => visit(cut, offset + len - cut, Place::Zero { layer: 0 })?,
                    Place::Hole => {}
                    _ => visit(offset, len, place)?,
                }
            }
            at = next;
        }
        Ok(())
    }

    /// [`Run::each`] of what the top lacks.
    pub(super) fn each_below_top<E: From<Error>>(
        &self,
        mut visit: impl FnMut(u64, u64, Place) -> Result<(), E>,
    ) -> Result<(), E> {
        self.each(0, self.top().size(), |offset, len, place| match place {
            Place::Data { layer, .. } | Place::Zero { layer } if self.is_top(layer) => Ok(()),
            _ => visit(offset, len, place),
        })
    }

    /// Bytes of data that the run holds of a range, by the layer whose copy counts.
    pub(super) fn bytes(&self, offset: u64, len: u64) -> Result<Vec<u64>> {
        let mut bytes = vec![0; self.slots.len()];
        self.each(offset, len, |_, len, place| count(&mut bytes, len, place))?;
        Ok(bytes)
    }

    /// Bytes of data that the top lacks, by the layer below it that has them.
    pub(super) fn bytes_below_top(&self) -> Result<Vec<u64>> {
        let mut bytes = vec![0; self.slots.len() - 1];
        self.each_below_top(|_, len, place| count(&mut bytes, len, place))?;
        Ok(bytes)
    }
}

#[expect(clippy::unnecessary_wraps, reason = "visitors of a run may fail, this one does not")]
fn count(bytes: &mut [u64], len: u64, place: Place) -> Result<()> {
    if let Place::Data { layer, .. } = place {
        bytes[layer] += len;
    }
    Ok(())
}

/// Whether a range of a layer may read as anything but zeros.
pub(super) fn shows_through(slot: &Slot, offset: u64, len: u64) -> Result<bool> {
    let mut runs = Vec::new();
    // Beyond its end everything is zeros.
    let inside = slot.size().saturating_sub(offset).min(len);
    if inside > 0 {
        slot.map(offset, inside, &mut runs)?;
    }
    Ok(runs.iter().any(|run| match run.source {
        Source::Data(_) => true,
        Source::Zero => false,
        Source::Absent => slot.differencing(),
    }))
}
