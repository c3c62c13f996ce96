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
//! What shows it: an entry behind the disk's last one, or in the place of a bitmap's, which such files do not have.
//!
//! It is mended only if it is proven: what comes out must be a table without any fault, and either the first entry is there twice (then
//! no reader opens the file as it is), or QEMU made the file, before 8.0, and what shows it is a block, not only zeros.

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
    let candidates = candidates(subject, &as_it_is)?;
    let certain = !candidates.is_empty() && candidates.iter().all(|candidate| candidate.certain);
    let back = if certain { shifted_back(subject, &candidates)? } else { None };
    let back = back.filter(Outcome::is_sound);
    let proven = back.is_some();
    let mut outcome = back.unwrap_or(as_it_is);
    for candidate in candidates.iter().rev() {
        outcome.report.findings.insert(0, story(candidate.page, subject, proven));
    }
    Ok(outcome)
}

/// The most pages that are looked at together.
const MOST: usize = 256;

/// A page that looks as if it was shifted.
struct Candidate {
    page: u64,
    /// The entries as they were before, if they can be told.
    words: Option<Vec<u64>>,
    /// The last entry of the page fell out of it.
    lost: bool,
    /// Nothing but a shift leaves such a page.
    certain: bool,
}

impl Candidate {
    fn bytes(&self) -> Option<PageBytes> {
        let mut bytes = Box::new([0; PAGE]);
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(self.words.as_ref()?) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Some(bytes)
    }
}

/// The table as it was before it was shifted. An entry that was lost is found if exactly one block's place belongs to nothing.
fn shifted_back(subject: &Subject<'_>, candidates: &[Candidate]) -> Result<Option<Outcome>> {
    let pages: Option<BTreeMap<_, _>> =
        candidates.iter().map(|candidate| Some((candidate.page, candidate.bytes()?))).collect();
    let Some(mut pages) = pages else { return Ok(None) };
    let outcome = examine_table(subject, Pages(pages.clone()))?;
    let mut lost = candidates.iter().filter(|candidate| candidate.lost);
    let Some(loser) = lost.next() else { return Ok(Some(outcome)) };
    // QEMU leaves room before the first block; a block that was lost lies behind it.
    let large = |hole: &&(u64, u64)| hole.1 >= subject.geometry.block && hole.0 > outcome.first;
    let mut holes = outcome.holes.iter().filter(large);
    match (holes.next(), holes.next(), lost.next()) {
        (None, ..) => Ok(Some(outcome)),
        (Some((at, len)), None, None) if *len == subject.geometry.block => {
            let page = pages.get_mut(&loser.page).expect("every candidate has its page");
            page[PAGE - 8..].copy_from_slice(&Entry::full(*at).0.to_le_bytes());
            Ok(Some(examine_table(subject, Pages(pages))?))
        }
        _ => Ok(None),
    }
}

/// The pages of which the evidence is in the table.
fn candidates(subject: &Subject<'_>, outcome: &Outcome) -> Result<Vec<Candidate>> {
    let geometry = &subject.geometry;
    let last = geometry.payload_index(geometry.blocks() - 1);
    let old_qemu = made_by_old_qemu(subject)?;
    let last_page = last / WORDS as u64;
    // Elsewhere only what is there twice, or what old QEMUs left in the places of bitmaps, tells.
    let first_page = if old_qemu || outcome.shared { 0 } else { last_page };
    let mut candidates = Vec::new();
    for page in first_page..=last_page {
        let first = page * WORDS as u64;
        let end = (last + 1 - first).min(WORDS as u64) as usize;
        let now = words(&*subject.page(page)?);
        if geometry.block_of(first).is_none() || !is_full(now[0]) || end < 2 || candidates.len() == MOST {
            continue;
        }
        let evidence = Evidence::of(&now, end, first, subject)?;
        if !(evidence.block || evidence.zero && old_qemu || evidence.twice && end == WORDS) {
            continue;
        }
        let back = shifted_page(&now, end, evidence.twice, |at| geometry.block_of(first + at as u64).is_some());
        let differs = |(old, new): (&u64, &u64)| old != new && (is_full(*old) || is_full(*new));
        let moves = back.as_ref().is_some_and(|back| back.iter().zip(&now).any(differs));
        // QEMU's new files hold zeros everywhere; where only those moved, nothing came to harm.
        if moves || evidence.block {
            let certain = evidence.twice || old_qemu && evidence.block;
            candidates.push(Candidate { page, words: back, lost: end == WORDS, certain });
        }
    }
    Ok(candidates)
}

/// What in a page belongs there by a shift only.
struct Evidence {
    /// A block that lies in the file, where no other of the page does, stands where no block's entry is.
    block: bool,
    /// The state zero, with which QEMU fills new tables, stands there.
    zero: bool,
    /// The first block's entry is the second's, too.
    twice: bool,
}

impl Evidence {
    /// What the page tells whose first entry is `first`, and of which the first `end` are the disk's.
    fn of(words: &[u64], end: usize, first: u64, subject: &Subject<'_>) -> Result<Self> {
        let length = subject.store.len()?;
        let alone = words.iter().skip(end + 1).all(|word| *word == 0);
        let none_of_a_block = |at: &usize| subject.geometry.block_of(first + *at as u64).is_none();
        let strange: Vec<usize> = (1..WORDS).filter(none_of_a_block).filter(|at| alone || *at < end).collect();
        let claimed = |at: usize| {
            let same = |(other, word): (usize, &u64)| {
                other != at && is_full(*word) && Entry(*word).offset() == Entry(words[at]).offset()
            };
            words.iter().enumerate().any(same)
        };
        let in_file = |at: usize| is_full(words[at]) && (MIB..length).contains(&Entry(words[at]).offset());
        Ok(Self {
            block: strange.iter().any(|at| in_file(*at) && !claimed(*at)),
            zero: strange.iter().any(|at| Entry(words[*at]) == Entry::zero()),
            twice: words[0] == words[1],
        })
    }
}

fn words(page: &[u8; PAGE]) -> Vec<u64> {
    page.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("chunks of eight"))).collect()
}

fn is_full(word: u64) -> bool {
    Entry(word).state() == Some(State::Full)
}

/// The entries of a page as they were before the shift, the first `end` of them being the disk's, if each finds its place: one that
/// is a block's, as `of_block` says.
fn shifted_page(words: &[u64], end: usize, twice: bool, of_block: impl Fn(usize) -> bool) -> Option<Vec<u64>> {
    // QEMU places blocks one behind the other: what lies behind the first block was placed after the shift, in the right entry.
    let first = Entry(words[0]).offset();
    let moved = |word: u64| is_full(word) && (twice || Entry(word).offset() < first);
    let mut back: Vec<Option<u64>> = vec![None; WORDS];
    back[0] = Some(words[0]);
    let mut put = |at: usize, word: u64| of_block(at) && back[at].replace(word).is_none();
    let skipped = if twice { 2 } else { 1 };
    for (at, word) in words.iter().enumerate().take(end + 1).skip(skipped) {
        let fine = match *word {
            word if moved(word) => put(at - 1, word),
            word if is_full(word) => put(at, word),
            _ => true,
        };
        if !fine {
            return None;
        }
    }
    let unplaced = |at: usize| if of_block(at) { Entry::zero().0 } else { 0 };
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

fn story(page: u64, subject: &Subject<'_>, proven: bool) -> Finding {
    let first = page * WORDS as u64;
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
