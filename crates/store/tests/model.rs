//! The simulated disk behaves as the real one while the power is on: the same operations, the same answers.

use proptest::prelude::*;
use std::fmt::Write as _;
use std::sync::Arc;
use store::host::HostFolder;
use store::sim::Sim;
use store::{Error, Folder, Lock, Mode, Store};

/// A name, by number: few, so that they collide.
const NAMES: [&str; 4] = ["a", "b", "c", ".."];

#[derive(Debug, Clone)]
enum Op {
    Open(usize, bool),
    Create(usize),
    Rename(usize, usize),
    Link(usize, usize, usize),
    Links(usize),
    Unlink(usize),
    CreateFolder(usize),
    Folder(usize),
    RemoveFolder(usize),
    Sync,
    Write(usize, u64, usize),
    Read(usize, u64, usize),
    SetLen(usize, u64),
    Punch(usize, u64, u64),
    SyncFile(usize),
    Lock(usize, u8),
    Close(usize),
    /// Which folder the next operations are in.
    Enter(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let name = || 0..NAMES.len();
    let handle = || 0..4_usize;
    let offset =
        || prop_oneof![0..20_000_u64, (0..40_u64).prop_map(|sector| sector * 512), Just(u64::MAX), Just(1 << 63)];
    let len = || prop_oneof![0..9000_usize, Just(4096), Just(512)];
    prop_oneof![
        2 => (name(), any::<bool>()).prop_map(|(n, w)| Op::Open(n, w)),
        4 => name().prop_map(Op::Create),
        2 => (name(), name()).prop_map(|(a, b)| Op::Rename(a, b)),
        3 => (name(), 0..3_usize, name()).prop_map(|(a, into, b)| Op::Link(a, into, b)),
        2 => name().prop_map(Op::Links),
        2 => name().prop_map(Op::Unlink),
        1 => name().prop_map(Op::CreateFolder),
        1 => name().prop_map(Op::Folder),
        1 => name().prop_map(Op::RemoveFolder),
        1 => Just(Op::Sync),
        6 => (handle(), offset(), len()).prop_map(|(h, o, l)| Op::Write(h, o, l)),
        6 => (handle(), offset(), len()).prop_map(|(h, o, l)| Op::Read(h, o, l)),
        2 => (handle(), 0..25_000_u64).prop_map(|(h, l)| Op::SetLen(h, l)),
        3 => (handle(), offset(), 0..12_000_u64).prop_map(|(h, o, l)| Op::Punch(h, o, l)),
        1 => handle().prop_map(Op::SyncFile),
        3 => (handle(), 0..3_u8).prop_map(|(h, l)| Op::Lock(h, l)),
        1 => handle().prop_map(Op::Close),
        1 => (0..3_usize).prop_map(Op::Enter),
    ]
}

/// What an operation answers, in a form that can be compared.
fn told<T>(result: Result<T, Error>, show: impl Fn(&T) -> String) -> String {
    match result {
        Ok(value) => show(&value),
        Err(error) => format!("{:?}", error.kind),
    }
}

/// A file's bytes, by the stretches that may hold any.
fn without_holes(file: &dyn Store, len: usize) -> Vec<u8> {
    let (mut data, mut at) = (vec![0; len], 0);
    while let Some((start, end)) = file.data(at).expect("stretches").filter(|(start, _)| *start < len as u64) {
        at = end.min(len as u64);
        file.read_at(&mut data[start as usize..at as usize], start).expect("read");
    }
    data
}

struct Disk {
    folders: Vec<Arc<dyn Folder>>,
    current: usize,
    files: Vec<Arc<dyn Store>>,
}

impl Disk {
    fn new(root: Arc<dyn Folder>) -> Self {
        Self { folders: vec![root], current: 0, files: Vec::new() }
    }

    fn keep(&mut self, file: Result<Arc<dyn Store>, Error>) -> String {
        told(file.map(|file| self.files.push(file)), |()| "opened".to_owned())
    }

