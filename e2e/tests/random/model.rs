//! The naive machine: what a real one has to show and to hold after each request.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// What a point in time holds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Content {
    /// The text on each disk.
    pub(crate) disks: [u64; 2],
    /// The pile of data on each disk; 0 where there is none.
    pub(crate) piles: [u64; 2],
    /// The note in RAM, if there is RAM to remember it.
    pub(crate) ram: Option<u64>,
    pub(crate) memory: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Snapshot {
    /// What it was taken on, whether that can still be seen or was thrown away.
    stood_on: Option<String>,
    pub(crate) content: Content,
}

/// What can be taken back.
#[derive(Clone, Debug, PartialEq)]
enum Thrown {
    Deleted(BTreeSet<String>),
    Discarded(Snapshot),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Model {
    pub(crate) state: &'static str,
    pub(crate) now: Content,
    stood_on: Option<String>,
    /// Those that were thrown away and can be taken back, too.
    snapshots: BTreeMap<String, Snapshot>,
    /// Oldest first.
    trash: Vec<Thrown>,
    /// Whether what is deleted or discarded can be taken back.
    pub(crate) keeps: bool,
}

/// What `snapshot list` shows of a machine.
#[derive(Debug, PartialEq)]
pub(crate) struct Shape {
    state: String,
    parent: Option<String>,
    /// What each stands on, whether it has memory, and its MiB of RAM.
    snapshots: BTreeMap<String, (Option<String>, bool, u64)>,
    /// How much can be taken back.
    undo: usize,
}

impl Model {
    /// A machine that runs and has nothing on its disks.
    pub(crate) fn running() -> Self {
        let now = Content { disks: [0; 2], piles: [0; 2], ram: Some(0), memory: 128 };
        let (snapshots, trash) = (BTreeMap::new(), Vec::new());
        Self { state: "running", now, stood_on: None, snapshots, trash, keeps: false }
    }

    pub(crate) fn has_qemu(&self) -> bool {
        ["running", "paused"].contains(&self.state)
    }

    pub(crate) fn shape(&self) -> Shape {
        let about = |id: &String| {
            let Snapshot { stood_on, content } = &self.snapshots[id];
            (id.clone(), (self.nearest(stood_on.as_ref()), content.ram.is_some(), content.memory))
        };
        Shape {
            state: self.state.to_owned(),
            parent: self.parent(),
            snapshots: self.ids().map(about).collect(),
            undo: self.trash.len(),
        }
    }

    /// The snapshots that can be seen.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &String> {
        self.snapshots.keys().filter(|id| self.is_seen(id))
    }

    pub(crate) fn holds(&self, id: &str) -> &Content {
        &self.snapshots[id].content
    }

    /// The snapshot that Now stands on.
    pub(crate) fn parent(&self) -> Option<String> {
        self.nearest(self.stood_on.as_ref())
    }

    fn is_seen(&self, id: &str) -> bool {
        !self.trash.iter().any(|thrown| matches!(thrown, Thrown::Deleted(ids) if ids.contains(id)))
    }

