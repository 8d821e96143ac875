//! What is tried on the tables of a proof.

use std::collections::BTreeMap;

use crate::oracle::model::{Leaf, Model, needed, pages};
use crate::oracle::proof::chance::Chance;
use crate::oracle::proof::ground::{Ground, page_in, within};
use crate::oracle::proof::{ACCESSES, PAGE_SHIFT};
use crate::oracle::{Access, Probe};

/// Leaves of one level, each with its first page.
type Leaves = Vec<(u64, Leaf)>;

impl Ground {
    /// So many probes, half of them on mapped pages or more. None leads out of the frames.
    pub(super) fn probes(&self, chance: &mut Chance, model: &Model, count: usize) -> Vec<Probe> {
        let mut by_level = BTreeMap::<u32, Leaves>::new();
        for (first, leaf) in model.leaves(0..self.end) {
            by_level.entry(leaf.level).or_default().push((first, *leaf));
        }
        let leaves: Vec<_> = by_level.into_values().collect();
        let mut probes = Vec::new();
        while probes.len() < count {
            let page = self.page(chance, &leaves);
            let access = *chance.pick(&ACCESSES);
            if self.can_be_probed(model, page, access) {
                let gpa = page << PAGE_SHIFT;
                probes.push(Probe { gpa, access });
            }
        }
        probes
    }

    /// A page of a leaf, or beside one, or where operations are, or anywhere.
    fn page(&self, chance: &mut Chance, leaves: &[Leaves]) -> u64 {
        match chance.below(16) {
            0..=7 if !leaves.is_empty() => self.mapped_page(chance, leaves),
            8..=11 if !leaves.is_empty() => page_beside(chance, leaves),
            12 => chance.below(self.end),
            _ => {
                let place = chance.pick(&self.places);
                page_in(chance, place)
            }
        }
    }

    /// A page of a leaf, in the frames if the leaf has any. Every level has its turn.
    fn mapped_page(&self, chance: &mut Chance, leaves: &[Leaves]) -> u64 {
        let of_level = chance.pick(leaves);
        let (first, leaf) = *chance.pick(of_level);
        let host = leaf.hpa >> PAGE_SHIFT;
        let start = self.frames.start.max(host);
        let end = self.frames.end.min(host + pages(leaf.level));
        if start >= end {
            return first + chance.below(pages(leaf.level));
        }
        first + start - host + within(chance, end - start)
    }

    /// Whether a page can be reached, is not the machine's own, and an access would not be done out of the frames.
    fn can_be_probed(&self, model: &Model, page: u64, access: Access) -> bool {
        let is_done_elsewhere = model.at(page).is_some_and(|(first, leaf)| {
            let hpa = leaf.hpa + ((page - first) << PAGE_SHIFT);
            leaf.permissions.allows(needed(access)) && self.frame(hpa).is_none()
        });
        page < self.end && !self.is_reserved(page) && !is_done_elsewhere
    }
}

fn page_beside(chance: &mut Chance, leaves: &[Leaves]) -> u64 {
    let of_level = chance.pick(leaves);
    let (first, leaf) = chance.pick(of_level);
    if chance.one_in(2) {
        first + pages(leaf.level)
    } else {
        first.saturating_sub(1)
    }
}
