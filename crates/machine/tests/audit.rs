//! An audit of a machine's files names what is wrong with them, and whom that concerns.

#[expect(dead_code, reason = "each test uses a part of the samples")]
mod sample;

use machine::audit::{Audit, Compared, Finding, Looked, audit, deep};
use machine::carry::Carries;
use machine::collect::Begin;
use machine::files::Files;
use machine::hashing::{Known, Manner};
use machine::job::{Cancel, Task};
use machine::keeper::Keeper;
use machine::ledger::Ledger;
use machine::plan::{Take, Written};
use machine::ram;
use machine::records::{Recorded, downwards};
use machine::request::{Problem, ProblemKind};
use machine::steps::Steps;
use machine::tree::{JobId, LayerFormat, LayerId, LayerRow, Machine, State, Stats};
use memory::stream::PAGE;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use store::sim::{At, Crash, Sim, Times};
use store::{ErrorKind, Mode};

/// A machine with a base, two snapshots in a row, and Now.
struct Lab {
    files: Files,
    machine: Machine,
}

impl Lab {
    fn new() -> Self {
        let sim = Sim::new();
        let files = Files::new(sim.root(), Path::new("/lab"));
        files.create_folders().expect("folders");
        let mut machine = sample::machine(1);
        for row in machine.layers.values_mut() {
            row.file = format!("disks/{}.vhdx", row.id);
            files.create_layer(row, 4 << 20, None, None).expect("a base").close().expect("closed");
        }
        Ledger::create(files.folder(), &machine).expect("a ledger").close();
        let keeper = Keeper::open(&files, Carries::new(Sim::new().root(), uuid::Uuid::nil()), Steps::default());
        let keeper = keeper.expect("opens");
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        for name in ["Monday", "Tuesday"] {
            let task = keeper.jobs().open(JobId::new(), "lab", "snapshot").expect("a fresh job");
            runtime.block_on(keeper.snapshot_still(&task, sample::take(name), &Value::Null)).expect("taken");
        }
        let machine = keeper.rows().machine.clone();
        Self { files, machine }
    }

    fn audit(&self) -> Audit {
        audit(&self.machine, &self.files, false, &[]).expect("audited")
    }

    /// The layers of Now, base first.
    fn chain(&self) -> Vec<LayerId> {
        self.machine.chain(*self.machine.now.disks.values().next().expect("a disk"))
    }

    fn file(&self, id: LayerId) -> (std::sync::Arc<dyn store::Folder>, String) {
        let (folder, name) = self.machine.layers[&id].file.split_once('/').expect("in a folder");
        (self.files.folder().folder(folder).expect("a folder"), name.to_owned())
    }
}

/// Kinds and effects.
fn told(audit: &Audit) -> Vec<(&str, &str)> {
    audit.findings.iter().map(|finding| (finding.kind, finding.effect.as_str())).collect()
}

#[test]
fn sound_files_are_clean() {
    let lab = Lab::new();
    let audit = lab.audit();
    assert_eq!((audit.clean, audit.files, audit.findings), (true, 3, Vec::new()));
}

#[test]
fn a_file_that_is_gone_concerns_what_stands_on_it() {
    let lab = Lab::new();
    let (folder, name) = lab.file(lab.chain()[1]);
    folder.unlink(&name).expect("removed");
    let audit = lab.audit();
    assert!(!audit.clean);
    assert_eq!(told(&audit), [("missing", "Tuesday, Now cannot be relied on")]);
    assert!(audit.findings[0].place.ends_with(&name), "{audit:?}");
}

#[test]
fn a_file_that_is_gone_concerns_what_can_be_taken_back() {
    let mut lab = Lab::new();
    let (folder, name) = lab.file(lab.chain()[0]);
    folder.unlink(&name).expect("removed");
    let monday = lab.machine.resolve("Monday").expect("it is there");
    lab.machine.policy.undo_for = 60;
    lab.machine.throw_away(monday, true, jiff::Timestamp::UNIX_EPOCH);
    let words = "Now, what can be taken back (deleted Monday and Tuesday) cannot be relied on";
    assert_eq!(told(&lab.audit()), [("missing", words)]);
}

#[test]
fn a_file_that_is_cut_or_overwritten_is_damaged() {
    for harm in [
        |store: &dyn store::Store| store.set_len(100 << 10),
        |store: &dyn store::Store| store.write_at(&vec![7; 1 << 20], 0),
        |store: &dyn store::Store| store.set_len(0),
    ] {
        let lab = Lab::new();
        let (folder, name) = lab.file(lab.chain()[0]);
        harm(&*folder.open(&name, Mode::Write).expect("opens")).expect("harmed");
        let audit = lab.audit();
        assert!(!audit.clean);
        assert!(audit.findings.iter().all(|found| found.kind == "damaged"), "{audit:?}");
        assert_eq!(audit.findings[0].effect, "Monday, Tuesday, Now cannot be relied on");
    }
}

