//! Executions: one input, one target, limits; and campaigns of many.

use crate::file::PAGE;
use crate::input::Input;
use crate::random::Random;
use crate::{Target, memory};
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

/// The most memory that an execution of most targets may hold at a time, bytes, besides [`MEMORY_PER_BYTE`]: the longest log of a
/// VHDX, which may be all holes, and as much as everything else needs.
pub const MEMORY: u64 = (64 + 16) << 20;
/// The most memory for each byte that the input's pages have.
pub const MEMORY_PER_BYTE: u64 = 4;
/// The longest that one execution may take. The limits that count are those on operations; this one finds loops without any, and is
/// generous to busy machines.
pub const TIME: Duration = Duration::from_secs(20);
/// How the message of an execution begins that took longer.
const TOOK: &str = "it took";
/// The most inputs that a campaign goes on from.
const POOL: usize = 2000;

/// Why an execution counts as a failure.
#[derive(Debug, Clone)]
pub struct Failure {
    /// What happened.
    pub reason: String,
    /// With which input.
    pub input: Input,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// What an execution came to.
#[derive(Debug, Clone)]
pub struct Ran {
    /// In a few words, the same for inputs that are alike.
    pub outcome: String,
    /// The most memory that it held, bytes.
    pub memory: u64,
}

/// Panics of any thread since the last look.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static WATCHING: AtomicBool = AtomicBool::new(false);
/// Memory and panics are the whole process's: one execution at a time.
static ONE: Mutex<()> = Mutex::new(());

fn panics() -> MutexGuard<'static, Vec<String>> {
    PANICS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Panics during executions are noted instead of printed.
fn watch_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if WATCHING.load(Ordering::SeqCst) {
                panics().push(info.to_string());
            } else {
                before(info);
            }
        }));
    });
}

/// Runs `target` once.
///
/// # Errors
/// The failure, if anything panicked, took too long or too much memory, or broke the target's own rules (which panics too).
pub fn execute(target: &Target, input: &Input) -> Result<Ran, Box<Failure>> {
    watch_panics();
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    panics().clear();
    WATCHING.store(true, Ordering::SeqCst);
    let (begun, before) = (Instant::now(), memory::begin());
    let result = panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let (took, memory) = (begun.elapsed(), memory::peak_since(before));
    WATCHING.store(false, Ordering::SeqCst);
    let allowed = target.memory + MEMORY_PER_BYTE * input.resident();
    let panics = std::mem::take(&mut *panics());
    let reason = match &result {
        _ if !panics.is_empty() => panics.join("; "),
        Err(_) => "a panic".to_owned(),
        Ok(_) if took > TIME => format!("{TOOK} {took:?}"),
        Ok(_) if memory > allowed => format!("it held {memory} bytes of memory, {allowed} are allowed"),
        Ok(outcome) => return Ok(Ran { outcome: outcome.clone(), memory }),
    };
    Err(Box::new(Failure { reason, input: input.clone() }))
}

/// Many executions of one target. The same seed makes the same executions, whatever the machine.
pub struct Campaign<'a> {
    target: &'a Target,
    random: Random,
    /// What mutations begin with: the seeds, and whatever came to something new.
    pool: Vec<Input>,
    seeds: usize,
    /// How often each outcome came.
    pub outcomes: BTreeMap<String, u64>,
    /// How many executions there were.
    pub executions: u64,
    /// The most memory that any of them held, bytes.
    pub memory: u64,
}

impl fmt::Debug for Campaign<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Campaign").field("target", &self.target.name).finish_non_exhaustive()
    }
}

impl<'a> Campaign<'a> {
    /// A campaign that begins with the target's seeds, which are executed as they are.
    ///
    /// # Errors
    /// A seed that fails.
    pub fn new(target: &'a Target, seed: u64) -> Result<Self, Box<Failure>> {
        let pool = (target.seeds)();
        let mut campaign = Self {
            target,
            random: Random::new(seed),
            seeds: pool.len(),
            pool: Vec::new(),
            outcomes: BTreeMap::new(),
            executions: 0,
            memory: 0,
        };
        for input in pool {
            campaign.pool.push(input.clone());
            campaign.execute(&input)?;
        }
        Ok(campaign)
    }

    /// The next input: one of the pool, changed.
    pub fn next_input(&mut self) -> Input {
        let random = &mut self.random;
        // The seeds stay in use, however many have joined them.
        let among = if random.one_in(3) { self.seeds } else { self.pool.len() };
        let mut input = self.pool[random.index(among)].clone();
        (self.target.mutate)(&mut input, random, &self.pool);
        input
    }

