//! What one can ask of the witness.

use std::io::Read;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::system::RebootCommand;
use serde_json::{Value, json};

use crate::disk::Disk;
use crate::journal::{Journal, Nonce};
use crate::pattern::{Hash, mix};
use crate::ram::{Ram, Sum, lock};

/// Between two ticks of the counter.
const TICK: Duration = Duration::from_millis(20);
/// Between two steps of the journal, unless told otherwise.
const PACE_MS: u64 = 100;
const MIB: u64 = 1 << 20;

const HELP: &str = "\
status                          who I am, what I have, how far I am
check                           whether RAM and disks agree
set KEY VALUE | get KEY         a note, in RAM only
write DEV OFFSET TEXT           a text onto a disk (vda, vdb), flushed
read DEV OFFSET [LEN]           and back
fill-ram MIB SEED | refill-ram AT MIB SEED (a part of it, from MiB AT on) | sum-ram | drop-ram
fill-disk DEV OFFSET MIB SEED | pour-disk (the same, not flushed) | sum-disk DEV OFFSET MIB [SEED] | zero DEV OFFSET MIB
dirty MIB PAGES_PER_SECOND      keep changing RAM (0 0 ends it)
gap                             the longest between two ticks since this was asked last
journal run | pause | step N | pace MS
sh COMMAND                      run a shell command
agent                           answer as the agent of other guests does: it sets the clock
poweroff | reboot | panic
";

/// A verb's result: an answer, or what was wrong with the request.
type Answer = Result<Value, String>;

/// All that the guest remembers.
pub(crate) struct Witness {
    nonce: Nonce,
    woke: Instant,
    ticks: AtomicU64,
    /// The longest time between two ticks, microseconds, since somebody asked for it.
    gap_us: AtomicU64,
    pub(crate) ram: Ram,
    journal: Mutex<Journal>,
    /// Why the journal no longer runs, if a disk refused a write.
    failure: Mutex<Option<String>>,
    /// Whether the journal runs. Changes under its lock.
    running: AtomicBool,
    resumed: Condvar,
    pace_ms: AtomicU64,
}

impl Witness {
    /// Draws a nonce and takes up the journal of the disks.
    pub(crate) fn wake() -> Self {
        Self::with_disks(Disk::names().iter().filter_map(|name| Disk::open(name).ok()).collect())
    }

    fn with_disks(disks: Vec<Disk>) -> Self {
        let nonce = [random(), random()];
        Self {
            nonce,
            woke: Instant::now(),
            ticks: AtomicU64::new(0),
            gap_us: AtomicU64::new(0),
            ram: Ram::default(),
            journal: Mutex::new(Journal::open(disks, nonce, mix(nonce[0]))),
            failure: Mutex::new(None),
            running: AtomicBool::new(true),
            resumed: Condvar::new(),
            pace_ms: AtomicU64::new(PACE_MS),
        }
    }

    /// A witness for tests of the conversation.
    #[cfg(test)]
    pub(crate) fn without_disks() -> Self {
        Self::with_disks(Vec::new())
    }

    /// Starts the counter and the journal.
    pub(crate) fn start_threads(self: &Arc<Self>) {
        let ticking = Arc::clone(self);
        std::thread::spawn(move || {
            let mut last = Instant::now();
            loop {
                ticking.ticks.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(TICK);
                let gap = last.elapsed();
                last += gap;
                ticking.gap_us.fetch_max(gap.as_micros() as u64, Ordering::Relaxed);
            }
        });
        let writing = Arc::clone(self);
        std::thread::spawn(move || {
            loop {
                writing.step_when_running();
                std::thread::sleep(Duration::from_millis(writing.pace_ms.load(Ordering::SeqCst)));
            }
        });
    }

    /// A step; none follows once `journal pause` has answered. A paused journal costs the host nothing.
    fn step_when_running(&self) {
        let mut journal = self.hold_journal();
        while !self.running.load(Ordering::SeqCst) {
            journal = self.resumed.wait(journal).unwrap_or_else(PoisonError::into_inner);
        }
        if let Err(error) = journal.step() {
            self.running.store(false, Ordering::SeqCst);
            *lock(&self.failure) = Some(error.to_string());
        }
    }

