//! P9: bytes of a tracker for each 2 MiB of memory. Nothing is timed.

use crate::peers::{
    DirtySet, atomic_bitmap::Atomic, ferry_tracker::Ferry, ferry_tracker::FerryAsMarked,
    roaring::Roaring, words::Words,
};

use super::pattern::{self, Spread};
use super::{Contestant, Figure, Role, Round, Sizes, Target, Unit};

/// An entry a page, as in a table of hardware's.
const TABLE: f64 = 8.0 * 512.0;
/// Half of all pages.
const HALF: u64 = 500;

/// Half of the pages are dirty, so that there is detail everywhere.
pub(super) fn in_detail(sizes: Sizes) -> Figure {
    let dirt = Spread::Uniform.dirt(sizes.pages(), HALF);
    let mut ferry = Ferry::new(&dirt);
    ferry.dirty(&dirt);
    let mut rolled_back = FerryAsMarked::new(&dirt);
    rolled_back.dirty(&dirt);
    rolled_back.roll_back();
    let mut roaring = Roaring::new(&dirt);
    roaring.dirty(&dirt);
    figure(
        sizes,
        "4 KiB detail",
        Target::AtMost(160.0),
        [
            (Role::Ferry, Ferry::NAME, ferry.bytes()),
            (
                Role::Variant,
                "ferry, all pending for a consumer too",
                rolled_back.bytes(),
            ),
            (Role::Plain, Words::NAME, Words::new(&dirt).bytes()),
            (Role::Peer, Atomic::NAME, Atomic::new(&dirt).bytes()),
            (Role::Peer, "RoaringBitmap, serialized", roaring.bytes()),
        ],
    )
}

/// All is dirty, as one range, and no 2 MiB was ever split.
pub(super) fn undivided(sizes: Sizes) -> Figure {
    let dirt = Spread::Clustered.dirt(sizes.pages(), 1000);
    let mut ferry = FerryAsMarked::new(&pattern::clean(sizes.pages()));
    ferry.dirty(&dirt);
    let mut roaring = Roaring::new(&dirt);
    roaring.dirty(&dirt);
    figure(
        sizes,
        "nothing split",
        Target::AtMost(1.0),
        [
            (Role::Ferry, "ferry", ferry.bytes()),
            (Role::Plain, Words::NAME, Words::new(&dirt).bytes()),
            (Role::Peer, Atomic::NAME, Atomic::new(&dirt).bytes()),
            (Role::Peer, "RoaringBitmap, serialized", roaring.bytes()),
        ],
    )
}

fn figure<const N: usize>(
    sizes: Sizes,
    what: &str,
    target: Target,
    bytes: [(Role, &'static str, usize); N],
) -> Figure {
    let blocks = sizes.pages() / 512;
    let held = bytes.map(|(role, name, bytes)| fixed(role, name, bytes as f64, blocks));
    let table = fixed(Role::Peer, "a table", TABLE, 1);
    Figure {
        number: "P9",
        what: format!("tracker's memory of {} GiB for 2 MiB, {what}", sizes.gib),
        unit: Unit::Bytes,
        target,
        contestants: held.into_iter().chain([table]).collect(),
    }
}

fn fixed(role: Role, name: &'static str, amount: f64, operations: u64) -> Contestant {
    Contestant::new(role, name, move || Round {
        amount,
        operations,
        result: 0,
    })
}
