//! 16550 serial port: the model of vm-superio, with a queue for input that does not fit into the receive FIFO.
//!
//! Writes to the output block the vCPU until the output has taken them.
//!
//! Specification: National Semiconductor PC16550D, "Universal Asynchronous Receiver/Transmitter".

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use minicbor::{Decode, Encode};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::{BusDevice, PortSpace, SavedState};

/// First port of COM1 on a PC.
pub const COM1_PORT: u16 = 0x3f8;
/// Number of ports of a 16550.
pub const COM1_PORTS: u16 = 8;
/// Interrupt line of COM1 on a PC.
pub const COM1_INTERRUPT: u32 = 4;

/// Maximum number of bytes in the input queue, also of a restored port.
const INPUT_LIMIT: usize = 64 * 1024;
/// Capacity of the receive FIFO of the UART model in bytes.
const FIFO_LIMIT: usize = 64;

/// Sink for the guest's output.
pub type SerialOutput = Box<dyn Write + Send>;

/// Reason for which a serial port could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The saved state has more bytes than the port can hold.
    #[error("serial state: {field} has {found} bytes, but the maximum is {limit}")]
    State {
        /// Field of [`SerialSnapshot`].
        field: &'static str,
        /// Number of bytes in the field.
        found: usize,
        /// Maximum number of bytes in the field.
        limit: usize,
    },
    /// The write to the interrupt's eventfd failed.
    #[error("cannot raise the interrupt of the serial port: {0}")]
    Interrupt(#[source] io::Error),
}

/// Saved state of a serial port: the registers of the 16550, and the input that the guest has not read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SerialSnapshot {
    /// Divisor latch, low byte.
    #[n(0)]
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    #[n(1)]
    pub divisor_high: u8,
    /// Interrupt enable register.
    #[n(2)]
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    #[n(3)]
    pub interrupt_identification: u8,
    /// Line control register.
    #[n(4)]
    pub line_control: u8,
    /// Line status register.
    #[n(5)]
    pub line_status: u8,
    /// Modem control register.
    #[n(6)]
    pub modem_control: u8,
    /// Modem status register.
    #[n(7)]
    pub modem_status: u8,
    /// Scratch register.
    #[n(8)]
    pub scratch: u8,
    /// Receive FIFO, oldest byte first, at most 64 bytes.
    #[n(9)]
    #[cbor(with = "minicbor::bytes")]
    pub receive_fifo: Vec<u8>,
    /// Input queue behind the FIFO, oldest byte first, at most 64 KiB.
    #[n(10)]
    #[cbor(with = "minicbor::bytes")]
    pub waiting_input: Vec<u8>,
}

impl SavedState for SerialSnapshot {
    const VERSION: u16 = 1;
}

/// Interrupt line in the form that vm-superio triggers.
struct InterruptLine(EventFd);

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// State of the port, behind a lock.
struct Port {
    uart: Uart<InterruptLine, NoEvents, SerialOutput>,
    /// Input that does not fit into the FIFO yet.
    waiting: VecDeque<u8>,
    /// Number of bytes or interrupts that could not be written.
    lost: u64,
}

impl Port {
    /// Moves input from the queue into the FIFO, as far as it has room.
    fn refill(&mut self) {
        let room = self.uart.fifo_capacity();
        if room == 0 || self.waiting.is_empty() {
            return;
        }
        let bytes: Vec<u8> = self.waiting.iter().copied().take(room).collect();
        match self.uart.enqueue_raw_bytes(&bytes) {
            Ok(taken) => drop(self.waiting.drain(..taken)),
            Err(_) => self.lost += 1,
        }
    }
}

/// 16550 serial port. Clones share the port.
#[derive(Clone)]
pub struct Serial {
    port: Arc<Mutex<Port>>,
}

impl Serial {
    /// Creates a port in its reset state. It raises `interrupt` and writes to `output`.
    #[must_use]
    pub fn new(interrupt: EventFd, output: SerialOutput) -> Self {
        let uart = Uart::new(InterruptLine(interrupt), output);
        Self::from_uart(uart, VecDeque::new())
    }

