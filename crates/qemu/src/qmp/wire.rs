//! QMP's messages: one JSON object a line.

use super::event::Event;
use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fmt;

/// The longest line that is taken, in bytes. The longest that QEMU sends (its schema) has a quarter of a megabyte.
pub(super) const MAX_LINE: usize = 4 << 20;

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What QEMU sends.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    /// Its first words.
    Greeting(Greeting),
    /// The answer to a command; without an id if QEMU could not read the command.
    Answer { id: Option<u64>, answer: Result<Value, String> },
    /// Something happened.
    Event(Event),
}

#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<RawStamp>,
    #[serde(rename = "return")]
    result: Option<Value>,
    error: Option<RawError>,
    id: Option<u64>,
}

/// QEMU's first words.
#[derive(Debug, PartialEq, Deserialize)]
pub(super) struct Greeting {
    version: GreetingVersion,
    /// The capabilities of the monitor that it offers.
    #[serde(default)]
    pub(super) capabilities: Vec<String>,
}

#[derive(Debug, PartialEq, Deserialize)]
struct GreetingVersion {
    qemu: Version,
}

impl Greeting {
    pub(super) fn version(&self) -> Version {
        self.version.qemu
    }
}

/// QEMU's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub micro: u32,
}

#[derive(Deserialize)]
struct RawStamp {
    seconds: i64,
    microseconds: i64,
}

#[derive(Deserialize)]
struct RawError {
    desc: String,
}

/// Reads a line, with or without its end.
pub(super) fn parse(line: &[u8]) -> Result<Message> {
    let raw: Raw =
        serde_json::from_slice(line).map_err(|error| Error::Protocol(format!("{error} in {}", excerpt(line))))?;
    match raw {
        Raw { event: Some(name), data, timestamp, .. } => {
            // QEMU sends -1 where it could not read the clock.
            let at = timestamp.and_then(|t| {
                u64::try_from(t.seconds).ok()?.checked_mul(1_000_000)?.checked_add_signed(t.microseconds)
            });
            Ok(Message::Event(Event::new(name, data, at)))
        }
        Raw { error: Some(error), id, .. } => Ok(Message::Answer { id, answer: Err(error.desc) }),
        Raw { greeting: Some(greeting), .. } => Ok(Message::Greeting(greeting)),
        Raw { result: Some(value), id, .. } => Ok(Message::Answer { id, answer: Ok(value) }),
        _ => Err(Error::Protocol(format!("neither an answer nor an event: {}", excerpt(line)))),
    }
}

/// A command's line.
pub(super) fn command(verb: &str, name: &str, arguments: &Value, id: u64) -> Vec<u8> {
    let mut object = json!({ verb: name, "id": id });
    if !arguments.is_null() {
        object["arguments"] = arguments.clone();
    }
    let mut line = object.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Bytes that arrive in pieces, cut into lines.
#[derive(Default)]
pub(super) struct Lines {
    held: Vec<u8>,
}

impl Lines {
    /// Takes what arrived and gives each line that is complete to `each`.
    ///
    /// # Errors
    /// Those of `each`, and [`Error::Protocol`] for a line beyond [`MAX_LINE`].
    pub(super) fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            self.held.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let line = std::mem::take(&mut self.held);
            if !line.trim_ascii().is_empty() {
                each(&line)?;
            }
        }
        self.held.extend_from_slice(rest);
        if self.held.len() > MAX_LINE {
            return Err(Error::Protocol(format!("a line of more than {MAX_LINE} bytes")));
        }
        Ok(())
    }
}

fn excerpt(line: &[u8]) -> String {
    String::from_utf8_lossy(&line[..line.len().min(200)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::event::Stamp;
    use super::*;

    #[test]
    fn messages() {
        let greeting =
            br#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}"#;
        let Message::Greeting(greeting) = parse(greeting).expect("greeting") else { panic!("no greeting") };
        assert_eq!(greeting.version(), Version { major: 10, minor: 0, micro: 2 });
        assert_eq!(greeting.capabilities, ["oob"]);
        let answer = parse(br#"{"return": {}, "id": 7}"#).expect("answer");
        assert_eq!(answer, Message::Answer { id: Some(7), answer: Ok(json!({})) });
        let refused = parse(br#"{"error": {"class": "GenericError", "desc": "no"}, "id": 8}"#).expect("refusal");
        assert_eq!(refused, Message::Answer { id: Some(8), answer: Err("no".into()) });
        let event = br#"{"timestamp": {"seconds": 5, "microseconds": 17}, "event": "STOP"}"#;
        let Message::Event(event) = parse(event).expect("event") else { panic!("no event") };
        assert_eq!(event.at, Some(Stamp::from_micros(5_000_017)));
        let Message::Event(event) =
            parse(br#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}"#).expect("event")
        else {
            panic!("no event")
        };
        assert_eq!(event.at, None);
    }

    #[test]
    fn garbage_is_an_error() {
        for line in [
            &b"garbage"[..],
            b"{",
            b"[]",
            b"{}",
            b"\xff\xff",
            b"{\"id\": 1}",
            b"{\"id\": \"x\", \"return\": 1}",
            b"null",
            b"7",
        ] {
            assert!(matches!(parse(line), Err(Error::Protocol(_))), "{:?}", String::from_utf8_lossy(line));
        }
        let deep = vec![b'['; 100_000];
        assert!(parse(&deep).is_err());
    }

    #[test]
    fn lines_in_pieces() {
        let text = b"one\r\n\r\ntwo\nthree";
        for size in 1..text.len() {
            let (mut lines, mut seen) = (Lines::default(), Vec::new());
            for piece in text.chunks(size) {
                let fed = lines.feed(piece, |line| {
                    seen.push(line.trim_ascii().to_vec());
                    Ok(())
                });
                fed.expect("lines");
            }
            assert_eq!(seen, [b"one".to_vec(), b"two".to_vec()]);
        }
    }

    #[test]
    fn a_line_without_end() {
        let mut lines = Lines::default();
        let piece = vec![b'x'; 1 << 20];
        let ended = (0..8).find(|_| lines.feed(&piece, |_| Ok(())).is_err());
        assert_eq!(ended, Some(4));
    }
}
