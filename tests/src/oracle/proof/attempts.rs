//! Generates the operations of a proof, some of which must fail.

use ept::format::Permissions;

use crate::oracle::model::{Attributes, Leaf, Model, Operation, Pages, pages};
use crate::oracle::proof::PAGE_SHIFT;
use crate::oracle::proof::chance::Chance;
use crate::oracle::proof::ground::{
    GIB, Ground, MIB2, Place, is_large, page_in, small_range, within,
};

/// Number of free tables below which parts of the ground are sometimes unmapped, so that not every operation fails.
const SCARCE: u64 = 24;

/// Operation, and the notifier range that is open during it.
pub(super) struct Attempt {
    pub(super) operation: Operation,
    pub(super) open: Pages,
}

impl Attempt {
    /// Returns an attempt with the range of the operation open.
    pub(super) fn new(operation: Operation) -> Self {
        let open = operation.range().clone();
        Self { operation, open }
    }
}

/// Flaw that makes an operation fail.
#[derive(Clone, Copy)]
enum Flaw {
    NotOpen,
    Beyond,
    Permissions,
    Memory,
    Misaligned,
    TooHigh,
}

impl Ground {
    /// Returns the next operations, usually one.
    pub(super) fn attempts(&self, chance: &mut Chance, model: &Model) -> Vec<Attempt> {
        let operations = if model.free() < SCARCE && chance.one_in(4) {
            vec![self.clearing(chance)]
        } else if model.free() == 0 && !chance.one_in(4) {
            self.fault_without_tables(chance, model)
        } else {
            self.operations(chance, model)
        };
        let attempt = |operation| self.attempt(chance, operation);
        operations.into_iter().map(attempt).collect()
    }

    fn operations(&self, chance: &mut Chance, model: &Model) -> Vec<Operation> {
        let range = self.range(chance);
        let one = match chance.below(26) {
            0..=6 => return self.mapping(chance),
            7 | 8 => Operation::Unmap { range },
            9..=12 => Operation::Protect {
                range,
                permissions: *chance.pick(self.shape.permissions),
            },
            13 | 14 => return self.splitting(chance, range),
            15 | 16 => self.collapsing(chance, range),
            17 | 18 => Operation::Clean { range },
            19 => Operation::Age { range },
            20 | 21 => return self.tracking(chance, range),
            22 => Operation::UntrackWrites { range },
            _ => self.write_fault(chance, model),
        };
        vec![one]
    }

    /// Begins to track writes. Sometimes a write fault on one page follows, which prevents a collapse until the
    /// tracking ends.
    fn tracking(&self, chance: &mut Chance, range: Pages) -> Vec<Operation> {
        let track = Operation::TrackWrites {
            range: range.clone(),
        };
        if !chance.one_in(3) {
            return vec![track];
        }
        let page = range.start + within(chance, range.end - range.start);
        let collapse = Operation::Collapse {
            range: self.place_of(&range),
            to: 1,
        };
        let untrack = Operation::UntrackWrites { range };
        vec![track, fault(page), collapse.clone(), untrack, collapse]
    }

    /// Returns a write fault, in about half of the cases on a tracked page.
    fn write_fault(&self, chance: &mut Chance, model: &Model) -> Operation {
        let place = chance.pick(&self.places);
        let page = page_in(chance, place);
        if chance.one_in(2) {
            return fault(page);
        }
        let mut behind = model.leaves(page..place.range.end);
        let tracked = behind.find(|(_, leaf)| leaf.tracked);
        let page = tracked.map_or(page, |(first, leaf)| {
            page.max(first + within(chance, pages(leaf.level)))
        });
        fault(page)
    }

    /// Returns a write fault on a writable leaf that cannot be split, if there is one.
    fn fault_without_tables(&self, chance: &mut Chance, model: &Model) -> Vec<Operation> {
        let place = chance.pick(&self.places);
        let mut leaves = model.leaves(place.range.clone());
        let is_right =
            |(_, leaf): &(u64, Leaf)| leaf.level > 0 && leaf.permissions.allows(Permissions::WRITE);
        let Some((first, leaf)) = leaves.find(is_right) else {
            return Vec::new();
        };
        let range = first..first + pages(leaf.level);
        let page = first + within(chance, pages(leaf.level));
        vec![Operation::TrackWrites { range }, fault(page)]
    }

