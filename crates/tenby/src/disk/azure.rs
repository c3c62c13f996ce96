//! What Azure takes of disks: fixed VHDs of whole MiB. (Their files have 512 bytes more, the footer, and no file is to be padded.)

use super::words;
use crate::draw;
use crate::out::Out;
use image::{Format, Kind};
use machine::plan::quoted;
use machine::request::Problem;
use std::path::Path;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The smallest disk that can be uploaded, bytes.
const LEAST: u64 = 20 * MIB;
/// The largest one, bytes.
const MOST: u64 = 32_767 * GIB;
/// The largest one that a machine starts from, bytes.
const MOST_TO_BOOT: u64 = 4095 * GIB;

/// The size that a disk of `size` bytes gets so that Azure takes it. Says what it changes, and refuses what no size helps.
pub(super) fn fit(size: u64, target: &Path, out: &Out) -> Result<u64, Problem> {
    let fit = size.next_multiple_of(MIB).max(LEAST);
    if fit > MOST {
        let message = format!("a disk of {} is too large for Azure, which takes up to 32767G", draw::size(size));
        return Err(Problem::refused(message));
    }
    let target = target.display();
    if fit != size {
        let (more, mib) = (fit - size, fit / MIB);
        out.note(&format!(
            "{target} gets {mib}M, {more} bytes more than the source: Azure takes whole MiB, 20 at least"
        ));
    }
    if fit > MOST_TO_BOOT {
        out.note(&format!("{target} can be a data disk only: Azure starts machines from up to 4095G"));
    }
    Ok(fit)
}

/// Says that Azure would not take a fixed VHD of this size, and what would help.
pub(super) fn note_unfit(format: Format, kind: Kind, size: u64, out: &Out, help: &str) {
    if (format, kind) == (Format::Vhd, Kind::Fixed) && !size.is_multiple_of(MIB) {
        out.note(&format!("Azure takes fixed VHDs of whole MiB only, not of {size} bytes; one that fits: {help}"));
    }
}

/// The command as it was typed, with a fit for Azure.
pub(super) fn help_convert() -> String {
    format!("{} --azure", words())
}

/// How to make an empty disk that fits.
pub(super) fn help_create(file: &Path, size: u64) -> String {
    let (file, size) = (quoted(&file.display().to_string()), size.next_multiple_of(MIB).max(LEAST) / MIB);
    format!("tenby disk create {file} --size {size}M --type fixed")
}
