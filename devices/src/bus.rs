//! Buses: which device handles an access to a port or a guest-physical address.
//!
//! The port bus and the MMIO bus are one type, [`Bus`], over two address spaces. An access that no device claims reads
//! as all ones and writes nowhere, as on a PC, and is counted: a guest may probe for hardware, and the counter shows
//! that it did.

use std::fmt::{self, Debug, LowerHex};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Address space of the guest in which devices have registers.
pub trait AddressSpace: Copy + Debug + Eq + Send + Sync + 'static {
    /// Address, or distance between two addresses.
    type Address: Copy + Debug + Eq + LowerHex + Into<u64> + TryFrom<u64> + Send + Sync;

    /// Name of the space, for messages.
    const NAME: &'static str;
    /// Highest address of the space.
    const LAST: u64;

    /// Returns how many bytes of an access of `len` bytes must lie within a device's range for the device to claim the
    /// access.
    fn claimed(len: u64) -> u64;
}

/// I/O port space of an x86 processor. The first port of an access selects the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortSpace {}

impl AddressSpace for PortSpace {
    type Address = u16;

    const NAME: &'static str = "port";
    const LAST: u64 = 0xffff;

    fn claimed(_: u64) -> u64 {
        1
    }
}

/// Guest-physical memory space. A device claims an access only if the whole access lies within its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MmioSpace {}

impl AddressSpace for MmioSpace {
    type Address = u64;

    const NAME: &'static str = "MMIO";
    const LAST: u64 = u64::MAX;

    fn claimed(len: u64) -> u64 {
        len
    }
}

/// Device with registers in the address space `S`.
///
/// An access has 1, 2 or 4 bytes in port space and 1 to 8 bytes in memory space.
pub trait BusDevice<S: AddressSpace>: Send {
    /// Fills `data` from the register at `offset` from the start of the device's range.
    fn read(&mut self, offset: S::Address, data: &mut [u8]);

    /// Writes `data` to the register at `offset` from the start of the device's range.
    fn write(&mut self, offset: S::Address, data: &[u8]);
}

/// Range of addresses that a device claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusRange<S: AddressSpace> {
    /// Lowest address.
    pub base: S::Address,
    /// Number of ports or bytes, at least 1.
    pub len: S::Address,
}

impl<S: AddressSpace> BusRange<S> {
    /// Returns the highest address, or nothing if the range is empty or passes the end of the address space.
    fn last(self) -> Option<u64> {
        let last = self
            .base
            .into()
            .checked_add(self.len.into().checked_sub(1)?)?;
        (last <= S::LAST).then_some(last)
    }

    /// Returns the offset of an access of `len` bytes at `address` if this range claims it.
    fn offset_of(self, address: S::Address, len: u64) -> Option<S::Address> {
        let offset = address.into().checked_sub(self.base.into())?;
        let end = offset.checked_add(S::claimed(len))?;
        if end > self.len.into() {
            return None;
        }
        S::Address::try_from(offset).ok()
    }
}

impl<S: AddressSpace> fmt::Display for BusRange<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.base, self.len)
    }
}

/// Reason for which a bus refused a device.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError<S: AddressSpace> {
    /// The range is empty or passes the end of the address space.
    #[error("{space} range {0} is empty or passes the end of the address space", space = S::NAME)]
    Invalid(BusRange<S>),
    /// The range overlaps that of another device.
    #[error("{space} range {new} overlaps {taken}, the range of another device", space = S::NAME)]
    Overlap {
        /// Range of the new device.
        new: BusRange<S>,
        /// Range of the device that is on the bus already.
        taken: BusRange<S>,
    },
}

/// Device that a bus shares with its owner.
pub type SharedBusDevice<S> = Arc<Mutex<dyn BusDevice<S>>>;

/// Devices of one address space. All vCPU threads share it once it is built.
pub struct Bus<S: AddressSpace> {
    devices: Vec<(BusRange<S>, SharedBusDevice<S>)>,
    unclaimed: AtomicU64,
}

