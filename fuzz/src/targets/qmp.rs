//! What QEMU's monitor says: greeting, events, answers.
//!
//! An input is what the monitor says, in parts: one at once, each other when it has been sent a command.

use super::{BREAK, IDLE, change_stream, converse};
use crate::run::{MEMORY, words};
use crate::{Input, Random, Target};
use qemu::{EventKind, Qmp, Stamp};
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

pub(super) const TARGET: Target =
    Target { name: "qmp", about: "QEMU's monitor: its lines", quick: 4000, memory: MEMORY, seeds, mutate, run };

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;

/// What a monitor says in a few bytes.
const WORDS: [&[u8]; 24] = [
    GREETING.as_bytes(),
    b"\r\n",
    b"\n",
    b"\x1e",
    br#"{"return": {}, "id": 1}"#,
    br#"{"return": {}, "id": 2}"#,
    br#"{"return": null, "id": 3}"#,
    br#"{"error": {"class": "GenericError", "desc": "no"}, "id": 2}"#,
    br#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#,
    br#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "RESUME"}"#,
    br#"{"timestamp": {"seconds": 9223372036854775807, "microseconds": 9223372036854775807}, "event": "X"}"#,
    br#"{"event": "MIGRATION", "data": {"status": "completed"}}"#,
    br#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#,
    br#"{"event": "RESET", "data": {"guest": 7}}"#,
    br#"{"event": "POWERDOWN"}"#,
    br#"{"event": "GUEST_PANICKED", "data": []}"#,
    br#"{"event": "BLOCK_IO_ERROR", "data": {"node-name": "disk0", "action": "stop", "reason": "EIO"}}"#,
    br#""id": 18446744073709551616"#,
    br#""id": -1"#,
    b"[[[[[[[[[[[[[[[[",
    b"\"\\ud800\"",
    b"1e999999",
    b"\xff\xfe",
    b"{\"a\":",
];

fn seeds() -> Vec<Input> {
    let answers = [
        [r#"{"running": true, "status": "running"}"#, r#"{"status": "active", "blocked-reasons": []}"#].as_slice(),
        &[r#"{"running": false, "status": "paused"}"#, r#"{"status": "failed", "error-desc": "no", "total-time": 5}"#],
        &[r#"{"running": false, "status": "inmigrate"}"#, "{}", r#"[{"type": "migration"}]"#],
        &["NO", "NO", "NO"],
    ];
    let chardevs = r#"[{"label": "serial0", "filename": "disconnected:unix:x", "frontend-open": true}]"#;
    let nodes = r#"[{"node-name": "disk0", "drv": "nbd", "image": {"virtual-size": 1048576}}]"#;
    answers
        .iter()
        .enumerate()
        .map(|(which, answers)| {
            let answers = answers.iter().copied().chain([nodes, chardevs]);
            let mut out = format!("{GREETING}\r\n").into_bytes();
            let all = std::iter::once("{}").chain(answers);
            for (index, answer) in all.enumerate() {
                out.push(BREAK);
                let event = String::from_utf8_lossy(WORDS[8 + (index + 3 * which) % 9]).into_owned();
                let id = index + 1;
                let answer = match answer {
                    "NO" => format!(r#"{{"error": {{"class": "GenericError", "desc": "no"}}, "id": {id}}}"#),
                    answer => format!(r#"{{"return": {answer}, "id": {id}}}"#),
                };
                out.extend(format!("{event}\n{answer}\r\n").into_bytes());
            }
            Input::stream(&out)
        })
        .collect()
}

fn mutate(input: &mut Input, random: &mut Random, _: &[Input]) {
    if random.one_in(500) {
        // A line without an end.
        *input = Input::stream(&vec![b'x'; 5 << 20]);
    }
    change_stream(input, &WORDS, 6 << 20, random);
}

fn run(input: &Input) -> String {
    let bytes = input.bytes();
    converse(|stream| play(stream, bytes), speak)
}

/// The monitor's part.
async fn play(stream: UnixStream, bytes: Vec<u8>) -> Option<()> {
    let (hears, mut says) = stream.into_split();
    let mut lines = BufReader::new(hears).lines();
    for part in bytes.split(|byte| *byte == BREAK) {
        says.write_all(part).await.ok()?;
        // Without a command by now there will be none: time passes only when everybody waits.
        tokio::time::timeout(IDLE, lines.next_line()).await.ok()?.ok()??;
    }
    Some(())
}

/// Our part: a greeting, and some questions.
async fn speak(stream: UnixStream) -> String {
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&events);
    let note =
        move |event: &qemu::Event| {
            let kind = match &event.kind {
                EventKind::Migration(status) if status.is_end() => "End".to_owned(),
                kind => format!("{kind:?}"),
            };
            let later = |at: Stamp| Stamp::from_micros(at.micros().saturating_add(1)).micros_since(at);
            assert!(event.at.is_none_or(|at| later(at) <= 1
                && at.micros_since(at) == 0
                && at.micros_since(Stamp::now()) < u64::MAX));
            let word = kind.split([' ', '(']).next().unwrap_or_default().to_owned();
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            if !seen.contains(&word) && seen.len() < 3 {
                seen.push(word);
            }
        };
    let mut said = Vec::new();
    match Qmp::connect(stream, note).await {
        Err(error) => said.push(words(&error.to_string())),
        Ok(qmp) => {
            assert!(!qmp.version().to_string().is_empty());
            let mut events = qmp.events();
            let mut hear = |result: Result<(), qemu::Error>| said.push(told(&result));
            hear(qmp.status().await.map(drop));
            hear(qmp.migration().await.map(drop));
            hear(qmp.migration_held().await.map(drop));
            hear(qmp.block_nodes().await.map(drop));
            hear(qmp.unconnected_chardevs().await.map(drop));
            hear(qmp.human("info").await.map(drop));
            drop(qmp);
            while events.next().await.is_ok() {}
        }
    }
    let events = events.lock().unwrap_or_else(PoisonError::into_inner);
    said.dedup();
    format!("{said:?} {events:?}")
}

fn told(result: &Result<(), impl Display>) -> String {
    super::outcome(result).chars().take(40).collect()
}
