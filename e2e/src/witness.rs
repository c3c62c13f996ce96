//! A conversation with the witness in the guest.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::DEADLINE;

/// Drops whatever the guest holds of an unfinished line: it may have been restored in the middle of one.
const KILL_LINE: u8 = 0x15;

/// Tags count on over all conversations of this process: a console repeats what it has said before.
static NEXT_TAG: AtomicU64 = AtomicU64::new(1);

/// Why nothing will be heard any more.
const CLOSED: &str = "the console is closed";

/// The other end of the guest's serial port.
pub struct Witness {
    to: Box<dyn Write + Send>,
    lines: Receiver<String>,
    /// What keeps the connection alive.
    _keep: Option<Box<dyn Send>>,
    /// What was heard last, for messages.
    heard: Vec<String>,
}

impl Witness {
    /// Talks through `to` and listens to `from`; `keep` lives as long as the conversation.
    pub fn new(from: impl Read + Send + 'static, to: impl Write + Send + 'static, keep: Option<Box<dyn Send>>) -> Self {
        let (send, lines) = channel();
        std::thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while from.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                if send.send(text).is_err() {
                    return;
                }
            }
        });
        Self { to: Box::new(to), lines, _keep: keep, heard: Vec::new() }
    }

    /// Waits for the line that says that the guest is up, and gives the nonce of this boot.
    ///
    /// # Panics
    /// If it does not come.
    pub fn wait_ready(&mut self) -> String {
        let line = self
            .line_with("WITNESS READY nonce=", DEADLINE)
            .unwrap_or_else(|why| self.give_up("the guest to come up", why));
        line.split_whitespace().next().unwrap_or_default().to_owned()
    }

    /// Waits for a line with `words` in it.
    ///
    /// # Panics
    /// If it does not come.
    pub fn hear(&mut self, words: &str) {
        self.line_with(words, DEADLINE).unwrap_or_else(|why| self.give_up(words, why));
    }

    /// Asks, and gives the answer.
    ///
    /// # Panics
    /// If none comes, or the answer is that the request was wrong.
    pub fn ask(&mut self, request: &str) -> Value {
        let answer = self.try_ask(request, DEADLINE).unwrap_or_else(|why| self.give_up(request, why));
        assert!(answer["error"].is_null(), "{request}: {}", answer["error"]);
        answer
    }

    /// Asks, and gives the answer if one comes `within` that time.
    ///
    /// # Errors
    /// What happened instead.
    pub fn try_ask(&mut self, request: &str, within: Duration) -> Result<Value, &'static str> {
        let tag = format!("{}.{}", std::process::id(), NEXT_TAG.fetch_add(1, Ordering::Relaxed));
        let mut line = vec![KILL_LINE];
        line.extend_from_slice(format!(">{tag} {request}\n").as_bytes());
        self.to.write_all(&line).and_then(|()| self.to.flush()).map_err(|_| CLOSED)?;
        let answer = self.line_with(&format!("<{tag} "), within)?;
        serde_json::from_str(&answer).map_err(|_| "the answer is mangled")
    }

    /// After something that may have swallowed a question (a restore, a worker's death): asks harmlessly until there is an answer.
    ///
    /// # Panics
    /// If there never is one.
    pub fn resync(&mut self) -> Value {
        let start = Instant::now();
        loop {
            match self.try_ask("status", Duration::from_secs(5)) {
                Ok(status) => return status,
                Err(CLOSED) => self.give_up("any answer", CLOSED),
                Err(why) if start.elapsed() > DEADLINE => self.give_up("any answer", why),
                Err(_) => {}
            }
        }
    }

    /// RAM and disks agree.
    ///
    /// # Panics
    /// If they do not.
    pub fn prove(&mut self) -> Value {
        let answer = self.ask("check");
        assert_eq!(answer["ok"], true, "the witness: {answer}");
        answer
    }

    /// The nonce of this boot.
    pub fn nonce(&mut self) -> String {
        let status = self.ask("status");
        status["nonce"].as_str().unwrap_or_else(|| panic!("no nonce in {status}")).to_owned()
    }

    /// What follows `start` in the next line that has it.
    fn line_with(&mut self, start: &str, within: Duration) -> Result<String, &'static str> {
        let end = Instant::now() + within;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if let Some(at) = line.find(start) {
                        return Ok(line[at + start.len()..].to_owned());
                    }
                    self.heard.push(line);
                }
                Err(RecvTimeoutError::Timeout) => return Err("nothing came"),
                Err(RecvTimeoutError::Disconnected) => return Err(CLOSED),
            }
        }
    }

    fn give_up(&self, waited_for: &str, why: &str) -> ! {
        let heard = self.heard[self.heard.len().saturating_sub(20)..].join("\n  ");
        panic!("waiting for {waited_for}: {why}; heard last:\n  {heard}");
    }
}
