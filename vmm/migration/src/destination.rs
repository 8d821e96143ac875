//! The destination's side of a migration.
//!
//! No guest runs here before COMMIT. Whatever fails before it, everything that has arrived is discarded.

use std::io::Read;
use std::net::Shutdown;
use std::sync::Arc;

use ept::GpaRange;

use crate::answers::Answers;
use crate::attempt::Attempt;
use crate::deadlines::Deadlines;
use crate::description::{Arrival, Description};
use crate::digest;
use crate::guest::{DestinationGuest, GuestError};
use crate::header;
use crate::pages::{MemoryAccess, receive_pages, receive_zeros};
use crate::panic::caught;
use crate::report::Phase;
use crate::section::{self, Section, SectionKind};
use crate::stream::{Halves, Stream};
use crate::watchdog::Watchdog;
use crate::wire::{
    FINISH_PLAIN, FINISH_WITH_DIGEST, FrameHead, FrameReader, FrameWriter, Tag, WireError,
};

/// Most sections of state, and most bytes of all of them together.
const SECTIONS_LIMIT: usize = 4096;
const STATE_BYTES_LIMIT: usize = 256 << 20;

/// How [`receive`] takes a guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReceiveOptions {
    /// How long to wait for the source. [`Deadlines::ready`] has no meaning here.
    pub deadlines: Deadlines,
}

/// Why no guest was received. None runs here then, except in the case for which
/// [`ReceiveError::is_in_doubt`] returns true.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The stream failed, a deadline passed, or the source sent something invalid.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// The stream could not be split, or a thread for it could not be started.
    #[error("preparing the connection: {0}")]
    Stream(#[source] std::io::Error),
    /// The guest was refused, for this reason.
    #[error("refused: {0}")]
    Refused(String),
    /// The migration was cancelled here.
    #[error("cancelled at the destination")]
    Cancelled,
    /// A method of the guest returned an error.
    #[error("{doing}: {source}")]
    Guest {
        /// What the method was to do.
        doing: &'static str,
        /// Error of the method.
        source: GuestError,
    },
    /// Guest memory could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryAccess),
    /// The attempt was used before, or is one of a source. The guest was not touched.
    #[error("the attempt is in phase {0}: a new migration needs a new attempt")]
    AttemptUsed(Phase),
    /// The engine, a method of the guest, or the stream panicked before COMMIT had arrived.
    #[error("a panic at the destination in phase {phase}: {message}")]
    Panicked {
        /// Phase of the migration.
        phase: Phase,
        /// Message of the panic.
        message: String,
    },
    /// The engine or a method of the guest panicked after COMMIT: the guest may run here, and the source keeps it
    /// paused. The source was told nothing.
    #[error(
        "a panic at the destination after COMMIT: {0}; the guest may run here, and it stays paused at the source \
         until somebody says there which side has it"
    )]
    InDoubt(String),
}

impl ReceiveError {
    /// Returns true if the guest may run here although `receive` failed.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        matches!(self, Self::InDoubt(_))
    }

    /// Returns true if the source sends nothing any more, so that there is nothing to read on.
    fn is_silence(&self) -> bool {
        matches!(
            self,
            Self::Wire(
                WireError::Io { .. }
                    | WireError::Truncated { .. }
                    | WireError::NotSent { .. }
                    | WireError::NotTaken { .. }
                    | WireError::PhaseTooLong { .. }
            )
        )
    }
}

type Result<T> = std::result::Result<T, ReceiveError>;

/// A guest that was received.
#[derive(Debug)]
pub struct Received {
    /// Why the source could not be told that the guest is here. If there is a reason, the source keeps the guest
    /// paused until somebody tells it.
    pub unconfirmed: Option<String>,
}

