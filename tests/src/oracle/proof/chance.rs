//! Reproducible random numbers: SplitMix64.

use std::env;

/// Seed if `FERRY_SEED` is not set.
const SEED: u64 = 20_251_125;

/// Returns the seed: the variable `FERRY_SEED`, or a fixed default.
///
/// # Panics
/// Panics if the variable is set but is not a number.
pub(super) fn seed() -> u64 {
    match env::var("FERRY_SEED") {
        Ok(text) => match text.parse() {
            Ok(seed) => seed,
            Err(error) => panic!("FERRY_SEED={text:?}: {error}"),
        },
        Err(_) => SEED,
    }
}

/// Random number generator.
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

    /// Returns a number below `end`, which must not be 0. Small numbers are slightly more likely, which is harmless
    /// here.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Returns true once in `times` on average.
    pub(super) fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// Returns one of these items. There must be at least one.
    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        let index = self.below(from.len() as u64);
        &from[usize::try_from(index).unwrap_or(0)]
    }
}
