//! Random 4 KiB reads and writes through chains of several depths:
//! `cargo run --release -p image --example depth -- FOLDER [DEPTH…]`.
//!
//! Every layer holds its share of the blocks, so a deep chain's reads come from all of its files. Beside the chain's reads stand
//! *bare* ones: the same bytes, from the same places of the same files, known beforehand. What the two differ by is the chain's own
//! cost; what the bare ones of different depths differ by is the system's, for many files with small pieces.
//!
//! Then 4 KiB writes to a new leaf on each: the first to their places, and again to the same.
//!
//! Medians of several rounds, which take turns so that a noisy machine is noisy to all.

use image::vhdx::{self, Options, Parent};
use image::{Access, Chain, Kind, Layer, Source};
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use store::host::HostFolder;
use store::{Folder, Store};

const SIZE: u64 = 512 << 20;
const BLOCK: u64 = 4096;
const READS: u64 = 200_000;
const WRITES: u64 = 50_000;
const ROUNDS: usize = 7;
const SEED: u64 = 12345;

fn dice(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 11
}

/// A chain whose 4 KiB blocks are spread over its layers.
fn build(folder: &dyn Folder, name: &str, depth: u64) -> Result<Chain, Box<dyn Error>> {
    let first: Arc<dyn Layer> = vhdx::create(folder.create(&format!("{name}-0"))?, &Options::dynamic(SIZE))?;
    let chain = Chain::new(vec![first], Access::Write)?;
    let piece = vec![7; 1 << 20];
    for offset in (0..SIZE).step_by(piece.len()) {
        chain.write(&piece, offset)?;
    }
    let mut state = 99;
    for n in 1..depth {
        push(folder, &chain, &format!("{name}-{n}"), &format!("{name}-{}", n - 1))?;
        // In runs of 32 KiB: a layer's share, without a file of holes for each layer.
        for _ in 0..SIZE / (32 << 10) / depth {
            let offset = dice(&mut state) % (SIZE / (32 << 10)) * (32 << 10);
            chain.write(&piece[..32 << 10], offset)?;
        }
    }
    chain.flush()?;
    Ok(chain)
}

fn reads(chain: &Chain, seed: u64) -> Result<f64, Box<dyn Error>> {
    let mut state = seed;
    let mut buf = vec![0; BLOCK as usize];
    let start = Instant::now();
    for _ in 0..READS {
        chain.read(&mut buf, dice(&mut state) % (SIZE / BLOCK) * BLOCK)?;
    }
    Ok(READS as f64 / start.elapsed().as_secs_f64())
}

/// A read's file and its offset there.
type Place = (Arc<dyn Store>, u64);

/// Where each read of `reads` lies.
fn places(chain: &Chain, seed: u64) -> Result<Vec<Place>, Box<dyn Error>> {
    let mut state = seed;
    let layers = chain.layers();
    let mut places = Vec::new();
    let mut runs = Vec::new();
    for _ in 0..READS {
        let offset = dice(&mut state) % (SIZE / BLOCK) * BLOCK;
        for layer in layers.iter().rev() {
            runs.clear();
            layer.map(offset, BLOCK, &mut runs)?;
            if let Source::Data(at) = runs[0].source {
                places.push((Arc::clone(layer.store()), at));
                break;
            }
        }
    }
    Ok(places)
}

fn bare(places: &[Place]) -> Result<f64, Box<dyn Error>> {
    let mut buf = vec![0; BLOCK as usize];
    let start = Instant::now();
    for (store, at) in places {
        store.read_at(&mut buf, *at)?;
    }
    Ok(places.len() as f64 / start.elapsed().as_secs_f64())
}

/// Writes a second to places that differ all; the flush is part of it.
fn writes(chain: &Chain) -> Result<f64, Box<dyn Error>> {
    let data = vec![3; BLOCK as usize];
    let start = Instant::now();
    for n in 0..WRITES {
        // An odd factor and a power of two: every block comes once.
        chain.write(&data, n * 40_503 % (SIZE / BLOCK) * BLOCK)?;
    }
    chain.flush()?;
    Ok(WRITES as f64 / start.elapsed().as_secs_f64())
}

fn push(folder: &dyn Folder, chain: &Chain, name: &str, below: &str) -> Result<(), Box<dyn Error>> {
    let layers = chain.layers();
    let parent = Parent::of(&**layers.last().expect("a chain has a layer"), Some(below))?;
    let options = Options { kind: Kind::Differencing, parent: Some(parent), ..Options::dynamic(SIZE) };
    Ok(chain.push(vhdx::create(folder.create(name)?, &options)?)?)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("name a folder for the files (1 GiB a depth)")?;
    let folder = HostFolder::open(path.as_ref())?;
    let depths = std::env::args().skip(2).map(|depth| depth.parse()).collect::<Result<Vec<u64>, _>>()?;
    let depths = if depths.is_empty() { vec![1, 50] } else { depths };
    let mut rates = vec![(Vec::new(), Vec::new()); depths.len()];
    let mut chains = Vec::new();
    for &depth in &depths {
        let chain = build(&folder, &format!("depth-{depth}"), depth)?;
        let places = places(&chain, SEED)?;
        chains.push((chain, places));
    }
    for round in 0..=ROUNDS {
        for (rates, (chain, places)) in rates.iter_mut().zip(&chains) {
            let (through, bare) = (reads(chain, SEED)?, bare(places)?);
            // The first round fills caches: ours and the system's.
            if round > 0 {
                rates.0.push(through);
                rates.1.push(bare);
            }
        }
    }
    let first = median(rates[0].0.clone());
    for (depth, (through, bare)) in depths.iter().zip(rates) {
        let (through, bare) = (median(through), median(bare));
        let (of_first, of_bare) = (through / first, through / bare);
        println!(
            "depth {depth:4}: {through:8.0} reads/s, {of_first:.2} x depth 1; bare {bare:8.0}, {of_bare:.2} x bare"
        );
    }
    for (depth, (chain, _)) in depths.iter().zip(&chains) {
        push(&folder, chain, &format!("depth-{depth}-leaf"), "below")?;
        let (first, again) = (writes(chain)?, writes(chain)?);
        println!("depth {depth:4}: {first:8.0} first writes/s, {:.2} x the {again:.0} of rewrites", first / again);
    }
    Ok(())
}
