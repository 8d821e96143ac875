//! Address ranges that a proof uses.
//!
//! Random addresses would rarely hit the same leaf twice. So a proof uses only a few places: two GiB at the lowest, the
//! middle and the highest addresses, and two spans of each higher level that has leaves. In each place it uses a few
//! ranges of 2 MiB, and operations begin and end inside of them as often as at their edges.

use std::ops::Range;

use crate::oracle::Layout;
use crate::oracle::model::{Pages, Shape, pages};
use crate::oracle::proof::PAGE_SHIFT;
use crate::oracle::proof::chance::Chance;

/// Number of pages in 2 MiB and in 1 GiB.
pub(super) const MIB2: u64 = pages(1);
pub(super) const GIB: u64 = pages(2);

/// 2 MiB ranges that are used in each GiB.
const STRETCHES: [u64; 9] = [0, 1, 2, 3, 4, 5, 31, 510, 511];

/// Place that operations use.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Pages of the place.
    pub(super) range: Pages,
    /// GiBs of the place that are used.
    pub(super) gibs: Vec<u64>,
    /// Level of the largest leaves that fit.
    pub(super) level: u32,
}

/// All places of a proof.
pub(super) struct Ground {
    pub(super) shape: Shape,
    /// Page after the last one that can be both mapped and probed.
    pub(super) end: u64,
    pub(super) places: Vec<Place>,
    /// Pages that the machine needs for itself.
    reserved: Vec<u64>,
    /// Host-physical pages of the frames.
    pub(super) frames: Range<u64>,
}

impl Ground {
    pub(super) fn new(shape: Shape, layout: &Layout) -> Self {
        let end = shape.end().min(1 << (layout.gpa_bits - PAGE_SHIFT));
        let frames = layout.frames >> PAGE_SHIFT;
        let two_gib = |base| Place {
            range: base..base + 2 * GIB,
            gibs: vec![0, 1],
            level: 2,
        };
        let mut places: Vec<_> = [0, end / 2 - GIB, end - 2 * GIB].map(two_gib).into();
        // Leaves of this size map everything from host-physical address 0 on, which includes the frames.
        let whole = |level, number| Place {
            range: number * pages(level)..(number + 1) * pages(level),
            gibs: vec![0, frames / GIB, frames / GIB, 511],
            level,
        };
        for level in 3..=shape.largest_leaf {
            places.extend([whole(level, 5), whole(level, 1029)]);
        }
        let reserved = layout.guest_pages.iter().map(|page| page.gpa >> PAGE_SHIFT);
        Self {
            shape,
            end,
            places,
            reserved: reserved.collect(),
            frames: frames..frames + (layout.frames_bytes >> PAGE_SHIFT),
        }
    }

    /// Whether a page lies in the highest GiB.
    pub(super) fn is_high(&self, page: u64) -> bool {
        page >= self.end - GIB
    }

    /// Returns the number of the frame at a host-physical address.
    pub(super) fn frame(&self, hpa: u64) -> Option<usize> {
        let page = hpa >> PAGE_SHIFT;
        let frame = page.checked_sub(self.frames.start)?;
        usize::try_from(frame)
            .ok()
            .filter(|_| page < self.frames.end)
    }

    /// Returns the number of frames.
    pub(super) fn frame_count(&self) -> usize {
        usize::try_from(self.frames.end - self.frames.start).unwrap_or(0)
    }

    /// Pages that the machine needs for itself.
    pub(super) fn reserved(&self) -> &[u64] {
        &self.reserved
    }

    pub(super) fn is_reserved(&self, page: u64) -> bool {
        self.reserved.contains(&page)
    }

    /// Whether the machine needs one of the pages for itself.
    pub(super) fn meets_reserved(&self, range: &Pages) -> bool {
        self.reserved.iter().any(|page| range.contains(page))
    }

    /// Returns the pages of a leaf of this level in a place, and the host-physical page to map it to, so that the leaf
    /// contains the frames.
    pub(super) fn span(&self, chance: &mut Chance, place: &Place, level: u32) -> (Pages, u64) {
        if level > 2 {
            return (place.range.clone(), 0);
        }
        let start = place.range.start + chance.pick(&place.gibs) * GIB;
        (start..start + GIB, self.frames.start / GIB * GIB)
    }

    /// Returns the place that contains the pages.
    pub(super) fn place_of(&self, range: &Pages) -> Pages {
        let has_it = |place: &&Place| place.range.contains(&range.start);
        let place = self.places.iter().find(has_it);
        place.map_or(range.clone(), |place| place.range.clone())
    }

    /// Returns random pages for an operation.
    pub(super) fn range(&self, chance: &mut Chance) -> Pages {
        let place = chance.pick(&self.places);
        match chance.below(16) {
            0 => place.range.clone(),
            1 => self.span(chance, place, 2).0,
            _ => small_range(chance, place),
        }
    }
}

/// Returns a number below `length`, often the first or the last.
pub(super) fn within(chance: &mut Chance, length: u64) -> u64 {
    match chance.below(4) {
        0 => 0,
        1 => length - 1,
        _ => chance.below(length),
    }
}

/// Returns a random page in the used part of a place.
pub(super) fn page_in(chance: &mut Chance, place: &Place) -> u64 {
    let gib = chance.pick(&place.gibs) * GIB;
    let stretch = chance.pick(&STRETCHES) * MIB2;
    place.range.start + gib + stretch + within(chance, MIB2)
}

/// Returns random pages in the used part of a place, at most 24 MiB.
pub(super) fn small_range(chance: &mut Chance, place: &Place) -> Pages {
    let start = page_in(chance, place);
    let range = match chance.below(8) {
        0..=2 => start..start + 1 + chance.below(24),
        3 | 4 => start..start + 1 + chance.below(1500),
        _ => {
            let start = start / MIB2 * MIB2;
            start..start + MIB2 * (1 + chance.below(12))
        }
    };
    range.start..range.end.min(place.range.end)
}

/// Whether mapping the range with 4 KiB leaves takes more tables than there are.
pub(super) const fn is_large(range: &Pages) -> bool {
    range.end - range.start >= GIB
}
