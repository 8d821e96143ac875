//! The port bus: which device answers at which x86 I/O port.
//!
//! An access that no device claims reads as all ones and writes nowhere, as on the ISA bus, and is
//! counted, so that a guest which probes for hardware neither fails nor goes unseen.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device with registers in I/O port space.
pub trait PortDevice: Send {
    /// Fills `data` (1, 2 or 4 bytes) from the register at `offset` ports above the device's first.
    fn read(&mut self, offset: u16, data: &mut [u8]);

    /// Takes `data` (1, 2 or 4 bytes) for the register at `offset` ports above the device's first.
    fn write(&mut self, offset: u16, data: &[u8]);
}

/// `count` ports from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest port.
    pub first: u16,
    /// How many ports, at least 1.
    pub count: u16,
}

impl PortRange {
    fn offset_of(self, port: u16) -> Option<u16> {
        port.checked_sub(self.first)
            .filter(|offset| *offset < self.count)
    }

    fn overlaps(self, other: Self) -> bool {
        self.offset_of(other.first).is_some() || other.offset_of(self.first).is_some()
    }
}

/// Why a device was not put on the bus.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortsError {
    /// The range is empty or passes port 0xffff.
    #[error("no such ports: {} from {:#x}", .0.count, .0.first)]
    Invalid(PortRange),
    /// Another device answers there already.
    #[error("ports {:#x}+{} are taken by the device at {:#x}", .new.first, .new.count, .taken.first)]
    Overlap {
        /// The range that was asked for.
        new: PortRange,
        /// The range that is there.
        taken: PortRange,
    },
}

type Shared = Arc<Mutex<dyn PortDevice>>;

/// The devices in I/O port space. Shared by all vCPU threads once it is built.
#[derive(Default)]
pub struct PortBus {
    devices: Vec<(PortRange, Shared)>,
    unclaimed: AtomicU64,
}

impl PortBus {
    /// A bus with no device on it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer at `range`.
    ///
    /// # Errors
    /// An empty or overflowing range, and one that overlaps an earlier one.
    pub fn insert(&mut self, range: PortRange, device: Shared) -> Result<(), PortsError> {
        if range.count == 0 || range.first.checked_add(range.count - 1).is_none() {
            return Err(PortsError::Invalid(range));
        }
        if let Some((taken, _)) = self.devices.iter().find(|(other, _)| other.overlaps(range)) {
            return Err(PortsError::Overlap {
                new: range,
                taken: *taken,
            });
        }
        self.devices.push((range, device));
        Ok(())
    }

    /// A guest's `in` from `port`: fills `data`, with ones where no device answers.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        match self.at(port) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
    }

    /// A guest's `out` of `data` to `port`; dropped where no device answers.
    pub fn write(&self, port: u16, data: &[u8]) {
        match self.at(port) {
            Some((offset, device)) => lock(device).write(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Accesses so far that no device claimed.
    #[must_use]
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    fn at(&self, port: u16) -> Option<(u16, &Shared)> {
        self.devices
            .iter()
            .find_map(|(range, device)| Some((range.offset_of(port)?, device)))
    }
}

/// A device whose owner panicked is still the guest's device: its registers are plain values.
fn lock(device: &Shared) -> MutexGuard<'_, dyn PortDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Register(Vec<u8>);

    impl PortDevice for Register {
        fn read(&mut self, offset: u16, data: &mut [u8]) {
            data.fill(self.0[usize::from(offset)]);
        }
        fn write(&mut self, offset: u16, data: &[u8]) {
            self.0[usize::from(offset)] = data[0];
        }
    }

    fn register(count: u16) -> Shared {
        Arc::new(Mutex::new(Register(vec![0; usize::from(count)])))
    }

    #[test]
    fn an_access_reaches_the_device_that_claims_the_port() {
        let mut bus = PortBus::new();
        bus.insert(
            PortRange {
                first: 0x10,
                count: 4,
            },
            register(4),
        )
        .unwrap();
        bus.insert(
            PortRange {
                first: 0x14,
                count: 1,
            },
            register(1),
        )
        .unwrap();
        bus.write(0x13, &[7]);
        bus.write(0x14, &[9]);
        let mut byte = [0];
        bus.read(0x13, &mut byte);
        assert_eq!(byte, [7]);
        bus.read(0x14, &mut byte);
        assert_eq!(byte, [9]);
        assert_eq!(bus.unclaimed(), 0);
    }

    #[test]
    fn an_unclaimed_port_reads_all_ones_and_is_counted() {
        let bus = PortBus::new();
        let mut data = [0; 4];
        bus.read(0xcf8, &mut data);
        bus.write(0xcf8, &[1, 2, 3, 4]);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(bus.unclaimed(), 2);
    }

    #[test]
    fn overlapping_and_impossible_ranges_are_refused() {
        let mut bus = PortBus::new();
        let taken = PortRange {
            first: 0x3f8,
            count: 8,
        };
        bus.insert(taken, register(8)).unwrap();
        for first in [0x3f1, 0x3f8, 0x3ff] {
            let new = PortRange { first, count: 8 };
            assert_eq!(
                bus.insert(new, register(8)),
                Err(PortsError::Overlap { new, taken })
            );
        }
        bus.insert(
            PortRange {
                first: 0x400,
                count: 1,
            },
            register(1),
        )
        .unwrap();
        bus.insert(
            PortRange {
                first: 0xffff,
                count: 1,
            },
            register(1),
        )
        .unwrap();
        for invalid in [
            PortRange { first: 1, count: 0 },
            PortRange {
                first: 0xffff,
                count: 2,
            },
        ] {
            assert_eq!(
                bus.insert(invalid, register(1)),
                Err(PortsError::Invalid(invalid))
            );
        }
    }
}
