//! Error and warning messages on standard error.

use std::fmt::Display;
use std::io::{Write, stderr};

/// Prints a message on standard error, after the name of the program.
pub fn complain(message: impl Display) {
    // If standard error is closed or full, there is nowhere to report that.
    let _lost = writeln!(stderr(), "ferry: {message}");
}
