//! A socket device, its driver, and processes of the host.

mod credit;
mod ends;

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

use super::super::testing::*;
use super::super::{DeviceState, MmioTransport};
use super::spec::Op;
use super::*;

const CID: u64 = 42;
const RX_BUFFER: u64 = 0x2000;
/// `buf_alloc` of the guest.
const GUEST_BUFFER: u32 = 64 * 1024;
const PATIENCE: Duration = Duration::from_secs(20);

/// Guest with a driver that always keeps receive buffers posted.
struct Guest {
    driver: Driver,
    folder: TempDir,
    /// Packets to the guest that the test has not looked at.
    inbox: VecDeque<(Header, Vec<u8>)>,
    posted: u64,
}

fn device(folder: &Path) -> Vsock {
    Vsock::new(VsockOptions {
        guest_cid: CID,
        path: folder.join("vsock"),
    })
    .unwrap()
}

impl Guest {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = device(folder.path());
        let mut driver = Driver::new(|_| Box::new(model));
        driver.start(EVENT_INDEX);
        let mut guest = Self {
            driver,
            folder,
            inbox: VecDeque::new(),
            posted: 0,
        };
        guest.post(4);
        guest
    }

    fn post(&mut self, buffers: u64) {
        for _ in 0..buffers {
            let at = DATA + 0x10_0000 + RX_BUFFER * (self.posted % 16);
            self.posted += 1;
            self.driver
                .add(0, &[Part::In(at, 44), Part::In(at + 0x100, 0x1000)]);
        }
        self.driver.notify(0);
    }

    fn send(&mut self, op: Op, (host, guest): (u32, u32), flags: u32, data: &[u8]) {
        self.send_as(
            Header {
                src_cid: CID,
                dst_cid: 2,
                src_port: guest,
                dst_port: host,
                len: u32::try_from(data.len()).unwrap(),
                kind: 1,
                op,
                flags,
                buf_alloc: GUEST_BUFFER,
                fwd_cnt: 0,
            },
            data,
        );
    }

    fn send_as(&mut self, header: Header, data: &[u8]) {
        self.driver.write_memory(DATA, &header.encode());
        self.driver.write_memory(DATA + 0x1000, data);
        let mut parts = vec![Part::Out(DATA, 44)];
        if !data.is_empty() {
            parts.push(Part::Out(DATA + 0x1000, u32::try_from(data.len()).unwrap()));
        }
        self.driver.request(1, &parts);
    }

    /// Returns the next packet to the guest.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        if let Some(packet) = self.inbox.pop_front() {
            return packet;
        }
        let used = self.driver.wait_used(0);
        self.taken(used)
    }

    /// Returns the packet in a used buffer, and posts another buffer.
    fn taken(&mut self, (head, written): (u16, u32)) -> (Header, Vec<u8>) {
        let descriptor = self
            .driver
            .read_memory(self.driver.rings[0].base + 16 * u64::from(head), 8);
        let at = u64::from_le_bytes(descriptor.try_into().unwrap());
        let header = Header::decode(&self.driver.read_memory(at, 44).try_into().unwrap());
        assert_eq!(written, 44 + header.len);
        let data = self.driver.read_memory(at + 0x100, header.len as usize);
        self.post(1);
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (2, CID, 1));
        (header, data)
    }

    fn expect(&mut self, op: Op, (host, guest): (u32, u32)) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!(
            (header.op, header.src_port, header.dst_port),
            (op, host, guest),
            "{header:?}"
        );
        (header, data)
    }

    fn socket(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("vsock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("vsock_{port}"))).unwrap()
    }

    /// Creates a connection that the guest requests to port 5000.
    fn connected(&mut self) -> (UnixStream, (u32, u32)) {
        let listener = self.listen(5000);
        let ports = (5000, 1025);
        self.send(Op::Request, ports, 0, &[]);
        let (response, _) = self.expect(Op::Response, ports);
        assert_eq!((response.buf_alloc, response.fwd_cnt), (256 * 1024, 0));
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        (stream, ports)
    }
}

fn read_exactly(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    stream.read_exact(&mut data).unwrap();
    data
}

fn read_to_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut data = Vec::new();
    stream.read_to_end(&mut data).unwrap();
    data
}

#[test]
fn a_header_has_the_layout_of_the_specification() {
    let bytes: [u8; 44] = std::array::from_fn(|at| u8::try_from(at).unwrap());
    let header = Header::decode(&bytes);
    assert_eq!(header.encode(), bytes);
    assert_eq!(header.dst_cid, 0x0f0e_0d0c_0b0a_0908);
    assert_eq!(header.op, Op::Unknown(0x1f1e));
    assert_eq!((header.flags, header.fwd_cnt), (0x2322_2120, 0x2b2a_2928));
}

