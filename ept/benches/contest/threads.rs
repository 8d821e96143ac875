//! P5: two threads on disjoint ranges against one on both.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use crate::peers::{Halves, PAGES, ferry_table::Ferry, plain_table::Plain};

use super::{Contestant, Figure, Role, Round, Sizes, Target, Unit, timed};

pub(super) fn figure(_: Sizes) -> Figure {
    Figure {
        number: "P5",
        what: "write-protect and release 1 GiB on two threads; an entry".into(),
        unit: Unit::Time,
        target: Target::Speedup(1.8),
        contestants: vec![
            contestant::<Ferry>(Role::Ferry, together),
            contestant::<Ferry>(Role::Alone, alone),
            contestant::<Plain>(Role::Plain, together),
            contestant::<Plain>(Role::PlainAlone, alone),
        ],
    }
}

fn contestant<T: Halves + 'static>(role: Role, toggle: fn(&T) -> Round) -> Contestant {
    let mut table = T::new();
    table.map();
    Contestant::new(role, T::NAME, move || {
        let mut round = toggle(&table);
        round.result = table.writable();
        round
    })
}

fn alone<T: Halves>(table: &T) -> Round {
    timed(2 * PAGES, || {
        table.toggle(0);
        table.toggle(1);
        0
    })
}

fn together<T: Halves>(table: &T) -> Round {
    Round {
        amount: two_threads(|half| table.toggle(half)),
        operations: 2 * PAGES,
        result: 0,
    }
}

/// Nanoseconds from when both threads were there until the last was done. Starting threads is not measured.
pub(super) fn two_threads(work: impl Fn(usize) + Sync) -> f64 {
    let barrier = Barrier::new(2);
    let one = |half: usize| {
        barrier.wait();
        let start = Instant::now();
        work(half);
        (start, Instant::now())
    };
    let (first, second) = thread::scope(|scope| {
        let first = scope.spawn(|| one(0));
        let second = one(1);
        (first.join().expect("the other thread panicked"), second)
    });
    let end = first.1.max(second.1);
    end.duration_since(first.0.min(second.0)).as_secs_f64() * 1e9
}
