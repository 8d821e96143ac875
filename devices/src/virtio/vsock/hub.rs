//! All connections of a device, and what is to be told to the guest.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use event_manager::EventSet;
use vm_memory::GuestAddressSpace;

use super::super::active_queues::ActiveQueues;
use super::super::buffer::Buffer;
use super::super::device::{DeviceError, EventRegistry, Token};
use super::super::queue::QueueError;
use super::connection::{Broken, Connection, Ports, Produced};
use super::host::{Handshake, HandshakeProgress, HostSocket};
use super::spec::{HOST_CID, Header, Op, STREAM};

/// The most connections at once, those that are being made included.
pub(super) const CONNECTIONS_MAX: usize = 1024;
/// Packets that wait for the guest to make room. Beyond that, nothing more is taken from it.
const PACKETS_MAX: usize = 1024;
/// Ports that the host's ends of its own connections get; below are those that guests ask for.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// The first token of a connection; below are the device's own.
const FIRST_TOKEN: Token = 16;

/// A packet without data, on its way to the guest.
struct Packet {
    ports: Ports,
    op: Op,
    flags: u32,
}

pub(super) struct Hub {
    pub(super) socket: HostSocket,
    pub(super) guest_cid: u64,
    connections: HashMap<Token, Connection>,
    by_ports: HashMap<Ports, Token>,
    handshakes: HashMap<Token, Handshake>,
    packets: VecDeque<Packet>,
    /// Connections that may have data for the guest.
    ready: VecDeque<Token>,
    next_token: Token,
    next_port: u32,
}

/// Streams are looked at when something changes: what is left unread is remembered.
fn stream_events() -> EventSet {
    EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED
}

impl Hub {
    pub(super) fn new(socket: HostSocket, guest_cid: u64) -> Self {
        Self {
            socket,
            guest_cid,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            handshakes: HashMap::new(),
            packets: VecDeque::new(),
            ready: VecDeque::new(),
            next_token: FIRST_TOKEN,
            next_port: FIRST_HOST_PORT,
        }
    }

    pub(super) fn connections(&self) -> usize {
        self.connections.len() + self.handshakes.len()
    }

    /// Whether so much waits for the guest that nothing more can be taken from it.
    pub(super) fn is_full(&self) -> bool {
        self.packets.len() >= PACKETS_MAX
    }

    pub(super) fn has_work(&self) -> bool {
        !self.packets.is_empty() || !self.ready.is_empty()
    }

    /// Ends everything: the guest is not there any more.
    pub(super) fn clear(&mut self, registry: &mut EventRegistry<'_, '_>) {
        let tokens: Vec<Token> = self.connections.keys().copied().collect();
        for token in tokens {
            self.remove(token, registry);
        }
        for (_, handshake) in self.handshakes.drain() {
            deregister(&handshake.stream, registry);
        }
        self.packets.clear();
        self.ready.clear();
    }

    /// Takes all hosts that have connected.
    pub(super) fn accept(&mut self, registry: &mut EventRegistry<'_, '_>) -> io::Result<()> {
        while let Some(stream) = self.socket.accept()? {
            // One too many is closed at once.
            if self.connections() < CONNECTIONS_MAX {
                let token = self.token();
                registry.add(&stream.as_raw_fd(), token, stream_events())?;
                self.handshakes.insert(token, Handshake::new(stream));
            }
        }
        Ok(())
    }

