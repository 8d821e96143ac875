//! Finds the frames in the bytes of a migration stream.
//!
//! This is a second implementation of the wire format, independent of the one in ferry-migration. An unintended change
//! of the format shows up here as a fault that never fires.
//!
//! ```text
//! header, only to the destination: "FERRYMIG" │ version u32 │ length u32 │ description │ crc32 u32
//! frame: tag u32 │ length u32 │ sequence u32 │ crc32 u32 │ payload
//! ```

use std::collections::BTreeMap;

/// Size of the fixed part of a frame in bytes.
const FIXED: usize = 16;
/// First bytes of the header.
pub(crate) const MAGIC: &[u8] = b"FERRYMIG";
/// Size of the header before its description in bytes.
pub(crate) const HEADER_FIXED: usize = FIXED;
/// Size of the header after its description in bytes.
pub(crate) const HEADER_CHECKSUM: usize = 4;

/// Kind of a frame, by its number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Tag {
    /// Pages with contents.
    Pages = 1,
    /// Zero pages, which are sent without contents.
    ZeroPages = 2,
    /// End of a pre-copy round.
    RoundEnd = 3,
    /// Section of device or vCPU state.
    State = 4,
    /// End of all state.
    Finish = 5,
    /// Commit: the destination owns the guest from here on.
    Commit = 6,
    /// The destination accepts the guest that the header describes.
    Accept = 16,
    /// The destination has received a round.
    RoundAck = 18,
    /// The destination has restored all state and waits for the commit.
    Ready = 20,
    /// The destination has taken over the guest.
    Done = 21,
}

/// Position and kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Offset of its first byte in its direction of the connection.
    pub offset: u64,
    /// Its tag on the wire.
    pub tag: u32,
    /// Number of frames with the same tag before it.
    pub before: usize,
}

/// Parser for one direction of one connection.
#[derive(Clone, Debug)]
pub struct Frames {
    position: u64,
    skip: u64,
    fixed: Vec<u8>,
    header_due: bool,
    counts: BTreeMap<u32, usize>,
    starts: Vec<Start>,
}

impl Frames {
    /// Returns a parser for the first byte of a connection. Only the source sends a header.
    pub fn new(header_due: bool) -> Self {
        let (counts, starts) = (BTreeMap::new(), Vec::new());
        Self {
            position: 0,
            skip: 0,
            fixed: Vec::new(),
            header_due,
            counts,
            starts,
        }
    }

    /// Parses the next bytes.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let rest = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            let count = if self.skip > 0 {
                self.skip.min(rest)
            } else {
                self.wanted().min(rest)
            };
            let (now, later) = bytes.split_at(usize::try_from(count).unwrap_or(bytes.len()));
            self.position += count;
            bytes = later;
            if self.skip > 0 {
                self.skip -= count;
                continue;
            }
            self.fixed.extend_from_slice(now);
            if self.fixed.len() == FIXED {
                self.complete();
            }
        }
    }

    /// Drops the frames that begin before `offset`, and returns the others.
    pub fn starts_from(&mut self, offset: u64) -> &[Start] {
        self.starts.retain(|start| start.offset >= offset);
        &self.starts
    }

    /// Returns the frames whose fixed parts are complete.
    pub fn starts(&self) -> &[Start] {
        &self.starts
    }

    /// Returns the number of bytes of a fixed part that is not complete yet.
    pub fn undecided(&self) -> usize {
        self.fixed.len()
    }

    fn wanted(&self) -> u64 {
        u64::try_from(FIXED - self.fixed.len()).unwrap_or(0)
    }

    fn complete(&mut self) {
        let word = |at: usize| {
            let bytes = self.fixed[at..at + 4].try_into().unwrap_or([0; 4]);
            u32::from_le_bytes(bytes)
        };
        if self.header_due {
            self.header_due = false;
            // A stream that does not begin with a Ferry header has no frames.
            let known = self.fixed.starts_with(MAGIC);
            self.skip = if known {
                u64::from(word(12)) + HEADER_CHECKSUM as u64
            } else {
                u64::MAX
            };
        } else {
            let (tag, length) = (word(0), word(4));
            let count = self.counts.entry(tag).or_default();
            let offset = self.position.saturating_sub(FIXED as u64);
            self.starts.push(Start {
                offset,
                tag,
                before: *count,
            });
            *count += 1;
            self.skip = length.into();
        }
        self.fixed.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tag: Tag, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap();
        let words = [tag as u32, length, 9, 9];
        let fixed = words.into_iter().flat_map(u32::to_le_bytes);
        fixed.chain(payload.iter().copied()).collect()
    }

    fn stream() -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0, 0, 0, 3, 0, 0, 0]);
        bytes.extend(b"{ }crc!");
        bytes.extend(frame(Tag::Pages, &[6; 40]));
        bytes.extend(frame(Tag::Commit, b""));
        bytes.extend(frame(Tag::Pages, b"x"));
        bytes
    }

    #[test]
    fn starts_are_found_however_the_stream_is_cut() {
        let start = |offset, tag, before| Start {
            offset,
            tag: tag as u32,
            before,
        };
        let expected = [
            start(23, Tag::Pages, 0),
            start(79, Tag::Commit, 0),
            start(95, Tag::Pages, 1),
        ];
        for size in 1..30 {
            let mut frames = Frames::new(true);
            stream().chunks(size).for_each(|piece| frames.feed(piece));
            assert_eq!(frames.starts_from(0), expected, "pieces of {size}");
            assert_eq!(
                (frames.undecided(), frames.starts_from(80)),
                (0, &expected[2..])
            );
        }
    }

    #[test]
    fn replies_have_no_header_and_other_streams_no_frames() {
        let mut replies = Frames::new(false);
        replies.feed(&frame(Tag::Ready, b"digest"));
        assert_eq!(replies.starts_from(0).len(), 1);
        let mut other = Frames::new(true);
        other.feed(&[0; 1000]);
        assert_eq!(other.starts_from(0), []);
    }
}
