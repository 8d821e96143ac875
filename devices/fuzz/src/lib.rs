//! Guest that writes arbitrary values to the registers and rings of a device, while the host is active, too.

pub mod hosts;
mod script;

pub use script::{Host, Memory, Script};
