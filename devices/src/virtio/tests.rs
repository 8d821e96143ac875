//! The transport, the queues and the worker, with a device that does no more than they need.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use proptest::prelude::*;
use vm_memory::GuestAddressSpace;

use super::device::read_config;
use super::testing::*;
use super::*;
use crate::MmioDevice;

/// Gives back what it is sent, in capitals; counts what happens to it.
#[derive(Default)]
struct Echo {
    log: Arc<Log>,
    served: u32,
}

#[derive(Default)]
struct Log {
    served: AtomicU32,
    started: AtomicU32,
    resets: AtomicU32,
    config: AtomicU64,
}

impl ConfigSpace for Log {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = self.config.load(Ordering::SeqCst).to_le_bytes();
        read_config(&value, offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(value)) = (offset, data.try_into()) {
            self.config
                .store(u64::from_le_bytes(value), Ordering::SeqCst);
        }
    }
    /// Feature 1 needs feature 0.
    fn accepts(&self, features: u64) -> bool {
        features & 2 == 0 || features & 1 != 0
    }
}

impl<M: GuestAddressSpace> Device<M> for Echo {
    fn identity(&self) -> Identity {
        Identity {
            device_type: 0x77,
            features: 3,
            queue_sizes: vec![64, 16],
            config: Arc::clone(&self.log) as _,
            counters: Arc::new(()),
        }
    }
    fn started(&mut self, _: Session<'_, M>, _: &mut Watch<'_, '_>) -> Result<(), DeviceError> {
        self.log.started.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn notified(
        &mut self,
        queue: usize,
        mut session: Session<'_, M>,
        _: &mut Watch<'_, '_>,
    ) -> Result<(), DeviceError> {
        session.drain(queue, |session, mut chain| {
            let mut data = [0; 256];
            let len = session.read(&mut chain.readable, &mut data)?;
            data.make_ascii_uppercase();
            self.served += 1;
            self.log.served.fetch_add(1, Ordering::SeqCst);
            Ok(Outcome::done(
                session.write(&mut chain.writable, &data[..len])?,
            ))
        })
    }
    fn reset(&mut self, _: &mut Watch<'_, '_>) {
        self.served = 0;
        self.log.resets.fetch_add(1, Ordering::SeqCst);
    }
    fn save(&self) -> DeviceSnapshot {
        DeviceSnapshot::Test(self.served)
    }
    fn restore(&mut self, state: &DeviceSnapshot) -> Result<(), DeviceStateError> {
        match state {
            DeviceSnapshot::Test(served) => self.served = *served,
            other => return Err(DeviceStateError::other("echo", other)),
        }
        Ok(())
    }
}

fn echo() -> (Driver, Arc<Log>) {
    let device = Echo::default();
    let log = Arc::clone(&device.log);
    (Driver::new(|_| Box::new(device)), log)
}

fn started(features: u64) -> (Driver, Arc<Log>) {
    let (mut driver, log) = echo();
    driver.start(features);
    (driver, log)
}

fn echo_once(driver: &mut Driver, queue: usize) {
    driver.write_memory(DATA, b"ferry");
    driver.write_memory(DATA + 0x1000, &[0; 8]);
    let written = driver.request(queue, &[Part::Out(DATA, 5), Part::In(DATA + 0x1000, 8)]);
    assert_eq!(written, 5);
    assert_eq!(driver.read_memory(DATA + 0x1000, 8), b"FERRY\0\0\0");
}

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
fn requests_are_served_with_all_ways_of_notification() {
    for features in [0, EVENT_INDEX, INDIRECT, EVENT_INDEX | INDIRECT] {
        let (mut driver, log) = started(features);
        for _ in 0..100 {
            echo_once(&mut driver, 0);
            echo_once(&mut driver, 1);
        }
        assert_eq!(log.served.load(Ordering::SeqCst), 200);
        assert_eq!(driver.device.failure(), None);
    }
}

#[test]
fn an_eventfd_notifies_as_the_register_does() {
    let (mut driver, _) = started(0);
    let head = driver.add(1, &[Part::Out(DATA, 1), Part::In(DATA, 1)]);
    driver.device.notifiers()[1].write(1).unwrap();
    assert_eq!(driver.wait_used(1), (head, 1));
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let (mut driver, _) = started(0);
    // VIRTQ_AVAIL_F_NO_INTERRUPT.
    driver.write_memory(driver.rings[0].base + 0x4000, &[1, 0]);
    driver.was_interrupted();
    driver.add(0, &[Part::Out(DATA, 1)]);
    driver.notify(0);
    driver.wait_until("the used buffer", |driver| driver.used(0).is_some());
    driver.device.pause();
    assert!(!driver.was_interrupted());
    assert_eq!(driver.get(0x60), 0);
}

#[test]
fn an_indirect_chain_is_served() {
    let (mut driver, _) = started(INDIRECT);
    driver.write_memory(DATA, b"ferry");
    let table = DATA + 0x2000;
    let parts = [(DATA, 5, NEXT, 1), (DATA + 0x1000, 5, WRITE, 0)];
    for (index, (address, bytes, flags, next)) in (0..).zip(parts) {
        let raw = Raw {
            address,
            bytes,
            flags,
            next,
        };
        driver.write_descriptor(table, index, raw);
    }
    let indirect = Raw {
        address: table,
        bytes: 32,
        flags: TABLE,
        next: 0,
    };
    driver.add_raw(0, &[indirect], 0);
    driver.notify(0);
    assert_eq!(driver.wait_used(0), (0, 5));
    assert_eq!(driver.read_memory(DATA + 0x1000, 5), b"FERRY");
}

#[test]
fn features_that_do_not_go_together_are_not_agreed_to() {
    let (mut driver, _) = echo();
    for refused in [0, 3, VERSION_1 | 2, VERSION_1 | 4, VERSION_1 | 1 << 40] {
        assert!(!driver.negotiate(refused), "{refused:#x}");
        assert_eq!(driver.get(0x70), 3);
        // What follows FEATURES_OK does not come.
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
    // Live reprogramming: size, rings, features, ready again, and bits of the status taken back.
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

fn descriptor(address: u64, bytes: u32, flags: u16, next: u16) -> Raw {
    Raw {
        address,
        bytes,
        flags,
        next,
    }
}

/// Chains that no driver may make, as descriptors from 0 on, and the head.
fn broken_chains() -> Vec<(&'static str, Vec<Raw>, u16)> {
    let good = descriptor(DATA, 8, 0, 0);
    let table = |bytes| descriptor(DATA + 0x3000, bytes, TABLE, 0);
    vec![
        ("a loop of one", vec![descriptor(DATA, 8, NEXT, 0)], 0),
        (
            "a loop of two",
            vec![descriptor(DATA, 8, NEXT, 1), descriptor(DATA, 8, NEXT, 0)],
            0,
        ),
        ("a next outside", vec![descriptor(DATA, 8, NEXT, 16)], 0),
        (
            "a next far outside",
            vec![descriptor(DATA, 8, NEXT, u16::MAX)],
            0,
        ),
        ("a head outside", vec![good], 16),
        ("no bytes", vec![descriptor(DATA, 0, 0, 0)], 0),
        ("a hole", vec![descriptor(LOW_END, 8, 0, 0)], 0),
        ("into a hole", vec![descriptor(LOW_END - 4, 8, WRITE, 0)], 0),
        (
            "the end of addresses",
            vec![descriptor(u64::MAX - 3, 8, 0, 0)],
            0,
        ),
        (
            "a huge length",
            vec![descriptor(DATA, u32::MAX, WRITE, 0)],
            0,
        ),
        (
            "more than 4 GiB",
            vec![
                descriptor(DATA, 4 << 20, NEXT, 1),
                descriptor(DATA, u32::MAX, 0, 0),
            ],
            0,
        ),
        (
            "readable behind writable",
            vec![descriptor(DATA, 8, WRITE | NEXT, 1), good],
            0,
        ),
        ("an empty table", vec![table(0)], 0),
        ("half a table entry", vec![table(24)], 0),
        ("a table of zeros", vec![table(16)], 0),
        ("a huge table", vec![table(0xffff_fff0)], 0),
        (
            "a table outside",
            vec![descriptor(LOW_END, 16, TABLE, 0)],
            0,
        ),
        (
            "a table in a table",
            vec![descriptor(DATA + 0x4000, 16, TABLE, 0)],
            0,
        ),
        (
            "a long chain",
            vec![descriptor(DATA + 0x10_0000, 16 * 1025, TABLE, 0)],
            0,
        ),
    ]
}

#[test]
fn broken_chains_need_a_reset_and_a_reset_mends() {
    for (what, descriptors, head) in broken_chains() {
        for queue in [0, 1] {
            let (mut driver, log) = started(INDIRECT);
            driver.write_memory(DATA + 0x3000, &[0; 16]);
            driver.write_descriptor(DATA + 0x4000, 0, descriptor(DATA + 0x4000, 16, TABLE, 0));
            for index in 0..1025 {
                let next = descriptor(DATA, 1, NEXT, (index + 1) % 1025);
                let last = descriptor(DATA, 1, 0, 0);
                let raw = if index == 1024 { last } else { next };
                driver.write_descriptor(DATA + 0x10_0000, index, raw);
            }
            driver.add_raw(queue, &descriptors, head);
            driver.notify(queue);
            driver.wait_needs_reset();
            assert_eq!(log.served.load(Ordering::SeqCst), 0, "{what}");
            assert_eq!(driver.used(queue), None, "{what}");
            // The broken device serves nothing more.
            driver.add(1 - queue, &[Part::Out(DATA, 1)]);
            driver.notify(1 - queue);
            driver.start(0);
            echo_once(&mut driver, queue);
            assert_eq!(log.served.load(Ordering::SeqCst), 1, "{what}");
        }
    }
}

#[test]
fn an_available_index_beyond_the_queue_needs_a_reset() {
    let (mut driver, log) = started(0);
    let index = driver.rings[0].base + 0x4002;
    driver.write_memory(index, &17_u16.to_le_bytes());
    driver.notify(0);
    driver.wait_needs_reset();
    assert_eq!(log.served.load(Ordering::SeqCst), 0);
}

#[test]
fn a_paused_device_stands_still_and_goes_on() {
    let (mut driver, log) = started(0);
    echo_once(&mut driver, 0);
    driver.device.pause();
    driver.device.pause();
    let head = driver.add(0, &[Part::Out(DATA, 1)]);
    driver.notify(0);
    let saved = driver.device.save().unwrap();
    assert_eq!(saved.device, DeviceSnapshot::Test(1));
    assert_eq!(saved.transport.queues[0].next_available, 1);
    assert_eq!(log.served.load(Ordering::SeqCst), 1);
    driver.device.resume();
    assert!(driver.device.save().is_none());
    assert_eq!(driver.wait_used(0), (head, 0));
}

#[test]
fn a_guest_moves_with_its_requests_and_its_interrupt() {
    for features in [0, EVENT_INDEX] {
        let (mut driver, _) = started(features | 1);
        for _ in 0..20 {
            echo_once(&mut driver, 0);
        }
        // One is done and not yet seen by the driver, one comes too late for the source.
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
        assert_eq!(after.device, DeviceSnapshot::Test(23));
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
    // Anything goes, as long as the driver is not ready.
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
    let broken: [(&str, Change); 8] = [
        ("type", |state| state.transport.device_type = 1),
        ("status", |state| state.transport.status = 0x1000),
        ("features", |state| {
            state.transport.driver_features |= 1 << 50
        }),
        ("queues", |state| state.transport.queues.truncate(1)),
        ("entries", |state| state.transport.queues[0].max_size = 7),
        ("7 entries", |state| state.transport.queues[0].size = 7),
        ("guest memory", |state| {
            state.transport.queues[0].used_ring = LOW_END;
        }),
        ("another kind", |state| {
            state.device = DeviceSnapshot::Entropy
        }),
    ];
    for (word, change) in broken {
        let mut state = good.clone();
        change(&mut state);
        let (interrupt, _line) = interrupt();
        let device = Box::new(Echo::default());
        let result = VirtioMmio::restore("_echo0", device, memory(), interrupt, &state);
        let error = result.err().expect(word).to_string();
        assert!(
            error.starts_with("_echo0: ") && error.contains(word),
            "{error}"
        );
    }
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

/// Panics when it is notified.
struct Broken;

impl<M: GuestAddressSpace> Device<M> for Broken {
    fn identity(&self) -> Identity {
        Device::<M>::identity(&Echo::default())
    }
    fn notified(
        &mut self,
        _: usize,
        mut session: Session<'_, M>,
        _: &mut Watch<'_, '_>,
    ) -> Result<(), DeviceError> {
        match session.pop(0)? {
            Some(_) => panic!("this test's device panics"),
            None => Ok(()),
        }
    }
    fn save(&self) -> DeviceSnapshot {
        DeviceSnapshot::Test(0)
    }
    fn restore(&mut self, _: &DeviceSnapshot) -> Result<(), DeviceStateError> {
        Ok(())
    }
}

#[test]
fn nobody_waits_for_a_worker_that_is_gone() {
    let mut driver = Driver::new(|_| Box::new(Broken));
    driver.start(0);
    driver.add(0, &[Part::Out(DATA, 1)]);
    driver.notify(0);
    driver.wait_needs_reset();
    driver.device.pause();
    assert!(driver.device.save().is_some());
    driver.device.resume();
    // A reset is done, but the device does not come back.
    assert!(driver.negotiate(VERSION_1));
    driver.set(0x70, RUNNING);
    driver.wait_needs_reset();
    assert!(driver.device.failure().unwrap().contains("thread ended"));
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
        VirtioMmio::new("_echo77", Box::new(Echo::default()), memory(), interrupt).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    // A thread names itself when it starts.
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

    /// A guest that writes anything to registers and rings ends in a state from which a reset recovers.
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
