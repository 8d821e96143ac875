//! Errors of booting.

use std::io;
use std::path::PathBuf;

/// Why a guest could not be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file that cannot be read.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel file is neither ELF nor bzImage.
    #[error(
        "kernel {}: neither an ELF image nor a bzImage (it begins with {begins:02x?})", path.display()
    )]
    Format {
        /// Which file.
        path: PathBuf,
        /// Its first bytes.
        begins: [u8; 4],
    },
    /// The kernel file has no bytes.
    #[error("kernel {} is empty", .0.display())]
    Empty(PathBuf),
    /// The kernel file is an ELF image of something else.
    #[error(
        "kernel {}: an ELF image, but no kernel: it is a program, or begins below 1 MiB; an ELF image with a \
         PVH note, a vmlinux or a bzImage is wanted",
        .0.display()
    )]
    NoKernel(PathBuf),
    /// The kernel file is broken or does not fit.
    #[error("kernel {}: {why}", path.display())]
    Kernel {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The kernel needs more room than there is.
    #[error(
        "kernel {}: it unpacks itself up to {end:#x}, beyond the guest's memory; give the guest more", path.display()
    )]
    KernelSize {
        /// Which file.
        path: PathBuf,
        /// Where the memory that it needs first ends.
        end: u64,
    },
    /// The initramfs does not fit behind the kernel.
    #[error(
        "initramfs {}: its {bytes} bytes do not fit the guest's memory behind the kernel, which ends \
         at {kernel_end:#x}; give the guest more memory", path.display()
    )]
    InitramfsSize {
        /// Which file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Where the kernel ends.
        kernel_end: u64,
    },
    /// The command line is too long or not ASCII.
    #[error("command line: {0}")]
    CommandLine(String),
    /// Guest memory that should be there is not.
    #[error("boot structures: {0}")]
    Memory(String),
    /// KVM refused the first registers.
    #[error("vcpu{index}: {call}: {source}")]
    Registers {
        /// Which vCPU.
        index: u32,
        /// The call's name in the kernel's documentation.
        call: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}