#[test]
fn a_host_connects_to_the_guest() {
    let mut guest = Guest::new();
    assert_eq!(guest.driver.config::<8>(0), CID.to_le_bytes());
    let mut host = guest.socket();
    // The host may send data right after the line, before the guest has answered.
    host.write_all(b"CONNECT 1234\nearly").unwrap();
    let (request, _) = guest.receive();
    assert_eq!((request.op, request.dst_port), (Op::Request, 1234));
    let ports = (request.src_port, 1234);
    guest.send(Op::Response, ports, 0, &[]);
    assert_eq!(guest.expect(Op::Data, ports).1, b"early");
    let mut line = String::new();
    let mut reader = BufReader::new(host.try_clone().unwrap());
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", ports.0));
    guest.send(Op::Data, ports, 0, b"hello host");
    assert_eq!(read_exactly(&mut host, 10), b"hello host");
    // A second connection gets another port.
    let mut second = guest.socket();
    second.write_all(b"CONNECT 1234\n").unwrap();
    assert_ne!(guest.receive().0.src_port, ports.0);
}

#[test]
fn a_guest_that_refuses_a_connection_ends_it() {
    let mut guest = Guest::new();
    let mut host = guest.socket();
    host.write_all(b"CONNECT 99\n").unwrap();
    let ports = (guest.receive().0.src_port, 99);
    guest.send(Op::Reset, ports, 0, &[]);
    assert_eq!(read_to_end(&mut host), b"");
    // A guest that answers with an unexpected packet gets a reset.
    let mut host = guest.socket();
    host.write_all(b"CONNECT 99\n").unwrap();
    let ports = (guest.receive().0.src_port, 99);
    guest.send(Op::Data, ports, 0, b"too early");
    guest.expect(Op::Reset, ports);
    assert_eq!(read_to_end(&mut host), b"");
}

#[test]
fn a_host_that_leaves_before_the_answer_is_forgotten() {
    let mut guest = Guest::new();
    let mut host = guest.socket();
    host.write_all(b"CONNECT 99\n").unwrap();
    let ports = (guest.receive().0.src_port, 99);
    drop(host);
    guest.expect(Op::Reset, ports);
}

#[test]
fn what_is_no_request_for_a_connection_is_closed() {
    let guest = Guest::new();
    for line in [
        "HELLO 1\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "CONNECT -1\n",
        "CONNECT 1",
        "\n",
        "CONNECT 0000000000000000000000000000000000000000000001\n",
    ] {
        let mut host = guest.socket();
        host.write_all(line.as_bytes()).unwrap();
        host.shutdown(Shutdown::Write).unwrap();
        // If the device closes a socket with unread data, the host sees a connection reset instead of an end of file.
        let mut answer = Vec::new();
        let _end = host.read_to_end(&mut answer);
        assert_eq!(answer, b"", "{line:?}");
    }
}

#[test]
fn a_guest_connects_to_a_listener_of_the_host() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.connected();
    guest.send(Op::Data, ports, 0, b"ping");
    assert_eq!(read_exactly(&mut host, 4), b"ping");
    host.write_all(b"pong").unwrap();
    assert_eq!(guest.expect(Op::Data, ports).1, b"pong");
    assert!(guest.driver.device.counters().contains(&("tx_bytes", 4)));
    // No process is listening on port 6000.
    guest.send(Op::Request, (6000, 1026), 0, &[]);
    guest.expect(Op::Reset, (6000, 1026));
    // The guest requests a connection with ports that are in use.
    guest.send(Op::Request, ports, 0, &[]);
    guest.expect(Op::Reset, ports);
    assert_eq!(read_to_end(&mut host), b"");
}

#[test]
fn packets_of_no_connection_are_reset_and_strangers_are_ignored() {
    let mut guest = Guest::new();
    guest.send(Op::Reset, (1, 2), 0, &[]);
    let stranger = Header {
        src_cid: CID + 1,
        dst_cid: 2,
        src_port: 1,
        dst_port: 2,
        len: 0,
        kind: 1,
        op: Op::Data,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    };
    guest.send_as(stranger, &[]);
    guest.send_as(
        Header {
            src_cid: CID,
            dst_cid: 3,
            ..stranger
        },
        &[],
    );
    // Socket type that the device does not offer.
    let datagram = Header {
        src_cid: CID,
        kind: 3,
        op: Op::Request,
        ..stranger
    };
    guest.send_as(datagram, &[]);
    guest.expect(Op::Reset, (2, 1));
    for op in [
        Op::Data,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
        Op::Response,
        Op::Unknown(9),
    ] {
        guest.send(op, (7, 8), 0, &[]);
        guest.expect(Op::Reset, (7, 8));
    }
}
