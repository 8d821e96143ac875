//! ioctls of KVM's dirty log.
//!
//! Sources: Linux Documentation/virt/kvm/api.rst, KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG and
//! KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
//!
//! This file has `unsafe` code because kvm-ioctls has neither KVM_CLEAR_DIRTY_LOG nor a KVM_GET_DIRTY_LOG that reads
//! into a buffer of the caller.
#![allow(unsafe_code)]

use std::io;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use super::DirtyLogMode;

/// Request numbers of include/uapi/linux/kvm.h.
#[allow(missing_docs, reason = "the macro makes public functions of them")]
mod request {
    use super::{KVMIO, ioctl_iow_nr, ioctl_iowr_nr, kvm_clear_dirty_log, kvm_dirty_log};

    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// Enables the capability that `mode` needs. Must be called before the first slot is logged.
///
/// # Errors
/// Returns the error of KVM_ENABLE_CAP.
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

/// Reads the dirty bitmap of `slot` into `words`: bit `n` of the bitmap is page `n` of the slot.
///
/// `pages` is the size of the slot. `words` is resized to hold one bit for each page.
///
/// # Errors
/// Returns the error of KVM_GET_DIRTY_LOG, for example if the slot does not exist or is not logged.
pub(super) fn get(vm: &VmFd, slot: u32, pages: u64, words: &mut Vec<u64>) -> io::Result<()> {
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
    // SAFETY: the kernel writes one bit for each page of the slot, rounded up to 64 bits. `words` has that size,
    // because `pages` is the size with which the slot was created.
    result(unsafe { ioctl_with_ref(vm, request::KVM_GET_DIRTY_LOG(), &log) })
}

/// Clears the dirty bits of those pages of `slot` whose bit is set in `words`, and write-protects the pages
/// again. Bit 0 of `words` is the page `first_page` of the slot; `pages` pages are covered.
///
/// `first_page` must be a multiple of 64. `pages` must be one too, unless the range ends with the slot.
///
/// # Errors
/// Returns the error of KVM_CLEAR_DIRTY_LOG, and `InvalidInput` if `words` has fewer than `pages` bits.
pub(super) fn clear(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    words: &[u64],
) -> io::Result<()> {
    if words.len() * 64 < pages as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            // The kernel only reads the bitmap.
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the kernel reads one bit for each of `pages` pages, and the check above made sure that `words` has as
    // many.
    result(unsafe { ioctl_with_ref(vm, request::KVM_CLEAR_DIRTY_LOG(), &log) })
}

/// Converts the return value of an ioctl to a result.
fn result(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
