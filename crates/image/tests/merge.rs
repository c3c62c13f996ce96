//! Merging offline, comparing and reconnecting: images in a folder, without anybody who knows them.

use image::merge::{FoldError, Mark, Marks, Outcome, Progress, fold_down, fold_run, fold_up, move_down};
use image::reconnect::{examine, reconnect};
use image::siblings::Siblings;
use image::vhdx::{self, Options};
use image::{Access, Chain, Error, ErrorKind, Format, Layer, compare, gate, vhd};
use std::ops::ControlFlow;
use std::sync::Arc;
use store::sim::{At, Crash, Sim};
use store::{Folder, Mode};
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

fn create(folder: &Arc<dyn Folder>, name: &str, below: Option<&str>, size: u64) -> Arc<dyn Layer> {
    create_as(Format::Vhdx, folder, name, below, size)
}

fn create_as(format: Format, folder: &Arc<dyn Folder>, name: &str, below: Option<&str>, size: u64) -> Arc<dyn Layer> {
    let parent =
        below.map(|below| (image::open(folder.open(below, Mode::Read).unwrap(), None, Mode::Read).unwrap(), below));
    let (file, block_size) = (folder.create(name).unwrap(), MIB as u32);
    let layer: Arc<dyn Layer> = if format == Format::Vhd {
        let options = parent.map(|(parent, below)| vhd::Options::differencing(&*parent, below).unwrap());
        vhd::create(file, &vhd::Options { size, block_size, ..options.unwrap_or_default() }).unwrap()
    } else {
        let options = parent.map(|(parent, below)| Options::differencing(&*parent, below).unwrap());
        vhdx::create(file, &Options { size, block_size, ..options.unwrap_or_default() }).unwrap()
    };
    folder.sync().unwrap();
    layer
}

/// Writes through a chain: (offset, length, byte); the byte 0 zeroes.
fn fill(folder: &Arc<dyn Folder>, name: &str, parts: &[(u64, u64, u8)]) {
    let chain = Chain::new(gate::open_chain(folder, name, Mode::Write).unwrap(), Access::Write).unwrap();
    for &(at, len, byte) in parts {
        match byte {
            0 => chain.zero(at, len).unwrap(),
            _ => chain.write(&vec![byte; len as usize], at).unwrap(),
        }
    }
    chain.close().unwrap();
}

fn content(folder: &Arc<dyn Folder>, name: &str) -> Result<Vec<u8>, Error> {
    let chain = Chain::new(gate::open_chain(folder, name, Mode::Read)?, Access::Read)?;
    let mut bytes = vec![0xAA; chain.size() as usize];
    chain.read(&mut bytes, 0)?;
    Ok(bytes)
}

/// Formats of a base and of its child.
type Formats = (Format, Format);
const FORMATS: [Formats; 3] = [(Format::Vhdx, Format::Vhdx), (Format::Vhd, Format::Vhd), (Format::Vhd, Format::Vhdx)];

/// A base, and a child of another size that has data, zeros and nothing.
fn pair(sim: &Sim, formats: Formats, sizes: (u64, u64)) -> Vec<u8> {
    let folder = sim.root();
    drop(create_as(formats.0, &folder, "base", None, sizes.0));
    fill(&folder, "base", &[(0, sizes.0, 1)]);
    drop(create_as(formats.1, &folder, "child", Some("base"), sizes.1));
    fill(&folder, "child", &[(SECTOR, 2 * SECTOR, 2), (MIB, MIB, 3), (2 * MIB + 5 * SECTOR, 300 * SECTOR, 0)]);
    content(&folder, "child").unwrap()
}

fn merge(sim: &Sim) -> Result<(), Error> {
    let folder = sim.root();
    let layers = gate::Gate::default().open_to_merge(&folder, "child", None)?;
    let go_on = &mut |_| ControlFlow::Continue(());
    let outcome = move_down(None, &layers, 64 * MIB, Uuid::new_v4(), go_on, || Ok::<_, Error>(()));
    let outcome = outcome.map_err(|error| match error {
        FoldError::Image(error) | FoldError::Commit(error) => error,
    })?;
    assert_eq!(outcome, Outcome::Folded);
    layers[layers.len() - 2].close()
}

