//! Position of a walk: a page, a level, and the tables on the path from the root.

use crate::sync::atomic::AtomicU64;

use crate::addr::{Gpa, GpaRange, Level, MAX_LEVELS, PAGE_SHIFT, TABLE_ENTRIES};
use crate::format::{TableId, Tables};
use crate::geometry::Geometry;
use crate::walk::{Visitor, Window};

pub(crate) struct Cursor<'t, T: Tables> {
    tables: &'t T,
    geometry: Geometry,
    /// Tables on the path, by level. Valid from `level` up to the level of the root.
    path: [&'t T::Upper; MAX_LEVELS],
    level: Level,
    /// Next page to visit.
    page: u64,
    end_page: u64,
}

impl<'t, T: Tables> Cursor<'t, T> {
    /// Creates a cursor at the start of `range`, which must lie in the span of the geometry.
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

    /// Moves to the next index that the visitor wants to see. Returns false at the end of the range.
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

    /// Returns the indices of the current table that remain to be visited.
    #[inline]
    fn window(&self) -> Window {
        let from = self.geometry.index(self.page, self.level);
        let last = self.geometry.index(self.end_page - 1, self.level);
        // The range ends in this table if and only if the path to its last page leads through it.
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

    /// Moves past the current entry.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.jump(1);
    }

    /// Moves past `entries` entries, and up from every table that ends there.
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

    /// Moves into `table`, to which the current entry points. It must not be a leaf table.
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

    /// Returns the table of `level` on the path to the current entry.
    #[inline]
    pub(crate) fn table(&self, level: Level) -> &'t T::Upper {
        self.path[level.index()]
    }

    /// Returns the index on the path in the table of `level`.
    #[inline]
    pub(crate) fn index(&self, level: Level) -> usize {
        self.geometry.index(self.page, level)
    }

    /// Returns the current entry.
    #[inline]
    pub(crate) fn slot(&self) -> &'t AtomicU64 {
        let entries: &'t [AtomicU64] = self.table(self.level).as_ref();
        &entries[self.index(self.level)]
    }

    /// Returns everything that the current entry maps.
    #[inline]
    pub(crate) fn span(&self) -> GpaRange {
        self.level.span_at(self.page)
    }

    /// Returns the part of this span that remains to be visited.
    #[inline]
    pub(crate) fn part(&self) -> GpaRange {
        GpaRange::of(self.page, self.end_page.min(self.span().end_page()))
    }

    #[inline]
    pub(crate) fn gpa(&self) -> Gpa {
        Gpa(self.page << PAGE_SHIFT)
    }
}
