//! A guest's RAM in huge pages again.
//!
//! A capture write-protects every page that QEMU has mapped, in its pause. In pages of 2 MiB that costs nothing; in pages of 4 KiB, which
//! is what a capture or a lazy restore leaves, some 25 ms for each GiB (measured with QEMU 7.2 and 10.0 on Linux 6.18). The kernel's own daemon takes hours to mend it.
//! So the worker asks for it, from outside: `process_madvise(MADV_COLLAPSE)`, Linux 6.1 and later, for who may trace QEMU and has `CAP_SYS_NICE`.
//!
//! A huge page takes 2 MiB, whatever it holds: for pieces that are not in use that is worth it only where there is RAM to spare.

#![expect(unsafe_code, reason = "advice about the memory of another process, for which there is no safe binding")]

use crate::error::{Error, Result};
use crate::qemu::Qemu;
use rustix::io::Errno;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use rustix::thread::{CapabilitySet, capabilities};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Bytes in a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// RAM of the host that is left alone where it is not needed, bytes.
const RESERVE: u64 = 1 << 30;

/// Pieces that could not be had in a row before it is given up: the host has no more memory in one piece.
const PATIENCE: u32 = 16;

/// Huge pages being made, in the background. Dropping it stops it.
#[derive(Debug)]
pub struct Collapse {
    orders: Arc<Orders>,
    thread: Thread,
    made: watch::Receiver<Option<u64>>,
}

/// What the thread that makes them is told.
#[derive(Debug, Default)]
struct Orders {
    stop: AtomicBool,
    /// Somebody waits for it: no more rests.
    hurry: AtomicBool,
}

impl Orders {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Rests so long, or until something else is wanted.
    fn rest(&self, time: Duration) {
        let until = Instant::now() + time;
        while !self.stopped() && !self.hurry.load(Ordering::Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            thread::park_timeout(left);
        }
    }
}

impl Collapse {
    /// Waits for its end: how many huge pages there are now. It rests no more. Nothing is lost if the future is dropped.
    pub async fn ended(&mut self) -> u64 {
        self.orders.hurry.store(true, Ordering::Relaxed);
        self.thread.unpark();
        self.made.wait_for(Option::is_some).await.ok().and_then(|made| *made).unwrap_or_default()
    }
}

impl Drop for Collapse {
    fn drop(&mut self) {
        self.orders.stop.store(true, Ordering::Relaxed);
        self.thread.unpark();
    }
}

impl Qemu {
    /// Makes huge pages of pieces of RAM: [`HUGE_PAGE`] bytes at these offsets of these blocks. Not while memory is captured or restored. After
    /// each piece its thread asks how long to `rest`.
    ///
    /// # Errors
    /// Those of the monitor, [`Error::Io`].
    pub async fn collapse(
        &self,
        pieces: &[(String, u64)],
        mut rest: impl FnMut() -> Duration + Send + 'static,
    ) -> Result<Collapse> {
        let start = parse_start(&self.qmp().human("gpa2hva 0").await?);
        let blocks = parse_lengths(&self.qmp().human("info ramblock").await?);
        let address = |(name, offset): &(String, u64)| {
            let (_, host) = start.as_ref().filter(|(block, _)| block == name)?;
            let (_, len) = blocks.iter().find(|(block, _)| block == name)?;
            // QEMU aligns what is worth it; and a piece at the end may not be whole.
            let whole = host.is_multiple_of(HUGE_PAGE) && offset + HUGE_PAGE <= *len;
            whole.then(|| host + offset)
        };
        let addresses: Vec<u64> = pieces.iter().filter_map(address).collect();
        if addresses.is_empty() && !pieces.is_empty() {
            tracing::warn!("where QEMU has the guest's RAM cannot be told: no huge pages for it");
        }
        let process = self.process().pidfd()?;
        let (orders, (tell, made)) = (Arc::<Orders>::default(), watch::channel(None));
        let told = Arc::clone(&orders);
        let work = move || {
            let _ = tell.send(Some(collapse(&process, &addresses, &told, || told.rest(rest()))));
        };
        let thread = thread::Builder::new().name("huge-pages".into()).spawn(work);
        let thread = thread.map_err(Error::io("make a thread for huge pages"))?.thread().clone();
        Ok(Collapse { orders, thread, made })
    }
}

fn collapse(process: &OwnedFd, addresses: &[u64], orders: &Orders, mut rest: impl FnMut()) -> u64 {
    let (mut made, mut failures) = (0, 0);
    for address in addresses {
        rest();
        if orders.stopped() {
            break;
        }
        match advise(process, *address) {
            Ok(()) => (made, failures) = (made + 1, 0),
            // Not so for every piece: one may hold what cannot be moved just now.
            Err(Errno::AGAIN | Errno::NOMEM | Errno::BUSY | Errno::INVAL) if failures < PATIENCE => failures += 1,
            Err(error) => {
                tracing::info!("no huge pages for the guest's RAM, its next snapshot will pause it longer: {error}");
                break;
            }
        }
    }
    made
}

