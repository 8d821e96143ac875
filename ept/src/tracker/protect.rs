//! Tracking by write faults: pages are write-protected, and each is released when it is written.

use core::fmt;

use crate::addr::{Gpa, GpaRange, PAGE_SHIFT};
use crate::counters::Source;
use crate::format::OutOfTables;
use crate::notify::OpenRange;
use crate::region::{RegionKind, Regions};
use crate::tracker::Tracker;
use crate::tracking::{Changed, Plane, Toggle};
use crate::walk::{NotOpen, Walk};

/// Reason why pages could not be protected or released. With `OutOfTables`, pages before `reached` were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtectError {
    /// The page at this address lies in no region.
    Outside(Gpa),
    /// Memory of this kind cannot be write-protected: the guest cannot write to it without an exit, or a write replaces
    /// the page.
    Kind {
        /// Address of the first such page.
        gpa: Gpa,
        /// Kind of its region.
        kind: RegionKind,
    },
    /// The open notifier range does not cover the pages.
    NotOpen(NotOpen),
    /// There is no memory for 4 KiB detail.
    OutOfTables {
        /// Address of the first page that was not reached.
        reached: Gpa,
        /// Pages that were changed before it.
        changed: Changed,
    },
}

impl fmt::Display for ProtectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside(gpa) => write!(f, "no region at {gpa}"),
            Self::Kind { gpa, kind } => write!(f, "{kind} at {gpa} cannot be write-protected"),
            Self::NotOpen(_) => f.write_str("the notifier range is too small"),
            Self::OutOfTables { reached, .. } => write!(f, "out of tables at {reached}"),
        }
    }
}

impl core::error::Error for ProtectError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::NotOpen(source) => Some(source),
            Self::OutOfTables { .. } => Some(&OutOfTables),
            Self::Outside(_) | Self::Kind { .. } => None,
        }
    }
}

/// State in which a write fault found its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// These pages were protected and are released now. If memory for 4 KiB detail was short, they are more than the page
    /// that was written, and all of them are dirty now.
    Released(GpaRange),
    /// The page was not protected: another fault came first.
    Open,
    /// The page lies in no region.
    Outside,
}

impl Tracker {
    /// Write-protects `range`. The caller must report the next write to each page with [`Tracker::fault`].
    ///
    /// To track a running guest by write faults, open a notifier range, harvest, protect, close the range, and then read
    /// the pages. A page that a fault releases before it is protected again was marked when the range opened; a page that
    /// a fault releases later is dirty again.
    ///
    /// # Errors
    /// Returns
    /// - [`ProtectError::Outside`] if a page lies in no region;
    /// - [`ProtectError::Kind`] if a region is neither RAM nor device RAM;
    /// - [`ProtectError::NotOpen`] if `open` does not cover `range`;
    /// - [`ProtectError::OutOfTables`] if there is no memory for 4 KiB detail.
    pub fn protect(&self, range: GpaRange, open: &OpenRange) -> Result<Changed, ProtectError> {
        self.toggle(range, open, Toggle::On)
    }

    /// Removes the write-protection of `range`.
    ///
    /// # Errors
    /// As [`Tracker::protect`].
    pub fn unprotect(&self, range: GpaRange, open: &OpenRange) -> Result<Changed, ProtectError> {
        self.toggle(range, open, Toggle::Off)
    }

    fn toggle(
        &self,
        range: GpaRange,
        open: &OpenRange,
        toggle: Toggle,
    ) -> Result<Changed, ProtectError> {
        let regions = self.registry().regions().clone();
        check_protectable(&regions, range)?;
        let walk = Walk::change(&self.tree, range, open).map_err(ProtectError::NotOpen)?;
        let mut changed = Changed::default();
        for (part, _) in regions.parts(range) {
            let (more, stuck) = match self.added.at(part.first_page()) {
                // The walk above is the proof that `open` covers it.
                Some(added) => added.toggle(part, toggle),
                None => match walk.within(part) {
                    Some(walk) => self.tree.toggle(walk, toggle),
                    None => continue,
                },
            };
            changed = changed.and(more);
            if let Some(reached) = stuck {
                return Err(ProtectError::OutOfTables { reached, changed });
            }
        }
        Ok(changed)
    }

    /// Returns whether a write to the page at `gpa` faults.
    pub fn is_protected(&self, gpa: Gpa) -> bool {
        self.has(gpa.page(), Plane::Protected)
    }

    /// Handles a write to a protected page: releases the page, then marks it dirty for [`Source::Fault`]. The vCPU counts
    /// as running until this returns, so a final harvest waits for it.
    ///
    /// This needs no notifier range. A stale translation of a released page is only too strict: the worst consequence is
    /// one more fault, which finds the page released. And a notifier range would wait for the vCPU that faulted.
    pub fn fault(&self, gpa: Gpa) -> Fault {
        let page = gpa.page();
        let part = GpaRange::of(page, page + 1);
        let (changed, _) = if self.regions.at(page).is_some() {
            let walk = Walk::record(&self.tree, part);
            self.tree.toggle(walk, Toggle::OffOrWhole)
        } else if let Some(added) = self.added.at(page) {
            added.toggle(part, Toggle::OffOrWhole)
        } else {
            self.counters.outside(1);
            return Fault::Outside;
        };
        // Marked after the release: a harvest between a mark and the release would clean the page, and nobody would see
        // the write that the vCPU tries again.
        self.mark(gpa, 1, Source::Fault);
        changed.interval.map_or(Fault::Open, Fault::Released)
    }
}

/// Checks that all of `range` lies in regions whose kind can be write-protected.
fn check_protectable(regions: &Regions, range: GpaRange) -> Result<(), ProtectError> {
    let mut next = range.first_page();
    for (part, region) in regions.parts(range) {
        if part.first_page() != next {
            break;
        }
        match region.kind {
            RegionKind::Ram | RegionKind::DeviceRam => next = part.end_page(),
            kind @ (RegionKind::Rom | RegionKind::Trapped | RegionKind::CopyOnWrite) => {
                let gpa = part.start();
                return Err(ProtectError::Kind { gpa, kind });
            }
        }
    }
    match range.from(Gpa(next << PAGE_SHIFT)) {
        Some(rest) if next < range.end_page() => Err(ProtectError::Outside(rest.start())),
        _ => Ok(()),
    }
}