#[test]
fn a_file_in_the_place_of_another_is_noticed() {
    let lab = Lab::new();
    let (folder, name) = lab.file(lab.chain()[0]);
    folder.unlink(&name).expect("removed");
    let row = &lab.machine.layers[&lab.chain()[0]];
    lab.files.create_layer(row, 4 << 20, None, None).expect("another").close().expect("closed");
    let audit = lab.audit();
    assert_eq!(told(&audit), [("parent", "Tuesday, Now cannot be relied on")]);
    assert!(audit.findings[0].what.contains("is not the parent"), "{audit:?}");
}

#[test]
fn a_file_that_nobody_knows_is_only_said() {
    let lab = Lab::new();
    lab.files.folder().folder("disks").and_then(|disks| disks.create("mine.vhdx")).expect("made");
    let audit = lab.audit();
    assert!(audit.clean);
    assert_eq!(told(&audit), [("unknown", "none: nothing needs it")]);
}

/// A machine whose disks have content that differs from snapshot to snapshot: with bases of these formats, and memory.
struct Deep {
    sim: Sim,
    files: Files,
    keeper: Keeper,
    known: Known,
    runtime: tokio::runtime::Runtime,
    /// A raw base's file.
    _outside: tempfile::TempDir,
}

/// A block of the disk, bytes: what is hashed as one.
const BLOCK: u64 = 2 << 20;
/// Size of the disks, in the middle of a block.
const SIZE: u64 = 4 * BLOCK + 4096;

impl Deep {
    fn new(format: LayerFormat) -> Self {
        Self::watched(format, Steps::default())
    }

    fn watched(format: LayerFormat, steps: Steps) -> Self {
        let mut deep = Self::bare(format, SIZE, steps);
        // Monday has all blocks but the last, Tuesday a sector of the first and all of the second, Wednesday nothing of its own.
        for (name, writes) in
            [("Monday", &[(0, 4 * BLOCK)][..]), ("Tuesday", &[(4096, 512), (BLOCK, BLOCK)]), ("Wednesday", &[])]
        {
            deep.write(writes, name.as_bytes()[0]);
            deep.snapshot(name);
        }
        deep
    }

    /// Without any content.
    fn bare(format: LayerFormat, size: u64, steps: Steps) -> Self {
        let (sim, outside) = (Sim::new(), tempfile::tempdir().expect("a folder"));
        let files = Files::new(sim.root(), Path::new("/lab"));
        files.create_folders().expect("folders");
        let mut machine = sample::machine(1);
        for row in machine.layers.values_mut() {
            (row.format, row.file) = (format, format!("disks/{}.{format}", row.id));
            if format == LayerFormat::Raw {
                let path = outside.path().join("base.raw");
                std::fs::write(&path, vec![0; size as usize]).expect("room");
                (row.in_place, row.file) = (true, path.to_string_lossy().into_owned());
            } else {
                files.create_layer(row, size, None, None).expect("a base").close().expect("closed");
            }
        }
        files.sync_names().expect("names");
        Ledger::create(files.folder(), &machine).expect("a ledger").close();
        let keeper = Keeper::open(&files, Carries::new(Sim::new().root(), uuid::Uuid::nil()), steps);
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let known = Known::default();
        Self { sim, files, keeper: keeper.expect("opens"), known, runtime, _outside: outside }
    }

    fn machine(&self) -> Machine {
        self.keeper.rows().machine.clone()
    }

    /// A guest that runs for a moment and writes.
    fn write(&mut self, writes: &[(u64, u64)], byte: u8) {
        let disks = self.keeper.open_disks(&self.machine()).expect("opens");
        for (_, chain) in disks.chains() {
            for (at, len) in writes {
                chain.write(&vec![byte; *len as usize], *at).expect("written");
            }
        }
        disks.close().expect("closed");
    }

    fn task(&self, kind: &str) -> Task {
        self.keeper.jobs().open(JobId::new(), "lab", kind).expect("a fresh job")
    }

    fn snapshot(&self, name: &str) {
        let (task, take) = (self.task("snapshot"), sample::take(name));
        self.runtime.block_on(self.keeper.snapshot_still(&task, take, &Value::Null)).expect("taken");
    }

    fn delete(&self, name: &str) {
        self.keeper.delete(&self.task("delete"), name, false).expect("deleted");
        self.collect();
    }

    fn collect(&self) {
        self.keeper.remove_garbage().expect("removed");
        while let Some(folding) = self.keeper.next_fold(None, Begin::default()).expect("begun") {
            let folded = self.keeper.fold(folding, &Cancel::default());
            self.keeper.folded(&folded, None).expect("folded");
        }
    }

