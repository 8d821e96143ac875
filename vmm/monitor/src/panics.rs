//! Panics, which are caught at the edge of each thread and told in words.

use std::any::Any;

/// Returns the message of a caught panic.
#[must_use]
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(message), _) => message,
        (None, Some(message)) => message.as_str(),
        (None, None) => "no message",
    };
    format!("internal error: panicked: {message}")
}
