//! Initialization steps in the wrong order (3.1.1) and invalid features (2.2).

use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::{Result, ensure};
use crate::dma::store;
use crate::spec::{feature, register, status};

const BEGUN: u32 = status::ACKNOWLEDGE | status::DRIVER;

const fn attack(name: &'static str, run: fn(&mut Case<'_>) -> Result<Outcome>) -> Attack {
    Attack {
        name,
        on: Targets::EveryDevice,
        expected: Outcome::Ignored,
        run,
    }
}

pub(super) const ATTACKS: [Attack; 12] = [
    attack("features-never-offered", |case| {
        let never = !case.device.features();
        features(case, case.device.choice() | never)
    }),
    attack("features-without-version-1", |case| {
        features(case, case.device.choice() & !feature::VERSION_1)
    }),
    attack("features-above-64-bits", |case| {
        begin(case)?;
        case.device.write(register::DRIVER_FEATURES_SEL, 2);
        case.device.write(register::DRIVER_FEATURES, u32::MAX);
        go_on(case, BEGUN)
    }),
    attack("driver-ok-without-features-ok", |case| {
        begin(case)?;
        let skipped = BEGUN | status::DRIVER_OK;
        case.device.write(register::STATUS, skipped);
        go_on(case, BEGUN)
    }),
    attack("features-ok-without-driver", |case| {
        case.device.reset()?;
        let skipped = status::ACKNOWLEDGE | status::FEATURES_OK;
        case.device.write(register::STATUS, skipped);
        ensure(case.device.status() == 0, "a step was skipped")?;
        case.device.write(register::STATUS, status::ACKNOWLEDGE);
        case.device.write(register::STATUS, BEGUN);
        go_on(case, BEGUN)
    }),
    attack("status-of-unknown-bits", |case| {
        begin(case)?;
        case.device.write(register::STATUS, BEGUN | 0xffff_ff30);
        go_on(case, BEGUN)
    }),
    attack("notified-before-driver-ok", |case| {
        begin(case)?;
        notify_all(case);
        go_on(case, BEGUN)
    }),
    attack("status-written-backwards", |case| {
        case.device.start(None)?;
        for fewer in [
            BEGUN | status::FEATURES_OK,
            BEGUN,
            status::ACKNOWLEDGE,
            status::DRIVER_OK,
        ] {
            case.device.write(register::STATUS, fewer);
            case.device.runs()?;
        }
        case.lives_on()
    }),
    attack("status-needs-reset-written", |case| {
        case.device.start(None)?;
        let all = status::RUNNING | status::DEVICE_NEEDS_RESET;
        case.device.write(register::STATUS, all);
        case.device.runs()?;
        case.lives_on()
    }),
    attack("status-written-again", |case| {
        case.device.start(None)?;
        for _ in 0..3 {
            case.device.set_driver_ok();
        }
        case.lives_on()
    }),
    attack("reset-again-and-again", |case| {
        for _ in 0..20 {
            case.device.start(None)?;
            notify_all(case);
            case.device.write(register::STATUS, 0);
            case.device.write(register::STATUS, 0);
        }
        case.device.start(None)?;
        case.lives_on()
    }),
    Attack {
        expected: Outcome::Served,
        ..attack("event-index-of-nonsense", event_index)
    },
];

/// Resets the device and initializes it up to DRIVER.
fn begin(case: &mut Case<'_>) -> Result {
    case.device.reset()?;
    case.device.write(register::STATUS, status::ACKNOWLEDGE);
    case.device.write(register::STATUS, BEGUN);
    ensure(case.device.status() == BEGUN, "its status changed")
}

fn notify_all(case: &Case<'_>) {
    (0..case.device.queue_count).for_each(|queue| case.device.notify(queue));
}

/// Completes the initialization correctly, without a reset. The status must still be `left`, as before the attack.
pub(super) fn go_on(case: &mut Case<'_>, left: u32) -> Result<Outcome> {
    ensure(case.device.status() == left, "its status changed")?;
    for index in 0..case.device.queue_count {
        case.device.write(register::QUEUE_SEL, index as u32);
        let ready = case.device.read(register::QUEUE_READY);
        ensure(ready == 0, "a queue is ready before its time")?;
    }
    case.device.choose(case.device.choice());
    let agreed = BEGUN | status::FEATURES_OK;
    case.device.write(register::STATUS, agreed);
    ensure(case.device.status() == agreed, "features refused")?;
    case.device.set_up_queues(None);
    case.device.set_driver_ok();
    case.device.give_receive_buffers();
    case.lives_on()
}

/// Writes invalid features. The device must not accept FEATURES_OK.
fn features(case: &mut Case<'_>, wrong: u64) -> Result<Outcome> {
    begin(case)?;
    case.device.choose(wrong);
    let agreed = BEGUN | status::FEATURES_OK;
    case.device.write(register::STATUS, agreed);
    ensure(case.device.status() == BEGUN, "it took the features")?;
    case.device.set_driver_ok();
    ensure(
        case.device.status() == BEGUN,
        "it runs with features that it did not take",
    )?;
    go_on(case, BEGUN)
}

/// Sets `used_event` to values that are never reached (2.7.7). The driver polls, so that operations still complete.
fn event_index(case: &mut Case<'_>) -> Result<Outcome> {
    let features = case.device.choice() | feature::EVENT_IDX;
    case.device.start_with(features, None)?;
    for nonsense in [0x7fff_u16, 0x8000, u16::MAX] {
        for queue in &case.device.queues[..case.device.queue_count] {
            store(queue.used_event(), nonsense);
        }
        case.device.operate()?;
    }
    case.lives_on()?;
    Ok(Outcome::Served)
}
