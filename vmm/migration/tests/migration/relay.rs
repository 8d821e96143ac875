//! A relay between source and destination that knows the frames, and does harm at a chosen one.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use migration::Tag;

/// What is done to one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    /// The connection ends before the frame.
    CutBefore,
    /// The connection ends in the middle of the frame.
    CutInside,
    /// The connection ends when the frame has arrived.
    CutAfter,
    /// One byte of the frame's head is changed: at this offset, of 16.
    FlipHead(usize),
    /// One byte of the frame's payload is changed.
    FlipPayload,
}

/// The frame to do harm to: the first with this tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) tag: Tag,
    pub(crate) harm: Harm,
}

/// Which side sends a tag.
fn is_reply(tag: Tag) -> bool {
    tag as u32 >= Tag::Accept as u32
}

/// Carries bytes between two sockets; `joined` once both directions have ended.
pub(crate) struct Relay {
    threads: Vec<JoinHandle<()>>,
    struck: Arc<AtomicBool>,
}

impl Relay {
    /// Relays between `source` and `destination`, with one fault or none.
    pub(crate) fn start(source: UnixStream, destination: UnixStream, fault: Option<Fault>) -> Self {
        let struck = Arc::new(AtomicBool::new(false));
        let forth = fault.filter(|fault| !is_reply(fault.tag));
        let back = fault.filter(|fault| is_reply(fault.tag));
        let lane = |from: &UnixStream, to: &UnixStream, header, fault| {
            let mut lane = Lane {
                from: from.try_clone().unwrap(),
                to: to.try_clone().unwrap(),
                fault,
                struck: Arc::clone(&struck),
            };
            thread::spawn(move || lane.run(header))
        };
        let threads = vec![
            lane(&source, &destination, true, forth),
            lane(&destination, &source, false, back),
        ];
        Self { threads, struck }
    }

    /// Waits for the end of the connection. True if the fault struck.
    pub(crate) fn join(self) -> bool {
        self.threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        self.struck.load(Ordering::SeqCst)
    }
}

struct Lane {
    from: UnixStream,
    to: UnixStream,
    fault: Option<Fault>,
    struck: Arc<AtomicBool>,
}

impl Lane {
    fn run(&mut self, header: bool) {
        if header && self.stream_header().is_none() {
            return self.cut();
        }
        while self.frame().is_some() {}
        self.cut();
    }

    /// "FERRYMIG", version, length, description, checksum.
    fn stream_header(&mut self) -> Option<()> {
        let mut bytes = self.take(16)?;
        let length = u32::from_le_bytes(bytes[12..16].try_into().ok()?) as usize;
        bytes.extend(self.take(length + 4)?);
        self.to.write_all(&bytes).ok()
    }

    /// Passes one frame on; none at the end.
    fn frame(&mut self) -> Option<()> {
        let mut head = self.take(16)?;
        let tag = u32::from_le_bytes(head[..4].try_into().ok()?);
        let length = u32::from_le_bytes(head[4..8].try_into().ok()?) as usize;
        let mut payload = self.take(length)?;
        let struck = self.fault.filter(|fault| fault.tag as u32 == tag);
        let Some(Fault { harm, .. }) = struck else {
            self.to.write_all(&head).ok()?;
            return self.to.write_all(&payload).ok();
        };
        self.fault = None;
        self.struck.store(true, Ordering::SeqCst);
        match harm {
            Harm::CutBefore => return None,
            Harm::FlipHead(at) => head[at] ^= 0x20,
            Harm::FlipPayload => {
                let middle = payload.len() / 2;
                *payload.get_mut(middle)? ^= 0x20;
            }
            Harm::CutInside | Harm::CutAfter => {}
        }
        let mut whole = [head, payload].concat();
        if harm == Harm::CutInside {
            whole.truncate(whole.len() - 1);
        }
        self.to.write_all(&whole).ok()?;
        match harm {
            Harm::CutInside | Harm::CutAfter => None,
            _ => Some(()),
        }
    }

    fn take(&mut self, count: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.from.read_exact(&mut bytes).ok()?;
        Some(bytes)
    }

    /// Ends both directions for both sides, as a broken link does.
    fn cut(&self) {
        for stream in [&self.from, &self.to] {
            // It may have ended already.
            let _ended = stream.shutdown(Shutdown::Both);
        }
    }
}
