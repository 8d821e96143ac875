//! A relay between source and destination that knows the frames and disturbs a chosen one.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use migration::{EndStream, Halves, Stream, Tag};

/// What happens to one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    /// The connection ends before the frame.
    CutBefore,
    /// The connection ends inside the frame.
    CutInside,
    /// The connection ends after the frame.
    CutAfter,
    /// One byte of the frame's fixed part is changed: the one at this offset, of 16.
    FlipHead(usize),
    /// One byte of the frame's payload is changed.
    FlipPayload,
    /// The frame and all after it are held back; the connection stays open.
    Stall,
    /// The frame is passed on one byte at a time.
    Drip,
    /// Some of the payload is read one byte at a time and not passed on; then the connection ends.
    DripTake,
}

/// The frame to disturb: the first with this tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) tag: Tag,
    pub(crate) harm: Harm,
}

/// Time between two bytes of a drip, and the number of bytes that are read so before the connection ends.
const DRIP: Duration = Duration::from_millis(100);
const DRIPS_TAKEN: usize = 20;

/// Returns true if the destination sends frames with this tag.
pub(crate) fn is_reply(tag: Tag) -> bool {
    tag as u32 >= Tag::Accept as u32
}

/// Passes bytes between two streams.
pub(crate) struct Relay {
    threads: Vec<JoinHandle<()>>,
    struck: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
}

impl Relay {
    /// Relays between `source` and `destination`, with one fault or none.
    pub(crate) fn start(
        source: impl Stream,
        destination: impl Stream,
        fault: Option<Fault>,
    ) -> Self {
        let (struck, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let forth = fault.filter(|fault| !is_reply(fault.tag));
        let back = fault.filter(|fault| is_reply(fault.tag));
        let (source, destination) = (source.split().unwrap(), destination.split().unwrap());
        let Halves {
            reader: from_source,
            writer: to_source,
            end: end_source,
        } = source;
        let Halves {
            reader: from_destination,
            writer: to_destination,
            end: end_destination,
        } = destination;
        let lane = |from, to, ends, header, fault| {
            let mut lane = Lane {
                from,
                to,
                ends,
                fault,
                struck: Arc::clone(&struck),
                done: Arc::clone(&done),
            };
            thread::spawn(move || lane.run(header))
        };
        let ends = [end_source, end_destination];
        let [end_source, end_destination] = ends.clone();
        let back_ends = [end_destination, end_source];
        let threads = vec![
            lane(from_source, to_destination, ends, true, forth),
            lane(from_destination, to_source, back_ends, false, back),
        ];
        Self {
            threads,
            struck,
            done,
        }
    }

    /// Waits for the end of the connection, which both sides have left. Returns true if the fault struck.
    pub(crate) fn join(self) -> bool {
        self.done.store(true, Ordering::SeqCst);
        self.threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        self.struck.load(Ordering::SeqCst)
    }
}

struct Lane {
    from: Box<dyn Read + Send>,
    to: Box<dyn Write + Send>,
    /// Ends `from` and `to`.
    ends: [EndStream; 2],
    fault: Option<Fault>,
    struck: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
}

/// Why a lane passes nothing more on.
enum End {
    /// Nothing more comes.
    From,
    /// Nothing more is taken.
    To,
    /// The fault ends the connection.
    Cut,
}

impl Lane {
    /// Passes frames on, and the end of the stream like a network does.
    fn run(&mut self, header: bool) {
        let [from, to] = self.ends.clone();
        match self.pass(header) {
            End::From => to(Shutdown::Write),
            End::To => from(Shutdown::Read),
            End::Cut => {
                from(Shutdown::Both);
                to(Shutdown::Both);
            }
        }
    }

    fn pass(&mut self, header: bool) -> End {
        if header && let Err(end) = self.stream_header() {
            return end;
        }
        loop {
            if let Err(end) = self.frame() {
                return end;
            }
        }
    }

    /// "FERRYMIG", version, length, description, checksum.
    fn stream_header(&mut self) -> Result<(), End> {
        let mut bytes = self.take(16)?;
        bytes.extend(self.take(word(&bytes, 12) + 4)?);
        self.give(&bytes)
    }

    fn frame(&mut self) -> Result<(), End> {
        let mut head = self.take(16)?;
        let (tag, length) = (word(&head, 0), word(&head, 4));
        let struck = self.fault.filter(|fault| fault.tag as usize == tag);
        let Some(Fault { harm, .. }) = struck else {
            let payload = self.take(length)?;
            self.give(&head)?;
            return self.give(&payload);
        };
        self.fault = None;
        self.struck.store(true, Ordering::SeqCst);
        if harm == Harm::DripTake {
            for _ in 0..DRIPS_TAKEN {
                self.take(1)?;
                thread::sleep(DRIP);
            }
            return Err(End::Cut);
        }
        let mut payload = self.take(length)?;
        match harm {
            Harm::CutBefore => return Err(End::Cut),
            Harm::FlipHead(at) => head[at] ^= 0x20,
            Harm::FlipPayload => {
                let middle = payload.len() / 2;
                payload[middle] ^= 0x20;
            }
            _ => {}
        }
        let mut whole = [head, payload].concat();
        match harm {
            Harm::Stall => return self.hold(&[]),
            Harm::Drip => return self.hold(&whole),
            Harm::CutInside => whole.truncate(whole.len() - 1),
            _ => {}
        }
        self.give(&whole)?;
        match harm {
            Harm::CutInside | Harm::CutAfter => Err(End::Cut),
            _ => Ok(()),
        }
    }

    /// Passes `bytes` on one at a time, then nothing more, until both sides have left.
    fn hold(&mut self, bytes: &[u8]) -> Result<(), End> {
        let mut bytes = bytes.chunks(1);
        while !self.done.load(Ordering::SeqCst) {
            if let Some(byte) = bytes.next() {
                self.give(byte)?;
            }
            thread::sleep(DRIP);
        }
        Err(End::Cut)
    }

    fn take(&mut self, count: usize) -> Result<Vec<u8>, End> {
        let mut bytes = vec![0; count];
        self.from.read_exact(&mut bytes).map_err(|_| End::From)?;
        Ok(bytes)
    }

    fn give(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.to.write_all(bytes).map_err(|_| End::To)
    }
}

fn word(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}
