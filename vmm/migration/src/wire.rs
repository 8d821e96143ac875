//! Frames: how everything but the header crosses the stream.
//!
//! ```text
//! tag u32 │ length u32 │ sequence u32 │ crc32 u32 │ payload, `length` bytes        (little-endian)
//! ```
//!
//! The checksum covers the first three fields and the payload. The sequence counts the frames of one
//! direction, so that a lost, repeated or reordered frame is found like a changed one. Each tag has a cap on its
//! length, which is checked before anything is allocated.

mod error;

use std::fmt;
use std::io::{self, IoSlice, Read, Write};

pub use error::WireError;

use crate::watchdog::Timer;

/// Most bytes of page contents in one frame: few enough to stay in a core's cache between the copy, the checksum
/// and the kernel's copy.
pub(crate) const PAGES_DATA_LIMIT: usize = 64 * 1024;
/// Bytes of one run in the table of a [`Tag::Pages`] or [`Tag::ZeroPages`] frame: address u64, pages u32.
pub(crate) const RUN_BYTES: usize = 12;
/// Most runs in the table of one frame.
pub(crate) const RUNS_LIMIT: usize = 4096;
/// Bytes of the fixed part of a frame.
pub(crate) const FRAME_HEADER_BYTES: usize = 16;
/// Payload of [`Tag::Finish`] if the source does not compare digests.
pub(crate) const FINISH_PLAIN: u8 = 0;
/// Payload of [`Tag::Finish`] if the source compares digests: READY then carries the destination's.
pub(crate) const FINISH_WITH_DIGEST: u8 = 1;

/// Kind of a frame. The first six go to the destination, the others to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Tag {
    /// A table of runs of pages, and the contents of the pages.
    Pages = 1,
    /// A table of runs of pages that hold only zeros.
    ZeroPages = 2,
    /// End of a pre-copy round; answered by [`Tag::RoundAck`].
    RoundEnd = 3,
    /// One section of device or vCPU state.
    State = 4,
    /// End of memory and state; answered by [`Tag::Ready`].
    Finish = 5,
    /// The destination has the guest. The source never runs it again by itself.
    Commit = 6,
    /// The destination can take the guest.
    Accept = 16,
    /// The destination does not take the guest, for the reason in the payload (text).
    Refuse = 17,
    /// The destination has all pages of the round.
    RoundAck = 18,
    /// The destination is still at work.
    Alive = 19,
    /// The destination could run the guest and waits for COMMIT.
    Ready = 20,
    /// The destination has the guest.
    Done = 21,
}

/// Writes the tag as the protocol names it.
impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pages => "PAGES",
            Self::ZeroPages => "ZERO PAGES",
            Self::RoundEnd => "ROUND END",
            Self::State => "STATE",
            Self::Finish => "FINISH",
            Self::Commit => "COMMIT",
            Self::Accept => "ACCEPT",
            Self::Refuse => "REFUSE",
            Self::RoundAck => "ROUND ACK",
            Self::Alive => "ALIVE",
            Self::Ready => "READY",
            Self::Done => "DONE",
        })
    }
}

impl Tag {
    const ALL: [Self; 12] = [
        Self::Pages,
        Self::ZeroPages,
        Self::RoundEnd,
        Self::State,
        Self::Finish,
        Self::Commit,
        Self::Accept,
        Self::Refuse,
        Self::RoundAck,
        Self::Alive,
        Self::Ready,
        Self::Done,
    ];

    pub(crate) fn from_wire(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|tag| *tag as u32 == value)
    }

    /// Returns the most bytes that the payload of this kind of frame may have.
    #[must_use]
    pub fn limit(self) -> usize {
        match self {
            Self::Pages => 4 + RUNS_LIMIT * RUN_BYTES + PAGES_DATA_LIMIT,
            Self::ZeroPages => 4 + RUNS_LIMIT * RUN_BYTES,
            Self::State => 1 << 20,
            Self::Refuse => 4096,
            Self::RoundEnd | Self::Finish | Self::Ready => 64,
            Self::Commit | Self::Accept | Self::RoundAck | Self::Alive | Self::Done => 0,
        }
    }
}

type Result<T> = std::result::Result<T, WireError>;

/// Writes frames to one direction of a stream.
pub(crate) struct FrameWriter<W> {
    stream: W,
    timer: Timer,
    sequence: u32,
    offset: u64,
}

impl<W: Write> FrameWriter<W> {
    /// Creates a writer without deadlines.
    pub(crate) fn new(stream: W) -> Self {
        Self::timed(stream, Timer::default())
    }

