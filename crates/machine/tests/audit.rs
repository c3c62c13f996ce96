//! An audit of a machine's files names what is wrong with them, and whom that concerns.

#[expect(dead_code, reason = "each test uses a part of the samples")]
mod sample;

use machine::audit::{Audit, audit};
use machine::carry::Carries;
use machine::files::Files;
use machine::keeper::Keeper;
use machine::ledger::Ledger;
use machine::steps::Steps;
use machine::tree::{JobId, LayerId, Machine};
use serde_json::Value;
use std::path::Path;
use store::Mode;
use store::sim::Sim;

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
