//! P8: mark pages dirty, of 64 GiB that are clean and have 4 KiB detail; on one thread, and on two at once.
//!
//! With two threads a mark takes as long as each of them was kept by it.

use std::rc::Rc;

use crate::peers::{
    Consumer, Dirt, DirtySet, MarkedSet, Marks, RUN, SharedSet, atomic_bitmap::Atomic,
    ferry_tracker::Ferry, ferry_tracker::FerryWithoutMarker, roaring::Roaring, words::Words,
};

use super::{Contestant, Figure, Role, Round, Sizes, Target, Unit, pattern, threads, timed};

const PAGES: u64 = 64 * Sizes::PAGES_PER_GIB;
/// Single pages that one thread marks in a round.
const SINGLE: usize = 1 << 20;
/// Runs that one thread marks in a round.
const RUNS: usize = 1 << 16;

const PAGE_NANOS: f64 = 12.0;
const RUN_NANOS: f64 = 60.0;

pub(super) fn pages() -> Figure {
    let marked = Rc::new(some_pages(1));
    single(
        "mark one random page of 64 GiB",
        PAGE_NANOS,
        marked,
        Which::Pages,
    )
}

pub(super) fn runs() -> Figure {
    let marked = Rc::new(some_runs(1));
    single(
        "mark a run of 256 pages of 64 GiB",
        RUN_NANOS,
        marked,
        Which::Runs,
    )
}

pub(super) fn pages_by_two() -> Figure {
    let what = "mark one random page, two threads at once";
    double(
        what,
        PAGE_NANOS,
        [some_pages(1), some_pages(2)],
        Which::Pages,
    )
}

pub(super) fn runs_by_two() -> Figure {
    let what = "mark a run of 256 pages, two threads at once";
    double(what, RUN_NANOS, [some_runs(1), some_runs(2)], Which::Runs)
}

#[derive(Clone, Copy)]
enum Which {
    Pages,
    Runs,
}

impl Which {
    fn mark(self, marks: &mut impl Marks, list: &[u32]) {
        match self {
            Self::Pages => list.iter().for_each(|page| marks.mark_page((*page).into())),
            Self::Runs => list
                .iter()
                .for_each(|first| marks.mark_run((*first).into())),
        }
    }
}

fn some_pages(seed: u64) -> Vec<u32> {
    pattern::random_pages(seed, PAGES, SINGLE)
}

/// Runs that start anywhere, not at a word's first page.
fn some_runs(seed: u64) -> Vec<u32> {
    pattern::random_pages(seed, PAGES - RUN, RUNS)
}

fn single(what: &str, nanos: f64, marked: Rc<Vec<u32>>, which: Which) -> Figure {
    let dirt = pattern::clean(PAGES);
    Figure {
        number: "P8",
        what: what.into(),
        unit: Unit::Time,
        target: Target::AtMost(nanos),
        contestants: vec![
            alone::<Ferry>(Role::Ferry, &dirt, &marked, which),
            alone::<FerryWithoutMarker>(Role::Variant, &dirt, &marked, which),
            alone::<Words>(Role::Plain, &dirt, &marked, which),
            alone::<Atomic>(Role::Peer, &dirt, &marked, which),
            alone::<Roaring>(Role::Peer, &dirt, &marked, which),
        ],
    }
}

fn alone<T: MarkedSet + 'static>(
    role: Role,
    dirt: &Dirt,
    marked: &Rc<Vec<u32>>,
    which: Which,
) -> Contestant {
    let mut set = T::new(dirt);
    let marked = Rc::clone(marked);
    let mark = move || {
        let mut round = timed(marked.len() as u64, || {
            which.mark(&mut set.marks(), &marked);
            0
        });
        round.result = harvested(&mut set);
        round
    };
    Contestant::new(role, T::NAME, warmed(mark))
}

/// Two rounds, of which the second counts: the first one brings back into the cache what others took its place.
fn warmed(mut round: impl FnMut() -> Round) -> impl FnMut() -> Round {
    move || {
        round();
        round()
    }
}

fn double(what: &str, nanos: f64, marked: [Vec<u32>; 2], which: Which) -> Figure {
    let dirt = pattern::clean(PAGES);
    let marked = Rc::new(marked);
    Figure {
        number: "P8",
        what: what.into(),
        unit: Unit::Time,
        target: Target::AtMost(nanos),
        contestants: vec![
            together::<Ferry>(Role::Ferry, &dirt, &marked, which),
            together::<FerryWithoutMarker>(Role::Variant, &dirt, &marked, which),
            together::<Words>(Role::Plain, &dirt, &marked, which),
            together::<Atomic>(Role::Peer, &dirt, &marked, which),
        ],
    }
}

fn together<T: SharedSet + 'static>(
    role: Role,
    dirt: &Dirt,
    marked: &Rc<[Vec<u32>; 2]>,
    which: Which,
) -> Contestant {
    let mut set = T::new(dirt);
    let marked = Rc::clone(marked);
    let mark = move || {
        let lists = &*marked;
        let shared = &set;
        let amount = threads::two_threads(|thread| {
            which.mark(&mut shared.shared_marks(), &lists[thread]);
        });
        Round {
            amount,
            operations: marked[0].len() as u64,
            result: harvested(&mut set),
        }
    };
    Contestant::new(role, T::NAME, warmed(mark))
}

/// What was marked; the set is clean after that.
fn harvested<T: DirtySet>(set: &mut T) -> u64 {
    let mut consumer = Consumer::default();
    set.harvest(&mut consumer);
    consumer.digest()
}
