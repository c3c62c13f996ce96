//! What one execution gets, and how it is kept in a file.

use crate::file::{File, PAGE};
use anyhow::{Context, Result, ensure};

/// The files that one execution gets. A target that reads a stream has one file, the stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Input(pub Vec<File>);

/// What a kept input begins with.
const MAGIC: &[u8] = b"fuzzed 1";

impl Input {
    /// An input of one stream.
    pub fn stream(bytes: &[u8]) -> Self {
        Self(vec![File::of(bytes)])
    }

    /// The first file's bytes, which are few.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.first().map(|file| file.bytes(0, file.len() as usize)).unwrap_or_default()
    }

    /// Bytes of the pages of all files.
    pub fn resident(&self) -> u64 {
        self.0.iter().map(File::resident).sum()
    }

    /// The input as it is kept: of each page only what comes before its last zeros.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        let mut put = |number: u64| out.extend_from_slice(&number.to_le_bytes());
        put(self.0.len() as u64);
        for file in &self.0 {
            let pages: Vec<u64> = file.pages().collect();
            put(file.len());
            put(pages.len() as u64);
        }
        for file in &self.0 {
            for at in file.pages() {
                let page = file.bytes(at, PAGE);
                let used = page.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                out.extend_from_slice(&at.to_le_bytes());
                out.extend_from_slice(&(used as u64).to_le_bytes());
                out.extend_from_slice(&page[..used]);
            }
        }
        out
    }

    /// The input that was kept so.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut rest = bytes.strip_prefix(MAGIC).context("no kept input")?;
        let mut take = |len: usize| {
            let (head, tail) = rest.split_at_checked(len).context("a kept input that is cut short")?;
            rest = tail;
            Ok::<_, anyhow::Error>(head)
        };
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        let count = number(take(8)?);
        let mut heads = Vec::new();
        for _ in 0..count {
            heads.push((number(take(8)?), number(take(8)?)));
        }
        let mut files = Vec::new();
        for (len, pages) in heads {
            let mut file = File::default();
            for _ in 0..pages {
                let (at, used) = (number(take(8)?), number(take(8)?) as usize);
                ensure!(used <= PAGE, "a page of {used} bytes");
                file.write(at, take(used)?);
            }
            file.set_len(len);
            files.push(file);
        }
        Ok(Self(files))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read() {
        let mut sparse = File::of(&[7; 5000]);
        sparse.write(1 << 40, b"far away");
        sparse.set_len(1 << 41);
        let input = Input(vec![sparse, File::default(), File::of(b"x")]);
        assert_eq!(Input::decode(&input.encode()).expect("kept"), input);
        let bytes = input.encode();
        assert!((0..bytes.len()).all(|cut| Input::decode(&bytes[..cut]).is_err()));
    }
}
