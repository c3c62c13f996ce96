//! Files in memory: sparse, cheap to copy, and counting what is done to them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use store::{Error, ErrorKind, Folder, Lock, Mode, Result, Store};

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// The longest that a file may become, as on a real file system.
const MAX_FILE: u64 = 1 << 60;

/// A file's bytes. What has no page is zeros; copies share their pages.
#[derive(Debug, Clone, Default)]
pub struct File {
    len: u64,
    pages: BTreeMap<u64, Arc<[u8; PAGE]>>,
}

/// The same bytes, whether a page of zeros is there or not.
impl PartialEq for File {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.solid().eq(other.solid())
    }
}

impl Eq for File {}

impl File {
    /// A file of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut file = Self::default();
        file.write(0, bytes);
        file
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the pages that it has.
    pub fn resident(&self) -> u64 {
        (self.pages.len() * PAGE) as u64
    }

    /// The offsets of the pages that it has.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().map(|number| number * PAGE as u64)
    }

    /// The pages that are not all zeros.
    fn solid(&self) -> impl Iterator<Item = (&u64, &Arc<[u8; PAGE]>)> {
        self.pages.iter().filter(|(_, page)| ***page != [0; PAGE])
    }

    /// Makes it `len` bytes long.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    /// Fills `out` from `at` on; zeros past the end.
    pub fn read(&self, at: u64, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let (page, inside) = place(at + done as u64);
            let step = (PAGE - inside).min(out.len() - done);
            match self.pages.get(&page) {
                Some(bytes) => out[done..done + step].copy_from_slice(&bytes[inside..inside + step]),
                None => out[done..done + step].fill(0),
            }
            done += step;
        }
    }

    /// `len` bytes at `at`; zeros past the end.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(at, &mut bytes);
        bytes
    }

    /// So many bytes at `at`.
    pub fn array<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(at, &mut bytes);
        bytes
    }

    /// The little-endian number of `width` bytes, at most 8, at `at`.
    pub fn number(&self, at: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes[..width.min(8)]);
        u64::from_le_bytes(bytes)
    }

    /// Writes the lower `width` bytes, at most 8, of a number.
    pub fn put(&mut self, at: u64, width: usize, value: u64) {
        self.write(at, &value.to_le_bytes()[..width.min(8)]);
    }

    /// Writes `bytes` at `at`, past the end too.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let (page, inside) = place(at + done as u64);
            let step = (PAGE - inside).min(bytes.len() - done);
            let piece = &bytes[done..done + step];
            done += step;
            if piece.iter().all(|byte| *byte == 0) && !self.pages.contains_key(&page) {
                continue;
            }
            let page = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[inside..inside + step].copy_from_slice(piece);
        }
        self.len = self.len.max(at + bytes.len() as u64);
    }

    /// Makes a stretch zeros. The length stays.
    pub fn zero(&mut self, at: u64, len: u64) {
        let end = at.saturating_add(len);
        let (first, inside) = place(at);
        let numbers: Vec<u64> = self.pages.range(first..=place(end).0).map(|(number, _)| *number).collect();
        for number in numbers {
            let start = number * PAGE as u64;
            let from = if number == first { inside } else { 0 };
            let to = (end - start).min(PAGE as u64) as usize;
            if (from, to) == (0, PAGE) {
                self.pages.remove(&number);
            } else if let Some(page) = self.pages.get_mut(&number).filter(|_| from < to) {
                Arc::make_mut(page)[from..to].fill(0);
            }
        }
    }

    /// Copies `len` bytes of `other` to the same place here, and the holes too.
    pub fn take_over(&mut self, other: &Self, at: u64, len: u64) {
        self.zero(at, len);
        for start in other.pages().filter(|start| (at..at.saturating_add(len)).contains(start)).collect::<Vec<_>>() {
            self.write(start, &other.bytes(start, PAGE));
        }
    }
}

fn place(at: u64) -> (u64, usize) {
    (at / PAGE as u64, (at % PAGE as u64) as usize)
}

/// The most operations on a file in one execution: what takes more counts as a hang.
pub const MAX_OPERATIONS: u64 = 200_000;

/// A file that is used as one of the host's.
#[derive(Debug)]
pub struct Disk {
    name: String,
    file: Mutex<File>,
    writable: bool,
    operations: AtomicU64,
}

impl Disk {
    /// A disk that holds `file`.
    pub fn new(name: &str, file: File) -> Arc<Self> {
        Self::opened(name, file, true)
    }

    /// A disk that takes no changes.
    pub fn to_read(name: &str, file: File) -> Arc<Self> {
        Self::opened(name, file, false)
    }

    fn opened(name: &str, file: File, writable: bool) -> Arc<Self> {
        let name = name.to_owned();
        Arc::new(Self { name, file: Mutex::new(file), writable, operations: AtomicU64::new(0) })
    }

