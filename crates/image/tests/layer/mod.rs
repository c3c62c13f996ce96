//! Writing and reading one layer, as a chain does it.

use image::{Change, Layer, Result, Source};

/// Writes sectors through a ticket.
pub(crate) fn write(layer: &dyn Layer, offset: u64, data: &[u8]) -> Result<()> {
    let ticket = layer.prepare(offset, data.len() as u64, Change::Data)?;
    for extent in &ticket.extents {
        let at = (extent.offset - offset) as usize;
        layer.store().write_at(&data[at..at + extent.len as usize], extent.at)?;
    }
    layer.commit(ticket)
}

/// Zeroes sectors through a ticket.
pub(crate) fn zero(layer: &dyn Layer, offset: u64, len: u64) -> Result<()> {
    let ticket = layer.prepare(offset, len, Change::Zero)?;
    for extent in &ticket.extents {
        layer.store().write_at(&vec![0; extent.len as usize], extent.at)?;
    }
    layer.commit(ticket)
}

/// What the layer holds; where it holds nothing, `absent`.
pub(crate) fn read(layer: &dyn Layer, offset: u64, len: u64, absent: u8) -> Result<Vec<u8>> {
    let (mut runs, mut out) = (Vec::new(), Vec::new());
    layer.map(offset, len, &mut runs)?;
    for run in runs {
        assert_eq!(run.offset, offset + out.len() as u64, "runs without gaps");
        assert_ne!(run.len, 0, "no empty runs");
        let mut bytes = vec![0; run.len as usize];
        match run.source {
            Source::Data(at) => layer.store().read_at(&mut bytes, at)?,
            Source::Zero => (),
            Source::Absent => bytes.fill(absent),
        }
        out.extend(bytes);
    }
    assert_eq!(out.len() as u64, len, "runs to the end");
    Ok(out)
}