    /// Keeps the journal from stepping while the guard lives.
    pub(crate) fn hold_journal(&self) -> MutexGuard<'_, Journal> {
        lock(&self.journal)
    }

    /// The line that says that the guest is up.
    pub(crate) fn ready(&self) -> String {
        let journal = self.hold_journal();
        format!(
            "WITNESS READY nonce={} found={} disks={}",
            hex(self.nonce),
            journal.found.seq,
            journal.disk_names().join(",")
        )
    }

    /// Carries out one request; whatever is wrong with it is in the answer.
    pub(crate) fn answer(&self, request: &str) -> Value {
        self.obey(request).unwrap_or_else(|error| json!({ "error": error }))
    }

    fn obey(&self, request: &str) -> Answer {
        let (verb, rest) = split(request);
        match verb {
            "help" => Ok(json!({ "help": HELP })),
            "status" => Ok(self.status()),
            "check" => Ok(self.check()),
            "journal" => self.steer_journal(rest),
            "sh" => shell(rest),
            "agent" => crate::agent::begin().map(|()| json!({})),
            "poweroff" => Ok(self.end(RebootCommand::PowerOff)),
            "reboot" => Ok(self.end(RebootCommand::Restart)),
            "panic" => failed(std::fs::write("/proc/sysrq-trigger", "c")).map(|()| json!({})),
            "gap" => Ok(json!({ "gap_us": self.gap_us.swap(0, Ordering::Relaxed) })),
            "set" | "get" | "fill-ram" | "refill-ram" | "sum-ram" | "drop-ram" | "dirty" => {
                self.obey_about_ram(verb, rest)
            }
            "write" | "read" | "fill-disk" | "pour-disk" | "sum-disk" | "zero" => obey_about_disk(verb, rest),
            _ => Err(format!("what is `{verb}`? Try `help`")),
        }
    }

    fn status(&self) -> Value {
        let disks: Vec<Value> = Disk::names()
            .iter()
            .filter_map(|name| Disk::open(name).ok())
            .map(|disk| json!({ "name": disk.name, "bytes": disk.bytes }))
            .collect();
        let journal = self.hold_journal();
        json!({
            "nonce": hex(self.nonce),
            "ticks": self.ticks.load(Ordering::Relaxed),
            "uptime_ms": self.woke.elapsed().as_millis() as u64,
            "memory": memory_bytes(),
            "cpus": std::thread::available_parallelism().map_or(1, usize::from),
            "disks": disks,
            "notes": self.ram.notes(),
            "journal": {
                "id": format!("{:016x}", journal.id()),
                "flushed": journal.flushed(),
                "disks": journal.disk_names(),
                "running": self.running.load(Ordering::SeqCst),
                "found": { "seq": journal.found.seq, "nonce": hex(journal.found.nonce), "problems": journal.found.problems },
            },
        })
    }

    /// Compares RAM with the disks, between two steps.
    fn check(&self) -> Value {
        let journal = self.hold_journal();
        let mut problems = journal.check();
        problems.extend(journal.found.problems.iter().map(|problem| format!("at boot: {problem}")));
        problems.extend(lock(&self.failure).iter().map(|error| format!("a write failed: {error}")));
        if let Some(wrong) = self.ram.sum().and_then(|sum| sum.wrong_at) {
            problems.push(format!("the filled RAM has changed at {wrong}"));
        }
        json!({ "ok": problems.is_empty(), "nonce": hex(self.nonce), "flushed": journal.flushed(), "problems": problems })
    }

    fn steer_journal(&self, rest: &str) -> Answer {
        let (what, count) = split(rest);
        let mut journal = self.hold_journal();
        match what {
            "run" | "pause" => {
                self.running.store(what == "run", Ordering::SeqCst);
                self.resumed.notify_all();
            }
            "pace" => self.pace_ms.store(number(count)?, Ordering::SeqCst),
            "step" => {
                for _ in 0..number(count)? {
                    failed(journal.step())?;
                }
            }
            _ => return Err("journal run | pause | step N | pace MS".to_owned()),
        }
        Ok(json!({ "flushed": journal.flushed() }))
    }

    fn obey_about_ram(&self, verb: &str, rest: &str) -> Answer {
        let (first, second) = split(rest);
        match verb {
            "set" => self.ram.set(first, second),
            "get" => return Ok(json!({ "value": self.ram.get(first) })),
            "drop-ram" => self.ram.drop_filled(),
            "dirty" => self.ram.dirty(number(first)? as usize, number(second)?),
            "fill-ram" => {
                let mib = number(first)?;
                if mib > memory_bytes() / MIB * 9 / 10 {
                    return Err("so much RAM is not there".to_owned());
                }
                self.ram.fill(mib as usize, number(second)?);
            }
            "refill-ram" => {
                let (mib, seed) = split(second);
                let (at, mib) = (number(first)? as usize, number(mib)? as usize);
                self.ram.refill(at, mib, number(seed)?).ok_or("so much RAM has not been filled: fill-ram MIB SEED")?;
            }
            _ => {
                let Sum { mib, seeds, hash, wrong_at } =
                    self.ram.sum().ok_or("no RAM has been filled: fill-ram MIB SEED")?;
                let (sum, ok) = (format!("{hash:016x}"), wrong_at.is_none());
                return Ok(json!({ "mib": mib, "seeds": seeds, "sum": sum, "ok": ok, "wrong_at": wrong_at }));
            }
        }
        Ok(json!({}))
    }

    fn end(&self, how: RebootCommand) -> Value {
        crate::boot::end(self, how);
        json!({ "error": "the guest goes on" })
    }
}

