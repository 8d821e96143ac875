//! Every sentence of the 2019 thread on `apply_to_pfn_range`, as a test.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ept::apply::{
    AllocatingError, ApplyError, Existing, Missing, apply_to_page_range, apply_to_pfn_range,
    apply_to_pfn_range_allocating,
};
use ept::format::{Entry, MemoryType, Npt, Permissions};
use ept::stage2::{Attributes, Flush, Stage2};
use ept::{Gpa, GpaRange, Hpa, Level, Notifier, Subscriber, Unresponsive};

const BASE: Hpa = Hpa(0x100_0000);

fn words(tables: usize) -> Vec<AtomicU64> {
    (0..tables * 512).map(|_| AtomicU64::new(0)).collect()
}

fn table(words: &[AtomicU64]) -> Stage2<'_, Npt> {
    Stage2::new(Npt::FourLevels, words, BASE).unwrap()
}

fn pages(first: u64, count: u64) -> GpaRange {
    GpaRange::from_pages(first, count).unwrap()
}

fn map(stage2: &Stage2<'_, Npt>, range: GpaRange, largest: Level) {
    let attributes = Attributes {
        permissions: Permissions::ALL,
        memory: MemoryType::WriteBack,
        largest,
    };
    let hpa = Hpa(range.start().0);
    stage2.map(range, hpa, attributes).unwrap();
}

/// The hardware has forgotten what it had of the range.
fn done<E>((flush, result): (Flush<'_, '_, Npt>, Result<(), E>)) -> Result<(), E> {
    flush.done();
    result
}

/// Counts its pages, and never says no.
fn count(counter: &mut Vec<u64>) -> impl FnMut(&AtomicU64, Gpa) -> Result<(), &'static str> + '_ {
    |_, gpa| {
        counter.push(gpa.0 >> 12);
        Ok(())
    }
}

/// "Allocating missing parts of the page table becomes optional, which means that the function can be guaranteed
/// not to error if allocation is disabled."
#[test]
fn without_allocation_nothing_is_filled_in_and_nothing_fails_for_memory() {
    // The root alone: there is not one table to be had.
    let words = words(1);
    let stage2 = table(&words);
    let open = Notifier::new().open(GpaRange::ALL).unwrap();
    let mut seen = Vec::new();
    let range = pages(5, 1 << 20);
    done(apply_to_pfn_range(
        &stage2,
        range,
        &open,
        Existing::Refuse,
        count(&mut seen),
    ))
    .unwrap();
    assert!(seen.is_empty(), "non-present parts are skipped");
    let exhausted = done(apply_to_page_range(&stage2, range, &open, count(&mut seen))).unwrap_err();
    let AllocatingError::Exhausted(exhausted) = exhausted else {
        panic!("{exhausted:?}")
    };
    assert_eq!(exhausted.reached, Gpa(5 << 12), "it says how far it got");
}

/// "If alloc is set to 1, the function will fill in the page table as necessary. Otherwise it will skip
/// non-present parts."
#[test]
fn with_allocation_every_entry_is_visited() {
    let words = words(8);
    let stage2 = table(&words);
    let open = Notifier::new().open(GpaRange::ALL).unwrap();
    let mut seen = Vec::new();
    done(apply_to_page_range(
        &stage2,
        pages(510, 5),
        &open,
        count(&mut seen),
    ))
    .unwrap();
    assert_eq!(seen, [510, 511, 512, 513, 514]);
    // The tables are there now, though nothing is mapped in them.
    seen.clear();
    let range = pages(0, 2048);
    done(apply_to_pfn_range(
        &stage2,
        range,
        &open,
        Existing::Refuse,
        count(&mut seen),
    ))
    .unwrap();
    assert_eq!(seen, (0..1024).collect::<Vec<_>>());
}

/// `err = ptefn(…); if (err) break;`
#[test]
fn the_first_error_ends_it() {
    let words = words(8);
    let stage2 = table(&words);
    let open = Notifier::new().open(GpaRange::ALL).unwrap();
    let mut visited = 0;
    let error = done(apply_to_page_range(
        &stage2,
        pages(500, 100),
        &open,
        |_, gpa| {
            visited += 1;
            if gpa == Gpa(520 << 12) {
                return Err("enough");
            }
            Ok(())
        },
    ))
    .unwrap_err();
    let at = Gpa(520 << 12);
    let expected = ApplyError::Callback {
        at,
        error: "enough",
    };
    assert_eq!(error, AllocatingError::Apply(expected));
    assert_eq!(visited, 21);
}

