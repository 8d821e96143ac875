//! Connection between a socket of the guest and a Unix socket of the host: stream, credit, and the state of both
//! halves.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::{GuestAddressSpace, Permissions, ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::super::active_queues::ActiveQueues;
use super::super::buffer::Buffer;
use super::super::queue::QueueError;
use super::spec::{Header, NO_RECEIVE, NO_SEND};

/// Size of the buffer for data from the guest, which the device announces as `buf_alloc`.
pub(super) const BUFFER_BYTES: u32 = 256 * 1024;
/// Maximum number of data bytes of one packet to the guest. This is VIRTIO_VSOCK_MAX_PKT_BUF_SIZE of Linux.
const PACKET_BYTES: u64 = 64 * 1024;

/// Ports of both ends. They identify a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// The connection has failed: the host's end is closed, or the guest broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// What a connection has to send to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Produced {
    /// This number of data bytes, which have been written to the guest's buffer.
    Data(u32),
    /// The host has shut down the stream, with these flags.
    Shutdown(u32),
    /// Data, but the guest has no credit left.
    NoCredit,
    /// Data, but the guest's buffer only has room for a header.
    NoRoom,
    /// Nothing now.
    Nothing,
}

/// Connection between a socket of the guest and a Unix socket of the host.
pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) stream: UnixStream,
    /// The host has requested the connection, and the guest has not answered yet.
    pub(super) requested: bool,
    /// Data from the guest that the host's socket has not taken yet.
    waiting: VecDeque<u8>,
    /// Number of bytes passed to the host (`fwd_cnt`), and its last value that was sent to the guest.
    forwarded: u32,
    announced: u32,
    /// A credit update for the guest is queued.
    update_queued: bool,
    /// Number of bytes sent to the guest, and the last values of `buf_alloc` and `fwd_cnt` from the guest.
    sent: u32,
    peer_alloc: u32,
    peer_forwarded: u32,
    /// The host's stream has data, or has ended, and was not read since.
    pub(super) readable: bool,
    /// Flags of [`Op::Shutdown`](super::spec::Op::Shutdown) that the guest has sent.
    guest_stopped: u32,
    write_half_closed: bool,
    /// Flags of [`Op::Shutdown`](super::spec::Op::Shutdown) that were sent to the guest.
    host_stopped: u32,
    /// The host's process has closed both halves of the stream.
    pub(super) hung_up: bool,
}

impl Connection {
    pub(super) fn new(ports: Ports, stream: UnixStream) -> Self {
        Self {
            ports,
            stream,
            requested: false,
            waiting: VecDeque::new(),
            forwarded: 0,
            announced: 0,
            update_queued: false,
            sent: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            readable: false,
            guest_stopped: 0,
            write_half_closed: false,
            host_stopped: 0,
            hung_up: false,
        }
    }

    /// Returns `buf_alloc` and `fwd_cnt` for a packet that is sent now.
    pub(super) fn credit_to_send(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        self.update_queued = false;
        (BUFFER_BYTES, self.forwarded)
    }

