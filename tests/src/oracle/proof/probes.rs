//! Generates the probes of a proof.

use std::collections::BTreeMap;

use crate::oracle::model::{Leaf, Model, pages};
use crate::oracle::proof::chance::Chance;
use crate::oracle::proof::ground::{Ground, page_in, within};
use crate::oracle::proof::{ACCESSES, PAGE_SHIFT};
use crate::oracle::{Access, Probe};

/// Leaves of one level, all tracked or all untracked, each with its first page.
type Leaves = Vec<(u64, Leaf)>;

impl Ground {
    /// Returns `count` probes, at least half of them on mapped pages. No probe accesses memory outside of the frames.
    pub(super) fn probes(&self, chance: &mut Chance, model: &Model, count: usize) -> Vec<Probe> {
        let mut by_kind = BTreeMap::<(u32, bool), Leaves>::new();
        for (first, leaf) in model.leaves(0..self.end) {
            let kind = by_kind.entry((leaf.level, leaf.tracked)).or_default();
            kind.push((first, leaf));
        }
        let leaves: Vec<_> = by_kind.into_values().collect();
        let holes = holes(model.leaves(0..self.end));
        let mut probes = Vec::new();
        while probes.len() < count {
            let page = self.page(chance, &leaves, &holes);
            let access = *chance.pick(&ACCESSES);
            if self.can_be_probed(model, page, access) {
                let gpa = page << PAGE_SHIFT;
                probes.push(Probe { gpa, access });
            }
        }
        probes
    }

    /// Returns a page of a leaf, a page next to a leaf, a page of a used range, or any page.
    fn page(&self, chance: &mut Chance, leaves: &[Leaves], holes: &[Vec<u64>]) -> u64 {
        match chance.below(16) {
            0..=7 if !leaves.is_empty() => self.mapped_page(chance, leaves),
            8 | 9 if !leaves.is_empty() => page_beside(chance, leaves),
            10 | 11 if !holes.is_empty() => {
                let at_level = chance.pick(holes);
                *chance.pick(at_level)
            }
            12 => chance.below(self.end),
            _ => {
                let place = chance.pick(&self.places);
                page_in(chance, place)
            }
        }
    }

    /// Returns a page of a leaf, within the frames if the leaf maps any. All levels are equally likely, tracked and
    /// untracked.
    fn mapped_page(&self, chance: &mut Chance, leaves: &[Leaves]) -> u64 {
        let of_kind = chance.pick(leaves);
        let (first, leaf) = *chance.pick(of_kind);
        let host = leaf.hpa >> PAGE_SHIFT;
        let start = self.frames.start.max(host);
        let end = self.frames.end.min(host + pages(leaf.level));
        if start >= end {
            return first + chance.below(pages(leaf.level));
        }
        first + start - host + within(chance, end - start)
    }

    /// Whether a page is in range, not needed by the machine, and an access would stay within the frames.
    pub(super) fn can_be_probed(&self, model: &Model, page: u64, access: Access) -> bool {
        let is_done_elsewhere = model.at(page).is_some_and(|(first, leaf)| {
            let hpa = leaf.hpa + ((page - first) << PAGE_SHIFT);
            leaf.allows(access) && self.frame(hpa).is_none()
        });
        page < self.end && !self.is_reserved(page) && !is_done_elsewhere
    }
}

/// Returns the unmapped pages next to leaves, grouped by the level of the leaf.
fn holes(leaves: impl Iterator<Item = (u64, Leaf)>) -> Vec<Vec<u64>> {
    let mut by_level = BTreeMap::<u32, Vec<u64>>::new();
    let mut before: Option<(u64, u32)> = None;
    for (first, leaf) in leaves {
        if let Some((end, level)) = before.filter(|(end, _)| *end < first) {
            by_level.entry(level).or_default().push(end);
            by_level.entry(leaf.level).or_default().push(first - 1);
        }
        before = Some((first + pages(leaf.level), leaf.level));
    }
    by_level.into_values().collect()
}

fn page_beside(chance: &mut Chance, leaves: &[Leaves]) -> u64 {
    let of_kind = chance.pick(leaves);
    let (first, leaf) = chance.pick(of_kind);
    if chance.one_in(2) {
        first + pages(leaf.level)
    } else {
        first.saturating_sub(1)
    }
}
