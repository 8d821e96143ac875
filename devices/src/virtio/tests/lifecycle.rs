//! Pause, save, restore and drop of a device.

use proptest::prelude::*;

use super::*;

#[test]
fn a_paused_device_stands_still_and_goes_on() {
    let (mut driver, log) = started(0);
    echo_once(&mut driver, 0);
    driver.device.pause();
    driver.device.pause();
    let head = driver.add(0, &[Part::Out(DATA, 1)]);
    driver.notify(0);
    let saved = driver.device.save().unwrap();
    assert_eq!(saved.device, served(1));
    assert_eq!(saved.transport.queues[0].next_available, 1);
    assert_eq!(log.served.load(Ordering::SeqCst), 1);
    driver.device.resume();
    let error = driver.device.save().unwrap_err().to_string();
    assert_eq!(error, "_test: cannot save: the device is not paused");
    assert_eq!(driver.wait_used(0), (head, 0));
}

#[test]
fn a_guest_moves_with_its_requests_and_its_interrupt() {
    for features in [0, EVENT_INDEX] {
        let (mut driver, _) = started(features | 1);
        for _ in 0..20 {
            echo_once(&mut driver, 0);
        }
        // The first chain is used, but the driver has not seen it. The second is made available after the pause.
        driver.add(1, &[Part::Out(DATA, 1)]);
        driver.notify(1);
        driver.wait_until("the interrupt", |driver| driver.get(0x60) == 1);
        driver.device.pause();
        driver.add(0, &[Part::Out(DATA, 1)]);
        driver.notify(0);
        let saved = driver.device.save().unwrap();
        assert_eq!(saved.transport.interrupt_status, 1);

        let device = Echo::default();
        let log = Arc::clone(&device.log);
        let mut driver = driver.moved(&saved, |_| Box::new(device));
        assert_eq!(driver.device.save().unwrap(), saved);
        assert_eq!(log.started.load(Ordering::SeqCst), 0);
        assert!(!driver.was_interrupted());
        driver.device.resume();
        assert!(driver.was_interrupted());
        driver.wait_used(1);
        driver.wait_used(0);
        echo_once(&mut driver, 1);
        driver.device.pause();
        let after = driver.device.save().unwrap();
        assert_eq!(after.device, served(23));
    }
}

#[test]
fn a_device_moves_in_every_state_of_its_driver() {
    for steps in 0..=4 {
        let (mut driver, _) = echo();
        for status in [1, 3, 11, RUNNING].into_iter().take(steps) {
            if status == 11 {
                driver.set(0x24, 1);
                driver.set(0x20, 1);
            }
            driver.set(0x70, status);
        }
        driver.device.pause();
        let saved = driver.device.save().unwrap();
        let mut driver = driver.moved(&saved, |_| Box::new(Echo::default()));
        driver.device.resume();
        driver.start(0);
        echo_once(&mut driver, 0);
    }
}

#[test]
fn a_device_moves_while_its_queues_are_set_up() {
    let (mut driver, _) = echo();
    driver.negotiate(VERSION_1);
    // Before DRIVER_OK, the addresses may have any value.
    driver.set(0x80, 0x1235);
    driver.set(0xa4, u32::MAX);
    driver.device.pause();
    let saved = driver.device.save().unwrap();
    assert_eq!(saved.transport.queues[0].descriptor_table, 0x1235);
    let mut driver = driver.moved(&saved, |_| Box::new(Echo::default()));
    driver.device.resume();
    driver.set_up_queue(0, 16);
    driver.set_up_queue(1, 16);
    driver.set(0x70, RUNNING);
    echo_once(&mut driver, 0);
}

