//! Console device with one port (virtio 1.2, 5.3): the guest's output goes to a sink, and its input comes from
//! [`ConsoleInput`].
//!
//! Writes to the sink block the worker, as they do for the serial port. If the sink returns an error, the output is
//! dropped and counted in `lost_bytes`.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::EventSet;
use minicbor::{Decode, Encode};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::active_queues::{ActiveQueues, Completion};
use super::buffer::Buffer;
use super::device::{Counters, Device, DeviceError, EventRegistry, Identity, Token};
use super::eventfd::{drain, notify};
use super::queue::{Chain, QueueError};
use super::state::{DeviceState, DeviceStateError};
use crate::SavedState;

/// Queues of port 0 (5.3.2), named from the driver's point of view.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 64;
/// Maximum number of bytes of input that the guest has not read, also of a restored console.
const INPUT_LIMIT: usize = 64 * 1024;
/// Size of the buffer for a copy in bytes.
const PIECE: usize = 4096;

/// Sink for a console's output.
pub type ConsoleOutput = Box<dyn Write + Send>;

/// Saved state of a console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ConsoleSnapshot {
    /// Input that the guest has not read, oldest byte first, at most 64 KiB.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub waiting_input: Vec<u8>,
}

impl SavedState for ConsoleSnapshot {
    const VERSION: u16 = 1;
}

/// Input side of a console. Clones feed the same console.
#[derive(Clone)]
pub struct ConsoleInput {
    shared: Arc<InputBuffer>,
}

/// Input that the guest has not read, shared by the console and its input side.
struct InputBuffer {
    bytes: Mutex<VecDeque<u8>>,
    arrived: EventFd,
}

impl InputBuffer {
    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleInput {
    /// Sends `bytes` to the guest, or keeps them until it reads. Returns the number of bytes taken, which is smaller if
    /// too many are waiting.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut waiting = self.shared.lock();
        let taken = bytes.len().min(INPUT_LIMIT - waiting.len());
        waiting.extend(&bytes[..taken]);
        drop(waiting);
        notify(&self.shared.arrived);
        taken
    }
}

/// Counters of a console.
#[derive(Default)]
struct ConsoleCounters {
    lost: AtomicU64,
}

impl Counters for ConsoleCounters {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("lost_bytes", self.lost.load(Ordering::Relaxed))]
    }
}

/// Console with one port.
pub struct Console {
    output: ConsoleOutput,
    input: Arc<InputBuffer>,
    counters: Arc<ConsoleCounters>,
}

impl Console {
    /// Creates a console that writes to `output`, and its input side.
    ///
    /// # Errors
    /// Returns the kernel's error if an eventfd cannot be created.
    pub fn new(output: ConsoleOutput) -> io::Result<(Self, ConsoleInput)> {
        let shared = Arc::new(InputBuffer {
            bytes: Mutex::default(),
            arrived: EventFd::new(EFD_NONBLOCK)?,
        });
        let console = Self {
            output,
            input: Arc::clone(&shared),
            counters: Arc::default(),
        };
        Ok((console, ConsoleInput { shared }))
    }

    /// Writes the guest's output to the sink.
    fn transmit<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
    ) -> Result<(), DeviceError> {
        queues.drain(TRANSMIT, |queues, mut chain| {
            must_be_empty(&chain, &chain.writable)?;
            while !chain.readable.is_empty() {
                let mut piece = [0; PIECE];
                let len = queues.read(&mut chain.readable, &mut piece)?;
                if self.output.write_all(&piece[..len]).is_err() {
                    self.counters.lost.fetch_add(len as u64, Ordering::Relaxed);
                }
            }
            if self.output.flush().is_err() {
                self.counters.lost.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Completion::Used(0))
        })
    }

    /// Delivers input to the guest.
    fn receive<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
    ) -> Result<(), DeviceError> {
        queues.drain(RECEIVE, |queues, mut chain| {
            must_be_empty(&chain, &chain.readable)?;
            let mut waiting = self.input.lock();
            if waiting.is_empty() {
                return Ok(Completion::Deferred);
            }
            let room = usize::try_from(chain.writable.len()).unwrap_or(PIECE);
            let len = room.min(PIECE).min(waiting.len());
            let bytes: Vec<u8> = waiting.drain(..len).collect();
            Ok(Completion::used(queues.write(&mut chain.writable, &bytes)?))
        })
    }
}

/// Rejects a chain unless its `buffer` for the other direction is empty: each queue has one direction (virtio 1.2,
/// 5.3.6).
fn must_be_empty(chain: &Chain, buffer: &Buffer) -> Result<(), QueueError> {
    if buffer.is_empty() {
        return Ok(());
    }
    Err(QueueError::Request {
        head: chain.head,
        what: "this queue of a console takes buffers of the other direction",
    })
}

