//! A guest that writes anything to the registers of a device and to its rings, and a host that goes on
//! meanwhile.

pub mod hosts;
mod script;

pub use script::{Host, Memory, Script};
