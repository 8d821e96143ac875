//! Device models of the monitor Ferry, over vm-memory, event-manager and plain file descriptors.
//!
//! A device here is three things: its specification (constants with their source), its state (a plain
//! struct whose fields are all named in save and restore), and its behaviour. No device knows KVM: an
//! interrupt is an [`EventFd`](vmm_sys_util::eventfd::EventFd) that somebody else wires up, and a
//! register access arrives through the traits [`PortDevice`] and [`MmioDevice`].

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
