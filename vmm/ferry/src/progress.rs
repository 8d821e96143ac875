//! One line at the bottom of a terminal that says how far something is.

use std::io::{IsTerminal, Write, stderr};

use rustix::termios::tcgetwinsize;

/// Characters of the bar.
const BAR: usize = 30;
/// Of a terminal that does not say how wide it is.
const USUAL_COLUMNS: u16 = 80;

/// A line of progress on standard error, where that is a terminal; nothing elsewhere. Gone when it is dropped.
pub(super) struct ProgressLine {
    on_terminal: bool,
}

impl ProgressLine {
    pub(super) fn new() -> Self {
        Self {
            on_terminal: stderr().is_terminal(),
        }
    }

    /// Shows that `done` of `all` are done, and `message` behind it.
    pub(super) fn show(&self, done: u64, all: u64, message: &str) {
        if self.on_terminal {
            let columns = tcgetwinsize(stderr()).map_or(0, |size| size.ws_col);
            let columns = if columns == 0 { USUAL_COLUMNS } else { columns };
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
    let bar = "#".repeat(percent * BAR / 100);
    format!("[{bar:<BAR$}] {percent:>3} %  {message}")
}

/// What fits without a second line.
fn fit(line: &str, columns: u16) -> String {
    line.chars()
        .take(usize::from(columns).saturating_sub(1))
        .collect()
}

/// In the place of the line that is there.
fn write(line: &str) {
    let mut terminal = stderr().lock();
    // A terminal that has gone shows nothing, and nothing depends on it.
    let _gone = write!(terminal, "\r\x1b[K{line}").and_then(|()| terminal.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_as_full_as_what_is_done() {
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