    fn enter(&mut self, folder: Result<Arc<dyn Folder>, Error>) -> String {
        told(folder.map(|folder| self.folders.push(folder)), |()| "entered".to_owned())
    }

    fn on_file(&self, nth: usize, act: impl FnOnce(&dyn Store) -> String) -> String {
        if self.files.is_empty() { String::new() } else { act(self.files[nth % self.files.len()].as_ref()) }
    }

    fn run(&mut self, op: &Op, step: u8) -> String {
        let folder = Arc::clone(&self.folders[self.current % self.folders.len()]);
        let done = |(): &()| "done".to_owned();
        match *op {
            Op::Open(name, write) => self.keep(folder.open(NAMES[name], if write { Mode::Write } else { Mode::Read })),
            Op::Create(name) => self.keep(folder.create(NAMES[name])),
            Op::Rename(from, to) => told(folder.rename(NAMES[from], NAMES[to]), done),
            Op::Link(name, into, new) => {
                let into = &self.folders[into % self.folders.len()];
                told(folder.link(NAMES[name], &**into, NAMES[new]), done)
            }
            Op::Links(name) => told(folder.links(NAMES[name]), ToString::to_string),
            Op::Unlink(name) => told(folder.unlink(NAMES[name]), done),
            Op::CreateFolder(name) => self.enter(folder.create_folder(NAMES[name])),
            Op::Folder(name) => self.enter(folder.folder(NAMES[name])),
            Op::RemoveFolder(name) => told(folder.remove_folder(NAMES[name]), done),
            Op::Sync => told(folder.sync(), done),
            Op::Write(file, offset, len) => {
                let data: Vec<u8> = (0..len).map(|n| step ^ (n / 64) as u8).collect();
                self.on_file(file, |file| told(file.write_at(&data, offset), done))
            }
            Op::Read(file, offset, len) => self.on_file(file, |file| {
                let mut data = vec![0; len];
                told(file.read_at(&mut data, offset).map(|()| data), |data| format!("{data:?}"))
            }),
            Op::SetLen(file, len) => self.on_file(file, |file| told(file.set_len(len), done)),
            Op::Punch(file, offset, len) => self.on_file(file, |file| told(file.punch(offset, len), done)),
            Op::SyncFile(file) => self.on_file(file, |file| told(file.sync(), done)),
            Op::Lock(file, lock) => {
                let lock = [Lock::None, Lock::Shared, Lock::Exclusive][usize::from(lock)];
                self.on_file(file, |file| told(file.lock(lock), done))
            }
            Op::Close(file) => {
                if !self.files.is_empty() {
                    self.files.remove(file % self.files.len());
                }
                String::new()
            }
            Op::Enter(folder) => {
                self.current = folder;
                String::new()
            }
        }
    }

    /// Everything that can be seen.
    fn look(&self) -> String {
        let mut seen = String::new();
        for folder in &self.folders {
            seen += &told(folder.list(), |names| format!("{names:?};"));
        }
        for file in &self.files {
            let len = file.len().expect("length");
            let mut data = vec![0; len.min(1 << 20) as usize];
            file.read_at(&mut data, 0).expect("read");
            assert!(without_holes(file.as_ref(), data.len()) == data, "what is called a hole reads as zeros");
            write!(seen, "{len} {data:?};").expect("a string takes it");
        }
        seen
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn as_the_host(ops in proptest::collection::vec(op(), 1..60)) {
        let place = tempfile::tempdir().expect("a temporary folder");
        let mut host = Disk::new(Arc::new(HostFolder::open(place.path()).expect("open")));
        let mut sim = Disk::new(Sim::new().root());
        for (step, op) in ops.iter().enumerate() {
            let told = (host.run(op, step as u8), sim.run(op, step as u8));
            prop_assert_eq!(&told.0, &told.1, "step {} {:?}: host left, sim right", step, op);
        }
        prop_assert_eq!(host.look(), sim.look());
    }
}
