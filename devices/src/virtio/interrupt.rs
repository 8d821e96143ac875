//! Interrupt of a virtio device: the line, and the registers that tell the driver its cause.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::spec::interrupt::{CONFIGURATION_CHANGE, USED_BUFFER};

/// Interrupt line of a device, with `InterruptStatus`, `ConfigGeneration` and DEVICE_NEEDS_RESET.
///
/// Clones share the same state, so that transport and worker thread can both use it.
///
/// The line is edge-triggered. Each cause signals the eventfd, even if its bit is set already: otherwise a cause that
/// arrives between the driver's read of `InterruptStatus` and its write to `InterruptACK` would be lost.
#[derive(Clone)]
pub struct Interrupt {
    inner: Arc<Inner>,
}

struct Inner {
    line: EventFd,
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    /// Causes that `InterruptStatus` always shows, because another process raises the line for them.
    external_causes: AtomicU32,
    /// The driver has set DRIVER_OK. A device must not send a notification before that (virtio 1.2, 3.1.1).
    driver_ready: AtomicBool,
    lost: AtomicU64,
}

impl Interrupt {
    /// Creates an interrupt that signals `line`, a non-blocking eventfd.
    ///
    /// The caller connects `line` to an edge-triggered input of the interrupt controller, with KVM by an irqfd.
    #[must_use]
    pub fn new(line: EventFd) -> Self {
        Self {
            inner: Arc::new(Inner {
                line,
                status: AtomicU32::new(0),
                generation: AtomicU32::new(0),
                needs_reset: AtomicBool::new(false),
                external_causes: AtomicU32::new(0),
                driver_ready: AtomicBool::new(false),
                lost: AtomicU64::new(0),
            }),
        }
    }

    /// Reports that the configuration space changed (virtio 1.2, 2.5): increments `ConfigGeneration`, and raises the
    /// interrupt if the driver has set DRIVER_OK.
    pub fn config_changed(&self) {
        self.inner.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIGURATION_CHANGE);
    }

    /// Returns the number of interrupts that could not be raised because the write to the eventfd failed.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.inner.lost.load(Ordering::Relaxed)
    }

    /// Raises the interrupt for a used buffer.
    pub(super) fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Sets DEVICE_NEEDS_RESET and raises a configuration change interrupt (virtio 1.2, 2.1.2).
    pub(super) fn needs_reset(&self) {
        self.inner.needs_reset.store(true, Ordering::SeqCst);
        self.raise(CONFIGURATION_CHANGE);
    }

    /// Allows interrupts, because the driver has set DRIVER_OK.
    pub(super) fn driver_is_ready(&self) {
        self.inner.driver_ready.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_reset_needed(&self) -> bool {
        self.inner.needs_reset.load(Ordering::SeqCst)
    }

    /// Returns the value of `InterruptStatus`.
    pub(super) fn status(&self) -> u32 {
        self.inner.status.load(Ordering::SeqCst) | self.inner.external_causes.load(Ordering::SeqCst)
    }

    /// Declares that another process raises the line when it uses buffers.
    ///
    /// That process cannot write `InterruptStatus`, so the register always shows a used buffer. A driver that finds no
    /// used buffer just goes on.
    pub(super) fn raised_externally(&self) {
        self.inner
            .external_causes
            .store(USED_BUFFER, Ordering::SeqCst);
    }

    /// Returns the eventfd of the interrupt line, for a back end in another process that raises the interrupt.
    pub(super) fn line(&self) -> &EventFd {
        &self.inner.line
    }

    /// Handles a write of `causes` to `InterruptACK`.
    pub(super) fn acknowledge(&self, causes: u32) {
        self.inner.status.fetch_and(!causes, Ordering::SeqCst);
    }

    /// Returns the value of `ConfigGeneration`.
    pub(super) fn generation(&self) -> u32 {
        self.inner.generation.load(Ordering::SeqCst)
    }

    /// Resets everything except `ConfigGeneration`, which never decreases.
    pub(super) fn reset(&self) {
        self.inner.driver_ready.store(false, Ordering::SeqCst);
        self.inner.needs_reset.store(false, Ordering::SeqCst);
        self.inner.status.store(0, Ordering::SeqCst);
    }

    /// Loads saved registers. Does not raise the line.
    pub(super) fn restore(&self, status: u32, generation: u32, needs_reset: bool) {
        self.inner.status.store(status, Ordering::SeqCst);
        self.inner.generation.store(generation, Ordering::SeqCst);
        self.inner.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// Raises the line again if the driver has not acknowledged every cause. An edge may have been lost when the guest
    /// was saved; an additional one does no harm.
    pub(super) fn raise_pending(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    /// Sets the bits of `cause` and signals the line, unless the driver has not set DRIVER_OK yet.
    fn raise(&self, cause: u32) {
        if !self.inner.driver_ready.load(Ordering::SeqCst) {
            return;
        }
        self.inner.status.fetch_or(cause, Ordering::SeqCst);
        if self.inner.line.write(1).is_err() {
            self.inner.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}
