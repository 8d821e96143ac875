//! Helpers for non-blocking eventfds.

use vmm_sys_util::eventfd::EventFd;

/// Signals `event`.
pub(super) fn notify(event: &EventFd) {
    // The write fails only if the counter is full, and then the event is signalled already.
    let _full = event.write(1);
}

/// Clears `event`.
pub(super) fn drain(event: &EventFd) {
    // The read fails only if the event is not signalled.
    let _empty = event.read();
}
