//! Output of a guest or a program, and waiting with a deadline for a text to appear in it.

use std::io::{ErrorKind, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Why a text did not appear. Carries the last lines of the output.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The text did not appear before the deadline.
    #[error("no {wanted:?} within {limit:?}; the output ends with:\n{tail}")]
    TimedOut {
        /// The text that was expected.
        wanted: String,
        /// The time limit.
        limit: Duration,
        /// The last lines of the output.
        tail: String,
    },
    /// The writer closed its end before the text appeared.
    #[error("the output ended without {wanted:?}; it ends with:\n{tail}")]
    Ended {
        /// The text that was expected.
        wanted: String,
        /// The last lines of the output.
        tail: String,
    },
}

/// Output that a background thread collects. Clones share the output.
#[derive(Clone, Debug, Default)]
pub struct Console {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    output: Mutex<Output>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    ended: bool,
}

impl Console {
    /// Starts a thread that reads `source` to its end.
    pub fn follow(source: impl Read + Send + 'static) -> Self {
        let console = Self::default();
        let shared = Arc::clone(&console.shared);
        thread::spawn(move || shared.collect(source));
        console
    }

    /// Returns all output so far, without carriage returns.
    pub fn text(&self) -> String {
        self.text_after(0)
    }

    /// Returns the output after `mark`, without carriage returns.
    pub fn text_after(&self, mark: usize) -> String {
        let output = self.shared.lock();
        let bytes = output.bytes.get(mark..).unwrap_or_default();
        String::from_utf8_lossy(bytes).replace('\r', "")
    }

    /// Returns the number of bytes so far, as a mark for [`Console::wait_after`].
    pub fn mark(&self) -> usize {
        self.shared.lock().bytes.len()
    }

    /// Waits until the output contains `wanted`.
    ///
    /// # Errors
    /// Returns [`ConsoleError`] if the deadline passes or the output ends first.
    pub fn wait_for(&self, wanted: &str, limit: Duration) -> Result<(), ConsoleError> {
        self.wait_after(0, wanted, limit)
    }

    /// Waits until the output after `mark` contains `wanted`.
    ///
    /// # Errors
    /// Returns [`ConsoleError`] if the deadline passes or the output ends first.
    pub fn wait_after(
        &self,
        mark: usize,
        wanted: &str,
        limit: Duration,
    ) -> Result<(), ConsoleError> {
        let deadline = Instant::now() + limit;
        let mut output = self.shared.lock();
        loop {
            if contains(
                &output.bytes[mark.min(output.bytes.len())..],
                wanted.as_bytes(),
            ) {
                return Ok(());
            }
            if output.ended {
                return Err(ConsoleError::Ended {
                    wanted: wanted.to_owned(),
                    tail: tail(&output.bytes),
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let tail = tail(&output.bytes);
                return Err(ConsoleError::TimedOut {
                    wanted: wanted.to_owned(),
                    limit,
                    tail,
                });
            }
            output = self.shared.wait(output, left);
        }
    }

    /// Waits until the writer closes its end. Returns false if it does not within the limit.
    pub fn wait_end(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut output = self.shared.lock();
        while !output.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            output = self.shared.wait(output, left);
        }
        true
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, output: MutexGuard<'a, Output>, limit: Duration) -> MutexGuard<'a, Output> {
        self.changed
            .wait_timeout(output, limit)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn collect(&self, mut source: impl Read) {
        let mut chunk = [0; 4096];
        loop {
            let count = match source.read(&mut chunk) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => break,
                Ok(count) => count,
            };
            self.lock().bytes.extend_from_slice(&chunk[..count]);
            self.changed.notify_all();
        }
        self.lock().ended = true;
        self.changed.notify_all();
    }
}

/// Returns the last twenty lines of an output, for error messages.
pub fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).replace('\r', "");
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    needle.is_empty()
        || haystack
            .windows(needle.len())
            .any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    const SOON: Duration = Duration::from_millis(50);
    const LATE: Duration = Duration::from_secs(10);

    #[test]
    fn a_text_in_two_pieces_is_found() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let console = Console::follow(reader);
        writer.write_all(b"rea").unwrap();
        assert!(matches!(
            console.wait_for("ready", SOON),
            Err(ConsoleError::TimedOut { .. })
        ));
        writer.write_all(b"dy\r\n").unwrap();
        console.wait_for("ready", LATE).unwrap();
        assert_eq!(console.text(), "ready\n");
    }

    #[test]
    fn only_what_stands_behind_the_mark_counts() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let console = Console::follow(reader);
        writer.write_all(b"42\n").unwrap();
        console.wait_for("42\n", LATE).unwrap();
        let mark = console.mark();
        assert!(console.wait_after(mark, "42", SOON).is_err());
        writer.write_all(b"again 42").unwrap();
        console.wait_after(mark, "42", LATE).unwrap();
    }

    #[test]
    fn the_end_is_told_from_silence() {
        let (writer, reader) = UnixStream::pair().unwrap();
        let console = Console::follow(reader);
        assert!(!console.wait_end(SOON));
        drop(writer);
        assert!(console.wait_end(LATE));
        assert!(matches!(
            console.wait_for("x", LATE),
            Err(ConsoleError::Ended { .. })
        ));
    }
}