#[test]
fn wherever_a_merge_is_cut_off_the_pair_reads_the_same_and_it_goes_on() {
    let sizes = [(4 * MIB, 4 * MIB), (4 * MIB, 3 * MIB - SECTOR), (3 * MIB + 7 * SECTOR, 5 * MIB)];
    for (formats, sizes) in FORMATS.into_iter().flat_map(|formats| sizes.map(|sizes| (formats, sizes))) {
        let (first, last) = {
            let sim = Sim::new();
            let before = pair(&sim, formats, sizes);
            let first = sim.counts().operations;
            merge(&sim).unwrap();
            assert!(content(&sim.root(), "base").unwrap() == before);
            (first, sim.counts().operations)
        };
        for cut in first..last {
            let sim = Sim::new();
            let before = pair(&sim, formats, sizes);
            sim.cut(At::Operation(cut));
            assert!(merge(&sim).is_err());
            for crash in Crash::several(cut, 3) {
                let after = sim.after_crash(crash);
                let what = format!("{formats:?}, {sizes:?}, cut at {cut} of {last}, {crash:?}");
                let now = content(&after.root(), "child").unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(now == before, "{what}");
                merge(&after).unwrap_or_else(|error| panic!("{error} ({what})"));
                let now = content(&after.root(), "base").unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(now == before, "merged again, {what}");
            }
        }
    }
}

