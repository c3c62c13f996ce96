//! Tables that QEMU has shifted.
//!
//! QEMU before 8.0 had a mistake in its log (its issue 727): when it changed the first entry of a page of the table, the page's other
//! entries moved up by one, the last one being lost. Until QEMU closed the file it used the table in its memory, which was right,
//! and wrote later entries to their right places; whoever reads the file sees the blocks that had a place before at the entry behind
//! their own.
//!
//! ```text
//!   before:  –  B  C  D  –     block 0 gets the place A:     A  –  B  C  D
//! ```
//!
//! That is mended only if it is proven: what comes out must be a table without any fault, and either the first entry is there twice
//! (then no reader opens the file as it is), or QEMU made the file, before 8.0, and an entry stands behind the disk's last one.

use super::table::{Outcome, Pages, Subject, examine as examine_table};
use super::{cannot, finding, mend, padded};
use crate::Result;
use crate::check::{Finding, Remedy, Severity};
use crate::vhdx::bat::{Entry, State};
use crate::vhdx::format::{MIB, PAGE};
use crate::vhdx::page::{PageBytes, WORDS};
use std::collections::BTreeMap;

/// Looks at the table; if it can be shown to be shifted, as it was before.
pub(super) fn examine(subject: &Subject<'_>) -> Result<Outcome> {
    let as_it_is = examine_table(subject, Pages::default())?;
    if subject.geometry.differencing {
        return Ok(as_it_is);
    }
    let Some(candidate) = candidate(subject, &as_it_is)? else { return Ok(as_it_is) };
    let back = if candidate.proven() { shifted_back(subject, &candidate)? } else { None };
    let proven = back.as_ref().is_some_and(Outcome::is_sound);
    let mut outcome = back.filter(Outcome::is_sound).unwrap_or(as_it_is);
    outcome.report.findings.insert(0, story(&candidate, subject, proven));
    Ok(outcome)
}

/// A page that looks as if it was shifted.
struct Candidate {
    page: u64,
    /// The entries as they were before, if they can be told.
    words: Option<Vec<u64>>,
    /// The last entry of the page fell out of it.
    lost: bool,
    /// The first entry is there twice.
    twice: bool,
    /// QEMU made the file when it still had the mistake.
    old_qemu: bool,
}

impl Candidate {
    fn proven(&self) -> bool {
        self.twice || self.old_qemu
    }

    fn bytes(&self) -> Option<PageBytes> {
        let mut bytes = Box::new([0; PAGE]);
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(self.words.as_ref()?) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Some(bytes)
    }
}

/// The table as it was before it was shifted. An entry that was lost is found if exactly one block's place belongs to nothing.
fn shifted_back(subject: &Subject<'_>, candidate: &Candidate) -> Result<Option<Outcome>> {
    let pages = |bytes: PageBytes| Pages(BTreeMap::from([(candidate.page, bytes)]));
    let Some(mut bytes) = candidate.bytes() else { return Ok(None) };
    let outcome = examine_table(subject, pages(bytes.clone()))?;
    if !candidate.lost {
        return Ok(Some(outcome));
    }
    let mut large = outcome.holes.iter().filter(|(_, len)| *len >= subject.geometry.block);
    match (large.next(), large.next()) {
        (None, _) => Ok(Some(outcome)),
        (Some((at, len)), None) if *len == subject.geometry.block => {
            bytes[PAGE - 8..].copy_from_slice(&Entry::full(*at).0.to_le_bytes());
            Ok(Some(examine_table(subject, pages(bytes))?))
        }
        _ => Ok(None),
    }
}

/// A page of which the evidence is in the table. At most one: several are not put right by themselves.
fn candidate(subject: &Subject<'_>, outcome: &Outcome) -> Result<Option<Candidate>> {
    let geometry = &subject.geometry;
    let last = geometry.payload_index(geometry.blocks() - 1);
    let old_qemu = made_by_old_qemu(subject)?;
    let last_page = last / WORDS as u64;
    let behind = (last % WORDS as u64) as usize + 1;
    if behind < WORDS && geometry.block_of(last_page * WORDS as u64).is_some() {
        let now = words(&*subject.page(last_page)?);
        if is_evidence(&now, behind, old_qemu, subject)? {
            let twice = now[0] == now[1];
            let back = shifted_page(&now, behind, twice);
            let differs = |(old, new): (&u64, &u64)| old != new && (is_full(*old) || is_full(*new));
            let moves = back.as_ref().is_some_and(|back| back.iter().zip(&now).any(differs));
            // QEMU's new files hold zeros everywhere; where only those moved, nothing came to harm.
            if moves || is_full(now[behind]) {
                return Ok(Some(Candidate { page: last_page, words: back, lost: false, twice, old_qemu }));
            }
        }
    }
    if !outcome.shared {
        return Ok(None);
    }
    let whole_pages = if behind == WORDS { last_page + 1 } else { last_page };
    for page in 0..whole_pages {
        let words = words(&*subject.page(page)?);
        let twice = is_full(words[0]) && words[0] == words[1];
        if twice && geometry.block_of(page * WORDS as u64).is_some() {
            let mut back = vec![words[0]];
            back.extend(&words[2..]);
            back.push(Entry::zero().0);
            return Ok(Some(Candidate { page, words: Some(back), lost: true, twice, old_qemu }));
        }
    }
    Ok(None)
}

