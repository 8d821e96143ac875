//! What a proof has met: a run that does nothing must not pass for one that finds nothing.

use std::collections::BTreeMap;
use std::fmt;

use crate::oracle::Access;
use crate::oracle::model::{Failure, Shape};
use crate::oracle::proof::ACCESSES;

/// Combinations of read, write and execute.
const ALL_PERMISSIONS: usize = 8;

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// An operation of this name was done.
    Done(&'static str),
    /// An operation failed, whatever the page was.
    Failed(Failure),
    /// A leaf was split.
    Split,
    /// A table became a leaf of this level.
    Collapsed(u32),
    /// The machine did an access.
    Allowed(Access),
    /// It did one through a leaf of this level.
    AllowedAt(u32),
    /// The machine found nothing for an access.
    Absent(Access),
    /// It found nothing at this level.
    AbsentAt(u32),
    /// A leaf refused an access.
    Refused(Access),
    /// A leaf of this level refused one.
    RefusedAt(u32),
    /// The machine made a leaf of this level dirty.
    Dirtied(u32),
    /// An access in the highest GiB was allowed.
    High,
    /// A page was recorded dirty.
    Cleaned,
}

/// How often.
#[derive(Default)]
pub(super) struct Seen(BTreeMap<Event, u64>);

impl Seen {
    pub(super) fn add(&mut self, event: Event, times: u64) {
        if times > 0 {
            *self.0.entry(event).or_default() += times;
        }
    }

    /// What has happened too seldom for a table of this shape.
    pub(super) fn too_rare(&self, shape: &Shape) -> Vec<Event> {
        let often = often(shape).into_iter().map(|event| (event, 10));
        let sometimes = sometimes(shape).into_iter().map(|event| (event, 1));
        let mut rare: Vec<_> = often.chain(sometimes).collect();
        rare.retain(|(event, least)| self.0.get(event).unwrap_or(&0) < least);
        rare.into_iter().map(|(event, _)| event).collect()
    }
}

/// What must happen often.
fn often(shape: &Shape) -> Vec<Event> {
    let levels = 0..=shape.largest_leaf;
    let operations = [
        "map", "unmap", "protect", "split", "collapse", "clean", "age",
    ];
    let mut events = vec![Event::Split, Event::Cleaned];
    events.extend(operations.map(Event::Done));
    events.extend(ACCESSES.map(Event::Allowed));
    events.extend(ACCESSES.map(Event::Refused));
    events.extend(ACCESSES.map(Event::Absent));
    events.extend(levels.clone().map(Event::AllowedAt));
    events.extend(levels.map(Event::RefusedAt));
    events
}

/// What must happen.
fn sometimes(shape: &Shape) -> Vec<Event> {
    let mut events = vec![
        Event::High,
        Event::Failed(Failure::NotOpen),
        Event::Failed(Failure::Beyond),
        Event::Failed(Failure::Memory),
        Event::Failed(Failure::Address),
        Event::Failed(Failure::Occupied(0)),
        Event::Failed(Failure::Exhausted(0)),
    ];
    if shape.permissions.len() < ALL_PERMISSIONS {
        events.push(Event::Failed(Failure::Permissions));
    }
    events.extend((0..shape.root_level).map(Event::AbsentAt));
    events.extend((0..=shape.largest_leaf).map(Event::Dirtied));
    events.extend((1..=shape.largest_leaf).map(Event::Collapsed));
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
