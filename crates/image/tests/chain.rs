//! A chain against plain bytes: whatever is done to it, it reads like one disk. (Chains of files: `chains/`.)

mod mem;

use image::merge::{Direction, Marks, Outcome, Plan, Progress, fold_down, fold_run, fold_up, move_down, plan};
use image::vhdx::{self, Options, Parent};
use image::{Access, Chain, ChainRun, ErrorKind, Kind, Layer, ParentLink, RunKind, gate};
use mem::MemLayer;
use proptest::prelude::*;
use std::convert::Infallible;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use store::Folder;
use store::sim::Sim;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

fn leaf(size: u64, sector: u32, block: u32) -> Arc<dyn Layer> {
    MemLayer::new(size, sector, block, Kind::Differencing)
}

fn base(size: u64, sector: u32, block: u32) -> Arc<dyn Layer> {
    MemLayer::new(size, sector, block, Kind::Dynamic)
}

/// A leaf that names the layer on which it is to stand.
fn over(below: &Arc<dyn Layer>, size: u64, sector: u32, block: u32) -> Arc<dyn Layer> {
    let leaf = leaf(size, sector, block);
    let link = ParentLink { linkage: below.info().data_id, ..leaf.info().parent.unwrap() };
    leaf.relink(None, Some(link)).unwrap();
    leaf
}

/// Where the layers of a chain are made.
#[derive(Debug, Clone)]
enum Place {
    /// Layers of these tests.
    Memory,
    /// VHDX files.
    Files(Arc<dyn Folder>),
}

impl Place {
    fn vhdx() -> Self {
        Self::Files(Sim::new().root())
    }

    /// The first layer, or one over `below`; VHDX files take the block size as a hint.
    fn layer(&self, below: Option<&Arc<dyn Layer>>, size: u64, sector: u32, block: u32) -> Arc<dyn Layer> {
        let Self::Files(folder) = self else {
            return below.map_or_else(|| base(size, sector, block), |below| over(below, size, sector, block));
        };
        let name = folder.list().unwrap().len().to_string();
        let parent = below.map(|below| Parent::of(&**below, Some(&file(below))).unwrap());
        let kind = if parent.is_some() { Kind::Differencing } else { Kind::Dynamic };
        let options = Options { size, block_size: block.max(1 << 20), sector_size: sector, kind, parent };
        vhdx::create(folder.create(&name).unwrap(), &options).unwrap()
    }
}

/// A layer's file name in its folder.
fn file(layer: &Arc<dyn Layer>) -> String {
    layer.store().name().trim_start_matches('/').to_owned()
}

/// Bytes that tell where they were meant to be and who wrote them.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn content(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0xAA; chain.size() as usize];
    chain.read(&mut bytes, 0).unwrap();
    bytes
}

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn fold(chain: &Chain, position: usize) -> Outcome {
    fold_some(chain, position..position + 1)
}

fn fold_some(chain: &Chain, run: Range<usize>) -> Outcome {
    let layers = chain.layers();
    let parent = &layers[run.start - 1];
    fold_run(
        Some(chain),
        &layers[run],
        parent,
        Uuid::new_v4(),
        Marks::default(),
        &mut go_on,
        || Ok::<_, Infallible>(()),
    )
    .unwrap()
}

/// Folds a run upwards, which keeps its top.
fn lift(chain: &Chain, run: Range<usize>) -> Outcome {
    let layers = chain.layers();
    let beneath = &layers[run.start - 1];
    fold_up(Some(chain), beneath, &layers[run], &mut go_on, || Ok::<_, Infallible>(())).unwrap()
}

/// Each layer accepts the one below.
fn check_links(chain: &Chain) {
    for pair in chain.layers().windows(2) {
        gate::check_link(&*pair[1], &*pair[0]).unwrap();
    }
}

