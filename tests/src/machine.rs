//! Configuration of a guest, for Ferry and for the programs that it is compared with.

use std::path::PathBuf;

/// Configuration of a guest.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Kernel: a PVH ELF file, a vmlinux or a bzImage.
    pub kernel: PathBuf,
    /// Initramfs, for Linux.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Number of vCPUs.
    pub cpus: u32,
}