fn obey_about_disk(verb: &str, rest: &str) -> Answer {
    let (name, rest) = split(rest);
    let disk = failed(Disk::open(name))?;
    let (offset, rest) = split(rest);
    let offset = number(offset)?;
    let (third, fourth) = split(rest);
    match verb {
        "write" => failed(disk.write_text(offset, rest))?,
        "read" => {
            let len = if third.is_empty() { 256 } else { number(third)?.min(MIB) };
            return Ok(json!({ "text": failed(disk.read_text(offset, len.min(disk.bytes.saturating_sub(offset))))? }));
        }
        "zero" => failed(disk.zero(offset, mebibytes(third)?))?,
        "fill-disk" => failed(disk.fill(offset, mebibytes(third)?, number(fourth)?).and_then(|()| disk.flush()))?,
        "pour-disk" => failed(disk.fill(offset, mebibytes(third)?, number(fourth)?))?,
        _ => {
            let seed = if fourth.is_empty() { None } else { Some(number(fourth)?) };
            let (hash, wrong) = failed(disk.sum(offset, mebibytes(third)?, seed))?;
            return Ok(
                json!({ "sum": format!("{hash:016x}"), "ok": seed.map(|_| wrong.is_none()), "wrong_at": wrong }),
            );
        }
    }
    Ok(json!({}))
}

/// The first word, and what follows it.
fn split(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once(' ').map_or((text.trim_end(), ""), |(first, rest)| (first, rest.trim()))
}

/// A number, plain or with K, M or G behind it.
fn number(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a number");
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value: u64 = digits.parse().map_err(|_| wrong())?;
    value.checked_mul(1 << unit).ok_or_else(wrong)
}

fn mebibytes(text: &str) -> Result<u64, String> {
    number(text)?.checked_mul(MIB).ok_or_else(|| format!("`{text}` is too much"))
}

fn failed<T>(result: std::io::Result<T>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

fn shell(command: &str) -> Answer {
    let output = failed(Command::new("/bin/sh").args(["-c", command]).stdin(std::process::Stdio::null()).output())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(json!({ "status": output.status.code(), "stdout": text(&output.stdout), "stderr": text(&output.stderr) }))
}

fn memory_bytes() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total =
        info.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    total.unwrap_or(0) * 1024
}

fn hex(nonce: Nonce) -> String {
    format!("{:016x}{:016x}", nonce[0], nonce[1])
}

/// A number that no other boot draws. Not a secret, so it does not wait until the kernel has gathered entropy, which takes
/// seconds under emulation; the clocks differ anyway.
fn random() -> u64 {
    let mut bytes = [0; 8];
    let _ = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    Hash::of(&[bytes, now.to_le_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::{Witness, number};
    use serde_json::json;

    #[test]
    fn sizes_have_units_and_limits() {
        assert_eq!(number("12"), Ok(12));
        assert_eq!(number("3M"), Ok(3 << 20));
        for wrong in ["", "M", "-1", "1x", "99999999999999999999", "99999999999G", "é"] {
            assert!(number(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn filled_ram_is_found_again() {
        let witness = Witness::without_disks();
        assert!(witness.answer("sum-ram")["error"].is_string());
        assert_eq!(witness.answer("fill-ram 2 77"), json!({}));
        let sum = witness.answer("sum-ram");
        assert_eq!((&sum["ok"], &sum["mib"], &sum["seeds"]), (&json!(true), &json!(2), &json!([77])));
        assert_eq!(witness.answer("check")["ok"], true);
    }

    #[test]
    fn a_part_of_it_is_filled_anew() {
        let witness = Witness::without_disks();
        assert!(witness.answer("refill-ram 0 1 5")["error"].is_string());
        witness.answer("fill-ram 4 77");
        let before = witness.answer("sum-ram");
        assert_eq!(witness.answer("refill-ram 1 2 5"), json!({}));
        let sum = witness.answer("sum-ram");
        assert_eq!((&sum["ok"], &sum["mib"], &sum["seeds"]), (&json!(true), &json!(4), &json!([77, 5, 77])));
        assert_ne!(sum["sum"], before["sum"]);
        assert!(witness.answer("refill-ram 3 2 5")["error"].is_string());
        assert_eq!(witness.answer("refill-ram 1 2 77"), json!({}));
        assert_eq!(witness.answer("sum-ram"), before);
    }

    #[test]
    fn nonsense_is_answered() {
        let witness = Witness::without_disks();
        for request in [
            "",
            " ",
            "status now",
            "read",
            "write vda",
            "fill-ram 99999999 1",
            "refill-ram 0 99999999999 1",
            "read ../etc/passwd 0",
            "journal step x",
            "zero nodisk 0 1",
        ] {
            let answer = witness.answer(request);
            assert!(request.starts_with("status") || answer["error"].is_string(), "{request}: {answer}");
        }
    }
}