    fn hash(&mut self) -> bool {
        self.keeper.hash(&mut self.known, &Manner::default(), &Cancel::default()).expect("hashed")
    }

    /// What a deep look says, without progress.
    fn deep(&self) -> (Compared, Vec<Finding>) {
        let mut look = || Ok(Looked { machine: self.machine(), worker: false });
        deep(&self.files, &mut look, &mut |_, _| true).expect("compared")
    }

    /// A guest with RAM of these bytes, one a page, over what another memory holds, is saved; and that becomes a snapshot.
    fn save(&self, name: &str, ram: &[u8], over: Option<&LayerRow>) -> LayerRow {
        self.keeper.book().commit(|rows| rows.machine.now.memory_base = over.map(|row| row.id)).expect("committed");
        let target = ram::Target::new(&self.files, &self.machine(), self.keeper.memory_row());
        let (layer, captured) = target.capture(stream(ram).as_slice(), |_| {}).expect("captured");
        captured.chain.close().expect("closed");
        let written = Written { layer: layer.clone(), stats: Stats::default() };
        self.keeper.book().commit(|rows| rows.machine.save(written)).expect("committed");
        let take = Take { memory: Some(layer.id), vm_state: State::Saved, ..sample::take(name) };
        self.runtime.block_on(self.keeper.snapshot_still(&self.task("snapshot"), take, &Value::Null)).expect("taken");
        layer
    }

    /// The layer of the snapshot of this name.
    fn layer(&self, name: &str) -> LayerRow {
        let machine = self.machine();
        let snapshot = machine.snapshots.values().find(|snapshot| snapshot.name == name).expect("a snapshot");
        machine.layers[snapshot.disks.values().next().expect("a disk")].clone()
    }

    /// Changes a byte of what a layer's file holds of the disk at `at`.
    fn flip(&self, row: &LayerRow, at: u64) {
        let layer = self.files.open_layer(row, Mode::Read).expect("opens");
        let mut runs = Vec::new();
        layer.map(at / 4096 * 4096, 4096, &mut runs).expect("mapped");
        let run = runs.iter().find(|run| (run.offset..run.offset + run.len).contains(&at)).expect("a run");
        let image::Source::Data(place) = run.source else { panic!("{run:?} holds nothing") };
        let (place, mut byte) = (place + (at - run.offset), [0]);
        layer.store().read_at(&mut byte, place).expect("read");
        if row.in_place {
            let file = store::host::open_file(Path::new(&row.file), Mode::Write).expect("a file");
            return file.write_at(&[!byte[0]], place).expect("changed");
        }
        let (folder, name) = row.file.split_once('/').expect("in a folder");
        let file = self.files.folder().folder(folder).and_then(|folder| folder.open(name, Mode::Write));
        file.and_then(|file| file.write_at(&[!byte[0]], place)).expect("changed");
    }

    fn place(&self, row: &LayerRow) -> String {
        self.files.layer_path(row).display().to_string()
    }
}

/// Where the first page of RAM lies on a memory disk.
const RAM: u64 = memory::table::STEP;

/// As QEMU would send it.
fn stream(ram: &[u8]) -> Vec<u8> {
    let pages: Vec<u32> = ram.iter().map(|byte| u32::from_le_bytes([*byte; 4])).collect();
    sample::ram(&pages)
}

const FORMATS: [LayerFormat; 3] = [LayerFormat::Vhdx, LayerFormat::Vhd, LayerFormat::Raw];

#[test]
fn what_is_recorded_is_compared_and_what_is_not_is_named() {
    for format in FORMATS {
        let mut lab = Deep::new(format);
        let (compared, findings) = lab.deep();
        assert_eq!((compared.layers, compared.sealed, compared.bytes), (0, 3, 0), "{format}");
        assert!(findings.len() == 3 && findings.iter().all(|found| found.kind == "unhashed" && found.is_note()));
        assert!(lab.hash());
        let (compared, findings) = lab.deep();
        assert_eq!((compared.layers, compared.sealed, findings), (3, 3, Vec::new()), "{format}");
        // What is not a layer's own is not read again.
        assert!((4 * BLOCK..8 * BLOCK).contains(&compared.bytes), "{format}: {compared:?}");
        assert!(lab.hash(), "nothing is left to do");
    }
}