/// "The caller must ensure that the range does not contain huge pages": here it chooses.
#[test]
fn huge_leaves_are_refused_skipped_or_split() {
    let words = words(8);
    let stage2 = table(&words);
    map(&stage2, pages(512, 512), Level::MIB2);
    map(&stage2, pages(1024, 1), Level::PAGE);
    let open = Notifier::new().open(GpaRange::ALL).unwrap();
    let range = pages(600, 500);
    let mut seen = Vec::new();
    let refused = done(apply_to_pfn_range(
        &stage2,
        range,
        &open,
        Existing::Refuse,
        count(&mut seen),
    ));
    let at = Gpa(600 << 12);
    assert_eq!(refused, Err(ApplyError::HugeLeaf { at }));
    let refused = done(apply_to_page_range(&stage2, range, &open, count(&mut seen)));
    let expected = AllocatingError::Apply(ApplyError::HugeLeaf { at });
    assert_eq!(refused, Err(expected));
    assert!(seen.is_empty());

    done(apply_to_pfn_range(
        &stage2,
        range,
        &open,
        Existing::Skip,
        count(&mut seen),
    ))
    .unwrap();
    assert_eq!(seen, (1024..1100).collect::<Vec<_>>());
    seen.clear();
    let split = Missing::Split;
    let (flush, result) =
        apply_to_pfn_range_allocating(&stage2, range, &open, split, count(&mut seen));
    result.unwrap();
    assert_eq!(
        (flush.tally().splits, flush.interval()),
        (1, Some(pages(512, 512)))
    );
    flush.done();
    assert_eq!(seen, (600..1100).collect::<Vec<_>>());
    let (level, entry) = stage2.lookup(512);
    let Entry::Leaf(leaf) = entry else {
        panic!("{entry:?}")
    };
    assert_eq!((level, leaf.hpa), (Level::PAGE, Hpa(512 << 12)));
}

/// What the function changed is to be flushed, and nothing else.
#[test]
fn what_the_function_changed_is_to_be_flushed() {
    let words = words(8);
    let stage2 = table(&words);
    map(&stage2, pages(100, 50), Level::PAGE);
    let open = Notifier::new().open(GpaRange::ALL).unwrap();
    let (flush, result) = apply_to_page_range(&stage2, pages(90, 60), &open, |entry, gpa| {
        // 95 was absent, 120 and 130 were there.
        if [95, 120, 130].contains(&(gpa.0 >> 12)) {
            entry.fetch_xor(1 << 9, Ordering::SeqCst);
        }
        Ok::<(), ()>(())
    });
    result.unwrap();
    assert_eq!(
        (flush.interval(), flush.tally().entries),
        (Some(pages(120, 11)), 2)
    );
    flush.done();
}

/// "you must call mmu notifier range": an argument proves it.
#[test]
fn nothing_is_called_outside_of_the_open_range() {
    let words = words(8);
    let stage2 = table(&words);
    let open = Notifier::new().open(pages(0, 10)).unwrap();
    let mut seen = Vec::new();
    let error = done(apply_to_page_range(
        &stage2,
        pages(9, 2),
        &open,
        count(&mut seen),
    ))
    .unwrap_err();
    assert!(matches!(
        error,
        AllocatingError::Apply(ApplyError::NotOpen(_))
    ));
    let beyond = pages(1 << 36, 1);
    let all = Notifier::new().open(GpaRange::ALL).unwrap();
    let error = done(apply_to_page_range(&stage2, beyond, &all, count(&mut seen))).unwrap_err();
    assert!(matches!(
        error,
        AllocatingError::Apply(ApplyError::Beyond { .. })
    ));
    assert!(seen.is_empty());
}

/// Counts what it is told.
#[derive(Default)]
struct Told {
    starts: AtomicU32,
    ends: AtomicU32,
}

impl Subscriber for Told {
    fn start(&self, _: GpaRange) {
        self.starts.fetch_add(1, Ordering::SeqCst);
    }

    fn wait(&self, _: GpaRange) -> Result<(), Unresponsive> {
        Ok(())
    }

    fn stopped(&self, _: GpaRange) -> bool {
        true
    }

    fn end(&self, _: GpaRange) {
        self.ends.fetch_add(1, Ordering::SeqCst);
    }
}

/// "if it ends up splitting a pmd, mmu_notifier_invalidate_range is called again, within the first range. Docs
/// aren't really clear whether that's permitted or not. Is it?" Not needed: every translation of the range is the
/// same before and after the split, for whoever reads the table at any moment, and nobody is told twice.
#[test]
fn a_split_inside_an_open_range_notifies_nobody_again() {
    let words = words(8);
    let stage2 = table(&words);
    map(&stage2, pages(512, 512), Level::MIB2);
    let notifier = Notifier::new();
    let told = Arc::new(Told::default());
    let _subscription = notifier.subscribe(Arc::clone(&told) as _).unwrap();
    let translation = |page: u64| match stage2.lookup(page) {
        (level, Entry::Leaf(leaf)) => Some((
            leaf.hpa.0 + ((page % level.pages()) << 12),
            leaf.permissions,
        )),
        _ => None,
    };
    let before: Vec<_> = (512..1024).map(translation).collect();
    let open = notifier.open(pages(512, 512)).unwrap();
    let mut calls = 0;
    done(apply_to_pfn_range_allocating(
        &stage2,
        pages(700, 1),
        &open,
        Missing::Split,
        |_, _| -> Result<(), ()> {
            calls += 1;
            let now: Vec<_> = (512..1024).map(translation).collect();
            assert_eq!(now, before, "in the middle of it, too");
            Ok(())
        },
    ))
    .unwrap();
    assert_eq!(calls, 1);
    assert_eq!(told.starts.load(Ordering::SeqCst), 1);
    // A second range inside the first is permitted all the same.
    drop(notifier.open(pages(700, 1)).unwrap());
    drop(open);
    assert_eq!(told.starts.load(Ordering::SeqCst), 2);
    assert_eq!(told.ends.load(Ordering::SeqCst), 2);
}
