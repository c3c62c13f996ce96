//! Making new machines from a snapshot.
//!
//! ```text
//!   journal: who they will be ─► folders out of sight, complete and synced ─► each gets its name ─► settle
//!      └── fails or dies here: nothing of them stays ──────────────────────┘      └── dies here: the next worker names the rest
//! ```
//!
//! That the first of them has its name is what makes the request real: from then on somebody may use it. So the next worker goes by what it
//! finds.
//!
//! A machine that is there already takes over what was made for it (`lend`, then `take-over`, which is that machine's own request): a new
//! machine in all but its name, which is given up afterwards.

use crate::actor::Owner;
use crate::files::{Files, file_problem};
use crate::job::{Task, end};
use crate::keeper::Keeper;
use crate::ledger::{Journal, Ledger};
use crate::linked::{Linked, Named, leaf_over};
use crate::live::blocking;
use crate::log;
use crate::ops::snapshot::make_leaf;
use crate::plan::{Take, check_name, quoted, shorten};
use crate::request::{Present, Problem};
use crate::root::{Begun, Root};
use crate::tree::{Firmware, LayerRow, Machine, MachineId, Snapshot, SnapshotId, SnapshotState, State};
use crate::views;
use serde_json::{Value, json};
use std::sync::{Mutex, PoisonError};

/// The journal's words for requests whose row names machines that are being made.
const CLONE: &str = "clone";
const LEND: &str = "lend";

/// How many are made side by side.
const MAKERS: usize = 8;

/// How many machines one request makes at most.
pub const MOST: usize = 1000;

impl Owner {
    /// Makes a machine of each of these names from a snapshot; all of them, or none.
    pub(crate) async fn clone_machines(
        &mut self,
        task: &Task,
        snapshot: &str,
        names: &[String],
        note: &str,
    ) -> Result<Value, Problem> {
        let rows = self.machine();
        let snapshot = rows.machine.to_link(snapshot)?;
        check_names(names)?;
        let (root, wanted) = (self.shared.root.clone(), names.to_vec());
        blocking(move || make_way(&root, &wanted)).await?;
        let new = names.iter().map(|name| Named { id: MachineId::new(), name: name.clone() });
        let linked: Vec<_> = new.map(|new| rows.machine.linked(snapshot, &new, note, true)).collect();
        let said = said(&who(&linked), snapshot);
        self.ready_to_share(&linked)?;
        let (keeper, root, task) = (self.keeper.clone(), self.shared.root.clone(), task.clone());
        blocking(move || keeper.clone_machines(&root, &task, linked, &said)).await
    }

    /// Makes a snapshot's files ready for another machine, out of sight.
    pub(crate) async fn lend(&mut self, task: &Task, snapshot: &str, memory: bool) -> Result<Value, Problem> {
        let rows = self.machine();
        let snapshot = rows.machine.to_link(snapshot)?;
        let new = Named { id: MachineId::new(), name: rows.machine.name.clone() };
        let linked = rows.machine.linked(snapshot, &new, "", memory);
        self.ready_to_share(std::slice::from_ref(&linked))?;
        let (keeper, root, task) = (self.keeper.clone(), self.shared.root.clone(), task.clone());
        blocking(move || keeper.lend(&root, &task, linked)).await
    }

    fn ready_to_share(&mut self, linked: &[Linked]) -> Result<(), Problem> {
        // What a merge that was stopped has left open for writing is written no more once it has a second name.
        if let Some(live) = &mut self.live {
            live.disks().seal(&self.keeper.rows().machine)?;
        }
        for linked in linked {
            let forgotten = self.keeper.forget_merging(linked);
            self.hashing.forget(&forgotten);
        }
        Ok(())
    }

    /// Becomes what was made ready for it ([`Owner::lend`]); stays who it is.
    pub(crate) async fn take_over(
        &mut self,
        task: &Task,
        lent: MachineId,
        origin: &str,
        present: &Present,
    ) -> Result<Value, Problem> {
        self.doing("applying");
        let (keeper, root, task) = (self.keeper.clone(), self.shared.root.clone(), task.clone());
        let (origin, present) = (origin.to_owned(), present.clone());
        blocking(move || keeper.take_over(&root, &task, lent, &origin, &present)).await
    }
}

