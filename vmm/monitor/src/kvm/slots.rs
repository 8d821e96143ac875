//! KVM memory slots: the mapping of guest RAM in KVM, and the flag that logs writes to it.
//!
//! This file has `unsafe` code because KVM_SET_USER_MEMORY_REGION takes host addresses that the guest may then write.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;

use ept::GpaRange;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::memory::{GuestRam, byte_len};

/// One KVM memory slot.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// Number of the slot.
    pub id: u32,
    /// Guest-physical range of the slot.
    pub range: GpaRange,
    host_address: u64,
}

/// Memory slots of a machine. They keep the RAM alive that KVM maps.
pub struct Slots {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    slots: Vec<Slot>,
}

/// KVM rejected a memory slot or a change of its flags.
#[derive(Debug, thiserror::Error)]
#[error("memory slot {id} at {start:#x} ({bytes} bytes): {source}")]
pub struct SlotError {
    id: u32,
    start: u64,
    bytes: u64,
    source: io::Error,
}

impl Slots {
    /// Creates one slot for each range of `ram`.
    ///
    /// # Errors
    /// Returns [`SlotError`] if KVM rejects a slot.
    pub fn new(vm: Arc<VmFd>, ram: Arc<GuestRam>) -> Result<Self, SlotError> {
        let slots = (0..)
            .zip(ram.mappings())
            .map(|(id, (range, host_address))| Slot {
                id,
                range,
                host_address,
            })
            .collect();
        let slots = Self { vm, ram, slots };
        slots.set_flags(0)?;
        Ok(slots)
    }

    /// Returns the slots in ascending order of address.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Returns the RAM that the slots map.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Returns the VM that the slots belong to.
    #[must_use]
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Starts logging writes to all slots. Has no effect on a slot that is logged already.
    ///
    /// # Errors
    /// Returns [`SlotError`] if KVM rejects the change of a slot.
    pub fn start_logging(&self) -> Result<(), SlotError> {
        self.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Stops logging for all slots, and discards the logs. Has no effect on a slot that is not logged.
    ///
    /// # Errors
    /// Returns [`SlotError`] if KVM rejects the change of a slot.
    pub fn stop_logging(&self) -> Result<(), SlotError> {
        self.set_flags(0)
    }

    /// Sets the flags of all slots.
    fn set_flags(&self, flags: u32) -> Result<(), SlotError> {
        self.slots.iter().try_for_each(|slot| self.set(slot, flags))
    }

    /// Creates a slot, or changes its flags.
    fn set(&self, slot: &Slot, flags: u32) -> Result<(), SlotError> {
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags,
            guest_phys_addr: slot.range.start().0,
            memory_size: byte_len(&slot.range),
            userspace_addr: slot.host_address,
        };
        // SAFETY: the host range is a mapping of `self.ram`, which lives as long as these slots. vCPUs do not run
        // without the slots, because `Machine` owns both. This process accesses guest memory only by volatile copies,
        // so that writes of the guest are not data races.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|error| SlotError {
            id: slot.id,
            start: region.guest_phys_addr,
            bytes: region.memory_size,
            source: error.into(),
        })
    }
}
