//! Random sequences of requests against a model: after each, the tree and the machine's memory are what the model says.

use e2e::{BASE, Lab, Witness};
use serde_json::Value;
use std::collections::BTreeMap;

/// Requests in a sequence.
const LENGTH: usize = 40;

/// What a point in time holds.
#[derive(Clone, Debug, PartialEq)]
struct Content {
    /// The text on each disk.
    disks: [u64; 2],
    /// The note in RAM, if there is RAM to remember it.
    ram: Option<u64>,
    memory: u64,
}

#[derive(Clone, Debug)]
struct Snapshot {
    parent: Option<String>,
    content: Content,
}

/// The naive machine.
#[derive(Debug)]
struct Model {
    state: &'static str,
    now: Content,
    parent: Option<String>,
    snapshots: BTreeMap<String, Snapshot>,
}

impl Model {
    fn take(&mut self, id: &str) {
        let snapshot = Snapshot { parent: self.parent.replace(id.to_owned()), content: self.now.clone() };
        self.snapshots.insert(id.to_owned(), snapshot);
    }

    fn apply(&mut self, id: &str) {
        self.now = self.snapshots[id].content.clone();
        self.parent = Some(id.to_owned());
        self.state = if self.now.ram.is_some() { "saved" } else { "off" };
    }

    fn delete(&mut self, id: &str) {
        let gone = self.snapshots.remove(id).expect("it is there");
        for parent in self.snapshots.values_mut().map(|one| &mut one.parent).chain([&mut self.parent]) {
            if parent.as_deref() == Some(id) {
                parent.clone_from(&gone.parent);
            }
        }
    }

    fn delete_subtree(&mut self, id: &str) {
        let children: Vec<String> = self
            .snapshots
            .iter()
            .filter(|(_, one)| one.parent.as_deref() == Some(id))
            .map(|(id, _)| id.clone())
            .collect();
        for child in children {
            self.delete_subtree(&child);
        }
        self.delete(id);
    }
}

