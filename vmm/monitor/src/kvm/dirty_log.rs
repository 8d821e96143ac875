//! KVM's dirty log, into the tracker (S22).
//!
//! Three ways of the same log, for one slot at a time:
//!
//! ```text
//! Get            GET = read and clear in one; KVM protects everything again at each GET
//! GetClear       GET reads; CLEAR takes back just the pages named, in chunks
//! InitiallySet   as GetClear, and the log starts all ones: no protection storm at the start, a page
//!                is protected when it is cleared for the first time, right before it is sent
//! ```
//!
//! Sources: Linux Documentation/virt/kvm/api.rst, KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG and
//! KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
//!
//! This file has `unsafe` because kvm-ioctls has neither KVM_CLEAR_DIRTY_LOG nor a KVM_GET_DIRTY_LOG
//! into a buffer that is used again.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::str::FromStr;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

/// The request numbers, from include/uapi/linux/kvm.h; what they do is in api.rst.
#[allow(missing_docs, reason = "the macro makes public functions of them")]
mod request {
    use super::{KVMIO, ioctl_iow_nr, ioctl_iowr_nr, kvm_clear_dirty_log, kvm_dirty_log};

    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// Which of KVM's dirty logs is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyLogMode {
    /// KVM_GET_DIRTY_LOG alone.
    Get,
    /// KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG.
    GetClear,
    /// As `GetClear`, and the log starts with all pages dirty.
    InitiallySet,
}

impl DirtyLogMode {
    /// All modes, the one to prefer first.
    pub const BEST_FIRST: [Self; 3] = [Self::InitiallySet, Self::GetClear, Self::Get];

    /// True if a log in this mode begins with every page dirty, so that a page which nobody clears
    /// stays dirty in it.
    #[must_use]
    pub fn starts_all_dirty(self) -> bool {
        matches!(self, Self::InitiallySet)
    }

    /// True if a GET leaves the pages dirty and writable until a CLEAR names them.
    #[must_use]
    pub fn needs_clear(self) -> bool {
        !matches!(self, Self::Get)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::GetClear => "get-clear",
            Self::InitiallySet => "initially-set",
        }
    }
}

impl fmt::Display for DirtyLogMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DirtyLogMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::BEST_FIRST
            .into_iter()
            .find(|mode| mode.name() == name)
            .ok_or_else(|| {
                format!("no dirty log is called {name:?}: get, get-clear, initially-set")
            })
    }
}

/// Tells KVM, before the first slot is logged, how its dirty log is to work.
///
/// # Errors
/// The kernel's, where the capability is not there after all.
pub fn configure(vm: &VmFd, mode: DirtyLogMode) -> io::Result<()> {
    let flags = match mode {
        DirtyLogMode::Get => return Ok(()),
        DirtyLogMode::GetClear => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
        DirtyLogMode::InitiallySet => {
            KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
        }
    };
    let mut capability = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ..Default::default()
    };
    capability.args[0] = u64::from(flags);
    Ok(vm.enable_cap(&capability)?)
}

/// Reads the log of `slot` into `words`: bit `n` of the whole is the slot's page `n`.
///
/// `pages` is the slot's size; `words` is made just as long as it needs.
///
/// # Errors
/// The kernel's: no such slot, or it is not logged.
pub fn get(vm: &VmFd, slot: u32, pages: u64, words: &mut Vec<u64>) -> io::Result<()> {
    let length = usize::try_from(pages.div_ceil(64)).map_err(io::Error::other)?;
    words.clear();
    words.resize(length, 0);
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the kernel writes one bit for each page of the slot, rounded up to 64, which is what
    // `words` has room for; the slot's size is the one it was made with.
    result(unsafe { ioctl_with_ref(vm, request::KVM_GET_DIRTY_LOG(), &log) })
}

/// Takes back the dirty state of those of `pages` pages from `first_page` of `slot` whose bit is set in
/// `words`, and write-protects them again.
///
/// `first_page` is a multiple of 64; so is `pages`, unless the range ends with the slot.
///
/// # Errors
/// The kernel's: no such slot, not logged, or a range that is not as above.
pub fn clear(vm: &VmFd, slot: u32, first_page: u64, pages: u32, words: &[u64]) -> io::Result<()> {
    if words.len() * 64 < pages as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            // The kernel only reads it.
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the kernel reads one bit for each of `pages` pages, which `words` has (checked above).
    result(unsafe { ioctl_with_ref(vm, request::KVM_CLEAR_DIRTY_LOG(), &log) })
}

fn result(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
