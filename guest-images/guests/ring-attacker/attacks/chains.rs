//! Invalid descriptor chains and available rings (2.7.5, 2.7.6).

use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::Result;
use crate::dma::scratch;
use crate::queue::Part;
use crate::spec::{FIRST_DEVICE, Kind, descriptor};

const fn attack(name: &'static str, run: fn(&mut Case<'_>) -> Result<Outcome>) -> Attack {
    Attack {
        name,
        on: Targets::EveryQueue,
        expected: Outcome::NeedsReset,
        run,
    }
}

pub(super) const ATTACKS: [Attack; 19] = [
    attack("chain-next-is-itself", |case| links(case, &[0])),
    attack("chain-cycle-of-three", |case| links(case, &[1, 2, 0])),
    attack("chain-next-out-of-range", |case| {
        let size = case.device.queues[case.queue].size;
        links(case, &[size])
    }),
    attack("chain-next-is-the-largest", |case| links(case, &[u16::MAX])),
    attack("head-out-of-range", |case| {
        let size = case.device.queues[case.queue].size;
        head(case, size)
    }),
    attack("head-is-the-largest", |case| head(case, u16::MAX)),
    attack("available-index-too-far", |case| {
        let size = case.device.queues[case.queue].size;
        available_index(case, size + 1)
    }),
    attack("available-index-backwards", |case| {
        available_index(case, u16::MAX)
    }),
    attack("length-is-the-largest", |case| {
        descriptor(case, scratch(), u32::MAX)
    }),
    attack("length-is-none", |case| descriptor(case, scratch(), 0)),
    attack("address-behind-memory", |case| {
        descriptor(case, case.memory_end, 16)
    }),
    attack("address-across-the-end", |case| {
        descriptor(case, case.memory_end - 8, 16)
    }),
    attack("address-in-the-hole", |case| {
        let between = (case.memory_end + FIRST_DEVICE) / 2;
        descriptor(case, between, 16)
    }),
    attack("address-of-registers", |case| {
        descriptor(case, case.device.base, 16)
    }),
    attack("address-wraps", |case| descriptor(case, u64::MAX - 7, 16)),
    attack("address-of-the-last-page", |case| {
        descriptor(case, u64::MAX - 4095, 16)
    }),
    attack("address-above-physical", |case| {
        descriptor(case, 1 << 52, 16)
    }),
    attack("readable-behind-writable", |case| {
        chain(case, &[Part::into(scratch(), 64), Part::out(scratch(), 64)])
    }),
    Attack {
        on: Targets::EveryServedQueue,
        ..attack("wrong-direction", wrong_direction)
    },
];

/// Makes a chain available whose descriptors, from 0 on, have the given `next` fields.
fn links(case: &mut Case<'_>, next: &[u16]) -> Result<Outcome> {
    case.start()?;
    let part = case.good_part();
    for (index, next) in (0..).zip(next) {
        case.device.queues[case.queue].describe(index, part, Some(*next));
    }
    published(case, 0)
}

/// Makes a valid chain available under another head.
fn head(case: &mut Case<'_>, head: u16) -> Result<Outcome> {
    case.start()?;
    let part = case.good_part();
    case.device.queues[case.queue].chain(0, &[part]);
    published(case, head)
}

/// Sets the index of the available ring to a wrong value.
fn available_index(case: &mut Case<'_>, index: u16) -> Result<Outcome> {
    case.start()?;
    let part = case.good_part();
    case.device.queues[case.queue].chain(0, &[part]);
    case.device.queues[case.queue].set_available_index(index);
    case.provoke();
    case.verdict()
}

/// Makes a chain of one descriptor available.
fn descriptor(case: &mut Case<'_>, address: u64, bytes: u32) -> Result<Outcome> {
    let part = case.part(address, bytes);
    chain(case, &[part])
}

/// Makes a chain available and returns the reaction of the device.
pub(super) fn chain(case: &mut Case<'_>, parts: &[Part]) -> Result<Outcome> {
    case.start()?;
    case.device.queues[case.queue].chain(0, parts);
    published(case, 0)
}

/// Makes a chain available with valid memory of the wrong direction: writable where the device reads, or readable where
/// it writes. A request to a block device has both directions; here its status cannot be written.
fn wrong_direction(case: &mut Case<'_>) -> Result<Outcome> {
    let part = match case.device.kind {
        Kind::Block => case.good_part(),
        _ => Part {
            flags: case.good_part().flags ^ descriptor::WRITE,
            ..case.good_part()
        },
    };
    chain(case, &[part])
}

/// Makes the chain at `head` available and returns the reaction of the device.
fn published(case: &mut Case<'_>, head: u16) -> Result<Outcome> {
    case.device.queues[case.queue].publish(head);
    case.provoke();
    case.verdict()
}
