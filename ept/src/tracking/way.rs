//! The path from the root to one page's leaf table, for marks that touch no other table: the work of a walk in a few
//! instructions.

use crate::sync::atomic::Ordering;

use crate::addr::{LEVEL_BITS, Level, TABLE_ENTRIES};
use crate::format::{Entry, Format, Tables};
use crate::tracking::table::{LeafTable, UpperTable};
use crate::tracking::{Tracking, Tree};

/// The leaf table of a page, and the `UPPERS` tables above it, lowest first.
///
/// `UPPERS` is a constant so that the compiler unrolls the loops over it: a mark should be a chain of loads that ends in a
/// locked operation, and nothing else.
pub(crate) struct Way<'t, const PLANES: usize, const UPPERS: usize> {
    uppers: [&'t UpperTable; UPPERS],
    leaf: LeafTable<'t, PLANES>,
    page: u64,
}

impl<'t, const PLANES: usize, const UPPERS: usize> Way<'t, PLANES, UPPERS> {
    /// Goes from the root of `tree` down to the leaf table of `page`. Returns `None` if there is no such table. `tree` must
    /// have `UPPERS` levels above the leaf tables, and must reach `page`.
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

    /// Iterates over the tables above the leaf table, lowest first, each with the index of the entry on the path.
    #[inline]
    pub(crate) fn up(&self) -> impl Iterator<Item = (&'t UpperTable, usize)> {
        let page = self.page;
        (1..)
            .zip(self.uppers)
            .map(move |(number, table)| (table, index(page, number)))
    }
}

/// Returns the index of `page` in its table of level `number`. In this format the root has no more entries than others.
#[inline]
fn index(page: u64, number: usize) -> usize {
    let index = page >> (LEVEL_BITS as usize * number) & (TABLE_ENTRIES as u64 - 1);
    usize::try_from(index).unwrap_or(0)
}
