//! Larger disks, of a machine that does not run.
//!
//! The leaf's file grows first, the rows follow. A worker that dies in between leaves a disk larger than the rows say, which the next one
//! puts right ([`Keeper::note_grown`]): nobody can have counted on the old size, for what was added reads as zeros.

use crate::files::image_problem;
use crate::keeper::Keeper;
use crate::log;
use crate::plan::quoted;
use crate::request::{Pending, Problem};
use crate::root::check_disk_size;
use crate::tree::{DiskId, Machine};
use crate::views::pending;
use image::{Access, Chain, ErrorKind};
use std::time::Duration;
use store::Mode;

impl Keeper {
    /// Makes disks of Now larger, all of them or none. Sizes are in bytes.
    ///
    /// # Errors
    /// A size that is smaller, or that the disk's format cannot have; a disk whose files are still to be merged.
    pub(crate) fn grow(&self, machine: &Machine, disks: &[(DiskId, u64)]) -> Result<(), Problem> {
        if let Some(nth) = (1..disks.len()).find(|nth| disks[..*nth].iter().any(|(disk, _)| *disk == disks[*nth].0)) {
            return Err(Problem::usage(format!("{} is to grow twice", disks[nth].0)));
        }
        let chains = disks.iter().map(|(disk, size)| self.open_to_grow(machine, disk, *size));
        let chains = chains.collect::<Result<Vec<_>, _>>()?;
        let before: Vec<u64> = chains.iter().map(Chain::size).collect();
        let grown = chains.iter().zip(disks).try_for_each(|(chain, (_, size))| chain.resize(*size));
        if grown.is_err() {
            // Nobody has written behind the old end.
            for (chain, size) in chains.iter().zip(before).filter(|(chain, size)| chain.size() > *size) {
                let shrunk = chain.resize(size);
                shrunk.unwrap_or_else(|error| tracing::error!("{error}: it stays larger"));
            }
        }
        let closed = chains.iter().try_for_each(Chain::close);
        grown.and(closed).map_err(|error| image_problem(&error))
    }

    fn open_to_grow(&self, machine: &Machine, disk: &DiskId, size: u64) -> Result<Chain, Problem> {
        check_disk_size(size)?;
        let leaf = machine.now.disks[disk];
        self.check_merged(machine, disk)?;
        let layers = self.files.open_chain_with(machine, leaf, |row| self.files.open_layer(row, Mode::Write))?;
        let layer = layers.last().expect("a chain is of one at least");
        let has = layer.info().size;
        if size < has {
            let refusal = format!("{disk} has {has} bytes, and {size} are fewer: a machine's disk only grows");
            return Err(Problem::usage(refusal));
        }
        layer.check_resize(size).map_err(|error| match error.kind {
            ErrorKind::Invalid => Problem::usage(format!("{disk}: {}", error.message)),
            _ => Problem::refused(format!("{disk}: {}", error.message)),
        })?;
        Chain::new(layers, Access::Write).map_err(|error| image_problem(&error))
    }

    /// Refuses to change a disk whose files are still to be merged.
    fn check_merged(&self, machine: &Machine, disk: &DiskId) -> Result<(), Problem> {
        let chain = machine.chain(machine.now.disks[disk]);
        let files: Vec<&str> = chain.iter().map(|id| machine.layers[id].file.as_str()).collect();
        let mut merges = pending(machine, &self.files);
        merges.retain(|work: &Pending| work.kind == "merge" && files.contains(&work.file.as_str()));
        if merges.is_empty() {
            return Ok(());
        }
        let time = Duration::from_millis(merges.iter().filter_map(|work| work.estimated_ms).sum());
        let files = if merges.len() == 1 { "1 file".to_owned() } else { format!("{} files", merges.len()) };
        let seconds = time.as_secs() + 1;
        Err(Problem::refused(format!("{disk} cannot be changed now: {files} to merge, about {seconds} s"))
            .hint(format!("tenby job list {}", quoted(&machine.name))))
    }

    /// Says of disks that are larger than the rows say what they are. The machine does not run.
    pub(crate) fn note_grown(&self) -> Result<(), Problem> {
        let rows = self.rows();
        let now = &rows.machine.now;
        let larger = now.config.disks.iter().filter_map(|disk| {
            let row = &rows.machine.layers[now.disks.get(&disk.id)?];
            // One that cannot be opened is another's to tell.
            let size = self.files.open_layer(row, Mode::Read).ok()?.info().size;
            (size > disk.size).then(|| (disk.id.clone(), size))
        });
        let larger: Vec<(DiskId, u64)> = larger.collect();
        if larger.is_empty() {
            return Ok(());
        }
        self.book.commit(|rows| rows.machine.resize(&larger))?;
        for (disk, size) in larger {
            log::write(&self.files, None, &format!("{disk} has {size} bytes: it had grown when a worker ended"));
        }
        Ok(())
    }
}

impl Machine {
    /// Disks of Now have these sizes, in bytes.
    pub(crate) fn resize(&mut self, sizes: &[(DiskId, u64)]) {
        for disk in &mut self.now.config.disks {
            if let Some((_, size)) = sizes.iter().find(|(id, _)| *id == disk.id) {
                disk.size = *size;
            }
        }
    }
}
