//! A machine's screen and keyboard, over VNC (RFC 6143), and text read off it without knowing the font.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::DEADLINE;

/// A character's cell on a VGA text screen, in pixels.
const CELL: (usize, usize) = (9, 16);
/// Nothing that a test looks at is larger, in pixels each way.
const LARGEST: u16 = 4096;

/// An open VNC connection.
pub struct Screen {
    stream: UnixStream,
    width: usize,
    height: usize,
    /// One number a pixel, row by row.
    pixels: Vec<u32>,
}

impl Screen {
    /// Connects to a VNC server's socket.
    ///
    /// # Panics
    /// If it does not speak VNC without a password.
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        stream.set_read_timeout(Some(DEADLINE)).expect("a socket has a time limit");
        let mut screen = Self { stream, width: 0, height: 0, pixels: Vec::new() };
        screen.shake_hands();
        screen
    }

    /// Presses and releases the key of a letter or sign.
    pub fn press(&mut self, key: char) {
        for down in [1, 0] {
            let mut event = vec![4, down, 0, 0];
            event.extend_from_slice(&u32::from(key).to_be_bytes());
            self.send(&event);
        }
    }

    /// Whether `text` stands somewhere on the screen as it is now: cells whose glyphs are equal where its letters are equal, that
    /// differ where those differ, and are empty where there is a space. A dozen letters cannot be met by chance.
    pub fn reads(&mut self, text: &str) -> bool {
        self.refresh();
        let text: Vec<char> = text.chars().collect();
        let (columns, rows) = (self.width / CELL.0, self.height / CELL.1);
        (0..rows).any(|row| {
            let cells: Vec<Vec<u32>> = (0..columns).map(|column| self.cell(column, row)).collect();
            cells.windows(text.len()).any(|run| is_text(&text, run))
        })
    }

    /// One character's pixels.
    fn cell(&self, column: usize, row: usize) -> Vec<u32> {
        let lines = (0..CELL.1).map(|line| (row * CELL.1 + line) * self.width + column * CELL.0);
        lines.flat_map(|start| self.pixels[start..start + CELL.0].iter().copied()).collect()
    }

    fn shake_hands(&mut self) {
        let greeting = self.receive(12);
        assert!(greeting.starts_with(b"RFB 003."), "no VNC server: {greeting:?}");
        self.send(b"RFB 003.008\n");
        let kinds = self.receive(1)[0];
        let kinds = self.receive(usize::from(kinds));
        assert!(kinds.contains(&1), "it asks for a password: {kinds:?}");
        self.send(&[1]);
        assert_eq!(self.receive(4), [0; 4], "it refuses us");
        self.send(&[1]);
        let about = self.receive(24);
        self.resize(u16::from_be_bytes([about[0], about[1]]), u16::from_be_bytes([about[2], about[3]]));
        let name = u32::from_be_bytes([about[20], about[21], about[22], about[23]]);
        self.receive(name.min(4096) as usize);
        // 32 bits a pixel, 8 each of red, green and blue; raw pixels, and word when the size changes (-223).
        self.send(&[0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0]);
        let mut encodings = vec![2, 0, 0, 2];
        encodings.extend_from_slice(&0_i32.to_be_bytes());
        encodings.extend_from_slice(&(-223_i32).to_be_bytes());
        self.send(&encodings);
    }

    fn resize(&mut self, width: u16, height: u16) {
        assert!(width <= LARGEST && height <= LARGEST, "a screen of {width} x {height}");
        self.width = usize::from(width);
        self.height = usize::from(height);
        self.pixels = vec![0; self.width * self.height];
    }

    /// Asks for the whole screen and waits for it.
    fn refresh(&mut self) {
        let [w, h] = [self.width as u16, self.height as u16].map(u16::to_be_bytes);
        self.send(&[3, 0, 0, 0, 0, 0, w[0], w[1], h[0], h[1]]);
        loop {
            match self.receive(1)[0] {
                0 => return self.update(),
                // The bell has no body; the clipboard has a length and a text.
                2 => {}
                3 => {
                    let head = self.receive(7);
                    self.receive(u32::from_be_bytes([head[3], head[4], head[5], head[6]]).min(1 << 20) as usize);
                }
                other => panic!("VNC message {other}"),
            }
        }
    }

    fn update(&mut self) {
        let head = self.receive(3);
        for _ in 0..u16::from_be_bytes([head[1], head[2]]) {
            let head = self.receive(12);
            let field = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
            let (x, y, width, height) = (field(0), field(2), field(4), field(6));
            match i32::from_be_bytes([head[8], head[9], head[10], head[11]]) {
                0 => self.paint(usize::from(x), usize::from(y), usize::from(width), usize::from(height)),
                -223 => self.resize(width, height),
                other => panic!("VNC encoding {other}"),
            }
        }
    }

    fn paint(&mut self, x: usize, y: usize, width: usize, height: usize) {
        assert!(x + width <= self.width && y + height <= self.height, "a rectangle beyond the screen");
        let bytes = self.receive(width * height * 4);
        for (index, pixel) in bytes.chunks_exact(4).enumerate() {
            let at = (y + index / width) * self.width + x + index % width;
            self.pixels[at] = u32::from_le_bytes([pixel[0], pixel[1], pixel[2], 0]);
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the VNC server listens");
    }

    fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).expect("the VNC server answers");
        bytes
    }
}

fn is_text(text: &[char], run: &[Vec<u32>]) -> bool {
    let empty = |cell: &Vec<u32>| cell.iter().all(|pixel| *pixel == cell[0]);
    text.iter().zip(run).enumerate().all(|(index, (letter, cell))| {
        empty(cell) == (*letter == ' ')
            && text[..index].iter().zip(run).all(|(before, cell_before)| (before == letter) == (cell_before == cell))
    })
}

#[cfg(test)]
mod tests {
    use super::is_text;

    fn written(text: &str) -> Vec<Vec<u32>> {
        // A font in which a letter looks like its number.
        text.chars().map(|letter| if letter == ' ' { vec![0, 0] } else { vec![0, u32::from(letter)] }).collect()
    }

    #[test]
    fn text_is_known_by_its_pattern() {
        let text: Vec<char> = "GNU GRUB".chars().collect();
        assert!(is_text(&text, &written("GNU GRUB")));
        assert!(!is_text(&text, &written("GNU GRUG")) && !is_text(&text, &written("GNUxGRUB")));
        assert!(!is_text(&text, &written("        ")));
    }
}
