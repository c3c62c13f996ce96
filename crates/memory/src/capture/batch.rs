//! Pages on their way from the stream to the disk.

use crate::stream::PAGE;

/// A batch is full at this many bytes of data…
pub(super) const DATA: usize = 4 << 20;
/// … or at this many pages, zeros included.
const PAGES: usize = 1 << 14;

/// Pages in the order of the stream, each with its place on the disk.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pages: Vec<Placed>,
    data: Vec<u8>,
}

/// A page and its place on the disk.
#[derive(Debug, Clone, Copy)]
struct Placed {
    /// Offset on the disk, bytes.
    at: u64,
    /// Where in the batch's data it is; `None` for zeros.
    data: Option<u32>,
}

impl Batch {
    pub(super) fn is_full(&self) -> bool {
        self.data.len() >= DATA || self.pages.len() >= PAGES
    }

    /// Adds a page; `None` stands for zeros.
    pub(super) fn push(&mut self, at: u64, page: Option<&[u8; PAGE]>) {
        let data = page.map(|_| self.data.len() as u32);
        self.pages.push(Placed { at, data });
        self.data.extend_from_slice(page.map_or(&[], |page| page.as_slice()));
    }

    pub(super) fn clear(&mut self) {
        self.pages.clear();
        self.data.clear();
    }

    /// Hands out the pages in the disk's order, as runs that are all data or all zeros (offset, length, data): the last page of
    /// each place alone.
    pub(super) fn each_run<E>(
        &mut self,
        mut visit: impl FnMut(u64, u64, Option<&[u8]>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.sort();
        let mut gathered = Vec::new();
        let joined = |a: &Placed, b: &Placed| a.at + PAGE as u64 == b.at && a.data.is_some() == b.data.is_some();
        for run in self.pages.chunk_by(joined) {
            let data = run[0].data.map(|first| {
                if in_order(run) {
                    return &self.data[first as usize..][..run.len() * PAGE];
                }
                gathered.clear();
                let starts = run.iter().filter_map(|page| page.data);
                starts.for_each(|start| gathered.extend_from_slice(&self.data[start as usize..][..PAGE]));
                gathered.as_slice()
            });
            visit(run[0].at, (run.len() * PAGE) as u64, data)?;
        }
        Ok(())
    }

    /// Brings the pages into the disk's order, the last one of each place alone.
    fn sort(&mut self) {
        if self.pages.is_sorted_by(|a, b| a.at < b.at) {
            return;
        }
        // The sort keeps the order of equals: reversed, the last one comes first and is the one that stays.
        self.pages.reverse();
        self.pages.sort_by_key(|page| page.at);
        self.pages.dedup_by_key(|page| page.at);
    }
}

/// Whether the pages of a run lie one after another in the batch's data.
fn in_order(run: &[Placed]) -> bool {
    run.windows(2).all(|pair| pair[0].data.map(|at| at + PAGE as u32) == pair[1].data)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (offset in pages, length in pages, first byte of each page, if data)
    fn runs(pages: &[(u64, Option<u8>)]) -> Vec<(u64, u64, Option<Vec<u8>>)> {
        let mut batch = Batch::default();
        for (at, fill) in pages {
            batch.push(at * PAGE as u64, fill.map(|fill| [fill; PAGE]).as_ref());
        }
        let mut out = Vec::new();
        let page = PAGE as u64;
        batch
            .each_run(|at, len, data| {
                assert!(data.is_none_or(|data| data.len() as u64 == len));
                out.push((at / page, len / page, data.map(|data| data.iter().step_by(PAGE).copied().collect())));
                Ok::<_, ()>(())
            })
            .unwrap();
        out
    }

    #[test]
    fn pages_in_order_are_one_run() {
        assert_eq!(runs(&[(4, Some(1)), (5, Some(2)), (6, Some(3))]), [(4, 3, Some(vec![1, 2, 3]))]);
    }

    #[test]
    fn pages_out_of_order_are_gathered() {
        let pages = [(4, Some(1)), (9, Some(9)), (5, Some(2)), (6, None), (3, Some(0))];
        assert_eq!(runs(&pages), [(3, 3, Some(vec![0, 1, 2])), (6, 1, None), (9, 1, Some(vec![9]))]);
    }

    #[test]
    fn the_last_page_of_a_place_counts() {
        let pages = [(1, Some(1)), (2, Some(2)), (1, None), (2, Some(3)), (1, Some(4)), (3, Some(5)), (3, None)];
        assert_eq!(runs(&pages), [(1, 2, Some(vec![4, 3])), (3, 1, None)]);
    }
}
