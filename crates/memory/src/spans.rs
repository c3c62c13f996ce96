//! Which parts of a memory disk may hold something other than zeros.

use image::{Chain, RunKind};

/// The most runs asked for at a time.
const RUNS: usize = 4096;

/// A part of the disk: data in some layer, or zeros in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// Offset in bytes, a multiple of the page.
    pub(crate) at: u64,
    /// Length in bytes, a multiple of the page, never 0.
    pub(crate) len: u64,
    /// Whether a layer holds data for it.
    pub(crate) data: bool,
}

/// The spans that make up `[at, at + len)`, in order; the chain's sectors are pages, so no span ends within one.
pub(crate) fn spans(chain: &Chain, at: u64, len: u64, out: &mut Vec<Span>) -> image::Result<()> {
    out.clear();
    let (mut at, end) = (at, at + len);
    while at < end {
        for run in chain.runs(at, end - at, RUNS)? {
            let data = run.kind == RunKind::Data;
            match out.last_mut() {
                Some(last) if last.data == data => last.len += run.len,
                _ => out.push(Span { at: run.offset, len: run.len, data }),
            }
            at = run.offset + run.len;
        }
    }
    Ok(())
}
