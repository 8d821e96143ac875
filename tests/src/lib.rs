//! Whole-system tests, the lab and comparisons with peers.
//!
//! The tests themselves lie in `tests/tests`; this library is what they stand on:
//!
//! - [`lab`]: a Debian kernel with a real KVM and nested paging, in emulation
//!   ([`kernels`], [`initramfs`], [`cpio`] and [`vmlinux`] make its parts);
//! - [`linux_guest`]: a stock kernel and a shell, to be run by `ferry run` in the lab, asked by [`linux_shell`],
//!   on a disk of [`linux_disk`]; its host's side is [`host_net`] and [`tap`], its memory is looked at by [`guest_memory`];
//! - [`ferry`]: drives processes of the program `ferry`, [`dirtier`] the guest in them;
//! - [`qemu`]: the peer that migrations are compared with, over [`qmp`];
//! - [`proxy`]: stands between the two sides of a migration and breaks it on purpose,
//!   at frames that [`frames`] finds, or with another [`header`];
//! - [`oracle`]: emulated memory management units, asked what they make of stage-2 tables;
//! - [`api`]: the monitor's API without its client;
//! - [`console`], [`process`], [`status`], [`endpoint`], [`errors`], [`machine`], [`paths`],
//!   [`figures`]: small tools of all of them.

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
