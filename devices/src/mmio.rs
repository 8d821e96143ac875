//! The MMIO bus: which device answers at which guest-physical address.
//!
//! It behaves as the port bus does: an access that no device claims reads as all ones, writes nowhere,
//! and is counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device with registers in guest-physical memory space.
pub trait MmioDevice: Send {
    /// Fills `data` (1 to 8 bytes) from the register at `offset` bytes above the device's first.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data` (1 to 8 bytes) for the register at `offset` bytes above the device's first.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// `bytes` bytes of guest-physical space from `base` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioRange {
    /// The lowest guest-physical address.
    pub base: u64,
    /// How many bytes, at least 1.
    pub bytes: u64,
}

impl MmioRange {
    /// Where an access of `len` bytes at `address` begins in this range, if all of it lies there.
    fn offset_of(self, address: u64, len: u64) -> Option<u64> {
        let offset = address.checked_sub(self.base)?;
        (offset.checked_add(len)? <= self.bytes).then_some(offset)
    }

    /// The last address. The range is valid.
    fn last(self) -> u64 {
        self.base + (self.bytes - 1)
    }

    fn overlaps(self, other: Self) -> bool {
        self.base <= other.last() && other.base <= self.last()
    }
}

/// Why a device was not put on the bus.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MmioError {
    /// The range is empty or passes the end of the address space.
    #[error("no such addresses: {:#x} bytes from {:#x}", .0.bytes, .0.base)]
    Invalid(MmioRange),
    /// Another device answers there already.
    #[error("addresses {:#x}+{:#x} are taken by the device at {:#x}", .new.base, .new.bytes, .taken.base)]
    Overlap {
        /// The range that was asked for.
        new: MmioRange,
        /// The range that is there.
        taken: MmioRange,
    },
}

type Shared = Arc<Mutex<dyn MmioDevice>>;

/// The devices in memory space. Shared by all vCPU threads once it is built.
#[derive(Default)]
pub struct MmioBus {
    devices: Vec<(MmioRange, Shared)>,
    unclaimed: AtomicU64,
}

impl MmioBus {
    /// A bus with no device on it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer at `range`.
    ///
    /// # Errors
    /// An empty or overflowing range, and one that overlaps an earlier one.
    pub fn insert(&mut self, range: MmioRange, device: Shared) -> Result<(), MmioError> {
        if range.bytes == 0 || range.base.checked_add(range.bytes - 1).is_none() {
            return Err(MmioError::Invalid(range));
        }
        if let Some((taken, _)) = self.devices.iter().find(|(other, _)| other.overlaps(range)) {
            return Err(MmioError::Overlap {
                new: range,
                taken: *taken,
            });
        }
        self.devices.push((range, device));
        Ok(())
    }

    /// A guest's load from `address`: fills `data`, with ones where no device answers.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.at(address, data.len()) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
    }

    /// A guest's store of `data` to `address`; dropped where no device answers.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.at(address, data.len()) {
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

    fn at(&self, address: u64, len: usize) -> Option<(u64, &Shared)> {
        let len = u64::try_from(len).ok()?;
        self.devices
            .iter()
            .find_map(|(range, device)| Some((range.offset_of(address, len)?, device)))
    }
}

/// A device whose owner panicked is still the guest's device: its registers are plain values.
fn lock(device: &Shared) -> MutexGuard<'_, dyn MmioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Memory(Vec<u8>);

    impl MmioDevice for Memory {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            let start = usize::try_from(offset).unwrap();
            data.copy_from_slice(&self.0[start..start + data.len()]);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            let start = usize::try_from(offset).unwrap();
            self.0[start..start + data.len()].copy_from_slice(data);
        }
    }

    fn memory(bytes: usize) -> Shared {
        Arc::new(Mutex::new(Memory(vec![0; bytes])))
    }

    fn range(base: u64, bytes: u64) -> MmioRange {
        MmioRange { base, bytes }
    }

    #[test]
    fn an_access_reaches_the_device_that_claims_all_of_it() {
        let mut bus = MmioBus::new();
        bus.insert(range(0x1000, 0x10), memory(0x10)).unwrap();
        bus.insert(range(0x1010, 8), memory(8)).unwrap();
        bus.write(0x100c, &[1, 2, 3, 4]);
        bus.write(0x1010, &[5; 8]);
        let mut data = [0; 4];
        bus.read(0x100c, &mut data);
        assert_eq!(data, [1, 2, 3, 4]);
        bus.read(0x1014, &mut data);
        assert_eq!(data, [5; 4]);
        assert_eq!(bus.unclaimed(), 0);
        bus.read(0x100e, &mut data);
        assert_eq!((data, bus.unclaimed()), ([0xff; 4], 1));
    }

    #[test]
    fn an_unclaimed_address_reads_all_ones_and_is_counted() {
        let bus = MmioBus::new();
        let mut data = [0; 8];
        bus.read(u64::MAX - 3, &mut data);
        bus.write(0, &[1, 2, 3, 4]);
        assert_eq!(data, [0xff; 8]);
        assert_eq!(bus.unclaimed(), 2);
    }

    #[test]
    fn overlapping_and_impossible_ranges_are_refused() {
        let mut bus = MmioBus::new();
        let taken = range(0x1000, 0x200);
        bus.insert(taken, memory(1)).unwrap();
        for new in [
            range(0xfff, 2),
            taken,
            range(0x11ff, 1),
            range(0, 0x10_0000),
        ] {
            assert_eq!(
                bus.insert(new, memory(1)),
                Err(MmioError::Overlap { new, taken })
            );
        }
        bus.insert(range(0x1200, 1), memory(1)).unwrap();
        bus.insert(range(u64::MAX, 1), memory(1)).unwrap();
        for invalid in [range(1, 0), range(u64::MAX, 2)] {
            assert_eq!(
                bus.insert(invalid, memory(1)),
                Err(MmioError::Invalid(invalid))
            );
        }
    }
}
