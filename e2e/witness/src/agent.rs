//! Plays the agent that other guests have (qemu-ga), as far as it is asked for here: it sets the clock.

use rustix::time::{ClockId, Timespec, clock_settime};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::time::Duration;

/// The port's name, by the agent's own documentation.
const NAME: &str = "org.qemu.guest_agent.0";
/// Comes before the answer to `guest-sync-delimited`, and may come before a question.
const SENTINEL: u8 = 0xff;
/// Nobody is at the other end: how long to wait until that is looked at again.
const PAUSE: Duration = Duration::from_millis(20);

/// Answers for as long as the guest lives.
pub(crate) fn begin() -> Result<(), String> {
    let path = port().ok_or_else(|| format!("there is no port {NAME}"))?;
    let open = || File::options().read(true).write(true).open(&path);
    let port = open().map_err(|error| format!("{}: {error}", path.display()))?;
    std::thread::spawn(move || serve(port));
    Ok(())
}

fn port() -> Option<PathBuf> {
    let ports = std::fs::read_dir("/sys/class/virtio-ports").ok()?;
    let is_it = |name: std::io::Result<String>| name.is_ok_and(|name| name.trim_end() == NAME);
    let port = ports.filter_map(Result::ok).find(|port| is_it(std::fs::read_to_string(port.path().join("name"))))?;
    Some(PathBuf::from("/dev").join(port.file_name()))
}

fn serve(port: File) {
    let mut port = BufReader::new(port);
    let mut line = Vec::new();
    loop {
        // While nobody is at the other end there is nothing to be read: what there was of a line goes on.
        if !port.read_until(b'\n', &mut line).is_ok_and(|_| line.ends_with(b"\n")) {
            std::thread::sleep(PAUSE);
            continue;
        }
        let begin = line.iter().rposition(|byte| *byte == SENTINEL).map_or(0, |at| at + 1);
        let answer = answer(&serde_json::from_slice(&line[begin..]).unwrap_or(Value::Null));
        line.clear();
        // If nobody reads it any more, the next one asks again.
        let _ = port.get_mut().write_all(&answer);
    }
}

fn answer(asked: &Value) -> Vec<u8> {
    let arguments = &asked["arguments"];
    let (before, answer): (&[u8], Value) = match asked["execute"].as_str() {
        Some("guest-sync-delimited") => (&[SENTINEL], json!({ "return": arguments["id"] })),
        Some("guest-set-time") => (&[], set_time(arguments["time"].as_i64().unwrap_or_default())),
        _ => (&[], json!({ "error": { "class": "CommandNotFound", "desc": "that is not known here" } })),
    };
    [before, format!("{answer}\n").as_bytes()].concat()
}

fn set_time(nanoseconds: i64) -> Value {
    let time = Timespec { tv_sec: nanoseconds / 1_000_000_000, tv_nsec: (nanoseconds % 1_000_000_000) as _ };
    match clock_settime(ClockId::Realtime, time) {
        Ok(()) => json!({ "return": {} }),
        Err(error) => json!({ "error": { "class": "GenericError", "desc": error.to_string() } }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_answers_as_agents_do() {
        let asked = json!({ "execute": "guest-sync-delimited", "arguments": { "id": 7 } });
        assert_eq!(answer(&asked), b"\xff{\"return\":7}\n");
        assert!(answer(&Value::Null).starts_with(b"{\"error\":"));
    }
}
