//! What a layer costs: `cargo run --release -p image --example writes -- FOLDER`.
//!
//! Tickets alone (nothing is written), then random 4 KiB first writes and rewrites through a chain with a flush after every 256, and
//! the same writes to a raw file.

use image::vhdx::{self, Options};
use image::{Access, Chain, Change, Layer};
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;
use store::Folder;
use store::host::HostFolder;

const SIZE: u64 = 16 << 30;
const WRITES: u64 = 40_000;
const FLUSH_EVERY: u64 = 256;
const TICKETS: u64 = 1_000_000;

fn offsets(count: u64) -> impl Iterator<Item = u64> {
    let mut state = 12345u64;
    (0..count).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 20) % (SIZE / 4096) * 4096
    })
}

fn writes(what: &str, chain: &Chain) -> image::Result<()> {
    let data = vec![0x5A; 4096];
    let start = Instant::now();
    for (index, offset) in offsets(WRITES).enumerate() {
        chain.write(&data, offset)?;
        if index as u64 % FLUSH_EVERY == FLUSH_EVERY - 1 {
            chain.flush()?;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{what:<28} {:>9.0} writes/s", WRITES as f64 / seconds);
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("a folder is needed")?;
    let folder = HostFolder::open(path.as_ref())?;
    let names = ["bench-base.vhdx", "bench-child.avhdx", "bench.raw"];
    let base = vhdx::create(folder.create(names[0])?, &Options::dynamic(SIZE))?;
    let child = vhdx::create(folder.create(names[1])?, &Options::differencing(&*base, names[0])?)?;
    let layers: Vec<Arc<dyn Layer>> = vec![base, Arc::clone(&child) as Arc<dyn Layer>];
    let chain = Chain::new(layers, Access::Write)?;
    writes("child, first writes", &chain)?;
    writes("child, rewrites", &chain)?;
    let start = Instant::now();
    let all: Vec<_> = offsets(WRITES).collect();
    for index in 0..TICKETS {
        child.commit(child.prepare(all[(index % WRITES) as usize], 4096, Change::Data)?)?;
    }
    println!("{:<28} {:>9.0} ns", "a ticket for exposed sectors", start.elapsed().as_nanos() as f64 / TICKETS as f64);
    drop(chain);
    let raw = Chain::new(vec![image::raw::create(folder.create(names[2])?, SIZE)?], Access::Write)?;
    writes("raw, first writes", &raw)?;
    writes("raw, rewrites", &raw)?;
    for name in names {
        folder.unlink(name)?;
    }
    Ok(())
}
