//! Orders that visit every page of a run exactly once, without a table in memory.
//!
//! A shuffled order is a bijection on numbers of a fixed bit width. It is composed of invertible
//! steps: multiplication by an odd number and exclusive-or with the shifted value, modulo a power of
//! two. Each position is computed independently, so that the processor can overlap several.
//! Positions that map past the end of the run are skipped.

/// Order of the pages `0..pages`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    pages: u64,
    mask: u64,
    shift: u32,
    factors: [u64; 2],
    offset: u64,
}

impl Order {
    /// Creates the ascending order.
    #[must_use]
    pub const fn ascending(pages: u64) -> Self {
        Self {
            pages,
            mask: u64::MAX,
            shift: 63,
            factors: [1, 1],
            offset: 0,
        }
    }

    /// Creates a shuffled order, which depends on `key`.
    #[must_use]
    pub fn shuffled(pages: u64, key: u64) -> Self {
        let bits = u64::BITS - pages.saturating_sub(1).leading_zeros();
        let mask = if bits == 64 {
            u64::MAX
        } else {
            (1 << bits) - 1
        };
        // Two different odd numbers.
        let factors = [scramble(key) | 1, scramble(!key) | 1];
        let shift = bits.div_ceil(2).max(1);
        Self {
            pages,
            mask,
            shift,
            factors,
            offset: scramble(key.rotate_left(32)),
        }
    }

    /// Returns the number of positions, which is at most twice the number of pages.
    #[must_use]
    pub const fn positions(&self) -> u64 {
        if self.mask == u64::MAX || self.pages == 0 {
            self.pages
        } else {
            self.mask + 1
        }
    }

    /// Returns the page at `position`, or `None` if the position must be skipped.
    #[inline]
    #[must_use]
    pub const fn page(&self, position: u64) -> Option<u64> {
        let mut page = position
            .wrapping_mul(self.factors[0])
            .wrapping_add(self.offset);
        page &= self.mask;
        page ^= page >> self.shift;
        page = page.wrapping_mul(self.factors[1]) & self.mask;
        if page < self.pages { Some(page) } else { None }
    }
}

/// Mixes all bits of a key (the finalizer of SplitMix64, Steele et al. 2014).
const fn scramble(key: u64) -> u64 {
    let mut mixed = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pages(order: Order) -> Vec<u64> {
        (0..order.positions())
            .filter_map(|position| order.page(position))
            .collect()
    }

    #[test]
    fn ascending_is_ascending() {
        assert_eq!(pages(Order::ascending(5)), [0, 1, 2, 3, 4]);
        assert_eq!(pages(Order::ascending(0)), []);
    }

    #[test]
    fn a_shuffled_order_is_not_the_ascending_one_nor_that_of_another_key() {
        let orders = [0, 1, 2].map(|key| pages(Order::shuffled(1000, key)));
        assert_ne!(orders[0], orders[1]);
        assert_ne!(orders[1], orders[2]);
        assert!(
            orders
                .iter()
                .all(|order| *order != pages(Order::ascending(1000)))
        );
    }

    proptest! {
        #[test]
        fn every_page_is_visited_once(count in 0u64..5000, key: u64) {
            let mut all = pages(Order::shuffled(count, key));
            all.sort_unstable();
            prop_assert_eq!(all, (0..count).collect::<Vec<_>>());
        }

        #[test]
        fn at_most_every_other_position_is_skipped(count in 1u64..1 << 40, key: u64) {
            prop_assert!(Order::shuffled(count, key).positions() < 2 * count.max(1) + 1);
        }
    }
}