#[test]
fn a_byte_that_was_changed_is_laid_at_the_door_of_its_file() {
    let (first, second) = ("bytes 0 to 2097151", "bytes 2097152 to 4194303");
    for format in FORMATS {
        for (whose, at, words, effect) in [
            ("Monday", 8192, first, "Monday, Tuesday, Wednesday, Now cannot be relied on"),
            // Tuesday wrote over that.
            ("Monday", BLOCK + 7, second, "Monday cannot be relied on"),
            ("Tuesday", 4097, first, "Tuesday, Wednesday, Now cannot be relied on"),
            ("Tuesday", 2 * BLOCK - 1, second, "Tuesday, Wednesday, Now cannot be relied on"),
        ] {
            let mut lab = Deep::new(format);
            assert!(lab.hash());
            let row = lab.layer(whose);
            lab.flip(&row, at);
            let (_, findings) = lab.deep();
            let told: Vec<_> = findings.iter().map(|found| (found.kind, &*found.place, &*found.effect)).collect();
            assert_eq!(told, [("changed", &*lab.place(&row), effect)], "{format} {whose} {at}: {findings:?}");
            assert!(findings[0].what.starts_with(words), "{findings:?}");
        }
    }
}

#[test]
fn a_fold_keeps_the_records() {
    for format in FORMATS {
        for gone in [&["Monday"][..], &["Tuesday"], &["Wednesday"], &["Tuesday", "Monday"]] {
            let mut lab = Deep::new(format);
            assert!(lab.hash());
            for name in gone {
                lab.delete(name);
            }
            let (compared, findings) = lab.deep();
            let left = 3 - gone.len();
            assert_eq!((compared.layers, compared.sealed, findings), (left, left, Vec::new()), "{format} {gone:?}");
            // And they go with their layers.
            assert!(lab.hash());
            let records = lab.files.folder().folder("hashes").and_then(|folder| folder.list()).expect("a folder");
            assert_eq!(records.len(), left, "{format} {gone:?}");
        }
    }
}

#[test]
fn a_record_that_is_lost_or_damaged_is_made_again() {
    let mut lab = Deep::new(LayerFormat::Vhdx);
    assert!(lab.hash());
    let (lost, harmed) = (lab.layer("Monday"), lab.layer("Tuesday"));
    let folder = lab.files.folder().folder("hashes").expect("a folder");
    let whole = lab.files.record(lost.id);
    folder.unlink(&lost.id.to_string()).expect("removed");
    let record = folder.open(&harmed.id.to_string(), Mode::Write).expect("a record");
    record.write_at(&[0xff], 60).expect("changed");
    let (compared, findings) = lab.deep();
    assert_eq!((compared.layers, findings.len()), (1, 2), "{findings:?}");
    let of = |row: &LayerRow| findings.iter().find(|found| found.place == lab.place(row)).expect("a finding");
    assert!(of(&lost).what.contains("nothing is recorded") && of(&harmed).what.contains("is damaged"), "{findings:?}");
    assert!(findings.iter().all(Finding::is_note));
    // The next worker looks at them all.
    lab.known = Known::default();
    assert!(lab.hash());
    assert_eq!(lab.deep().1, Vec::new());
    assert_ne!(lab.files.record(lost.id), whole, "its key is a new one");
}

#[test]
fn the_data_of_a_layer_that_has_no_record_may_be_what_changed() {
    let mut lab = Deep::new(LayerFormat::Vhdx);
    assert!(lab.hash());
    let (base, child) = (lab.layer("Monday"), lab.layer("Tuesday"));
    lab.files.folder().folder("hashes").and_then(|folder| folder.unlink(&base.id.to_string())).expect("removed");
    lab.flip(&base, 8192);
    let (_, findings) = lab.deep();
    let found = findings.iter().find(|found| found.kind == "changed").expect("a finding");
    assert!(found.place == lab.place(&child) && found.what.contains(&lab.place(&base)), "{findings:?}");
    assert_eq!(findings.iter().filter(|found| found.kind == "changed").count(), 1, "{findings:?}");
}

#[test]
fn what_is_merged_meanwhile_is_compared_again() {
    let mut lab = Deep::new(LayerFormat::Vhdx);
    assert!(lab.hash());
    let (before, row) = (lab.machine(), lab.layer("Monday"));
    lab.delete("Tuesday");
    lab.flip(&row, 8192);
    let mut looks = 0;
    let mut look = || {
        looks += 1;
        Ok(Looked { machine: if looks == 1 { before.clone() } else { lab.machine() }, worker: false })
    };
    let (compared, findings) = deep(&lab.files, &mut look, &mut |_, _| true).expect("compared");
    assert!(looks > 1 && compared.sealed == 2, "{compared:?}");
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(findings[0].effect, "Monday, Wednesday, Now cannot be relied on");
}

#[test]
fn what_a_worker_may_be_merging_is_not_read() {
    let mut lab = Deep::new(LayerFormat::Vhdx);
    assert!(lab.hash());
    lab.keeper.delete(&lab.task("delete"), "Monday", false).expect("deleted");
    let mut look = || Ok(Looked { machine: lab.machine(), worker: true });
    let (compared, findings) = deep(&lab.files, &mut look, &mut |_, _| true).expect("compared");
    assert_eq!((compared.layers, compared.sealed), (0, 2));
    assert!(findings.iter().all(|found| found.kind == "unread" && found.is_note()), "{findings:?}");
}

