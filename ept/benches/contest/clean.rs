//! P6: harvest a clean map.

use crate::peers::{
    Consumer, Dirt, DirtySet, atomic_bitmap::Atomic, ferry_tracker::Ferry, roaring::Roaring,
    words::Words,
};

use super::{Contestant, Figure, Role, Sizes, Target, Unit, pattern, timed};

/// A round takes about this long where a harvest is short.
const ROUND_NANOS: f64 = 1e6;
const MOST_TIMES: u64 = 1 << 14;

/// Of a map of `gib`, in `nanos`.
pub(super) fn figure(sizes: Sizes, gib: u64, nanos: f64) -> Figure {
    let gib = if sizes.quick { gib / 16 } else { gib };
    let dirt = pattern::clean(gib * Sizes::PAGES_PER_GIB);
    Figure {
        number: "P6",
        what: format!("harvest a clean map of {gib} GiB"),
        unit: Unit::Time,
        target: Target::AtMost(nanos),
        contestants: vec![
            contestant::<Ferry>(Role::Ferry, &dirt),
            contestant::<Words>(Role::Plain, &dirt),
            contestant::<Atomic>(Role::Peer, &dirt),
            contestant::<Roaring>(Role::Peer, &dirt),
        ],
    }
}

fn contestant<T: DirtySet + 'static>(role: Role, dirt: &Dirt) -> Contestant {
    let mut set = T::new(dirt);
    let mut harvest = move || {
        let mut consumer = Consumer::default();
        set.harvest(&mut consumer);
        consumer.digest()
    };
    harvest();
    let once = timed(1, &mut harvest).amount;
    let mut times = 1;
    while once * (times as f64) < ROUND_NANOS && times < MOST_TIMES {
        times *= 2;
    }
    Contestant::new(role, T::NAME, move || {
        timed(times, || (0..times).fold(0, |all, _| all | harvest()))
    })
}