    /// Creates a port from its saved state, with a new interrupt and output.
    ///
    /// # Errors
    /// Returns [`SerialError`] if the state has too many bytes of input, or the interrupt cannot be raised.
    pub fn restore(
        saved: &SerialSnapshot,
        interrupt: EventFd,
        output: SerialOutput,
    ) -> Result<Self, SerialError> {
        check("receive_fifo", saved.receive_fifo.len(), FIFO_LIMIT)?;
        check("waiting_input", saved.waiting_input.len(), INPUT_LIMIT)?;
        let state = SerialState {
            baud_divisor_low: saved.divisor_low,
            baud_divisor_high: saved.divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.receive_fifo.clone(),
        };
        let uart = Uart::from_state(&state, InterruptLine(interrupt), NoEvents, output).map_err(
            |error| match error {
                vm_superio::serial::Error::Trigger(source)
                | vm_superio::serial::Error::IOError(source) => SerialError::Interrupt(source),
                vm_superio::serial::Error::FullFifo => SerialError::State {
                    field: "receive_fifo",
                    found: saved.receive_fifo.len(),
                    limit: FIFO_LIMIT,
                },
            },
        )?;
        Ok(Self::from_uart(
            uart,
            saved.waiting_input.iter().copied().collect(),
        ))
    }

    /// Returns the state of the port. The caller must have stopped the guest and the input.
    #[must_use]
    pub fn save(&self) -> SerialSnapshot {
        let port = self.lock();
        let state = port.uart.state();
        SerialSnapshot {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            receive_fifo: state.in_buffer,
            waiting_input: port.waiting.iter().copied().collect(),
        }
    }

