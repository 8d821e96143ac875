//! I/O ports of a hardware-reduced ACPI platform: sleep control and status, reset, and pending events of the Generic
//! Event Device.
//!
//! The monitor generates the ACPI tables that describe these ports to the guest.
//!
//! ```text
//! 0x600  sleep control, 1 byte      0x602  reset, 1 byte
//! 0x601  sleep status, 1 byte       0x604  pending events, 4 bytes
//! ```
//!
//! Specification: ACPI 6.5, sections 4.1 (hardware-reduced ACPI), 4.8.3.6 (reset register), 4.8.3.7 (sleep registers)
//! and 5.6.9 (interrupt-signaled events).

mod events;
mod reset;
mod sleep;

pub use events::{
    EVENTS_PORT, EVENTS_PORTS, EventsError, EventsSnapshot, GENERIC_EVENTS_INTERRUPT, GenericEvent,
    GenericEvents,
};
pub use reset::{RESET_PORT, RESET_VALUE, ResetRegister};
pub use sleep::{SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};
pub use sleep::{SLEEP_PORTS, SLEEP_TYPE_OFF, SleepControl, SleepError, SleepSnapshot};
