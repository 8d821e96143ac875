//! Invalid addresses and sizes of queues (2.7, 4.2.2).

use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::Result;
use crate::dma::store;
use crate::spec::{register, status};

const TABLE: usize = 0;
const AVAILABLE: usize = 1;
const USED: usize = 2;

const fn placed(name: &'static str, run: fn(&mut Case<'_>) -> Result<Outcome>) -> Attack {
    Attack {
        name,
        on: Targets::FirstQueue,
        expected: Outcome::NeedsReset,
        run,
    }
}

const fn sized(name: &'static str, run: fn(&mut Case<'_>) -> Result<Outcome>) -> Attack {
    Attack {
        expected: Outcome::Ignored,
        ..placed(name, run)
    }
}

pub(super) const ATTACKS: [Attack; 21] = [
    placed("table-ring-behind-memory", |c| at(c, TABLE, c.memory_end)),
    placed("table-ring-across-the-end", |c| {
        at(c, TABLE, c.memory_end - 16)
    }),
    placed("table-ring-unaligned", |c| moved(c, TABLE, 8)),
    placed("table-ring-wraps", |c| at(c, TABLE, u64::MAX - 15)),
    placed("table-ring-in-registers", |c| at(c, TABLE, c.device.base)),
    placed("available-ring-behind-memory", |c| {
        at(c, AVAILABLE, c.memory_end)
    }),
    placed("available-ring-across-the-end", |c| {
        at(c, AVAILABLE, c.memory_end - 16)
    }),
    placed("available-ring-unaligned", |c| moved(c, AVAILABLE, 1)),
    placed("available-ring-wraps", |c| at(c, AVAILABLE, u64::MAX - 15)),
    placed("available-ring-in-registers", |c| {
        at(c, AVAILABLE, c.device.base)
    }),
    placed("used-ring-behind-memory", |c| at(c, USED, c.memory_end)),
    placed("used-ring-across-the-end", |c| {
        at(c, USED, c.memory_end - 16)
    }),
    placed("used-ring-unaligned", |c| moved(c, USED, 2)),
    placed("used-ring-wraps", |c| at(c, USED, u64::MAX - 15)),
    placed("used-ring-in-registers", |c| at(c, USED, c.device.base)),
    placed("ready-without-addresses", ready_without_addresses),
    sized("size-is-none", |c| size(c, 0)),
    sized("size-is-no-power-of-two", |c| size(c, 3)),
    sized("size-above-the-most", |c| {
        c.device.write(register::QUEUE_SEL, 0);
        size(c, 2 * c.device.read(register::QUEUE_NUM_MAX))
    }),
    sized("size-above-16-bits", |c| size(c, (1 << 16) + 2)),
    sized("ready-before-the-features", ready_before_features),
];

/// Sets up the queue with one ring at `address`.
fn at(case: &mut Case<'_>, ring: usize, address: u64) -> Result<Outcome> {
    case.device.negotiate(case.device.choice())?;
    case.device.set_up_queues(Some(case.queue));
    let queue = &case.device.queues[case.queue];
    let mut addresses = queue.addresses();
    addresses[ring] = address;
    select(case);
    case.device.write(register::QUEUE_NUM, queue.size.into());
    case.device.set_addresses(addresses);
    case.device.write(register::QUEUE_READY, 1);
    case.device.set_driver_ok();
    case.verdict()
}

/// Sets up the queue with one ring moved by `by` bytes.
fn moved(case: &mut Case<'_>, ring: usize, by: u64) -> Result<Outcome> {
    let place = case.device.queues[case.queue].addresses()[ring];
    at(case, ring, place + by)
}

fn select(case: &Case<'_>) {
    let queue = case.queue as u32;
    case.device.write(register::QUEUE_SEL, queue);
}

/// Enables the queue without setting its addresses. The rings are then at address 0, which is RAM with invalid contents.
fn ready_without_addresses(case: &mut Case<'_>) -> Result<Outcome> {
    const AVAILABLE_INDEX: u64 = 2;
    store(AVAILABLE_INDEX, 0x7fff_u16);
    case.device.negotiate(case.device.choice())?;
    case.device.set_up_queues(Some(case.queue));
    select(case);
    case.device.write(register::QUEUE_READY, 1);
    case.device.set_driver_ok();
    case.provoke();
    let outcome = case.verdict();
    store(AVAILABLE_INDEX, 0_u16);
    outcome
}

/// Writes an invalid size after a valid one. The device must keep the valid size, so that more requests than it complete.
fn size(case: &mut Case<'_>, wrong: u32) -> Result<Outcome> {
    const SIZE: u16 = 4;
    let whole = core::mem::replace(&mut case.device.queues[case.queue].size, SIZE);
    let outcome = sized_wrongly(case, wrong, SIZE.into());
    case.device.queues[case.queue].size = whole;
    outcome
}

fn sized_wrongly(case: &mut Case<'_>, wrong: u32, right: u32) -> Result<Outcome> {
    case.device.negotiate(case.device.choice())?;
    case.device.set_up_queues(Some(case.queue));
    select(case);
    case.device.write(register::QUEUE_NUM, right);
    case.device.write(register::QUEUE_NUM, wrong);
    let addresses = case.device.queues[case.queue].addresses();
    case.device.set_addresses(addresses);
    case.device.write(register::QUEUE_READY, 1);
    case.device.set_driver_ok();
    case.device.give_receive_buffers();
    for _ in 0..2 * right {
        case.device.operate()?;
    }
    case.lives_on()
}

fn ready_before_features(case: &mut Case<'_>) -> Result<Outcome> {
    case.device.reset()?;
    let known = status::ACKNOWLEDGE | status::DRIVER;
    case.device.write(register::STATUS, status::ACKNOWLEDGE);
    case.device.write(register::STATUS, known);
    case.device.set_up_queues(None);
    super::handshake::go_on(case, known)
}
