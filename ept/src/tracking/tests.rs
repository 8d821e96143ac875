//! Tests that need access to the tree: marks that arrive while pages are taken, and markers that stop half-way.

use crate::sync::atomic::Ordering;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::GpaRange;
use crate::format::Tables;
use crate::region::{Region, RegionKind, Regions};
use crate::tracking::way::Way;
use crate::tracking::{Every, PLANE_WORDS, Plane, Sink, Taken, Tree};

const GIB: u64 = 1 << 18;

/// Creates a clean tree over one region from page 0.
fn tree(pages: u64) -> Tree<1> {
    let region = Region {
        range: GpaRange::of(0, pages),
        kind: RegionKind::Ram,
    };
    let regions = Arc::new(Regions::new(&[region]).unwrap());
    Tree::try_new(regions, usize::MAX).unwrap()
}

/// Marks one page, with or without 4 KiB detail.
fn mark(tree: &Tree<1>, page: u64) {
    tree.mark(GpaRange::of(page, page + 1), &Every);
}

/// A sink that records the pages it receives, and marks a page when it receives the first ones.
struct Marker<'t> {
    tree: &'t Tree<1>,
    page: Option<u64>,
    taken: Vec<GpaRange>,
}

impl<'t> Marker<'t> {
    fn new(tree: &'t Tree<1>, page: Option<u64>) -> Self {
        Self {
            tree,
            page,
            taken: Vec::new(),
        }
    }

    fn mark(&mut self) {
        if let Some(page) = self.page.take() {
            mark(self.tree, page);
        }
    }
}

impl Sink for Marker<'_> {
    fn make_room(&mut self, _: usize) -> bool {
        true
    }

    fn range(&mut self, part: GpaRange) {
        self.taken.push(part);
        self.mark();
    }

    fn words(&mut self, base: u64, _: &[u64; PLANE_WORDS], _: u64) {
        self.taken.push(GpaRange::of(base, base + 512));
        self.mark();
    }
}

/// S16: if `take` resumes in the middle because there was no table for a split, it hides no mark that arrives meanwhile in
/// the part before.
#[test]
fn s16_a_taking_without_memory_hides_no_mark() {
    let range = GpaRange::of(0, 1024 * GIB);
    let tree = tree(range.pages());
    // One page with 4 KiB detail, and a whole GiB in the same table of GiB entries.
    mark(&tree, 5);
    let whole = GpaRange::of(2 * GIB, 3 * GIB);
    tree.mark(whole, &Every);
    while tree.uppers.allocate().is_ok() {}

    let mut sink = Marker::new(&tree, Some(5));
    assert_eq!(tree.take(range, 100, &mut sink), Taken::All);
    assert_eq!(sink.taken, [GpaRange::of(0, 512), whole]);

    sink.taken.clear();
    assert_eq!(tree.take(range, 100, &mut sink), Taken::All);
    assert_eq!(sink.taken, [GpaRange::of(0, 512)]);
    assert!(tree.is_clean());
}

/// S16: a marker sets the summary bits of all levels, also above one that it finds set: the marker that set that one may
/// not have reached the root.
#[test]
fn s16_a_marker_does_not_rely_on_one_that_stands_still() {
    let tree = tree(1024 * GIB);
    let mut sink = Marker::new(&tree, None);
    mark(&tree, 5);
    assert_eq!(tree.take(GpaRange::ALL, u64::MAX, &mut sink), Taken::All);
    assert!(tree.is_clean());

    let way = Way::<1, 3>::down(&tree, 6).unwrap();
    let word = &way.leaf().plane(Plane::Dirty)[0];
    word.fetch_or(1 << 6, Ordering::SeqCst);
    let (lowest, index) = way.up().next().unwrap();
    lowest.set_summary(index);

    sink.taken.clear();
    assert_eq!(tree.mark_page(7), Some(true));
    assert_eq!(tree.take(GpaRange::ALL, u64::MAX, &mut sink), Taken::All);
    assert_eq!(sink.taken, [GpaRange::of(0, 512)]);
}

/// S16: the same if the other marker has marked a whole entry and set no summary bit yet.
#[test]
fn s16_a_dirty_entry_is_told_by_who_finds_it() {
    let tree = tree(1024);
    tree.root().as_ref()[1].store(Plane::Dirty.flag(), Ordering::SeqCst);
    mark(&tree, 600);
    let mut sink = Marker::new(&tree, None);
    assert_eq!(tree.take(GpaRange::ALL, u64::MAX, &mut sink), Taken::All);
    assert_eq!(sink.taken, [GpaRange::of(512, 1024)]);
}
