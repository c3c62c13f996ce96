//! The mark on a file that was taken in place: whose it is, as an extended attribute that whoever meets the file elsewhere can read.
//!
//! A mark is a help, not a lock: file systems without extended attributes have none, and one that its machine has left behind counts for
//! nothing.

use crate::plan::{quoted, shorten};
use crate::request::Problem;
use crate::root::{Found, Root};
use crate::tree::MachineId;
use rustix::fs::{XattrFlags, getxattr, removexattr, setxattr};
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The attribute's name. Its value is the machine's id, a space, and the path of the root.
const MARK: &str = "user.tenby.machine";
/// The folders of a machine's own images.
const OWN: [&str; 2] = ["disks", "memory"];

/// Says on a file that a machine of `root` owns it.
pub(crate) fn set(file: &Path, root: &Path, id: MachineId) {
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    let value = [id.to_string().as_bytes(), b" ", root.as_os_str().as_bytes()].concat();
    // Without it the file's owner is found out later, by its lock.
    let _ = setxattr(file, MARK, &value, XattrFlags::empty());
}

/// Takes the mark off.
pub(crate) fn clear(file: &Path) {
    // A mark that stays names a machine that is not there.
    let _ = removexattr(file, MARK);
}

/// A machine that owns a file, and where it is.
#[derive(Debug, Clone)]
pub struct Owner {
    /// The folder of the machine's folder.
    pub root: Root,
    /// The machine.
    pub machine: Found,
}

/// The machine that owns this file: by the machine's folder that it lies in, else by its mark. `None` if there is no such machine.
pub fn owner(file: &Path) -> Option<Owner> {
    let file = std::fs::canonicalize(file).ok()?;
    let (root, id) = by_place(&file).or_else(|| by_mark(&file))?;
    let root = Root::open(&root).ok()?;
    let machine = root.list().ok()?.into_iter().find(|found| found.id == id)?;
    Some(Owner { root, machine })
}

/// That a file is in use, for people: by whom, and what to do.
pub fn in_use(file: &Path) -> Problem {
    let name = file.strip_prefix(".").unwrap_or(file).display();
    let holders = store::host::holders(file);
    if let Some(Owner { machine, .. }) = owner(file) {
        let worker = format!(" worker {}", machine.id);
        if holders.is_empty() || holders.iter().any(|holder| holder.command.ends_with(&worker)) {
            return Problem::refused(format!("{name} is in use: the machine {} has it", machine.name))
                .hint(format!("tenby vm show {}", quoted(&machine.name)));
        }
    }
    let told: Vec<_> = holders
        .iter()
        .map(|holder| match shorten(&holder.command).as_str() {
            "" => format!("process {}", holder.pid),
            command => format!("process {} ({command})", holder.pid),
        })
        .collect();
    match holders.first() {
        Some(first) => Problem::refused(format!("{name} is in use by {}", told.join(", ")))
            .hint(format!("ps -fp {}      (what it does; wait for it, or end it)", first.pid)),
        None => Problem::refused(format!("{name} is in use by another process"))
            .hint(format!("fuser -v {}      (who has it open)", quoted(&name.to_string()))),
    }
}

/// `ROOT/ID/disks/FILE`
fn by_place(file: &Path) -> Option<(PathBuf, MachineId)> {
    let folder = file.parent()?;
    let machine = folder.parent()?;
    let own = OWN.iter().any(|name| folder.file_name() == Some(OsStr::new(name))) && machine.join("ledger").is_file();
    let id = machine.file_name()?.to_str()?.parse().ok().map(MachineId)?;
    own.then_some((machine.parent()?.to_owned(), id))
}

fn by_mark(file: &Path) -> Option<(PathBuf, MachineId)> {
    let mut value = vec![0; 4200];
    let len = getxattr(file, MARK, &mut value[..]).ok()?;
    value.truncate(len);
    let space = value.iter().position(|byte| *byte == b' ')?;
    let id = std::str::from_utf8(&value[..space]).ok()?.parse().ok().map(MachineId)?;
    let root = PathBuf::from(std::ffi::OsString::from_vec(value.split_off(space + 1)));
    // A root that is not there is not made for the sake of a mark.
    (root.is_absolute() && root.join(id.to_string()).is_dir()).then_some((root, id))
}
