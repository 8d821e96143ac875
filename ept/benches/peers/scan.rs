//! Maximal runs of a bitmap, a word at a time.

use super::Consumer;

/// Gives the runs of `words` to `consumer`.
#[inline]
pub(crate) fn runs(words: impl Iterator<Item = u64>, consumer: &mut Consumer) {
    let mut open: Option<u64> = None;
    let mut base = 0;
    for word in words {
        open = match (open, word) {
            (None, 0) => None,
            (Some(_), u64::MAX) => open,
            _ => runs_of_word(word, base, open, consumer),
        };
        base += 64;
    }
    if let Some(first) = open {
        consumer.run(first, base - first);
    }
}

/// The runs that end in the word of page `base`; the first page of the one that does not.
#[inline]
fn runs_of_word(
    mut word: u64,
    base: u64,
    open: Option<u64>,
    consumer: &mut Consumer,
) -> Option<u64> {
    if let Some(first) = open {
        let ones = u64::from(word.trailing_ones());
        consumer.run(first, base + ones - first);
        // Not all are ones.
        word &= u64::MAX << ones;
    }
    while word != 0 {
        let from = u64::from(word.trailing_zeros());
        let ones = u64::from((word >> from).trailing_ones());
        if from + ones == 64 {
            return Some(base + from);
        }
        consumer.run(base + from, ones);
        word &= u64::MAX << (from + ones);
    }
    None
}
