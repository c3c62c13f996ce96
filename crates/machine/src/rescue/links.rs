//! Which file stands on which, by their ids alone.
//!
//! A fold that was cut off leaves more than one answer (`image/src/merge.rs` has the order of its steps): a child that accepts two parents, a
//! parent that has taken its child's id and plays its part while the child's file is still there. What is left here is a forest.

use super::found::{Found, Unknown};
use crate::label::Label;
use crate::tree::{LayerFormat, LayerId, LayerKind, MachineId};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// The files that are layers of the machine, and what each stands on.
#[derive(Debug)]
pub(super) struct Links<'a> {
    pub(super) found: &'a [Found],
    /// What each stands on.
    pub(super) parent: Vec<Option<usize>>,
    /// All that it stands on is here.
    pub(super) whole: Vec<bool>,
    /// Its label; of a file that plays another's part, the other's.
    pub(super) label: Vec<Option<&'a Label>>,
    /// It is shared, and says what it is to another machine.
    pub(super) foreign: Vec<bool>,
    /// A merge was writing into it, or it stands between the ends of one: nothing but what stands on it is sensible.
    pub(super) torn: Vec<bool>,
    /// It accepts its parent by the id that a merge gave it: to be put right by whoever works with the machine next.
    pub(super) mend: Vec<usize>,
}

impl<'a> Links<'a> {
    /// Finds them. `used` says which files may be layers at all, and `home` whose labels count: what is shared speaks of another machine.
    pub(super) fn find(found: &'a [Found], mut used: Vec<bool>, home: MachineId, unknown: &mut Vec<Unknown>) -> Self {
        let own = |label: &&Label| label.machine.id == home;
        let mut label: Vec<Option<&Label>> = found.iter().map(|file| file.label.as_ref().filter(own)).collect();
        let foreign = found.iter().map(|file| file.label.as_ref().is_some_and(|label| !own(&label))).collect();
        settle_twins(found, &mut used, &mut label, unknown);
        let mut links = Self {
            found,
            parent: vec![None; found.len()],
            whole: used.clone(),
            label,
            foreign,
            torn: vec![false; found.len()],
            mend: Vec::new(),
        };
        links.link(&used);
        links.keep_whole(&used, unknown);
        links.find_torn();
        links
    }

    /// The files that this one stands on, the nearest first, itself among them.
    pub(super) fn chain(&self, at: usize) -> impl Iterator<Item = usize> {
        // A circle has been cut before anybody walks here.
        std::iter::successors(Some(at), |at| self.parent[*at])
    }

    /// How many files stand on each, of those for which `counts` says yes.
    pub(super) fn children(&self, counts: impl Fn(usize) -> bool) -> Vec<usize> {
        let mut children = vec![0; self.found.len()];
        for parent in (0..self.found.len()).filter(|at| counts(*at)).filter_map(|at| self.parent[at]) {
            children[parent] += 1;
        }
        children
    }

    /// Whether what its label says holds for what is in the file.
    pub(super) fn is_sure(&self, at: usize) -> bool {
        self.label[at].is_some_and(|label| label.content == Some(self.found[at].info.data_id))
    }

