//! One connection between a guest's socket and a Unix socket of the host: its stream, its credit, and which
//! halves of it are open.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::{GuestAddressSpace, Permissions, ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::super::active_queues::ActiveQueues;
use super::super::buffer::Buffer;
use super::super::queue::QueueError;
use super::spec::{Header, NO_RECEIVE, NO_SEND};

/// Bytes that a guest may send before the host has taken them: `buf_alloc`.
pub(super) const BUFFER_BYTES: u32 = 256 * 1024;
/// The most bytes of one packet to the guest. VIRTIO_VSOCK_MAX_PKT_BUF_SIZE of Linux.
const PACKET_BYTES: u64 = 64 * 1024;

/// By which a connection is known: the ports of both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// The host's end is gone, or the guest broke the rules: the connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// What a connection has for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Produced {
    /// So many bytes, which are in its memory already.
    Data(u32),
    /// The host sends no more; with these flags.
    Shutdown(u32),
    /// The guest's credit is used up.
    NoCredit,
    /// The guest's buffer has room for a header only.
    NoRoom,
    /// Nothing now.
    Nothing,
}

pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) stream: UnixStream,
    /// The host asked for it, and the guest has not answered.
    pub(super) requested: bool,
    /// From the guest, not yet taken by the host.
    waiting: VecDeque<u8>,
    /// `fwd_cnt`, and as the guest knows it.
    forwarded: u32,
    told: u32,
    /// A packet is on its way that says so.
    telling: bool,
    /// Bytes sent to the guest, and what it said of its buffer.
    sent: u32,
    peer_alloc: u32,
    peer_forwarded: u32,
    /// The stream has something to read, or its end.
    pub(super) readable: bool,
    /// What the guest does not do any more: bits of SHUTDOWN.
    guest_stopped: u32,
    write_half_closed: bool,
    /// What the guest was told that the host does not do any more: bits of SHUTDOWN.
    host_stopped: u32,
    /// The host's process closed both halves.
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
            told: 0,
            telling: false,
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

    /// `buf_alloc` and `fwd_cnt` for a packet that is sent now.
    pub(super) fn tell_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.telling = false;
        (BUFFER_BYTES, self.forwarded)
    }

    /// Takes over what a packet says of the guest's buffer (5.10.6.3).
    pub(super) fn take_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
    }

    /// The guest may think that its buffer here is nearly full, and it is not. True once, until it is told.
    pub(super) fn owes_credit(&mut self) -> bool {
        let owes = self.forwarded.wrapping_sub(self.told) >= BUFFER_BYTES / 4;
        owes && !std::mem::replace(&mut self.telling, true)
    }

    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(in_flight)
    }

    /// True when both ends have nothing more to say to each other, but for what is on its way to the host.
    pub(super) fn is_over(&self) -> bool {
        self.guest_stopped == NO_RECEIVE | NO_SEND && self.waiting.is_empty()
    }

    /// Bytes of a guest go to the host, at once or when it has room.
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
            // More than its credit.
            return Ok(Err(Broken));
        }
        let mut bytes = vec![0; usize::try_from(left).unwrap_or_default()];
        queues.read(&mut data, &mut bytes)?;
        self.waiting.extend(bytes);
        Ok(result)
    }

    fn forward(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// The host has room: what waits goes on.
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

    /// The guest does not send or receive any more, as `flags` say (5.10.6.4).
    pub(super) fn stop(&mut self, flags: u32) {
        self.guest_stopped |= flags & (NO_RECEIVE | NO_SEND);
        if self.guest_stopped & NO_RECEIVE != 0 {
            self.close(Shutdown::Read);
        }
        self.close_write_half();
    }

    fn close_write_half(&mut self) {
        let stopped = self.guest_stopped & NO_SEND != 0;
        if stopped && self.waiting.is_empty() && !self.write_half_closed {
            self.write_half_closed = true;
            self.close(Shutdown::Write);
        }
    }

    /// Fails only when the host has closed already.
    fn close(&self, half: Shutdown) {
        let _closed = self.stream.shutdown(half);
    }

    /// Reads from the host into `room`, as much as the guest has credit for.
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

    /// The stream was read to its end: the host sends no more, and receives no more if it hung up.
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

/// Calls again what a signal interrupted. How much was moved; none if the stream would block.
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
