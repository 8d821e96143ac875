//! Random numbers that come again: SplitMix64.

use std::env;

/// What a run starts from where `FERRY_SEED` says nothing.
const SEED: u64 = 20_251_125;

/// The number that a run starts from: the variable `FERRY_SEED`, if it is set.
///
/// # Panics
/// It is set, and no number.
pub(super) fn seed() -> u64 {
    match env::var("FERRY_SEED") {
        Ok(text) => match text.parse() {
            Ok(seed) => seed,
            Err(error) => panic!("FERRY_SEED={text:?}: {error}"),
        },
        Err(_) => SEED,
    }
}

/// A sequence of numbers.
pub(super) struct Chance(u64);

impl Chance {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`, which is not 0. That small ones are a trifle likelier does no harm here.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True once in so many times.
    pub(super) fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of these, of which there is at least one.
    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        let index = self.below(from.len() as u64);
        &from[usize::try_from(index).unwrap_or(0)]
    }
}
