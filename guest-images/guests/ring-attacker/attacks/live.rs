//! Changes that a driver must not make while the device works.

use crate::attack::{Attack, Case, Outcome, Targets, is_untouched};
use crate::device::{Result, Trouble, ensure};
use crate::dma::{self, Patience, scratch, store};
use crate::operation::{NET_HEADER_BYTES, SECTOR_BYTES, block, vsock};
use crate::queue::Part;
use crate::spec::{Kind, register, status};

const fn attack(
    name: &'static str,
    expected: Outcome,
    run: fn(&mut Case<'_>) -> Result<Outcome>,
) -> Attack {
    Attack {
        name,
        on: Targets::EveryDevice,
        expected,
        run,
    }
}

pub(super) const ATTACKS: [Attack; 8] = [
    attack("live-queue-size", Outcome::Ignored, |case| {
        reprogrammed(case, |case| case.device.write(register::QUEUE_NUM, 2))
    }),
    attack("live-queue-addresses", Outcome::Ignored, |case| {
        reprogrammed(case, |case| case.device.set_addresses([case.memory_end; 3]))
    }),
    attack("live-queue-ready-again", Outcome::Ignored, |case| {
        reprogrammed(case, |case| {
            case.device.set_addresses([0; 3]);
            case.device.write(register::QUEUE_READY, 1);
            case.device.write(register::QUEUE_READY, 2);
        })
    }),
    attack("live-features", Outcome::Ignored, |case| {
        reprogrammed(case, |case| case.device.choose(u64::MAX))
    }),
    attack("live-no-features", Outcome::Ignored, |case| {
        reprogrammed(case, |case| case.device.choose(0))
    }),
    attack("queue-taken-back-under-load", Outcome::Quiet, |case| {
        left_alone(case, |case| {
            case.device.write(register::QUEUE_SEL, case.queue as u32);
            case.device.write(register::QUEUE_READY, 0);
            let ready = case.device.read(register::QUEUE_READY);
            ensure(ready == 0, "the queue is ready still")
        })
    }),
    attack("reset-under-load", Outcome::Quiet, |case| {
        left_alone(case, |case| {
            case.device.write(register::STATUS, 0);
            ensure(case.device.status() == 0, "a status behind a reset")
        })
    }),
    attack("rings-rewritten-under-load", Outcome::Survived, rewritten),
];

/// Calls `what` with each queue selected. The device must work as before.
fn reprogrammed(case: &mut Case<'_>, what: fn(&mut Case<'_>)) -> Result<Outcome> {
    case.device.start(None)?;
    for queue in 0..case.device.queue_count {
        case.device.write(register::QUEUE_SEL, queue as u32);
        what(case);
        let ready = case.device.read(register::QUEUE_READY);
        ensure(ready == 1, "the queue is not ready any more")?;
    }
    ensure(
        case.device.status() == status::RUNNING,
        "its status changed",
    )?;
    case.device.operate()?;
    case.lives_on()
}

/// Size of the data that all requests read or write.
const DATA_BYTES: u32 = 32 << 10;
/// Size of the memory for headers and for the status of block requests.
const SMALL_BYTES: u64 = 4096;
const STATUS_OFFSET: u64 = 64;

/// Initializes the device and fills the queue with valid requests that take some time. Returns their number.
fn loaded(case: &mut Case<'_>) -> Result<u16> {
    case.device.start(None)?;
    let device = &mut *case.device;
    let (small, data) = (scratch(), scratch() + SMALL_BYTES);
    dma::fill(small, 0, SMALL_BYTES);
    let small_parts = |bytes| [Part::out(small, bytes); 3];
    let (parts, length) = match device.kind {
        Kind::Block => {
            // The header is zeroed, so that the request reads from the first sector.
            let all = device.config32(0).saturating_mul(SECTOR_BYTES);
            let parts = [
                Part::out(small, block::HEADER_BYTES),
                Part::into(data, all.min(DATA_BYTES)),
                Part::into(small + STATUS_OFFSET, 1),
            ];
            (parts, 3)
        }
        Kind::Rng => ([Part::into(data, DATA_BYTES); 3], 1),
        Kind::Net => {
            device.ethernet(small + u64::from(NET_HEADER_BYTES), 0x88b5);
            (small_parts(NET_HEADER_BYTES + 1500), 1)
        }
        Kind::Console => {
            (0..u64::from(DATA_BYTES) / 8)
                .for_each(|word| dma::write(data + 8 * word, b"loading\n"));
            ([Part::out(data, DATA_BYTES); 3], 1)
        }
        Kind::Balloon => {
            store(small, (data / 4096) as u32);
            (small_parts(4), 1)
        }
        Kind::Vsock => {
            let packet = device.packet(vsock::REQUEST);
            packet.store(small);
            (small_parts(vsock::HEADER_BYTES), 1)
        }
    };
    let queue = &mut device.queues[case.queue];
    let count = queue.size / length;
    for number in 0..count {
        queue.chain(number * length, &parts[..length.into()]);
        queue.publish(number * length);
    }
    device.notify(case.queue);
    Ok(count)
}

/// Number of times that a device is stopped under load, each time at a random point of its work.
const ROUNDS: u32 = 8;
/// Number of checks of the memory after each stop. They take longer than all requests.
const LOOKS: u32 = 32;

/// Stops the device while it works. From then on it must not write to the used ring or to the data of the requests, which
/// belong to the driver.
fn left_alone(case: &mut Case<'_>, stop: fn(&Case<'_>) -> Result) -> Result<Outcome> {
    for _ in 0..ROUNDS {
        loaded(case)?;
        stop(case)?;
        let used_ring = (case.device.queues[case.queue].used_ring(), 4096);
        let data = match case.device.kind {
            // The page was inflated, and the device may discard it at any time.
            Kind::Balloon => None,
            _ => Some((scratch(), SMALL_BYTES + u64::from(DATA_BYTES))),
        };
        case.watch([Some(used_ring), data]);
        for _ in 0..LOOKS {
            let untouched = is_untouched(&case.watched());
            ensure(untouched, "it writes to memory that is the driver's")?;
        }
    }
    Ok(Outcome::Quiet)
}

/// Overwrites the descriptors with invalid values while the device reads them.
fn rewritten(case: &mut Case<'_>) -> Result<Outcome> {
    let expected = loaded(case)?;
    let nonsense = Part {
        address: case.memory_end - 1,
        bytes: u32::MAX,
        flags: u16::MAX,
    };
    let size = case.device.queues[case.queue].size;
    for index in (0..size).rev() {
        case.device.queues[case.queue].describe(index, nonsense, Some(u16::MAX));
    }
    let mut patience = Patience::new();
    let mut served = 0;
    while patience.look() {
        if case.device.queues[case.queue].take_used().is_some() {
            served += 1;
        }
        if served == expected || patience.is_due() && case.device.needs_reset()? {
            return Ok(Outcome::Survived);
        }
    }
    Err(Trouble::Silent("neither answers nor a need of a reset"))
}
