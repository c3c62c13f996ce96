//! A disk to serve, and a client that says exactly what it is told to.

#![expect(dead_code, reason = "each test binary uses its part")]

pub(crate) mod client;

use export::{Export, Options, listen_unix};
use image::{Access, Chain, Layer, vhdx};
use std::path::PathBuf;
use std::sync::Arc;
use store::Folder;
use store::host::HostFolder;
use tempfile::TempDir;

/// A new disk of this many bytes, 512-byte sectors: an empty VHDX and another one over it, so that it knows each sector as data or
/// not. The files have no names any more and go with the last who uses them.
pub(crate) fn disk(size: u64) -> Arc<Chain> {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = HostFolder::open(folder.path()).expect("it is there");
    let create = |name, options: vhdx::Options| -> Arc<dyn Layer> {
        vhdx::create(folder.create(name).expect("a file"), &options).expect("a layer")
    };
    let base = create("base.vhdx", vhdx::Options::dynamic(size));
    let leaf = create("leaf.avhdx", vhdx::Options::differencing(&*base, "base.vhdx").expect("a parent"));
    Arc::new(Chain::new(vec![base, leaf], Access::Write).expect("two layers"))
}

/// A new leaf for this disk.
pub(crate) fn leaf_over(chain: &Chain) -> Arc<dyn Layer> {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = HostFolder::open(folder.path()).expect("it is there");
    let layers = chain.layers();
    let options = vhdx::Options::differencing(&**layers.last().expect("a layer"), "leaf.avhdx").expect("a parent");
    vhdx::create(folder.create("next.avhdx").expect("a file"), &options).expect("a layer")
}

/// Lets the system forget what the files hold, as far as it will: reads wait for the disk.
pub(crate) fn cool(chain: &Chain) {
    chain.flush().expect("durable");
    for layer in chain.layers() {
        let file = layer.store().descriptor().expect("a file of the host");
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).expect("let go");
    }
}

/// The options of these tests: in `on_threads.rs` as if there were no io_uring.
pub(crate) fn options() -> Options {
    Options { ring: !module_path!().starts_with("on_threads"), ..Options::default() }
}

/// A disk that is served on a socket of its own.
pub(crate) struct Served {
    pub(crate) chain: Arc<Chain>,
    pub(crate) export: Export,
    pub(crate) socket: PathBuf,
    folder: TempDir,
}

impl Served {
    pub(crate) fn new(size: u64) -> Self {
        Self::with(disk(size), options())
    }

    pub(crate) fn with(chain: Arc<Chain>, options: Options) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("disk.sock");
        let listener = listen_unix(&socket).expect("a free name");
        let export = Export::serve(Arc::clone(&chain), listener, options).expect("threads");
        Self { chain, export, socket, folder }
    }

    /// `nbd+unix:///?socket=…`
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// A place for a test's own files.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.chain.size() as usize];
        self.chain.read(&mut content, 0).expect("readable");
        content
    }
}
