//! The rows, from what the files say: pure.
//!
//! ```text
//!   links ──► layers: ids, disks ──► snapshots, by the labels ──► Now: the leaves that belong together, by the labels
//!                                                                  └─► what is left and holds something: snapshots, "found: FILE"
//! ```
//!
//! Nothing that a file says is believed because it is there: names, numbers and paths are checked as if somebody had typed them, and no path
//! is taken over.

use super::found::{Found, Unknown};
use super::links::Links;
use super::sane;
use crate::label::{Head, Label, Present};
use crate::ledger::just_after;
use crate::table::Table;
use crate::tree::{
    Config, DiskId, Firmware, LayerId, LayerKind, LayerRow, Machine, MachineId, Now, Snapshot, SnapshotId,
    SnapshotState, State, Stats,
};
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// A machine, as its files tell it.
#[derive(Debug)]
pub struct Rebuilt {
    /// Its rows. If `over` is there, Now has no disks yet.
    pub machine: Machine,
    /// When it is: later than all that its files say.
    pub at: Timestamp,
    /// Now needs fresh leaves over this snapshot.
    pub over: Option<SnapshotId>,
    /// Layers whose link to their parent a merge has left half-changed.
    pub mend: Vec<LayerId>,
    /// What could not be known or used.
    pub unknown: Vec<Unknown>,
}

/// Rebuilds the machine `id` from these files, at this time. `named` are paths of the user's, the only ones that may be in a configuration.
///
/// # Errors
/// If nothing of it can be rebuilt: why.
pub fn rebuild(
    id: MachineId,
    found: &[Found],
    named: &[String],
    at: Timestamp,
    mut unknown: Vec<Unknown>,
) -> Result<Rebuilt, Vec<Unknown>> {
    let (home, used) = ours(id, found, &mut unknown);
    let links = Links::find(found, used, home, &mut unknown);
    Rebuild::new(links, named, at, unknown).run(id)
}

/// Which files are this machine's: those that say so or say nothing, and what they stand on (it may be shared, and speak of the machine that it
/// came from). A folder that was renamed keeps its files, which say who the machine was.
fn ours(id: MachineId, found: &[Found], unknown: &mut Vec<Unknown>) -> (MachineId, Vec<bool>) {
    let says = |file: &Found| file.label.as_ref().map(|label| label.machine.id);
    let mut votes: BTreeMap<MachineId, usize> = BTreeMap::new();
    found.iter().filter_map(says).for_each(|id| *votes.entry(id).or_default() += 1);
    let most = votes.iter().max_by_key(|(_, votes)| **votes).map(|(id, _)| *id);
    let home = if votes.contains_key(&id) { id } else { most.unwrap_or(id) };
    if home != id {
        let what = format!("its files were those of the machine {home}; it comes back as {id}");
        unknown.push(Unknown { file: None, what });
    }
    let mut used: Vec<bool> = found.iter().map(|file| says(file).is_none_or(|id| id == home)).collect();
    loop {
        let needs = |file: &Found, foreign: &Found| {
            let link = file.info.parent.as_ref();
            link.is_some_and(|link| image::siblings::accepts(link, foreign.info.data_id)) && file.kind == foreign.kind
        };
        let needed =
            |at: &usize| !used[*at] && found.iter().zip(&used).any(|(file, used)| *used && needs(file, &found[*at]));
        let Some(at) = (0..found.len()).find(needed) else { break };
        used[at] = true;
    }
    for at in (0..found.len()).filter(|at| !used[*at]) {
        unknown.push(Unknown::of(&found[at].file, "it is another machine's, and was left alone"));
    }
    (home, used)
}

struct Rebuild<'a> {
    links: Links<'a>,
    named: &'a [String],
    at: Timestamp,
    ids: Vec<LayerId>,
    by_id: BTreeMap<LayerId, usize>,
    disks: Vec<Option<DiskId>>,
    snapshots: BTreeMap<SnapshotId, Snapshot>,
    /// Those that go by the names of files.
    found: BTreeSet<SnapshotId>,
    /// That of a saved machine's memory.
    saved: Option<SnapshotId>,
    unknown: Vec<Unknown>,
}

