//! A device's interrupt: the line, and the registers that say why it was raised.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::spec::interrupt::{CONFIGURATION_CHANGE, USED_BUFFER};

/// An interrupt line with its `InterruptStatus`, `ConfigGeneration` and DEVICE_NEEDS_RESET. Clones are
/// the same interrupt: registers and worker share it.
///
/// The line is an edge: each cause writes to the event, also when the register has it already, so that
/// a cause which comes between the guest's look at the register and its acknowledgement is not lost.
#[derive(Clone)]
pub struct Interrupt {
    inner: Arc<Inner>,
}

struct Inner {
    line: EventFd,
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    /// Causes for which another process writes to the line: it does not say so in the register.
    elsewhere: AtomicU32,
    /// The driver is ready: before that, a device sends no notification (3.1.1).
    driver_ready: AtomicBool,
    lost: AtomicU64,
}

impl Interrupt {
    /// An interrupt that writes to `line`, which the monitor has wired to an edge of an interrupt
    /// controller (with KVM: an irqfd). The event is non-blocking.
    #[must_use]
    pub fn new(line: EventFd) -> Self {
        Self {
            inner: Arc::new(Inner {
                line,
                status: AtomicU32::new(0),
                generation: AtomicU32::new(0),
                needs_reset: AtomicBool::new(false),
                elsewhere: AtomicU32::new(0),
                driver_ready: AtomicBool::new(false),
                lost: AtomicU64::new(0),
            }),
        }
    }

    /// Says that the configuration space changed (2.5); a driver that is not ready will see it anyway.
    pub fn config_changed(&self) {
        self.inner.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIGURATION_CHANGE);
    }

    /// Interrupts so far that could not be raised.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.inner.lost.load(Ordering::Relaxed)
    }

    pub(super) fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Sets DEVICE_NEEDS_RESET, and tells the driver (2.1.2).
    pub(super) fn needs_reset(&self) {
        self.inner.needs_reset.store(true, Ordering::SeqCst);
        self.raise(CONFIGURATION_CHANGE);
    }

    pub(super) fn driver_is_ready(&self) {
        self.inner.driver_ready.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_reset_needed(&self) -> bool {
        self.inner.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn status(&self) -> u32 {
        self.inner.status.load(Ordering::SeqCst) | self.inner.elsewhere.load(Ordering::SeqCst)
    }

    /// Another process raises the line when it uses buffers. As it cannot write the register, the register always says
    /// so: a driver that looks for used buffers and finds none goes on.
    pub(super) fn raised_elsewhere(&self) {
        self.inner.elsewhere.store(USED_BUFFER, Ordering::SeqCst);
    }

    /// What that process writes to.
    pub(super) fn line(&self) -> &EventFd {
        &self.inner.line
    }

    pub(super) fn acknowledge(&self, causes: u32) {
        self.inner.status.fetch_and(!causes, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u32 {
        self.inner.generation.load(Ordering::SeqCst)
    }

    /// All but the generation, which never goes back.
    pub(super) fn reset(&self) {
        self.inner.driver_ready.store(false, Ordering::SeqCst);
        self.inner.needs_reset.store(false, Ordering::SeqCst);
        self.inner.status.store(0, Ordering::SeqCst);
    }

    /// As it was saved; nothing is raised yet.
    pub(super) fn restore(&self, status: u32, generation: u32, needs_reset: bool) {
        self.inner.status.store(status, Ordering::SeqCst);
        self.inner.generation.store(generation, Ordering::SeqCst);
        self.inner.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// Raises the line again if there is a cause that the guest has not acknowledged. The line's edge may
    /// not have travelled with the guest; one too many does no harm.
    pub(super) fn raise_pending(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

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
