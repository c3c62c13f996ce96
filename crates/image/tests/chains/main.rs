//! Chains of every shape against plain bytes.
//!
//! A seed is a chain's whole life: layers forged byte by byte or made by us, of any format, block and size, up to twenty of them; then
//! writes, zeroes, discards, snapshots, folds, resizes, compactions, power cuts, other handles; and at its end it is checked, and folded
//! in any order until one file is left. Whatever happens, the disk is the same as plain bytes, and each of its layers the disk that it
//! was. Others that read such chains read the same.
//!
//! The seeds are the same each time. `TENBY_SEEDS=1000..9000` runs others, `TENBY_SEEDS=7` the one that failed:
//!
//! ```text
//!   TENBY_SEEDS=7 cargo test -p image --test chains -- --nocapture
//! ```

mod bytes;
mod dice;
mod forge;
mod others;
#[path = "../peers/mod.rs"]
mod peers;
mod world;

use std::ops::Range;
use world::World;

/// The seeds to run instead of `usual`, if somebody says so.
fn seeds(usual: Range<u64>) -> Range<u64> {
    let Ok(words) = std::env::var("TENBY_SEEDS") else { return usual };
    let number = |word: &str| word.trim().parse::<u64>().unwrap_or_else(|_| panic!("{words:?} are no seeds"));
    match words.split_once("..") {
        Some((from, to)) => number(from)..number(to),
        None => number(&words)..number(&words) + 1,
    }
}

/// Says how to see it again, if this is left by a panic.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("seed {0} failed; TENBY_SEEDS={0} runs it again", self.0);
        }
    }
}

/// Lives of every other seed.
fn live(rest: u64) {
    for seed in seeds(0..200).filter(|seed| seed % 2 == rest) {
        let _seed = Seed(seed);
        World::of_anything(seed).live();
    }
}

#[test]
fn a_chain_of_any_shape_is_plain_bytes() {
    live(0);
}

/// The same on the other processor.
#[test]
fn and_so_is_every_other_one() {
    live(1);
}

#[test]
fn others_read_a_chain_of_any_shape() {
    for seed in seeds(0..16) {
        let _seed = Seed(seed);
        World::for_others(seed).live();
    }
}

#[test]
fn others_carry_out_a_log_as_we_do() {
    for seed in seeds(0..30) {
        let _seed = Seed(seed);
        others::carry_out_a_log(seed);
    }
}
