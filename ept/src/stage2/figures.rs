//! Figures that a table keeps.

/// Figures of a [`Stage2`](crate::stage2::Stage2) since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Huge leaves that were split.
    pub splits: u64,
    /// Tables that became huge leaves.
    pub collapses: u64,
    /// Write faults that gave a page back to the guest.
    pub faults: u64,
    /// The longest time for which one change held its range, in nanoseconds. 0 without a clock
    /// ([`Stage2::with_clock`](crate::stage2::Stage2::with_clock)).
    pub longest_turn_ns: u64,
}

impl Figures {
    /// The figures of both.
    pub(super) fn add(&mut self, more: &Self) {
        let Self {
            splits,
            collapses,
            faults,
            longest_turn_ns,
        } = more;
        self.splits += splits;
        self.collapses += collapses;
        self.faults += faults;
        self.longest_turn_ns = self.longest_turn_ns.max(*longest_turn_ns);
    }
}
