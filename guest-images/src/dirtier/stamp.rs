//! Stamps that the dirtier writes into its pages, and the detection of damaged stamps.
//!
//! A stamp has three words: the iteration, the address of the page with the index of the vCPU in its
//! low bits, and a check value over both. Each page has the same stamp at its head, its middle and
//! its tail, except that the check value depends on the place. The head is written first and the
//! tail last, so that a page that was copied during a write has an older tail.

/// Offsets of the stamps in a page, in the order in which they are written.
pub const PLACES: [u64; 3] = [0, 2048, 4096 - 24];

/// Number of 8-byte words in a stamp.
pub const WORDS: usize = 3;

/// Odd multipliers of the check value (the golden ratio, and the finalizer of SplitMix64).
const FACTORS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9];

/// Stamp of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Iteration that wrote it. 0 means that the page was never written.
    pub iteration: u64,
    /// Guest-physical address of the page, plus the index of the vCPU.
    pub owner: u64,
}

/// Result of the check of a page's three stamps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// All stamps are intact and have the same iteration. Zeros at all places are iteration 0.
    Whole(u64),
    /// The stamps differ or are damaged. The values are the iterations found.
    Torn([u64; 3]),
}

impl Stamp {
    /// Creates the stamp of `iteration` for the page at `gpa`, which vCPU `cpu` writes.
    #[inline]
    #[must_use]
    pub fn new(iteration: u64, gpa: u64, cpu: u32) -> Self {
        Self {
            iteration,
            owner: gpa | u64::from(cpu),
        }
    }

    /// Returns the words of the stamp at place number `place` of the page.
    #[inline]
    #[must_use]
    pub const fn words(&self, place: usize) -> [u64; WORDS] {
        // The compiler computes both products once per page or per pass, not once per place.
        let mixed = self.iteration.wrapping_mul(FACTORS[0]).rotate_left(29);
        let check = mixed ^ self.owner.wrapping_mul(FACTORS[1]) ^ PLACES[place];
        [self.iteration, self.owner, check]
    }
}

/// Checks the words that were read from the three places of the page of `owner`.
#[must_use]
pub fn judge(owner: u64, found: [[u64; WORDS]; 3]) -> Finding {
    let iteration = found[0][0];
    let stamp = Stamp { iteration, owner };
    let whole = [0, 1, 2]
        .iter()
        .all(|place| found[*place] == stamp.words(*place));
    if whole || found == [[0; WORDS]; 3] {
        Finding::Whole(iteration)
    } else {
        Finding::Torn(found.map(|words| words[0]))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(stamp: Stamp) -> [[u64; WORDS]; 3] {
        [0, 1, 2].map(|place| stamp.words(place))
    }

    #[test]
    fn a_page_of_zeros_was_never_written() {
        assert_eq!(judge(0x1000, [[0; 3]; 3]), Finding::Whole(0));
    }

    proptest! {
        #[test]
        fn a_whole_page_tells_its_iteration(iteration: u64, number in 0u64..1 << 40, cpu in 0u32..16) {
            let stamp = Stamp::new(iteration, number << 12, cpu);
            prop_assert_eq!(judge(stamp.owner, page(stamp)), Finding::Whole(iteration));
        }

        #[test]
        fn any_flipped_bit_is_torn(iteration: u64, number in 0u64..1 << 40, place in 0usize..3,
                                   word in 0usize..3, bit in 0u32..64) {
            let stamp = Stamp::new(iteration, number << 12, 1);
            let mut found = page(stamp);
            found[place][word] ^= 1 << bit;
            prop_assert!(matches!(judge(stamp.owner, found), Finding::Torn(_)));
        }

        #[test]
        fn places_of_two_iterations_are_torn(one: u64, other: u64, place in 0usize..3) {
            prop_assume!(one != other);
            let mut found = page(Stamp::new(one, 0x5000, 0));
            found[place] = Stamp::new(other, 0x5000, 0).words(place);
            prop_assert!(matches!(judge(0x5000, found), Finding::Torn(_)));
        }

        #[test]
        fn another_page_or_vcpu_is_torn(iteration in 1u64.., number in 0u64..1 << 40, cpu in 0u32..15) {
            let owner = number << 12 | u64::from(cpu);
            let next_page = page(Stamp::new(iteration, (number + 1) << 12, cpu));
            let next_cpu = page(Stamp::new(iteration, number << 12, cpu + 1));
            prop_assert!(matches!(judge(owner, next_page), Finding::Torn(_)));
            prop_assert!(matches!(judge(owner, next_cpu), Finding::Torn(_)));
        }
    }
}
