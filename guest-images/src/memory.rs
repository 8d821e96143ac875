//! Lists of page runs: the pages of RAM that a guest program may use.
//!
//! Built from the memory map of a monitor, whose ranges may be in any order, overlap, be unaligned,
//! or end beyond the address space.

use crate::interface::PAGE_SIZE;

/// Maximum number of runs in a list, which is more than any monitor describes. Further runs are not
/// used.
pub const RUNS_MOST: usize = 16;

/// End of the guest-physical addresses that are used. One page-directory-pointer table maps all
/// memory below it.
pub const ADDRESS_END: u64 = 512 << 30;

/// A run of contiguous pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// Number of the first page: its guest-physical address divided by the page size.
    pub first: u64,
    /// Length in pages.
    pub pages: u64,
}

impl Run {
    const fn end(&self) -> u64 {
        self.first + self.pages
    }
}

/// A sorted list of disjoint runs. Its pages are numbered from 0, starting at the lowest address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    runs: [Run; RUNS_MOST],
    count: usize,
}

impl Runs {
    /// Creates an empty list.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            runs: [Run { first: 0, pages: 0 }; RUNS_MOST],
            count: 0,
        }
    }

    /// Returns the runs, sorted by address.
    #[must_use]
    pub fn as_slice(&self) -> &[Run] {
        &self.runs[..self.count]
    }

    /// Returns the number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.as_slice().iter().map(|run| run.pages).sum()
    }

    /// Adds the RAM at `address`. Only whole pages are added, and only if they are at or above
    /// `floor`, below [`ADDRESS_END`], and not in the list already.
    pub fn add(&mut self, address: u64, bytes: u64, floor: u64) {
        let end = address.saturating_add(bytes).min(ADDRESS_END) / PAGE_SIZE;
        let mut first = address.max(floor).div_ceil(PAGE_SIZE);
        // The runs in the list split the new run. The list is sorted, so one ascending pass finds
        // all gaps between them.
        let mut at = 0;
        while at < self.count && first < end {
            let old = self.runs[at];
            if first < old.first {
                at += usize::from(self.insert(at, first, end.min(old.first)));
            }
            first = first.max(old.end());
            at += 1;
        }
        if first < end {
            self.insert(at, first, end);
        }
    }

    /// Inserts a run at index `at`. Returns false if the list is full.
    fn insert(&mut self, at: usize, first: u64, end: u64) -> bool {
        if self.count == RUNS_MOST {
            return false;
        }
        self.runs.copy_within(at..self.count, at + 1);
        self.runs[at] = Run {
            first,
            pages: end - first,
        };
        self.count += 1;
        true
    }

    /// Returns the part of the list that starts at page index `from` and has at most `pages` pages.
    #[must_use]
    pub fn window(&self, mut from: u64, mut pages: u64) -> Self {
        let mut part = Self::new();
        for run in self.as_slice() {
            let skipped = from.min(run.pages);
            let taken = pages.min(run.pages - skipped);
            if taken > 0 {
                part.runs[part.count] = Run {
                    first: run.first + skipped,
                    pages: taken,
                };
                part.count += 1;
            }
            from -= skipped;
            pages -= taken;
        }
        part
    }

    /// Returns the guest-physical address of page index `index`. An index past the end continues the
    /// last run.
    #[inline]
    #[must_use]
    pub fn gpa(&self, mut index: u64) -> u64 {
        let mut run = &self.runs[0];
        let mut next = 1;
        // The page is nearly always in the first run, which costs one comparison.
        while index >= run.pages && next < self.count {
            index -= run.pages;
            run = &self.runs[next];
            next += 1;
        }
        (run.first + index) * PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn listed(runs: &Runs) -> Vec<u64> {
        runs.as_slice()
            .iter()
            .flat_map(|run| run.first..run.end())
            .collect()
    }

    #[test]
    fn unaligned_ends_lose_their_partial_pages() {
        let mut runs = Runs::new();
        runs.add(0x1001, 0x3000, 0);
        assert_eq!(runs.as_slice(), [Run { first: 2, pages: 2 }]);
    }

    #[test]
    fn nothing_below_the_floor_or_beyond_the_end_of_addresses() {
        let mut runs = Runs::new();
        runs.add(0, 0x10_0000, 0x10_0000);
        runs.add(ADDRESS_END, u64::MAX, 0);
        runs.add(u64::MAX - 5, 100, 0);
        runs.add(0x10_0000, 0, 0);
        assert_eq!(runs.pages(), 0);
        runs.add(ADDRESS_END - PAGE_SIZE, u64::MAX, 0);
        assert_eq!(runs.pages(), 1);
    }

    #[test]
    fn a_full_list_refuses_more_and_stays_sound() {
        let mut runs = Runs::new();
        for n in 0..40 {
            runs.add(n * 2 * PAGE_SIZE, PAGE_SIZE, 0);
        }
        assert_eq!(runs.pages(), RUNS_MOST as u64);
    }

    proptest! {
        #[test]
        fn a_list_is_the_union_of_the_added_ranges(
            ranges in prop::collection::vec((0u64..200, 0u64..20), 0..8)
        ) {
            let mut runs = Runs::new();
            let mut model = BTreeSet::new();
            for (first, pages) in ranges {
                runs.add(first * PAGE_SIZE, pages * PAGE_SIZE, 0);
                model.extend(first..first + pages);
            }
            prop_assume!(runs.as_slice().len() < RUNS_MOST);
            let model: Vec<u64> = model.into_iter().collect();
            prop_assert_eq!(listed(&runs), model);
        }

        #[test]
        fn a_window_holds_the_pages_that_it_names(
            ranges in prop::collection::vec((0u64..200, 1u64..20), 1..5),
            from in 0u64..100, pages in 0u64..100
        ) {
            let mut runs = Runs::new();
            for (first, length) in ranges {
                runs.add(first * PAGE_SIZE, length * PAGE_SIZE, 0);
            }
            let all = listed(&runs);
            let from_index = usize::try_from(from).unwrap().min(all.len());
            let to_index = usize::try_from(from + pages).unwrap().min(all.len());
            let window = runs.window(from, pages);
            prop_assert_eq!(listed(&window), &all[from_index..to_index]);
            for (index, page) in (0u64..).zip(listed(&window)) {
                prop_assert_eq!(window.gpa(index), page * PAGE_SIZE);
            }
        }
    }
}
