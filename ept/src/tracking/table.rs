//! The two kinds of table.

use crate::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{GpaRange, TABLE_ENTRIES};
use crate::region::Regions;
use crate::tracking::Plane;

/// Words of 64 bits that hold one bit for each of a table's entries.
pub(crate) const WORDS: usize = TABLE_ENTRIES / 64;

/// 512 entries, and a bit for each that says something below may be dirty.
#[repr(C, align(64))]
pub(crate) struct UpperTable {
    summary: [AtomicU64; WORDS],
    entries: [AtomicU64; TABLE_ENTRIES],
}

impl Default for UpperTable {
    fn default() -> Self {
        Self {
            summary: core::array::from_fn(|_| AtomicU64::new(0)),
            entries: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl AsRef<[AtomicU64]> for UpperTable {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.entries
    }
}

impl UpperTable {
    /// Makes every entry a leaf with `flags`. For tables that are not linked yet.
    pub(crate) fn fill(&self, flags: u64) {
        let dirty = flags & Plane::Dirty.flag() != 0;
        for entry in &self.entries {
            entry.store(flags, Ordering::Relaxed);
        }
        for word in &self.summary {
            word.store(if dirty { u64::MAX } else { 0 }, Ordering::Relaxed);
        }
    }

    /// Says that something below entry `index` is dirty. A locked operation only where that is
    /// news: the load is `SeqCst`, and the caller's mark below was, so a set bit that it reads is
    /// one that no harvester has cleared before looking below (see the module).
    #[inline]
    pub(crate) fn set_summary(&self, index: usize) {
        let (word, bit) = (&self.summary[index / 64], 1 << (index % 64));
        if word.load(Ordering::SeqCst) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Sets the bits `bits` of summary word `word` again.
    pub(crate) fn restore_summary(&self, word: usize, bits: u64) {
        self.summary[word].fetch_or(bits, Ordering::SeqCst);
    }

    /// The bits of summary word `word` that are in `wanted`; those also in `clear` are cleared.
    #[inline]
    pub(crate) fn take_summary(&self, word: usize, wanted: u64, clear: u64) -> u64 {
        let word = &self.summary[word];
        let seen = word.load(Ordering::SeqCst);
        if seen & clear == 0 {
            return seen & wanted;
        }
        word.fetch_and(!clear, Ordering::SeqCst) & wanted
    }

    /// Whether no summary bit is set.
    pub(crate) fn is_clean(&self) -> bool {
        let mut words = self.summary.iter();
        words.all(|word| word.load(Ordering::SeqCst) == 0)
    }
}

/// Leaf tables allocated together, so that each of their planes is a 4 KiB page.
pub(crate) const LEAF_CHUNK: usize = 64;

/// One plane of one leaf table: a cache line.
#[repr(align(64))]
#[derive(Default)]
pub(crate) struct PlaneLine([AtomicU64; WORDS]);

/// The memory of 64 leaf tables, one plane after the other: marking touches the dirty planes
/// only, which lie as close together as in a plain bitmap.
pub(crate) struct LeafChunk<const PLANES: usize> {
    planes: [[PlaneLine; LEAF_CHUNK]; PLANES],
}

impl<const PLANES: usize> Default for LeafChunk<PLANES> {
    fn default() -> Self {
        Self {
            planes: core::array::from_fn(|_| core::array::from_fn(|_| PlaneLine::default())),
        }
    }
}

/// The planes of 512 pages.
#[derive(Clone, Copy)]
pub(crate) struct LeafTable<'t, const PLANES: usize> {
    chunk: &'t LeafChunk<PLANES>,
    /// Which of the chunk's tables this is.
    place: usize,
}

impl<'t, const PLANES: usize> LeafTable<'t, PLANES> {
    #[inline]
    pub(crate) fn new(chunk: &'t LeafChunk<PLANES>, place: usize) -> Self {
        Self { chunk, place }
    }

    /// Sets the planes in `flags` for the pages of `span` that lie in regions, and clears all else.
    /// For tables that are not linked yet.
    pub(crate) fn fill(&self, flags: u64, span: GpaRange, regions: &Regions) {
        let tracked = tracked_words(span, regions);
        for (number, lines) in self.chunk.planes.iter().enumerate() {
            let set = flags & (1 << number) != 0;
            for (word, tracked) in lines[self.place].0.iter().zip(tracked) {
                word.store(if set { tracked } else { 0 }, Ordering::Relaxed);
            }
        }
    }

    /// The words of `plane`.
    #[inline]
    pub(crate) fn plane(&self, plane: Plane) -> &'t [AtomicU64; WORDS] {
        &self.chunk.planes[plane as usize][self.place].0
    }

    /// The flags of page `index`.
    pub(crate) fn flags(&self, index: usize) -> u64 {
        let mut flags = 0;
        for (number, lines) in self.chunk.planes.iter().enumerate() {
            let word = lines[self.place].0[index / 64].load(Ordering::SeqCst);
            flags |= (word >> (index % 64) & 1) << number;
        }
        flags
    }
}

/// A bit for each page of the 2 MiB `span` that lies in a region.
fn tracked_words(span: GpaRange, regions: &Regions) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    for (part, _) in regions.parts(span) {
        for (word, tracked) in words.iter_mut().enumerate() {
            *tracked |= word_mask(span.first_page(), word, part);
        }
    }
    words
}

/// The bits of word `word` of the leaf table at page `base` that stand for pages of `part`.
#[inline]
pub(crate) fn word_mask(base: u64, word: usize, part: GpaRange) -> u64 {
    let start = base + 64 * word as u64;
    let from = part.first_page().saturating_sub(start);
    let to = part.end_page().saturating_sub(start).min(64);
    if from >= to {
        return 0;
    }
    u64::MAX << from & u64::MAX >> (64 - to)
}

/// The words of the leaf table at page `base` that have pages of `part`, each with the bits that stand for them.
#[inline]
pub(crate) fn masks(base: u64, part: GpaRange) -> impl Iterator<Item = (usize, u64)> {
    let (first, last) = (part.first_page() - base, part.end_page() - 1 - base);
    let word_of = |page: u64| usize::try_from(page / 64).unwrap_or(usize::MAX);
    let (first_word, last_word) = (word_of(first), word_of(last));
    (first_word..last_word + 1).map(move |word| {
        let mut mask = u64::MAX;
        if word == first_word {
            mask <<= first % 64;
        }
        if word == last_word {
            mask &= u64::MAX >> (63 - last % 64);
        }
        (word, mask)
    })
}
