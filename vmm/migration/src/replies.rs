//! What the destination says to the source.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::transport::Connection;
use super::wire::{FrameReader, Tag, WireError};

/// Why a reply was not the one that was due.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    /// The destination said no.
    #[error("the destination refused: {0}")]
    Refused(String),
    /// The connection, or a frame out of place.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// The frames that come back.
pub struct Replies {
    frames: FrameReader<Connection>,
    connection: Connection,
}

impl Replies {
    /// Frames from `connection`.
    ///
    /// # Errors
    /// The system's.
    pub fn new(connection: Connection) -> std::io::Result<Self> {
        Ok(Self {
            frames: FrameReader::new(connection.try_clone()?),
            connection,
        })
    }

    /// Waits for a frame of kind `due`, of which `what` is the name in words. Returns its payload.
    ///
    /// # Errors
    /// A refusal with its reason, silence, and any other frame.
    pub fn expect(&mut self, due: Tag, what: &'static str) -> Result<Vec<u8>, ReplyError> {
        self.expect_within(due, what, Duration::ZERO)
    }

    /// As [`Self::expect`]; for `limit` altogether the other side may say that it is still at work.
    ///
    /// # Errors
    /// As [`Self::expect`].
    pub fn expect_within(
        &mut self,
        due: Tag,
        what: &'static str,
        limit: Duration,
    ) -> Result<Vec<u8>, ReplyError> {
        let began = Instant::now();
        loop {
            let (head, payload) = self.frames.frame()?;
            match head.tag {
                tag if tag == due => return Ok(payload.to_vec()),
                Tag::Alive if began.elapsed() < limit => {}
                Tag::Refuse => {
                    return Err(ReplyError::Refused(
                        String::from_utf8_lossy(payload).into_owned(),
                    ));
                }
                _ => return Err(head.unexpected(what).into()),
            }
        }
    }

    /// Reads a refusal if there is one, without waiting.
    ///
    /// # Errors
    /// A refusal with its reason, the end of the connection, and any frame that is not due.
    pub fn check_for_refusal(&mut self) -> Result<(), ReplyError> {
        if self.is_pending()? {
            let (head, payload) = self.frames.frame()?;
            match head.tag {
                Tag::Refuse => {
                    return Err(ReplyError::Refused(
                        String::from_utf8_lossy(payload).into_owned(),
                    ));
                }
                _ => return Err(head.unexpected("nothing but a refusal").into()),
            }
        }
        Ok(())
    }

    fn is_pending(&self) -> Result<bool, WireError> {
        let mut fds = [PollFd::new(&self.connection, PollFlags::IN)];
        match poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        ) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(WireError::Io {
                doing: "looking for a reply".into(),
                offset: self.frames.offset(),
                source: error.into(),
            }),
        }
    }
}