impl<'a> Rebuild<'a> {
    fn new(links: Links<'a>, named: &'a [String], at: Timestamp, unknown: Vec<Unknown>) -> Self {
        let ids = layer_ids(&links);
        let by_id = (0..ids.len()).filter(|at| links.whole[*at]).map(|at| (ids[at], at)).collect();
        Self {
            disks: Vec::new(),
            links,
            named,
            at,
            ids,
            by_id,
            snapshots: BTreeMap::new(),
            found: BTreeSet::new(),
            saved: None,
            unknown,
        }
    }

    fn run(mut self, id: MachineId) -> Result<Rebuilt, Vec<Unknown>> {
        self.disks = self.disk_ids();
        self.take_snapshots();
        let mut now = self.present();
        self.take_saved(&mut now);
        self.take_the_rest(now.as_ref());
        let mut over = None;
        if now.is_none() {
            let Some(last) = self.last_known() else { return Err(self.unknown) };
            let name = &self.snapshots[&last].name;
            let what = format!("what the machine held last is not certain: it begins anew from {name}");
            self.unknown.push(Unknown { file: None, what });
            over = Some(last);
        }
        Ok(self.rows(id, now, over))
    }

    /// The snapshot to begin anew from: the saved state, or what the present stood on as far as its leaves tell, or the newest. Of those that
    /// were known by their names, if there are any.
    fn last_known(&self) -> Option<SnapshotId> {
        let whole = |snapshot: &&Snapshot| !self.found.contains(&snapshot.id);
        let told = self.all().filter(|at| self.links.whole[*at]).filter_map(|at| self.label(at));
        let told = told.filter_map(|label| Some((label.at, label.now.as_ref()?.parent?)));
        let parent = told.filter(|(_, id)| self.snapshots.contains_key(id)).max().map(|(_, id)| id);
        let newest = |snapshots: &mut dyn Iterator<Item = &Snapshot>| {
            snapshots.max_by_key(|snapshot| (snapshot.created, snapshot.id)).map(|snapshot| snapshot.id)
        };
        self.saved
            .or(parent)
            .or_else(|| newest(&mut self.snapshots.values().filter(whole)))
            .or_else(|| newest(&mut self.snapshots.values()))
    }

