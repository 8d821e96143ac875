//! Code that the guest program `dirtier` and the host share: the command line, the stamps in the
//! pages, the order of visits, and the reports on the serial port.
//!
//! The guest includes these source files, so that the host tests the code that runs in the guest.
//! They use `core` only.

mod config;
mod layout;
mod order;
mod plan;
mod report;
mod size;
mod stamp;

pub use config::{Config, ConfigError, Pattern, Selftest};
pub use layout::{Layout, Share};
pub use order::Order;
pub use plan::{COLD_STRIPS, Leg, Plan, Position, Region, Span};
pub use report::{Fault, GuestReport, Totals};
pub use size::Size;
pub use stamp::{Finding, PLACES, Stamp, WORDS, judge};
