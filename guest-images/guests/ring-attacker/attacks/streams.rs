//! Very large requests that are valid.

use super::chains::chain;
use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::{Result, ensure};
use crate::dma::{fill, is_filled, scratch, store};
use crate::queue::Part;
use crate::spec::Kind;

const MEGABYTE: u32 = 1 << 20;
/// More bytes than an entropy device returns at once.
const PLENTY: u64 = 1 << 16;

pub(super) const ATTACKS: [Attack; 3] = [
    Attack {
        name: "entropy-of-a-megabyte",
        on: Targets::Only(Kind::Rng),
        expected: Outcome::Served,
        run: |case| entropy(case, MEGABYTE),
    },
    Attack {
        name: "entropy-of-all-memory",
        on: Targets::Only(Kind::Rng),
        expected: Outcome::Served,
        run: |case| {
            let all = (case.memory_end - scratch()).min(1 << 31);
            entropy(case, all as u32)
        },
    },
    Attack {
        name: "output-of-a-megabyte",
        on: Targets::OnlyQueue(Kind::Console, 1),
        expected: Outcome::Served,
        run: |case| {
            fill(scratch(), b'x', MEGABYTE.into());
            store(scratch() + u64::from(MEGABYTE) - 1, b'\n');
            chain(case, &[Part::out(scratch(), MEGABYTE)])
        },
    },
];

/// Requests random bytes. The device may return fewer bytes, and must report their number.
fn entropy(case: &mut Case<'_>, bytes: u32) -> Result<Outcome> {
    case.device.start(None)?;
    fill(scratch(), 0, PLENTY);
    let got = case.device.request(0, &[Part::into(scratch(), bytes)])?;
    let got = u64::from(got);
    ensure((1..PLENTY).contains(&got), "as many as cannot be")?;
    ensure(
        is_filled(scratch() + got, 0, PLENTY - got),
        "more random bytes than it says",
    )?;
    case.lives_on()?;
    Ok(Outcome::Served)
}
