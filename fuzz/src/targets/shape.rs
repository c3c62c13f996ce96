//! A disk that is packed, made larger, made smaller.
//!
//! Rule beside the limits: the disk reads as before, as far as it is the same disk; what it gets more is zeros. That holds after a
//! failure too.

use super::disk::{disk, sector, windows, write};
use super::{images, outcome, store_of, vhd};
use crate::PAGE;
use crate::run::MEMORY;
use crate::{Input, Random, Target};
use image::{Layer, LayerInfo, open};
use std::ops::Range;
use std::sync::Arc;
use store::{Mode, Store};

pub(super) const TARGET: Target = Target {
    name: "shape",
    about: "a VHDX or VHD file that is packed, made larger, and made smaller",
    quick: 800,
    // Blocks that move are copied in memory here.
    memory: 2 * MEMORY,
    seeds: || images().into_iter().chain(vhd::images()).map(|file| Input(vec![file])).collect(),
    mutate,
    run,
};

const MIB: u64 = 1 << 20;
/// Between two looks at a disk's content, bytes.
const STRIDE: usize = 64 << 10;

fn mutate(input: &mut Input, random: &mut Random, pool: &[Input]) {
    let target = if crate::vhdx::is_one(&input.0[0]) { super::vhdx::TARGET } else { vhd::TARGET };
    (target.mutate)(input, random, pool);
}

/// Sectors here and there, in order.
fn places(info: &LayerInfo) -> Vec<u64> {
    let mut all: Vec<_> = windows(info).into_iter().flat_map(|(at, len)| (at..at + len).step_by(STRIDE)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// What the sectors at these places read as.
fn content(layer: &dyn Layer, places: &[u64]) -> image::Result<Vec<Option<Vec<u8>>>> {
    places.iter().map(|at| sector(layer, *at)).collect()
}

/// A disk that others must find as it is.
struct Subject {
    store: Arc<dyn Store>,
    layer: Arc<dyn Layer>,
    places: Vec<u64>,
    content: Vec<Option<Vec<u8>>>,
}

impl Subject {
    /// Whether the disk reads as it did, up to `end`.
    fn check(&self, layer: &dyn Layer, end: u64, what: &str) {
        let kept = self.places.iter().filter(|at| **at < end).count();
        let now = content(layer, &self.places[..kept]).expect("it could be read");
        assert!(now == self.content[..kept], "{what}, it reads otherwise");
    }

    /// Closes the file and opens it again.
    fn reopen(&mut self) {
        match self.layer.close() {
            Ok(()) => {
                let again = open(Arc::clone(&self.store), None, Mode::Write);
                self.layer = again.expect("what was closed opens");
            }
            // The headers may be numbered to the end of all numbers.
            Err(error) => self.recover(&error),
        }
    }

    /// Some failures leave a layer that must be opened again.
    fn recover(&mut self, error: &image::Error) {
        let again = open(Arc::clone(&self.store), None, Mode::Write);
        self.layer = again.unwrap_or_else(|again| panic!("{error}, and then {again}"));
    }

    fn size(&self) -> u64 {
        self.layer.info().size
    }

    fn pack(&mut self) -> String {
        let packed = self.layer.pack(&mut |_, _| true);
        if let Err(error) = &packed {
            self.recover(error);
        }
        self.check(&*self.layer, self.size(), "packed");
        outcome(&packed)
    }

    /// Forgets what the parent has as well.
    fn forget(&mut self) {
        let size = self.size();
        let _ = self.layer.forget(0, size);
        self.reopen();
        let kept = self.places.iter().filter(|at| **at < size).count();
        let now = content(&*self.layer, &self.places[..kept]).expect("it could be read");
        for (now, before) in now.into_iter().zip(&self.content) {
            assert!(now.is_none() || now == *before, "what is not the parent's is as it was");
        }
    }

    fn resize(&mut self, size: u64, beneath: u64) -> String {
        let (old, may) = (self.size(), self.layer.check_resize(size));
        let resized = self.layer.resize(size, beneath);
        assert!(may.is_ok() || resized.is_err(), "it was not to be resized: {may:?}");
        if let Err(error) = &resized {
            self.recover(error);
        }
        let now = if resized.is_ok() { size } else { old };
        assert_eq!(self.size(), now, "the size that it has");
        self.check(&*self.layer, old.min(now), "resized");
        self.check_new(old..now, beneath);
        outcome(&resized)
    }

    /// What is new is zeros, and a parent shows through only where there is none.
    fn check_new(&self, new: Range<u64>, beneath: u64) {
        let places: Vec<u64> = places(&self.layer.info()).into_iter().filter(|at| new.contains(at)).collect();
        let found = content(&*self.layer, &places).expect("it can be read");
        for (at, bytes) in places.iter().zip(found) {
            let zeros = bytes.as_ref().map_or(*at >= beneath, |bytes| bytes.iter().all(|byte| *byte == 0));
            assert!(zeros, "at {at} of {new:?}, which is new, lies something");
        }
    }
}

fn run(input: &Input) -> String {
    let store = store_of(&disk(&input.0[0]));
    let layer = match open(Arc::clone(&store), None, Mode::Write) {
        Ok(layer) => layer,
        Err(error) => return outcome::<(), _>(&Err(error)),
    };
    let info = layer.info();
    let places = places(&info);
    let content = match content(&*layer, &places) {
        Ok(content) => content,
        Err(error) => return outcome::<(), _>(&Err(error)),
    };
    let mut subject = Subject { store, layer, places, content };
    let mut words = vec![format!("{:?} {:?}", info.format, info.kind), subject.pack()];
    subject.reopen();
    let (unit, block) = (u64::from(info.sector_size), u64::from(info.block_size).max(MIB));
    // Within the table's place, and out of it.
    let blocks = [3, 300, 150_000][(input.resident() / PAGE as u64 % 3) as usize];
    let larger = info.size + blocks * block + unit;
    words.push(subject.resize(larger, info.size + block));
    if subject.size() == larger {
        write(&*subject.layer, larger - unit, &vec![7; unit as usize]).expect("room");
    }
    subject.reopen();
    subject.check(&*subject.layer, info.size, "opened again");
    words.push(subject.resize((info.size / 2 / unit * unit).max(unit), 0));
    words.push(subject.pack());
    subject.reopen();
    subject.check(&*subject.layer, subject.size(), "opened once more");
    subject.forget();
    words.join("; ")
}