/// The part without a guest. All of it blocks.
impl Keeper {
    /// Makes these machines, all of them or none. `said` is what there is to tell of it.
    pub fn clone_machines(&self, root: &Root, task: &Task, linked: Vec<Linked>, said: &str) -> Result<Value, Problem> {
        let new = who(&linked);
        let begun = self.make_linked(root, task, CLONE, linked)?;
        let result = json!({ "machines": new, "said": said });
        let made = self.name_all(root, &new).and_then(|()| self.settle(task, &result, |_| {}));
        // Their workers need the locks.
        drop(begun);
        if let Err(problem) = made {
            // Nobody was told of them.
            for new in &new {
                take_back_new(root, new);
            }
            return Err(problem);
        }
        self.steps.at("clone:committed");
        log::write(&self.files, Some(task.id()), said);
        Ok(result)
    }

    /// Makes a snapshot's files ready for another machine, out of sight: see [`Keeper::take_over`].
    pub fn lend(&self, root: &Root, task: &Task, linked: Linked) -> Result<Value, Problem> {
        let result = json!({ "lent": linked.machine.id });
        self.make_linked(root, task, LEND, vec![linked])?;
        self.settle(task, &result, |_| {})?;
        self.steps.at("lend:committed");
        Ok(result)
    }

    /// Makes the folders of these machines, out of sight. If that fails, nothing stays of them.
    fn make_linked(&self, root: &Root, task: &Task, request: &str, linked: Vec<Linked>) -> Result<Vec<Begun>, Problem> {
        let new = who(&linked);
        self.journal_noting(task, request, Vec::new(), json!(new).to_string())?;
        let made = make_all(self, root, task, linked);
        if made.is_err() {
            for new in new {
                root.give_up(new.id);
            }
        }
        made
    }

    fn name_all(&self, root: &Root, new: &[Named]) -> Result<(), Problem> {
        let _names = root.lock_names()?;
        new.iter().try_for_each(|new| root.check_free(&new.name, None))?;
        let ids: Vec<_> = new.iter().map(|new| new.id).collect();
        // Nobody uses one before all are certain to stay: we still have their locks.
        root.show(&ids, || self.steps.at("clone:named"))
    }

    /// Finishes what an earlier worker died in the middle of: if one of the machines has its name, the others get theirs; else they go.
    pub fn finish_clones(&self, root: &Root) -> Result<(), Problem> {
        let rows = self.rows();
        for journal in rows.journals().filter(|journal| journal.request == CLONE || journal.request == LEND) {
            // What it cannot be known to have made is swept away, like all that is out of sight.
            let new: Vec<Named> = serde_json::from_str(&journal.note).unwrap_or_default();
            let _names = root.lock_names()?;
            if journal.request == LEND || !new.iter().any(|new| root.has(new.id)) {
                for new in &new {
                    root.give_up(new.id);
                }
                continue;
            }
            let rest = new.iter().filter(|new| !root.has(new.id));
            let outcome = rest.into_iter().try_for_each(|new| {
                root.check_free(&new.name, None).and_then(|()| root.show(&[new.id], || {})).map_err(|problem| {
                    root.give_up(new.id);
                    Problem::failed(format!("{} could not be made: {problem}", new.name)).hint("tenby vm list")
                })
            });
            // Those that had their names already may have them in memory only.
            root.show(&[], || {})?;
            let names: Vec<&str> = new.iter().map(|new| new.name.as_str()).collect();
            let result = json!({ "machines": new, "said": format!("{}: made", listed(&names)) });
            self.end_recovered(journal, &outcome.map(|()| result))?;
        }
        Ok(())
    }

