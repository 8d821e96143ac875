//! Frames: how anything but the header crosses the connection.
//!
//! ```text
//! tag u32 │ length u32 │ sequence u32 │ crc32 u32 │ payload, `length` bytes        (little-endian)
//! ```
//!
//! The checksum covers the first three fields and the payload; the sequence counts the frames of one
//! direction, so a frame that is lost, repeated or out of place is noticed like one that was changed.
//! Each tag has a cap on its length, checked before anything is allocated.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};

/// Data of one frame of pages, at most: small enough to stay in a core's cache between the copy, the
/// checksum and the kernel's copy.
pub const PAGES_DATA_LIMIT: usize = 64 * 1024;
/// Bytes of a run in the table of a [`Tag::Pages`] or [`Tag::ZeroPages`] frame: address u64, pages u32.
pub const RUN_BYTES: usize = 12;
/// Runs in the table of one frame, at most.
pub const RUNS_LIMIT: usize = 4096;
const FRAME_HEADER_BYTES: usize = 16;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Tag {
    /// To the destination: a table of runs, and their pages.
    Pages = 1,
    /// To the destination: a table of runs of pages that hold nothing but zeros.
    ZeroPages = 2,
    /// To the destination: a round is complete; answered by [`Tag::RoundAck`].
    RoundEnd = 3,
    /// To the destination: one section of device or vCPU state.
    State = 4,
    /// To the destination: that was all; answered by [`Tag::Ready`].
    Finish = 5,
    /// To the destination: the guest is yours. The source never runs it again by itself.
    Commit = 6,
    /// To the source: the guest fits here.
    Accept = 16,
    /// To the source: no, and why, in words.
    Refuse = 17,
    /// To the source: everything of the round is in place.
    RoundAck = 18,
    /// To the source: still at work.
    Alive = 19,
    /// To the source: the guest could run, and waits for the commit.
    Ready = 20,
    /// To the source: the guest runs here.
    Done = 21,
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

    fn from_wire(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|tag| *tag as u32 == value)
    }

    /// The most bytes that a frame of this tag may carry.
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

/// Why the other side could not be understood or reached. Offsets count from the start of the stream.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed or went silent.
    #[error("{doing} at offset {offset}: {}", describe(source))]
    Io {
        /// "reading" or "writing", and what.
        doing: String,
        /// Where in the stream.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The stream ended too early.
    #[error("the stream ends in {section} at offset {offset}")]
    Truncated {
        /// What was expected there.
        section: String,
        /// Where.
        offset: u64,
    },
    /// A tag that this version does not know.
    #[error("frame {sequence} at offset {offset}: unknown tag {found:#x}")]
    UnknownTag {
        /// The frame's number.
        sequence: u32,
        /// Where it begins.
        offset: u64,
        /// Its tag.
        found: u32,
    },
    /// A frame that is longer than its kind may be.
    #[error(
        "{tag:?} frame {sequence} at offset {offset}: {found} bytes, at most {limit} are allowed"
    )]
    TooLong {
        /// Its tag.
        tag: Tag,
        /// The frame's number.
        sequence: u32,
        /// Where it begins.
        offset: u64,
        /// Its length.
        found: u32,
        /// The most that the tag allows.
        limit: usize,
    },
    /// A frame out of order.
    #[error("{tag:?} frame at offset {offset}: it is number {found}, number {required} was due")]
    Sequence {
        /// Its tag.
        tag: Tag,
        /// Where it begins.
        offset: u64,
        /// Its number.
        found: u32,
        /// The number that was due.
        required: u32,
    },
    /// A frame that was changed on its way.
    #[error(
        "{tag:?} frame {sequence} at offset {offset}: checksum {found:#010x}, its contents have \
         {required:#010x}"
    )]
    Checksum {
        /// Its tag.
        tag: Tag,
        /// The frame's number.
        sequence: u32,
        /// Where it begins.
        offset: u64,
        /// The checksum that it carries.
        found: u32,
        /// The checksum of what it carries.
        required: u32,
    },
    /// A frame whose contents make no sense, though they arrived whole.
    #[error("{tag:?} frame {sequence} at offset {offset}: {why}")]
    Malformed {
        /// Its tag.
        tag: Tag,
        /// The frame's number.
        sequence: u32,
        /// Where it begins.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// A frame that has no place in this phase.
    #[error("{found:?} frame {sequence} at offset {offset}: {required} was due")]
    Unexpected {
        /// Its tag.
        found: Tag,
        /// The frame's number.
        sequence: u32,
        /// Where it begins.
        offset: u64,
        /// What was due.
        required: &'static str,
    },
    /// The header is not one of Ferry's, or not one that this version reads.
    #[error("stream header: {0}")]
    Header(String),
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "the other side has been silent for too long".into()
        }
        _ => error.to_string(),
    }
}

type Result<T> = std::result::Result<T, WireError>;

/// The sending half of one direction.
pub struct FrameWriter<W> {
    stream: W,
    sequence: u32,
    offset: u64,
}

impl<W: Write> FrameWriter<W> {
    /// Frames onto `stream`.
    pub fn new(stream: W) -> Self {
        Self {
            stream,
            sequence: 0,
            offset: 0,
        }
    }

