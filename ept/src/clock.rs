//! Clock of the caller. This crate has none, because it does without a standard library.

/// A monotonic clock, in nanoseconds from any origin.
pub type Clock = fn() -> u64;

/// Returns the time of `clock`; 0 if there is none.
pub(crate) fn now_ns(clock: Option<Clock>) -> u64 {
    clock.map_or(0, |clock| clock())
}