    /// Something changed at the stream of `token`.
    pub(super) fn stream_event(
        &mut self,
        token: Token,
        events: EventSet,
        registry: &mut EventRegistry<'_, '_>,
    ) {
        if self.handshakes.contains_key(&token) {
            return self.handshake_event(token, registry);
        }
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        connection.hung_up |= events.contains(EventSet::HANG_UP);
        if connection.requested {
            if connection.hung_up {
                self.reset(token, registry);
            }
            return;
        }
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP)
            && !connection.readable
        {
            connection.readable = true;
            self.ready.push_back(token);
        }
        if events.contains(EventSet::OUT) {
            self.flush(token, registry);
        }
    }

    fn flush(&mut self, token: Token, registry: &mut EventRegistry<'_, '_>) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let result = connection.flush();
        self.settle(token, result, registry);
    }

    fn handshake_event(&mut self, token: Token, registry: &mut EventRegistry<'_, '_>) {
        let Some(mut handshake) = self.handshakes.remove(&token) else {
            return;
        };
        match handshake.read() {
            HandshakeProgress::Waiting => {
                self.handshakes.insert(token, handshake);
            }
            HandshakeProgress::Failed => deregister(&handshake.stream, registry),
            HandshakeProgress::Port(guest) => {
                let ports = Ports {
                    host: self.host_port(guest),
                    guest,
                };
                let mut connection = Connection::new(ports, handshake.stream);
                connection.requested = true;
                self.insert(token, connection);
                self.push(ports, Op::Request, 0);
            }
        }
    }

    /// A packet of the guest.
    pub(super) fn packet<M: GuestAddressSpace>(
        &mut self,
        queues: &ActiveQueues<'_, M>,
        header: &Header,
        data: Buffer,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        if header.dst_cid != HOST_CID || header.src_cid != self.guest_cid {
            // For or from somebody else: there is no way to them, or back.
            return Ok(());
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let token = self.by_ports.get(&ports).copied();
        let (Some(token), STREAM) = (token, header.kind) else {
            match header.op {
                Op::Request if header.kind == STREAM => self.connect(ports, header, registry)?,
                // A reset is not answered by another.
                Op::Reset => {}
                _ => self.push(ports, Op::Reset, 0),
            }
            return Ok(());
        };
        self.connection_packet(queues, token, header, data, registry)
    }

    fn connection_packet<M: GuestAddressSpace>(
        &mut self,
        queues: &ActiveQueues<'_, M>,
        token: Token,
        header: &Header,
        data: Buffer,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(());
        };
        connection.take_credit(header);
        let ports = connection.ports;
        let result = match (header.op, connection.requested) {
            (Op::Reset, _) => {
                self.remove(token, registry);
                return Ok(());
            }
            (Op::Response, true) => accepted(connection),
            // Before it has answered a request, a guest says nothing else; and it does not ask twice.
            (_, true) | (Op::Request | Op::Response | Op::Unknown(_), false) => Err(Broken),
            (Op::Data, false) => connection.send(queues, data)?,
            (Op::Shutdown, false) => {
                connection.stop(header.flags);
                Ok(())
            }
            (Op::CreditRequest, false) => {
                self.push(ports, Op::CreditUpdate, 0);
                Ok(())
            }
            (Op::CreditUpdate, false) => Ok(()),
        };
        // New credit, or a stream that was readable before the guest answered.
        self.make_ready(token);
        self.settle(token, result, registry);
        Ok(())
    }

    /// After something happened to a connection: ends it, or tells the guest of its credit.
    fn settle(
        &mut self,
        token: Token,
        result: Result<(), Broken>,
        registry: &mut EventRegistry<'_, '_>,
    ) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if result.is_err() || connection.is_over() {
            self.reset(token, registry);
        } else if connection.owes_credit() {
            let ports = connection.ports;
            self.push(ports, Op::CreditUpdate, 0);
        }
    }

    /// The guest asks for a connection to whoever listens on the host.
    fn connect(
        &mut self,
        ports: Ports,
        header: &Header,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        let stream = if self.connections() < CONNECTIONS_MAX {
            self.socket.connect(ports.host).ok()
        } else {
            None
        };
        let Some(stream) = stream else {
            self.push(ports, Op::Reset, 0);
            return Ok(());
        };
        let token = self.token();
        registry
            .add(&stream.as_raw_fd(), token, stream_events())
            .map_err(DeviceError::host("waiting for a socket"))?;
        let mut connection = Connection::new(ports, stream);
        connection.take_credit(header);
        self.insert(token, connection);
        self.push(ports, Op::Response, 0);
        Ok(())
    }

    /// The next packet for the guest, its data put into `room`. None if there is nothing to say.
    pub(super) fn next<M: GuestAddressSpace>(
        &mut self,
        queues: &ActiveQueues<'_, M>,
        room: &mut Buffer,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<Option<Header>, QueueError> {
        loop {
            if let Some(packet) = self.packets.pop_front() {
                return Ok(Some(self.header(packet.ports, packet.op, packet.flags, 0)));
            }
            let Some(token) = self.ready.pop_front() else {
                return Ok(None);
            };
            let Some(connection) = self.connections.get_mut(&token) else {
                continue;
            };
            let ports = connection.ports;
            match connection.produce(queues, room)? {
                Ok(Produced::Data(len)) => {
                    self.ready.push_back(token);
                    return Ok(Some(self.header(ports, Op::Data, 0, len)));
                }
                Ok(Produced::Shutdown(flags)) => self.push(ports, Op::Shutdown, flags),
                // An update of the guest makes it ready again.
                Ok(Produced::NoCredit) => self.push(ports, Op::CreditRequest, 0),
                // A packet without data takes the buffer, so that the next one's turn comes.
                Ok(Produced::NoRoom) => {
                    self.ready.push_back(token);
                    self.push(ports, Op::CreditUpdate, 0);
                }
                Ok(Produced::Nothing) => {}
                Err(Broken) => self.reset(token, registry),
            }
        }
    }

    fn header(&mut self, ports: Ports, op: Op, flags: u32, len: u32) -> Header {
        let connection = self
            .by_ports
            .get(&ports)
            .and_then(|token| self.connections.get_mut(token));
        let (buf_alloc, fwd_cnt) = connection.map_or((0, 0), Connection::tell_credit);
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len,
            kind: STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    fn make_ready(&mut self, token: Token) {
        let readable = self
            .connections
            .get(&token)
            .is_some_and(|connection| connection.readable && !connection.requested);
        if readable && !self.ready.contains(&token) {
            self.ready.push_back(token);
        }
    }

    fn push(&mut self, ports: Ports, op: Op, flags: u32) {
        self.packets.push_back(Packet { ports, op, flags });
    }

    fn insert(&mut self, token: Token, connection: Connection) {
        self.by_ports.insert(connection.ports, token);
        self.connections.insert(token, connection);
    }

    /// Ends a connection, and tells the guest.
    fn reset(&mut self, token: Token, registry: &mut EventRegistry<'_, '_>) {
        if let Some(ports) = self.remove(token, registry) {
            self.push(ports, Op::Reset, 0);
        }
    }

    /// Ends a connection: what was to be said about it is not.
    fn remove(&mut self, token: Token, registry: &mut EventRegistry<'_, '_>) -> Option<Ports> {
        let connection = self.connections.remove(&token)?;
        deregister(&connection.stream, registry);
        let ports = connection.ports;
        self.by_ports.remove(&ports);
        self.packets.retain(|packet| packet.ports != ports);
        Some(ports)
    }

    fn token(&mut self) -> Token {
        loop {
            let token = self.next_token;
            self.next_token = token.wrapping_add(1).max(FIRST_TOKEN) % (1 << 31);
            let used =
                self.connections.contains_key(&token) || self.handshakes.contains_key(&token);
            if token >= FIRST_TOKEN && !used {
                return token;
            }
        }
    }

    fn host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = host.wrapping_add(1).max(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }
}

/// The guest took a connection that the host asked for. What the host has sent meanwhile is read now.
fn accepted(connection: &mut Connection) -> Result<(), Broken> {
    connection.requested = false;
    connection.readable = true;
    let line = format!("OK {}\n", connection.ports.host);
    // A stream on which nothing was written yet has room for a line.
    connection
        .stream
        .write_all(line.as_bytes())
        .map_err(|_| Broken)
}

/// It is registered, so removing it fails only if epoll itself is gone.
fn deregister(stream: &UnixStream, registry: &mut EventRegistry<'_, '_>) {
    let _gone = registry.remove(&stream.as_raw_fd());
}
