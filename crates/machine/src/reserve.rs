//! Room that is kept for the ledger: a file of 16 MiB in the machine's folder, given up when the disk is full and made again later. So
//! deleting, which makes room, works on a full disk.

use store::{Folder, Result};

/// The file's name.
const NAME: &str = "reserve";
/// Its name while it is being made.
const NEW: &str = "reserve.new";
/// Its size, bytes.
pub const SIZE: u64 = 16 << 20;
/// It is written in pieces of this many bytes.
const PIECE: usize = 1 << 20;

/// Makes the reserve, if it is not there. Fails if there is no room, and leaves nothing then.
pub fn keep(folder: &dyn Folder) -> Result<()> {
    if folder.list()?.iter().any(|name| name == NAME) {
        return Ok(());
    }
    let made = make(folder);
    if made.is_err() {
        // Nobody takes a part of it for the whole.
        let _ = folder.unlink(NEW);
    }
    made
}

fn make(folder: &dyn Folder) -> Result<()> {
    // What an earlier attempt has left.
    let _ = folder.unlink(NEW);
    let store = folder.create(NEW)?;
    // Not zeros, for which some file systems keep no room.
    let piece = vec![0x52; PIECE];
    for at in (0..SIZE).step_by(PIECE) {
        store.write_at(&piece, at)?;
    }
    store.sync()?;
    folder.rename(NEW, NAME)?;
    folder.sync()
}

/// Gives the reserve up; whether there was one. The room is there when this returns.
pub fn give_up(folder: &dyn Folder) -> bool {
    folder.unlink(NAME).and_then(|()| folder.sync()).is_ok()
}
