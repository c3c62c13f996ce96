//! The whole content of a chain: its hash, and copies of it in another format.

use crate::chain::{Chain, ChainRun, RunKind};
use crate::{Error, ErrorKind, Result};
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use store::Store;

/// How much is read before it is handed on, in bytes and in pieces, and how often that may be ahead.
const BUFFER: u64 = 1 << 20;
const PIECES: usize = 256;
const BUFFERS: usize = 4;
/// How far one look at the chain's runs reaches, in bytes, and how many it returns at most.
const LOOK: u64 = 1 << 30;
const RUNS: usize = 4096;
/// Zeros are left out of a copy in pieces of this many bytes, aligned.
const GRAIN: usize = 4096;

/// Told how many bytes of how many are done; `false` stops.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// What a piece of the disk holds.
enum Content<'a> {
    /// Bytes, at most [`BUFFER`].
    Data(&'a [u8]),
    /// So many zeros that no layer holds.
    Zeros(u64),
}

/// Pieces of the disk, in order.
#[derive(Debug)]
struct Batch {
    /// Length in bytes, and whether it is data.
    pieces: Vec<(u64, bool)>,
    /// The bytes of all that are data, one behind the other.
    data: Vec<u8>,
}

/// Hands the whole content to `each`, piece by piece, in order; a thread of its own reads ahead. Says whether it came to the end:
/// `false` if `progress` stopped it.
fn each_piece(
    chain: &Chain,
    progress: Progress<'_>,
    mut each: impl FnMut(u64, Content<'_>) -> Result<()>,
) -> Result<bool> {
    let (buffers, unused) = mpsc::channel();
    let (batches, arrived) = mpsc::sync_channel(BUFFERS);
    for _ in 0..BUFFERS {
        buffers.send(vec![0; BUFFER as usize]).expect("the other end is here");
    }
    // What the reader may wait for goes with this closure, however it ends.
    thread::scope(move |scope| {
        let reader = scope.spawn(move || read_ahead(chain, &unused, &batches));
        let mut at = 0;
        for Batch { pieces, data } in arrived {
            let mut rest = &*data;
            for (len, is_data) in pieces {
                let (bytes, after) = rest.split_at(if is_data { len as usize } else { 0 });
                each(at, if is_data { Content::Data(bytes) } else { Content::Zeros(len) })?;
                (at, rest) = (at + len, after);
            }
            if !progress(at, chain.size()) {
                return Ok(false);
            }
            // A reader that has come to its end wants no more.
            let _ = buffers.send(data);
        }
        reader.join().expect("reading does not panic").map(|()| true)
    })
}

/// Reads everything into buffers that are given back; ends early when nobody takes them any more.
fn read_ahead(chain: &Chain, unused: &Receiver<Vec<u8>>, batches: &SyncSender<Batch>) -> Result<()> {
    let size = chain.size();
    let (mut at, mut runs) = (0, VecDeque::new());
    while at < size {
        let Ok(mut data) = unused.recv() else { return Ok(()) };
        let (mut pieces, mut filled) = (Vec::new(), 0);
        while at < size && filled < data.len() && pieces.len() < PIECES {
            if runs.is_empty() {
                runs.extend(chain.runs(at, LOOK.min(size - at), RUNS)?);
            }
            let run: ChainRun = runs.pop_front().expect("there is something up to the disk's end");
            let is_data = run.kind == RunKind::Data;
            let len = if is_data { run.len.min((data.len() - filled) as u64) } else { run.len };
            if is_data {
                let end = filled + len as usize;
                chain.read(&mut data[filled..end], at)?;
                filled = end;
            }
            if len < run.len {
                runs.push_front(ChainRun { offset: at + len, len: run.len - len, ..run });
            }
            pieces.push((len, is_data));
            at += len;
        }
        if batches.send(Batch { pieces, data }).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The SHA-256 of the disk's content, all of it: what `sha256sum` says of the raw disk. `None` if `progress` stopped it.
pub fn hash(chain: &Chain, progress: Progress<'_>) -> Result<Option<[u8; 32]>> {
    let zeros = vec![0; BUFFER as usize];
    let mut digest = Sha256::new();
    let ended = each_piece(chain, progress, |_, content| {
        match content {
            Content::Data(bytes) => digest.update(bytes),
            Content::Zeros(mut count) => {
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
    let ended = each_piece(source, progress, |offset, content| match content {
        Content::Data(bytes) => {
            filled(bytes).try_for_each(|(start, end)| target.write(&bytes[start..end], offset + start as u64))
        }
        Content::Zeros(_) => Ok(()),
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