    /// Creates a writer under the deadlines of `timer`.
    pub(crate) fn timed(stream: W, timer: Timer) -> Self {
        Self {
            stream,
            timer,
            sequence: 0,
            offset: 0,
        }
    }

    /// Returns the number of bytes written so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Writes bytes that are not a frame: the header.
    ///
    /// # Errors
    /// Returns [`WireError`] if the stream fails or its deadline passes.
    pub(crate) fn raw(&mut self, what: &str, bytes: &[u8]) -> Result<()> {
        self.all([bytes, &[], &[]])
            .map_err(|source| self.failed(what, source))
    }

    /// Writes one frame whose payload is the concatenation of `parts`.
    ///
    /// # Errors
    /// Returns [`WireError`] if the stream fails or its deadline passes. Returns [`WireError::TooLong`] if the
    /// payload exceeds the tag's limit: the other side would refuse it.
    pub(crate) fn frame(&mut self, tag: Tag, parts: [&[u8]; 2]) -> Result<()> {
        let length = parts[0].len() + parts[1].len();
        let wire_length = u32::try_from(length).unwrap_or(u32::MAX);
        if length > tag.limit() {
            return Err(WireError::TooLong {
                tag,
                sequence: self.sequence,
                offset: self.offset,
                found: wire_length,
                limit: tag.limit(),
            });
        }
        let header = encode_header(tag as u32, wire_length, self.sequence, parts);
        self.all([&header, parts[0], parts[1]])
            .map_err(|source| self.failed(&tag.to_string(), source))?;
        self.sequence = self.sequence.wrapping_add(1);
        Ok(())
    }

    /// Writes a COMMIT frame.
    ///
    /// # Errors
    /// Returns [`CommitError`], which tells whether the other side may have COMMIT all the same.
    pub(crate) fn commit(&mut self) -> std::result::Result<(), CommitError> {
        let before = self.offset;
        self.frame(Tag::Commit, [&[], &[]])
            .map_err(|error| match self.offset == before {
                true => CommitError::NothingSent(error),
                false => CommitError::InDoubt(error),
            })
    }

    /// Writes all bytes of several slices within one deadline.
    fn all(&mut self, parts: [&[u8]; 3]) -> io::Result<()> {
        self.timer.begin();
        let written = self.all_untimed(parts);
        self.timer.end();
        written
    }

    fn all_untimed(&mut self, parts: [&[u8]; 3]) -> io::Result<()> {
        let mut slices = parts.map(IoSlice::new);
        let mut rest = &mut slices[..];
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            match self.stream.write_vectored(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.offset += count as u64;
                    IoSlice::advance_slices(&mut rest, count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.stream.flush()
    }

    fn failed(&self, what: &str, source: io::Error) -> WireError {
        match self.timer.expired() {
            Some(expired) => WireError::not_taken(what, expired),
            None => WireError::Io {
                doing: format!("writing {what}"),
                offset: self.offset,
                source,
            },
        }
    }
}

/// COMMIT could not be written.
#[derive(Debug)]
pub(crate) enum CommitError {
    /// No byte of it left this side: the other side cannot have it.
    NothingSent(WireError),
    /// Some bytes of it left this side: the other side may have it.
    InDoubt(WireError),
}

fn encode_header(tag: u32, length: u32, sequence: u32, parts: [&[u8]; 2]) -> [u8; 16] {
    let mut header = [0; FRAME_HEADER_BYTES];
    for (field, value) in header.chunks_exact_mut(4).zip([tag, length, sequence]) {
        field.copy_from_slice(&value.to_le_bytes());
    }
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&header[..12]);
    parts.iter().for_each(|part| checksum.update(part));
    header[12..].copy_from_slice(&checksum.finalize().to_le_bytes());
    header
}

/// Fixed part of a frame that was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrameHead {
    /// Kind of the frame.
    pub(crate) tag: Tag,
    /// Number of the frame in its direction.
    pub(crate) sequence: u32,
    /// Offset of the frame in the stream.
    pub(crate) offset: u64,
}

impl FrameHead {
    /// Creates the error for invalid contents of this frame.
    pub(crate) fn malformed(&self, why: impl Into<String>) -> WireError {
        let Self {
            tag,
            sequence,
            offset,
        } = *self;
        WireError::Malformed {
            tag,
            sequence,
            offset,
            why: why.into(),
        }
    }