    /// Stores the guest's credit from the header of a packet (virtio 1.2, 5.10.6.3).
    pub(super) fn take_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
    }

    /// Returns whether the guest needs a credit update, because its view of the device's buffer is much fuller than the
    /// buffer. Returns true only once until the update is sent.
    pub(super) fn owes_credit(&mut self) -> bool {
        let owes = self.forwarded.wrapping_sub(self.announced) >= BUFFER_BYTES / 4;
        owes && !std::mem::replace(&mut self.update_queued, true)
    }

    /// Returns the number of bytes that the guest's buffer has room for.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(in_flight)
    }

    /// Returns whether the guest has shut down both halves and the host has received all of its data.
    pub(super) fn is_over(&self) -> bool {
        self.guest_stopped == NO_RECEIVE | NO_SEND && self.waiting.is_empty()
    }

    /// Passes data from the guest to the host. What the host's socket does not take is buffered.
    pub(super) fn send<M: GuestAddressSpace>(
        &mut self,
        queues: &ActiveQueues<'_, M>,
        mut data: Buffer,
    ) -> Result<Result<(), Broken>, QueueError> {
        if self.guest_stopped & NO_SEND != 0 {
            return Ok(Err(Broken));
        }
        let mut result = Ok(());
        if self.waiting.is_empty() {
            let mut written = 0;
            queues.each_slice(&data, Permissions::Read, |slice| {
                match moved(|| self.stream.write_volatile(&slice)) {
                    Ok(Some(len)) => {
                        written += len;
                        len == slice.len()
                    }
                    Ok(None) => false,
                    Err(broken) => {
                        result = Err(broken);
                        false
                    }
                }
            })?;
            data.take(written as u64);
            self.forward(written);
        }
        let left = data.len();
        if self.waiting.len() as u64 + left > u64::from(BUFFER_BYTES) {
            // The guest has sent more than its credit.
            return Ok(Err(Broken));
        }
        let mut bytes = vec![0; usize::try_from(left).unwrap_or_default()];
        queues.read(&mut data, &mut bytes)?;
        self.waiting.extend(bytes);
        Ok(result)
    }

    /// Counts bytes that were passed to the host.
    fn forward(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Writes buffered data to the host's socket, which is writable again.
    pub(super) fn flush(&mut self) -> Result<(), Broken> {
        while !self.waiting.is_empty() {
            match self.stream.write(self.waiting.as_slices().0) {
                Ok(0) => return Err(Broken),
                Ok(len) => {
                    self.waiting.drain(..len);
                    self.forward(len);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Err(Broken),
            }
        }
        self.close_write_half();
        Ok(())
    }

    /// Handles a shutdown by the guest, with `flags` (virtio 1.2, 5.10.6.4).
    pub(super) fn stop(&mut self, flags: u32) {
        self.guest_stopped |= flags & (NO_RECEIVE | NO_SEND);
        if self.guest_stopped & NO_RECEIVE != 0 {
            self.close(Shutdown::Read);
        }
        self.close_write_half();
    }

    /// Shuts down the writing half of the stream after the guest has shut it down and all data has been written.
    fn close_write_half(&mut self) {
        let stopped = self.guest_stopped & NO_SEND != 0;
        if stopped && self.waiting.is_empty() && !self.write_half_closed {
            self.write_half_closed = true;
            self.close(Shutdown::Write);
        }
    }

    /// Shuts down one half of the stream. The call fails only if the host has closed the stream already.
    fn close(&self, half: Shutdown) {
        let _closed = self.stream.shutdown(half);
    }

    /// Reads data from the host into `room`, as far as the guest has credit.
    pub(super) fn produce<M: GuestAddressSpace>(
        &mut self,
        queues: &ActiveQueues<'_, M>,
        room: &mut Buffer,
    ) -> Result<Result<Produced, Broken>, QueueError> {
        if self.guest_stopped & NO_RECEIVE != 0 || !self.readable {
            self.readable = false;
            return Ok(Ok(Produced::Nothing));
        }
        if self.host_stopped != 0 {
            return Ok(Ok(self.ended()));
        }
        let credit = self.credit();
        if credit == 0 {
            return Ok(Ok(Produced::NoCredit));
        }
        if room.is_empty() {
            return Ok(Ok(Produced::NoRoom));
        }
        let part = room.take(u64::from(credit).min(PACKET_BYTES));
        let mut read = 0;
        let mut result = Ok(());
        let mut ended = false;
        queues.each_slice(&part, Permissions::Write, |mut slice| {
            match moved(|| self.stream.read_volatile(&mut slice)) {
                Ok(Some(0)) => {
                    ended = true;
                    false
                }
                Ok(Some(len)) => {
                    read += len;
                    len == slice.len()
                }
                Ok(None) => {
                    self.readable = false;
                    false
                }
                Err(broken) => {
                    result = Err(broken);
                    false
                }
            }
        })?;
        if read > 0 {
            let bytes = u32::try_from(read).unwrap_or(u32::MAX);
            self.sent = self.sent.wrapping_add(bytes);
            return Ok(Ok(Produced::Data(bytes)));
        }
        if ended {
            return Ok(Ok(self.ended()));
        }
        Ok(result.map(|()| Produced::Nothing))
    }

    /// Handles the end of the host's stream. The host will not send, and if it hung up, it will not receive either.
    fn ended(&mut self) -> Produced {
        self.readable = false;
        let both = if self.hung_up { NO_RECEIVE } else { 0 };
        let flags = NO_SEND | both;
        if self.host_stopped == flags {
            return Produced::Nothing;
        }
        self.host_stopped = flags;
        Produced::Shutdown(flags)
    }
}

/// Repeats `call` as long as a signal interrupts it. Returns the number of bytes moved, or `None` if the stream would
/// block.
fn moved(
    mut call: impl FnMut() -> Result<usize, VolatileMemoryError>,
) -> Result<Option<usize>, Broken> {
    loop {
        match call() {
            Ok(len) => return Ok(Some(len)),
            Err(VolatileMemoryError::IOError(error)) => match error.kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::WouldBlock => return Ok(None),
                _ => return Err(Broken),
            },
            Err(_) => return Err(Broken),
        }
    }
}
