//! Errors of machines.

use std::io;

use devices::acpi::{EventsError, SleepError};
use devices::{BusError, PortSpace, RtcError, SerialError};
use ept::OpenError;

use super::virtio::DevicesError;
use crate::boot::{BootError, CpuidError};
use crate::kvm::dirty_log::LogError;
use crate::kvm::host::HostError;
use crate::kvm::slots::SlotError;
use crate::kvm::state::KvmStateError;
use crate::memory::MemoryError;
use crate::vcpu::KickError;

/// Reasons why a machine cannot be built, restored, paused, resumed or saved.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The KVM of this host cannot be used.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The number of vCPUs is 0 or above the limit.
    #[error("{0} vCPUs cannot be: from 1 to {1}")]
    Cpus(u32, u32),
    /// Guest memory cannot be allocated.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The view of guest memory for devices cannot be made.
    #[error("guest memory for devices: {0}")]
    DeviceMemory(#[source] io::Error),
    /// KVM rejected a call that builds a part of the machine.
    #[error("{call}: {source}")]
    Kvm {
        /// Name of the ioctl.
        call: &'static str,
        /// Error that KVM returned.
        source: io::Error,
    },
    /// KVM rejected a memory slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The CPUID of the guest cannot be built or set.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// The kernel or the initramfs cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM rejected a part of the state that is saved or restored.
    #[error("{section}: {source}")]
    State {
        /// Name of the section.
        section: String,
        /// Error of the KVM call.
        source: KvmStateError,
    },
    /// A section of saved state is missing, duplicated or cannot be decoded.
    #[error("section {section}: {why}")]
    Section {
        /// Name of the section.
        section: String,
        /// What is wrong with the section.
        why: String,
    },
    /// The saved state of the serial port is invalid.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The saved state of the real-time clock is invalid.
    #[error(transparent)]
    Rtc(#[from] RtcError),
    /// The saved state of the ACPI sleep registers is invalid.
    #[error(transparent)]
    Sleep(#[from] SleepError),
    /// The ACPI event register cannot be restored, or its interrupt cannot be raised.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// Two devices claim the same I/O port.
    #[error(transparent)]
    Ports(#[from] BusError<PortSpace>),
    /// A virtio device or its host resource cannot be used.
    #[error(transparent)]
    Devices(#[from] DevicesError),
    /// The thread of a vCPU cannot be started.
    #[error("vcpu{0}: {1}")]
    Thread(u32, #[source] io::Error),
    /// A vCPU did not leave the guest in time.
    #[error(transparent)]
    Kick(#[from] KickError),
    /// A vCPU cannot subscribe to the notifier of memory changes.
    #[error(transparent)]
    Notifier(#[from] OpenError),
    /// The dirty log cannot be started, read, cleared or stopped.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The guest has ended by itself: it reset, powered off or failed.
    #[error("the guest has ended")]
    Ended,
}
