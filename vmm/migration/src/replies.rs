//! The source's view of the destination's replies.
//!
//! While the pages of a round are written, a thread waits for the next reply, so that a refusal is seen without waiting,
//! whatever the stream is made of. At other times the source reads the replies itself, so that no switch between threads
//! adds to the downtime.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::Duration;

use crate::watchdog::{Timer, Watchdog};
use crate::wire::{FrameHead, FrameReader, Tag, WireError};

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
    /// The reader, unless the thread has it.
    reader: Option<Reader>,
    /// Gives the reader to the thread.
    give: SyncSender<Reader>,
    /// Gives the reader back, with the reply that came.
    take_back: Receiver<(Reader, Result<Reply, WireError>)>,
}

type Reader = FrameReader<Box<dyn Read + Send>>;

/// One reply.
pub(crate) struct Reply {
    pub(crate) head: FrameHead,
    pub(crate) payload: Vec<u8>,
}

impl Replies {
    /// Prepares to read replies from `reader` under the deadlines of `timer`. The thread ends with the stream.
    ///
    /// # Errors
    /// Returns the system's error if no thread can be started.
    pub(crate) fn start(reader: Box<dyn Read + Send>, timer: Timer) -> io::Result<Self> {
        let (give, given) = sync_channel(1);
        let (give_back, take_back) = sync_channel(1);
        thread::Builder::new()
            .name("migr-replies".into())
            .spawn(move || look_out(&given, &give_back))?;
        Ok(Self {
            reader: Some(FrameReader::timed(reader, timer)),
            give,
            take_back,
        })
    }

    /// Lets the thread wait for the next reply, so that [`Self::check_for_refusal`] sees it.
    pub(crate) fn look_out(&mut self) {
        if let Some(reader) = self.reader.take() {
            // If the thread has ended by a panic, the next reply that is due says so.
            let _ended = self.give.send(reader);
        }
    }

    /// Waits for a frame of kind `due` and returns it. In a phase with a limit the destination may say
    /// ALIVE instead: then it gets the time for another message.
    ///
    /// # Errors
    /// Returns [`ReplyError::Refused`] if the destination refuses, and [`ReplyError::Wire`] if the deadline
    /// of the message or the phase passes, if the stream fails or if another frame comes.
    pub(crate) fn expect(&mut self, due: Tag, watchdog: &Watchdog) -> Result<Reply, ReplyError> {
        loop {
            let reply = self.next(due, watchdog)?;
            match reply.head.tag {
                tag if tag == due => return Ok(reply),
                Tag::Alive if watchdog.limits_phase() => {}
                Tag::Refuse => return Err(refused(&reply.payload)),
                _ => return Err(reply.head.unexpected(due.to_string()).into()),
            }
            if let Some(expired) = watchdog.expired_phase() {
                return Err(WireError::not_sent(due.to_string(), expired).into());
            }
        }
    }

    /// Looks for a refusal without waiting, if [`Self::look_out`] was called.
    ///
    /// # Errors
    /// Returns [`ReplyError::Refused`] if there is a refusal, and [`ReplyError::Wire`] if the stream has failed or if
    /// there is another frame, because none is due.
    pub(crate) fn check_for_refusal(&mut self) -> Result<(), ReplyError> {
        if self.reader.is_some() {
            return Ok(());
        }
        let Reply { head, payload } = match self.take_back.try_recv() {
            Ok((reader, reply)) => {
                self.reader = Some(reader);
                reply?
            }
            Err(TryRecvError::Empty) => return Ok(()),
            Err(TryRecvError::Disconnected) => return Err(thread_gone().into()),
        };
        match head.tag {
            Tag::Refuse => Err(refused(&payload)),
            _ => Err(head.unexpected("nothing but REFUSE").into()),
        }
    }

    /// Waits up to `limit` for a refusal and returns its reason: a destination that ends the stream may have said
    /// why.
    pub(crate) fn reason_of_end(&mut self, limit: Duration) -> Option<String> {
        self.look_out();
        let (_, reply) = self.take_back.recv_timeout(limit).ok()?;
        let Reply { head, payload } = reply.ok()?;
        (head.tag == Tag::Refuse).then(|| reason(&payload))
    }

    fn next(&mut self, due: Tag, watchdog: &Watchdog) -> Result<Reply, WireError> {
        if let Some(reader) = &mut self.reader {
            let (head, payload) = reader.frame(&due.to_string())?;
            let payload = payload.to_vec();
            return Ok(Reply { head, payload });
        }
        let (left, limit) = watchdog.next_limit();
        match self.take_back.recv_timeout(left) {
            Ok((reader, reply)) => {
                self.reader = Some(reader);
                reply
            }
            Err(RecvTimeoutError::Timeout) => Err(WireError::not_sent(due.to_string(), limit)),
            Err(RecvTimeoutError::Disconnected) => Err(thread_gone()),
        }
    }
}

/// Reads one reply with each reader that is given, and gives the reader back.
fn look_out(given: &Receiver<Reader>, give_back: &SyncSender<(Reader, Result<Reply, WireError>)>) {
    // Ends when the replies are dropped.
    while let Ok(mut reader) = given.recv() {
        let reply = reader.untimed_frame().map(|(head, payload)| {
            let payload = payload.to_vec();
            Reply { head, payload }
        });
        if give_back.send((reader, reply)).is_err() {
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

/// Creates the error for a reply that was due from a thread that has panicked.
fn thread_gone() -> WireError {
    WireError::Io {
        doing: "reading the replies".into(),
        offset: 0,
        source: io::Error::other("the stream panicked"),
    }
}
