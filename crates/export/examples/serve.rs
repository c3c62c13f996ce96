//! Serves a chain over NBD, for measuring and for trying things out:
//!
//! ```text
//!   serve SOCKET FOLDER SIZE DEPTH     a new chain in FOLDER (which must not exist), every page written, spread over its layers
//!   serve SOCKET FILE                  an image and its parents
//! ```
//!
//! It ends when its standard input does.

use export::{Export, Options, listen_unix};
use image::{Access, Chain, Layer, vhdx};
use std::error::Error;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use store::host::HostFolder;
use store::{Folder, Mode};

const PAGE: u64 = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (socket, chain) = match words[..] {
        [socket, folder, size, depth] => (socket, create(Path::new(folder), size.parse()?, depth.parse()?)?),
        [socket, file] => (socket, Chain::new(image::open_path(Path::new(file), None, Mode::Write)?, Access::Write)?),
        _ => return Err("serve SOCKET (FILE | FOLDER SIZE DEPTH)".into()),
    };
    let chain = Arc::new(chain);
    let export = Export::serve(Arc::clone(&chain), listen_unix(Path::new(socket))?, Options::default())?;
    println!("nbd+unix:///?socket={socket}");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    export.stop();
    chain.close()?;
    Ok(())
}

/// A chain whose base has every page, and whose other layers each have their share of them, scattered: a read of any page finds it
/// in a layer that its neighbours are not in.
fn create(folder: &Path, size: u64, depth: u64) -> Result<Chain, Box<dyn Error>> {
    let folder = HostFolder::create(folder)?;
    let name = |number: u64| format!("{number}.vhdx");
    let base: Arc<dyn Layer> = vhdx::create(folder.create(&name(0))?, &vhdx::Options::dynamic(size))?;
    let chain = Chain::new(vec![Arc::clone(&base)], Access::Write)?;
    for block in 0..size / (256 * PAGE) {
        chain.write(&page(block).repeat(256), block * 256 * PAGE)?;
    }
    let mut leaf = base;
    for number in 1..depth {
        let options = vhdx::Options::differencing(&*leaf, &name(number - 1))?;
        leaf = vhdx::create(folder.create(&name(number))?, &options)?;
        chain.push(Arc::clone(&leaf))?;
        for at in (0..size / PAGE).filter(|at| scatter(*at) % depth == number) {
            chain.write(&page(at), at * PAGE)?;
        }
    }
    chain.flush()?;
    Ok(chain)
}

fn page(seed: u64) -> Vec<u8> {
    (0..PAGE / 8).flat_map(|word| scatter(seed * PAGE + word).to_le_bytes()).collect()
}

fn scatter(number: u64) -> u64 {
    let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 17
}