    /// One execution more.
    ///
    /// # Errors
    /// The failure, if it is one.
    pub fn step(&mut self) -> Result<(), Box<Failure>> {
        let input = self.next_input();
        self.run(input)
    }

    /// Executes an input, which joins the pool if its outcome is new.
    ///
    /// # Errors
    /// The failure, if it is one.
    pub fn run(&mut self, input: Input) -> Result<(), Box<Failure>> {
        if self.execute(&input)? && self.pool.len() < POOL {
            self.pool.push(input);
        }
        Ok(())
    }

    /// Executes `input` and says whether its outcome is new.
    fn execute(&mut self, input: &Input) -> Result<bool, Box<Failure>> {
        self.executions += 1;
        let ran = execute(self.target, input)?;
        self.memory = self.memory.max(ran.memory);
        let times = self.outcomes.entry(ran.outcome).or_default();
        *times += 1;
        Ok(*times == 1)
    }
}

/// The most executions that making a failing input smaller may cost.
const REDUCTIONS: usize = 300;

/// The same failure with less in the input: pages that do not matter become zeros, and the pages of a single file go from its end.
pub fn reduce(target: &Target, failure: &Failure) -> Failure {
    let mut least = failure.clone();
    if failure.reason.starts_with(TOOK) {
        return least;
    }
    let pages = |input: &Input| -> Vec<(usize, u64)> {
        input.0.iter().enumerate().flat_map(|(index, file)| file.pages().map(move |at| (index, at))).collect()
    };
    for (index, at) in pages(&failure.input).into_iter().rev().take(REDUCTIONS) {
        let mut input = least.input.clone();
        input.0[index].zero(at, PAGE as u64);
        if let Err(again) = execute(target, &input)
            && words(&again.reason) == words(&failure.reason)
        {
            least = *again;
        }
    }
    least
}

/// Keeps a failing input in `target/fuzz/TARGET/`, made smaller, and says where.
///
/// # Errors
/// Those of the file system.
pub fn keep(target: &Target, failure: &Failure) -> std::io::Result<PathBuf> {
    let folder = built().join("fuzz").join(target.name);
    std::fs::create_dir_all(&folder)?;
    let bytes = reduce(target, failure).input.encode();
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    let path = folder.join(format!("{:016x}.input", hasher.finish()));
    std::fs::write(&path, bytes)?;
    Ok(path)
}

/// Where cargo puts what it builds.
fn built() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => folder.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target"),
    }
}

/// The inputs that once failed, with their files.
///
/// # Errors
/// A folder or file that cannot be read.
pub fn regressions(target: &Target) -> anyhow::Result<Vec<(PathBuf, Input)>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("regressions").join(target.name);
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    paths.sort();
    paths.into_iter().map(|path| Ok((path.clone(), Input::decode(&std::fs::read(&path)?)?))).collect()
}

/// A message without what differs from file to file: numbers, ids and quoted words.
pub fn words(message: &str) -> String {
    let mut out = String::new();
    let mut quoted = false;
    for word in message.split_inclusive([' ', '"']) {
        if !quoted {
            let plain = word.trim_end_matches(['"', ' ']);
            let differs = plain.chars().any(|c| c.is_ascii_digit()) || plain.contains('{');
            out.push_str(if differs { "#" } else { plain });
            out.push(' ');
        }
        quoted ^= word.ends_with('"');
    }
    out.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_that_are_alike_have_the_same_words() {
        assert_eq!(words("block 5 lies at 77, past"), words("block 6 lies at 1, past"));
        assert_eq!(words(r#"two blocks named "a b""#), words(r#"two blocks named "c""#));
        assert_ne!(words("the log"), words("the table"));
    }

    fn failing(name: &'static str, run: fn(&Input) -> String) -> Target {
        Target {
            name,
            about: "",
            quick: 1,
            memory: MEMORY,
            seeds: || vec![Input::stream(b"x")],
            mutate: |_, _, _| (),
            run,
        }
    }

    #[test]
    fn what_breaks_a_limit_is_a_failure() {
        let panics = failing("panics", |_| panic!("boo"));
        assert!(execute(&panics, &Input::default()).expect_err("a panic").reason.contains("boo"));
        let elsewhere = failing("elsewhere", |_| {
            let _ = std::thread::spawn(|| panic!("far away")).join();
            String::new()
        });
        assert!(execute(&elsewhere, &Input::default()).expect_err("a panic").reason.contains("far away"));
        let greedy = failing("greedy", |_| format!("{}", vec![1_u8; (MEMORY + 1) as usize].len()));
        assert!(execute(&greedy, &Input::default()).expect_err("too much").reason.contains("memory"));
        assert_eq!(execute(&failing("fine", |_| "fine".to_owned()), &Input::default()).expect("fine").outcome, "fine");
    }
}
