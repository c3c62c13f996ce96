//! Giving way to others on a host that has more to do than processors: for work that nobody waits for.
//!
//! The kernel counts for each thread how long it has run, and how long it was ready to run while others did (`schedstat`). Where a thread has
//! waited longer than it ran, others want the processors as much as it does: it rests so many times as long. Twenty-five machines that are
//! started together so get up before any of them brings in memory that its guest does not ask for. Work of a lower priority does not count: it
//! gives way by itself.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// How many times as long as it has waited, beyond what it ran, a thread rests.
const REST: u32 = 50;
/// It looks again after this.
const LONGEST: Duration = Duration::from_secs(1);

/// What a thread sees of the others: the one that asks first, and from then on.
#[derive(Debug, Default)]
pub(crate) struct Crowd {
    stat: Option<File>,
    seen: Times,
}

/// How long a thread has run, and was kept from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Times {
    ran: Duration,
    waited: Duration,
}

impl Crowd {
    /// How long to rest after what was done since this was last asked. Not at all where the kernel does not say.
    pub(crate) fn rest(&mut self) -> Duration {
        let Some(now) = self.times() else { return Duration::ZERO };
        let before = std::mem::replace(&mut self.seen, now);
        match before == Times::default() {
            // What the thread has done before is no measure.
            true => Duration::ZERO,
            false => rest(now.ran.saturating_sub(before.ran), now.waited.saturating_sub(before.waited)),
        }
    }

    fn times(&mut self) -> Option<Times> {
        if self.stat.is_none() {
            self.stat = File::open("/proc/thread-self/schedstat").ok();
        }
        let mut text = [0; 64];
        let len = self.stat.as_ref()?.read_at(&mut text, 0).ok()?;
        parse(&text[..len])
    }
}

fn rest(ran: Duration, waited: Duration) -> Duration {
    (waited.saturating_sub(ran) * REST).min(LONGEST)
}

/// Nanoseconds, and nanoseconds, and how often.
fn parse(text: &[u8]) -> Option<Times> {
    let mut numbers = std::str::from_utf8(text).ok()?.split_ascii_whitespace().map(|word| word.parse::<u64>().ok());
    let mut time = || Some(Duration::from_nanos(numbers.next()??));
    Some(Times { ran: time()?, waited: time()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_longer_than_it_runs_rests() {
        let ms = Duration::from_millis;
        assert_eq!(rest(ms(5), ms(1)), Duration::ZERO, "nobody else wants much");
        assert_eq!(rest(ms(1), ms(2)), ms(50));
        assert_eq!(rest(ms(7), ms(60)), LONGEST);
    }

    #[test]
    fn what_the_kernel_says() {
        let times = Times { ran: Duration::from_nanos(831_266), waited: Duration::from_nanos(148_515) };
        assert_eq!(parse(b"831266 148515 2\n"), Some(times));
        assert_eq!(parse(b"831266"), None);
        assert_eq!(parse(b"not this"), None);
        assert_eq!(parse(b""), None);
    }
}
