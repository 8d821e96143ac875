//! Sets of pages that are marked together.

use crate::addr::GpaRange;
use crate::region::Regions;
use crate::tracking::table::word_mask;

/// A set of pages that are marked together.
pub(crate) trait Bits {
    /// Returns whether any page of `part` is in the set.
    fn any(&self, part: GpaRange) -> bool;
    /// Returns whether every page of `part` is in the set.
    fn all(&self, part: GpaRange) -> bool;
    /// Counts the pages of `part` that are in the set.
    fn count(&self, part: GpaRange) -> u64;
    /// Returns the bits of `mask` whose pages are in the set. Bit `i` is page `start + i`.
    fn word(&self, start: u64, mask: u64) -> u64;
}

/// The set of all pages.
pub(crate) struct Every;

impl Bits for Every {
    #[inline]
    fn any(&self, _: GpaRange) -> bool {
        true
    }

    #[inline]
    fn all(&self, _: GpaRange) -> bool {
        true
    }

    fn count(&self, part: GpaRange) -> u64 {
        part.pages()
    }

    #[inline]
    fn word(&self, _: u64, mask: u64) -> u64 {
        mask
    }
}

/// A set as a bitmap: bit `i` is page `first_page + i`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bitmap<'a> {
    pub(crate) first_page: u64,
    pub(crate) words: &'a [u64],
}

impl Bitmap<'_> {
    /// Returns the 64 bits from page `page` on. `page` need not be aligned. Bits beyond the bitmap are 0.
    fn bits_from(&self, page: u64) -> u64 {
        if page < self.first_page {
            let missing = self.first_page - page;
            return if missing < 64 {
                self.at(0) << missing
            } else {
                0
            };
        }
        let offset = page - self.first_page;
        let (word, shift) = (offset / 64, offset % 64);
        let low = self.at(word) >> shift;
        if shift == 0 {
            low
        } else {
            low | self.at(word + 1) << (64 - shift)
        }
    }

    fn at(&self, word: u64) -> u64 {
        let word = usize::try_from(word).ok();
        word.and_then(|word| self.words.get(word))
            .copied()
            .unwrap_or(0)
    }

    /// Iterates over the words of `part`, each with the mask of the bits that lie in it.
    fn words_of(&self, part: GpaRange) -> impl Iterator<Item = (u64, u64)> {
        let starts = (part.first_page()..part.end_page()).step_by(64);
        starts.map(move |start| {
            let mask = word_mask(start, 0, part);
            (self.bits_from(start) & mask, mask)
        })
    }
}

impl Bits for Bitmap<'_> {
    fn any(&self, part: GpaRange) -> bool {
        self.words_of(part).any(|(bits, _)| bits != 0)
    }

    fn all(&self, part: GpaRange) -> bool {
        self.words_of(part).all(|(bits, mask)| bits == mask)
    }

    fn count(&self, part: GpaRange) -> u64 {
        self.words_of(part).map(|(bits, _)| count(bits)).sum()
    }

    #[inline]
    fn word(&self, start: u64, mask: u64) -> u64 {
        self.bits_from(start) & mask
    }
}

/// The set of the pages of a range that lie in regions.
pub(crate) struct Tracked<'r> {
    pub(crate) range: GpaRange,
    pub(crate) regions: &'r Regions,
}

impl Tracked<'_> {
    /// Iterates over the pages of `part` that are in the set, as ranges.
    fn parts(&self, part: GpaRange) -> impl Iterator<Item = GpaRange> {
        let both = self.range.intersection(&part);
        both.into_iter()
            .flat_map(|both| self.regions.parts(both).map(|(one, _)| one))
    }
}

impl Bits for Tracked<'_> {
    fn any(&self, part: GpaRange) -> bool {
        self.parts(part).next().is_some()
    }

    fn all(&self, part: GpaRange) -> bool {
        self.count(part) == part.pages()
    }

    fn count(&self, part: GpaRange) -> u64 {
        self.parts(part).map(|one| one.pages()).sum()
    }

    fn word(&self, start: u64, mask: u64) -> u64 {
        let parts = self.parts(GpaRange::of(start, start + 64));
        let masks = parts.map(|one| word_mask(start, 0, one));
        masks.fold(0, |all, one| all | one & mask)
    }
}

/// The set `bits` as seen by a tree whose page 0 is the guest's page `base`.
pub(crate) struct Shifted<'b, B> {
    pub(crate) bits: &'b B,
    pub(crate) base: u64,
}

impl<B> Shifted<'_, B> {
    /// Converts `part` from the tree's page numbers to the guest's.
    fn absolute(&self, part: GpaRange) -> GpaRange {
        GpaRange::of(part.first_page() + self.base, part.end_page() + self.base)
    }
}

impl<B: Bits> Bits for Shifted<'_, B> {
    fn any(&self, part: GpaRange) -> bool {
        self.bits.any(self.absolute(part))
    }

    fn all(&self, part: GpaRange) -> bool {
        self.bits.all(self.absolute(part))
    }

    fn count(&self, part: GpaRange) -> u64 {
        self.bits.count(self.absolute(part))
    }

    fn word(&self, start: u64, mask: u64) -> u64 {
        self.bits.word(start + self.base, mask)
    }
}

/// Counts the bits that are set. Words with all bits set are a special case, because they are most of a long run and
/// counting takes a dozen instructions on processors without one for it.
#[inline]
pub(crate) fn count(bits: u64) -> u64 {
    if bits == u64::MAX {
        64
    } else {
        u64::from(bits.count_ones())
    }
}
