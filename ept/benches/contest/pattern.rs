//! Which pages are dirty.

use std::rc::Rc;

use crate::peers::Dirt;

/// Tenths of a percent of all pages.
pub(super) const DENSITIES: [u64; 5] = [1, 10, 100, 500, 1000];

/// Words of 64 pages in 2 MiB.
const BLOCK_WORDS: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spread {
    /// Each page by itself.
    Uniform,
    /// Whole 2 MiB at a time.
    Clustered,
}

impl Spread {
    pub(super) const ALL: [Self; 2] = [Self::Uniform, Self::Clustered];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Clustered => "clustered in 2 MiB",
        }
    }

    /// `tenths` of a percent of `pages` pages, the same ones every time.
    pub(super) fn dirt(self, pages: u64, tenths: u64) -> Dirt {
        let mut random = Random::new(1);
        let words = words_of(pages);
        let words = match self {
            Self::Uniform => (0..words).map(|_| random.word(tenths)).collect(),
            Self::Clustered => (0..words.div_ceil(BLOCK_WORDS))
                .flat_map(|_| [random.all_or_none(tenths); BLOCK_WORDS])
                .collect(),
        };
        Rc::new(words)
    }
}

pub(super) fn clean(pages: u64) -> Dirt {
    Rc::new(vec![0; words_of(pages)])
}

fn words_of(pages: u64) -> usize {
    usize::try_from(pages / 64).expect("64 bits")
}

/// `count` of `pages` pages, the same ones for the same seed; some may be there twice.
pub(super) fn random_pages(seed: u64, pages: u64, count: usize) -> Vec<u32> {
    let mut random = Random::new(seed);
    let page = |_| u32::try_from(random.next() % pages).expect("below 16 TiB");
    (0..count).map(page).collect()
}

/// xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled" (2016).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn chance(&mut self, tenths: u64) -> bool {
        self.next() % 1000 < tenths
    }

    fn all_or_none(&mut self, tenths: u64) -> u64 {
        if self.chance(tenths) { u64::MAX } else { 0 }
    }

    fn word(&mut self, tenths: u64) -> u64 {
        (0..64).fold(0, |word, bit| word | u64::from(self.chance(tenths)) << bit)
    }
}
