//! Layers against plain byte arrays: one shape, any sequence of operations, in one thread and in many.

use crate::layer::{read, write, zero};
use image::{Change, Kind, Layer, Source};
use proptest::prelude::*;
use std::sync::Arc;
use store::Mode;

/// What sectors that the layer does not hold read as, for a differencing one.
pub(crate) const PARENT: u8 = 0xEE;
/// What tickets that are dropped have written.
const JUNK: u8 = 0xDD;

/// What sectors that a layer of this kind does not hold are to be read as.
pub(crate) fn absent(kind: Kind) -> u8 {
    if kind == Kind::Differencing { PARENT } else { 0 }
}

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Write {
        at: u64,
        len: u64,
        fill: u8,
    },
    Zero {
        at: u64,
        len: u64,
    },
    /// Two tickets at once, committed in the other order.
    Cross {
        first: (u64, u64),
        second: (u64, u64),
        fill: u8,
    },
    /// A ticket whose data was written and that is then dropped, with another one open beside it.
    Drop {
        at: u64,
        len: u64,
        beside: u64,
        fill: u8,
    },
    Flush,
    Reopen {
        close: bool,
    },
}

/// Any operations on so many sectors.
pub(crate) fn ops(sectors: u64) -> impl Strategy<Value = Vec<Op>> {
    // Small ranges, ranges around blocks, and large ones.
    let range = move || {
        let len = prop_oneof![4 => 1..64u64, 1 => 1..sectors, 1 => Just(2048u64), 1 => Just(4096)];
        (0..sectors, len, any::<bool>()).prop_map(move |(at, len, aligned)| {
            let at = if aligned { at / 2048 * 2048 } else { at };
            (at, len.min(sectors - at))
        })
    };
    let op = prop_oneof![
        6 => (range(), any::<u8>()).prop_map(|((at, len), fill)| Op::Write { at, len, fill }),
        3 => range().prop_map(|(at, len)| Op::Zero { at, len }),
        2 => (range(), range(), any::<u8>()).prop_map(|(first, second, fill)| Op::Cross { first, second, fill }),
        2 => (range(), 0..sectors, any::<u8>()).prop_map(|((at, len), beside, fill)| Op::Drop { at, len, beside, fill }),
        2 => Just(Op::Flush),
        1 => any::<bool>().prop_map(|close| Op::Reopen { close }),
    ];
    prop::collection::vec(op, 1..40)
}

fn put(layer: &dyn Layer, extents: &[image::Extent], fill: u8) {
    for extent in extents {
        layer.store().write_at(&vec![fill; extent.len as usize], extent.at).expect("write");
    }
}

/// A layer and the bytes that it must read as.
pub(crate) struct Pair {
    layer: Arc<dyn Layer>,
    open: Box<dyn Fn(Mode) -> Arc<dyn Layer>>,
    model: Vec<u8>,
    absent: u8,
    sector: u64,
}

impl Pair {
    /// A new layer of these sectors, and how to open it again.
    pub(crate) fn new(layer: Arc<dyn Layer>, open: impl Fn(Mode) -> Arc<dyn Layer> + 'static) -> Self {
        let info = layer.info();
        let absent = absent(info.kind);
        let model = vec![absent; info.size as usize];
        Self { layer, open: Box::new(open), model, absent, sector: info.sector_size.into() }
    }

    /// Does all of this, then compares the layer, and the file as a reader opens it, flushed and closed.
    pub(crate) fn live(&mut self, ops: &[Op]) {
        for op in ops {
            self.run(op);
            if matches!(op, Op::Reopen { .. } | Op::Drop { .. }) {
                self.check(&*self.layer);
            }
        }
        self.check(&*self.layer);
        self.layer.flush().expect("flush");
        // A log may be in use: a reader replays it in memory.
        self.check(&*(self.open)(Mode::Read));
        self.layer.close().expect("close");
        self.check(&*(self.open)(Mode::Read));
    }

    fn set(&mut self, (at, len): (u64, u64), fill: u8) {
        self.model[(at * self.sector) as usize..((at + len) * self.sector) as usize].fill(fill);
    }

    fn prepare(&self, (at, len): (u64, u64)) -> image::Ticket {
        self.layer.prepare(at * self.sector, len * self.sector, Change::Data).expect("prepare")
    }

