//! Headers and region tables of which both copies are destroyed: found again by what they led to, where that is certain.

use super::table::{Pages, Subject, examine};
use super::{Exam, Headers, NOTHING_READS, cannot, fixed, mend, padded};
use crate::Result;
use crate::vhdx::format::{
    HEADER_AT, LOG_SIGNATURE, METADATA_SIGNATURE, MIB, PAGE, PAGE_BYTES, REGION_TABLE_AT, RawLogEntry, TABLE_BYTES,
    parse,
};
use crate::vhdx::header::{self, Header, Region, Regions};
use crate::vhdx::log::{self, Patch, Replay};
use crate::vhdx::metadata::{self, Metadata};
use crate::vhdx::open::{MAX_FILE, geometry};
use std::collections::{BTreeMap, BTreeSet};
use store::Store;
use uuid::Uuid;

/// Where every file that was seen has its log.
const USUAL_LOG: Region = Region { offset: MIB, length: MIB };
/// The metadata region of every file that was seen.
const USUAL_METADATA: u64 = MIB;
/// How far the metadata is sought: behind the longest table that files have.
const SOUGHT: u64 = 1 << 30;
/// The most logs whose entries are looked at.
const MOST_LOGS: usize = 16;

impl Exam {
    /// A header for a file that has none, if the log is where all files have it and nothing is lost without it.
    pub(super) fn rebuilt_header(&mut self) -> Result<Option<(Header, Headers)>> {
        let place = format!("both copies of the header, at {} and {}", HEADER_AT[0], HEADER_AT[1]);
        let what = "both copies of the header are destroyed";
        let copies = [
            padded(&*self.store, REGION_TABLE_AT[0], TABLE_BYTES)?,
            padded(&*self.store, REGION_TABLE_AT[1], TABLE_BYTES)?,
        ];
        let regions = copies.iter().find_map(|copy| header::decode_copy(copy)?.ok());
        let why = match regions {
            None => Some("where the log lies is written nowhere else, and the region table is destroyed too"),
            Some(regions) => {
                let taken = |region: &Region| region.offset < USUAL_LOG.end() && USUAL_LOG.offset < region.end();
                if [regions.bat, regions.metadata].iter().chain(&regions.others).any(taken) {
                    Some("the log is not where it usually is")
                } else if self.log_is_needed()? {
                    Some("the log holds changes that are not in their places, and whether they count is not known")
                } else {
                    None
                }
            }
        };
        let remedy = why.map_or_else(
            || mend("new ones are written; the log was carried out, but a child no longer recognises this image by its id"),
            cannot,
        );
        self.damage("header", &place, what, NOTHING_READS, remedy);
        if why.is_some() {
            return Ok(None);
        }
        let header = Header {
            sequence: 0,
            file_write: Uuid::new_v4(),
            data_write: Uuid::new_v4(),
            log: Uuid::nil(),
            log_offset: USUAL_LOG.offset,
            log_length: USUAL_LOG.length,
        };
        Ok(Some((header, Headers { slot: 0, sequence: 0, broken: true })))
    }

    /// Whether the log may hold what is not in its place: there are runs of entries, and none of them is carried out.
    fn log_is_needed(&self) -> Result<bool> {
        let bytes = padded(&*self.store, USUAL_LOG.offset, USUAL_LOG.length as usize)?;
        let entries = bytes.chunks_exact(PAGE).filter_map(|page| parse::<RawLogEntry>(page, 0));
        let logs: BTreeSet<Uuid> =
            entries.filter(|entry| entry.signature == LOG_SIGNATURE).map(|entry| entry.log.into()).collect();
        let mut any = false;
        for id in logs.into_iter().take(MOST_LOGS) {
            if let Some(replay) = log::replay(&bytes, id) {
                any = true;
                if self.is_carried_out(&replay)? {
                    return Ok(false);
                }
            }
        }
        Ok(any)
    }

    fn is_carried_out(&self, replay: &Replay) -> Result<bool> {
        let mut newest = BTreeMap::new();
        for patch in &replay.patches {
            match patch {
                Patch::Page(at, page) => drop(newest.insert(*at, page)),
                // Not looked at: it may not be.
                Patch::Zero(..) => return Ok(false),
            }
        }
        for (at, page) in newest {
            if padded(&*self.store, at, PAGE)? != page[..] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The regions of a file that has no region table, if there is one way only to read it.
    pub(super) fn rebuilt_regions(&mut self, view: &dyn Store, header: &Header) -> Result<Option<Regions>> {
        let place = format!("both copies of the region table, at {} and {}", REGION_TABLE_AT[0], REGION_TABLE_AT[1]);
        let what = "both copies of the region table are destroyed";
        let found = sought(view, header)?;
        let remedy = match &found {
            Some(_) => mend(
                "they are written again: the metadata and the block table were found, and nothing else can be them",
            ),
            None => cannot("where the block table and the metadata lie is not certain"),
        };
        self.damage("region-table", &place, what, NOTHING_READS, remedy);
        if let Some(regions) = &found {
            let bytes = header::encode_regions(regions.bat, regions.metadata);
            for at in REGION_TABLE_AT {
                self.plan.write_last(at, bytes.clone());
            }
        }
        Ok(found)
    }
}

/// The one pair of metadata and table that makes sense.
fn sought(view: &dyn Store, header: &Header) -> Result<Option<Regions>> {
    let log = Region { offset: header.log_offset, length: header.log_length };
    let length = view.len()?;
    if length > MAX_FILE {
        return Ok(None);
    }
    let mut found = None;
    for at in (MIB..length.min(SOUGHT)).step_by(MIB as usize).filter(|at| !(log.offset..log.end()).contains(at)) {
        if padded(view, at, METADATA_SIGNATURE.len())? != METADATA_SIGNATURE {
            continue;
        }
        let region = Region { offset: at, length: USUAL_METADATA };
        let Ok(metadata) = metadata::read(&padded(view, at, USUAL_METADATA as usize)?) else { continue };
        if found.replace((region, metadata)).is_some() {
            return Ok(None);
        }
    }
    let Some((region, metadata)) = found else { return Ok(None) };
    let places = BTreeSet::from([log.end(), region.end(), MIB, 2 * MIB, 3 * MIB, 4 * MIB]);
    let mut table = None;
    for at in places.into_iter().filter(|at| *at < length) {
        let regions = Regions {
            bat: Region { offset: at, length: geometry(&metadata).table_region() },
            metadata: region,
            others: Vec::new(),
        };
        if is_table(view, header, &regions, &metadata)? && table.replace(regions).is_some() {
            return Ok(None);
        }
    }
    Ok(table)
}

/// Whether the table can lie there: it holds blocks, and nothing is wrong with any.
fn is_table(view: &dyn Store, header: &Header, regions: &Regions, metadata: &Metadata) -> Result<bool> {
    let fixed = fixed(header, regions);
    let apart = fixed.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.offset);
    let inside =
        regions.bat.offset.checked_add(regions.bat.length).is_some_and(|end| view.len().is_ok_and(|len| end <= len));
    if !apart || !inside || !regions.bat.offset.is_multiple_of(PAGE_BYTES) {
        return Ok(false);
    }
    let subject = Subject { store: view, region: regions.bat, geometry: geometry(metadata), fixed, parent_named: true };
    let outcome = examine(&subject, Pages::default())?;
    Ok(outcome.is_sound() && outcome.placed > 0)
}