#[derive(Debug, Clone)]
enum Op {
    Write { at: u64, len: u64, aligned: bool },
    Zero { at: u64, len: u64 },
    Discard { at: u64, len: u64 },
    Flush,
    Push { size: u64, block: u32 },
    Pop,
    Fold { which: usize, most: usize },
    Lift { which: usize, most: usize },
    Reopen { index: usize },
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let at = prop_oneof![0..6 * MIB, Just(0), Just(2 * MIB), (2 * MIB - 2000)..(2 * MIB + 2000)];
    let len = prop_oneof![1u64..600, 1u64..20_000, 1..3 * MIB, Just(512), Just(4096), Just(2 * MIB)];
    (at, len)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (range(), any::<bool>()).prop_map(|((at, len), aligned)| Op::Write { at, len, aligned }),
        3 => range().prop_map(|(at, len)| Op::Zero { at, len }),
        3 => range().prop_map(|(at, len)| Op::Discard { at, len }),
        1 => Just(Op::Flush),
        3 => (size(), block()).prop_map(|(size, block)| Op::Push { size, block }),
        1 => Just(Op::Pop),
        2 => (any::<usize>(), 1..6usize).prop_map(|(which, most)| Op::Fold { which, most }),
        2 => (any::<usize>(), 2..6usize).prop_map(|(which, most)| Op::Lift { which, most }),
        1 => prop_oneof![Just(0), Just(100 << 10), Just(64 << 20)].prop_map(|index| Op::Reopen { index }),
    ]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(op(), 1..40)
}

/// Mostly the same size: others cut off what lies under them, and go on cutting it off when they are folded.
fn size() -> impl Strategy<Value = u64> {
    prop_oneof![3 => Just(5 * MIB + 4096), 1 => Just(3 * MIB), 1 => Just(7 * MIB + 8192), 1 => Just(4096u64)]
}

fn block() -> impl Strategy<Value = u32> {
    prop_oneof![Just(4096u32), Just(64 << 10), Just(2 << 20), Just(4 << 20)]
}

fn clip(at: u64, len: u64, size: u64) -> (u64, u64) {
    let at = at.min(size);
    (at, len.min(size - at))
}

fn zero_model(model: &mut [u8], at: u64, len: u64) {
    model[at as usize..(at + len) as usize].fill(0);
}

/// Runs cover the range, say zeros only where there are zeros, and can be asked for piecemeal.
fn check_runs(chain: &Chain, model: &[u8], at: u64, len: u64) {
    let whole = chain.runs(at, len, usize::MAX).unwrap();
    let mut expected = at;
    for run in &whole {
        assert!(run.offset == expected && run.len > 0, "{run:?}");
        expected += run.len;
        let bytes = &model[run.offset as usize..(run.offset + run.len) as usize];
        assert!(run.kind == RunKind::Data || bytes.iter().all(|&byte| byte == 0), "{run:?}");
        assert_eq!(run.layer.is_none(), run.kind == RunKind::Absent);
    }
    assert_eq!(expected, at + len);
    let mut pieces: Vec<ChainRun> = Vec::new();
    let mut next = at;
    while next < at + len {
        let some = chain.runs(next, at + len - next, 1).unwrap();
        assert_eq!(some.len(), 1);
        next += some[0].len;
        pieces.extend(some);
    }
    assert_eq!(pieces, whole);
}

