//! Small reads that a connection's reader has begun and does not wait for one by one.

use super::proto::Request;
use crate::disk::{Busy, Disk};
use crate::pool::lock;
use crate::socket::Socket;
use crate::uring::{Landed, Read, Ring};
use image::Held;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, TryLockError};

/// Reads under way at a time.
const DEPTH: usize = 127;
/// Pieces in one send (the system's `IOV_MAX`).
const MAX_PARTS: usize = 1024;

/// Reads under way, and the replies of those that have ended. Where there is no io_uring nothing ever flies.
///
/// What is under way holds its place in the chain, and who has that in hand must not wait for anybody but the disk: a snapshot would
/// wait for a client. So before anything else is waited for, everything comes down ([`Flights::land_all`]).
pub(super) struct Flights<'a> {
    ring: Option<Ring<'a, Flight<'a>>>,
    /// The files are of a kind that cannot be read like this.
    grounded: bool,
    landed: Vec<Landed<Flight<'a>>>,
    replies: Vec<Reply<'a>>,
    failed: Vec<Request>,
    /// Buffers to be used again.
    spare: Vec<Vec<u8>>,
}

struct Flight<'a> {
    request: Request,
    place: Held<'a>,
    busy: Busy<'a>,
}

impl AsFd for Flight<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.place.as_fd()
    }
}

/// A reply to be sent.
struct Reply<'a> {
    bytes: Vec<u8>,
    _busy: Busy<'a>,
}

impl<'a> Flights<'a> {
    /// For the thread that calls this.
    pub(super) fn new(disk: &Disk, socket: &'a Socket) -> Self {
        let ring = disk.ring.then(|| Ring::new(DEPTH, socket.as_fd()));
        let ring = ring.and_then(|ring| {
            ring.inspect_err(|error| tracing::debug!(%error, "no io_uring: small reads are done by threads")).ok()
        });
        let (landed, replies, failed, spare) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { ring, grounded: false, landed, replies, failed, spare }
    }

    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.ring.as_ref().is_none_or(Ring::is_idle)
    }

    /// Whether a read may begin.
    pub(super) fn has_room(&mut self) -> io::Result<bool> {
        if self.grounded {
            return Ok(false);
        }
        if self.ring.as_ref().is_some_and(Ring::is_full) {
            self.land(false)?;
        }
        Ok(self.ring.as_ref().is_some_and(|ring| !ring.is_full()))
    }

    /// Begins a read of that place. There must be room. `head` is what comes before the data in the reply.
    pub(super) fn begin(&mut self, request: Request, head: &[u8], place: Held<'a>, busy: Busy<'a>) {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.resize(head.len() + request.len as usize, 0);
        buffer[..head.len()].copy_from_slice(head);
        let ring = self.ring.as_mut().expect("there is room");
        ring.read(place.at(), Read { owner: Flight { request, place, busy }, buffer, from: head.len() });
    }

    /// Sees to the reads that have ended, and says whether the socket has something. If `wait`, waits until either is so. Does nothing if
    /// nothing is under way.
    pub(super) fn land(&mut self, wait: bool) -> io::Result<bool> {
        let Some(ring) = self.ring.as_mut().filter(|ring| !ring.is_idle()) else { return Ok(false) };
        let readable = ring.land(wait, &mut self.landed)?;
        self.sort();
        Ok(readable)
    }

    /// Waits until nothing is under way.
    pub(super) fn land_all(&mut self) -> io::Result<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        ring.land_all(&mut self.landed)?;
        self.sort();
        Ok(())
    }

    /// A read that did not do. Who reads it in the ordinary way finds out why.
    pub(super) fn failed(&mut self) -> Option<Request> {
        self.failed.pop()
    }

    fn sort(&mut self) {
        for Landed { read: Read { owner: Flight { request, busy, .. }, buffer, .. }, result } in self.landed.drain(..) {
            match result {
                Ok(()) => self.replies.push(Reply { bytes: buffer, _busy: busy }),
                Err(error) => {
                    self.grounded |= error.kind() == io::ErrorKind::WouldBlock;
                    self.failed.push(request);
                }
            }
        }
    }

    /// Sends `first`, then the replies that are there.
    pub(super) fn send(&mut self, mut first: &[u8], socket: &Socket, sending: &Mutex<()>) -> io::Result<()> {
        while !first.is_empty() || !self.replies.is_empty() {
            let replies = std::mem::take(&mut self.replies);
            let _one = match sending.try_lock() {
                Ok(one) => one,
                Err(TryLockError::Poisoned(one)) => one.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    self.land_all()?;
                    lock(sending)
                }
            };
            let mut parts = Vec::with_capacity(1 + replies.len());
            parts.extend((!first.is_empty()).then(|| IoSlice::new(first)));
            parts.extend(replies.iter().map(|reply| IoSlice::new(&reply.bytes)));
            self.send_parts(&mut parts, socket)?;
            first = &[];
            let buffers = replies.into_iter().map(|reply| reply.bytes);
            self.spare.extend(buffers.take(DEPTH.saturating_sub(self.spare.len())));
        }
        Ok(())
    }

    fn send_parts(&mut self, mut parts: &mut [IoSlice<'_>], socket: &Socket) -> io::Result<()> {
        while !parts.is_empty() {
            let idle = self.is_idle();
            match socket.send(&parts[..parts.len().min(MAX_PARTS)], idle) {
                Ok(sent) => IoSlice::advance_slices(&mut parts, sent),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !idle => self.land_all()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
