//! All connections of a socket device, and the queue of packets to the guest.

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

/// Maximum number of connections, including those in the handshake.
pub(super) const CONNECTIONS_MAX: usize = 1024;
/// Maximum number of packets that wait for buffers of the guest. When it is reached, no packet is taken from the guest.
const PACKETS_MAX: usize = 1024;
/// First port for the host's end of a connection that the host requests. The guest connects to smaller port numbers.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// First token of a connection. Smaller tokens belong to the device itself.
const FIRST_TOKEN: Token = 16;

/// Packet without data for the guest.
struct Packet {
    ports: Ports,
    op: Op,
    flags: u32,
}

/// Connections of a socket device, by token and by ports, with the packets and data for the guest.
pub(super) struct Hub {
    pub(super) socket: HostSocket,
    pub(super) guest_cid: u64,
    connections: HashMap<Token, Connection>,
    by_ports: HashMap<Ports, Token>,
    handshakes: HashMap<Token, Handshake>,
    packets: VecDeque<Packet>,
    /// Connections that may have data for the guest, in the order in which they are served.
    ready: VecDeque<Token>,
    next_token: Token,
    next_port: u32,
}

/// Events of a stream. They are edge-triggered, so [`Connection::readable`] remembers data that was not read.
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

    /// Returns the number of connections, including those in the handshake.
    pub(super) fn connections(&self) -> usize {
        self.connections.len() + self.handshakes.len()
    }

    /// Returns whether so many packets wait for the guest that no packet can be taken from it.
    pub(super) fn is_full(&self) -> bool {
        self.packets.len() >= PACKETS_MAX
    }

    /// Returns whether there may be a packet for the guest.
    pub(super) fn has_work(&self) -> bool {
        !self.packets.is_empty() || !self.ready.is_empty()
    }

    /// Closes all connections, because the driver has reset the device.
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

    /// Accepts all pending connections of the host.
    pub(super) fn accept(&mut self, registry: &mut EventRegistry<'_, '_>) -> io::Result<()> {
        while let Some(stream) = self.socket.accept()? {
            // A connection above the limit is closed at once.
            if self.connections() < CONNECTIONS_MAX {
                let token = self.token();
                registry.add(&stream.as_raw_fd(), token, stream_events())?;
                self.handshakes.insert(token, Handshake::new(stream));
            }
        }
        Ok(())
    }

    /// Handles `events` of the stream that was registered with `token`.
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

    /// Writes buffered data of a connection to the host, whose socket has room again.
    fn flush(&mut self, token: Token, registry: &mut EventRegistry<'_, '_>) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let result = connection.flush();
        self.after_event(token, result, registry);
    }

    /// Reads the line of a connection in the handshake, and requests the connection from the guest if it is complete.
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

    /// Handles a packet from the guest.
    pub(super) fn packet<M: GuestAddressSpace>(
        &mut self,
        queues: &ActiveQueues<'_, M>,
        header: &Header,
        data: Buffer,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        if header.dst_cid != HOST_CID || header.src_cid != self.guest_cid {
            // The packet's addresses are not those of this guest and this host, so there is nobody to answer.
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
                // A reset is not answered.
                Op::Reset => {}
                _ => self.push(ports, Op::Reset, 0),
            }
            return Ok(());
        };
        self.connection_packet(queues, token, header, data, registry)
    }

    /// Handles a packet for an existing connection.
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
            // Before the guest has answered a request, it may send nothing else. It must not request a connection
            // twice.
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
        // The guest may have sent credit, or answered the request for a stream that has data already.
        self.make_ready(token);
        self.after_event(token, result, registry);
        Ok(())
    }

    /// Closes a connection if it has failed or ended, and sends a credit update if the guest needs one.
    fn after_event(
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

    /// Handles a request of the guest for a connection to a socket of the host.
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
            .map_err(DeviceError::host("cannot wait for a socket of the host"))?;
        let mut connection = Connection::new(ports, stream);
        connection.take_credit(header);
        self.insert(token, connection);
        self.push(ports, Op::Response, 0);
        Ok(())
    }

    /// Returns the header of the next packet for the guest, and writes its data to `room`. Returns `None` if there is
    /// no packet.
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
                // A credit update of the guest makes the connection ready again.
                Ok(Produced::NoCredit) => self.push(ports, Op::CreditRequest, 0),
                // A packet without data uses up the buffer, so that the next buffer can take data.
                Ok(Produced::NoRoom) => {
                    self.ready.push_back(token);
                    self.push(ports, Op::CreditUpdate, 0);
                }
                Ok(Produced::Nothing) => {}
                Err(Broken) => self.reset(token, registry),
            }
        }
    }

    /// Returns the header of a packet for the guest, with the current credit of its connection.
    fn header(&mut self, ports: Ports, op: Op, flags: u32, len: u32) -> Header {
        let connection = self
            .by_ports
            .get(&ports)
            .and_then(|token| self.connections.get_mut(token));
        let (buf_alloc, fwd_cnt) = connection.map_or((0, 0), Connection::credit_to_send);
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

    /// Queues a connection for delivery to the guest, if its stream is readable.
    fn make_ready(&mut self, token: Token) {
        let readable = self
            .connections
            .get(&token)
            .is_some_and(|connection| connection.readable && !connection.requested);
        if readable && !self.ready.contains(&token) {
            self.ready.push_back(token);
        }
    }

    /// Queues a packet without data for the guest.
    fn push(&mut self, ports: Ports, op: Op, flags: u32) {
        self.packets.push_back(Packet { ports, op, flags });
    }

    fn insert(&mut self, token: Token, connection: Connection) {
        self.by_ports.insert(connection.ports, token);
        self.connections.insert(token, connection);
    }

    /// Closes a connection, and sends a reset to the guest.
    fn reset(&mut self, token: Token, registry: &mut EventRegistry<'_, '_>) {
        if let Some(ports) = self.remove(token, registry) {
            self.push(ports, Op::Reset, 0);
        }
    }

    /// Closes a connection, and discards the packets that are queued for it.
    fn remove(&mut self, token: Token, registry: &mut EventRegistry<'_, '_>) -> Option<Ports> {
        let connection = self.connections.remove(&token)?;
        deregister(&connection.stream, registry);
        let ports = connection.ports;
        self.by_ports.remove(&ports);
        self.packets.retain(|packet| packet.ports != ports);
        Some(ports)
    }

    /// Returns a token that is not in use.
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

    /// Returns a port of the host that is not connected to port `guest`.
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

/// Handles the guest's acceptance of a connection that the host requested. The stream counts as readable, because the
/// host may have sent data already.
fn accepted(connection: &mut Connection) -> Result<(), Broken> {
    connection.requested = false;
    connection.readable = true;
    let line = format!("OK {}\n", connection.ports.host);
    // Nothing was written to the stream before, so it has room for a line.
    connection
        .stream
        .write_all(line.as_bytes())
        .map_err(|_| Broken)
}

/// Removes a stream from the event loop. The stream is registered, so the call fails only if epoll itself fails.
fn deregister(stream: &UnixStream, registry: &mut EventRegistry<'_, '_>) {
    let _gone = registry.remove(&stream.as_raw_fd());
}