impl<M: GuestAddressSpace> Device<M> for Console {
    fn identity(&self) -> Identity {
        Identity {
            device_type: VIRTIO_ID_CONSOLE,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE; 2],
            config: Arc::new(()),
            counters: Arc::clone(&self.counters) as _,
        }
    }

    fn register(&mut self, registry: &mut EventRegistry<'_, '_>) -> io::Result<()> {
        registry.add(&self.input.arrived, 0, EventSet::IN)
    }

    fn started(
        &mut self,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        self.receive(&mut queues)
    }

    fn notified(
        &mut self,
        queue: usize,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        match queue {
            RECEIVE => self.receive(&mut queues),
            _ => self.transmit(&mut queues),
        }
    }

    fn ready(
        &mut self,
        _: Token,
        _: EventSet,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        drain(&self.input.arrived);
        self.receive(&mut queues)
    }

    fn save(&self) -> DeviceState {
        DeviceState::new(&ConsoleSnapshot {
            waiting_input: self.input.lock().iter().copied().collect(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let state: ConsoleSnapshot = state.decode("console")?;
        let bytes = state.waiting_input.len();
        if bytes > INPUT_LIMIT {
            return Err(DeviceStateError::Mismatch {
                device: "console",
                what: format!("waiting_input has {bytes} bytes, but the maximum is {INPUT_LIMIT}"),
            });
        }
        *self.input.lock() = state.waiting_input.iter().copied().collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::super::MmioTransport;
    use super::super::testing::*;
    use super::*;

    struct Sink(mpsc::Sender<Vec<u8>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn started() -> (Driver, ConsoleInput, mpsc::Receiver<Vec<u8>>) {
        let (sender, receiver) = mpsc::channel();
        let (console, input) = Console::new(Box::new(Sink(sender))).unwrap();
        let mut driver = Driver::new(|_| Box::new(console));
        driver.start(EVENT_INDEX);
        (driver, input, receiver)
    }

    #[test]
    fn output_reaches_the_sink_whole_and_in_order() {
        let (mut driver, _input, output) = started();
        let text: Vec<u8> = (0..20_000_u32).map(|n| (n % 251) as u8).collect();
        driver.write_memory(DATA, &text);
        assert_eq!(
            driver.request(1, &[Part::Out(DATA, 1), Part::Out(DATA + 1, 19_999)]),
            0
        );
        assert_eq!(driver.request(1, &[Part::Out(DATA, 3)]), 0);
        let seen: Vec<u8> = output.try_iter().flatten().collect();
        assert_eq!(seen, [text.as_slice(), &text[..3]].concat());
    }

    #[test]
    fn a_closed_sink_loses_output_and_nothing_else() {
        let (mut driver, _input, output) = started();
        drop(output);
        driver.request(1, &[Part::Out(DATA, 5)]);
        driver.request(1, &[Part::Out(DATA, 6)]);
        assert_eq!(driver.device.counters(), [("lost_bytes", 11)]);
    }

    #[test]
    fn input_waits_for_the_guest_and_fills_what_it_offers() {
        let (mut driver, input, _output) = started();
        assert_eq!(input.input(b"hello, "), 7);
        driver.add(0, &[Part::In(DATA, 3)]);
        driver.add(0, &[Part::In(DATA + 0x100, 10)]);
        driver.add(0, &[Part::In(DATA + 0x200, 10)]);
        driver.notify(0);
        assert_eq!(driver.wait_used(0).1, 3);
        assert_eq!(driver.wait_used(0).1, 4);
        assert_eq!(driver.read_memory(DATA, 3), b"hel");
        assert_eq!(driver.read_memory(DATA + 0x100, 4), b"lo, ");
        assert_eq!(input.input(b"guest"), 5);
        assert_eq!(driver.wait_used(0).1, 5);
        assert_eq!(driver.read_memory(DATA + 0x200, 5), b"guest");
    }

    #[test]
    fn input_is_bounded() {
        let (_driver, input, _output) = started();
        assert_eq!(input.input(&vec![0; 2 * INPUT_LIMIT]), INPUT_LIMIT);
        assert_eq!(input.input(&[0]), 0);
    }

    #[test]
    fn memory_of_the_wrong_direction_needs_a_reset() {
        for (queue, part) in [(0, Part::Out(DATA, 8)), (1, Part::In(DATA, 8))] {
            let (mut driver, input, output) = started();
            input.input(b"x");
            driver.add(queue, &[part]);
            driver.notify(queue);
            driver.wait_needs_reset();
            assert!(output.try_recv().is_err());
            driver.start(0);
            assert_eq!(driver.request(0, &[Part::In(DATA, 8)]), 1);
        }
    }

    #[test]
    fn waiting_input_moves_with_the_guest() {
        let (driver, input, _output) = started();
        input.input(b"typed ahead");
        driver.device.pause();
        let saved = driver.device.save().unwrap();
        let (console, _input) = Console::new(Box::new(io::sink())).unwrap();
        let mut driver = driver.moved(&saved, |_| Box::new(console));
        driver.device.resume();
        assert_eq!(driver.request(0, &[Part::In(DATA, 64)]), 11);
        assert_eq!(driver.read_memory(DATA, 11), b"typed ahead");

        let mut flood = saved;
        flood.device = DeviceState::new(&ConsoleSnapshot {
            waiting_input: vec![0; INPUT_LIMIT + 1],
        });
        let (console, _input) = Console::new(Box::new(io::sink())).unwrap();
        let (interrupt, _line) = interrupt();
        let result =
            MmioTransport::restore("_console0", Box::new(console), memory(), interrupt, &flood);
        assert!(result.err().unwrap().to_string().contains("65537"));
    }
}
