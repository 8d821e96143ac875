//! Tracking by write faults: pages are protected, and released one by one as they are written.

use core::fmt;

use crate::addr::{Gpa, GpaRange, PAGE_SHIFT};
use crate::counters::Source;
use crate::format::OutOfTables;
use crate::notify::OpenRange;
use crate::region::RegionKind;
use crate::tracker::Tracker;
use crate::tracking::{Changed, Plane, Toggle};
use crate::walk::{NotOpen, Walk};

/// Why pages could not be protected or released. What was done before `OutOfTables` stays done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtectError {
    /// The page at this address lies in no region.
    Outside(Gpa),
    /// Memory of this kind cannot be write-protected: nothing writes to it natively, or it is copied on a write.
    Kind {
        /// Where.
        gpa: Gpa,
        /// What is there.
        kind: RegionKind,
    },
    /// The notifier range that was handed over does not cover the pages.
    NotOpen(NotOpen),
    /// No memory for 4 KiB detail.
    OutOfTables {
        /// The first page that was not reached.
        reached: Gpa,
        /// What was changed before it.
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

/// What a write fault met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// These pages were protected and are released now: the page that was written, or, where
    /// memory for detail was short, all that was protected together with it (and is dirty now).
    Released(GpaRange),
    /// The page was not protected: somebody else's fault came first.
    Open,
    /// The page lies in no region.
    Outside,
}

impl Tracker {
    /// Write-protects `range`: the next write to each page is to be reported with
    /// [`Tracker::fault`].
    ///
    /// Who harvests write faults while the guest runs takes first and protects after, inside one
    /// open range, and reads the pages after that: what a fault releases before the
    /// protection is marked when it is over, and what it releases later is dirty again.
    ///
    /// # Errors
    /// Pages outside the regions or in one that is neither RAM nor device RAM, an open range that
    /// does not cover `range`, or no memory for detail.
    pub fn protect(&self, range: GpaRange, open: &OpenRange) -> Result<Changed, ProtectError> {
        self.toggle(range, open, Toggle::On)
    }

    /// Releases the protection of `range`.
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
        self.check_protectable(range)?;
        let walk = Walk::change(&self.tree, range, open).map_err(ProtectError::NotOpen)?;
        let mut changed = Changed::default();
        let parts = self.regions.parts(range);
        for walk in parts.filter_map(|(part, _)| walk.within(part)) {
            let (more, stuck) = self.tree.toggle(walk, toggle);
            changed = changed.and(more);
            if let Some(reached) = stuck {
                return Err(ProtectError::OutOfTables { reached, changed });
            }
        }
        Ok(changed)
    }

    fn check_protectable(&self, range: GpaRange) -> Result<(), ProtectError> {
        let mut next = range.first_page();
        for (part, region) in self.regions.parts(range) {
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

    /// Whether a write to the page at `gpa` faults.
    pub fn is_protected(&self, gpa: Gpa) -> bool {
        self.regions.at(gpa.page()).is_some() && self.tree.has(gpa.page(), Plane::Protected)
    }

    /// A write to a protected page: releases it, then marks it dirty for [`Source::Fault`]. Until
    /// this returns, its vCPU counts as running: a final harvest waits for it.
    ///
    /// It needs no notifier range. Releasing makes no stale translation wrong, only too strict:
    /// the worst is one more fault, which finds the page open. And the vCPU that faulted could not
    /// wait for itself.
    pub fn fault(&self, gpa: Gpa) -> Fault {
        let page = gpa.page();
        if self.regions.at(page).is_none() {
            self.counters.outside(1);
            return Fault::Outside;
        }
        let walk = Walk::record(&self.tree, GpaRange::of(page, page + 1));
        let (changed, _) = self.tree.toggle(walk, Toggle::OffOrWhole);
        // Marked after: a harvest between a mark and the release would clean the page, and the write
        // that is tried again after this would be seen by nobody.
        self.mark(gpa, 1, Source::Fault);
        changed.interval.map_or(Fault::Open, Fault::Released)
    }
}
