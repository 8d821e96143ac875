//! The source's view of the destination's replies.
//!
//! A thread reads them, so that the source can wait for a whole reply with a limit, and can look for a refusal without
//! waiting, whatever the stream is made of.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::Duration;

use crate::watchdog::Watchdog;
use crate::wire::{FrameHead, FrameReader, Tag, WireError};

/// Replies that are read ahead. A peer that sends more than are due waits.
const READ_AHEAD: usize = 4;

/// Why the reply that was due did not come.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplyError {
    /// The destination refused the guest.
    #[error("the destination refused: {0}")]
    Refused(String),
    /// The stream failed, a deadline passed, or another frame came.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Replies of the destination, in order.
pub(crate) struct Replies {
    replies: Receiver<Result<Reply, WireError>>,
}

/// One reply.
pub(crate) struct Reply {
    pub(crate) head: FrameHead,
    pub(crate) payload: Vec<u8>,
}

impl Replies {
    /// Starts to read replies from `reader`. The thread ends with the stream.
    ///
    /// # Errors
    /// Returns the system's error if no thread can be started.
    pub(crate) fn start(reader: Box<dyn Read + Send>) -> io::Result<Self> {
        let (sender, replies) = sync_channel(READ_AHEAD);
        thread::Builder::new()
            .name("migr-replies".into())
            .spawn(move || read(reader, &sender))?;
        Ok(Self { replies })
    }

    /// Waits for a frame of kind `due` and returns it. In a phase with a limit the destination may say
    /// ALIVE instead: then it gets the time for another message.
    ///
    /// # Errors
    /// Returns [`ReplyError::Refused`] if the destination refuses, and [`ReplyError::Wire`] if the deadline
    /// of the message or the phase passes, if the stream fails or if another frame comes.
    pub(crate) fn expect(&self, due: Tag, watchdog: &Watchdog) -> Result<Reply, ReplyError> {
        loop {
            let (left, limit) = watchdog.next_limit();
            let reply = match self.replies.recv_timeout(left) {
                Ok(reply) => reply?,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(WireError::not_sent(due.to_string(), limit).into());
                }
                Err(RecvTimeoutError::Disconnected) => return Err(reader_gone().into()),
            };
            match reply.head.tag {
                tag if tag == due => return Ok(reply),
                Tag::Alive if watchdog.limits_phase() => {}
                Tag::Refuse => return Err(refused(&reply.payload)),
                _ => return Err(reply.head.unexpected(due.to_string()).into()),
            }
        }
    }

    /// Looks for a refusal without waiting.
    ///
    /// # Errors
    /// Returns [`ReplyError::Refused`] if there is a refusal, and [`ReplyError::Wire`] if the stream has failed or if
    /// there is another frame, because none is due.
    pub(crate) fn check_for_refusal(&self) -> Result<(), ReplyError> {
        let Reply { head, payload } = match self.replies.try_recv() {
            Ok(reply) => reply?,
            Err(TryRecvError::Empty) => return Ok(()),
            Err(TryRecvError::Disconnected) => return Err(reader_gone().into()),
        };
        match head.tag {
            Tag::Refuse => Err(refused(&payload)),
            _ => Err(head.unexpected("nothing but REFUSE").into()),
        }
    }

    /// Waits up to `limit` for a refusal and returns its reason: a destination that ends the stream may have said
    /// why.
    pub(crate) fn reason_of_end(&self, limit: Duration) -> Option<String> {
        let Reply { head, payload } = self.replies.recv_timeout(limit).ok()?.ok()?;
        (head.tag == Tag::Refuse).then(|| reason(&payload))
    }
}

fn read(reader: Box<dyn Read + Send>, replies: &SyncSender<Result<Reply, WireError>>) {
    let mut frames = FrameReader::new(reader);
    loop {
        let reply = frames.frame("a reply").map(|(head, payload)| Reply {
            head,
            payload: payload.to_vec(),
        });
        let last = reply.is_err();
        // Nobody receives once the migration has ended.
        if replies.send(reply).is_err() || last {
            return;
        }
    }
}

fn refused(payload: &[u8]) -> ReplyError {
    ReplyError::Refused(reason(payload))
}

fn reason(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload).into_owned()
}

/// Creates the error for replies after the error that ended the reading thread, or after its panic.
fn reader_gone() -> WireError {
    WireError::Io {
        doing: "reading the replies".into(),
        offset: 0,
        source: io::Error::other("their reader has ended"),
    }
}