    fn nearest<'a>(&'a self, mut stood_on: Option<&'a String>) -> Option<String> {
        while let Some(id) = stood_on.filter(|id| !self.is_seen(id)) {
            stood_on = self.snapshots[id].stood_on.as_ref();
        }
        stood_on.cloned()
    }

    /// Boots, or goes on where it was saved or paused.
    pub(crate) fn start(&mut self) {
        if self.state == "off" {
            // RAM begins anew.
            self.now.ram = None;
        }
        self.state = "running";
    }

    pub(crate) fn turn_off(&mut self) {
        self.state = "off";
        self.now.ram = None;
    }

    /// What becomes of it when its QEMU is killed.
    pub(crate) fn lose_qemu(&mut self) {
        if self.has_qemu() {
            self.turn_off();
        }
    }

    pub(crate) fn take(&mut self, id: &str) {
        let snapshot = Snapshot { stood_on: self.stood_on.replace(id.to_owned()), content: self.now.clone() };
        self.snapshots.insert(id.to_owned(), snapshot);
    }

    pub(crate) fn apply(&mut self, id: &str) {
        self.now = self.snapshots[id].content.clone();
        self.stood_on = Some(id.to_owned());
        self.state = if self.now.ram.is_some() { "saved" } else { "off" };
    }

    /// The present will be replaced, and can be taken back; only memory that was written already comes back with it.
    pub(crate) fn discard(&mut self) {
        let mut content = self.now.clone();
        content.ram = content.ram.filter(|_| self.state == "saved");
        self.trash.push(Thrown::Discarded(Snapshot { stood_on: self.stood_on.clone(), content }));
    }

    pub(crate) fn delete(&mut self, id: &str, subtree: bool) {
        let mut gone = BTreeSet::from([id.to_owned()]);
        while subtree && let Some(child) = self.child_of(&gone) {
            gone.insert(child);
        }
        if self.keeps {
            self.trash.push(Thrown::Deleted(gone));
        } else {
            for id in &gone {
                self.forget(id);
            }
        }
    }

    fn child_of(&self, parents: &BTreeSet<String>) -> Option<String> {
        let below =
            |id: &&String| self.nearest(self.snapshots[*id].stood_on.as_ref()).is_some_and(|id| parents.contains(&id));
        self.ids().find(|id| !parents.contains(*id) && below(id)).cloned()
    }

    fn forget(&mut self, id: &str) {
        let Some(gone) = self.snapshots.remove(id) else { return };
        let discarded = self.trash.iter_mut().filter_map(|thrown| match thrown {
            Thrown::Discarded(snapshot) => Some(snapshot),
            Thrown::Deleted(_) => None,
        });
        let snapshots = self.snapshots.values_mut().chain(discarded).map(|one| &mut one.stood_on);
        for stood_on in snapshots.chain([&mut self.stood_on]) {
            if stood_on.as_deref() == Some(id) {
                stood_on.clone_from(&gone.stood_on);
            }
        }
    }

    /// What is deleted or discarded from now on can be taken back; or it can not, and what could be is given up.
    pub(crate) fn keep(&mut self, keeps: bool) {
        self.keeps = keeps;
        while !keeps && let Some(thrown) = self.trash.pop() {
            if let Thrown::Deleted(ids) = thrown {
                for id in &ids {
                    self.forget(id);
                }
            }
        }
    }

    /// Whether something can be taken back.
    pub(crate) fn has_trash(&self) -> bool {
        !self.trash.is_empty()
    }

    /// Takes back the latest. A present that was discarded is a snapshot then, with an id that only `shape` knows.
    pub(crate) fn take_back(&mut self, shape: &Shape) -> Option<()> {
        let new = shape.new_since(self);
        if let Thrown::Discarded(snapshot) = self.trash.pop()? {
            self.snapshots.insert(new?, snapshot);
        }
        Some(())
    }
}

impl Shape {
    pub(crate) fn of(tree: &Value) -> Self {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let about = |one: &Value| {
            assert_eq!(one["state"], "ready");
            let memory = one["config"]["memory"].as_u64().expect("bytes") >> 20;
            (text(&one["id"]).expect("an id"), (text(&one["parent"]), one["memory"] == true, memory))
        };
        Self {
            state: text(&tree["now"]["state"]).expect("a state"),
            parent: text(&tree["now"]["parent"]),
            snapshots: tree["snapshots"].as_array().expect("a list").iter().map(about).collect(),
            undo: tree["undo"].as_array().expect("a list").len(),
        }
    }

    /// The one snapshot that the model does not know.
    pub(crate) fn new_since(&self, model: &Model) -> Option<String> {
        let mut new = self.snapshots.keys().filter(|id| !model.snapshots.contains_key(*id));
        new.next().filter(|_| new.next().is_none()).cloned()
    }

    /// Whether more can be taken back than the model knows of.
    pub(crate) fn keeps_more_than(&self, model: &Model) -> bool {
        self.undo > model.trash.len()
    }
}
