//! What an attack is, whom it is meant for, and what a device may make of it.

use core::fmt;

use crate::device::{Device, Result, Trouble};
use crate::dma::{self, Patience, fill};
use crate::queue::Part;
use crate::spec::Kind;

/// What a device made of an attack.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// DEVICE_NEEDS_RESET, with the interrupt that tells of it.
    NeedsReset,
    /// Nothing: without a reset, it does what it is for.
    Ignored,
    /// The request is one that can be carried out, and was.
    Served,
    /// The request came back, and nothing else came of it.
    Dropped,
    /// The request came back with the status of a failure (5.2.6).
    IoError,
    /// The request came back with the status of something unknown (5.2.6).
    Unsupported,
    /// A reset of the connection that was asked for (5.10.6.6).
    ConnectionReset,
    /// From then on it wrote nothing to memory that was the driver's.
    Quiet,
    /// Which of two things it did depends on who was faster: it served the requests, or needs a reset.
    Survived,
}

impl fmt::Display for Outcome {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::NeedsReset => "needs-reset",
            Self::Ignored => "ignored",
            Self::Served => "served",
            Self::Dropped => "dropped",
            Self::IoError => "io-error",
            Self::Unsupported => "unsupported",
            Self::ConnectionReset => "connection-reset",
            Self::Quiet => "quiet",
            Self::Survived => "survived",
        })
    }
}

/// Whom an attack is meant for.
#[derive(Clone, Copy)]
pub(crate) enum Targets {
    /// Each queue of each device.
    EveryQueue,
    /// Each queue whose buffers the device looks into whatever else happens: all but the events of sockets.
    EveryServedQueue,
    /// The first queue of each device.
    FirstQueue,
    /// Each device, whatever its queues.
    EveryDevice,
    /// All devices of one kind.
    Only(Kind),
    /// One queue of the devices of one kind.
    OnlyQueue(Kind, usize),
}

impl Targets {
    /// Whether `queue` of `device` is a target, or the device itself where there is no queue.
    pub(crate) fn hit(self, device: &Device, queue: Option<usize>) -> bool {
        match (self, queue) {
            (Self::EveryQueue, Some(queue)) => queue < device.queue_count,
            (Self::EveryServedQueue, Some(queue)) => {
                queue < device.queue_count && (device.kind, queue) != (Kind::Vsock, 2)
            }
            (Self::FirstQueue, Some(queue)) => queue == 0,
            (Self::OnlyQueue(kind, wanted), Some(queue)) => {
                device.kind == kind && queue == wanted && queue < device.queue_count
            }
            (Self::EveryDevice, None) => true,
            (Self::Only(kind), None) => device.kind == kind,
            _ => false,
        }
    }
}

pub(crate) struct Attack {
    pub(crate) name: &'static str,
    pub(crate) on: Targets,
    pub(crate) expected: Outcome,
    pub(crate) run: fn(&mut Case<'_>) -> Result<Outcome>,
}

/// Memory that a device must leave alone: addresses, and lengths in bytes.
pub(crate) type Watched = [Option<(u64, u64)>; 2];

const UNTOUCHED: u8 = 0xa5;

/// One attack on one device.
pub(crate) struct Case<'a> {
    pub(crate) device: &'a mut Device,
    /// The queue that is attacked; the one for requests where the device itself is.
    pub(crate) queue: usize,
    /// The first address that is no memory.
    pub(crate) memory_end: u64,
    watched: Watched,
}

impl<'a> Case<'a> {
    pub(crate) fn new(device: &'a mut Device, queue: Option<usize>, memory_end: u64) -> Self {
        let queue = queue.unwrap_or(device.kind.main_queue());
        Self {
            device,
            queue,
            memory_end,
            watched: [None; 2],
        }
    }

    /// A descriptor of the direction that the queue's requests begin with.
    pub(crate) fn part(&self, address: u64, bytes: u32) -> Part {
        if self.device.kind.is_written(self.queue) {
            Part::into(address, bytes)
        } else {
            Part::out(address, bytes)
        }
    }

    /// Memory for such a descriptor.
    pub(crate) fn good_part(&self) -> Part {
        self.part(dma::scratch(), 64)
    }

    /// A start with nothing in the queue that is attacked.
    pub(crate) fn start(&mut self) -> Result {
        self.device.start(Some(self.queue))
    }

    /// Has the device look at the queue.
    pub(crate) fn provoke(&mut self) {
        self.device.notify(self.queue);
        if self.device.kind.is_receive(self.queue) {
            self.have_something_arrive();
        }
    }

    fn have_something_arrive(&mut self) {
        match self.device.kind {
            Kind::Net => self.device.send_question(2),
            Kind::Vsock => {
                let packet = self.device.packet(crate::operation::vsock::REQUEST);
                let bytes = crate::operation::vsock::HEADER_BYTES;
                self.device.send_packet(&packet, bytes);
            }
            // Nobody types here; but a console looks at what it is given.
            _ => {}
        }
    }

    /// Waits for what the device makes of a chain.
    pub(crate) fn verdict(&mut self) -> Result<Outcome> {
        let mut patience = Patience::new();
        while patience.look() {
            if self.device.queues[self.queue].take_used().is_some() {
                return Ok(Outcome::Served);
            }
            if patience.is_due() && self.device.needs_reset()? {
                return Ok(Outcome::NeedsReset);
            }
        }
        Err(Trouble::Silent("neither an answer nor a need of a reset"))
    }

    /// It works without a reset, and asks for none.
    pub(crate) fn lives_on(&mut self) -> Result<Outcome> {
        self.device.operate()?;
        self.device.runs()?;
        Ok(Outcome::Ignored)
    }

    /// Fills memory, which is to be so still after all other devices have worked.
    pub(crate) fn watch(&mut self, watched: Watched) {
        for (at, bytes) in watched.into_iter().flatten() {
            fill(at, UNTOUCHED, bytes);
        }
        self.watched = watched;
    }

    pub(crate) fn watched(&self) -> Watched {
        self.watched
    }
}

/// Whether all that is watched is untouched.
pub(crate) fn is_untouched(watched: &Watched) -> bool {
    watched
        .iter()
        .flatten()
        .all(|(at, bytes)| dma::is_filled(*at, UNTOUCHED, *bytes))
}
