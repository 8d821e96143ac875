//! Counts the events of a proof, so that a proof that exercises too little fails.

use std::collections::BTreeMap;
use std::fmt;

use crate::oracle::Access;
use crate::oracle::model::{Failure, Fault, Shape};
use crate::oracle::proof::ACCESSES;

/// Number of combinations of read, write and execute.
const ALL_PERMISSIONS: usize = 8;

/// Event of a proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// An operation of this name succeeded.
    Done(&'static str),
    /// An operation failed in this way, regardless of the page.
    Failed(Failure),
    /// A leaf was split.
    Split,
    /// A table became a leaf of this level.
    Collapsed(u32),
    /// The machine allowed an access.
    Allowed(Access),
    /// The machine allowed an access through a leaf of this level.
    AllowedAt(u32),
    /// The machine found no leaf for an access.
    Absent(Access),
    /// The machine found an absent entry at this level.
    AbsentAt(u32),
    /// A leaf refused an access.
    Refused(Access),
    /// A leaf of this level refused an access.
    RefusedAt(u32),
    /// The machine set the dirty flag of a leaf of this level.
    Dirtied(u32),
    /// An access in the highest GiB was allowed.
    High,
    /// A page was recorded dirty.
    Cleaned,
    /// An operation of this name succeeded on tracked leaves.
    OnTracked(&'static str),
    /// A table of tracked leaves became a leaf of this level.
    CollapsedTracked(u32),
    /// A leaf of this level refused a write because writes are tracked.
    Withheld(u32),
    /// A write fault released one page.
    Released,
    /// A write fault released a leaf that could not be split.
    ReleasedLarge,
    /// A write fault was on a writable page.
    FaultWritable,
    /// A write fault was on a read-only page.
    FaultDenied,
    /// A write fault was on an unmapped page.
    FaultAbsent,
    /// The machine allowed a write that it had refused before.
    Resumed,
    /// The machine refused a write to the neighbour of a released page.
    StillTracked,
}

impl Event {
    /// Returns the event for the cause of a write fault.
    pub(super) const fn of_fault(fault: &Fault) -> Self {
        match fault {
            Fault::Released(pages) if pages.end - pages.start == 1 => Self::Released,
            Fault::Released(_) => Self::ReleasedLarge,
            Fault::Writable => Self::FaultWritable,
            Fault::Denied => Self::FaultDenied,
            Fault::Absent => Self::FaultAbsent,
        }
    }
}

/// Numbers of events.
#[derive(Default)]
pub(super) struct Seen(BTreeMap<Event, u64>);

impl Seen {
    pub(super) fn add(&mut self, event: Event, times: u64) {
        if times > 0 {
            *self.0.entry(event).or_default() += times;
        }
    }

    /// Returns the events that occurred too rarely for a table of this shape.
    pub(super) fn too_rare(&self, shape: &Shape) -> Vec<Event> {
        let often = often(shape).into_iter().map(|event| (event, 10));
        let sometimes = sometimes(shape).into_iter().map(|event| (event, 1));
        let mut rare: Vec<_> = often.chain(sometimes).collect();
        rare.retain(|(event, least)| self.0.get(event).unwrap_or(&0) < least);
        rare.into_iter().map(|(event, _)| event).collect()
    }
}

/// Returns the events that must occur often.
fn often(shape: &Shape) -> Vec<Event> {
    let levels = 0..=shape.largest_leaf;
    let changes = ["unmap", "protect", "split", "collapse", "clean"];
    let tracking = ["track_writes", "untrack_writes", "write_fault"];
    let mut events = vec![
        Event::Split,
        Event::Cleaned,
        Event::Released,
        Event::FaultWritable,
        Event::FaultDenied,
        Event::FaultAbsent,
        Event::Resumed,
        Event::StillTracked,
    ];
    events.extend(["map", "age"].map(Event::Done));
    events.extend(changes.map(Event::Done));
    events.extend(changes.map(Event::OnTracked));
    events.extend(tracking.map(Event::Done));
    events.extend(tracking.map(Event::OnTracked));
    events.extend(ACCESSES.map(Event::Allowed));
    events.extend(ACCESSES.map(Event::Refused));
    events.extend(ACCESSES.map(Event::Absent));
    events.extend(levels.clone().map(Event::AllowedAt));
    events.extend(levels.clone().map(Event::RefusedAt));
    events.extend(levels.map(Event::Withheld));
    events
}

/// Returns the events that must occur.
fn sometimes(shape: &Shape) -> Vec<Event> {
    let mut events = vec![
        Event::High,
        Event::Failed(Failure::NotOpen),
        Event::Failed(Failure::Beyond),
        Event::Failed(Failure::Memory),
        Event::Failed(Failure::Address),
        Event::Failed(Failure::Occupied(0)),
        Event::Failed(Failure::Exhausted(0)),
        Event::OnTracked("age"),
        Event::ReleasedLarge,
    ];
    if shape.permissions.len() < ALL_PERMISSIONS {
        events.push(Event::Failed(Failure::Permissions));
    }
    events.extend((0..shape.root_level).map(Event::AbsentAt));
    events.extend((0..=shape.largest_leaf).map(Event::Dirtied));
    events.extend((1..=shape.largest_leaf).map(Event::Collapsed));
    events.extend((1..=shape.largest_leaf).map(Event::CollapsedTracked));
    events
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (event, times) in &self.0 {
            writeln!(f, "{times:9} {event:?}")?;
        }
        Ok(())
    }
}
