//! Files that fail: what is refused afterwards, and what goes on.

use image::merge::{FoldError, Outcome, fold_down, fold_up};
use image::{Access, Chain, ErrorKind, Format, Layer, ParentLink, vhd, vhdx};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;
use store::Mode;
use store::sim::{At, Crash, Sim, Times};
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;

const FORMATS: [Format; 2] = [Format::Vhdx, Format::Vhd];

fn base(sim: &Sim, format: Format) -> Arc<dyn Layer> {
    let file = sim.root().create("base").unwrap();
    if format == Format::Vhd {
        return vhd::create(file, &vhd::Options::dynamic(SIZE)).unwrap();
    }
    vhdx::create(file, &vhdx::Options::dynamic(SIZE)).unwrap()
}

fn child(sim: &Sim, format: Format, name: &str, parent: &Arc<dyn Layer>) -> Arc<dyn Layer> {
    let file = sim.root().create(name).unwrap();
    if format == Format::Vhd {
        return vhd::create(file, &vhd::Options::differencing(&**parent, "base").unwrap()).unwrap();
    }
    vhdx::create(file, &vhdx::Options::differencing(&**parent, "base").unwrap()).unwrap()
}

fn content(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0xAA; chain.size() as usize];
    chain.read(&mut bytes, 0).unwrap();
    bytes
}

fn kind<T>(result: image::Result<T>) -> ErrorKind {
    result.err().expect("it cannot have worked").kind
}

#[test]
fn a_failed_sync_is_never_retried_and_trusted() {
    FORMATS.into_iter().for_each(failed_sync);
}

fn failed_sync(format: Format) {
    let sim = Sim::new();
    let chain = Chain::new(vec![base(&sim, format)], Access::Write).unwrap();
    chain.write(&[1; 512], 0).unwrap();
    sim.fail(At::Sync(sim.counts().syncs), store::ErrorKind::Io, Times::Once);
    assert_eq!(kind(chain.flush()), ErrorKind::Io);
    assert_eq!(kind(chain.flush()), ErrorKind::Poisoned);
    assert_eq!(kind(chain.write(&[2; 512], 0)), ErrorKind::Poisoned);
    assert_eq!(kind(chain.zero(0, 512)), ErrorKind::Poisoned);
    assert_eq!(content(&chain)[..512], [1; 512]);
}

#[test]
fn no_space_is_an_answer_and_not_a_fault() {
    FORMATS.into_iter().for_each(no_space);
}

fn no_space(format: Format) {
    let sim = Sim::new();
    let chain = Chain::new(vec![base(&sim, format)], Access::Write).unwrap();
    chain.write(&vec![1; 4 * MIB as usize], 0).unwrap();
    sim.set_capacity(Some(10 * MIB));
    let mut offset = 4 * MIB;
    let error = loop {
        match chain.write(&vec![2; MIB as usize], offset) {
            Ok(()) => offset += MIB,
            Err(error) => break error,
        }
        assert!(offset < SIZE, "the disk does not fill up");
    };
    assert_eq!(error.kind, ErrorKind::NoSpace);
    sim.set_capacity(None);
    chain.write(&vec![3; MIB as usize], offset).unwrap();
    chain.flush().unwrap();
    let bytes = content(&chain);
    assert!(bytes[..4 * MIB as usize].iter().all(|&byte| byte == 1));
    assert!(bytes[4 * MIB as usize..offset as usize].iter().all(|&byte| byte == 2));
    assert!(bytes[offset as usize..(offset + MIB) as usize].iter().all(|&byte| byte == 3));
}

#[test]
fn a_flush_without_space_is_made_again_when_there_is_some() {
    for (format, differencing) in FORMATS.into_iter().flat_map(|format| [(format, false), (format, true)]) {
        let starved = (0..32).filter(|pages| starved_flush(format, differencing, *pages)).count();
        // A block of a VHD takes all of its room when it is placed.
        assert!((3..32).contains(&starved) || format == Format::Vhd, "{format:?}, {differencing}: {starved} of 32");
    }
}

