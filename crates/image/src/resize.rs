//! What a disk would lose if it were smaller. (Its size is changed by [`crate::Layer::resize`] of its leaf: a child may be larger or
//! smaller than its parent.)

use crate::Result;
use crate::chain::{Chain, RunKind};

/// How much is read at once, in bytes.
const BUFFER: u64 = 1 << 20;
/// How far one look at the chain's runs reaches, in bytes, and how many it returns at most.
const LOOK: u64 = 1 << 30;
const RUNS: usize = 4096;

/// The end of what the disk holds besides zeros, in bytes, if that lies past `from`; else `from`. `None` if `progress`, which is
/// told bytes done and to do, stopped it.
pub fn data_end(chain: &Chain, from: u64, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<Option<u64>> {
    let size = chain.size();
    let (mut at, mut last) = (from, from);
    let mut buffer = vec![0; BUFFER as usize];
    while at < size {
        for run in chain.runs(at, LOOK.min(size - at), RUNS)? {
            let end = run.offset + run.len;
            while at < end {
                if run.kind != RunKind::Data {
                    at = end;
                    break;
                }
                let piece = &mut buffer[..BUFFER.min(end - at) as usize];
                chain.read(piece, at)?;
                if let Some(index) = piece.iter().rposition(|byte| *byte != 0) {
                    last = at + index as u64 + 1;
                }
                at += piece.len() as u64;
                if !progress(at - from, size - from) {
                    return Ok(None);
                }
            }
        }
    }
    Ok(Some(last))
}
