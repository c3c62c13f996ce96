//! Where a read finds its data, for who reads the file himself: many reads at a time, by one thread.

use super::{Chain, Place, Stack, index::BLOCK};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, RwLockReadGuard};
use store::Store;

/// What bytes of the disk are at this moment.
#[derive(Debug)]
pub enum Located<'a> {
    /// They lie in a file.
    Data(Held<'a>),
    /// Zeros.
    Zeros,
}

/// A place in a layer's file. Until it is dropped the place holds those bytes of the disk, and no other file comes to hold them: what
/// gives places away waits, and so does every change of the layers.
///
/// Who holds one must not wait for anybody but the file: not for a client, and not for a request to the same chain.
#[derive(Debug)]
pub struct Held<'a> {
    store: Arc<dyn Store>,
    at: u64,
    // Given back in this order, the reverse of how they are taken.
    _gate: RwLockReadGuard<'a, ()>,
    _stack: RwLockReadGuard<'a, Stack>,
}

impl Held<'_> {
    /// Offset in the file, bytes.
    pub fn at(&self) -> u64 {
        self.at
    }
}

impl AsFd for Held<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.store.descriptor().expect("only what has a descriptor is held")
    }
}

impl Chain {
    /// Where `[offset, offset + len)` lies, if it is in one piece, in a file of the host, and nobody has to be waited for. `None` says
    /// nothing about the bytes: [`Chain::read`] knows. `offset` and `len` in bytes, of any alignment.
    ///
    /// One thread may hold any number of places, since none of them is waited for.
    pub fn locate(&self, offset: u64, len: u64) -> Option<Located<'_>> {
        let stack = self.stack.try_read().ok()?;
        let end = offset.checked_add(len)?;
        if len == 0 || stack.closed || end > stack.size() || offset / BLOCK != (end - 1) / BLOCK {
            return None;
        }
        let gate = self.stripe(offset / BLOCK).gate.try_read().ok()?;
        let run = self.look_up(&stack, offset, end).ok()?;
        if run.offset + run.len < end {
            return None;
        }
        match run.place {
            Place::Zero { .. } | Place::Hole => Some(Located::Zeros),
            Place::Data { layer, at } => {
                let store = Arc::clone(stack.slot(layer).store());
                store.descriptor()?;
                Some(Located::Data(Held { store, at: at + (offset - run.offset), _gate: gate, _stack: stack }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhdx::{self, Options};
    use crate::{Access, Layer};
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicBool, Ordering};
    use store::Folder;
    use store::host::HostFolder;
    use store::sim::Sim;

    const MIB: u64 = 1 << 20;

    fn layer(folder: &dyn Folder, name: &str, below: Option<&dyn Layer>) -> Arc<dyn Layer> {
        let options = match below {
            Some(below) => Options::differencing(below, "base").unwrap(),
            None => Options::dynamic(8 * MIB),
        };
        vhdx::create(folder.create(name).unwrap(), &options).unwrap()
    }

    /// Pages 0 and 1 in the base, page 1 in the leaf too.
    fn chain(folder: &dyn Folder) -> Chain {
        let base = layer(folder, "base", None);
        let leaf = layer(folder, "leaf", Some(&*base));
        let chain = Chain::new(vec![base], Access::Write).unwrap();
        chain.write(&[1; 8192], 0).unwrap();
        chain.push(leaf).unwrap();
        chain.write(&[2; 4096], 4096).unwrap();
        chain
    }

    fn bytes(held: &Held<'_>, len: usize) -> Vec<u8> {
        let file = std::fs::File::from(held.as_fd().try_clone_to_owned().unwrap());
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, held.at()).unwrap();
        bytes
    }

    fn held(chain: &Chain, offset: u64, len: u64) -> Held<'_> {
        match chain.locate(offset, len) {
            Some(Located::Data(held)) => held,
            other => panic!("{len} at {offset}: {other:?}"),
        }
    }

    #[test]
    fn one_piece_is_found_wherever_it_begins() {
        let dir = tempfile::tempdir().unwrap();
        let chain = chain(&HostFolder::open(dir.path()).unwrap());
        assert_eq!(bytes(&held(&chain, 0, 4096), 4096), [1; 4096]);
        assert_eq!(bytes(&held(&chain, 4096, 4096), 4096), [2; 4096]);
        assert_eq!(bytes(&held(&chain, 4000, 96), 96), [1; 96]);
        assert_eq!(bytes(&held(&chain, 4097, 1), 1), [2]);
        assert!(matches!(chain.locate(MIB, 4096), Some(Located::Zeros)));
    }

    #[test]
    fn what_is_more_than_one_piece_is_left_to_a_read() {
        let dir = tempfile::tempdir().unwrap();
        let chain = chain(&HostFolder::open(dir.path()).unwrap());
        assert!(chain.locate(0, 8192).is_none(), "two layers");
        assert!(chain.locate(8000, 1000).is_none(), "data and zeros");
        assert!(chain.locate(BLOCK - 1, 2).is_none(), "two blocks");
        assert!(chain.locate(0, 0).is_none(), "nothing");
        assert!(chain.locate(8 * MIB - 1, 2).is_none() && chain.locate(u64::MAX, 2).is_none(), "outside");
        chain.close().unwrap();
        assert!(chain.locate(0, 4096).is_none(), "closed");
    }

    #[test]
    fn a_file_that_is_none_of_the_host_is_left_to_a_read() {
        let chain = chain(&*Sim::new().root());
        assert!(chain.locate(0, 4096).is_none());
        assert!(matches!(chain.locate(MIB, 4096), Some(Located::Zeros)));
    }

    #[test]
    fn nobody_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let chain = chain(&HostFolder::open(dir.path()).unwrap());
        {
            let _alone = chain.gate_alone(0);
            assert!(chain.locate(0, 4096).is_none());
            assert!(chain.locate(BLOCK, 4096).is_some(), "another stripe");
        }
        let _alone = chain.alone();
        assert!(chain.locate(0, 4096).is_none());
    }

    #[test]
    fn a_place_is_kept_and_the_layers_too_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let folder = HostFolder::open(dir.path()).unwrap();
        let chain = chain(&folder);
        let next = layer(&folder, "next", Some(&*chain.layers()[1]));
        let (zeroed, pushed) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let place = held(&chain, 4096, 4096);
            scope.spawn(|| {
                // Gives the place back to the file.
                chain.zero(0, 2 * MIB).unwrap();
                zeroed.store(true, Ordering::SeqCst);
            });
            scope.spawn(|| {
                chain.push(next).unwrap();
                pushed.store(true, Ordering::SeqCst);
            });
            for _ in 0..100 {
                std::thread::yield_now();
                assert!(!zeroed.load(Ordering::SeqCst) && !pushed.load(Ordering::SeqCst));
                assert_eq!(bytes(&place, 4096), [2; 4096]);
            }
            drop(place);
        });
        assert!(matches!(chain.locate(4096, 4096), Some(Located::Zeros)));
        assert_eq!(chain.layers().len(), 3);
    }
}
