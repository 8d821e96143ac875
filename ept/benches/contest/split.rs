//! P3: make 512 leaves of 4 KiB of one of 2 MiB.

use crate::peers::{
    BLOCKS, Splits, aarch64::AArch64, ferry_table::Ferry, generic::Generic, multiarch::MultiArch,
    plain_table::Plain, x86_64::X86,
};

use super::{Contestant, Figure, Role, Sizes, Target, Unit, timed};

pub(super) fn figure(_: Sizes) -> Figure {
    Figure {
        number: "P3",
        what: "split 2 MiB with a reserved table".into(),
        unit: Unit::Time,
        target: Target::AtMost(300.0),
        contestants: vec![
            contestant::<Ferry>(Role::Ferry),
            contestant::<Plain>(Role::Plain),
            contestant::<Generic>(Role::Peer),
            contestant::<AArch64>(Role::Peer),
            contestant::<X86>(Role::Peer),
            contestant::<MultiArch>(Role::Peer),
        ],
    }
}

fn contestant<T: Splits + 'static>(role: Role) -> Contestant {
    let mut table = T::new();
    Contestant::new(role, T::NAME, move || {
        table.fill();
        let mut round = timed(BLOCKS, || {
            for block in 0..BLOCKS {
                table.split(block);
            }
            0
        });
        round.result = table.sum();
        round
    })
}