    fn link(&mut self, used: &[bool]) {
        let by_id = by_id(self.found, used);
        let candidates = |at: usize| -> Vec<(usize, bool)> {
            let file = &self.found[at];
            let Some(link) = &file.info.parent else { return Vec::new() };
            let of = |id: Uuid| by_id.get(&(file.kind as u8, id)).copied().filter(|parent| *parent != at);
            let second = link.linkage2.and_then(of).map(|parent| (parent, true));
            let raw = link.linkage.is_nil().then(|| raw_base(self.found, used, at)).flatten();
            let first = of(link.linkage).or(raw).map(|parent| (parent, false));
            let fits = |(parent, _): &(usize, bool)| {
                self.found[*parent].info.format == image::Format::Raw
                    || self.found[*parent].info.sector_size == file.info.sector_size
            };
            first.into_iter().chain(second).filter(fits).collect()
        };
        let candidates: Vec<_> = (0..self.found.len()).filter(|at| used[*at]).map(|at| (at, candidates(at))).collect();
        for (at, candidates) in &candidates {
            self.parent[*at] = candidates.first().map(|(parent, _)| *parent);
        }
        let mut second: BTreeSet<usize> = BTreeSet::new();
        for (at, candidates) in &candidates {
            // Towards the end of a merge its lowest layer names the top, which stands on it.
            let other = candidates.get(1).filter(|_| self.in_circle(*at));
            let chosen = other.or(candidates.first());
            self.parent[*at] = chosen.map(|(parent, _)| *parent);
            if chosen.is_some_and(|(_, is_second)| *is_second) {
                second.insert(*at);
            }
        }
        self.mend = second.into_iter().collect();
    }

    fn in_circle(&self, at: usize) -> bool {
        let mut walked = 0;
        let mut next = self.parent[at];
        while let Some(parent) = next {
            walked += 1;
            if parent == at {
                return true;
            }
            if walked > self.found.len() {
                return false;
            }
            next = self.parent[parent];
        }
        false
    }

    /// Takes out what hangs on nothing.
    fn keep_whole(&mut self, used: &[bool], unknown: &mut Vec<Unknown>) {
        let is_based = |at: usize| {
            let mut next = at;
            for _ in 0..=self.found.len() {
                match self.parent[next] {
                    None => return self.found[next].info.parent.is_none(),
                    Some(parent) => next = parent,
                }
            }
            false
        };
        self.whole = (0..self.found.len()).map(|at| used[at] && is_based(at)).collect();
        for at in (0..self.found.len()).filter(|at| used[*at] && !self.whole[*at]) {
            let what = self.why_not(at);
            let named: Vec<&str> = self.label[at].iter().flat_map(|l| &l.snapshots).map(|s| s.name.as_str()).collect();
            let with = if named.is_empty() { String::new() } else { format!("; so {} is lost", named.join(", ")) };
            unknown.push(Unknown::of(&self.found[at].file, format!("{what}{with}; it was left alone")));
        }
    }

    fn why_not(&self, at: usize) -> String {
        if self.parent[at].is_some() {
            return "what it stands on does not come back".to_owned();
        }
        let base = self.label[at].and_then(|label| label.base.as_ref());
        let link = self.found[at].info.parent.as_ref();
        match (base, link.and_then(|link| image::gate::parent_name(link).ok())) {
            (Some(base), _) => format!(
                "what it stands on was taken in place, from {}: if that is right, say so: --with FILE",
                base.file.escape_debug()
            ),
            (None, Some(name)) => format!("what it stands on is not here, or was changed: {name}"),
            (None, None) => "what it stands on is not here".to_owned(),
        }
    }

    /// Where a merge was under way, the lowest of its files holds a mixture, that only the top of the run makes sense of.
    fn find_torn(&mut self) {
        let children = self.children(|at| self.whole[at]);
        let mut between: BTreeSet<LayerId> = BTreeSet::new();
        for at in 0..self.found.len() {
            between.extend(self.label[at].iter().filter(|_| self.whole[at]).flat_map(|label| &label.merging));
        }
        for child in self.mend.clone() {
            let Some(parent) = self.parent[child].filter(|parent| !self.is_sure(*parent)) else { continue };
            self.torn[parent] = true;
            // Without labels: a run is of layers on which one stands, and its top may be the next on which none or several do.
            let mut next = Some(child).filter(|child| self.label[*child].is_none());
            while let Some(at) = next.filter(|at| children[*at] == 1 && self.label[*at].is_none()) {
                self.torn[at] = true;
                next = (0..self.found.len()).find(|child| self.whole[*child] && self.parent[*child] == Some(at));
            }
        }
        for at in 0..self.found.len() {
            self.torn[at] |= self.label[at].is_some_and(|label| between.contains(&label.layer));
        }
    }
}