fn run_ops(sector: u32, ops: Vec<Op>) {
    let first = base(5 * MIB + 4096, sector, 64 << 10);
    let mut chain = Chain::new(vec![first], Access::Write).unwrap();
    let mut model = vec![0u8; chain.size() as usize];
    for (n, op) in ops.into_iter().enumerate() {
        let size = chain.size();
        match op {
            Op::Write { at, len, aligned } => {
                let (mut at, mut len) = clip(at, len, size);
                if aligned {
                    at -= at % u64::from(sector);
                    len = len.next_multiple_of(u64::from(sector)).min(size - at);
                }
                let data = pattern(n as u64, len as usize);
                chain.write(&data, at).unwrap();
                model[at as usize..(at + len) as usize].copy_from_slice(&data);
            }
            Op::Zero { at, len } => {
                let (at, len) = clip(at, len, size);
                chain.zero(at, len).unwrap();
                zero_model(&mut model, at, len);
            }
            Op::Discard { at, len } => {
                let (at, len) = clip(at, len, size);
                chain.discard(at, len).unwrap();
                let sector = u64::from(sector);
                let (from, to) = (at.next_multiple_of(sector), (at + len) / sector * sector);
                zero_model(&mut model, from, to.saturating_sub(from));
            }
            Op::Flush => chain.flush().unwrap(),
            Op::Push { size, block } => {
                let below = Arc::clone(chain.layers().last().unwrap());
                chain.push(over(&below, size, sector, block)).unwrap();
                model.resize(size as usize, 0);
            }
            Op::Pop => match chain.pop_leaf(|| Ok::<_, Infallible>(())) {
                Ok(_) => {}
                Err(image::merge::FoldError::Image(error)) => {
                    assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
                }
                Err(error) => panic!("{error}"),
            },
            Op::Fold { which, most } => {
                let layers = chain.layers();
                if layers.len() < 2 {
                    continue;
                }
                let position = 1 + which % (layers.len() - 1);
                let run = position..layers.len().min(position + most);
                let (parent, child) = (&layers[position - 1], &layers[run.end - 1]);
                let (depth, id, size) = (layers.len(), child.info().data_id, child.info().size);
                let gone = run.len();
                assert_eq!(fold_some(&chain, run), Outcome::Folded);
                assert_eq!(chain.layers().len(), depth - gone);
                assert_eq!((parent.info().data_id, parent.info().size), (id, size));
            }
            Op::Lift { which, most } => {
                let layers = chain.layers();
                if layers.len() < 3 {
                    continue;
                }
                let position = 1 + which % (layers.len() - 2);
                let run = position..layers.len().min(position + most);
                let top = &layers[run.end - 1];
                let (id, size, gone) = (top.info().data_id, top.info().size, run.len() - 1);
                let plan = plan(Some(&*layers[position - 1]), &layers[run.clone()]).unwrap();
                let mut moved = 0;
                let progress = &mut |now: Progress| {
                    moved = now.done;
                    ControlFlow::Continue(())
                };
                let commit = || Ok::<_, Infallible>(());
                let folded = fold_up(Some(&chain), &layers[position - 1], &layers[run], progress, commit);
                assert_eq!((folded.unwrap(), moved), (Outcome::Folded, plan.moves(Direction::Up).iter().sum()));
                assert_eq!((top.info().data_id, top.info().size), (id, size));
                assert_eq!(chain.layers().len(), layers.len() - gone);
                check_links(&chain);
            }
            Op::Reopen { index } => {
                chain = Chain::with_index(chain.layers(), Access::Write, index).unwrap();
            }
        }
        assert_eq!(chain.size(), model.len() as u64);
        assert!(content(&chain) == model, "after operation {n}");
    }
    let (at, len) = clip(1000, 3 * MIB + 77, chain.size());
    check_runs(&chain, &model, at, len);
    check_runs(&chain, &model, 0, chain.size());
}

#[test]
fn of_what_a_run_wrote_often_only_the_newest_copy_moves() {
    let place = Place::vhdx();
    let base = place.layer(None, 4 * MIB, 512, 1 << 20);
    let chain = Chain::new(vec![base], Access::Write).unwrap();
    for version in 1..=9u8 {
        let leaf = place.layer(chain.layers().last(), 4 * MIB, 512, 1 << 20);
        chain.push(leaf).unwrap();
        chain.write(&vec![version; MIB as usize], MIB / 2).unwrap();
    }
    let (before, layers) = (content(&chain), chain.layers());
    let mut moved = 0;
    let mut progress = |now: Progress| {
        moved = now.done;
        assert!(now.done <= now.total);
        ControlFlow::Continue(())
    };
    let commit = || Ok::<_, Infallible>(());
    let outcome =
        fold_run(Some(&chain), &layers[1..], &layers[0], Uuid::new_v4(), Marks::default(), &mut progress, commit);
    assert_eq!((outcome.unwrap(), moved, chain.layers().len()), (Outcome::Folded, MIB, 1));
    assert!(content(&chain) == before);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_chain_reads_like_plain_bytes(sector in prop_oneof![Just(512u32), Just(4096)], ops in ops()) {
        run_ops(sector, ops);
    }
}

#[test]
fn a_layer_cuts_off_what_lies_under_it() {
    let layers = vec![base(10 * MIB, 512, 2 << 20), leaf(5 * MIB, 512, 2 << 20), leaf(10 * MIB, 512, 2 << 20)];
    let lowest = Chain::new(vec![Arc::clone(&layers[0])], Access::Write).unwrap();
    lowest.write(&vec![7; 10 * MIB as usize], 0).unwrap();
    let chain = Chain::new(layers, Access::Read).unwrap();
    let bytes = content(&chain);
    assert!(bytes[..5 * MIB as usize].iter().all(|&byte| byte == 7));
    assert!(bytes[5 * MIB as usize..].iter().all(|&byte| byte == 0));
    let kinds: Vec<_> = chain.runs(0, 10 * MIB, 9).unwrap().iter().map(|run| (run.kind, run.len)).collect();
    assert_eq!(kinds, [(RunKind::Data, 5 * MIB), (RunKind::Absent, 5 * MIB)]);
}

