//! Where a walk stands: a page, a level, and the tables on the way from the root.

use crate::sync::atomic::AtomicU64;

use crate::addr::{Gpa, GpaRange, Level, MAX_LEVELS, PAGE_SHIFT, TABLE_ENTRIES};
use crate::format::{TableId, Tables};
use crate::geometry::Geometry;
use crate::walk::{Visitor, Window};

pub(crate) struct Cursor<'t, T: Tables> {
    tables: &'t T,
    geometry: Geometry,
    /// By level; meaningful from `level` up to the root's.
    path: [&'t T::Upper; MAX_LEVELS],
    level: Level,
    /// The next page to cover.
    page: u64,
    end_page: u64,
}

impl<'t, T: Tables> Cursor<'t, T> {
    /// At the start of `range`, which lies inside the geometry's span.
    #[inline]
    pub(crate) fn new(tables: &'t T, range: GpaRange) -> Self {
        let geometry = tables.geometry();
        Self {
            tables,
            geometry,
            path: [tables.root(); MAX_LEVELS],
            level: geometry.root_level(),
            page: range.first_page(),
            end_page: range.end_page(),
        }
    }

    /// Moves to the next index that the visitor wants to see; false at the end of the range.
    #[inline]
    pub(crate) fn seek<A, V: Visitor<'t, T, A>>(&mut self, visitor: &mut V) -> bool {
        while self.page < self.end_page {
            let window = self.window();
            let wanted = visitor.seek(self.level, self.table(self.level), window);
            if wanted == window.from {
                return true;
            }
            self.jump((wanted - window.from) as u64);
            if wanted < window.to {
                return true;
            }
        }
        false
    }

    /// The indexes of the current table that the range still has.
    #[inline]
    fn window(&self) -> Window {
        let from = self.geometry.index(self.page, self.level);
        let last = self.geometry.index(self.end_page - 1, self.level);
        // The range ends in this table exactly if its last page has the same way down to it.
        let to = if self.same_table(self.end_page - 1) {
            last + 1
        } else {
            TABLE_ENTRIES
        };
        Window {
            from,
            to,
            page: self.page,
        }
    }

    #[inline]
    fn same_table(&self, page: u64) -> bool {
        self.level == self.geometry.root_level() || {
            let shift = self.level.up().shift();
            page >> shift == self.page >> shift
        }
    }

    /// Past the entry under the cursor.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.jump(1);
    }

    /// Past `entries` entries, and up out of every table that ends there.
    #[inline]
    fn jump(&mut self, entries: u64) {
        let shift = self.level.shift();
        self.page = ((self.page >> shift) + entries) << shift;
        while self.page < self.end_page && self.level < self.geometry.root_level() {
            let above = self.level.up().shift();
            if !self.page.is_multiple_of(1 << above) {
                return;
            }
            self.level = self.level.up();
        }
    }

    /// Into the table under the cursor, which is not a leaf table.
    #[inline]
    pub(crate) fn descend(&mut self, table: TableId) {
        self.level = self.level.down();
        self.path[self.level.index()] = self.tables.upper(table);
    }

    #[inline]
    pub(crate) fn tables(&self) -> &'t T {
        self.tables
    }

    #[inline]
    pub(crate) fn level(&self) -> Level {
        self.level
    }

    pub(crate) fn root_level(&self) -> Level {
        self.geometry.root_level()
    }

    /// The table of `level` on the way to the current entry.
    #[inline]
    pub(crate) fn table(&self, level: Level) -> &'t T::Upper {
        self.path[level.index()]
    }

    /// The index in that table.
    #[inline]
    pub(crate) fn index(&self, level: Level) -> usize {
        self.geometry.index(self.page, level)
    }

    /// The entry under the cursor.
    #[inline]
    pub(crate) fn slot(&self) -> &'t AtomicU64 {
        let entries: &'t [AtomicU64] = self.table(self.level).as_ref();
        &entries[self.index(self.level)]
    }

    /// The true span of the entry under the cursor.
    #[inline]
    pub(crate) fn span(&self) -> GpaRange {
        self.level.span_at(self.page)
    }

    /// The part of that span that the walk still has to cover.
    #[inline]
    pub(crate) fn part(&self) -> GpaRange {
        GpaRange::of(self.page, self.end_page.min(self.span().end_page()))
    }

    #[inline]
    pub(crate) fn gpa(&self) -> Gpa {
        Gpa(self.page << PAGE_SHIFT)
    }
}
