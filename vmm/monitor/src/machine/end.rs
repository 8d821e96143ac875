//! The end of a guest, which is recorded once.

use std::sync::{Arc, OnceLock};

use crate::vcpu::GuestEnd;

/// Callback for the end of a guest. It can be called from any thread.
pub(super) type OnEnd = Arc<dyn Fn(GuestEnd) + Send + Sync>;

/// Records how the guest ended by itself. Only the first end counts.
pub(super) struct EndLatch {
    end: Arc<OnceLock<GuestEnd>>,
    /// Records an end, and reports it if it is the first one.
    pub(super) report: OnEnd,
}

impl EndLatch {
    /// Creates a latch that reports the first end to `on_end`.
    pub(super) fn new(on_end: OnEnd) -> Self {
        let end = Arc::new(OnceLock::new());
        let latch = Arc::clone(&end);
        let report = Arc::new(move |how: GuestEnd| {
            if latch.set(how.clone()).is_ok() {
                on_end(how);
            }
        });
        Self { end, report }
    }

    /// Returns how the guest ended, if it has.
    pub(super) fn get(&self) -> Option<&GuestEnd> {
        self.end.get()
    }
}