#[test]
fn zero_over_parent_data_stays_zero() {
    let chain = Chain::new(vec![base(4 * MIB, 512, 2 << 20)], Access::Write).unwrap();
    chain.write(&vec![7; 4 * MIB as usize], 0).unwrap();
    chain.push(leaf(4 * MIB, 512, 2 << 20)).unwrap();
    chain.zero(0, 2 * MIB).unwrap();
    chain.discard(2 * MIB, 4096).unwrap();
    chain.push(leaf(4 * MIB, 512, 2 << 20)).unwrap();
    let mut expected = vec![7; 4 * MIB as usize];
    expected[..(2 * MIB + 4096) as usize].fill(0);
    assert!(content(&chain) == expected);
    assert_eq!(fold(&chain, 1), Outcome::Folded);
    assert!(content(&chain) == expected);
}

#[test]
fn zeroing_what_reads_as_zeros_changes_nothing() {
    let chain = Chain::new(vec![base(64 * MIB, 512, 2 << 20), leaf(64 * MIB, 512, 2 << 20)], Access::Write).unwrap();
    chain.discard(0, 64 * MIB).unwrap();
    let runs = chain.runs(0, 64 * MIB, 10).unwrap();
    assert_eq!(runs, [ChainRun { offset: 0, len: 64 * MIB, kind: RunKind::Absent, layer: None }]);
}

#[test]
fn what_is_out_of_range_is_refused() {
    let chain = Chain::new(vec![base(MIB, 512, 4096)], Access::Write).unwrap();
    let invalid = |result: image::Result<()>| assert_eq!(result.unwrap_err().kind, ErrorKind::Invalid);
    invalid(chain.read(&mut [0; 2], MIB - 1));
    invalid(chain.read(&mut [0; 2], u64::MAX));
    invalid(chain.write(&[0; 512], MIB));
    invalid(chain.zero(1, MIB));
    invalid(chain.discard(u64::MAX - 5, 10));
    chain.read(&mut [], MIB).unwrap();
    chain.write(&[], 0).unwrap();
    let read_only = Chain::new(chain.layers(), Access::Read).unwrap();
    invalid(read_only.write(&[0; 512], 0));
    invalid(read_only.push(leaf(MIB, 512, 4096)));
    assert_eq!(chain.push(leaf(MIB, 4096, 4096)).unwrap_err().kind, ErrorKind::Unsupported);
    invalid(Chain::new(vec![], Access::Read).map(|_| ()));
    invalid(Chain::new(vec![base(MIB, 512, 4096); 4097], Access::Read).map(|_| ()));
    chain.close().unwrap();
    invalid(chain.read(&mut [0; 2], 0));
    invalid(chain.flush());
}

#[test]
fn a_flush_covers_every_layer_with_unsynced_data() {
    let lower = MemLayer::new(MIB, 512, 4096, Kind::Dynamic);
    let upper = MemLayer::new(MIB, 512, 4096, Kind::Differencing);
    let flushes = || (lower.flushes.load(Ordering::SeqCst), upper.flushes.load(Ordering::SeqCst));
    let chain = Chain::new(vec![Arc::clone(&lower) as Arc<dyn Layer>], Access::Write).unwrap();
    chain.write(&[1; 512], 0).unwrap();
    chain.push(Arc::clone(&upper) as Arc<dyn Layer>).unwrap();
    chain.flush().unwrap();
    assert_eq!(flushes(), (1, 0), "acknowledged just before the switch, flushed just after");
    chain.write(&[1; 512], 0).unwrap();
    chain.flush().unwrap();
    chain.flush().unwrap();
    assert_eq!(flushes(), (1, 1));
    chain.write(&[2; 512], 0).unwrap();
    chain.flush().unwrap();
    assert_eq!(flushes(), (1, 2), "a write in place is one, too");
}