#[test]
fn what_a_merge_has_begun_to_change_is_not_compared_and_what_stands_on_it_is_as_it_was() {
    for format in FORMATS {
        let stop = Arc::<Cancel>::default();
        let (asked, pieces) = (Arc::clone(&stop), AtomicU64::new(0));
        let steps = Steps::watched(move |step| {
            if step == "merge:copying" && pieces.fetch_add(1, Ordering::SeqCst) == 2 {
                asked.ask();
            }
        });
        let mut lab = Deep::watched(format, steps);
        assert!(lab.hash());
        let base = lab.layer("Monday");
        lab.keeper.delete(&lab.task("delete"), "Monday", false).expect("deleted");
        let folding = lab.keeper.next_fold(None, Begin::default()).expect("begun").expect("a fold");
        let folded = lab.keeper.fold(folding, &stop);
        assert_eq!(lab.keeper.folded(&folded, None).expect_err("stopped").kind, ProblemKind::Cancelled);
        let (compared, findings) = lab.deep();
        assert_eq!((compared.layers, compared.sealed, findings), (2, 2, Vec::new()), "{format}");
        // What it had begun to change is another thing than what was recorded.
        let layer = lab.files.open_layer(&base, Mode::Read).expect("opens");
        let mut byte = [0];
        image::Chain::new(vec![layer], image::Access::Read)
            .and_then(|chain| chain.read(&mut byte, 4096))
            .expect("read");
        assert_eq!(byte, *b"T", "{format}");
        lab.known = Known::default();
        assert!(lab.hash());
        assert_eq!(lab.deep().1, Vec::new(), "{format}");
    }
}

#[test]
fn a_deep_look_can_be_stopped() {
    let mut lab = Deep::new(LayerFormat::Vhdx);
    assert!(lab.hash());
    let mut look = || Ok(Looked { machine: lab.machine(), worker: false });
    let stopped = deep(&lab.files, &mut look, &mut |_, _| false).expect_err("stopped");
    assert_eq!(stopped.kind, ProblemKind::Cancelled);
}

#[test]
fn hashing_that_was_stopped_goes_on_and_gives_way() {
    let mut lab = Deep::new(LayerFormat::Vhdx);
    let stop = Cancel::default();
    stop.ask();
    assert!(!lab.keeper.hash(&mut lab.known, &Manner::default(), &stop).expect("stopped"));
    assert_eq!(lab.deep().0.layers, 0);
    // What somebody writes is left alone.
    let (row, manner) =
        (lab.layer("Wednesday"), Manner { written: [lab.layer("Wednesday").id].into(), ..Manner::default() });
    assert!(lab.keeper.hash(&mut lab.known, &manner, &Cancel::default()).expect("hashed"));
    assert_eq!(lab.deep().0.layers, 2);
    assert_eq!(lab.files.record(row.id), Recorded::Nothing);
    assert!(lab.hash());
    assert_eq!(lab.deep().0.layers, 3);
}

#[test]
fn a_large_layer_is_gone_on_with_where_it_was_left() {
    let (stop, read) = (Arc::<Cancel>::default(), Arc::<AtomicU64>::default());
    let (asked, count) = (Arc::clone(&stop), Arc::clone(&read));
    let steps = Steps::watched(move |step| {
        // In the tenth block somebody wants something else.
        if step == "hash:reading" && count.fetch_add(1, Ordering::SeqCst) == 9 {
            asked.ask();
        }
    });
    let mut lab = Deep::bare(LayerFormat::Vhdx, 12 * BLOCK, steps);
    lab.write(&[(0, 12 * BLOCK)], 7);
    lab.snapshot("Monday");
    assert!(!lab.keeper.hash(&mut lab.known, &Manner::default(), &stop).expect("stopped"));
    let (compared, findings) = lab.deep();
    assert_eq!((compared.layers, compared.bytes), (1, 10 * BLOCK), "{findings:?}");
    assert!(findings.len() == 1 && findings[0].what.contains("first 20971520 of 25165824"), "{findings:?}");
    assert!(lab.hash());
    assert_eq!((read.load(Ordering::SeqCst), lab.deep().1), (12, Vec::new()));
}

