//! P7: harvest what is dirty, as maximal runs.

use std::rc::Rc;

use crate::peers::{
    Consumer, Dirt, DirtySet, atomic_bitmap::Atomic, ferry_tracker::Ferry,
    ferry_tracker::FerryAsMarked, roaring::Roaring, words::Words,
};

use super::pattern::Spread;
use super::{Contestant, Figure, Role, Sizes, Target, Unit, timed};

pub(super) fn figure(sizes: Sizes, spread: Spread, tenths: u64) -> Figure {
    let dirt = spread.dirt(sizes.pages(), tenths);
    let (gib, spread) = (sizes.gib, spread.name());
    Figure {
        number: "P7",
        what: format!("harvest {gib} GiB, {} % dirty, {spread}", percent(tenths)),
        unit: Unit::Time,
        target: Target::NotSlower,
        contestants: vec![
            contestant::<Ferry>(Role::Ferry, &dirt),
            contestant::<FerryAsMarked>(Role::Variant, &dirt),
            contestant::<Words>(Role::Plain, &dirt),
            contestant::<Atomic>(Role::Peer, &dirt),
            contestant::<Roaring>(Role::Peer, &dirt),
        ],
    }
}

fn percent(tenths: u64) -> String {
    match (tenths / 10, tenths % 10) {
        (whole, 0) => whole.to_string(),
        (whole, rest) => format!("{whole}.{rest}"),
    }
}

fn contestant<T: DirtySet + 'static>(role: Role, dirt: &Dirt) -> Contestant {
    let mut set = T::new(dirt);
    let dirt = Rc::clone(dirt);
    Contestant::new(role, T::NAME, move || {
        set.dirty(&dirt);
        timed(1, || {
            let mut consumer = Consumer::default();
            set.harvest(&mut consumer);
            consumer.digest()
        })
    })
}
