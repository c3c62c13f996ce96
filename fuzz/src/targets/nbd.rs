//! A client's whole conversation with the NBD server, over a socket.
//!
//! Rule beside the limits: the server outlives the client, and the disk still serves another.

use super::handshake::{mutate, seeds};
use super::{Shape, store_of};
use crate::file::Disk;
use crate::run::MEMORY;
use crate::{Input, Target};
use export::{Export, Options, listen_unix};
use image::{Access, Chain, Kind, open};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use store::Mode;

pub(super) const TARGET: Target = Target {
    name: "nbd",
    about: "an NBD client's whole conversation",
    quick: 1500,
    memory: MEMORY,
    seeds,
    mutate,
    run,
};

/// The most of a server's answers that is looked at, bytes.
const MOST: u64 = 80 << 20;

/// The disk that is served.
static DISK: LazyLock<crate::File> = LazyLock::new(|| {
    let shape = Shape { kind: Kind::Dynamic, size: 8 << 20, block: 1 << 20, sector: 512 };
    shape.images().pop().expect("a closed image")
});

fn run(input: &Input) -> String {
    let bytes = input.bytes();
    let layer = open(store_of(&Disk::new("disk.vhdx", DISK.clone())), None, Mode::Write).expect("a sound image");
    let chain = Arc::new(Chain::new(vec![layer], Access::Write).expect("a layer"));
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("disk");
    let options = Options { name: "disk".to_owned(), threads: 2, window: 4 << 20, ..Options::default() };
    let export =
        Export::serve(Arc::clone(&chain), listen_unix(&socket).expect("a free name"), options).expect("threads");
    let answers = converse(&socket, &bytes);
    let mut sane = [0; 18];
    let mut other = UnixStream::connect(&socket).expect("it still listens");
    other.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket");
    other.read_exact(&mut sane).expect("it still greets");
    drop(other);
    export.stop();
    chain.read(&mut [0; 512], 0).expect("the disk is still there");
    // Which answers come first depends on threads; how many does not.
    format!("{} bytes", answers.next_power_of_two())
}

/// Says all of it and hears the server out; gives how many bytes it said.
fn converse(socket: &std::path::Path, bytes: &[u8]) -> u64 {
    let mut client = UnixStream::connect(socket).expect("it listens");
    client.set_read_timeout(Some(Duration::from_secs(15))).expect("a socket");
    // The server may have hung up before the end.
    let _ = client.write_all(bytes).and_then(|()| client.shutdown(Shutdown::Write));
    let heard = std::io::copy(&mut client.take(MOST), &mut std::io::sink());
    match heard {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            panic!("the server does not end the conversation")
        }
        heard => heard.unwrap_or(0),
    }
}
