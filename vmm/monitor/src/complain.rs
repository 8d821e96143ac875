//! Words for whoever looks after the monitor.

use std::fmt::Display;
use std::io::{Write, stderr};

/// Says something on standard error.
pub fn complain(words: impl Display) {
    // One that is closed or full has nobody behind it who could be told.
    let _unheard = writeln!(stderr(), "ferry: {words}");
}
