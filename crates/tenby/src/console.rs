//! `tenby vm console`: the serial console, over every worker and QEMU that the machine has meanwhile.
//!
//! ```text
//!   keys ──► thread ──► waiting ──► socket ──► worker's hub ──► guest      Ctrl-] leaves (on a terminal)
//!   screen ◄── what is new ◄─────── socket ◄── the last 64 KiB, then live
//! ```
//!
//! When the connection ends (the worker died, the machine was applied or restarted) it is made again. The hub then shows its last
//! 64 KiB once more: what was shown before is left out. What was typed meanwhile waits and is delivered; what was typed just
//! before the break may have died with the worker, and is reported.

use crate::out::put;
use crate::session::{Reader, Session};
use machine::request::Problem;
use machine::root::Found;
use machine::tree::State;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use std::collections::VecDeque;
use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Leaves, on a terminal: Ctrl-].
const LEAVE: u8 = 0x1d;

/// What a hub shows at first, in bytes.
const REPLAY: usize = 64 << 10;

/// What was typed so shortly before a break may not have arrived.
const UNSURE: Duration = Duration::from_secs(2);

/// At the end of input, how long the port must have been silent before the console is left: an answer to the last line is waited
/// for a little. And how long all that may take.
const SILENCE: Duration = Duration::from_millis(300);
const ANSWER: Duration = Duration::from_millis(1500);
const LAST_WORDS: Duration = Duration::from_secs(10);

/// How long the machine may take to come back.
const PATIENCE: Duration = Duration::from_secs(120);

/// Shows the console until the user leaves, the input ends, or the machine is off.
pub(crate) async fn run(session: &Session, found: &Found) -> Result<(), Problem> {
    let Some(stream) = join(session, found).await? else {
        return Err(Problem::refused(format!("{} is not running: there is no console", found.name))
            .hint(format!("tenby vm start {}", crate::cli::quoted(&found.name))));
    };
    let terminal = RawTerminal::enter();
    if terminal.is_some() {
        session.out.note("Ctrl-] leaves\r");
    }
    let mut console = Console {
        keys: keys(),
        raw: terminal.is_some(),
        waiting: Vec::new(),
        sent: VecDeque::new(),
        tail: Tail::default(),
    };
    let result = console.over_all(session, found, stream).await;
    drop(terminal);
    if let Some(line) = console.undelivered() {
        session.out.note(&line);
    }
    result
}

/// Why a conversation ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The user leaves, or the input ended, or nobody reads the output.
    Left,
    /// The other end is gone.
    Broken,
}

struct Console {
    keys: mpsc::Receiver<Vec<u8>>,
    raw: bool,
    /// Typed, not yet handed over.
    waiting: Vec<u8>,
    /// Handed over lately.
    sent: VecDeque<(Instant, Vec<u8>)>,
    /// Shown last.
    tail: Tail,
}

impl Console {
    async fn over_all(&mut self, session: &Session, found: &Found, first: UnixStream) -> Result<(), Problem> {
        let mut stream = first;
        let mut terminate = signal(SignalKind::terminate())
            .map_err(|error| Problem::failed(format!("SIGTERM cannot be heard: {error}")))?;
        let mut again = false;
        loop {
            let end = tokio::select! {
                end = self.converse(stream, again) => end,
                _ = terminate.recv() => End::Left,
            };
            if end == End::Left {
                return Ok(());
            }
            if let Some(line) = self.unsure() {
                session.out.note(&format!("{line}\r"));
            }
            let rejoined = tokio::select! {
                rejoined = join(session, found) => rejoined?,
                () = self.type_ahead() => return Ok(()),
                _ = terminate.recv() => return Ok(()),
            };
            let Some(next) = rejoined else {
                session.out.note(&format!("{} is off\r", found.name));
                return Ok(());
            };
            (stream, again) = (next, true);
        }
    }

