//! The guest's agent, where one is installed: a program of the guest at the other end of a serial port.
//!
//! Its protocol is one JSON object a line, asked and answered in turn (QEMU, `docs/interop/qemu-ga-ref`). Nothing says who reads at the other end,
//! or that anybody does: an agent that was restored in the middle of an answer goes on with that. So a conversation begins with a question whose answer
//! has a byte before it that is found nowhere else, and a number that is this conversation's alone.
//!
//! All that comes is a guest's word: no more than one line is kept of it, and whoever asks must not wait for it in the way of others.

use crate::error::{Error, Result};
use crate::launch::AGENT_SOCKET;
use crate::qemu::connect;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Instant;

/// The longest answer, in bytes: what is asked here is answered in few words.
const LONGEST: u64 = 16 << 10;
/// An answer that took so long may be to a time that was over when it was heard: a guest can be halted in between. (An agent that sets the machine's
/// clock as well takes up to 1 s.)
const LATE: Duration = Duration::from_secs(5);
/// Stands before the answer that a conversation begins with; no JSON has it. It also makes an agent forget what it has read of a line.
const SENTINEL: u8 = 0xff;

/// A conversation with a guest's agent.
#[derive(Debug)]
pub struct Agent<R = BufReader<OwnedReadHalf>, W = OwnedWriteHalf> {
    from: R,
    to: W,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "return")]
    result: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    desc: String,
}

impl Agent {
    /// Begins a conversation with the agent in the guest of the QEMU whose run folder this is. Returns when there is one: a guest may have none, or have
    /// one only later, so this may take for ever.
    pub async fn hail(run_dir: &Path) -> Result<Self> {
        let stream: UnixStream = connect(run_dir, AGENT_SOCKET).await?;
        let (from, to) = stream.into_split();
        Agent::meet(BufReader::new(from), to).await
    }
}

impl<R: AsyncBufRead + Unpin, W: AsyncWrite + Unpin> Agent<R, W> {
    /// The same over any two streams (for tests).
    pub async fn meet(from: R, to: W) -> Result<Self> {
        let mut agent = Self { from, to };
        let number = since_the_epoch().as_micros() as u64;
        agent.to.write_all(&[SENTINEL]).await.map_err(gone)?;
        agent.send("guest-sync-delimited", &json!({ "id": number })).await?;
        loop {
            // An answer to somebody before us is passed over.
            if parse(&agent.line().await?).is_ok_and(|answer| answer.result == Some(json!(number))) {
                return Ok(agent);
            }
        }
    }

    /// Sets the guest's clock to what the host's is now. Refused where the agent may not, or does not know how ([`Error::Refused`]).
    pub async fn set_time(&mut self) -> Result<()> {
        loop {
            let asked = Instant::now();
            let nanoseconds = since_the_epoch().as_nanos() as u64;
            self.send("guest-set-time", &json!({ "time": nanoseconds })).await?;
            if let Answer { error: Some(refusal), .. } = parse(&self.line().await?)? {
                let reason = refusal.desc.chars().filter(|char| !char.is_control()).take(200).collect();
                return Err(Error::Refused { command: "guest-set-time".to_owned(), reason });
            }
            if asked.elapsed() < LATE {
                return Ok(());
            }
        }
    }

    async fn send(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.to.write_all(line.as_bytes()).await.map_err(gone)
    }