    /// Maps a leaf of each level from 2 MiB on, a tracked leaf of each, and one in the highest GiB, some of them by a
    /// collapse. Without this, large leaves would be rare, because nearly all operations split them.
    pub(super) fn large_leaves(&self, chance: &mut Chance) -> Vec<Attempt> {
        let ranges = self.places.iter().map(|place| place.range.clone());
        let free: Vec<_> = ranges.filter(|one| !self.meets_reserved(one)).collect();
        let range = chance.pick(&free).clone();
        // Otherwise no table may be left for splitting.
        let mut operations = vec![Operation::Unmap { range }];
        for level in 2..=self.shape.largest_leaf {
            let places = self.places.iter().filter(|place| place.level == level);
            let mut places: Vec<_> = places.collect();
            let first = chance.below(places.len() as u64);
            places.rotate_left(usize::try_from(first).unwrap_or(0));
            for (place, tracked) in places.iter().zip([false, true]) {
                let (range, hpa) = self.span(chance, place, level);
                operations.extend(self.large_leaf(chance, &range, hpa, level, tracked));
            }
            // Only leaves of 1 GiB have more than one place.
            if let [_, _, third, ..] = places[..] {
                operations.extend(self.leaves_of_2_mib(chance, third));
            }
        }
        if self.shape.largest_leaf >= 2 {
            let (range, hpa) = (self.end - GIB..self.end, self.frames.start / GIB * GIB);
            operations.extend(self.large_leaf(chance, &range, hpa, 2, false));
        }
        operations.into_iter().map(Attempt::new).collect()
    }

    /// Maps a tracked leaf and an untracked one.
    fn leaves_of_2_mib(&self, chance: &mut Chance, place: &Place) -> Vec<Operation> {
        let mut operations = Vec::new();
        for (stretch, tracked) in [(3, false), (4, true)] {
            let start = place.range.start + stretch * MIB2;
            let range = start..start + MIB2;
            let hpa = self.frames.start + chance.below(self.frame_count() as u64 / MIB2) * MIB2;
            operations.extend(self.large_leaf(chance, &range, hpa, 1, tracked));
        }
        operations
    }

    /// Maps a leaf, unless the machine needs pages there.
    fn large_leaf(
        &self,
        chance: &mut Chance,
        range: &Pages,
        hpa: u64,
        level: u32,
        tracked: bool,
    ) -> Vec<Operation> {
        if self.meets_reserved(range) {
            return Vec::new();
        }
        let mut attributes = Attributes {
            largest: level,
            ..self.attributes(chance, range)
        };
        if tracked || chance.one_in(2) {
            attributes.permissions = self.writable(chance);
        }
        let unmap = Operation::Unmap {
            range: range.clone(),
        };
        let mut operations = vec![unmap, map(range, hpa, attributes)];
        let track = tracked.then(|| Operation::TrackWrites {
            range: range.clone(),
        });
        if !chance.one_in(if tracked { 4 } else { 2 }) {
            let largest = level - 1;
            operations.push(Operation::Split {
                range: range.clone(),
                largest,
            });
            operations.extend(track);
            operations.push(Operation::Collapse {
                range: range.clone(),
                to: level,
            });
        } else {
            operations.extend(track);
        }
        operations
    }

    fn clearing(&self, chance: &mut Chance) -> Operation {
        let range = chance.pick(&self.places).range.clone();
        Operation::Unmap { range }
    }

    /// Returns a split, sometimes followed by a collapse.
    fn splitting(&self, chance: &mut Chance, range: Pages) -> Vec<Operation> {
        // Splitting a GiB into 4 KiB leaves takes more tables than there are.
        let lowest = u32::from(is_large(&range) && !chance.one_in(8));
        let levels = self.shape.largest_leaf.saturating_sub(lowest).max(1);
        let largest = lowest + level_below(chance, levels);
        let split = Operation::Split {
            range: range.clone(),
            largest,
        };
        match chance.below(6) {
            0 => vec![split, self.collapsing(chance, range)],
            1 => vec![split, self.collapsing(chance, self.place_of(&range))],
            _ => vec![split],
        }
    }

    fn collapsing(&self, chance: &mut Chance, range: Pages) -> Operation {
        let to = 1 + level_below(chance, self.shape.largest_leaf + 1);
        Operation::Collapse { range, to }
    }

    /// Returns a map operation. It fails if a page is mapped already, so large ranges are often unmapped before.
    fn mapping(&self, chance: &mut Chance) -> Vec<Operation> {
        let place = chance.pick(&self.places);
        let (range, hpa) = if chance.one_in(2) {
            let level = *chance.pick(&[2, place.level]);
            self.span(chance, place, level)
        } else {
            let range = small_range(chance, place);
            let hpa = self.frames_for(chance, &range);
            (range, hpa)
        };
        let mut operations = Vec::new();
        if is_large(&range) && !chance.one_in(4) {
            let range = range.clone();
            operations.push(Operation::Unmap { range });
        }
        operations.push(map(&range, hpa, self.attributes(chance, &range)));
        if chance.one_in(3) {
            operations.push(Operation::TrackWrites { range });
        }
        operations
    }

