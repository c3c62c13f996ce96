//! Memory disks in a temporary folder.

use image::vhdx::{self, Options};
use image::{Access, Chain, Kind, Layer};
use memory::stream::PAGE;
use memory::{Captured, NewLayer, Signal};
use std::io::Read;
use std::sync::Arc;
use store::host::HostFolder;
use store::{Folder, Mode};
use tempfile::TempDir;

/// A folder of memory disks `0`, `1`, …, each over the one before or over none.
pub(crate) struct Disks {
    folder: HostFolder,
    /// Each disk's layers by name, base first.
    chains: Vec<Vec<String>>,
    _temporary: TempDir,
}

impl Disks {
    pub(crate) fn new() -> Self {
        let temporary = TempDir::new().unwrap();
        let folder = HostFolder::open(temporary.path()).unwrap();
        Self { folder, chains: Vec::new(), _temporary: temporary }
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

    /// Captures a stream into a new disk over `parent`, closes it, and says which it is.
    pub(crate) fn capture(
        &mut self,
        stream: impl Read,
        parent: Option<usize>,
        signal: impl FnMut(Signal),
    ) -> memory::Result<(usize, Captured)> {
        let chain = parent.map(|parent| self.open(parent, Access::Read));
        let captured = memory::capture(stream, chain.as_ref(), |new| Ok(self.create(new, parent)), signal)?;
        captured.chain.close().unwrap();
        Ok((self.chains.len() - 1, captured))
    }

    /// Bytes that the disk's own layer occupies.
    pub(crate) fn allocated(&self, disk: usize) -> u64 {
        self.folder.open(self.chains[disk].last().unwrap(), Mode::Read).unwrap().allocated().unwrap()
    }
}
