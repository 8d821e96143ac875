//! Registers and the state machine of the device status.

use super::*;

#[test]
fn the_registers_say_what_it_is() {
    let (mut driver, _) = echo();
    let identity = [0, 4, 8].map(|offset| driver.get(offset));
    assert_eq!(identity, [0x7472_6976, 2, 0x77]);
    assert_eq!(driver.offered(), VERSION_1 | INDIRECT | EVENT_INDEX | 3);
    driver.set(0x14, 2);
    assert_eq!(driver.get(0x10), 0);
    let sizes = [0, 1, 2].map(|queue| {
        driver.set(0x30, queue);
        driver.get(0x34)
    });
    assert_eq!(sizes, [64, 16, 0]);
    let no_shared_memory = [0xb0, 0xb4, 0xb8, 0xbc].map(|offset| driver.get(offset));
    assert_eq!(no_shared_memory, [u32::MAX; 4]);
}

#[test]
fn features_that_do_not_go_together_are_not_agreed_to() {
    let (mut driver, _) = echo();
    for refused in [0, 3, VERSION_1 | 2, VERSION_1 | 4, VERSION_1 | 1 << 40] {
        assert!(!driver.negotiate(refused), "{refused:#x}");
        assert_eq!(driver.get(0x70), 3);
        // Bits that follow FEATURES_OK cannot be set either.
        driver.set(0x70, RUNNING);
        assert_eq!(driver.get(0x70), 3);
    }
    assert!(driver.negotiate(VERSION_1 | 3));
}

#[test]
fn status_bits_come_in_order_and_stay() {
    let (mut driver, _) = echo();
    for (written, seen) in [
        (2, 0),
        (8, 0),
        (0x1000, 0),
        (1, 1),
        (5, 1),
        (9, 1),
        (3, 3),
        (1, 3),
        (7, 3),
        (0x83, 0x83),
        (3, 0x83),
        (0, 0),
    ] {
        driver.set(0x70, written);
        assert_eq!(driver.get(0x70), seen, "after {written:#x}");
    }
}

#[test]
fn registers_change_only_at_their_time_and_width() {
    let (mut driver, log) = started(0);
    let saved = |driver: &Driver| {
        driver.device.pause();
        let state = driver.device.save().unwrap();
        driver.device.resume();
        state.transport
    };
    let before = saved(&driver);
    let refused = driver.device.refused();
    // A driver may not change a device that is running: size, rings, features, readiness of a queue, and clearing
    // status bits.
    for (register, value) in [
        (0x38, 8),
        (0x80, 0xdead_0000),
        (0x84, 7),
        (0x90, 0),
        (0xa4, 1),
        (0x20, 0),
        (0x44, 1),
        (0x70, 3),
        (0x00, 1),
        (0x0c0, 1),
        (0x50, 2),
    ] {
        driver.set(register, value);
    }
    let mut wide = [0xaa; 8];
    driver.device.read(0, &mut wide);
    assert_eq!(wide, [0; 8]);
    driver.device.write(0x70, &[0]);
    driver.device.write(0x71, &[0; 4]);
    assert_eq!(driver.device.refused(), refused + 14);
    assert_eq!(saved(&driver), before);
    echo_once(&mut driver, 0);
    assert_eq!(log.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn queues_that_cannot_be_need_a_reset_when_the_driver_is_ready() {
    for (register, value) in [
        (0x80, 8_u32),
        (0x90, 1),
        (0xa0, 2),
        (0x80, 0xff_fff0),
        (0x84, u32::MAX),
        (0x94, 1),
        (0xa4, 1),
    ] {
        let (mut driver, _) = echo();
        assert!(driver.negotiate(VERSION_1));
        driver.set_up_queue(0, 16);
        driver.set(0x44, 0);
        driver.set(register, value);
        driver.set(0x44, 1);
        driver.set(0x70, RUNNING);
        driver.wait_needs_reset();
        driver.start(0);
        echo_once(&mut driver, 0);
    }
    let (mut driver, _) = echo();
    assert!(driver.negotiate(VERSION_1));
    driver.set(0x30, 0);
    for size in [0, 3, 128, 0x1_0000] {
        driver.set(0x38, size);
    }
    driver.device.pause();
    assert_eq!(driver.device.save().unwrap().transport.queues[0].size, 64);
}

#[test]
fn a_queue_that_is_taken_back_is_left_alone() {
    let (mut driver, log) = started(0);
    driver.set(0x30, 0);
    driver.set(0x44, 0);
    assert_eq!(driver.get(0x44), 0);
    driver.add(0, &[Part::Out(DATA, 1)]);
    driver.notify(0);
    echo_once(&mut driver, 1);
    driver.device.pause();
    assert_eq!(log.served.load(Ordering::SeqCst), 1);
    assert!(!driver.device.save().unwrap().transport.queues[0].ready);
}

#[test]
fn the_configuration_changes_with_its_generation() {
    let (mut driver, log) = echo();
    assert_eq!(driver.config::<8>(0), [0; 8]);
    driver.device.write(0x100, &7_u64.to_le_bytes());
    assert_eq!(driver.device.refused(), 1);
    driver.start(0);
    driver.device.write(0x100, &7_u64.to_le_bytes());
    assert_eq!(driver.config::<4>(0), [7, 0, 0, 0]);
    assert_eq!(driver.config::<4>(6), [0; 4]);
    assert_eq!(driver.config::<1>(u64::from(u32::MAX)), [0]);
    let generation = driver.get(0xfc);
    log.config.store(9, Ordering::SeqCst);
    driver.device.interrupt().config_changed();
    assert_ne!(driver.get(0xfc), generation);
    assert_eq!(driver.get(0x60), 2);
    driver.set(0x64, 2);
    assert_eq!(driver.get(0x60), 0);
}

#[test]
fn a_driver_that_is_not_ready_is_not_interrupted() {
    let (mut driver, _) = echo();
    driver.negotiate(VERSION_1);
    driver.device.interrupt().config_changed();
    assert_eq!((driver.get(0x60), driver.was_interrupted()), (0, false));
    assert_eq!(driver.get(0xfc), 1);
    driver.start(0);
    driver.device.interrupt().config_changed();
    assert_eq!((driver.get(0x60), driver.was_interrupted()), (2, true));
}