    /// Passes bytes both ways until one end has had enough.
    async fn converse(&mut self, stream: UnixStream, again: bool) -> End {
        let (mut from, to) = stream.into_split();
        let mut bytes = vec![0; 16 << 10];
        if again && !self.catch_up(&mut from).await {
            return End::Broken;
        }
        loop {
            // Output goes on while the guest does not take what is typed; then no more keys are read.
            let full = self.waiting.len() >= REPLAY;
            tokio::select! {
                read = from.read(&mut bytes) => match read {
                    Ok(count @ 1..) if self.show(&bytes[..count]) => {}
                    Ok(1..) => return End::Left,
                    Ok(0) | Err(_) => return End::Broken,
                },
                writable = to.writable(), if !self.waiting.is_empty() => {
                    if writable.is_err() || !self.hand_over(&to) {
                        return End::Broken;
                    }
                }
                keys = self.keys.recv(), if !full => match keys {
                    Some(keys) if self.take(&keys) => return End::Left,
                    Some(_) => {}
                    None => return self.last_words(from, to).await,
                },
            }
        }
    }

    /// Keeps what is typed while nobody is there to take it. Returns if the user leaves.
    async fn type_ahead(&mut self) {
        loop {
            match self.keys.recv().await {
                Some(keys) if self.take(&keys) => return,
                Some(_) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// Takes what was typed. `true` if the user leaves.
    fn take(&mut self, keys: &[u8]) -> bool {
        let leave = keys.iter().position(|key| self.raw && *key == LEAVE);
        self.waiting.extend_from_slice(&keys[..leave.unwrap_or(keys.len())]);
        leave.is_some()
    }

    /// Hands over what the socket takes. `false` if it is closed.
    fn hand_over(&mut self, to: &OwnedWriteHalf) -> bool {
        match to.try_write(&self.waiting) {
            Ok(count) => {
                let now = Instant::now();
                while self.sent.front().is_some_and(|(at, _)| now.duration_since(*at) > UNSURE) {
                    self.sent.pop_front();
                }
                self.sent.push_back((now, self.waiting.drain(..count).collect()));
                true
            }
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }

    /// Shows bytes. `false` if nobody looks any more.
    fn show(&mut self, bytes: &[u8]) -> bool {
        self.tail.push(bytes);
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).is_ok()
    }

    /// Reads what the hub shows again, and shows what is new in it. `false` if the other end is gone.
    async fn catch_up(&mut self, from: &mut tokio::net::unix::OwnedReadHalf) -> bool {
        let mut replay = Vec::new();
        let mut bytes = vec![0; 16 << 10];
        while replay.len() < REPLAY {
            match tokio::time::timeout(Duration::from_millis(200), from.read(&mut bytes)).await {
                Ok(Ok(count @ 1..)) => replay.extend_from_slice(&bytes[..count]),
                Ok(_) => return false,
                Err(_) => break,
            }
        }
        let known = self.tail.overlap(&replay);
        self.show(&replay[known..])
    }

    /// The input has ended: what waits is delivered, and what the port still says is shown until it is silent.
    async fn last_words(&mut self, mut from: tokio::net::unix::OwnedReadHalf, mut to: OwnedWriteHalf) -> End {
        let typed = std::mem::take(&mut self.waiting);
        if to.write_all(&typed).await.is_err() {
            self.waiting = typed;
            return End::Broken;
        }
        // The hub goes on showing to a client that types no more.
        let _ = to.shutdown().await;
        let (now, mut bytes) = (Instant::now(), vec![0; 16 << 10]);
        let asked = !typed.is_empty() || self.sent.back().is_some_and(|(at, _)| at.elapsed() < ANSWER);
        let least = now + if asked { ANSWER } else { SILENCE };
        while now.elapsed() < LAST_WORDS {
            let silence = SILENCE.max(least.saturating_duration_since(Instant::now()));
            match tokio::time::timeout(silence, from.read(&mut bytes)).await {
                Ok(Ok(count @ 1..)) if self.show(&bytes[..count]) => {}
                _ => break,
            }
        }
        End::Left
    }

    /// What was handed over so shortly before the break that it may be lost.
    fn unsure(&mut self) -> Option<String> {
        let sent = std::mem::take(&mut self.sent);
        let lately: Vec<u8> =
            sent.into_iter().filter(|(at, _)| at.elapsed() <= UNSURE).flat_map(|(_, bytes)| bytes).collect();
        (!lately.is_empty())
            .then(|| format!("what was typed just before the break may not have arrived: {}", lately.escape_ascii()))
    }

    /// What was typed and never handed over.
    fn undelivered(&mut self) -> Option<String> {
        let waiting = std::mem::take(&mut self.waiting);
        (!waiting.is_empty()).then(|| format!("this was typed and not delivered: {}", waiting.escape_ascii()))
    }
}

/// Connects to the machine's hub. `None` if the machine is off.
async fn join(session: &Session, found: &Found) -> Result<Option<UnixStream>, Problem> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let view = match session.sure_reader(found).await {
            // A worker that dies between two questions: the next one answers.
            Ok(reader @ Reader::Worker { .. }) => reader.view().await.ok(),
            Ok(reader @ Reader::Ledger(_)) => Some(reader.view().await?),
            Err(problem) => return Err(problem),
        };
        if let Some(view) = view {
            if matches!(view.state, State::Off | State::Saved) && view.doing.is_empty() {
                return Ok(None);
            }
            if let Some(sockets) = view.sockets
                && let Ok(stream) = api::connect(Path::new(&sockets.console)).await
            {
                return Ok(Some(stream));
            }
        }
        if Instant::now() > deadline {
            return Err(Problem::failed(format!("the console of {} does not answer", found.name)));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Reads standard input in a thread of its own: a read from a terminal cannot be taken back.
fn keys() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = io::stdin().lock().read(&mut bytes) {
            if sender.blocking_send(bytes[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// The terminal without its own ideas of keys and lines, until dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// `None` if standard input is no terminal.
    fn enter() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if tcsetattr(io::stdin(), OptionalActions::Drain, &self.before).is_ok() {
            put(&mut io::stderr().lock(), b"\n");
        }
    }
}

/// The last that was shown, as much as a hub would show again.
#[derive(Debug, Default)]
struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > 2 * REPLAY {
            self.bytes.drain(..self.bytes.len() - REPLAY);
        }
    }

    /// How much of the front of `replay` has been shown already: its longest beginning that the tail ends with (Knuth, Morris, Pratt).
    fn overlap(&self, replay: &[u8]) -> usize {
        if replay.is_empty() {
            return 0;
        }
        let mut borders = vec![0; replay.len()];
        let mut matched = 0;
        for i in 1..replay.len() {
            while matched > 0 && replay[i] != replay[matched] {
                matched = borders[matched - 1];
            }
            matched += usize::from(replay[i] == replay[matched]);
            borders[i] = matched;
        }
        let mut matched = 0;
        for byte in &self.bytes {
            while matched > 0 && (matched == replay.len() || *byte != replay[matched]) {
                matched = borders[matched - 1];
            }
            matched += usize::from(*byte == replay[matched]);
        }
        matched
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlap(shown: &str, replay: &str) -> usize {
        let mut tail = Tail::default();
        tail.push(shown.as_bytes());
        tail.overlap(replay.as_bytes())
    }

    #[test]
    fn what_was_shown_is_not_shown_again() {
        // The log is short: the replay begins where the first did.
        assert_eq!(overlap("one two", "one two three"), 7);
        // The log is long: the replay begins in the middle of what was shown.
        assert_eq!(overlap("zero one two", "one two three"), 7);
        // Nothing of it was shown: another log altogether.
        assert_eq!(overlap("abc", "xyz"), 0);
        assert_eq!(overlap("", "xyz"), 0);
        assert_eq!(overlap("abc", ""), 0);
        assert_eq!(overlap("aab", "aab"), 3);
        assert_eq!(overlap("aabaa", "aabaaab"), 5);
        assert_eq!(overlap("xaabaaab", "aabaab"), 3);
    }

    #[test]
    fn the_tail_is_bounded_and_keeps_what_a_hub_would_repeat() {
        let mut tail = Tail::default();
        for i in 0..100_000u32 {
            tail.push(&i.to_le_bytes());
        }
        assert!(tail.bytes.len() <= 2 * REPLAY);
        let replay: Vec<u8> = (90_000..100_010u32).flat_map(u32::to_le_bytes).collect();
        assert_eq!(tail.overlap(&replay), 40_000);
    }

    #[test]
    fn the_key_to_leave_is_one_only_on_a_terminal() {
        let console = |raw| Console {
            keys: mpsc::channel(1).1,
            raw,
            waiting: Vec::new(),
            sent: VecDeque::new(),
            tail: Tail::default(),
        };
        let mut piped = console(false);
        assert!(!piped.take(b"a\x1db"));
        assert_eq!(piped.waiting, b"a\x1db");
        let mut typed = console(true);
        assert!(typed.take(b"a\x1db"));
        assert_eq!(typed.undelivered().as_deref(), Some("this was typed and not delivered: a"));
    }
}
