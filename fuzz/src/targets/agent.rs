//! What a guest's agent says: what is left of earlier answers, the answer to who hails it, the answer to what it is told.
//!
//! An input is what the agent says, in parts: each when it has been asked something. `#` stands for the number that it was given.

use super::{BREAK, IDLE, change_stream, converse};
use crate::run::{MEMORY, words};
use crate::{Input, Random, Target};
use qemu::Agent;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

pub(super) const TARGET: Target =
    Target { name: "agent", about: "a guest's agent: its lines", quick: 4000, memory: MEMORY, seeds, mutate, run };

/// What an agent says in a few bytes.
const WORDS: [&[u8]; 16] = [
    b"\xff",
    b"\n",
    b"\r\n",
    b"\x1e",
    b"#",
    b"{\"return\": #}\n",
    b"\xff{\"return\": #}\n",
    b"{\"return\": {}}\n",
    b"{\"return\": null}\n",
    b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\"}}\n",
    b"{\"error\": {}}\n",
    b"{\"error\": 7}\n",
    b"\"\\ud800\"",
    b"[[[[[[[[[[[[[[[[",
    b"{\"a\":",
    b"18446744073709551616",
];

fn seeds() -> Vec<Input> {
    let hailed = b"\xff{\"return\": #}\n\x1e".as_slice();
    let after = [WORDS[7], WORDS[9], WORDS[10], b"{\"return\": 1, \"error\": {\"desc\": \"\\u001b[0m\"}}\r\n"];
    let whole = after.iter().map(|after| [hailed, after].concat());
    let late = [b"turn\": {}}\n\xff{\"return\": 1}\n".as_slice(), hailed, WORDS[7]].concat();
    whole.chain([late]).map(|bytes| Input::stream(&bytes)).collect()
}

fn mutate(input: &mut Input, random: &mut Random, _: &[Input]) {
    if random.one_in(500) {
        // A line without an end.
        *input = Input::stream(&[b"\xff{\"return\": #}\n\x1e".as_slice(), &vec![b'x'; 1 << 20]].concat());
    }
    change_stream(input, &WORDS, 2 << 20, random);
}

fn run(input: &Input) -> String {
    let bytes = input.bytes();
    converse(|stream| play(stream, bytes), speak)
}

/// Our part: it is told the time.
async fn speak(stream: UnixStream) -> String {
    let (from, to) = stream.into_split();
    let told = async { Agent::meet(BufReader::new(from), to).await?.set_time().await };
    match told.await {
        Ok(()) => "told".to_owned(),
        Err(error) => words(&error.to_string()),
    }
}

/// The guest's part; then it is gone.
async fn play(stream: UnixStream, bytes: Vec<u8>) -> Option<()> {
    let (hears, mut says) = stream.into_split();
    let mut hears = BufReader::new(hears);
    let mut number = Vec::new();
    for part in bytes.split(|byte| *byte == BREAK) {
        let mut line = Vec::new();
        tokio::time::timeout(IDLE, hears.read_until(b'\n', &mut line)).await.ok()?.ok()?;
        if number.is_empty() {
            number = line.iter().copied().filter(u8::is_ascii_digit).collect();
        }
        for (at, piece) in part.split(|byte| *byte == b'#').enumerate() {
            if at > 0 {
                says.write_all(&number).await.ok()?;
            }
            says.write_all(piece).await.ok()?;
        }
    }
    Some(())
}
