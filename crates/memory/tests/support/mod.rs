//! Memory disks in a temporary folder.

use image::hashes::{Expected, Key, Pages};
use image::vhdx::{self, Options};
use image::{Access, Chain, Kind, Layer};
use memory::stream::PAGE;
use memory::{Captured, Made, NewLayer, Sealed, Signal};
use std::io::Read;
use std::sync::Arc;
use store::host::HostFolder;
use store::{Folder, Mode};
use tempfile::TempDir;
use uuid::Uuid;

/// A folder of memory disks `0`, `1`, …, each over the one before or over none.
pub(crate) struct Disks {
    folder: Arc<dyn Folder>,
    /// Each disk's layers by name, base first.
    chains: Vec<Vec<String>>,
    /// What was recorded of each that was captured.
    records: Vec<Pages>,
    key: Key,
    _temporary: Option<TempDir>,
}

impl Disks {
    pub(crate) fn new() -> Self {
        let temporary = TempDir::new().unwrap();
        let folder = HostFolder::open(temporary.path()).unwrap();
        Self { _temporary: Some(temporary), ..Self::on(Arc::new(folder)) }
    }

    /// In this folder.
    pub(crate) fn on(folder: Arc<dyn Folder>) -> Self {
        Self { folder, chains: Vec::new(), records: Vec::new(), key: Key::new(), _temporary: None }
    }

    /// The layers of a disk; the topmost may be opened for writing.
    fn layers(&self, disk: usize, leaf: Mode) -> Vec<Arc<dyn Layer>> {
        let names = &self.chains[disk];
        let open = |(height, name): (usize, &String)| -> Arc<dyn Layer> {
            let mode = if height + 1 == names.len() { leaf } else { Mode::Read };
            vhdx::open(self.folder.open(name, mode).unwrap(), mode).unwrap()
        };
        names.iter().enumerate().map(open).collect()
    }

    /// A disk, to be read, or to be damaged.
    pub(crate) fn open(&self, disk: usize, access: Access) -> Chain {
        let mode = if access == Access::Write { Mode::Write } else { Mode::Read };
        Chain::new(self.layers(disk, mode), access).unwrap()
    }

    /// A new disk, over `parent` if asked for.
    pub(crate) fn create(&mut self, new: NewLayer, parent: Option<usize>) -> Arc<Chain> {
        let name = self.chains.len().to_string();
        let mut layers =
            parent.filter(|_| new.on_parent).map(|parent| self.layers(parent, Mode::Read)).unwrap_or_default();
        let mut names = parent.filter(|_| new.on_parent).map(|parent| self.chains[parent].clone()).unwrap_or_default();
        let options = match layers.last() {
            Some(parent) => Options::differencing(parent.as_ref(), names.last().unwrap()).unwrap(),
            None => Options { sector_size: PAGE as u32, kind: Kind::Dynamic, ..Options::dynamic(new.size) },
        };
        layers.push(vhdx::create(self.folder.create(&name).unwrap(), &options).unwrap());
        names.push(name);
        self.chains.push(names);
        Arc::new(Chain::new(layers, Access::Write).unwrap())
    }

    /// A new disk, and an empty record of it.
    pub(crate) fn make(&mut self, new: NewLayer, parent: Option<usize>) -> Made {
        let pages = Pages::new(id(self.chains.len()), new.size, self.key).unwrap();
        Made { chain: self.create(new, parent), pages }
    }

    /// Captures a stream into a new disk over `parent`, closes it, and says which it is.
    pub(crate) fn capture(
        &mut self,
        stream: impl Read,
        parent: Option<usize>,
        signal: impl FnMut(Signal),
    ) -> memory::Result<(usize, Captured)> {
        let sealed = parent.map(|parent| (parent, self.sealed(parent)));
        self.capture_over(stream, sealed, signal)
    }

    /// The same, with what is known of the parent.
    pub(crate) fn capture_over(
        &mut self,
        stream: impl Read,
        parent: Option<(usize, Sealed)>,
        signal: impl FnMut(Signal),
    ) -> memory::Result<(usize, Captured)> {
        let (parent, sealed) = parent.unzip();
        let captured = memory::capture(stream, sealed.as_ref(), |new| Ok(self.make(new, parent)), signal)?;
        captured.chain.close().unwrap();
        let disk = self.chains.len() - 1;
        self.records.push(captured.pages.clone().whole(self.below(disk).map(id)));
        Ok((disk, captured))
    }

    /// A disk, with what was recorded of it.
    pub(crate) fn sealed(&self, disk: usize) -> Sealed {
        self.sealed_by(disk, |disk| Some(self.records[disk].clone()))
    }

    /// A disk, with these records of it and of what it stands on.
    pub(crate) fn sealed_by(&self, disk: usize, record: impl Fn(usize) -> Option<Pages>) -> Sealed {
        let (mut expected, mut next) = (Expected::default(), Some(disk));
        while let Some((disk, pages)) = next.and_then(|disk| Some((disk, record(disk)?))) {
            let below = self.below(disk);
            let says_more = expected.add(pages, below.map(id));
            next = below.filter(|_| says_more);
        }
        Sealed { chain: self.open(disk, Access::Read), expected }
    }

    /// What was recorded of a disk.
    pub(crate) fn record(&self, disk: usize) -> &Pages {
        &self.records[disk]
    }

    /// The same, as it is made of what the disk holds.
    pub(crate) fn record_anew(&self, disk: usize) -> Pages {
        self.record_by(disk, self.key)
    }

    /// The same with another key.
    pub(crate) fn record_by(&self, disk: usize, key: Key) -> Pages {
        let chain = self.open(disk, Access::Read);
        let mut pages = Pages::new(id(disk), chain.size(), key).unwrap();
        assert!(pages.complete(&chain, self.below(disk).map(id), &mut |_| true).unwrap());
        pages
    }

    /// A record of a few of the pages that a disk reads as.
    pub(crate) fn record_some(&self, disk: usize, places: impl Iterator<Item = u64>) -> Pages {
        let chain = self.open(disk, Access::Read);
        let mut pages = Pages::new(id(disk), chain.size(), self.key).unwrap();
        let mut page = [0; PAGE];
        for at in places {
            chain.read(&mut page, at).unwrap();
            pages.set(at, &page);
        }
        pages
    }

    /// The disk's own layer.
    pub(crate) fn layer(&self, disk: usize) -> Arc<dyn Layer> {
        self.layers(disk, Mode::Read).pop().unwrap()
    }

    /// What a disk stands on.
    fn below(&self, disk: usize) -> Option<usize> {
        let names = &self.chains[disk];
        names.len().checked_sub(2).map(|below| names[below].parse().unwrap())
    }

    /// Bytes that the disk's own layer occupies.
    pub(crate) fn allocated(&self, disk: usize) -> u64 {
        self.folder.open(self.chains[disk].last().unwrap(), Mode::Read).unwrap().allocated().unwrap()
    }
}

/// What a disk is known by.
fn id(disk: usize) -> Uuid {
    Uuid::from_u128(disk as u128 + 1)
}