    /// Creates the error for a frame in the place of another one.
    pub(crate) fn unexpected(&self, required: impl Into<String>) -> WireError {
        let Self {
            tag: found,
            sequence,
            offset,
        } = *self;
        WireError::Unexpected {
            found,
            sequence,
            offset,
            required: required.into(),
        }
    }
}

/// Reads frames from one direction of a stream.
pub(crate) struct FrameReader<R> {
    stream: R,
    timer: Timer,
    sequence: u32,
    offset: u64,
    payload: Vec<u8>,
}

impl<R: Read> FrameReader<R> {
    /// Creates a reader without deadlines.
    #[cfg(test)]
    pub(crate) fn new(stream: R) -> Self {
        Self::timed(stream, Timer::default())
    }

    /// Creates a reader under the deadlines of `timer`.
    pub(crate) fn timed(stream: R, timer: Timer) -> Self {
        Self {
            stream,
            timer,
            sequence: 0,
            offset: 0,
            payload: Vec::new(),
        }
    }

    /// Returns the number of bytes read so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Reads one message named `what` within one deadline, as `read` does.
    ///
    /// # Errors
    /// Returns the error of `read`, or the deadline that passed.
    pub(crate) fn message<T>(
        &mut self,
        what: &str,
        read: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        self.timer.begin();
        let message = read(self);
        self.timer.end();
        message.map_err(|error| match self.timer.expired() {
            Some(expired) => WireError::not_sent(what, expired),
            None => error,
        })
    }

    /// Fills `bytes`, which are not a frame: a part of the header.
    ///
    /// # Errors
    /// Returns [`WireError`] if the stream fails or ends.
    pub(crate) fn raw(&mut self, section: &str, bytes: &mut [u8]) -> Result<()> {
        fill(
            &mut self.stream,
            &mut self.offset,
            format_args!("{section}"),
            bytes,
        )
    }

    /// Reads one whole frame and checks it. `due` names the frame that the caller waits for.
    ///
    /// # Errors
    /// Returns [`WireError`] if the stream fails or ends, if the deadline passes, or if the frame is too long, out
    /// of order or changed.
    pub(crate) fn frame(&mut self, due: &str) -> Result<(FrameHead, &[u8])> {
        let head = self.message(due, Self::read_frame)?;
        Ok((head, &self.payload))
    }

    /// Reads one whole frame as [`Self::frame`] does, however long it takes.
    ///
    /// # Errors
    /// Returns [`WireError`] if the stream fails or ends, or if the frame is too long, out of order or changed.
    pub(crate) fn untimed_frame(&mut self) -> Result<(FrameHead, &[u8])> {
        let head = self.read_frame()?;
        Ok((head, &self.payload))
    }

    /// Reads and discards bytes until the stream ends, within one deadline.
    pub(crate) fn drain(&mut self) {
        let mut bytes = [0; 64 * 1024];
        self.timer.begin();
        while self.stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
        self.timer.end();
    }

    fn read_frame(&mut self) -> Result<FrameHead> {
        let offset = self.offset;
        let mut header = [0; FRAME_HEADER_BYTES];
        let required = self.sequence;
        fill(
            &mut self.stream,
            &mut self.offset,
            format_args!("frame {required}"),
            &mut header,
        )?;
        let field = |n: usize| {
            let bytes = &header[n * 4..n * 4 + 4];
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        };
        let (found_tag, length, found, checksum) = (field(0), field(1), field(2), field(3));
        let Some(tag) = Tag::from_wire(found_tag) else {
            return Err(WireError::UnknownTag {
                sequence: required,
                offset,
                found: found_tag,
            });
        };
        if length as usize > tag.limit() {
            return Err(WireError::TooLong {
                tag,
                sequence: found,
                offset,
                found: length,
                limit: tag.limit(),
            });
        }
        self.payload.resize(length as usize, 0);
        fill(
            &mut self.stream,
            &mut self.offset,
            format_args!("{tag} frame"),
            &mut self.payload,
        )?;
        let actual = encode_header(found_tag, length, found, [&self.payload, &[]]);
        if actual != header {
            return Err(WireError::Checksum {
                tag,
                sequence: found,
                offset,
                found: checksum,
                required: u32::from_le_bytes([actual[12], actual[13], actual[14], actual[15]]),
            });
        }
        if found != required {
            return Err(WireError::Sequence {
                tag,
                offset,
                found,
                required,
            });
        }
        self.sequence = self.sequence.wrapping_add(1);
        Ok(FrameHead {
            tag,
            sequence: found,
            offset,
        })
    }
}