/// Bus for I/O ports.
pub type PortBus = Bus<PortSpace>;
/// Range of I/O ports.
pub type PortRange = BusRange<PortSpace>;
/// Bus for guest-physical addresses.
pub type MmioBus = Bus<MmioSpace>;
/// Range of guest-physical addresses.
pub type MmioRange = BusRange<MmioSpace>;

impl<S: AddressSpace> Default for Bus<S> {
    fn default() -> Self {
        Self {
            devices: Vec::new(),
            unclaimed: AtomicU64::new(0),
        }
    }
}

impl<S: AddressSpace> Bus<S> {
    /// Creates a bus without devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `device`, which claims `range`.
    ///
    /// # Errors
    /// Returns [`BusError`] if the range is empty, passes the end of the address space, or overlaps the range of
    /// another device.
    pub fn insert(
        &mut self,
        range: BusRange<S>,
        device: SharedBusDevice<S>,
    ) -> Result<(), BusError<S>> {
        let last = range.last().ok_or(BusError::Invalid(range))?;
        let overlaps = |other: &BusRange<S>| {
            range.base.into() <= other.last().unwrap_or(S::LAST) && other.base.into() <= last
        };
        if let Some((taken, _)) = self.devices.iter().find(|(other, _)| overlaps(other)) {
            return Err(BusError::Overlap {
                new: range,
                taken: *taken,
            });
        }
        self.devices.push((range, device));
        Ok(())
    }

    /// Handles a load or `in` of the guest: fills `data` from `address`, with ones if no device claims the access.
    pub fn read(&self, address: S::Address, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
    }

