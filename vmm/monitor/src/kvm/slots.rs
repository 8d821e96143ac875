//! KVM memory slots: guest RAM as KVM knows it, and whether writes to it are logged.
//!
//! This file has `unsafe` for one call: KVM is given host addresses that the guest may then write.
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
    /// Its number.
    pub id: u32,
    /// The guest-physical memory that it maps.
    pub range: GpaRange,
    host_address: u64,
}

/// The memory slots of a machine. They keep the memory that KVM maps.
pub struct Slots {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    slots: Vec<Slot>,
}

/// Why a slot could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[error("memory slot {id} at {start:#x} ({bytes} bytes): {source}")]
pub struct SlotError {
    id: u32,
    start: u64,
    bytes: u64,
    source: io::Error,
}

impl Slots {
    /// Gives all of `ram` to the machine, a slot for each of its ranges.
    ///
    /// # Errors
    /// KVM's, with the slot.
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

    /// The slots, in ascending order of address.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The memory behind them.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The machine that they belong to.
    #[must_use]
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Begins to log writes to every slot. Idempotent.
    ///
    /// # Errors
    /// KVM's, with the slot.
    pub fn start_logging(&self) -> Result<(), SlotError> {
        self.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Ends logging; what was logged is forgotten. Idempotent.
    ///
    /// # Errors
    /// KVM's, with the slot.
    pub fn stop_logging(&self) -> Result<(), SlotError> {
        self.set_flags(0)
    }

    fn set_flags(&self, flags: u32) -> Result<(), SlotError> {
        self.slots.iter().try_for_each(|slot| self.set(slot, flags))
    }

    fn set(&self, slot: &Slot, flags: u32) -> Result<(), SlotError> {
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags,
            guest_phys_addr: slot.range.start().0,
            memory_size: byte_len(&slot.range),
            userspace_addr: slot.host_address,
        };
        // SAFETY: the host range is a mapping of `self.ram`, which lives as long as these slots, and
        // the machine cannot run without them: `Machine` keeps them beside its vCPUs. The guest's
        // memory is only ever accessed through volatile copies, so that its writes are no data races.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|error| SlotError {
            id: slot.id,
            start: region.guest_phys_addr,
            bytes: region.memory_size,
            source: error.into(),
        })
    }
}
