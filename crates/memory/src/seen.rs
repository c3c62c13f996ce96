//! Which pages of RAM a stream has brought, or has taken.

use crate::stream::{Block, PAGE};
use crate::{Error, ErrorKind, Result};
use std::collections::BTreeMap;

/// Pages that are noted together: 2 MiB of RAM.
const STRETCH: u64 = 512;

/// 2 MiB of RAM, as large as a huge page.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Stretch {
    /// The block.
    pub block: String,
    /// Where in the block it begins, bytes.
    pub offset: u64,
}

/// Which pages have been seen: a bit each, of the stretches of which any was. So the memory that this takes grows with what was sent,
/// not with what the stream says that it will send.
pub(crate) struct Seen<'a> {
    blocks: &'a [Block],
    /// By block and number of the stretch.
    stretches: BTreeMap<(usize, u64), [u64; STRETCH as usize / 64]>,
    pages: u64,
}

impl<'a> Seen<'a> {
    pub(crate) fn new(blocks: &'a [Block]) -> Self {
        Self { blocks, stretches: BTreeMap::new(), pages: 0 }
    }

    /// The page at this offset in a block, bytes.
    pub(crate) fn mark(&mut self, block: usize, offset: u64) {
        self.mark_page(block, offset / PAGE as u64);
    }

    pub(crate) fn mark_page(&mut self, block: usize, page: u64) {
        let words = self.stretches.entry((block, page / STRETCH)).or_default();
        let word = &mut words[(page % STRETCH / 64) as usize];
        let bit = 1 << (page % 64);
        self.pages += u64::from(*word & bit == 0);
        *word |= bit;
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.pages * PAGE as u64
    }

    pub(crate) fn total(&self) -> u64 {
        self.blocks.iter().map(|block| block.len).sum()
    }

    /// The stretches of which half or more was seen.
    pub(crate) fn stretches(&self) -> Vec<Stretch> {
        let full = |words: &[u64]| words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>() >= STRETCH / 2;
        let stretch = |(block, number): &(usize, u64)| Stretch {
            block: self.blocks[*block].name.clone(),
            offset: number * STRETCH * PAGE as u64,
        };
        self.stretches.iter().filter(|(_, words)| full(*words)).map(|(at, _)| stretch(at)).collect()
    }

    /// Whether every page of every block was seen.
    pub(crate) fn check(&self) -> Result<()> {
        let missing = self.total() - self.bytes();
        if missing == 0 {
            return Ok(());
        }
        let (name, offset) = self.first_missing().expect("a page is missing");
        let message = format!("{missing} bytes of RAM were not in the stream, first at {offset} of the block {name:?}");
        Err(Error::new(ErrorKind::Incomplete, message))
    }

    /// The first page that was not seen: its block's name, and where it is in the block, bytes.
    fn first_missing(&self) -> Option<(&'a str, u64)> {
        self.blocks.iter().enumerate().find_map(|(number, block)| {
            let mut pages = 0..block.len / PAGE as u64;
            let page = pages.find(|page| !self.has(number, *page))?;
            Some((block.name.as_str(), page * PAGE as u64))
        })
    }

    pub(crate) fn has(&self, block: usize, page: u64) -> bool {
        let words = self.stretches.get(&(block, page / STRETCH));
        words.is_some_and(|words| words[(page % STRETCH / 64) as usize] >> (page % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, pages: u64) -> Block {
        Block { name: name.into(), len: pages * PAGE as u64 }
    }

    #[test]
    fn the_missing_page_is_named() {
        let blocks = [block("a", STRETCH + 65), block("empty", 0), block("b", 2)];
        let mut seen = Seen::new(&blocks);
        (0..STRETCH + 65).for_each(|page| seen.mark(0, page * PAGE as u64));
        seen.mark(2, 0);
        seen.mark(2, 0);
        let error = seen.check().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Incomplete);
        assert!(
            error.message.contains("4096 bytes") && error.message.contains("at 4096 of the block \"b\""),
            "{error}"
        );
        seen.mark(2, PAGE as u64);
        seen.check().unwrap();
        assert_eq!(seen.bytes(), seen.total());
    }

    #[test]
    fn memory_grows_with_what_was_seen_and_not_with_what_was_said() {
        let blocks = [block("huge", 1 << 33), block("huge too", 1 << 33)];
        let mut seen = Seen::new(&blocks);
        assert!(seen.stretches.is_empty());
        seen.mark(0, 0);
        seen.mark(0, PAGE as u64);
        seen.mark(1, (PAGE as u64) << 32);
        assert_eq!(seen.stretches.len(), 2);
        let error = seen.check().unwrap_err();
        assert!(error.message.contains("at 8192 of the block \"huge\""), "{error}");
    }
}
