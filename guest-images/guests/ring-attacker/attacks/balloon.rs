//! Invalid page lists for the balloon (5.5.6).

use super::chains::chain;
use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::{BUFFER_BYTES, Result};
use crate::dma::{scratch, store};
use crate::queue::Part;
use crate::spec::{FIRST_DEVICE, Kind};

const ENTRY_BYTES: u32 = 4;
/// Maximum number of pages in a list that the device accepts. The specification sets no limit; Linux uses 256.
const PAGES_MOST: u32 = 16_384;

const fn attack(
    name: &'static str,
    expected: Outcome,
    run: fn(&mut Case<'_>) -> Result<Outcome>,
) -> Attack {
    Attack {
        name,
        on: Targets::OnlyQueue(Kind::Balloon, 0),
        expected,
        run,
    }
}

pub(super) const ATTACKS: [Attack; 10] = [
    attack("page-behind-memory", Outcome::NeedsReset, |case| {
        pages(case, 1, page_of(case.memory_end))
    }),
    attack("page-of-registers", Outcome::NeedsReset, |case| {
        pages(case, 1, page_of(FIRST_DEVICE))
    }),
    attack("page-the-largest", Outcome::NeedsReset, |case| {
        pages(case, 1, u32::MAX)
    }),
    attack("pages-good-then-bad", Outcome::NeedsReset, |case| {
        // Only the need of a reset is checked, not the contents of the first page.
        store(scratch() + 4, u32::MAX);
        store(scratch(), page_of(scratch() + 0x4000));
        chain(case, &[Part::out(scratch(), 2 * ENTRY_BYTES)])
    }),
    attack("page-number-in-half", Outcome::NeedsReset, |case| {
        chain(case, &[Part::out(scratch(), ENTRY_BYTES - 1)])
    }),
    attack("pages-too-many", Outcome::NeedsReset, |case| {
        pages(case, PAGES_MOST + 1, page_of(free_page()))
    }),
    attack("pages-of-a-megabyte", Outcome::NeedsReset, |case| {
        pages(case, (1 << 20) / ENTRY_BYTES, page_of(free_page()))
    }),
    attack("page-again-and-again", Outcome::Served, |case| {
        pages(case, PAGES_MOST, page_of(free_page()))
    }),
    Attack {
        on: Targets::OnlyQueue(Kind::Balloon, 1),
        ..attack("taken-back-that-is-not", Outcome::Served, |case| {
            pages(case, 256, u32::MAX)
        })
    },
    Attack {
        on: Targets::OnlyQueue(Kind::Balloon, 2),
        ..attack("report-of-a-part-of-a-page", Outcome::Served, |case| {
            let parts = [Part::into(free_page() + 1, 4094), Part::into(scratch(), 1)];
            store(scratch(), 0x77_u8);
            store(free_page() + 100, 0x77_u8);
            let outcome = chain(case, &parts)?;
            let kept = [scratch(), free_page() + 100].map(crate::dma::load::<u8>);
            crate::device::ensure(kept == [0x77; 2], "a part of a page was given away")?;
            Ok(outcome)
        })
    },
];

fn page_of(address: u64) -> u32 {
    (address / u64::from(BUFFER_BYTES)) as u32
}

/// Returns the address of a page after the longest list.
fn free_page() -> u64 {
    scratch() + (3 << 19)
}

/// Sends a list that contains `page` `count` times.
fn pages(case: &mut Case<'_>, count: u32, page: u32) -> Result<Outcome> {
    for index in 0..u64::from(count) {
        store(scratch() + index * u64::from(ENTRY_BYTES), page);
    }
    chain(case, &[Part::out(scratch(), count * ENTRY_BYTES)])
}
