//! Checking a VHD: the same structures as the opener reads, but everything that is wrong is named instead of the first thing refused.
//!
//! ```text
//!   footers ► header, locators ► block table ► what lies where ► bitmaps ► what the footers and the header need
//! ```
//!
//! A wrong checksum is set right only if all that it covers agrees with the file; so footers and header are judged last. A file that
//! the opener refuses as damaged is never clean here, and one that is clean here opens.

mod blocks;

use super::bat::Geometry;
use super::footer::{self, Footer, Found};
use super::format::{
    BLOCK_SIZES, HEADER_BYTES, HEADER_CHECKSUM, HEADER_COOKIE, LOCATOR_ABSOLUTE, LOCATOR_RELATIVE, LOCATOR_URL,
    MAX_BLOCKS, MAX_FIXED, MAX_SPARSE, NOWHERE, RawHeader, RawLocator, SECTOR, VERSION, checksum,
};
use super::parent::{MAX_LOCATOR, utf16};
use crate::check::{Finding, Plan, Remedy, Report, Severity, Survey};
use crate::layer::Kind;
use crate::{ErrorKind, Format, Result};
use std::ops::Range;
use std::sync::Arc;
use store::Store;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Where nearly all files have their header; there one without any footer is recognised.
const USUAL_HEADER_AT: u64 = SECTOR;
/// The bytes of a footer that say something; the rest is reserved.
const TELLING: usize = 84;

/// Whether a file without the signature of a VHD is one all the same: it has a header, or a footer before nothing but zeros.
pub(crate) fn looks_like_one(store: &dyn Store) -> Result<bool> {
    Ok(padded(store, USUAL_HEADER_AT, HEADER_COOKIE.len())? == HEADER_COOKIE || footer::before_zeros(store)?.is_some())
}