    /// Whether nothing of the range lies in the file as far as can be read.
    fn is_hidden(&self, (at, len): (u64, u64)) -> bool {
        let mut runs = Vec::new();
        self.layer.map(at * self.sector, len * self.sector, &mut runs).expect("map");
        runs.iter().all(|run| !matches!(run.source, Source::Data(_)))
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Write { at, len, fill } => {
                write(&*self.layer, at * self.sector, &vec![fill; (len * self.sector) as usize]).expect("write");
                self.set((at, len), fill);
            }
            Op::Zero { at, len } => {
                zero(&*self.layer, at * self.sector, len * self.sector).expect("zero");
                self.set((at, len), 0);
            }
            Op::Cross { first, second, fill } => {
                let (one, two) = (self.prepare(first), self.prepare(second));
                put(&*self.layer, &one.extents, fill);
                put(&*self.layer, &two.extents, fill.wrapping_add(1));
                self.layer.commit(two).expect("commit");
                self.layer.commit(one).expect("commit");
                self.set(first, fill);
                self.set(second, fill.wrapping_add(1));
            }
            Op::Drop { at, len, beside, fill } => {
                let sectors = self.model.len() as u64 / self.sector;
                let beside = (if beside >= at && beside < at + len { at + len } else { beside }, 1);
                let beside = (beside.0 < sectors).then_some(beside);
                if !self.is_hidden((at, len)) {
                    return;
                }
                let other = beside.map(|range| self.prepare(range));
                let dropped = self.prepare((at, len));
                put(&*self.layer, &dropped.extents, JUNK);
                drop(dropped);
                if let (Some(other), Some(range)) = (other, beside) {
                    put(&*self.layer, &other.extents, fill);
                    self.layer.commit(other).expect("commit");
                    self.set(range, fill);
                }
            }
            Op::Flush => self.layer.flush().expect("flush"),
            Op::Reopen { close } => {
                if close {
                    self.layer.close().expect("close");
                } else {
                    self.layer.flush().expect("flush");
                }
                self.layer = (self.open)(Mode::Write);
            }
        }
    }

    fn check(&self, layer: &dyn Layer) {
        let size = self.model.len() as u64;
        let found = read(layer, 0, size, self.absent).expect("read");
        if found != self.model {
            let at = (0..found.len()).find(|at| found[*at] != self.model[*at]).expect("they differ");
            panic!("byte {at} of {size} is {:#x} and should be {:#x}", found[at], self.model[at]);
        }
    }
}

/// Threads that each own every fourth sector write, zero and read theirs, while one flushes; at the end, and in the file, each finds
/// what it wrote last.
pub(crate) fn threads(layer: &Arc<dyn Layer>, open: impl Fn(Mode) -> Arc<dyn Layer>) {
    const THREADS: u64 = 4;
    let sectors = layer.info().size / 512;
    let absent = absent(layer.info().kind);
    let worker = |thread: u64| {
        let mut random = thread + 1;
        let mut own = vec![absent; (sectors / THREADS) as usize];
        for step in 0..3000u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let index = (random >> 33) % (sectors / THREADS);
            let offset = (index * THREADS + thread) * 512;
            let fill = (step % 200) as u8 + 1;
            match (random >> 20) % 8 {
                0 => {
                    zero(&**layer, offset, 512).expect("zero");
                    own[index as usize] = 0;
                }
                1 => assert_eq!(read(&**layer, offset, 512, absent).expect("read"), [own[index as usize]; 512]),
                _ => {
                    write(&**layer, offset, &[fill; 512]).expect("write");
                    own[index as usize] = fill;
                }
            }
            if thread == 0 && step % 50 == 0 {
                layer.flush().expect("flush");
            }
        }
        own
    };
    let owned: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || worker(thread))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    layer.flush().expect("flush");
    for layer in [Arc::clone(layer), open(Mode::Read)] {
        for sector in 0..sectors {
            let expected = owned[(sector % THREADS) as usize][(sector / THREADS) as usize];
            let found = read(&*layer, sector * 512, 512, absent).expect("read");
            assert_eq!(found, [expected; 512], "sector {sector}");
        }
    }
}
