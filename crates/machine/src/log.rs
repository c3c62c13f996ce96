//! The machine's log: a line for each thing that was done to it, JSON, in `log/machine.log`. For people; nothing depends on it.

use crate::files::Files;
use crate::root::{LogLine, open_or_create};
use crate::tree::JobId;
use store::Mode;

/// At most this much of the log's end is read, bytes.
const READ_LIMIT: u64 = 1 << 20;

/// Appends a line. A log that cannot be written stops nobody.
pub fn write(files: &Files, job: Option<JobId>, what: &str) {
    tracing::info!(job = job.map(|id| id.to_string()), "{what}");
    let line = LogLine { at: jiff::Timestamp::now(), job, what: what.to_owned() };
    let Ok(mut text) = serde_json::to_vec(&line) else { return };
    text.push(b'\n');
    let append = || {
        let folder = files.folder().folder("log").ok()?;
        let store = open_or_create(&folder, "machine.log").ok()?;
        store.write_at(&text, store.len().ok()?).ok()
    };
    append();
}

/// The last lines, oldest first.
pub fn read(files: &Files) -> Vec<LogLine> {
    let text = || {
        let store = files.folder().folder("log").ok()?.open("machine.log", Mode::Read).ok()?;
        let len = store.len().ok()?;
        let start = len.saturating_sub(READ_LIMIT);
        let mut text = vec![0; (len - start) as usize];
        store.read_at(&mut text, start).ok()?;
        Some(text)
    };
    let text = text().unwrap_or_default();
    text.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}
