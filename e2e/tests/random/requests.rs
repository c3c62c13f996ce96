//! What can be asked of a machine, each with what it makes of the model.

use crate::blows::Blow;
use crate::model::{Model, Shape};
use crate::run::Run;
use e2e::{BASE, wait_for};

/// A request, and what it makes of the model.
pub(crate) struct Wish {
    pub(crate) words: Vec<String>,
    /// Whether a conversation with the guest ends by it.
    ends: bool,
    done: Box<Done>,
}

/// Ids are the worker's choice: the tree shows them. `None` if this tree cannot come of the request.
type Done = dyn Fn(&mut Model, &Shape) -> Option<()>;

impl Wish {
    fn new(words: &[&str], done: impl Fn(&mut Model, &Shape) -> Option<()> + 'static) -> Self {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        Self { words, ends: false, done: Box::new(done) }
    }

    fn ending(self) -> Self {
        Self { ends: true, ..self }
    }

    /// The words, to run them.
    pub(crate) fn args(&self) -> Vec<&str> {
        self.words.iter().map(String::as_str).collect()
    }

    /// The model after it, if the tree that `shape` shows can have come of it.
    pub(crate) fn done(&self, before: &Model, shape: &Shape) -> Option<Model> {
        let mut model = before.clone();
        (self.done)(&mut model, shape)?;
        Some(model)
    }
}

impl Run {
    /// Something random: a change by the guest, a request, or the worker's death.
    pub(crate) fn request(&mut self) {
        let running = self.model.state == "running";
        match self.below(12) {
            0..=3 if running => {
                let disk = self.below(2);
                self.change(disk);
            }
            11 if running => _ = self.strike(Blow::Worker),
            number => {
                if let Some(wish) = self.wish(number) {
                    self.grant(&wish);
                }
            }
        }
    }

    /// The request of this number, up to 11, as far as the machine's state allows it; `None` if it needs a snapshot and there is none.
    pub(crate) fn wish(&mut self, number: usize) -> Option<Wish> {
        match (number, self.model.state) {
            (0..=2, "running") => Some(Self::pause()),
            (0..=2, _) => Some(self.start()),
            (3 | 4, _) => Some(self.snapshot()),
            (5..=7, _) => self.apply_any(),
            (8, _) => self.delete_any(),
            (9, "running" | "paused") => Some(Self::save()),
            (10, _) => Some(Self::turn_off()),
            (_, "off") => Some(self.set_memory()),
            _ => Some(self.start()),
        }
    }

    /// Asks for it; it has to be done.
    pub(crate) fn grant(&mut self, wish: &Wish) {
        self.log.push(wish.words.join(" "));
        if wish.ends {
            self.witness = None;
        }
        self.lab.ok(&wish.args());
        let shape = self.shape();
        let done = wish.done(&self.model, &shape);
        self.model = done.unwrap_or_else(|| panic!("{:?} brought {shape:?}", wish.words));
        self.greet();
    }

    pub(crate) fn start(&self) -> Wish {
        let verb = if self.model.state == "paused" { "resume" } else { "start" };
        Wish::new(&["vm", verb, BASE], |model, _| {
            model.start();
            Some(())
        })
    }

    fn pause() -> Wish {
        let paused = Wish::new(&["vm", "pause", BASE], |model, _| {
            model.state = "paused";
            Some(())
        });
        paused.ending()
    }

    fn save() -> Wish {
        let saved = Wish::new(&["vm", "save", BASE], |model, _| {
            model.state = "saved";
            Some(())
        });
        saved.ending()
    }

    pub(crate) fn turn_off() -> Wish {
        let off = Wish::new(&["vm", "stop", BASE, "--turn-off"], |model, _| {
            model.turn_off();
            Some(())
        });
        off.ending()
    }