/// Whether this process may ask for the huge pages of others.
///
/// # Errors
/// [`Error::Unsupported`] with the reason.
pub fn collapses() -> Result<()> {
    let not = |why: String| Error::Unsupported(why);
    let ours = capabilities(None).map_err(|error| not(format!("no capabilities: {error}")))?;
    if !ours.effective.contains(CapabilitySet::SYS_NICE) {
        return Err(not("process_madvise needs CAP_SYS_NICE".into()));
    }
    // Of nothing: whether there is such advice.
    let me = pidfd_open(getpid(), PidfdFlags::empty()).map_err(|error| not(format!("no pidfd: {error}")))?;
    call(&me, &[]).map_err(|error| not(format!("process_madvise(MADV_COLLAPSE): {error}")))
}

/// Whether the host could give away twice so many bytes of RAM, and something besides.
pub fn has_ram_to_spare(bytes: u64) -> bool {
    crate::host::available_ram().is_some_and(|available| available > 2 * bytes + RESERVE)
}

fn advise(process: &OwnedFd, address: u64) -> std::result::Result<(), Errno> {
    call(process, &[libc::iovec { iov_base: address as *mut libc::c_void, iov_len: HUGE_PAGE as usize }])
}

fn call(process: &OwnedFd, pieces: &[libc::iovec]) -> std::result::Result<(), Errno> {
    // SAFETY: the list of pieces lives through the call, which reads it; the addresses in it are another process's, and never followed
    // here. This advice changes no byte of anybody's memory.
    let done = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            process.as_raw_fd(),
            pieces.as_ptr(),
            pieces.len(),
            libc::MADV_COLLAPSE,
            0,
        )
    };
    if done >= 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)) }
}

/// What `gpa2hva 0` prints: the block that the guest has at its address 0, and where QEMU has it. The block begins there.
///
/// (`info ramblock` of QEMU 10.0 says where each block is, that of 7.2 does not; and of the blocks this is the one that counts.)
fn parse_start(text: &str) -> Option<(String, u64)> {
    let (name, address) = text.trim().strip_prefix("Host virtual address for 0x0 (")?.rsplit_once(") is 0x")?;
    Some((name.to_owned(), u64::from_str_radix(address, 16).ok()?))
}

/// What `info ramblock` prints: a line a block, with its name, a page's size, and numbers of which the third is its length, bytes. A line of
/// another form is none.
fn parse_lengths(text: &str) -> Vec<(String, u64)> {
    let block = |line: &str| {
        let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
        let name = line.split_whitespace().next()?;
        Some((name.to_owned(), line.split_whitespace().filter_map(number).nth(2)?))
    };
    text.lines().filter_map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It would not end for an hour.
    #[test]
    fn who_rests_hears_what_it_is_told() {
        let hurry: fn(&Orders) = |orders| orders.hurry.store(true, Ordering::Relaxed);
        let stop: fn(&Orders) = |orders| orders.stop.store(true, Ordering::Relaxed);
        for order in [hurry, stop] {
            let orders = Arc::<Orders>::default();
            let told = Arc::clone(&orders);
            let resting = thread::spawn(move || told.rest(Duration::from_secs(3600)));
            order(&orders);
            resting.thread().unpark();
            resting.join().expect("it rests no more");
        }
    }

    #[test]
    fn blocks_are_found() {
        // QEMU 10.0, then 7.2.
        let new = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n\
                   \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000 0x00007f0a3be00000  rw\r\n";
        let old = "              Block Name    PSize              Offset               Used              Total\r\n\
                   \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000080000000 0x0000000080000000\r\n\
                   \x20   /rom@etc/acpi/tables    4 KiB  0x0000000081100000 0x0000000000020000 0x0000000000200000\r\n";
        assert_eq!(parse_lengths(new), [("pc.ram".into(), 0x2000_0000)]);
        assert_eq!(parse_lengths(old), [("pc.ram".into(), 0x8000_0000), ("/rom@etc/acpi/tables".into(), 0x20_0000)]);
        assert_eq!(parse_lengths("unknown command: 'info ramblock'"), []);
    }

    #[test]
    fn the_start_of_ram_is_found() {
        let told = "Host virtual address for 0x0 (pc.ram) is 0x7ff8e7e00000\r\n";
        assert_eq!(parse_start(told), Some(("pc.ram".into(), 0x7ff8_e7e0_0000)));
        assert_eq!(parse_start("No memory is mapped at address 0x0\r\n"), None);
        assert_eq!(parse_start("Memory at address 0x0 is not RAM\r\n"), None);
    }
}