/// A fold that cannot begin for want of room is no reason to distrust the leaf that a guest writes.
#[test]
fn a_link_that_finds_no_room_is_changed_when_there_is_some() {
    for (format, pages) in FORMATS.into_iter().flat_map(|format| (0..12).map(move |pages| (format, pages))) {
        let sim = Sim::new();
        let lower = base(&sim, format);
        let upper = child(&sim, format, "child", &lower);
        let chain = Chain::new(vec![lower, Arc::clone(&upper)], Access::Write).unwrap();
        chain.write(&vec![1; 700 * 512], 300 * 512).unwrap();
        chain.flush().unwrap();
        let link = upper.info().parent.expect("it stands on something");
        sim.set_capacity(Some(sim.used() + pages * 4096));
        // A longer one takes more room.
        let new = ParentLink { linkage2: Some(Uuid::new_v4()), relative_path: Some("x".repeat(900)), ..link.clone() };
        let refused = upper.relink(None, Some(new.clone()));
        if let Err(error) = &refused {
            assert_eq!(error.kind, ErrorKind::NoSpace, "{format:?}, {pages}: {error}");
            assert_eq!(upper.info().parent, Some(link), "{format:?}, {pages}");
        }
        assert!(refused.is_err() || pages > 0, "{format:?}: it needs room");
        sim.set_capacity(None);
        chain.write(&[2; 512], 0).unwrap();
        chain.flush().unwrap_or_else(|error| panic!("{format:?}, {pages}: {error}"));
        upper.relink(None, Some(new)).unwrap();
        chain.close().unwrap();
        drop((chain, upper));
        let again = image::open(sim.root().open("child", Mode::Read).unwrap(), None, Mode::Read).unwrap();
        assert!(again.info().parent.is_some_and(|link| link.linkage2.is_some()), "{format:?}, {pages}");
    }
}

/// Where [`starved_flush`] writes, and of what.
const WRITES: [(u8, u64); 4] = [(2, 3 * MIB + 512), (3, 900 * 512), (4, 9 * MIB), (5, 0)];
const PIECE: usize = 9 * 512;

/// Writes and flushes with room for so many pages more, and goes on when there is room: whatever the power takes, what was flushed is there.
/// Whether a flush found no room.
fn starved_flush(format: Format, differencing: bool, pages: u64) -> bool {
    let sim = Sim::new();
    let mut layers = vec![base(&sim, format)];
    if differencing {
        layers.push(child(&sim, format, "child", &layers[0]));
    }
    let chain = Chain::new(layers, Access::Write).unwrap();
    chain.write(&vec![1; 700 * 512], 300 * 512).unwrap();
    chain.flush().unwrap();
    sim.root().sync().unwrap();
    let mut flushed = pieces(&chain);
    let mut room = sim.used() + pages * 4096;
    sim.set_capacity(Some(room));
    let mut a_page_more = || {
        room += 4096;
        sim.set_capacity(Some(room));
    };
    let mut starved = false;
    for (nth, from) in WRITES {
        while let Err(error) = chain.write(&[nth; PIECE], from) {
            assert_eq!(error.kind, ErrorKind::NoSpace, "{format:?}, {pages}: {error}");
            check_crashes(&sim, differencing, &flushed, nth);
            a_page_more();
        }
        let written = pieces(&chain);
        while let Err(error) = chain.flush() {
            assert_eq!(error.kind, ErrorKind::NoSpace, "{format:?}, {pages}: {error}");
            assert!(pieces(&chain) == written, "{format:?}, {pages}: it reads as it was written");
            check_crashes(&sim, differencing, &flushed, nth);
            a_page_more();
            starved = true;
        }
        flushed = written;
        check_crashes(&sim, differencing, &flushed, nth);
    }
    starved
}