    fn file(&self, at: usize) -> &'a Found {
        &self.links.found[at]
    }

    fn label(&self, at: usize) -> Option<&'a Label> {
        self.links.label[at]
    }

    fn all(&self) -> impl Iterator<Item = usize> + use<> {
        0..self.links.found.len()
    }

    /// A layer that may be part of something: all that it stands on is here, and no merge has made a mixture of it.
    fn is_good(&self, at: usize) -> bool {
        self.links.whole[at] && !self.links.torn[at]
    }

    /// Which disk each layer belongs to: as labels say, or what stands on it or lies below it.
    fn disk_ids(&mut self) -> Vec<Option<DiskId>> {
        let roots: Vec<usize> = self.all().map(|at| self.root(at)).collect();
        let mut of_root: BTreeMap<usize, DiskId> = BTreeMap::new();
        let disk = |at: usize| self.label(at).and_then(|label| label.disk.clone()).filter(sane::is_known);
        for at in self.all().filter(|at| self.is_disk(*at)) {
            if let Some(disk) = disk(at) {
                of_root.entry(roots[at]).or_insert(disk);
            }
        }
        let unknown: BTreeSet<usize> = self
            .all()
            .filter(|at| self.is_disk(*at))
            .map(|at| roots[at])
            .filter(|r| !of_root.contains_key(r))
            .collect();
        for root in unknown {
            let taken: BTreeSet<&DiskId> = of_root.values().collect();
            let id = (0..=taken.len())
                .map(|n| DiskId(format!("disk{n}")))
                .find(|id| !taken.contains(id))
                .expect("one is free");
            let what = format!("which disk it holds is not known: it comes back as {id}");
            self.unknown.push(Unknown::of(&self.file(root).file, what));
            of_root.insert(root, id);
        }
        let disk = |at: usize| self.label(at).and_then(|label| label.disk.clone()).filter(sane::is_known);
        let of = |at: usize| disk(at).or_else(|| of_root.get(&roots[at]).cloned());
        self.all().map(|at| of(at).filter(|_| self.is_disk(at))).collect()
    }

    fn is_disk(&self, at: usize) -> bool {
        self.links.whole[at] && self.file(at).kind == LayerKind::Disk
    }

    fn root(&self, at: usize) -> usize {
        if self.links.whole[at] { self.links.chain(at).last().unwrap_or(at) } else { at }
    }

    /// The snapshots that labels tell of.
    fn take_snapshots(&mut self) {
        let mut told: BTreeMap<SnapshotId, (Timestamp, Snapshot)> = BTreeMap::new();
        for at in self.all().filter(|at| self.is_good(*at) && self.links.is_sure(*at)) {
            let Some(label) = self.label(at) else { continue };
            for snapshot in &label.snapshots {
                let known = told.entry(snapshot.id).or_insert_with(|| (label.at, snapshot.clone()));
                if known.0 < label.at {
                    *known = (label.at, snapshot.clone());
                }
            }
        }
        for (id, (_, snapshot)) in told {
            if let Some(snapshot) = self.restored(snapshot) {
                self.snapshots.insert(id, snapshot);
            }
        }
    }

    /// A snapshot with what is left of it.
    fn restored(&mut self, mut snapshot: Snapshot) -> Option<Snapshot> {
        sane::snapshot(&mut snapshot);
        let name = snapshot.name.clone();
        self.make_sane(&mut snapshot.config, &name);
        let said = |what: String| Unknown { file: None, what: format!("{name}: {what}") };
        let of_guest = |snapshot: &Snapshot| snapshot.disks.keys().any(sane::is_disk);
        let had_some = of_guest(&snapshot);
        let lost: Vec<DiskId> = snapshot
            .disks
            .iter()
            .filter(|(_, id)| self.disk_layer(**id).is_none())
            .map(|(disk, _)| disk.clone())
            .collect();
        for disk in &lost {
            snapshot.disks.remove(disk);
            self.unknown.push(said(format!("what it held of {disk} is lost")));
        }
        if had_some && !of_guest(&snapshot) {
            self.unknown.push(said("none of its disks is left, so it does not come back".to_owned()));
            return None;
        }
        let sure = |id: &LayerId| {
            let layer = self.by_id.get(id).copied().filter(|at| self.is_good(*at) && self.links.is_sure(*at));
            layer.filter(|at| self.label(*at).is_some_and(|l| l.snapshots.iter().any(|s| s.id == snapshot.id)))
        };
        let changed: Vec<DiskId> =
            snapshot.disks.iter().filter(|(_, id)| sure(id).is_none()).map(|(disk, _)| disk.clone()).collect();
        let memory = snapshot.memory.filter(|id| sure(id).is_some_and(|at| self.file(at).kind == LayerKind::Memory));
        let parts = lost.is_empty() && changed.is_empty();
        for disk in changed {
            self.unknown.push(said(format!("whether {disk} is as it was then is not certain")));
        }
        if snapshot.memory.is_some() && (memory.is_none() || !parts) {
            let why =
                if memory.is_none() { "its memory is lost" } else { "its memory is of no use without just its disks" };
            self.unknown.push(said(why.to_owned()));
        }
        snapshot.memory = memory.filter(|_| parts);
        snapshot.state = SnapshotState::Ready;
        self.fit(&mut snapshot.config, &snapshot.disks);
        Some(snapshot)
    }

    /// Takes what makes no sense out of a configuration, and says which file in the CD drive is not taken over.
    fn make_sane(&mut self, config: &mut Config, whose: &str) {
        sane::config(config);
        if let Some(file) = config.cdrom.take_if(|file| !self.named.contains(file)) {
            let file = file.escape_debug();
            let what = format!("{whose}: what was in the CD drive is not taken over from a file's word: {file}");
            self.unknown.push(Unknown { file: None, what });
        }
    }

    fn disk_layer(&self, id: LayerId) -> Option<usize> {
        self.by_id.get(&id).copied().filter(|at| self.is_good(*at) && self.file(*at).kind == LayerKind::Disk)
    }

    /// The configuration has these disks, of the size that their files have. (Of a firmware's that is lost there will be another.)
    fn fit(&self, config: &mut Config, disks: &BTreeMap<DiskId, LayerId>) {
        config.disks.retain(|disk| disks.contains_key(&disk.id));
        if disks.contains_key(&DiskId::firmware()) {
            config.firmware = Firmware::Uefi;
        }
        for (id, layer) in disks.iter().filter(|(id, _)| sane::is_disk(id)) {
            let size = self.by_id.get(layer).map_or(0, |at| self.file(*at).info.size);
            match config.disks.iter_mut().find(|disk| &disk.id == id) {
                Some(disk) => disk.size = size,
                None => config.disks.push(sane::disk(id, size)),
            }
        }
    }

    fn named(&self) -> BTreeSet<LayerId> {
        self.snapshots.values().flat_map(|s| s.disks.values().chain(&s.memory)).copied().collect()
    }

    /// Disk layers on which nothing stands, but for what is nobody's.
    fn leaves(&self) -> Vec<usize> {
        let named = self.named();
        let mut counts: Vec<bool> = self.all().map(|at| self.links.whole[at]).collect();
        loop {
            let children = self.links.children(|at| counts[at]);
            let nobodys = |at: &usize| {
                counts[*at] && children[*at] == 0 && !named.contains(&self.ids[*at]) && self.is_nobodys(*at)
            };
            match self.all().find(nobodys) {
                Some(at) => counts[at] = false,
                None => {
                    return self.all().filter(|at| counts[*at] && children[*at] == 0 && self.is_disk(*at)).collect();
                }
            }
        }
    }

    /// A layer of which it is known that nothing names it.
    fn is_nobodys(&self, at: usize) -> bool {
        let free = |label: &Label| label.snapshots.is_empty() && label.now.is_none();
        self.links.torn[at] || self.links.foreign[at] || (self.links.is_sure(at) && self.label(at).is_some_and(free))
    }

    /// The leaves that belong together as the present, and what their labels say of it.
    fn present(&mut self) -> Option<Present> {
        let named = self.named();
        let leaves: Vec<usize> = self.leaves().into_iter().filter(|at| !named.contains(&self.ids[*at])).collect();
        let mut sets: Vec<(Timestamp, &Present)> = Vec::new();
        for label in leaves.iter().filter_map(|at| self.label(*at)) {
            if let Some(now) = label.now.as_ref().filter(|now| self.is_set(now, &leaves)) {
                match sets.iter_mut().find(|(_, other)| other.disks == now.disks) {
                    Some((at, known)) if *at < label.at => (*at, *known) = (label.at, now),
                    Some(_) => {}
                    None => sets.push((label.at, now)),
                }
            }
        }
        let newest = sets.iter().max_by_key(|(at, _)| *at).map(|(_, now)| (*now).clone());
        let mut now = newest.or_else(|| self.only_leaves(&leaves))?;
        self.make_sane(&mut now.config, "Now");
        self.fit(&mut now.config, &now.disks);
        Some(now)
    }

    /// Whether all leaves of a present are here.
    fn is_set(&self, now: &Present, leaves: &[usize]) -> bool {
        let mut seen = BTreeSet::new();
        let is_leaf = |id: &LayerId| self.by_id.get(id).is_some_and(|at| leaves.contains(at) && self.is_good(*at));
        !now.disks.is_empty()
            && now.disks.iter().all(|(disk, id)| sane::is_known(disk) && is_leaf(id) && seen.insert(id))
    }

    /// Where no label helps: one leaf for each disk can only be the present.
    fn only_leaves(&mut self, leaves: &[usize]) -> Option<Present> {
        let mut disks = BTreeMap::new();
        for at in leaves.iter().filter(|at| self.is_good(**at)) {
            let disk = self.disks[*at].clone()?;
            if self.label(*at).is_some_and(|label| label.now.is_some()) || disks.insert(disk, self.ids[*at]).is_some() {
                return None;
            }
        }
        let all: BTreeSet<&DiskId> =
            self.all().filter(|at| self.is_good(*at)).filter_map(|at| self.disks[at].as_ref()).collect();
        if disks.is_empty() || !all.into_iter().eq(disks.keys()) {
            return None;
        }
        let config = self.newest_config();
        Some(Present { parent: None, config, disks, memory: None, contents: BTreeMap::new() })
    }

    /// The last configuration that is known of, or a plain one.
    fn newest_config(&mut self) -> Config {
        let told = self.all().filter(|at| self.links.whole[*at]).filter_map(|at| self.label(at)).flat_map(|label| {
            let now = label.now.iter().map(|now| (label.at, &now.config));
            now.chain(label.snapshots.iter().map(|snapshot| (snapshot.created, &snapshot.config)))
        });
        let Some((_, config)) = told.max_by_key(|(at, _)| *at) else {
            let what = "its memory, processors and network are not known: it comes back with 1G and one processor";
            self.unknown.push(Unknown { file: None, what: what.to_owned() });
            return sane::plain();
        };
        config.clone()
    }

    /// The memory of a saved machine comes back as a snapshot, if its disks hold what they held then.
    fn take_saved(&mut self, now: &mut Option<Present>) {
        let memory: Vec<usize> =
            self.all().filter(|at| self.is_good(*at) && self.file(*at).kind == LayerKind::Memory).collect();
        for at in memory {
            let Some(label) = self.label(at).filter(|_| self.links.is_sure(at)) else { continue };
            let Some(saved) = &label.now else { continue };
            if let Some(same) = label.snapshots.iter().find_map(|told| self.snapshots.get(&told.id)) {
                let what = format!("the machine was saved, just as in {}; it comes back off", same.name);
                self.unknown.push(Unknown { file: None, what });
                continue;
            }
            // Its leaves say so, too: that they are those of this memory.
            let leaves = self.leaves();
            let is_its = |leaf: &usize| {
                let memory = self.label(*leaf).and_then(|label| label.now.as_ref()).and_then(|now| now.memory);
                leaves.contains(leaf) && memory == Some(self.ids[at])
            };
            let same = |(disk, id): (&DiskId, &LayerId)| {
                let leaf = self.disk_layer(*id).filter(is_its);
                leaf.is_some_and(|leaf| saved.contents.get(disk) == Some(&self.file(leaf).info.data_id))
            };
            if saved.disks.is_empty() || !saved.disks.iter().all(same) {
                let what = "it is the memory of a saved machine whose disks have changed since; it was left alone";
                self.unknown.push(Unknown::of(&self.file(at).file, what));
                continue;
            }
            let mut config = saved.config.clone();
            self.make_sane(&mut config, "saved state");
            self.fit(&mut config, &saved.disks);
            let mut snapshot = snapshot_row("saved state", label.at, config, saved.disks.clone());
            (snapshot.vm_state, snapshot.memory, snapshot.parent) = (State::Saved, Some(self.ids[at]), saved.parent);
            let what = "the machine was saved; it comes back off, and what it was in the middle of as a snapshot";
            self.unknown.push(Unknown { file: None, what: format!("{}: {what}", snapshot.name) });
            if now
                .as_ref()
                .is_some_and(|now| now.disks.values().any(|id| saved.disks.values().any(|other| other == id)))
            {
                *now = None;
                self.saved = Some(snapshot.id);
            }
            self.snapshots.insert(snapshot.id, snapshot);
        }
    }

    /// What is left and may be somebody's comes back as snapshots of its own.
    fn take_the_rest(&mut self, now: Option<&Present>) {
        let mut named = self.named();
        named.extend(now.into_iter().flat_map(|now| now.disks.values()));
        let children = self.links.children(|at| self.links.whole[at]);
        let rest: Vec<usize> =
            self.all().filter(|at| self.is_good(*at) && self.is_disk(*at) && !named.contains(&self.ids[*at])).collect();
        // Leaves that were the present together, or a part of it.
        let mut together: BTreeMap<Vec<LayerId>, Vec<usize>> = BTreeMap::new();
        for at in rest {
            if self.is_nobodys(at) || (children[at] == 0 && !self.file(at).holds) {
                continue;
            }
            let set = self.label(at).and_then(|label| label.now.as_ref()).filter(|_| children[at] == 0);
            let key = set.map_or_else(|| vec![self.ids[at]], |now| now.disks.values().copied().collect());
            together.entry(key).or_default().push(at);
        }
        for set in together.into_values() {
            self.take_found(&set);
        }
        self.tell_memory();
    }

    fn take_found(&mut self, set: &[usize]) {
        let files: Vec<&str> = set.iter().map(|at| self.file(*at).file.as_str()).collect();
        let label = set.iter().find_map(|at| self.label(*at));
        let told = label.and_then(|label| label.now.as_ref()).map(|now| now.config.clone());
        let mut config = told.unwrap_or_else(|| self.newest_config());
        self.make_sane(&mut config, files[0]);
        let disks = set.iter().filter_map(|at| Some((self.disks[*at].clone()?, self.ids[*at]))).collect();
        self.fit(&mut config, &disks);
        let names: Vec<&str> = set.iter().map(|at| self.file(*at).name()).collect();
        let name: String = format!("found: {}", names.join(", ")).chars().take(crate::plan::NAME_LIMIT).collect();
        let created = label.map_or(self.at, |label| label.at.min(self.at));
        let mut snapshot = snapshot_row(&sane::name(&name, "found"), created, config, disks);
        snapshot.parent = label.and_then(|label| label.now.as_ref()).and_then(|now| now.parent);
        for file in &files {
            let what = "which snapshot it was, if one, is not known: it comes back under its file's name";
            self.unknown.push(Unknown::of(file, what));
        }
        self.found.insert(snapshot.id);
        self.snapshots.insert(snapshot.id, snapshot);
    }

    fn tell_memory(&mut self) {
        let named = self.named();
        let mut needed: BTreeSet<usize> = BTreeSet::new();
        for at in self.all().filter(|at| self.links.whole[*at] && named.contains(&self.ids[*at])) {
            needed.extend(self.links.chain(at));
        }
        let memory: Vec<usize> =
            self.all().filter(|at| self.links.whole[*at] && self.file(*at).kind == LayerKind::Memory).collect();
        for at in memory {
            let told = self.unknown.iter().any(|said| said.file.as_ref() == Some(&self.file(at).file));
            let of_lost = self.label(at).is_some_and(|label| !label.snapshots.is_empty());
            if !needed.contains(&at) && !told && !of_lost {
                let what = "it is memory, and of which snapshot is not known; it was left alone";
                self.unknown.push(Unknown::of(&self.file(at).file, what));
            }
        }
    }

    /// The rows: what is named, and what that stands on.
    fn rows(mut self, id: MachineId, now: Option<Present>, over: Option<SnapshotId>) -> Rebuilt {
        let mut named = self.named();
        named.extend(now.iter().flat_map(|now| now.disks.values()));
        let kept: BTreeSet<usize> = named.iter().flat_map(|id| self.links.chain(self.by_id[id])).collect();
        self.tell_the_rest(&kept);
        self.set_parents();
        let (head, at) = (self.head(), self.last());
        let parent = match (&now, over) {
            (_, Some(over)) => Some(over),
            (Some(now), None) => {
                now.parent.filter(|id| self.snapshots.contains_key(id)).or_else(|| self.below(&now.disks, None))
            }
            (None, None) => None,
        };
        let config = now
            .as_ref()
            .map_or_else(|| self.snapshots[&over.expect("one of the two")].config.clone(), |now| now.config.clone());
        let layers: BTreeMap<LayerId, LayerRow> = kept.iter().map(|at| (self.ids[*at], self.row(*at))).collect();
        let mend = self.links.mend.iter().filter(|at| kept.contains(at)).map(|at| self.ids[*at]).collect();
        let mut machine = Machine {
            id,
            name: head.as_ref().map_or_else(|| "rescued".to_owned(), |head| sane::name(&head.name, "rescued")),
            note: head.as_ref().map(|head| head.note.clone()).unwrap_or_default(),
            created: head.as_ref().map_or(self.at, |head| head.created),
            policy: head.map(|head| head.policy).unwrap_or_default(),
            next_disk: self.next_disk(),
            now: Now {
                parent,
                under: None,
                state: State::Off,
                config,
                disks: now.map(|now| now.disks).unwrap_or_default(),
                memory: None,
                memory_base: None,
                restoring: None,
                touched: true,
                generation: Uuid::new_v4(),
                run: None,
            },
            snapshots: self.snapshots.into(),
            trash: Table::default(),
            layers: layers.into(),
        };
        sane::network(&mut machine);
        Rebuilt { machine, at, over, mend, unknown: self.unknown }
    }

    fn row(&self, at: usize) -> LayerRow {
        let file = self.file(at);
        LayerRow {
            id: self.ids[at],
            kind: file.kind,
            file: file.file.clone(),
            in_place: file.in_place,
            format: file.format(),
            parent: self.links.parent[at].map(|parent| self.ids[parent]),
            created: self.label(at).map_or(self.at, |label| label.made),
            folded: None,
            taken_on: None,
        }
    }

    fn tell_the_rest(&mut self, kept: &BTreeSet<usize>) {
        for at in self.all().filter(|at| self.links.whole[*at] && !kept.contains(at)) {
            let file = self.file(at);
            if !self.unknown.iter().any(|said| said.file.as_ref() == Some(&file.file)) {
                let what = if file.holds { "nothing needs it" } else { "it holds nothing" };
                self.unknown.push(Unknown::of(&file.file, format!("{what}; it was left alone")));
            }
        }
    }

    /// Where the snapshot that a snapshot stood on is gone, the nearest one below. What could be taken back is there again.
    fn set_parents(&mut self) {
        let ids: Vec<SnapshotId> = self.snapshots.keys().copied().collect();
        for id in ids {
            let snapshot = &self.snapshots[&id];
            let mut told = snapshot.under.into_iter().chain(snapshot.parent);
            let told = told.find(|parent| self.snapshots.contains_key(parent) && *parent != id);
            let below = if snapshot.disks.is_empty() { None } else { self.below(&snapshot.disks, Some(id)) };
            let parent = told.or(below);
            if let Some(snapshot) = self.snapshots.get_mut(&id) {
                (snapshot.parent, snapshot.under) = (parent, None);
            }
        }
        // What files say may be anything.
        let ids: Vec<SnapshotId> = self.snapshots.keys().copied().collect();
        for id in ids {
            let mut next = self.snapshots[&id].parent;
            for _ in 0..=self.snapshots.len() {
                next = next.and_then(|id| self.snapshots.get(&id)).and_then(|snapshot| snapshot.parent);
            }
            if let Some(snapshot) = self.snapshots.get_mut(&id).filter(|_| next.is_some()) {
                snapshot.parent = None;
            }
        }
    }

    /// The newest of the snapshots next below these layers.
    fn below(&self, disks: &BTreeMap<DiskId, LayerId>, but: Option<SnapshotId>) -> Option<SnapshotId> {
        let nearest = |leaf: &LayerId| {
            self.links.chain(*self.by_id.get(leaf)?).skip(1).find_map(|at| {
                let names = |s: &&Snapshot| Some(s.id) != but && s.disks.values().any(|id| *id == self.ids[at]);
                self.snapshots.values().find(names)
            })
        };
        disks.values().filter_map(nearest).max_by_key(|snapshot| (snapshot.created, snapshot.id)).map(|s| s.id)
    }

    /// A moment after all labels.
    fn last(&self) -> Timestamp {
        let told = self.all().filter_map(|at| self.label(at)).map(|label| just_after(label.at));
        told.max().map_or(self.at, |last| last.max(self.at))
    }

    /// What is said of the machine, by the label that was written last; the present's know its name best.
    fn head(&self) -> Option<Head> {
        let labels = self.all().filter(|at| self.links.whole[*at]).filter_map(|at| self.label(at));
        labels.max_by_key(|label| (label.now.is_some(), label.at)).map(|label| label.machine.clone())
    }

    fn next_disk(&self) -> u32 {
        let snapshots = self.snapshots.values().flat_map(|snapshot| snapshot.disks.keys());
        let told = self.all().filter_map(|at| self.label(at)).filter_map(|label| label.disk.as_ref());
        let number = |id: &DiskId| id.0.strip_prefix("disk").and_then(|n| n.parse::<u32>().ok());
        let all = self.disks.iter().flatten().chain(snapshots).chain(told).filter_map(number);
        all.max().map_or(0, |n| n.saturating_add(1))
    }
}