#[test]
fn a_layer_that_cannot_be_read_holds_up_no_other() {
    let mut lab = Deep::new(LayerFormat::Vhdx);
    let (folder, name) =
        lab.layer("Tuesday").file.split_once('/').map(|(f, n)| (f.to_owned(), n.to_owned())).expect("in a folder");
    lab.files.folder().folder(&folder).and_then(|folder| folder.unlink(&name)).expect("removed");
    assert!(lab.hash());
    assert!(matches!(lab.files.record(lab.layer("Monday").id), Recorded::Record(_)));
    let (compared, findings) = lab.deep();
    assert_eq!((compared.layers, compared.sealed), (1, 3));
    assert!(findings.iter().all(Finding::is_note), "the audit itself says what is missing: {findings:?}");
}

#[test]
fn the_memory_of_a_saved_machine_is_compared_too() {
    let mut lab = Deep::new(LayerFormat::Vhdx);
    let row = lab.keeper.memory_row();
    let layer = lab.files.create_layer(&row, SIZE, None, None).expect("a memory disk");
    let chain = image::Chain::new(vec![layer], image::Access::Write).expect("a chain");
    chain.write(&vec![9; 3 << 20], 4096).expect("written");
    chain.close().expect("closed");
    let written = Written { layer: row.clone(), stats: Stats::default() };
    lab.keeper.book().commit(|rows| rows.machine.save(written)).expect("committed");
    assert!(lab.hash());
    assert_eq!((lab.deep().0.sealed, lab.deep().1), (4, Vec::new()));
    lab.flip(&row, 8192);
    let (_, findings) = lab.deep();
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(findings[0].what.contains("memory disk") && findings[0].place == lab.place(&row), "{findings:?}");
    assert_eq!(findings[0].effect, "Now cannot be relied on");
}

/// A machine with three memories, each over the one before, and their layers.
fn remembered() -> (Deep, [LayerRow; 3]) {
    let lab = Deep::new(LayerFormat::Vhdx);
    let first = lab.save("First", &[1, 1, 1, 1, 0, 0], None);
    let second = lab.save("Second", &[1, 2, 2, 0, 2, 0], Some(&first));
    let third = lab.save("Third", &[1, 2, 3, 3, 2, 0], Some(&second));
    (lab, [first, second, third])
}

fn is_whole(lab: &Deep, id: LayerId) -> bool {
    let below = lab.machine().layers[&id].parent.map(|id| id.0);
    lab.files.pages(id).record().is_some_and(|pages| pages.is_whole(below))
}

#[test]
fn the_pages_of_a_memory_are_recorded_as_they_are_written() {
    let (lab, layers) = remembered();
    // Nothing was hashed yet.
    assert!(layers.iter().all(|row| is_whole(&lab, row.id)));
    assert_eq!(lab.deep().0.layers, 3);
    for (row, page, effect) in [
        (&layers[0], 0, "First, Second, Third, Now cannot be relied on"),
        (&layers[0], 1, "First cannot be relied on"),
        (&layers[1], 1, "Second, Third, Now cannot be relied on"),
        (&layers[2], 3, "Third, Now cannot be relied on"),
    ] {
        let at = RAM + page * PAGE as u64;
        lab.flip(row, at + 5);
        let (_, findings) = lab.deep();
        let changed: Vec<&Finding> = findings.iter().filter(|found| !found.is_note()).collect();
        assert!(changed.len() == 1 && changed[0].place == lab.place(row), "{findings:?}");
        assert_eq!(changed[0].effect, effect);
        let words = format!("bytes {at} to {} of its memory disk", at + PAGE as u64 - 1);
        assert!(changed[0].what.starts_with(&words), "{}", changed[0].what);
        lab.flip(row, at + 5);
    }
}

/// A page of the parent that is damaged shows who looks at it: it is stored again only by who reads it.
#[test]
fn a_capture_reads_of_its_parent_what_is_not_recorded() {
    let (lab, layers) = remembered();
    let recorded = |row: &LayerRow| lab.files.pages(row.id).record().expect("a record");
    let ram = [1, 2, 3, 3, 2, 0];
    lab.flip(&layers[0], RAM + 5);
    let fourth = recorded(&lab.save("Fourth", &ram, Some(&layers[2])));
    assert_eq!(fourth.key(), recorded(&layers[2]).key());
    let folder = lab.files.folder().folder("hashes").expect("a folder");
    folder.unlink(&layers[0].id.to_string()).expect("removed");
    let fifth = recorded(&lab.save("Fifth", &ram, Some(&layers[2])));
    assert_eq!(fifth.to_read(), fourth.to_read() + PAGE as u64);
    let [at, page] = [RAM, RAM + PAGE as u64];
    let known = image::hashes::Expected::default();
    assert!(fifth.hash_over(&known, at) == Some(fifth.hash(&[1; PAGE])) && fifth.hash_over(&known, page).is_none());
}

