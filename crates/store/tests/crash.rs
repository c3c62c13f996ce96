//! The simulated disk loses what was not synced, tears, and fails when it is told to.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use store::sim::{At, Crash, Sim, Times};
use store::{ErrorKind, Folder, Lock, Mode, Result, Store};

fn bytes(sim: &Sim, name: &str) -> Option<Vec<u8>> {
    let file = sim.root().open(name, Mode::Read).ok()?;
    let mut data = vec![0; file.len().expect("length") as usize];
    file.read_at(&mut data, 0).expect("read");
    Some(data)
}

/// A disk with a durable file `a` of `len` ones.
fn disk(len: usize) -> (Sim, Arc<dyn Folder>, Arc<dyn Store>) {
    let sim = Sim::new();
    let root = sim.root();
    let file = root.create("a").expect("create");
    file.write_at(&vec![1; len], 0).expect("write");
    file.sync().expect("sync");
    root.sync().expect("sync");
    (sim, root, file)
}

fn states(sim: &Sim, name: &str) -> BTreeSet<Option<Vec<u8>>> {
    Crash::several(7, 500).map(|crash| bytes(&sim.after_crash(crash), name)).collect()
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("should fail").kind
}

#[test]
fn what_was_synced_stays() {
    let (sim, _root, _file) = disk(5000);
    assert_eq!(sim.unsynced(), 0);
    assert_eq!(states(&sim, "a"), BTreeSet::from([Some(vec![1; 5000])]));
}

#[test]
fn what_was_not_synced_may_go() {
    let (sim, _root, file) = disk(512);
    file.write_at(&[2; 512], 0).expect("write");
    assert_eq!(bytes(&sim, "a"), Some(vec![2; 512]), "reads see it");
    assert_eq!(states(&sim, "a"), BTreeSet::from([Some(vec![1; 512]), Some(vec![2; 512])]));
    assert_eq!(bytes(&sim.after_crash(Crash::Nothing), "a"), Some(vec![1; 512]));
    assert_eq!(bytes(&sim.after_crash(Crash::Everything), "a"), Some(vec![2; 512]));
}

