//! Panics at the edge of a thread: caught, and turned into text for a report.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `work` and returns the panic message if it panics.
///
/// The caller must treat everything that `work` can reach as being in an unknown state after a panic.
pub(super) fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| message(&*payload))
}

fn message(payload: &(dyn Any + Send)) -> String {
    match (
        payload.downcast_ref::<&str>(),
        payload.downcast_ref::<String>(),
    ) {
        (Some(text), _) => (*text).into(),
        (None, Some(text)) => text.clone(),
        (None, None) => "no message".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_both_types_are_kept() {
        assert_eq!(catch(|| 7), Ok(7));
        let number = 5;
        assert_eq!(catch(|| panic!("five")), Err::<(), _>("five".into()));
        assert_eq!(catch(|| panic!("{number}")), Err::<(), _>("5".into()));
        let other = catch(|| std::panic::panic_any(number));
        assert_eq!(other, Err::<(), _>("no message".into()));
    }
}
