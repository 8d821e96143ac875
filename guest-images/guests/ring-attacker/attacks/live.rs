//! What a driver must not do while a device works for it.

use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::{Result, Trouble, ensure};
use crate::dma::{self, Patience, store};
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
        loaded(case)?;
        case.device.write(register::QUEUE_SEL, case.queue as u32);
        case.device.write(register::QUEUE_READY, 0);
        let ready = case.device.read(register::QUEUE_READY);
        ensure(ready == 0, "the queue is ready still")?;
        left_alone(case)
    }),
    attack("reset-under-load", Outcome::Quiet, |case| {
        loaded(case)?;
        case.device.write(register::STATUS, 0);
        ensure(case.device.status() == 0, "a status behind a reset")?;
        left_alone(case)
    }),
    attack("rings-rewritten-under-load", Outcome::Survived, rewritten),
];

/// Does `what` with each queue selected; then all works as before.
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

/// Requests at once.
const LOAD: u16 = 32;
/// The first of the buffers for them: 4 pages for data behind one for all else.
const SMALL: u64 = 24;
const LARGE: u64 = 25;
const LARGE_BYTES: u64 = 4 * 4096;

/// Starts, and has many requests on their way, valid ones. Returns how many.
fn loaded(case: &mut Case<'_>) -> Result<u16> {
    case.device.start(None)?;
    let device = &mut *case.device;
    let (small, large) = (device.buffer(SMALL), device.buffer(LARGE));
    dma::fill(small, 0, 4096);
    match device.kind {
        // The header, which is of zeros, reads from the first sector.
        Kind::Block => store(small, block::READ),
        Kind::Net => device.ethernet(small + u64::from(NET_HEADER_BYTES), 0x88b5),
        Kind::Console => dma::write(small, b"load\n"),
        // The page that holds the numbers is none that is given away.
        Kind::Balloon => store(small, (large / 4096) as u32),
        Kind::Rng => {}
        Kind::Vsock => {
            let packet = device.packet(vsock::REQUEST);
            store(small, packet.source);
            store(small + 8, packet.destination);
            store(small + 16, packet.guest_port);
            store(small + 20, packet.host_port);
            store(small + 28, packet.kind);
            store(small + 30, packet.op);
        }
    }
    for number in 0..LOAD {
        let first = 3 * number;
        let own = large + u64::from(number) * u64::from(SECTOR_BYTES);
        let queue = &mut device.queues[case.queue];
        match device.kind {
            Kind::Block => queue.chain(
                first,
                &[
                    Part::out(small, block::HEADER_BYTES),
                    Part::into(own, SECTOR_BYTES),
                    Part::into(small + 64 + u64::from(number), 1),
                ],
            ),
            Kind::Rng => queue.chain(number, &[Part::into(own, SECTOR_BYTES)]),
            Kind::Net => queue.chain(first, &[Part::out(small, NET_HEADER_BYTES + 60)]),
            Kind::Console => queue.chain(number, &[Part::out(small, 5)]),
            Kind::Balloon => queue.chain(number, &[Part::out(small, 4)]),
            Kind::Vsock => queue.chain(first, &[Part::out(small, vsock::HEADER_BYTES)]),
        }
        // The queues of the two have no room for three descriptors each.
        let head = match device.kind {
            Kind::Rng | Kind::Console | Kind::Balloon => number,
            _ => first,
        };
        queue.publish(head);
    }
    device.notify(case.queue);
    Ok(LOAD)
}

/// The queue's used ring, and what requests had for the device to write, are the driver's again.
fn left_alone(case: &mut Case<'_>) -> Result<Outcome> {
    let used_ring = case.device.queues[case.queue].used_ring();
    case.watch(used_ring, 4096);
    if matches!(case.device.kind, Kind::Block | Kind::Rng) {
        case.watch(case.device.buffer(SMALL), LARGE_BYTES + 4096);
    }
    Ok(Outcome::Quiet)
}

/// The descriptors become nonsense while the device reads them.
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
