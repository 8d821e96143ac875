//! The KVM monitor Ferry, as a library: guests, their memory and its dirty logging, live migration.
//!
//! Ferry's program is a thin layer over this crate. Other monitors can take parts of it:
//! [`migration`] needs nothing of the rest but the traits in [`migration::guest`].

pub mod api;
pub mod boot;
pub mod carrier;
pub mod complain;
pub mod config;
pub mod events;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod monitor;
pub mod size;
pub mod vcpu;