/// Receives a guest from `stream` into `guest`, and runs it unless it is to stay paused. Returns `Ok` when this
/// side has the guest.
///
/// `attempt` must be new, from [`Attempt::arriving`]; it is ended before `receive` returns. This thread may be blocked
/// for as long as the migration runs.
///
/// # Errors
/// Returns [`ReceiveError`] if no guest was received. The source has been told, if it still listened. Drop `guest`
/// then, unless [`ReceiveError::is_in_doubt`].
pub fn receive<G: DestinationGuest>(
    guest: &mut G,
    stream: impl Stream,
    options: &ReceiveOptions,
    attempt: &Attempt,
) -> Result<Received> {
    attempt
        .begin_receiving()
        .map_err(ReceiveError::AttemptUsed)?;
    let received = match caught(|| stream.split()) {
        Ok(halves) => halves
            .map_err(ReceiveError::Stream)
            .and_then(|halves| receive_over(guest, halves, options, attempt)),
        Err(message) => Err(panicked(attempt, message)),
    };
    let (phase, message) = match &received {
        Ok(Received { unconfirmed }) => {
            let told = |why| format!("the guest is here, but the source could not be told: {why}");
            (Phase::Completed, unconfirmed.as_ref().map(told))
        }
        Err(error @ ReceiveError::Cancelled) => (Phase::Cancelled, Some(error.to_string())),
        Err(error) if error.is_in_doubt() => {
            (Phase::HandedOverUnconfirmed, Some(error.to_string()))
        }
        Err(error) => (Phase::Failed, Some(error.to_string())),
    };
    attempt.progress().end(phase, message);
    received
}

fn panicked(attempt: &Attempt, message: String) -> ReceiveError {
    let phase = attempt.report().phase;
    ReceiveError::Panicked { phase, message }
}

fn receive_over<G: DestinationGuest>(
    guest: &mut G,
    halves: Halves,
    options: &ReceiveOptions,
    attempt: &Attempt,
) -> Result<Received> {
    let Halves {
        reader,
        writer,
        end,
    } = halves;
    let watchdog = Watchdog::start(Arc::clone(&end), options.deadlines.message)
        .map_err(ReceiveError::Stream)?;
    let replies = FrameWriter::timed(writer, watchdog.writing());
    let answers =
        Answers::start(replies, options.deadlines.message).map_err(ReceiveError::Stream)?;
    attempt.arbiter().on_cancel(watchdog.interrupt());
    let mut receiver = Receiver {
        guest,
        frames: FrameReader::timed(reader, watchdog.reading()),
        answers,
        watchdog,
        options,
        attempt,
        fate: Fate::Discarded,
        memory: Vec::new(),
        announced: Vec::new(),
        sections: Vec::new(),
        state_bytes: 0,
        arrival: Arrival::StaysPaused,
    };
    let received = match caught(|| receiver.phases()) {
        Ok(Err(error)) => Err(receiver.explained(error)),
        Ok(received) => received,
        Err(message) => receiver.panicked(message),
    };
    attempt.arbiter().release();
    if let Err(error) = &received
        && !error.is_in_doubt()
    {
        // A stream that panics cannot tell the source. The source then sees the end of the stream.
        let _told = caught(|| receiver.refuse(error));
    }
    // A stream that panics here has ended, or never will.
    let _ended = caught(|| end(Shutdown::Both));
    received
}

struct Receiver<'a, G> {
    guest: &'a mut G,
    frames: FrameReader<Box<dyn Read + Send>>,
    answers: Answers,
    watchdog: Watchdog,
    options: &'a ReceiveOptions,
    attempt: &'a Attempt,
    fate: Fate,
    memory: Vec<GpaRange>,
    announced: Vec<SectionKind>,
    sections: Vec<Section>,
    state_bytes: usize,
    arrival: Arrival,
}

/// Where the guest is if the engine panics.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The guest is at the source: it cannot run here before COMMIT.
    Discarded,
    /// The guest may run here: `taken_over` or `resume` was called and has not returned.
    InDoubt,
    /// The guest is here: `resume` has returned.
    Here,
}