    fn attributes(&self, chance: &mut Chance, range: &Pages) -> Attributes {
        let memory = if chance.one_in(8) {
            *chance.pick(self.shape.memory)
        } else {
            self.shape.memory[0]
        };
        // A level above the highest one is valid, too.
        let largest = if chance.one_in(2) {
            self.shape.largest_leaf + level_below(chance, 2)
        } else {
            let lowest = u32::from(is_large(range) && !chance.one_in(8));
            lowest + level_below(chance, self.shape.largest_leaf)
        };
        Attributes {
            permissions: *chance.pick(self.shape.permissions),
            memory,
            largest,
        }
    }

    /// Returns the first of this number of frames, mostly aligned for leaves of 2 MiB.
    fn frames_for(&self, chance: &mut Chance, range: &Pages) -> u64 {
        let room = self.frames.end - self.frames.start - (range.end - range.start);
        let offset = chance.below(room - MIB2);
        if chance.one_in(4) {
            self.frames.start + offset
        } else {
            self.frames.start + offset / MIB2 * MIB2 + range.start % MIB2
        }
    }

    /// Returns the operation as an attempt, now and then with a flaw.
    fn attempt(&self, chance: &mut Chance, operation: Operation) -> Attempt {
        let mut attempt = Attempt::new(self.sparing(chance, operation));
        if chance.one_in(10) {
            let flaw = *chance.pick(&[
                Flaw::NotOpen,
                Flaw::Beyond,
                Flaw::Permissions,
                Flaw::Memory,
                Flaw::Misaligned,
                Flaw::TooHigh,
            ]);
            self.spoil(chance, &mut attempt, flaw);
        }
        attempt
    }

    /// Moves the operation to a range without the pages that the machine needs.
    fn sparing(&self, chance: &mut Chance, mut operation: Operation) -> Operation {
        let takes_away = matches!(
            operation,
            Operation::Unmap { .. } | Operation::Protect { .. } | Operation::TrackWrites { .. }
        );
        while takes_away && self.meets_reserved(operation.range()) {
            operation = operation.at(self.range(chance));
        }
        operation
    }

    /// Adds a flaw to an attempt, if the operation can have it.
    fn spoil(&self, chance: &mut Chance, attempt: &mut Attempt, flaw: Flaw) {
        let range = attempt.operation.range().clone();
        match (flaw, &mut attempt.operation) {
            (Flaw::NotOpen, _) => attempt.open = range.end..range.end + 1,
            (Flaw::Beyond, operation) => {
                let end = self.shape.end();
                let beyond = end - chance.below(3)..end + 1 + chance.below(GIB);
                *operation = operation.clone().at(beyond.clone());
                attempt.open = beyond;
            }
            (Flaw::Permissions, Operation::Map { attributes, .. }) => {
                attributes.permissions = self.refused_permissions(chance);
            }
            (Flaw::Permissions, Operation::Protect { permissions, .. }) => {
                *permissions = self.refused_permissions(chance);
            }
            (Flaw::Memory, Operation::Map { attributes, .. }) => {
                attributes.memory = self.shape.no_memory;
            }
            (Flaw::Misaligned, Operation::Map { hpa, .. }) => *hpa += 8,
            (Flaw::TooHigh, Operation::Map { hpa, .. }) => {
                let all_but_last = (range.end - range.start - 1) << PAGE_SHIFT;
                *hpa = (1 << self.shape.hpa_bits) - all_but_last;
            }
            (Flaw::Permissions | Flaw::Memory | Flaw::Misaligned | Flaw::TooHigh, _) => {}
        }
    }

    /// Returns permissions that include the write permission.
    fn writable(&self, chance: &mut Chance) -> Permissions {
        let all = self.shape.permissions.iter();
        let writable = all.filter(|one| one.allows(Permissions::WRITE));
        **chance.pick(&writable.collect::<Vec<_>>())
    }

    /// Returns permissions that the format does not have, or any permissions if it has all.
    fn refused_permissions(&self, chance: &mut Chance) -> Permissions {
        let refused: Vec<_> = all_permissions()
            .filter(|one| !self.shape.permissions.contains(one))
            .collect();
        if refused.is_empty() {
            *chance.pick(self.shape.permissions)
        } else {
            *chance.pick(&refused)
        }
    }
}

fn map(range: &Pages, host_page: u64, attributes: Attributes) -> Operation {
    Operation::Map {
        range: range.clone(),
        hpa: host_page << PAGE_SHIFT,
        attributes,
    }
}

const fn fault(page: u64) -> Operation {
    Operation::WriteFault {
        range: page..page + 1,
    }
}

fn level_below(chance: &mut Chance, end: u32) -> u32 {
    u32::try_from(chance.below(end.into())).unwrap_or(0)
}

/// All combinations of permissions.
fn all_permissions() -> impl Iterator<Item = Permissions> {
    let one = [Permissions::READ, Permissions::WRITE, Permissions::EXECUTE];
    (0..8_usize).map(move |bits| {
        let set = (0..3).filter(|index| bits >> index & 1 == 1);
        set.fold(Permissions::NONE, |all, index| all.union(one[index]))
    })
}