    /// Handles a store or `out` of the guest: writes `data` to `address`, or drops it if no device claims the access.
    pub fn write(&self, address: S::Address, data: &[u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => lock(device).write(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Returns the number of accesses so far that no device claimed.
    #[must_use]
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    /// Returns the device that claims an access of `len` bytes at `address`, and the offset within its range.
    fn find(&self, address: S::Address, len: usize) -> Option<(S::Address, &SharedBusDevice<S>)> {
        let len = u64::try_from(len).ok()?;
        self.devices
            .iter()
            .find_map(|(range, device)| Some((range.offset_of(address, len)?, device)))
    }
}

/// Locks a device. After a panic of another thread that held the lock, its registers are still plain valid values.
fn lock<S: AddressSpace>(
    device: &SharedBusDevice<S>,
) -> MutexGuard<'_, dyn BusDevice<S> + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Device whose registers are bytes of memory.
    struct Memory(Vec<u8>);

    impl<S: AddressSpace> BusDevice<S> for Memory {
        fn read(&mut self, offset: S::Address, data: &mut [u8]) {
            let start = usize::try_from(offset.into()).unwrap();
            for (byte, register) in data.iter_mut().zip(&self.0[start..]) {
                *byte = *register;
            }
        }
        fn write(&mut self, offset: S::Address, data: &[u8]) {
            let start = usize::try_from(offset.into()).unwrap();
            for (byte, register) in data.iter().zip(&mut self.0[start..]) {
                *register = *byte;
            }
        }
    }

    fn memory<S: AddressSpace>(bytes: usize) -> SharedBusDevice<S> {
        Arc::new(Mutex::new(Memory(vec![0; bytes])))
    }

    fn address<S: AddressSpace>(value: u64) -> S::Address {
        S::Address::try_from(value).ok().unwrap()
    }

    fn range<S: AddressSpace>(base: u64, len: u64) -> BusRange<S> {
        BusRange {
            base: address::<S>(base),
            len: address::<S>(len),
        }
    }

    /// A bus with devices at 0x1000+0x10 and 0x1010+8.
    fn two_devices<S: AddressSpace>() -> Bus<S> {
        let mut bus = Bus::new();
        bus.insert(range(0x1000, 0x10), memory(0x10)).unwrap();
        bus.insert(range(0x1010, 8), memory(8)).unwrap();
        bus
    }

    fn an_access_reaches_the_device_that_claims_it<S: AddressSpace>() {
        let bus = two_devices::<S>();
        bus.write(address::<S>(0x100c), &[1, 2, 3, 4]);
        bus.write(address::<S>(0x1010), &[5; 8]);
        let mut data = [0; 4];
        bus.read(address::<S>(0x100c), &mut data);
        assert_eq!(data, [1, 2, 3, 4]);
        bus.read(address::<S>(0x1014), &mut data);
        assert_eq!(data, [5; 4]);
        assert_eq!(bus.unclaimed(), 0);
    }

    fn an_unclaimed_access_reads_all_ones_and_is_counted<S: AddressSpace>() {
        let bus = two_devices::<S>();
        for (number, at) in (1..).zip([0, 0xfff, 0x1018, S::LAST]) {
            let mut data = [0; 4];
            bus.read(address::<S>(at), &mut data);
            bus.write(address::<S>(at), &[1, 2, 3, 4]);
            assert_eq!(data, [0xff; 4]);
            assert_eq!(bus.unclaimed(), 2 * number);
        }
    }

    fn overlapping_and_invalid_ranges_are_refused<S: AddressSpace>() {
        let mut bus = Bus::<S>::new();
        let taken = range(0x1000, 0x200);
        bus.insert(taken, memory(1)).unwrap();
        for new in [
            range(0xfff, 2),
            range(0xff9, 8),
            taken,
            range(0x11ff, 1),
            range(0, 0x2000),
        ] {
            let refused = bus.insert(new, memory(1));
            assert_eq!(refused, Err(BusError::Overlap { new, taken }));
        }
        bus.insert(range(0x1200, 1), memory(1)).unwrap();
        bus.insert(range(S::LAST, 1), memory(1)).unwrap();
        for invalid in [range(1, 0), range(S::LAST, 2), range(S::LAST, S::LAST)] {
            let refused = bus.insert(invalid, memory(1));
            assert_eq!(refused, Err(BusError::Invalid(invalid)));
            let message = refused.unwrap_err().to_string();
            assert!(message.starts_with(S::NAME), "{message}");
        }
    }

    /// Runs every generic test for one address space.
    macro_rules! suite {
        ($name:ident, $space:ty) => {
            mod $name {
                #[test]
                fn an_access_reaches_the_device_that_claims_it() {
                    super::an_access_reaches_the_device_that_claims_it::<$space>();
                }
                #[test]
                fn an_unclaimed_access_reads_all_ones_and_is_counted() {
                    super::an_unclaimed_access_reads_all_ones_and_is_counted::<$space>();
                }
                #[test]
                fn overlapping_and_invalid_ranges_are_refused() {
                    super::overlapping_and_invalid_ranges_are_refused::<$space>();
                }
            }
        };
    }

    suite!(ports, super::PortSpace);
    suite!(mmio, super::MmioSpace);

    #[test]
    fn an_mmio_access_must_lie_wholly_in_a_device() {
        let bus: MmioBus = two_devices();
        let mut data = [0; 4];
        bus.read(0x100e, &mut data);
        assert_eq!((data, bus.unclaimed()), ([0xff; 4], 1));
        // A bus that wrapped around would find the device at 0x1000.
        bus.read(u64::MAX - 3, &mut [0; 8]);
        assert_eq!(bus.unclaimed(), 2);
    }

    #[test]
    fn a_port_access_belongs_to_its_first_port() {
        let bus: PortBus = two_devices();
        bus.write(0x100e, &[1, 2, 3, 4]);
        let mut data = [0; 4];
        bus.read(0x100e, &mut data);
        assert_eq!(data, [1, 2, 0, 0], "the device has two ports left");
        bus.read(0x1010, &mut data);
        assert_eq!(data, [0; 4]);
        assert_eq!(bus.unclaimed(), 0);
    }
}
