//! Changing a disk's size, of a chain's leaf too: a child may be larger or smaller than its parent.

use crate::chain::{Chain, RunKind};
use crate::{Error, ErrorKind, Result};
use std::sync::Arc;

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

/// Makes the disk `size` bytes: its leaf, which must be open for writing. What is cut off must hold nothing but zeros; what is
/// added reads as zeros. Says `false` if `progress` stopped it before anything changed. The chain is not to be used afterwards.
///
/// # Errors
/// [`ErrorKind::Invalid`] if something but zeros would be cut off, or for a size that the format does not know.
pub fn resize(chain: &Chain, size: u64, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool> {
    let layers = chain.layers();
    let leaf = layers.last().expect("a chain has at least one layer");
    leaf.check_resize(size)?;
    if size < chain.size() {
        let Some(end) = data_end(chain, size, progress)? else { return Ok(false) };
        if end > size {
            let message = format!("it holds data up to {end}; {size} bytes would cut that off");
            return Err(Error::new(ErrorKind::Invalid, Arc::clone(leaf).store().name(), message));
        }
    }
    leaf.resize(size)?;
    leaf.close()?;
    Ok(true)
}