impl<G: DestinationGuest> Receiver<'_, G> {
    fn phases(&mut self) -> Result<Received> {
        self.agree()?;
        let finish = self.memory_and_state()?;
        self.ready(finish)?;
        self.wait_for_commit()?;
        self.take_over()
    }

    fn agree(&mut self) -> Result<()> {
        self.watchdog
            .begin_phase(Phase::Agreeing, Some(self.options.deadlines.agreeing));
        let description = header::read(&mut self.frames)?;
        self.watchdog.begin_phase(Phase::Agreeing, None);
        description.check().map_err(ReceiveError::Refused)?;
        self.memory = description.ranges().map_err(ReceiveError::Refused)?;
        self.arrival = description.arrival;
        let guest = &mut self.guest;
        self.answers
            .while_working(|| guest.prepare(&description))
            .map_err(|error| ReceiveError::Refused(error.to_string()))?;
        self.announce(&description);
        self.announced = description.sections;
        self.check_for_cancel()?;
        Ok(self.reply(Tag::Accept, &[])?)
    }

    fn announce(&self, description: &Description) {
        let bytes = description.memory_bytes();
        self.attempt
            .progress()
            .update(|report| report.memory_bytes = bytes);
    }

    /// Takes memory and state in the order in which they come, up to FINISH.
    fn memory_and_state(&mut self) -> Result<Finish> {
        self.enter(Phase::Rounds);
        loop {
            let (head, payload) = self.frames.frame("memory or state")?;
            let pages = match head.tag {
                Tag::Pages => receive_pages(self.guest, &self.memory, &head, payload)?,
                Tag::ZeroPages => receive_zeros(self.guest, &self.memory, &head, payload)?,
                Tag::State => {
                    let section = section(&head, payload, &self.announced)?;
                    self.state_bytes += section.data.len();
                    self.sections.push(section);
                    if self.sections.len() > SECTIONS_LIMIT || self.state_bytes > STATE_BYTES_LIMIT
                    {
                        return Err(head
                            .malformed(format!(
                                "more than {SECTIONS_LIMIT} sections or {STATE_BYTES_LIMIT} bytes of state"
                            ))
                            .into());
                    }
                    0
                }
                Tag::RoundEnd => {
                    self.reply(Tag::RoundAck, &[])?;
                    0
                }
                Tag::Finish => {
                    let finish = finish(&head, payload)?;
                    section::check_complete(&self.announced, &self.sections)
                        .map_err(|why| head.malformed(why))?;
                    return Ok(finish);
                }
                _ => return Err(head.unexpected("memory or state").into()),
            };
            let bytes = self.frames.offset();
            self.attempt.progress().update(|report| {
                report.round_pages_sent += pages;
                report.bytes_sent = bytes;
            });
        }
    }

    /// Restores the guest and tells the source that it could run, with the digest of its memory if the source asked
    /// for it.
    fn ready(&mut self, finish: Finish) -> Result<()> {
        self.enter(Phase::Switchover);
        // Before state is restored: KVM writes to guest memory when the guest's clock is restored.
        let digest = match finish {
            Finish::Plain => Vec::new(),
            Finish::WithDigest => {
                let digest = self.digest()?;
                self.attempt
                    .progress()
                    .update(|report| report.digest = Some(digest.to_string()));
                digest.0.to_le_bytes().to_vec()
            }
        };
        let (guest, sections) = (&mut self.guest, &self.sections);
        self.answers
            .while_working(|| guest.restore(sections))
            .map_err(|source| ReceiveError::Guest {
                doing: "restoring state",
                source,
            })?;
        self.check_for_cancel()?;
        Ok(self.reply(Tag::Ready, &digest)?)
    }

    /// Refuses a cancelled migration before the source goes on.
    fn check_for_cancel(&self) -> Result<()> {
        match self.attempt.is_cancelled() {
            true => Err(ReceiveError::Cancelled),
            false => Ok(()),
        }
    }

    fn digest(&self) -> Result<digest::Digest> {
        self.answers.while_working(|| {
            let populated = self
                .guest
                .populated()
                .map_err(|source| ReceiveError::Guest {
                    doing: "finding populated memory",
                    source,
                })?;
            let Some(memory) = self.guest.memory() else {
                return Err(ReceiveError::Refused("there is no guest memory".into()));
            };
            Ok(digest::of_memory(memory, &populated)?)
        })
    }

    /// Waits for COMMIT. After anything else the source has the guest.
    fn wait_for_commit(&mut self) -> Result<()> {
        let (head, _) = self.frames.frame("COMMIT")?;
        match head.tag {
            Tag::Commit => Ok(()),
            _ => Err(head.unexpected("COMMIT").into()),
        }
    }

    /// Takes the guest over and runs it, unless the migration was cancelled here in the meantime: then the guest has
    /// not run here, and the source is told so.
    fn take_over(&mut self) -> Result<Received> {
        if !self.attempt.arbiter().commit() {
            return Err(ReceiveError::Cancelled);
        }
        self.enter(Phase::Committed);
        self.fate = Fate::InDoubt;
        self.guest.taken_over();
        if self.arrival == Arrival::Runs {
            self.guest.resume().map_err(|source| ReceiveError::Guest {
                doing: "resuming the guest",
                source,
            })?;
        }
        self.fate = Fate::Here;
        let confirmed = self.reply(Tag::Done, &[]);
        Ok(Received {
            unconfirmed: confirmed.err().map(|error| error.to_string()),
        })
    }

    /// Returns the error that a failed phase means for the user.
    fn explained(&self, error: ReceiveError) -> ReceiveError {
        match error {
            // The cancel ended the stream.
            ReceiveError::Wire(_) if self.attempt.is_cancelled() => ReceiveError::Cancelled,
            other => other,
        }
    }

    fn panicked(&self, message: String) -> Result<Received> {
        match self.fate {
            Fate::Discarded => Err(panicked(self.attempt, message)),
            Fate::InDoubt => Err(ReceiveError::InDoubt(message)),
            Fate::Here => Ok(Received {
                unconfirmed: Some(format!("a panic: {message}")),
            }),
        }
    }

    /// Tells the source the reason, and reads on until the source has closed the stream: otherwise a socket could drop
    /// the reason together with the bytes that were not read.
    fn refuse(&mut self, error: &ReceiveError) {
        let mut reason = match error {
            ReceiveError::Refused(reason) => reason.clone(),
            other => other.to_string(),
        };
        reason.truncate(reason.floor_char_boundary(Tag::Refuse.limit()));
        let told = self.reply(Tag::Refuse, reason.as_bytes());
        // A source that is gone is told nothing.
        if told.is_ok() && !error.is_silence() {
            self.frames.drain();
        }
    }

    fn reply(&self, tag: Tag, payload: &[u8]) -> std::result::Result<(), WireError> {
        self.answers.reply(tag, payload)
    }

    fn enter(&self, phase: Phase) {
        self.attempt.progress().enter(phase);
    }
}

