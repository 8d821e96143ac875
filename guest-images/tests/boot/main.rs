//! The guest programs, booted in real machines: QEMU with KVM where there is one, and emulated.

mod dirtier;
mod hello;
mod machine;
mod ring_attacker;