/// The machine and its model, and the numbers by which both go.
struct Run {
    lab: Lab,
    witness: Option<Witness>,
    model: Model,
    seed: u64,
    /// Each change writes another number.
    next: u64,
    /// For the message of a failure.
    log: Vec<String>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let (lab, _) = Lab::running();
        let now = Content { disks: [0; 2], ram: Some(0), memory: 128 };
        let model = Model { state: "running", now, parent: None, snapshots: BTreeMap::new() };
        let mut run = Self { lab, witness: None, model, seed, next: 1, log: Vec::new() };
        run.change(0);
        run.change(1);
        run
    }

    fn below(&mut self, limit: usize) -> usize {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) as usize % limit
    }

    fn witness(&mut self) -> &mut Witness {
        self.witness.get_or_insert_with(|| {
            let mut witness = self.lab.witness(BASE);
            witness.resync();
            witness
        })
    }

    fn ok(&mut self, args: &[&str]) {
        self.log.push(args.join(" "));
        self.lab.ok(args);
    }

    /// Another number on one of the disks, and in RAM.
    fn change(&mut self, disk: usize) {
        let number = self.next;
        self.next += 1;
        self.log.push(format!("write {number} to disk {disk}"));
        let name = ["vda", "vdb"][disk];
        // Over the place of the text, too: the text is what is left of it.
        self.witness().ask(&format!("fill-disk {name} 16M {} {number}", 1 + number % 3));
        self.witness().ask(&format!("write {name} 4M number {number}"));
        self.witness().ask(&format!("set number {number}"));
        self.model.now.disks[disk] = number;
        self.model.now.ram = Some(number);
    }

    fn step(&mut self) {
        let running = self.model.state == "running";
        match self.below(12) {
            0..=3 if running => {
                let disk = self.below(2);
                self.change(disk);
            }
            0..=2 => self.start(),
            3 | 4 => self.snapshot(),
            5..=7 => self.apply(),
            8 => self.delete(),
            9 if running => self.leave(&["vm", "save", BASE], "saved"),
            10 => self.turn_off(),
            11 if running => {
                self.log.push("kill the worker".to_owned());
                self.witness = None;
                self.lab.kill_worker();
            }
            _ if self.model.state == "off" => self.set_memory(),
            _ => self.start(),
        }
    }

    fn start(&mut self) {
        let booted = self.model.state == "off";
        self.ok(&["vm", "start", BASE]);
        if booted {
            self.model.now.ram = None;
        }
        self.model.state = "running";
        self.witness().resync();
        if booted {
            // RAM begins anew.
            let number = self.next;
            self.next += 1;
            self.witness().ask(&format!("set number {number}"));
            self.model.now.ram = Some(number);
        }
    }

    fn leave(&mut self, args: &[&str], state: &'static str) {
        self.witness = None;
        self.ok(args);
        self.model.state = state;
    }

    fn turn_off(&mut self) {
        self.leave(&["vm", "stop", BASE, "--turn-off"], "off");
        self.model.now.ram = None;
    }

    fn set_memory(&mut self) {
        let memory = [128, 130, 136][self.below(3)];
        self.ok(&["vm", "set", BASE, "--memory", &format!("{memory}M")]);
        self.model.now.memory = memory;
    }

    fn snapshot(&mut self) {
        // The names repeat; the ids do not.
        let name = format!("name {}", self.below(3));
        self.log.push(format!("snapshot {name}"));
        let id = self.lab.snapshot(&name);
        self.model.take(&id);
    }

    fn any(&mut self) -> Option<String> {
        let count = self.model.snapshots.len();
        let index = if count == 0 { return None } else { self.below(count) };
        self.model.snapshots.keys().nth(index).cloned()
    }

    fn apply(&mut self) {
        let Some(id) = self.any() else { return };
        let keep = self.below(2) == 0;
        // A boot takes seconds: what has no memory is not started here.
        let start = self.model.snapshots[&id].content.ram.is_some() && self.below(4) > 0;
        let run = if start { "--start" } else { "--no-start" };
        self.witness = None;
        if keep {
            let before: Vec<String> = self.model.snapshots.keys().cloned().collect();
            self.ok(&["snapshot", "apply", BASE, &id, "--keep", run]);
            let tree = self.lab.tree();
            let ids =
                tree["snapshots"].as_array().expect("a list").iter().map(|one| one["id"].as_str().expect("an id"));
            let new: Vec<&str> = ids.filter(|id| !before.iter().any(|old| old == id)).collect();
            assert_eq!(new.len(), 1, "the present, kept");
            self.model.take(new[0]);
        } else {
            self.ok(&["snapshot", "apply", BASE, &id, "--discard", run]);
        }
        self.model.apply(&id);
        if start {
            self.model.state = "running";
        }
    }

    fn delete(&mut self) {
        let Some(id) = self.any() else { return };
        if self.below(3) == 0 {
            self.ok(&["snapshot", "delete", BASE, &id, "--subtree"]);
            self.model.delete_subtree(&id);
        } else {
            self.ok(&["snapshot", "delete", BASE, &id]);
            self.model.delete(&id);
        }
    }

    /// The machine is what the model says.
    fn compare(&mut self) {
        let tree = self.lab.tree();
        assert_eq!(tree["now"]["state"], self.model.state);
        assert_eq!(tree["now"]["parent"].as_str(), self.model.parent.as_deref());
        let have: BTreeMap<&str, (Option<&str>, bool, u64)> = tree["snapshots"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|one| {
                assert_eq!(one["state"], "ready");
                let memory = one["config"]["memory"].as_u64().expect("bytes") >> 20;
                let about = (one["parent"].as_str(), one["memory"] == true, memory);
                (one["id"].as_str().expect("an id"), about)
            })
            .collect();
        let want = self
            .model
            .snapshots
            .iter()
            .map(|(id, one)| (id.as_str(), (one.parent.as_deref(), one.content.ram.is_some(), one.content.memory)));
        assert_eq!(have, want.collect());
        if self.model.state == "running" {
            self.compare_content();
        }
    }

    fn compare_content(&mut self) {
        let want = self.model.now.clone();
        self.witness().prove();
        let number = self.witness().ask("get number")["value"].clone();
        assert_eq!(number, want.ram.map_or(Value::Null, |number| number.to_string().into()));
        for (name, number) in ["vda", "vdb"].into_iter().zip(want.disks) {
            assert_eq!(self.witness().ask(&format!("read {name} 4M"))["text"], format!("number {number}"));
            let sum = format!("sum-disk {name} 16M {} {number}", 1 + number % 3);
            assert_eq!(self.witness().ask(&sum)["ok"], true, "{sum}");
        }
    }

    /// In the end every snapshot is applied in turn, and all that is left is what the rows need.
    fn prove_all(&mut self) {
        let ids: Vec<String> = self.model.snapshots.keys().cloned().collect();
        for id in ids {
            self.witness = None;
            self.ok(&["snapshot", "apply", BASE, &id, "--discard", "--no-start"]);
            self.model.apply(&id);
            if self.model.state == "saved" {
                self.start();
            }
            self.compare();
        }
        self.witness = None;
        self.lab.settle();
        self.lab.assert_tidy();
        self.lab.wait_hashed();
    }
}

fn sequence(seed: u64) {
    let mut run = Run::new(seed);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for _ in 0..LENGTH {
            run.step();
            run.compare();
        }
        run.prove_all();
    }));
    if let Err(panic) = outcome {
        eprintln!("seed {seed}, after:\n  {}", run.log.join("\n  "));
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn sequence_1() {
    sequence(1);
}

#[test]
fn sequence_2() {
    sequence(20_261_124);
}

#[test]
fn sequence_3() {
    sequence(std::env::var("TENBY_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(3));
}
