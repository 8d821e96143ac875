//! P2: take the right to write from all 4 KiB entries of 1 GiB, and give it back.

use crate::peers::{
    PAGES, Protects, aarch64::AArch64, aarch64::AArch64Active, ferry_table::Ferry,
    ferry_table::FerryDetached, generic::Generic, multiarch::MultiArch, plain_table::Plain,
    plain_table::PlainDetached, x86_64::X86,
};

use super::{Contestant, Figure, Role, Round, Sizes, Target, Unit, timed};

/// Entries that hardware may be writing to: each change is one atomic read-modify-write.
pub(super) fn live(_: Sizes) -> Figure {
    figure(
        "live",
        vec![
            contestant::<Ferry>(Role::Ferry),
            contestant::<Plain>(Role::Plain),
            contestant::<AArch64Active>(Role::Peer),
        ],
    )
}

/// Entries that nobody else sees: plain loads and stores do.
pub(super) fn detached(_: Sizes) -> Figure {
    figure(
        "detached",
        vec![
            contestant::<FerryDetached>(Role::Ferry),
            contestant::<PlainDetached>(Role::Plain),
            contestant::<X86>(Role::Peer),
            contestant::<MultiArch>(Role::Peer),
            contestant::<Generic>(Role::Peer),
            contestant::<AArch64>(Role::Peer),
        ],
    )
}

fn figure(kind: &str, contestants: Vec<Contestant>) -> Figure {
    Figure {
        number: "P2",
        what: format!("write-protect and release 262,144 entries, {kind}; an entry"),
        unit: Unit::Time,
        target: Target::TimesPlain(1.3),
        contestants,
    }
}

fn contestant<T: Protects + 'static>(role: Role) -> Contestant {
    let mut table = T::new();
    table.map();
    Contestant::new(role, T::NAME, move || protect_and_release(&mut table))
}

fn protect_and_release<T: Protects>(table: &mut T) -> Round {
    // In the cache, as after the last round it was, before the others had theirs.
    assert_eq!(table.writable(), PAGES, "{} is not mapped", T::NAME);
    let protect = timed(PAGES, || {
        table.protect();
        0
    });
    assert_eq!(table.writable(), 0, "{} left entries writable", T::NAME);
    let release = timed(PAGES, || {
        table.release();
        0
    });
    Round {
        amount: protect.amount + release.amount,
        operations: 2 * PAGES,
        result: table.writable(),
    }
}