#[test]
fn a_cancelled_or_failed_fold_changes_nothing() {
    let chain = Chain::new(vec![base(8 * MIB, 512, 2 << 20), leaf(8 * MIB, 512, 64 << 10)], Access::Write).unwrap();
    let data = pattern(1, 8 * MIB as usize);
    chain.write(&data, 0).unwrap();
    let layers = chain.layers();
    let mut calls = 0;
    let mut after_three = |_| {
        calls += 1;
        if calls > 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let g = Uuid::new_v4();
    let never = || -> Result<(), Infallible> { panic!("nothing to commit") };
    let outcome = fold_down(Some(&chain), &layers[1], &layers[0], g, &mut after_three, never).unwrap();
    assert_eq!(outcome, Outcome::Cancelled);
    assert!(content(&chain) == data && chain.layers().len() == 2);
    assert_eq!(layers[0].info().data_id, g, "nobody takes the mixture for the old parent");
    assert_eq!(layers[1].info().parent.unwrap().linkage2, Some(g));

    let failing = fold_down(Some(&chain), &layers[1], &layers[0], Uuid::new_v4(), &mut go_on, || Err("no"));
    assert!(matches!(failing, Err(image::merge::FoldError::Commit("no"))));
    assert!(content(&chain) == data && chain.layers().len() == 2);

    // Offline, on the same layers, it goes through.
    drop(chain);
    fold_down(None, &layers[1], &layers[0], Uuid::new_v4(), &mut go_on, || Ok::<_, Infallible>(())).unwrap();
    let chain = Chain::new(vec![Arc::clone(&layers[0])], Access::Read).unwrap();
    assert!(content(&chain) == data);
    assert_eq!(layers[0].info().data_id, layers[1].info().data_id);
}

#[test]
fn a_fold_moves_only_what_the_child_holds() {
    let layers = [base(64 * MIB, 512, 2 << 20), leaf(64 * MIB, 512, 2 << 20)];
    let chain = Chain::new(layers.to_vec(), Access::Write).unwrap();
    chain.write(&[1; 512], 5 * MIB).unwrap();
    chain.write(&[2; 4096], 9 * MIB + 512).unwrap();
    assert_eq!(plan(None, &layers).unwrap(), Plan { down: Some(vec![512 + 4096]), up: None });
    assert_eq!(fold(&chain, 1), Outcome::Folded);
    let data = chain.runs(0, 64 * MIB, 100).unwrap();
    let data: u64 = data.iter().filter(|run| run.kind == RunKind::Data).map(|run| run.len).sum();
    assert_eq!(data, 512 + 4096);
}

/// Base ← little ← much: what is little moves, whichever side it is on, and nothing else.
#[test]
fn the_smaller_side_moves() {
    for (below, above) in [(3u64, 40u64), (40, 3), (5, 5)] {
        let place = Place::vhdx();
        let chain = Chain::new(vec![place.layer(None, 64 * MIB, 512, 1 << 20)], Access::Write).unwrap();
        chain.write(&pattern(1, 50 * MIB as usize), 0).unwrap();
        chain.push(place.layer(chain.layers().last(), 64 * MIB, 512, 1 << 20)).unwrap();
        chain.write(&pattern(2, below as usize * 4096), MIB).unwrap();
        chain.push(place.layer(chain.layers().last(), 64 * MIB, 512, 1 << 20)).unwrap();
        // One of the sectors is written again above.
        chain.write(&pattern(3, above as usize * 4096), MIB + (below - 1) * 4096).unwrap();
        let (before, layers) = (content(&chain), chain.layers());
        let plan = plan(Some(&*layers[0]), &layers[1..]).unwrap();
        assert_eq!(plan, Plan { down: Some(vec![above * 4096]), up: Some(vec![(below - 1) * 4096]) });
        let (mut moved, commit) = (0, || Ok::<_, Infallible>(()));
        let progress = &mut |now: Progress| {
            moved = now.done;
            ControlFlow::Continue(())
        };
        let g = Uuid::new_v4();
        let folded = match plan.direction() {
            Direction::Down => fold_run(Some(&chain), &layers[2..], &layers[1], g, Marks::default(), progress, commit),
            Direction::Up => fold_up(Some(&chain), &layers[0], &layers[1..], progress, commit),
        };
        assert_eq!((folded.unwrap(), moved), (Outcome::Folded, plan.bytes()));
        assert_eq!(moved, (below - 1).min(above) * 4096);
        let kept = if plan.direction() == Direction::Down { &layers[1] } else { &layers[2] };
        assert!(chain.layers().len() == 2 && Arc::ptr_eq(&chain.layers()[1], kept));
        assert!(content(&chain) == before);
        check_links(&chain);
    }
}

#[test]
fn of_equal_costs_a_fold_goes_down_and_a_closed_way_is_not_taken() {
    let plan = |down: Option<u64>, up: Option<u64>| Plan { down: down.map(|n| vec![n, 1]), up: up.map(|n| vec![1, n]) };
    assert_eq!(plan(Some(7), Some(7)).direction(), Direction::Down);
    assert_eq!(plan(Some(7), None).direction(), Direction::Down);
    assert_eq!(plan(None, Some(9)).direction(), Direction::Up);
    assert_eq!((plan(Some(7), Some(6)).direction(), plan(Some(7), Some(6)).bytes()), (Direction::Up, 7));
    // A base that stands on nothing stays what it is.
    let layers = [base(MIB, 512, 4096), leaf(MIB, 512, 4096)];
    let chain = Chain::new(layers.to_vec(), Access::Write).unwrap();
    let folded = fold_up(Some(&chain), &layers[0], &layers[1..], &mut go_on, || Ok::<_, Infallible>(()));
    assert!(folded.is_err());
}

/// Whatever a cancelled fold left, the next one, in either direction, begins from there.
#[test]
fn a_fold_goes_on_in_the_other_direction() {
    for ups in [[true, false], [false, true], [true, true], [false, false]] {
        let place = Place::vhdx();
        let chain = Chain::new(vec![place.layer(None, 16 * MIB, 512, 1 << 20)], Access::Write).unwrap();
        for n in 0..4 {
            chain.write(&pattern(n, 7 * MIB as usize), n * 3 * MIB).unwrap();
            chain.zero(n * 4 * MIB, MIB + 512).unwrap();
            chain.push(place.layer(chain.layers().last(), 16 * MIB, 512, 1 << 20)).unwrap();
        }
        chain.write(&pattern(9, 3 * MIB as usize), 5 * MIB).unwrap();
        let (mut model, layers) = (content(&chain), chain.layers());
        for (turn, up) in ups.into_iter().enumerate() {
            let (mut calls, g) = (0, Uuid::new_v4());
            let chain = &chain;
            let model = &mut model;
            let progress = &mut |_| {
                calls += 1;
                let data = pattern(calls, 3000);
                let at = calls * 700_001 % (15 * MIB);
                chain.write(&data, at).unwrap();
                model[at as usize..at as usize + 3000].copy_from_slice(&data);
                if turn == 0 && calls == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let commit = || Ok::<_, Infallible>(());
            let folded = if up {
                fold_up(Some(chain), &layers[0], &layers[1..], progress, commit)
            } else {
                fold_run(Some(chain), &layers[2..], &layers[1], g, Marks::default(), progress, commit)
            };
            assert_eq!(folded.unwrap(), if turn == 0 { Outcome::Cancelled } else { Outcome::Folded });
            assert!(content(chain) == *model, "{ups:?}");
            check_links(chain);
        }
        assert_eq!(chain.layers().len(), 2);
    }
}

/// Sealed layers are moved down piece by piece while a guest reads and writes: it sees nothing of that, and they never take their space twice.
#[test]
fn what_is_sealed_is_given_up_beside_a_guest() {
    let sim = Sim::new();
    let place = Place::Files(sim.root());
    let chain = Chain::new(vec![place.layer(None, 24 * MIB, 512, 1 << 20)], Access::Write).unwrap();
    chain.write(&pattern(1, 2 * MIB as usize), MIB).unwrap();
    chain.push(place.layer(chain.layers().last(), 24 * MIB, 512, 1 << 20)).unwrap();
    chain.write(&pattern(2, 20 * MIB as usize), 2 * MIB).unwrap();
    chain.zero(5 * MIB + 512, MIB).unwrap();
    chain.push(place.layer(chain.layers().last(), 24 * MIB, 512, 1 << 20)).unwrap();
    chain.flush().unwrap();
    let (before, model) = (sim.used(), content(&chain));
    let (mut most, stop, layers) = (before, AtomicBool::new(false), chain.layers());
    let written = 6 * MIB..10 * MIB;
    std::thread::scope(|scope| {
        for from in [0, 10 * MIB, 17 * MIB] {
            let (chain, model, stop) = (&chain, &model, &stop);
            scope.spawn(move || {
                let (mut at, mut bytes) = (from, vec![0; 2 << 20]);
                while !stop.load(Ordering::Relaxed) {
                    at = from + (at * 5 + 77_777) % (4 * MIB);
                    chain.read(&mut bytes, at).unwrap();
                    assert!(bytes == model[at as usize..at as usize + bytes.len()], "at {at}");
                }
            });
        }
        let mut progress = |progress: Progress| {
            most = most.max(sim.used());
            // The guest has a few places of its own that it writes again and again.
            let data = pattern(progress.done, 4096);
            chain.write(&data, written.start + progress.done % (2 * MIB) / 4096 * 4096).unwrap();
            ControlFlow::Continue(())
        };
        let commit = || Ok::<_, Infallible>(());
        let moved = move_down(Some(&chain), &layers[..2], 1, Uuid::new_v4(), &mut progress, commit);
        stop.store(true, Ordering::Relaxed);
        assert_eq!(moved.unwrap(), Outcome::Folded);
    });
    assert_eq!(chain.layers().len(), 2);
    check_links(&chain);
    // Two blocks of either, the guest's, and what the tables grow by.
    assert!(most < before + 9 * MIB, "{} MiB more", (most - before) >> 20);
    let (now, written) = (content(&chain), written.start as usize..written.end as usize);
    assert!(now[..written.start] == model[..written.start] && now[written.end..] == model[written.end..]);
}

/// Requests go on while the commit runs, and are there after it, as is what was flushed meanwhile.
#[test]
fn a_guest_goes_on_during_the_commit() {
    for up in [false, true] {
        let lower = MemLayer::new(8 * MIB, 512, 4096, Kind::Dynamic);
        let mut layers: Vec<Arc<dyn Layer>> = vec![lower];
        for _ in 0..2 {
            layers.push(over(layers.last().unwrap(), 8 * MIB, 512, 64 << 10));
        }
        let chain = Chain::new(layers.clone(), Access::Write).unwrap();
        chain.write(&pattern(1, 3 * MIB as usize), MIB).unwrap();
        let mut model = content(&chain);
        let commit = || {
            let data = pattern(2, 4096);
            chain.write(&data, 6 * MIB).unwrap();
            chain.write(&data, MIB + 100).unwrap();
            chain.zero(2 * MIB, 5000).unwrap();
            chain.flush().unwrap();
            let mut bytes = vec![0; 4096];
            chain.read(&mut bytes, MIB + 100).unwrap();
            assert!(bytes == data);
            Ok::<_, Infallible>(())
        };
        let folded = if up {
            fold_up(Some(&chain), &layers[0], &layers[1..], &mut go_on, commit)
        } else {
            fold_down(Some(&chain), &layers[2], &layers[1], Uuid::new_v4(), &mut go_on, commit)
        };
        assert_eq!((folded.unwrap(), chain.layers().len()), (Outcome::Folded, 2));
        let data = pattern(2, 4096);
        model[6 * MIB as usize..][..4096].copy_from_slice(&data);
        model[MIB as usize + 100..][..4096].copy_from_slice(&data);
        model[2 * MIB as usize..][..5000].fill(0);
        assert!(content(&chain) == model, "up: {up}");
    }
}

#[test]
fn a_write_beside_a_look_up_is_not_forgotten() {
    let size = 130 * MIB;
    let lower = MemLayer::new(size, 512, 4096, Kind::Dynamic);
    let layers = vec![Arc::clone(&lower) as Arc<dyn Layer>, leaf(size, 512, 4096)];
    let chain = Arc::new(Chain::with_index(layers, Access::Write, 0).unwrap());
    let other = Arc::clone(&chain);
    // The leaf has just said that it holds nothing, when it gets a sector, and the index forgets about the block.
    let hook = move || {
        other.write(&[9; 512], 512).unwrap();
        other.read(&mut [0; 512], 128 * MIB).unwrap();
    };
    *lower.on_map.0.lock().unwrap() = Some(Box::new(hook));
    chain.read(&mut [0; 512], 0).unwrap();
    let mut bytes = [0; 512];
    chain.read(&mut bytes, 512).unwrap();
    assert_eq!(bytes, [9; 512]);
}

/// Readers see a sector's own content or zeros: never what another sector gets in the place that it had.
#[test]
fn places_given_away_are_not_read() {
    const SECTORS: u64 = 64;
    let chain = Chain::new(vec![base(SECTORS * 512, 512, 1024)], Access::Write).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut changers = Vec::new();
        for seed in 1..=2 {
            let chain = &chain;
            changers.push(scope.spawn(move || {
                let mut own = Own { at: 0, model: Vec::new(), seed };
                for _ in 0..20_000 {
                    let sector = own.next(SECTORS);
                    match own.next(2) {
                        0 => chain.write(&[sector as u8 + 1; 512], sector * 512).unwrap(),
                        _ => chain.zero(sector / 2 * 1024, 1024).unwrap(),
                    }
                }
            }));
        }
        for _ in 0..2 {
            scope.spawn(|| {
                let mut bytes = vec![0; SECTORS as usize * 512];
                while !over.load(Ordering::SeqCst) {
                    chain.read(&mut bytes, 0).unwrap();
                    for (sector, bytes) in bytes.chunks(512).enumerate() {
                        let own = sector as u8 + 1;
                        assert!(bytes.iter().all(|&byte| byte == own || byte == 0), "sector {sector}: {}", bytes[0]);
                    }
                }
            });
        }
        let ended: Vec<_> = changers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::SeqCst);
        for end in ended {
            end.unwrap();
        }
    });
}

