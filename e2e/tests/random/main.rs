//! Random sequences of requests against a model: after each, the tree and the machine's memory are what the model says.
//!
//! ```text
//!   model     what the machine has to be
//!   run       the machine beside its model: what it holds is changed, and compared
//!   requests  each request, and what it makes of the model
//!   blows     the worker, QEMU or both are killed, with merges under way, or while a request is
//!   soak      all of that without end
//! ```

mod blows;
mod model;
mod requests;
mod run;
mod soak;

use run::Run;

/// Requests in a sequence.
const LENGTH: usize = 40;

fn sequence(seed: u64) {
    Run::play(seed, |run| {
        for _ in 0..LENGTH {
            run.request();
            run.compare();
        }
        run.prove_all();
    });
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
    sequence(run::seed().unwrap_or(3));
}
