//! A machine: memory, vCPUs, interrupt controllers and devices, built and taken apart in one place.
//!
//! ```text
//! EmptyMachine ─ boot ────┐
//!              ─ restore ─┴→ Paused ⇄ Running
//! ```
//!
//! An [`EmptyMachine`] has memory and vCPUs without contents: a guest that arrives by migration brings its state
//! last. Whether a machine runs is its type, [`Running`] or [`Paused`]: state can be saved only from the latter.

mod dirty_logs;
mod empty;
mod end;
mod error;
mod facts;
mod gauges;
mod kvm;
mod live;
mod port_devices;
#[cfg(test)]
mod recorded;
mod sections;
mod virtio;

use std::sync::Arc;

use devices::SerialOutput;

use crate::kvm::dirty_log::DirtyLogMode;
use crate::memory::Backing;
use crate::vcpu::GuestEnd;

pub use dirty_logs::DirtyLogs;
pub use empty::EmptyMachine;
pub use error::MachineError;
pub(crate) use facts::cpuid;
pub use gauges::Gauges;
pub use live::{Failed, Live, Machine, Paused, RunState, Running};
pub use virtio::{DeviceCounters, DevicesError, DiskError, OnLoss, TapError, check_host_resources};

/// Maximum number of vCPUs of a guest.
pub const MAX_CPUS: u32 = 64;

/// Size and composition of a machine.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// Kind of host memory behind the RAM.
    pub backing: Backing,
    /// Mode of KVM's dirty log. `None` selects the best that the host has.
    pub dirty_log: Option<DirtyLogMode>,
}

/// Callbacks and outputs that connect a machine to its monitor.
pub struct Wiring {
    /// Sink of the serial port's output.
    pub serial_output: SerialOutput,
    /// Called once, from any thread, when the guest ends by itself.
    pub on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>,
    /// Called from any thread when a process that serves a device is lost, with the name of the device and the reason.
    pub on_loss: OnLoss,
}

type Result<T> = std::result::Result<T, MachineError>;

fn kvm_error(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm {
        call,
        source: source.into(),
    }
}