    /// A request that an earlier worker had made real has ended like this.
    fn end_recovered(&self, journal: &Journal, outcome: &Result<Value, Problem>) -> Result<(), Problem> {
        let job = self.rows().job(journal.job).cloned();
        self.book.commit(|rows| {
            rows.remove_journal(journal.job);
            if let Some(mut job) = job {
                end(&mut job, outcome);
                self.jobs.put(job.clone());
                rows.insert_job(job);
            }
        })
    }

    /// Becomes what was made ready for it ([`Keeper::lend`]) from `origin`; stays who it is.
    pub fn take_over(
        &self,
        root: &Root,
        task: &Task,
        lent: MachineId,
        origin: &str,
        present: &Present,
    ) -> Result<Value, Problem> {
        let taken_over = self.take_over_from(root, task, lent, origin, present);
        // Whatever came of it: what was made for it is used up.
        root.give_up(lent);
        taken_over
    }

    fn take_over_from(
        &self,
        root: &Root,
        task: &Task,
        lent: MachineId,
        origin: &str,
        present: &Present,
    ) -> Result<Value, Problem> {
        let rows = self.rows();
        rows.machine.check_can_take_over()?;
        let begun = root.begun(lent).map_err(|_| {
            Problem::failed(format!("what {origin} holds is not ready for {} any more; try again", rows.machine.name))
        })?;
        let made = Ledger::read(begun.files.folder()).map_err(|e| e.problem(begun.files.path()))?.machine;
        check_firmware(&self.files, &begun.files, &made)?;
        let mut next = rows.machine.clone();
        let kept = self.leave_for_another(&mut next, origin, present)?;
        let there = self.files.names()?;
        let layers = next.take_over(&made, |file| there.contains(file));
        rename_kernel(&mut next, lent);
        let result = json!({
            "kept": kept.as_ref().map(|(id, _)| id), "kept_name": kept.as_ref().map(|(_, name)| name),
            "undo_for": rows.machine.policy.undo_for, "said": format!("{} is a linked clone of {origin} now", next.name),
        });
        self.become_linked(task, &result, &begun, next, &layers, &made)?;
        let words = kept.map_or_else(String::new, |(_, name)| format!("; kept the present as {name}"));
        log::write(&self.files, Some(task.id()), &format!("took over {origin}{words}"));
        Ok(result)
    }

    /// What becomes of the present: kept as a snapshot of its own, noted as discarded, or there is nothing to lose.
    fn leave_for_another(
        &self,
        next: &mut Machine,
        origin: &str,
        present: &Present,
    ) -> Result<Option<(SnapshotId, String)>, Problem> {
        let now = &next.now;
        let empty = || now.disks.values().all(|leaf| views::written(next, &self.files, *leaf) == 0);
        match present {
            Present::Keep { name } => {
                let created = jiff::Timestamp::now();
                let (name, note) = (next.snapshot_name(name.as_deref(), created)?, String::new());
                let (vm_state, memory) = (now.state, now.memory);
                let id = SnapshotId::new();
                let state = SnapshotState::Ready;
                next.keep(Take { id, name: name.clone(), note, created, vm_state, memory, state }, None);
                Ok(Some((id, name)))
            }
            Present::Discard => {
                if next.policy.undo_for > 0 {
                    next.note_discarded_for(origin, jiff::Timestamp::now());
                }
                Ok(None)
            }
            Present::IfUnchanged if now.state == State::Off && empty() => Ok(None),
            Present::IfUnchanged => {
                let shell = format!("tenby snapshot apply {} {}", quoted(&next.name), quoted_origin(origin));
                Err(Problem::refused(format!("{} holds something; applying {origin} would lose that", next.name))
                    .hint(format!("{shell} --keep      (or --discard)")))
            }
        }
    }