/// Each write in turn finds no room, from the session's first, and is made again; a sync that finds none is a fault.
#[test]
fn whichever_write_finds_no_room_nothing_is_lost() {
    for (format, differencing) in FORMATS.into_iter().flat_map(|format| [(format, false), (format, true)]) {
        let (mut starved, mut lost) = (0, 0);
        for nth in 0.. {
            match fail_once(format, differencing, nth) {
                None => break,
                Some(ErrorKind::NoSpace) => starved += 1,
                Some(_) => lost += 1,
            }
        }
        assert!(starved > 2 && lost > 1, "{format:?}, {differencing}: {starved} and {lost}");
    }
}

/// What the nth operation of a session's first write and flush comes to, if it finds no room; nothing, if there are fewer.
fn fail_once(format: Format, differencing: bool, nth: u64) -> Option<ErrorKind> {
    let sim = Sim::new();
    let mut layers = vec![base(&sim, format)];
    if differencing {
        layers.push(child(&sim, format, "child", &layers[0]));
    }
    let chain = Chain::new(layers, Access::Write).unwrap();
    sim.root().sync().unwrap();
    let flushed = pieces(&chain);
    let end = sim.counts().operations + nth;
    sim.fail(At::Operation(end), store::ErrorKind::NoSpace, Times::Once);
    let write = || WRITES.iter().try_for_each(|(_, from)| chain.write(&[7; PIECE], *from)).and_then(|()| chain.flush());
    let failed = write().err().map(|error| error.kind);
    if sim.counts().operations <= end {
        return None;
    }
    check_crashes(&sim, differencing, &flushed, 7);
    if failed.is_none_or(|kind| kind == ErrorKind::NoSpace) {
        write().unwrap_or_else(|error| panic!("{format:?}, {differencing}, {nth}: {error}"));
        check_crashes(&sim, differencing, &vec![vec![7; PIECE]; WRITES.len()], 7);
    } else {
        assert_eq!(kind(write()), ErrorKind::Poisoned, "{format:?}, {differencing}, {nth}");
    }
    // The header's second copy is done without.
    Some(failed.unwrap_or(ErrorKind::NoSpace))
}

fn pieces(chain: &Chain) -> Vec<Vec<u8>> {
    let piece = |from| {
        let mut bytes = vec![0xAA; PIECE];
        chain.read(&mut bytes, from).unwrap();
        bytes
    };
    WRITES.iter().map(|(_, from)| piece(*from)).collect()
}

/// Each byte is what it was when it was last flushed, or what was being written.
fn check_crashes(sim: &Sim, differencing: bool, flushed: &[Vec<u8>], writing: u8) {
    for crash in Crash::several(sim.counts().operations, 8) {
        let after = sim.after_crash(crash);
        let open = |name| image::open(after.root().open(name, Mode::Write).unwrap(), None, Mode::Write).unwrap();
        let mut layers = vec![open("base")];
        if differencing {
            layers.push(open("child"));
        }
        let found = pieces(&Chain::new(layers, Access::Write).unwrap());
        let sound =
            found.iter().flatten().zip(flushed.iter().flatten()).all(|(new, old)| new == old || *new == writing);
        assert!(sound, "{crash:?}");
    }
}

#[test]
fn a_fold_that_fails_does_not_disturb_the_guest() {
    FORMATS.into_iter().for_each(failed_fold);
}

