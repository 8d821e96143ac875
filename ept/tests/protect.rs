//! Write-protection against a model of pages (S14, S15, S20).

mod common;

use common::model::PageSet;
use common::{SPACE, any_page, any_range, config, gpa, pages, ragged_regions};
use ept::{Fault, GpaRange, Notifier, ProtectError, RegionKind, Source, Tracker};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Protect(GpaRange),
    Unprotect(GpaRange),
    Fault(u64),
    Mark(GpaRange),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any_range(1500).prop_map(Step::Protect),
        any_range(1500).prop_map(Step::Unprotect),
        any_page().prop_map(Step::Fault),
        any_range(1500).prop_map(Step::Mark),
    ]
}

/// Why `range` may not be protected: its first page that is in no region, or in one of a kind that
/// nothing writes to.
fn refusal(range: GpaRange) -> Option<ProtectError> {
    let regions = ragged_regions();
    (range.first_page()..range.end_page()).find_map(|page| {
        let gpa = gpa(page);
        let found = regions.iter().find(|region| region.range.contains(gpa));
        match found.map(|region| region.kind) {
            None => Some(ProtectError::Outside(gpa)),
            Some(RegionKind::Ram | RegionKind::DeviceRam) => None,
            Some(kind) => Some(ProtectError::Kind { gpa, kind }),
        }
    })
}

/// Protects or unprotects `range` in the model; returns the pages that were not so before.
fn model_toggle(protected: &mut PageSet, range: GpaRange, on: Toggle) -> PageSet {
    let mut changed = protected.within(range);
    match on {
        Toggle::On => {
            changed.update(range, |was| was.is_none().then_some(()));
            protected.insert(range);
        }
        Toggle::Off => protected.clear(range),
    }
    changed
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Toggle {
    On,
    Off,
}

proptest! {
    #![proptest_config(config(200))]

    /// S15, S20: protection changes exactly what it should and reports it; what may not be protected
    /// is refused whole; dirtiness is not touched by it.
    #[test]
    fn s15_protection_matches_a_set_of_pages(steps in prop::collection::vec(any_step(), 1..20)) {
        let tracker = Tracker::new(&ragged_regions()).unwrap();
        let notifier = Notifier::new();
        let (mut protected, mut dirty) = (PageSet::new(), PageSet::new());
        for step in steps {
            let (range, on) = match step {
                Step::Protect(range) => (range, Toggle::On),
                Step::Unprotect(range) => (range, Toggle::Off),
                Step::Fault(page) => {
                    let inside = ragged_regions().iter().any(|region| region.range.contains(gpa(page)));
                    let this = pages(page, page + 1);
                    let expected = match (inside, protected.contains(page)) {
                        (false, _) => Fault::Outside,
                        (true, true) => Fault::Released(this),
                        (true, false) => Fault::Open,
                    };
                    protected.clear(this);
                    if inside {
                        dirty.insert(this);
                    }
                    prop_assert_eq!(tracker.fault(gpa(page)), expected);
                    continue;
                }
                Step::Mark(range) => {
                    tracker.mark(range.start(), range.pages() << 12, Source::Monitor);
                    dirty.extend(&common::tracked_pages(&ragged_regions(), range));
                    continue;
                }
            };
            let open = notifier.open(range).unwrap();
            let result = match on {
                Toggle::On => tracker.protect(range, &open),
                Toggle::Off => tracker.unprotect(range, &open),
            };
            if let Some(refused) = refusal(range) {
                prop_assert_eq!(result, Err(refused));
                continue;
            }
            let changed = result.unwrap();
            let expected = model_toggle(&mut protected, range, on);
            prop_assert_eq!(changed.pages, expected.count());
            prop_assert!(changed.entries <= changed.pages);
            prop_assert_eq!(changed.interval, expected.hull());
        }
        for page in (0..2700).chain(SPACE - 1600..SPACE) {
            prop_assert_eq!(tracker.is_protected(gpa(page)), protected.contains(page));
            prop_assert_eq!(tracker.dirty_at(gpa(page)), dirty.contains(page));
        }
    }
}

/// S14: the open range must cover what is changed.
#[test]
fn s14_protect_needs_the_open_range() {
    let tracker = common::ram(1024);
    let open = Notifier::new().open(pages(0, 100)).unwrap();
    assert!(tracker.protect(pages(0, 100), &open).is_ok());
    let refused = tracker.protect(pages(50, 101), &open);
    assert!(matches!(refused, Err(ProtectError::NotOpen(_))));
    assert!(!tracker.is_protected(gpa(100)));
}

/// S15: a huge leaf that is protected whole is one entry.
#[test]
fn s15_a_huge_leaf_is_one_entry() {
    let tracker = common::ram(1 << 20);
    let range = pages(0, 1 << 20);
    let open = Notifier::new().open(range).unwrap();
    let changed = tracker.protect(range, &open).unwrap();
    assert!(changed.entries <= 4, "{changed:?}");
    assert_eq!(changed.pages, 1 << 20);
    assert_eq!(tracker.fault(gpa(5)), Fault::Released(pages(5, 6)));
    assert!(tracker.is_protected(gpa(4)) && tracker.is_protected(gpa(6)));
}