#[test]
fn unaligned_writes_of_one_sector_keep_each_others_bytes() {
    let chain = Chain::new(vec![base(4096, 512, 4096)], Access::Write).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let chain = &chain;
            scope.spawn(move || {
                for n in 0..2000u32 {
                    let own = [n.to_le_bytes(), n.to_be_bytes()].concat();
                    chain.write(&own, thread * 60).unwrap();
                    let mut back = [0; 8];
                    chain.read(&mut back, thread * 60).unwrap();
                    assert_eq!(back[..], own);
                }
            });
        }
    });
}

/// A thread's own bytes, shifted so that neighbours share sectors.
struct Own {
    at: u64,
    model: Vec<u8>,
    seed: u64,
}

impl Own {
    fn next(&mut self, below: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed >> 11) % below
    }

    fn step(&mut self, chain: &Chain) {
        let size = self.model.len() as u64;
        let at = self.next(size);
        let len = match self.next(4) {
            0 => 1 + self.next(size - at),
            _ => 1 + self.next((size - at).min(5000)),
        };
        let (from, to) = (at as usize, (at + len) as usize);
        match self.next(8) {
            0 | 1 => {
                chain.zero(self.at + at, len).unwrap();
                self.model[from..to].fill(0);
            }
            2 => {
                chain.discard(self.at + at, len).unwrap();
                let first = (self.at + at).next_multiple_of(512) - self.at;
                let last = ((self.at + at + len) / 512 * 512).saturating_sub(self.at);
                if first < last {
                    self.model[first as usize..last as usize].fill(0);
                }
            }
            3 => chain.flush().unwrap(),
            _ => {
                let data = pattern(self.seed, len as usize);
                chain.write(&data, self.at + at).unwrap();
                self.model[from..to].copy_from_slice(&data);
            }
        }
        let at = self.next(size);
        let len = 1 + self.next(size - at);
        let mut bytes = vec![0xAA; len as usize];
        chain.read(&mut bytes, self.at + at).unwrap();
        assert!(bytes == self.model[at as usize..(at + len) as usize], "own bytes at {}", self.at + at);
    }
}