fn failed_fold(format: Format) {
    let sim = Sim::new();
    let lower = base(&sim, format);
    let chain = Chain::new(vec![Arc::clone(&lower)], Access::Write).unwrap();
    chain.write(&vec![1; 4 * MIB as usize], 0).unwrap();
    chain.flush().unwrap();
    let upper = child(&sim, format, "child", &lower);
    chain.push(Arc::clone(&upper)).unwrap();
    chain.write(&vec![2; 4 * MIB as usize], MIB).unwrap();
    let expected = content(&chain);
    let mut go_on = |_| ControlFlow::Continue(());
    // The third piece of data meets a bad place.
    let mut calls = 0;
    let mut break_it = |_| {
        calls += 1;
        if calls == 3 {
            sim.fail(At::Operation(sim.counts().operations), store::ErrorKind::Io, Times::Once);
        }
        ControlFlow::Continue(())
    };
    let never = || -> Result<(), Infallible> { panic!("nothing to commit") };
    let failed = fold_down(Some(&chain), &upper, &lower, Uuid::new_v4(), &mut break_it, never);
    assert!(matches!(failed, Err(FoldError::Image(error)) if error.kind == ErrorKind::Io));
    assert!(content(&chain) == expected);
    chain.write(&[3; 512], 0).unwrap();
    chain.flush().unwrap();
    // The parent is not trusted any more: not before it is opened again.
    let again = fold_down(Some(&chain), &upper, &lower, Uuid::new_v4(), &mut go_on, never);
    assert!(matches!(again, Err(FoldError::Image(error)) if error.kind == ErrorKind::Poisoned));
    let file = sim.root().open("base", store::Mode::Write).unwrap();
    lower.store().lock(store::Lock::None).unwrap();
    let reopened = image::open(file, None, store::Mode::Write).unwrap();
    chain.replace(&lower, Arc::clone(&reopened)).unwrap();
    let commit = || Ok::<_, Infallible>(());
    let folded = fold_down(Some(&chain), &upper, &reopened, Uuid::new_v4(), &mut go_on, commit).unwrap();
    assert_eq!(folded, Outcome::Folded);
    let bytes = content(&chain);
    assert!(bytes[..512] == [3; 512] && bytes[512..] == expected[512..]);
}

/// The n-th operation of the fold fails, for many n, while a guest writes: what was acknowledged is there.
#[test]
fn a_fold_fails_at_every_operation_and_nothing_acknowledged_is_lost() {
    for (format, up) in FORMATS.into_iter().flat_map(|format| [(format, false), (format, true)]) {
        let mut folds = 0;
        for nth in (0..).step_by(3) {
            let sim = Sim::new();
            let bottom = base(&sim, format);
            let middle = child(&sim, format, "middle", &bottom);
            let chain = Chain::new(vec![Arc::clone(&bottom), Arc::clone(&middle)], Access::Write).unwrap();
            chain.write(&vec![1; 3 * MIB as usize], 0).unwrap();
            let top = child(&sim, format, "top", &middle);
            chain.push(Arc::clone(&top)).unwrap();
            chain.write(&vec![2; 2 * MIB as usize], 2 * MIB).unwrap();
            chain.flush().unwrap();
            let model = std::cell::RefCell::new(content(&chain));
            let mut calls = 0u8;
            let refused = std::cell::RefCell::new(Vec::new());
            let write = |byte: u8, at: u64| match chain.write(&[byte; 1024], at) {
                Ok(()) => model.borrow_mut()[at as usize..at as usize + 1024].fill(byte),
                Err(_) => refused.borrow_mut().push((byte, at as usize..at as usize + 1024)),
            };
            let first = sim.counts().operations;
            sim.fail(At::Operation(first + nth), store::ErrorKind::Io, Times::Once);
            let mut progress = |_| {
                calls += 1;
                if calls <= 8 {
                    write(calls + 10, u64::from(calls) * 500_224);
                }
                ControlFlow::Continue(())
            };
            let commit = || {
                write(99, 4 * MIB);
                Ok::<_, Infallible>(())
            };
            let folded = if up {
                fold_up(Some(&chain), &bottom, &[middle, top], &mut progress, commit)
            } else {
                fold_down(Some(&chain), &top, &middle, Uuid::new_v4(), &mut progress, commit)
            };
            let reached = sim.counts().operations > first + nth;
            assert_eq!(chain.layers().len(), if folded.is_ok() { 2 } else { 3 });
            // What was refused is there, or is not, or in part.
            let mut now = content(&chain);
            for (byte, range) in refused.take() {
                for at in range.filter(|at| now[*at] == byte).collect::<Vec<_>>() {
                    now[at] = model.borrow()[at];
                }
            }
            assert!(now == *model.borrow(), "{format:?}, up: {up}, operation {nth}: {folded:?}");
            folds += u32::from(folded.is_err());
            if !reached {
                assert!(folded.is_ok());
                break;
            }
        }
        assert!(folds > 3, "{folds} folds failed");
    }
}