#[test]
fn what_was_recorded_of_a_memory_outlives_its_merge() {
    let (mut lab, layers) = remembered();
    lab.delete("Second");
    let folded = lab.machine().layers[&layers[2].id].clone();
    assert!(!lab.machine().layers.contains_key(&layers[1].id) && folded.parent == Some(layers[0].id));
    assert!(!is_whole(&lab, folded.id));
    // A page that the merge has brought is changed before anybody reads it again.
    lab.flip(&folded, RAM + PAGE as u64);
    assert!(lab.hash() && is_whole(&lab, folded.id));
    let (_, findings) = lab.deep();
    assert!(findings.len() == 1 && findings[0].place == lab.place(&folded), "{findings:?}");
    lab.flip(&folded, RAM + PAGE as u64);
    assert_eq!(lab.deep().1, Vec::new());
}

/// What RAM was last equal to is on its way into what stands on it, and so reads as neither: a capture stands on the one that is whole.
#[test]
fn a_capture_stands_on_no_memory_that_is_half_merged() {
    const PAGES: usize = 3000;
    let (stop, pieces) = (Arc::<Cancel>::default(), Arc::<AtomicU64>::default());
    let (asked, seen) = (Arc::clone(&stop), Arc::clone(&pieces));
    let steps = Steps::watched(move |step| {
        if step == "merge:copying" && seen.fetch_add(1, Ordering::SeqCst) == 2 {
            asked.ask();
        }
    });
    let mut lab = Deep::bare(LayerFormat::Vhdx, SIZE, steps);
    let (mut first, mut second) = ([1; PAGES], [1; PAGES]);
    first[PAGES / 2..].fill(2);
    second[..PAGES / 3].fill(3);
    let monday = lab.save("Monday", &first, None);
    let tuesday = lab.save("Tuesday", &second, Some(&monday));
    lab.keeper.delete(&lab.task("delete"), "Monday", false).expect("deleted");
    lab.keeper.remove_garbage().expect("removed");
    // The disk's layer, which holds nothing, may be first.
    while !stop.asked() {
        pieces.store(0, Ordering::SeqCst);
        let folding = lab.keeper.next_fold(None, Begin::default()).expect("begun").expect("Monday goes into Tuesday");
        let folded = lab.keeper.fold(folding, &stop);
        let outcome = lab.keeper.folded(&folded, None).map(drop).map_err(|problem| problem.kind);
        assert_eq!(outcome, if stop.asked() { Err(ProblemKind::Cancelled) } else { Ok(()) });
    }
    let reads = |lab: &Deep, row: &LayerRow| {
        let layers = lab.files.open_chain(&lab.machine(), row.id).expect("opens");
        let chain = image::Chain::new(layers, image::Access::Read).expect("a chain");
        let mut bytes = vec![0; PAGES * PAGE];
        chain.read(&mut bytes, RAM).expect("read");
        bytes.chunks(PAGE).map(|page| page[0]).collect::<Vec<u8>>()
    };
    assert!(reads(&lab, &monday) != first, "it is half merged");
    let wednesday = lab.save("Wednesday", &first, Some(&monday));
    let whole = |lab: &Deep, told: &str| {
        assert!(reads(lab, &wednesday) == first, "{told}");
        assert!(reads(lab, &tuesday) == second, "{told}");
    };
    whole(&lab, "before the merge goes on");
    lab.collect();
    whole(&lab, "afterwards");
    assert!(lab.hash());
    assert_eq!(lab.deep().1, Vec::new());
}

/// What a memory was merged into is itself about to be merged, and that rests: so it is not hashed, but all the rest is.
#[test]
fn what_was_recorded_of_a_memory_outlives_two_merges_with_hashing_in_between() {
    let (mut lab, layers) = remembered();
    lab.delete("First");
    lab.keeper.delete(&lab.task("delete"), "Second", false).expect("deleted");
    assert!(lab.hash());
    lab.collect();
    let folded = lab.machine().layers[&layers[2].id].clone();
    assert_eq!(folded.parent, None);
    lab.flip(&folded, RAM);
    assert!(lab.hash() && is_whole(&lab, folded.id));
    let (_, findings) = lab.deep();
    assert!(findings.len() == 1 && findings[0].place == lab.place(&folded), "{findings:?}");
    lab.flip(&folded, RAM);
    assert_eq!(lab.deep().1, Vec::new());
    // Now nobody needs them.
    let names = lab.files.folder().folder("hashes").and_then(|folder| folder.list()).expect("a folder");
    assert!(!layers[..2].iter().any(|row| names.contains(&row.id.to_string())), "{names:?}");
}

