//! The registers of a hardware-reduced ACPI platform, in I/O port space: sleep control and status, reset,
//! and the selector of the Generic Event Device. The tables that name them to the guest are the monitor's.
//!
//! ```text
//! 0x600  sleep control, a byte      0x602  reset, a byte
//! 0x601  sleep status, a byte       0x604  pending events, 4 bytes
//! ```
//!
//! Specification: ACPI 6.5, sections 4.1 (hardware-reduced), 4.8.3.6 (reset register), 4.8.3.7 (sleep
//! registers) and 5.6.9 (interrupt-signaled events).

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
