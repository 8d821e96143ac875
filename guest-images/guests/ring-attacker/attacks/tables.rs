//! Invalid indirect descriptor tables (2.7.5.3).

use super::chains::chain;
use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::Result;
use crate::dma::scratch;
use crate::queue::{Part, describe};
use crate::spec::{Kind, descriptor, feature};

/// More descriptors than any queue has.
const TOO_MANY: u16 = 1025;
/// Maximum number of descriptors with which the total length of a chain can exceed 2^32 bytes while the chain is not too
/// long.
const MOST: u64 = 1000;

const fn attack(name: &'static str, run: fn(&mut Case<'_>) -> Result<Outcome>) -> Attack {
    Attack {
        name,
        on: Targets::EveryQueue,
        expected: Outcome::NeedsReset,
        run,
    }
}

pub(super) const ATTACKS: [Attack; 13] = [
    attack("table-in-a-table", |case| {
        let inner = scratch() + 0x1000;
        describe(inner, 0, case.good_part(), None);
        describe(table(), 0, Part::table(inner, descriptor::BYTES), None);
        through(case, table(), descriptor::BYTES)
    }),
    attack("table-of-odd-length", |case| {
        describe(table(), 0, case.good_part(), None);
        through(case, table(), descriptor::BYTES + 8)
    }),
    attack("table-of-no-length", |case| through(case, table(), 0)),
    attack("table-of-65536", |case| {
        describe(table(), 0, case.good_part(), None);
        through(case, table(), descriptor::BYTES << 16)
    }),
    attack("table-behind-memory", |case| {
        through(case, case.memory_end, descriptor::BYTES)
    }),
    attack("table-across-the-end", |case| {
        let at = case.memory_end - u64::from(descriptor::BYTES);
        describe(at, 0, case.good_part(), Some(1));
        through(case, at, 2 * descriptor::BYTES)
    }),
    attack("table-wraps", |case| {
        through(case, u64::MAX - 15, 2 * descriptor::BYTES)
    }),
    attack("table-of-registers", |case| {
        through(case, case.device.base, 2 * descriptor::BYTES)
    }),
    attack("table-cycle", |case| {
        describe(table(), 0, case.good_part(), Some(1));
        describe(table(), 1, case.good_part(), Some(0));
        through(case, table(), 2 * descriptor::BYTES)
    }),
    attack("table-next-out-of-range", |case| {
        describe(table(), 0, case.good_part(), Some(2));
        through(case, table(), 2 * descriptor::BYTES)
    }),
    attack("chain-longer-than-any-queue", |case| {
        repeated(case, case.good_part(), TOO_MANY)
    }),
    attack("length-sum-above-4-gib", |case| {
        let bytes = case.memory_end.min(1 << 31);
        let count = ((1 << 32) / bytes + 1).min(MOST);
        repeated(case, case.part(0, bytes as u32), count as u16)
    }),
    // The feature restricts the driver. The device accepts tables without it.
    Attack {
        name: "table-without-the-feature",
        on: Targets::Only(Kind::Rng),
        expected: Outcome::Served,
        run: |case| {
            let features = case.device.choice() & !feature::INDIRECT_DESC;
            case.device.start_with(features, None)?;
            describe(table(), 0, case.good_part(), None);
            case.device.queues[0].chain(0, &[Part::table(table(), descriptor::BYTES)]);
            case.device.queues[0].publish(0);
            case.provoke();
            case.verdict()
        },
    },
];

/// Returns the address of the table, after the memory that its descriptors refer to.
fn table() -> u64 {
    scratch() + 0x2000
}

/// Makes a chain available that consists of an indirect table.
fn through(case: &mut Case<'_>, table: u64, bytes: u32) -> Result<Outcome> {
    chain(case, &[Part::table(table, bytes)])
}

/// Makes a table available that contains the same descriptor `count` times.
fn repeated(case: &mut Case<'_>, part: Part, count: u16) -> Result<Outcome> {
    for index in 0..count {
        let next = (index + 1 < count).then_some(index + 1);
        describe(table(), index, part, next);
    }
    through(case, table(), u32::from(count) * descriptor::BYTES)
}