    /// Sends `bytes` to the guest. Bytes that do not fit into the FIFO wait in the input queue. Returns the number of
    /// bytes taken, which is smaller if the queue is full.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut port = self.lock();
        let taken = bytes.len().min(INPUT_LIMIT - port.waiting.len());
        port.waiting.extend(&bytes[..taken]);
        port.refill();
        taken
    }

    /// Returns the number of bytes and interrupts that could not be written, for example to a closed pipe or a full
    /// disk.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lock().lost
    }

    fn from_uart(uart: Uart<InterruptLine, NoEvents, SerialOutput>, waiting: VecDeque<u8>) -> Self {
        Self {
            port: Arc::new(Mutex::new(Port {
                uart,
                waiting,
                lost: 0,
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(field: &'static str, found: usize, limit: usize) -> Result<(), SerialError> {
    if found > limit {
        return Err(SerialError::State {
            field,
            found,
            limit,
        });
    }
    Ok(())
}

impl BusDevice<PortSpace> for Serial {
    /// Registers are 1 byte wide. The other bytes of a wider read are 0.
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let (Some(first), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            let mut port = self.lock();
            *first = port.uart.read(offset);
            port.refill();
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        if let (Some(value), Ok(offset)) = (data.first(), u8::try_from(offset)) {
            let mut port = self.lock();
            if port.uart.write(offset, *value).is_err() {
                port.lost += 1;
            }
        }
    }
}

/// Source of input for a serial port: a file descriptor on an event-manager loop.
///
/// At end of file or after an error, it stops reading. The port stays usable.
pub struct SerialInput<R> {
    source: R,
    serial: Serial,
}

impl<R: Read + AsFd> SerialInput<R> {
    /// Creates an input that reads from `source`. The descriptor may be blocking, because it is read only when it is
    /// readable.
    pub fn new(source: R, serial: Serial) -> Self {
        Self { source, serial }
    }

    /// Reads once from the source. Returns false if there will be no more input.
    fn pump(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.source.read(&mut bytes) {
            Ok(0) => false,
            // Input is dropped when the queue is full, as on a serial line without flow control.
            Ok(count) => {
                self.serial.input(&bytes[..count]);
                true
            }
            Err(error) => matches!(
                error.kind(),
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
            ),
        }
    }
}

impl<R: Read + AsFd> MutEventSubscriber for SerialInput<R> {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let readable = events.event_set().contains(EventSet::IN);
        let open = if readable { self.pump() } else { false };
        if !open {
            // The descriptor is registered, so removing it fails only if epoll itself fails.
            let _gone = ops.remove(events);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let fd = self.source.as_fd().as_raw_fd();
        // epoll rejects a regular file (EPERM), which can be read to its end at once.
        if ops.add(Events::new_raw(fd, EventSet::IN)).is_err() {
            while self.pump() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    struct Sink(mpsc::Sender<u8>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            for byte in bytes {
                self.0.send(*byte).map_err(io::Error::other)?;
            }
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn serial() -> (Serial, mpsc::Receiver<u8>, EventFd) {
        let (sender, receiver) = mpsc::channel();
        let interrupt = EventFd::new(libc_nonblock()).unwrap();
        let port = Serial::new(interrupt.try_clone().unwrap(), Box::new(Sink(sender)));
        (port, receiver, interrupt)
    }

    /// `EFD_NONBLOCK` of the kernel's include/uapi/linux/eventfd.h.
    fn libc_nonblock() -> i32 {
        0o4000
    }

    fn read(port: &mut Serial, offset: u16) -> u8 {
        let mut byte = [0];
        port.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn output_reaches_the_sink_and_a_closed_sink_is_counted() {
        let (mut port, output, _interrupt) = serial();
        port.write(0, b"h");
        port.write(0, b"i");
        assert_eq!(output.try_iter().collect::<Vec<_>>(), b"hi");
        drop(output);
        port.write(0, b"x");
        assert_eq!(port.lost(), 1);
    }

    #[test]
    fn input_beyond_the_fifo_waits_and_arrives_in_order() {
        let (mut port, _output, _interrupt) = serial();
        let sent: Vec<u8> = (0..=255).collect();
        assert_eq!(port.input(&sent), 256);
        let mut seen = Vec::new();
        while read(&mut port, 5) & 1 != 0 {
            seen.push(read(&mut port, 0));
        }
        assert_eq!(seen, sent);
    }

    #[test]
    fn input_is_bounded() {
        let (port, _output, _interrupt) = serial();
        let flood = vec![0; 2 * INPUT_LIMIT];
        let taken = port.input(&flood);
        assert_eq!(taken, INPUT_LIMIT);
        assert!(port.input(&flood) <= FIFO_LIMIT);
    }

    #[test]
    fn a_saved_port_goes_on_elsewhere() {
        let (mut port, _output, _interrupt) = serial();
        port.write(1, &[1]);
        port.write(7, &[0x5a]);
        port.input(&[7; 100]);
        let saved = port.save();
        assert_eq!(
            (saved.receive_fifo.len(), saved.waiting_input.len()),
            (64, 36)
        );
        let (_, _unused, interrupt) = serial();
        let mut other = Serial::restore(&saved, interrupt, Box::new(io::sink())).unwrap();
        assert_eq!(other.save(), saved);
        assert_eq!(read(&mut other, 7), 0x5a);
        let mut count = 0;
        while read(&mut other, 5) & 1 != 0 {
            assert_eq!(read(&mut other, 0), 7);
            count += 1;
        }
        assert_eq!(count, 100);
    }

    #[test]
    fn an_impossible_state_is_refused_by_field() {
        for (field, limit) in [("receive_fifo", FIFO_LIMIT), ("waiting_input", INPUT_LIMIT)] {
            let mut saved = SerialSnapshot::default();
            match field {
                "receive_fifo" => saved.receive_fifo = vec![0; limit + 1],
                _ => saved.waiting_input = vec![0; limit + 1],
            }
            let (_, _output, interrupt) = serial();
            let error = Serial::restore(&saved, interrupt, Box::new(io::sink()))
                .err()
                .unwrap();
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}