    /// Files and rows of a machine that becomes what was made ready for it. `next` is what it becomes, but for fresh leaves over the layers that
    /// it takes over: each as it lies there, and as it is to lie here.
    fn become_linked(
        &self,
        task: &Task,
        result: &Value,
        lent: &Begun,
        mut next: Machine,
        layers: &[(LayerRow, LayerRow)],
        made: &Machine,
    ) -> Result<(), Problem> {
        let over: Vec<_> = next.now.disks.iter().map(|(disk, id)| (disk.clone(), *id)).collect();
        let leaves: Vec<_> =
            over.into_iter().map(|(disk, id)| (disk, leaf_over(&self.files, &next.layers, id))).collect();
        let rows = layers.iter().map(|(_, new)| new).chain(leaves.iter().map(|(_, leaf)| leaf));
        let there = self.files.folder().folder("boot").and_then(|boot| boot.list()).map_err(|e| file_problem(&e))?;
        let new = next.now.config.boot_files().filter(|name| !there.iter().any(|one| one == name));
        let boot: Vec<_> = new.map(|name| format!("boot/{name}")).collect();
        let files = rows.map(|row| row.file.clone()).chain(boot).collect();
        self.journal(task, "take-over", files)?;
        for (row, new) in layers {
            lent.files.share(row, &self.files, new, &mut |_| !task.cancelled())?;
            lent.files.share_record(row, &self.files, new);
        }
        lent.files.share_boot(&made.now.config, &self.files, |name| kernel_name(name, made.id))?;
        for (disk, leaf) in leaves {
            let file = make_leaf(&self.files, None, &next.layers, &leaf, None)?;
            file.layer.close().map_err(|e| crate::files::image_problem(&e))?;
            next.now.disks.insert(disk, leaf.id);
            next.layers.insert(leaf.id, leaf);
        }
        self.files.sync_names()?;
        self.steps.at("take-over:files");
        task.check()?;
        self.settle(task, result, |machine| *machine = next)?;
        self.steps.at("take-over:committed");
        self.files.tidy_boot(&self.rows().machine);
        Ok(())
    }
}

impl Machine {
    /// The snapshot of this name, if a machine can be made from it.
    fn to_link(&self, name: &str) -> Result<&Snapshot, Problem> {
        let snapshot = &self.snapshots[&self.resolve(name)?];
        match snapshot.state {
            SnapshotState::Ready => Ok(snapshot),
            SnapshotState::Creating => Err(Problem::refused(format!("{} is still being written", snapshot.name))
                .hint(format!("tenby job list {}", quoted(&self.name)))),
        }
    }

    /// Whether another machine's snapshot can become its present.
    pub fn check_can_take_over(&self) -> Result<(), Problem> {
        if self.snapshots.is_empty() {
            return Ok(());
        }
        let name = quoted(&self.name);
        let message =
            format!("{} has snapshots of its own: another machine's can only be applied to one without", self.name);
        Err(Problem::refused(message)
            .hint(format!("tenby snapshot list {name}      (or: tenby vm create NEW --from …)")))
    }
}

/// Memory comes back only over just the firmware that it was captured with, and a machine has one firmware.
fn check_firmware(own: &Files, other: &Files, made: &Machine) -> Result<(), Problem> {
    if made.now.config.firmware != Firmware::Uefi {
        return Ok(());
    }
    let code = |files: &Files| {
        let file = files.folder().folder("boot")?.open(crate::firmware::CODE_NAME, store::Mode::Read)?;
        let mut bytes = vec![0; file.len()? as usize];
        file.read_at(&mut bytes, 0).map(|()| bytes)
    };
    match code(own) {
        Err(error) if error.kind == store::ErrorKind::NotFound => Ok(()),
        ours => {
            let same = ours.and_then(|ours| code(other).map(|theirs| ours == theirs)).map_err(|e| file_problem(&e))?;
            let other = "its UEFI is another version than that of the machine it would come from";
            if same { Ok(()) } else { Err(Problem::refused(other).hint("tenby vm create NEW --from VM@SNAP")) }
        }
    }
}

