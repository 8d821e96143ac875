//! A connection inside one process, for local migrations and tests.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Halves, Stream};

/// One side of a connection inside the process. Dropping it ends both directions.
#[derive(Debug)]
pub struct MemoryStream {
    reader: PipeReader,
    writer: PipeWriter,
}

/// Creates a connection inside the process. Each direction buffers at most `capacity` bytes (at least one): a
/// writer that is further ahead blocks.
#[must_use]
pub fn memory_pair(capacity: usize) -> (MemoryStream, MemoryStream) {
    let ((near_reader, far_writer), (far_reader, near_writer)) = (pipe(capacity), pipe(capacity));
    (
        MemoryStream {
            reader: near_reader,
            writer: near_writer,
        },
        MemoryStream {
            reader: far_reader,
            writer: far_writer,
        },
    )
}

impl Stream for MemoryStream {
    fn split(self) -> io::Result<Halves> {
        let Self { reader, writer } = self;
        let (incoming, outgoing) = (Arc::clone(&reader.0), Arc::clone(&writer.0));
        let end = move |half| {
            if matches!(half, Shutdown::Read | Shutdown::Both) {
                incoming.end_reading();
            }
            if matches!(half, Shutdown::Write | Shutdown::Both) {
                outgoing.end_writing();
            }
        };
        Ok(Halves::new(reader, writer, end))
    }
}

/// Creates one direction.
pub(super) fn pipe(capacity: usize) -> (PipeReader, PipeWriter) {
    let pipe = Arc::new(Pipe {
        state: Mutex::default(),
        changed: Condvar::new(),
        capacity: capacity.max(1),
    });
    (PipeReader(Arc::clone(&pipe)), PipeWriter(pipe))
}

/// One direction: a bounded queue of bytes.
#[derive(Debug)]
pub(super) struct Pipe {
    state: Mutex<State>,
    changed: Condvar,
    capacity: usize,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    /// Nothing more will be read.
    reading_ended: bool,
    /// Nothing more will be written.
    writing_ended: bool,
}

impl Pipe {
    pub(super) fn end_reading(&self) {
        let mut state = self.lock();
        state.reading_ended = true;
        state.bytes = VecDeque::new();
        self.changed.notify_all();
    }

    pub(super) fn end_writing(&self) {
        self.lock().writing_ended = true;
        self.changed.notify_all();
    }

    /// Waits while `condition` holds for the state.
    fn wait_while(&self, condition: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        self.changed
            .wait_while(self.lock(), |state| condition(state))
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Bytes are added and removed as a whole, so a panic of another thread leaves nothing half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a direction that is read from.
#[derive(Debug)]
pub(super) struct PipeReader(pub(super) Arc<Pipe>);

impl Read for PipeReader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.wait_while(|state| {
            state.bytes.is_empty() && !state.reading_ended && !state.writing_ended
        });
        let count = state.bytes.read(bytes)?;
        self.0.changed.notify_all();
        Ok(count)
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        self.0.end_reading();
    }
}

/// The end of a direction that is written to.
#[derive(Debug)]
pub(super) struct PipeWriter(pub(super) Arc<Pipe>);

impl Write for PipeWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let capacity = self.0.capacity;
        let mut state = self.0.wait_while(|state| {
            state.bytes.len() >= capacity && !state.reading_ended && !state.writing_ended
        });
        if state.reading_ended || state.writing_ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = bytes.len().min(capacity - state.bytes.len());
        state.bytes.extend(&bytes[..count]);
        self.0.changed.notify_all();
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for PipeWriter {
    fn drop(&mut self) {
        self.0.end_writing();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn bytes_arrive_in_order_through_a_buffer_smaller_than_they_are() {
        let (mut reader, mut writer) = pipe(7);
        let sent: Vec<u8> = (0..=u8::MAX).collect();
        let expected = sent.clone();
        let sender = thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        sender.join().unwrap();
        assert_eq!(received, expected);
    }

    #[test]
    fn what_was_written_before_the_end_is_still_read() {
        let (mut reader, mut writer) = pipe(100);
        writer.write_all(b"last words").unwrap();
        writer.0.end_writing();
        writer.write_all(b"more").unwrap_err();
        let mut received = String::new();
        reader.read_to_string(&mut received).unwrap();
        assert_eq!(received, "last words");
    }

    #[test]
    fn ending_a_direction_wakes_its_reader_and_its_writer() {
        let (mut reader, writer) = pipe(1);
        let pipe_of_reader = Arc::clone(&reader.0);
        let blocked = thread::spawn(move || reader.read(&mut [0; 4]).unwrap());
        pipe_of_reader.end_reading();
        assert_eq!(blocked.join().unwrap(), 0);
        drop(writer);
        let (reader, mut writer) = pipe(1);
        writer.write_all(b"x").unwrap();
        let pipe_of_writer = Arc::clone(&writer.0);
        let blocked = thread::spawn(move || writer.write(b"y"));
        pipe_of_writer.end_writing();
        blocked.join().unwrap().unwrap_err();
        drop(reader);
    }
}
