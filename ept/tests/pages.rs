//! The model of pages, which the other suites trust, against a plain map of page numbers.

mod model;

use std::collections::BTreeMap;
use std::ops::Range;

use model::{PageSet, Pages};
use proptest::prelude::*;

/// Pages that the tests use.
const PAGES: u64 = 40;

#[derive(Clone, Debug)]
enum Step {
    Set(Range<u64>, u8),
    Clear(Range<u64>),
    /// Adds to every value; pages without one get this one.
    Add(Range<u64>, u8),
}

fn any_range() -> impl Strategy<Value = Range<u64>> {
    (0..PAGES, 0..PAGES).prop_map(|(a, b)| a.min(b)..a.max(b))
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (any_range(), 0..3_u8).prop_map(|(range, value)| Step::Set(range, value)),
        any_range().prop_map(Step::Clear),
        (any_range(), 0..3_u8).prop_map(|(range, value)| Step::Add(range, value)),
    ]
}

fn apply(step: Step, pages: &mut Pages<u8>, plain: &mut BTreeMap<u64, u8>) {
    match step {
        Step::Set(range, value) => {
            pages.set(range.clone(), value);
            plain.extend(range.map(|page| (page, value)));
        }
        Step::Clear(range) => {
            pages.clear(range.clone());
            plain.retain(|page, _| !range.contains(page));
        }
        Step::Add(range, by) => {
            pages.update(range.clone(), |old| Some(old.unwrap_or(0).wrapping_add(by)));
            for page in range {
                let value = plain.entry(page).or_insert(0);
                *value = value.wrapping_add(by);
            }
        }
    }
}

/// Maximal runs of equal values, found page by page.
fn runs(plain: &BTreeMap<u64, u8>, window: Range<u64>) -> Vec<(Range<u64>, u8)> {
    let mut runs: Vec<(Range<u64>, u8)> = Vec::new();
    for (&page, &value) in plain.range(window) {
        match runs.last_mut() {
            Some((last, same)) if last.end == page && *same == value => last.end += 1,
            _ => runs.push((page..page + 1, value)),
        }
    }
    runs
}

proptest! {
    #[test]
    fn pages_behave_like_a_plain_map(
        steps in proptest::collection::vec(any_step(), 1..20),
        window in any_range(),
    ) {
        let (mut pages, mut plain) = (Pages::new(), BTreeMap::new());
        for step in steps {
            apply(step, &mut pages, &mut plain);
        }
        for page in 0..PAGES {
            prop_assert_eq!(pages.get(page), plain.get(&page).copied());
        }
        prop_assert_eq!(pages.count(), plain.len() as u64);
        let expected = runs(&plain, window.clone());
        prop_assert_eq!(pages.first(window.clone()), expected.first().map(|(run, _)| run.start));
        prop_assert_eq!(pages.runs(window.clone()), expected.clone());
        prop_assert_eq!(pages.within(window.clone()).runs(0..PAGES), expected);
        let ones: BTreeMap<_, _> = plain.into_iter().filter(|(_, value)| *value == 1).collect();
        let expected: Vec<_> = runs(&ones, window.clone()).into_iter().map(|(run, _)| run).collect();
        prop_assert_eq!(pages.ranges(window, |value| value == 1), expected);
    }

    #[test]
    fn sets_of_pages_cover_join_and_subtract(
        one in proptest::collection::vec(any_range(), 0..6),
        other in proptest::collection::vec(any_range(), 0..6),
    ) {
        let is_in = |ranges: &[Range<u64>], page| ranges.iter().any(|range| range.contains(&page));
        let sets: [PageSet; 2] = [&one, &other].map(|ranges| ranges.iter().cloned().collect());
        let covers = (0..PAGES).all(|page| is_in(&one, page) || !is_in(&other, page));
        prop_assert_eq!(sets[0].covers(&sets[1]), covers);
        let [mut joined, mut rest] = [sets[0].clone(), sets[0].clone()];
        joined.extend(&sets[1]);
        rest.remove_all(&sets[1]);
        for page in 0..PAGES {
            prop_assert_eq!(joined.contains(page), is_in(&one, page) || is_in(&other, page));
            prop_assert_eq!(rest.contains(page), is_in(&one, page) && !is_in(&other, page));
        }
        let all: Vec<u64> = (0..PAGES).filter(|page| joined.contains(*page)).collect();
        let hull = all.first().map(|first| *first..all[all.len() - 1] + 1);
        prop_assert_eq!(joined.hull(), hull);
        prop_assert!(joined == sets[1].clone() || rest.count() > 0);
    }
}
