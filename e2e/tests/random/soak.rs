//! Everything that can be asked of a machine, and done to it, without end.

use crate::run::{Run, seed};
use e2e::{BASE, Process, wait_for};
use std::time::{Duration, Instant};

/// Steps of the short one.
const SHORT: usize = 12;
/// After so many steps all that is there is settled and compared.
const ROUND: usize = 25;
/// More snapshots than these take too long to prove each time.
const MANY: usize = 8;

#[test]
fn killed_at_random() {
    Run::play(11, |run| soak(run, |steps| steps < SHORT));
}

/// By hand, for as long as one likes: `cargo xtask soak`.
#[test]
#[ignore = "takes an hour"]
fn an_hour() {
    let minutes = std::env::var("TENBY_SOAK_MINUTES").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let (start, limit) = (Instant::now(), Duration::from_secs(60 * minutes));
    Run::play(seed().unwrap_or(1), |run| soak(run, |_| start.elapsed() < limit));
}

fn soak(run: &mut Run, mut go_on: impl FnMut(usize) -> bool) {
    let start = Instant::now();
    run.settle();
    run.lab.wait_hashed();
    let before = run.descriptors().len();
    let (mut steps, mut minute) = (0, 0);
    while go_on(steps) {
        run.step();
        run.compare();
        steps += 1;
        if steps % ROUND == 0 {
            run.prove_all();
            run.assert_no_leaks();
        }
        if start.elapsed().as_secs() / 60 > minute {
            minute = start.elapsed().as_secs() / 60;
            run.tell(steps, start);
        }
    }
    run.end(before);
    run.tell(steps, start);
}

impl Run {
    fn tell(&self, steps: usize, start: Instant) {
        let (minutes, seconds) = (start.elapsed().as_secs() / 60, start.elapsed().as_secs() % 60);
        let Self { kills, .. } = self;
        eprintln!(
            "{steps} steps, {} kills, {} of them with merges under way, {minutes} min {seconds} s",
            kills.all, kills.merging
        );
    }

    /// Whatever comes next.
    fn step(&mut self) {
        if self.model.ids().count() > MANY
            && let Some(wish) = self.delete_any()
        {
            return self.grant(&wish);
        }
        match self.below(20) {
            0..=5 => self.request(),
            6..=8 => self.tear(),
            9..=14 => self.beat(),
            15 if self.model.state == "running" => {
                let disk = self.below(2);
                self.pile_torn(disk);
            }
            15 | 16 => self.keep(!self.model.keeps),
            17 if self.model.has_trash() => self.grant(&Self::undo()),
            18 => self.steer_any(),
            19 => self.check(),
            _ => {
                let pause_or_go_on = self.wish(0).expect("it needs no snapshot");
                self.grant(&pause_or_go_on);
            }
        }
    }

    fn steer_any(&mut self) {
        match self.below(4) {
            0 => self.steer("pause", None),
            1 => self.steer("resume", None),
            2 => self.steer("throttle", Some("4M")),
            _ => self.steer("cancel", None),
        }
    }

    /// What the worker has open.
    fn descriptors(&self) -> Vec<String> {
        self.lab.descriptors(self.lab.worker().expect("a worker runs"))
    }

    /// No file that is gone is still open, and there is one folder of sockets a QEMU.
    fn assert_no_leaks(&self) {
        let open = || self.lab.worker().map(|worker| self.lab.descriptors(worker)).unwrap_or_default();
        let removed = |target: &String| target.ends_with(" (deleted)");
        // Their space is given back in steps.
        wait_for("what was removed to be closed", || (!open().iter().any(removed)).then_some(()));
        assert_eq!(self.lab.sockets().len(), usize::from(self.model.has_qemu()), "{:?}", self.lab.sockets());
    }

    /// Everything is proven, and then everything goes: nothing is left of it, nor of the machine afterwards.
    fn end(&mut self, descriptors: usize) {
        self.prove(|_| true);
        self.keep(false);
        let ids: Vec<String> = self.model.ids().cloned().collect();
        for id in ids {
            self.grant(&Self::delete(&id, false));
        }
        if self.model.state != "running" {
            let wish = self.start();
            self.grant(&wish);
        }
        self.prove_all();
        let what = format!("{:?} to be no more than the {descriptors} of the beginning", self.descriptors());
        wait_for(&what, || (self.descriptors().len() <= descriptors).then_some(()));
        self.assert_no_leaks();
        self.grant(&Self::turn_off());
        self.check_files();
        self.lab.ok(&["vm", "delete", BASE, "--yes"]);
        wait_for("everybody to leave", || self.lab.processes().is_empty().then_some(()));
        assert_eq!(self.lab.left(), Vec::<String>::new());
    }

    fn check_files(&mut self) {
        wait_for("the worker to leave", || {
            self.lab.processes().iter().all(|one| !Process::is_worker(one)).then_some(())
        });
        for (file, _) in self.lab.files() {
            let path = self.lab.machine_folder().join(file);
            self.lab.ok(&["disk", "check", &path.to_string_lossy()]);
        }
        let audit = self.lab.json(&["vm", "check", BASE, "--deep"]);
        assert!(audit["clean"] == true && audit["findings"].as_array().is_some_and(Vec::is_empty), "{audit}");
    }
}
