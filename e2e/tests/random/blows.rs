//! Death at random: of the worker, of QEMU, of both; while merges are under way, and while a request is.

use crate::model::{Model, Shape};
use crate::requests::Wish;
use crate::run::{Run, pile};
use e2e::{BASE, Lab, Process, wait_for};
use std::time::Duration;

/// After a request was sent a blow falls within so many milliseconds.
const SOON: usize = 300;
/// The same after a merge was begun, which takes no longer.
const SOONER: usize = 50;

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Blow {
    Worker,
    Qemu,
    Both,
}

/// How often something was killed.
#[derive(Debug, Default)]
pub(crate) struct Kills {
    pub(crate) all: usize,
    /// Those while a merge was pending.
    pub(crate) merging: usize,
}

impl Blow {
    /// On whoever is there; says on how many.
    fn fall(self, lab: &Lab) -> usize {
        match self {
            Self::Worker => lab.kill(Process::is_worker),
            Self::Qemu => lab.kill(Process::is_qemu),
            Self::Both => lab.kill(|process| process.is_worker() || process.is_qemu()),
        }
    }
}

impl Run {
    fn any_blow(&mut self) -> Blow {
        [Blow::Worker, Blow::Worker, Blow::Worker, Blow::Qemu, Blow::Both][self.below(5)]
    }

    fn within(&mut self, ms: usize) -> Duration {
        Duration::from_millis(self.below(ms) as u64)
    }

    pub(crate) fn is_merging(&self) -> bool {
        self.lab.tree()["pending"].as_array().expect("a list").iter().any(|work| work["kind"] == "merge")
    }

    /// Whether a merge was under way.
    pub(crate) fn strike(&mut self, blow: Blow) -> bool {
        // A console would wake another worker.
        self.witness = None;
        let merging = self.is_merging();
        self.note(&format!("kill {blow:?}{}", if merging { ", merging" } else { "" }));
        let killed = blow.fall(&self.lab);
        self.count(killed, merging);
        if blow != Blow::Worker {
            self.model.lose_qemu();
            wait_for("the machine to be known as off", || (self.shape() == self.model.shape()).then_some(()));
        }
        merging
    }

    fn count(&mut self, killed: usize, merging: bool) {
        self.kills.all += usize::from(killed > 0);
        self.kills.merging += usize::from(killed > 0 && merging);
    }

    /// Blow after blow, as long as a merge is under way: each new worker begins it again.
    pub(crate) fn beat(&mut self) {
        if self.below(8) > 0 && !self.is_merging() {
            self.stir();
        }
        let mut merging = true;
        while merging && self.below(8) > 0 {
            if self.below(4) == 0 {
                self.steer("throttle", Some("2M"));
            }
            let (soon, blow) = (self.within(SOONER), self.any_blow());
            std::thread::sleep(soon);
            merging = self.strike(blow);
            assert_eq!(self.shape(), self.model.shape());
        }
    }

    /// Leaves a merge to do that is big enough to be under way for a while.
    fn stir(&mut self) {
        if self.model.keeps {
            self.keep(false);
        }
        if self.model.state != "running" {
            let wish = self.start();
            self.grant(&wish);
        }
        let before = self.snapshot();
        self.grant(&before);
        let gone = self.model.parent().expect("it was just taken");
        self.pile(0);
        self.pile(1);
        let after = self.snapshot();
        self.grant(&after);
        self.grant(&Self::delete(&gone, false));
    }

    /// Somebody dies while the guest writes a pile and flushes nothing. Without its worker it goes on, and what it was told is written is
    /// there; without its QEMU nobody knows what is.
    pub(crate) fn pile_torn(&mut self, disk: usize) {
        if self.model.now.piles[disk] == 0 {
            self.pile(disk);
        }
        let (number, before) = (self.number(), self.model.now.piles[disk]);
        let (blow, soon) = (self.any_blow(), self.within(SOON));
        self.note(&format!("pile {number} on disk {disk}, not flushed"));
        self.witness().ask("journal pause");
        let _heard = self.witness().try_ask(&pile("pour", disk, number), soon);
        self.strike(blow);
        self.model.now.piles[disk] = 0;
        if self.model.state == "running" {
            // It may not have heard what it was asked for.
            let there = [number, before].into_iter().find(|number| self.has_pile(disk, *number));
            let there = there.unwrap_or_else(|| panic!("neither pile {number} nor {before} is on disk {disk}"));
            self.model.now.piles[disk] = there;
            // Once on each disk, with a flush.
            self.witness().ask("journal step 2");
            self.witness().ask("journal run");
        }
    }

    /// A request during which somebody dies: it is done, or has changed nothing, and the command says which.
    pub(crate) fn tear(&mut self) {
        let number = self.below(12);
        let wish = match number {
            11 if self.model.has_trash() => Some(Self::undo()),
            _ => self.wish(number),
        };
        let Some(wish) = wish else { return };
        let (blow, soon) = (self.any_blow(), self.within(SOON));
        if self.could_hide(&wish) {
            return self.grant(&wish);
        }
        self.witness = None;
        let merging = self.is_merging();
        self.note(&format!("{}; after {soon:?} kill {blow:?}", wish.words.join(" ")));
        let mut killed = 0;
        let output = self.lab.struck(&wish.args(), soon, || killed = blow.fall(&self.lab));
        self.count(killed, merging);
        let cut = blow != Blow::Worker && killed > 0;
        let done = self.adopt(&wish, cut, output.code == 0);
        self.note(if done { "done" } else { "not done" });
        assert!(done || output.code != 0, "it was not done: {output:?}");
        assert!(cut || !done || output.code == 0, "it was done: {output:?}");
        self.greet();
    }

    /// Whether the tree would not show that it was done, though what the machine holds would.
    fn could_hide(&self, wish: &Wish) -> bool {
        let done = wish.done(&self.model, &self.model.shape());
        done.is_some_and(|done| done != self.model && done.shape() == self.model.shape())
    }

    /// Waits until the machine is what it was, or what it has to be after the request, and says which. `cut` if a QEMU was killed: the one that
    /// was there, or the one that the request had started.
    fn adopt(&mut self, wish: &Wish, cut: bool, likely: bool) -> bool {
        let what = format!("{:?} to be done or not done to {:?}", wish.words, self.model.shape());
        let (done, model) = wait_for(&what, || {
            let shape = self.shape();
            let has_qemu = self.lab.processes().iter().any(Process::is_qemu);
            let mut ends = ends(&self.model, wish, &shape, cut);
            ends.sort_by_key(|(done, _)| *done != likely);
            ends.into_iter().find(|(_, model)| model.shape() == shape && model.has_qemu() == has_qemu)
        });
        self.model = model;
        done
    }

    pub(crate) fn check(&mut self) {
        self.note("check");
        let audit = self.lab.json(&["vm", "check", BASE]);
        assert_eq!(audit["clean"], true, "{audit}");
    }
}

/// What can have become of a machine, and whether the request was done then. `cut`: its QEMU died before, meanwhile or afterwards.
fn ends(before: &Model, wish: &Wish, shape: &Shape, cut: bool) -> Vec<(bool, Model)> {
    let off = |model: &Model| {
        let mut model = model.clone();
        model.lose_qemu();
        model
    };
    let mut ends = vec![(false, before.clone())];
    if cut {
        ends.push((false, off(before)));
    }
    let done: Vec<Model> = ends.iter().filter_map(|(_, model)| wish.done(model, shape)).collect();
    if cut {
        ends.extend(done.iter().map(|model| (true, off(model))));
    }
    ends.extend(done.into_iter().map(|model| (true, model)));
    ends
}
