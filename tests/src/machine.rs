//! The guest that a test or a comparison starts.

use std::path::PathBuf;

/// What both Ferry and its peers are told about a guest.
#[derive(Clone, Debug)]
pub struct Machine {
    /// A PVH ELF file, a vmlinux or a bzImage.
    pub kernel: PathBuf,
    /// An initramfs, for Linux.
    pub initramfs: Option<PathBuf>,
    /// The guest's command line.
    pub cmdline: String,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Number of vCPUs.
    pub cpus: u32,
}