/// Makes the folders, several side by side: for most of the time that one takes, the disk writes. What is copied comes one after the other.
fn make_all(keeper: &Keeper, root: &Root, task: &Task, linked: Vec<Linked>) -> Result<Vec<Begun>, Problem> {
    let copies = linked.iter().flat_map(|linked| &linked.layers).any(|(row, _)| row.in_place);
    let makers = if copies { 1 } else { MAKERS.min(linked.len()) };
    let left = Mutex::new(linked);
    let left = || left.lock().unwrap_or_else(PoisonError::into_inner);
    let some = || {
        let mut made = Vec::new();
        // (A lock in the head of a loop would be held through its body.)
        let next = || left().pop();
        while let Some(linked) = next() {
            match make(keeper, root, task, linked) {
                Ok(begun) => made.push(begun),
                Err(problem) => {
                    left().clear();
                    return Err(problem);
                }
            }
        }
        Ok(made)
    };
    std::thread::scope(|scope| {
        let makers: Vec<_> = (0..makers).map(|_| scope.spawn(some)).collect();
        let broke = |_| Err(Problem::failed("making a machine broke off"));
        let made = makers.into_iter().map(|maker| maker.join().unwrap_or_else(broke));
        let made: Result<Vec<Vec<Begun>>, Problem> = made.collect();
        made.map(|made| made.into_iter().flatten().collect())
    })
}

/// Makes one machine's folder, and holds it until it is named.
fn make(keeper: &Keeper, root: &Root, task: &Task, linked: Linked) -> Result<Begun, Problem> {
    let begun = root.begin(linked.machine.id)?;
    keeper.link_machine(linked, &begun.files, &mut |done, total| {
        task.progress(done, total);
        !task.cancelled()
    })?;
    keeper.steps.at("clone:made");
    Ok(begun)
}

/// These names are free, and what others have left out of sight is gone.
fn make_way(root: &Root, names: &[String]) -> Result<(), Problem> {
    let _names = root.lock_names()?;
    names.iter().try_for_each(|name| root.check_free(name, None))?;
    root.sweep()
}

/// A machine that was made a moment ago goes again.
fn take_back_new(root: &Root, new: &Named) {
    if root.has(new.id)
        && let Err(problem) = root.hide(new.id)
    {
        tracing::error!("{} stays, for it cannot be removed: {problem}", new.name);
    }
    root.give_up(new.id);
}

/// Who they will be.
fn who(linked: &[Linked]) -> Vec<Named> {
    linked.iter().map(|Linked { machine, .. }| Named { id: machine.id, name: machine.name.clone() }).collect()
}

fn check_names(names: &[String]) -> Result<(), Problem> {
    if !(1..=MOST).contains(&names.len()) {
        return Err(Problem::usage(format!("1 to {MOST} machines can be made at a time, not {}", names.len())));
    }
    for (nth, name) in names.iter().enumerate() {
        check_name(name)?;
        if names[..nth].contains(name) {
            return Err(Problem::usage(format!("two of them would be named \"{}\"", shorten(name))));
        }
    }
    Ok(())
}

/// The kernel of what a machine takes over does not replace its own, which a snapshot may name.
fn rename_kernel(machine: &mut Machine, lent: MachineId) {
    if let Some(kernel) = &mut machine.now.config.kernel {
        kernel.kernel = kernel_name(&kernel.kernel, lent);
        kernel.initrd = kernel.initrd.as_ref().map(|initrd| kernel_name(initrd, lent));
    }
}

fn kernel_name(name: &str, lent: MachineId) -> String {
    let base = name.split('-').next().unwrap_or(name);
    format!("{base}-{}", &lent.to_string()[..8])
}

fn quoted_origin(origin: &str) -> String {
    match origin.split_once('@') {
        Some((vm, snapshot)) if quoted(vm) == vm && quoted(snapshot) == snapshot => origin.to_owned(),
        _ => format!("'{}'", origin.replace('\'', "'\\''")),
    }
}

fn said(new: &[Named], snapshot: &Snapshot) -> String {
    let names: Vec<&str> = new.iter().map(|new| new.name.as_str()).collect();
    let are = if names.len() == 1 { "is" } else { "are" };
    format!("{} {are} made from {}", listed(&names), shorten(&snapshot.name))
}

/// `web`, `web-1 and web-2`, `web-1 to web-9`.
fn listed(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [one, other] => format!("{one} and {other}"),
        [first, .., last] => format!("{first} to {last}"),
    }
}
