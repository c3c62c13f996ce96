//! Threads that work beside a connection's reader, and the window that bounds what waits for them.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;

/// Locks also after a panic elsewhere: what these locks guard is whole between any two statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Jobs that wait, and the threads that do them.
///
/// Threads are started when a job finds none idle, up to a limit; a connection whose requests are all done by its reader never
/// has any. The queue is bounded: who hands in a job waits for room.
#[derive(Debug)]
pub(crate) struct Pool<J> {
    state: Mutex<State<J>>,
    /// A job came in, or no more will.
    work: Condvar,
    /// A job was taken.
    room: Condvar,
    most_threads: usize,
    most_jobs: usize,
}

#[derive(Debug)]
struct State<J> {
    jobs: VecDeque<J>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl<J: Send> Pool<J> {
    /// At most `threads` (at least one) at work and `jobs` waiting.
    pub(crate) fn new(threads: usize, jobs: usize) -> Self {
        let state = State { jobs: VecDeque::with_capacity(jobs), threads: 0, idle: 0, closed: false };
        Self {
            state: Mutex::new(state),
            work: Condvar::new(),
            room: Condvar::new(),
            most_threads: threads.max(1),
            most_jobs: jobs.max(1),
        }
    }

    /// Hands in a job. `start` starts a thread that calls [`Pool::work`]; if the system has none to give and there is not one
    /// at work, the job comes back.
    pub(crate) fn submit(&self, job: J, start: impl FnOnce() -> std::io::Result<()>) -> Result<(), J> {
        let mut state = lock(&self.state);
        while state.jobs.len() >= self.most_jobs {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.idle <= state.jobs.len() && state.threads < self.most_threads {
            match start() {
                Ok(()) => state.threads += 1,
                Err(_) if state.threads == 0 => return Err(job),
                Err(error) => tracing::warn!(%error, threads = state.threads, "no further thread for a connection"),
            }
        }
        state.jobs.push_back(job);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Whether who hands in a job has to wait.
    pub(crate) fn is_full(&self) -> bool {
        lock(&self.state).jobs.len() >= self.most_jobs
    }

    /// A thread's life: does jobs until the pool is closed and empty.
    pub(crate) fn work(&self, mut run: impl FnMut(J)) {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                self.room.notify_one();
                run(job);
                state = lock(&self.state);
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }

    /// No more jobs will come; the threads end when those that wait are done.
    pub(crate) fn close(&self) {
        lock(&self.state).closed = true;
        self.work.notify_all();
    }
}

/// Starts a thread of a scope, small and with a name.
pub(crate) fn start<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    name: &str,
    run: impl FnOnce() + Send + 'scope,
) -> std::io::Result<()> {
    let builder = std::thread::Builder::new().name(name.into()).stack_size(STACK);
    builder.spawn_scoped(scope, run).map(drop)
}

/// Stack of a thread that moves data, in bytes; its buffers are on the heap.
pub(crate) const STACK: usize = 512 << 10;

/// A bound on bytes: who wants to hold some waits until they fit.
#[derive(Debug)]
pub(crate) struct Window {
    free: Mutex<usize>,
    returned: Condvar,
    limit: usize,
}

impl Window {
    pub(crate) fn new(limit: usize) -> Self {
        Self { free: Mutex::new(limit), returned: Condvar::new(), limit }
    }

    /// Waits for `bytes` of room. More than the whole window counts as the whole window: it is then held alone.
    pub(crate) fn take(&self, bytes: usize) -> Held<'_> {
        let bytes = bytes.min(self.limit);
        let mut free = lock(&self.free);
        while *free < bytes {
            free = self.returned.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= bytes;
        Held { window: self, bytes }
    }
}

impl Window {
    /// The same if it is there now.
    pub(crate) fn try_take(&self, bytes: usize) -> Option<Held<'_>> {
        let bytes = bytes.min(self.limit);
        let mut free = lock(&self.free);
        *free = free.checked_sub(bytes)?;
        Some(Held { window: self, bytes })
    }
}

/// Room in a [`Window`], given back when dropped.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    window: &'a Window,
    bytes: usize,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        *lock(&self.window.free) += self.bytes;
        self.window.returned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn every_job_is_done_before_the_threads_end() {
        let (pool, done) = (Pool::new(3, 4), AtomicUsize::new(0));
        thread::scope(|scope| {
            for job in 0..1000usize {
                let begin = || {
                    start(scope, "test", || {
                        pool.work(|job: usize| {
                            done.fetch_add(job, Ordering::Relaxed);
                        });
                    })
                };
                pool.submit(job, begin).expect("a thread");
            }
            pool.close();
        });
        assert_eq!(done.into_inner(), 1000 * 999 / 2);
        assert!(lock(&pool.state).threads <= 3);
    }

    #[test]
    fn jobs_run_beside_each_other() {
        let pool = Pool::new(2, 4);
        let (send, receive) = mpsc::sync_channel::<()>(0);
        let receive = Mutex::new(receive);
        thread::scope(|scope| {
            // The first job ends only when the second runs.
            for sends in [true, false] {
                let begin = || {
                    start(scope, "test", || {
                        pool.work(|sends| {
                            if sends {
                                send.send(()).expect("a receiver");
                            } else {
                                lock(&receive).recv().expect("a sender");
                            }
                        });
                    })
                };
                pool.submit(sends, begin).expect("a thread");
            }
            pool.close();
        });
    }

    #[test]
    fn without_any_thread_the_job_comes_back() {
        let pool = Pool::new(2, 4);
        assert_eq!(pool.submit(7, || Err(std::io::ErrorKind::OutOfMemory.into())), Err(7));
    }

    #[test]
    fn the_window_is_never_exceeded() {
        let (window, held) = (Window::new(100), AtomicUsize::new(0));
        thread::scope(|scope| {
            for bytes in [30, 50, 100, 7, 400] {
                let (window, held) = (&window, &held);
                scope.spawn(move || {
                    for _ in 0..200 {
                        let room = window.take(bytes);
                        let before = held.fetch_add(room.bytes, Ordering::SeqCst);
                        assert!(before + room.bytes <= 100);
                        held.fetch_sub(room.bytes, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(*lock(&window.free), 100);
    }
}
