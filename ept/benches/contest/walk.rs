//! P1: add up the addresses of all present 4 KiB entries of 1 GiB.

use std::hint::black_box;

use crate::peers::{
    self, PAGES, PageTable, aarch64::AArch64, ferry_table::Ferry, ferry_table::FerryEntries,
    generic::Generic, multiarch::MultiArch, plain_table::Plain, x86_64::X86,
};

use super::cold::Evict;
use super::{Contestant, Figure, Role, Sizes, Target, Unit, timed};

pub(super) fn warm(_: Sizes) -> Figure {
    figure("warm", None)
}

pub(super) fn cold(sizes: Sizes) -> Figure {
    figure("cold", Some(Evict::new(sizes)))
}

fn figure(temperature: &str, before: Option<Evict>) -> Figure {
    Figure {
        number: "P1",
        what: format!("walk 1 GiB of 4 KiB entries, {temperature}; an entry"),
        unit: Unit::Time,
        target: Target::TimesPlain(1.2),
        contestants: vec![
            contestant::<Ferry>(Role::Ferry, before),
            contestant::<FerryEntries>(Role::Variant, before),
            contestant::<Plain>(Role::Plain, before),
            contestant::<X86>(Role::Peer, before),
            contestant::<MultiArch>(Role::Peer, before),
            contestant::<Generic>(Role::Peer, before),
            contestant::<AArch64>(Role::Peer, before),
        ],
    }
}

/// The caches are emptied before each round, or filled by a walk.
fn contestant<T: PageTable + 'static>(role: Role, before: Option<Evict>) -> Contestant {
    let mut table = T::new();
    table.map();
    assert_eq!(table.sum(), peers::SUM, "{}", T::NAME);
    Contestant::new(role, T::NAME, move || {
        match &before {
            Some(evict) => evict.run(),
            None => _ = black_box(table.sum()),
        }
        timed(PAGES, || table.sum())
    })
}