fn words(page: &[u8; PAGE]) -> Vec<u64> {
    page.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("chunks of eight"))).collect()
}

fn is_full(word: u64) -> bool {
    Entry(word).state() == Some(State::Full)
}

/// Whether something stands behind the disk's last entry that belongs there by a shift only: a block that lies in the file where
/// nothing else does, or, in files of the QEMUs that did it, the state zero with which they fill new tables.
fn is_evidence(words: &[u64], behind: usize, old_qemu: bool, subject: &Subject<'_>) -> Result<bool> {
    let alone = words[behind + 1..].iter().all(|word| *word == 0);
    if !alone || behind < 2 || !is_full(words[0]) {
        return Ok(false);
    }
    let (stray, length) = (Entry(words[behind]), subject.store.len()?);
    let in_file = is_full(stray.0) && (MIB..length).contains(&stray.offset());
    let claimed = words[..behind].iter().any(|word| is_full(*word) && Entry(*word).offset() == stray.offset());
    Ok(in_file && !claimed || old_qemu && stray == Entry::zero())
}

/// The entries of a page as they were before the shift, if each finds its place.
fn shifted_page(words: &[u64], behind: usize, twice: bool) -> Option<Vec<u64>> {
    // QEMU places blocks one behind the other: what lies behind the first block was placed after the shift, in the right entry.
    let first = Entry(words[0]).offset();
    let moved = |word: u64| is_full(word) && (twice || Entry(word).offset() < first);
    let mut back: Vec<Option<u64>> = vec![None; WORDS];
    back[0] = Some(words[0]);
    let mut put = |at: usize, word: u64| back[at].replace(word).is_none();
    let skipped = if twice { 2 } else { 1 };
    for (at, word) in words.iter().enumerate().take(behind + 1).skip(skipped) {
        let fine = match *word {
            word if moved(word) => put(at - 1, word),
            word if is_full(word) => at < behind && put(at, word),
            _ => true,
        };
        if !fine {
            return None;
        }
    }
    let unplaced = |at: usize| if at < behind { Entry::zero().0 } else { 0 };
    Some(back.into_iter().enumerate().map(|(at, word)| word.unwrap_or_else(|| unplaced(at))).collect())
}

/// Whether the file's creator is a QEMU that had the mistake.
fn made_by_old_qemu(subject: &Subject<'_>) -> Result<bool> {
    let bytes = padded(subject.store, 8, 64)?;
    let units = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let creator: String =
        char::decode_utf16(units).map_while(std::result::Result::ok).take_while(|c| *c != '\0').collect();
    let version = creator.strip_prefix("QEMU v").and_then(|version| version.split('.').next()?.parse::<u32>().ok());
    Ok(version.is_some_and(|major| major < 8))
}

fn story(candidate: &Candidate, subject: &Subject<'_>, proven: bool) -> Finding {
    let first = candidate.page * WORDS as u64;
    let place = format!("entries {first} to {} of the block table", first + WORDS as u64 - 1);
    let what = "the entries stand one behind their places, as a mistake of QEMU before 8.0 left them";
    let remedy =
        if proven { mend("the entries are moved back") } else { cannot("it is not certain how they stood before") };
    let geometry = &subject.geometry;
    let block = |index: u64| geometry.block_of(index).unwrap_or(geometry.blocks());
    let bytes = block(first) * geometry.block
        ..(block(first + WORDS as u64 - 1) * geometry.block + geometry.block).min(geometry.size);
    let effect = format!("blocks of bytes {} to {} show each other's content", bytes.start, bytes.end - 1);
    let mut finding = finding(Severity::Damage, "shifted-table", &place, what, &effect, Remedy::Nothing);
    finding.remedy = remedy;
    finding.ranges = vec![bytes];
    finding
}