    /// What it holds now.
    pub fn file(&self) -> File {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, File> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file, for one change more.
    fn change(&self, operation: &'static str) -> Result<MutexGuard<'_, File>> {
        let denied = || self.refuse(ErrorKind::Denied, operation, "it is open for reading only".to_owned());
        if self.writable { Ok(self.operate()) } else { Err(denied()) }
    }

    /// The file, for one operation more.
    fn operate(&self) -> MutexGuard<'_, File> {
        let operations = self.operations.fetch_add(1, Ordering::Relaxed);
        assert!(operations < MAX_OPERATIONS, "more than {MAX_OPERATIONS} operations on {}", self.name);
        self.lock()
    }

    fn refuse(&self, kind: ErrorKind, operation: &'static str, detail: String) -> Error {
        Error::new(kind, operation, self.name.clone(), detail)
    }

    fn end(&self, operation: &'static str, offset: u64, len: u64) -> Result<u64> {
        let end = offset.checked_add(len).filter(|end| *end <= MAX_FILE);
        end.ok_or_else(|| self.refuse(ErrorKind::NoSpace, operation, format!("{len} bytes at {offset}")))
    }
}

impl Store for Disk {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn len(&self) -> Result<u64> {
        Ok(self.operate().len())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.end("resize", 0, len)?;
        self.change("resize")?.set_len(len);
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let file = self.operate();
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > file.len()) {
            return Err(self.refuse(ErrorKind::PastEnd, "read", format!("{} bytes at {offset}", buf.len())));
        }
        file.read(offset, buf);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.end("write", offset, buf.len() as u64)?;
        self.change("write")?.write(offset, buf);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        let end = self.end("zero", offset, len)?;
        let mut file = self.change("zero")?;
        if end > file.len() {
            return Err(self.refuse(ErrorKind::Io, "zero", format!("{len} bytes at {offset} reach past the end")));
        }
        file.zero(offset, len);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn lock(&self, _: Lock) -> Result<()> {
        Ok(())
    }

    fn data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let file = self.operate();
        let next = file.pages.range(place(offset).0..).next().map(|(number, _)| number * PAGE as u64);
        Ok(next.filter(|at| *at < file.len()).map(|at| (at.max(offset), (at + PAGE as u64).min(file.len()))))
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.operate().resident())
    }
}

/// A folder of disks, without folders in it.
#[derive(Debug, Default)]
pub struct Shelf(Mutex<BTreeMap<String, Arc<Disk>>>);

impl Shelf {
    /// A folder that holds these disks by their names.
    pub fn new(disks: impl IntoIterator<Item = Arc<Disk>>) -> Self {
        Self(Mutex::new(disks.into_iter().map(|disk| (disk.name.clone(), disk)).collect()))
    }

    /// What the disk of this name holds now; nothing if there is none.
    pub fn file(&self, name: &str) -> File {
        self.disks(name).get(name).map(|disk| disk.file()).unwrap_or_default()
    }

    /// The disks that it holds now. No name may lead out of it.
    fn disks(&self, name: &str) -> MutexGuard<'_, BTreeMap<String, Arc<Disk>>> {
        assert!(!name.contains(['/', '\\', '\0']) && name != "..", "{name:?} was to be used");
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse<T>(kind: ErrorKind, operation: &'static str, name: &str) -> Result<T> {
        Err(Error::new(kind, operation, name, "on a shelf"))
    }
}

impl Folder for Shelf {
    fn open(&self, name: &str, _: Mode) -> Result<Arc<dyn Store>> {
        match self.disks(name).get(name) {
            Some(disk) => Ok(Arc::<Disk>::clone(disk)),
            None => Self::refuse(ErrorKind::NotFound, "open", name),
        }
    }

    fn create(&self, name: &str) -> Result<Arc<dyn Store>> {
        let disk = Disk::new(name, File::default());
        match self.disks(name).entry(name.to_owned()) {
            Entry::Occupied(_) => Self::refuse(ErrorKind::Exists, "create", name),
            Entry::Vacant(entry) => Ok(Arc::<Disk>::clone(entry.insert(disk))),
        }
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let mut disks = self.disks(to);
        let Some(disk) = disks.remove(from) else { return Self::refuse(ErrorKind::NotFound, "rename", from) };
        disks.insert(to.to_owned(), disk);
        Ok(())
    }

    fn link(&self, name: &str, _: &dyn Folder, _: &str) -> Result<()> {
        Self::refuse(ErrorKind::CannotLink, "link", name)
    }

    fn links(&self, name: &str) -> Result<u64> {
        if self.disks(name).contains_key(name) { Ok(1) } else { Self::refuse(ErrorKind::NotFound, "look at", name) }
    }

    fn unlink(&self, name: &str) -> Result<()> {
        let gone = self.disks(name).remove(name);
        if gone.is_some() { Ok(()) } else { Self::refuse(ErrorKind::NotFound, "remove", name) }
    }

    fn create_folder(&self, name: &str) -> Result<Arc<dyn Folder>> {
        Self::refuse(ErrorKind::Denied, "create", name)
    }

    fn folder(&self, name: &str) -> Result<Arc<dyn Folder>> {
        Self::refuse(ErrorKind::NotFound, "open", name)
    }

    fn remove_folder(&self, name: &str) -> Result<()> {
        Self::refuse(ErrorKind::NotFound, "remove", name)
    }

    fn list(&self) -> Result<Vec<String>> {
        Ok(self.disks("").keys().cloned().collect())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn room(&self) -> Result<u64> {
        Ok(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_behaves_as_bytes_do() {
        let mut random = crate::Random::new(1);
        let (mut file, mut bytes) = (File::default(), Vec::new());
        for _ in 0..2000 {
            let (at, len) = (random.index(20_000), random.index(9000));
            match random.below(4) {
                0 => {
                    bytes.resize(at, 0);
                    file.set_len(at as u64);
                }
                1 => {
                    let end = (at + len).min(bytes.len());
                    if at < end {
                        bytes[at..end].fill(0);
                        file.zero(at as u64, (end - at) as u64);
                    }
                }
                _ => {
                    let fill = vec![random.number() as u8; len];
                    bytes.resize(bytes.len().max(at + len), 0);
                    bytes[at..at + len].copy_from_slice(&fill);
                    file.write(at as u64, &fill);
                }
            }
            assert_eq!(file.len(), bytes.len() as u64);
            assert_eq!(file.bytes(0, bytes.len()), bytes);
            assert!(file.bytes(file.len(), 5000).iter().all(|byte| *byte == 0));
        }
    }
}