/// Fills `bytes` as `read_exact` does, counts them, and names the section in which the stream ends.
fn fill(
    stream: &mut impl Read,
    offset: &mut u64,
    section: fmt::Arguments<'_>,
    mut bytes: &mut [u8],
) -> Result<()> {
    while !bytes.is_empty() {
        match stream.read(bytes) {
            Ok(0) => {
                return Err(WireError::Truncated {
                    section: section.to_string(),
                    offset: *offset,
                });
            }
            Ok(count) => {
                *offset += count as u64;
                bytes = &mut bytes[count..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                let doing = format!("reading {section}");
                return Err(WireError::Io {
                    doing,
                    offset: *offset,
                    source,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream_of(frames: &[(Tag, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = FrameWriter::new(&mut bytes);
        for (tag, payload) in frames {
            writer.frame(*tag, [payload, &[]]).unwrap();
        }
        bytes
    }

    fn read_all(bytes: &[u8]) -> (Vec<(Tag, Vec<u8>)>, WireError) {
        let mut reader = FrameReader::new(bytes);
        let mut frames = Vec::new();
        loop {
            match reader.frame("a frame") {
                Ok((head, payload)) => frames.push((head.tag, payload.to_vec())),
                Err(error) => return (frames, error),
            }
        }
    }

    fn frames() -> impl Strategy<Value = Vec<(Tag, Vec<u8>)>> {
        let frame = proptest::sample::select(Tag::ALL.to_vec()).prop_flat_map(|tag| {
            (
                Just(tag),
                proptest::collection::vec(any::<u8>(), 0..=tag.limit().min(300)),
            )
        });
        proptest::collection::vec(frame, 1..6)
    }

    proptest! {
        #[test]
        fn frames_arrive_as_they_were_sent(sent in frames()) {
            let (received, end) = read_all(&stream_of(&sent));
            prop_assert_eq!(received, sent);
            prop_assert!(matches!(end, WireError::Truncated { .. }), "{}", end);
        }

        #[test]
        fn a_flipped_bit_is_noticed_in_its_frame(sent in frames(), at in any::<proptest::sample::Index>(), bit in 0_u32..8) {
            let mut bytes = stream_of(&sent);
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            let (received, _error) = read_all(&bytes);
            prop_assert!(received.len() < sent.len());
            prop_assert_eq!(&sent[..received.len()], &received[..]);
        }

        #[test]
        fn a_cut_stream_is_noticed(sent in frames(), at in any::<proptest::sample::Index>()) {
            let bytes = stream_of(&sent);
            let cut = at.index(bytes.len());
            let (received, error) = read_all(&bytes[..cut]);
            prop_assert!(received.len() < sent.len());
            match error {
                WireError::Truncated { offset, .. } => prop_assert_eq!(offset, cut as u64),
                other => prop_assert!(false, "{}", other),
            }
        }
    }

    #[test]
    fn a_lost_or_repeated_frame_is_noticed() {
        let frames = [
            (Tag::State, vec![1]),
            (Tag::State, vec![2]),
            (Tag::State, vec![3]),
        ];
        let bytes = stream_of(&frames);
        let one = bytes.len() / 3;
        let lost = [&bytes[..one], &bytes[2 * one..]].concat();
        let repeated = [&bytes[..one], &bytes[..one]].concat();
        for (stream, number) in [(lost, 2), (repeated, 0)] {
            let (received, error) = read_all(&stream);
            assert_eq!(received.len(), 1);
            assert!(
                matches!(error, WireError::Sequence { found, required: 1, .. } if found == number),
                "{error}"
            );
        }
    }

    #[test]
    fn a_length_beyond_the_cap_allocates_nothing() {
        let mut bytes = stream_of(&[(Tag::Ready, vec![])]);
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut reader = FrameReader::new(&bytes[..]);
        let error = reader.frame("a frame").unwrap_err();
        assert!(
            matches!(error, WireError::TooLong { limit: 64, .. }),
            "{error}"
        );
        assert_eq!(reader.payload.capacity(), 0);
    }

    #[test]
    fn a_commit_that_never_left_is_told_from_one_that_may_have() {
        struct Stuck(usize);
        impl Write for Stuck {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if self.0 == 0 {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                let count = bytes.len().min(self.0);
                self.0 -= count;
                Ok(count)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for (room, in_doubt) in [(0, false), (1, true), (15, true)] {
            let error = FrameWriter::new(Stuck(room)).commit().unwrap_err();
            let doubt = matches!(error, CommitError::InDoubt(_));
            assert_eq!(doubt, in_doubt, "with room for {room} bytes");
        }
    }
}
