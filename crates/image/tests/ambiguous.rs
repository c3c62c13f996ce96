//! Pushes whose point in time becomes known later, against two plain disks: one before the point, one now.

mod mem;

use image::{Access, Chain, ErrorKind, Kind, Layer, Received};
use mem::MemLayer;
use proptest::prelude::*;
use std::convert::Infallible;
use std::sync::Arc;

const SIZE: u64 = 5 << 20;

fn layer(kind: Kind, block: u32) -> Arc<dyn Layer> {
    MemLayer::new(SIZE, 512, block, kind)
}

fn content(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0xAA; SIZE as usize];
    chain.read(&mut bytes, 0).unwrap();
    bytes
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Write(u8),
    Zero,
    Discard,
}

/// A request at a time, on a range.
#[derive(Debug, Clone, Copy)]
struct Request {
    op: Op,
    at: u64,
    len: u64,
    time: u64,
}

impl Request {
    fn send(self, chain: &Chain) {
        let received = Received(self.time);
        match self.op {
            Op::Write(byte) => chain.write_received(&vec![byte; self.len as usize], self.at, received),
            Op::Zero => chain.zero_received(self.at, self.len, received),
            Op::Discard => chain.discard_received(self.at, self.len, received),
        }
        .unwrap();
    }

    fn apply(self, model: &mut [u8]) {
        let (mut from, mut to) = (self.at, self.at + self.len);
        let byte = match self.op {
            Op::Write(byte) => byte,
            Op::Zero => 0,
            Op::Discard => {
                (from, to) = (from.next_multiple_of(512), to / 512 * 512);
                0
            }
        };
        if from < to {
            model[from as usize..to as usize].fill(byte);
        }
    }
}

fn request() -> impl Strategy<Value = (Op, u64, u64)> {
    let op = prop_oneof![3 => (1u8..=255).prop_map(Op::Write), 1 => Just(Op::Zero), 1 => Just(Op::Discard)];
    (op, 0..SIZE, prop_oneof![1u64..2000, 1u64..(3 << 20)]).prop_map(|(op, at, len)| (op, at, len.min(SIZE - at)))
}

/// Requests at times from `first` on.
fn requests(first: u64, max: usize) -> impl Strategy<Value = Vec<Request>> {
    prop::collection::vec(request(), 0..max).prop_map(move |requests| {
        let timed = requests.into_iter().enumerate();
        timed.map(|(n, (op, at, len))| Request { op, at, len, time: first + n as u64 }).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_old_leaf_holds_what_came_before_the_point(
        before in requests(0, 8),
        window in requests(100, 20),
        after in requests(1000, 8),
        point in 100u64..125,
        settles in prop::collection::vec(0usize..20, 0..4),
        block in prop_oneof![Just(4096u32), Just(64 << 10), Just(2 << 20)],
    ) {
        let chain = Arc::new(Chain::new(vec![layer(Kind::Dynamic, 64 << 10)], Access::Write).unwrap());
        let mut now = vec![0; SIZE as usize];
        for request in before {
            request.send(&chain);
            request.apply(&mut now);
        }
        let mut then = now.clone();
        let mut ambiguous = chain.push_ambiguous(layer(Kind::Differencing, block), u64::MAX).unwrap();
        for (n, request) in window.into_iter().enumerate() {
            request.send(&chain);
            request.apply(&mut now);
            if request.time < point {
                request.apply(&mut then);
            }
            if settles.contains(&n) {
                ambiguous.settle_before(Received(point.min(request.time + 1))).unwrap();
                prop_assert!(request.time >= point || ambiguous.logged() == 0);
            }
        }
        prop_assert!(content(&chain) == now);
        ambiguous.finish(Received(point)).unwrap();
        drop(ambiguous);
        let old = Chain::new(chain.layers()[..1].to_vec(), Access::Read).unwrap();
        prop_assert!(content(&old) == then);
        for request in after {
            request.send(&chain);
            request.apply(&mut now);
        }
        prop_assert!(content(&chain) == now);
        prop_assert!(content(&old) == then, "the old leaf is sealed");
    }

    #[test]
    fn a_cancelled_push_leaves_no_trace(
        window in requests(100, 20),
        settled in 0u64..120,
        block in prop_oneof![Just(4096u32), Just(2 << 20)],
    ) {
        let chain = Arc::new(Chain::new(vec![layer(Kind::Dynamic, 64 << 10)], Access::Write).unwrap());
        let first = chain.layers();
        let mut now = vec![0; SIZE as usize];
        let mut ambiguous = chain.push_ambiguous(layer(Kind::Differencing, block), u64::MAX).unwrap();
        for request in window {
            request.send(&chain);
            request.apply(&mut now);
        }
        ambiguous.settle_before(Received(settled)).unwrap();
        ambiguous.cancel(|| Ok::<_, Infallible>(())).unwrap();
        prop_assert_eq!(chain.layers().len(), 1);
        prop_assert!(content(&chain) == now);
        prop_assert!(content(&Chain::new(first, Access::Read).unwrap()) == now);
    }
}

#[test]
fn a_full_log_can_only_be_cancelled() {
    let chain = Arc::new(Chain::new(vec![layer(Kind::Dynamic, 4096)], Access::Write).unwrap());
    let mut ambiguous = chain.push_ambiguous(layer(Kind::Differencing, 4096), 100_000).unwrap();
    chain.write(&vec![1; 60_000], 0).unwrap();
    assert!(!ambiguous.is_full());
    chain.write(&vec![2; 60_000], 60_000).unwrap();
    assert!(ambiguous.is_full() && ambiguous.logged() == 0);
    chain.write(&vec![3; 60_000], 120_000).unwrap();
    assert_eq!(ambiguous.settle_before(Received::now()).unwrap_err().kind, ErrorKind::Invalid);
    assert_eq!(ambiguous.finish(Received::now()).unwrap_err().kind, ErrorKind::Invalid);
    let expected = content(&chain);
    ambiguous.cancel(|| Ok::<_, Infallible>(())).unwrap();
    assert_eq!(chain.layers().len(), 1);
    assert!(content(&chain) == expected && expected[60_000] == 2 && expected[120_000] == 3);
}

#[test]
fn one_push_at_a_time_may_be_ambiguous() {
    let chain = Arc::new(Chain::new(vec![layer(Kind::Dynamic, 4096)], Access::Write).unwrap());
    let ambiguous = chain.push_ambiguous(layer(Kind::Differencing, 4096), 1000).unwrap();
    assert_eq!(chain.push(layer(Kind::Differencing, 4096)).unwrap_err().kind, ErrorKind::Invalid);
    assert!(chain.pop_leaf(|| Ok::<_, Infallible>(())).is_err());
    drop(ambiguous);
    chain.push(layer(Kind::Differencing, 4096)).unwrap();
    chain.pop_leaf(|| Ok::<_, Infallible>(())).unwrap();
}