#[test]
fn a_record_of_a_memory_that_is_lost_or_damaged_is_made_again() {
    let (mut lab, layers) = remembered();
    assert!(lab.hash());
    let before = lab.files.pages(layers[1].id);
    let folder = lab.files.folder().folder("hashes").expect("a folder");
    folder.unlink(&layers[0].id.to_string()).expect("removed");
    let record = folder.open(&layers[1].id.to_string(), Mode::Write).expect("a record");
    record.write_at(&[0xff], 140).expect("changed");
    // What is known of a memory ends where nothing is recorded, and nothing is taken from a damaged record.
    let chain = |top: &LayerRow| downwards(&lab.machine(), top.id);
    let harmed = [7; PAGE];
    assert!(!lab.files.expected(&chain(&layers[2])).allows(RAM + 2 * PAGE as u64, &harmed));
    assert!(lab.files.expected(&chain(&layers[2])).allows(RAM, &harmed));
    assert!(lab.files.expected(&chain(&layers[1])).allows(RAM + PAGE as u64, &harmed));
    lab.known = Known::default();
    assert!(lab.hash());
    assert_eq!(lab.deep().1, Vec::new());
    assert_eq!(lab.files.pages(layers[1].id), before, "with the key that the machine's memory has");
    assert!(!lab.files.expected(&downwards(&lab.machine(), layers[2].id)).allows(RAM, &harmed));
}

#[test]
fn files_among_the_records_that_are_none_are_told_of_and_left() {
    let mut lab = Deep::new(LayerFormat::Vhdx);
    assert!(lab.hash());
    let folder = lab.files.folder().folder("hashes").expect("a folder");
    let (stale, half) = (LayerId::new().to_string(), format!("{}.new", lab.layer("Monday").id));
    for name in ["mine", &stale, &half] {
        folder.create(name).expect("made");
    }
    assert_eq!(lab.files.unknown(&lab.machine()).expect("listed"), ["hashes/mine"]);
    assert!(lab.hash());
    let names = folder.list().expect("listed");
    assert!(names.contains(&"mine".to_owned()) && names.len() == 4, "{names:?}");
}

/// Every `try_at` of the operations that hashing makes of a disk, on a fresh machine.
fn at_every_operation(mut try_at: impl FnMut(Deep, u64)) {
    let mut whole = Deep::new(LayerFormat::Vhdx);
    let first = whole.sim.counts().operations;
    assert!(whole.hash());
    // A folder, and for each record a file, its content, a sync, its name.
    let operations = whole.sim.counts().operations - first;
    assert!(operations >= 12, "{operations}");
    for nth in 0..operations {
        let lab = Deep::new(LayerFormat::Vhdx);
        let at = lab.sim.counts().operations + nth;
        try_at(lab, at);
    }
}

/// All that is sealed is hashed by whoever comes next, and nothing else is left.
fn goes_on(files: &Files, told: &str) -> Result<(), Problem> {
    let keeper = Keeper::open(files, Carries::new(Sim::new().root(), uuid::Uuid::nil()), Steps::default())?;
    let mut look = || Ok(Looked { machine: keeper.rows().machine.clone(), worker: false });
    let (_, findings) = deep(files, &mut look, &mut |_, _| true)?;
    let wrong = findings.iter().find(|found| !found.is_note() || found.what.contains("damaged"));
    assert_eq!(wrong, None, "{told}");
    assert!(keeper.hash(&mut Known::default(), &Manner::default(), &Cancel::default())?);
    let (compared, findings) = deep(files, &mut look, &mut |_, _| true)?;
    assert_eq!((compared.layers, findings), (3, Vec::new()), "{told}");
    assert_eq!(files.folder().folder("hashes").and_then(|folder| folder.list()).expect("a folder").len(), 3, "{told}");
    Ok(())
}

#[test]
fn a_record_is_whole_or_not_there_wherever_the_power_goes() {
    at_every_operation(|mut lab, at| {
        lab.sim.cut(At::Operation(at));
        let hashed = lab.keeper.hash(&mut lab.known, &Manner::default(), &Cancel::default());
        assert!(hashed.is_err() && !lab.sim.powered(), "cut at {at}");
        for crash in Crash::several(at, 8) {
            let files = Files::new(lab.sim.after_crash(crash).root(), Path::new("/lab"));
            goes_on(&files, &format!("cut at {at}, {crash:?}")).expect("recovered");
        }
    });
}

#[test]
fn a_disk_that_fails_while_it_is_hashed_costs_a_record_at_most() {
    for (kind, times) in [(ErrorKind::NoSpace, Times::Once), (ErrorKind::Io, Times::Forever)] {
        at_every_operation(|mut lab, at| {
            lab.sim.fail(At::Operation(at), kind, times);
            // Whether it shows is another matter: what cannot be tidied away now is so later.
            let _ = lab.keeper.hash(&mut lab.known, &Manner::default(), &Cancel::default());
            lab.sim.heal();
            drop(lab.keeper);
            goes_on(&lab.files, &format!("{kind:?} {times:?} at {at}")).expect("it goes on");
        });
    }
}
