//! Records a guest into a file, in the place of a destination.

use std::fs::File;
use std::io::{self, IoSlice, Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::memory::{PipeReader, PipeWriter, pipe};
use super::{Halves, Stream};
use crate::wire::{FRAME_HEADER_BYTES, FrameWriter, Tag, WireError};
use crate::{header, wire};

/// Records the stream of [`send`](crate::send) into a file and answers as a destination would, so that `send`
/// runs unchanged. [`Playback`](super::Playback) reads it again.
///
/// The file is complete only if `send` returned `Ok`: then COMMIT, its last frame, is on stable storage. In any
/// other case remove the file. A recording has no memory of its own to compare with the guest's, so it refuses
/// [`DigestCheck::Compare`](crate::DigestCheck::Compare). A write that hangs in the file system cannot be interrupted:
/// deadlines and cancels take effect after it.
#[derive(Debug)]
pub struct Recording {
    file: File,
}

/// Bytes of replies that wait for the source at most. The source reads each before it causes the next.
const REPLIES_CAPACITY: usize = 64 * 1024;

impl Recording {
    /// Records into `file` from its current position on. The position should be the end of the file.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self { file }
    }
}

impl Stream for Recording {
    fn split(mut self) -> io::Result<Halves> {
        let start = self.file.stream_position()?;
        let (reader, replies) = pipe(REPLIES_CAPACITY);
        let ended = Arc::new(AtomicBool::new(false));
        let writer = Recorder {
            file: self.file,
            position: start,
            parser: Parser::default(),
            replies: FrameWriter::new(replies),
            ended: Arc::clone(&ended),
        };
        Ok(halves(reader, writer, ended))
    }
}

fn halves(reader: PipeReader, writer: Recorder, ended: Arc<AtomicBool>) -> Halves {
    let incoming = Arc::clone(&reader.0);
    Halves::new(reader, writer, move |half| {
        if matches!(half, Shutdown::Read | Shutdown::Both) {
            incoming.end_reading();
        }
        if matches!(half, Shutdown::Write | Shutdown::Both) {
            ended.store(true, Ordering::Relaxed);
        }
    })
}

struct Recorder {
    file: File,
    /// Position in the file.
    position: u64,
    parser: Parser,
    replies: FrameWriter<PipeWriter>,
    ended: Arc<AtomicBool>,
}

impl Write for Recorder {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.ended.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = self.file.write_vectored(parts)?;
        let mut left = count;
        for part in parts {
            let written = &part[..left.min(part.len())];
            left -= written.len();
            self.follow(written)?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Recorder {
    /// Follows the bytes that were written, and answers the frames that are complete.
    fn follow(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (count, complete) = self.parser.take(bytes);
            bytes = &bytes[count..];
            self.position += count as u64;
            match complete {
                Some(Complete::Header) => self.reply(Tag::Accept, b"")?,
                Some(Complete::Frame(tag)) => self.answer(tag)?,
                None => {}
            }
        }
        Ok(())
    }

    fn answer(&mut self, tag: u32) -> io::Result<()> {
        match Tag::from_wire(tag) {
            Some(Tag::RoundEnd) => self.reply(Tag::RoundAck, b""),
            Some(Tag::Finish) if self.parser.payload == [wire::FINISH_WITH_DIGEST] => self.reply(
                Tag::Refuse,
                b"a recording has no memory to compare digests with; send without the comparison",
            ),
            Some(Tag::Finish) => self.reply(Tag::Ready, b""),
            Some(Tag::Commit) => match self.file.sync_all() {
                Ok(()) => self.reply(Tag::Done, b""),
                Err(error) => self.withdraw(&error),
            },
            _ => Ok(()),
        }
    }

    /// Takes COMMIT off the file again, because it is not on stable storage, and refuses the guest.
    fn withdraw(&mut self, error: &io::Error) -> io::Result<()> {
        let commit = self.position - FRAME_HEADER_BYTES as u64;
        self.file.set_len(commit)?;
        self.file.seek(SeekFrom::Start(commit))?;
        let reason = format!("the recording cannot be written to stable storage: {error}");
        self.reply(Tag::Refuse, reason.as_bytes())
    }

    fn reply(&mut self, tag: Tag, payload: &[u8]) -> io::Result<()> {
        match self.replies.frame(tag, [payload, &[]]) {
            Ok(()) => Ok(()),
            // The source reads no replies any more.
            Err(WireError::Io { source, .. }) => Err(source),
            Err(other) => Err(io::Error::other(other)),
        }
    }
}

/// Finds the end of the header and of each frame in a stream. Checks nothing: that is the reader's part.
#[derive(Default)]
struct Parser {
    state: Parse,
    /// Bytes of the fixed part that have been seen.
    fixed: Vec<u8>,
    /// Payload of the current frame, if it is a short one.
    payload: Vec<u8>,
}

#[derive(Clone, Copy, Default)]
enum Parse {
    /// In the fixed part of the header.
    #[default]
    Header,
    /// In the rest of the header, this many bytes before its end.
    HeaderRest(u64),
    /// In the fixed part of a frame.
    Frame,
    /// In the payload of a frame with this tag, this many bytes before its end.
    Payload(u32, u64),
}

enum Complete {
    Header,
    Frame(u32),
}

/// Longest payload that the recorder looks at.
const SHORT_PAYLOAD: u64 = 64;

impl Parser {
    /// Takes some of `bytes`. Returns how many, and what they completed.
    fn take(&mut self, bytes: &[u8]) -> (usize, Option<Complete>) {
        match self.state {
            Parse::Header | Parse::Frame => {
                let count = bytes.len().min(FRAME_HEADER_BYTES - self.fixed.len());
                self.fixed.extend_from_slice(&bytes[..count]);
                if self.fixed.len() < FRAME_HEADER_BYTES {
                    return (count, None);
                }
                self.payload.clear();
                let length = u64::from(self.word(4));
                self.state = match self.state {
                    Parse::Header => {
                        Parse::HeaderRest(u64::from(self.word(12)) + header::CHECKSUM_BYTES as u64)
                    }
                    _ => Parse::Payload(self.word(0), length),
                };
                self.fixed.clear();
                (count, self.complete())
            }
            Parse::HeaderRest(left) => {
                let count = at_most(bytes.len(), left);
                self.state = Parse::HeaderRest(left - count as u64);
                (count, self.complete())
            }
            Parse::Payload(tag, left) => {
                let count = at_most(bytes.len(), left);
                if left <= SHORT_PAYLOAD {
                    self.payload.extend_from_slice(&bytes[..count]);
                }
                self.state = Parse::Payload(tag, left - count as u64);
                (count, self.complete())
            }
        }
    }

    fn complete(&mut self) -> Option<Complete> {
        let complete = match self.state {
            Parse::HeaderRest(0) => Complete::Header,
            Parse::Payload(tag, 0) => Complete::Frame(tag),
            _ => return None,
        };
        self.state = Parse::Frame;
        Some(complete)
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self.fixed.get(at..at + 4).and_then(|b| b.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    }
}

fn at_most(length: usize, left: u64) -> usize {
    usize::try_from(left).map_or(length, |left| left.min(length))
}