/// The layers' ids: what labels say, or what the files are named after; each once.
fn layer_ids(links: &Links<'_>) -> Vec<LayerId> {
    let mut taken = BTreeSet::new();
    let mut ids: Vec<Option<LayerId>> = vec![None; links.found.len()];
    let mut sure_first: Vec<usize> = (0..ids.len()).filter(|at| links.whole[*at]).collect();
    sure_first.sort_by_key(|at| (links.torn[*at], !links.is_sure(*at)));
    for at in sure_first {
        let told = links.label[at].map(|label| label.layer);
        let stem = links.found[at].name().split('.').next().and_then(|stem| Uuid::try_parse(stem).ok()).map(LayerId);
        ids[at] = told.or(stem).filter(|id| taken.insert(*id));
    }
    ids.into_iter().map(|id| id.unwrap_or_else(LayerId::new)).collect()
}

/// A snapshot's row, of which no label tells.
fn snapshot_row(name: &str, created: Timestamp, config: Config, disks: BTreeMap<DiskId, LayerId>) -> Snapshot {
    Snapshot {
        id: SnapshotId::new(),
        name: name.to_owned(),
        note: String::new(),
        parent: None,
        under: None,
        created,
        state: SnapshotState::Ready,
        vm_state: State::Off,
        config,
        disks,
        memory: None,
        stats: Stats::default(),
    }
}
