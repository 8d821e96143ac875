//! Where a proof is played.
//!
//! Random addresses would never meet. So all happens in a few places: two GiB at the lowest, the middle and the
//! highest addresses, and two spans of each level above that has leaves. In each of them a few stretches of 2 MiB
//! are used, and ranges begin and end in the middle of them as often as at their edges.

use std::ops::Range;

use crate::oracle::Layout;
use crate::oracle::model::{Pages, Shape, pages};
use crate::oracle::proof::PAGE_SHIFT;
use crate::oracle::proof::chance::Chance;

/// Pages of 2 MiB, and of 1 GiB.
pub(super) const MIB2: u64 = pages(1);
pub(super) const GIB: u64 = pages(2);

/// The stretches of 2 MiB that are used in a GiB.
const STRETCHES: [u64; 9] = [0, 1, 2, 3, 4, 5, 31, 510, 511];

/// A place, which takes what is mapped there with the largest leaves.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// All of it.
    pub(super) range: Pages,
    /// The GiB of it that are used.
    pub(super) gibs: Vec<u64>,
    /// The level of the largest leaves that fit.
    pub(super) level: u32,
}

/// Where everything happens.
pub(super) struct Ground {
    pub(super) shape: Shape,
    /// The page after the last that can be both mapped and probed.
    pub(super) end: u64,
    pub(super) places: Vec<Place>,
    /// The pages that the machine needs for itself.
    reserved: Vec<u64>,
    /// Host-physical pages to map to.
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
        // Such leaves map everything from address 0 on, the frames among it.
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

    /// Whether an access to a page would be one of the highest.
    pub(super) fn is_high(&self, page: u64) -> bool {
        page >= self.end - GIB
    }

    /// Where a host-physical address is among the frames, counted in pages.
    pub(super) fn frame(&self, hpa: u64) -> Option<usize> {
        let page = hpa >> PAGE_SHIFT;
        let frame = page.checked_sub(self.frames.start)?;
        usize::try_from(frame)
            .ok()
            .filter(|_| page < self.frames.end)
    }

    /// How many frames there are.
    pub(super) fn frame_count(&self) -> usize {
        usize::try_from(self.frames.end - self.frames.start).unwrap_or(0)
    }

    /// The pages that the machine needs for itself.
    pub(super) fn reserved(&self) -> &[u64] {
        &self.reserved
    }

    pub(super) fn is_reserved(&self, page: u64) -> bool {
        self.reserved.contains(&page)
    }

    /// Whether one of the pages is the machine's own.
    pub(super) fn meets_reserved(&self, range: &Pages) -> bool {
        self.reserved.iter().any(|page| range.contains(page))
    }

    /// What a leaf of this level maps in a place, and the host-physical page that it leads to: such that the
    /// frames are in it.
    pub(super) fn span(&self, chance: &mut Chance, place: &Place, level: u32) -> (Pages, u64) {
        if level > 2 {
            return (place.range.clone(), 0);
        }
        let start = place.range.start + chance.pick(&place.gibs) * GIB;
        (start..start + GIB, self.frames.start / GIB * GIB)
    }

    /// The whole place that pages are in.
    pub(super) fn place_of(&self, range: &Pages) -> Pages {
        let has_it = |place: &&Place| place.range.contains(&range.start);
        let place = self.places.iter().find(has_it);
        place.map_or(range.clone(), |place| place.range.clone())
    }

    /// Pages to change.
    pub(super) fn range(&self, chance: &mut Chance) -> Pages {
        let place = chance.pick(&self.places);
        match chance.below(16) {
            0 => place.range.clone(),
            1 => self.span(chance, place, 2).0,
            _ => small_range(chance, place),
        }
    }
}

/// A number below `length`, often the first or the last.
pub(super) fn within(chance: &mut Chance, length: u64) -> u64 {
    match chance.below(4) {
        0 => 0,
        1 => length - 1,
        _ => chance.below(length),
    }
}

/// A page of those that are used in a place.
pub(super) fn page_in(chance: &mut Chance, place: &Place) -> u64 {
    let gib = chance.pick(&place.gibs) * GIB;
    let stretch = chance.pick(&STRETCHES) * MIB2;
    place.range.start + gib + stretch + within(chance, MIB2)
}

/// Some pages there, at most 24 MiB.
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

/// Whether leaves of 4 KiB for all of it take more tables than there are.
pub(super) const fn is_large(range: &Pages) -> bool {
    range.end - range.start >= GIB
}
