//! The destination's side of a migration.
//!
//! Nothing runs here before COMMIT; whatever goes wrong before it, all that arrived is discarded.

use std::io::Read;
use std::time::{Duration, Instant};

use ept::GpaRange;

use super::digest;
use super::guest::{DestinationGuest, GuestError, Section};
use super::header::{self, Description, SectionKind};
use super::pages::{MemoryAccess, receive_pages, receive_zeros};
use super::progress::{Phase, Progress};
use super::transport::Connection;
use super::wire::{FrameHead, FrameReader, FrameWriter, Tag, WireError};

/// Sections of state, at most; and bytes of all of them together.
const SECTIONS_LIMIT: usize = 4096;
const STATE_BYTES_LIMIT: usize = 256 << 20;
/// How often the source hears that a long computation is at work.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// How long, and how far, a refused source is listened to, so that it reads the reason before it finds
/// the connection closed.
const DRAIN_LIMIT: Duration = Duration::from_secs(8);

/// Why no guest arrived. None runs here then.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The connection failed, or what came over it was wrong.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// The guest was refused before anything of it was taken.
    #[error("refused: {0}")]
    Refused(String),
    /// The monitor could not do its part.
    #[error("{doing}: {source}")]
    Guest {
        /// Its part.
        doing: &'static str,
        /// Why not.
        source: GuestError,
    },
    /// Guest memory is not where it should be.
    #[error(transparent)]
    Memory(#[from] MemoryAccess),
}

impl ReceiveError {
    /// True if the source said nothing any more: then it need not be listened to either.
    fn is_silence(&self) -> bool {
        matches!(
            self,
            Self::Wire(WireError::Io { .. } | WireError::Truncated { .. })
        )
    }
}

type Result<T> = std::result::Result<T, ReceiveError>;

/// A guest that arrived.
#[derive(Debug)]
pub struct Received {
    /// Why the source could not be told that the guest runs here, if so: it must be told by hand.
    pub unconfirmed: Option<WireError>,
}

/// Receives a guest over `connection` into `guest`, and runs it.
///
/// # Errors
/// Why none arrived; the source was told, if it still listened.
pub fn receive<G: DestinationGuest>(
    guest: &mut G,
    connection: &Connection,
    progress: &Progress,
) -> Result<Received> {
    let clone = |what: &str| {
        connection.try_clone().map_err(|source| {
            ReceiveError::Wire(WireError::Io {
                doing: what.into(),
                offset: 0,
                source,
            })
        })
    };
    progress.use_connection(clone("preparing the connection")?);
    let mut receiver = Receiver {
        guest,
        frames: FrameReader::new(clone("preparing the connection")?),
        replies: FrameWriter::new(clone("preparing the connection")?),
        progress,
        memory: Vec::new(),
        sections: Vec::new(),
        state_bytes: 0,
        running: true,
    };
    let received = receiver.phases();
    progress.drop_connection();
    if let Err(error) = &received {
        receiver.refuse(error);
        if !error.is_silence() {
            drain(connection);
        }
    }
    received
}

