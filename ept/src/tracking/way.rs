//! The way down to one page's leaf table and up again, for marks that touch no other: the work of a walk in a few
//! instructions.

use crate::sync::atomic::Ordering;

use crate::addr::{LEVEL_BITS, Level, TABLE_ENTRIES};
use crate::format::{Entry, Format, Tables};
use crate::tracking::table::{LeafTable, UpperTable};
use crate::tracking::{Tracking, Tree};

/// A page's leaf table and the `UPPERS` tables above it, the lowest first.
///
/// The number is a constant so that the loops over it unroll: a mark is a chain of loads that ends in a locked
/// operation, and nothing else should be in it.
pub(crate) struct Way<'t, const PLANES: usize, const UPPERS: usize> {
    uppers: [&'t UpperTable; UPPERS],
    leaf: LeafTable<'t, PLANES>,
    page: u64,
}

impl<'t, const PLANES: usize, const UPPERS: usize> Way<'t, PLANES, UPPERS> {
    /// Down from the root of `tree`, which has `UPPERS` levels of tables above the leaf tables, to the leaf table of
    /// `page`, a page of the tree; `None` where there is no such table.
    #[inline]
    pub(crate) fn down(tree: &'t Tree<PLANES>, page: u64) -> Option<Self> {
        let mut uppers = [tree.root(); UPPERS];
        for number in (1..=UPPERS).rev() {
            let table = uppers[number - 1];
            let raw = table.as_ref()[index(page, number)].load(Ordering::Acquire);
            let Entry::Table(below) = Tracking.decode(raw, Level::PAGE.up()) else {
                return None;
            };
            if number == 1 {
                let leaf = tree.leaf(below);
                return Some(Self { uppers, leaf, page });
            }
            uppers[number - 2] = tree.upper(below);
        }
        None
    }

    #[inline]
    pub(crate) fn leaf(&self) -> LeafTable<'t, PLANES> {
        self.leaf
    }

    /// Up to the root: the tables above the leaf table, lowest first, each with the index taken in it.
    #[inline]
    pub(crate) fn up(&self) -> impl Iterator<Item = (&'t UpperTable, usize)> {
        let page = self.page;
        (1..)
            .zip(self.uppers)
            .map(move |(number, table)| (table, index(page, number)))
    }
}

/// The index of `page` in its table of level `number`. The root of this format has no more entries than others.
#[inline]
fn index(page: u64, number: usize) -> usize {
    let index = page >> (LEVEL_BITS as usize * number) & (TABLE_ENTRIES as u64 - 1);
    usize::try_from(index).unwrap_or(0)
}
