//! The two kinds of table: leaf tables, and the upper tables above them.

use crate::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{GpaRange, TABLE_ENTRIES};
use crate::region::Regions;
use crate::tracking::Plane;

/// Number of 64-bit words that hold one bit for each entry of a table.
pub(crate) const WORDS: usize = TABLE_ENTRIES / 64;

/// Table above the leaf tables: 512 entries, and a summary bit for each, which is set if a page below may be dirty.
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
    /// Makes every entry a leaf with `flags`. The table must not be linked yet.
    pub(crate) fn fill(&self, flags: u64) {
        let dirty = flags & Plane::Dirty.flag() != 0;
        for entry in &self.entries {
            entry.store(flags, Ordering::Relaxed);
        }
        for word in &self.summary {
            word.store(if dirty { u64::MAX } else { 0 }, Ordering::Relaxed);
        }
    }

    /// Sets the summary bit of entry `index`. If it is set already, there is no locked operation: the load is `SeqCst`, as
    /// the caller's mark below was, so no harvester has cleared this bit before it reads that mark (see the module).
    #[inline]
    pub(crate) fn set_summary(&self, index: usize) {
        let (word, bit) = (&self.summary[index / 64], 1 << (index % 64));
        if word.load(Ordering::SeqCst) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Sets `bits` in summary word `word` again.
    pub(crate) fn restore_summary(&self, word: usize, bits: u64) {
        self.summary[word].fetch_or(bits, Ordering::SeqCst);
    }

    /// Returns the bits of summary word `word` that are in `wanted`, and clears those in `clear`.
    #[inline]
    pub(crate) fn take_summary(&self, word: usize, wanted: u64, clear: u64) -> u64 {
        let word = &self.summary[word];
        let seen = word.load(Ordering::SeqCst);
        if seen & clear == 0 {
            return seen & wanted;
        }
        word.fetch_and(!clear, Ordering::SeqCst) & wanted
    }

    /// Returns whether no summary bit is set.
    pub(crate) fn is_clean(&self) -> bool {
        let mut words = self.summary.iter();
        words.all(|word| word.load(Ordering::SeqCst) == 0)
    }
}

/// Number of leaf tables that are allocated together, so that each of their planes fills a 4 KiB page.
pub(crate) const LEAF_CHUNK: usize = 64;

/// One plane of one leaf table, which is one cache line.
#[repr(align(64))]
#[derive(Default)]
pub(crate) struct PlaneLine([AtomicU64; WORDS]);

/// Memory of 64 leaf tables, one plane after the other. A mark touches the dirty planes only, which lie as close together
/// as in a plain bitmap.
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

/// Reference to one leaf table: the planes of 512 pages.
#[derive(Clone, Copy)]
pub(crate) struct LeafTable<'t, const PLANES: usize> {
    chunk: &'t LeafChunk<PLANES>,
    /// Index of the table in the chunk.
    place: usize,
}

impl<'t, const PLANES: usize> LeafTable<'t, PLANES> {
    #[inline]
    pub(crate) fn new(chunk: &'t LeafChunk<PLANES>, place: usize) -> Self {
        Self { chunk, place }
    }

    /// Sets the planes in `flags` for the pages of `span` that lie in regions, and clears all other bits. The table must not
    /// be linked yet.
    pub(crate) fn fill(&self, flags: u64, span: GpaRange, regions: &Regions) {
        let tracked = tracked_words(span, regions);
        for (number, lines) in self.chunk.planes.iter().enumerate() {
            let set = flags & (1 << number) != 0;
            for (word, tracked) in lines[self.place].0.iter().zip(tracked) {
                word.store(if set { tracked } else { 0 }, Ordering::Relaxed);
            }
        }
    }

    /// Returns the words of `plane`.
    #[inline]
    pub(crate) fn plane(&self, plane: Plane) -> &'t [AtomicU64; WORDS] {
        &self.chunk.planes[plane as usize][self.place].0
    }

    /// Returns the flags of page `index`.
    pub(crate) fn flags(&self, index: usize) -> u64 {
        let mut flags = 0;
        for (number, lines) in self.chunk.planes.iter().enumerate() {
            let word = lines[self.place].0[index / 64].load(Ordering::SeqCst);
            flags |= (word >> (index % 64) & 1) << number;
        }
        flags
    }
}

/// Returns a bitmap of the 2 MiB `span` with a bit set for each page that lies in a region.
pub(crate) fn tracked_words(span: GpaRange, regions: &Regions) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    for (part, _) in regions.parts(span) {
        for (word, tracked) in words.iter_mut().enumerate() {
            *tracked |= word_mask(span.first_page(), word, part);
        }
    }
    words
}

/// Returns the bits of word `word`, in the leaf table of page `base`, whose pages lie in `part`.
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

/// Iterates over the words of the leaf table of page `base` that have pages of `part`, each with the bits of these pages.
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
