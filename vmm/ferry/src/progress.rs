//! A progress bar on one line of the terminal.

use std::io::{IsTerminal, Write, stderr};

use rustix::termios::tcgetwinsize;

/// Width of the bar in characters.
const BAR_WIDTH: usize = 30;
/// Assumed width of a terminal that does not report its size.
const DEFAULT_COLUMNS: u16 = 80;

/// A progress line on standard error. It is not shown if standard error is not a terminal. Dropping it clears the line.
pub(super) struct ProgressLine {
    on_terminal: bool,
}

impl ProgressLine {
    pub(super) fn new() -> Self {
        Self {
            on_terminal: stderr().is_terminal(),
        }
    }

    /// Shows a bar for `done` of `all`, followed by `message`.
    pub(super) fn show(&self, done: u64, all: u64, message: &str) {
        if self.on_terminal {
            let columns = tcgetwinsize(stderr()).map_or(0, |size| size.ws_col);
            let columns = if columns == 0 {
                DEFAULT_COLUMNS
            } else {
                columns
            };
            write(&fit(&line(done, all, message), columns));
        }
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.on_terminal {
            write("");
        }
    }
}

fn line(done: u64, all: u64, message: &str) -> String {
    let (done, all) = (u128::from(done.min(all)), u128::from(all.max(1)));
    let percent = usize::try_from(done * 100 / all).unwrap_or(0);
    let bar = "#".repeat(percent * BAR_WIDTH / 100);
    format!("[{bar:<BAR_WIDTH$}] {percent:>3} %  {message}")
}

/// Cuts `line` so that it fits into one line of a terminal with this number of columns.
fn fit(line: &str, columns: u16) -> String {
    line.chars()
        .take(usize::from(columns).saturating_sub(1))
        .collect()
}

/// Replaces the current line of the terminal.
fn write(line: &str) {
    let mut terminal = stderr().lock();
    // An error means that the terminal is gone. The work itself does not depend on it.
    let _gone = write!(terminal, "\r\x1b[K{line}").and_then(|()| terminal.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_shows_the_share_that_is_done() {
        assert_eq!(line(0, 0, "x"), format!("[{}]   0 %  x", " ".repeat(30)));
        let half = format!("[{}{}]  50 %  ", "#".repeat(15), " ".repeat(15));
        assert_eq!(line(4, 8, ""), half);
        assert_eq!(
            line(u64::MAX, 1, ""),
            format!("[{}] 100 %  ", "#".repeat(30))
        );
        assert!(line(u64::MAX, u64::MAX, "").contains("100 %"));
    }

    #[test]
    fn a_narrow_terminal_gets_one_line() {
        assert_eq!(fit("häuser", 4), "häu");
        assert_eq!(fit("ab", 80), "ab");
        assert_eq!(fit("ab", 0), "");
    }
}
