//! What the destination says to the source: its replies, and ALIVE while it works.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::wire::{FrameWriter, Tag, WireError};

/// Longest time between two ALIVE frames.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// How often ALIVE is sent within the time that the source may wait for one message.
const ALIVES: u32 = 8;

/// Sends replies, and ALIVE from a thread of its own while the destination works, so that the source can tell a slow
/// destination from a dead one. Dropping it ends the thread.
pub(crate) struct Answers {
    shared: Arc<Shared>,
}

struct Shared {
    frames: Mutex<FrameWriter<Box<dyn Write + Send>>>,
    /// Whether the destination works on something that may take long.
    working: AtomicBool,
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl Answers {
    /// Starts the thread. `message_limit` is how long this side waits for a message; the source should wait as long.
    ///
    /// # Errors
    /// Returns the system's error if no thread can be started.
    pub(crate) fn start(
        frames: FrameWriter<Box<dyn Write + Send>>,
        message_limit: Duration,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            frames: Mutex::new(frames),
            working: AtomicBool::new(false),
            stopped: Mutex::new(false),
            changed: Condvar::new(),
        });
        let period = (message_limit / ALIVES).min(ALIVE_EVERY);
        let speaker = Arc::clone(&shared);
        thread::Builder::new()
            .name("migr-alive".into())
            .spawn(move || speaker.say_alive(period))?;
        Ok(Self { shared })
    }

    /// Sends one reply.
    ///
    /// # Errors
    /// Returns [`WireError`] if the stream fails or its deadline passes.
    pub(crate) fn reply(&self, tag: Tag, payload: &[u8]) -> Result<(), WireError> {
        self.shared.frames().frame(tag, [payload, &[]])
    }

    /// Does `work`, which may take long. The source is told meanwhile that the destination is alive.
    pub(crate) fn while_working<T>(&self, work: impl FnOnce() -> T) -> T {
        let _working = Working::begin(&self.shared.working);
        work()
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        *self.shared.stopped() = true;
        self.shared.changed.notify_all();
    }
}

/// Marks the destination as working until it is dropped, also by a panic.
struct Working<'a>(&'a AtomicBool);

impl<'a> Working<'a> {
    fn begin(working: &'a AtomicBool) -> Self {
        working.store(true, Ordering::SeqCst);
        Self(working)
    }
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Shared {
    /// Says ALIVE in each period in which the destination works, until the stream fails or the answers are dropped.
    fn say_alive(&self, period: Duration) {
        let mut stopped = self.stopped();
        while !*stopped {
            stopped = self
                .changed
                .wait_timeout(stopped, period)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if *stopped {
                return;
            }
            drop(stopped);
            if self.say_alive_once().is_err() {
                return;
            }
            stopped = self.stopped();
        }
    }

    fn say_alive_once(&self) -> Result<(), WireError> {
        let mut frames = self.frames();
        // Under the lock: the reply that ends the work must not be followed by an ALIVE.
        match self.working.load(Ordering::SeqCst) {
            true => frames.frame(Tag::Alive, [&[], &[]]),
            false => Ok(()),
        }
    }

    fn frames(&self) -> MutexGuard<'_, FrameWriter<Box<dyn Write + Send>>> {
        // After a panic of the stream inside a frame, the source finds the damage by checksum and sequence.
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> MutexGuard<'_, bool> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::wire::FrameReader;

    /// Hands each write on as it comes.
    struct Sent(mpsc::Sender<Vec<u8>>);

    impl Write for Sent {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn alive_is_said_while_there_is_work_and_not_after_the_reply() {
        let (sender, sent) = mpsc::channel();
        let frames = FrameWriter::new(Box::new(Sent(sender)) as Box<dyn Write + Send>);
        let answers = Answers::start(frames, Duration::from_millis(80)).unwrap();
        let first = answers.while_working(|| sent.recv_timeout(Duration::from_secs(20)).unwrap());
        answers.reply(Tag::Accept, &[]).unwrap();
        thread::sleep(Duration::from_millis(50));
        drop(answers);
        let bytes: Vec<u8> = [first].into_iter().chain(sent.iter()).flatten().collect();
        let mut reader = FrameReader::new(&bytes[..]);
        let mut tags = Vec::new();
        while let Ok((head, _)) = reader.frame("a reply") {
            tags.push(head.tag);
        }
        assert_eq!(tags.pop(), Some(Tag::Accept));
        assert!(!tags.is_empty() && tags.iter().all(|tag| *tag == Tag::Alive));
    }
}
