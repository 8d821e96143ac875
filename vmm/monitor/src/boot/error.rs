//! Errors of booting.

use std::io;
use std::path::PathBuf;

/// Reasons why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// Role of the file: "kernel" or "initramfs".
        what: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The kernel file is neither an ELF image nor a bzImage.
    #[error(
        "kernel {}: neither an ELF image nor a bzImage (it begins with {begins:02x?})", path.display()
    )]
    Format {
        /// Path of the file.
        path: PathBuf,
        /// First four bytes of the file.
        begins: [u8; 4],
    },
    /// The kernel file is empty.
    #[error("kernel {} is empty", .0.display())]
    Empty(PathBuf),
    /// The kernel file is an ELF image, but not of a kernel.
    #[error(
        "kernel {}: an ELF image, but no kernel: it is a program, or begins below 1 MiB; give an ELF \
         image with a PVH note, a vmlinux or a bzImage",
        .0.display()
    )]
    NoKernel(PathBuf),
    /// The kernel file is corrupt, or does not fit guest memory.
    #[error("kernel {}: {why}", path.display())]
    Kernel {
        /// Path of the file.
        path: PathBuf,
        /// Error of the loader.
        why: String,
    },
    /// The kernel needs more memory to unpack itself than the guest has.
    #[error(
        "kernel {}: it unpacks itself up to {end:#x}, beyond the guest's memory; give the guest more", path.display()
    )]
    KernelSize {
        /// Path of the file.
        path: PathBuf,
        /// End of the memory that the kernel needs before it can use the memory map.
        end: u64,
    },
    /// The initramfs does not fit between the kernel and the end of low RAM.
    #[error(
        "initramfs {}: its {bytes} bytes do not fit the guest's memory behind the kernel, which ends \
         at {kernel_end:#x}; give the guest more memory", path.display()
    )]
    InitramfsSize {
        /// Path of the file.
        path: PathBuf,
        /// Size of the initramfs in bytes.
        bytes: u64,
        /// End of the kernel in guest memory.
        kernel_end: u64,
    },
    /// The command line is too long, or is not ASCII.
    #[error("command line: {0}")]
    CommandLine(String),
    /// A boot structure could not be created or written to guest memory.
    #[error("boot structures: {0}")]
    Memory(String),
    /// KVM rejected the initial registers of a vCPU.
    #[error("vcpu{index}: {call}: {source}")]
    Registers {
        /// Index of the vCPU.
        index: u32,
        /// Name of the ioctl.
        call: &'static str,
        /// Error that KVM returned.
        source: kvm_ioctls::Error,
    },
}
