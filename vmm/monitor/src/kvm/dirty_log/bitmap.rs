//! Bitmaps of pages: bit `n % 64` of word `n / 64` is page `n`.

use std::iter;

/// Sets `count` bits from bit `first` on. Bits beyond the end of the bitmap are ignored.
pub(super) fn set_bits(words: &mut [u64], first: u64, count: u64) {
    let end = first + count;
    let mut at = first;
    while at < end {
        let next = (at / 64 + 1) * 64;
        let mut mask = u64::MAX << (at % 64);
        if end < next {
            mask &= (1 << (end % 64)) - 1;
        }
        if let Some(word) = usize::try_from(at / 64)
            .ok()
            .and_then(|index| words.get_mut(index))
        {
            *word |= mask;
        }
        at = next;
    }
}

/// Returns the runs of set bits in ascending order: the first bit of each run, and its length.
pub(super) fn runs(words: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    let total = words.len() as u64 * 64;
    let mut at = 0;
    iter::from_fn(move || {
        let first = next_bit(words, at, 0)?;
        at = next_bit(words, first, u64::MAX).unwrap_or(total);
        Some((first, at - first))
    })
}

/// Returns the first bit from bit `at` on that differs from the bits of `skipped`: 0 finds a set bit, `u64::MAX` a
/// clear one.
fn next_bit(words: &[u64], at: u64, skipped: u64) -> Option<u64> {
    let mut index = usize::try_from(at / 64).ok()?;
    let mut word = (words.get(index)? ^ skipped) & (u64::MAX << (at % 64));
    while word == 0 {
        index += 1;
        word = words.get(index)? ^ skipped;
    }
    Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn set_bits_sets_just_those(first in 0..300_u64, count in 0..300_u64) {
            let mut words = [0_u64; 10];
            set_bits(&mut words, first, count);
            let found: Vec<_> = runs(&words).collect();
            let wanted: Vec<_> = (count > 0).then_some((first, count)).into_iter().collect();
            prop_assert_eq!(found, wanted);
        }

        #[test]
        fn runs_are_the_ones_of_the_bitmap(words in proptest::collection::vec(
            prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..6)
        ) {
            let mut found = vec![0_u64; words.len()];
            let mut last_end = None;
            for (first, count) in runs(&words) {
                prop_assert!(count > 0 && last_end < Some(first), "maximal, in order");
                last_end = Some(first + count);
                for bit in first..first + count {
                    found[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
                }
            }
            prop_assert_eq!(found, words);
        }
    }
}