fn by_id(found: &[Found], used: &[bool]) -> BTreeMap<(u8, Uuid), usize> {
    let ids = (0..found.len()).filter(|at| used[*at] && !found[*at].info.data_id.is_nil());
    ids.map(|at| ((found[at].kind as u8, found[at].info.data_id), at)).collect()
}

/// A raw file has no id: the one that the label names, or the only one.
fn raw_base(found: &[Found], used: &[bool], child: usize) -> Option<usize> {
    let base = found[child].label.as_ref().and_then(|label| label.base.as_ref());
    let base = base.filter(|base| base.format == LayerFormat::Raw && found[child].kind == LayerKind::Disk)?;
    let raw = |at: &usize| used[*at] && found[*at].in_place && found[*at].info.format == image::Format::Raw;
    let all: Vec<usize> = (0..found.len()).filter(raw).collect();
    let named = all.iter().copied().find(|at| found[*at].file == base.file);
    match all.as_slice() {
        [only] => named.or(Some(*only)),
        _ => named,
    }
}

/// Of files of one id only one is a layer: the end of a merge leaves two, and so does who copies a file.
fn settle_twins<'a>(
    found: &'a [Found],
    used: &mut [bool],
    label: &mut [Option<&'a Label>],
    unknown: &mut Vec<Unknown>,
) {
    let mut twins: BTreeMap<(u8, Uuid), Vec<usize>> = BTreeMap::new();
    for at in (0..found.len()).filter(|at| used[*at] && !found[*at].info.data_id.is_nil()) {
        twins.entry((found[at].kind as u8, found[at].info.data_id)).or_default().push(at);
    }
    for twins in twins.values().filter(|twins| twins.len() > 1) {
        let (emptied, full): (Vec<usize>, Vec<usize>) = twins.iter().partition(|at| is_emptied(found, used, **at));
        let sure = |at: usize| label[at].is_some_and(|label| label.content == Some(found[at].info.data_id));
        let own_name = |at: usize| label[at].is_some_and(|l| found[at].name().starts_with(&l.layer.to_string()));
        let named = |at: usize| found.iter().any(|child| names(child, &found[at]));
        let best = |all: &[usize]| all.iter().copied().max_by_key(|at| (sure(*at), named(*at), own_name(*at)));
        let Some(stays) = best(&full).or_else(|| best(&emptied)) else { continue };
        if !sure(stays)
            && let Some(from) = emptied.iter().find(|at| **at != stays && label[**at].is_some())
        {
            label[stays] = label[*from];
        }
        for at in twins.iter().filter(|at| **at != stays) {
            used[*at] = false;
            let what = if emptied.contains(at) {
                format!("a merge has put what it held into {}; it was left alone", found[stays].file)
            } else {
                format!("it is a copy of {}, or the other way round; it was left alone", found[stays].file)
            };
            unknown.push(Unknown::of(&found[*at].file, what));
        }
    }
}

fn names(child: &Found, parent: &Found) -> bool {
    let name = child.info.parent.as_ref().and_then(|link| image::gate::parent_name(link).ok());
    child.kind == parent.kind && name.is_some_and(|name| name == parent.name())
}

/// Whether a merge is over for this file: what stands at the bottom of the run accepts the file's own id as its parent's.
fn is_emptied(found: &[Found], used: &[bool], top: usize) -> bool {
    let own = found[top].info.data_id;
    let mut at = top;
    for _ in 0..found.len() {
        let Some(link) = &found[at].info.parent else { return false };
        if link.linkage == own {
            return true;
        }
        let below = |below: &usize| {
            let id = found[*below].info.data_id;
            used[*below] && found[*below].kind == found[top].kind && id != own && link.linkage == id
        };
        match (0..found.len()).find(below) {
            Some(below) => at = below,
            None => return false,
        }
    }
    false
}