struct Receiver<'a, G> {
    guest: &'a mut G,
    frames: FrameReader<Connection>,
    replies: FrameWriter<Connection>,
    progress: &'a Progress,
    memory: Vec<GpaRange>,
    sections: Vec<Section>,
    state_bytes: usize,
    running: bool,
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
        self.enter(Phase::Agreeing);
        let description = header::read(&mut self.frames)?;
        description.check().map_err(ReceiveError::Refused)?;
        self.memory = description.ranges().map_err(ReceiveError::Refused)?;
        self.running = description.running;
        self.guest
            .prepare(&description)
            .map_err(|error| ReceiveError::Refused(error.to_string()))?;
        self.announce(&description);
        Ok(self.reply(Tag::Accept, &[])?)
    }

    fn announce(&self, description: &Description) {
        let bytes = description.memory_bytes();
        self.progress.update(|p| p.memory_bytes = bytes);
    }

    /// Takes memory and state as they come, until the source says that this was all.
    fn memory_and_state(&mut self) -> Result<Finish> {
        self.enter(Phase::Rounds);
        loop {
            let (head, payload) = self.frames.frame()?;
            let pages = match head.tag {
                Tag::Pages => receive_pages(self.guest, &self.memory, &head, payload)?,
                Tag::ZeroPages => receive_zeros(self.guest, &self.memory, &head, payload)?,
                Tag::State => {
                    let section = section(&head, payload)?;
                    self.state_bytes += section.data.len();
                    self.sections.push(section);
                    if self.sections.len() > SECTIONS_LIMIT || self.state_bytes > STATE_BYTES_LIMIT
                    {
                        return Err(head.malformed("too much state").into());
                    }
                    0
                }
                Tag::RoundEnd => {
                    self.reply(Tag::RoundAck, &[])?;
                    0
                }
                Tag::Finish => return Ok(finish(&head, payload)?),
                _ => return Err(head.unexpected("memory or state").into()),
            };
            let bytes = self.frames.offset();
            self.progress.update(|p| {
                p.round_pages_sent += pages;
                p.bytes_sent = bytes;
            });
        }
    }

    /// Makes the guest ready to run, and proves its memory if that was asked for.
    fn ready(&mut self, finish: Finish) -> Result<()> {
        self.enter(Phase::Switchover);
        // Before the state is restored: KVM writes to guest memory when it takes back a guest's clock.
        let digest = match finish {
            Finish::Plain => Vec::new(),
            Finish::WithDigest => {
                let digest = self.digest()?;
                self.progress
                    .update(|p| p.digest = Some(digest.to_string()));
                digest.0.to_le_bytes().to_vec()
            }
        };
        self.guest
            .restore(&self.sections)
            .map_err(|source| ReceiveError::Guest {
                doing: "restoring state",
                source,
            })?;
        Ok(self.reply(Tag::Ready, &digest)?)
    }

    fn digest(&mut self) -> Result<digest::Digest> {
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
        let replies = &mut self.replies;
        let mut last = Instant::now();
        digest::of_memory(memory, &populated, || {
            if last.elapsed() >= ALIVE_EVERY {
                replies.frame(Tag::Alive, [&[], &[]])?;
                last = Instant::now();
            }
            Ok(())
        })
    }

    /// The end of the connection, silence or anything else here means that the guest stays the source's.
    fn wait_for_commit(&mut self) -> Result<()> {
        let (head, _) = self.frames.frame()?;
        match head.tag {
            Tag::Commit => Ok(()),
            _ => Err(head.unexpected("the commit").into()),
        }
    }

    /// The guest is this side's now, unless the user has said meanwhile that it is not to be: then nobody has
    /// run it here, and the source is told so if it can be.
    fn take_over(&mut self) -> Result<Received> {
        if !self.progress.commit() {
            return Err(ReceiveError::Refused("cancelled at the destination".into()));
        }
        self.guest.taken_over();
        if self.running {
            self.guest.resume().map_err(|source| ReceiveError::Guest {
                doing: "resuming the guest",
                source,
            })?;
        }
        Ok(Received {
            unconfirmed: self.reply(Tag::Done, &[]).err(),
        })
    }

    /// Tells the source why not. It may be gone: then there is nobody to tell.
    fn refuse(&mut self, error: &ReceiveError) {
        let mut reason = match error {
            ReceiveError::Refused(reason) => reason.clone(),
            other => other.to_string(),
        };
        reason.truncate(reason.floor_char_boundary(Tag::Refuse.limit()));
        let _gone = self.reply(Tag::Refuse, reason.as_bytes());
    }

    fn reply(&mut self, tag: Tag, payload: &[u8]) -> std::result::Result<(), WireError> {
        self.replies.frame(tag, [payload, &[]])
    }

    fn enter(&self, phase: Phase) {
        self.progress.update(|p| p.phase = phase);
    }
}

/// How the source wants the end.
#[derive(Clone, Copy)]
enum Finish {
    Plain,
    WithDigest,
}

fn finish(head: &FrameHead, payload: &[u8]) -> std::result::Result<Finish, WireError> {
    match payload {
        [0] => Ok(Finish::Plain),
        [1] => Ok(Finish::WithDigest),
        other => Err(head.malformed(format!("{other:?} is no way to finish"))),
    }
}

fn section(head: &FrameHead, payload: &[u8]) -> std::result::Result<Section, WireError> {
    let (kind, data): (SectionKind, _) = postcard::take_from_bytes(payload)
        .map_err(|error| head.malformed(format!("its name and version: {error}")))?;
    Ok(Section {
        kind,
        data: data.to_vec(),
    })
}

/// Reads on until the source has closed, within bounds.
fn drain(connection: &Connection) {
    let Ok(mut connection) = connection.try_clone() else {
        return;
    };
    let began = Instant::now();
    let mut bytes = [0; 64 * 1024];
    while began.elapsed() < DRAIN_LIMIT && connection.read(&mut bytes).is_ok_and(|count| count > 0)
    {
    }
}
