//! Buffers between a socket and the protocol: many small messages, few system calls, no allocation per message.

use crate::socket::Socket;
use std::io;
use std::time::{Duration, Instant};

/// What arrives.
#[derive(Debug)]
pub(crate) struct Input<'a> {
    socket: &'a Socket,
    buf: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Until when a message that has begun must be there, whole.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(patience: Duration) -> Self {
        Self(Instant::now() + patience)
    }

    fn check(self) -> io::Result<()> {
        if Instant::now() > self.0 { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }
}

impl<'a> Input<'a> {
    pub(crate) fn new(socket: &'a Socket, capacity: usize) -> Self {
        Self { socket, buf: vec![0; capacity].into_boxed_slice(), start: 0, end: 0 }
    }

    /// What has arrived and was not consumed.
    pub(crate) fn available(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    pub(crate) fn consume(&mut self, len: usize) {
        self.start += len;
        debug_assert!(self.start <= self.end);
    }

    /// Waits for more; `false` if the client has closed. Says `WouldBlock` when the socket's patience ends.
    pub(crate) fn fill(&mut self) -> io::Result<bool> {
        self.fill_by(Socket::recv)
    }

    /// Takes what is there; `false` if the client has closed. Says `WouldBlock` if nothing is.
    pub(crate) fn fill_now(&mut self) -> io::Result<bool> {
        self.fill_by(Socket::recv_now)
    }

    fn fill_by(&mut self, recv: impl Fn(&Socket, &mut [u8]) -> io::Result<usize>) -> io::Result<bool> {
        // What is left is less than one message, mostly nothing: moving it is cheaper than a read of few bytes.
        self.buf.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let got = uninterrupted(|| recv(self.socket, &mut self.buf[self.end..]))?;
        self.end += got;
        Ok(got > 0)
    }

    /// Waits until `len` bytes are there, which must fit, and shows them.
    pub(crate) fn need(&mut self, len: usize, deadline: Deadline) -> io::Result<&[u8]> {
        debug_assert!(len <= self.buf.len());
        while self.end - self.start < len {
            deadline.check()?;
            if !self.fill()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(&self.available()[..len])
    }

    /// Fills `out`, directly where nothing is buffered.
    pub(crate) fn read_exact(&mut self, out: &mut [u8], deadline: Deadline) -> io::Result<()> {
        let mut have = self.available().len().min(out.len());
        out[..have].copy_from_slice(&self.available()[..have]);
        self.consume(have);
        while have < out.len() {
            deadline.check()?;
            match uninterrupted(|| self.socket.recv(&mut out[have..]))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                got => have += got,
            }
        }
        Ok(())
    }

    /// Lets `len` bytes go by.
    pub(crate) fn skip(&mut self, len: usize, deadline: Deadline) -> io::Result<()> {
        let mut left = len;
        loop {
            let have = self.available().len().min(left);
            self.consume(have);
            left -= have;
            if left == 0 {
                return Ok(());
            }
            self.need(1, deadline)?;
        }
    }
}

fn uninterrupted(mut receive: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match receive() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// What is to be sent.
#[derive(Debug)]
pub(crate) struct Output {
    buf: Box<[u8]>,
    len: usize,
}

impl Output {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { buf: vec![0; capacity].into_boxed_slice(), len: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buf[..self.len]
    }

    pub(crate) fn room(&self) -> usize {
        self.buf.len() - self.len
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends bytes, for which there must be room.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.buf[self.len..][..bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// Appends zeros, for which there must be room.
    pub(crate) fn put_zeros(&mut self, len: usize) {
        self.buf[self.len..][..len].fill(0);
        self.len += len;
    }

    /// Takes back the last `len` bytes.
    pub(crate) fn take_back(&mut self, len: usize) {
        self.len -= len;
    }

    /// Appends `head` and `len` bytes that `fill` provides; nothing is appended if it fails. There must be room.
    pub(crate) fn put_with<E>(
        &mut self,
        head: &[u8],
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.len;
        self.put(head);
        match fill(&mut self.buf[self.len..][..len]) {
            Ok(()) => self.len += len,
            Err(error) => {
                self.len = start;
                return Err(error);
            }
        }
        Ok(())
    }
}
