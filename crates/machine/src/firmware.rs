//! UEFI: what this host has of it, and what a machine keeps.
//!
//! ```text
//!   <folder>/OVMF_CODE_4M.fd ── copied when the machine is made ──► boot/firmware   flash unit 0, only read: the same for its life, since memory
//!                                                                                  comes back only over just the code that it was captured with
//!            OVMF_VARS_4M.fd ── copied in as a disk ──────────────► disks/….vhdx    flash unit 1: `DiskId::firmware`, of just the file's size
//! ```
//!
//! The folder is Debian's, of the package `ovmf`, unless [`FOLDER_VARIABLE`] names another.

use crate::files::{Files, file_problem};
use crate::request::{DiskSource, DiskSpec, Problem};
use crate::root::{copy_file, take_in};
use crate::tree::{Bus, LayerKind, LayerRow};
use std::path::{Path, PathBuf};
use store::{ErrorKind, Mode};

/// The variable that names the folder of the firmware's files.
pub const FOLDER_VARIABLE: &str = "TENBY_OVMF";

/// Where Debian has them.
const FOLDER: &str = "/usr/share/OVMF";

/// A machine's copy of the code, below its folder; and in the folder that it lies in.
pub(crate) const CODE: &str = "boot/firmware";
pub(crate) const CODE_NAME: &str = "firmware";

/// Flash memory comes in blocks of so many bytes, and QEMU has room for so many bytes of it.
const BLOCK: u64 = 4096;
const ROOM: u64 = 8 << 20;

/// What stands at byte 40 of a firmware volume, and both files begin with one.
const SIGNATURE: &[u8; 4] = b"_FVH";

/// OVMF: UEFI for virtual machines.
#[derive(Debug)]
pub struct Ovmf {
    folder: PathBuf,
    code: PathBuf,
    variables: PathBuf,
}

impl Ovmf {
    /// The one that this host has.
    ///
    /// # Errors
    /// `Failed` if there is none; `Damaged` if its files are not what QEMU takes.
    pub fn find() -> Result<Self, Problem> {
        let named = std::env::var_os(FOLDER_VARIABLE).filter(|folder| !folder.is_empty());
        let folder = named.map_or_else(|| PathBuf::from(FOLDER), PathBuf::from);
        let (code, variables) = (folder.join("OVMF_CODE_4M.fd"), folder.join("OVMF_VARS_4M.fd"));
        let bytes = checked(&code)? + checked(&variables)?;
        if bytes > ROOM {
            let refusal = format!("{} and {} take more than 8M of flash memory", code.display(), variables.display());
            return Err(Problem::damaged(refusal).hint(INSTALL_AGAIN));
        }
        Ok(Self { folder, code, variables })
    }

    /// Where its files lie.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Copies the code into a machine's folder.
    pub(crate) fn copy_code(&self, files: &Files) -> Result<(), Problem> {
        let boot = files.folder().folder("boot").map_err(|e| file_problem(&e))?;
        copy_file(&boot, &self.code, CODE_NAME)?;
        boot.sync().map_err(|e| file_problem(&e))
    }

    /// Makes a layer that holds the variables as they are before the first start.
    pub(crate) fn new_variables(&self, files: &Files) -> Result<LayerRow, Problem> {
        let path = self.variables.to_string_lossy().into_owned();
        let source = DiskSource::Copy { path, format: Some("raw".to_owned()), parents: Vec::new() };
        let row = files.new_row(LayerKind::Disk, source.format(), None);
        let spec = DiskSpec { source, bus: Bus::default() };
        Ok(take_in(files, row, &spec, &mut |_, _| true)?.row)
    }
}

const INSTALL: &str = "apt-get install ovmf";
const INSTALL_AGAIN: &str = "apt-get install --reinstall ovmf";

/// The size of a firmware's file, if QEMU takes it as flash memory.
fn checked(path: &Path) -> Result<u64, Problem> {
    let file = store::host::open_file(path, Mode::Read).map_err(|error| match error.kind {
        ErrorKind::NotFound => {
            Problem::failed(format!("there is no UEFI firmware here: {} is missing", path.display())).hint(INSTALL)
        }
        _ => file_problem(&error),
    })?;
    let damaged = |why: String| Problem::damaged(format!("{} {why}", path.display())).hint(INSTALL_AGAIN);
    let len = file.len().map_err(|e| file_problem(&e))?;
    if len == 0 || !len.is_multiple_of(BLOCK) {
        return Err(damaged(format!(
            "is no UEFI firmware: it has {len} bytes, and flash memory comes in blocks of {BLOCK}"
        )));
    }
    let mut signature = [0; SIGNATURE.len()];
    file.read_at(&mut signature, 40).map_err(|e| file_problem(&e))?;
    if signature != *SIGNATURE {
        return Err(damaged("is no UEFI firmware: it does not begin with a firmware volume".to_owned()));
    }
    Ok(len)
}
