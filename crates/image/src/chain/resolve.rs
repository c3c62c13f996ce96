//! Where bytes lie, asked of every layer from the leaf down.

use super::slot::Slot;
use crate::{Result, Source};
use std::sync::Arc;

/// Where a run's content comes from. Layers are counted from the base, 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// At this offset of this layer's file.
    Data { layer: usize, at: u64 },
    /// This layer says zeros.
    Zero { layer: usize },
    /// No layer holds it, or a layer's end cut it off: zeros.
    Hole,
}

impl Place {
    /// The place of what lies so many bytes behind.
    pub(crate) fn skip(self, bytes: u64) -> Self {
        match self {
            Self::Data { layer, at } => Self::Data { layer, at: at + bytes },
            other => other,
        }
    }
}

/// A run of virtual bytes and its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) place: Place,
}

impl Found {
    /// Whether `next` goes on where this ends, in the file too.
    fn continues(&self, next: &Found) -> bool {
        match (self.place, next.place) {
            (Place::Data { layer, at }, Place::Data { layer: other, at: then }) => {
                layer == other && at + self.len == then
            }
            (a, b) => a == b,
        }
    }
}

/// The runs that make up `[offset, offset + len)`, in order, without gaps, joined where they continue each other.
///
/// Beside a write of the same sectors the answer may be from before or after it.
pub(crate) fn resolve(slots: &[Arc<Slot>], offset: u64, len: u64) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let mut open = vec![(offset, len)];
    let mut below = Vec::new();
    let mut runs = Vec::new();
    for (layer, slot) in slots.iter().enumerate().rev() {
        for (offset, len) in open.drain(..) {
            // A layer cuts off what lies under it beyond its own end.
            let inside = slot.size().saturating_sub(offset).min(len);
            if inside < len {
                found.push(Found { offset: offset + inside, len: len - inside, place: Place::Hole });
            }
            if inside == 0 {
                continue;
            }
            runs.clear();
            slot.map(offset, inside, &mut runs)?;
            for run in &runs {
                let place = match run.source {
                    Source::Data(at) => Place::Data { layer, at },
                    Source::Zero => Place::Zero { layer },
                    Source::Absent => {
                        below.push((run.offset, run.len));
                        continue;
                    }
                };
                found.push(Found { offset: run.offset, len: run.len, place });
            }
        }
        std::mem::swap(&mut open, &mut below);
        if open.is_empty() {
            break;
        }
    }
    found.extend(open.into_iter().map(|(offset, len)| Found { offset, len, place: Place::Hole }));
    found.sort_unstable_by_key(|run| run.offset);
    found.dedup_by(|next, run| {
        let joined = run.continues(next);
        if joined {
            run.len += next.len;
        }
        joined
    });
    Ok(found)
}
