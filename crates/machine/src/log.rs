//! The machine's log: a line for each thing that was done to it, JSON, in `log/machine.log`. For people; nothing depends on it.

use crate::files::Files;
use crate::root::{LogLine, open_or_create};
use crate::tree::JobId;
use store::{Mode, Store};

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
        append_line(&*open_or_create(&folder, "machine.log").ok()?, &text).ok()
    };
    append();
}

/// Appends a line; behind half a one, which a full disk or a power cut left, it begins anew.
fn append_line(store: &dyn Store, line: &[u8]) -> store::Result<()> {
    let end = store.len()?;
    let mut last = *b"\n";
    store.read_at(&mut last[..end.min(1) as usize], end.saturating_sub(1))?;
    let text = [if last == *b"\n" { &b""[..] } else { b"\n" }, line].concat();
    store.write_at(&text, end)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use store::sim::{At, Sim, Times};

    #[test]
    fn half_a_line_costs_no_other() {
        let sim = Sim::new();
        let files = Files::new(sim.root(), Path::new("/sim"));
        files.create_folders().expect("folders");
        let long = "words ".repeat(2000);
        let words = || read(&files).into_iter().map(|line| line.what).collect::<Vec<_>>();
        write(&files, None, "one");
        sim.fail(At::Operation(sim.counts().operations), store::ErrorKind::NoSpace, Times::Once);
        write(&files, None, &long);
        write(&files, None, "two");
        assert_eq!(words(), ["one", "two"]);
        // As a power cut leaves it.
        let log = files.folder().folder("log").expect("there").open("machine.log", Mode::Write).expect("there");
        log.set_len(log.len().expect("a length") - 5).expect("cut");
        write(&files, None, "three");
        write(&files, None, &long);
        assert_eq!(words(), ["one", "three", &long]);
    }
}
