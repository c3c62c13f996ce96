//! A list of cells that are filled once, and that grows without moving: readers hold no lock while a disk is resized.

use std::sync::OnceLock;

/// Segment `n` has 2^n cells: a million cells in all, more than the largest disk of any format has pages of its table.
const SEGMENTS: usize = 20;

/// Cells by number, from 0 on. All are empty at first and take no memory.
pub(crate) struct Cells<T> {
    segments: [OnceLock<Box<[OnceLock<T>]>>; SEGMENTS],
}

/// The segment that a cell is in, and its place there.
fn place(number: usize) -> (usize, usize) {
    let segment = (number + 1).ilog2() as usize;
    (segment, number + 1 - (1 << segment))
}

impl<T> Cells<T> {
    /// Empty cells.
    pub(crate) fn new() -> Self {
        Self { segments: [const { OnceLock::new() }; SEGMENTS] }
    }

    /// What the cell holds, if it was filled.
    pub(crate) fn get(&self, number: u64) -> Option<&T> {
        let (segment, index) = place(number as usize);
        self.segments.get(segment)?.get()?[index].get()
    }

    /// What the cell holds; an empty one is filled with `first`.
    pub(crate) fn get_or_init(&self, number: u64, first: impl FnOnce() -> T) -> &T {
        let (segment, index) = place(number as usize);
        let cells = self.segments[segment].get_or_init(|| (0..1 << segment).map(|_| OnceLock::new()).collect());
        cells[index].get_or_init(first)
    }

    /// The cells that are filled, by number.
    pub(crate) fn filled(&self) -> impl Iterator<Item = (u64, &T)> {
        let segments = self.segments.iter().enumerate().filter_map(|(n, cells)| Some((n, cells.get()?)));
        segments.flat_map(|(n, cells)| {
            let first = (1 << n) - 1;
            cells.iter().enumerate().filter_map(move |(index, cell)| Some((first + index as u64, cell.get()?)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_found_again_wherever_they_lie() {
        let cells = Cells::new();
        let numbers = [0, 1, 2, 3, 6, 7, 1000, 131_072, (1 << SEGMENTS) - 2];
        for number in numbers {
            assert_eq!(cells.get(number), None);
            assert_eq!(*cells.get_or_init(number, || number * 3), number * 3);
            assert_eq!(*cells.get_or_init(number, || 0), number * 3, "filled once");
        }
        assert_eq!(cells.get(5), None);
        assert_eq!(cells.get(1 << 40), None);
        assert_eq!(cells.filled().map(|(number, _)| number).collect::<Vec<_>>(), numbers);
    }
}
