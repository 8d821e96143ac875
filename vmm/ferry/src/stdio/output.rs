//! Serial output on standard output.

use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Maximum number of bytes that wait to be written to standard output.
const OUTPUT_LIMIT: usize = 16 * 1024;
/// Maximum time that a vCPU waits for room in the queue before output is dropped. A pause may take much longer.
const ROOM_LIMIT: Duration = Duration::from_millis(100);
/// Maximum time that an ending process waits until its output is read.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Bytes of the whole process that are queued for standard output.
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// A queue in front of standard output, written by a thread of its own, so that a stalled reader stops no vCPU.
pub(super) struct QueuedOutput {
    bytes: SyncSender<u8>,
    /// Whether the reader has stalled. While it has, writes do not wait for room.
    stalled: bool,
}

impl QueuedOutput {
    pub(super) fn start() -> io::Result<Self> {
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

impl Write for QueuedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().try_for_each(|byte| self.push(*byte))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes queued bytes in batches until the queue is closed or standard output fails.
fn write_out(queue: &Receiver<u8>) {
    let mut stdout = io::stdout();
    while let Ok(first) = queue.recv() {
        let batch: Vec<u8> = std::iter::once(first)
            .chain(queue.try_iter().take(4095))
            .collect();
        let written = stdout.write_all(&batch).and_then(|()| stdout.flush());
        WAITING.fetch_sub(batch.len(), Ordering::SeqCst);
        if written.is_err() {
            // The reader is gone. Queued output is dropped, and further writes fail.
            WAITING.fetch_sub(queue.try_iter().count(), Ordering::SeqCst);
            return;
        }
    }
}

/// Waits until all queued output is written, or the reader has stalled for [`FLUSH_LIMIT`].
pub(crate) fn flush() {
    let began = Instant::now();
    while WAITING.load(Ordering::SeqCst) > 0 && began.elapsed() < FLUSH_LIMIT {
        thread::sleep(Duration::from_millis(1));
    }
}
