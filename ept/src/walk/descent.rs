//! The way down to one page's leaf table: the walk of a single step.

use crate::sync::atomic::Ordering;

use crate::addr::{GpaRange, Level, MAX_LEVELS};
use crate::format::{Entry, Format, Tables};
use crate::geometry::Geometry;

/// Tables by level; those below the root are filled in on the way down.
pub(crate) type Path<'t, T> = [&'t <T as Tables>::Upper; MAX_LEVELS];

/// A leaf table and the tables above it.
pub(crate) struct Descent<'p, 't, T: Tables + 't> {
    geometry: Geometry,
    /// Lent, because copying it costs more than the way down.
    path: &'p Path<'t, T>,
    leaf: T::Leaf<'t>,
    page: u64,
}

impl<'p, 't, T: Tables> Descent<'p, 't, T> {
    /// The way `path` to `leaf`, the leaf table of page `page`.
    #[inline]
    pub(crate) fn new(
        geometry: Geometry,
        path: &'p Path<'t, T>,
        leaf: T::Leaf<'t>,
        page: u64,
    ) -> Self {
        Self {
            geometry,
            path,
            leaf,
            page,
        }
    }

    /// Down to the leaf table of page `page`, noting the way in `path`; `None` where the tree does
    /// not go down to one.
    #[inline]
    pub(crate) fn to(tables: &'t T, page: u64, path: &'p mut Path<'t, T>) -> Option<Self> {
        let geometry = tables.geometry();
        let mut level = geometry.root_level();
        let mut table = tables.root();
        loop {
            let index = geometry.index(page, level);
            let raw = table.as_ref().get(index)?.load(Ordering::Acquire);
            let Entry::Table(below) = tables.format().decode(raw, level) else {
                return None;
            };
            path[level.index()] = table;
            level = level.down();
            if level == Level::PAGE {
                return Some(Self::new(geometry, path, tables.leaf(below), page));
            }
            table = tables.upper(below);
        }
    }

    /// Everything the leaf table maps.
    #[inline]
    pub(crate) fn span(&self) -> GpaRange {
        Level::PAGE.up().span_at(self.page)
    }

    #[inline]
    pub(crate) fn leaf(&self) -> T::Leaf<'t> {
        self.leaf
    }

    /// The tables above the leaf table, lowest first, each with the index taken in it.
    #[inline]
    pub(crate) fn ancestors(&self) -> impl Iterator<Item = (&'t T::Upper, usize)> {
        let levels = 1..=self.geometry.root_level().number();
        levels.filter_map(Level::new).map(|level| {
            let index = self.geometry.index(self.page, level);
            (self.path[level.index()], index)
        })
    }
}
