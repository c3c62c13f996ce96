//! Things that live in RAM alone: patterns to be found again, notes, and pages that keep changing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::pattern::{Hash, Pattern};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// A run of memory, each MiB of it filled with the pattern of a seed.
struct Filled {
    seeds: Vec<u64>,
    bytes: Vec<u8>,
}

impl Filled {
    /// The first byte that is not as it was filled.
    fn first_difference(&self) -> Option<u64> {
        let pieces = (0..).step_by(MIB).zip(self.bytes.chunks(MIB)).zip(&self.seeds);
        pieces.into_iter().find_map(|((at, bytes), seed)| Pattern::new(*seed).first_difference(at, bytes))
    }
}

/// What is filled.
pub(crate) struct Sum {
    /// Its length.
    pub(crate) mib: usize,
    /// The seed of each MiB, where it differs from the one before.
    pub(crate) seeds: Vec<u64>,
    /// Of all of it.
    pub(crate) hash: u64,
    /// The first byte that is no longer as it was filled.
    pub(crate) wrong_at: Option<u64>,
}

/// What the witness holds in RAM on request.
#[derive(Default)]
pub(crate) struct Ram {
    filled: Mutex<Option<Filled>>,
    notes: Mutex<BTreeMap<String, String>>,
    /// Pages per second that the dirtying thread of the current generation changes; a new generation ends the old thread.
    generation: Arc<AtomicU64>,
}

impl Ram {
    /// Fills `mib` MiB with the pattern of `seed`, in place of what was filled before.
    pub(crate) fn fill(&self, mib: usize, seed: u64) {
        let mut filled = lock(&self.filled);
        *filled = None;
        let mut bytes = vec![0; mib * MIB];
        Pattern::new(seed).fill(0, &mut bytes);
        *filled = Some(Filled { seeds: vec![seed; mib], bytes });
    }

    /// Fills `mib` MiB from the MiB `at` on of what is filled with the pattern of another seed, where it lies. `None` if so much is not filled.
    pub(crate) fn refill(&self, at: usize, mib: usize, seed: u64) -> Option<()> {
        let mut filled = lock(&self.filled);
        let Filled { seeds, bytes } = filled.as_mut()?;
        let end = at.checked_add(mib)?;
        seeds.get_mut(at..end)?.fill(seed);
        Pattern::new(seed).fill((at * MIB) as u64, bytes.get_mut(at * MIB..end * MIB)?);
        Some(())
    }

    /// Gives the filled memory back.
    pub(crate) fn drop_filled(&self) {
        *lock(&self.filled) = None;
    }

    /// What is filled, looked at.
    pub(crate) fn sum(&self) -> Option<Sum> {
        let filled = lock(&self.filled);
        let filled = filled.as_ref()?;
        let mut seeds = filled.seeds.clone();
        seeds.dedup();
        let wrong_at = filled.first_difference();
        Some(Sum { mib: filled.seeds.len(), seeds, hash: Hash::of(&filled.bytes), wrong_at })
    }

    /// Remembers `value` under `key`, in RAM only.
    pub(crate) fn set(&self, key: &str, value: &str) {
        lock(&self.notes).insert(key.to_owned(), value.to_owned());
    }

    /// What is remembered under `key`.
    pub(crate) fn get(&self, key: &str) -> Option<String> {
        lock(&self.notes).get(key).cloned()
    }

    /// Everything that is remembered.
    pub(crate) fn notes(&self) -> BTreeMap<String, String> {
        lock(&self.notes).clone()
    }

    /// From now on changes `rate` pages a second, round and round within `mib` MiB; a rate of 0 only ends what ran before.
    pub(crate) fn dirty(&self, mib: usize, rate: u64) {
        let mine = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        if rate == 0 || mib == 0 {
            return;
        }
        let generation = Arc::clone(&self.generation);
        std::thread::spawn(move || {
            let mut bytes = vec![0_u8; mib * MIB];
            let mut next = 0;
            while generation.load(Ordering::SeqCst) == mine {
                for _ in 0..rate.div_ceil(20) {
                    bytes[next] = bytes[next].wrapping_add(1);
                    next = (next + PAGE) % bytes.len();
                }
                std::hint::black_box(&bytes);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
    }
}

/// A panic ends the whole guest, so no lock here is ever poisoned by one that went on.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
