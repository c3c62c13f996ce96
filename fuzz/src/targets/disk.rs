//! Using a layer as a chain does.

use crate::file::{Disk, File};
use image::{Change, Kind, Layer, LayerInfo, Result, Run, Source, Ticket};
use std::sync::Arc;

const MIB: u64 = 1 << 20;
/// The most bytes of data that a look reads from each run.
const GLANCE: u64 = 16 << 10;

/// Writes sectors through a ticket.
pub(super) fn write(layer: &dyn Layer, offset: u64, data: &[u8]) -> Result<()> {
    let ticket = layer.prepare(offset, data.len() as u64, Change::Data)?;
    fill(layer, &ticket, data)?;
    layer.commit(ticket)
}

/// Writes what a ticket is for.
fn fill(layer: &dyn Layer, ticket: &Ticket, data: &[u8]) -> Result<()> {
    for extent in &ticket.extents {
        let at = (extent.offset - ticket.offset) as usize;
        layer.store().write_at(&data[at..at + extent.len as usize], extent.at)?;
    }
    Ok(())
}

/// Zeroes sectors through a ticket.
pub(super) fn zero(layer: &dyn Layer, offset: u64, len: u64) -> Result<()> {
    let ticket = layer.prepare(offset, len, Change::Zero)?;
    for extent in &ticket.extents {
        layer.store().write_at(&vec![0; extent.len as usize], extent.at)?;
    }
    layer.commit(ticket)
}

/// Parts of a disk to look at: its beginning, its middle, its end.
pub(super) fn windows(info: &LayerInfo) -> [(u64, u64); 3] {
    let sector = u64::from(info.sector_size);
    let len = info.size.min(4 * MIB + sector);
    [0, info.size / 2 / sector * sector, info.size].map(|at| (at.min(info.size - len), len))
}

/// What a disk says and holds in its windows: runs, and the beginning of each run's data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Look {
    size: u64,
    runs: Vec<(Run, Vec<u8>)>,
}

impl Look {
    /// Looks, and checks that the runs are what the contract says.
    pub(super) fn at(layer: &dyn Layer) -> Result<Self> {
        let info = layer.info();
        let mut all = Vec::new();
        for (offset, len) in windows(&info) {
            let (mut runs, mut next) = (Vec::new(), offset);
            layer.map(offset, len, &mut runs)?;
            for run in runs {
                assert_eq!(run.offset, next, "runs without gaps");
                assert_ne!(run.len, 0, "no empty runs");
                next += run.len;
                let mut data = Vec::new();
                if let Source::Data(at) = run.source {
                    data.resize(run.len.min(GLANCE) as usize, 0);
                    layer.store().read_at(&mut data, at)?;
                    // What a run names is in the file.
                    layer.store().read_at(&mut [0], at + run.len - 1)?;
                }
                all.push((run, data));
            }
            assert_eq!(next, offset + len, "runs to the end");
        }
        Ok(Self { size: info.size, runs: all })
    }
}

/// Writes and zeroes here and there.
pub(super) fn scribble(layer: &dyn Layer) -> Result<()> {
    let info = layer.info();
    let sector = u64::from(info.sector_size);
    for (at, len) in windows(&info) {
        write(layer, at, &vec![7; sector as usize])?;
        change_mind(layer, at + len / 4 / sector * sector)?;
        zero(layer, at + len / 2 / sector * sector, (len / 4 / sector * sector).max(sector))?;
    }
    Ok(())
}

/// What the sector at `at` reads as; nothing if a parent would show through.
pub(super) fn sector(layer: &dyn Layer, at: u64) -> Result<Option<Vec<u8>>> {
    let info = layer.info();
    let mut runs = Vec::new();
    layer.map(at, info.sector_size.into(), &mut runs)?;
    let mut bytes = vec![0; info.sector_size as usize];
    match runs[0].source {
        Source::Data(place) => layer.store().read_at(&mut bytes, place)?,
        Source::Absent if info.kind == Kind::Differencing => return Ok(None),
        Source::Zero | Source::Absent => (),
    }
    Ok(Some(bytes))
}

/// A write that never happens, beside one that does.
fn change_mind(layer: &dyn Layer, at: u64) -> Result<()> {
    let info = layer.info();
    let len = u64::from(info.sector_size);
    let before = sector(layer, at)?;
    drop(layer.prepare(at, len, Change::Data)?);
    let dropped = layer.prepare(at, len, Change::Data)?;
    let beside = (at + 2 * len <= info.size).then(|| layer.prepare(at + len, len, Change::Data)).transpose()?;
    drop(dropped);
    if let Some(ticket) = beside {
        fill(layer, &ticket, &vec![8; len as usize])?;
        layer.commit(ticket)?;
    }
    assert_eq!(sector(layer, at)?, before, "what was dropped shows");
    Ok(())
}

/// Tries what a layer that is open for reading does not do, and what no layer does.
pub(super) fn misuse(layer: &dyn Layer) {
    let info = layer.info();
    let (store, sector) = (layer.store(), u64::from(info.sector_size));
    for (offset, len) in [(1, sector), (0, 1), (info.size, sector), (u64::MAX / sector * sector, sector)] {
        assert!(layer.map(offset, len, &mut Vec::new()).is_err(), "{len} bytes at {offset} are no part of the disk");
    }
    assert!(layer.prepare(0, sector, Change::Data).is_err(), "a ticket to write to what is only read");
    assert!(layer.relink(Some(uuid::Uuid::nil()), None).is_err(), "an id for what is only read");
    let changes = [store.write_at(&[1], 0), store.set_len(1), store.punch(0, 1)];
    assert!(changes.iter().all(Result::is_err), "a change of what is only read");
    let quiet = [layer.flush().is_ok(), layer.close().is_ok(), store.sync().is_ok(), store.allocated().is_ok()];
    assert_eq!(quiet, [true; 4], "what does nothing does not fail");
    let end = store.len().unwrap_or_default();
    assert!(store.read_at(&mut [0], end).is_err(), "a byte past the end of {}", store.name());
}

/// The same, to be read only.
pub(super) fn to_read(file: &File) -> Arc<Disk> {
    Disk::to_read("disk.avhdx", file.clone())
}

/// A disk that holds `file`, under the name of an image.
pub(super) fn disk(file: &File) -> Arc<Disk> {
    Disk::new("disk.avhdx", file.clone())
}
