//! P4: map 1 GiB in 4 KiB entries, tables and all, and unmap it.

use crate::peers::{
    PAGES, PageTable, Unmaps, aarch64::AArch64, ferry_table::Ferry, generic::Generic,
    multiarch::MultiArch, plain_table::Plain, x86_64::X86,
};

use super::{Contestant, Figure, Role, Sizes, Target, Unit, timed};

pub(super) fn map(_: Sizes) -> Figure {
    figure(
        "map",
        vec![
            mapping::<Ferry>(Role::Ferry),
            mapping::<Plain>(Role::Plain),
            mapping::<X86>(Role::Peer),
            mapping::<MultiArch>(Role::Peer),
            mapping::<Generic>(Role::Peer),
            mapping::<AArch64>(Role::Peer),
        ],
    )
}

pub(super) fn unmap(_: Sizes) -> Figure {
    figure(
        "unmap",
        vec![
            unmapping::<Ferry>(Role::Ferry),
            unmapping::<Plain>(Role::Plain),
            unmapping::<X86>(Role::Peer),
            unmapping::<MultiArch>(Role::Peer),
            unmapping::<Generic>(Role::Peer),
            unmapping::<AArch64>(Role::Peer),
        ],
    )
}

fn figure(what: &str, contestants: Vec<Contestant>) -> Figure {
    Figure {
        number: "P4",
        what: format!("{what} 262,144 pages; a page"),
        unit: Unit::Time,
        target: Target::PeerOrPlain {
            peer: 2.0,
            plain: 1.3,
        },
        contestants,
    }
}

fn mapping<T: Unmaps + 'static>(role: Role) -> Contestant {
    let mut table = T::new();
    table.map();
    Contestant::new(role, T::NAME, move || {
        table.unmap();
        let mut round = timed(PAGES, || {
            table.map();
            0
        });
        round.result = table.sum();
        round
    })
}

fn unmapping<T: Unmaps + 'static>(role: Role) -> Contestant {
    let mut table: T = PageTable::new();
    Contestant::new(role, T::NAME, move || {
        table.map();
        let mut round = timed(PAGES, || {
            table.unmap();
            0
        });
        round.result = table.sum();
        round
    })
}
