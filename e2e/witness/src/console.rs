//! The conversation, for a program and for a human on the same line.
//!
//! A program writes `>TAG verb words…` and gets `<TAG {json}` on a line of its own, without echo or prompt. Ctrl-U drops
//! whatever part of a line is pending, so after an apply (which may restore the guest in the middle of a line) a program begins
//! with it, uses a tag it never used before and ignores every line with another one. Anything else is a human's: it is echoed,
//! answered in words, and prompted for.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;

use serde_json::Value;

use crate::verbs::Witness;

const PORT: u16 = 7777;
const PROMPT: &str = "guest> ";
/// A line longer than this is not a request.
const LONGEST: usize = 4096;

const CTRL_C: u8 = 0x03;
const CTRL_U: u8 = 0x15;
const BACKSPACE: u8 = 0x08;
const DELETE: u8 = 0x7f;

/// One end of a conversation.
struct Line<R, W> {
    from: R,
    to: W,
    pending: Vec<u8>,
    /// Whether what a human types is shown to him: a terminal on a serial line does not do it by itself.
    echo: bool,
}

impl<R: Read, W: Write> Line<R, W> {
    fn new(from: R, to: W, echo: bool) -> Self {
        Self { from, to, pending: Vec::new(), echo }
    }

    /// Answers until the other end goes away.
    fn converse(&mut self, witness: &Witness) -> std::io::Result<()> {
        let mut bytes = [0; 256];
        loop {
            let count = self.from.read(&mut bytes)?;
            if count == 0 {
                return Ok(());
            }
            for &byte in &bytes[..count] {
                self.take(byte, witness)?;
            }
        }
    }

    fn take(&mut self, byte: u8, witness: &Witness) -> std::io::Result<()> {
        match byte {
            b'\n' | b'\r' => self.answer(witness),
            CTRL_U | CTRL_C => self.forget(),
            BACKSPACE | DELETE if self.pending.pop().is_some() => self.show(b"\x08 \x08"),
            32.. if self.pending.len() < LONGEST => {
                self.pending.push(byte);
                self.show(&[byte])
            }
            _ => Ok(()),
        }
    }

    /// Shows an edit to a human, not to a program.
    fn show(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.echo && self.pending.first() != Some(&b'>') {
            self.to.write_all(bytes)?;
        }
        Ok(())
    }

    fn forget(&mut self) -> std::io::Result<()> {
        let human = self.echo && !self.pending.is_empty() && self.pending[0] != b'>';
        self.pending.clear();
        if human { write!(self.to, "\r\n{PROMPT}") } else { Ok(()) }
    }

    fn answer(&mut self, witness: &Witness) -> std::io::Result<()> {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned();
        if let Some(request) = line.strip_prefix('>') {
            let (tag, command) = request.split_once(' ').unwrap_or((request, ""));
            return write_whole(&mut self.to, &format!("\r\n<{tag} {}\r\n", witness.answer(command)));
        }
        let mut text = if self.echo { String::from("\r\n") } else { String::new() };
        if !line.trim().is_empty() {
            text.push_str(&in_words(&witness.answer(&line)).replace('\n', "\r\n"));
        }
        text.push_str(PROMPT);
        write_whole(&mut self.to, &text)
    }
}

/// One write for one answer: nothing of another thread or of the kernel gets between its parts.
fn write_whole(to: &mut impl Write, text: &str) -> std::io::Result<()> {
    to.write_all(text.as_bytes())?;
    to.flush()
}

/// An answer for a human: one field a line; a single text as it is.
fn in_words(answer: &Value) -> String {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let Value::Object(fields) = answer else { return format!("{answer}\n") };
    let lines: Vec<String> = if fields.len() == 1 {
        fields.values().map(|value| plain(value).trim_end().to_owned()).collect()
    } else {
        fields.iter().map(|(name, value)| format!("  {name:<10} {}", plain(value).trim_end())).collect()
    };
    lines.iter().flat_map(|line| [line, "\n"]).collect()
}

/// Talks on the first serial port for as long as the guest lives.
pub(crate) fn serve_serial(witness: &Witness) -> ! {
    let path = if std::process::id() == 1 { "/dev/ttyS0" } else { "/dev/tty" };
    let port = File::options().read(true).write(true).open(path).expect("the guest has a serial port");
    make_raw(&port);
    let mut line = Line::new(&port, &port, true);
    let _ = write_whole(&mut line.to, &format!("\r\n{}\r\n{}\r\n{PROMPT}", witness.ready(), WELCOME));
    loop {
        // A hangup is no reason for PID 1 to end.
        let _ = line.converse(witness);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

const WELCOME: &str =
    "This is Tenby's test guest. It compares what its RAM and its disks remember: type `check`, or `help`.";

fn make_raw(port: &File) {
    if let Ok(mut termios) = rustix::termios::tcgetattr(port) {
        termios.make_raw();
        let _ = rustix::termios::tcsetattr(port, rustix::termios::OptionalActions::Now, &termios);
    }
}

/// Talks to everybody who connects.
pub(crate) fn serve_tcp(witness: Arc<Witness>) {
    let Ok(listener) = TcpListener::bind(("0.0.0.0", PORT)) else { return };
    std::thread::spawn(move || {
        for stream in listener.incoming().filter_map(Result::ok) {
            let witness = Arc::clone(&witness);
            std::thread::spawn(move || Line::new(&stream, &stream, false).converse(&witness));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::{Line, PROMPT};
    use crate::verbs::Witness;

    fn said(typed: &[u8]) -> String {
        let witness = Witness::without_disks();
        let mut out = Vec::new();
        Line::new(typed, &mut out, true).converse(&witness).unwrap();
        String::from_utf8_lossy(&out).into_owned()
    }

    #[test]
    fn a_program_gets_its_answer_alone() {
        assert_eq!(said(b">7 set day Monday\n"), "\r\n<7 {}\r\n");
        assert_eq!(said(b">7 set day Monday\n>8 get day\n"), "\r\n<7 {}\r\n\r\n<8 {\"value\":\"Monday\"}\r\n");
    }

    #[test]
    fn half_a_line_from_before_does_no_harm() {
        assert_eq!(said(b">6 set day Tue\x15>7 get day\n"), "\r\n<7 {\"value\":null}\r\n");
        assert!(said(b"set day Tue\x15>7 get day\n").ends_with("\r\n<7 {\"value\":null}\r\n"));
    }

    #[test]
    fn a_human_sees_what_he_types_and_a_prompt() {
        assert_eq!(said(b"set day Mondax\x7fy\r"), format!("set day Mondax\x08 \x08y\r\n{PROMPT}"));
        assert_eq!(said(b"set day Mon\rget day\r"), format!("set day Mon\r\n{PROMPT}get day\r\nMon\r\n{PROMPT}"));
        assert!(said(b"nonsense\r").contains("help"));
    }

    #[test]
    fn bad_bytes_and_endless_lines_are_survived() {
        said(&vec![0xff; 100_000]);
        said(b">\n> \n>x\n");
    }
}
