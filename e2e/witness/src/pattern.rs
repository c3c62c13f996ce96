//! Reproducible contents, and the hash that tells them apart.

/// Bytes per word of a pattern.
const WORD: usize = 8;

/// A pseudo-random sequence of bytes in which every position can be computed on its own (splitmix64 over the position), so a
/// piece of it is verified wherever it lies and a piece that has moved is noticed.
#[derive(Clone, Copy)]
pub(crate) struct Pattern {
    seed: u64,
}

impl Pattern {
    /// The sequence that belongs to `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed: mix(seed) }
    }

    /// Writes the sequence from byte `position` (a multiple of 8) into `to` (whose length is a multiple of 8).
    pub(crate) fn fill(self, position: u64, to: &mut [u8]) {
        for (index, word) in (position / 8..).zip(to.chunks_exact_mut(WORD)) {
            word.copy_from_slice(&self.word(index).to_le_bytes());
        }
    }

    /// The first byte of `have`, taken to lie at `position`, that is not the sequence's.
    pub(crate) fn first_difference(self, position: u64, have: &[u8]) -> Option<u64> {
        (position / 8..)
            .zip(have.chunks_exact(WORD))
            .find_map(|(index, word)| (word != self.word(index).to_le_bytes()).then_some(index * 8))
    }

    fn word(self, index: u64) -> u64 {
        mix(self.seed.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
    }
}

/// The finaliser of splitmix64: every input bit reaches every output bit.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// A running 64-bit hash. Against accidents, not against forgers.
#[derive(Clone, Copy, Default)]
pub(crate) struct Hash(u64);

impl Hash {
    /// Takes `bytes` in; a tail shorter than a word is padded with zeros.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(WORD) {
            let mut word = [0; WORD];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = mix(self.0.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_add(0x9E37_79B9_7F4A_7C15);
        }
    }

    /// What has been taken in so far, as one number.
    pub(crate) fn value(self) -> u64 {
        self.0
    }

    /// The hash of `bytes` alone.
    pub(crate) fn of(bytes: &[u8]) -> u64 {
        let mut hash = Self::default();
        hash.update(bytes);
        hash.value()
    }
}

#[cfg(test)]
mod tests {
    use super::{Hash, Pattern};

    #[test]
    fn a_piece_is_known_by_its_place() {
        let mut whole = vec![0; 4096];
        Pattern::new(7).fill(0, &mut whole);
        assert_eq!(Pattern::new(7).first_difference(1024, &whole[1024..2048]), None);
        assert_eq!(Pattern::new(7).first_difference(0, &whole[1024..2048]), Some(0), "a moved piece is noticed");
        assert_eq!(Pattern::new(8).first_difference(0, &whole), Some(0));
        whole[2049] ^= 1;
        assert_eq!(Pattern::new(7).first_difference(0, &whole), Some(2048));
    }

    #[test]
    fn the_hash_sees_order_and_every_bit() {
        assert_ne!(Hash::of(&[1, 0, 0, 0, 0, 0, 0, 0, 2]), Hash::of(&[2, 0, 0, 0, 0, 0, 0, 0, 1]));
        assert_ne!(Hash::of(&[0; 8]), Hash::of(&[0; 16]));
    }
}
