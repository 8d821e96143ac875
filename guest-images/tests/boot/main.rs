//! Tests that boot the guest programs in QEMU, with emulation and, if available, with KVM.

mod dirtier;
mod hello;
mod machine;
mod ring_attacker;
