//! A machine beside its model.

use crate::blows::Kills;
use crate::model::{Content, Model, Shape};
use e2e::{BASE, Lab, Witness};
use serde_json::Value;

/// What the guest calls its disks.
const DISKS: [&str; 2] = ["vda", "vdb"];
/// A pile, which takes a merge a while to move: where it begins, and its MiB.
const PILE: (&str, u64) = ("24M", 40);

/// The machine and its model, and the numbers by which both go.
pub(crate) struct Run {
    pub(crate) lab: Lab,
    pub(crate) witness: Option<Witness>,
    pub(crate) model: Model,
    seed: u64,
    /// Each change writes another number.
    next: u64,
    /// For the message of a failure.
    pub(crate) log: Vec<String>,
    pub(crate) kills: Kills,
}

/// The seed that whoever runs this wants.
pub(crate) fn seed() -> Option<u64> {
    std::env::var("TENBY_SEED").ok()?.parse().ok()
}

/// What the guest is asked for to do this with a pile: `fill`, `pour` (the same without a flush) or `sum`.
pub(crate) fn pile(verb: &str, disk: usize, number: u64) -> String {
    format!("{verb}-disk {} {} {} {number}", DISKS[disk], PILE.0, PILE.1)
}

impl Run {
    /// A game from this seed. One that is lost is told from its beginning.
    pub(crate) fn play(seed: u64, game: impl FnOnce(&mut Self)) {
        let mut run = Self::new(seed);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| game(&mut run)));
        if let Err(panic) = outcome {
            eprintln!("seed {seed}, after:\n  {}", run.log.join("\n  "));
            eprintln!("model: {:#?}\ntree: {}", run.model, run.lab.tenby(&["--json", "snapshot", "list", BASE]).stdout);
            std::panic::resume_unwind(panic);
        }
    }

    fn new(seed: u64) -> Self {
        let (lab, _) = Lab::running();
        let (model, kills) = (Model::running(), Kills::default());
        let mut run = Self { lab, witness: None, model, seed, next: 1, log: Vec::new(), kills };
        run.hurry();
        run.change(0);
        run.change(1);
        run
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) as usize % limit
    }

    pub(crate) fn note(&mut self, words: &str) {
        self.log.push(words.to_owned());
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    pub(crate) fn witness(&mut self) -> &mut Witness {
        self.witness.get_or_insert_with(|| {
            let mut witness = self.lab.witness(BASE);
            witness.resync();
            witness
        })
    }

    /// Another number on one of the disks, and in RAM.
    pub(crate) fn change(&mut self, disk: usize) {
        let number = self.number();
        self.note(&format!("write {number} to disk {disk}"));
        let name = DISKS[disk];
        self.witness().ask(&format!("fill-disk {name} 16M {} {number}", 1 + number % 3));
        self.witness().ask(&format!("write {name} 4M number {number}"));
        self.remember(number);
        self.model.now.disks[disk] = number;
    }

    /// Another pile on one of the disks.
    pub(crate) fn pile(&mut self, disk: usize) {
        let number = self.number();
        self.note(&format!("pile {number} on disk {disk}"));
        self.witness().ask(&pile("fill", disk, number));
        self.model.now.piles[disk] = number;
    }

    pub(crate) fn has_pile(&mut self, disk: usize, number: u64) -> bool {
        self.witness().ask(&pile("sum", disk, number))["ok"] == true
    }

    fn remember(&mut self, number: u64) {
        self.witness().ask(&format!("set number {number}"));
        self.model.now.ram = Some(number);
    }

    /// A guest that has booted has RAM that remembers nothing.
    pub(crate) fn greet(&mut self) {
        if self.model.state == "running" && self.model.now.ram.is_none() {
            let number = self.number();
            self.remember(number);
            self.hurry();
        }
    }

    /// The guest's journal goes on all the time.
    fn hurry(&mut self) {
        self.witness().ask("journal pace 10");
    }

    pub(crate) fn shape(&self) -> Shape {
        Shape::of(&self.lab.tree())
    }

    /// The machine is what the model says.
    pub(crate) fn compare(&mut self) {
        assert_eq!(self.shape(), self.model.shape());
        if self.model.state == "running" {
            self.compare_content();
        }
    }

    fn compare_content(&mut self) {
        let want = self.model.now.clone();
        self.witness().prove();
        let number = self.witness().ask("get number")["value"].clone();
        assert_eq!(number, want.ram.map_or(Value::Null, |number| number.to_string().into()));
        for (name, number) in DISKS.into_iter().zip(want.disks) {
            assert_eq!(self.witness().ask(&format!("read {name} 4M"))["text"], format!("number {number}"));
            let sum = format!("sum-disk {name} 16M {} {number}", 1 + number % 3);
            assert_eq!(self.witness().ask(&sum)["ok"], true, "{sum}");
        }
    }

    /// The piles, too, which take a while to read.
    fn compare_all(&mut self) {
        self.compare();
        for (disk, number) in self.model.now.piles.into_iter().enumerate() {
            let gone = self.model.state == "running" && number > 0 && !self.has_pile(disk, number);
            assert!(!gone, "pile {number} is not on disk {disk}");
        }
    }

    /// What is there is compared, every snapshot with memory is applied in turn, and all that is left is what the rows need.
    pub(crate) fn prove_all(&mut self) {
        self.prove(|content| content.ram.is_some());
    }

    /// The same of those snapshots that are worth it: without memory, a guest has to boot.
    pub(crate) fn prove(&mut self, worth: impl Fn(&Content) -> bool) {
        self.compare_all();
        let ids: Vec<String> = self.model.ids().cloned().collect();
        for id in ids {
            let wish = Self::apply(&id, false, false);
            self.grant(&wish);
            if worth(&self.model.now) {
                let wish = self.start();
                self.grant(&wish);
            }
            self.compare_all();
        }
        self.witness = None;
        self.settle();
        self.lab.assert_tidy();
        self.lab.wait_hashed();
    }
}
