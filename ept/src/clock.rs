//! Time, which this crate cannot tell by itself.

/// A clock that only goes forward, in nanoseconds from any origin.
pub type Clock = fn() -> u64;

/// The time by `clock`; without one, always 0.
pub(crate) fn now_ns(clock: Option<Clock>) -> u64 {
    clock.map_or(0, |clock| clock())
}
