//! Changes that fit any format: numbers that parsers stumble over, and bytes put elsewhere.

use crate::file::{File, PAGE};
use crate::random::Random;

/// A number in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Where it lies.
    pub at: u64,
    /// Its bytes: 1 to 8; wider fields (ids) are changed as bytes.
    pub width: usize,
}

/// A number that says more than chance would: near zero, near a limit, near a power of two, near `old` or near `len`.
pub fn number(random: &mut Random, old: u64, len: u64, width: usize) -> u64 {
    let largest = if width >= 8 { u64::MAX } else { (1 << (width * 8)) - 1 };
    let near = |random: &mut Random, middle: u64| {
        let unit = *random.pick(&[1, 1, 8, 512, 4096, 1 << 20, 1 << 21]);
        let by = unit * random.below(4);
        if random.one_in(2) { middle.wrapping_add(by) } else { middle.wrapping_sub(by) }
    };
    let value = match random.below(9) {
        0 => random.below(4),
        1 => near(random, largest),
        2 => {
            let bit = random.below(width as u64 * 8);
            near(random, 1 << bit)
        }
        3 => near(random, len),
        4 => random.below(64) << 20,
        5 => random.below(64) << 12,
        6 => old ^ 1 << random.below(width as u64 * 8),
        7 => random.number(),
        _ => near(random, old),
    };
    value & largest
}

/// Gives one of the fields another number.
pub fn change_field(file: &mut File, fields: &[Field], random: &mut Random) {
    if fields.is_empty() {
        return;
    }
    let field = *random.pick(fields);
    let old = file.number(field.at, field.width);
    let value = if random.one_in(6) {
        // What another field says.
        let other = random.pick(fields);
        file.number(other.at, other.width)
    } else {
        number(random, old, file.len(), field.width.min(8))
    };
    file.put(field.at, field.width, value);
}

/// Changes a byte or a few of a page that is there.
pub fn change_bytes(file: &mut File, random: &mut Random) {
    let pages: Vec<u64> = file.pages().collect();
    if pages.is_empty() {
        return;
    }
    // Mostly what comes first in a page counts.
    let within = *random.pick(&[64, 512, PAGE as u64]);
    let at = *random.pick(&pages) + random.below(within);
    if at >= file.len() {
        return;
    }
    match random.below(3) {
        0 => file.put(at, 1, random.number()),
        1 => file.put(at, 1, file.number(at, 1) ^ 1 << random.below(8)),
        _ => {
            let width = *random.pick(&[1, 2, 4, 8]);
            let at = at / width as u64 * width as u64;
            let value = number(random, file.number(at, width), file.len(), width);
            file.put(at, width, value);
        }
    }
}

/// Copies a page that is there over another.
pub fn copy_page(file: &mut File, random: &mut Random) {
    let pages: Vec<u64> = file.pages().collect();
    if !pages.is_empty() {
        let bytes = file.bytes(*random.pick(&pages), PAGE);
        file.write(*random.pick(&pages), &bytes);
    }
}

/// Cuts the file or makes it longer.
pub fn resize(file: &mut File, random: &mut Random) {
    let len = file.len();
    let new = match random.below(4) {
        0 => random.below(len),
        1 => len.saturating_sub(random.below(8192)),
        2 => random.below(len >> 20) << 20,
        _ => len + (random.below(16) << random.below(44)),
    };
    file.set_len(new);
}

/// Changes a stream: bytes replaced, put in, taken out, repeated; words of the format put in; cut.
pub fn change_stream(bytes: &mut Vec<u8>, words: &[&[u8]], most: usize, random: &mut Random) {
    let at = random.index(bytes.len() + 1);
    let longest = *random.pick(&[2, 8, 64, 5000]);
    let span = random.index(longest);
    let end = (at + span).min(bytes.len());
    match random.below(10) {
        0 | 1 if at < bytes.len() => bytes[at] = random.number() as u8,
        2 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        3 if bytes.len() - at >= 8 => {
            let width = *random.pick(&[2, 4, 8]);
            let big_endian = number(random, 0, bytes.len() as u64, width).to_be_bytes();
            bytes[at..at + width].copy_from_slice(&big_endian[8 - width..]);
        }
        4 => drop(bytes.drain(at..end)),
        5 => {
            let piece = bytes[at..end].to_vec();
            let to = random.index(bytes.len() + 1);
            drop(bytes.splice(to..to, piece));
        }
        6 | 7 if !words.is_empty() => {
            let word = random.pick(words).to_vec();
            let over = if random.one_in(2) { (at + word.len()).min(bytes.len()) } else { at };
            drop(bytes.splice(at..over, word));
        }
        8 => bytes.truncate(at),
        _ => {
            let byte = random.number() as u8;
            drop(bytes.splice(at..at, std::iter::repeat_n(byte, span)));
        }
    }
    bytes.truncate(most);
}

/// The CRC-32C of `bytes` with the four at `at` taken as zero.
pub fn checksum_without(bytes: &[u8], at: usize) -> u32 {
    let before = crc32c::crc32c(&bytes[..at]);
    let zeroed = crc32c::crc32c_append(before, &[0; 4]);
    crc32c::crc32c_append(zeroed, &bytes[at + 4..])
}
