//! Whole-system tests, the lab and comparisons with peers.
//!
//! The test programs are in `tests/tests`. This library has the modules that they share:
//!
//! - [`lab`]: an emulated KVM host with nested paging, built from [`kernels`], [`initramfs`], [`cpio`] and [`vmlinux`];
//! - [`linux_guest`]: a stock Linux kernel with a shell, which `ferry run` boots in the lab. [`linux_shell`] types commands
//!   at the shell, [`linux_disk`] has its disk, [`host_net`] and [`tap`] the host side of its network, and [`guest_memory`]
//!   reads its memory;
//! - [`ferry`]: controls processes of the program `ferry`; [`dirtier`] controls the guest in them;
//! - [`qemu`]: runs QEMU, with which migrations are compared, over [`qmp`];
//! - [`proxy`]: relays a migration and injects faults at frames that [`frames`] finds, or a changed [`header`];
//! - [`oracle`]: emulated memory management units, which walk the stage-2 tables of ferry-ept;
//! - [`api`]: raw HTTP requests to the monitor's API;
//! - [`console`], [`process`], [`status`], [`endpoint`], [`errors`], [`machine`], [`paths`],
//!   [`figures`]: small helpers for all of them.

pub mod api;
pub mod console;
pub mod cpio;
pub mod device_load;
pub mod dirtier;
pub mod endpoint;
pub mod errors;
pub mod ferry;
pub mod figures;
pub mod frames;
pub mod guest_memory;
pub mod header;
pub mod host_net;
pub mod initramfs;
pub mod kernels;
pub mod lab;
pub mod linux_disk;
pub mod linux_guest;
pub mod linux_shell;
pub mod machine;
pub mod oracle;
pub mod paths;
pub mod process;
pub mod proxy;
pub mod qemu;
pub mod qmp;
pub mod status;
pub mod tap;
pub mod vmlinux;
