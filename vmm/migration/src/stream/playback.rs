//! Plays a recorded guest back to a destination.

use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Halves, Stream};

/// A stream that [`Recording`](super::Recording) has written, for [`receive`](crate::receive) to read. What the
/// destination replies is discarded.
///
/// Each playback makes one more copy of the guest, which the engine cannot know of: play a recording back once, or give
/// each copy another identity.
///
/// A recording that is incomplete is refused before anything runs, because COMMIT is its last frame. A read that
/// hangs in the file system cannot be interrupted: deadlines and cancels take effect after it.
#[derive(Debug)]
pub struct Playback {
    file: File,
}

impl Playback {
    /// Plays `file` back from its current position.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self { file }
    }
}

impl Stream for Playback {
    fn split(self) -> io::Result<Halves> {
        let ended = Arc::new(AtomicBool::new(false));
        let reader = PlaybackReader {
            file: self.file,
            ended: Arc::clone(&ended),
        };
        Ok(Halves::new(reader, io::sink(), move |half| {
            if matches!(half, Shutdown::Read | Shutdown::Both) {
                ended.store(true, Ordering::Relaxed);
            }
        }))
    }
}

struct PlaybackReader {
    file: File,
    ended: Arc<AtomicBool>,
}

impl Read for PlaybackReader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self.ended.load(Ordering::Relaxed) {
            true => Ok(0),
            false => self.file.read(bytes),
        }
    }
}
