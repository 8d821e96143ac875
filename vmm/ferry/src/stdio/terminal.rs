//! The terminal of this process while a guest uses it.

use std::io::{self, IsTerminal};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The terminal on standard input in raw mode. Dropping it restores the previous mode.
pub(super) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Puts the terminal into raw mode. Returns `None` if standard input is no terminal.
    ///
    /// # Errors
    /// Returns the error of the terminal driver.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // This fails only if the terminal is gone.
        let _gone = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