#[test]
fn writes_tear_between_sectors_only() {
    let (sim, _root, file) = disk(2048);
    file.write_at(&[2; 2048], 0).expect("write");
    let seen = states(&sim, "a");
    assert_eq!(seen.len(), 16, "each of four sectors is old or new");
    for state in seen {
        let state = state.expect("the file is there");
        assert!(state.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
    }
}

#[test]
fn a_sector_survives_with_any_content_that_it_had() {
    let (sim, _root, file) = disk(512);
    file.write_at(&[2; 100], 0).expect("write");
    file.write_at(&[3; 100], 50).expect("write");
    file.punch(0, 60).expect("punch");
    let mut versions = vec![vec![1; 512]];
    for change in [(0, 100, 2), (50, 150, 3), (0, 60, 0)] {
        let mut next: Vec<u8> = versions.last().expect("one").clone();
        next[change.0..change.1].fill(change.2);
        versions.push(next);
    }
    // A sector goes to the device as the cache holds it: later versions hold the earlier changes.
    assert_eq!(states(&sim, "a"), versions.into_iter().map(Some).collect());
}

#[test]
fn later_writes_may_overtake_earlier_ones() {
    let (sim, root, file) = disk(512);
    let other = root.create("b").expect("create");
    root.sync().expect("sync");
    file.write_at(&[2; 512], 0).expect("write");
    other.write_at(&[9; 512], 0).expect("write");
    let overtaken = sim.after_crash(Crash::Hold { operation: 0 });
    assert_eq!((bytes(&overtaken, "a"), bytes(&overtaken, "b")), (Some(vec![1; 512]), Some(vec![9; 512])));
    let ordered = sim.after_crash(Crash::Prefix { operations: 1, sectors: 0 });
    assert_eq!((bytes(&ordered, "a"), bytes(&ordered, "b")), (Some(vec![2; 512]), Some(vec![])));
}

#[test]
fn a_length_survives_apart_from_the_data() {
    let (sim, _root, file) = disk(512);
    file.write_at(&[2; 512], 512).expect("write");
    let zeros = [vec![1; 512], vec![0; 512]].concat();
    let whole = [vec![1; 512], vec![2; 512]].concat();
    assert_eq!(states(&sim, "a"), [vec![1; 512], zeros, whole].into_iter().map(Some).collect());
}

#[test]
fn what_a_shrink_cut_off_does_not_come_back_zeroed_halfway() {
    let (sim, _root, file) = disk(1024);
    file.set_len(100).expect("shrink");
    file.set_len(1024).expect("grow");
    let cut = [vec![1; 100], vec![0; 924]].concat();
    assert_eq!(states(&sim, "a"), [vec![1; 1024], vec![1; 100], cut].into_iter().map(Some).collect());
}

#[test]
fn punches_are_lost_page_by_page() {
    let (sim, _root, file) = disk(3 * 4096);
    file.punch(100, 3 * 4096 - 200).expect("punch");
    for state in states(&sim, "a") {
        let state = state.expect("the file is there");
        assert!(state[..100].iter().chain(&state[3 * 4096 - 100..]).all(|byte| *byte == 1));
    }
    assert_eq!(states(&sim, "a").len(), 8, "each of three pages");
    file.sync().expect("sync");
    assert_eq!(states(&sim, "a").len(), 1);
}

#[test]
fn names_need_their_folder_synced() {
    let (sim, root, _file) = disk(1);
    let file = root.create("b").expect("create");
    file.write_at(&[1], 0).expect("write");
    file.sync().expect("sync");
    assert_eq!(states(&sim, "b"), BTreeSet::from([None, Some(vec![1])]));
    root.sync().expect("sync");
    assert_eq!(states(&sim, "b"), BTreeSet::from([Some(vec![1])]));
    root.unlink("b").expect("unlink");
    assert_eq!(states(&sim, "b"), BTreeSet::from([None, Some(vec![1])]));
    root.sync().expect("sync");
    assert_eq!(states(&sim, "b"), BTreeSet::from([None]));
}

#[test]
fn a_rename_is_atomic() {
    let (sim, root, _file) = disk(1);
    let file = root.create("new").expect("create");
    file.write_at(&[2], 0).expect("write");
    file.sync().expect("sync");
    root.rename("new", "a").expect("rename");
    let mut seen = BTreeSet::new();
    for crash in Crash::several(3, 300) {
        let after = sim.after_crash(crash);
        seen.insert((bytes(&after, "a"), bytes(&after, "new")));
    }
    let old_and_both = (Some(vec![1]), Some(vec![2]));
    assert_eq!(seen, BTreeSet::from([(Some(vec![1]), None), old_and_both, (Some(vec![2]), None)]));
}

#[test]
fn a_folder_is_lost_with_what_is_in_it() {
    let (sim, root, _file) = disk(1);
    let folder = root.create_folder("f").expect("create folder");
    folder.create("x").expect("create").sync().expect("sync");
    folder.sync().expect("sync");
    let lost = sim.after_crash(Crash::Nothing);
    assert_eq!(lost.root().list().expect("list"), ["a"]);
    root.sync().expect("sync");
    let kept = sim.after_crash(Crash::Nothing);
    assert_eq!(kept.root().folder("f").expect("folder").list().expect("list"), ["x"]);
}

#[test]
fn nothing_works_after_the_cut() {
    let (sim, root, file) = disk(512);
    let before = sim.counts();
    sim.cut(At::Operation(before.operations + 1));
    file.write_at(&[2; 512], 0).expect("one before");
    assert_eq!(kind(file.sync()), ErrorKind::PowerLost);
    assert!(!sim.powered());
    assert_eq!(kind(file.write_at(&[3; 512], 0)), ErrorKind::PowerLost);
    assert_eq!(kind(file.read_at(&mut [0], 0)), ErrorKind::PowerLost);
    assert_eq!(kind(file.len()), ErrorKind::PowerLost);
    assert_eq!(kind(file.lock(Lock::Shared)), ErrorKind::PowerLost);
    assert_eq!(kind(root.list()), ErrorKind::PowerLost);
    assert_eq!(kind(root.create("b")), ErrorKind::PowerLost);
    assert_eq!(
        states(&sim, "a"),
        BTreeSet::from([Some(vec![1; 512]), Some(vec![2; 512])]),
        "the sync did not take place"
    );
    let after = sim.after_crash(Crash::Everything);
    assert!(after.powered());
    after.root().open("a", Mode::Write).expect("open").lock(Lock::Exclusive).expect("locks are gone");
}

#[test]
fn the_operation_under_way_may_have_taken_place() {
    let (sim, root, file) = disk(512);
    sim.cut(At::Operation(sim.counts().operations));
    assert_eq!(kind(file.write_at(&[2; 512], 0)), ErrorKind::PowerLost);
    assert_eq!(states(&sim, "a").len(), 2);
    drop(root);
    let (sim, root, _file) = disk(512);
    sim.cut(At::Operation(sim.counts().operations));
    assert_eq!(kind(root.rename("a", "b")), ErrorKind::PowerLost);
    assert_eq!(states(&sim, "b"), BTreeSet::from([None, Some(vec![1; 512])]));
}

#[test]
fn faults_hit_their_operation() {
    let (sim, root, file) = disk(512);
    let start = sim.counts();
    sim.fail(At::Operation(start.operations), ErrorKind::Io, Times::Once);
    assert_eq!(kind(file.set_len(7)), ErrorKind::Io);
    assert_eq!(file.len().expect("length"), 512, "nothing was done");
    file.set_len(512).expect("only once");
    sim.fail(At::Read(start.reads + 1), ErrorKind::Io, Times::Forever);
    file.read_at(&mut [0], 0).expect("not yet");
    assert_eq!(kind(file.read_at(&mut [0], 0)), ErrorKind::Io);
    assert_eq!(kind(file.read_at(&mut [0], 0)), ErrorKind::Io);
    sim.fail(At::Operation(0), ErrorKind::NoSpace, Times::Forever);
    assert_eq!(kind(root.create("b")), ErrorKind::NoSpace);
    assert_eq!(kind(file.write_at(&[1], 0)), ErrorKind::NoSpace);
    sim.heal();
    root.create("b").expect("create");
}

#[test]
fn a_failed_write_may_have_written_a_part() {
    let mut parts = BTreeSet::new();
    for before in 0..100 {
        let (sim, _root, file) = disk(8 * 512);
        for _ in 0..before {
            file.set_len(8 * 512).expect("set length");
        }
        sim.fail(At::Operation(sim.counts().operations), ErrorKind::Io, Times::Once);
        assert_eq!(kind(file.write_at(&[2; 7 * 512], 100)), ErrorKind::Io);
        let written = bytes(&sim, "a").expect("there").iter().skip(100).take_while(|byte| **byte == 2).count();
        parts.insert(written);
    }
    // A sector is written whole or not at all.
    assert!(parts.iter().copied().eq((0..=7).map(|sectors| (sectors * 512_usize).saturating_sub(100))), "{parts:?}");
}

#[test]
fn a_failed_sync_is_never_made_good() {
    let (sim, root, file) = disk(8 * 512);
    file.write_at(&[2; 8 * 512], 0).expect("write");
    sim.fail(At::Sync(sim.counts().syncs), ErrorKind::Io, Times::Once);
    assert_eq!(kind(file.sync()), ErrorKind::Io);
    assert_eq!(kind(file.sync()), ErrorKind::Io, "the handle remembers");
    root.open("a", Mode::Write).expect("open").sync().expect("another handle is told nothing");
    assert_eq!(bytes(&sim, "a"), Some(vec![2; 8 * 512]), "reads see the new content");
    let after = bytes(&sim.after_crash(Crash::Everything), "a").expect("there");
    assert!(after.contains(&1), "some of it never got to the disk");
    assert_eq!(states(&sim, "a"), BTreeSet::from([Some(after)]));
}

#[test]
fn a_full_disk_says_so() {
    let (sim, root, file) = disk(4096);
    sim.set_capacity(Some(2 * 4096));
    let other = root.create("b").expect("create");
    other.write_at(&[1; 4096], 0).expect("fits");
    assert_eq!(kind(other.write_at(&[1], 4096)), ErrorKind::NoSpace);
    assert_eq!(other.allocated().expect("allocated"), 4096);
    file.write_at(&[3; 4096], 0).expect("what has its place can be written");
    drop(file);
    root.unlink("a").expect("unlink");
    other.write_at(&[1], 4096).expect("room again");
    other.punch(0, 4096).expect("punch");
    other.write_at(&[1], 8192).expect("and again");
}

/// Two names of one file, each as durable as its own folder; the file lives as long as one of them.
#[test]
fn a_link_is_a_name_like_any_other() {
    let (sim, root, file) = disk(4096);
    let other = root.create_folder("other").expect("create");
    root.sync().expect("sync");
    root.link("a", &*other, "b").expect("link");
    assert_eq!((root.links("a").expect("links"), other.links("b").expect("links")), (2, 2));
    assert_eq!(kind(root.link("a", &*other, "b")), ErrorKind::Exists);
    assert_eq!(kind(root.link("none", &*other, "c")), ErrorKind::NotFound);
    assert_eq!(kind(root.link("other", &*root, "c")), ErrorKind::WrongType);
    assert_eq!(kind(root.link("a", &*Sim::new().root(), "c")), ErrorKind::CannotLink, "another disk");
    let linked = |sim: &Sim| sim.root().folder("other").expect("there").open("b", Mode::Read).is_ok();
    let seen: BTreeSet<bool> = Crash::several(7, 50).map(|crash| linked(&sim.after_crash(crash))).collect();
    assert_eq!(seen, BTreeSet::from([false, true]), "nobody has synced the folder");
    other.sync().expect("sync");
    root.unlink("a").expect("unlink");
    assert_eq!(other.links("b").expect("links"), 1);
    file.write_at(&[2; 4096], 0).expect("it lives");
    file.sync().expect("sync");
    for crash in Crash::several(8, 50) {
        let after = sim.after_crash(crash);
        let there = after.root().folder("other").expect("there").open("b", Mode::Read).expect("there");
        let mut data = [0; 4096];
        there.read_at(&mut data, 0).expect("read");
        assert_eq!(data, [2; 4096], "{crash:?}");
    }
}

#[test]
fn digests_tell_states_apart() {
    let (sim, root, file) = disk(4096);
    let first = sim.digest();
    file.write_at(&[0; 4096], 8192).expect("write zeros");
    let longer = sim.digest();
    assert_ne!(first, longer);
    file.punch(8192, 4096).expect("punch");
    assert_eq!(sim.digest(), longer, "zeros are zeros");
    root.rename("a", "b").expect("rename");
    assert_ne!(sim.digest(), longer);
}

#[test]
fn the_same_seed_is_the_same_crash() {
    let (sim, root, file) = disk(4096);
    file.write_at(&[2; 4096], 1000).expect("write");
    root.create("b").expect("create").write_at(&[7; 3000], 5).expect("write");
    let digests = |seed| Crash::several(seed, 100).map(|crash| sim.after_crash(crash).digest()).collect::<Vec<_>>();
    assert_eq!(digests(1), digests(1));
    assert_ne!(digests(1), digests(2));
    assert!(digests(1).iter().collect::<BTreeSet<_>>().len() > 25);
}

/// What a file holds besides holes is found, wherever one begins to look.
#[test]
fn holes_are_told_from_data() {
    let file = Sim::new().root().create("a").expect("create");
    file.set_len(100_000).expect("length");
    assert_eq!(file.data(0).expect("data"), None);
    file.write_at(&[1; 10], 5000).expect("write");
    file.write_at(&[2; 9000], 16_000).expect("write");
    let found: Vec<_> = [0, 4096, 5000, 8192, 20_000].iter().map(|at| file.data(*at).expect("data")).collect();
    let first = Some((4096, 8192));
    assert_eq!(found, [first, first, Some((5000, 8192)), Some((12_288, 28_672)), Some((20_000, 28_672))]);
    assert_eq!(file.data(28_672).expect("data"), None);
    file.punch(4096, 4096).expect("punch");
    assert_eq!(file.data(0).expect("data"), Some((12_288, 28_672)));
}

/// A copy taken before an operation crashes as the disk itself would, cut off in the middle of that one.
#[test]
fn a_copy_is_the_disk_as_it_was_then() {
    let copies = Arc::new(Mutex::new(Vec::new()));
    let life = |sim: &Sim, file: &dyn Store| -> Result<()> {
        file.write_at(&[2; 700], 100)?;
        file.set_len(3000)?;
        file.sync()?;
        sim.root().rename("a", "b")?;
        file.write_at(&[3; 700], 2900)?;
        sim.root().sync()
    };
    let (sim, _root, file) = disk(2048);
    let first = sim.counts().operations;
    let taken = Arc::clone(&copies);
    sim.copy_before((first..first + 9).collect(), move |at, copy| taken.lock().expect("not poisoned").push((at, copy)));
    life(&sim, &*file).expect("it lives");
    let copies = std::mem::take(&mut *copies.lock().expect("not poisoned"));
    assert!(copies.iter().map(|(at, _)| *at).eq(first..sim.counts().operations));
    for (at, copy) in copies {
        let (cut, _root, file) = disk(2048);
        // A sync that is cut off has done nothing.
        cut.cut(At::Operation(at - 1));
        let synced = life(&cut, &*file).is_err_and(|error| error.operation == "sync");
        if synced || at == first {
            continue;
        }
        for crash in Crash::several(at, 50) {
            let (after, again) = (copy.after_crash(crash), cut.after_crash(crash));
            assert_eq!(after.digest(), again.digest(), "before {at}, {crash:?}");
        }
    }
}

#[test]
fn a_sync_that_did_nothing_can_be_looked_at() {
    let (sim, root, file) = disk(512);
    sim.remember_syncs();
    file.write_at(&[2; 512], 0).expect("write");
    file.sync().expect("sync");
    file.write_at(&[3; 512], 512).expect("write");
    root.rename("a", "b").expect("rename");
    root.sync().expect("sync");
    root.rename("b", "c").expect("rename");
    let [of_names, of_file] = &*sim.last_syncs() else { panic!("two syncs are remembered") };
    let (first, second) = ([[1; 512], [2; 512]], [[0; 512], [3; 512]]);

    let without = sim.without_sync(of_file.operation).expect("remembered");
    let of = |start: [u8; 512], then: Option<[u8; 512]>| {
        Some([start.as_slice(), then.as_ref().map_or(&[], |then| then)].concat())
    };
    let all = |starts: &[[u8; 512]]| -> BTreeSet<_> {
        let ends = [None, Some(second[0]), Some(second[1])];
        starts.iter().flat_map(|start| ends.map(|end| of(*start, end))).collect()
    };
    let seen = |sim: &Sim| -> BTreeSet<_> {
        ["b", "c"].iter().flat_map(|name| states(sim, name)).flatten().map(Some).collect()
    };
    assert_eq!(seen(&without.open), all(&first), "it may be lost, and what came later as well");
    assert_eq!(seen(&without.lost), all(&first[..1]), "it is lost, and what came later may be there");

    let without = sim.without_sync(of_names.operation).expect("remembered");
    let names = |sim: &Sim| -> BTreeSet<_> {
        Crash::several(7, 500).flat_map(|crash| sim.after_crash(crash).root().list().expect("a list")).collect()
    };
    assert_eq!(names(&without.open), ["a", "b", "c"].map(String::from).into());
    assert_eq!(names(&without.lost), ["a".to_owned()].into(), "a name does not change without what came before");
}