/// Whether the source compares digests.
#[derive(Clone, Copy)]
enum Finish {
    Plain,
    WithDigest,
}

fn finish(head: &FrameHead, payload: &[u8]) -> std::result::Result<Finish, WireError> {
    match payload {
        [FINISH_PLAIN] => Ok(Finish::Plain),
        [FINISH_WITH_DIGEST] => Ok(Finish::WithDigest),
        other => Err(head.malformed(format!("unknown payload {other:?}"))),
    }
}

/// Decodes a STATE frame, whose section the description must have announced.
fn section(
    head: &FrameHead,
    payload: &[u8],
    announced: &[SectionKind],
) -> std::result::Result<Section, WireError> {
    let (name, version, data) = section::decode(payload).map_err(|why| head.malformed(why))?;
    let kind = announced
        .iter()
        .find(|kind| kind.name == name && kind.version == version)
        .ok_or_else(|| {
            head.malformed(format!(
                "section {name:?} version {version} was not announced"
            ))
        })?;
    Ok(Section {
        kind: kind.clone(),
        data: data.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_taken_only_if_it_was_announced() {
        let head = FrameHead {
            tag: Tag::State,
            sequence: 7,
            offset: 99,
        };
        let announced = [SectionKind::optional("log", 2)];
        let payload = section::encode_kind(&announced[0]).unwrap();
        let taken = section(&head, &payload, &announced).unwrap();
        assert_eq!(taken.kind, announced[0]);
        for other in [
            SectionKind::required("log", 1),
            SectionKind::required("cpu", 2),
        ] {
            let payload = section::encode_kind(&other).unwrap();
            let error = section(&head, &payload, &announced)
                .unwrap_err()
                .to_string();
            assert!(error.contains("was not announced"), "{error}");
            assert!(error.contains("STATE frame 7 at offset 99"), "{error}");
        }
    }
}
