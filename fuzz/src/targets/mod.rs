//! The targets, one a file, and the sound images that several of them begin with.

mod agent;
mod carry;
mod chain;
mod check;
mod disk;
mod handshake;
mod hashes;
mod memory;
mod nbd;
mod pages;
mod probe;
mod qmp;
mod shape;
mod stream;
mod undo;
mod vhd;
mod vhdx;

use crate::file::{Disk, File};
use crate::vhdx::settle_ids;
use crate::{Input, Random, Target};
use image::vhdx::{Options, Parent};
use image::{Kind, Layer};
use std::sync::Arc;
use std::time::Duration;
use store::Store;
use tokio::net::UnixStream;
use uuid::Uuid;

/// All targets. The one of a new format comes here, and in a file of its own.
pub const ALL: &[Target] = &[
    vhdx::TARGET,
    vhd::TARGET,
    chain::TARGET,
    shape::TARGET,
    check::TARGET,
    undo::TARGET,
    carry::TARGET,
    hashes::TARGET,
    pages::TARGET,
    probe::TARGET,
    stream::TARGET,
    memory::TARGET,
    handshake::TARGET,
    nbd::TARGET,
    qmp::TARGET,
    agent::TARGET,
];

/// The id of the content of every base that a child here stands on.
pub(crate) const BASE_ID: Uuid = Uuid::from_u128(0xba5e);

const MIB: u64 = 1 << 20;

/// A sound VHDX and the moments at which its writer might have died.
struct Shape {
    kind: Kind,
    size: u64,
    block: u64,
    sector: u64,
}

const SHAPES: [Shape; 9] = [
    Shape { kind: Kind::Dynamic, size: 7 * MIB + 512, block: MIB, sector: 512 },
    Shape { kind: Kind::Differencing, size: 7 * MIB + 512, block: MIB, sector: 512 },
    Shape { kind: Kind::Fixed, size: 3 * MIB, block: MIB, sector: 512 },
    Shape { kind: Kind::Differencing, size: 9 * MIB + 4096, block: 2 * MIB, sector: 4096 },
    Shape { kind: Kind::Dynamic, size: 100 * MIB, block: 32 * MIB, sector: 4096 },
    // More than one chunk: 2,048 blocks of 2 MiB, with 512-byte sectors.
    Shape { kind: Kind::Differencing, size: 4100 * MIB, block: 2 * MIB, sector: 512 },
    Shape { kind: Kind::Differencing, size: 600 * MIB, block: 256 * MIB, sector: 512 },
    Shape { kind: Kind::Dynamic, size: 64 << 40, block: 256 * MIB, sector: 512 },
    Shape { kind: Kind::Dynamic, size: 512, block: MIB, sector: 512 },
];

impl Shape {
    /// The image after each flush, dirty, and at its end, closed; and each dirty log over the file as it was before.
    fn images(&self) -> Vec<File> {
        let store = Disk::new("disk.avhdx", File::default());
        let layer = image::vhdx::create(Arc::<Disk>::clone(&store), &self.options()).expect("a sound image");
        let mut images = vec![store.file()];
        for round in 0..3 {
            self.change(&*layer, round);
            if round == 1 {
                layer.set_note(br#"{"format":1}"#).expect("a place for it");
            }
            layer.flush().expect("a sound image");
            let file = store.file();
            images.push(unwritten(&images[0], &file));
            images.push(file);
        }
        layer.close().expect("a sound image");
        images.push(store.file());
        for file in &mut images {
            settle_ids(&mut [file]);
        }
        images
    }

    fn options(&self) -> Options {
        let base = (self.kind == Kind::Differencing).then(|| base(self.size, self.sector).1);
        Options {
            size: self.size,
            block_size: self.block as u32,
            sector_size: self.sector as u32,
            kind: self.kind,
            parent: base.map(|base| Parent::of(&*base, Some("base.vhdx")).expect("a name")),
        }
    }

    /// A few writes and zeroes, in places that differ from round to round.
    fn change(&self, layer: &dyn Layer, round: u64) {
        let Self { size, block, sector, .. } = *self;
        let inside = |at: u64| at.min(size - sector) / sector * sector;
        disk::write(layer, inside(round * block + sector), &vec![round as u8 + 1; sector as usize]).expect("room");
        disk::write(layer, inside(size), &vec![round as u8 + 4; sector as usize]).expect("room");
        let zeros = inside((round + 1) * block);
        disk::zero(layer, zeros, (size - zeros).min(block)).expect("room");
        if round == 2 && size > 2 * block {
            let piece = vec![9; (block.min(MIB) - sector) as usize / 16 / sector as usize * sector as usize];
            disk::write(layer, 2 * block, &piece).expect("room");
        }
    }
}

/// A base of this size, its content's id [`BASE_ID`], and its file's disk.
fn base(size: u64, sector: u64) -> (Arc<Disk>, Arc<dyn Layer>) {
    let store = Disk::new("base.vhdx", File::default());
    let options = Options { size, sector_size: sector as u32, ..Options::default() };
    let layer = image::vhdx::create(Arc::<Disk>::clone(&store), &options).expect("a sound image");
    disk::write(&*layer, 0, &vec![0xba; sector as usize]).expect("room");
    layer.flush().expect("a sound image");
    layer.relink(Some(BASE_ID), None).expect("a sound image");
    (store, layer)
}

/// `after` as if nothing that its log carries had been written in its place: log and headers are the new ones, the pages between
/// them the old.
fn unwritten(before: &File, after: &File) -> File {
    let mut file = after.clone();
    let places = 2 * MIB..before.len();
    file.take_over(before, places.start, places.end - places.start);
    file
}

/// Sound VHDX files of all shapes and states.
pub(crate) fn images() -> Vec<File> {
    SHAPES.iter().flat_map(Shape::images).collect()
}

/// A target by its name.
pub fn find(name: &str) -> Option<&'static Target> {
    ALL.iter().find(|target| target.name == name)
}

/// What came of opening something: the words of the error, or `fine`.
fn outcome<T, E: std::fmt::Display>(result: &Result<T, E>) -> String {
    match result {
        Ok(_) => "fine".to_owned(),
        // The file's name comes first, and differs.
        Err(error) => crate::run::words(&error.to_string()),
    }
}

/// A store for a disk.
fn store_of(disk: &Arc<Disk>) -> Arc<dyn Store> {
    Arc::<Disk>::clone(disk)
}

/// The first files of a pool's inputs.
fn firsts(pool: &[Input]) -> Vec<&File> {
    pool.iter().filter_map(|input| input.0.first()).collect()
}

/// One of a stream's mutations after the other.
fn change_stream(input: &mut Input, words: &[&[u8]], most: usize, random: &mut Random) {
    let mut bytes = input.bytes();
    for _ in 0..=random.below(4) {
        crate::mutate::change_stream(&mut bytes, words, most, random);
    }
    *input = Input::stream(&bytes);
}

/// What stands between the parts of an input that somebody says in turn.
const BREAK: u8 = 0x1e;
/// A time that passes at once when both ends of a conversation wait.
const IDLE: Duration = Duration::from_secs(1);

/// Two ends of a socket; what ours comes to. Time passes when both wait, and only then.
fn converse<P: Future<Output: Send + 'static> + Send + 'static, S: Future<Output = String>>(
    play: impl FnOnce(UnixStream) -> P,
    speak: impl FnOnce(UnixStream) -> S,
) -> String {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        let other = tokio::spawn(play(theirs));
        let outcome = speak(ours).await;
        other.abort();
        outcome
    })
}