#[test]
fn many_threads_while_layers_come_and_go() {
    many_threads(&Place::Memory);
}

#[test]
fn many_threads_while_vhdx_files_come_and_go() {
    many_threads(&Place::vhdx());
}

fn many_threads(place: &Place) {
    const PART: u64 = 300_000;
    let size = 8 * MIB;
    let chain = Chain::with_index(vec![place.layer(None, size, 512, 64 << 10)], Access::Write, 1 << 20).unwrap();
    let over = AtomicBool::new(false);
    let mut parts: Vec<Own> =
        (0..24).map(|n| Own { at: 100 + n * PART, model: vec![0; PART as usize], seed: 77 + n * 1_000_003 }).collect();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for own in parts.chunks_mut(6) {
            let chain = &chain;
            threads.push(scope.spawn(move || {
                for n in 0..1200 {
                    own[n % 6].step(chain);
                }
            }));
        }
        scope.spawn(|| {
            let mut turn = 0;
            while !over.load(Ordering::SeqCst) {
                turn += 1;
                let depth = chain.layers().len();
                match turn % 7 {
                    0 | 1 | 4 => {
                        let block = [4096, 64 << 10, 2 << 20][turn % 3];
                        chain.push(place.layer(chain.layers().last(), size, 512, block)).unwrap();
                    }
                    2 if depth > 1 => assert_eq!(fold(&chain, depth - 1), Outcome::Folded),
                    3 if depth > 2 => assert_eq!(fold(&chain, 1 + turn % (depth - 1)), Outcome::Folded),
                    6 if depth > 2 => {
                        let run = 1 + turn % (depth - 2)..depth;
                        assert_eq!(lift(&chain, run), Outcome::Folded);
                    }
                    5 if depth > 1 => drop(chain.pop_leaf(|| Ok::<_, Infallible>(())).unwrap()),
                    _ => std::thread::yield_now(),
                }
            }
        });
        let ended: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::SeqCst);
        for end in ended {
            end.unwrap();
        }
    });
    let bytes = content(&chain);
    for own in &parts {
        assert!(bytes[own.at as usize..(own.at + PART) as usize] == own.model);
    }
}