#[test]
fn a_device_moves_with_features_that_were_not_agreed_to() {
    let (mut driver, _) = echo();
    assert!(!driver.negotiate(VERSION_1 | 4));
    driver.device.pause();
    let saved = driver.device.save().unwrap();
    assert_eq!(saved.transport.driver_features, VERSION_1 | 4);
    let mut driver = driver.moved(&saved, |_| Box::new(Echo::default()));
    driver.device.resume();
    driver.set(0x70, 11);
    assert_eq!(driver.get(0x70), 3);
    driver.set(0x24, 0);
    driver.set(0x20, 0);
    driver.set(0x70, 11);
    assert_eq!(driver.get(0x70), 11);
}

#[test]
fn a_broken_device_is_broken_elsewhere_too_until_it_is_reset() {
    let (mut driver, _) = started(0);
    driver.add_raw(0, &[descriptor(DATA, 8, NEXT, 0)], 0);
    driver.notify(0);
    driver.wait_needs_reset();
    driver.device.pause();
    let saved = driver.device.save().unwrap();
    let mut driver = driver.moved(&saved, |_| Box::new(Echo::default()));
    driver.device.resume();
    assert_eq!(driver.get(0x70), RUNNING | NEEDS_RESET);
    driver.start(0);
    echo_once(&mut driver, 0);
}

#[test]
fn states_that_do_not_fit_are_refused_with_the_reason() {
    let (driver, _) = started(0);
    driver.device.pause();
    let good = driver.device.save().unwrap();
    type Change = fn(&mut VirtioSnapshot);
    let broken: [(&str, Change); 9] = [
        ("type", |state| state.transport.device_type = 1),
        ("status", |state| state.transport.status = 0x1000),
        ("features", |state| {
            state.transport.driver_features |= 1 << 50
        }),
        ("queues", |state| state.transport.queues.truncate(1)),
        ("maximum sizes", |state| {
            state.transport.queues[0].max_size = 7
        }),
        ("7 entries", |state| state.transport.queues[0].size = 7),
        ("guest memory", |state| {
            state.transport.queues[0].used_ring = LOW_END;
        }),
        ("undecodable", |state| {
            state.device = DeviceState::new(&RngSnapshot {});
        }),
        ("too new", |state| state.device.version = 2),
    ];
    for (word, change) in broken {
        let mut state = good.clone();
        change(&mut state);
        let (interrupt, _line) = interrupt();
        let device = Box::new(Echo::default());
        let result = MmioTransport::restore("_echo0", device, memory(), interrupt, &state);
        let error = result.err().expect(word).to_string();
        assert!(
            error.starts_with("_echo0: ") && error.contains(word),
            "{error}"
        );
    }
}

#[test]
fn the_thread_has_the_name_of_its_device_and_ends_with_it() {
    let (interrupt, _line) = interrupt();
    let named = || {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
            .filter(|name| name.trim() == "_echo77")
            .count()
    };
    let device =
        MmioTransport::new("_echo77", Box::new(Echo::default()), memory(), interrupt).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    // The thread sets its name when it starts.
    while named() == 0 && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(named(), 1);
    drop(device);
    assert_eq!(named(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(128)
    })]

    /// Whatever a guest writes to registers and rings, a reset makes the device usable again.
    #[test]
    fn any_writes_leave_a_device_that_a_reset_mends(
        writes in prop::collection::vec((0_u64..0x108, any::<u32>(), prop::bool::ANY), 0..60),
        ring in prop::collection::vec(any::<u8>(), 0x200),
    ) {
        let (mut driver, _) = started(0);
        driver.write_memory(driver.rings[0].base, &ring);
        driver.write_memory(driver.rings[0].base + 0x4000, &ring[..64]);
        for (offset, value, small) in writes {
            let value = if small { value % 16 } else { value };
            driver.set(offset & !3, value);
            driver.notify(0);
        }
        driver.device.pause();
        let saved = driver.device.save().unwrap();
        let mut driver = driver.moved(&saved, |_| Box::new(Echo::default()));
        driver.device.resume();
        driver.start(0);
        echo_once(&mut driver, 0);
    }
}
