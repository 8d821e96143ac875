//! What is owed to the hardware after a change.

use core::fmt;

use crate::addr::GpaRange;
use crate::format::HardwareFormat;
use crate::stage2::pool::Chain;
use crate::stage2::{Stage2, Tally};

/// Translations that hardware may still have cached, and the tables that they came from.
///
/// Invalidate what [`Flush::interval`] names (INVEPT or INVVPID, a new ASID, TLBI IPAS2E1IS, HFENCE.GVMA), then
/// call [`Flush::done`]. Dropped instead, the tables in it stay out of use for ever.
#[must_use = "the interval is to be flushed before the notifier range closes; then call `done`"]
pub struct Flush<'t, 'm, F> {
    stage2: &'t Stage2<'m, F>,
    interval: Option<GpaRange>,
    tally: Tally,
    detached: Chain,
}

impl<'t, 'm, F: HardwareFormat> Flush<'t, 'm, F> {
    pub(super) fn nothing(stage2: &'t Stage2<'m, F>) -> Self {
        Self {
            stage2,
            interval: None,
            tally: Tally::default(),
            detached: Chain::EMPTY,
        }
    }

    /// The smallest range with everything that was changed; none where nothing was.
    pub fn interval(&self) -> Option<GpaRange> {
        self.interval
    }

    /// What was changed.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Tables that wait for the flush.
    pub fn tables(&self) -> usize {
        self.detached.len()
    }

    /// The hardware has forgotten the interval: the tables may be used again.
    pub fn done(self) {
        self.stage2.pool.give_back(self.detached);
    }

    /// One entry was changed, which maps `span`.
    pub(super) fn changed(&mut self, span: GpaRange) {
        self.tally.entries += 1;
        self.touched(span);
    }

    /// A huge leaf was replaced by a table that says the same.
    pub(super) fn split(&mut self, span: GpaRange) {
        self.tally.splits += 1;
        self.touched(span);
    }

    /// The last split did not come about, for want of a table.
    pub(super) fn not_split(&mut self) {
        self.tally.splits = self.tally.splits.saturating_sub(1);
    }

    pub(super) fn detached(&mut self) -> &mut Chain {
        &mut self.detached
    }

    fn touched(&mut self, span: GpaRange) {
        self.interval = Some(self.interval.map_or(span, |old| old.hull(&span)));
    }
}

impl<F> fmt::Debug for Flush<'_, '_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flush")
            .field("interval", &self.interval)
            .field("tally", &self.tally)
            .field("tables", &self.detached.len())
            .finish_non_exhaustive()
    }
}