    /// Bytes written so far.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Writes bytes that are not a frame: the header.
    ///
    /// # Errors
    /// The connection's.
    pub fn raw(&mut self, what: &str, bytes: &[u8]) -> Result<()> {
        self.stream
            .write_all(bytes)
            .map_err(|source| self.failed(what, source))?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    /// Writes one frame whose payload is `parts`, one after the other.
    ///
    /// # Errors
    /// The connection's; and a payload beyond the tag's limit, which is a defect of the caller and is
    /// refused as the other side would refuse it.
    pub fn frame(&mut self, tag: Tag, parts: [&[u8]; 2]) -> Result<()> {
        let length = parts[0].len() + parts[1].len();
        let wire_length = u32::try_from(length).unwrap_or(u32::MAX);
        if length > tag.limit() {
            let (sequence, offset) = (self.sequence, self.offset);
            let (found, limit) = (wire_length, tag.limit());
            return Err(WireError::TooLong {
                tag,
                sequence,
                offset,
                found,
                limit,
            });
        }
        let header = encode_header(tag as u32, wire_length, self.sequence, parts);
        self.all([&header, parts[0], parts[1]])
            .map_err(|source| self.failed(&format!("{tag:?}"), source))?;
        self.sequence = self.sequence.wrapping_add(1);
        Ok(())
    }

    /// As [`Self::frame`] without payload, for [`Tag::Commit`]: tells apart a frame of which nothing left
    /// this process from one that may have.
    ///
    /// # Errors
    /// The connection's; `true` beside it if the other side may have the frame all the same.
    pub fn commit(&mut self) -> std::result::Result<(), (bool, WireError)> {
        let before = self.offset;
        self.frame(Tag::Commit, [&[], &[]])
            .map_err(|error| (self.offset != before, error))
    }

    /// write_all for several slices, counting what has left.
    fn all(&mut self, parts: [&[u8]; 3]) -> io::Result<()> {
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
        WireError::Io {
            doing: format!("writing {what}"),
            offset: self.offset,
            source,
        }
    }
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

/// A frame's head, once it has been read.
#[derive(Clone, Copy, Debug)]
pub struct FrameHead {
    /// What it is.
    pub tag: Tag,
    /// Its number in its direction.
    pub sequence: u32,
    /// Where in the stream it begins.
    pub offset: u64,
}

impl FrameHead {
    /// The error that this frame's contents make no sense.
    pub fn malformed(&self, why: impl Into<String>) -> WireError {
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

    /// The error that this frame has no place here.
    #[must_use]
    pub fn unexpected(&self, required: &'static str) -> WireError {
        let Self {
            tag: found,
            sequence,
            offset,
        } = *self;
        WireError::Unexpected {
            found,
            sequence,
            offset,
            required,
        }
    }
}

/// The receiving half of one direction.
pub struct FrameReader<R> {
    stream: R,
    sequence: u32,
    offset: u64,
    payload: Vec<u8>,
}

impl<R: Read> FrameReader<R> {
    /// Frames from `stream`.
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            sequence: 0,
            offset: 0,
            payload: Vec::new(),
        }
    }

    /// Bytes read so far.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Fills `bytes`, which are not a frame: the header.
    ///
    /// # Errors
    /// The connection's, and its end.
    pub fn raw(&mut self, section: &str, bytes: &mut [u8]) -> Result<()> {
        fill(
            &mut self.stream,
            &mut self.offset,
            format_args!("{section}"),
            bytes,
        )
    }

    /// Reads one whole frame and checks it.
    ///
    /// # Errors
    /// The connection's and its end, and frames that are too long, out of order or changed.
    pub fn frame(&mut self) -> Result<(FrameHead, &[u8])> {
        let offset = self.offset;
        let mut header = [0; FRAME_HEADER_BYTES];
        let due = self.sequence;
        fill(
            &mut self.stream,
            &mut self.offset,
            format_args!("frame {due}"),
            &mut header,
        )?;
        let field = |n: usize| {
            let bytes = &header[n * 4..n * 4 + 4];
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        };
        let (found_tag, length, found, checksum) = (field(0), field(1), field(2), field(3));
        let required = self.sequence;
        let Some(tag) = Tag::from_wire(found_tag) else {
            return Err(WireError::UnknownTag {
                sequence: required,
                offset,
                found: found_tag,
            });
        };
        if length as usize > tag.limit() {
            let limit = tag.limit();
            return Err(WireError::TooLong {
                tag,
                sequence: found,
                offset,
                found: length,
                limit,
            });
        }
        self.payload.resize(length as usize, 0);
        fill(
            &mut self.stream,
            &mut self.offset,
            format_args!("{tag:?} frame"),
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
        Ok((
            FrameHead {
                tag,
                sequence: found,
                offset,
            },
            &self.payload,
        ))
    }
}

/// read_exact that counts, and names what the stream ended in.
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
            match reader.frame() {
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
        let error = reader.frame().unwrap_err();
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
            let (doubt, _error) = FrameWriter::new(Stuck(room)).commit().unwrap_err();
            assert_eq!(doubt, in_doubt, "with room for {room} bytes");
        }
    }
}