/// What a fold has just copied into the leaf is known to this process alone; a guest that writes over it, in place, must find that in the
/// file when the process dies then.
#[test]
fn a_write_over_what_a_fold_has_copied_outlives_the_process() {
    for (format, up) in FORMATS.into_iter().flat_map(|format| [(format, false), (format, true)]) {
        let sim = Sim::new();
        let bottom = base(&sim, format);
        let middle = child(&sim, format, "middle", &bottom);
        let chain = Chain::new(vec![Arc::clone(&bottom), Arc::clone(&middle)], Access::Write).unwrap();
        chain.write(&vec![1; 3 * MIB as usize], 0).unwrap();
        let top = child(&sim, format, "top", &middle);
        chain.push(Arc::clone(&top)).unwrap();
        chain.flush().unwrap();
        let chain = Chain::new(chain.layers(), Access::Write).unwrap().surviving();
        // Reads what the files say.
        let survivor = |names: &[&str]| {
            let open = |name: &&str| {
                let file = sim.root().open(name, Mode::Read).unwrap();
                image::open::open_unlocked(file, None, Mode::Read).unwrap()
            };
            let chain = Chain::new(names.iter().map(open).collect(), Access::Read).unwrap();
            let mut bytes = [0; 512];
            chain.read(&mut bytes, MIB + 512).unwrap();
            bytes
        };
        let mut byte = 10;
        let mut progress = |_| {
            byte += 1;
            chain.write(&[byte; 512], MIB + 512).unwrap();
            assert_eq!(survivor(&["base", "middle", "top"]), [byte; 512], "{format:?}, up: {up}");
            ControlFlow::Continue(())
        };
        let written = || {
            chain.write(&[99; 512], MIB + 512).unwrap();
            let after = if up { ["base", "top"] } else { ["base", "middle"] };
            assert_eq!(survivor(&after), [99; 512], "{format:?}, up: {up}");
            Ok::<_, Infallible>(())
        };
        let folded = if up {
            fold_up(Some(&chain), &bottom, &[middle, top], &mut progress, written)
        } else {
            fold_down(Some(&chain), &top, &middle, Uuid::new_v4(), &mut progress, written)
        };
        assert_eq!(folded.unwrap(), Outcome::Folded);
    }
}

/// Somebody cuts or lengthens a file while it is being read: what is missing is an error and never zeros; what is new is not looked at.
#[test]
fn a_file_that_changes_its_length_while_it_is_read() {
    for format in [Format::Vhdx, Format::Vhd, Format::Raw] {
        for sparse in [false, true] {
            let sim = Sim::new();
            let layer: Arc<dyn Layer> = match format {
                Format::Raw => image::raw::create(sim.root().create("base").unwrap(), SIZE).unwrap(),
                format => base(&sim, format),
            };
            let chain = Chain::new(vec![layer], Access::Write).unwrap();
            let last = if sparse { SIZE - MIB } else { 0 };
            chain.write(&vec![7; (SIZE - last) as usize], last).unwrap();
            chain.close().unwrap();
            drop(chain);
            let said = (format == Format::Raw).then_some(format);
            let open = || {
                let file = sim.root().open("base", Mode::Read).unwrap();
                Chain::new(vec![image::open::open_unlocked(file, said, Mode::Read).unwrap()], Access::Read).unwrap()
            };
            let hash =
                |chain: &Chain| image::convert::hash(chain, &mut |_, _| true).map(|hash| hash.expect("to its end"));
            let (chain, before) = (open(), hash(&open()).unwrap());
            let file = sim.root().open("base", Mode::Write).unwrap();
            let length = file.len().unwrap();
            file.write_at(&[9; 4096], length).unwrap();
            assert_eq!(hash(&chain).unwrap(), before, "{format:?} longer");
            for cut in [length - 2 * MIB, length / 2, 4096, 0] {
                file.set_len(cut).unwrap();
                assert_eq!(kind(hash(&chain)), ErrorKind::Damaged, "{format:?} {sparse} cut to {cut}");
            }
        }
    }
}
