//! Device models for a virtual machine monitor, over vm-memory, event-manager and plain file descriptors.
//!
//! Each device consists of constants with their source in a specification, a snapshot type with its saved state
//! ([`SavedState`]), and its behavior. No device knows KVM: an interrupt is an
//! [`EventFd`](vmm_sys_util::eventfd::EventFd) that the monitor connects to an interrupt controller, and the monitor
//! passes register accesses to a [`Bus`], which calls a [`BusDevice`].

pub mod acpi;
mod bus;
mod debug_exit;
mod rate_limit;
mod reset;
mod rtc;
mod serial;
pub mod state;
pub mod virtio;

pub use bus::{
    AddressSpace, Bus, BusDevice, BusError, BusRange, MmioBus, MmioRange, MmioSpace, PortBus,
    PortRange, PortSpace, SharedBusDevice,
};
pub use debug_exit::{DEBUG_EXIT_PORT, DebugExit};
pub use rate_limit::{Rate, RateLimit};
pub use reset::{I8042_PORT, I8042_PORTS, ResetController};
pub use rtc::{HostClock, RTC_CENTURY, RTC_PORT, RTC_PORTS, Rtc, RtcError, RtcMemory, RtcSnapshot};
pub use serial::{
    COM1_INTERRUPT, COM1_PORT, COM1_PORTS, Serial, SerialError, SerialInput, SerialOutput,
    SerialSnapshot,
};
pub use state::{SavedState, StateError, decode_state, encode_state};