/// Everything that is wrong with a VHD, and what would mend it.
pub(crate) fn survey(store: &Arc<dyn Store>) -> Result<Survey> {
    let mut exam = Exam {
        store: Arc::clone(store),
        length: store.len()?,
        report: Report::new(Format::Vhd),
        plan: Plan::default(),
        hopeless: None,
        doubt: false,
        exact: false,
        cut: false,
        regrown: None,
        end: 0,
    };
    exam.all()?;
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

const NOTHING_READS: &str = "nothing of the virtual disk can be read";
const NO_DATA: &str = "none: all data can be read";
const NOWHERE_ELSE: &str = "what it said is written nowhere else";

fn mend(how: &str) -> Remedy {
    Remedy::Mend(how.to_owned())
}

fn cannot(why: &str) -> Remedy {
    Remedy::Cannot(why.to_owned())
}

/// The header, as it lies in the file and as it is to be.
struct Header {
    at: u64,
    raw: RawHeader,
    sealed: bool,
    /// It is to be written again.
    changed: bool,
    /// The sectors of the locators' data.
    locators: Vec<Range<u64>>,
}

/// An examination under way.
struct Exam {
    store: Arc<dyn Store>,
    /// The file's, bytes.
    length: u64,
    report: Report,
    plan: Plan,
    /// Why nothing may be repaired, if so.
    hopeless: Option<String>,
    /// What the footer and the header say does not agree with the file: a wrong checksum may be right about that.
    doubt: bool,
    /// The table has just the entries that a disk of this size needs.
    exact: bool,
    /// Something is cut off by the file's end, and stays so.
    cut: bool,
    /// Where the file ends, before its footer, once what was cut off is mended.
    regrown: Option<u64>,
    /// The end of all that is known to be used, bytes.
    end: u64,
}

impl Exam {
    fn add(&mut self, severity: Severity, kind: &'static str, place: &str, what: &str, effect: &str, remedy: Remedy) {
        let (place, what, effect) = (place.to_owned(), what.to_owned(), effect.to_owned());
        self.report.add(Finding { severity, kind, place, what, effect, ranges: Vec::new(), remedy });
    }

    fn damage(&mut self, kind: &'static str, place: &str, what: &str, effect: &str, remedy: Remedy) {
        self.add(Severity::Damage, kind, place, what, effect, remedy);
    }

    fn note(&mut self, kind: &'static str, place: &str, what: &str, effect: &str) {
        self.add(Severity::Note, kind, place, what, effect, Remedy::Nothing);
    }

    /// What ends a check: nothing behind it can be read, and it is written nowhere else.
    fn stop(&mut self, kind: &'static str, place: &str, what: &str) {
        self.doubt = true;
        self.damage(kind, place, what, NOTHING_READS, cannot(NOWHERE_ELSE));
    }

    /// The same where what is known is not supported: then nothing is repaired.
    fn unsupported(&mut self, place: &str, what: &str) {
        self.hopeless = Some("the image uses what is not known here".to_owned());
        self.damage("unsupported", place, what, NOTHING_READS, cannot("it is not known what the image means by it"));
    }

    fn all(&mut self) -> Result<()> {
        let found = match footer::find(&*self.store) {
            Ok(found) => found,
            Err(error) if error.kind == ErrorKind::Damaged => {
                let what = "both copies of the footer are destroyed";
                self.damage("footer", "the footers, at 0 and at the end", what, NOTHING_READS, cannot(NOWHERE_ELSE));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        match found.footer.kind() {
            Ok(kind) if found.footer.is_known_version() => {
                self.disk(&found, kind)?;
                self.footers(&found, kind)
            }
            Ok(_) => {
                self.unsupported("the footer", "its footer is of another version than 1.0");
                Ok(())
            }
            Err(number) => {
                self.unsupported("the footer", &format!("it is a disk of type {number}, which is unknown"));
                Ok(())
            }
        }
    }

    /// Checks all but the footers.
    fn disk(&mut self, found: &Found, kind: Kind) -> Result<()> {
        let size = found.footer.size();
        let most = if kind == Kind::Fixed { MAX_FIXED } else { MAX_SPARSE };
        if size == 0 || size > most || !size.is_multiple_of(SECTOR) {
            self.stop("size", "the footer", &format!("the size of {size} bytes is none that the format allows"));
            return Ok(());
        }
        if kind == Kind::Fixed {
            self.fixed(size, found.tail.unwrap_or(0));
            return Ok(());
        }
        let Some(mut header) = self.header(found)? else { return Ok(()) };
        if let Some(geometry) = self.geometry(found, kind, &header.raw) {
            self.locators(&mut header, &geometry)?;
            if self.places(found, &header, &geometry) {
                self.table(found, &header, &geometry)?;
            }
        }
        self.put_header(&mut header);
        Ok(())
    }

    /// Checks that the data of a fixed disk ends where its footer begins.
    fn fixed(&mut self, size: u64, tail: u64) {
        if size > tail {
            self.doubt = true;
            let what = format!("the disk has {size} bytes, and the file only {tail} before its footer");
            self.report.add(Finding {
                severity: Severity::Damage,
                kind: "cut",
                place: "the end of the file".to_owned(),
                what,
                effect: format!("bytes {tail} to {} of the disk are lost, and the image is refused", size - 1),
                ranges: std::iter::once(tail..size).collect(),
                remedy: cannot("whether it was cut, or its size is wrong, is not known"),
            });
        } else if size < tail {
            let what = format!("{} bytes lie between the end of the disk and the footer", tail - size);
            self.note("unused", &format!("from {size} on"), &what, NO_DATA);
        }
        self.exact = size == tail;
    }

    /// The header, if it is one.
    fn header(&mut self, found: &Found) -> Result<Option<Header>> {
        let at = found.footer.header_at();
        let place = format!("the header, at {at}");
        let limit = found.tail.unwrap_or(self.length);
        if at < SECTOR || !at.is_multiple_of(SECTOR) || at.checked_add(HEADER_BYTES).is_none_or(|end| end > limit) {
            self.cut = true;
            self.stop("header", &place, "the footer places the header where it cannot be");
            return Ok(None);
        }
        let bytes = padded(&*self.store, at, HEADER_BYTES as usize)?;
        let Ok(mut raw) = RawHeader::read_from_bytes(&bytes) else { return Ok(None) };
        let signed = raw.cookie == HEADER_COOKIE;
        raw.cookie = HEADER_COOKIE;
        let sealed = is_sealed(&raw);
        if !signed {
            // The checksum covers the signature: it proves that nothing else is wrong.
            if !sealed {
                self.stop("header", &place, "the header is destroyed");
                return Ok(None);
            }
            let remedy = mend("the signature is written again: the checksum shows that the rest is good");
            self.damage("header", &place, "the header has lost its signature", NOTHING_READS, remedy);
        }
        if raw.version.get() != VERSION {
            self.unsupported(&place, &format!("the header is of version {:#x}, not 1.0", raw.version.get()));
            return Ok(None);
        }
        Ok(Some(Header { at, raw, sealed, changed: !signed, locators: Vec::new() }))
    }

    /// How the header cuts the disk into blocks.
    fn geometry(&mut self, found: &Found, kind: Kind, raw: &RawHeader) -> Option<Geometry> {
        let (block, entries) = (raw.block_size.get(), u64::from(raw.max_entries.get()));
        if !block.is_power_of_two() || !BLOCK_SIZES.contains(&block) {
            self.stop("header", "the header", &format!("blocks of {block} bytes are none that the format allows"));
            return None;
        }
        let geometry = Geometry { size: found.footer.size(), block: block.into(), kind };
        let blocks = geometry.blocks();
        if blocks > MAX_BLOCKS {
            self.unsupported("the header", &format!("it has {blocks} blocks, which is too much"));
            return None;
        }
        if entries < blocks {
            let what = format!("the block table has {entries} entries for {blocks} blocks");
            self.stop("table", "the header", &what);
            return None;
        }
        if entries > blocks {
            let what = format!("the block table has {entries} entries, and the disk only {blocks} blocks");
            self.note("long-table", "the header", &what, NO_DATA);
        }
        self.exact = entries == blocks;
        Some(geometry)
    }

    /// Checks what the header says of where the parent is.
    fn locators(&mut self, header: &mut Header, geometry: &Geometry) -> Result<()> {
        let mut names = utf16(&header.raw.parent_name, u16::from_be_bytes).is_some();
        for slot in 0..header.raw.locators.len() {
            let locator = header.raw.locators[slot];
            if locator.code == [0; 4] || locator.length.get() == 0 {
                continue;
            }
            let (at, length) = (locator.offset.get(), u64::from(locator.length.get()));
            let inside = at.checked_add(length).is_some_and(|end| end <= self.length);
            let wrong = if locator.length.get() > MAX_LOCATOR || !inside {
                Some("lies where it cannot be")
            } else {
                header.locators.push(at / SECTOR * SECTOR..(at + length).next_multiple_of(SECTOR));
                let text = is_text(locator.code, &padded(&*self.store, at, length as usize)?);
                names |= text == Some(true);
                (text == Some(false)).then_some("holds no text")
            };
            if let Some(wrong) = wrong {
                self.bad_locator(header, slot, wrong);
            }
        }
        if geometry.differencing() && !names {
            let what = "the image says nowhere what its parent is called";
            self.note("parent-unnamed", "the header", what, "the parent is known by its id only, and must be named");
        }
        Ok(())
    }

    fn bad_locator(&mut self, header: &mut Header, slot: usize, wrong: &str) {
        let code = header.raw.locators[slot].code;
        let what = format!("the parent locator {} {wrong}", code.escape_ascii());
        let remedy = mend("it is removed; what else names the parent stays");
        let effect = "the parent may not be found by its name; the data is not touched by that";
        self.damage("parent-locator", &format!("locator {slot} of the header"), &what, effect, remedy);
        header.raw.locators[slot] = RawLocator::new_zeroed();
        header.changed = true;
    }

    /// Whether what is not blocks lies where it can be.
    fn places(&mut self, found: &Found, header: &Header, geometry: &Geometry) -> bool {
        let (at, bytes) = (header.raw.table_offset.get(), geometry.table());
        let place = format!("the block table, {bytes} bytes at {at}");
        let limit = found.tail.unwrap_or(self.length);
        if !at.is_multiple_of(SECTOR) || at.checked_add(bytes).is_none_or(|end| end > limit) {
            self.cut = true;
            self.stop("table", &place, "the block table does not lie inside the file");
            return false;
        }
        if at < SECTOR || at < header.at + HEADER_BYTES && header.at < at + bytes {
            self.doubt = true;
            self.hopeless = Some("it is not known which of the structures that overlap is good".to_owned());
            let remedy = cannot("it is not known which of them is good");
            self.damage("overlap", &place, "the block table lies over a header", NOTHING_READS, remedy);
            return false;
        }
        for locator in &header.locators {
            if locator.start < at + bytes && at < locator.end {
                let remedy = cannot("what it said is lost; the table is needed");
                let what = "a parent locator lies over the block table";
                let effect = "the parent may not be found by its name; the data is not touched by that";
                let place = format!("a parent locator, at {}", locator.start);
                self.damage("overlap", &place, what, effect, remedy);
                self.doubt = true;
            }
        }
        true
    }

    /// Checks the header's checksum, and plans what is to be changed in it.
    fn put_header(&mut self, header: &mut Header) {
        if !header.sealed {
            let place = format!("the header, at {}", header.at);
            let fine = !self.doubt && self.exact;
            let remedy = if fine {
                mend("the checksum is set: what the header says agrees with the file")
            } else {
                cannot("what the header says does not agree with the file")
            };
            let what = "the checksum of the header is wrong";
            self.damage("header-checksum", &place, what, "the image can be read at most, not written", remedy);
            if !fine {
                self.hopeless = Some("the header cannot be trusted: its checksum is wrong".to_owned());
            }
            header.changed = true;
        }
        if header.changed {
            header.raw.checksum = checksum(header.raw.as_bytes(), HEADER_CHECKSUM).into();
            self.plan.write(header.at, header.raw.as_bytes().to_vec());
        }
    }

    /// Checks the footers. If anything is to be changed, both are written: by their id an undo file is told that is too old.
    fn footers(&mut self, found: &Found, kind: Kind) -> Result<()> {
        self.footer_notes(found);
        let mut tail_at = found.tail;
        if let Some(tail) = found.tail.filter(|tail| kind == Kind::Fixed && self.length > tail + SECTOR) {
            // Where the file ends, but not over the one that is there.
            tail_at = Some(((self.length - SECTOR) / SECTOR * SECTOR).max((tail + SECTOR).next_multiple_of(SECTOR)));
        }
        let broken = if found.sealed { self.copies(found, kind)? } else { self.unsealed(found, kind)? };
        if let Some(end) = self.regrown {
            tail_at = Some(end.next_multiple_of(SECTOR));
        } else if tail_at.is_none() && !self.cut {
            tail_at = Some(self.place_for_tail(&found.footer)?);
        }
        let Some(tail_at) = tail_at else { return Ok(()) };
        if broken || !self.plan.is_empty() {
            let footer = found.footer.with(found.footer.id(), found.footer.header_at());
            self.plan.write_last(tail_at, footer.bytes().to_vec());
            if kind != Kind::Fixed {
                self.plan.write_last(0, footer.bytes().to_vec());
            }
        }
        Ok(())
    }

    fn footer_notes(&mut self, found: &Found) {
        if found.footer.saved_state() {
            let effect = "none for the disk: a virtual machine was suspended, and its memory is kept elsewhere";
            self.note("saved-state", "the footer", "the flag of a saved state is set", effect);
        }
        if found.tail.is_some_and(|tail| tail + SECTOR > self.length) {
            let what = "the footer has 511 bytes, as tools before 2004 wrote it";
            self.note("short-footer", "the footer at the end", what, NO_DATA);
        }
    }

    /// Compares the copies of a footer whose checksum is right; whether they are to be written again.
    fn copies(&mut self, found: &Found, kind: Kind) -> Result<bool> {
        let good = "none: the other copy is good. If that is lost too, nothing can be read";
        if found.tail.is_none() && self.cut {
            let remedy = cannot("something else that is cut off by the file's end belongs where it was");
            self.damage("footer", "the footer at the end", "the footer is missing", good, remedy);
            return Ok(false);
        }
        if !found.tail_sound && kind == Kind::Fixed {
            let what = if found.tail.is_some_and(|tail| tail + SECTOR > self.length) {
                "the footer's last bytes, which are zeros, are missing"
            } else {
                "nothing but zeros lie behind the footer: the file was cut off while it grew, or was padded"
            };
            let effect = "none here; other programs take the file for raw bytes";
            let remedy = mend("the footer is written again where the file ends");
            self.damage("footer", "the footer at the end", what, effect, remedy);
            return Ok(true);
        }
        if !found.tail_sound {
            let what = if found.tail.is_none() { "the footer is missing" } else { "the footer is destroyed" };
            let remedy = mend("it is written again from the copy at the beginning");
            self.damage("footer", "the footer at the end", what, good, remedy);
            return Ok(true);
        }
        if kind == Kind::Fixed || found.head_sound {
            return Ok(false);
        }
        let head = Footer::parse(&padded(&*self.store, 0, SECTOR as usize)?);
        let place = "the copy of the footer at the beginning";
        let remedy = mend("it is written again from the footer at the end");
        if head.is_some_and(|head| head.is_sealed()) {
            let effect = "none: the one at the end counts. Other programs may take the other one";
            self.damage("footers-differ", place, "the two copies of the footer differ", effect, remedy);
        } else {
            self.damage("footer", place, "the copy of the footer is destroyed", good, remedy);
        }
        Ok(true)
    }

    /// Judges a footer whose checksum is wrong in every copy that is there; whether they are to be written again.
    fn unsealed(&mut self, found: &Found, kind: Kind) -> Result<bool> {
        let footer = &found.footer;
        let one = kind == Kind::Fixed
            || found.head_sound
            || Footer::parse(&padded(&*self.store, 0, SECTOR as usize)?).is_none();
        let leads = kind != Kind::Fixed || footer.header_at() == NOWHERE;
        let fine = one && leads && self.exact && !self.doubt && !self.cut && footer.size_agrees();
        let remedy = if fine {
            mend("the checksum is set: what the footer says agrees with the file")
        } else {
            cannot("what the footer says does not agree with the file, or with its copy")
        };
        let what = "the checksum of the footer is wrong, and there is no copy with a right one";
        self.damage("footer-checksum", "the footer", what, "the image can be read at most, not written", remedy);
        if !fine {
            self.hopeless = Some("the footer cannot be trusted: its checksum is wrong".to_owned());
        }
        Ok(fine)
    }

    /// Where a lost footer is put: into the last sector if that looks like what is left of it, else behind everything.
    fn place_for_tail(&self, footer: &Footer) -> Result<u64> {
        let behind = self.length.next_multiple_of(SECTOR).max(self.end);
        let Some(last) = self.length.checked_sub(SECTOR).filter(|at| at.is_multiple_of(SECTOR) && *at >= self.end)
        else {
            return Ok(behind);
        };
        let there = padded(&*self.store, last, SECTOR as usize)?;
        let same = there.iter().zip(footer.bytes()).take(TELLING).filter(|(one, two)| one == two).count();
        // If the structures could not be read, nothing is known of what lies there.
        Ok(if same > TELLING / 2 && self.end > 0 { last } else { behind })
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

fn is_sealed(raw: &RawHeader) -> bool {
    raw.checksum.get() == checksum(raw.as_bytes(), HEADER_CHECKSUM)
}

/// Whether a locator's data is the text that its code promises; `None` if its code promises none.
fn is_text(code: [u8; 4], data: &[u8]) -> Option<bool> {
    match code {
        LOCATOR_RELATIVE | LOCATOR_ABSOLUTE => Some(utf16(data, u16::from_le_bytes).is_some()),
        LOCATOR_URL => Some(std::str::from_utf8(data).is_ok()),
        _ => None,
    }
}