    async fn line(&mut self) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        (&mut self.from).take(LONGEST).read_until(b'\n', &mut line).await.map_err(gone)?;
        match line.last() {
            Some(b'\n') => Ok(line),
            _ if line.len() as u64 == LONGEST => {
                Err(Error::Protocol("the guest's agent does not come to an end".to_owned()))
            }
            _ => Err(gone(std::io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

fn parse(line: &[u8]) -> Result<Answer> {
    // What is left of an agent's earlier words may stand before it.
    let from = line.iter().rposition(|byte| *byte == SENTINEL).map_or(0, |at| at + 1);
    let answer: Answer = serde_json::from_slice(&line[from..])
        .map_err(|error| Error::Protocol(format!("the guest's agent makes no sense: {error}")))?;
    if answer.result.is_none() && answer.error.is_none() {
        return Err(Error::Protocol("the guest's agent neither answers nor refuses".to_owned()));
    }
    Ok(answer)
}

fn gone(source: std::io::Error) -> Error {
    Error::Io { what: "talk to the guest's agent".to_owned(), source }
}

fn since_the_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{DuplexStream, ReadHalf, WriteHalf, duplex, split};

    /// The guest's end: asked a line, it says what `answer` makes of it.
    fn guest(
        mut answer: impl FnMut(&Value) -> Vec<u8> + Send + 'static,
    ) -> (BufReader<ReadHalf<DuplexStream>>, WriteHalf<DuplexStream>) {
        let (ours, theirs) = duplex(64);
        tokio::spawn(async move {
            let (from, mut to) = split(theirs);
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while from.read_until(b'\n', &mut line).await.is_ok_and(|count| count > 0) {
                let start = line.iter().rposition(|byte| *byte == SENTINEL).map_or(0, |at| at + 1);
                let asked = serde_json::from_slice(&line[start..]).expect("it is asked in JSON");
                if to.write_all(&answer(&asked)).await.is_err() {
                    return;
                }
                line.clear();
            }
        });
        let (from, to) = split(ours);
        (BufReader::new(from), to)
    }

    fn synced(asked: &Value) -> Vec<u8> {
        let answer = json!({ "return": asked["arguments"]["id"] }).to_string();
        [&[SENTINEL], answer.as_bytes(), b"\n"].concat()
    }

    #[tokio::test]
    async fn it_is_told_the_time() {
        let (from, to) = guest(|asked| match asked["execute"].as_str() {
            Some("guest-sync-delimited") => synced(asked),
            Some("guest-set-time") => {
                let time = u128::from(asked["arguments"]["time"].as_u64().expect("a number"));
                assert!(since_the_epoch().as_nanos() - time < 60_000_000_000, "it is now");
                b"{\"return\": {}}\n".to_vec()
            }
            other => panic!("{other:?}"),
        });
        Agent::meet(from, to).await.expect("it answers").set_time().await.expect("it does");
    }

    /// It was halted before it heard the time, and goes on after it.
    #[tokio::test(start_paused = true)]
    async fn a_time_that_was_heard_late_is_told_again() {
        let (ours, theirs) = duplex(256);
        let halted = tokio::spawn(async move {
            let (from, mut to) = split(theirs);
            let mut lines = BufReader::new(from).lines();
            for wait in [LATE * 2, Duration::ZERO] {
                lines.next_line().await.expect("it is open").expect("it is told");
                tokio::time::sleep(wait).await;
                to.write_all(b"{\"return\": {}}\n").await.expect("it is open");
            }
            lines.next_line().await.expect("it is open")
        });
        let (from, to) = split(ours);
        let mut agent = Agent { from: BufReader::new(from), to };
        agent.set_time().await.expect("it does");
        drop(agent);
        assert_eq!(halted.await.expect("it was told twice"), None);
    }

    #[tokio::test]
    async fn what_it_said_to_others_is_passed_over() {
        let (from, to) = guest(|asked| match asked["execute"].as_str() {
            Some("guest-sync-delimited") => {
                let before =
                    b"turn\": {}}\n{\"return\": 7}\n\xff{\"return\": 8}\n\xffnonsense\n\xff{\"return\": null}\n";
                [before.as_slice(), &synced(asked)].concat()
            }
            _ => b"{\"return\": {}}\r\n".to_vec(),
        });
        Agent::meet(from, to).await.expect("it answers").set_time().await.expect("it does");
    }

    #[tokio::test]
    async fn what_it_refuses_and_what_makes_no_sense() {
        for (said, words) in [
            (b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"not \\u001bhere\"}}\n".to_vec(), "not here"),
            (b"{}\n".to_vec(), "neither answers nor refuses"),
            (b"what?\n".to_vec(), "makes no sense"),
            (b"[".repeat(LONGEST as usize + 1), "does not come to an end"),
        ] {
            let (from, to) = guest(move |asked| match asked["execute"].as_str() {
                Some("guest-sync-delimited") => synced(asked),
                _ => said.clone(),
            });
            let error = Agent::meet(from, to).await.expect("it answers").set_time().await.expect_err(words);
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[tokio::test]
    async fn a_guest_that_goes_ends_the_conversation() {
        let (ours, mut theirs) = duplex(64);
        let (from, to) = split(ours);
        let meeting = tokio::spawn(Agent::meet(BufReader::new(from), to));
        let mut byte = [0];
        theirs.read_exact(&mut byte).await.expect("it is hailed");
        drop(theirs);
        assert!(meeting.await.expect("no panic").is_err());
    }
}
