//! A disk of the guest, read and written past the page cache, so that what is answered is what the host answered.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::pattern::{Hash, Pattern};

/// The unit of direct I/O: a page, which every sector size divides.
pub(crate) const UNIT: u64 = 4096;
/// How much of a pattern moves in one request.
const STEP: u64 = 1 << 20;

/// Memory that direct I/O accepts: it starts at a multiple of [`UNIT`].
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` zero bytes.
    pub(crate) fn new(len: u64) -> Self {
        let bytes = vec![0; (len + UNIT) as usize];
        let start = bytes.as_ptr().align_offset(UNIT as usize);
        Self { bytes, start, len: len as usize }
    }
}

impl Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// One block device (or, in tests, one file).
pub(crate) struct Disk {
    file: File,
    /// What the guest calls it: `vda`.
    pub(crate) name: String,
    /// What the machine calls it, whatever its place: `disk0`. Empty if it does not say.
    pub(crate) serial: String,
    /// Its length in bytes, when it was opened.
    pub(crate) bytes: u64,
}

impl Disk {
    /// Opens the disk called `name` below /dev.
    pub(crate) fn open(name: &str) -> Result<Self> {
        if name.contains('/') {
            return Err(Error::new(ErrorKind::InvalidInput, "a disk is named without a path: vda"));
        }
        Self::open_path(&Path::new("/dev").join(name))
    }

    /// Opens the disk at `path`.
    pub(crate) fn open_path(path: &Path) -> Result<Self> {
        let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let mut file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(path)?;
        let bytes = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let serial = std::fs::read_to_string(format!("/sys/block/{name}/serial")).unwrap_or_default();
        Ok(Self { file, name, serial, bytes })
    }

    /// The disks that this guest sees, in order: those of virtio first named.
    pub(crate) fn names() -> Vec<String> {
        let Ok(entries) = std::fs::read_dir("/sys/block") else { return Vec::new() };
        let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.retain(|name| name.starts_with("vd") || name.starts_with("sd"));
        names.sort();
        names
    }

    /// Reads whole units from `offset`, both multiples of [`UNIT`].
    pub(crate) fn read(&self, offset: u64, to: &mut Aligned) -> Result<()> {
        self.file.read_exact_at(to, offset)
    }

    /// Writes whole units at `offset`; durable only after [`Disk::flush`].
    pub(crate) fn write(&self, offset: u64, from: &Aligned) -> Result<()> {
        self.file.write_all_at(from, offset)
    }

    /// Everything written so far survives a power cut when this returns.
    pub(crate) fn flush(&self) -> Result<()> {
        self.file.sync_data()
    }

    /// Fills `bytes` from `offset` with the pattern of `seed`; durable only after [`Disk::flush`].
    pub(crate) fn fill(&self, offset: u64, bytes: u64, seed: u64) -> Result<()> {
        let mut block = Aligned::new(STEP.min(bytes));
        for at in self.steps(offset, bytes)? {
            Pattern::new(seed).fill(at, &mut block);
            self.write(at, &block)?;
        }
        Ok(())
    }

    /// The hash of `bytes` from `offset`, and the first byte that is not the pattern's of `seed`.
    pub(crate) fn sum(&self, offset: u64, bytes: u64, seed: Option<u64>) -> Result<(u64, Option<u64>)> {
        let mut block = Aligned::new(STEP.min(bytes));
        let mut hash = Hash::default();
        let mut wrong = None;
        for at in self.steps(offset, bytes)? {
            self.read(at, &mut block)?;
            hash.update(&block);
            wrong = wrong.or_else(|| Pattern::new(seed?).first_difference(at, &block));
        }
        Ok((hash.value(), wrong))
    }

    /// Writes `text`, closed by a zero byte, at any `offset`, keeping what lies around it, and flushes.
    pub(crate) fn write_text(&self, offset: u64, text: &str) -> Result<()> {
        let len = text.len() as u64 + 1;
        let (start, mut around) = self.around(offset, len)?;
        let at = (offset - start) as usize;
        around[at..at + text.len()].copy_from_slice(text.as_bytes());
        around[at + text.len()] = 0;
        self.write(start, &around)?;
        self.flush()
    }

    /// The text at `offset`: up to a zero byte, at most `len` bytes; what is not UTF-8 is replaced.
    pub(crate) fn read_text(&self, offset: u64, len: u64) -> Result<String> {
        let (start, around) = self.around(offset, len)?;
        let at = (offset - start) as usize;
        let text = &around[at..at + len as usize];
        let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        Ok(String::from_utf8_lossy(&text[..end]).into_owned())
    }

    /// Makes `bytes` from `offset` read as zeros, the way `mkfs` and `fstrim` do (write-zeroes, not a write of zeros).
    pub(crate) fn zero(&self, offset: u64, bytes: u64) -> Result<()> {
        use rustix::fs::FallocateFlags;
        self.inside(offset, bytes)?;
        rustix::fs::fallocate(&self.file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, bytes)?;
        self.flush()
    }

    /// The whole units that hold `len` bytes at `offset`, and where the first begins.
    fn around(&self, offset: u64, len: u64) -> Result<(u64, Aligned)> {
        self.inside(offset, len)?;
        let start = offset / UNIT * UNIT;
        let mut units = Aligned::new((offset + len).next_multiple_of(UNIT) - start);
        self.read(start, &mut units)?;
        Ok((start, units))
    }

    /// The starts of the steps in which `bytes` from `offset` are walked.
    fn steps(&self, offset: u64, bytes: u64) -> Result<impl Iterator<Item = u64> + use<>> {
        self.inside(offset, bytes)?;
        let step = STEP.min(bytes);
        if bytes == 0 || !offset.is_multiple_of(UNIT) || !step.is_multiple_of(UNIT) || !bytes.is_multiple_of(step) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "offsets are multiples of 4096, lengths of 1M (or of 4096, below 1M)",
            ));
        }
        Ok((offset..offset + bytes).step_by(step as usize))
    }

    fn inside(&self, offset: u64, bytes: u64) -> Result<()> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("{} has only {} bytes", self.name, self.bytes))),
        }
    }
}
