//! The KVM monitor Ferry as a library: guests, their memory and its dirty logs, live migration, and the API.
//!
//! A program that launches guests creates a [`monitor::Monitor`]; [`api`] serves its calls on a socket. A monitor with
//! devices of its own can take the parts below: [`machine`], [`memory`], [`kvm`] and [`vcpu`], or the crate
//! `ferry-migration` alone.

pub mod api;
pub mod boot;
pub mod complain;
pub mod config;
pub mod events;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod migrate;
pub mod monitor;
mod panics;
pub mod serial;
pub mod size;
mod socket_path;
pub mod vcpu;
