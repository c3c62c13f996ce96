//! Checking a VHDX: the same structures as the opener reads, but everything that is wrong is named instead of the first thing refused.
//!
//! ```text
//!   signature ► headers ► log (replayed in memory) ► region table ► metadata ► block table ► what lies where
//! ```
//!
//! Each step needs the one before it; what cannot be read ends the check there. A file that the opener refuses as damaged is never
//! clean here, and one that is clean here opens.

mod claims;
mod rebuild;
mod shift;
mod table;

use super::format::{
    FILE_SIGNATURE, HEADER_AT, HEADER_SECTION, ITEM_INCOMPLETE, ITEM_PARENT_LOCATOR, ITEM_REQUIRED, MIB, PAGE,
    PAGE_BYTES, REGION_TABLE_AT, RawHeader, RawItem, TABLE_BYTES,
};
use super::header::{self, Header, Region, Regions};
use super::log::{self, MAX_LOG, Patch, Replay};
use super::metadata::{self, Fault, Metadata};
use super::open::{MAX_FILE, MAX_METADATA, geometry};
use super::replay::{self, Replayed};
use crate::check::{Finding, Plan, Remedy, Report, Severity, Survey};
use crate::{ErrorKind, Format, Result};
use std::sync::Arc;
use store::Store;
use uuid::Uuid;

/// The most zeros that a log may ask for to be carried out by a repair, bytes: they are kept in memory, and what they replace in
/// the undo file. No log that was seen asks for any.
const MAX_ZEROS: u64 = 16 * MIB;