/// Folds the child of [`pair`] down, going on from `mark`; each mark is kept there. `told` hears of everything.
fn take_in(sim: &Sim, mark: &mut Option<Mark>, told: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<(), Error> {
    let layers = gate::Gate::default().open_to_merge(&sim.root(), "child", None)?;
    let marks = Marks { from: *mark, every: 64 << 10 };
    let progress = &mut |progress: Progress| {
        *mark = progress.mark.or(*mark);
        told(progress)
    };
    let folded = fold_run(None, &layers[1..], &layers[0], Uuid::new_v4(), marks, progress, || Ok::<_, Error>(()));
    folded.map(drop).map_err(|error| match error {
        FoldError::Image(error) | FoldError::Commit(error) => error,
    })
}

#[test]
fn a_fold_that_was_cut_off_goes_on_from_its_mark() {
    let sizes = [(4 * MIB, 4 * MIB), (4 * MIB, 3 * MIB - SECTOR)];
    let mut went_on = 0;
    for (formats, sizes) in FORMATS.into_iter().flat_map(|formats| sizes.map(|sizes| (formats, sizes))) {
        let sim = Sim::new();
        let before = pair(&sim, formats, sizes);
        let first = sim.counts().operations;
        take_in(&sim, &mut None, &mut |_| ControlFlow::Continue(())).unwrap();
        assert!(content(&sim.root(), "base").unwrap() == before);
        let last = sim.counts().operations;
        for cut in first..last {
            let sim = Sim::new();
            let before = pair(&sim, formats, sizes);
            let mut mark = None;
            sim.cut(At::Operation(cut));
            assert!(take_in(&sim, &mut mark, &mut |_| ControlFlow::Continue(())).is_err());
            for crash in Crash::several(cut, 3) {
                let after = sim.after_crash(crash);
                let what = format!("{formats:?}, {sizes:?}, cut at {cut} of {last}, {crash:?}, {mark:?}");
                let mut begun = None;
                let told = &mut |progress: Progress| {
                    begun.get_or_insert(progress.done);
                    ControlFlow::Continue(())
                };
                take_in(&after, &mut mark.clone(), told).unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(content(&after.root(), "base").unwrap() == before, "{what}");
                went_on += u32::from(begun > Some(0));
            }
        }
    }
    assert!(went_on > 100, "{went_on}");
}

/// What an earlier fold has copied may be written over by another; its mark does not count any more then.
#[test]
fn a_mark_counts_for_no_other_fold() {
    for formats in FORMATS {
        let sim = Sim::new();
        let before = pair(&sim, formats, (4 * MIB, 4 * MIB));
        let mut begun = Vec::new();
        // Twice it is stopped when there is a mark; the second time it was not told of the first one's.
        for _ in 0..2 {
            let stop = &mut |progress: Progress| match progress.mark {
                Some(_) => ControlFlow::Break(()),
                None => ControlFlow::Continue(()),
            };
            let mut mark = None;
            take_in(&sim, &mut mark, stop).unwrap();
            begun.push(mark.expect("a mark"));
        }
        assert_ne!(begun[0].parent, begun[1].parent);
        for (mut mark, counts) in [(Some(begun[0]), false), (Some(begun[1]), true)] {
            let sim = sim.after_crash(Crash::Everything);
            let mut first = None;
            let told = &mut |progress: Progress| {
                first.get_or_insert(progress.done);
                ControlFlow::Continue(())
            };
            take_in(&sim, &mut mark, told).unwrap();
            assert_eq!(first > Some(0), counts, "{formats:?}");
            assert!(content(&sim.root(), "base").unwrap() == before, "{formats:?}");
        }
    }
}

/// Bottom, base and child of these sizes, each with data, zeros and nothing.
fn three(sim: &Sim, formats: [Format; 3], sizes: [u64; 3]) -> Vec<u8> {
    let folder = sim.root();
    drop(create_as(formats[0], &folder, "bottom", None, sizes[0]));
    fill(&folder, "bottom", &[(0, sizes[0], 1)]);
    drop(create_as(formats[1], &folder, "base", Some("bottom"), sizes[1]));
    fill(&folder, "base", &[(SECTOR, SECTOR, 4), (MIB, MIB + SECTOR, 5), (MIB / 2, 9 * SECTOR, 0), (0, SECTOR, 0)]);
    drop(create_as(formats[2], &folder, "child", Some("base"), sizes[2]));
    fill(&folder, "child", &[(0, 2 * SECTOR, 2), (MIB + MIB / 2, MIB, 3), (2 * MIB + MIB / 2, 7 * SECTOR, 0)]);
    content(&folder, "child").unwrap()
}

/// Folds the base of [`three`] up into the child, and makes it stand on the bottom.
fn lift(sim: &Sim) -> Result<(), Error> {
    let folder = sim.root();
    let mut layers = gate::Gate::default().open_to_merge(&folder, "child", None)?;
    let child = layers.pop().expect("a child");
    let go_on = &mut |_| ControlFlow::Continue(());
    let run = [Arc::clone(&layers[1]), Arc::clone(&child)];
    // A ledger commits here; without one the names in the files count.
    let outcome = fold_up(None, &layers[0], &run, go_on, || Ok::<_, Error>(()));
    let outcome = outcome.map_err(|error| match error {
        FoldError::Image(error) | FoldError::Commit(error) => error,
    })?;
    assert_eq!(outcome, Outcome::Folded);
    child.close()
}

/// An upward fold changes nothing but the child, and that reads the same at every moment; cut off, it goes on in either direction.
#[test]
fn wherever_an_upward_fold_is_cut_off_the_chain_reads_the_same_and_it_goes_on() {
    use Format::{Vhd, Vhdx};
    let sizes = [[4 * MIB; 3], [4 * MIB, 2 * MIB + SECTOR, 3 * MIB], [3 * MIB - SECTOR, 4 * MIB, 5 * MIB + SECTOR]];
    let formats = [[Vhdx; 3], [Vhd; 3], [Vhd, Vhdx, Vhdx], [Vhdx, Vhd, Vhdx], [Vhdx, Vhdx, Vhd]];
    for (formats, sizes) in formats.into_iter().flat_map(|formats| sizes.map(|sizes| (formats, sizes))) {
        let (first, last) = {
            let sim = Sim::new();
            let before = three(&sim, formats, sizes);
            let (first, base) = (sim.counts().operations, content(&sim.root(), "base").unwrap());
            lift(&sim).unwrap();
            assert!(content(&sim.root(), "child").unwrap() == before);
            assert!(content(&sim.root(), "base").unwrap() == base, "the base is not changed");
            let child = image::open(sim.root().open("child", Mode::Read).unwrap(), None, Mode::Read).unwrap();
            let link = child.info().parent.unwrap();
            assert_eq!((gate::parent_name(&link).as_deref(), link.linkage2), (Ok("bottom"), None));
            (first, sim.counts().operations)
        };
        for cut in (first..last).step_by(2) {
            let sim = Sim::new();
            let before = three(&sim, formats, sizes);
            sim.cut(At::Operation(cut));
            let whole = lift(&sim).is_ok();
            for crash in Crash::several(cut, 3) {
                let after = sim.after_crash(crash);
                let what = format!("{formats:?}, {sizes:?}, cut at {cut} of {last}, {crash:?}");
                let now = content(&after.root(), "child").unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(now == before, "{what}");
                let named = {
                    let child = image::open(after.root().open("child", Mode::Read).unwrap(), None, Mode::Read).unwrap();
                    gate::parent_name(&child.info().parent.unwrap()).unwrap()
                };
                let again = match named.as_str() {
                    "bottom" => Ok("child"),
                    _ if cut % 4 < 2 => lift(&after).map(|()| "child"),
                    _ => merge(&after).map(|()| "base"),
                };
                let again = again.unwrap_or_else(|error| panic!("{error} ({what})"));
                assert!(content(&after.root(), again).unwrap() == before, "folded again into {again}, {what}");
            }
            // All but the last step, which the chain does not need, was done.
            assert!(!whole || cut + 20 > last, "{cut} of {last}");
        }
    }
}

#[test]
fn a_merge_does_not_need_the_space_twice() {
    const SIZE: u64 = 512 * MIB;
    for formats in FORMATS {
        let sim = Sim::new();
        let folder = sim.root();
        drop(create_as(formats.0, &folder, "base", None, SIZE));
        drop(create_as(formats.1, &folder, "child", Some("base"), SIZE));
        fill(&folder, "child", &[(0, SIZE, 5)]);
        sim.set_capacity(Some(SIZE + 200 * MIB));
        merge(&sim).unwrap();
        assert!(content(&folder, "base").unwrap().iter().all(|byte| *byte == 5));
    }
}

/// What a layer hides beneath it by its end stays hidden when that layer grows with what is folded into it.
#[test]
fn a_merge_into_a_shorter_layer_brings_nothing_back_from_beneath_it() {
    for format in [Format::Vhdx, Format::Vhd] {
        for base in [2 * MIB, 10 * MIB] {
            let sim = Sim::new();
            let folder = sim.root();
            drop(create_as(format, &folder, "bottom", None, base));
            fill(&folder, "bottom", &[(0, base, 7)]);
            drop(create_as(format, &folder, "base", Some("bottom"), 2 * MIB + SECTOR));
            drop(create_as(format, &folder, "child", Some("base"), 64 * MIB));
            fill(&folder, "child", &[(5 * MIB, SECTOR, 3), (63 * MIB, SECTOR, 4)]);
            let before = content(&folder, "child").unwrap();
            assert!(before[(2 * MIB + SECTOR) as usize..(5 * MIB) as usize].iter().all(|byte| *byte == 0));
            merge(&sim).unwrap();
            assert!(content(&folder, "base").unwrap() == before, "{format:?}, {base}");
            let length = folder.open("base", Mode::Read).unwrap().len().unwrap();
            assert!(format == Format::Vhdx || length < base + 5 * MIB, "zeros take no place: {length}");
        }
    }
}

/// A raw file cannot take the id of the layer that is folded into it.
#[test]
fn what_stood_on_a_layer_that_is_folded_into_a_raw_base_stands_on_the_base() {
    let sim = Sim::new();
    let folder = sim.root();
    let base: Arc<dyn Layer> = image::raw::create(folder.create("base").unwrap(), 4 * MIB).unwrap();
    let over = |name: &str, parent: &Arc<dyn Layer>| -> Arc<dyn Layer> {
        let options = Options::differencing(&**parent, "parent").unwrap();
        vhdx::create(folder.create(name).unwrap(), &options).unwrap()
    };
    let child = over("child", &base);
    let chain = Chain::new(vec![Arc::clone(&base), Arc::clone(&child)], Access::Write).unwrap();
    chain.write(&[7; 4096], MIB).unwrap();
    let leaf = over("leaf", &child);
    chain.push(Arc::clone(&leaf)).unwrap();
    gate::check_link(&*leaf, &*child).unwrap();
    let go_on = &mut |_| ControlFlow::Continue(());
    let folded = fold_down(Some(&chain), &child, &base, Uuid::new_v4(), go_on, || Ok::<_, Error>(()));
    assert_eq!(folded.unwrap(), Outcome::Folded);
    gate::check_link(&*leaf, &*base).unwrap();
    let mut bytes = [0; 4096];
    chain.read(&mut bytes, MIB).unwrap();
    assert_eq!(bytes, [7; 4096]);
}

#[test]
fn blocks_that_become_zeros_give_up_their_places_however_little_room_there_is() {
    let sim = Sim::new();
    let folder = sim.root();
    let large = Options { block_size: 4 << 20, ..Options::dynamic(32 * MIB) };
    drop(vhdx::create(folder.create("base").unwrap(), &large).unwrap());
    fill(&folder, "base", &[(0, 32 * MIB, 1)]);
    drop(create(&folder, "child", Some("base"), 32 * MIB));
    fill(&folder, "child", &[(0, 32 * MIB, 0)]);
    let layers = gate::Gate::default().open_to_merge(&folder, "child", None).unwrap();
    let go_on = &mut |_| ControlFlow::Continue(());
    let moved = move_down(None, &layers, 1, Uuid::new_v4(), go_on, || Ok::<_, Error>(()));
    assert_eq!(moved.unwrap(), Outcome::Folded);
    let mut runs = Vec::new();
    layers[0].map(0, 32 * MIB, &mut runs).unwrap();
    assert!(runs.iter().all(|run| !matches!(run.source, image::Source::Data(_))), "{runs:?}");
}

#[test]
fn disks_are_compared_by_what_was_written_over_their_base() {
    let sim = Sim::new();
    let folder = sim.root();
    drop(create(&folder, "base", None, 64 * MIB));
    fill(&folder, "base", &[(0, 64 * MIB, 1)]);
    for name in ["one", "other"] {
        drop(create(&folder, name, Some("base"), 64 * MIB));
    }
    // Different, the same in two ways, and zeros against data.
    fill(&folder, "one", &[(MIB, SECTOR, 2), (5 * MIB, 4096, 3), (9 * MIB, MIB, 0)]);
    fill(&folder, "other", &[(5 * MIB, 4096, 3), (20 * MIB + SECTOR, SECTOR, 9)]);
    let open = |name: &str| Chain::new(gate::open_chain(&folder, name, Mode::Read).unwrap(), Access::Read).unwrap();
    let (one, other) = (open("one"), open("other"));
    let before = sim.counts().reads;
    let mut found = Vec::new();
    assert!(compare::compare(&one, &other, &mut |_, _| true, |at, len| found.push((at, len))).unwrap());
    assert_eq!(found, [(MIB, SECTOR), (9 * MIB, MIB), (20 * MIB + SECTOR, SECTOR)]);
    assert!(sim.counts().reads - before < 40, "what they share is not read");
    let stopped = compare::compare(&one, &other, &mut |_, _| false, |_, _| ());
    assert!(!stopped.unwrap());
}

#[test]
fn siblings_know_who_stands_on_whom() {
    let sim = Sim::new();
    let folder = sim.root();
    drop(create(&folder, "base.vhdx", None, 4 * MIB));
    drop(create(&folder, "child.avhdx", Some("base.vhdx"), 4 * MIB));
    folder.create("notes.txt").unwrap().write_at(b"not an image", 0).unwrap();
    folder.create("broken.vhdx").unwrap().write_at(b"vhdxfile", 0).unwrap();
    let siblings = Siblings::of(&*folder).unwrap();
    assert_eq!(siblings.unread, ["broken.vhdx"]);
    let id = |name: &str| siblings.images.iter().find(|image| image.name == name).unwrap().info.data_id;
    let children =
        |name: &'static str| siblings.children(name, id(name)).map(|child| child.name.as_str()).collect::<Vec<_>>();
    assert_eq!(children("base.vhdx"), ["child.avhdx"]);
    assert_eq!(children("child.avhdx"), [""; 0]);
    // By its id also under another name.
    let renamed: Vec<_> = siblings.children("moved.vhdx", id("base.vhdx")).map(|child| child.name.as_str()).collect();
    assert_eq!(renamed, ["child.avhdx"]);
}

#[test]
fn another_parent_is_taken_by_force_only_and_is_remembered() {
    let sim = Sim::new();
    let folder = sim.root();
    let base = create(&folder, "base", None, 4 * MIB);
    let first = base.info().data_id;
    drop(base);
    drop(create(&folder, "other", None, 4 * MIB));
    drop(create(&folder, "child", Some("base"), 4 * MIB));
    let open = |name: &str, mode| vhdx::open(folder.open(name, mode).unwrap(), mode).unwrap();
    let other = open("other", Mode::Read);
    let child = open("child", Mode::Write);
    assert!(examine(&*child, &*open("base", Mode::Read)).unwrap().fits);
    assert_eq!(reconnect(&*child, &*other, "other", false).unwrap_err().kind, ErrorKind::Parent);
    assert_eq!((child.info().parent.unwrap().linkage, child.forced()), (first, None));
    assert!(!reconnect(&*child, &*other, "other", true).unwrap().fits);
    drop(child);
    let child = open("child", Mode::Write);
    let link = child.info().parent.unwrap();
    assert_eq!((link.linkage, child.forced()), (other.info().data_id, Some(first)));
    assert_eq!(gate::parent_name(&link).unwrap(), "other");
    // The other way round it is the first one that is remembered.
    reconnect(&*child, &*open("base", Mode::Read), "base", true).unwrap();
    assert_eq!(open("child", Mode::Read).forced(), Some(first));
    assert_eq!(examine(&*other, &*child).unwrap_err().kind, ErrorKind::Parent);
}
