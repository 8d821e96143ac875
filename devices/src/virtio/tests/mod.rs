//! Transport, queues and worker, tested with a minimal device model.

mod lifecycle;
mod panics;
mod registers;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use minicbor::{Decode, Encode};
use vm_memory::GuestAddressSpace;

use super::device::read_config;
use super::testing::*;
use super::*;
use crate::{BusDevice, SavedState};

/// Device model that returns the data of each chain in upper case, and counts its calls.
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
    /// Feature 1 requires feature 0.
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
    fn started(
        &mut self,
        _: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        self.log.started.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn notified(
        &mut self,
        queue: usize,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        queues.drain(queue, |queues, mut chain| {
            let mut data = [0; 256];
            let len = queues.read(&mut chain.readable, &mut data)?;
            data.make_ascii_uppercase();
            self.served += 1;
            self.log.served.fetch_add(1, Ordering::SeqCst);
            Ok(Completion::used(
                queues.write(&mut chain.writable, &data[..len])?,
            ))
        })
    }
    fn reset(&mut self, _: &mut EventRegistry<'_, '_>) {
        self.served = 0;
        self.log.resets.fetch_add(1, Ordering::SeqCst);
    }
    fn save(&self) -> DeviceState {
        served(self.served)
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let EchoSnapshot { served } = state.decode("echo")?;
        self.served = served;
        Ok(())
    }
}

/// State of [`Echo`] after it served `served` chains.
#[derive(Encode, Decode)]
#[cbor(map)]
struct EchoSnapshot {
    #[n(0)]
    served: u32,
}

impl SavedState for EchoSnapshot {
    const VERSION: u16 = 1;
}

fn served(served: u32) -> DeviceState {
    DeviceState::new(&EchoSnapshot { served })
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

fn descriptor(address: u64, bytes: u32, flags: u16, next: u16) -> Raw {
    Raw {
        address,
        bytes,
        flags,
        next,
    }
}

/// Malformed chains: a name, descriptors from index 0 on, and the head.
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
            // The device must not serve any queue after a failure.
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