/// Whether a file without the signature of a VHDX is one all the same: it has a header.
pub(crate) fn looks_like_one(store: &dyn Store) -> Result<bool> {
    for at in HEADER_AT {
        if header::decode(&padded(store, at, PAGE)?).is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Everything that is wrong with a VHDX, and what would mend it.
pub(crate) fn survey(store: &Arc<dyn Store>) -> Result<Survey> {
    let mut exam =
        Exam { store: Arc::clone(store), report: Report::new(Format::Vhdx), plan: Plan::default(), hopeless: None };
    if let Some((header, headers)) = exam.all()? {
        exam.put_headers(header, &headers);
    }
    Ok(exam.end())
}

/// Bytes of a file, zeros past its end.
fn padded(store: &dyn Store, at: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let inside = store.len()?.saturating_sub(at).min(length as u64) as usize;
    if inside > 0 {
        store.read_at(&mut bytes[..inside], at)?;
    }
    Ok(bytes)
}

/// What is known of the two copies of the header.
struct Headers {
    /// The current one.
    slot: usize,
    /// The larger of the numbers.
    sequence: u64,
    /// Both are to be written again.
    broken: bool,
}

/// Which header counts.
enum Counts {
    This(Header, Headers),
    /// None, and that was said.
    Nothing,
    /// Both copies are destroyed.
    Lost,
}

/// An examination under way.
struct Exam {
    /// The file as it lies there.
    store: Arc<dyn Store>,
    report: Report,
    plan: Plan,
    /// Why nothing may be repaired, if so.
    hopeless: Option<String>,
}

const NOTHING_READS: &str = "nothing of the virtual disk can be read";
const NO_DATA: &str = "none: all data can be read";

fn mend(how: &str) -> Remedy {
    Remedy::Mend(how.to_owned())
}

fn cannot(why: &str) -> Remedy {
    Remedy::Cannot(why.to_owned())
}

/// A finding that is not about single blocks.
fn finding(severity: Severity, kind: &'static str, place: &str, what: &str, effect: &str, remedy: Remedy) -> Finding {
    let (place, what, effect) = (place.to_owned(), what.to_owned(), effect.to_owned());
    Finding { severity, kind, place, what, effect, ranges: Vec::new(), remedy }
}

impl Exam {
    fn damage(&mut self, kind: &'static str, place: &str, what: &str, effect: &str, remedy: Remedy) {
        self.report.add(finding(Severity::Damage, kind, place, what, effect, remedy));
    }

    fn note(&mut self, kind: &'static str, place: &str, what: &str, effect: &str) {
        self.report.add(finding(Severity::Note, kind, place, what, effect, Remedy::Nothing));
    }

    /// What ends a check: nothing behind it can be read, and nothing is repaired where what is known is not supported.
    fn stop(&mut self, kind: &'static str, place: &str, fault: Fault) {
        let (error, what) = fault;
        let why = if error == ErrorKind::Unsupported {
            self.hopeless = Some("the image uses what is not known here".to_owned());
            "it is not known what the image means by it"
        } else {
            "what it said is written nowhere else"
        };
        self.damage(kind, place, &what, NOTHING_READS, cannot(why));
    }

    /// Goes through the file. `None` if it was not even told which header counts.
    fn all(&mut self) -> Result<Option<(Header, Headers)>> {
        self.signature()?;
        let (mut header, headers) = match self.headers()? {
            Counts::This(header, headers) => (header, headers),
            Counts::Nothing => return Ok(None),
            Counts::Lost => match self.rebuilt_header()? {
                Some(found) => found,
                None => return Ok(None),
            },
        };
        let view = self.log(&mut header)?;
        if let Some(regions) = self.regions(&*view, &header)?
            && self.places(&*view, &header, &regions)?
            && let Some((metadata, parent_named)) = self.metadata(&*view, regions.metadata)?
        {
            self.table(&*view, &header, &regions, &metadata, parent_named)?;
        }
        Ok(Some((header, headers)))
    }

    fn signature(&mut self) -> Result<()> {
        if padded(&*self.store, 0, FILE_SIGNATURE.len())? != FILE_SIGNATURE {
            self.damage(
                "signature",
                "offset 0",
                "the signature is missing",
                "no program takes the file for a VHDX; its data is not touched by that",
                mend("the signature is written again"),
            );
            self.plan.write_last(0, FILE_SIGNATURE.to_vec());
        }
        Ok(())
    }

    /// Which header counts.
    fn headers(&mut self) -> Result<Counts> {
        let copies = [padded(&*self.store, HEADER_AT[0], PAGE)?, padded(&*self.store, HEADER_AT[1], PAGE)?];
        let decoded = [header::decode(&copies[0]), header::decode(&copies[1])];
        let sequence = decoded.iter().flatten().map(|raw| raw.sequence.get()).max().unwrap_or(0);
        let mut headers = Headers { slot: 0, sequence, broken: false };
        let raw = match decoded {
            [Some(first), Some(second)] => {
                headers.slot = usize::from(second.sequence.get() > first.sequence.get());
                if first.sequence == second.sequence && copies[0] != copies[1] {
                    headers.broken = self.headers_differ(&first, &second);
                    if !headers.broken {
                        return Ok(Counts::Nothing);
                    }
                }
                [first, second][headers.slot]
            }
            [Some(raw), None] | [None, Some(raw)] => {
                headers.slot = usize::from(decoded[0].is_none());
                headers.broken = true;
                let lost = 1 - headers.slot;
                let (effect, remedy) = match header::of(&raw) {
                    Ok(_) => (
                        "none: the other copy is good. If that is lost too, nothing can be read",
                        mend("it is written again from the other copy"),
                    ),
                    Err(_) => (NOTHING_READS, cannot("the other copy cannot be used")),
                };
                self.damage(
                    "header",
                    &format!("copy {} of the header, at {}", lost + 1, HEADER_AT[lost]),
                    "one of the two copies of the header is destroyed",
                    effect,
                    remedy,
                );
                raw
            }
            [None, None] => return Ok(Counts::Lost),
        };
        match header::of(&raw) {
            Ok(header) => Ok(Counts::This(header, headers)),
            Err(fault) => {
                let place = format!("copy {} of the header, at {}", headers.slot + 1, HEADER_AT[headers.slot]);
                self.stop("header", &place, fault);
                Ok(Counts::Nothing)
            }
        }
    }

    /// Two headers with one number that differ: whether the first can be taken for both.
    fn headers_differ(&mut self, first: &RawHeader, second: &RawHeader) -> bool {
        let usable = header::of(first).is_ok();
        let same_log = (first.log, first.log_offset, first.log_length, first.log_version, first.version)
            == (second.log, second.log_offset, second.log_length, second.log_version, second.version);
        let remedy = match (same_log, usable) {
            (true, true) => {
                mend("the first copy is taken; a child that was made over the other id no longer recognises this image")
            }
            (true, false) => cannot("what they agree on cannot be"),
            (false, _) => cannot("it is not known which of them says where the log lies and whether it is in use"),
        };
        self.damage(
            "header",
            &format!("both copies of the header, at {} and {}", HEADER_AT[0], HEADER_AT[1]),
            "the two headers have the same number and differ",
            "which of them counts is not known; the data is not touched by that",
            remedy,
        );
        same_log && usable
    }

    /// The file as it is once its log is carried out. If the log is to be empty after a repair, `header` says so.
    fn log(&mut self, header: &mut Header) -> Result<Arc<dyn Store>> {
        let as_it_is = Arc::clone(&self.store);
        if header.log.is_nil() {
            return Ok(as_it_is);
        }
        let place = format!("the log, {} bytes at {}", header.log_length, header.log_offset);
        if header.log_length > MAX_LOG {
            let what = format!("its log of {} bytes is in use and too long to be read", header.log_length);
            self.stop("log", &place, (ErrorKind::Unsupported, what));
            return Ok(as_it_is);
        }
        let length = self.store.len()?;
        // What a log that reaches past the file's end says does not count, to the opener neither.
        let inside = header.log_offset + header.log_length <= length;
        let bytes = if inside {
            header::read(&*self.store, header.log_offset, header.log_length as usize)?
        } else {
            Vec::new()
        };
        let Some(mut replay) = log::replay(&bytes, header.log) else {
            self.damage(
                "log",
                &place,
                "the log is in use and holds nothing valid",
                "the newest changes of the block table may be missing: blocks that were written last may read as what they \
                 were before",
                mend("the log is emptied; what only it held is lost"),
            );
            header.log = Uuid::nil();
            return Ok(as_it_is);
        };
        if length < replay.flushed_length {
            self.damage(
                "cut",
                &format!("the end of the file, at {length}"),
                &format!("the file was cut: its log counts on {} bytes at least", replay.flushed_length),
                "what lay behind the end is lost; blocks that lay there are named one by one",
                mend("the log is carried out as far as the file reaches"),
            );
            replay.patches.retain(|patch| patch.place().0 + patch.place().1 <= length);
            replay.last_length = length;
        }
        if let Err(error) = replay::check_places(&*self.store, header, &replay, length.max(replay.last_length)) {
            self.hopeless = Some("the log cannot be carried out".to_owned());
            let why = "neither the log nor what it would change can be trusted";
            self.damage("log", &place, &error.message, "the block table may be older than the data", cannot(why));
            return Ok(as_it_is);
        }
        if self.plan_replay(&replay) {
            self.note("log", &place, "the log is in use: what it holds was taken into account", NO_DATA);
        } else {
            self.hopeless = Some("its log is to be carried out first: open it for writing once".to_owned());
        }
        header.log = Uuid::nil();
        Ok(Arc::new(Replayed::new(as_it_is, replay)?))
    }

    /// Plans what carrying the log out writes; `false` if that is too much.
    fn plan_replay(&mut self, replay: &Replay) -> bool {
        let zeros: u64 = replay
            .patches
            .iter()
            .filter(|patch| matches!(patch, Patch::Zero(..)))
            .map(|patch| patch.place().1)
            .fold(0, u64::saturating_add);
        if zeros > MAX_ZEROS {
            return false;
        }
        self.plan.grow(replay.last_length);
        for patch in &replay.patches {
            match patch {
                Patch::Page(at, page) => self.plan.write(*at, page.to_vec()),
                Patch::Zero(at, len) => {
                    (*at..at + len).step_by(PAGE).for_each(|at| self.plan.write(at, vec![0; PAGE]));
                }
            }
        }
        true
    }

    /// The region table that counts.
    fn regions(&mut self, view: &dyn Store, header: &Header) -> Result<Option<Regions>> {
        let copies = [
            padded(&*self.store, REGION_TABLE_AT[0], TABLE_BYTES)?,
            padded(&*self.store, REGION_TABLE_AT[1], TABLE_BYTES)?,
        ];
        let place = |copy: usize| format!("copy {} of the region table, at {}", copy + 1, REGION_TABLE_AT[copy]);
        let mut decoded = copies.iter().map(|copy| header::decode_copy(copy));
        let decoded: [_; 2] = [decoded.next().flatten(), decoded.next().flatten()];
        let unsupported = |copy: &usize| matches!(decoded[*copy], Some(Err((ErrorKind::Unsupported, _))));
        let good = (0..2).find(|copy| matches!(decoded[*copy], Some(Ok(_))));
        let stopped = (0..2)
            .find(unsupported)
            .or_else(|| good.is_none().then(|| (0..2).find(|copy| decoded[*copy].is_some()).unwrap_or(0)));
        if let Some(copy) = stopped {
            match &decoded[copy] {
                Some(Err(fault)) => self.stop("region-table", &place(copy), fault.clone()),
                _ => return self.rebuilt_regions(view, header),
            }
            return Ok(None);
        }
        let [first, second] = decoded;
        let (copy, regions) = match (first, second) {
            (Some(Ok(first)), Some(Ok(second))) if first == second => return Ok(Some(self.unknown_regions(first))),
            (Some(Ok(regions)), _) => (0, regions),
            (_, Some(Ok(regions))) => (1, regions),
            _ => return Ok(None),
        };
        self.damage(
            "region-table",
            &place(1 - copy),
            "one of the two copies of the region table is destroyed, or says something else than the other",
            "none: the other copy is good. If that is lost too, nothing can be read",
            mend("it is written again from the other copy"),
        );
        self.plan.write_last(REGION_TABLE_AT[1 - copy], copies[copy].clone());
        Ok(Some(self.unknown_regions(regions)))
    }

    fn unknown_regions(&mut self, regions: Regions) -> Regions {
        for other in &regions.others {
            let place = format!("{} bytes at {}", other.length, other.offset);
            self.note("unknown-region", &place, "the image has a region that is not known here; it is kept", NO_DATA);
        }
        regions
    }

    /// Whether what is not blocks lies where it can be.
    fn places(&mut self, view: &dyn Store, header: &Header, regions: &Regions) -> Result<bool> {
        let length = view.len()?;
        if length > MAX_FILE {
            self.stop(
                "size",
                "the file",
                (ErrorKind::Unsupported, format!("it has {length} bytes, which is too much")),
            );
            return Ok(false);
        }
        let fixed = fixed(header, regions);
        for pair in fixed.windows(2) {
            let [(a, a_name), (b, b_name)] = [pair[0], pair[1]];
            if a.end() > b.offset {
                let what = format!("{a_name} and {b_name} lie in the same place");
                self.hopeless = Some("it is not known which of the structures that overlap is good".to_owned());
                self.damage(
                    "overlap",
                    &format!("offset {}", b.offset),
                    &what,
                    "what the file says cannot be trusted",
                    cannot("it is not known which of them is good"),
                );
                return Ok(false);
            }
        }
        let mut fine = true;
        for (region, name) in fixed {
            let place = format!("{name}, {} bytes at {}", region.length, region.offset);
            if region.offset >= length {
                let what = format!("{name} lies past the file's end at {length}");
                self.damage("past-end", &place, &what, NOTHING_READS, cannot("what it said is written nowhere else"));
                fine = false;
            } else if region.end() > length {
                let what = format!("{name} reaches past the file's end at {length}");
                let effect = "what lay behind the end is lost, and reads as zeros";
                self.damage("cut", &place, &what, effect, mend("the file is made longer"));
                self.plan.grow(region.end());
            }
        }
        Ok(fine)
    }

    /// What the metadata says, and whether a parent is named in it.
    fn metadata(&mut self, view: &dyn Store, region: Region) -> Result<Option<(Metadata, bool)>> {
        let place = format!("the metadata, {} bytes at {}", region.length, region.offset);
        if region.length > MAX_METADATA {
            let what = format!("its metadata region has {} bytes, which is too much", region.length);
            self.stop("metadata", &place, (ErrorKind::Unsupported, what));
            return Ok(None);
        }
        let bytes = padded(view, region.offset, region.length as usize)?;
        let items = metadata::items(&bytes).unwrap_or_default();
        let has = |id: Uuid| items.iter().any(|item| Uuid::from(item.id) == id);
        match metadata::read(&bytes) {
            Ok(metadata) => {
                for item in items.iter().filter(|item| !metadata::is_known(item)) {
                    let what = format!("the image has the metadata item {:?}, not known here; it is kept", item.id);
                    self.note("unknown-item", &place, &what, NO_DATA);
                }
                Ok(Some((metadata, has(ITEM_PARENT_LOCATOR))))
            }
            Err((_, what)) if has(ITEM_INCOMPLETE) => {
                let effect = "parts of the virtual disk were never written; which is not known";
                self.damage("incomplete", &place, &what, effect, cannot("what is missing has to be made again"));
                self.hopeless = Some("the image was never finished".to_owned());
                Ok(None)
            }
            Err(fault) => {
                let required = |item: &RawItem| item.flags.get() & ITEM_REQUIRED != 0 && !metadata::is_known(item);
                let kind = if items.iter().any(required) { "unknown-item" } else { "metadata" };
                self.stop(kind, &place, fault);
                Ok(None)
            }
        }
    }

    /// Checks the block table and what it says of the file.
    fn table(
        &mut self,
        view: &dyn Store,
        header: &Header,
        regions: &Regions,
        metadata: &Metadata,
        parent_named: bool,
    ) -> Result<()> {
        let geometry = geometry(metadata);
        let bytes = geometry.entries() * 8;
        if bytes > regions.bat.length {
            let what = format!("its block table has {} bytes of {bytes}", regions.bat.length);
            let place = format!("the block table, {} bytes at {}", regions.bat.length, regions.bat.offset);
            self.damage(
                "table",
                &place,
                &what,
                "where the last blocks lie is not known",
                cannot("there is no room for it"),
            );
            return Ok(());
        }
        let subject =
            table::Subject { store: view, region: regions.bat, geometry, fixed: fixed(header, regions), parent_named };
        let outcome = shift::examine(&subject)?;
        self.report.more += outcome.report.more;
        for finding in outcome.report.findings {
            self.report.add(finding);
        }
        if let Some(why) = outcome.hopeless {
            self.hopeless = Some(why);
        }
        for (page, bytes) in outcome.pages {
            self.plan.write(regions.bat.offset + page * PAGE_BYTES, bytes.to_vec());
        }
        for copy in outcome.copies {
            self.plan.copy(copy.from, copy.to, copy.len);
        }
        if outcome.length > self.store.len()? {
            self.plan.grow(outcome.length);
        }
        Ok(())
    }

    /// Plans new headers if anything is to be changed, or they themselves are to be mended.
    fn put_headers(&mut self, header: Header, headers: &Headers) {
        if self.plan.is_empty() && !headers.broken && header.log == self.log_in_file(headers) {
            return;
        }
        // Two numbers must be left; both copies are written, so that they may begin again.
        let sequence = if headers.sequence > u64::MAX - 2 { 0 } else { headers.sequence };
        let file_write = Uuid::new_v4();
        for (step, slot) in [(1, 1 - headers.slot), (2, headers.slot)] {
            let header = Header { sequence: sequence + step, file_write, ..header };
            self.plan.write_last(header::slot_offset(slot), header.encode().to_vec());
        }
    }

    /// The log's id as the current header has it.
    fn log_in_file(&self, headers: &Headers) -> Uuid {
        let bytes = padded(&*self.store, HEADER_AT[headers.slot], PAGE).unwrap_or_default();
        header::decode(&bytes).map_or(Uuid::nil(), |raw| raw.log.into())
    }

    fn end(mut self) -> Survey {
        if let Some(why) = self.hopeless {
            self.plan = Plan::default();
            for finding in &mut self.report.findings {
                if matches!(finding.remedy, Remedy::Mend(_)) {
                    finding.remedy = Remedy::Cannot(why.clone());
                }
            }
        }
        Survey { report: self.report, plan: self.plan }
    }
}

/// What lies in the file and is no block, in the order of the offsets.
fn fixed(header: &Header, regions: &Regions) -> Vec<(Region, &'static str)> {
    let log = Region { offset: header.log_offset, length: header.log_length };
    let section = Region { offset: 0, length: HEADER_SECTION };
    let mut fixed = vec![
        (section, "the header"),
        (log, "the log"),
        (regions.bat, "the block table"),
        (regions.metadata, "the metadata"),
    ];
    fixed.extend(regions.others.iter().map(|other| (*other, "an unknown region")));
    fixed.sort_by_key(|(region, _)| region.offset);
    fixed
}
