//! The whole content of a chain: its hash, and copies of it in another format.

use crate::chain::{Chain, RunKind};
use crate::{Error, ErrorKind, Result};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use store::Store;

/// How much is read at once, in bytes.
const BUFFER: u64 = 2 << 20;
/// How far one look at the chain's runs reaches, in bytes, and how many it returns at most.
const LOOK: u64 = 1 << 30;
const RUNS: usize = 4096;
/// Zeros are left out of a copy in pieces of this many bytes, aligned.
const GRAIN: usize = 4096;

/// Told how many bytes of how many are done; `false` stops.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// A piece of the disk's content, in order.
enum Piece<'a> {
    /// Bytes, at most [`BUFFER`].
    Data(&'a [u8]),
    /// So many zeros that no layer holds.
    Zeros(u64),
}

/// Hands the whole content to `each`, piece by piece with its offset. Says whether it came to the end: `false` if `progress`
/// stopped it.
fn each_piece(
    chain: &Chain,
    progress: Progress<'_>,
    mut each: impl FnMut(u64, Piece<'_>) -> Result<()>,
) -> Result<bool> {
    let size = chain.size();
    let mut buffer = vec![0; BUFFER as usize];
    let mut at = 0;
    while at < size {
        for run in chain.runs(at, LOOK.min(size - at), RUNS)? {
            if run.kind != RunKind::Data {
                each(run.offset, Piece::Zeros(run.len))?;
                at = run.offset + run.len;
                continue;
            }
            let end = run.offset + run.len;
            while at < end {
                let piece = &mut buffer[..BUFFER.min(end - at) as usize];
                chain.read(piece, at)?;
                each(at, Piece::Data(piece))?;
                at += piece.len() as u64;
                if !progress(at, size) {
                    return Ok(false);
                }
            }
        }
        if !progress(at, size) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The SHA-256 of the disk's content, all of it: what `sha256sum` says of the raw disk. `None` if `progress` stopped it.
pub fn hash(chain: &Chain, progress: Progress<'_>) -> Result<Option<[u8; 32]>> {
    let zeros = vec![0; BUFFER as usize];
    let mut digest = Sha256::new();
    let ended = each_piece(chain, progress, |_, piece| {
        match piece {
            Piece::Data(bytes) => digest.update(bytes),
            Piece::Zeros(mut count) => {
                while count > 0 {
                    let now = count.min(BUFFER);
                    digest.update(&zeros[..now as usize]);
                    count -= now;
                }
            }
        }
        Ok(())
    })?;
    Ok(ended.then(|| digest.finalize().into()))
}

/// Copies the whole content of `source` to `target`, which is new (it reads as zeros) and at least as large, and flushes it. Zeros
/// are left out. Says whether it came to the end: `false` if `progress` stopped it, and then the target is to be thrown away.
///
/// # Errors
/// [`ErrorKind::Invalid`] if the target is smaller than the source; and those of both chains.
pub fn copy(source: &Chain, target: &Chain, progress: Progress<'_>) -> Result<bool> {
    if target.size() < source.size() {
        let message = format!("{} bytes do not fit into {}", source.size(), target.size());
        return Err(Error::new(ErrorKind::Invalid, name(target), message));
    }
    let ended = each_piece(source, progress, |offset, piece| match piece {
        Piece::Data(bytes) => {
            filled(bytes).try_for_each(|(start, end)| target.write(&bytes[start..end], offset + start as u64))
        }
        Piece::Zeros(_) => Ok(()),
    })?;
    target.flush()?;
    Ok(ended)
}

/// Fills the holes of a file with zeros, so that all of it takes space, and syncs it: a file with holes is refused by Windows when it
/// arrives there as a sparse one. Says `false` if `progress` stopped it.
pub fn fill(store: &dyn Store, progress: Progress<'_>) -> Result<bool> {
    let (len, zeros) = (store.len()?, vec![0; BUFFER as usize]);
    let mut at = 0;
    while at < len {
        let (start, end) = store.data(at)?.unwrap_or((len, len));
        while at < start.min(len) {
            let piece = BUFFER.min(start.min(len) - at);
            store.write_at(&zeros[..piece as usize], at)?;
            at += piece;
            if !progress(at, len) {
                return Ok(false);
            }
        }
        at = at.max(end);
    }
    store.sync()?;
    Ok(true)
}

fn name(chain: &Chain) -> String {
    chain.layers().last().map_or_else(String::new, |leaf| Arc::clone(leaf).store().name())
}

/// The stretches of `bytes` that are not zeros, from and to, in whole grains.
fn filled(bytes: &[u8]) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    let is_zero = |start: usize| {
        // Compared by 16 bytes at a time: this runs over every byte of a disk.
        let (chunks, rest) = bytes[start..bytes.len().min(start + GRAIN)].as_chunks::<16>();
        chunks.iter().all(|chunk| u128::from_ne_bytes(*chunk) == 0) && rest.iter().all(|byte| *byte == 0)
    };
    std::iter::from_fn(move || {
        while at < bytes.len() && is_zero(at) {
            at += GRAIN;
        }
        let start = at;
        while at < bytes.len() && !is_zero(at) {
            at += GRAIN;
        }
        (start < bytes.len()).then(|| (start, at.min(bytes.len())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_left_out() {
        let mut bytes = vec![0; 5 * GRAIN + 10];
        assert_eq!(filled(&bytes).count(), 0);
        bytes[GRAIN] = 1;
        bytes[3 * GRAIN - 1] = 1;
        bytes[5 * GRAIN + 9] = 1;
        assert_eq!(filled(&bytes).collect::<Vec<_>>(), [(GRAIN, 3 * GRAIN), (5 * GRAIN, 5 * GRAIN + 10)]);
        assert_eq!(filled(&[1; 10]).collect::<Vec<_>>(), [(0, 10)]);
    }
}
