//! Tables: columns two spaces apart, a head of capitals, nothing else.

/// Where a column's words stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    /// At its left.
    Left,
    /// At its right: numbers.
    Right,
}

/// Rows of words under a head.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<Cell>>,
}

/// A word, and how wide it is on the terminal (colours take no room).
#[derive(Debug)]
struct Cell {
    text: String,
    width: usize,
}

impl Table {
    /// An empty table.
    pub(crate) fn new(columns: &[(&'static str, Align)]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|text| Cell { width: width(&text), text }).collect());
    }

    /// The lines, each ended. No spaces at their ends.
    pub(crate) fn draw(&self) -> String {
        let head: Vec<Cell> = self
            .columns
            .iter()
            .map(|(name, _)| Cell { text: (*name).to_owned(), width: name.chars().count() })
            .collect();
        let lines = || std::iter::once(&head).chain(&self.rows);
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| lines().filter_map(|row| row.get(i)).map(|cell| cell.width).max().unwrap_or(0))
            .collect();
        lines().map(|row| self.line(row, &widths)).collect()
    }

    fn line(&self, row: &[Cell], widths: &[usize]) -> String {
        let mut out = String::new();
        for ((cell, width), (_, align)) in row.iter().zip(widths).zip(&self.columns) {
            if !out.is_empty() {
                out.push_str("  ");
            }
            let room = " ".repeat(width - cell.width);
            match align {
                Align::Left => out.extend([cell.text.as_str(), &room]),
                Align::Right => out.extend([&room, cell.text.as_str()]),
            }
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
        out
    }
}

/// Columns that a text takes on a terminal: its characters, without colours (`ESC [ … m`).
fn width(text: &str) -> usize {
    let mut width = 0;
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        if c == '\u{1b}' {
            rest.by_ref().find(|c| *c == 'm');
        } else {
            width += 1;
        }
    }
    width
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_colours_take_no_room() {
        let mut table = Table::new(&[("NAME", Align::Left), ("SIZE", Align::Right), ("NOTE", Align::Left)]);
        table.row(["\u{1b}[32mTenby\u{1b}[0m".to_owned(), "12M".to_owned(), String::new()]);
        table.row(["Saundersfoot".to_owned(), "1.2G".to_owned(), "by the sea".to_owned()]);
        assert_eq!(
            table.draw(),
            "NAME          SIZE  NOTE\n\u{1b}[32mTenby\u{1b}[0m          12M\nSaundersfoot  1.2G  by the sea\n"
        );
    }
}
