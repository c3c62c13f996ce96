//! Which pages of RAM a stream has brought.

use crate::stream::{Block, PAGE};
use crate::{Error, ErrorKind, Result};

/// Which pages have been seen: a bit each.
pub(super) struct Seen<'a> {
    blocks: &'a [Block],
    bits: Vec<Vec<u64>>,
    pages: u64,
}

impl<'a> Seen<'a> {
    pub(super) fn new(blocks: &'a [Block]) -> Self {
        let words = |block: &Block| vec![0; (block.len / PAGE as u64).div_ceil(64) as usize];
        Self { blocks, bits: blocks.iter().map(words).collect(), pages: 0 }
    }

    pub(super) fn mark(&mut self, block: usize, offset: u64) {
        let page = offset / PAGE as u64;
        let word = &mut self.bits[block][(page / 64) as usize];
        let bit = 1 << (page % 64);
        self.pages += u64::from(*word & bit == 0);
        *word |= bit;
    }

    pub(super) fn bytes(&self) -> u64 {
        self.pages * PAGE as u64
    }

    pub(super) fn total(&self) -> u64 {
        self.blocks.iter().map(|block| block.len).sum()
    }

    /// Whether every page of every block was seen.
    pub(super) fn check(&self) -> Result<()> {
        let missing = self.total() - self.bytes();
        if missing == 0 {
            return Ok(());
        }
        let holes = |(block, bits): (&'a Block, &Vec<u64>)| {
            let mut pages = 0..block.len / PAGE as u64;
            let page = pages.find(|page| bits[(page / 64) as usize] >> (page % 64) & 1 == 0)?;
            Some((&block.name, page * PAGE as u64))
        };
        let (name, offset) = self.blocks.iter().zip(&self.bits).find_map(holes).expect("a page is missing");
        let message = format!("{missing} bytes of RAM were not in the stream, first at {offset} of the block {name:?}");
        Err(Error::new(ErrorKind::Incomplete, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_missing_page_is_named() {
        let block = |name: &str, pages: u64| Block { name: name.into(), len: pages * PAGE as u64 };
        let blocks = [block("a", 65), block("empty", 0), block("b", 2)];
        let mut seen = Seen::new(&blocks);
        (0..65).for_each(|page| seen.mark(0, page * PAGE as u64));
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
}
