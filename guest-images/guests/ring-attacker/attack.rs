//! Attacks: their targets, their possible outcomes, and the state of one attack on one device.

use core::fmt;

use crate::device::{Device, Result, Trouble};
use crate::dma::{self, Patience, fill};
use crate::queue::Part;
use crate::spec::Kind;

/// Reaction of a device to an attack.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The device set DEVICE_NEEDS_RESET and sent the configuration change interrupt.
    NeedsReset,
    /// The device completes operations without a reset.
    Ignored,
    /// The device completed the request, which is valid.
    Served,
    /// The device returned the request and did nothing else.
    Dropped,
    /// The request returned with VIRTIO_BLK_S_IOERR (5.2.6).
    IoError,
    /// The request returned with VIRTIO_BLK_S_UNSUPP (5.2.6).
    Unsupported,
    /// The device answered with a reset of the connection (5.10.6.6).
    ConnectionReset,
    /// The device no longer wrote to memory that belongs to the driver.
    Quiet,
    /// The device completed the requests or needs a reset, depending on a race.
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

/// Targets of an attack.
#[derive(Clone, Copy)]
pub(crate) enum Targets {
    /// Each queue of each device.
    EveryQueue,
    /// Each queue whose buffers the device always processes: all except the event queue of vsock devices.
    EveryServedQueue,
    /// The first queue of each device.
    FirstQueue,
    /// Each device, once.
    EveryDevice,
    /// All devices of one kind.
    Only(Kind),
    /// One queue of the devices of one kind.
    OnlyQueue(Kind, usize),
}

impl Targets {
    /// Returns true if `queue` of `device` is a target. `None` stands for the device as a whole.
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

/// One attack.
pub(crate) struct Attack {
    pub(crate) name: &'static str,
    pub(crate) on: Targets,
    pub(crate) expected: Outcome,
    pub(crate) run: fn(&mut Case<'_>) -> Result<Outcome>,
}

/// Memory to which a device must not write: addresses and lengths in bytes.
pub(crate) type Watched = [Option<(u64, u64)>; 2];

/// Value of the bytes of watched memory.
const UNTOUCHED: u8 = 0xa5;

/// One attack on one device.
pub(crate) struct Case<'a> {
    pub(crate) device: &'a mut Device,
    /// Attacked queue, or the main queue if the device as a whole is attacked.
    pub(crate) queue: usize,
    /// End of RAM.
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

    /// Returns a descriptor with the direction of the first descriptor of a request in this queue.
    pub(crate) fn part(&self, address: u64, bytes: u32) -> Part {
        if self.device.kind.is_written(self.queue) {
            Part::into(address, bytes)
        } else {
            Part::out(address, bytes)
        }
    }

    /// Returns a valid descriptor of that direction.
    pub(crate) fn good_part(&self) -> Part {
        self.part(dma::scratch(), 64)
    }

    /// Initializes the device and leaves the attacked queue empty.
    pub(crate) fn start(&mut self) -> Result {
        self.device.start(Some(self.queue))
    }

    /// Makes the device process the queue.
    pub(crate) fn provoke(&mut self) {
        self.device.notify(self.queue);
        if self.device.kind.is_receive(self.queue) {
            self.have_something_arrive();
        }
    }

    /// Causes a packet to arrive, so that the device uses a receive buffer.
    fn have_something_arrive(&mut self) {
        match self.device.kind {
            Kind::Net => self.device.send_question(2),
            Kind::Vsock => {
                let packet = self.device.packet(crate::operation::vsock::REQUEST);
                let bytes = crate::operation::vsock::HEADER_BYTES;
                self.device.send_packet(&packet, bytes);
            }
            // There is no console input. The console processes its receive buffers anyway.
            _ => {}
        }
    }

    /// Waits until the device has used a chain or needs a reset.
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

    /// Checks that the device completes an operation without a reset.
    pub(crate) fn lives_on(&mut self) -> Result<Outcome> {
        self.device.operate()?;
        self.device.runs()?;
        Ok(Outcome::Ignored)
    }

    /// Fills memory with a pattern, which is checked after all other devices have completed an operation.
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

/// Returns true if watched memory still has its pattern.
pub(crate) fn is_untouched(watched: &Watched) -> bool {
    watched
        .iter()
        .flatten()
        .all(|(at, bytes)| dma::is_filled(*at, UNTOUCHED, *bytes))
}
