//! What the guest program `dirtier` and its host side share, word for word: the command line, the
//! stamps in the pages, the order of the visits, and the lines on the serial port.
//!
//! Everything here is plain computation on `core`; the guest includes these very files, so that
//! what is tested on the host is what runs in the guest.

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
