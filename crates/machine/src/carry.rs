//! Where acknowledged changes are kept until a flush makes them durable, so that they outlive the worker: one small file for each image
//! that is written (see [`image::vhdx::Carry`]), in the runtime folder.
//!
//! ```text
//!   <runtime>/<id>/carry/<name of the image's file>     while the image is open for writing, and after its worker has died
//! ```
//!
//! A worker that begins works off what the one before has left, before it does anything else with the machine: from then on the files
//! of all layers hold what the guest was told.

use crate::files::{Files, file_problem, image_problem};
use crate::request::Problem;
use crate::root::{Root, open_or_create};
use crate::tree::{LayerFormat, LayerRow, Machine, MachineId};
use image::vhdx;
use std::sync::Arc;
use store::Folder;
use store::host::HostFolder;
use uuid::Uuid;

/// The journals of a machine's images.
#[derive(Debug, Clone)]
pub struct Carries {
    folder: Arc<dyn Folder>,
    life: Uuid,
}

/// The journal of one image, for as long as its layer is open for writing.
#[derive(Debug)]
pub(crate) struct Kept {
    folder: Arc<dyn Folder>,
    name: String,
}

impl Kept {
    /// The layer was closed: nothing is left to carry over.
    pub(crate) fn forget(self) {
        // A name that stays leads to an empty file, which says nothing.
        let _ = self.folder.unlink(&self.name);
    }
}

impl Carries {
    /// Those of this machine.
    pub(crate) fn open(id: MachineId) -> Result<Self, Problem> {
        let folder = HostFolder::create(&Root::runtime_folder(id).join("carry")).map_err(|e| file_problem(&e))?;
        let life = store::host::boot_id().map_err(|e| file_problem(&e))?;
        Ok(Self::new(Arc::new(folder), Uuid::from_u128(life)))
    }

    /// Those in `folder`, which the host forgets when it stops; `life` names the time from its start to then.
    pub fn new(folder: Arc<dyn Folder>, life: Uuid) -> Self {
        Self { folder, life }
    }

    /// The journal of a layer's file that is about to be opened for writing. `None` for formats that keep nothing back.
    pub(crate) fn keep(&self, row: &LayerRow) -> Result<Option<(vhdx::Carry, Kept)>, Problem> {
        if row.format != LayerFormat::Vhdx {
            return Ok(None);
        }
        let name = name(row);
        let store = open_or_create(&self.folder, &name)?;
        let kept = Kept { folder: Arc::clone(&self.folder), name };
        Ok(Some((vhdx::Carry { store, life: self.life }, kept)))
    }

    /// Works off what a worker that died has left, and says of which files that was something.
    pub(crate) fn work_off(&self, files: &Files, machine: &Machine) -> Result<Vec<String>, Problem> {
        let mut worked_off = Vec::new();
        for left in self.folder.list().map_err(|e| file_problem(&e))? {
            let row = machine.layers.values().find(|row| name(row) == left);
            if let Some(row) = row
                && let Some((carry, _)) = self.keep(row)?
                && !carry.store.is_empty().map_err(|e| file_problem(&e))?
            {
                files.open_carried(row, carry)?.close().map_err(|e| image_problem(&e))?;
                worked_off.push(row.file.clone());
            }
            self.folder.unlink(&left).map_err(|e| file_problem(&e))?;
        }
        Ok(worked_off)
    }
}

/// Named after the file, not the layer: a fold moves a layer into another file, and the journal is the file's.
fn name(row: &LayerRow) -> String {
    match row.file.rsplit_once('/') {
        Some((_, name)) if !row.in_place => name.to_owned(),
        _ => format!("{:016x}.in-place", hash(row.file.as_bytes())),
    }
}

/// FNV-1a, 64 bits: the path of a file elsewhere, as a name that any later version makes of it as well.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::hash;

    #[test]
    fn a_path_keeps_its_name() {
        // The test vectors of FNV's authors.
        assert_eq!(
            (hash(b""), hash(b"a"), hash(b"foobar")),
            (0xcbf2_9ce4_8422_2325, 0xaf63_dc4c_8601_ec8c, 0x8594_4171_f739_67e8)
        );
    }
}
