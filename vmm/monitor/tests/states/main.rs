//! The states of a monitor's guest on this host's KVM: every call in every state, random sequences of calls and faults,
//! and panics.

mod guest;
mod panics;
mod peers;
mod races;
mod sequences;
mod walk;