    fn set_memory(&mut self) -> Wish {
        let memory = [128, 130, 136][self.below(3)];
        Wish::new(&["vm", "set", BASE, "--memory", &format!("{memory}M")], move |model, _| {
            model.now.memory = memory;
            Some(())
        })
    }

    pub(crate) fn snapshot(&mut self) -> Wish {
        // The names repeat; the ids do not.
        let name = format!("name {}", self.below(3));
        Wish::new(&["snapshot", "create", BASE, &name], |model, shape| {
            let id = shape.new_since(model)?;
            model.take(&id);
            Some(())
        })
    }

    fn any(&mut self) -> Option<String> {
        let count = self.model.ids().count();
        let index = if count == 0 { return None } else { self.below(count) };
        self.model.ids().nth(index).cloned()
    }

    fn apply_any(&mut self) -> Option<Wish> {
        let id = self.any()?;
        let keep = self.below(2) == 0;
        // A boot takes seconds: what has no memory is not started here.
        let start = self.model.holds(&id).ram.is_some() && self.below(4) > 0;
        Some(Self::apply(&id, keep, start))
    }

    pub(crate) fn apply(id: &str, keep: bool, start: bool) -> Wish {
        let (present, run) = (if keep { "--keep" } else { "--discard" }, if start { "--start" } else { "--no-start" });
        let to = id.to_owned();
        let applied = Wish::new(&["snapshot", "apply", BASE, id, present, run], move |model, shape| {
            if keep {
                let kept = shape.new_since(model)?;
                model.take(&kept);
            } else if shape.keeps_more_than(model) {
                model.discard();
            }
            model.apply(&to);
            if start {
                model.state = "running";
            }
            Some(())
        });
        applied.ending()
    }

    pub(crate) fn delete_any(&mut self) -> Option<Wish> {
        let id = self.any()?;
        let subtree = self.below(3) == 0;
        Some(Self::delete(&id, subtree))
    }

    pub(crate) fn delete(id: &str, subtree: bool) -> Wish {
        let below: &[&str] = if subtree { &["--subtree"] } else { &[] };
        let gone = id.to_owned();
        Wish::new(&[&["snapshot", "delete", BASE, id], below].concat(), move |model, _| {
            model.delete(&gone, subtree);
            Some(())
        })
    }

    pub(crate) fn undo() -> Wish {
        Wish::new(&["vm", "undo", BASE], Model::take_back)
    }

    /// From now on what is deleted or discarded can be taken back, or not any more.
    pub(crate) fn keep(&mut self, keep: bool) {
        let time = if keep { "7d" } else { "0" };
        self.note(&format!("undo for {time}"));
        self.lab.ok(&["vm", "set", BASE, "--undo-for", time]);
        self.model.keep(keep);
        wait_for("what cannot be taken back to go", || (self.shape() == self.model.shape()).then_some(()));
    }

    /// Waits until nothing is under way, and helps where only its user can.
    pub(crate) fn settle(&mut self) {
        // One that was cancelled begins again with the next request.
        self.lab.ok(&["vm", "set", BASE, "--note", "settle"]);
        self.steer("resume", None);
        self.steer("throttle", Some("0"));
        self.lab.settle();
    }

    /// Does this to the merge under way, if there is one.
    pub(crate) fn steer(&mut self, verb: &str, value: Option<&str>) {
        let jobs = self.lab.json(&["job", "list", BASE])["jobs"].take();
        let merge =
            jobs.as_array().expect("a list").iter().find(|job| job["kind"] == "merge" && job["ended"].is_null());
        let Some(id) = merge.and_then(|job| job["id"].as_str()) else { return };
        self.note(&format!("{verb} the merge {}", value.unwrap_or_default()));
        let asked = self.lab.tenby(&["job", verb, id].into_iter().chain(value).collect::<Vec<_>>());
        // It may be done by now.
        let ended = || !self.lab.json(&["job", "show", id])["ended"].is_null();
        assert!(asked.code == 0 || asked.code == 3 && ended(), "{asked:?}");
    }
}
