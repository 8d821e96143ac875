//! Everything that talks to KVM about a whole machine: what the host has, memory slots, the dirty log,
//! and the state that travels.

mod abi;
pub mod dirty_log;
pub mod host;
pub mod slots;
pub mod state;
pub mod time;
