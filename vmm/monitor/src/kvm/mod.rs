//! Interfaces of KVM for a whole machine: capabilities of the host, memory slots, the dirty log, and the state that is
//! saved and restored.

mod abi;
pub mod dirty_log;
pub mod host;
pub mod slots;
pub mod state;
pub mod time;
