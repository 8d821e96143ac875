//! The serial port's other end: standard input and output, a file, or nothing.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use devices::SerialOutput;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use vmm::config::{SerialConfig, SerialMode};
use vmm::monitor::Monitor;

/// A file for serial output that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConsoleError {
    #[error("--serial: a file is needed for mode File")]
    NoFile,
    #[error("--serial stdio: no thread for it: {0}")]
    Thread(#[source] io::Error),
    #[error("--serial {}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
}

/// Where the guest's serial output goes.
pub(super) fn output(config: &SerialConfig) -> Result<SerialOutput, ConsoleError> {
    match config.mode {
        SerialMode::Null => Ok(Box::new(io::sink())),
        SerialMode::Tty => Ok(Box::new(Queued::start().map_err(ConsoleError::Thread)?)),
        SerialMode::File => {
            let path = config.file.clone().ok_or(ConsoleError::NoFile)?;
            // A pipe whose reader stalls must stop no vCPU: what does not fit is lost.
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path);
            Ok(Box::new(
                file.map_err(|source| ConsoleError::File { path, source })?,
            ))
        }
    }
}

/// Bytes of output that wait for whoever reads standard output.
const OUTPUT_LIMIT: usize = 16 * 1024;
/// How long a vCPU waits for room, byte by byte, before output is dropped: much less than a pause may take.
const ROOM_LIMIT: Duration = Duration::from_millis(100);
/// How long an ending process waits for its reader.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Bytes on their way to standard output, in all of the process.
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// Standard output behind a thread of its own: a reader that stalls stops no vCPU.
struct Queued {
    bytes: SyncSender<u8>,
    /// The reader has stalled: until there is room again, nothing is waited for.
    stalled: bool,
}

impl Queued {
    fn start() -> io::Result<Self> {
        let (bytes, queue) = sync_channel(OUTPUT_LIMIT);
        thread::Builder::new()
            .name("_console".into())
            .spawn(move || write_out(&queue))?;
        Ok(Self {
            bytes,
            stalled: false,
        })
    }

    fn push(&mut self, byte: u8) -> io::Result<()> {
        WAITING.fetch_add(1, Ordering::SeqCst);
        let queued = self.queue(byte);
        if queued.is_err() {
            WAITING.fetch_sub(1, Ordering::SeqCst);
        }
        queued
    }

    fn queue(&mut self, byte: u8) -> io::Result<()> {
        let began = Instant::now();
        loop {
            match self.bytes.try_send(byte) {
                Ok(()) => {
                    self.stalled = false;
                    return Ok(());
                }
                Err(TrySendError::Full(_)) if !self.stalled && began.elapsed() < ROOM_LIMIT => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(TrySendError::Full(_)) => {
                    self.stalled = true;
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(TrySendError::Disconnected(_)) => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
    }
}

impl Write for Queued {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().try_for_each(|byte| self.push(*byte))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes what comes, as much at once as there is, until nobody sends any more or nobody reads.
fn write_out(queue: &Receiver<u8>) {
    let mut stdout = io::stdout();
    while let Ok(first) = queue.recv() {
        let batch: Vec<u8> = std::iter::once(first)
            .chain(queue.try_iter().take(4095))
            .collect();
        let written = stdout.write_all(&batch).and_then(|()| stdout.flush());
        WAITING.fetch_sub(batch.len(), Ordering::SeqCst);
        if written.is_err() {
            // The reader has gone: what is still queued goes nowhere, and the guest's writes fail.
            WAITING.fetch_sub(queue.try_iter().count(), Ordering::SeqCst);
            return;
        }
    }
}

/// Waits until all output has reached standard output, unless its reader has stalled.
pub(super) fn flush() {
    let began = Instant::now();
    while WAITING.load(Ordering::SeqCst) > 0 && began.elapsed() < FLUSH_LIMIT {
        thread::sleep(Duration::from_millis(1));
    }
}

/// The key before a command to the monitor, and the command that ends the guest, as in QEMU.
const ESCAPE: u8 = 1;
const QUIT: u8 = b'x';

/// Standard input for a guest; on a terminal, Ctrl-A x ends the guest and Ctrl-A Ctrl-A is a Ctrl-A.
pub(super) struct Input {
    stdin: File,
    quit: Option<Arc<Monitor>>,
    escaped: bool,
}

impl Input {
    /// # Errors
    /// The system's.
    pub(super) fn new(quit: Arc<Monitor>) -> io::Result<Self> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let quit = stdin.is_terminal().then_some(quit);
        Ok(Self {
            stdin,
            quit,
            escaped: false,
        })
    }

    /// Takes the monitor's commands out of `bytes`; returns how many are left.
    fn filter(&mut self, bytes: &mut [u8]) -> usize {
        let Some(quit) = &self.quit else {
            return bytes.len();
        };
        let mut kept = 0;
        for at in 0..bytes.len() {
            let byte = bytes[at];
            match (self.escaped, byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, QUIT) => {
                    self.escaped = false;
                    quit.interrupt();
                }
                (_, byte) => {
                    self.escaped = false;
                    bytes[kept] = byte;
                    kept += 1;
                }
            }
        }
        kept
    }
}

impl Read for Input {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.stdin.read(bytes)?;
        match self.filter(&mut bytes[..count]) {
            // All of it was for the monitor: no input, but not the end of it either.
            0 if count > 0 => Err(io::ErrorKind::WouldBlock.into()),
            kept => Ok(kept),
        }
    }
}

impl AsFd for Input {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stdin.as_fd()
    }
}

/// A terminal that passes every key to the guest, until this is dropped.
pub(super) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Standard input in raw mode; none if it is no terminal.
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
        // A terminal that has gone needs no mode.
        let _gone = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
