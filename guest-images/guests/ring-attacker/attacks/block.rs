//! Invalid requests to block devices (5.2.6).

use super::chains::chain;
use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::{Result, Trouble};
use crate::dma::{scratch, store};
use crate::operation::{SECTOR_BYTES, block};
use crate::queue::Part;
use crate::spec::Kind;

/// A sector that no operation uses.
const FOREIGN_SECTOR: u64 = 20;
/// Range of a discard or write-zeroes request: first sector, number of sectors, flags.
type Range = (u64, u32, u32);
const RANGE_BYTES: u32 = 16;
const UNMAP: u32 = 1;

const fn attack(
    name: &'static str,
    expected: Outcome,
    run: fn(&mut Case<'_>) -> Result<Outcome>,
) -> Attack {
    Attack {
        name,
        on: Targets::Only(Kind::Block),
        expected,
        run,
    }
}

pub(super) const ATTACKS: [Attack; 27] = [
    attack("type-unknown", Outcome::Unsupported, |case| {
        request(case, 0xdead_beef, 0, &[into(SECTOR_BYTES)])
    }),
    attack("read-behind-the-end", Outcome::IoError, |case| {
        request(case, block::READ, sectors(case), &[into(SECTOR_BYTES)])
    }),
    attack("read-across-the-end", Outcome::IoError, |case| {
        let last = sectors(case) - 1;
        request(case, block::READ, last, &[into(2 * SECTOR_BYTES)])
    }),
    attack("read-at-the-largest", Outcome::IoError, |case| {
        request(case, block::READ, u64::MAX, &[into(SECTOR_BYTES)])
    }),
    attack("read-whose-bytes-wrap", Outcome::IoError, |case| {
        request(case, block::READ, 1 << 55, &[into(SECTOR_BYTES)])
    }),
    attack("read-of-half-a-sector", Outcome::IoError, |case| {
        request(case, block::READ, 0, &[into(SECTOR_BYTES / 2)])
    }),
    attack("read-of-nothing", Outcome::IoError, |case| {
        request(case, block::READ, 0, &[])
    }),
    attack("read-of-a-megabyte-too-much", Outcome::IoError, |case| {
        let sector = sectors(case) - 1;
        request(case, block::READ, sector, &[into(1 << 20)])
    }),
    attack("write-behind-the-end", Outcome::IoError, |case| {
        request(case, block::WRITE, sectors(case), &[out(SECTOR_BYTES)])
    }),
    attack("write-across-the-end", Outcome::IoError, |case| {
        let last = sectors(case) - 1;
        request(case, block::WRITE, last, &[out(2 * SECTOR_BYTES)])
    }),
    attack("write-at-the-largest", Outcome::IoError, |case| {
        request(case, block::WRITE, u64::MAX, &[out(SECTOR_BYTES)])
    }),
    attack("write-of-half-a-sector", Outcome::IoError, |case| {
        request(case, block::WRITE, FOREIGN_SECTOR, &[out(SECTOR_BYTES / 2)])
    }),
    attack("discard-behind-the-end", Outcome::IoError, |case| {
        let end = sectors(case);
        ranges(case, block::DISCARD, &[(end, 1, 0)])
    }),
    attack("discard-that-wraps", Outcome::IoError, |case| {
        ranges(case, block::DISCARD, &[(u64::MAX, 2, 0)])
    }),
    attack("discard-of-the-most", Outcome::IoError, |case| {
        ranges(case, block::DISCARD, &[(0, u32::MAX, 0)])
    }),
    attack("discard-of-unknown-flags", Outcome::Unsupported, |case| {
        ranges(case, block::DISCARD, &[(FOREIGN_SECTOR, 1, 0x8000_0000)])
    }),
    // The device must check all ranges before it discards the first.
    attack("discard-good-then-bad", Outcome::IoError, |case| {
        let good = (FOREIGN_SECTOR, 1, 0);
        ranges(case, block::DISCARD, &[good, (u64::MAX, 1, 0)])
    }),
    attack("discard-of-too-many", Outcome::IoError, |case| {
        ranges(case, block::DISCARD, &[(FOREIGN_SECTOR, 1, 0); 33])
    }),
    attack("discard-of-half-a-range", Outcome::IoError, |case| {
        request(case, block::DISCARD, 0, &[out(RANGE_BYTES / 2)])
    }),
    attack("discard-of-nothing", Outcome::IoError, |case| {
        request(case, block::DISCARD, 0, &[])
    }),
    attack("zeroes-behind-the-end", Outcome::IoError, |case| {
        let last = sectors(case) - 1;
        ranges(case, block::WRITE_ZEROES, &[(last, 2, UNMAP)])
    }),
    attack("zeroes-good-then-bad", Outcome::IoError, |case| {
        let good = (FOREIGN_SECTOR, 1, 0);
        ranges(case, block::WRITE_ZEROES, &[good, (0, u32::MAX, UNMAP)])
    }),
    attack("zeroes-of-unknown-flags", Outcome::Unsupported, |case| {
        ranges(case, block::WRITE_ZEROES, &[(FOREIGN_SECTOR, 1, 6)])
    }),
    attack("identification-too-short", Outcome::IoError, |case| {
        request(case, block::GET_ID, 0, &[into(19)])
    }),
    attack("header-too-short", Outcome::NeedsReset, |case| {
        chain(
            case,
            &[Part::out(scratch(), 15), into(SECTOR_BYTES), into(1)],
        )
    }),
    attack("header-in-pieces", Outcome::Served, header_in_pieces),
    attack("status-alone", Outcome::NeedsReset, |case| {
        chain(case, &[into(1)])
    }),
];

/// Returns the capacity of the disk in sectors.
fn sectors(case: &Case<'_>) -> u64 {
    u64::from(case.device.config32(0)) | u64::from(case.device.config32(4)) << 32
}

fn into(bytes: u32) -> Part {
    Part::into(scratch(), bytes)
}

fn out(bytes: u32) -> Part {
    Part::out(scratch(), bytes)
}

/// Makes a request that the device must answer with a status. The device must continue to work.
fn request(case: &mut Case<'_>, kind: u32, sector: u64, data: &[Part]) -> Result<Outcome> {
    case.device.start(None)?;
    answered(case, kind, sector, data)
}

fn answered(case: &mut Case<'_>, kind: u32, sector: u64, data: &[Part]) -> Result<Outcome> {
    let status = case.device.block_request(kind, sector, data)?;
    case.lives_on()?;
    match status {
        0 => Ok(Outcome::Served),
        1 => Ok(Outcome::IoError),
        2 => Ok(Outcome::Unsupported),
        _ => Err(Trouble::Wrong("a status that is none")),
    }
}

/// Makes a discard or write-zeroes request.
fn ranges(case: &mut Case<'_>, kind: u32, ranges: &[Range]) -> Result<Outcome> {
    case.device.start(None)?;
    for ((sector, sectors, flags), at) in ranges.iter().zip((scratch()..).step_by(16)) {
        store(at, *sector);
        store(at + 8, *sectors);
        store(at + 12, *flags);
    }
    let bytes = ranges.len() as u32 * RANGE_BYTES;
    answered(case, kind, 0, &[out(bytes)])
}

/// Makes a request whose header consists of 16 descriptors of one byte. The framing of messages is free (2.7.4.1).
fn header_in_pieces(case: &mut Case<'_>) -> Result<Outcome> {
    const PIECES: u64 = block::HEADER_BYTES as u64;
    let status = scratch() + 64;
    let data = scratch() + 128;
    crate::dma::fill(scratch(), 0, PIECES);
    store(status, 0xff_u8);
    let mut parts = [into(1); PIECES as usize + 2];
    for (part, at) in parts.iter_mut().zip(scratch()..scratch() + PIECES) {
        *part = Part::out(at, 1);
    }
    parts[PIECES as usize] = Part::into(data, SECTOR_BYTES);
    parts[PIECES as usize + 1] = Part::into(status, 1);
    let outcome = chain(case, &parts)?;
    match crate::dma::load::<u8>(status) {
        block::DONE => Ok(outcome),
        _ => Err(Trouble::Wrong("a request in pieces failed")),
    }
}
